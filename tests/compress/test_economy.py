"""Guidance economy in torch, against a sampling loop written out here, and recordings made under it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpress.calibration import capture
from diffpress.calibration.capture import PLAIN, Execution, Recordings
from diffpress.calibration.model import load_pipeline
from diffpress.calibration.schedule import tabulate
from diffpress.calibration.sets import CalibrationSet
from diffpress.compress.cache.deepcache import CachePass
from diffpress.compress.cache.execute import executed, execution
from diffpress.compress.cache.program import CACHED
from diffpress.compress.families.unet_graph import UNetGraph
from diffpress.compress.quantize.sensitivity import final_latents
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import CONDITIONAL, FULL, MEAN, REUSE, StepProgram, Variant

STEPS, BRANCH, DEEP, SCALE = 6, 1, "up_1", 3.0
PROMPTS = ("a red ring", "a star")
VARIANTS = {FULL: Variant(writes=(DEEP,)), CACHED: Variant(reads=(DEEP,))}
GUIDANCE = (FULL, REUSE, FULL, FULL, REUSE, CONDITIONAL)
# With cached steps that take half of a feature, and one that was written for half.
PROGRAMS = {
    "plain": StepProgram((FULL,) * STEPS, guidance=GUIDANCE),
    "cached": StepProgram((FULL, CACHED, FULL, CACHED, FULL, CACHED), VARIANTS, GUIDANCE),
    # Steps that take the mean of a feature, and one after them that takes its half.
    "mean": StepProgram((FULL, CACHED, FULL, *[CACHED] * 3), VARIANTS, (FULL, MEAN, FULL, MEAN, MEAN, CONDITIONAL)),
}
HALVES = {"plain": [2, 1, 2, 2, 1, 1], "cached": [2, 1, 2, 2, 1, 1], "mean": [2, 1, 2, 1, 1, 1]}


@pytest.fixture(scope="module")
def loaded(tiny_pipeline: Path) -> Any:
    return load_pipeline(str(tiny_pipeline))


@pytest.fixture
def pipeline(loaded: Any) -> Iterator[Any]:
    unet = loaded.unet
    yield loaded
    assert loaded.unet is unet  # no test leaves a stand-in behind


@pytest.fixture
def work(loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setenv("DIFFPRESS_CACHE", str(tmp_path / "cache"))
    sampling = tabulate(loaded.scheduler, STEPS, SCALE, 32, 32)
    chosen = CalibrationSet(PROMPTS, "every-step")

    def recorder(how: Execution) -> Recordings:
        return capture.record(loaded, "digest", sampling, chosen, 3, lambda items, _: items, how)

    return Work(loaded, sampling, 3, recorder, lambda items, _: items, tmp_path / "scratch")


def image(pipeline: Any, prompt: str, seed: int = 3, scale: float = SCALE) -> Tensor:
    """The latent [1, 4, 8, 8] that the pipeline makes."""
    generator = torch.Generator().manual_seed(seed)
    fields = {"num_inference_steps": STEPS, "guidance_scale": scale, "generator": generator, "output_type": "latent"}
    return pipeline(prompt, **fields).images


@torch.no_grad()
def by_hand(pipeline: Any, program: StepProgram, prompt: str, seed: int = 3) -> tuple[Tensor, list[Tensor]]:
    """The latent, and the conditional output of every step; one half of guidance at a time."""
    positive, negative = pipeline.encode_prompt(prompt, "cpu", 1, True)
    texts, kept, outputs = {"u": negative, "c": positive}, {}, []
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    pipeline.scheduler.set_timesteps(STEPS)
    for index, timestep in enumerate(pipeline.scheduler.timesteps):
        time, variant = timestep.float().reshape(1), program.variants[program.steps[index]]

        def half(
            name: str, time: Tensor = time, x: Tensor = x, variant: Variant = variant, index: int = index
        ) -> Tensor:
            if variant.reads:
                given = (kept["u"] + kept["c"]) / 2 if program.guidance[index] == MEAN else kept[name]
                return UNetGraph(pipeline.unet, (DEEP,))(x, time, texts[name], given)[0]
            output, kept[name] = UNetGraph(pipeline.unet, writes=(DEEP,))(x, time, texts[name])
            return output

        if program.guidance[index] == FULL:
            u = half("u")
            c = half("c")
            d, output = c - u, u + SCALE * (c - u)
        else:
            output = c = half("c")
            if program.guidance[index] == REUSE:
                output = c + (SCALE - 1) * d
        outputs.append(c)
        x = pipeline.scheduler.step(output, timestep, x, return_dict=False)[0]
    return x, outputs


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_image_is_the_one_made_by_hand(pipeline: Any, name: str) -> None:
    program = PROGRAMS[name]
    expected, _ = by_hand(pipeline, program, PROMPTS[0])
    with executed(pipeline, program):
        image(pipeline, PROMPTS[1])  # of which nothing is left
        got = image(pipeline, PROMPTS[0])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, image(pipeline, PROMPTS[0]), atol=1e-3)  # the economy is seen


def test_full_guidance_changes_no_bit(pipeline: Any) -> None:
    steps = (FULL, CACHED) * 3
    images = []
    for program in (StepProgram(steps, VARIANTS), StepProgram(steps, VARIANTS, (FULL,) * STEPS)):
        with executed(pipeline, program):
            images.append(image(pipeline, PROMPTS[0]))
    assert torch.equal(*images)
    assert execution(StepProgram((FULL,) * STEPS, guidance=(FULL,) * STEPS)) is PLAIN
    assert execution(PROGRAMS["plain"]) is not PLAIN


def test_a_pipeline_without_guidance_is_told(pipeline: Any) -> None:
    with (
        pytest.raises(DiffpressError, match="economizes guidance, but the pipeline samples without it"),
        executed(pipeline, PROGRAMS["plain"]),
    ):
        image(pipeline, PROMPTS[0], scale=1.0)


@pytest.mark.parametrize("name", PROGRAMS)
def test_recorded_calls_are_those_of_the_economic_trajectory(work: Work, name: str) -> None:
    work.program = PROGRAMS[name]
    calls = list(work.record())
    outputs = [c for i, prompt in enumerate(PROMPTS) for c in by_hand(work.pipeline, work.program, prompt, 3 + i)[1]]
    assert [len(call.sample) for call in calls] == HALVES[name] * 2
    assert {tuple(call.text.shape) for call in calls} == {tuple(calls[0].text.shape)}
    with torch.no_grad():
        for call, expected in zip(calls, outputs, strict=True):
            assert all(len(feature) == len(call.sample) for feature in call.features.values())
            torch.testing.assert_close(work.run(call)[-1:], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PROGRAMS)
def test_latents_of_many_prompts_at_once(work: Work, name: str) -> None:
    work.program = PROGRAMS[name]
    # The first kept call may be of one half.
    calls = [call for call in work.record() if len(call.sample) == 1][1 :: HALVES[name].count(1)]
    assert len(calls) == 2
    got = torch.stack(final_latents(work, calls))
    wanted = [by_hand(work.pipeline, work.program, prompt, 3 + index)[0] for index, prompt in enumerate(PROMPTS)]
    torch.testing.assert_close(got, torch.cat(wanted), rtol=1e-3, atol=1e-3)


def test_the_cache_keeps_guidance_and_refuses_what_does_not_fit(work: Work) -> None:
    work.program = StepProgram((FULL,) * STEPS, guidance=(FULL, REUSE) * 3)
    fits, not_fitting = CachePass(interval=2, branch=BRANCH), CachePass(interval=3, branch=BRANCH)
    with pytest.raises(DiffpressError, match=r"cache: step 4 .* step 3 wrote feature 'up_1'"):
        not_fitting.requires(work)
    fits.requires(work)
    fits.apply(work)
    assert (work.program.marks(), work.program.guidance_marks()) == ("#-#-#-", "#-#-#-")
    assert work.program.guidance == (FULL, REUSE) * 3 and work.program.steps == (FULL, CACHED) * 3
