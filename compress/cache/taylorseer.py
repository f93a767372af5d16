"""`taylorseer`: cached features extrapolated by finite differences of first order (Liu et al. 2025, "From Reusing to
Forecasting: Accelerating Diffusion Models with TaylorSeers").

Between full steps a feature goes on as it did between the last two of them. The extrapolation is a correction whose
coefficients are known beforehand, so that this pass, too, only plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffpress.compress.cache.program import program_of, require_no_cache
from diffpress.compress.families import unet as family
from diffpress.compress.families.unet_graph import up
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, Correction, Corrections, StepProgram

NAME = "taylorseer"
FIRST = 2  # steps that are full before any is cached: a difference needs two


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TaylorSeerPass:
    """Extrapolate the deep feature of `branch` for `interval` - 1 steps; order 0 repeats it. Two full steps begin."""

    interval: Annotated[int, Field(ge=2, description="a full step every so many")] = 3
    branch: Annotated[int, Field(ge=0, description="how many down layers a cached step still runs")] = 0
    order: Annotated[Literal[0, 1], Field(description="1: with the difference of the last two full steps")] = 1

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` when the branch or a third step does not exist, or a program stands already."""
        count = family.branches(work.denoiser)
        if self.branch >= count:
            raise DiffpressError(
                f"{NAME}: branch {self.branch} does not exist, this denoiser has branches 0 to {count - 1}"
            )
        require_no_cache(work, NAME)
        if len(work.sampling.timesteps) <= FIRST:
            raise DiffpressError(f"{NAME}: the first {FIRST} steps are full, and there are no others")
        try:
            self._planned(work)
        except DiffpressError as error:
            raise DiffpressError(f"{NAME}: {error}") from error

    def _planned(self, work: Work) -> tuple[StepProgram, Corrections | None]:
        timesteps, feature = work.sampling.timesteps, up(self.branch)
        steps = range(len(timesteps))
        full = [index for index in steps if index < FIRST or (index - FIRST + 1) % self.interval == 0]
        corrections = None
        if self.order > 0:
            scale = extrapolation(full, len(timesteps))
            for index in reversed(steps):  # those at one timestep share a row: of the first that reads it
                if index not in full:
                    scale[[timestep == timesteps[index] for timestep in timesteps]] = scale[index]
            offset = np.zeros((len(timesteps), 1), np.float32)
            corrections = Corrections(timesteps, {feature: Correction(scale, offset)})
        reads = [() if index in full else (feature,) for index in steps]
        return program_of(work.denoiser, reads, work.program.guidance, corrections), corrections

    def apply(self, work: Work) -> str:
        """Put the step program and its coefficients into the plan; says what is extrapolated."""
        work.program, work.corrections = self._planned(work)
        full, steps = work.program.steps.count(FULL), len(work.program.steps)
        how = "extrapolate" if self.order else "reuse"
        return f"{full} of {steps} steps run in full, the others {how} the feature of branch {self.branch}"


def extrapolation(full: Sequence[int], steps: int) -> np.ndarray:
    """[steps, 2, 1]: what the last two values of a feature, computed at the steps `full`, weigh at every step.

    First order: F + k (F - F@1) / N with N the steps between both and k those since, so a line is followed exactly.
    Steps that are full or have one value so far take the last one, (1, 0).
    """
    scale = np.zeros((steps, 2, 1), np.float32)
    for index in range(steps):
        *_, earlier, last = (None, None, *(step for step in full if step <= index))
        slope = 0.0 if last is None or earlier is None else (index - last) / (last - earlier)
        scale[index, :, 0] = 1.0 + slope, -slope
    return scale
