"""Drawing that goes on where it was stopped, shared out between the processes of `accelerate launch`.

Every batch is a file in a cache folder, whose name says everything that the images depend on. The folder goes when
a bench is done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffpress.benchmarks import candidates, machine
from diffpress.benchmarks.candidates import Candidate, Drawn
from diffpress.bundle import Bundle
from diffpress.paths import cache_root


@dataclass(frozen=True)
class Wanted:
    """Images of a candidate: the prompts in order, the index of each as its seed, `batch` at a time."""

    name: str
    texts: Sequence[str]
    batch: int
    keep: int  # of so many first images every latent is kept
    key: Any  # what the images depend on beside these, as JSON

    @property
    def folder(self) -> str:
        """The name of its folder: another one where anything is."""
        key = json.dumps([list(self.texts), self.batch, self.keep, self.key], sort_keys=True)
        return f"{self.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def identity(bundle: Bundle) -> dict[str, Any]:
    """What the images of a bundle depend on: its files but for reports, its schedule and its step program."""
    files = {name: digest for name, digest in bundle.manifest["files"].items() if not name.startswith("report/")}
    return {"files": files, **{name: bundle.manifest[name] for name in ("sampling", "program")}}


def folder_of(bundle: Bundle, texts: Sequence[str]) -> Path:
    """Where the images of a bench are kept until it is done: on another machine, or by other libraries, they differ."""
    key = [identity(bundle), list(texts), machine.versions(), machine.machine()["processor"]]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_root() / "unfinished" / f"bench-{digest[:24]}"


def draw_all(
    wanted: Sequence[Wanted],
    opened: Callable[[str], Candidate],
    folder: Path,
    progress: Callable[[Iterable[Any], str], Iterable[Any]],
) -> None:
    """Draw what the folder does not hold yet, each process its part; afterwards it holds all.

    `opened` returns a candidate by its name; a process asks for those alone whose images it draws.
    """
    from diffpress.calibration.processes import make_missing

    for one in wanted:
        (folder / one.folder).mkdir(parents=True, exist_ok=True)

    def make(part: tuple[Wanted, int]) -> None:
        one, start = part
        texts = one.texts[start : start + one.batch]
        seeds = range(start, start + len(texts))
        drawn = candidates.draw(opened(one.name), texts, seeds, one.batch, max(0, one.keep - start))
        candidates.store(_file(folder, part), drawn)

    parts = [part for one in wanted for part in _parts(one)]
    make_missing(parts, lambda part: not _file(folder, part).exists(), make, progress, "drawing")


def read_all(wanted: Sequence[Wanted], folder: Path) -> dict[str, Drawn]:
    """What was drawn, by candidate."""
    return {one.name: _joined([_read(_file(folder, part)) for part in _parts(one)]) for one in wanted}


def _parts(one: Wanted) -> list[tuple[Wanted, int]]:
    """Its batches, by the index of their first image."""
    return [(one, start) for start in range(0, len(one.texts), one.batch)]


def _file(folder: Path, part: tuple[Wanted, int]) -> Path:
    return folder / part[0].folder / f"{part[1]:06}.npz"


def _read(file: Path) -> Drawn:
    drawn = candidates.stored(file)
    assert drawn is not None
    return drawn


def _joined(parts: Sequence[Drawn]) -> Drawn:
    """The batches of a candidate as one; trajectories are those of the first images, later batches have none."""
    kept = [part.trajectory for part in parts if part.trajectory.size] or [parts[0].trajectory]
    return Drawn(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.latents for part in parts]),
        np.concatenate(kept, axis=1),
    )
