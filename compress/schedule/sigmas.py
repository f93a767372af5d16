"""Noise levels and timesteps: two names of one place on the way, and how one is found from the other.

sigma = sqrt(1 / alphas_cumprod - 1) is the noise of x = x0 + sigma * eps (variance exploding, Karras et al. 2022). A
network trained on x_VP = sqrt(alphas_cumprod) * x0 + sqrt(1 - alphas_cumprod) * eps takes x / sqrt(1 + sigma^2), at the
timestep of that sigma; between two trained timesteps the logarithm of sigma is linear, as in diffusers' solvers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from diffpress.errors import DiffpressError


def sigma_table(alphas_cumprod: ArrayLike) -> np.ndarray:
    """Sigma [T] of every trained timestep, increasing, from alphas_cumprod [T] (diffusers' schedulers carry it)."""
    alphas = np.asarray(alphas_cumprod, np.float64)
    if not (alphas > 0).all():  # zero terminal SNR: the last timestep has no finite sigma
        raise DiffpressError(
            "the last trained timestep is pure noise (zero terminal SNR) and has no sigma: give timesteps, not sigmas"
        )
    return np.sqrt(1 / alphas - 1)


def timestep_of(sigma: ArrayLike, alphas_cumprod: ArrayLike) -> np.ndarray:
    """The fractional timestep of each sigma (any shape): linear in log sigma; outside the table, its nearest end.

    What diffusers' `_sigma_to_t` gives, for arrays.
    """
    table = np.log(sigma_table(alphas_cumprod))
    values = np.log(np.maximum(np.asarray(sigma, np.float64), 1e-10))
    return np.interp(values, table, np.arange(len(table), dtype=np.float64))


def sigma_of(timestep: ArrayLike, alphas_cumprod: ArrayLike) -> np.ndarray:
    """The sigma of each timestep (any shape, fractions allowed): the inverse of `timestep_of`."""
    table = np.log(sigma_table(alphas_cumprod))
    return np.exp(np.interp(np.asarray(timestep, np.float64), np.arange(len(table), dtype=np.float64), table))


def karras(largest: float, smallest: float, intervals: int, rho: float = 7.0) -> list[float]:
    """Karras et al. 2022, equation 5: intervals + 1 sigmas, equally far apart in sigma^(1 / rho)."""
    ends = largest ** (1 / rho), smallest ** (1 / rho)
    return [largest, *(float(value) for value in np.linspace(*ends, intervals + 1)[1:-1] ** rho), smallest]


def checked(sigmas: Sequence[float], zero_allowed: bool = False) -> list[float]:
    """`sigmas` as floats: two or more, finite, strictly decreasing and positive (the last may be zero if allowed)."""
    values = [float(sigma) for sigma in sigmas]
    if len(values) < 2:
        raise DiffpressError(f"{len(values)} sigmas make no step: give at least two")
    for index, (before, after) in enumerate(pairwise(values)):
        if not (math.isfinite(before) and before > after):
            raise DiffpressError(f"sigmas have to decrease, but {after:g} follows {before:g} at position {index + 1}")
    if values[-1] < 0 or (values[-1] == 0 and not zero_allowed):
        raise DiffpressError(
            f"the last sigma is {values[-1]:g}: it has to be positive here, such as the model's smallest"
        )
    return values
