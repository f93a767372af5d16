"""Quantized time features: scales by step, joint rounding, and the choice between a projection and a table."""

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffpress.compress import training
from diffpress.compress.families import unet as family
from diffpress.compress.families.unet_graph import UNetGraph
from diffpress.compress.numerics.formats import get
from diffpress.compress.numerics.simulate import rounded_weight, simulated
from diffpress.compress.temporal import maintain
from diffpress.compress.temporal.maintain import TemporalPass, quantize_time_layers, quantized_features
from diffpress.compress.temporal.table import TemporalTablePass, features, install, tabulate
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import Sampling, TemporalTable

TIMESTEPS = (951.0, 701.0, 450.5, 201.0, 1.0)
RESNET = "down_blocks.0.resnets.0"


@pytest.fixture(scope="module")
def network() -> Any:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=8,
        )
    return unet.eval().requires_grad_(False)


@pytest.fixture
def work(network: Any, tmp_path: Path) -> Work:
    return make_work(network, tmp_path)


def make_work(network: Any, scratch: Path) -> Work:
    ones = (1.0,) * len(TIMESTEPS)
    sampling = Sampling("DDIMScheduler", len(TIMESTEPS), 3.0, 32, 32, TIMESTEPS, ones, 1.0, ())
    pipeline = SimpleNamespace(unet=copy.deepcopy(network))
    return Work(
        pipeline, sampling, 0, lambda _: pytest.fail("this pass needs no data"), lambda items, _: items, scratch
    )


def schedule() -> Tensor:
    return torch.tensor(TIMESTEPS)


@torch.no_grad()
def relative(got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    away, size = torch.cat([got[name] - rows for name, rows in exact.items()], 1), torch.cat(list(exact.values()), 1)
    return float(away.norm() / size.norm())


@torch.no_grad()
def features_as_planned(work: Work) -> dict[str, Tensor]:
    """The time features [steps, C] of single calls of the whole U-Net under the plan's simulation."""
    unet, seen = work.denoiser, {}
    for name in family.time_projections(unet):
        projection = unet.get_submodule(name).time_emb_proj
        projection.register_forward_hook(lambda _, __, output, name=name: seen.setdefault(name, []).append(output[:1]))
    with simulated(unet, work.quantization, TIMESTEPS):
        for timestep in TIMESTEPS:
            unet(torch.zeros(2, 4, 8, 8), torch.tensor([timestep]), torch.zeros(2, 3, 16))
    return {name: torch.cat(rows) for name, rows in seen.items()}


@pytest.mark.parametrize("per_step", [True, False])
@pytest.mark.parametrize(("weights", "inputs"), [("int4", "int8"), ("e4m3", "e4m3"), ("int8", None)])
def test_all_steps_at_once_equal_single_calls(work: Work, weights: str, inputs: str | None, per_step: bool) -> None:
    layers = quantize_time_layers(work.denoiser, schedule(), weights, inputs, per_step)
    scales = {None if layer.input_scale is None else len(layer.input_scale) for layer in layers.values()}
    assert scales == ({None} if inputs is None else {5 if per_step else 1})
    rounded = {name: rounded_weight(work.denoiser.get_submodule(name).weight, layer) for name, layer in layers.items()}
    together = quantized_features(work.denoiser, schedule(), layers, rounded)
    work.quantization.update(layers)
    single = features_as_planned(work)
    for name, rows in together.items():
        torch.testing.assert_close(rows, single[name], rtol=1e-4, atol=1e-5)


def test_reconstruction_halves_the_error_of_rounding_to_nearest_at_four_bits(network: Any, tmp_path: Path) -> None:
    errors = {}
    for method in ("round-to-nearest", "reconstruct"):
        work = make_work(network, tmp_path)
        step = TemporalPass(method, "int4", "int8", iterations=200, rate=0.05)
        step.requires(work)
        summary = step.apply(work)
        assert work.quantization.keys() == family.time_layers(network).keys()
        errors[method] = relative(features_as_planned(work), features(network, schedule()))
        # What it says of itself is what the simulation of the plan shows.
        assert f"{errors[method]:.2%}" in summary
    assert errors["reconstruct"] < 0.5 * errors["round-to-nearest"]
    for name, module in family.time_layers(work.denoiser).items():
        before, layer = network.get_submodule(name).weight, work.quantization[name]
        assert torch.equal(module.weight, rounded_weight(module.weight, layer)), "on its grid"
        moved = (module.weight - before).abs() / torch.from_numpy(layer.weight_scale)[:, None]
        inside = (before / torch.from_numpy(layer.weight_scale)[:, None]).abs() < get("int4").largest
        assert float(moved[inside].max()) <= 1 + 1e-4, "no weight moves by more than a step"
        assert torch.equal(work.originals[f"{name}.weight"], before)


def test_scales_by_step_are_nearer_than_one_for_all(network: Any, tmp_path: Path) -> None:
    errors = []
    for per_step in (True, False):
        work = make_work(network, tmp_path)
        TemporalPass("round-to-nearest", "int8", "int4", per_step=per_step).apply(work)
        errors.append(relative(features_as_planned(work), features(network, schedule())))
    assert errors[0] < errors[1]


def test_an_interrupted_reconstruction_goes_on(network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 4)
    step = TemporalPass("reconstruct", "int4", iterations=30, rate=0.05)
    whole = make_work(network, tmp_path / "whole")
    step.apply(whole)

    def until_ten(items: Iterable[Any], _: str) -> Iterator[Any]:
        for count, item in enumerate(items):
            if count == 10:
                raise KeyboardInterrupt
            yield item

    broken = make_work(network, tmp_path / "pieces")
    broken.progress = until_ten
    with pytest.raises(KeyboardInterrupt):
        step.apply(broken)
    assert not broken.quantization
    assert torch.equal(broken.denoiser.time_embedding.linear_1.weight, network.time_embedding.linear_1.weight)
    done: list[int] = []
    rest = make_work(network, tmp_path / "pieces")
    rest.progress = lambda items, _: (done.append(item) or item for item in items)  # type: ignore[func-returns-value]
    step.apply(rest)
    assert done == list(range(8, 30))
    for name, module in family.time_layers(whole.denoiser).items():
        assert torch.equal(module.weight, rest.denoiser.get_submodule(name).weight)


def test_tables_for_some_leave_the_embedding_to_the_others(network: Any) -> None:
    unet = copy.deepcopy(network)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16)
    everything = tabulate(unet, TIMESTEPS)
    tables = dict(list(everything.tables.items())[::2])
    install(unet, TemporalTable(TIMESTEPS, tables))
    left = family.time_layers(unet)
    assert left.keys() == {
        name for name in family.time_layers(network) if name.removesuffix(".time_emb_proj") not in tables
    }
    assert all(torch.equal(module.weight, network.get_submodule(name).weight) for name, module in left.items())
    with torch.no_grad():
        for timestep in TIMESTEPS:
            expected = network(sample, torch.tensor([timestep]), text).sample
            for now in (torch.tensor([timestep]), torch.tensor(timestep)):
                torch.testing.assert_close(unet(sample, now, text).sample, expected, rtol=1e-4, atol=1e-5)
            (got,) = UNetGraph(unet)(sample, torch.tensor([timestep]), text)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        # Off the schedule a table stands still, a projection does not.
        one, other = (features(unet, torch.tensor([t])) for t in (440.0, 450.0))
    for name in everything.tables:
        assert torch.equal(one[name], other[name]) == (name in tables)


def test_the_nearer_of_projection_and_table_is_kept(work: Work, network: Any) -> None:
    # A projection of zeros is exact in any format, its bias alone is not exact in a table of INT8; elsewhere
    # INT4 weights are farther off than INT8 tables.
    for unet in (work.denoiser, network := copy.deepcopy(network)):
        unet.get_submodule(RESNET).time_emb_proj.weight.data.zero_()
    step = TemporalPass("select", "int4", "int8", "int8", iterations=20, rate=0.05)
    step.requires(work)
    summary = step.apply(work)
    kept = {"time_embedding.linear_1", "time_embedding.linear_2", f"{RESNET}.time_emb_proj"}
    assert work.quantization.keys() == family.time_layers(work.denoiser).keys() == kept
    assert work.temporal is not None
    assert work.temporal.tables.keys() == family.time_projections(network).keys() - {RESNET}
    exact, got = features(network, schedule()), features_as_planned(work)
    assert torch.equal(got[RESNET], exact[RESNET])
    for name, table in work.temporal.tables.items():
        assert torch.equal(got[name], torch.from_numpy(table))
        assert len(np.unique(table[0])) <= 256
        assert 0 < relative({name: got[name]}, {name: exact[name]}) < 0.01
    assert "1 projections in int4 x int8" in summary
    assert f"{relative(got, exact):.2%} as chosen" in summary


def test_a_rough_table_gives_way_to_the_projections(work: Work) -> None:
    summary = TemporalPass("select", "int8", None, "e3m0", iterations=1, rate=1e-6).apply(work)
    assert work.temporal is None
    assert "0 tables in e3m0" in summary
    assert len(work.quantization) == len(family.time_layers(work.denoiser))


def test_exact_tables_win_everywhere_and_the_modules_leave(work: Work, network: Any) -> None:
    summary = TemporalPass("select", table_format=None, iterations=1).apply(work)
    assert not family.time_layers(work.denoiser)
    assert not work.quantization
    assert "0.00% as chosen" in summary
    # Float32 for every step and channel, and nothing else.
    numbers = sum(rows.size for rows in tabulate(network, TIMESTEPS).tables.values())
    assert f"became {4 * numbers / 1e3:.1f} kB" in summary
    got = features_as_planned(work)
    for name, rows in features(network, schedule()).items():
        torch.testing.assert_close(got[name], rows, rtol=0, atol=0)


def test_bytes_count_weights_scales_and_biases(work: Work) -> None:
    summary = TemporalPass("round-to-nearest", "int4", "int8").apply(work)
    layers = family.time_layers(work.denoiser).values()
    weights, out = sum(layer.weight.numel() for layer in layers), sum(layer.out_features for layer in layers)
    after = weights / 2 + 4 * (2 * out + len(TIMESTEPS) * len(layers))
    assert f"{4 * (weights + out) / 1e3:.1f} kB of float32 weights became {after / 1e3:.1f} kB" in summary


def test_ties_go_to_the_table() -> None:
    exact = {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}
    off = {name: rows + 0.5 for name, rows in exact.items()}
    assert maintain.nearer_tables(exact, off, off).keys() == {"a", "b"}
    assert maintain.nearer_tables(exact, {"a": exact["a"], "b": off["b"]}, off).keys() == {"b"}


def test_what_it_cannot_do_is_said(work: Work) -> None:
    with pytest.raises(DiffpressError, match="no number format 'int5'"):
        TemporalPass(weight_format="int5").requires(work)
    block = work.denoiser.get_submodule(RESNET)
    block.time_embedding_norm = "scale_shift"
    with pytest.raises(DiffpressError, match="scales by it"):
        TemporalPass().requires(work)
    block.time_embedding_norm = "default"
    TemporalPass("round-to-nearest").apply(work)
    for step in (TemporalPass(), TemporalTablePass()):
        with pytest.raises(DiffpressError, match="keep one of the two"):
            step.requires(work)
