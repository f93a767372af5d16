"""What TensorRT cannot take in a Q/DQ graph, or takes without gaining from it, said by the name of the node and layer.

Errors are what the parser or the builder refuse, and what it takes and computes otherwise; they are found here because
the library's own words seldom name the cause, and a scale that is not constant ends its process. Warnings are Q/DQ that
it does not fuse: the layer computes what it should, but decodes its weights at every call or multiplies in float.

Rules follow "Working with Quantized Types" of the TensorRT manual (symmetric scales, constant, per tensor, channel or
block) and what TensorRT for RTX 1.7 did with one layer of each kind: fused or not shows in the scratch memory it
reserves, which holds the decoded weight where it is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from diffpress.errors import DiffpressError
from diffpress.export.scopes import module_path

PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
TYPES = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN, ir.DataType.INT4, ir.DataType.FLOAT4E2M1)
INTEGER = ("DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")
CARRIERS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")  # that keep an element's value
BETWEEN = ("Add", "Mul", "Sub", "Div", "Relu", "Sigmoid", "Clip")  # what a graph may have put behind its Q/DQ


@dataclass(frozen=True)
class Finding:
    """One fault of a graph; `layer` is the module path it came from, or the layer whose weight it reads, or empty."""

    node: str
    operator: str
    layer: str
    problem: str
    fatal: bool

    def to_json(self) -> dict[str, object]:
        """As the manifest keeps it."""
        return {**self.__dict__, "text": str(self)}

    def __str__(self) -> str:
        layer = f" of layer {self.layer}" if self.layer and self.layer != self.node else ""
        return f"node '{self.node}' ({self.operator}){layer}: {self.problem}"


def findings(model: ir.Model) -> list[Finding]:
    """Everything that is wrong with the graph's Q/DQ for TensorRT, in its order; both errors and warnings.

    Operators that the parser does not know are not looked for: it names them itself, whatever their domain.
    """
    found = []
    for node in model.graph.all_nodes():
        if node.op_type in INTEGER:
            problem = "TensorRT quantizes by QuantizeLinear and DequantizeLinear with constant scales alone"
            found.append(_finding(node, problem))
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            found += [_finding(node, problem) for problem in _rounding(node)]
        elif node.op_type in PRODUCTS and len(node.inputs) > 1:
            found += [_finding(node, problem, fatal) for problem, fatal in _product(node)]
    return found


def check(model: ir.Model, name: str) -> list[Finding]:
    """Raise `DiffpressError` for the first thing that TensorRT cannot take in graph `name`; returns the warnings."""
    found = findings(model)
    errors = [finding for finding in found if finding.fatal]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise DiffpressError(f"TensorRT cannot take {name}: {errors[0]}{more}")
    return found


def _rounding(node: ir.Node) -> Iterator[str]:
    """Faults of one QuantizeLinear or DequantizeLinear."""
    source, scale = node.inputs[0], node.inputs[1]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if not _constant(scale) and not _own(scale):
        yield "its scale is computed at run time, which TensorRT cannot take: calibrate constant scales"
    elif (values := _values(scale)) is not None and not (values.astype(np.float64) > 0).all():
        yield "its scale has values that are not positive"
    if zero is not None:
        values = _values(zero)
        if not _constant(zero):
            yield "its zero point is computed at run time: TensorRT takes symmetric scales alone"
        elif values is not None and values.astype(np.float64).any():
            yield "its zero point is not 0: TensorRT takes symmetric scales alone"
    kind = _kind(node)
    if kind is not None and kind not in TYPES:
        known = "int8, float8e4m3fn, int4 and float4e2m1"
        # It reads uint8 as int8, and says nothing.
        yield f"it quantizes to {kind.name.lower()}, which TensorRT does not have: use one of {known}"
    block, shape = node.attributes.get_int("block_size", 0) or 0, _shape(source)
    if block and shape is not None:
        axis = node.attributes.get_int("axis", 1) or 0
        axis += len(shape) if axis < 0 else 0
        if axis < len(shape) - 2:
            yield (
                f"its blocks lie along axis {axis} of {len(shape)}, TensorRT knows them along the last two alone: "
                "store the weight as rows and reshape it"
            )
        if isinstance(shape[axis], int) and shape[axis] % block:
            yield f"blocks of {block} do not divide its {shape[axis]} values along axis {axis}: choose one that does"


def _product(node: ir.Node) -> Iterator[tuple[str, bool]]:
    """Faults of a product's Q/DQ, and whether it is refused for them."""
    data, weight = _dequantized(node.inputs[0]), _dequantized(node.inputs[1])
    if weight is None and data is None:
        return
    if weight is None or not _constant(weight.inputs[0]):
        if data is not None and weight is None and _constant(node.inputs[1]):
            yield "its input is quantized but its weight is not, so it multiplies in float", False
        return
    kind, axis = _kind(weight), weight.attributes.get_int("axis", 1) or 0
    blocks = weight.attributes.get_int("block_size", 0)
    scale, shape = _values(weight.inputs[1]), _shape(weight.inputs[0])
    scales = 1 if scale is None else scale.size
    if data is not None:
        other = _kind(data)
        if kind is not None and other is not None and (kind is not other and (blocks or {kind, other} & {*TYPES[:2]})):
            names = f"{kind.name.lower()} by {other.name.lower()}"
            yield f"it multiplies {names}, which TensorRT has no arithmetic for: give both one format", True
            return
        across = _values(data.inputs[1])
        if across is not None and across.size > 1:
            yield "its input has a scale per channel, so it multiplies in float: use one scale for the tensor", False
    elif (between := _between(node.inputs[0])) is not None:
        yield (
            f"'{between.name}' ({between.op_type}) stands between its input's DequantizeLinear and it, so it "
            "multiplies in float",
            False,
        )
    elif node.op_type.startswith("Conv"):
        yield "its weight is quantized but its input is not: TensorRT decodes the weight at every call", False
    elif bool(blocks) != (kind in (ir.DataType.INT4, ir.DataType.FLOAT4E2M1)):
        how = f"{'' if blocks else 'without '}blocks" + (f" of {blocks}" if blocks else "")
        name = "" if kind is None else f"{kind.name.lower()} "
        yield f"its {name}weight {how} and a float input are not fused: TensorRT decodes it at every call", False
    if scales > 1 and not blocks and shape is not None and axis % len(shape) != _channels(node, len(shape)):
        yield f"its weight's scales lie along axis {axis}, not along its outputs, so they are not fused", False


def _channels(node: ir.Node, rank: int) -> int:
    """The axis of a weight's output channels."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    transposed = node.attributes.get_int("transB", 0)
    return 0 if node.op_type == "Gemm" and transposed else rank - 1


def _dequantized(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a value comes from, with nothing but a change of shape behind it."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "DequantizeLinear":
            return node
        if node.op_type not in CARRIERS:
            return None
        value = node.inputs[0]
    return None


def _between(value: ir.Value | None) -> ir.Node | None:
    """An operator between a value and a DequantizeLinear of a computed tensor right in front of it."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in BETWEEN:
        return None
    sources = [_dequantized(source) for source in node.inputs]
    return node if any(source is not None and not _constant(source.inputs[0]) for source in sources) else None


def _kind(node: ir.Node) -> ir.DataType | None:
    """The type that a QuantizeLinear writes or a DequantizeLinear reads; None where the graph does not say."""
    if node.op_type == "DequantizeLinear":
        source = node.inputs[0]
        while source is not None and source.dtype is None and (maker := source.producer()) is not None:
            if maker.op_type == "QuantizeLinear":
                return _kind(maker)
            source = maker.inputs[0] if maker.op_type in CARRIERS else None
        return None if source is None else _dtype(source)
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None:
        return _dtype(zero)
    stated = node.attributes.get_int("output_dtype", 0)
    return ir.DataType(stated) if stated else node.outputs[0].dtype or ir.DataType.UINT8  # ONNX's default


def _dtype(value: ir.Value) -> ir.DataType | None:
    return value.dtype if value.const_value is None else value.const_value.dtype


def _constant(value: ir.Value | None) -> bool:
    """Whether a value depends on no input of the graph, so that the parser can fold it."""
    stack, seen = [value], set()
    while stack:
        entry = stack.pop()
        if entry is None or entry.const_value is not None or id(entry) in seen:
            continue
        seen.add(id(entry))
        node = entry.producer()
        if node is None:
            return False
        stack += node.inputs
    return value is not None


def _own(value: ir.Value | None) -> bool:
    """Whether a scale comes from TensorRT's own operator of dynamic blocks (TRT_FP4DynamicQuantize and the like)."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type.startswith("TRT_"):
            return True
        value = node.inputs[0] if node.inputs else None
    return False


def _values(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a constant that stands in the graph as it is; None of one that is computed."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    tensor = node.attributes.get("value") if node is not None and node.op_type == "Constant" else None
    return tensor.as_tensor().numpy() if tensor is not None else None


def _shape(value: ir.Value | None) -> Sequence[int | ir.SymbolicDim] | None:
    if value is None:
        return None
    if value.const_value is not None:
        return [int(size) for size in value.const_value.shape.numpy()]
    return None if value.shape is None else list(value.shape)


def _finding(node: ir.Node, problem: str, fatal: bool = True) -> Finding:
    name = node.name or str(node.outputs[0].name)
    return Finding(name, node.op_type, module_path(node) or _weighted(node), problem, fatal)


def _weighted(node: ir.Node) -> str:
    """The layer of the constant that a node reads, by its name: "to_q.weight_int8" is to_q's."""
    readers = [node]
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        readers += [usage.node for usage in node.outputs[0].uses()]
    for reader in readers:
        for value in reader.inputs:
            weight = _dequantized(value)
            named = weight.inputs[0] if weight is not None else value
            if named is not None and named.const_value is not None and ".weight" in (named.name or ""):
                return str(named.name).rpartition(".weight")[0]
    return ""
