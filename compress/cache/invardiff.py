"""`invardiff`: reuse what changes ever more slowly (Wu 2025, "InvarDiff: Cross-Scale Invariance Caching for
Accelerated Diffusion Models").

Of every module, and of the step as a whole, the rate of change r_i = |X_{i+1} - X_i|_1 / |X_i - X_{i-1}|_1 is averaged
over a few full runs. Where it is below a quantile, step i + 1 takes X_i instead of computing its own: steps as a whole
first, modules at the others. Steps next to each other are then too many: a second look compares step i with the last
step a before it that the plan computes, |X_i - X_a|_1 / |X_a - X_{a-1}|_1, which is the same where a = i - 1, and
draws the thresholds again (the paper's re-sampling correction).

The authors' code caches row i, not i + 1, by r_i, so that a step is judged by the change after it; and their anchor is
the second step of a run. Here a step is judged by the very difference that is made in its place. This pass only plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffpress.compress.cache.cluster import Taken, program_from
from diffpress.compress.cache.measure import NONE, last_steps, measured, savings
from diffpress.compress.cache.program import require_no_cache
from diffpress.compress.families.unet_graph import WHOLE, check_features, modules
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError

Kind = Literal["resnet", "transformer", "attn1", "attn2", "ff"]
Quantile = Annotated[float, Field(ge=0, lt=1)]
TINY = 1e-30


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class InvarDiffPass:
    """Reuse whole steps, and modules at other steps, whose rate of change is among the smallest.

    `tau_step` and `tau_module` are the shares of steps, and of modules times steps of a kind, with rates small enough;
    0 reuses none. A step is reused as a whole by `step_feature`: "whole", all layers at once, or a deep feature "up_B".
    """

    tau_step: Annotated[Quantile, Field(description="quantile of the steps' rates below which a step is reused")] = 0.5
    tau_module: Annotated[
        Quantile | dict[Kind, Quantile], Field(description="the same of modules; one for all kinds, or by kind")
    ] = 0.2
    kinds: Annotated[tuple[Kind, ...], Field(description="which modules are reused by themselves")] = (
        "resnet",
        "transformer",
    )
    step_feature: Annotated[str, Field(pattern=r"^(whole|up_\d+)$")] = WHOLE
    rho: Annotated[float, Field(ge=0, lt=1, description="share of first steps that reuse nothing, one at least")] = 0.1
    max_consecutive: Annotated[int | None, Field(ge=1, description="steps in a row that reuse the same value")] = 2
    resamplings: Annotated[
        int, Field(ge=0, le=10, description="how often runs of cached steps are measured against their anchor")
    ] = 1
    prompts: Annotated[int, Field(ge=1, description="calibration prompts that are sampled in full")] = 5

    def __post_init__(self) -> None:
        if "transformer" in self.kinds and {"attn1", "attn2", "ff"} & set(self.kinds):
            raise DiffpressError("invardiff: a transformer contains attn1, attn2 and ff: reuse it or them")
        if isinstance(self.tau_module, dict) and set(self.tau_module) - set(self.kinds):
            names = ", ".join(sorted(set(self.tau_module) - set(self.kinds)))
            raise DiffpressError(f"invardiff: tau_module has {names}, which kinds does not name")
        if not self.tau_step and not any(self._tau(kind) for kind in self.kinds):
            raise DiffpressError("invardiff: with tau_step 0 and tau_module 0 nothing is reused: raise one")

    def _tau(self, kind: Kind) -> float:
        return self.tau_module.get(kind, 0.0) if isinstance(self.tau_module, dict) else self.tau_module

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` where the denoiser lacks the features, and where no step is left to reuse one."""
        require_no_cache(work, "invardiff")
        check_features(work.denoiser, (self.step_feature,))
        for kind in self.kinds:
            if kind not in modules(work.denoiser).values():
                raise DiffpressError(f"invardiff: this denoiser has no module of kind {kind}")
        steps = len(work.sampling.timesteps)
        if max(self._protected(steps), 2) >= steps - 1:
            raise DiffpressError(
                f"invardiff: of {steps} steps none is left to reuse anything: the first "
                f"{max(self._protected(steps), 2)} and the last run in full"
            )

    def _protected(self, steps: int) -> int:
        """How many first steps reuse nothing. (The second never does: no change came before the first.)"""
        return max(1, int(self.rho * steps))

    def apply(self, work: Work) -> str:
        """Measure, plan and cluster; says what is reused. Raises `DiffpressError` where nothing is."""
        kinds = modules(work.denoiser)
        taus: dict[str, float] = {kind: tau for kind in self.kinds if (tau := self._tau(kind))}
        groups = {kind: [name for name, found in kinds.items() if found == kind] for kind in taus}
        if self.tau_step:
            taus["step"], groups["step"] = self.tau_step, [self.step_feature]
        cached = self._plan(work, groups, taus)
        steps = len(work.sampling.timesteps)
        whole = cached.pop(self.step_feature, np.zeros(steps, bool))
        sets = step_first(whole, cached, self.step_feature)
        weights, call = savings(work, {name for taken in sets for name in taken})
        program, kept = program_from(work, sets, weights)
        if len(program.variants) == 1:
            raise DiffpressError("invardiff: at these quantiles no step reuses anything: raise tau_step or tau_module")
        work.program = program
        saved = sum(weights[name] for step in program.steps for name in program.variants[step].features)
        counts = [sum(name != self.step_feature for name in program.variants[step].features) for step in program.steps]
        deep = sum(self.step_feature in program.variants[step].features for step in program.steps)
        return (
            f"{deep} of {steps} steps reuse {self.step_feature}, {sum(map(bool, counts))} reuse up to {max(counts)} "
            f"modules: {program.marks()}, {1 - saved / (call * steps):.0%} of the arithmetic; "
            f"{len(program.variants)} graphs keep {kept:.0%} of what was planned"
        )

    def _plan(
        self, work: Work, groups: Mapping[str, Sequence[str]], taus: Mapping[str, float]
    ) -> dict[str, np.ndarray]:
        """Of every feature, [steps]: whether its own rates let it be reused at the step."""
        steps = len(work.sampling.timesteps)
        names = [name for group in groups.values() for name in group]
        first = measured(work, {name: last_steps(steps, 1) for name in names}, self.prompts, "measuring rates")
        adjacent = {name: distances[..., 0] for name, distances in first.distances.items()}
        before = last_steps(steps, 1)[:, 0]
        cached = self._thresholded(
            {name: rates(adjacent[name], adjacent[name], before) for name in names}, groups, taus
        )
        for _ in range(self.resamplings):
            anchors = {name: last_computed(cached[name]) for name in names}
            wanted = {name: found[:, None] for name, found in anchors.items()}
            again = measured(work, wanted, self.prompts, "measuring against anchors")
            corrected = {name: rates(again.distances[name][..., 0], adjacent[name], anchors[name]) for name in names}
            cached = self._thresholded(corrected, groups, taus)
        return {name: at_most(found, self.max_consecutive) for name, found in cached.items()}

    def _thresholded(
        self, found: Mapping[str, np.ndarray], groups: Mapping[str, Sequence[str]], taus: Mapping[str, float]
    ) -> dict[str, np.ndarray]:
        cached: dict[str, np.ndarray] = {}
        for kind, group in groups.items():
            small = smallest(np.stack([found[name] for name in group]), taus[kind])
            small[:, : self._protected(small.shape[1])] = small[:, -1:] = False
            cached |= dict(zip(group, small, strict=True))
        return cached


def rates(distances: np.ndarray, adjacent: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """|X_i - X_a|_1 / |X_a - X_{a-1}|_1, [steps], the mean over prompts; inf where `anchors`' step a or a - 1 is none.

    `distances` [prompts, steps] are those of step i to its anchor, `adjacent` [prompts, steps] to the step before. What
    does not change has rate 0.
    """
    found = np.full(len(anchors), np.inf)
    for step, anchor in enumerate(anchors):
        if anchor >= 1:
            change, before = distances[:, step], adjacent[:, anchor]
            found[step] = np.mean(np.where(change == 0, 0.0, change / np.maximum(before, TINY)))
    return found


def smallest(found: np.ndarray, tau: float) -> np.ndarray:
    """Whether a rate is below the quantile `tau` of all finite ones: of n different ones, ceil(tau (n - 1)) are."""
    finite = found[np.isfinite(found)]
    return found < np.quantile(finite, tau) if finite.size else np.zeros(found.shape, bool)


def last_computed(cached: np.ndarray) -> np.ndarray:
    """The last step before each that is not `cached`, [steps]; `NONE` for the first."""
    anchors, last = [], NONE
    for step, reused in enumerate(cached):
        anchors.append(last)
        last = last if reused else step
    return np.array(anchors)


def at_most(cached: np.ndarray, most: int | None) -> np.ndarray:
    """`cached` [steps] with every step computed that would be one more than `most` in a row."""
    found, row = cached.copy(), 0
    for step in range(len(found)):
        found[step] &= most is None or row < most
        row = row + 1 if found[step] else 0
    return found


def step_first(whole: np.ndarray, cached: Mapping[str, np.ndarray], feature: str) -> list[Taken]:
    """What each step takes: `feature` where it is reused as a whole, else modules; all run after a whole step."""
    sets: list[Taken] = []
    for step in range(len(whole)):
        if whole[step]:
            sets.append(frozenset({feature}))
        elif step and whole[step - 1]:
            sets.append(frozenset())
        else:
            sets.append(frozenset(name for name, reused in cached.items() if reused[step]))
    return sets
