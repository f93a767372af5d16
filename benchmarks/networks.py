"""Networks that judge images, with weights that the user has: nothing is ever downloaded.

A metric without its network is None, and a note says what to give.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from diffpress.errors import DiffpressError

if TYPE_CHECKING:
    from diffpress.benchmarks.clip import Clip
    from diffpress.benchmarks.inception import Inception
    from diffpress.benchmarks.lpips import Lpips

LPIPS, CLIP, FRECHET = "lpips", "clip_score", "frechet"  # metrics, as reports call them
Found = TypeVar("Found")


@dataclass(frozen=True)
class Source:
    """Where a metric's network comes from: an option of the command line, or a variable of the environment."""

    option: str
    variable: str
    what: str
    folder: bool = False

    def path(self, given: Path | None, environment: Mapping[str, str]) -> Path | None:
        """What was given; raises `DiffpressError` where nothing is there."""
        named = self.option
        if given is None and environment.get(self.variable):
            given, named = Path(environment[self.variable]), self.variable
        if given is None:
            return None
        if not (given.is_dir() if self.folder else given.is_file()):
            kind = "folder" if self.folder else "file"
            raise DiffpressError(f"{named}: there is no {kind} {given}; give {self.what}")
        return given

    @property
    def note(self) -> str:
        """What to give."""
        return f"not measured, give {self.option} (or {self.variable}): {self.what}"


SOURCES = {
    LPIPS: Source(
        "--lpips-weights",
        "DIFFPRESS_LPIPS_WEIGHTS",
        "a state dict of lpips.LPIPS(net='alex'), or of torchvision's alexnet or vgg16",
    ),
    CLIP: Source("--clip-model", "DIFFPRESS_CLIP_MODEL", "a CLIP's folder as transformers saves it", folder=True),
    FRECHET: Source("--inception", "DIFFPRESS_INCEPTION", "the TorchScript archive inception-2015-12-05.pt"),
}


@dataclass
class Networks:
    """The networks that are there, and a note for every metric that was asked of one and could not be measured."""

    lpips: Lpips | None = None
    clip: Clip | None = None
    inception: Inception | None = None
    paths: dict[str, Path] = field(default_factory=dict)  # by metric
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        clip_model: Path | None = None,
        lpips_weights: Path | None = None,
        inception: Path | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> Networks:
        """Open what is given, by argument or by environment; raises `DiffpressError` for what cannot be opened."""
        given = {LPIPS: lpips_weights, CLIP: clip_model, FRECHET: inception}
        paths = {name: SOURCES[name].path(path, environment) for name, path in given.items()}
        opened = cls(paths={name: path for name, path in paths.items() if path})
        if path := paths[LPIPS]:
            from diffpress.benchmarks.lpips import Lpips

            opened.lpips = Lpips.load(path)
        if path := paths[CLIP]:
            from diffpress.benchmarks.clip import Clip

            opened.clip = Clip.load(path)
        if path := paths[FRECHET]:
            from diffpress.benchmarks.inception import Inception

            opened.inception = Inception.load(path)
        return opened

    def attempt(self, metric: str, measure: Callable[[], Found]) -> Found | None:
        """What `measure` returns; None and a note where the network refuses the images, and the rest goes on."""
        try:
            return measure()
        except (RuntimeError, ValueError, TypeError, MemoryError, DiffpressError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.notes[metric] = f"not measured, {self.paths.get(metric, 'its network')} failed: {reason}"
            return None

    def options(self) -> dict[str, Path]:
        """What to give a command line to have them again."""
        return {SOURCES[metric].option: path for metric, path in self.paths.items()}
