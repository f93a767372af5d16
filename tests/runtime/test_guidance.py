"""Guidance economy in the runtime: against a loop written out here, one image and one half of guidance at a time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress import bundle
from diffpress.errors import DiffpressError
from diffpress.plan import CONDITIONAL, FULL, MEAN, REUSE, Sampling, StepProgram, Variant
from diffpress.runtime import backends
from diffpress.runtime.noise import randn
from diffpress.runtime.pipeline import Pipeline, guide
from diffpress.runtime.program import Denoiser
from diffpress.runtime.tokenizer import Tokenizer

PROMPTS, SEEDS = ["a red circle", "a large blue star left of a small green square"], [3, 4]
STEPS = ("full", "cached", "full", "cached", "cached", "full", "cached")
GUIDANCE = (FULL, REUSE, FULL, FULL, REUSE, CONDITIONAL, REUSE)  # reads of rows of its own, and of both halves
VARIANTS = {FULL: Variant(writes=("feature_0",)), "cached": Variant(reads=("feature_0",))}
Make = Callable[..., Path]


@pytest.fixture
def path(make: Make) -> Path:
    return make(steps=STEPS, program=StepProgram(STEPS, VARIANTS, GUIDANCE).to_json())


def by_hand(
    toy: Any,
    path: Path,
    sampling: Sampling,
    prompt: str,
    seed: int,
    scale: float,
    guidance: Sequence[str] = GUIDANCE,
) -> tuple[np.ndarray, list[int]]:
    """The last latent [1, 4, h, w] and how many halves every step computed."""
    tokenizer = Tokenizer.load(path / "tokenizer")
    texts = {name: toy.text(tokenizer.encode([text])) for name, text in (("u", ""), ("c", prompt))}
    x, before, d, halves = randn(seed, (1, 4, 4, 4)) * sampling.init_noise_sigma, None, None, []
    kept: dict[str, np.ndarray] = {}
    for step, how, timestep in zip(STEPS, guidance, sampling.timesteps, strict=True):

        def half(
            name: str, step: str = step, timestep: float = timestep, x: np.ndarray = x, how: str = how
        ) -> np.ndarray:
            if step == "full":
                kept[name] = toy.feature(x * 0.5, timestep, texts[name])
            given = (kept["u"] + kept["c"]) / 2 if how == MEAN else kept[name]
            return np.asarray(toy.output(x * 0.5, given))

        if how == FULL:
            u, c = half("u"), half("c")
            d = c - u
            output = u + scale * d
        else:
            output = half("c")
            if how == REUSE:
                output = output + (scale - 1) * d
        halves.append(2 if how == FULL else 1)
        x = 0.9 * x - (0.2 * output if before is None else 0.3 * output - 0.1 * before)
        before = output
    return x, halves


@pytest.mark.parametrize("backend", sorted({name for name, _ in backends.available()}))
def test_a_program_that_leaves_halves_out_is_the_one_by_hand(path: Path, toy: Any, backend: str) -> None:
    pipeline = Pipeline.load(path, backend, "fp32", threads=1)
    for _ in range(2):  # nothing is left behind
        got = pipeline(PROMPTS, SEEDS, keep_latents=True).latents[-1]
        wanted = [by_hand(toy, path, pipeline.sampling, p, s, 3.0)[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
        assert np.linalg.norm(got - np.concatenate(wanted)) < 1e-4 * np.linalg.norm(wanted)


MEANS = (FULL, MEAN, FULL, MEAN, CONDITIONAL, FULL, MEAN)  # and a step that reads a half after one that took the mean


@pytest.mark.parametrize("backend", sorted({name for name, _ in backends.available()}))
def test_a_step_of_one_half_takes_the_mean_of_what_both_wrote(make: Make, toy: Any, backend: str) -> None:
    path = make(steps=STEPS, program=StepProgram(STEPS, VARIANTS, MEANS).to_json())
    pipeline = Pipeline.load(path, backend, "fp32", threads=1)
    for _ in range(2):
        got = pipeline(PROMPTS, SEEDS, keep_latents=True).latents[-1]
        wanted = [by_hand(toy, path, pipeline.sampling, *pair, 3.0, MEANS) for pair in zip(PROMPTS, SEEDS, strict=True)]
        latents = np.concatenate([latent for latent, _ in wanted])
        assert np.linalg.norm(got - latents) < 1e-4 * np.linalg.norm(latents)
    assert wanted[0][1] == [2, 1, 2, 1, 1, 2, 1]
    conditional = [by_hand(toy, path, pipeline.sampling, p, s, 3.0)[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert np.linalg.norm(got - np.concatenate(conditional)) > 1e-2 * np.linalg.norm(got)  # the mean is seen


def test_without_guidance_there_is_one_half_and_no_mean(make: Make) -> None:
    path = make(steps=STEPS, program=StepProgram(STEPS, VARIANTS, MEANS).to_json())
    got, sessions = counted(path, guidance_scale=1.0)
    assert {size for session in sessions.values() for size in session.ran} == {2}
    np.testing.assert_array_equal(got, counted(path, StepProgram(STEPS, VARIANTS), guidance_scale=1.0)[0])


class Counting:
    """A session that notes batch sizes."""

    def __init__(self, session: backends.Session) -> None:
        self.session, self.inputs, self.outputs = session, session.inputs, session.outputs
        self.prepared: list[int] = []
        self.ran: list[int] = []

    def prepare(self, batch: int) -> None:
        self.prepared.append(batch)

    def run(self, feeds: backends.Feeds, into: backends.Feeds | None = None) -> dict[str, np.ndarray]:
        self.ran.append(len(feeds["sample"]))
        return self.session.run(feeds, into)


def counted(path: Path, program: StepProgram | None = None, **arguments: Any) -> tuple[np.ndarray, dict[str, Counting]]:
    pipeline = Pipeline.load(path, "onnxruntime", "fp32", threads=1)
    sessions = {name: Counting(session) for name, session in pipeline.denoiser.sessions.items()}
    pipeline = replace(pipeline, denoiser=Denoiser(program or pipeline.denoiser.program, sessions))
    return pipeline(PROMPTS, SEEDS, keep_latents=True, **arguments).latents[-1], sessions


def test_both_batch_sizes_are_prepared_and_half_of_the_rows_run(path: Path) -> None:
    _, sessions = counted(path)
    assert sessions["full"].ran == [4, 4, 2] and sessions["cached"].ran == [2, 4, 2, 2]
    for session in sessions.values():
        assert sorted(session.prepared) == [2, 4]
    program = StepProgram(STEPS, VARIANTS, GUIDANCE)
    assert sum(sum(session.ran) for session in sessions.values()) == program.evaluations() * 4


def test_without_guidance_every_step_runs_the_conditional_half(path: Path) -> None:
    got, sessions = counted(path, guidance_scale=1.0)
    assert {size for session in sessions.values() for size in [*session.ran, *session.prepared]} == {2}
    np.testing.assert_array_equal(got, counted(path, StepProgram(STEPS, VARIANTS), guidance_scale=1.0)[0])


def test_a_program_of_full_guidance_changes_no_bit(make: Make) -> None:
    manifest = StepProgram(STEPS, VARIANTS).to_json() | {"guidance": [FULL] * len(STEPS)}
    path = make(steps=STEPS, program=manifest)
    got, sessions = counted(path)
    assert {size for session in sessions.values() for size in [*session.ran, *session.prepared]} == {4}
    np.testing.assert_array_equal(got, counted(path, StepProgram(STEPS, VARIANTS))[0])


def test_guide_is_what_it_says() -> None:
    outputs = iter([[1.0, 5.0], [7.0], [11.0], [2.0, 3.0], [6.0], [4.0]])
    shown: list[int] = []

    def denoise(index: int, sample: np.ndarray, timestep: float) -> np.ndarray:
        shown.append(len(sample))
        return np.array(next(outputs), np.float32).reshape(-1, 1, 1, 1)

    program = StepProgram((*[FULL] * 4, "cached", "cached"), VARIANTS, (FULL, REUSE, CONDITIONAL, FULL, MEAN, REUSE))
    guided = guide(denoise, 3.0, program)
    got = [guided(index, np.zeros((1, 1, 1, 1), np.float32), 0.0).item() for index in range(6)]
    assert got == [1 + 3 * 4, 7 + 2 * 4, 11, 2 + 3 * 1, 6, 4 + 2 * 1]
    assert shown == [2, 1, 1, 2, 1, 1]


def test_the_schedule_of_such_a_bundle_is_its_own(make: Make) -> None:
    steps = (FULL,) * 4
    path = make(steps=steps, program=StepProgram(steps, VARIANTS, (FULL, REUSE) * 2).to_json())
    data = bundle.read(path).manifest["sampling"]
    short: dict[str, Sequence[Any]] = {key: data[key][:3] for key in ("timesteps", "input_scale", "terms")}
    with pytest.raises(DiffpressError, match="step program is bound"):
        Pipeline.load(path, sampling=Sampling.from_json({**data, **short, "steps": 3}))


@pytest.mark.parametrize("guidance", [[REUSE] * 7, ["half"] * 7, [FULL, REUSE]])
def test_a_program_that_cannot_be_guided_so_is_refused(make: Make, guidance: list[str]) -> None:
    program = StepProgram(STEPS, VARIANTS).to_json() | {"guidance": guidance}
    with pytest.raises(DiffpressError, match="guidance") as caught:
        Pipeline.load(make(steps=STEPS, program=program))
    assert "\n" not in str(caught.value)


def test_another_guidance_scale_is_cautioned_or_refused(make: Make) -> None:
    cached = Pipeline.load(make())
    assert cached.caution(cached.sampling.guidance_scale) is None
    told = cached.caution(5.0) or ""
    assert "cached steps were made for guidance scale 3, " in told and "at 5" in told and "\n" not in told
    cached(["a"], [1], guidance_scale=5.0)  # it runs


def test_a_plain_bundle_takes_any_guidance_scale_but_one_with_offsets_does_not(make: Make) -> None:
    path = make(steps=("full",) * 3)
    pipeline = Pipeline.load(path)
    assert pipeline.caution(5.0) is None
    manifest = bundle.read(path).manifest
    corrected = {**manifest, "passes": [{"name": "correct"}]}
    bundle.write_manifest(path, corrected)
    assert "corrections were made for guidance scale 3" in (Pipeline.load(path).caution(5.0) or "")
    offsets = {**manifest["sampling"], "offsets": [[0.1] * 4] * 3}
    bundle.write_manifest(path, {**corrected, "sampling": offsets})
    pipeline = Pipeline.load(path)
    pipeline(["a"], [1])
    with pytest.raises(DiffpressError, match="measured at guidance scale 3, which are others at 5"):
        pipeline(["a"], [1], guidance_scale=5.0)
