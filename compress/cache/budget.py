"""`cache-budget`: where full steps stand best for a latency or an error that is given.

A cached step's error is predicted from one full run (`predict`), so a plan's is a sum over its cached steps of
weight[n] * residual(n; the last full steps), and dynamic programming finds the least for every number of full steps:

    L[K; i, j] = min over h of L[K-1; h, i] + sum_{i < n < j} weight[n] * residual[n; i, h]

with states of the last two full steps where corrections take two values. (The dynamic program of CacheQuant, Liu et
al. 2025, Section 3.2, with predicted error of the final latents in place of the feature's distance.) Latency is
measured, the best predictions are run, and what is taken is what did best on prompts that took no part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffpress.calibration.capture import Call
from diffpress.calibration.processes import on_fastest_device
from diffpress.compress.cache.correction import fit, neutral, reading
from diffpress.compress.cache.execute import CachedDenoiser
from diffpress.compress.cache.predict import Observed, observe
from diffpress.compress.cache.program import CACHED, program_of, require_no_cache
from diffpress.compress.families import unet as family
from diffpress.compress.families.unet_graph import up
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.schedule.stepping import finish, first_calls, start
from diffpress.compress.work import Work, require_prompts
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, Corrections, StepProgram

NAME = "cache-budget"
Full = tuple[int, ...]  # the full steps of a plan
TINY = 1e-9


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CacheBudgetPass:
    """Plan a cache of deep features for a speedup of the denoiser's calls, or for an error of the final latents."""

    fewest_prompts: ClassVar[int] = 4
    speedup: Annotated[float | None, Field(gt=1, description="of all calls, against full ones")] = None
    error: Annotated[float | None, Field(gt=0, description="relative, of the final latents against full steps")] = None
    branches: Annotated[tuple[int, ...], Field(min_length=1, description="deep features to choose from")] = (0,)
    depth: Annotated[Literal[0, 1, 2], Field(description="how many values a correction takes; 0 corrects nothing")] = 2
    longest: Annotated[int, Field(ge=1, description="cached steps in a row")] = 8
    probes: Annotated[int, Field(ge=2, description="steps at which the effect of an error is measured")] = 8

    def __post_init__(self) -> None:
        if (self.speedup is None) == (self.error is None):
            raise DiffpressError(f"{NAME}: give a speedup or an error, and not both")

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` for branches that do not exist, and where a cache is planned already."""
        require_no_cache(work, NAME)
        count = family.branches(work.denoiser)
        for branch in self.branches:
            if not 0 <= branch < count:
                raise DiffpressError(f"{NAME}: branch {branch} does not exist, there are branches 0 to {count - 1}")
        if work.latency is None:
            raise DiffpressError(f"{NAME}: no inference library is installed to measure on: pip install diffpress[cpu]")
        if len(work.sampling.timesteps) < 3:
            raise DiffpressError(f"{NAME}: a schedule of {len(work.sampling.timesteps)} steps leaves nothing to cache")

    @torch.no_grad()
    def apply(self, work: Work) -> str:
        """Walk the frontier, run its best plans, take one; says which."""
        calls = first_calls(work.record())
        require_prompts(NAME, self.fewest_prompts, len(calls))
        half, steps = len(calls) // 2, len(work.sampling.timesteps)
        frontiers: dict[int, dict[int, tuple[float, Full]]] = {}
        times = {branch: self._times(work, branch) for branch in self.branches}
        fewest = min(frontier(steps, self.depth, self.longest, lambda *_: 0.0))
        most = max(faster(found, fewest, steps) for found in times.values())
        if self.speedup is not None and most < self.speedup:
            raise DiffpressError(f"a speedup of {self.speedup:g} cannot be reached: the cheapest plan has {most:.2f}")
        with on_fastest_device(work.denoiser):
            for branch in self.branches:
                with simulated(work.denoiser, work.quantization, work.sampling.timesteps):
                    observed = observe(work, calls[:half], branch, self.probes)
                frontiers[branch] = frontier(steps, self.depth, self.longest, errors(observed, self.depth))
            bench = _Bench(work, calls, half, self.depth)
            rows: list[dict[str, Any]] = []
            chosen: tuple[dict[str, Any], StepProgram, Corrections | None] | None = None
            for branch, count in self._candidates(frontiers, times, steps):
                predicted, full = frontiers[branch][count]
                program, corrections, measured = bench.run(full, branch)
                row: dict[str, Any] = {"branch": branch, "full": count, "steps": list(full), "predicted": predicted}
                row |= {"measured": measured, "speedup": faster(times[branch], count, steps)}
                rows.append(row)
                fits = self.error is None or measured <= self.error
                better = chosen is None or self._better(row, chosen[0])
                if fits and better:
                    chosen = (row, program, corrections)
        work.tables[NAME] = rows
        if chosen is None:
            closest = min(row["measured"] for row in rows)
            return (
                f"no plan keeps the error under {self.error:g} (the nearest has {closest:.3g}): every step stays full"
            )
        row, work.program, work.corrections = chosen
        return (
            f"{row['full']} of {steps} steps run in full, the others reuse the feature of branch {row['branch']}: "
            f"calls {row['speedup']:.2f}x faster, error {row['measured']:.3%} on prompts that took no part"
        )

    def _better(self, row: Mapping[str, Any], than: Mapping[str, Any]) -> bool:
        if self.error is None:
            return bool(row["measured"] < than["measured"])
        return bool(row["speedup"] > than["speedup"])

    def _times(self, work: Work, branch: int) -> Mapping[str, float]:
        assert work.latency is not None  # see `requires`
        steps = len(work.sampling.timesteps)
        program = program_of(work.denoiser, [(), ()] + [(up(branch),)] * (steps - 2))
        corrections = neutral(program, work.sampling.timesteps, self.depth) if self.depth else None
        return work.latency(reading(work.denoiser, program, corrections), corrections)

    def _candidates(
        self, frontiers: Mapping[int, Mapping[int, object]], times: Mapping[int, Mapping[str, float]], steps: int
    ) -> Iterator[tuple[int, int]]:
        """(branch, full steps) of the plans to run: the most that the speedup leaves, or every few of the frontier."""
        for branch, counts in frontiers.items():
            if self.speedup is not None:
                fitting = [count for count in counts if faster(times[branch], count, steps) >= self.speedup]
                if fitting:
                    yield branch, max(fitting)
                continue
            for count in sorted(counts)[:: max(1, len(counts) // 8)]:
                yield branch, count


def faster(times: Mapping[str, float], full: int, steps: int) -> float:
    """How much faster all calls are with `full` of them full."""
    return steps * times[FULL] / (full * times[FULL] + (steps - full) * times[CACHED])


def errors(observed: Observed, depth: int) -> Callable[[int, int, int], float]:
    """(step n, last full step j, the one before i) to the predicted error of the final latents."""

    def predicted(step: int, last: int, before: int) -> float:
        if depth == 0:
            return float(observed.weights[step]) * observed.stale(step, last)
        sources = (last,) if depth == 1 else (last, before)
        return float(observed.weights[step]) * observed.residual(step, sources)

    return predicted


def frontier(
    steps: int, depth: int, longest: int, error: Callable[[int, int, int], float]
) -> dict[int, tuple[float, Full]]:
    """For every number of full steps the plan of least predicted error: (error, full steps), steps 0 .. steps - 1.

    The first step is full, the first two where `depth` is 2; at most `longest` cached steps stand in a row. Numbers of
    full steps that no plan can have are absent.
    """
    two = depth == 2
    # By the last two full steps (before, last): the error so far and the plan. `before` is -1 where it plays no part.
    begin: tuple[int, int] = (0, 1) if two else (-1, 0)
    best: dict[tuple[int, int], tuple[float, Full]] = {begin: (0.0, tuple(step for step in begin if step >= 0))}
    found: dict[int, tuple[float, Full]] = {}
    known: dict[tuple[int, int], list[float]] = {}

    def group(before: int, last: int, length: int) -> float:
        """The error of the `length` cached steps after `last`."""
        sums = known.setdefault((before, last), [0.0])
        while len(sums) <= length:
            sums.append(sums[-1] + error(last + len(sums), last, before))
        return sums[length]

    while best:
        following: dict[tuple[int, int], tuple[float, Full]] = {}
        for (before, last), (so_far, full) in best.items():
            if steps - last - 1 <= longest:
                total = so_far + group(before, last, steps - last - 1)
                if total < found.get(len(full), (float("inf"),))[0]:
                    found[len(full)] = (total, full)
            for step in range(last + 1, min(last + 1 + longest, steps - 1) + 1):
                state = (last if two else -1, step)
                total = so_far + group(before, last, step - last - 1)
                if total < following.get(state, (float("inf"),))[0]:
                    following[state] = (total, (*full, step))
        best = following
    return found


class _Bench:
    """Plans, run on the calibration prompts: one half corrects, the other judges."""

    def __init__(self, work: Work, calls: Sequence[Call], half: int, depth: int) -> None:
        self.work, self.calls, self.half, self.depth = work, calls, half, depth
        self.reference = self._latents(work.program, None, "sampling with full steps")

    def run(self, full: Full, branch: int) -> tuple[StepProgram, Corrections | None, float]:
        """The plan's program and corrections, and the geometric mean of the judging half's errors."""
        work, corrections = self.work, None
        reads = [() if step in full else (up(branch),) for step in range(len(work.sampling.timesteps))]
        program = program_of(work.denoiser, reads, work.program.guidance)
        if self.depth:
            corrections = fit(work, program, self.depth, prompts=self.half)
            program = reading(work.denoiser, program, corrections)
        latents = self._latents(program, corrections, "trying a plan")
        found = (latents - self.reference).flatten(1).norm(dim=1) / self.reference.flatten(1).norm(dim=1)
        return program, corrections, float(found.clamp_min(TINY).log().mean().exp())

    def _latents(self, program: StepProgram, corrections: Corrections | None, text: str) -> Tensor:
        work = self.work
        with simulated(work.denoiser, work.quantization, work.sampling.timesteps):
            walks = start(work.sampling, self.calls, work.seed, work.denoiser.device)
            latents = finish(walks, lambda: CachedDenoiser(work.denoiser, program, corrections), work.progress, text)
        return latents[self.half :]
