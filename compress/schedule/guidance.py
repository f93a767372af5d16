"""`guidance`: leave the unconditional half out where it is missed least.

Reuse of the difference between both halves (Lv et al. 2024, FasterCache, whose correction by frequency is left out:
here the steps are chosen instead), or guidance within an interval of noise levels (Kynkäänniemi et al. 2024, "Applying
Guidance in a Limited Interval Improves Sample and Distribution Quality"). This pass only plans: the step program says
how each step is guided, and what runs it follows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffpress.calibration import conditions
from diffpress.calibration.model import state_digest
from diffpress.calibration.processes import make_missing, on_fastest_device
from diffpress.calibration.sets import uniform_stride
from diffpress.compress.quantize.sensitivity import Numbers, deviation, final_latents
from diffpress.compress.schedule import economy
from diffpress.compress.schedule.sigmas import sigma_of
from diffpress.compress.schedule.stepping import first_calls
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import CONDITIONAL, FULL, REUSE, StepProgram

EVERY = 2  # where neither `every` nor `budget` is given
STARTS = 16  # intervals that are tried
BATCH = 4  # prompts sampled at once


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class GuidancePass:
    """Compute both halves of guidance at some steps, and the conditional one alone at the others.

    `reuse` takes the difference of the last full step there, `interval` none. How many steps are full is said by
    `every` or `budget`. `uniform` spreads them; `calibrated` chooses them by how far latents of calibration prompts end
    from those of full guidance. An interval can be given as `sigmas` instead, and is calibrated otherwise.
    """

    mode: Literal["reuse", "interval"] = "reuse"
    every: Annotated[int | None, Field(ge=2, description="a full step every so many; 2 if absent")] = None
    budget: Annotated[float | None, Field(gt=0, lt=1, description="share of full steps instead")] = None
    plan: Literal["uniform", "calibrated"] | None = None  # uniform for reuse, calibrated for an interval
    sigmas: Annotated[
        tuple[float, float] | None, Field(description="noise levels above and up to which an interval guides")
    ] = None
    prompts: Annotated[int, Field(ge=1, description="calibration prompts that plans are tried on")] = 16
    trials: Annotated[int, Field(ge=1, description="plans that are tried at most")] = 32

    def __post_init__(self) -> None:
        sizes = [name for name in ("every", "budget", "sigmas") if getattr(self, name) is not None]
        if len(sizes) > 1:
            raise DiffpressError(f"guidance: {sizes[0]} and {sizes[1]} both say how many steps are full: keep one")
        if self.mode == "interval" and self.plan == "uniform":
            raise DiffpressError("guidance: an interval is not uniform: leave plan out, or take mode reuse")
        if self.sigmas is not None:
            if self.mode != "interval" or self.plan is not None:
                raise DiffpressError("guidance: sigmas are for mode interval, and leave nothing to plan")
            if not 0 <= self.sigmas[0] < self.sigmas[1]:
                raise DiffpressError("guidance: sigmas are two noise levels, the lower one first")

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` without guidance, after passes that calibrate layers, and where nothing is saved."""
        if work.sampling.guidance_scale <= 1:
            raise DiffpressError(
                f"guidance: guidance_scale {work.sampling.guidance_scale:g} runs one half alone, nothing can go"
            )
        if work.program.guidance:
            raise DiffpressError("guidance: an earlier pass planned guidance already; keep one of the two")
        if work.quantization or work.temporal is not None:
            raise DiffpressError("guidance: put it before passes that calibrate layers: what they record follows it")
        if self._calibrated() and work.sampling.solver != "linear":
            raise DiffpressError(f"guidance: what a step of {work.sampling.solver} weighs is not known: plan uniform")
        if not self._calibrated():
            self._fixed(work)
        elif self._count(work) >= len(work.sampling.timesteps):
            raise DiffpressError(
                f"guidance: nothing is left out of {len(work.sampling.timesteps)} steps at this budget"
            )

    def apply(self, work: Work) -> str:
        """Put the plan into the step program; says which steps are full, and what a calibrated plan costs."""
        if self._calibrated():
            plan, cost = self._calibrate(work)
        else:
            plan, cost = self._fixed(work), ""
        work.program = plan
        calls = len(plan.steps)
        what = "reuse their difference" if self.mode == "reuse" else "leave guidance out"
        return (
            f"{plan.guidance.count(FULL)} of {calls} steps compute both halves of guidance, the others {what}: "
            f"{plan.guidance_marks()}, {plan.evaluations() / calls:.0%} of the work{cost}"
        )

    def _calibrated(self) -> bool:
        return self.sigmas is None and (self.mode == "interval" or self.plan == "calibrated")

    def _count(self, work: Work) -> int:
        """How many steps are full."""
        calls = len(work.sampling.timesteps)
        return -(-calls // (self.every or EVERY)) if self.budget is None else max(1, round(self.budget * calls))

    def _fixed(self, work: Work) -> StepProgram:
        """The plan that needs no calibration."""
        calls = len(work.sampling.timesteps)
        if self.sigmas is None:
            full = economy.spread(calls, self._count(work))
            if self.budget is None:
                full = list(range(0, calls, self.every or EVERY))
        else:
            scheduler = getattr(work.pipeline.scheduler, "base", work.pipeline.scheduler)
            levels = sigma_of(work.sampling.timesteps, scheduler.alphas_cumprod)
            full = [index for index, level in enumerate(levels) if self.sigmas[0] < level <= self.sigmas[1]]
            if not full:
                raise DiffpressError(
                    f"guidance: no step lies within these sigmas, theirs are {levels[0]:.3g} to {levels[-1]:.3g}"
                )
        if len(full) == calls:
            raise DiffpressError(f"guidance: nothing is left out of {calls} steps like this")
        return self._program(work, full)

    def _program(self, work: Work, full: Sequence[int]) -> StepProgram:
        """The work's program with guidance at the steps `full`; raises `DiffpressError` where it cannot run."""
        other = REUSE if self.mode == "reuse" else CONDITIONAL
        try:
            return replace(work.program, guidance=economy.guidance_of(len(work.program.steps), full, other))
        except DiffpressError as error:
            raise DiffpressError(f"guidance: {error}") from error

    def _fitting(self, work: Work, plans: Sequence[Sequence[int]]) -> list[StepProgram]:
        """The programs of those plans that can run, each once."""
        found: dict[tuple[str, ...], StepProgram] = {}
        for full in plans:
            try:
                program = self._program(work, full)
            except DiffpressError:  # a cached step would read half of a feature
                continue
            found.setdefault(program.guidance, program)
        return list(found.values())

    def _calibrate(self, work: Work) -> tuple[StepProgram, str]:
        """The best plan that was tried, and what to say of it."""
        calls, count = len(work.sampling.timesteps), self._count(work)
        with on_fastest_device(work.denoiser):
            trials = _Trials(work, self.prompts, self.trials)
            if self.mode == "interval":
                starts = uniform_stride(calls - count + 1, min(STARTS, self.trials))
                plans = self._fitting(work, [range(start, start + count) for start in starts])
                if not plans:
                    raise DiffpressError("guidance: no interval fits the cached steps: put cache after guidance")
                best = trials.best(plans)
            else:
                best = self._descend(work, trials, count)
            return best, f", {trials.errors[best.guidance]:.2%} from the latents of full guidance"

    def _descend(self, work: Work, trials: _Trials, count: int) -> StepProgram:
        """From the best of the shortest paths and the uniform plan, one moved refresh after the other."""
        calls, apart = len(work.sampling.timesteps), trials.distances()
        earliest = economy.earliest_refresh(work.program)
        weights = (np.ones(calls), economy.effects(work.sampling))  # which of them tells more depends on the model
        starts = [economy.refreshes(apart * weight, count, earliest) for weight in weights]
        plans = self._fitting(work, [economy.spread(calls, count), *starts]) or self._fitting(work, [[0]])
        best = trials.best(plans)
        while trials.left > 0:
            full = [index for index in range(calls) if best.guided(index) == FULL]
            moved = self._fitting(work, economy.neighbours(full, calls))
            after = trials.best([best, *moved])
            if after == best:
                break
            best = after
        return best


class _Trials:
    """Plans tried on calibration prompts, without cached steps: what those add is not the plan's.

    Numbers are kept in `work.scratch`, so that an interrupted pass goes on and processes share the work.
    """

    def __init__(self, work: Work, prompts: int, most: int) -> None:
        self.work, self.left = work, most
        self.errors: dict[tuple[str, ...], float] = {}
        self._texts = first_calls(work.record(), prompts)
        self._plain = StepProgram((FULL,) * len(work.sampling.timesteps))
        context = [state_digest(work.denoiser), work.sampling.to_json(), work.seed, len(self._texts)]
        key = hashlib.sha256(json.dumps(context).encode())
        for call in self._texts:
            key.update(conditions.contents(call.text))
        self._key, self._folder = key, work.scratch / "guidance"
        self._known = Numbers(self._folder)
        self._program = self._plain
        self._measured: Callable[[], float] | None = None

    def _latents(self, watch: Callable[[Tensor], object] = lambda _: None) -> list[Tensor]:
        """The final latent [C, H, W] of every prompt under the program in turn."""
        starts = range(0, len(self._texts), BATCH)
        batches = (self._texts[start : start + BATCH] for start in starts)
        made = (
            final_latents(self.work, some, self._program, watch, first)
            for first, some in zip(starts, batches, strict=True)
        )
        return [latent for batch in made for latent in batch]

    def _measure(self, guidance: tuple[str, ...]) -> None:
        if self._measured is None:
            self._program = self._plain
            self._measured = deviation(self._latents)
        self._program = replace(self._plain, guidance=guidance)
        self._known[self._name(guidance)] = self._measured()

    def _name(self, what: Sequence[str]) -> str:
        key = self._key.copy()
        key.update(" ".join(what).encode())
        return key.hexdigest()[:24]

    def best(self, plans: Sequence[StepProgram]) -> StepProgram:
        """The plan of least error, the first of equal ones; as many new ones are tried as are left."""
        new = [plan.guidance for plan in plans if plan.guidance not in self.errors][: max(0, self.left)]
        make_missing(
            new, lambda plan: self._name(plan) not in self._known, self._measure, self.work.progress, "trying guidance"
        )
        self.errors |= {plan: self._known[self._name(plan)] for plan in new}
        self.left -= len(new)
        tried = [plan for plan in plans if plan.guidance in self.errors]
        return min(tried, key=lambda plan: _finite(self.errors[plan.guidance]))

    def distances(self) -> np.ndarray:
        """`economy.distances` of the differences between both halves, under full guidance."""
        file = self._folder / f"{self._name(['distances'])}.npy"

        def make(_: object) -> None:
            differences: list[Tensor] = []

            def keep(output: Tensor) -> None:
                plain, told = output.chunk(2)
                differences.append(told - plain)

            self._program = self._plain
            self._latents(keep)
            # Batch after batch, of which the last may be smaller.
            calls = len(self._plain.steps)
            steps = [torch.cat(differences[index::calls]) for index in range(calls)]
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_name(f"{os.getpid()}.partial.npy")
            np.save(unfinished, economy.distances(steps))
            unfinished.replace(file)

        # From one file, so that all processes plan the same.
        make_missing([file], lambda path: not path.is_file(), make, self.work.progress, "comparing guidance")
        return np.asarray(np.load(file))


def _finite(error: float) -> float:
    return error if math.isfinite(error) else math.inf
