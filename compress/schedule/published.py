"""Schedules from papers that are given as tables or formulas, for any number of steps."""

from __future__ import annotations

import numpy as np

from diffpress.compress.schedule import align
from diffpress.compress.schedule.sigmas import karras as spread
from diffpress.compress.schedule.sigmas import sigma_of, sigma_table, timestep_of
from diffpress.errors import DiffpressError


def karras(steps: int, alphas_cumprod: np.ndarray) -> tuple[float, ...]:
    """Karras sigmas as diffusers places them: the last step begins at the smallest sigma. steps + 1, the last 0."""
    table = sigma_table(alphas_cumprod)
    return (*spread(float(table[-1]), float(table[0]), steps - 1), 0.0)


def align_your_steps(steps: int, alphas_cumprod: np.ndarray) -> tuple[float, ...]:
    """The paper's ten steps for Stable Diffusion, at `steps` by its own interpolation: steps + 1 sigmas, the last 0.

    Sabour et al. 2024. Ends that leave the range of alphas_cumprod [T] are moved onto it.
    """
    table = sigma_table(alphas_cumprod)
    smallest, largest = float(table[0]), float(table[-1])
    found = align.interpolated(align.table("StableDiffusion"), steps, smallest)
    return (*(min(max(sigma, smallest), largest) for sigma in found[:-1]), 0.0)


def hyperparameters(steps: int, alphas_cumprod: np.ndarray) -> tuple[float, ...]:
    """The schedule of "Hyperparameters are all you need" (2025): it ends early, at t of about 20, and is decoded there.

    Karras sigmas of n points with exponent rho say where sampling ends, at three quarters of them; between, timesteps
    stand at t^(1 / 1.2) equally far apart. For 8 steps n = 12 and rho = 7, for 5 and 6 n = 8 and rho = 5, as in the
    paper; for others the nearest of the two rules, n growing with the steps. steps + 1 sigmas.
    """
    if steps < 2:
        raise DiffpressError("the schedule of 'Hyperparameters are all you need' has two steps at least")
    points, rho = (8, 5.0) if steps <= 6 else (round(1.5 * steps), 7.0)
    table = sigma_table(alphas_cumprod)
    levels = spread(float(table[-1]), float(table[0]), points - 1, rho)
    end = timestep_of(levels[round(0.75 * points)], alphas_cumprod)
    timesteps = np.linspace((len(table) - 1) ** (1 / 1.2), float(end) ** (1 / 1.2), steps + 1) ** 1.2
    return tuple(float(sigma) for sigma in sigma_of(timesteps, alphas_cumprod))
