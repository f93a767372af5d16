"""Times of the caching table, end to end at batch 1, paired and alternating; and plain schedules that are as fast."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

from diffpress import bundle as bundles
from diffpress.benchmarks import caching_peers, candidates, plain, scores
from diffpress.benchmarks.caching_peers import PEERS
from diffpress.benchmarks.caching_tables import PLAIN
from diffpress.benchmarks.candidates import Candidate, Drawn, Reference, own_schedule
from diffpress.benchmarks.latency import alternate, paired_ratio
from diffpress.benchmarks.recipe_rows import BATCH, compared, file_name, following
from diffpress.compress.cache.execute import executed
from diffpress.errors import DiffpressError
from diffpress.paths import write_json
from diffpress.plan import FULL, Plan, Sampling, StepProgram
from diffpress.runtime import backends
from diffpress.runtime.pipeline import Pipeline

ROUNDS = 5
CHUNK = 6  # rows that are timed together: each of them is open, in every library
ORT = "onnxruntime fp32"
UNCACHED, EAGER = "uncached", "eager"  # beside the rows of a chunk
ERRORS = tuple(f"latent_rel_l2{end}" for end in ("", "_median", "_converged", "_converged_median"))


@dataclass(frozen=True)
class Played:
    """Drawn images as a candidate, which draws image i for seed i."""

    drawn: Drawn

    def __call__(self, prompts: list[str], seeds: list[int], *, keep_latents: bool = False) -> Any:
        some = list(seeds)
        return SimpleNamespace(pixels=self.drawn.pixels[some], latents=[self.drawn.latents[some]])


@dataclass(frozen=True)
class Place:
    """Where bundles and what was measured lie, and what rows are compared with."""

    store: Path
    folder: Path
    texts: Sequence[str]
    pair: tuple[str, str]  # the fastest (backend, precision)
    wanted: tuple[Drawn, Drawn]  # the pipeline's own images, and the converged ones
    judging: scores.Judging
    rounds: int = ROUNDS
    _exports: list[Pipeline] = field(default_factory=list)

    def bundle(self, entry: Mapping[str, Any]) -> bundles.Bundle:
        """The bundle of a row; one without a cache is that of its schedule."""
        name = entry["full"] if entry["group"] == "reference" else entry["name"]
        return bundles.read(self.store / file_name(name))

    def times(self, entry: Mapping[str, Any]) -> Path:
        """Where the row's times are kept."""
        return self.folder / "times" / f"{file_name(entry['name'])}.json"

    def export(self) -> Pipeline:
        """The uncompressed export on the fastest backend."""
        if not self._exports:
            self._exports.append(Pipeline.load(bundles.read(self.store / "fp32"), *self.pair))
        return self._exports[0]

    def plain(self, sampling: Sampling) -> Pipeline:
        """The same on another schedule."""
        return following(self.export(), sampling, StepProgram((FULL,) * len(sampling.timesteps)))


def timed(place: Place, entries: Sequence[dict[str, Any]], again: bool = False) -> list[dict[str, Any]]:
    """The rows with their times and rivals, and a row for each plain schedule that is a rival."""
    (place.folder / "times").mkdir(exist_ok=True)
    missing = [entry for entry in entries if again or not place.times(entry).exists()]
    # Alike are those of the same schedule, whose uncached export is timed beside them.
    alike = sorted(missing, key=lambda entry: (entry["peer"], entry["full"]))
    with tqdm(total=len(missing), desc="timing", unit="row") as bar:
        for (peer, _), group in groupby(alike, key=lambda entry: (entry["peer"], entry["full"])):
            rows = list(group)
            for start in range(0, len(rows), CHUNK):
                some = rows[start : start + CHUNK]
                found = _peers(place, some) if peer else _rows(place, some)
                for entry in some:
                    write_json(place.times(entry), found[entry["name"]])
                    bar.update()
    told = [entry | json.loads(place.times(entry).read_text("utf-8")) for entry in entries]
    rivals = {entry["rival"]["steps"] for entry in told if entry["rival"]}
    schedules = {steps: plain_schedule(place, steps) for steps in sorted(rivals)}
    return [judged(entry, schedules) for entry in told] + plain_rows(told, schedules)


def _rows(place: Place, entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Times of bundles by the row's name."""
    found: dict[str, dict[str, Any]] = {
        entry["name"]: {"latency_ms": {}, "speedups": {}, "speedup_vs_eager": None, "rival": None, "problems": {}}
        for entry in entries
    }
    full = bundles.read(place.store / file_name(entries[0]["full"]))
    own = own_schedule(full.manifest)
    wanted = {ORT, *(entry["backend"] for entry in entries)}
    for backend, precision in backends.available():
        pair = f"{backend} {precision}"
        if pair not in wanted:
            continue
        opened: dict[str, Candidate] = {UNCACHED: Pipeline.load(full, backend, precision)}
        for entry in entries:
            try:
                pipeline = Pipeline.load(place.bundle(entry), backend, precision)
                pipeline(list(place.texts[:1]), [0])
                opened[entry["name"]] = pipeline
            except DiffpressError as error:
                found[entry["name"]]["problems"][pair] = str(error)
        if any(entry["backend"] == pair for entry in entries):
            opened[EAGER] = Reference.load("shapes", *own)
        times = _alternate(place, opened)
        for entry in entries:
            if entry["name"] in times:
                _note(found[entry["name"]], entry, pair, times)
        for entry in entries:
            if entry["backend"] == pair and entry["group"] != "reference":
                name = entry["name"]
                found[name]["rival"] = _rival(place, opened[name], opened[UNCACHED], times[name])
    in_torch = _torch(place, full, [entry for entry in entries if _float(entry)])
    for entry in entries:
        speedups, cached = found[entry["name"]]["speedups"], entry["group"] != "reference"
        found[entry["name"]] |= {
            "speedup_vs_uncompressed": speedups.get(entry["backend"]) if cached else None,
            "speedup_ort": speedups.get(ORT) if cached else None,
            "speedup_torch": in_torch.get(entry["name"]),
        }
    return found


def _note(found: dict[str, Any], entry: Mapping[str, Any], pair: str, times: Mapping[str, list[float]]) -> None:
    """Put the times of a row on one backend among what is known of it."""
    own = times[entry["name"]]
    found["latency_ms"][pair] = float(np.median(own))
    found["speedups"][pair] = paired_ratio(times[UNCACHED], own)
    if entry["backend"] == pair:
        found["speedup_vs_eager"] = paired_ratio(times[EAGER], own)


def _alternate(place: Place, opened: Mapping[str, Candidate]) -> dict[str, list[float]]:
    return alternate({name: partial(_draw, found, place.texts) for name, found in opened.items()}, place.rounds)


def _draw(candidate: Candidate, texts: Sequence[str], turn: int) -> None:
    candidate([texts[turn % len(texts)]], [turn])


def _float(entry: Mapping[str, Any]) -> bool:
    """Whether torch does the same arithmetic; what is simulated there has no time of its own."""
    return entry["group"] != "reference" and entry["bits_w"] == entry["bits_a"] == 32


def _torch(place: Place, full: bundles.Bundle, entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How many times faster each row's step program is than diffusers' own pipeline, on the same schedule."""
    if not entries:
        return {}
    with ExitStack() as stack:
        opened: dict[str, Candidate] = {UNCACHED: _reference(full)}
        opened |= {entry["name"]: _simulated(place, entry, stack) for entry in entries}
        times = _alternate(place, opened)
    return {entry["name"]: paired_ratio(times[UNCACHED], times[entry["name"]]) for entry in entries}


def _reference(bundle: bundles.Bundle) -> Reference:
    return Reference.load("shapes", Sampling.from_json(bundle.manifest["sampling"]), bundle.manifest["scheduler"])


def _simulated(place: Place, entry: Mapping[str, Any], stack: ExitStack) -> Reference:
    """diffusers' pipeline under the row's step program, until the stack is left."""
    bundle = place.bundle(entry)
    plan, reference = Plan.load(bundle.path / "plan"), _reference(bundle)
    stack.enter_context(executed(reference.pipeline, plan.program, plan.corrections))
    return reference


def _peers(place: Place, entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Times of peers beside diffusers' plain pipeline and, where it is measured, beside ours of the same settings."""
    running = [entry for entry in entries if entry["problem"] is None]
    reference = _reference(bundles.read(place.store / "fp32"))
    ours = {entry["name"]: PEERS[entry["name"]].ours for entry in running}
    there = {name for name in ours.values() if name and (place.store / file_name(name) / bundles.MANIFEST).exists()}
    with ExitStack() as stack:
        opened: dict[str, Candidate] = {UNCACHED: reference}
        for entry in running:
            opened[entry["name"]] = caching_peers.opened(PEERS[entry["name"]], reference.sampling)
        for name in there:
            opened[name] = _simulated(place, {"name": name, "full": "fp32", "group": ""}, stack)
        times = _alternate(place, opened)
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name = entry["name"]
        mate = ours.get(name)
        speedup = paired_ratio(times[UNCACHED], times[name]) if name in times else None
        found[name] = {
            "speedup_vs_eager": speedup,
            "speedup_vs_uncompressed": None,
            "speedup_ort": None,
            "speedup_torch": speedup,
            "latency_ms": {caching_peers.BACKEND: float(np.median(times[name]))} if name in times else {},
            "ours": mate,
            "ours_faster": paired_ratio(times[name], times[mate]) if mate in times else None,
            "rival": None,
        }
    return found


def _rival(place: Place, row: Candidate, uncached: Candidate, times: Sequence[float]) -> dict[str, Any] | None:
    """How many plain steps are no slower than the row on its backend, and their latency over the row's."""
    scheduler, own = place.export().bundle.manifest["scheduler"], place.export().sampling
    images = uncached([place.texts[0]], [0])
    step = images.stage_ms["denoise"] / len(images.step_ms)
    first = plain.estimate(float(np.median(times)), images.stage_ms["text"], step, images.stage_ms["decode"], own.steps)

    def opened(steps: int) -> Candidate:
        return place.plain(plain.schedules(scheduler, own, steps)[plain.TIMED])

    found = plain.best(plain.search(opened, row, first, own.steps, place.texts[0], place.rounds))
    return None if found is None else {"steps": found.steps, "latency_ratio": found.ratio}


def plain_schedule(place: Place, steps: int) -> dict[str, Any]:
    """Quality of the best plain schedules of so many steps: the nearest to the own images, and to the converged."""
    file = place.folder / f"plain-{steps}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return found
    scheduler, own = place.export().bundle.manifest["scheduler"], place.export().sampling
    rivals = plain.schedules(scheduler, own, steps)
    names, made = [], {}
    for reference in place.wanted:
        name, best = plain.best_schedule(rivals, place.plain, Played(reference), place.texts, BATCH)
        names.append(name)
        if name not in made:
            drawn = candidates.draw(best, place.texts, range(len(place.texts)), BATCH)
            made[name] = compared(drawn, place.wanted, place.judging)
    nearest = {key: made[names["converged" in key]][key] for key in ERRORS}
    entry = {"steps": steps, "schedule": names[0], "schedule_converged": names[1], **made[names[0]], **nearest}
    write_json(file, entry)
    return entry


def judged(entry: dict[str, Any], schedules: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The row with its rival's numbers, and by which errors it beats it."""
    if not entry["rival"]:
        return entry | {"beats": None}
    rival = {**entry["rival"], **schedules[entry["rival"]["steps"]]}
    return entry | {"rival": rival, "beats": {key: entry[key] < rival[key] for key in ERRORS}}


def plain_rows(
    entries: Sequence[Mapping[str, Any]], schedules: Mapping[int, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each step count that is somebody's rival; its speed is what the rows say that it was timed beside."""
    reference = next(entry for entry in entries if entry["name"] == "fp32")
    made = []
    for steps, schedule in schedules.items():
        beside = [entry for entry in entries if entry["rival"] and entry["rival"]["steps"] == steps]
        speed = np.median([entry["speedup_vs_eager"] / entry["rival"]["latency_ratio"] for entry in beside])
        made.append(
            dict.fromkeys(beside[0])
            | {key: reference[key] for key in ("bits_w", "bits_a", "bytes", "params")}
            | {"name": f"plain, {steps} steps", "group": PLAIN, "full": "fp32", "peer": False}
            | {"backend": beside[0]["backend"], "evaluations": float(steps), "variants": 1, "seconds": 0.0}
            | {"deploys": True, "speedup_vs_eager": float(speed), **schedule}
        )
    return made
