"""Images per second at several batch sizes; what a graph, a backend or the time does not allow is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from diffpress.benchmarks.candidates import COMPRESSED, Candidate
from diffpress.benchmarks.latency import alternate, paired_interval, paired_ratio
from diffpress.errors import DiffpressError

BATCHES = (1, 2, 4, 8)
ROUNDS = 5
SECONDS = 60  # that a batch size may take, all candidates and rounds together


def measure(
    opens: Mapping[str, Callable[[], Candidate]],
    single_ms: Mapping[str, float],
    texts: Sequence[str],
    quiet: bool,
    batches: Sequence[int] = BATCHES,
) -> list[dict[str, Any]]:
    """A row per batch size: images per second by candidate, how many times faster the compressed one is, refusals.

    Candidates are opened anew for every batch size, because a backend keeps what it compiled for each. `single_ms` are
    latencies of one image, which say beforehand what would take too long.
    """
    rows = []
    for batch in tqdm(batches, desc="throughput", unit="batch", disable=quiet):
        expected = sum(single_ms[name] for name in opens) * batch / 1000
        if batch > 1 and 2 * expected > SECONDS:  # a warm-up and one round at least
            reason = f"not measured: a round would take about {expected:.0f} s"
            rows.append(_row(batch, {}, dict.fromkeys(opens, reason)))
            continue
        calls, refused = _opened(opens, batch, texts)
        rounds = int(np.clip(SECONDS / expected - 1, 1, ROUNDS))
        rows.append(_row(batch, alternate(calls, rounds, warmup=0) if calls else {}, refused))
    return rows


def _opened(
    opens: Mapping[str, Callable[[], Candidate]], batch: int, texts: Sequence[str]
) -> tuple[dict[str, Callable[[int], object]], dict[str, str]]:
    """Those that have drawn a batch, ready to be timed, and why the others did not."""
    calls: dict[str, Callable[[int], object]] = {}
    refused: dict[str, str] = {}
    some = [texts[index % len(texts)] for index in range(batch)]
    for name, open_candidate in opens.items():
        try:
            candidate = open_candidate()

            def draw(turn: int, candidate: Candidate = candidate) -> object:
                return candidate(some, [turn * batch + index for index in range(batch)])

            draw(0)
        # Out of memory is an error of its own kind in every library; torch's are RuntimeErrors.
        except (DiffpressError, RuntimeError, MemoryError) as error:
            refused[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
        else:
            calls[name] = draw
    return calls, refused


def _row(batch: int, times: Mapping[str, Sequence[float]], refused: Mapping[str, str]) -> dict[str, Any]:
    own = times.get(COMPRESSED)
    others = {name: values for name, values in times.items() if own is not None and name != COMPRESSED}
    return {
        "batch": batch,
        "images_per_second": {name: batch / (float(np.median(values)) / 1000) for name, values in times.items()},
        "speedup": {name: paired_ratio(values, own or ()) for name, values in others.items()},
        "speedup_interval": {name: paired_interval(values, own or ()) for name, values in others.items()},
        "rounds": len(own) if own else 0,
        "refused": dict(refused),
    }
