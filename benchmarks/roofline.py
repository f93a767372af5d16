"""How far every graph of a denoiser is from what the machine can do, and which operators hold it back.

Operations and bytes are counted from the ONNX graph (`export.flops`), the roofs are measured (`ceilings`). Operators
run one after another, so the least time of a graph is the sum of its products', each the longer of its arithmetic and
of what it moves; what stands between products counts as fused into them. So a share of 100 % is out of reach, and what
is missing to it lies in slower products or in what is not fused, which the backend's own profile tells apart.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from diffpress.benchmarks import ceilings, profiles
from diffpress.benchmarks.ceilings import Ceilings
from diffpress.benchmarks.latency import alternate
from diffpress.benchmarks.memory import on_nvidia
from diffpress.benchmarks.profiles import Timed
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError
from diffpress.export.flops import Product, Work, count
from diffpress.plan import FULL, Sampling, StepProgram
from diffpress.runtime.opening import choose_opening
from diffpress.runtime.program import TIMESTEP
from diffpress.runtime.session import Feeds, Session

ROUNDS = 9
SECONDS = 30  # that the calls of one backend may take
SHOWN = 12  # operators in a report, of hundreds


@dataclass(frozen=True)
class Call:
    """A graph as a step program calls it: rows of the batch (both halves of guidance, steps together), how often."""

    variant: str
    rows: int
    times: int  # in an image
    timestep: float  # of the first


def calls(program: StepProgram, sampling: Sampling) -> list[Call]:
    """What one image runs, most frequent first."""
    guided = sampling.guidance_scale > 1
    found: Counter[tuple[str, int]] = Counter()
    first: dict[tuple[str, int], float] = {}
    for index, together in program.runs():
        key = program.steps[index], together * (2 if guided and program.guided(index) == FULL else 1)
        found[key] += 1
        first.setdefault(key, sampling.timesteps[index])
    return [Call(variant, rows, times, first[variant, rows]) for (variant, rows), times in found.most_common()]


def seconds_of(product: Product, total_bytes: int, roofs: Ceilings) -> tuple[float, float]:
    """Least seconds of (arithmetic, moving); weights come from where the whole graph's `total_bytes` fit."""
    moving = product.weight_bytes / roofs.bandwidth(total_bytes)
    moving += product.activation_bytes / roofs.bandwidth(product.activation_bytes)
    return product.flops / roofs.operations_per_s[product.kind], moving


def judged(work: Work, roofs: Ceilings, measured_s: float | None, profile: Sequence[Timed] | None) -> dict[str, Any]:
    """A graph's work beside the ceilings and beside what it took; see the keys. A type without a ceiling: no share."""
    found: dict[str, Any] = {
        "operations": work.operations,
        "operations_by_type": dict(work.flops),
        "bytes": work.bytes,
        "weight_bytes": work.weight_bytes,
        "activation_bytes": work.activation_bytes,
        "operations_per_byte": work.operations / max(work.bytes, 1),
        "measured_seconds": measured_s,
        "seconds_at_ceiling": None,
        "share_of_ceiling": None,
        "bound": None,
        "by_operator": [],
        **_profiled(profile),
    }
    if not set(work.flops) <= roofs.operations_per_s.keys():
        return found
    least = [seconds_of(product, work.bytes, roofs) for product in work.products]
    total = sum(map(max, least))
    arithmetic = sum(computing for computing, moving in least if computing >= moving)
    found |= {
        "seconds_at_ceiling": total,
        "share_of_ceiling": None if measured_s is None else total / measured_s,
        "bound": "arithmetic" if 2 * arithmetic >= total else "bandwidth",
        "by_operator": _operators(work, least, total, profile),
    }
    return found


def _operators(
    work: Work, least: Sequence[tuple[float, float]], total: float, profile: Sequence[Timed] | None
) -> list[dict[str, Any]]:
    """The products that take longest at the ceiling, with what the backend says of each where it kept its name."""
    times = {one.name: one.seconds for one in profile or ()}
    rows = []
    for product, (computing, moving) in zip(work.products, least, strict=True):
        rows.append(
            {
                "name": product.name,
                "operator": product.op,
                "type": product.kind,
                "operations": product.flops,
                "bytes": product.weight_bytes + product.activation_bytes,
                "seconds_at_ceiling": max(computing, moving),
                "share": max(computing, moving) / total,
                "bound": "arithmetic" if computing >= moving else "bandwidth",
                "measured_seconds": times.get(product.name),
            }
        )
    return sorted(rows, key=lambda row: -row["seconds_at_ceiling"])[:SHOWN]


def _profiled(profile: Sequence[Timed] | None) -> dict[str, Any]:
    """Measured shares by the backend's types of operators, and its slowest operators."""
    if not profile:
        return {"by_type": None, "slowest": None}
    total = sum(one.seconds for one in profile)
    types: defaultdict[str, float] = defaultdict(float)
    for one in profile:
        types[one.op] += one.seconds / total
    return {
        "by_type": dict(sorted(types.items(), key=lambda pair: -pair[1])),
        "slowest": [{"name": one.name, "operator": one.op, "share": one.seconds / total} for one in profile[:SHOWN]],
    }


@dataclass(frozen=True)
class Measured:
    """A call on a backend: what it does, takes and consists of; `reason` says why something of it is None."""

    candidate: str
    backend: str
    precision: str
    call: Call
    work: Work | None = None
    seconds: float | None = None
    profile: Sequence[Timed] | None = None
    reason: str | None = None

    def entry(self, roofs: Ceilings) -> dict[str, Any]:
        """As it stands in a report."""
        call = self.call
        head = {"graph": call.variant, "candidate": self.candidate, "backend": self.backend}
        head |= {"precision": self.precision, "rows": call.rows, "calls_per_image": call.times, "reason": self.reason}
        return head | (judged(self.work, roofs, self.seconds, self.profile) if self.work else {})


def measure(
    bundles: Mapping[str, Bundle], backends: Mapping[str, Sequence[tuple[str, str]]], quiet: bool = True
) -> dict[str, Any]:
    """The ceilings, every graph of every candidate on its backends, and a whole image's denoising on each.

    `bundles` and `backends` ((backend, precision) pairs) are by candidate. What cannot be counted or run is an entry
    with its reason.
    """
    pairs = [(name, *pair) for name in bundles for pair in backends[name]]
    bar = tqdm(pairs, desc="roofline", unit="backend", disable=quiet)
    found = [one for name, *pair in bar for one in run(bundles[name], name, *pair)]
    kinds = {kind for one in found if one.work for kind in one.work.flops}
    document: dict[str, Any] = {"ceilings": (here := ceilings.measure(kinds)).as_json()}
    roofs = {False: here}
    if any(on_nvidia(one.backend) for one in found):
        roofs[True] = _of_gpu()
        document["ceilings_gpu"] = roofs[True].as_json()
    graphs = [one.entry(roofs[on_nvidia(one.backend)]) for one in found]
    return document | {"graphs": graphs, "images": _images(graphs)}


def run(bundle: Bundle, candidate: str, backend: str, precision: str) -> list[Measured]:
    """Every graph of a bundle's step program on a backend: timed in alternation, then profiled one by one."""
    manifest = bundle.manifest
    every = calls(StepProgram.from_json(manifest["program"]), Sampling.from_json(manifest["sampling"]))
    found = [Measured(candidate, backend, precision, call) for call in every]
    graphs = {call.variant: str(manifest["graphs"][call.variant]) for call in every}
    try:
        opening = choose_opening(bundle, graphs, backend, precision)
        files = opening.graphs(graphs)
        sessions = {name: opening.open(file) for name, file in files.items()}
        given = {call: feeds(sessions[call.variant], call) for call in every}
        seconds = _times(given, sessions)
        del sessions  # one more of each is opened to be profiled
        profiled = {call: profiles.profile(files[call.variant], backend, precision, given[call]) for call in every}
    except DiffpressError as error:
        return [replace(one, reason=str(error)) for one in found]
    return [replace(_counted(bundle, one), seconds=seconds[one.call], profile=profiled[one.call]) for one in found]


def _counted(bundle: Bundle, one: Measured) -> Measured:
    try:
        return replace(one, work=count(bundle.graph(one.call.variant), one.call.rows, one.precision))
    except DiffpressError as error:
        return replace(one, reason=str(error))


def feeds(session: Session, call: Call) -> dict[str, np.ndarray]:
    """Noise for every input of a graph, in the shapes of the call; its own timestep, of which it may have a table."""
    random = np.random.default_rng(0)
    found = {}
    for name, port in session.inputs.items():
        shape = [call.rows if size is None else size for size in port.shape]
        values = np.full(shape, call.timestep) if name == TIMESTEP else random.standard_normal(shape)
        found[name] = values.astype(port.dtype)
    return found


def _times(given: Mapping[Call, Feeds], sessions: Mapping[str, Session]) -> dict[Call, float]:
    """Median seconds of each call, alternating."""
    runs = {
        str(index): partial(_run, sessions[call.variant], feeds) for index, (call, feeds) in enumerate(given.items())
    }
    once = sum(times[0] for times in alternate(runs, 1).values()) / 1000
    times = alternate(runs, int(np.clip(SECONDS / once, 1, ROUNDS)), warmup=0)
    return {call: float(np.median(times[str(index)])) / 1000 for index, call in enumerate(given)}


def _run(session: Session, given: Feeds, _: int) -> object:
    return session.run(given)


def _images(graphs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All calls of an image together, by candidate and backend; None where a graph is not known."""
    groups: defaultdict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in graphs:
        groups[row["candidate"], row["backend"], row["precision"]].append(row)
    found = []
    for (candidate, backend, precision), rows in groups.items():
        sums = {
            key: None
            if any(row.get(key) is None for row in rows)
            else sum(row["calls_per_image"] * row[key] for row in rows)
            for key in ("operations", "bytes", "seconds_at_ceiling", "measured_seconds")
        }
        least, taken = sums["seconds_at_ceiling"], sums["measured_seconds"]
        head = {"candidate": candidate, "backend": backend, "precision": precision}
        found.append({**head, **sums, "share_of_ceiling": least / taken if least and taken else None})
    return found


def _of_gpu() -> Ceilings:
    from diffpress.benchmarks import gpu_ceilings
    from diffpress.benchmarks.gpu_device import Device
    from diffpress.runtime import cuda

    gpu = cuda.gpu()
    assert gpu is not None
    return ceilings.of_gpu(gpu_ceilings.measure(Device(), gpu.memory_bytes))
