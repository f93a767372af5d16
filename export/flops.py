"""Arithmetic and traffic of a graph, counted from its products (Conv, MatMul, Gemm): what a roofline is made of.

Williams, Waterman and Patterson (2009), "Roofline: an insightful visual performance model": no run is faster than its
operations over the peak of their type, nor than its bytes over the memory's bandwidth. Bytes are the least that must
move: every stored weight once, every product's inputs and output once, with all between products fused into them, and
attention without its matrix of weights (Dao et al. 2022, FlashAttention).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from diffpress.errors import DiffpressError

PRODUCTS = ("Conv", "MatMul", "Gemm")
KINDS = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
KINDS |= {ir.DataType.INT8: "int8", ir.DataType.UINT8: "int8", ir.DataType.FLOAT8E4M3FN: "fp8"}
# In what a backend computes and moves the floats of 32 bits that a graph holds, and bytes of each.
FLOAT_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
_SHAPING = ("Reshape", "Transpose", "Flatten", "Unsqueeze", "Squeeze", "Identity", "Cast")  # values stay what they are
_BETWEEN = (*_SHAPING, "Mul", "Div", "Add")  # that attention may have between its first product and softmax


@dataclass(frozen=True)
class Product:
    """One Conv, MatMul or Gemm; a multiplication and its addition are two operations."""

    name: str
    op: str
    kind: str  # of the arithmetic: "fp32", "fp16", "int8", ...; weights alone in fewer bits do not change it
    flops: int
    weight_bytes: int  # as stored
    activation_bytes: int  # read and written


@dataclass(frozen=True)
class Work:
    """What a graph does once: operations by the type of their arithmetic, and the least bytes that move."""

    flops: Mapping[str, int]
    weight_bytes: int
    activation_bytes: int
    products: tuple[Product, ...] = field(repr=False, default=())

    @property
    def operations(self) -> int:
        """Of all types together."""
        return sum(self.flops.values())

    @property
    def bytes(self) -> int:
        """Of weights and activations."""
        return self.weight_bytes + self.activation_bytes


def count(source: Path | ir.Model, batch: int, precision: str = "fp32") -> Work:
    """Count a graph that runs with `batch` rows; a file's weights are not read.

    `precision` is what a backend makes of the graph's floats of 32 bits, one of FLOAT_BYTES. Raises `DiffpressError`
    for a graph whose shapes cannot be inferred, or with control flow.
    """
    found = tuple(products(source, batch, precision))
    flops = Counter[str]()
    for product in found:
        flops[product.kind] += product.flops
    return Work(
        dict(flops),
        sum(product.weight_bytes for product in found),
        sum(product.activation_bytes for product in found),
        found,
    )


def products(source: Path | ir.Model, batch: int, precision: str = "fp32") -> Iterable[Product]:
    """Every product of a graph, in order; see `count`."""
    model = _inferred(ir.load(source) if isinstance(source, Path) else source.clone(), batch)
    weighed: set[str] = set()  # a weight that two products share is read once
    for node in model.graph:
        if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in _fields(node)):
            raise DiffpressError(f"node '{node.name}' ({node.op_type}) has graphs of its own: its work is not counted")
        if node.op_type in PRODUCTS and node.domain == "":
            yield _product(node, weighed, precision)


def _inferred(model: ir.Model, batch: int) -> ir.Model:
    """The model with a batch of `batch`, and the shape of every value."""
    for value in model.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape([size if isinstance(size, int) else batch for size in value.shape])
    for node in model.graph:
        for value in node.outputs:
            value.shape = None  # those of the export name the batch, and rewritten ones may have none
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    return model


def _product(node: ir.Node, weighed: set[str], precision: str) -> Product:
    left, right, output = node.inputs[0], node.inputs[1], node.outputs[0]
    assert left is not None and right is not None
    out = _sizes(output, node)
    if node.op_type == "Conv":
        depth = prod(_sizes(right, node)[1:])  # [out, in / groups, kernel ...]
    elif node.op_type == "Gemm" and "transA" in node.attributes and node.attributes["transA"].as_int():
        depth = _sizes(left, node)[0]
    else:
        depth = _sizes(left, node)[-1]
    stored = [_weight(value) for value in (left, right)]
    weights = moved = 0
    for value, weight in zip((left, right), stored, strict=True):
        if weight is None:
            moved += 0 if _made_by_softmax(value) else _bytes(value, _grid(value), node, precision)
        elif weight.name is not None and weight.name not in weighed:
            assert weight.const_value is not None
            weighed.add(weight.name)
            weights += _as_computed(weight.const_value.nbytes, weight.const_value.dtype, precision)
    if not (stored[0] is None and stored[1] is None and _feeds_softmax(output)):
        moved += _bytes(output, output.dtype, node, precision)
    kinds = {_grid(value) for value in (left, right)}
    # Both sides on the same grid of 8 bits: then the product is; else the types in the graph say it.
    grid = next(iter(kinds)) if len(kinds) == 1 else output.dtype
    kind = KINDS.get(grid or ir.DataType.FLOAT)
    if kind is None:
        raise DiffpressError(f"node '{node.name}' multiplies {grid}: its work is not counted")
    kind = precision if kind == "fp32" else kind
    return Product(node.name or output.name or "", node.op_type, kind, 2 * prod(out) * depth, weights, moved)


def _grid(value: ir.Value) -> ir.DataType | None:
    """The type in which a value arrives: that under its DequantizeLinear where it has one."""
    while (node := value.producer()) is not None and node.op_type in _SHAPING and node.inputs[0] is not None:
        value = node.inputs[0]
    if node is not None and node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
        stored = node.inputs[0].dtype
        # Four bits are decoded before they are multiplied: no target has products of them.
        return stored if stored in KINDS else value.dtype
    return value.dtype


def _weight(value: ir.Value) -> ir.Value | None:
    """The initializer that a value comes from, as it is stored; None where it is computed from inputs."""
    while value.const_value is None:
        node = value.producer()
        if node is None or node.op_type not in (*_SHAPING, "DequantizeLinear") or node.inputs[0] is None:
            return None
        value = node.inputs[0]
    return value


def _made_by_softmax(value: ir.Value) -> bool:
    while (node := value.producer()) is not None and node.op_type in _SHAPING and node.inputs[0] is not None:
        value = node.inputs[0]
    return node is not None and node.op_type == "Softmax"


def _feeds_softmax(value: ir.Value) -> bool:
    users = [use.node for use in value.uses()]
    if len(users) != 1 or value.is_graph_output():
        return False
    return users[0].op_type == "Softmax" or (users[0].op_type in _BETWEEN and _feeds_softmax(users[0].outputs[0]))


def _bytes(value: ir.Value, kind: ir.DataType | None, node: ir.Node, precision: str) -> int:
    kind = kind or ir.DataType.FLOAT
    return _as_computed(int(prod(_sizes(value, node)) * kind.itemsize), kind, precision)


def _as_computed(stored: int, kind: ir.DataType, precision: str) -> int:
    """Bytes that move of `stored` ones of a type."""
    return stored * FLOAT_BYTES[precision] // 4 if kind == ir.DataType.FLOAT else stored


def _sizes(value: ir.Value, node: ir.Node) -> list[int]:
    sizes = [] if value.shape is None else list(value.shape)
    if value.shape is None or not all(isinstance(size, int) for size in sizes):
        raise DiffpressError(f"node '{node.name}' ({node.op_type}): the shape of '{value.name}' cannot be inferred")
    return [int(size) for size in sizes]  # type: ignore[arg-type]  # as checked


def _fields(node: ir.Node) -> Iterable[ir.Attr]:
    return node.attributes.values()
