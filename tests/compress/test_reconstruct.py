"""Block reconstruction on a tiny U-Net: it lowers errors, keeps to the grid, and goes on after an interruption."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffpress.calibration.capture import Call
from diffpress.compress.families import unet as family
from diffpress.compress.families.unet_graph import feature_shapes
from diffpress.compress.numerics.formats import get
from diffpress.compress.numerics.ranges import weight_scale
from diffpress.compress.numerics.simulate import rounded_weight, simulated
from diffpress.compress.quantize import reconstruct
from diffpress.compress.quantize.reconstruct import ReconstructPass
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, LayerQuant, Sampling, StepProgram, Variant

TIMESTEPS = (801.0, 501.0, 201.0, 1.0)
LATER = ("mid_block.*", "up_blocks.*", "down_blocks.1.*")
RESNET, TRANSFORMER = "down_blocks.0.resnets.0", "down_blocks.0.attentions.0"


@pytest.fixture(scope="module")
def network() -> Any:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (
            UNet2DConditionModel(
                sample_size=8,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                block_out_channels=(16, 32),
                layers_per_block=1,
                cross_attention_dim=16,
                attention_head_dim=2,
                norm_num_groups=8,
            )
            .eval()
            .requires_grad_(False)
        )


def recorded() -> list[Call]:
    generator = torch.Generator().manual_seed(0)
    calls = []
    for index in range(8):
        sample = torch.randn(2, 4, 8, 8, generator=generator)
        timestep = torch.tensor([TIMESTEPS[index % 3]])  # the last step is not recorded
        calls.append(Call(sample, timestep, torch.randn(2, 5, 16, generator=generator)))
    return calls


def make_work(
    network: Work, scratch: Path, format: str = "int4", inputs: str | None = "int8", time: bool = False
) -> Work:
    """A copy of the network with every layer quantized by its largest weights."""
    unet = copy.deepcopy(network)
    layers = dict(family.quantizable(unet)) | (family.time_layers(unet) if time else {})
    scale = None if inputs is None else np.full(1, 4.0 / get(inputs).largest, np.float32)
    ones = (1.0,) * len(TIMESTEPS)
    return Work(
        pipeline=SimpleNamespace(unet=unet),
        sampling=Sampling("by hand", len(TIMESTEPS), 3.0, 32, 32, TIMESTEPS, ones, 1.0, ((),) * len(TIMESTEPS)),
        seed=0,
        recorder=lambda _: recorded(),  # type: ignore[arg-type,return-value]
        progress=lambda items, _: items,
        scratch=scratch,
        quantization={
            name: LayerQuant(weight_scale(module.weight, get(format), "max").numpy(), scale, format, inputs)
            for name, module in layers.items()
        },
    )


def pass_of(**fields: Any) -> ReconstructPass:
    defaults = {"iterations": 150, "rate": 0.05, "scale_iterations": 0, "batch": 8, "exclude": LATER}
    return ReconstructPass(**{**defaults, **fields})


@torch.no_grad()
def outputs(work: Work, unit: str, quantized: bool) -> torch.Tensor:
    """The unit's outputs on all recorded calls, by whole runs of the denoiser."""
    seen = []
    hook = work.denoiser.get_submodule(unit).register_forward_hook(
        lambda _, __, output: seen.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    with simulated(work.denoiser, work.quantization if quantized else {}, TIMESTEPS):
        for call in recorded():
            work.run(call)
    hook.remove()
    return torch.cat(seen)


def error(work: Work, unit: str, reference: torch.Tensor) -> float:
    return float((outputs(work, unit, quantized=True) - reference).norm() / reference.norm())


@pytest.mark.parametrize(("format", "inputs"), [("int4", "int8"), ("e2m1", None)])
def test_lowers_the_error_of_units_below_round_to_nearest(
    network: Work, tmp_path: Path, format: str, inputs: str | None
) -> None:
    work = make_work(network, tmp_path, format, inputs)
    references = {unit: outputs(work, unit, quantized=False) for unit in (RESNET, TRANSFORMER)}
    nearest = {unit: error(work, unit, reference) for unit, reference in references.items()}
    before = copy.deepcopy(work.denoiser.state_dict())
    task = pass_of()
    task.requires(work)
    summary = task.apply(work)
    for unit, reference in references.items():
        assert error(work, unit, reference) < 0.8 * nearest[unit], unit
    learned = [name for inside in task.learned(work).values() for name in inside]
    assert f"{len(learned)} layers" in summary
    for name, tensor in work.denoiser.state_dict().items():
        if name.removesuffix(".weight") not in learned:
            assert torch.equal(tensor, before[name]), name
    for name in learned:
        weight, layer = work.denoiser.get_submodule(name).weight, work.quantization[name]
        assert torch.equal(rounded_weight(weight, layer), weight), "learned weights lie on the grid"
        step = torch.from_numpy(layer.weight_scale).reshape(-1, *[1] * (weight.ndim - 1))
        step = step * (2.0 if format == "e2m1" else 1.0)  # the widest of E2M1
        assert bool(((weight - before[f"{name}.weight"]).abs() <= step * 1.0001).all())
        assert not torch.equal(weight, rounded_weight(before[f"{name}.weight"], layer)), "something was learned"


def test_learns_scales_of_inputs_that_were_far_too_wide(network: Work, tmp_path: Path) -> None:
    work = make_work(network, tmp_path, "int8", "int4")
    rows = np.array([2.0, 2.0, 1.5, 1.0], np.float32)
    work.quantization = {
        name: LayerQuant(layer.weight_scale, rows, "int8", "int4") for name, layer in work.quantization.items()
    }
    eased = np.geomspace(0.7, 1.4, 16).astype(np.float32)
    work.quantization[f"{RESNET}.conv2"] = replace(work.quantization[f"{RESNET}.conv2"], multiplier=eased)
    reference = outputs(work, RESNET, quantized=False)
    nearest = error(work, RESNET, reference)
    pass_of(iterations=0, scale_iterations=60, scale_rate=0.05).apply(work)
    refined = error(work, RESNET, reference)
    assert refined < 0.8 * nearest
    # What the pass computed while it learned is what the plan's simulation computes, step by step.
    (file,) = tmp_path.rglob(f"{RESNET}.safetensors")
    assert reconstruct.load(file).before == pytest.approx(nearest, rel=1e-4)
    assert reconstruct.load(file).after == pytest.approx(refined, rel=1e-4)
    learned = work.quantization[f"{RESNET}.conv1"].input_scale
    assert learned.dtype == np.float32
    assert learned.shape == (4,)
    assert learned[0] == learned[1] != 2.0, "steps that share a scale go on sharing it"
    assert learned[2] != 1.5
    assert learned[3] == 1.0, "no call was recorded at the last step"
    assert np.array_equal(work.quantization["mid_block.resnets.0.conv1"].input_scale, rows)


def test_scales_by_step_learn_one_factor_together(network: Work, tmp_path: Path, monkeypatch: Any) -> None:
    work = make_work(network, tmp_path, "int8", "int4")
    rows = np.array([2.0, 2.5, 1.5, 1.0], np.float32)
    work.quantization = {
        name: LayerQuant(layer.weight_scale, rows, "int8", "int4") for name, layer in work.quantization.items()
    }
    monkeypatch.setattr(reconstruct, "GROUPS", 3)
    pass_of(iterations=0, scale_iterations=30, scale_rate=0.05).apply(work)
    factors = work.quantization[f"{RESNET}.conv1"].input_scale / rows
    assert factors == pytest.approx(np.full(4, factors[0]))
    assert factors[0] < 0.9


def test_keeps_round_to_nearest_where_learning_does_not_help(network: Work, tmp_path: Path) -> None:
    work = make_work(network, tmp_path)
    before = copy.deepcopy(work.denoiser.state_dict())
    pass_of(iterations=2, rate=1e3, scale_iterations=2, scale_rate=50.0).apply(work)
    weight = work.denoiser.get_submodule(f"{RESNET}.conv1").weight
    assert torch.equal(weight, rounded_weight(before[f"{RESNET}.conv1.weight"], work.quantization[f"{RESNET}.conv1"]))
    assert work.quantization[f"{RESNET}.conv1"].input_scale[0] == np.float32(4.0 / 127)


def test_an_interrupted_run_goes_on_and_ends_like_an_uninterrupted_one(network: Work, tmp_path: Path) -> None:
    task = pass_of(iterations=12, scale_iterations=6)
    whole = make_work(network, tmp_path / "whole")
    task.apply(whole)

    def fails_after_one(items: Iterable[Any], _: str) -> Iterable[Any]:
        for index, item in enumerate(items):
            if index == 1:
                raise KeyboardInterrupt
            yield item

    broken = make_work(network, tmp_path / "resumed")
    broken.progress = fails_after_one
    with pytest.raises(KeyboardInterrupt):
        task.apply(broken)
    (state,) = (tmp_path / "resumed").rglob("*.safetensors")
    stamp = state.stat().st_mtime_ns

    resumed = make_work(network, tmp_path / "resumed")
    asked: list[str] = []
    resumed.progress = lambda items, _: [asked.append(item) or item for item in items]
    task.apply(resumed)
    assert asked == list(task.learned(resumed))[1:]
    assert state.stat().st_mtime_ns == stamp
    for name, tensor in whole.denoiser.state_dict().items():
        assert torch.equal(tensor, resumed.denoiser.state_dict()[name]), name
    for name, layer in whole.quantization.items():
        assert np.array_equal(layer.input_scale, resumed.quantization[name].input_scale), name

    other = make_work(network, tmp_path / "resumed")
    asked.clear()
    other.progress = lambda items, _: [asked.append(item) or item for item in items][:1]
    pass_of(iterations=13, scale_iterations=6).apply(other)
    assert len(asked) == len(task.learned(other)), "another option starts afresh"


def test_inputs_come_from_the_quantized_prefix_and_targets_from_full_precision(network: Work, tmp_path: Path) -> None:
    work = make_work(network, tmp_path)
    exact = make_work(network, tmp_path)
    task = pass_of(iterations=3)
    units = task.learned(work)
    state = reconstruct.State(work, {name for inside in units.values() for name in inside})
    first = state.capture(RESNET, recorded())
    assert first is not None
    quantized = {name: layer for name, layer in work.quantization.items() if name in units[RESNET]}
    result = reconstruct.optimise(
        RESNET, work.denoiser.get_submodule(RESNET), quantized, units[RESNET], first, task, seed=0
    )
    state.install(result)
    second = state.capture(TRANSFORMER, recorded())
    assert second is not None
    assert torch.allclose(second.targets, outputs(exact, TRANSFORMER, quantized=False), atol=1e-6)
    learned = {name: work.quantization[name] for name in units[RESNET]}
    with torch.no_grad(), simulated(work.denoiser, learned, TIMESTEPS):
        seen: list[torch.Tensor] = []
        hook = work.denoiser.get_submodule(TRANSFORMER).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for call in recorded():
            work.run(call)
        hook.remove()
    assert torch.allclose(second.args[0], torch.cat(seen), atol=1e-6)
    assert second.kwargs["encoder_hidden_states"].shape == (16, 5, 16)
    assert second.rows.tolist() == [index % 3 for index in range(8) for _ in range(2)]


def test_calls_that_skip_a_unit_are_left_out(network: Work, tmp_path: Path) -> None:
    work = make_work(network, tmp_path)
    variants = {FULL: Variant(writes=("up_0",)), "cached": Variant(reads=("up_0",))}
    work.program = StepProgram((FULL, "cached") * 2, variants)
    feature = torch.zeros(2, *feature_shapes(work.denoiser, ["up_0"], 8, 8)["up_0"])
    cached = [replace(call, variant="cached", features={"up_0": feature}) for call in recorded()[3:]]
    state = reconstruct.State(work, set(work.quantization))
    for unit, count in ((RESNET, 6), ("up_blocks.1.resnets.1", 16)):
        data = state.capture(unit, recorded()[:3] + cached)
        assert data is not None
        assert len(data.targets) == len(data.rows) == len(data.args[0]) == len(data.args[1]) == count
    assert state.capture(RESNET, cached) is None
    work.recorder = lambda _: cached  # type: ignore[assignment,return-value]
    with pytest.raises(DiffpressError, match="no recorded call"):
        pass_of().apply(work)


def test_time_projections_are_learned_only_when_asked(network: Work, tmp_path: Path) -> None:
    projection = f"{RESNET}.time_emb_proj"
    for temporal in (False, True):
        work = make_work(network, tmp_path / str(temporal), time=True)
        before = work.denoiser.get_submodule(projection).weight.clone()
        summary = pass_of(iterations=2, temporal=temporal).apply(work)
        after = work.denoiser.get_submodule(projection).weight
        assert torch.equal(before, after) is not temporal
        assert "2 layers outside of units (time_embedding.linear_1, time_embedding.linear_2)" in summary


def test_refuses_what_it_cannot_refine(network: Work, tmp_path: Path) -> None:
    work = make_work(network, tmp_path)
    with pytest.raises(DiffpressError, match="matches no unit"):
        pass_of(exclude=("encoder.*",)).requires(work)
    with pytest.raises(DiffpressError, match="no unit"):
        pass_of(exclude=("*",)).requires(work)
    work.denoiser.get_submodule(RESNET).conv1.bias.data[0] = torch.nan
    with pytest.raises(DiffpressError, match=f"{RESNET}.*not finite"):
        pass_of().apply(work)
    work.quantization = {}
    with pytest.raises(DiffpressError, match="put 'quantize' before"):
        pass_of().requires(work)


def test_units_that_a_call_takes_in_part_do_not_learn_from_it(network: Any, tmp_path: Path) -> None:
    """A feature in the place of a module answers for it: that is nothing for its unit to learn."""
    work = make_work(network, tmp_path)
    attention = f"{TRANSFORMER}.transformer_blocks.0.attn1"
    shapes = feature_shapes(work.denoiser, (RESNET, attention), 8, 8)
    features = {name: torch.randn(2, *shape) for name, shape in shapes.items()}
    variants = {FULL: Variant(writes=(RESNET, attention)), "cached": Variant(reads=(RESNET, attention))}
    work.program = StepProgram((FULL, "cached") * 2, variants)
    cached = [replace(call, variant="cached", features=features) for call in recorded()[3:]]
    state = reconstruct.State(work, set())
    for unit, calls in ((RESNET, 3), (TRANSFORMER, 3), ("up_blocks.1.resnets.0", 8)):
        data = state.capture(unit, recorded()[:3] + cached)
        assert data is not None and len(data.targets) == 2 * calls, unit
