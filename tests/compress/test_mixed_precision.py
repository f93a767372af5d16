"""The mixed-precision pass: it meets its budget, leaves a table, and refuses what it cannot do."""

import json

import pytest
import torch

from diffpress.compress.families import unet as family
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.quantize.budget import Budget
from diffpress.compress.quantize.latency import Target
from diffpress.compress.quantize.mixed_precision import MixedPrecisionPass
from diffpress.compress.quantize.post_training import QuantizePass
from diffpress.compress.quantize.sensitivity import deviation, probe
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError


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


def test_what_an_interrupted_choice_has_scored_is_not_scored_again(work: Work) -> None:
    asked: list[int] = []

    def score(metric: str) -> float:
        asked.append(sum(bool(module._forward_pre_hooks) for module in work.denoiser.modules()))
        return 40 - 0.1 * asked[-1]

    def stops(metric: str) -> float:
        if len(asked) == 3:
            raise KeyboardInterrupt
        return score(metric)

    step = MixedPrecisionPass(candidates=("int8",), budget=Budget(clip=1.0), calls=1, min_parameters=1024)
    work.scorer = stops
    with pytest.raises(KeyboardInterrupt):
        step.apply(work)
    work.scorer = score
    step.apply(work)
    assert len(work.quantization) == 4  # each costs a quarter of a percent
    assert 0 in asked and len(set(asked)) == len(asked) > 3  # every state once, the float reference among them


def test_a_latent_budget_is_measured_here(work: Work) -> None:
    step = MixedPrecisionPass(candidates=("int4",), budget=Budget(latent=0.05), calls=1, prompts=1, min_parameters=1024)
    step.requires(work)
    step.apply(work)
    chosen = dict(work.quantization)
    assert 0 < len(chosen) < len(family.quantizable(work.denoiser))
    _, run = probe(work, "latent", 1, 1)
    measured = deviation(run)
    with simulated(work.denoiser, chosen, work.sampling.timesteps):
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
    name = next(iter(family.quantizable(work.denoiser)))
    work.originals[f"{name}.weight"] = work.denoiser.get_submodule(name).weight.data
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
