"""Latency as it should be measured on a shared machine: alternating in one process, medians of paired ratios."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from diffpress.benchmarks.bootstrap import interval, median

Clock = Callable[[Callable[[], object]], float]  # calls it once and says how long that took, in ms


def wall_clock(call: Callable[[], object]) -> float:
    """Milliseconds that `call` takes this process."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


def alternate(
    candidates: Mapping[str, Callable[[int], object]],
    rounds: int,
    warmup: int = 1,
    on_call: Callable[[str], object] = lambda _: None,
    clock: Clock = wall_clock,
) -> dict[str, list[float]]:
    """Time every candidate once a round, in ms; the order moves on by one each round, so none is always first.

    A candidate is called with the round's number, so that all of them do the same work in the same round. Warm-up
    rounds come first and are not counted. `on_call` hears the candidate's name after each call (a progress bar).
    `clock` is another than this process's where the work goes on elsewhere, on a GPU.
    """
    if rounds < 1:
        raise ValueError("at least one round is needed")
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()  # what lives now, large libraries above all, is not searched again in every round
    try:
        for turn in range(-warmup, rounds):
            shift = turn % len(names)
            gc.collect()
            gc.disable()  # a collection in the middle of a run would be charged to whoever runs then
            for name in names[shift:] + names[:shift]:
                elapsed_ms = clock(partial(candidates[name], max(turn, 0)))
                if turn >= 0:
                    times[name].append(elapsed_ms)
                on_call(name)
            if collecting:
                gc.enable()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return times


def summary(times_ms: Sequence[float]) -> dict[str, float | int]:
    """p50, p90 and p99 in ms (linear interpolation between runs) and the number of runs."""
    p50, p90, p99 = np.percentile(times_ms, [50, 90, 99])
    return {"p50_ms": float(p50), "p90_ms": float(p90), "p99_ms": float(p99), "runs": len(times_ms)}


def paired_ratio(slow_ms: Sequence[float], fast_ms: Sequence[float]) -> float:
    """How many times faster `fast` is: the median of per-round ratios, in which a round's disturbance cancels."""
    return float(np.median(_ratios(slow_ms, fast_ms)))


def paired_interval(slow_ms: Sequence[float], fast_ms: Sequence[float]) -> list[float] | None:
    """The 95 % bootstrap interval [low, high] of `paired_ratio`, over rounds; None for a single round."""
    return interval(_ratios(slow_ms, fast_ms), median)


def _ratios(slow_ms: Sequence[float], fast_ms: Sequence[float]) -> np.ndarray:
    if len(slow_ms) != len(fast_ms):
        raise ValueError("paired ratios need the same rounds on both sides")
    return np.asarray(slow_ms) / np.asarray(fast_ms)
