"""Steps placed where the teacher's trajectory bends: GITS, as a shortest path.

Chen et al. 2024, On the Trajectory Regularity of ODE-based Diffusion Sampling, Section 4. In x = x0 + sigma * eps the
probability-flow ODE is dx / dsigma = eps(x, sigma), so a step of Euler's method is a straight line, and its cost is how
much farther than the teacher it ends from the chord between the trajectory's first and last point. Trajectories of one
model bend alike, so few of them are enough, and the best subset of the teacher's points is a dynamic program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffpress.compress.schedule.sigmas import checked
from diffpress.errors import DiffpressError

# The data that x [N, ...] = x0 + sigma * eps most likely came from, for sigma [N].
Denoise = Callable[[Tensor, Tensor], Tensor]
Metric = Literal["deviation", "l2"]


def teacher(denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Trajectories over P decreasing sigmas from x [N, ...] at the first: points [P, N, ...], eps [P - 1, N, ...].

    Adams-Bashforth of second order with variable steps: one evaluation a step, as iPNDM in the paper's code.
    """
    levels = checked(sigmas, zero_allowed=True)
    points: list[Tensor] = [x]
    directions: list[Tensor] = []
    for index, (sigma, after) in enumerate(pairwise(levels)):
        eps = (x - denoise(x, x.new_full((len(x),), sigma))) / sigma
        slope = eps
        if index:
            half = (after - sigma) / (sigma - levels[index - 1]) / 2
            slope = eps + half * (eps - directions[-1])
        x = x + (after - sigma) * slope
        points.append(x)
        directions.append(eps)
    return torch.stack(points), torch.stack(directions)


def cost_matrix(points: Tensor, directions: Tensor, sigmas: Sequence[float], metric: Metric = "deviation") -> Tensor:
    """Costs [P, P] of one Euler step from teacher point i to sigma_j > i; zero on and below the diagonal. float64.

    points [P, N, ...] and directions [P or P - 1, N, ...] are the teacher's x and eps = dx / dsigma. With "deviation"
    c_ij = mean_n[dev(x_i + (sigma_j - sigma_i) eps_i) - dev(x_j)], dev(x) = the distance of x to the chord from the
    first to the last point: signed, since a step that ends nearer to the chord than the teacher costs less than
    nothing. "l2" is mean_n |x_i + (sigma_j - sigma_i) eps_i - x_j|, which also sees an error along the chord.
    Costs are means over trajectories: batches of equal size may be averaged.
    """
    levels = torch.tensor(checked(sigmas, zero_allowed=True), dtype=torch.float64)
    count = len(levels)
    if len(points) != count or len(directions) < count - 1:
        raise DiffpressError(
            f"{count} sigmas, {len(points)} points and {len(directions)} directions do not fit together"
        )
    costs = torch.zeros(count, count, dtype=torch.float64)
    last = points[-1].flatten(1).double()
    chord = torch.nn.functional.normalize(points[0].flatten(1).double() - last, dim=1)

    def across(x: Tensor) -> Tensor:  # what of x [N, D] is perpendicular to the chord
        return x - (x * chord).sum(1, keepdim=True) * chord

    if metric == "deviation":
        teachers = torch.stack([across(x.flatten(1).double() - last).norm(dim=1) for x in points])  # [P, N]
    # One row at a time: only [N, D] is held in double precision, whatever P is.
    for i in range(count - 1):
        x, eps = points[i].flatten(1).double(), directions[i].flatten(1).double()
        lengths = (levels[i + 1 :] - levels[i]).to(x.device)[:, None]  # [P - i - 1, 1]
        if metric == "deviation":
            # |a + h b|^2 is a quadratic in the step h: three dot products serve every j.
            a, b = across(x - last), across(eps)
            square = a.square().sum(1) + 2 * lengths * (a * b).sum(1) + lengths**2 * b.square().sum(1)
            error = square.clamp_min(0).sqrt() - teachers[i + 1 :]
        else:
            ends = (points[j].flatten(1).double() for j in range(i + 1, count))
            error = torch.stack([(x + h * eps - end).norm(dim=1) for h, end in zip(lengths, ends, strict=True)])
        costs[i, i + 1 :] = error.mean(1).cpu()
    return costs


def shortest(costs: Tensor, steps: int, gamma: float = 1.15) -> list[int]:
    """The path 0 = i_0 < i_1 < ... < i_steps = P - 1 of least sum_k gamma^k c[i_k, i_(k+1)], for costs [P, P].

    V[i, 1] = c[i, last], V[j, k] = min_i(c[j, i] + gamma V[i, k - 1]), over i > j (the paper's Algorithm 1). gamma
    above 1 makes late errors dearer: 1.15 for pixels, 1.20 for Stable Diffusion in the paper.
    """
    table = costs.double().cpu().numpy()
    last = len(table) - 1
    if not 1 <= steps <= last:
        raise DiffpressError(f"{steps} steps cannot be chosen from {last + 1} teacher points: 1 to {last} can")
    if not np.isfinite(table[np.triu_indices(last + 1, 1)]).all():
        raise DiffpressError("the cost of a step is not finite: the teacher's trajectories hold NaN or infinity")
    edges = np.where(np.triu(np.ones_like(table), 1) > 0, table, np.inf)
    values = edges[:, last].copy()  # V[:, k] with k segments left, here one; infinite where k do not fit
    choices: list[np.ndarray] = []
    for _ in range(steps - 1):
        totals = edges + gamma * values[None, :]
        choices.append(totals.argmin(1))
        values = totals.min(1)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return [*path, last]
