"""What passes share while a recipe runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from diffpress.calibration.capture import Call, Execution, Recordings
from diffpress.compress.cache.execute import execution, replay
from diffpress.compress.schedule.trajectory import Trajectories
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, Corrections, LayerQuant, MadeFor, Plan, Sampling, StepProgram, TemporalTable


@dataclass
class Work:
    """The pipeline being compressed and the plan so far. Passes change it in order."""

    pipeline: Any
    sampling: Sampling
    seed: int
    recorder: Callable[[Execution], Recordings]  # runs the pipeline as it is, or reads what an earlier run stored
    progress: Callable[[Iterable[Any], str], Iterable[Any]]
    scratch: Path  # where long passes keep what they have done, so that an interrupted run goes on
    scorer: Callable[[str], float] | None = None  # "accuracy" in points or "clip": of what the pipeline draws now
    # Opens so many trajectories of the model as it was read, on the fastest runtime here; each draw has its own noise.
    trajectories: Callable[[int, int], Trajectories] | None = None
    # Milliseconds of a call of each variant, both halves of guidance, on the fastest runtime here, as it would ship.
    latency: Callable[[StepProgram, Corrections | None], Mapping[str, float]] | None = None
    program: StepProgram = field(init=False)
    quantization: dict[str, LayerQuant] = field(default_factory=dict)
    temporal: TemporalTable | None = None
    corrections: Corrections | None = None  # of the features that the step program reads
    original: Callable[[], Any] | None = None  # opens the model's denoiser anew, as no pass has changed it
    originals: dict[str, Tensor] = field(default_factory=dict)  # by parameter path, before the first pass changed it
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # what a pass found, row by row, by its name
    model: str = ""  # digest of the model that is compressed
    sparse: set[str] = field(default_factory=set)  # layers whose zeros were made by pruning and stay
    passes: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # that were applied, as in a recipe
    planned_for: MadeFor | None = field(default=None, init=False)  # what the step program was planned for
    _recorded: tuple[tuple[str, Sampling], Recordings] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.program = StepProgram((FULL,) * len(self.sampling.timesteps))

    @property
    def denoiser(self) -> Any:
        """The network that runs at every step."""
        return self.pipeline.unet

    def record(self) -> Recordings:
        """The pipeline's calls under schedule and step program as they are; made again only when these have changed.

        They are of the weights at the first asking, so ask before changing weights, and outside of `simulated`.
        """
        now = execution(self.program, self.corrections)
        key = (now.key, self.sampling)
        if self._recorded is None or self._recorded[0] != key:
            self._recorded = (key, self.recorder(now))
        return self._recorded[1]

    def recorded(self) -> Recordings:
        """What was recorded last, of whichever step program; for what all recordings have, such as the prompts."""
        return self.record() if self._recorded is None else self._recorded[1]

    def follow(self, scheduler: Any, sampling: Sampling) -> None:
        """Go over to another schedule: `scheduler` plays `sampling` in the pipeline. Before anything depends on one.

        The step program is full at every call again, and what is recorded or left unfinished is the schedule's own.
        """
        self.pipeline.scheduler, self.sampling = scheduler, sampling
        self.program, self.corrections = StepProgram((FULL,) * len(sampling.timesteps)), None
        state = hashlib.sha256(json.dumps(sampling.to_json()).encode())
        self.scratch = self.scratch / f"schedule-{state.hexdigest()[:16]}"

    def run(self, call: Call) -> Tensor:
        """`out_sample` [2, C, H, W] of the denoiser as it is now on a recorded call; gradients flow."""
        return replay(self.denoiser, self.program, self.corrections, call)

    def made_for(self) -> MadeFor:
        """What a step program that is planned now is made for."""
        # Where else sampling may begin is no part of it, and long.
        return MadeFor(self.model, replace(self.sampling, starts=()), tuple(self.passes))

    def plan(self) -> Plan:
        """The decisions so far, as data."""
        made_for = self.planned_for or self.made_for()
        return Plan(self.sampling, self.program, dict(self.quantization), self.temporal, self.corrections, made_for)


class Pass(Protocol):
    """One method of compression; a frozen dataclass whose fields are its keys in a recipe.

    One that judges on some calibration prompts what it found on others says in `fewest_prompts` how many it needs.
    """

    def requires(self, work: Work) -> None:
        """Raise `DiffpressError` when it cannot be applied to `work`."""

    def apply(self, work: Work) -> str:
        """Change `work`; return one line that says what changed."""


def require_prompts(name: str, fewest: int, count: int) -> None:
    """Raise `DiffpressError` where pass `name` needs `fewest` calibration prompts and there are `count`."""
    if count < fewest:
        found = "half of the prompts judge what the other half found"
        raise DiffpressError(f"{name}: {found}: calibrate with {fewest} or more, not {count}")
