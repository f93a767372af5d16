"""Found schedules on a mixture of Gaussians in the plane: its best denoiser is known, so no network is judged along."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffpress import evodiff
from diffpress.compress.schedule.align import Progress, klub, klub_matrix, noised, optimise
from diffpress.compress.schedule.gits import Metric, cost_matrix, shortest, teacher
from diffpress.compress.schedule.sigmas import sigma_of, sigma_table, timestep_of
from diffpress.plan import Sampling

MEANS = torch.tensor([[1.0, 0.6], [-0.8, 0.9], [0.1, -1.1], [0.9, -0.5]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
STD = 0.15
# Stable Diffusion's betas: sigmas from 0.029 to 14.6.
ALPHAS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SIGMA_MIN, SIGMA_MAX = sigma_table(ALPHAS)[[0, -1]].tolist()


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] for x [N, 2] = x0 + sigma * eps, sigma [N]: each Gaussian's own, by how likely it is to be the one."""
    variance = STD**2 + sigma.double().square()[:, None]  # [N, 1]
    log_likely = WEIGHTS.log() - (x[:, None] - MEANS).square().sum(-1) / (2 * variance)
    own = (STD**2 * x[:, None] + (variance - STD**2)[..., None] * MEANS) / variance[..., None]
    return (log_likely.softmax(1)[..., None] * own).sum(1)


def sample_at(count: int, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """Draws [N, 2] of the mixture with noise sigma [N] on them."""
    which = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    noise = torch.randn(2, count, 2, generator=generator, dtype=torch.float64)
    return MEANS[which] + STD * noise[0] + sigma.double()[:, None] * noise[1]


def start(count: int, seed: int) -> Tensor:
    """Noise [N, 2] at the largest sigma."""
    generator = torch.Generator().manual_seed(seed)
    return SIGMA_MAX * torch.randn(count, 2, generator=generator, dtype=torch.float64)


def solve(x: Tensor, sigmas: Sequence[float], order: int = 1) -> Tensor:
    """x [N, ...] at the last of `sigmas` from x at the first: Euler, or DPM-Solver++ 2M for an order of 2."""
    before = None
    for index, (sigma, after) in enumerate(pairwise(sigmas)):
        x0 = guess = denoise(x, x.new_full((len(x),), sigma))
        step = math.log(sigma / after)
        if before is not None and order == 2:
            guess = x0 + step / math.log(sigmas[index - 1] / sigma) / 2 * (x0 - before)
        x, before = after / sigma * x - math.expm1(-step) * guess, x0
    return x


def karras(steps: int, rho: float = 7) -> list[float]:
    """Karras et al. 2022, equation 5."""
    ends = SIGMA_MAX ** (1 / rho), SIGMA_MIN ** (1 / rho)
    return (np.linspace(*ends, steps + 1) ** rho).tolist()


def uniform(steps: int) -> list[float]:
    """Sigmas of timesteps at equal distances."""
    return sigma_of(np.linspace(len(ALPHAS) - 1, 0, steps + 1), ALPHAS).tolist()


@pytest.fixture(scope="module")
def truth() -> tuple[Tensor, Tensor]:
    """1000 starts that no search sees, and where 500 steps of the second order take them."""
    x = start(1000, seed=1)
    return x, solve(x, karras(400), order=2)


def error(sigmas: Sequence[float], truth: tuple[Tensor, Tensor], order: int = 1) -> float:
    x, ends = truth
    return float((solve(x, sigmas, order) - ends).norm(dim=1).mean())


def test_the_reference_has_converged(truth: tuple[Tensor, Tensor]) -> None:
    x, ends = truth
    assert float((solve(x, karras(800), order=2) - ends).norm(dim=1).mean()) < 1e-3
    # Euler's 500 steps end at the same points.
    assert error(karras(400), truth) < 5e-3


def test_the_teacher_is_of_second_order() -> None:
    x = start(100, seed=0)
    ends = solve(x, karras(1000), order=2)
    errors = [float((teacher(denoise, x, karras(steps))[0][-1] - ends).norm(dim=1).mean()) for steps in (60, 120, 240)]
    # Halving the steps divides the error by four, where Euler's method would halve it.
    assert errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3
    assert errors[0] < 0.2 * float((solve(x, karras(60)) - ends).norm(dim=1).mean())


@pytest.mark.parametrize("metric", ["deviation", "l2"])
def test_gits_at_five_steps_beats_uniform_by_far_and_karras(metric: Metric, truth: tuple[Tensor, Tensor]) -> None:
    grid = uniform(60)
    points, directions = teacher(denoise, start(256, seed=0), grid)
    chosen = [grid[i] for i in shortest(cost_matrix(points, directions, grid, metric), 5, gamma=1.15)]
    assert len(chosen) == 6
    found = error(chosen, truth)
    assert found < 0.75 * error(uniform(5), truth)
    assert found < 0.9 * error(karras(5), truth)
    # A schedule found with Euler's steps serves DPM-Solver++ too.
    assert error(chosen, truth, order=2) < min(error(uniform(5), truth, order=2), error(karras(5), truth, order=2))


def test_align_lowers_the_bound_and_the_error(truth: tuple[Tensor, Tensor]) -> None:
    runs = list(optimise(denoise, sample_at, uniform(10), samples=128, rounds=4, seed=3))
    assert [run.round for run in runs] == [1, 2, 3, 4]
    assert [run.ended for run in runs] == [False, False, False, True]
    before, after = (
        klub(denoise, sample_at, sigmas, 4000, torch.Generator().manual_seed(9))
        for sigmas in (uniform(10), runs[-1].sigmas)
    )
    assert after < 0.5 * before
    assert runs[-1].klub == pytest.approx(after, rel=0.3)  # 128 draws against 4000
    assert error(runs[-1].sigmas, truth) < 0.95 * error(uniform(10), truth)
    assert error(runs[-1].sigmas, truth, order=2) < 0.5 * error(uniform(10), truth, order=2)


def test_rounds_are_seeded_and_go_on_where_they_were_stored() -> None:
    options: dict[str, Any] = {"samples": 32, "rounds": 2, "seed": 5, "candidates": 5, "doublings": 1}
    whole = list(optimise(denoise, sample_at, uniform(4), **options))
    assert [(run.level, run.round, len(run.sigmas)) for run in whole] == [(0, 1, 5), (0, 2, 5), (1, 1, 9), (1, 2, 9)]
    again = list(optimise(denoise, sample_at, uniform(4), **options))
    assert again == whole
    for k in (0, 1):  # within a level, and at its end
        stored = json.loads(json.dumps(dataclasses.asdict(whole[k])))
        state = Progress(**{**stored, "sigmas": tuple(stored["sigmas"]), "best": tuple(stored["best"])})
        rest = optimise(denoise, sample_at, uniform(4), **options, start=state)
        assert list(rest) == whole[k + 1 :]
    other = list(optimise(denoise, sample_at, uniform(4), **{**options, "seed": 6}))
    assert other != whole
    # The points of the first level stay where it left them.
    assert whole[-1].sigmas[::2] == pytest.approx(whole[1].sigmas)


def test_a_score_stops_the_search_and_returns_to_its_best() -> None:
    scores = iter([5.0, 3.0, 4.0, 3.5])  # of the start and of three rounds
    seen: list[Sequence[float]] = []

    def score(sigmas: Sequence[float]) -> float:
        seen.append(tuple(sigmas))
        return next(scores)

    runs = list(optimise(denoise, sample_at, uniform(4), samples=32, rounds=10, score=score, patience=2))
    assert [run.ended for run in runs] == [False, False, True]
    assert seen[0] == tuple(uniform(4))
    assert runs[-1].sigmas == runs[-1].best == seen[1] and runs[-1].score == 3.0
    assert runs[1].sigmas == seen[2] != seen[1]


def test_the_bound_on_a_grid_agrees_with_the_draws_and_its_path_is_no_worse(truth: tuple[Tensor, Tensor]) -> None:
    grid = karras(60)
    generator = torch.Generator().manual_seed(4)
    x0 = sample_at(2000, torch.zeros(2000), generator)
    paths = list(noised(x0, grid, generator))[::-1]
    denoised = torch.stack([denoise(x, x.new_full((len(x),), sigma)) for x, sigma in zip(paths, grid, strict=True)])
    costs = klub_matrix(denoised, grid)

    path = shortest(costs, 8, gamma=1.0)
    bound = sum(float(costs[a, b]) for a, b in pairwise(path))
    drawn = klub(denoise, sample_at, [grid[i] for i in path], 8000, torch.Generator().manual_seed(6))
    assert bound == pytest.approx(drawn, rel=0.05)
    searched = list(optimise(denoise, sample_at, uniform(8), samples=64, rounds=3))[-1]
    assert drawn < klub(denoise, sample_at, searched.sigmas, 8000, torch.Generator().manual_seed(6))
    # The least bound is not the least error (Appendix A.3): weight on the early steps makes up for it.
    weighted = [grid[i] for i in shortest(costs, 8, gamma=0.7)]
    assert error(weighted, truth) < 0.8 * error([grid[i] for i in path], truth)
    assert error(weighted, truth) < 0.8 * error(uniform(8), truth)


def walked(x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """x [N, 2] at the last of `sigmas`, 0 for no noise, by EVODiff: one channel of two pixels."""
    levels = tuple((1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)) for sigma in sigmas)
    timesteps = tuple(timestep_of(sigmas[:-1], ALPHAS).tolist())
    sampling = Sampling("by hand", len(timesteps), 1.0, 8, 16, timesteps, (), 1.0, (), "evodiff", levels)
    evodiff.check(sampling)
    point, state = (x * levels[0][0]).reshape(-1, 1, 1, 2), None
    for index, (sigma, (alpha, _)) in enumerate(zip(sigmas, levels[:-1], strict=False)):
        data = denoise(point.reshape(-1, 2) / alpha, x.new_full((len(x),), sigma))
        point, state = evodiff.advance(sampling, index, point, data.reshape(point.shape), state)
    return point.reshape(-1, 2) / levels[-1][0]


def test_evodiff_beats_its_first_order_and_converges(truth: tuple[Tensor, Tensor]) -> None:
    x, ends = truth

    def off(sigmas: Sequence[float]) -> float:
        return float((walked(x, sigmas) - ends).norm(dim=1).mean())

    assert off(karras(10)) < 0.5 * error(karras(10), truth)
    assert off(karras(6)) < 0.7 * error(karras(6), truth)
    # Against 2M it is better at few steps; it is of first order, so that 2M overtakes it.
    assert off(karras(6)) < 0.8 * error(karras(6), truth, order=2)
    errors = [off(karras(steps)) for steps in (10, 40, 160)]
    assert errors[1] < 0.4 * errors[0] and errors[2] < 0.4 * errors[1]
    assert errors[2] < 0.005
    # An end without noise, as pipelines have it: what counts is where the last call is made.
    ends = denoise(ends, x.new_full((len(x),), SIGMA_MIN))
    plain = denoise(solve(x, karras(5), order=2), x.new_full((len(x),), SIGMA_MIN))
    assert off([*karras(5), 0.0]) < 0.8 * float((plain - ends).norm(dim=1).mean())
