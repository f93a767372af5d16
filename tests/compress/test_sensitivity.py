"""Sensitivity and mixed precision: what is measured, what a budget chooses, and that both can be trusted."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffpress.calibration.capture import Call
from diffpress.calibration.schedule import tabulate
from diffpress.compress.cache.deepcache import CachePass
from diffpress.compress.families import unet as family
from diffpress.compress.numerics.formats import get
from diffpress.compress.numerics.ranges import weight_scale
from diffpress.compress.quantize import sensitivity
from diffpress.compress.quantize.post_training import QuantizePass
from diffpress.compress.quantize.sensitivity import (
    Budget,
    Layer,
    MixedPrecisionPass,
    Option,
    Target,
    Traffic,
    choose,
    does_not_pay,
    final_latents,
    measure,
    ordered,
)
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import LayerQuant

STEPS, GUIDANCE = 4, 3.0


def scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


@pytest.fixture(scope="module")
def shared_unet() -> Any:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            mid_block_type=None,
            block_out_channels=(32, 32),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
        ).requires_grad_(False)


class Recorded(list[Call]):
    """Recordings in memory, of every second call."""

    def rows(self) -> set[int]:
        return set(range(0, STEPS, 2))


@pytest.fixture
def work(shared_unet: Any, tmp_path: Path) -> Work:
    """Two recorded prompts with two calls each; weights are put back by every test that changes them."""
    sampling = tabulate(scheduler(), STEPS, GUIDANCE, 64, 64)
    generator = torch.Generator().manual_seed(1)
    calls = Recorded()
    for _ in range(2):
        text = torch.randn(2, 5, 32, generator=generator)
        for timestep in sampling.timesteps[::2]:
            sample = torch.randn(1, 4, 8, 8, generator=generator).repeat(2, 1, 1, 1)
            calls.append(Call(sample, torch.tensor([timestep]), text))
    made = Work(SimpleNamespace(unet=shared_unet), sampling, 0, lambda _: calls, lambda items, _: items, tmp_path)  # type: ignore[arg-type,return-value]
    made.scorer = None
    return made


def weights_only(work: Work, names: list[str]) -> dict[str, dict[str, LayerQuant]]:
    layers = {name: work.denoiser.get_submodule(name) for name in names}
    scales = {name: weight_scale(layer.weight, get("int8"), "max").numpy() for name, layer in layers.items()}
    return {name: {"int8 weights": LayerQuant(scale, None, "int8", None)} for name, scale in scales.items()}


NAMES = [
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v",
    "up_blocks.0.resnets.0.conv1",
    "up_blocks.1.resnets.1.conv2",
]


@pytest.mark.parametrize("error", ["output", "latent"])
def test_a_layer_made_sensitive_ranks_first(work: Work, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = work.denoiser.get_submodule(NAMES[2]).weight
    changed = weight.data.clone()
    changed[:, 0] *= 300  # one input channel takes the range, and the others' weights round to nothing
    monkeypatch.setattr(weight, "data", changed)
    errors = measure(work, weights_only(work, NAMES), error, prompts=2)
    found = {name: by["int8 weights"] for name, by in errors.items()}
    assert max(found, key=found.__getitem__) == NAMES[2]
    assert all(0 < value < found[NAMES[2]] / 2 for name, value in found.items() if name != NAMES[2])


def test_what_rounding_does_not_change_costs_nothing(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = work.denoiser.get_submodule(NAMES[0]).weight
    integers = torch.randint(-127, 128, weight.shape, generator=torch.Generator().manual_seed(0)).float()
    integers[:, 0] = 127
    monkeypatch.setattr(weight, "data", integers / 1024)
    errors = measure(work, weights_only(work, NAMES[:2]))
    assert errors[NAMES[0]]["int8 weights"] == 0
    assert errors[NAMES[1]]["int8 weights"] > 0


def test_an_interrupted_measurement_goes_on_and_a_finished_one_is_read(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = weights_only(work, NAMES)

    def interrupted(items: Any, _: str) -> Any:
        yield from itertools.islice(items, 2)
        raise KeyboardInterrupt

    work.progress = interrupted
    with pytest.raises(KeyboardInterrupt):
        measure(work, candidates)
    left: list[Any] = []
    work.progress = lambda items, _: left.extend(items) or left  # type: ignore[func-returns-value]
    errors = measure(work, candidates)
    assert [name for name, _ in left] == NAMES[2:]
    monkeypatch.setattr(sensitivity, "deviation", lambda run: pytest.fail("measured again"))
    assert measure(work, candidates) == errors
    assert not list(work.scratch.glob("*.partial"))
    with pytest.raises(pytest.fail.Exception):  # other ranges are another measurement
        layer = candidates[NAMES[0]]["int8 weights"]
        measure(work, {NAMES[0]: {"int8 weights": LayerQuant(layer.weight_scale * 2, None, "int8", None)}})


def test_a_denoiser_that_is_not_finite_is_named(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = work.denoiser.get_submodule(NAMES[0]).weight
    monkeypatch.setattr(weight, "data", weight.data * torch.nan)
    with pytest.raises(DiffpressError, match="not finite before"):
        measure(work, {NAMES[1]: {"int8 weights": LayerQuant(np.ones(32, np.float32), None, "int8", None)}})


@torch.no_grad()
def test_final_latents_are_those_of_the_scheduler(work: Work) -> None:
    prompts = [call for call in work.record() if float(call.timestep) == work.sampling.timesteps[0]]
    stock = scheduler()
    stock.set_timesteps(STEPS)
    for index, (call, got) in enumerate(zip(prompts, final_latents(work, prompts), strict=True)):
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(index))
        for timestep in stock.timesteps:
            plain, told = work.denoiser(torch.cat([x, x]), timestep, call.text).sample.chunk(2)
            x = stock.step(plain + GUIDANCE * (told - plain), timestep, x).prev_sample
        assert torch.allclose(got, x[0], atol=1e-4)
    CachePass(interval=2, branch=0).apply(work)
    assert not torch.allclose(final_latents(work, prompts)[0], got, atol=1e-4)  # cached steps are run as such


def table(count: int, seed: int = 0) -> dict[str, Layer]:
    """Layers of 1000 parameters and up with an option of 8 bits and one of 4, of random errors."""
    draw = np.random.default_rng(seed)
    made = {}
    for index in range(count):
        size = int(draw.integers(10, 200)) * 100
        errors = sorted(draw.uniform(0.001, 0.1, 2))
        options = (Option("int8", size, errors[0]), Option("int4 weights", size // 2, errors[1]))
        made[f"layer{index}"] = Layer("linear", (size // 100, 100), None, options)
    return made


def size_of(layers: dict[str, Layer], chosen: dict[str, str]) -> int:
    return sum(
        next(option.bytes for option in layer.options if option.name == chosen[name]) if name in chosen else layer.bytes
        for name, layer in layers.items()
    )


def error_of(layers: dict[str, Layer], chosen: dict[str, str]) -> float:
    return math.sqrt(
        sum(next(o.error for o in layers[name].options if o.name == format) ** 2 for name, format in chosen.items())
    )


def test_budgets_are_respected_and_more_bytes_never_cost_more_error() -> None:
    layers = table(30)
    whole, rest = size_of(layers, {}), 5000
    before: tuple[float, int] | None = None
    for share in (1.0, 0.8, 0.6, 0.5, 0.4, 0.3):
        chosen = choose(layers, share * whole + rest, rest=rest)
        assert size_of(layers, chosen) <= share * whole
        now = error_of(layers, chosen), sum(len(name) for name in chosen.values())
        assert before is None or now[0] > before[0]
        before = now
    assert choose(layers, whole + rest, rest=rest) == {}
    with pytest.raises(DiffpressError, match="cannot be met: the smallest choice takes"):
        choose(layers, 0.2 * whole)


@pytest.mark.parametrize("seed", range(4))
def test_every_prefix_is_the_best_choice_for_its_bytes(seed: int) -> None:
    layers = table(5, seed)
    every = [
        {name: format for name, format in zip(layers, formats, strict=True) if format}
        for formats in itertools.product(("", "int8", "int4 weights"), repeat=len(layers))
    ]
    moves = ordered(layers)
    for count in range(len(moves) + 1):
        chosen = {name: option.name for name, option in moves[:count]}
        size = size_of(layers, chosen)
        best = min(error_of(layers, other) for other in every if size_of(layers, other) <= size)
        assert error_of(layers, chosen) == pytest.approx(best)


def test_options_above_the_hull_and_those_that_save_nothing_are_skipped() -> None:
    poor = Layer("linear", (10, 10), None, (Option("int8", 100, 0.5), Option("int4 weights", 50, 0.1)))
    useless = Layer("linear", (10, 10), None, (Option("int8", 250, 0.0),))
    assert [(name, option.name) for name, option in ordered({"a": poor, "b": useless})] == [("a", "int4 weights")]


@pytest.mark.parametrize("threshold", [0, 1, 7, 22, 40])
def test_bisection_finds_the_last_choice_within_the_loss(threshold: int) -> None:
    layers = table(20, seed=1)
    moves = ordered(layers)
    sizes = {size_of(layers, {n: o.name for n, o in moves[:count]}): count for count in range(len(moves) + 1)}
    asked = []

    def loss(chosen: dict[str, str]) -> float:
        asked.append(sizes[size_of(layers, chosen)])
        return 0.25 * asked[-1]

    chosen = choose(layers, loss=loss, at_most_loss=0.25 * threshold)
    assert sizes[size_of(layers, chosen)] == min(threshold, len(moves))
    assert len(asked) <= 2 + math.ceil(math.log2(len(moves)))


def test_both_budgets_hold_or_are_refused() -> None:
    layers = table(10)
    half = 0.5 * size_of(layers, {})
    assert choose(layers, half, loss=lambda _: 1.0, at_most_loss=2.0) == choose(layers, half)
    with pytest.raises(DiffpressError, match="loses 3 where 2 is allowed"):
        choose(layers, half, loss=lambda _: 3.0, at_most_loss=2.0)


def test_without_a_budget_every_layer_gets_what_is_preferred() -> None:
    assert set(choose(table(5)).values()) == {"int8"}


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Linear(64, 64), ""),
        (nn.Conv2d(4, 32, 3), "4 inputs and 32 outputs are not both multiples of 16"),
        (nn.Linear(64, 24), "64 inputs and 24 outputs"),
        (nn.Conv2d(32, 32, 3, groups=32), "1 inputs"),
        (nn.Linear(16, 16), "256 parameters are fewer than 1000"),
    ],
)
def test_small_and_odd_layers_do_not_pay(module: Any, why: str) -> None:
    found = does_not_pay(module, min_parameters=1000)
    assert found.startswith(why) if why else not found


def test_latency_is_the_longer_of_computing_and_moving() -> None:
    target = Target(rates={"float": 100.0, "int8": 400.0}, bandwidth=10.0, float_bytes=4)
    scale = np.ones(1, np.float32)
    int8 = LayerQuant(scale, scale)
    heavy = Traffic(multiply_adds=10**9, inputs=1000, outputs=1000)
    assert target.latency_ms(heavy, 4000) == pytest.approx(10.0)
    # A quarter of the arithmetic, and inputs read as float and written as int8 before it.
    assert target.latency_ms(heavy, 1000, int8) == pytest.approx(2.5 + 5000 / 10e9 * 1e3)
    light = Traffic(multiply_adds=1000, inputs=10**6, outputs=1000)
    assert target.latency_ms(light, 4000) == pytest.approx((4 * 10**6 + 8000) / 10e9 * 1e3)
    assert target.latency_ms(light, 1000, int8) > target.latency_ms(light, 4000)  # type: ignore[operator]
    assert target.latency_ms(heavy, 500, LayerQuant(scale, None, "int4", None)) == pytest.approx(10.0)
    assert target.latency_ms(heavy, 500, LayerQuant(scale, scale, "int4", "int8")) is None
    assert target.latency_ms(heavy, 500, LayerQuant(scale, scale, "e4m3", "e4m3")) is None


def test_the_pass_meets_its_budget_and_leaves_a_table(work: Work) -> None:
    step = MixedPrecisionPass(
        candidates=("int8", "int4"),
        budget=Budget(bytes=0.45),
        calls=1,
        min_parameters=1024,
        override={"*.attn1.*": "float", "*.attn1.to_v": "int4"},
    )
    step.requires(work)
    before = {name: value.clone() for name, value in work.denoiser.state_dict().items()}
    summary = step.apply(work)
    assert all(torch.equal(value, before[name]) for name, value in work.denoiser.state_dict().items())
    rows = {row["layer"]: row for row in work.tables["sensitivity"]}
    assert json.loads(json.dumps(work.tables["sensitivity"], allow_nan=False))
    assert set(rows) == set(family.quantizable(work.denoiser))
    assert set(work.quantization) == {name for name, row in rows.items() if row["format"] != "float"}
    total = 2 * sum(parameter.numel() for parameter in work.denoiser.parameters())
    assert total - sum(2 * row["parameters"] - row["bytes"] for row in rows.values()) <= 0.45 * total
    assert {layer.name for layer in work.quantization.values()} == {"int8", "int4 weights"}
    for name, row in rows.items():
        if name.endswith("attn1.to_v"):
            assert row["format"] == "int4 weights"
        elif ".attn1." in name:
            assert (row["format"], row["why"]) == ("float", "override")
        elif row["format"] != "float":
            assert {option["name"] for option in row["candidates"]} == {"int8", "int4 weights"}
            assert row["error"] > 0
    assert "layers quantized" in summary
    assert "by override" in summary


def test_a_scorer_judges_by_running_what_was_chosen(work: Work) -> None:
    def score(metric: str) -> float:
        assert metric == "accuracy"
        return 90 - 0.5 * sum(bool(module._forward_pre_hooks) for module in work.denoiser.modules())

    work.scorer = score
    step = MixedPrecisionPass(candidates=("int8",), budget=Budget(accuracy=2.0), calls=1, min_parameters=1024)
    step.requires(work)
    step.apply(work)
    assert len(work.quantization) == 4


def test_a_latent_budget_is_measured_here(work: Work) -> None:
    step = MixedPrecisionPass(candidates=("int4",), budget=Budget(latent=0.05), calls=1, prompts=1, min_parameters=1024)
    step.requires(work)
    step.apply(work)
    chosen = dict(work.quantization)
    assert 0 < len(chosen) < len(family.quantizable(work.denoiser))
    _, run = sensitivity.probe(work, "latent", 1, 1)
    measured = sensitivity.deviation(run)
    with sensitivity.simulated(work.denoiser, chosen, work.sampling.timesteps):
        assert measured() <= 0.05


def test_layers_that_an_earlier_pass_quantized_stay_only_where_they_pay(work: Work) -> None:
    QuantizePass().apply(work)
    before = dict(work.quantization)
    step = MixedPrecisionPass(calls=1, min_parameters=4096)
    step.requires(work)
    summary = step.apply(work)
    small = {name for name in before if work.denoiser.get_submodule(name).weight.numel() < 4096}
    assert 0 < len(small) < len(before)
    assert set(work.quantization) == set(before) - small
    assert all(work.quantization[name] is before[name] for name in work.quantization)  # their ranges are kept
    assert f"{len(small)} that do not pay" in summary


def test_a_target_without_gain_keeps_everything_in_float(work: Work) -> None:
    slow = Target(rates={"float": 100.0, "int8": 100.0}, bandwidth=1000.0)
    step = MixedPrecisionPass(candidates=("int8",), calls=1, min_parameters=1024, target=slow)
    step.apply(work)
    assert not work.quantization
    rows = [row for row in work.tables["sensitivity"] if row["why"].startswith("estimated")]
    assert rows
    assert all(row["float_ms"] > 0 and row["latency_ms"] == row["float_ms"] for row in rows)


def test_weights_that_a_pass_has_changed_are_refused(work: Work) -> None:
    work.originals[f"{NAMES[0]}.weight"] = work.denoiser.get_submodule(NAMES[0]).weight.data
    with pytest.raises(DiffpressError, match="come after it"):
        MixedPrecisionPass(candidates=("int8",)).requires(work)


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (MixedPrecisionPass(), "put 'quantize' before it"),
        (MixedPrecisionPass(candidates=("int8",), override={"nothing.*": "float"}), "'nothing.*' matches no layer"),
        (MixedPrecisionPass(candidates=("int8",), budget=Budget(clip=0.2)), "measures the loss of clip"),
        (MixedPrecisionPass(candidates=("int8",), target=Target(rates={"int8": 1.0}, bandwidth=1.0)), "'float'"),
    ],
)
def test_what_cannot_be_done_is_refused(work: Work, step: MixedPrecisionPass, told: str) -> None:
    with pytest.raises(DiffpressError, match=told):
        step.requires(work)
