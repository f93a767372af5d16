"""`cachequant`: full steps where cached features are missed least (Liu et al. 2025, "CacheQuant: Comprehensively
Accelerated Diffusion Models"; dynamic programming schedule and decoupled error correction).

Every step of a group reuses the deep feature of its first one. Groups are those of the least sum of feature distances
along full runs, with the rounding of earlier passes active. The paper calibrates quantization under the cache: put
`quantize` behind this pass, with `correct: false`, and `cache-correct` behind both.
"""

from __future__ import annotations

from collections import deque
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffpress.calibration.processes import on_fastest_device
from diffpress.compress.cache.correct_pass import CacheCorrectPass, corrected
from diffpress.compress.cache.correction import FEWEST_PROMPTS, warmed
from diffpress.compress.cache.execute import CachedDenoiser
from diffpress.compress.cache.program import program_of, require_no_cache
from diffpress.compress.families import unet as family
from diffpress.compress.families.unet_graph import up
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.schedule.stepping import first_calls, start
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, StepProgram, Variant

NAME = "cachequant"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CacheQuantPass:
    """Reuse the deep feature of `branch` within groups of steps, `interval` of them on average, and correct it.

    A group has between half and double as many. With depth 2 corrections take the last two values that were computed,
    and the second step is full.
    """

    interval: Annotated[int, Field(ge=2, description="steps of a group on average, the first of them full")] = 3
    branch: Annotated[int, Field(ge=0, description="how many down layers a cached step still runs")] = 0
    correct: Annotated[bool, Field(description="correct the feature; leave it to cache-correct otherwise")] = True
    depth: Annotated[Literal[1, 2], Field(description="of the correction")] = 1
    prompts: Annotated[int, Field(ge=1, description="calibration prompts that features are compared on")] = 8

    @property
    def fewest_prompts(self) -> int:
        """How many calibration prompts there have to be."""
        return FEWEST_PROMPTS if self.correct else 1

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` when the branch does not exist, a cache stands already or no groups are possible."""
        count = family.branches(work.denoiser)
        if self.branch >= count:
            raise DiffpressError(
                f"{NAME}: branch {self.branch} does not exist, this denoiser has branches 0 to {count - 1}"
            )
        require_no_cache(work, NAME)
        steps = len(work.sampling.timesteps)
        self._groups(work, np.zeros((steps, steps)))
        if self.correct:
            CacheCorrectPass().comparable(work)

    def apply(self, work: Work) -> str:
        """Measure, plan, correct, and put the step program into the plan; says how far features are apart."""
        steps = len(work.sampling.timesteps)
        apart = distances(work, up(self.branch), self.prompts, 2 * self.interval)
        firsts = self._groups(work, apart)
        even = list(range(0, steps, self.interval))
        sums = [_cost(apart, plan) for plan in (firsts, even)]
        program = self._program(work, firsts)
        if self.correct and self.depth > 1:
            program = warmed(work.denoiser, program)
        work.program = program
        full = work.program.steps.count(FULL)
        note = corrected(work, program, self.depth, per_channel=True) if self.correct else ""
        return (
            f"{full} of {steps} steps run in full, the others reuse the feature of branch {self.branch}: "
            f"{work.program.marks()}, {sums[0] / sums[1]:.0%} of the feature distance of even groups"
            + (f"; {note}" if note else "")
        )

    def _groups(self, work: Work, apart: np.ndarray) -> list[int]:
        """The first step of every group; those that compute one half of guidance serve none that computes both."""
        steps = range(len(apart))
        both = np.array([work.program.guided(index) == FULL for index in steps])
        apart = np.where(~both[:, None] & both[None, :], np.inf, apart)
        count = -(-len(apart) // self.interval)
        try:
            return groups(apart, count, max(1, self.interval // 2), 2 * self.interval)
        except DiffpressError as error:
            raise DiffpressError(f"{NAME}: {error}: take a smaller interval") from error

    def _program(self, work: Work, firsts: list[int]) -> StepProgram:
        steps = range(len(work.sampling.timesteps))
        reads = [() if index in firsts else (up(self.branch),) for index in steps]
        return program_of(work.denoiser, reads, work.program.guidance)


@torch.no_grad()
def distances(work: Work, feature: str, prompts: int, window: int) -> np.ndarray:
    """[steps, steps]: the mean over elements of |F_i - F_j| in row j, column i, along full runs of the first prompts.

    Of steps j <= i < j + window; 0 elsewhere. `work.quantization` is active, and guidance as planned: where a step
    computes one half, that half is compared.
    """
    calls, steps = first_calls(work.recorded(), prompts), len(work.sampling.timesteps)
    program = StepProgram((FULL,) * steps, {FULL: Variant(writes=(feature,))}, work.program.guidance)
    found = np.zeros((steps, steps))
    with on_fastest_device(work.denoiser), simulated(work.denoiser, work.quantization, work.sampling.timesteps):
        for walk in work.progress(start(work.sampling, calls, work.seed, work.denoiser.device), "comparing features"):
            running, share = CachedDenoiser(work.denoiser, program), len(walk.sample) / len(calls)
            last: deque[tuple[int, Tensor]] = deque(maxlen=window)
            for index in range(steps):
                walk.advance(walk.output(running))
                value = running.features[feature]
                for before, other in last:
                    rows = min(len(value), len(other))
                    found[before, index] += share * float((value[-rows:] - other[-rows:]).abs().mean())
                last.append((index, value))
    return found


def groups(apart: np.ndarray, count: int, shortest: int, longest: int) -> list[int]:
    """The first steps of `count` groups of consecutive steps, of allowed lengths, that minimise the sum of distances.

    `apart` [T, T] holds in row j, column i what step i lacks where it takes what step j computed. With D(j, n) the sum
    of row j up to n, L[n, k] = min_j L[j, k - 1] + D(j, n). Raises `DiffpressError` where no lengths fit.
    """
    steps = len(apart)
    best = np.full((steps + 1, count + 1), np.inf)
    came = np.zeros((steps + 1, count + 1), dtype=int)
    best[0, 0] = 0.0
    for group in range(1, count + 1):
        for end in range(shortest, steps + 1):
            for first in range(max(0, end - longest), end - shortest + 1):
                cost = best[first, group - 1] + apart[first, first:end].sum()
                if cost < best[end, group]:
                    best[end, group], came[end, group] = cost, first
    if not np.isfinite(best[steps, count]):
        raise DiffpressError(f"{steps} steps do not fall into {count} groups of {shortest} to {longest} steps")
    found, end = [], steps
    for group in range(count, 0, -1):
        end = int(came[end, group])
        found.append(end)
    return found[::-1]


def _cost(apart: np.ndarray, firsts: list[int]) -> float:
    """The sum of distances that groups have."""
    ends = [*firsts[1:], len(apart)]
    return float(sum(apart[first, first:end].sum() for first, end in zip(firsts, ends, strict=True)))
