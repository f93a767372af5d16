"""How much of a GPU's memory a bundle's engines take: weights, activations, feature buffers.

Weights are the bytes that a graph stores. Activations are the peak over the graph's order of execution of the tensors
that are alive, a tensor living from the node that makes it to its last reader. That is what an engine without scratch
memory and without fusion would need: fused attention takes less (its matrix of weights is never whole), a kernel's
workspace comes on top (TensorRT for RTX reserves about 8 MB and more).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from diffpress.export.targets import Target

GB = 10**9
USABLE = 0.9  # of a card's memory; its display and the driver's context take the rest
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")  # name the same bytes anew


@dataclass(frozen=True)
class Need:
    """Bytes that one engine needs at its largest batch; `budget` of its weights stay on the device, None for all."""

    weights: int
    activations: int
    budget: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """What all engines of a target take together, in bytes.

    Weights and activations are sums, since each engine's context holds its own; features are shared.
    """

    target: str
    available: int
    features: int
    engines: Mapping[str, Need]

    @property
    def weights(self) -> int:
        """Of all engines, on the device or streamed."""
        return sum(need.weights for need in self.engines.values())

    @property
    def activations(self) -> int:
        """Of all engines."""
        return sum(need.activations for need in self.engines.values())

    @property
    def total(self) -> int:
        """With all weights on the device."""
        return self.weights + self.activations + self.features

    @property
    def streaming(self) -> bool:
        """Whether some weights have to stay in the host's memory and be streamed."""
        return any(need.budget is not None for need in self.engines.values())

    @property
    def fits(self) -> bool:
        """Whether it runs at all, with its weights streamed where they must be."""
        return self.activations + self.features < self.available

    def to_json(self) -> dict[str, Any]:
        """As the manifest keeps it, in bytes."""
        return {
            "target": self.target,
            "available": self.available,
            "weights": self.weights,
            "activations": self.activations,
            "features": self.features,
            "total": self.total,
            "weight_streaming": self.streaming,
            "fits": self.fits,
            "engines": {name: dict(need.__dict__) for name, need in self.engines.items()},
        }

    def line(self) -> str:
        """For people."""
        sizes = {"weights": self.weights, "activations": self.activations, "features": self.features}
        parts = " + ".join(f"{name} {_megabytes(size)}" for name, size in sizes.items())
        verdict = "fits" if not self.streaming else "fits with its weights streamed from the host's memory"
        if not self.fits:
            verdict = "does not fit even with its weights streamed: build for fewer images at once or a larger card"
        return f"{self.target}: {parts} = {_megabytes(self.total)} of {_megabytes(self.available)}, {verdict}"


def plan(target: Target, needs: Mapping[str, Need], features: int, memory_gb: float | None = None) -> MemoryPlan:
    """What the engines `needs` take on `target`; `memory_gb` is the card's where it is not the target's own.

    Where that is too much, weights are streamed: what remains for them is shared out by their sizes.
    """
    available = int((target.memory_gb if memory_gb is None else memory_gb) * GB * USABLE)
    made = MemoryPlan(target.name, available, features, dict(needs))
    if made.total <= available:
        return made
    left = max(0, available - made.activations - features)
    shared = {
        name: Need(need.weights, need.activations, left * need.weights // max(made.weights, 1))
        for name, need in needs.items()
    }
    return MemoryPlan(target.name, available, features, shared)


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


def features(shapes: Mapping[str, Sequence[int]], rows: int, doubled: Sequence[str] = ()) -> int:
    """Bytes of the feature buffers between steps, in FP32; `doubled` keep an earlier value besides the last."""
    return sum(4 * rows * math.prod(shape) * (2 if name in doubled else 1) for name, shape in shapes.items())


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


def _megabytes(size: int) -> str:
    return f"{size / GB:.2f} GB" if size >= GB else f"{size / 1e6:.1f} MB"
