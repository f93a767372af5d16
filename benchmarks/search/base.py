"""What the uncompressed export does on this machine: measured once, alone, before any trial."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffpress.benchmarks import speed
from diffpress.benchmarks.latency import alternate, paired_ratio
from diffpress.benchmarks.search.ground import Ground
from diffpress.benchmarks.search.space import Space
from diffpress.errors import DiffpressError
from diffpress.paths import write
from diffpress.runtime import backends

ROUNDS = 9
PLAIN = "fp32"


@dataclass(frozen=True)
class Base:
    """Which backend runs which precision of the space, and the export in FP32 that trials are timed beside."""

    backends: Mapping[str, str]  # by precision, the fastest first
    export: str  # its backend
    eager: float  # how many times faster than diffusers it is

    @property
    def preferred(self) -> str:
        """The fastest precision."""
        return next(iter(self.backends))


def pairs(space: Space) -> list[tuple[str, str]]:
    """The (backend, precision) pairs that the export is tried on; raises `DiffpressError` where the space has none."""
    wanted, found = space.precision, backends.available()
    if not any(wanted is None or precision in wanted for _, precision in found):
        runs = ", ".join(dict.fromkeys(precision for _, precision in found)) or "nothing: pip install 'diffpress[cpu]'"
        raise DiffpressError(f"precision: no backend here computes in {' or '.join(wanted or ())}, but in {runs}")
    return [pair for pair in found if wanted is None or pair[1] in (*wanted, PLAIN)]


def measure(ground: Ground, space: Space) -> Base:
    """Diffusers beside the export on every backend; read where this machine has measured it already."""
    file, host = ground.place / "base.json", socket.gethostname()
    known: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if known.get("host") != host:
        pipelines: dict[str, Any] = {"": ground.eager}
        pipelines |= {" ".join(pair): ground.exported(*pair) for pair in pairs(space)}
        texts = ground.prompts.texts
        times = alternate({name: speed.single(one, texts) for name, one in pipelines.items()}, ROUNDS)
        ratios = {name: paired_ratio(times[""], own) for name, own in times.items() if name}
        known = {"host": host, "faster": dict(sorted(ratios.items(), key=lambda item: -item[1]))}
        write(file, json.dumps(known, indent=1).encode())
    fastest: dict[str, str] = {}
    for name in known["faster"]:
        backend, precision = name.split()
        fastest.setdefault(precision, backend)
    export = fastest[PLAIN]
    own = {name: backend for name, backend in fastest.items() if name in (space.precision or fastest)}
    return Base(own, export, known["faster"][f"{export} {PLAIN}"])
