"""Executes a step program: which variant of the denoiser runs at each call, and what passes from one to another.

The runtime knows no caching method: a variant is a graph that takes some features as inputs and hands out others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffpress.errors import DiffpressError
from diffpress.plan import StepProgram
from diffpress.runtime.backends import Port, Session
from diffpress.runtime.sampler import Denoise

SAMPLE, TIMESTEP, HIDDEN, OUTPUT = "sample", "timestep", "encoder_hidden_states", "out_sample"


@dataclass(frozen=True)
class Denoiser:
    """A step program and an open session for each variant that it runs."""

    program: StepProgram
    sessions: Mapping[str, Session]

    def prepare(self, images: int, guided: bool) -> None:
        """Make every variant ready for the batch sizes that it runs with; `guided` for both halves of guidance."""
        for name, session in self.sessions.items():
            for halves in self.program.halves(name) if guided else (1,):
                session.prepare(images * halves)

    def start(self, hidden: np.ndarray) -> Denoise:
        """Begin a batch of images with its text features [N, T, D]; feature buffers live and die with what it returns.

        The function it returns maps (call, sample [M, C, h, w], timestep) to the output [M, C, h, w]. M may be less
        than N: the sample belongs to the last rows, the conditional half of guidance, then.
        """
        features: dict[str, np.ndarray] = {}

        def denoise(index: int, sample: np.ndarray, timestep: float) -> np.ndarray:
            name = self.program.steps[index]
            session = self.sessions[name]
            rows = len(sample)
            # A step of the conditional half reads what one of both halves may have written.
            reads = {read: features[read][-rows:] for read in self.program.variants[name].reads}
            feeds = {SAMPLE: sample, HIDDEN: hidden[-rows:], **reads}
            if TIMESTEP in session.inputs:
                feeds[TIMESTEP] = _timestep(session.inputs[TIMESTEP], timestep, rows)
            # A variant need not take everything: a shallow one may not look at the text.
            results = session.run({key: feeds[key] for key in session.inputs})
            features.update((write, results[write]) for write in self.program.variants[name].writes)
            return results[OUTPUT]

        return denoise


def open_denoiser(program: StepProgram, graphs: Mapping[str, Path], open_graph: Callable[[Path], Session]) -> Denoiser:
    """Open the variants that the program runs; raises `DiffpressError` when a graph lacks what its variant says."""
    sessions = {}
    for name in dict.fromkeys(program.steps):
        if name not in graphs:
            raise DiffpressError(f"the bundle has no graph for variant '{name}': compress again")
        session, variant = open_graph(graphs[name]), program.variants[name]
        missing = {SAMPLE, *variant.reads} - session.inputs.keys() | {OUTPUT, *variant.writes} - session.outputs.keys()
        unknown = session.inputs.keys() - {SAMPLE, TIMESTEP, HIDDEN, *variant.reads}
        if missing or unknown:
            what = f"lacks {', '.join(sorted(missing))}" if missing else f"asks for {', '.join(sorted(unknown))}"
            raise DiffpressError(f"{graphs[name]} {what}, unlike variant '{name}' of the step program: compress again")
        sessions[name] = session
    return Denoiser(program, sessions)


def _timestep(port: Port, timestep: float, batch: int) -> np.ndarray:
    """The timestep in the shape that the graph declares: [], [1] or one per row."""
    return np.full([batch if size is None else size for size in port.shape], timestep, port.dtype)
