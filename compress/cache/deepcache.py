"""`cache`: DeepCache as a step program (Ma, Fang and Wang 2023, "DeepCache: Accelerating Diffusion Models for Free").

Full steps run the whole denoiser and keep one deep feature of the up path; the steps between run the shallow layers
around it. Full steps stand at every `interval`-th step (Section 3.3), closer together around a `center` (Section 3.4),
or where they are listed. This pass only plans: export makes the graphs, the runtime follows the program.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffpress.compress.cache.program import program_of, require_no_cache
from diffpress.compress.families import unet as family
from diffpress.compress.families.unet_graph import up
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, StepProgram


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CachePass:
    """Reuse the deep feature of `branch` (0 the shallowest, cheapest and roughest) between full steps."""

    interval: Annotated[int, Field(ge=2, description="a full step every so many")] = 3
    branch: Annotated[int, Field(ge=0, description="how many down layers a cached step still runs")] = 0
    center: Annotated[int | None, Field(ge=0, description="the step around which full steps stand closer")] = None
    power: Annotated[float, Field(gt=1, le=4, description="how much closer, for a center")] = 1.4
    full: Annotated[tuple[int, ...] | None, Field(description="the full steps themselves, from 0 on")] = None

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` when the branch does not exist or a program stands already."""
        count = family.branches(work.denoiser)
        if self.branch >= count:
            raise DiffpressError(
                f"cache: branch {self.branch} does not exist, this denoiser has branches 0 to {count - 1}"
            )
        require_no_cache(work, "cache")
        try:
            self._program(work)
        except DiffpressError as error:
            raise DiffpressError(f"cache: {error}") from error

    def _program(self, work: Work) -> StepProgram:
        steps = len(work.sampling.timesteps)
        if self.full is not None:
            full = set(self.full)
            outside = [index for index in self.full if not 0 <= index < steps]
            if outside:
                raise DiffpressError(f"full step {outside[0]} is not one of the schedule's, 0 to {steps - 1}")
        elif self.center is not None:
            if self.center >= steps:
                raise DiffpressError(f"center {self.center} is not one of the schedule's steps, 0 to {steps - 1}")
            full = set(around(steps, -(-steps // self.interval), self.center, self.power))
        else:
            full = set(range(0, steps, self.interval))
        return interval_program(work.denoiser, steps, full, self.branch, work.program.guidance)

    def apply(self, work: Work) -> str:
        """Put the step program into the plan; says what is reused."""
        work.program = self._program(work)
        full, steps = work.program.steps.count(FULL), len(work.program.steps)
        return f"{full} of {steps} steps run in full, the others reuse the feature of branch {self.branch}"


def interval_program(
    denoiser: Any, steps: int, full: Collection[int], branch: int, guidance: tuple[str, ...] = ()
) -> StepProgram:
    """Steps not in `full` read the deep feature of `branch`."""
    return program_of(denoiser, [() if index in full else (up(branch),) for index in range(steps)], guidance)


def around(steps: int, count: int, center: int, power: float) -> tuple[int, ...]:
    """`count` of `steps` steps, 0 the first, closer together around `center`: center + sign(u) |u|^power of even u.

    Where so many do not fit around the center, the power falls until they do.
    """
    while True:
        ends = (-(center ** (1 / power)), (steps - center) ** (1 / power))
        even = np.linspace(*ends, count, endpoint=False)
        found = np.floor(center + np.sign(even) * np.abs(even) ** power + 1e-9).astype(int)
        chosen = tuple(sorted({0, *(int(index) for index in found)}))
        if len(chosen) == count or power <= 1:
            return chosen
        power = max(1.0, power - 0.02)
