"""`cache-correct`: tables that turn cached features into what the float network would compute; see `correction`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffpress.compress.cache.correction import FEWEST_PROMPTS, NAME, fit, neutral, reading, reference, told, warmed
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import StepProgram


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CacheCorrectPass:
    """Correct what cached steps read, per step, by least squares; put it behind the passes that plan and round.

    Corrections of earlier passes are replaced. At depth 2 a step that reads what was computed only once becomes full.
    """

    fewest_prompts: ClassVar[int] = FEWEST_PROMPTS
    depth: Annotated[Literal[1, 2], Field(description="2: from the last two values that were computed")] = 1
    per_channel: Annotated[bool, Field(description="by channel, instead of one number for a feature")] = True
    prompts: Annotated[
        int | None, Field(ge=2, description="calibration prompts; one half finds, the other judges; all if absent")
    ] = None

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` where nothing is cached, and where features cannot be compared or corrected."""
        if not any(variant.reads for variant in work.program.variants.values()):
            raise DiffpressError(f"{NAME}: no step reuses a feature: put it behind a pass that plans a cache")
        self.comparable(work)
        try:
            self._program(work)
        except DiffpressError as error:
            raise DiffpressError(f"{NAME}: {error}") from error

    def comparable(self, work: Work) -> None:
        """Raises `DiffpressError` where the float model is not there."""
        if work.quantization and work.original is None:
            reference(work)

    def _program(self, work: Work) -> StepProgram:
        """That features are corrected along."""
        program = warmed(work.denoiser, work.program) if self.depth > 1 else work.program
        timesteps = work.sampling.timesteps
        return reading(work.denoiser, program, neutral(program, timesteps, self.depth))

    def apply(self, work: Work) -> str:
        """Put the corrections and what they read into the plan; says how far features were off before and after."""
        return corrected(work, self._program(work), self.depth, self.per_channel, self.prompts)


def corrected(work: Work, program: StepProgram, depth: int, per_channel: bool, prompts: int | None = None) -> str:
    """Make `program`, with fitted corrections, the plan's; returns what they gained, in words."""
    corrections = fit(work, program, depth, per_channel, prompts)
    work.program, work.corrections = reading(work.denoiser, program, corrections), corrections
    return told(work.tables[NAME])
