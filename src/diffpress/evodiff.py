"""EVODiff (Li et al. 2025, arXiv 2509.26096): a solver that steers by how its predictions agree, one call a step.

Its steps are not linear in what they have seen, so no table of coefficients holds them. One function makes them for
numpy arrays and torch tensors alike, and the runtime and calibration both play it.

The steps are those of the authors' code (ShiguiLi/EVODiff) up to 20 of them; its other rule for more is left out: it
changed the error on a mixture of Gaussians by less than a tenth, either way. Of lower order are, as there, the first
step and the last, and the one before it where sampling ends without noise: the last prediction is then the result, and
a probe would go uncorrected. These steps are DDIM's; the authors' last one also shrinks the sample and adds a part of
the last prediction, which no longer solves the differential equation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from diffpress.errors import DiffpressError
from diffpress.plan import Sampling

Array = Any  # numpy array or torch tensor; only what both offer is used below


@dataclass(frozen=True)
class State:
    """What the step before left; arrays [N, C, h, w], ratio [N, C, 1, 1]. A first-order step has no difference."""

    data: Array  # m, of the call before
    euler: Array  # x_E, the first-order step to the level of the next call
    difference: Array = None  # D1, of the two latest predictions
    ratio: Array = None  # rho


@dataclass(frozen=True)
class _Step:
    """The numbers of the step to a level: of the schedule alone."""

    shrink: float  # sigma_t / sigma_0
    reach: float  # sigma_t h = alpha_t - alpha_0 sigma_t / sigma_0
    growth: float  # l, the logarithmic length of the step before over that of this one
    balance: float  # base
    weight: float  # w


def advance(sampling: Sampling, index: int, sample: Array, data: Array, state: State | None) -> tuple[Array, State]:
    """Where to call next, [N, C, h, w], after call `index` at `sample` gave the data prediction `data`; or the end.

    What is called at is a probe: a guess of the sample at that level, which the call then corrects.
    `state` is what the call before returned, None for the first. Both arrays should be of double precision.
    """
    corrected = sample
    if state is not None and state.difference is not None:
        corrected = _corrected(_step(sampling, index), data, state)
    step = _step(sampling, index + 1)
    euler = step.shrink * corrected + step.reach * data
    plain = len(sampling.timesteps) - (sampling.levels[-1][1] == 0)  # from this level on
    if state is None or index + 1 >= plain:
        return euler, State(data, euler)
    mixed = _mixed(step, data, state.data)
    difference = data - mixed * state.data
    # Never outside of the method's clamp to 0.25 l .. 1.5 l: the sigmoid of what is not negative is 0.5 to 1.
    ratio = _sigmoid(0.25 * abs(mixed)) * step.growth
    return euler + 0.5 * step.reach * difference / ratio, State(data, euler, difference, ratio)


def check(sampling: Sampling) -> None:
    """Raise `DiffpressError` unless there is a level for each call and one for the end, and noise falls."""
    levels = sampling.levels
    known = all(math.isfinite(alpha) and math.isfinite(sigma) and alpha > 0 for alpha, sigma in levels)
    kappas = [sigma / alpha for alpha, sigma in levels] if known else []
    falling = all(before > after for before, after in pairwise(kappas))
    if len(kappas) != len(sampling.timesteps) + 1 or not falling or kappas[-1] < 0:
        raise DiffpressError(
            "the sampling schedule's noise levels do not fall from call to call: compress again, with other steps"
        )


def _step(sampling: Sampling, index: int) -> _Step:
    """The step to level `index`; without what the first and the last do not need."""
    (alpha, sigma), (alpha_0, sigma_0) = sampling.levels[index], sampling.levels[index - 1]
    shrink = sigma / sigma_0
    reach = alpha - alpha_0 * shrink
    if index == 1 or index == len(sampling.timesteps):
        return _Step(shrink, reach, math.nan, math.nan, math.nan)
    alpha_1, sigma_1 = sampling.levels[index - 2]
    kappa, kappa_0, kappa_1 = sigma / alpha, sigma_0 / alpha_0, sigma_1 / alpha_1
    growth = math.log(kappa_1 / kappa_0) / math.log(kappa_0 / kappa)
    # Time runs to 1 in as many parts as the model was trained on, the smallest of them t_min: (t + t_min) / (T + t_min)
    # with t = (timestep + 1) / parts, where their number drops out.
    origin = sampling.timesteps[0] if sampling.origin is None else sampling.origin
    past = (sampling.timesteps[index] + 2) / (origin + 2)
    return _Step(shrink, reach, growth, math.sqrt(shrink / (sigma_0 / sigma_1)), 0.5 * (1 - past**2))


def _corrected(step: _Step, data: Array, state: State) -> Array:
    """The sample at the level of a call that was made at its probe."""
    # B1 and B2 times h, which projections do not see.
    before = state.difference / step.growth
    after = (data - _mixed(step, data, state.data) * state.data) * step.growth
    eta = 0.5 * _sigmoid(abs(0.5 * _projection(after + before, after - before)))
    slope = (1 - eta) * after - eta * before  # B
    # x_p - x_E is a half of reach * D1 / rho.
    excess = 0.5 * step.reach * (state.difference - slope) / state.ratio
    zeta = _sigmoid(abs(_projection(excess, state.difference) / step.reach) - 0.5)
    return state.euler + 0.5 * step.reach * slope / zeta


def _mixed(step: _Step, data: Array, before: Array) -> Array:
    """r [N, C, 1, 1]: how much of the prediction before is held to be in this one."""
    return (1 - step.weight) * step.balance + step.weight * _projection(data, before)


def _projection(a: Array, b: Array) -> Array:
    """<a, b> / <b, b> [N, C, 1, 1] over the pixels, within -2 .. 2; 0 where b vanishes."""
    square = (b * b).sum(axis=(-2, -1), keepdims=True)
    return ((a * b).sum(axis=(-2, -1), keepdims=True) / (square + (square == 0))).clip(-2, 2)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + math.e ** (-x))
