"""What passes share while a recipe runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from diffpress.calibration.capture import Recordings
from diffpress.plan import FULL, LayerQuant, Plan, Sampling, StepProgram, TemporalTable


@dataclass
class Work:
    """The pipeline being compressed and the plan so far. Passes change it in order."""

    pipeline: Any
    sampling: Sampling
    seed: int
    record: Callable[[], Recordings]  # runs the reference pipeline once, or reads what an earlier run stored
    progress: Callable[[Iterable[Any], str], Iterable[Any]]
    program: StepProgram = field(init=False)
    quantization: dict[str, LayerQuant] = field(default_factory=dict)
    temporal: TemporalTable | None = None
    features: dict[str, int] = field(default_factory=dict)  # feature name to its branch in the denoiser

    def __post_init__(self) -> None:
        self.program = StepProgram((FULL,) * len(self.sampling.timesteps))

    @property
    def denoiser(self) -> Any:
        """The network that runs at every step."""
        return self.pipeline.unet

    def plan(self) -> Plan:
        """The decisions so far, as data."""
        return Plan(self.sampling, self.program, dict(self.quantization), self.temporal)


class Pass(Protocol):
    """One method of compression; a frozen dataclass whose fields are its keys in a recipe."""

    def requires(self, work: Work) -> None:
        """Raise `DiffpressError` when it cannot be applied to `work`."""

    def apply(self, work: Work) -> str:
        """Change `work`; return one line that says what changed."""
