from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffpress.calibration.schedule import tabulate
from diffpress.errors import DiffpressError
from diffpress.plan import Sampling
from diffpress.runtime.sampler import Denoise, sample

Terms = tuple[tuple[tuple[str, int, float], ...], ...]


def schedule(timesteps: list[float], terms: Terms, scale: list[float] | None = None) -> Sampling:
    scales = tuple(scale or [1.0] * len(timesteps))
    return Sampling("test", len(timesteps), 1.0, 64, 64, tuple(timesteps), scales, 1.0, terms)


def model(index: int, x: np.ndarray, timestep: float) -> np.ndarray:
    """Some denoiser: not linear, and different at every timestep."""
    return np.asarray(np.sin(x) + np.float32(timestep / 1000))


def noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 4, 3, 3)).astype(np.float32)


def run(sampling: Sampling, denoise: Denoise = model) -> list[np.ndarray]:
    return list(sample(sampling, denoise, noise()))


def test_ddim_equals_diffusers_and_its_formula() -> None:
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(10)
    alphas = scheduler.alphas_cumprod.double().numpy()
    timesteps = [int(t) for t in scheduler.timesteps]
    terms, formula = [], noise().astype(np.float64)
    for t in timesteps:
        before = alphas[t - 100] if t >= 100 else alphas[0]
        ratio = np.sqrt(before / alphas[t])
        shift = np.sqrt(1 - before) - ratio * np.sqrt(1 - alphas[t])
        terms.append((("sample", 0, float(ratio)), ("output", 0, float(shift))))
        output = np.sin(formula) + t / 1000
        clean = (formula - np.sqrt(1 - alphas[t]) * output) / np.sqrt(alphas[t])  # equation 12, sigma 0
        formula = np.sqrt(before) * clean + np.sqrt(1 - before) * output
    ours = run(schedule([float(t) for t in timesteps], tuple(terms)))
    theirs = torch.from_numpy(noise())
    for mine, t in zip(ours, scheduler.timesteps, strict=True):
        theirs = scheduler.step(torch.from_numpy(model(0, theirs.numpy(), float(t))), t, theirs).prev_sample
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[-1], formula, rtol=1e-5, atol=1e-5)
    assert ours[-1].dtype == np.float32


def test_euler_scales_the_input_and_walks_down_the_sigmas() -> None:
    sigmas = [14.6, 5.0, 1.0, 0.1, 0.0]
    terms = tuple((("sample", 0, 1.0), ("output", 0, b - a)) for a, b in pairwise(sigmas))
    scales = [(s**2 + 1) ** -0.5 for s in sigmas[:-1]]
    ours = run(schedule([900.0, 500.0, 100.0, 1.0], terms, scales))
    x = noise().astype(np.float64)
    for index, t in enumerate([900.0, 500.0, 100.0, 1.0]):
        output = np.sin(x * scales[index]) + t / 1000
        x = x + (sigmas[index + 1] - sigmas[index]) * output
    np.testing.assert_allclose(ours[-1], x, rtol=1e-5, atol=1e-5)


def test_terms_reach_back_to_earlier_samples_and_outputs() -> None:
    terms: Terms = (
        (("sample", 0, 0.5), ("output", 0, -1.0)),
        (("output", 1, 2.0), ("sample", 1, -0.25)),
        (("sample", 2, 1.0), ("output", 2, 3.0), ("output", 0, 0.125)),
    )
    ours = run(schedule([3.0, 2.0, 1.0], terms))
    x0 = noise()
    e0 = model(0, x0, 3.0)
    x1 = 0.5 * x0 - e0
    x2 = 2 * e0 - 0.25 * x0
    x3 = x0 + 3 * e0 + 0.125 * model(2, x2, 1.0)
    for mine, expected in zip(ours, (x1, x2, x3), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "broken",
    [
        lambda: schedule([], ()),
        lambda: schedule([1.0], ()),
        lambda: schedule([1.0], ((("sample", 0, 1.0),),), [1.0, 1.0]),
        lambda: schedule([1.0], ((("sample", 1, 1.0),),)),
        lambda: schedule([1.0], ((("sample", -1, 1.0),),)),
        lambda: schedule([1.0], ((("noise", 1, 1.0),),)),
        lambda: schedule([1.0], ((("salt", 0, 1.0),),)),
    ],
)
def test_a_schedule_that_cannot_be_run_is_refused(broken: Callable[[], Sampling]) -> None:
    with pytest.raises(DiffpressError, match="schedule"):
        run(broken())


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50])
@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        DPMSolverMultistepScheduler(**BETAS),
        EulerDiscreteScheduler(**BETAS),
        UniPCMultistepScheduler(**BETAS),
        PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_tabulated_scheduler_walks_as_diffusers_does(
    scheduler: DDIMScheduler, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffpress.calibration.schedule.HISTORY", steps, raising=False)  # UniPC looks back to its start
    sampling = tabulate(scheduler, steps, 3.0, 64, 64)
    scheduler.set_timesteps(steps)
    start = noise() * np.float32(sampling.init_noise_sigma)
    theirs = torch.from_numpy(start).double()
    for mine, t in zip(sample(sampling, model, start), scheduler.timesteps, strict=True):
        scaled = scheduler.scale_model_input(theirs, t).numpy()
        theirs = scheduler.step(torch.from_numpy(model(0, scaled, float(t))), t, theirs).prev_sample.double()
        error = np.linalg.norm(mine - theirs.numpy()) / np.linalg.norm(theirs.numpy())
        assert error < 1e-4, (float(t), error)
