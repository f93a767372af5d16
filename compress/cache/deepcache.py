"""`cache`: DeepCache as a step program (Ma, Fang and Wang 2023, "DeepCache: Accelerating Diffusion Models for Free").

Every `interval`-th step runs the whole denoiser and keeps one deep feature of the up path; the steps between run the
shallow layers around it. This pass only plans: export makes the graphs, the runtime follows the program.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffpress.compress.families import unet as family
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, StepProgram, Variant

CACHED = "cached"


def interval_program(steps: int, interval: int, feature: str, guidance: tuple[str, ...] = ()) -> StepProgram:
    """Step i is full where i % interval == 0 and reads `feature` elsewhere; `guidance` is that of the program."""
    variants = {FULL: Variant(writes=(feature,)), CACHED: Variant(reads=(feature,))}
    return StepProgram(tuple(FULL if index % interval == 0 else CACHED for index in range(steps)), variants, guidance)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CachePass:
    """Reuse the deep feature of `branch` (0 the shallowest, cheapest and roughest) for `interval` - 1 steps."""

    interval: Annotated[int, Field(ge=2, description="a full step every so many")] = 3
    branch: Annotated[int, Field(ge=0, description="how many down layers a cached step still runs")] = 0

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` when the branch does not exist or a program stands already."""
        count = family.branches(work.denoiser)
        if self.branch >= count:
            raise DiffpressError(
                f"cache: branch {self.branch} does not exist, this denoiser has branches 0 to {count - 1}"
            )
        if any(variant.reads for variant in work.program.variants.values()):
            raise DiffpressError("cache: an earlier pass planned a cache already; keep one of the two")
        try:
            self._program(work)
        except DiffpressError as error:
            raise DiffpressError(f"cache: {error}") from error

    def _program(self, work: Work) -> StepProgram:
        return interval_program(len(work.sampling.timesteps), self.interval, f"up_{self.branch}", work.program.guidance)

    def apply(self, work: Work) -> str:
        """Put the step program into the plan; says what is reused."""
        work.program = self._program(work)
        work.features[f"up_{self.branch}"] = self.branch
        full, steps = work.program.steps.count(FULL), len(work.program.steps)
        return f"{full} of {steps} steps run in full, the others reuse the feature of branch {self.branch}"
