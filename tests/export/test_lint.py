"""Each fault is made by hand; where the installed library says something of it, it must agree."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError
from diffpress.export import lint

Node = tuple[str, list[str], str, dict[str, Any]]  # operator, inputs, output, attributes
E4M3, INT4 = ml_dtypes.float8_e4m3fn, ml_dtypes.int4
Q: list[Node] = [("QuantizeLinear", ["x", "s", "z"], "x_q", {}), ("DequantizeLinear", ["x_q", "s", "z"], "x_dq", {})]
W: Node = ("DequantizeLinear", ["to_q.weight_int8", "ws"], "w_dq", {"axis": 1})
PRODUCT: Node = ("MatMul", ["x_dq", "w_dq"], "y", {})


def constants(**changed: Any) -> dict[str, np.ndarray]:
    found = {
        "s": np.float32(0.02),
        "z": np.int8(0),
        "to_q.weight_int8": np.full((64, 32), 3, np.int8),
        "ws": np.full(32, 0.01, np.float32),
    }
    return {name: np.asarray(value) for name, value in {**found, **changed}.items()}


def graph(nodes: Sequence[Node], arrays: dict[str, np.ndarray], shape: Sequence[int] = (2, 64)) -> ir.Model:
    values: dict[str, ir.Value] = {}
    sample = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    values["x"] = sample
    arrays = {name: array for name, array in arrays.items() if name not in {output for _, _, output, _ in nodes}}
    for name, array in arrays.items():
        tensor = ir.tensor(array, name=name)
        values[name] = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    made = []
    for op, inputs, output, attributes in nodes:
        node = ir.node(op, [values[name] for name in inputs], attributes, name=f"{output}_node")
        values[output] = node.outputs[0]
        node.outputs[0].name = output
        made.append(node)
    out = values[nodes[-1][2]]
    out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["rows", *["any"] * (len(shape) - 1)])
    used = [values[name] for name in arrays if values[name].uses()]
    return ir.Model(ir.Graph([sample], [out], nodes=made, initializers=used, opset_imports={"": 21}), ir_version=10)


DYNAMIC: list[Node] = [("ReduceMax", ["x"], "peak", {"keepdims": 0}), ("Mul", ["peak", "c"], "s", {})]
BIAS: Node = ("DequantizeLinear", ["b", "ws"], "b_dq", {"axis": 0})
INTEGER: list[Node] = [
    ("QuantizeLinear", ["x", "s", "z"], "x_q", {}),
    ("MatMulInteger", ["x_q", "to_q.weight_int8"], "i", {}),
    ("Cast", ["i"], "y", {"to": 1}),
]
BLOCKS = {"axis": 0, "block_size": 24}
KERNEL = np.ones((8, 64, 3, 3), INT4)
KERNEL_ALONE: Node = ("Conv", ["x", "w_dq"], "y", {})

FATAL: dict[str, tuple[list[Node], dict[str, np.ndarray], str]] = {
    "dynamic scale": ([*DYNAMIC, *Q, W, PRODUCT], constants(s=1, c=np.float32(1)), "'x_q_node'.*computed at run time"),
    "zero point": ([*Q, W, PRODUCT], constants(z=np.int8(3)), "'x_q_node'.*of layer to_q|'x_q_node'.*zero point"),
    "zero point of a weight": (
        [*Q, (W[0], [*W[1], "wz"], W[2], W[3]), PRODUCT],
        constants(wz=np.arange(32).astype(np.int8)),
        "'w_dq_node'.*of layer to_q: its zero point is not 0",
    ),
    "int16": ([*Q, W, PRODUCT], constants(z=np.int16(0)), "'x_q_node'.*int16, which TensorRT does not have"),
    "uint8": ([*Q, W, PRODUCT], constants(z=np.uint8(0)), "'x_q_node'.*uint8, which TensorRT does not have"),
    "uint8 by default": (
        [("QuantizeLinear", ["x", "s"], "x_q", {}), ("DequantizeLinear", ["x_q", "s"], "x_dq", {}), W, PRODUCT],
        constants(),
        "'x_q_node'.*uint8, which",
    ),
    "int32 bias": (
        [*Q, W, BIAS, ("Gemm", ["x_dq", "w_dq", "b_dq"], "y", {})],
        constants(b=np.zeros(32, np.int32)),
        "'b_dq_node'.*int32, which",
    ),
    "block that does not divide": (
        [("DequantizeLinear", ["to_q.weight_int4", "ws"], "w_dq", BLOCKS), ("MatMul", ["x", "w_dq"], "y", {})],
        {"to_q.weight_int4": np.ones((64, 32), INT4), "ws": np.ones((3, 32), np.float32)},
        "'w_dq_node'.*of layer to_q: blocks of 24 do not divide its 64 values",
    ),
    "blocks of a kernel": (
        [("DequantizeLinear", ["conv.weight", "ws"], "w_dq", {"axis": 1, "block_size": 32}), KERNEL_ALONE],
        {"conv.weight": KERNEL, "ws": np.ones((8, 2, 3, 3), np.float32)},
        "'w_dq_node'.*of layer conv: its blocks lie along axis 1 of 4",
    ),
    "scale of zero": ([*Q, W, PRODUCT], constants(ws=np.zeros(32, np.float32)), "'w_dq_node'.*not positive"),
    "operators of integers": (INTEGER, constants(), r"'i_node' \(MatMulInteger\).*QuantizeLinear and"),
    "two types": (
        [*Q, W, PRODUCT],
        constants(**{"to_q.weight_int8": np.ones((64, 32), E4M3)}),
        "'y_node'.*of layer to_q: it multiplies float8e4m3fn by int8",
    ),
}


@pytest.mark.parametrize("fault", FATAL)
def test_what_tensorrt_cannot_take_is_refused_by_the_name_of_the_node(fault: str) -> None:
    nodes, arrays, message = FATAL[fault]
    shape = (1, 64, 8, 8) if fault == "blocks of a kernel" else (2, 64)
    with pytest.raises(DiffpressError, match=f"TensorRT cannot take unet/model.onnx: node {message}") as caught:
        lint.check(graph(nodes, arrays, shape), "unet/model.onnx")
    assert "\n" not in str(caught.value)


# The library ends its process for the first, reads the uint8 ones as int8, and refuses two types while it builds.
@pytest.mark.parametrize("fault", [name for name in FATAL if name.split()[0] not in ("dynamic", "uint8", "two")])
def test_the_library_refuses_the_same(fault: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    nodes, arrays, _ = FATAL[fault]
    model = graph(nodes, arrays, (1, 64, 8, 8) if fault == "blocks of a kernel" else (2, 64))
    assert not parses(trt, model)


def parses(trt: Any, model: ir.Model) -> bool:
    from diffpress.engines import library

    logger = library.logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    return bool(trt.OnnxParser(network, logger).parse(ir.to_proto(model).SerializeToString()))


def test_a_whole_pair_is_clean_and_the_library_takes_it() -> None:
    model = graph([*Q, W, PRODUCT], constants())
    assert lint.findings(model) == []
    cast: list[Node] = [("Cast", ["s16"], "s", {"to": 1}), *Q, W, PRODUCT]
    folded = graph(cast, constants(s16=np.float16(0.02)))  # computed, but from constants alone
    assert lint.findings(folded) == []
    trt = pytest.importorskip("tensorrt_rtx")
    assert parses(trt, model) and parses(trt, folded)


WARNED: dict[str, tuple[list[Node], dict[str, np.ndarray], str]] = {
    "a float weight": (
        [*Q, ("MatMul", ["x_dq", "w"], "y", {})],
        constants(w=np.ones((64, 32), np.float32)),
        "its input is quantized but its weight is not",
    ),
    "scales by channel of the input": (
        [
            ("QuantizeLinear", ["x", "s", "z"], "x_q", {"axis": 1}),
            ("DequantizeLinear", ["x_q", "s", "z"], "x_dq", {"axis": 1}),
            W,
            PRODUCT,
        ],
        constants(s=np.full(64, 0.1, np.float32), z=np.zeros(64, np.int8)),
        "a scale per channel",
    ),
    "scales along the inputs": (
        [*Q, (W[0], W[1], W[2], {"axis": 0}), PRODUCT],
        constants(ws=np.ones(64, np.float32)),
        "scales lie along axis 0, not along its outputs",
    ),
    "something between": (
        [*Q, W, ("Mul", ["x_dq", "c"], "scaled", {}), ("MatMul", ["scaled", "w_dq"], "y", {})],
        constants(c=np.ones(64, np.float32)),
        r"'scaled_node' \(Mul\) stands between",
    ),
    "int4 without blocks": (
        [("DequantizeLinear", ["to_q.weight_int4", "ws"], "w_dq", {"axis": 1}), ("MatMul", ["x", "w_dq"], "y", {})],
        {"to_q.weight_int4": np.ones((64, 32), INT4), "ws": np.ones(32, np.float32)},
        "int4 weight without blocks and a float input are not fused",
    ),
    "a kernel alone": (
        [("DequantizeLinear", ["conv.weight", "ws"], "w_dq", {"axis": 0}), KERNEL_ALONE],
        {"conv.weight": np.ones((8, 64, 3, 3), np.int8), "ws": np.ones(8, np.float32)},
        "its weight is quantized but its input is not",
    ),
}


@pytest.mark.parametrize("fault", WARNED)
def test_pairs_that_do_not_fuse_are_warned_of(fault: str) -> None:
    nodes, arrays, message = WARNED[fault]
    model = graph(nodes, arrays, (1, 64, 8, 8) if fault == "a kernel alone" else (2, 64))
    (found,) = lint.check(model, "unet/model.onnx")
    assert not found.fatal and found.node == "y_node"
    assert re.search(message, str(found))


def test_layers_go_by_the_module_that_the_exporter_noted() -> None:
    model = graph([*Q, W, PRODUCT], constants(z=np.int8(1)))
    for node in model.graph:
        scopes = "['', 'unet', 'unet.mid_block.attentions.0', 'linear']"
        node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    found = lint.findings(model)
    assert {finding.layer for finding in found} == {"unet.mid_block.attentions.0"}
    assert "of layer unet.mid_block.attentions.0: its zero point" in str(found[0])


def test_a_foreign_graph_is_refused_before_anything_is_built(handmade: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    from diffpress import bundle
    from diffpress.export import engines

    model = ir.load(handmade.file("unet/cached.onnx"))
    model.graph.initializers["zero"].const_value = ir.tensor(np.array(5, np.int8), name="zero")
    ir.save(model, handmade.file("unet/cached.onnx"))
    changed = bundle.update(handmade)
    monkeypatch.setattr("diffpress.engines.build._build_graph", refuse("work was started"))
    with pytest.raises(DiffpressError, match=r"TensorRT cannot take unet/cached.onnx: node 'columns_q_node'.*not 0"):
        engines.build(changed, ["sm89"], progress=False)
    assert not changed.file("engines").exists()


def refuse(why: str) -> Callable[..., None]:
    return lambda *_, **__: pytest.fail(why)
