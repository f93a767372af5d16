"""MagCache: masks worked out by hand, ratios of known residuals, and what the pass plans."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffpress.calibration.model import load_pipeline
from diffpress.compress.cache.magcache import MagCachePass, mask, measured_ratios
from diffpress.compress.cache.program import CACHED
from diffpress.compress.cache.walk import walk
from diffpress.compress.families.unet_graph import WHOLE, UNetGraph
from diffpress.compress.schedule.stepping import first_calls, seeded
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import CONDITIONAL, FULL, REUSE, StepProgram, Variant


def marks(full: list[bool]) -> str:
    return "".join("#" if runs else "-" for runs in full)


@pytest.mark.parametrize(
    ("ratios", "threshold", "most", "retained", "wanted"),
    [
        # Errors after step 0: .1, then .19, in all .29; after step 2 again .1.
        ([1.0, 0.9, 0.9, 0.9, 0.9], 0.24, 5, 1, "#-#-#"),
        # .1, .29, .561 (the product is .729 then), so that the third skipped step is the last below .6.
        ([1.0, 0.9, 0.9, 0.9, 0.9], 0.6, 5, 1, "#---#"),
        # Ratios that undo each other: .25 then 0, so that their sum stays.
        ([1.0, 1.25, 0.8, 1.0, 1.25], 0.3, 5, 1, "#---#"),
        ([1.0] * 9, 0.24, 3, 1, "#---#---#"),
        ([1.0] * 6, 0.24, 9, 4, "####--"),
        ([1.0] * 3, 0.24, 9, 0, "#--"),  # the first is never cached
        ([1.0] * 4, 0.0, 9, 1, "####"),
        ([1.0, 2.0, 1.0], 0.24, 5, 1, "##-"),  # the error starts anew at a full step
        ([1.0, 0.5, 0.9, 0.9], 0.24, 5, 2, "##-#"),  # those of retained steps do not count
    ],
)
def test_masks_by_hand(ratios: list[float], threshold: float, most: int, retained: int, wanted: str) -> None:
    assert marks(mask(ratios, threshold, most, retained)) == wanted


def test_a_step_of_both_halves_waits_for_a_writer_of_both() -> None:
    assert marks(mask([1.0] * 6, 0.24, 5, 1, (FULL, REUSE) * 3)) == "#-----"
    guidance = (CONDITIONAL, CONDITIONAL, FULL, FULL, CONDITIONAL, CONDITIONAL)
    assert marks(mask([1.0] * 6, 0.24, 5, 1, guidance)) == "#-#---"


@torch.no_grad()
def by_hand(work: Work, feature: str) -> list[float]:
    """Ratios of both recorded prompts, sampled one after the other with all steps full."""
    calls = first_calls(work.recorded())
    sums, noise = [0.0] * len(work.sampling.timesteps), seeded(calls, work.seed)
    graph = UNetGraph(work.denoiser, writes=(feature,))
    for number, call in enumerate(calls):
        x, before = noise[number : number + 1], None
        for index, timestep in enumerate(work.sampling.timesteps):
            output, value = graph(torch.cat([x, x]), torch.tensor([timestep]), call.text)
            if before is not None:
                for half in range(2):
                    ratio = (value[half].square().sum(0) / before[half].square().sum(0)).sqrt()
                    sums[index] += float(ratio.mean()) / (2 * len(calls))
            before = value
            u, c = output.chunk(2)
            guided = u + work.sampling.guidance_scale * (c - u)
            x = sum(k * {"sample": x, "output": guided}[kind] for kind, _, k in work.sampling.terms[index])  # type: ignore[assignment]
    return sums


@pytest.mark.parametrize("chunk", [8, 1])
def test_ratios_are_means_over_prompts_halves_and_positions(
    work: Work, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffpress.compress.schedule.stepping.CHUNK", chunk)
    expected = [1.0, *by_hand(work, "up_1")[1:]]
    assert measured_ratios(work, "up_1", 2) == pytest.approx(expected, rel=1e-4)
    assert measured_ratios(work, "up_1", 1) != pytest.approx(expected, rel=1e-4)


def test_ratios_under_economy_are_those_of_the_rows_that_run(work: Work) -> None:
    shown: list[int] = []
    work.program = StepProgram((FULL,) * 4, guidance=(FULL, REUSE, FULL, REUSE))
    walk(work, (WHOLE,), 2, lambda _, __, features: shown.append(len(features[WHOLE])), "")
    assert shown == [4, 2, 4, 2]
    assert all(0 < ratio < 10 for ratio in measured_ratios(work, WHOLE, 2))


def test_the_pass_plans_what_it_measured(work: Work) -> None:
    step = MagCachePass(threshold=100.0, max_consecutive=2, retain=0.0, prompts=1)
    step.requires(work)
    summary = step.apply(work)
    assert work.program.steps == (FULL, CACHED, CACHED, FULL)
    assert work.program.variants == {FULL: Variant(writes=(WHOLE,)), CACHED: Variant(reads=(WHOLE,))}
    assert summary == "2 of 4 steps run in full, the others reuse whole: #--#"
    assert [row["full"] for row in work.tables["magcache"]] == [True, False, False, True]
    with pytest.raises(DiffpressError, match="magcache: an earlier pass planned a cache already"):
        step.requires(work)


def test_without_a_threshold_the_plan_is_the_plain_one(work: Work) -> None:
    plain = work.program
    MagCachePass(threshold=0.0, retain=0.0, branch=1).apply(work)
    assert work.program == plain


def test_a_branch_that_does_not_exist_is_refused(work: Work) -> None:
    with pytest.raises(DiffpressError, match="magcache: branch 4 does not exist, this denoiser has branches 0 to 3"):
        MagCachePass(branch=4).requires(work)


def test_values_that_are_not_finite_are_named(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"up_0": torch.full((2, 1, 1, 1), float("nan"))}
    monkeypatch.setattr("diffpress.compress.cache.magcache.walk", lambda *a: [a[3](i, None, broken) for i in range(4)])
    with pytest.raises(DiffpressError, match="not finite"):
        measured_ratios(work, "up_0", 1)


def test_the_law_holds_for_a_trained_model() -> None:
    """Ratios of the trained pipeline hardly depend on the prompt, which is what the method rests on."""
    pipeline: Any = load_pipeline("shapes")
    from diffpress.calibration.capture import Call
    from diffpress.calibration.schedule import tabulate

    sampling = tabulate(pipeline.scheduler, 5, 2.0, *[pipeline.unet.config.sample_size * pipeline.vae_scale_factor] * 2)
    calls = []
    for prompt in ("a red circle", "a small blue star left of a large green square"):
        positive, negative = pipeline.encode_prompt(prompt, "cpu", 1, True)
        text = torch.cat([negative, positive]).detach()
        size = pipeline.unet.config.sample_size
        calls.append(Call(torch.zeros(2, pipeline.unet.config.in_channels, size, size), torch.ones(1), text))
    found = []
    for call in calls:
        made = Work(pipeline, sampling, 0, lambda _, call=call: [call], lambda items, _: items, Path())  # type: ignore[misc,arg-type,return-value]
        found.append(measured_ratios(made, WHOLE, 1))
    assert found[0] == pytest.approx(found[1], abs=0.1)
    assert all(0.5 < ratio < 1.5 for ratio in found[0])
