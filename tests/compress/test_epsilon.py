"""Epsilon scaling as coefficients: the same samples as scaling epsilon by hand in the paper's own loops."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffpress.benchmarks.shapes.models import SCHEDULER
from diffpress.calibration.schedule import tabulate
from diffpress.calibration.tabulated import Tabulated, playing
from diffpress.compress.schedule.epsilon import scaled
from diffpress.errors import DiffpressError
from diffpress.plan import Sampling
from diffpress.runtime.sampler import sample

DIVISORS = (1.02, 0.97, 1.1, 1.0, 0.93, 1.05)
KINDS = ["epsilon", "v_prediction", "sample"]


def scheduler(kind: str, name: str = "DDIMScheduler", **changes: Any) -> Any:
    own = diffusers.DDIMScheduler(**{**SCHEDULER, "prediction_type": kind})
    return getattr(diffusers, name).from_config(dict(own.config), **changes)


def network(kind: str, x: np.ndarray, timestep: float, alpha: float, sigma: float) -> np.ndarray:
    """A network of any prediction type: what it thinks of the noise in x = alpha x0 + sigma eps, put as that type."""
    eps = np.tanh(x) * sigma + 0.1 * math.cos(timestep)
    clean = (x - sigma * eps) / alpha
    return {"epsilon": eps, "v_prediction": alpha * eps - sigma * clean, "sample": clean}[kind]


def levels(schedule: Any, timestep: float) -> tuple[float, float]:
    """alpha and sigma at a timestep, between trained ones with log(sigma / alpha) linear."""
    alphas = schedule.alphas_cumprod.double().numpy()
    ratio = np.exp(np.interp(timestep, np.arange(len(alphas)), np.log(np.sqrt(1 / alphas - 1))))
    return float(1 / np.sqrt(1 + ratio**2)), float(ratio / np.sqrt(1 + ratio**2))


def noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 4, 3, 3))


def by_table(schedule: Any, table: Sampling, kind: str) -> list[np.ndarray]:
    def denoise(_: int, x: np.ndarray, timestep: float) -> np.ndarray:
        return network(kind, x.astype(np.float64), timestep, *levels(schedule, timestep)).astype(np.float32)

    return list(sample(table, denoise, noise().astype(np.float32) * np.float32(table.init_noise_sigma)))


def by_hand(schedule: Any, timesteps: tuple[float, ...]) -> Callable[[int, np.ndarray], np.ndarray]:
    """The scaled epsilon at call i for a sample of unit variance."""

    def eps(index: int, x: np.ndarray) -> np.ndarray:
        t = timesteps[index]
        return network("epsilon", x, t, *levels(schedule, t)) / DIVISORS[index]

    return eps


def assert_same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert np.linalg.norm(mine - other) < 2e-5 * np.linalg.norm(other)


@pytest.mark.parametrize("kind", KINDS)
def test_ddim(kind: str) -> None:
    schedule = scheduler(kind)
    table = scaled(tabulate(schedule, 6, 3.0, 64, 64), schedule, DIVISORS)
    eps, x, theirs = by_hand(schedule, table.timesteps), noise(), []
    for index, t in enumerate(table.timesteps):
        alpha, sigma = levels(schedule, t)
        after = table.timesteps[index] - 1000 // 6  # diffusers' stride; the last step ends at its first alpha
        end_alpha, end_sigma = levels(schedule, max(after, 0))
        e = eps(index, x)
        x = end_alpha * (x - sigma * e) / alpha + end_sigma * e  # Song et al. 2021, equation 12
        theirs.append(x)
    assert_same(by_table(schedule, table, kind), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_dpm_solver_plus_plus(kind: str) -> None:
    timesteps = (999.0, 820.0, 610.0, 420.0, 200.0, 40.0)
    schedule = scheduler(kind, "DPMSolverMultistepScheduler", final_sigmas_type="sigma_min")
    plain = tabulate(schedule, 6, 3.0, 64, 64, timesteps=timesteps)
    table = scaled(plain, schedule, DIVISORS)
    eps, x, theirs, before = by_hand(schedule, timesteps), noise(), [], None
    logs = [math.log(levels(schedule, t)[0] / levels(schedule, t)[1]) for t in (*timesteps, 0.0)]
    for index, (t, after) in enumerate(pairwise((*timesteps, 0.0))):
        (alpha, sigma), (end_alpha, end_sigma) = levels(schedule, t), levels(schedule, after)
        clean = (x - sigma * eps(index, x)) / alpha
        h, direction = logs[index + 1] - logs[index], clean
        if before is not None and index < 5:  # diffusers' last step is of first order below 15 steps
            ratio = (logs[index] - logs[index - 1]) / h
            direction = (1 + 1 / (2 * ratio)) * clean - before / (2 * ratio)  # Lu et al. 2022, algorithm 2
        x, before = end_sigma / sigma * x - end_alpha * math.expm1(-h) * direction, clean
        theirs.append(x)
    assert_same(by_table(schedule, table, kind), theirs)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])  # diffusers' Euler knows no others
def test_euler(kind: str) -> None:
    timesteps = (999.0, 820.5, 610.0, 420.25, 200.0, 40.0)  # fractions
    schedule = scheduler(kind, "EulerDiscreteScheduler")
    table = scaled(tabulate(schedule, 6, 3.0, 64, 64, timesteps=timesteps), schedule, DIVISORS)
    eps, theirs = by_hand(schedule, timesteps), []
    ratios = [levels(schedule, t)[1] / levels(schedule, t)[0] for t in timesteps]
    x = noise() * table.init_noise_sigma
    for index, (sigma, after) in enumerate(pairwise([*ratios, 0.0])):
        x = x + (after - sigma) * eps(index, x / math.sqrt(1 + sigma**2))  # Karras et al. 2022, algorithm 1
        theirs.append(x)
    # diffusers takes sigma to be linear between two timesteps, not its logarithm.
    for mine, other in zip(by_table(schedule, table, kind), theirs, strict=True):
        assert np.linalg.norm(mine - other) < 2e-4 * np.linalg.norm(other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_any_solver_as_if_the_network_were_another(kind: str, name: str) -> None:
    schedule = scheduler(kind, name, use_karras_sigmas=True)
    table = scaled(tabulate(schedule, 6, 3.0, 64, 64), schedule, DIVISORS)
    schedule.set_timesteps(6)
    x, theirs = torch.from_numpy(noise()), []
    for divisor, t in zip(DIVISORS, schedule.timesteps, strict=True):
        alpha, sigma = levels(schedule, float(t))
        eps = network("epsilon", x.numpy(), float(t), alpha, sigma) / divisor
        clean = (x.numpy() - sigma * eps) / alpha
        output = {"epsilon": eps, "v_prediction": alpha * eps - sigma * clean, "sample": clean}[kind]
        x = schedule.step(torch.from_numpy(output), t, x, return_dict=False)[0]
        theirs.append(x.numpy())
    assert_same(by_table(schedule, table, kind), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_dividing_by_one_changes_nothing(kind: str) -> None:
    schedule = scheduler(kind, "DPMSolverMultistepScheduler")
    table = tabulate(schedule, 6, 3.0, 64, 64)
    assert scaled(table, schedule, [1.0] * 6) == table
    assert playing(schedule, scaled(table, schedule, [1.0] * 6)) is schedule
    assert isinstance(playing(schedule, scaled(table, schedule, DIVISORS)), Tabulated)


@pytest.mark.parametrize("divisors", [(1.0,) * 5, (1.0,) * 5 + (0.0,), (1.0,) * 5 + (math.nan,), (math.inf,) * 6])
def test_divisors_that_make_no_sense_are_refused(divisors: tuple[float, ...]) -> None:
    schedule = scheduler("epsilon")
    with pytest.raises(DiffpressError, match="6 calls need as many positive divisors"):
        scaled(tabulate(schedule, 6, 3.0, 64, 64), schedule, divisors)


def test_models_without_an_epsilon_are_refused() -> None:
    table = tabulate(scheduler("epsilon"), 6, 3.0, 64, 64)
    with pytest.raises(DiffpressError, match="prediction type 'flow_prediction' is not known"):
        scaled(table, scheduler("flow_prediction", "DPMSolverMultistepScheduler", use_flow_sigmas=True), DIVISORS)
    zero = diffusers.DDIMScheduler(**{**SCHEDULER, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    with pytest.raises(DiffpressError, match="pure noise"):
        scaled(table, zero, DIVISORS)
