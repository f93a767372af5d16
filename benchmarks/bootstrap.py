"""Bootstrap confidence intervals (Efron 1979): how far a figure may be off, from the numbers it is made of.

The percentile interval: the rows are drawn again with replacement, and the middle 95 % of what the figure comes out as
then is the interval. Drawing whole rows keeps what belongs together: both times of a round, all scores of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
_AT_ONCE = 1 << 22  # numbers in memory

Statistic = Callable[[np.ndarray], np.ndarray]  # [R, N, ...] -> [R]: of each of R samples of N rows


def median(samples: np.ndarray) -> np.ndarray:
    """The median of each sample [R, N] -> [R]."""
    return np.asarray(np.median(samples, axis=1))


def mean(samples: np.ndarray) -> np.ndarray:
    """The mean of each sample [R, N] -> [R]."""
    return np.asarray(samples.mean(axis=1))


def share(samples: np.ndarray) -> np.ndarray:
    """Of rows (hits, of how many): all hits over all of them, [R, N, 2] -> [R]."""
    totals = samples.sum(axis=1)
    return np.asarray(totals[:, 0] / np.maximum(totals[:, 1], 1))


def interval(
    rows: np.ndarray, statistic: Statistic = mean, confidence: float = CONFIDENCE, resamples: int = RESAMPLES
) -> list[float] | None:
    """The [low, high] of a statistic of rows [N, ...]; None for fewer than two rows, which say nothing about spread.

    The same rows always have the same interval. It cannot be wider than the rows are: of fewer than six the true
    median lies outside of all of them more often than one time in twenty.
    """
    rows = np.asarray(rows, np.float64)
    if len(rows) < 2:
        return None
    random = np.random.default_rng(0)
    step = max(1, _AT_ONCE // rows.size)
    found = [
        statistic(rows[random.integers(0, len(rows), (min(step, resamples - start), len(rows)))])
        for start in range(0, resamples, step)
    ]
    low, high = np.quantile(np.concatenate(found), [(1 - confidence) / 2, (1 + confidence) / 2])
    return [float(low), float(high)]
