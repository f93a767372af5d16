"""Everything about a bundle's speed: backends, latency, equal-latency rivals, throughput, cold start, the roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from diffpress.benchmarks import ceilings, document, machine, memory, plain, roofline, speed, throughput
from diffpress.benchmarks.candidates import COMPRESSED, EXPORT, REFERENCE, RESCHEDULED, STRICT, Candidate
from diffpress.benchmarks.compared import Choice, Compared, on_gpu
from diffpress.plan import Sampling


@dataclass(frozen=True)
class Found:
    """What was measured, under the report's keys, and what it decides about the images that are drawn."""

    choice: Choice
    entries: Mapping[str, Any]
    trials: list[plain.Trial]
    rival: plain.Rival | None


def measure(compared: Compared, texts: Sequence[str], quiet: bool) -> Found:
    """Measure, and leave the reference open; raises `DiffpressError` where no backend runs the bundle."""
    # Other processes of a launch wait meanwhile, and diffusers may have the cores that backends take by themselves.
    with ceilings.all_cores() if machine.launched() else nullcontext():
        return _measured(compared, texts, quiet)


def _measured(compared: Compared, texts: Sequence[str], quiet: bool) -> Found:
    from diffpress.runtime.backends import available

    backends = tqdm(available(), desc="trying backends", unit="backend", disable=quiet)
    default, tried = speed.fastest(backends, compared.compressed, texts[0])
    choice = Choice(default["name"], default["precision"])
    timed = [REFERENCE, EXPORT, COMPRESSED]
    timed += [STRICT] if choice.precision != "fp32" else []
    timed += [RESCHEDULED] if compared.sampling != compared.own else []
    pipelines = {name: compared.open(name, choice) for name in timed}
    timings = speed.time_all(pipelines, texts, quiet)
    trials, rival = _rival(compared, choice, timings, pipelines, texts, quiet)
    del pipelines
    compared.close()  # sessions hold copies of the weights, and what follows opens its own
    choice = replace(choice, rival=rival.sampling if rival else None)
    sound = [(entry["backend"], entry["precision"]) for entry in tried if "p50_ms" in entry]
    plainly = dict.fromkeys([(choice.backend, "fp32"), (choice.backend, choice.precision)])
    single = {name: float(np.median(timings.images[name])) for name in (REFERENCE, EXPORT, COMPRESSED)}
    entries = {
        **document.speed(timings, choice.precision),
        "throughput": throughput.measure(
            {name: compared.opener(name, choice) for name in single}, single, texts, quiet
        ),
        **_starts(compared, choice, texts[0], quiet),
        "roofline": roofline.measure(
            {COMPRESSED: compared.bundle, EXPORT: compared.export}, {COMPRESSED: sound, EXPORT: list(plainly)}, quiet
        ),
        "backend": default,
        "backends_tried": tried,
    }
    return Found(choice, entries, trials, rival)


def _rival(
    compared: Compared,
    choice: Choice,
    timings: speed.Timings,
    pipelines: Mapping[str, Candidate],
    texts: Sequence[str],
    quiet: bool,
) -> tuple[list[plain.Trial], plain.Rival | None]:
    """Fewer plain steps in the same time: what was tried, and the best schedule of as many."""

    def open_plain(schedule: Sampling) -> Candidate:
        return compared.plain(choice.backend, choice.precision, schedule)

    def open_timed(steps: int) -> Candidate:
        return open_plain(plain.schedules(compared.scheduler, compared.own, steps)[plain.TIMED])

    trials = plain.compare(timings, pipelines, open_timed, compared.own.steps, texts[0], quiet)
    reference = pipelines[REFERENCE]
    return trials, plain.rival(
        trials, compared.scheduler, compared.own, open_plain, reference, texts, compared.batch, quiet
    )


def _starts(compared: Compared, choice: Choice, prompt: str, quiet: bool) -> dict[str, Any]:
    """Peak memory and cold start of each candidate in fresh processes."""
    runs = {"backend": choice.backend, "prompt": prompt}
    bundle = str(compared.bundle.path)
    reference = {"bundle": bundle, "against": compared.against, "prompt": prompt, "on_gpu": on_gpu(choice.backend)}
    tasks: dict[str, dict[str, Any]] = {
        REFERENCE: reference,
        EXPORT: {"bundle": str(compared.export.path), "precision": "fp32", **runs},
        COMPRESSED: {"bundle": bundle, "precision": choice.precision, **runs},
    }
    bar = tqdm(tasks.items(), desc="fresh processes", unit="candidate", disable=quiet)
    found = {name: memory.starts(task) for name, task in bar}
    parts = {name: memory.middle(each) for name, each in found.items()}
    return {
        "peak_rss_bytes": {name: max(one.peak_rss_bytes for one in each) for name, each in found.items()},
        "peak_device_bytes": {name: max((one.peak_device_bytes for one in each), key=lambda peak: peak or 0)
                              for name, each in found.items()},
        "cold_start_ms": {name: sum(each.values()) for name, each in parts.items()},
        "cold_start_parts_ms": parts,
    }  # fmt: skip
