"""What the uncompressed export does on this machine: measured once, alone, before any trial."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from diffpress.benchmarks import speed
from diffpress.benchmarks.candidates import REFERENCE, Candidate
from diffpress.benchmarks.latency import alternate, paired_ratio
from diffpress.benchmarks.search.ground import OPEN_BYTES, Ground
from diffpress.benchmarks.search.space import Space
from diffpress.errors import DiffpressError
from diffpress.paths import write_json
from diffpress.runtime import backends
from diffpress.runtime.pipeline import Pipeline

ROUNDS = 7
PLAIN = "fp32"


@dataclass(frozen=True)
class Base:
    """Which backend runs which precision of the space, and the export in FP32 that trials are timed beside."""

    backends: Mapping[str, str]  # by precision, the preferred first
    export: str  # its backend
    eager: float  # how many times faster than diffusers it is

    @property
    def preferred(self) -> str:
        """The precision that the first recipes are tried in: the fastest where the search began."""
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
        known = {**known, "host": host, "faster": _faster(ground, space)}
    fastest: dict[str, str] = {}
    for name in known["faster"]:
        backend, precision = name.split()
        fastest.setdefault(precision, backend)
    own = {name: backend for name, backend in fastest.items() if name in (space.precision or fastest)}
    # Where a search began decides what its first recipes are tried in, on whichever machine it goes on.
    preferred = known.setdefault("preferred", next(iter(own), PLAIN))
    if PLAIN not in fastest or preferred not in own:
        lacking = preferred if PLAIN in fastest else PLAIN
        raise DiffpressError(f"no backend here draws whole images of this model in {lacking}, which the search needs")
    write_json(file, known, indent=1)
    own = {preferred: own[preferred], **own}
    return Base(own, fastest[PLAIN], known["faster"][f"{fastest[PLAIN]} {PLAIN}"])


def _faster(ground: Ground, space: Space) -> dict[str, float]:
    """How many times faster than diffusers the export is, by "backend precision", the fastest first.

    Those that fail, or draw broken images, are left out. Large ones are open one at a time, since they fit once.
    """
    wanted, size = pairs(space), ground.bundle.manifest["sizes"]["denoiser_reference"]
    groups = [[pair] for pair in wanted] if size * len(wanted) > OPEN_BYTES else [wanted]
    ratios = {name: ratio for group in groups for name, ratio in _timed(ground, group).items()}
    return dict(sorted(ratios.items(), key=lambda item: -item[1]))


def _timed(ground: Ground, group: Sequence[tuple[str, str]]) -> dict[str, float]:
    """The same of some pairs, which are open together and timed in the same rounds."""
    texts, opened = ground.prompts.texts, dict[str, Candidate]()
    for pair in group:
        with suppress(DiffpressError):
            exported = Pipeline.load(ground.bundle, *pair, ground.threads)
            if exported(texts[:1], [0]).problem is None:
                opened[" ".join(pair)] = exported
    if not opened:
        return {}
    every = {REFERENCE: ground.eager, **opened}
    times = alternate({name: speed.single(one, texts) for name, one in every.items()}, ROUNDS)
    return {name: paired_ratio(times[REFERENCE], times[name]) for name in opened}
