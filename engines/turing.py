"""Turing multiplies matrices in half precision or in integers: TensorRT for RTX refuses float ones for it.

So its networks get casts around every float product, and around softmax, which the library fuses with its products.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

TARGETS = ("sm75",)


def multiply_in_half(trt: ModuleType, network: Any) -> None:
    """Products of matrices and softmax of a parsed `network` in half precision; the rest of it stays in float."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]  # in the order of execution
    readers: dict[str, list[tuple[Any, int]]] = {}
    for layer in layers:
        for index in range(layer.num_inputs):
            if (tensor := layer.get_input(index)) is not None:
                readers.setdefault(tensor.name, []).append((layer, index))
    kinds = (trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.SOFTMAX)
    halves: dict[str, Any] = {}  # float tensor to the same in half precision
    for layer in layers:
        if layer.type not in kinds or layer.get_output(0).dtype != trt.DataType.FLOAT:
            continue
        output, name = layer.get_output(0), layer.get_output(0).name
        for index in range(layer.num_inputs):
            source = layer.get_input(index)
            if source.name not in halves:
                halves[source.name] = network.add_cast(source, trt.DataType.HALF).get_output(0)
            layer.set_input(index, halves[source.name])
        back = network.add_cast(output, trt.DataType.FLOAT).get_output(0)
        halves[back.name] = output
        for reader, index in readers.get(name, ()):
            reader.set_input(index, back)
        if output.is_network_output:
            network.unmark_output(output)
            output.name = f"{name}_half"
            back.name = name
            network.mark_output(back)
