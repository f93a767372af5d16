"""The roofline: by hand on small numbers, and its operations against torch's own counter on real denoisers."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnxscript import optimizer
from torch.utils.flop_counter import FlopCounterMode

from diffpress.benchmarks import ceilings, roofline
from diffpress.benchmarks.ceilings import Ceilings
from diffpress.benchmarks.profiles import Timed
from diffpress.benchmarks.roofline import Call, Measured
from diffpress.bundle import Bundle
from diffpress.compress.families.unet_graph import UNetGraph
from diffpress.export import flops, graphs
from diffpress.export.flops import Product, Work
from diffpress.export.graphs import GraphSpec
from diffpress.plan import FULL, StepProgram, Variant
from diffpress.runtime.session import Port

# A cache of a kilobyte moves ten times as fast as memory.
ROOFS = Ceilings({"fp32": 1000.0, "int8": 4000.0}, {0: 100.0, 1000: 10.0}, "by hand")
WORK = Work(
    {"fp32": 5000, "int8": 8000},
    weight_bytes=1400,
    activation_bytes=600,
    products=(
        Product("conv", "Conv", "fp32", 5000, weight_bytes=400, activation_bytes=500),
        Product("linear", "MatMul", "int8", 8000, weight_bytes=1000, activation_bytes=100),
    ),
)


def test_each_operator_is_as_slow_as_its_arithmetic_or_its_bytes() -> None:
    found = roofline.judged(WORK, ROOFS, 300.0, None)
    # Weights come from memory, since 2000 bytes do not fit the cache: 40 s and 100 s; activations do fit: 5 s and 1 s.
    assert found["seconds_at_ceiling"] == pytest.approx(45 + 101)
    assert found["share_of_ceiling"] == pytest.approx(146 / 300)
    assert (found["operations"], found["bytes"], found["bound"]) == (13_000, 2000, "bandwidth")
    slow, fast = found["by_operator"]
    assert (slow["name"], slow["bound"], slow["share"]) == ("linear", "bandwidth", pytest.approx(101 / 146))
    assert (fast["name"], fast["seconds_at_ceiling"], fast["measured_seconds"]) == ("conv", 45, None)
    narrow = roofline.judged(WORK, Ceilings({"fp32": 10.0, "int8": 20.0}, ROOFS.bytes_per_s, ""), None, None)
    assert narrow["bound"] == "arithmetic" and narrow["seconds_at_ceiling"] == pytest.approx(500 + 400)
    assert narrow["share_of_ceiling"] is None


def test_a_type_without_a_ceiling_has_no_share() -> None:
    found = roofline.judged(WORK, Ceilings({"fp32": 1.0}, {0: 1.0}, ""), 1.0, None)
    assert found["operations"] == 13_000 and found["measured_seconds"] == 1.0
    assert found["seconds_at_ceiling"] is found["share_of_ceiling"] is None and found["by_operator"] == []


def test_profiles_are_shares() -> None:
    profile = [Timed("softmax", "SoftMax", 5.0), Timed("linear", "FullyConnected", 3.0), Timed("b", "SoftMax", 2.0)]
    found = roofline.judged(WORK, ROOFS, 10.0, profile)
    assert found["by_type"] == pytest.approx({"SoftMax": 0.7, "FullyConnected": 0.3})
    assert found["slowest"][0] == {"name": "softmax", "operator": "SoftMax", "share": 0.5}
    assert [row["measured_seconds"] for row in found["by_operator"]] == [3.0, None]


def test_calls_of_a_program() -> None:
    variants = {FULL: Variant(writes=("a",)), "cached": Variant(reads=("a",)), "joined": Variant(together=2)}
    steps = (FULL, "cached", "cached", "joined", "joined", "joined")
    program = StepProgram(steps, variants, (FULL, FULL, "conditional", FULL, FULL, FULL))
    sampling = SimpleNamespace(guidance_scale=3.0, timesteps=(60.0, 50.0, 40.0, 30.0, 20.0, 10.0))
    assert set(roofline.calls(program, sampling)) == {  # type: ignore[arg-type]
        Call(FULL, 2, 1, 60.0),
        Call("cached", 2, 1, 50.0),
        Call("cached", 1, 1, 40.0),
        Call("joined", 4, 1, 30.0),
        Call("joined", 2, 1, 10.0),
    }
    sampling.guidance_scale = 1.0
    assert {(call.rows, call.times) for call in roofline.calls(program, sampling)} == {(1, 1), (1, 2), (2, 1)}  # type: ignore[arg-type]


def test_feeds_have_the_shapes_of_the_call() -> None:
    ports = {"sample": Port((None, 4, 8), np.dtype("float32")), "timestep": Port((1,), np.dtype("float32"))}
    found = roofline.feeds(SimpleNamespace(inputs=ports), Call(FULL, 6, 1, 951.0))  # type: ignore[arg-type]
    assert found["sample"].shape == (6, 4, 8) and found["sample"].dtype == np.float32
    assert found["sample"].std() == pytest.approx(1, abs=0.2) and found["timestep"].tolist() == [951.0]


def test_a_bundle_on_two_backends(handmade: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(ceilings, "measure", lambda kinds: Ceilings(dict.fromkeys(kinds, 1e12), {0: 1e11}, "made up"))
    pairs = [("openvino", "fp32"), ("onnxruntime", "fp32"), ("onnxruntime", "bf16")]
    found = roofline.measure({"compressed": handmade}, {"compressed": pairs})
    rows = found["graphs"]
    assert [(row["graph"], row["calls_per_image"], row["rows"]) for row in rows] == [("cached", 4, 2), (FULL, 2, 2)] * 3
    for row in rows[:4]:
        assert row["reason"] is None and 0 < row["share_of_ceiling"] < 1
        assert row["seconds_at_ceiling"] == pytest.approx(sum(op["seconds_at_ceiling"] for op in row["by_operator"]))
        assert sum(row["by_type"].values()) == pytest.approx(1)
    full = rows[1]
    assert full["operations_by_type"].keys() == {"fp32", "int8"} and full["operations"] > rows[0]["operations"]
    for row in rows[4:]:
        assert "not bf16" in row["reason"] and "operations" not in row
    image = found["images"][0]
    assert image["operations"] == 4 * rows[0]["operations"] + 2 * rows[1]["operations"]
    assert image["measured_seconds"] == pytest.approx(4 * rows[0]["measured_seconds"] + 2 * rows[1]["measured_seconds"])
    assert [entry["share_of_ceiling"] is None for entry in found["images"]] == [False, False, True]


def test_a_graph_that_cannot_be_counted_is_timed(handmade: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffpress.errors import DiffpressError

    def refuse(*_: Any) -> Work:
        raise DiffpressError("it has a loop")

    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(roofline, "count", refuse)
    found = roofline.run(handmade, "compressed", "onnxruntime", "fp32")
    assert all(isinstance(one, Measured) and one.seconds and one.reason == "it has a loop" for one in found)
    assert found[0].entry(ROOFS).keys() >= {"graph", "reason"}


def counted(module: Any, inputs: dict[str, torch.Tensor]) -> int:
    # The fused kernels of CPUs are not known to the counter.
    with graphs.plain_attention(module.unet), FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs.values())
    return counter.get_total_flops()


def exported(unet: Any, inputs: dict[str, torch.Tensor]) -> Any:
    with graphs.plain_attention(unet):
        return graphs.to_onnx(GraphSpec(UNetGraph(unet), inputs, ("out_sample",)))


def without_weights(unet: Any, inputs: dict[str, torch.Tensor]) -> ir.Model:
    """A network of the meta device as a graph: shapes and types of weights, no values."""
    with graphs.plain_attention(unet):
        program = torch.export.export(UNetGraph(unet), tuple(inputs.values()))
    onnx: Any = torch.onnx.export(program, dynamo=True, opset_version=graphs.OPSET, optimize=False, verbose=False)
    for value in onnx.model.graph.initializers.values():
        shape, dtype = value.const_value.shape, value.const_value.dtype
        if value.const_value.raw.is_meta:
            zeros = partial(np.zeros, shape.numpy(), dtype.numpy())
            value.const_value = ir.LazyTensor(lambda zeros=zeros: ir.tensor(zeros()), dtype, shape)
    # Sizes that the exporter computes in the graph, of the embedding of steps; weights are over its limit.
    optimizer.fold_constants(onnx.model, input_size_limit=1024, output_size_limit=4096)
    return onnx.model  # type: ignore[no-any-return]


def test_operations_of_stable_diffusion_are_those_that_torch_counts() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval().requires_grad_(False)
        inputs = {
            "sample": torch.zeros(2, 4, 64, 64),
            "timestep": torch.zeros(1),
            "encoder_hidden_states": torch.zeros(2, 77, 768),
        }
    work = flops.count(without_weights(unet, inputs), 2)
    assert work.operations == pytest.approx(counted(UNetGraph(unet), inputs), rel=0.02)
    assert work.operations == pytest.approx(2 * 803e9, rel=0.01)
    assert work.weight_bytes == 4 * sum(weight.numel() for weight in unet.parameters() if weight.ndim > 1)


def test_operations_of_shapes_are_those_that_torch_counts() -> None:
    from diffusers import UNet2DConditionModel

    from diffpress.benchmarks.shapes import PIPELINE

    unet = UNet2DConditionModel.from_pretrained(PIPELINE / "unet").eval()
    inputs = {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(2, 24, unet.config.cross_attention_dim),
    }
    model = exported(unet, inputs)
    graphs.finish(model)
    assert flops.count(model, 2).operations == pytest.approx(counted(UNetGraph(unet), inputs), rel=0.02)
