"""Align Your Steps where everything is known: Gaussian data. How good it is elsewhere: test_mixture.py."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from diffpress.compress.schedule.align import (
    SampleAt,
    gaussian_klub,
    interpolated,
    klub,
    klub_matrix,
    noised,
    optimise,
    surrogate,
    table,
)
from diffpress.compress.schedule.gits import Denoise
from diffpress.errors import DiffpressError

SIGMAS = [14.6, 3.0, 1.0, 0.3, 0.03]


def gaussian(c: float) -> Denoise:
    """The best denoiser of data N(0, c^2)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        shrink = c**2 / (c**2 + sigma.double() ** 2)
        return x * shrink.reshape(-1, *[1] * (x.ndim - 1))

    return denoise


def drawn(c: float, *shape: int) -> SampleAt:
    """Such data [n, *shape] with noise."""

    def sample_at(count: int, sigma: Tensor, generator: torch.Generator) -> Tensor:
        x = torch.randn(2, count, *shape, generator=generator, dtype=torch.float64)
        return c * x[0] + sigma.double().reshape(-1, *[1] * len(shape)) * x[1]

    return sample_at


@pytest.mark.parametrize("c", [0.2, 0.5, 1.0])
def test_the_closed_form_is_the_integral(c: float) -> None:
    total = 0.0
    for upper, lower in pairwise(SIGMAS):
        t = np.exp(np.linspace(math.log(lower), math.log(upper), 20001))
        integrand = t**-3 * c**4 * (1 / (t**2 + c**2) - 1 / (upper**2 + c**2))
        total += float(np.trapezoid(integrand, t))
    assert gaussian_klub(SIGMAS, c) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("assumed", [0.5, 1.0])
def test_draws_agree_with_the_closed_form(assumed: float) -> None:
    # The data's spread is 0.5; another one in the importance density changes the variance, not the mean.
    shape = (4, 2, 2)
    estimate = klub(gaussian(0.5), drawn(0.5, *shape), SIGMAS, 4000, torch.Generator().manual_seed(0), c=assumed)
    assert estimate == pytest.approx(16 * gaussian_klub(SIGMAS, 0.5), rel=0.03)


def test_draws_depend_on_their_generator_alone() -> None:
    estimates = [
        klub(gaussian(0.5), drawn(0.5, 4), SIGMAS, 100, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert estimates[0] == estimates[1] != estimates[2]


def test_the_surrogate_is_the_minimum_of_the_closed_form() -> None:
    c = 0.8
    found = surrogate(14.6, 0.03, 8, c)
    assert (found[0], found[-1], len(found)) == (14.6, 0.03, 9)
    least = gaussian_klub(found, c)
    for i in range(1, 8):
        for factor in (0.97, 1.03):
            assert gaussian_klub([*found[:i], found[i] * factor, *found[i + 1 :]], c) > least
        # The paper's equation 31.
        before, after = found[i - 1] ** 2, found[i + 1] ** 2
        root = math.sqrt((before + c**2) * (after + c**2))
        assert c**2 / found[i] ** 2 == pytest.approx((root - math.sqrt(before * after)) / math.sqrt(before * after))
    others = [found, interpolated([14.6, 0.03], 8), np.linspace(14.6, 0.03, 9).tolist()]
    assert min(others, key=lambda sigmas: gaussian_klub(sigmas, c)) is found
    # Data without structure below sigma need no early steps: the smaller c, the later they are.
    assert surrogate(14.6, 0.03, 8, 0.1)[4] < found[4]


def test_the_search_comes_near_the_minimum() -> None:
    start = interpolated([14.6, 0.03], 6)
    least = gaussian_klub(surrogate(14.6, 0.03, 6, 0.5), 0.5)
    runs = list(optimise(gaussian(0.5), drawn(0.5, 16), start, samples=64, rounds=30))
    assert len(runs) < 30 and runs[-1].ended  # it stopped by itself
    assert gaussian_klub(runs[-1].sigmas, 0.5) - least < 0.1 * (gaussian_klub(start, 0.5) - least)
    assert all(before > after for before, after in pairwise(runs[-1].sigmas))


def test_the_bound_on_a_grid_is_the_closed_form() -> None:
    grid = interpolated([14.6, 0.03], 30)
    generator = torch.Generator().manual_seed(0)
    paths = list(noised(0.5 * torch.randn(500, 64, generator=generator), grid, generator))[::-1]
    assert [float(x.var()) for x in paths] == pytest.approx([0.25 + sigma**2 for sigma in grid], rel=0.03)
    denoise = gaussian(0.5)
    denoised = torch.stack([denoise(x, x.new_full((500,), sigma)) for x, sigma in zip(paths, grid, strict=True)])
    costs = klub_matrix(denoised, grid)
    assert not costs.tril().any()
    for i, j in [(0, 1), (0, 30), (5, 12), (20, 21), (15, 30), (29, 30)]:
        assert float(costs[i, j]) == pytest.approx(64 * gaussian_klub([grid[i], grid[j]], 0.5), rel=0.05)
    with pytest.raises(DiffpressError, match="31 sigmas and 30 rows"):
        klub_matrix(denoised[:-1], grid)


@pytest.mark.parametrize("name", ["StableDiffusion", "StableDiffusionXL", "StableDiffusionVideo"])
def test_tables_keep_their_values_and_ends_at_any_length(name: str) -> None:
    sigmas = table(name)
    assert len(sigmas) == 11 and sigmas[-1] == 0
    assert interpolated(sigmas, 10, sigma_min=0.029) == pytest.approx(sigmas)
    for steps in (1, 5, 12, 20, 50):
        found = interpolated(sigmas, steps, sigma_min=0.029)
        assert len(found) == steps + 1
        assert (found[0], found[-1]) == (sigmas[0], 0)
        assert all(before > after for before, after in pairwise(found))
        assert steps == 1 or found[-2] > 0.029


def test_twice_the_steps_are_logarithmic_midpoints() -> None:
    found = interpolated(SIGMAS, 8)
    assert found[::2] == pytest.approx(SIGMAS)
    assert found[1::2] == pytest.approx([math.sqrt(a * b) for a, b in pairwise(SIGMAS)])


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(DiffpressError, match="no Align Your Steps table 'Flux': choose one of StableDiffusion, "):
        table("Flux")
    with pytest.raises(DiffpressError, match=r"give sigma_min between 0 and 0\.3"):
        interpolated([*SIGMAS[:-1], 0.0], 8)
    with pytest.raises(DiffpressError, match="at least one step, not 0"):
        interpolated(SIGMAS, 0)
    with pytest.raises(DiffpressError, match="have to decrease, but 1 follows 1 at position 2"):
        gaussian_klub([3.0, 1.0, 1.0], 0.5)
    with pytest.raises(DiffpressError, match="the last sigma is 0: it has to be positive"):
        klub(gaussian(1), drawn(1, 4), [3.0, 1.0, 0.0], 8, torch.Generator())
