"""The finals: what ended on the front is judged on fresh prompts and timed alone on this machine, diffusers beside it.

Trials are timed beside each other on a part of the cores, and chosen by few images: both flatter whoever was lucky. The
report, the front and the choice are made of these numbers alone.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffpress.benchmarks import speed
from diffpress.benchmarks.candidates import EXPORT, REFERENCE, Candidate
from diffpress.benchmarks.latency import paired_ratio
from diffpress.benchmarks.search import objective, trial
from diffpress.benchmarks.search.ground import OPEN_BYTES, Ground
from diffpress.benchmarks.search.objective import Loss
from diffpress.benchmarks.search.workers import Record
from diffpress.gates import Gate
from diffpress.paths import write_json

MARGIN = 0.05  # of speed and loss, within which a trial is not worse than another
MOST = 8  # finalists beside the recipes that came first
ROUNDS = 9


def select(records: Sequence[Record], first: Sequence[str], loss: Loss, budgets: Sequence[Gate]) -> list[Record]:
    """Who goes to the finals: the front and what is near it, `MOST` at most, and those of the keys `first`.

    Within the limits comes before outside, the front before its neighbours; and the nearest to the limits is there.
    """
    points = [(objective.speed(record), loss.of(record)) for record in records]
    inside = [i for i, record in enumerate(records) if objective.keeps(budgets, record)]
    best, near = (
        # Of limits on something else the front of all says nothing: those within them have a front of their own.
        {*objective.front(points, margin), *(inside[i] for i in objective.front([points[i] for i in inside], margin))}
        for margin in (0.0, MARGIN)
    )
    order = sorted(near, key=lambda i: (not objective.keeps(budgets, records[i]), i not in best, points[i][1]))
    chosen = set(order[:MOST])
    if records:
        chosen.add(objective.nearest(records, budgets))
    # A trial has a part of the cores: one that keeps the limits with room to spare may be all that keeps them alone.
    slower = [
        {**record, "speedup": {name: ratio * (1 - 2 * MARGIN) for name, ratio in record["speedup"].items()}}
        for record in records
    ]
    if (safe := objective.choose(slower, loss, budgets)) is not None:
        chosen.add(safe)
    return [record for i, record in enumerate(records) if i in chosen or record["key"] in first]


def hold(
    records: Sequence[Record], ground: Ground, export_backend: str, tick: Callable[[], object] = lambda: None
) -> list[dict[str, Any]]:
    """The finalists with what the finals found, in the form of trials, but for those whose images are broken.

    What an interrupted run judged is read, and so are times of the very same finalists. `tick` hears of each step.
    """
    judged = []
    for record in records:
        file = ground.place / "finals" / f"{record['key']}.json"
        if not file.is_file():
            write_json(file, ground.judge(_opened(record, ground)), indent=1)
        judged.append(json.loads(file.read_text("utf-8")))
        tick()
    speedups = _timed(records, ground, export_backend)
    tick()
    kept = ("key", "recipe", "precision", "backend", "size_bytes", "passes", "operations")
    return [
        {name: record[name] for name in kept}
        | found
        | {"speedup": speedups[record["key"]], "trial": {name: record[name] for name in ("speedup", "quality")}}
        for record, found in zip(records, judged, strict=True)
        if not found["faults"]
    ]


def _timed(records: Sequence[Record], ground: Ground, export_backend: str) -> dict[str, dict[str, float]]:
    """Speedups by key."""
    file, about = ground.place / "finals" / "times.json", sorted(record["key"] for record in records)
    known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    here = socket.gethostname()
    if known.get("of") != about or known.get("host") != here:
        found: dict[str, dict[str, float]] = {}
        for part in _parts(records):
            ratios = timed([_opened(record, ground) for record in part], ground, export_backend)
            found |= {record["key"]: own for record, own in zip(part, ratios, strict=True)}
        known = {"of": about, "host": here, "speedups": found}
        write_json(file, known, indent=1)
    speedups: dict[str, dict[str, float]] = known["speedups"]
    return speedups


def timed(candidates: Sequence[Candidate], ground: Ground, export_backend: str) -> list[dict[str, float]]:
    """The speedups of pipelines that are open together: alternating with diffusers and the uncompressed export."""
    pipelines: dict[str, Candidate] = {REFERENCE: ground.eager, EXPORT: ground.exported(export_backend)}
    pipelines |= {str(index): candidate for index, candidate in enumerate(candidates)}
    times = speed.time_all(pipelines, ground.prompts.texts, quiet=True, rounds=ROUNDS).images
    return [
        {
            "vs_eager": paired_ratio(times[REFERENCE], times[str(index)]),
            "vs_uncompressed_export": paired_ratio(times[EXPORT], times[str(index)]),
        }
        for index in range(len(candidates))
    ]


def _opened(record: Mapping[str, Any], ground: Ground) -> Candidate:
    folder = trial.folder_of(ground.place, record["recipe"])
    made, _ = trial.make(record["recipe"], folder, ground, {})
    return ground.opened(made, record["backend"], record["precision"])


def _parts(records: Sequence[Record]) -> list[list[Record]]:
    """In order, as many together as may be open at once."""
    parts: list[list[Record]] = []
    used = OPEN_BYTES
    for record in records:
        size = record["size_bytes"]["denoiser_compressed"]
        if used + size > OPEN_BYTES:
            parts.append([])
            used = 0.0
        parts[-1].append(record)
        used += size
    return parts
