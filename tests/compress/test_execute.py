"""Step programs in torch against a sampling loop written out here, and recordings made under them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffpress.calibration import capture
from diffpress.calibration.capture import PLAIN, Call, Execution, Recordings
from diffpress.calibration.model import load_pipeline
from diffpress.calibration.schedule import tabulate
from diffpress.calibration.sets import CalibrationSet
from diffpress.compress.cache.deepcache import CachePass
from diffpress.compress.cache.execute import CachedDenoiser, executed, execution
from diffpress.compress.cache.program import CACHED
from diffpress.compress.families.unet_graph import UNetGraph
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, Correction, Corrections, LayerQuant, StepProgram, Variant

STEPS, BRANCH, DEEP = 5, 1, "up_1"
VARIANTS = {FULL: Variant(writes=(DEEP,)), CACHED: Variant(reads=(DEEP,))}
PROGRAM = StepProgram((FULL, CACHED, FULL, CACHED, FULL), VARIANTS)
PROMPTS = ("a red ring", "a star")


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
    sampling = tabulate(loaded.scheduler, STEPS, 3.0, 32, 32)
    chosen = CalibrationSet(PROMPTS, "every-step")

    def recorder(how: Execution) -> Recordings:
        return capture.record(loaded, "digest", sampling, chosen, 3, lambda items, _: items, how)

    return Work(loaded, sampling, 0, recorder, lambda items, _: items, tmp_path / "scratch")


def image(pipeline: Any, prompt: str, seed: int = 3, steps: int = STEPS) -> Tensor:
    """The latent [1, 4, 8, 8] that the pipeline makes."""
    generator = torch.Generator().manual_seed(seed)
    fields = {"num_inference_steps": steps, "guidance_scale": 3.0, "generator": generator, "output_type": "latent"}
    return pipeline(prompt, **fields).images


@torch.no_grad()
def by_hand(pipeline: Any, prompt: str, seed: int = 3) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """DeepCache written out: the latent, and the output and the feature in use at every step."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    positive, negative = pipeline.encode_prompt(prompt, "cpu", 1, True)
    text = torch.cat([negative, positive])
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    scheduler.set_timesteps(STEPS)
    seen = []
    for index, timestep in enumerate(scheduler.timesteps):
        pair, time = torch.cat([latent, latent]), timestep.float().reshape(1)
        if index % 2 == 0:
            output, feature = UNetGraph(unet, writes=(DEEP,))(pair, time, text)
        else:
            (output,) = UNetGraph(unet, (DEEP,))(pair, time, text, feature)
        seen.append((output, feature))
        without, given = output.chunk(2)
        latent = scheduler.step(without + 3.0 * (given - without), timestep, latent, return_dict=False)[0]
    return latent, seen


def test_an_all_full_program_is_the_model(pipeline: Any) -> None:
    expected = image(pipeline, PROMPTS[0])
    with executed(pipeline, StepProgram((FULL,) * STEPS)):
        got = image(pipeline, PROMPTS[0])
    assert torch.allclose(got, expected, atol=1e-4)


def test_a_cached_image_is_the_one_made_by_hand(pipeline: Any) -> None:
    expected, _ = by_hand(pipeline, PROMPTS[0])
    with executed(pipeline, PROGRAM):
        got = image(pipeline, PROMPTS[0])
    assert torch.equal(got, expected)
    assert not torch.allclose(got, image(pipeline, PROMPTS[0]), atol=1e-3)  # the cache is seen


def test_nothing_leaks_from_one_image_to_the_next(pipeline: Any) -> None:
    with executed(pipeline, PROGRAM):
        alone = image(pipeline, PROMPTS[1])
    with executed(pipeline, PROGRAM) as stand_in:
        image(pipeline, PROMPTS[0])
        assert torch.equal(image(pipeline, PROMPTS[1]), alone)  # after a whole image
        image(pipeline, PROMPTS[0], steps=2)
        assert torch.equal(image(pipeline, PROMPTS[1]), alone)  # after a short one
        text = torch.zeros(2, 4, 32)
        first = pipeline.scheduler.timesteps[0]
        stand_in(torch.zeros(2, 4, 8, 8), first, text)
        stand_in.reset()
        assert torch.equal(image(pipeline, PROMPTS[1]), alone)  # after one broken off at its first step


def test_a_schedule_of_one_step_begins_anew_each_time(pipeline: Any) -> None:
    with executed(pipeline, StepProgram((FULL,), VARIANTS)):
        first = image(pipeline, PROMPTS[0], steps=1)
        assert torch.equal(image(pipeline, PROMPTS[0], steps=1), first)


def test_more_calls_than_steps_and_foreign_conditions_are_refused(pipeline: Any) -> None:
    with (
        pytest.raises(DiffpressError, match="more often than the step program's 5 steps"),
        executed(pipeline, PROGRAM),
    ):
        image(pipeline, PROMPTS[0], steps=6)
    stand_in = CachedDenoiser(pipeline.unet, PROGRAM)
    with pytest.raises(DiffpressError, match="does not take class_labels"):
        stand_in(torch.zeros(1, 4, 8, 8), 1.0, torch.zeros(1, 4, 32), class_labels=1, timestep_cond=None)


def test_programs_that_a_unet_cannot_run_are_refused(pipeline: Any) -> None:
    unknown = StepProgram((FULL,), {FULL: Variant(writes=("up_99",))})
    with pytest.raises(DiffpressError, match="no feature 'up_99': there are up_0 to up_8"):
        CachedDenoiser(pipeline.unet, unknown)
    two = StepProgram((FULL, CACHED), {FULL: Variant(writes=("up_1", "up_2")), CACHED: Variant(("up_1", "up_2"))})
    with pytest.raises(DiffpressError, match="one deep feature, not up_1, up_2"):
        CachedDenoiser(pipeline.unet, two)


def test_recorded_calls_are_those_of_the_cached_trajectory(work: Work) -> None:
    work.program = PROGRAM
    calls = list(work.record())
    outputs = [pair for index, prompt in enumerate(PROMPTS) for pair in by_hand(work.pipeline, prompt, 3 + index)[1]]
    assert [call.variant for call in calls] == [FULL, CACHED, FULL, CACHED, FULL] * 2
    with torch.no_grad():
        for call, (output, feature) in zip(calls, outputs, strict=True):
            if call.variant == FULL:
                assert call.features == {}
                assert torch.allclose(work.run(call), output, atol=1e-5)  # the stock forward pass adds in another order
            else:
                assert call.features.keys() == {DEEP}
                assert torch.equal(call.features[DEEP], feature)
                assert torch.equal(work.run(call), output)


def test_work_records_once_and_again_when_the_program_changes(work: Work) -> None:
    asked: list[Execution] = []
    recorder = work.recorder
    work.recorder = lambda how: asked.append(how) or recorder(how)  # type: ignore[func-returns-value]
    plain = work.record()
    assert work.record() is plain
    assert asked == [PLAIN]
    CachePass(interval=2, branch=BRANCH).apply(work)
    cached = work.record()
    assert work.record() is cached
    assert cached.folder != plain.folder
    assert [call.variant for call in plain] == [FULL] * 2 * STEPS
    wide = np.ones((STEPS, 1, 1), np.float32)
    work.corrections = Corrections(work.sampling.timesteps, {DEEP: Correction(wide, wide[:, 0])})
    assert work.record().folder not in (plain.folder, cached.folder)
    assert len(asked) == 3
    assert any(not torch.equal(a.sample, b.sample) for a, b in zip(plain, cached, strict=True))


def test_a_program_that_reads_nothing_is_the_plain_denoiser() -> None:
    assert execution(StepProgram((FULL, CACHED), VARIANTS)).key != PLAIN.key
    assert execution(StepProgram((FULL,) * 2, VARIANTS)) is PLAIN
    assert execution(StepProgram((FULL,) * 4)) is PLAIN


def test_simulation_reaches_both_kinds_of_call(work: Work) -> None:
    work.program = PROGRAM
    full, cached, *_ = work.record()
    name = "up_blocks.2.resnets.2.conv1"  # what every variant runs
    weight = work.denoiser.get_submodule(name).weight
    fine = np.full(weight.shape[0], 1e-3, np.float32)
    rough = np.geomspace(0.5, 1e-3, STEPS, dtype=np.float32)  # of the inputs; rough at the first step alone
    with torch.no_grad():
        before = [work.run(call) for call in (full, cached)]
        with simulated(work.denoiser, {name: LayerQuant(fine, rough)}, work.sampling.timesteps):
            first = [work.run(call) for call in (full, cached)]
        with simulated(work.denoiser, {name: LayerQuant(fine, rough[::-1].copy())}, work.sampling.timesteps):
            swapped = [work.run(call) for call in (full, cached)]
        assert all(torch.equal(work.run(call), was) for call, was in zip((full, cached), before, strict=True))
    for was, a, b in zip(before, first, swapped, strict=True):
        assert not torch.equal(was, a)
        assert not torch.equal(a, b)  # each step has its own scale: both calls tell the time


def test_gradients_flow_through_a_cached_call(work: Work) -> None:
    work.program = PROGRAM
    _, cached, *_ = work.record()
    sample = cached.sample.clone().requires_grad_()
    work.run(Call(sample, cached.timestep, cached.text, cached.variant, cached.features)).sum().backward()
    assert sample.grad is not None
    assert sample.grad.abs().sum() > 0


def test_calls_of_another_program_are_refused(work: Work) -> None:
    call = Call(torch.zeros(2, 4, 8, 8), torch.ones(1), torch.zeros(2, 4, 32), CACHED)
    with pytest.raises(DiffpressError, match="'cached' does not belong to the step program"):
        work.run(call)
    work.program = PROGRAM
    with pytest.raises(DiffpressError, match="without feature 'up_1'"):
        work.run(call)
