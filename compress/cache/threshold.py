"""`freeze`: caches that decide at run time by a threshold, as a step program.

Calibration prompts are sampled together as such a cache would sample them: at every call the mean, over prompts and
both halves of guidance, of what its rule looks at decides for all whether the step runs in full. That is the plan.

    teacache     the relative L1 change from call to call of the input that the timestep modulated, mapped by a
                 polynomial to the change of the output, is summed up to the threshold (Liu et al. 2024, "Timestep
                 Embedding Tells: It's Time to Cache for Video Diffusion Model")
    first-block  the relative L1 change of what the first block adds, against the last full step's, stays below the
                 threshold ("First Block Cache" of ParaAttention, and of diffusers)

Both were made for transformers; `families.unet.entrance` says what stands for their inputs here. What cached steps
reuse is what all layers add, the first one too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.polynomial import Polynomial
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffpress.calibration.processes import on_fastest_device
from diffpress.compress.cache.execute import CachedDenoiser
from diffpress.compress.cache.program import CACHED, program_of, require_no_cache
from diffpress.compress.cache.walk import Inputs, cached_feature, may_read, relative_l1, walk
from diffpress.compress.families.unet import entrance
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.schedule.stepping import first_calls, start
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, StepProgram, Variant

NAME = "freeze"
TEACACHE, FIRST_BLOCK = "teacache", "first-block"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FreezePass:
    """Reuse what all layers add (with `branch`, what is deeper than it) where a run-time rule would."""

    rule: Literal["teacache", "first-block"] = "teacache"
    threshold: Annotated[float, Field(ge=0, description="change below which steps are cached")] = 0.15
    max_consecutive: Annotated[int, Field(ge=1, description="steps cached in a row at most")] = 5
    branch: Annotated[int | None, Field(ge=0, description="reuse the deep feature of this branch instead")] = None
    degree: Annotated[int, Field(ge=1, le=8, description="of teacache's polynomial")] = 4
    prompts: Annotated[int, Field(ge=1, description="calibration prompts that decide")] = 4

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` when the branch does not exist or a program stands already."""
        cached_feature(work, self.branch, NAME)
        require_no_cache(work, NAME)

    def apply(self, work: Work) -> str:
        """Sample as the rule would, and put its decisions into the plan; says which steps reuse."""
        feature, calls = cached_feature(work, self.branch, NAME), len(work.sampling.timesteps)
        rule = Rule(self.rule == TEACACHE, self.threshold, self.max_consecutive, calls, work.program.guidance)
        polynomial = None
        if self.rule == TEACACHE and calls > 1:
            polynomial = fit(*modulation(work, feature, self.prompts), self.degree)
        changes, full = decided(work, feature, rule, polynomial, self.prompts)
        reads = [() if runs else (feature,) for runs in full]
        work.program = program_of(work.denoiser, reads, work.program.guidance)
        work.tables[NAME] = [
            {"step": index, "change": change, "full": runs}
            for index, (change, runs) in enumerate(zip(changes, full, strict=True))
        ]
        return (
            f"{sum(full)} of {calls} steps run in full by {self.rule}, the others reuse {feature}: "
            f"{work.program.marks()}"
        )


@plain_dataclass
class Rule:
    """Decides step by step; `sums` tells whether changes since the last full step count together.

    The first and the last step are full, and the step after `max_consecutive` cached ones.
    """

    sums: bool
    threshold: float
    max_consecutive: int
    steps: int
    guidance: Sequence[str] = ()
    writer: int = 0
    total: float = 0.0

    def full(self, index: int, change: float) -> bool:
        """Whether step `index`, the next one, runs in full, `change` being what the rule measured there."""
        self.total = self.total + change if self.sums else change
        inside = 0 < index < self.steps - 1 and index - self.writer <= self.max_consecutive
        if inside and self.total < self.threshold and may_read(self.guidance, self.writer, index):
            return False
        self.writer, self.total = index, 0.0
        return True


def modulation(work: Work, feature: str, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Relative L1 changes from call to call [M], of the modulated input and of `feature`, where every step is full.

    M counts calls, prompts, and both halves where they are computed.
    """
    before: list[tuple[Tensor, Tensor]] = []
    found: list[tuple[Tensor, Tensor]] = []

    def observe(index: int, inputs: Inputs, features: Mapping[str, Tensor]) -> None:
        now = (looked_at(work.denoiser, inputs, TEACACHE), features[feature])
        if index:
            changes, outputs = (relative_l1(*pair).cpu() for pair in zip(now, before.pop(), strict=True))
            found.append((changes[-len(outputs) :], outputs))
        before[:] = [now]

    walk(work, (feature,), prompts, observe, "measuring modulation")
    changes, outputs = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    return changes, outputs


def looked_at(unet: Any, inputs: Inputs, rule: str) -> Tensor:
    """What the rule compares between steps, [halves N, C, H, W]."""
    sample, timestep, text = inputs
    modulated, residual = entrance(unet, sample, torch.full((1,), timestep, device=sample.device), text)
    return modulated if rule == TEACACHE else residual


def fit(inputs: np.ndarray, outputs: np.ndarray, degree: int) -> Polynomial:
    """The polynomial of least squared error from changes of the input [M] to changes of the output [M].

    Of a lower degree where there are too few different changes. Raises `DiffpressError` where one is not finite.
    """
    if not (np.isfinite(inputs).all() and np.isfinite(outputs).all()):
        raise DiffpressError("the denoiser gives values that are not finite")
    return Polynomial.fit(inputs, outputs, min(degree, len(np.unique(inputs)) - 1))


def mapped(polynomial: Polynomial, changes: np.ndarray) -> np.ndarray:
    """Changes of the output [N]. A polynomial says nothing beyond what it was fitted on, nor is a change negative."""
    return np.maximum(polynomial(np.clip(changes, *polynomial.domain)), 0.0)


@torch.no_grad()
def decided(
    work: Work, feature: str, rule: Rule, polynomial: Polynomial | None, prompts: int
) -> tuple[list[float], list[bool]]:
    """The mean change that the rule saw at every step, and whether it ran in full."""
    unet, sampling = work.denoiser, work.sampling
    calls = len(sampling.timesteps)
    variants = {FULL: Variant(writes=(feature,)), CACHED: Variant(reads=(feature,))}
    both = StepProgram((FULL, CACHED), variants)  # so that a stand-in has both graphs
    name = TEACACHE if polynomial else FIRST_BLOCK
    changes: list[float] = []
    steps: list[str] = []
    with on_fastest_device(unet), simulated(unet, work.quantization, sampling.timesteps):
        walks = start(sampling, first_calls(work.recorded(), prompts), work.seed, unet.device)
        stand_ins = [CachedDenoiser(unet, both) for _ in walks]
        before: list[Tensor] = []
        for index in work.progress(range(calls), f"freezing {name}"):
            now = [looked_at(unet, trajectory.inputs(), name) for trajectory in walks]
            change = 0.0
            if index:
                each = torch.cat([relative_l1(*pair) for pair in zip(now, before, strict=True)]).cpu().numpy()
                change = float((mapped(polynomial, each) if polynomial else each).mean())
            full = rule.full(index, change)
            changes.append(change)
            steps.append(FULL if full else CACHED)
            if full or rule.sums:
                before = now
            program = StepProgram((*steps, *[FULL] * (calls - index - 1)), variants, work.program.guidance)
            for trajectory, stand_in in zip(walks, stand_ins, strict=True):
                stand_in.program = program
                trajectory.advance(trajectory.output(stand_in))
    return changes, [step == FULL for step in steps]
