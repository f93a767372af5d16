"""Run-time thresholds as plans: decisions by hand, a known polynomial, and the rules against a cache that runs them."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial

from diffpress.compress.cache.program import CACHED
from diffpress.compress.cache.threshold import FreezePass, Rule, decided, fit, mapped, modulation
from diffpress.compress.cache.walk import relative_l1
from diffpress.compress.families.unet import down_layers, entrance
from diffpress.compress.families.unet_graph import WHOLE, UNetGraph
from diffpress.compress.schedule.stepping import first_calls, seeded
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import CONDITIONAL, FULL, REUSE, StepProgram, Variant


@pytest.mark.parametrize(
    ("sums", "changes", "threshold", "most", "wanted"),
    [
        # Sums .1, .2, .3: the third reaches the threshold and starts anew.
        (True, [0, 0.1, 0.1, 0.11, 0.1, 0.1, 0.1], 0.3, 9, "#--#--#"),
        (True, [0, 0.4, 0.1, 0.1, 0.4, 0.1], 0.3, 9, "##--##"),
        (False, [0, 0.1, 0.2, 0.31, 0.1, 0.29, 0.1], 0.3, 9, "#--#--#"),
        (False, [0, 0.1, 0.3, 0.1], 0.3, 9, "#-##"),  # below it, not at it
        (True, [0] * 8, 0.3, 2, "#--#--##"),
        (False, [0] * 8, 0.3, 2, "#--#--##"),
        (True, [0] * 4, 0.0, 9, "####"),
        (False, [0] * 4, 0.0, 9, "####"),
        (True, [0] * 2, 0.3, 9, "##"),  # the first and the last
        (True, [0], 0.3, 9, "#"),
    ],
)
def test_decisions_by_hand(sums: bool, changes: list[float], threshold: float, most: int, wanted: str) -> None:
    rule = Rule(sums, threshold, most, len(changes))
    assert "".join("#" if rule.full(*step) else "-" for step in enumerate(changes)) == wanted


def test_a_step_of_both_halves_waits_for_a_writer_of_both() -> None:
    rule = Rule(False, 0.3, 9, 6, (CONDITIONAL, CONDITIONAL, FULL, FULL, REUSE, FULL))
    assert [rule.full(index, 0.0) for index in range(6)] == [True, False, True, False, False, True]


def test_a_known_polynomial_is_recovered() -> None:
    known = Polynomial([0.01, 2.0, -7.0, 30.0, 11.0])
    changes = np.random.default_rng(0).uniform(0.02, 0.4, 60)
    np.testing.assert_allclose(fit(changes, known(changes), 4).convert().coef, known.coef, rtol=1e-6)
    assert fit(changes[:3], known(changes[:3]), 4).degree() == 2  # through three points
    assert fit(np.full(4, 0.1), np.array([1.0, 2.0, 3.0, 2.0]), 4)(0.1) == pytest.approx(2.0)
    with pytest.raises(DiffpressError, match="not finite"):
        fit(changes, known(changes) * np.nan, 4)


def test_a_polynomial_is_not_asked_beyond_what_it_knows() -> None:
    steep = fit(np.array([0.1, 0.2, 0.3]), np.array([0.0, 0.1, 0.4]), 2)
    np.testing.assert_allclose(mapped(steep, np.array([0.0, 0.1, 0.3, 9.0])), [0, 0, 0.4, 0.4], atol=1e-12)
    assert mapped(Polynomial([-1.0], domain=[0.0, 1.0]), np.array([0.5])) == [0.0]


def test_relative_changes_are_those_of_each_row() -> None:
    before = torch.tensor([[1.0, -3.0], [2.0, 2.0]])
    value = torch.tensor([[2.0, -2.0], [2.0, 1.0]])
    assert relative_l1(value, before).tolist() == pytest.approx([0.5, 0.25])
    assert relative_l1(value, before[1:]).tolist() == pytest.approx(
        [0.25]
    )  # of the conditional half, if one has no more
    assert relative_l1(before[:1], torch.zeros(1, 2)).isfinite().all()


def test_the_entrance_is_what_the_first_layer_does(work: Work) -> None:
    unet, call = work.denoiser, next(iter(work.recorded()))
    layer: Any = down_layers(unet)[0]
    resnet = layer.resnet
    with torch.no_grad():
        modulated, residual = entrance(unet, call.sample, call.timestep, call.text)
        hidden = unet.conv_in(call.sample)
        time = unet.time_embedding(unet.time_proj(call.timestep))
        first = resnet.conv1(torch.nn.functional.silu(resnet.norm1(hidden)))
        first = first + resnet.time_emb_proj(torch.nn.functional.silu(time))[:, :, None, None]
        torch.testing.assert_close(modulated, torch.nn.functional.silu(resnet.norm2(first)))
        _, before, after = UNetGraph(unet, writes=("skip_0", "skip_1"))(call.sample, call.timestep, call.text)
        torch.testing.assert_close(residual, after - before)
    assert not resnet.conv2._forward_pre_hooks


@torch.no_grad()
def run(work: Work, rule: str, threshold: float, most: int, polynomial: Polynomial | None) -> list[bool]:
    """A cache that decides while it samples, both recorded prompts as one batch."""
    calls = first_calls(work.recorded())
    text = torch.cat([torch.stack([call.text[half] for call in calls]) for half in range(2)])
    x, full, writer, total = seeded(calls, work.seed), list[bool](), 0, 0.0
    before = x
    last = len(work.sampling.timesteps) - 1
    for index, timestep in enumerate(work.sampling.timesteps):
        inputs = (torch.cat([x, x]), torch.tensor([timestep]), text)
        now = entrance(work.denoiser, *inputs)[0 if rule == "teacache" else 1]
        if index:
            rows = [float((a - b).abs().mean() / b.abs().mean()) for a, b in zip(now, before, strict=True)]
            if polynomial is None:
                total = float(np.mean(rows))
            else:
                total += float(np.mean(mapped(polynomial, np.array(rows))))
        full.append(index in (0, last) or total >= threshold or index - writer > most)
        if full[-1]:
            output, kept = UNetGraph(work.denoiser, writes=(WHOLE,))(*inputs)
            writer, total = index, 0.0
        else:
            (output,) = UNetGraph(work.denoiser, (WHOLE,))(*inputs, kept)
        if full[-1] or polynomial is not None:
            before = now
        u, c = output.chunk(2)
        guided = u + work.sampling.guidance_scale * (c - u)
        x = sum(k * {"sample": x, "output": guided}[kind] for kind, _, k in work.sampling.terms[index])  # type: ignore[assignment]
    return full


@pytest.mark.parametrize("chunk", [8, 1])
@pytest.mark.parametrize("rule", ["teacache", "first-block"])
def test_the_plan_is_what_the_rule_decides_while_sampling(
    work: Work, rule: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffpress.compress.schedule.stepping.CHUNK", chunk)
    polynomial = fit(*modulation(work, WHOLE, 2), 4) if rule == "teacache" else None
    first, _ = decided(work, WHOLE, Rule(rule == "teacache", 0.0, 5, 4), polynomial, 2)
    assert first[0] == 0 and min(first[1:]) > 0
    seen = set()
    for threshold in (first[1] * 0.9, first[1] * 1.1, first[2] * 1.1, 1e9):
        _, full = decided(work, WHOLE, Rule(rule == "teacache", threshold, 5, 4), polynomial, 2)
        assert full == run(work, rule, threshold, 5, polynomial)
        seen.add(tuple(full))
    assert len(seen) > 1  # thresholds that tell


def test_modulation_pairs_the_rows_of_input_and_output(work: Work) -> None:
    inputs, outputs = modulation(work, WHOLE, 2)
    assert inputs.shape == outputs.shape == (3 * 2 * 2,) and (inputs > 0).all() and (outputs > 0).all()
    work.program = StepProgram((FULL,) * 4, guidance=(FULL, REUSE, FULL, CONDITIONAL))
    inputs, outputs = modulation(work, WHOLE, 2)
    assert inputs.shape == outputs.shape == (3 * 2,)  # one step of each pair has the conditional half alone


@pytest.mark.parametrize("rule", ["teacache", "first-block"])
def test_the_pass_plans_under_economy_too(work: Work, rule: str) -> None:
    work.program = StepProgram((FULL,) * 4, guidance=(FULL, REUSE) * 2)
    step = FreezePass(rule=rule, threshold=100.0, prompts=2)  # type: ignore[arg-type]
    step.requires(work)
    summary = step.apply(work)
    assert work.program.steps == (FULL, CACHED, CACHED, FULL) and work.program.guidance == (FULL, REUSE) * 2
    assert work.program.variants == {FULL: Variant(writes=(WHOLE,)), CACHED: Variant(reads=(WHOLE,))}
    assert summary == f"2 of 4 steps run in full by {rule}, the others reuse whole: #--#"
    assert [row["full"] for row in work.tables["freeze"]] == [True, False, False, True]
    with pytest.raises(DiffpressError, match="freeze: an earlier pass planned a cache already"):
        step.requires(work)


def test_guidance_in_the_middle_is_no_obstacle(work: Work) -> None:
    work.program = StepProgram((FULL,) * 4, guidance=(CONDITIONAL, FULL, FULL, CONDITIONAL))
    FreezePass(rule="first-block", threshold=100.0, prompts=1).apply(work)
    assert work.program.steps == (FULL, FULL, CACHED, FULL)


@pytest.mark.parametrize("rule", ["teacache", "first-block"])
def test_without_a_threshold_the_plan_is_the_plain_one(work: Work, rule: str) -> None:
    plain = work.program
    FreezePass(rule=rule, threshold=0.0, branch=1, prompts=1).apply(work)  # type: ignore[arg-type]
    assert work.program == plain


def test_a_branch_that_does_not_exist_is_refused(work: Work) -> None:
    with pytest.raises(DiffpressError, match="freeze: branch 9 does not exist, this denoiser has branches 0 to 3"):
        FreezePass(branch=9).requires(work)
