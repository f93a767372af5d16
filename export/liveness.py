"""How many bytes a graph needs at once: its weights, and the peak of the tensors that are alive.

A tensor lives from the node that makes it to its last reader, in the graph's own order of execution. That is what an
engine without workspaces and without fusion would need; TensorRT for RTX reserves 8 MB and more on top, and where it
fuses attention, whose matrix of weights is then never whole, it needs less. Of a U-Net of Stable Diffusion 1.5's size
(512x512 pixels, two rows, int8 with FP32 for the rest) this says 2.20 GB and 945.4 MB of weights, where the builder
counts 2.28 GB and 944.9 MB.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes import common

from diffpress.engines.memory import Need

VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")  # name the same bytes anew


def need(model: ir.Model, batch: int) -> Need:
    """What one graph needs at `batch` rows; inputs whose first dimension is fixed keep it."""
    weights = sum(value.const_value.nbytes for value in _constants(model) if value.const_value is not None)
    return Need(weights, peak(model, batch))


def peak(model: ir.Model, batch: int) -> int:
    """The most bytes of tensors that are alive at once, constants left out, with `batch` for open dimensions."""
    sized = _concrete(model, batch)
    nodes = list(sized.graph)
    roots: dict[ir.Value, ir.Value] = {}  # a view to the tensor whose bytes it names
    constant = set(sized.graph.initializers.values())
    for node in nodes:
        source = node.inputs[0] if node.inputs else None
        # A decoded weight is part of the product that reads it, a decoded input is still in its 8 bits there.
        if (node.op_type in VIEWS or node.op_type == "DequantizeLinear") and source is not None:
            roots[node.outputs[0]] = roots.get(source, source)
        if all(value is None or roots.get(value, value) in constant for value in node.inputs):
            constant.update(roots.get(output, output) for output in node.outputs)
    last: dict[ir.Value, int] = {}
    for index, node in enumerate(nodes):
        for value in (*node.inputs, *node.outputs, *_captured(node)):
            if value is not None:
                last[roots.get(value, value)] = index
    for value in sized.graph.outputs:
        last[roots.get(value, value)] = len(nodes)
    alive = sum(_size(value, batch) for value in sized.graph.inputs)
    most = alive
    ends: dict[int, list[ir.Value]] = {}
    for value, index in last.items():
        ends.setdefault(index, []).append(value)
    for index, node in enumerate(nodes):
        alive += sum(_size(value, batch) for value in node.outputs if value not in roots and value not in constant)
        most = max(most, alive + _inner(node, batch))
        alive -= sum(
            _size(value, batch)
            for value in ends.get(index, ())
            if value not in constant and not value.is_graph_input()  # whoever calls keeps the inputs
        )
    return most


def _concrete(model: ir.Model, batch: int) -> ir.Model:
    """A copy whose shapes are inferred with `batch` for every open dimension of the inputs."""
    copy = model.clone()
    annotated = {}
    for node in copy.graph:
        for value in node.outputs:
            annotated[value] = value.shape
            if not value.is_graph_output():
                value.shape = None
    for value in (*copy.graph.inputs, *copy.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([size if isinstance(size, int) else batch for size in value.shape])
    logger = logging.getLogger("onnx_ir.passes.common.shape_inference")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what it cannot infer keeps the exporter's shape
    try:
        common.ShapeInferencePass(check_type=False, strict_mode=False)(copy)
    finally:
        logger.setLevel(level)
    for value, shape in annotated.items():
        if value.shape is None:
            value.shape = shape
    return copy


def _size(value: ir.Value, batch: int) -> int:
    if value.shape is None or value.type is None:
        return 0
    bits = value.dtype.bitwidth if value.dtype is not None and value.dtype != ir.DataType.STRING else 32
    return math.prod(size if isinstance(size, int) else batch for size in value.shape) * bits // 8


def _captured(node: ir.Node) -> Iterator[ir.Value]:
    """Values of the outer graph that a node's subgraphs read."""
    for graph in _subgraphs(node):
        for inner in graph.all_nodes():
            yield from (value for value in inner.inputs if value is not None)


def _inner(node: ir.Node, batch: int) -> int:
    """Bytes inside the largest of a node's subgraphs, all of its tensors together."""
    sizes = [
        sum(_size(value, batch) for inner in graph.all_nodes() for value in inner.outputs) for graph in _subgraphs(node)
    ]
    return max(sizes, default=0)


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()


def _constants(model: ir.Model) -> Iterator[ir.Value]:
    """Every initializer once, whatever the number of graphs that hold it."""
    for graph in model.graphs():
        yield from graph.initializers.values()
