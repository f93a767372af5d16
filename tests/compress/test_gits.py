"""GITS against brute force: costs point by point, and every path there is. How good it is: test_mixture.py."""

from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from diffpress.compress.schedule.gits import Metric, cost_matrix, shortest, teacher
from diffpress.errors import DiffpressError


def distance_to_chord(x: Tensor, first: Tensor, last: Tensor) -> float:
    """By least squares: |x - (last + s (first - last))| at the best s."""
    chord = (first - last).flatten()
    away = (x - last).flatten()
    s = torch.linalg.lstsq(chord[:, None], away[:, None]).solution[0, 0]
    return float((away - s * chord).norm())


@pytest.fixture
def trajectories() -> tuple[Tensor, Tensor, list[float]]:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(6, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    directions = torch.randn(6, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    return points, directions, [9.0, 5.0, 3.0, 1.0, 0.4, 0.0]


def test_costs_are_the_deviations_of_one_step_beyond_the_teacher(
    trajectories: tuple[Tensor, Tensor, list[float]],
) -> None:
    points, directions, sigmas = trajectories
    costs = cost_matrix(points, directions, sigmas)
    assert not costs.tril().any()
    for i, j in combinations(range(6), 2):
        differences = []
        for n in range(3):
            student = points[i, n] + (sigmas[j] - sigmas[i]) * directions[i, n]
            ends = points[0, n], points[-1, n]
            differences.append(distance_to_chord(student, *ends) - distance_to_chord(points[j, n], *ends))
        assert float(costs[i, j]) == pytest.approx(sum(differences) / 3, rel=1e-9)
    assert (costs < 0).any()  # signed: a step may end nearer to the chord than the teacher


def test_costs_can_be_the_distances_to_the_teacher(trajectories: tuple[Tensor, Tensor, list[float]]) -> None:
    points, directions, sigmas = trajectories
    costs = cost_matrix(points, directions[:-1], sigmas, "l2")  # the last direction is never needed
    assert not costs.tril().any()
    for i, j in combinations(range(6), 2):
        student = points[i] + (sigmas[j] - sigmas[i]) * directions[i]
        expected = (student - points[j]).flatten(1).norm(dim=1).mean()
        assert float(costs[i, j]) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("metric", ["deviation", "l2"])
def test_a_straight_trajectory_costs_nothing(metric: Metric) -> None:
    # Data at one point: eps is constant along a trajectory, and every step of Euler's method is exact.
    sigmas = [14.0, 7.0, 2.0, 0.5, 0.03]
    x = 14 * torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    points, directions = teacher(lambda x, sigma: torch.full_like(x, 0.7), x, sigmas)
    assert points.shape == (5, 8, 4, 4, 4) and directions.shape == (4, 8, 4, 4, 4)
    torch.testing.assert_close(points[-1], 0.7 + (x - 0.7) * 0.03 / 14, rtol=1e-4, atol=1e-5)
    assert float(cost_matrix(points, directions, sigmas, metric).abs().max()) < 1e-4


@pytest.mark.parametrize("gamma", [0.7, 1.0, 1.15, 1.3])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 8])
def test_the_path_is_the_best_of_all(steps: int, gamma: float) -> None:
    for seed in range(5):
        costs = torch.randn(9, 9, generator=torch.Generator().manual_seed(seed)) + 0.5  # some below zero

        def total(path: tuple[int, ...], costs: Tensor = costs) -> float:
            return sum(gamma**k * float(costs[a, b]) for k, (a, b) in enumerate(pairwise(path)))

        every = [(0, *inner, 8) for inner in combinations(range(1, 8), steps - 1)]
        found = shortest(costs, steps, gamma)
        assert tuple(found) == min(every, key=total)


def test_impossible_requests_are_refused() -> None:
    costs = torch.rand(5, 5)
    assert shortest(costs, 4) == [0, 1, 2, 3, 4]
    for steps in (0, 5):
        with pytest.raises(DiffpressError, match=f"{steps} steps cannot be chosen from 5 teacher points: 1 to 4 can"):
            shortest(costs, steps)
    costs[1, 3] = float("nan")
    with pytest.raises(DiffpressError, match="not finite"):
        shortest(costs, 2)


def test_what_does_not_fit_together_is_refused() -> None:
    points = torch.rand(3, 2, 4)
    with pytest.raises(DiffpressError, match="4 sigmas, 3 points and 3 directions"):
        cost_matrix(points, points, [3.0, 2.0, 1.0, 0.5])
    with pytest.raises(DiffpressError, match="sigmas have to decrease, but 3 follows 2 at position 2"):
        cost_matrix(points, points, [4.0, 2.0, 3.0])
