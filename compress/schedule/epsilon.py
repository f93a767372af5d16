"""Epsilon scaling folded into a schedule's coefficients: eps <- eps / b at every call, with no work at run time.

Ning et al. 2024, Elucidating the Exposure Bias in Diffusion Models, Section 5: a sampler's own samples are off those
of training, and the network answers with too large a noise; dividing it by a number close to 1 undoes most of that.
What a network predicts is linear in its input x = alpha x0 + sigma eps and in eps, whichever of eps, x0 and
v = alpha eps - sigma x0 it is, so that a scaled eps is one more term in x:

    eps / b;    v' = v / b + (1 / b - 1) (sigma / alpha) x;    x0' = x0 / b + (1 - 1 / b) x / alpha.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from diffpress.compress.schedule.sigmas import sigma_of
from diffpress.errors import DiffpressError
from diffpress.plan import FRESH, OUTPUT, PRIOR, SAMPLE, Row, Sampling

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def check_scheduler(scheduler: Any) -> None:
    """Raises `DiffpressError` where epsilon cannot be told from what the scheduler's network predicts."""
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise DiffpressError(f"prediction type '{kind}' is not known: there are {', '.join(PREDICTIONS)}")
    if not float(scheduler.alphas_cumprod[-1]) > 0:
        raise DiffpressError("the model is trained to start from pure noise, where epsilon says nothing of the image")


def scaled(sampling: Sampling, scheduler: Any, divisors: Sequence[float]) -> Sampling:
    """`sampling` with the epsilon of call i divided by divisors[i]; `scheduler` tells what the network predicts.

    Noise levels are those of the timesteps that the network is told, log sigma linear between the trained ones. Raises
    `DiffpressError` as `check_scheduler`, and for divisors that are not one positive number for each call.
    """
    check_scheduler(scheduler)
    if len(divisors) != len(sampling.timesteps) or not all(0 < divisor < float("inf") for divisor in divisors):
        raise DiffpressError(f"{len(sampling.timesteps)} calls need as many positive divisors, not {list(divisors)}")
    factors = [1 / divisor for divisor in divisors]  # of the output
    sigmas = sigma_of(sampling.timesteps, scheduler.alphas_cumprod)  # sigma / alpha
    kind = scheduler.config.get("prediction_type", "epsilon")
    of_input = {
        "epsilon": [0.0] * len(factors),
        "v_prediction": [(factor - 1) * sigma for factor, sigma in zip(factors, sigmas, strict=True)],
        "sample": [(1 - factor) * np.sqrt(1 + sigma**2) for factor, sigma in zip(factors, sigmas, strict=True)],
    }[kind]
    return replaced_outputs(
        sampling, factors, [share * scale for share, scale in zip(of_input, sampling.input_scale, strict=True)]
    )


def replaced_outputs(sampling: Sampling, factors: Sequence[float], of_sample: Sequence[float]) -> Sampling:
    """`sampling` in which the output of call i is factors[i] * output_i + of_sample[i] * sample_i."""

    def changed(row: Row, index: int) -> Row:
        sums: dict[tuple[int, str], float] = {}
        for kind, lag, coefficient in row:
            parts = {kind: coefficient}
            if kind == OUTPUT:
                parts = {OUTPUT: coefficient * factors[index - lag], SAMPLE: coefficient * of_sample[index - lag]}
            for part, value in parts.items():
                if value or part == FRESH:  # drawn even where nothing of it is added
                    sums[-lag, part] = sums.get((-lag, part), 0.0) + value
        # As `calibration.probe` has them: the earliest call first, its sample before its output.
        ordered = sorted(sums, key=lambda key: (key[0], (SAMPLE, OUTPUT, FRESH, PRIOR).index(key[1])))
        return tuple((part, -back, float(sums[back, part])) for back, part in ordered)

    def all_changed(rows: Iterable[Row], first: int = 0) -> tuple[Row, ...]:
        return tuple(changed(row, index) for index, row in enumerate(rows, first))

    # What a start adds to rows is a sum of the same outputs.
    starts = tuple(rows and all_changed(rows, first) for first, rows in enumerate(sampling.starts, 1))
    return replace(sampling, terms=all_changed(sampling.terms), starts=starts)
