"""ONNX Runtime's dialect of a Q/DQ graph, for its CPU provider: the same numbers from operators that it has fast.

Its CPU provider fuses Q/DQ around a convolution only where the output is quantized too, and computes int8 x int8
several times slower than uint8 x int8. So every layer with int8 weights and one int8 scale becomes

    x -> QuantizeLinear to uint8, zero point 128 -> [N, H W, C] -> MatMulIntegerToFloat(weight [k k C, O]) + bias

where a convolution first gathers its kernel's places (im2col, in one byte per value), and attention becomes one
MultiHeadAttention, which never holds the whole matrix of weights. Symmetric int8 and uint8 around 128 are the same
grid, and the int8 weights keep their bytes, so that both graphs share one data file; their transposition to what the
product takes is folded when the graph is opened.

Other formats keep their Q/DQ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from diffpress.export.attention import CONTRIB, fuse_attention, made_by, permutation

ZERO = 128  # of uint8, where int8 has 0
CHANNELS_LAST, CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


def onnxruntime(model: ir.Model) -> ir.Model | None:
    """A copy of the finished Q/DQ graph `model` in ONNX Runtime's dialect; None where it has no int8 layer."""
    model = model.clone()
    graph = _Graph(model.graph)
    for node in list(model.graph):
        layer = _matched(node)
        if layer is not None:
            (_convolution if node.op_type == "Conv" else _linear)(graph, layer)
    if not graph.layers:
        return None
    fuse_attention(model)
    common.RemoveUnusedNodesPass()(model)
    model.graph.opset_imports.setdefault(CONTRIB, 1)
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape, value.type = None, None  # the library infers them; they are a sixth of the file
    return model


@dataclass(frozen=True)
class _Layer:
    """A Conv, MatMul or Gemm of int8 by int8."""

    node: ir.Node
    source: ir.Value  # its input before QuantizeLinear
    scale: ir.Value  # [] of the input
    weight: ir.Value  # int8, constant
    weight_scale: ir.Value  # [out]
    bias: ir.Value | None  # [out], constant
    output: ir.Value


def _matched(node: ir.Node) -> _Layer | None:
    if node.op_type not in ("Conv", "MatMul", "Gemm") or node.domain or len(node.inputs) < 2:
        return None
    activation, weight = made_by(node.inputs[0], "DequantizeLinear"), made_by(node.inputs[1], "DequantizeLinear")
    rounded = made_by(activation.inputs[0], "QuantizeLinear") if activation is not None else None
    if rounded is None or weight is None or not _symmetric(rounded) or len(weight.inputs) > 2:
        return None
    source, scale = rounded.inputs[0], rounded.inputs[1]
    stored, weight_scale = weight.inputs[0], weight.inputs[1]
    assert source is not None and scale is not None and stored is not None and weight_scale is not None
    if stored.const_value is None or stored.dtype != ir.DataType.INT8 or len(weight_scale.shape or ()) != 1:
        return None
    if node.op_type == "Conv" and not _plain_convolution(node, source):
        return None
    if node.op_type == "Gemm" and not _plain_gemm(node):
        return None
    if node.op_type == "MatMul" and len(stored.shape or ()) != 2:
        return None
    bias, output = (node.inputs[2] if len(node.inputs) > 2 else None), node.outputs[0]
    if node.op_type == "MatMul":
        bias, output = _added(output, stored.shape[-1]) if stored.shape is not None else (None, output)
    elif bias is not None and bias.const_value is None:
        return None
    return _Layer(node, source, scale, stored, weight_scale, bias, output)


@dataclass
class _Graph:
    """The graph that is rewritten, and what its layers share."""

    graph: ir.Graph
    shared: dict[tuple[str | int, ...], ir.Value] = field(default_factory=dict)
    layers: int = 0

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initializer; the first of a name wins."""
        if name not in self.graph.initializers:
            tensor = ir.tensor(array, name=name)
            shape, kind = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
            self.graph.register_initializer(ir.Value(name=name, shape=shape, type=kind, const_value=tensor))
        return self.graph.initializers[name]

    def shape(self, *sizes: int) -> ir.Value:
        """The second input of a Reshape."""
        return self.constant("shape_" + "_".join(map(str, sizes)), np.array(sizes, np.int64))

    def before(
        self, user: ir.Node, op: str, inputs: Sequence[ir.Value | None], name: str, domain: str = "", **fields: object
    ) -> ir.Value:
        """A node in front of `user`."""
        node = ir.node(op, inputs=list(inputs), attributes=fields, name=name, domain=domain)  # type: ignore[arg-type]
        node.outputs[0].name = f"{name}_out"
        self.graph.insert_before(user, node)
        return node.outputs[0]

    def rounded(self, layer: _Layer) -> ir.Value:
        """The layer's input in uint8, in the layout of its product: channels last."""
        source, image = layer.source, layer.node.op_type == "Conv"
        key = ("rounded", source.name or "", layer.scale.name or "", image)
        if key not in self.shared:
            stem = f"{source.name}_{layer.scale.name}_{'rows' if image else 'u8'}"
            last = made_by(source, "Transpose")
            turned = image and last is not None and permutation(last) == CHANNELS_FIRST
            taken = last.inputs[0] if turned and last is not None else source
            zero = self.constant("zero_point_uint8", np.array(ZERO, np.uint8))
            value = self.before(layer.node, "QuantizeLinear", [taken, layer.scale, zero], f"{stem}_q")
            if image:
                channels, height, width = _sizes(source)
                if not turned:
                    flat = self.before(layer.node, "Reshape", [value, self.shape(0, channels, -1)], f"{stem}_flat")
                    value = self.before(layer.node, "Transpose", [flat], stem, perm=[0, 2, 1])
                else:
                    value = self.before(layer.node, "Reshape", [value, self.shape(0, height * width, channels)], stem)
            self.shared[key] = value
        return self.shared[key]

    def product(self, layer: _Layer, rows: ir.Value, weight: ir.Value) -> ir.Value:
        """Float [..., out] of uint8 [..., depth] by int8 [depth, out]."""
        self.layers += 1
        zero = self.constant("zero_point_uint8", np.array(ZERO, np.uint8))
        inputs = [rows, weight, layer.scale, layer.weight_scale, zero, None, layer.bias]
        name = f"{_name(layer.node)}_integer"
        return self.before(layer.node, "MatMulIntegerToFloat", inputs, name, CONTRIB)


def _linear(graph: _Graph, layer: _Layer) -> None:
    weight = layer.weight
    if layer.node.op_type == "Gemm":
        key = ("rows", weight.name or "")
        if key not in graph.shared:
            graph.shared[key] = graph.before(layer.node, "Transpose", [weight], f"{weight.name}_rows", perm=[1, 0])
        weight = graph.shared[key]
    _replace(layer.output, graph.product(layer, graph.rounded(layer), weight))


def _convolution(graph: _Graph, layer: _Layer) -> None:
    node, name = layer.node, _name(layer.node)
    assert layer.weight.shape is not None
    outs, ins, *kernel = (int(size) for size in layer.weight.shape.numpy())
    index, height, width = places(_sizes(layer.source)[1:], kernel, _window(node))
    rows = graph.rounded(layer)
    if index.shape[1] > 1 or len(index) != np.prod(_sizes(layer.source)[1:]):
        window = [size for sizes in (kernel, *_window(node)) for size in sizes]
        key: tuple[str | int, ...] = ("columns", rows.name or "", *window)
        if key not in graph.shared:
            stem = f"{rows.name}_{len(graph.shared)}"
            ends = graph.constant("pad_one_row", np.array([0, 0, 0, 0, 1, 0], np.int64))
            zero = graph.constant("zero_point_uint8", np.array(ZERO, np.uint8))
            padded = graph.before(node, "Pad", [rows, ends, zero], f"{stem}_padded")
            table = graph.constant("places_" + "_".join(map(str, [*window, *_sizes(layer.source)[1:]])), index)
            taken = graph.before(node, "Gather", [padded, table], f"{stem}_taken", axis=1)
            sizes = graph.shape(0, len(index), index.shape[1] * ins)
            graph.shared[key] = graph.before(node, "Reshape", [taken, sizes], f"{stem}_columns")
        rows = graph.shared[key]
    product = graph.product(layer, rows, _kernel_last(graph, layer))
    image = graph.before(node, "Reshape", [product, graph.shape(0, height, width, outs)], f"{name}_image")
    for user, _ in list(layer.output.uses()):
        if user.op_type == "Transpose" and permutation(user) == CHANNELS_LAST:
            _replace(user.outputs[0], image)
    if layer.output.uses() or layer.output.is_graph_output():
        _replace(layer.output, graph.before(node, "Transpose", [image], f"{name}_first", perm=list(CHANNELS_FIRST)))


def _kernel_last(graph: _Graph, layer: _Layer) -> ir.Value:
    """The weight [O, C, k, k] as [k k C, O].

    In two transpositions of matrices, because ONNX Runtime takes ten times longer for one of four dimensions.
    """
    assert layer.weight.shape is not None
    outs, ins, *kernel = (int(size) for size in layer.weight.shape.numpy())
    name, key = f"{layer.weight.name}_last", ("last", layer.weight.name or "")
    if key not in graph.shared:
        first = graph.before(layer.node, "Transpose", [layer.weight], f"{name}_0", perm=[2, 3, 0, 1])
        shape = graph.shape(int(np.prod(kernel)), outs, ins)
        flat = graph.before(layer.node, "Reshape", [first, shape], f"{name}_1")
        second = graph.before(layer.node, "Transpose", [flat], f"{name}_2", perm=[0, 2, 1])
        graph.shared[key] = graph.before(layer.node, "Reshape", [second, graph.shape(-1, outs)], name)
    return graph.shared[key]


Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # strides, pads (begin of each axis, end), dilations


def places(size: Sequence[int], kernel: Sequence[int], window: Window) -> tuple[np.ndarray, int, int]:
    """Where each output place of a convolution looks: int32 [H' W', k k] into the H W input places, and H' and W'.

    One past the end stands for the padding.
    """
    strides, pads, dilations = window
    axes = []
    for axis in range(2):
        reach = dilations[axis] * (kernel[axis] - 1) + 1
        count = (size[axis] + pads[axis] + pads[axis + 2] - reach) // strides[axis] + 1
        starts = np.arange(count)[:, None] * strides[axis] - pads[axis]
        axes.append(starts + np.arange(kernel[axis]) * dilations[axis])  # [out, kernel]
    y, x = axes[0][:, None, :, None], axes[1][None, :, None, :]
    inside = (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
    index = np.where(inside, y * size[1] + x, size[0] * size[1]).astype(np.int32)
    return index.reshape(len(axes[0]) * len(axes[1]), -1), len(axes[0]), len(axes[1])


def _window(node: ir.Node) -> Window:
    return (_ints(node, "strides", (1, 1)), _ints(node, "pads", (0,) * 4), _ints(node, "dilations", (1, 1)))


def _plain_convolution(node: ir.Node, source: ir.Value) -> bool:
    """Over images of a known size, without groups."""
    shape, group = source.shape, node.attributes.get("group")
    if shape is None or len(shape) != 4 or not all(isinstance(size, int) for size in shape[1:]):
        return False
    auto = node.attributes.get("auto_pad")
    return (group is None or group.as_int() == 1) and (auto is None or auto.as_string() == "NOTSET")


def _plain_gemm(node: ir.Node) -> bool:
    """x Wᵀ + b, which is how nn.Linear arrives."""
    wanted: Mapping[str, float] = {"transA": 0, "transB": 1, "alpha": 1, "beta": 1}
    defaults: Mapping[str, float] = {"transA": 0, "transB": 0, "alpha": 1, "beta": 1}
    found = {name: node.attributes[name].value if name in node.attributes else defaults[name] for name in wanted}
    return all(found[name] == wanted[name] for name in wanted)


def _symmetric(node: ir.Node) -> bool:
    """A QuantizeLinear to int8 around 0 with one scale."""
    zero, scale = (node.inputs[2] if len(node.inputs) > 2 else None), node.inputs[1]
    if zero is None or zero.const_value is None or zero.const_value.dtype != ir.DataType.INT8:
        return False
    return not zero.const_value.numpy().any() and scale is not None and not len(scale.shape or ())


def _added(product: ir.Value, size: object) -> tuple[ir.Value | None, ir.Value]:
    """The constant [size] that is added to `product` by its only user, and the sum; or None and `product`."""
    users = list(product.uses())
    if len(users) == 1 and users[0].node.op_type == "Add" and not product.is_graph_output():
        add = users[0].node
        other = add.inputs[1 - users[0].idx]
        if other is not None and other.const_value is not None and list(other.const_value.shape) == [size]:
            return other, add.outputs[0]
    return None, product


def _name(node: ir.Node) -> str:
    return node.name or f"node_{node.outputs[0].name}"


def _sizes(value: ir.Value) -> tuple[int, int, int]:
    """C, H and W of an image."""
    assert value.shape is not None
    channels, height, width = (int(size) for size in value.shape[1:])  # type: ignore[arg-type]
    return channels, height, width


def _ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return default if attribute is None else tuple(attribute.as_ints())


def _replace(old: ir.Value, new: ir.Value) -> None:
    """Everybody who took `old` takes `new`, which gets its name where it is an output of the graph."""
    new.shape, new.type = old.shape, old.type
    if old.is_graph_output():
        old.name, new.name = f"{old.name}_before", old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
