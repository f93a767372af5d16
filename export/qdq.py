"""Writes a quantization plan into an ONNX graph as standard Q/DQ operators.

Weights are stored as INT8 with a DequantizeLinear only, so the file shrinks. Layer inputs get QuantizeLinear and
DequantizeLinear; layers that share an input and a scale share the pair. Zero points are 0, as TensorRT demands.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch

from diffpress.compress.numerics.integer import quantize
from diffpress.errors import DiffpressError
from diffpress.export.graphs import module_path
from diffpress.plan import LayerQuant


def insert(model: ir.Model, quantization: Mapping[str, LayerQuant], prefix: str = "unet.") -> set[str]:
    """Quantize the layers of `quantization` that `model` contains; the names of those it did.

    A graph of a cached step holds few of them, so absence is not an error; a weight that cannot be read is.
    """
    shared: dict[tuple[str, float], ir.Value] = {}
    weights: dict[str, ir.Value] = {}
    done: set[str] = set()
    for node in list(model.graph):
        if node.op_type not in ("Conv", "MatMul", "Gemm") or len(node.inputs) < 2:
            continue
        name = module_path(node).removeprefix(prefix)
        weight = node.inputs[1]
        if name not in quantization or weight is None or weight.const_value is None:
            continue
        layer = quantization[name]
        if name not in weights:
            weights[name] = _stored(model, node, name, weight, layer)
        node.replace_input_with(1, weights[name])
        source = node.inputs[0]
        assert source is not None
        key = (source.name or "", layer.input_scale)
        if key not in shared:
            shared[key] = _rounded(model, node, source, layer.input_scale)
        node.replace_input_with(0, shared[key])
        done.add(name)
    return done


def _constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=name),
    )
    model.graph.register_initializer(value)
    return value


def _stored(model: ir.Model, user: ir.Node, name: str, weight: ir.Value, layer: LayerQuant) -> ir.Value:
    """The INT8 weight behind a DequantizeLinear; the float one leaves the graph with its last user."""
    assert weight.const_value is not None
    array = weight.const_value.numpy()
    transposed = user.op_type == "MatMul" or (user.op_type == "Gemm" and not _flag(user, "transB"))
    axis = 1 if transposed else 0  # of the output channels: [in, out] in a MatMul, [out, in, ...] else
    if array.shape[axis] != len(layer.weight_scale):
        raise DiffpressError(f"layer {name}: weight {array.shape} does not fit {len(layer.weight_scale)} scales")
    scale = torch.from_numpy(layer.weight_scale)
    integers = quantize(torch.from_numpy(np.array(array)), scale, axis=axis).to(torch.int8).numpy()
    inputs = [
        _constant(model, f"{name}.weight_int8", integers),
        _constant(model, f"{name}.weight_scale", layer.weight_scale),
    ]
    node = ir.node("DequantizeLinear", inputs=inputs, attributes={"axis": axis}, name=f"{name}.weight_dq")
    _typed(node, weight, f"{name}.weight_dequantized")
    model.graph.insert_before(user, node)
    return node.outputs[0]


def _rounded(model: ir.Model, user: ir.Node, source: ir.Value, scale: float) -> ir.Value:
    stem = f"{source.name}_{scale:.8g}"
    scale_value = _constant(model, f"{stem}_scale", np.array(scale, np.float32))
    zero = model.graph.initializers.get("zero_point_int8") or _constant(model, "zero_point_int8", np.array(0, np.int8))
    q = ir.node("QuantizeLinear", inputs=[source, scale_value, zero], name=f"{stem}_q")
    q.outputs[0].name = f"{stem}_int8"
    q.outputs[0].dtype, q.outputs[0].shape = ir.DataType.INT8, source.shape
    dq = ir.node("DequantizeLinear", inputs=[q.outputs[0], scale_value, zero], name=f"{stem}_dq")
    _typed(dq, source, f"{stem}_dequantized")
    model.graph.insert_before(user, [q, dq])
    return dq.outputs[0]


def _typed(node: ir.Node, like: ir.Value, name: str) -> None:
    node.outputs[0].name = name
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, like.shape


def _flag(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else attribute.as_int()
