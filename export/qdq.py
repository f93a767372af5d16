"""Writes a quantization plan into an ONNX graph as standard Q/DQ operators.

Weights are stored in their format behind a DequantizeLinear, so the file shrinks. Layer inputs get QuantizeLinear and
DequantizeLinear; layers that share an input and a scale share the pair. Zero points are 0 and scales are constants, as
TensorRT demands.

Where every step has its own scale s[step], the graph keeps one scale s0 and looks up r = s0 / s[step] by the timestep:

    x -> Mul(r) -> Q(s0) -> DQ(s0) -> layer without bias -> Mul(1 / r) -> Add(bias)

which is quantization with s[step], exactly where r is a power of two. A graph whose steps run together has a timestep,
and so an r, for each row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch

from diffpress.compress.numerics.formats import get, quantize
from diffpress.errors import DiffpressError
from diffpress.export.scopes import module_path
from diffpress.plan import LayerQuant

TYPES = {
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "e4m3": ir.DataType.FLOAT8E4M3FN,
}
OPSETS = {"int8": 20, "e4m3": 20, "int4": 21}  # that know the type


Packed = dict[tuple[str, bool], ir.TensorProtocol]  # weights by layer, and whether they are transposed


def insert(
    model: ir.Model,
    quantization: Mapping[str, LayerQuant],
    timesteps: Sequence[float] = (),
    prefix: str = "unet.",
    packed: Packed | None = None,
) -> set[str]:
    """Quantize the layers of `quantization` that `model` contains; the names of those it did.

    Every layer must be deployable (`export.deploy`); `timesteps` is the schedule that per-step scales belong to. A
    graph of a cached step holds few of the layers, so absence is not an error; a weight that cannot be read is.

    Weights are rounded when they are written, from what they are then. Graphs of one network may share them: `packed`
    holds those that earlier ones had.
    """
    graph = _Graph(model, tuple(timesteps), {} if packed is None else packed)
    opset = model.graph.opset_imports[""]
    done: set[str] = set()
    for node in list(model.graph):
        if node.op_type not in ("Conv", "MatMul", "Gemm") or len(node.inputs) < 2:
            continue
        name = module_path(node).removeprefix(prefix)
        weight = node.inputs[1]
        if name not in quantization or weight is None or (weight.const_value is None and name not in graph.weights):
            continue
        layer = quantization[name]
        if name not in graph.weights:
            graph.weights[name] = _stored(graph, node, name, weight, layer)
            opset = max(opset, OPSETS[layer.weight_format], OPSETS[layer.input_format or "int8"])
        node.replace_input_with(1, graph.weights[name])
        if layer.input_scale is not None:
            _round_input(graph, node, layer)
        elif layer.multiplier is not None:
            node.replace_input_with(0, _scaled(graph, node, layer, None))
        done.add(name)
    model.graph.opset_imports[""] = opset
    return done


@dataclass
class _Graph:
    """What is shared between the layers of one graph."""

    model: ir.Model
    timesteps: tuple[float, ...]
    packed: Packed
    weights: dict[str, ir.Value] = field(default_factory=dict)
    shared: dict[tuple[str, ...], ir.Value] = field(default_factory=dict)

    def constant(self, name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
        """An initializer; the first of a name wins."""
        if name in self.model.graph.initializers:
            return self.model.graph.initializers[name]
        tensor = ir.tensor(array, name=name) if isinstance(array, np.ndarray) else array
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )  # fmt: skip
        self.model.graph.register_initializer(value)
        return value

    def before(
        self, user: ir.Node, op: str, inputs: Sequence[ir.Value], name: str, like: ir.Value | None = None, **fields: int
    ) -> ir.Value:
        """A node in front of `user`; its output is typed as `like`."""
        node = ir.node(op, inputs=list(inputs), attributes=fields, name=name)
        node.outputs[0].name = f"{name}_out"
        if like is not None:
            node.outputs[0].type, node.outputs[0].shape = like.type, like.shape
        self.model.graph.insert_before(user, node)
        return node.outputs[0]


def _stored(graph: _Graph, user: ir.Node, name: str, weight: ir.Value, layer: LayerQuant) -> ir.Value:
    """The weight in its format behind a DequantizeLinear; the float one leaves the graph with its last user."""
    tensor = weight.const_value
    assert tensor is not None
    transposed = user.op_type == "MatMul" or (user.op_type == "Gemm" and not _flag(user, "transB"))
    sizes = tuple(reversed(tensor.shape.numpy())) if transposed else tensor.shape.numpy()  # [out, in, ...]
    scale = torch.from_numpy(layer.weight_scale)
    if len(scale) != sizes[0]:
        raise DiffpressError(f"layer {name}: weight {sizes} does not fit {len(scale)} scales")
    fields = {"axis": 1 if transposed else 0}
    flat = scale.ndim == 2 and len(sizes) > 2
    shape = sizes
    if scale.ndim == 2:
        # TensorRT knows blocks along the last axes alone: a kernel [out, in, kh, kw] is stored as rows [out, in kh kw].
        shape = (sizes[0], math.prod(sizes[1:]))
        fields = {"axis": 0 if transposed else 1, "block_size": shape[1] // scale.shape[1]}
    shape = tuple(reversed(shape)) if transposed else shape
    kind = TYPES[layer.weight_format]

    def packed() -> ir.TensorProtocol:
        array = torch.from_numpy(np.array(tensor.numpy()))
        array = array.T if transposed else array
        if layer.multiplier is not None:
            array = array / torch.from_numpy(layer.multiplier).reshape(1, -1, *[1] * (array.ndim - 2))
        grid = quantize(array, scale, get(layer.weight_format)).reshape(len(array), -1)
        grid = (grid.T if transposed else grid).reshape(shape)
        return ir.tensor(grid.contiguous().numpy().astype(kind.numpy()), dtype=kind)

    key = name, transposed
    if key not in graph.packed:
        graph.packed[key] = ir.LazyTensor(packed, kind, ir.Shape(shape), name=f"{name}.weight_{kind.name.lower()}")
    by_out = scale.T if transposed and scale.ndim == 2 else scale
    inputs = [
        graph.constant(f"{name}.weight_{kind.name.lower()}", graph.packed[key]),
        graph.constant(f"{name}.weight_scale", by_out.contiguous().numpy().astype(np.float32)),
    ]
    value = graph.before(user, "DequantizeLinear", inputs, f"{name}.weight_dq", None if flat else weight, **fields)
    if not flat:
        return value
    value.type, value.shape = weight.type, ir.Shape(shape)
    kernel = graph.constant(f"{name}.weight_shape", np.array(sizes, np.int64))
    return graph.before(user, "Reshape", [value, kernel], f"{name}.weight_rows", weight)


def _round_input(graph: _Graph, node: ir.Node, layer: LayerQuant) -> None:
    """Q and DQ on the layer's input, and for scales by step the factors around it."""
    assert layer.input_scale is not None
    assert layer.input_format is not None
    scales = layer.input_scale.astype(np.float32)
    # The middle of the range: r stays near one, so half precision holds it.
    base = np.float32(scales[0] if len(scales) == 1 else np.exp(np.log(scales.astype(np.float64)).mean()))
    stepped = len(scales) > 1
    source = _scaled(graph, node, layer, base / scales if stepped else None)
    key = (source.name or "", layer.input_format, f"{base:.9g}")
    if key not in graph.shared:
        kind = TYPES[layer.input_format]
        stem = f"{source.name}_{base:.8g}"
        zero = graph.constant(
            f"zero_point_{kind.name.lower()}", ir.tensor(np.array(0).astype(kind.numpy()), dtype=kind)
        )
        pair = [graph.constant(f"{stem}_scale", np.array(base, np.float32)), zero]
        q = graph.before(node, "QuantizeLinear", [source, *pair], f"{stem}_q")
        q.dtype, q.shape = kind, source.shape
        graph.shared[key] = graph.before(node, "DequantizeLinear", [q, *pair], f"{stem}_dq", source)
    node.replace_input_with(0, graph.shared[key])
    if stepped:
        _undo_after(graph, node, scales / base)


def _scaled(graph: _Graph, node: ir.Node, layer: LayerQuant, by_step: np.ndarray | None) -> ir.Value:
    """The layer's input times its multiplier and its factor of the step, where there are any."""
    source = node.inputs[0]
    assert source is not None
    if layer.multiplier is None and by_step is None:
        return source
    parts = [part.tobytes().hex() for part in (layer.multiplier, by_step) if part is not None]
    key = (source.name or "", "scaled", *parts)
    if key in graph.shared:
        return graph.shared[key]
    stem = f"{source.name}_by{len(graph.shared)}"
    factor: ir.Value | None = None
    if layer.multiplier is not None:
        shape = (-1, 1, 1) if node.op_type == "Conv" else (-1,)
        factor = graph.constant(f"{stem}_multiplier", layer.multiplier.astype(np.float32).reshape(shape))
    if by_step is not None:
        looked_up = _at_step(graph, node, by_step, f"{stem}_step", source)
        factor = looked_up if factor is None else graph.before(node, "Mul", [factor, looked_up], f"{stem}_factor")
    assert factor is not None
    graph.shared[key] = graph.before(node, "Mul", [source, factor], f"{stem}_mul", source)
    return graph.shared[key]


def _at_step(graph: _Graph, user: ir.Node, values: np.ndarray, name: str, like: ir.Value) -> ir.Value:
    """The value [1] of the step the graph is called for; `values` [steps].

    Where the graph takes a timestep for each row, [N, 1, ...] with as many dimensions as `like` [N, ...] has.
    """
    if len(values) != len(graph.timesteps):
        raise DiffpressError(f"{len(values)} scales by step do not fit a schedule of {len(graph.timesteps)} calls")
    if ("row",) not in graph.shared:
        timestep = _timestep(graph)
        first = graph.model.graph[0]  # every layer comes after it
        # A column, because TensorRT's ArgMin wants two dimensions; the row that comes out is [1].
        schedule = graph.constant("schedule", np.array(graph.timesteps, np.float32).reshape(-1, 1))
        away = graph.before(first, "Sub", [schedule, timestep], "schedule_away")
        distance = graph.before(first, "Abs", [away], "schedule_distance")
        graph.shared["row",] = graph.before(first, "ArgMin", [distance], "schedule_row", axis=0, keepdims=0)
    table = graph.constant(f"{name}_table", values.astype(np.float32))
    found = graph.before(user, "Gather", [table, graph.shared["row",]], name, axis=0)
    shape = _timestep(graph).shape
    if shape is None or isinstance(shape[0], int):
        return found
    assert like.shape is not None  # the exporter writes them all
    rank = len(like.shape)
    by_row = graph.constant(f"by_row_{rank}", np.array([-1, *[1] * (rank - 1)], np.int64))
    return graph.before(user, "Reshape", [found, by_row], f"{name}_rows")


def _timestep(graph: _Graph) -> ir.Value:
    return next(value for value in graph.model.graph.inputs if value.name == "timestep")


def _undo_after(graph: _Graph, node: ir.Node, by_step: np.ndarray) -> None:
    """Multiply the layer's product by its factor of the step, before its bias is added."""
    output = node.outputs[0]
    users = [(usage.node, usage.idx) for usage in output.uses()]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    name = f"{node.name}_unstep"
    following = _next(graph.model, node)
    looked_up = _at_step(graph, following, by_step, name, output)
    value = graph.before(following, "Mul", [output, looked_up], f"{name}_mul", output)
    if bias is not None:
        node.resize_inputs(2)
        if node.op_type == "Conv":
            shape = graph.constant("channels_first", np.array([-1, 1, 1], np.int64))
            bias = graph.before(following, "Reshape", [bias, shape], f"{name}_bias")
        value = graph.before(following, "Add", [value, bias], f"{name}_add", output)
    for user, index in users:
        user.replace_input_with(index, value)
    outputs = graph.model.graph.outputs
    for index in [place for place, other in enumerate(outputs) if other is output]:  # a feature that is handed out
        outputs[index] = value
        output.name, value.name = f"{name}_before", output.name


def _next(model: ir.Model, node: ir.Node) -> ir.Node:
    nodes = list(model.graph)
    return nodes[nodes.index(node) + 1]


def _flag(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else attribute.as_int()
