"""What a bench compares, and how each candidate is opened: by every process that draws, when it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from diffpress.benchmarks import candidates, drawing
from diffpress.benchmarks.candidates import (
    COMPRESSED,
    EXPORT,
    PLAIN,
    REFERENCE,
    RESCHEDULED,
    STRICT,
    Candidate,
    Reference,
)
from diffpress.benchmarks.drawing import Wanted
from diffpress.benchmarks.memory import on_nvidia
from diffpress.bundle import Bundle
from diffpress.plan import Sampling

KEPT = 16  # images whose latents are compared step by step
STEPWISE = (REFERENCE, EXPORT, COMPRESSED)  # whose latents these are
FEW = (EXPORT, STRICT, RESCHEDULED)  # of which no more images are drawn


@dataclass(frozen=True)
class Choice:
    """What timing decided: the backend and its precision, and the schedule of the plain steps that are as fast."""

    backend: str
    precision: str
    rival: Sampling | None = None


@dataclass
class Compared:
    """A bundle, the same model exported without compression, and diffusers; opened candidates are kept."""

    bundle: Bundle
    export: Bundle
    against: str
    opened: dict[str, Candidate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sampling = Sampling.from_json(self.bundle.manifest["sampling"])
        # What is not compressed keeps the model's own schedule.
        self.own, self.scheduler = candidates.own_schedule(self.bundle.manifest)
        self.batch = candidates.batch_size(self.bundle.manifest["latent"])

    def compressed(self, backend: str, precision: str) -> Candidate:
        """The bundle on a backend."""
        from diffpress.runtime.pipeline import Pipeline

        return Pipeline.load(self.bundle, backend, precision)

    def plain(self, backend: str, precision: str, sampling: Sampling) -> Candidate:
        """The export on a backend and a schedule."""
        from diffpress.runtime.pipeline import Pipeline

        return Pipeline.load(self.export, backend, precision, sampling=sampling)

    def reference(self, backend: str) -> Candidate:
        """diffusers; on the GPU where what it is compared with is."""
        loras = candidates.loras_of(self.bundle.manifest)
        made = Reference.load(self.against, self.own, self.scheduler, loras)
        if on_gpu(backend):
            made.pipeline.to("cuda")
        return made

    def open(self, name: str, choice: Choice) -> Candidate:
        """A candidate, opened once."""
        if name not in self.opened:
            self.opened[name] = self.opener(name, choice)()
        return self.opened[name]

    def close(self) -> None:
        """Let go of all but the reference, which takes longest to open."""
        self.opened = {name: made for name, made in self.opened.items() if name == REFERENCE}

    def opener(self, name: str, choice: Choice) -> Callable[[], Candidate]:
        """What opens a candidate anew; the reference, which takes any batch, is the one that is open already."""
        backend, precision = choice.backend, choice.precision
        openers: Mapping[str, Callable[[], Candidate]] = {
            REFERENCE: lambda: self.opened.get(REFERENCE) or self.reference(backend),
            EXPORT: lambda: self.plain(backend, "fp32", self.own),
            COMPRESSED: lambda: self.compressed(backend, precision),
            STRICT: lambda: self.plain(backend, precision, self.own),
            RESCHEDULED: lambda: cast(Reference, self.open(REFERENCE, choice)).on(self.sampling),
            PLAIN: lambda: self.plain(backend, precision, choice.rival or self.own),
        }
        return openers[name]

    def model_folder(self) -> Path | None:
        """Where the model lies, None for a hub id."""
        from diffpress.calibration.model import folder_of

        return folder_of(self.against)

    def wanted(self, texts: list[str], choice: Choice) -> list[Wanted]:
        """The same prompts and seeds for all; few of those that are compared step by step or in the plot alone."""
        model, on = dict(self.bundle.manifest.get("model", {})), [choice.backend, choice.precision]
        keys: dict[str, Any] = {
            REFERENCE: [model, self.own.to_json(), dict(self.scheduler), on_gpu(choice.backend)],
            EXPORT: [model, self.own.to_json(), choice.backend],
            COMPRESSED: [drawing.identity(self.bundle), on],
        }
        if choice.precision != "fp32":
            keys[STRICT] = [model, self.own.to_json(), on]
        if self.sampling != self.own:
            keys[RESCHEDULED] = [model, self.sampling.to_json(), on_gpu(choice.backend)]
        if choice.rival is not None:
            keys[PLAIN] = [model, choice.rival.to_json(), on]
        return [
            Wanted(name, texts[:KEPT] if name in FEW else texts, self.batch, KEPT if name in STEPWISE else 0, key)
            for name, key in keys.items()
        ]


def on_gpu(backend: str) -> bool:
    """Whether diffusers can be where a backend is, on an NVIDIA GPU."""
    import torch

    return on_nvidia(backend) and torch.cuda.is_available()
