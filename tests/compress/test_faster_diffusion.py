"""Encoder propagation: which steps are keys, how far features moved, and the loop written out here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffpress.calibration.model import load_pipeline
from diffpress.calibration.schedule import tabulate
from diffpress.calibration.tabulated import Tabulated
from diffpress.compress.cache import movement
from diffpress.compress.cache.execute import executed
from diffpress.compress.cache.faster_diffusion import FasterDiffusionPass, fixed_keys
from diffpress.compress.cache.movement import movements
from diffpress.compress.families.unet_graph import UNetGraph, encoder
from diffpress.compress.run import run
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import CONDITIONAL, FULL, StepProgram

STEPS = 5
Make = Callable[..., Work]


@pytest.fixture(scope="module")
def loaded(tiny_pipeline: Path) -> Any:
    return load_pipeline(str(tiny_pipeline))


@pytest.fixture
def made(loaded: Any, tmp_path: Path) -> Make:
    """Work of so many steps; nothing is recorded."""
    scheduler = loaded.scheduler

    def make(steps: int = STEPS) -> Work:
        loaded.scheduler = scheduler
        sampling = tabulate(scheduler, steps, 3.0, 32, 32)
        return Work(loaded, sampling, 0, lambda _: [], lambda items, _: items, tmp_path)  # type: ignore[arg-type,return-value]

    return make


def applied(work: Work, **fields: Any) -> str:
    return run([("faster-diffusion", FasterDiffusionPass(**fields))], work)[0].summary


def test_keys_of_the_paper_stretch_to_the_schedule() -> None:
    assert fixed_keys("published", 50) == [0, 1, 2, 3, 5, 10, 15, 25, 35]
    assert fixed_keys("published", 100) == [0, 2, 4, 6, 10, 20, 30, 50, 70]
    assert fixed_keys("published", 20) == [0, 1, 2, 4, 6, 10, 14]
    assert fixed_keys(3, 8) == [0, 3, 6]
    assert fixed_keys((4, 2, 2), 5) == [0, 2, 4]


def test_key_steps_write_what_the_others_read(made: Make) -> None:
    work = made()
    summary = applied(work, keys=[3], together=2)
    reads = tuple(sorted(encoder(work.denoiser)))
    assert work.program.steps == (FULL, "cached", "cached", FULL, "cached")
    assert set(work.program.variants[FULL].writes) == set(reads) and work.program.variants["cached"].reads == reads
    assert work.program.runs() == ((0, 1), (1, 2), (3, 1), (4, 1))
    assert summary == "2 of 5 steps run the encoder in 4 calls of a graph: 0 3"
    assert "calls" not in applied(made(), keys=2, together=1)


@torch.no_grad()
def by_hand(work: Work, keys: set[int], noise: float) -> Tensor:
    """Faster Diffusion written out: the final latent [1, 4, 8, 8]."""
    unet, scheduler = work.denoiser, work.pipeline.scheduler
    reads = encoder(unet)
    positive, negative = work.pipeline.encode_prompt("a star", "cpu", 1, True)
    text = torch.cat([negative, positive])
    start = latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    scheduler.set_timesteps(STEPS)
    for index, timestep in enumerate(scheduler.timesteps):
        if timestep < 500:
            latent = latent + noise * start
        pair, time = torch.cat([latent, latent]), timestep.float().reshape(1)
        if index in keys:
            output, *features = UNetGraph(unet, writes=reads)(pair, time, text)
        else:
            blank = torch.full_like(pair, torch.nan)  # a decoder does not look at the sample
            (output,) = UNetGraph(unet, reads)(blank, time, text, *features)
        without, given = output.chunk(2)
        latent = scheduler.step(without + 3.0 * (given - without), timestep, latent, return_dict=False)[0]
    return latent


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_an_image_is_the_one_made_by_hand(made: Make, noise: float) -> None:
    work = made()
    expected = by_hand(work, {0, 3}, noise)
    summary = applied(work, keys=[0, 3], prior_noise=noise)
    assert isinstance(work.pipeline.scheduler, Tabulated) == bool(noise) == ("noise" in summary)
    with executed(work.pipeline, work.program):
        fields = {"guidance_scale": 3.0, "output_type": "latent"}
        generator = torch.Generator().manual_seed(3)
        got = work.pipeline("a star", num_inference_steps=STEPS, generator=generator, **fields).images
    assert torch.allclose(got, expected, atol=1e-4)
    assert not torch.allclose(got, by_hand(made(), set(range(STEPS)), noise), atol=1e-3)  # the cache is seen
    assert not torch.allclose(got, by_hand(made(), {0, 3}, 0.05 - noise), atol=1e-3)  # and the noise


def test_movements_are_those_of_features_along_the_image(work: Work) -> None:
    names, calls = encoder(work.denoiser), len(work.sampling.timesteps)
    moved = movements(work, names, 2)
    assert moved.shape == (calls, calls) and not np.diag(moved).any() and (moved[~np.eye(calls, dtype=bool)] > 0).all()
    texts = [call.text for index, call in enumerate(work.record()) if index % 2 == 0]
    found = np.zeros((calls, calls))
    scheduler = Tabulated(work.sampling)
    for prompt, text in enumerate(texts):
        latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(work.seed + prompt))
        features = []
        scheduler.set_timesteps()
        for timestep in work.sampling.timesteps:
            with torch.no_grad():
                graph = UNetGraph(work.denoiser, writes=names)
                output, *values = graph(torch.cat([latent, latent]), torch.tensor([timestep]), text)
            features.append([value.flatten(1)[:, movement._places(value[0].numel())] for value in values])
            guided = output[:1] + work.sampling.guidance_scale * (output[1:] - output[:1])
            latent = scheduler.step(guided, timestep, latent).prev_sample
        for j, before in enumerate(features):
            for i, now in enumerate(features):
                parts = [(a - b).norm(dim=1) / b.norm(dim=1) for a, b in zip(before, now, strict=True)]
                found[j, i] += float(torch.stack(parts).mean()) / len(texts)
    np.testing.assert_allclose(moved, found, rtol=1e-3, atol=1e-5)


# Steps 0 and 1 are alike, and so are 2 and 3.
MOVED = np.array([[0.0, 0.1, 0.8, 0.9], [0.1, 0.0, 0.7, 0.8], [0.8, 0.7, 0.0, 0.1], [0.9, 0.8, 0.1, 0.0]])


@pytest.mark.parametrize(
    ("fields", "keys"),
    [
        ({"key_steps": 1}, [0]),
        ({"key_steps": 2}, [0, 2]),
        ({"key_steps": 3}, [0, 1, 2]),
        ({"threshold": 0.5}, [0, 2]),
        ({"threshold": 0.05}, None),
        ({"threshold": 0.85}, [0, 3]),
    ],
)
def test_calibrated_keys_are_where_features_have_moved(
    work: Work, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], keys: list[int] | None
) -> None:
    monkeypatch.setattr("diffpress.compress.cache.faster_diffusion.movements", lambda *_: MOVED)
    if keys is None:
        with pytest.raises(DiffpressError, match="every one of 4 steps is a key"):
            applied(work, keys="calibrated", **fields)
        return
    summary = applied(work, keys="calibrated", **fields)
    assert [index for index, name in enumerate(work.program.steps) if name == FULL] == keys
    assert "off by" in summary
    assert [row["key"] for row in work.tables["faster-diffusion"]][keys[-1]] == keys[-1]


def test_calibrated_keys_write_both_halves_where_both_are_read(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffpress.compress.cache.faster_diffusion.movements", lambda *_: MOVED)
    work.program = StepProgram((FULL,) * 4, guidance=(FULL, FULL, CONDITIONAL, FULL))
    applied(work, keys="calibrated", key_steps=2)
    assert work.program.steps == (FULL, "cached", "cached", FULL)  # step 2 writes one half, of which 3 needs two


def test_calibration_runs_from_recorded_prompts(work: Work) -> None:
    summary = applied(work, keys="calibrated", key_steps=2, prompts=1)
    assert work.program.steps.count(FULL) == 2 and work.program.steps[0] == FULL
    assert "2 of 4 steps run the encoder" in summary


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"keys": [0, 5]}, "key 5 is not a step of the schedule, which has 0 to 4"),
        ({"keys": [-1]}, "key -1 is not a step"),
        ({"keys": [1, 2, 3, 4]}, "every one of 5 steps is a key"),
        ({"keys": "calibrated", "key_steps": 5}, "5 key steps of 5 leave nothing"),
        ({"keys": "calibrated"}, "need one of key_steps and threshold"),
        ({"keys": "calibrated", "key_steps": 2, "threshold": 0.1}, "need one of"),
        ({"keys": 3, "threshold": 0.1}, "threshold is for keys: calibrated"),
        ({"keys": 1}, "keys every 1 steps leave nothing"),
    ],
)
def test_bad_keys_are_refused_before_anything_runs(made: Make, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(DiffpressError, match=told) as caught:
        FasterDiffusionPass(**fields).requires(made())
    assert "\n" not in str(caught.value)


def test_what_does_not_go_together_is_refused(made: Make) -> None:
    work = made()
    applied(work, keys=2)
    with pytest.raises(DiffpressError, match="an earlier pass planned a cache"):
        applied(work)
    halves = made()
    halves.program = StepProgram((FULL,) * STEPS, guidance=(CONDITIONAL, FULL, FULL, FULL, FULL))
    with pytest.raises(DiffpressError, match="faster-diffusion: step 1 computes both halves"):
        FasterDiffusionPass(keys=2).requires(halves)
    short = made(1)
    with pytest.raises(DiffpressError, match="every one of 1 steps is a key"):
        FasterDiffusionPass().requires(short)
    with pytest.raises(DiffpressError, match=r"faster-diffusion: .*all of this schedule are on one side"):
        FasterDiffusionPass(keys=2, prior_noise=0.003).requires(_late(made()))


def _late(work: Work) -> Work:
    work.sampling = type(work.sampling)(**{**work.sampling.__dict__, "timesteps": (400.0, 300.0, 200.0, 100.0, 1.0)})
    return work
