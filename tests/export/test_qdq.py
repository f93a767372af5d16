"""Q/DQ graphs of single layers in ONNX Runtime against the simulation in torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffpress.compress.numerics.formats import get
from diffpress.compress.numerics.ranges import weight_scale
from diffpress.compress.numerics.simulate import simulated
from diffpress.errors import DiffpressError
from diffpress.export import graphs, qdq, store
from diffpress.export.deploy import deployable, exact, settled, types
from diffpress.plan import LayerQuant
from diffpress.runtime.backends import open_session

SCHEDULE = (900.0, 600.0, 300.0, 1.0)


class Small(nn.Module):
    """A convolution, a linear layer on tokens and one on vectors, as a U-Net has them."""

    def __init__(self) -> None:
        super().__init__()
        self.time_proj = nn.Identity()
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.linear = nn.Linear(32, 32)
        self.vector = nn.Linear(32, 16)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        time = self.time_proj(timestep)
        tokens = self.conv(sample).flatten(2).transpose(1, 2)
        tokens = tokens + self.linear(tokens) + time[:, None, None] * 0
        return (self.vector(tokens.mean(1)).tanh(),)


class Wrapped(nn.Module):
    def __init__(self, unet: Small) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return self.unet(sample, timestep)


def quant(module: Any, weight: str, inputs: str | None, scales: tuple[float, ...] = (0.02,), **more: Any) -> LayerQuant:
    block = more.pop("block", None)
    rows = module.weight
    if (multiplier := more.get("multiplier")) is not None:
        rows = rows / torch.from_numpy(multiplier).reshape(1, -1, *[1] * (rows.ndim - 2))
    scale = weight_scale(rows, get(weight), "l2.4", block).numpy()
    return LayerQuant(scale, None if inputs is None else np.array(scales, np.float32), weight, inputs, **more)


def run(model: Small, plan: Mapping[str, LayerQuant], folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every step what ONNX Runtime and the simulation give."""
    sample = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    inputs = {"sample": sample, "timestep": torch.tensor([600.0])}
    wrapped = Wrapped(model).eval().requires_grad_(False)
    graph = graphs.to_onnx(graphs.GraphSpec(wrapped, inputs, ("out_sample",)))
    assert qdq.insert(graph, plan, SCHEDULE) == set(plan)
    graphs.finish(graph)
    store.save({"model.onnx": graph}, folder)
    session = open_session(folder / "model.onnx", "onnxruntime")
    pairs = []
    with torch.no_grad(), simulated(model, plan, SCHEDULE):
        for timestep in SCHEDULE:
            feed = {"sample": sample, "timestep": torch.tensor([timestep])}
            got = session.run({name: value.numpy() for name, value in feed.items() if name in session.inputs})
            pairs.append((got["out_sample"], wrapped(**feed)[0].numpy()))
    return pairs


def check(pairs: list[tuple[np.ndarray, np.ndarray]], tolerance: float) -> None:
    for got, want in pairs:
        assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


@pytest.fixture
def model() -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small()


@pytest.mark.parametrize("formats", [("int8", "int8"), ("e4m3", "e4m3"), ("int8", None), ("int4", None)])
def test_every_deployable_format_runs_and_matches(
    model: Small, formats: tuple[str, str | None], tmp_path: Path
) -> None:
    plan = {name: quant(getattr(model, name), *formats) for name in ("conv", "linear", "vector")}
    assert all(exact(layer) and deployable(layer) == layer for layer in plan.values())
    check(run(model, plan, tmp_path), 2e-3)


def test_int4_blocks_run_match_and_are_small(model: Small, tmp_path: Path) -> None:
    plan = {name: quant(getattr(model, name), "int4", None, block=16) for name in ("conv", "linear", "vector")}
    check(run(model, plan, tmp_path), 5e-3)  # ONNX Runtime multiplies such blocks in 8 bits
    weights = 16 * 32 * 9 + 32 * 32 + 32 * 16
    assert (tmp_path / "model.onnx_data").stat().st_size < 0.2 * 4 * weights


def test_multipliers_run_and_match(model: Small, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    plan = {
        name: quant(
            module, "int8", "int8", multiplier=random.uniform(0.2, 5, module.weight.shape[1]).astype(np.float32)
        )
        for name, module in (("conv", model.conv), ("linear", model.linear), ("vector", model.vector))
    }
    check(run(model, plan, tmp_path), 2e-3)


def test_scales_by_step_equal_quantization_with_each(model: Small, tmp_path: Path) -> None:
    scales = (0.04, 0.02, 0.01, 0.005)  # powers of two of each other: equal but for the last bits of the sums
    plan = {name: quant(getattr(model, name), "int8", "int8", scales) for name in ("conv", "linear", "vector")}
    pairs = run(model, plan, tmp_path)
    check(pairs, 1e-5)
    assert not np.allclose(pairs[0][1], pairs[3][1], rtol=1e-3)  # so that the step matters
    odd = {name: quant(getattr(model, name), "int8", "int8", (0.031, 0.023, 0.017, 0.011)) for name in plan}
    check(run(model, odd, tmp_path / "odd"), 2e-3)


def test_layers_with_scales_by_step_may_give_outputs_of_the_graph(model: Small, tmp_path: Path) -> None:
    class Both(Wrapped):
        def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
            feature = self.unet.conv(sample)
            return *self.unet(sample, timestep), feature

    plan = {"conv": quant(model.conv, "int8", "int8", (0.04, 0.02, 0.01, 0.005))}
    inputs = {"sample": torch.randn(2, 16, 6, 6), "timestep": torch.tensor([600.0])}
    module = Both(model).eval().requires_grad_(False)
    graph = graphs.to_onnx(graphs.GraphSpec(module, inputs, ("out_sample", "feature")))
    assert qdq.insert(graph, plan, SCHEDULE) == set(plan)
    graphs.finish(graph)
    store.save({"model.onnx": graph}, tmp_path)
    session = open_session(tmp_path / "model.onnx", "onnxruntime")
    for timestep in SCHEDULE:
        feed = {**inputs, "timestep": torch.tensor([timestep])}
        got = session.run({name: value.numpy() for name, value in feed.items()})
        with torch.no_grad(), simulated(model, plan, SCHEDULE):
            model.time_proj(feed["timestep"])  # tells the simulation the time before the first layer
            wanted = module(**feed)
        pairs = zip(("out_sample", "feature"), wanted, strict=True)
        # Not as near as rounding: an input that is almost half a step may be rounded the other way.
        check([(got[name], value.numpy()) for name, value in pairs], 2e-3)


def test_rows_at_steps_of_their_own_have_their_own_scales(model: Small, tmp_path: Path) -> None:
    plan = {
        name: quant(
            module, "int8", "int8", (0.04, 0.02, 0.01, 0.005), multiplier=np.full(module.weight.shape[1], 2, np.float32)
        )
        for name, module in (("conv", model.conv), ("linear", model.linear), ("vector", model.vector))
    }
    one_by_one = run(model, plan, tmp_path / "one")
    sample = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))  # that of `run`
    inputs = {"sample": sample, "timestep": torch.tensor([600.0, 1.0])}
    graph = graphs.to_onnx(graphs.GraphSpec(Wrapped(model).eval(), inputs, ("out_sample",), fixed=()))
    assert qdq.insert(graph, plan, SCHEDULE) == set(plan)
    graphs.finish(graph)
    store.save({"model.onnx": graph}, tmp_path / "rows")
    session = open_session(tmp_path / "rows" / "model.onnx", "onnxruntime")
    feed = {"sample": sample.repeat(4, 1, 1, 1), "timestep": torch.tensor(SCHEDULE).repeat_interleave(2)}
    got = np.split(session.run({name: value.numpy() for name, value in feed.items()})["out_sample"], 4)
    check(list(zip(got, (wanted for _, wanted in one_by_one), strict=True)), 1e-5)


@pytest.mark.parametrize(
    "formats", [("e2m1", "e4m3"), ("e2m1", None), ("e2m1", "int8"), ("int4", "int8"), ("e3m0", None)]
)
def test_a_finer_grid_ships_the_very_numbers_that_were_decided(
    model: Small, formats: tuple[str, str | None], tmp_path: Path
) -> None:
    plan = {name: quant(getattr(model, name), *formats) for name in ("conv", "linear", "vector")}
    shipped = {name: deployable(layer) for name, layer in plan.items()}
    assert all(exact(layer) and shipped[name].weight_format != layer.weight_format for name, layer in plan.items())
    before = model.linear.weight.clone()
    sample = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with simulated(model, plan):
            (wanted,) = model(sample, torch.tensor([600.0]))
        with settled(model, plan):
            with simulated(model, shipped):
                (got,) = model(sample, torch.tensor([600.0]))
            check(run(model, shipped, tmp_path), 2e-3)
    assert torch.allclose(got, wanted, atol=1e-5)
    assert torch.equal(model.linear.weight, before)


def test_blocks_beside_rounded_inputs_ship_as_one_scale_per_channel(model: Small) -> None:
    layer = quant(model.linear, "int4", "int8", block=16)
    shipped = deployable(layer)
    assert shipped.weight_scale.shape == (32,) and shipped.weight_format == "int8" and not exact(layer)
    with simulated(model, {"linear": layer}):
        wanted = model.linear.weight.clone()
    with settled(model, {"linear": layer}), simulated(model, {"linear": shipped}):
        assert (model.linear.weight - wanted).norm() < 0.02 * wanted.norm()


def test_what_hardware_must_have_is_told_of_what_ships() -> None:
    assert types("int4", None) == {"int4"}
    assert types("int4", "int8") == types("int8", "int4") == {"int8"}
    assert types("e2m1", "e4m3") == {"fp8"}


def test_scales_of_another_schedule_are_refused(model: Small, tmp_path: Path) -> None:
    plan = {"linear": quant(model.linear, "int8", "int8", (0.1, 0.2))}
    with pytest.raises(DiffpressError, match="2 scales by step do not fit a schedule of 4 calls"):
        run(model, plan, tmp_path)


@pytest.mark.parametrize(
    ("decided", "shipped", "same"),
    [
        (("int4", "int8"), ("int8", "int8"), True),
        (("int4", "int4"), ("int8", "int8"), False),
        (("e2m1", "e4m3"), ("e4m3", "e4m3"), True),
        (("e1m2", None), ("int4", None), True),
        (("e3m4", "e5m2"), ("e4m3", "e4m3"), False),
        (("int6", "int8"), ("int8", "int8"), True),
        (("e2m1", None), ("int8", None), True),  # which every target has
        (("e4m3", "int8"), ("int8", "int8"), False),
        (("int8", "e4m3"), ("e4m3", "e4m3"), False),
        (("e5m2", None), ("e4m3", None), False),
    ],
)
def test_what_no_target_has_ships_as_the_nearest_that_one_has(
    decided: tuple[str, str | None], shipped: tuple[str, str | None], same: bool
) -> None:
    layer = quant(nn.Linear(16, 8), *decided)
    result = deployable(layer)
    assert (result.weight_format, result.input_format) == shipped
    assert exact(layer) == same
    # The range is kept: what was the largest number is still about the largest.
    for name, scale, new, new_scale in (
        (layer.weight_format, layer.weight_scale, result.weight_format, result.weight_scale),
        (layer.input_format, layer.input_scale, result.input_format, result.input_scale),
    ):
        if name is None or new is None:
            continue
        assert (new_scale * get(new).largest >= scale * get(name).largest * 0.999).all()
