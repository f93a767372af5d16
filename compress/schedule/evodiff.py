"""What EVODiff steps between, from a diffusers scheduler: noise levels and data predictions; see `diffpress.evodiff`.

The schedule is that of DPM-Solver++, which predicts data too: same spacings, same lists of timesteps or sigmas.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from diffpress import evodiff
from diffpress.calibration.schedule import place
from diffpress.errors import DiffpressError
from diffpress.plan import Sampling


def to_evodiff(
    linear: Sampling, scheduler: Any, timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None
) -> Sampling:
    """The schedule `linear` of a DPMSolverMultistepScheduler, walked by EVODiff.

    `timesteps` or `sigmas` are what it was placed at, see `calibration.schedule.place`. Raises `DiffpressError` for a
    network that predicts another thing than noise, v or data, and where noise does not fall.
    """
    placed = copy.deepcopy(scheduler)
    if timesteps is None and sigmas is None:
        placed.set_timesteps(linear.steps)
    else:
        place(placed, timesteps, sigmas)
    kappas = np.asarray(placed.sigmas, np.float64)
    alphas = 1 / np.sqrt(1 + kappas**2)
    levels = tuple(zip(alphas.tolist(), (kappas * alphas).tolist(), strict=True))
    kind = placed.config.prediction_type
    # By (alpha, sigma) of the call, what sample and output contribute to the data prediction.
    weights: dict[str, Callable[[float, float], tuple[float, float]]] = {
        "epsilon": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
        "v_prediction": lambda alpha, sigma: (alpha, -sigma),
        "sample": lambda alpha, sigma: (0.0, 1.0),
    }
    if kind not in weights:
        raise DiffpressError(f"a network that predicts '{kind}' is not one of: {', '.join(weights)}")
    pairs = [weights[kind](*level) for level in levels[:-1]]
    terms = tuple((("sample", 0, a), ("output", 0, b)) for a, b in pairs)
    sampling = replace(linear, terms=terms, solver="evodiff", levels=levels)
    evodiff.check(sampling)
    return sampling
