"""`smoothcache`: layers of a kind are reused while they differ little (Liu et al. 2024, "SmoothCache: A Universal
Inference Acceleration Technique for Diffusion Transformers").

E(i, a) = mean over layers of a kind, and over prompts, of |L_i - L_a|_1 / |L_i|_1 is how far step i is from step a
(Section 3.2). While it is below alpha for the last computed step a, all layers of the kind keep that step's work. This
pass only plans.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffpress.compress.cache.cluster import program_from
from diffpress.compress.cache.measure import Changes, last_steps, measured, savings
from diffpress.compress.cache.program import require_no_cache
from diffpress.compress.families.unet_graph import modules
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError

Kind = Literal["resnet", "attn1", "attn2", "ff"]
TINY = 1e-30


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SmoothCachePass:
    """Reuse all layers of a kind at the steps where they are within `alpha` of the last computed ones."""

    alpha: Annotated[float, Field(gt=0, description="relative L1 error below which a kind of layers is reused")] = 0.08
    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)] = ("resnet", "attn1", "attn2", "ff")
    max_consecutive: Annotated[int, Field(ge=1, description="steps in a row that reuse the same value")] = 3
    prompts: Annotated[int, Field(ge=1, description="calibration prompts that are sampled in full, at most")] = 10

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` where the denoiser lacks a kind, and where no step is left to reuse one."""
        require_no_cache(work, "smoothcache")
        for kind in self.kinds:
            if kind not in modules(work.denoiser).values():
                raise DiffpressError(f"smoothcache: this denoiser has no module of kind {kind}")
        if len(work.sampling.timesteps) < 3:
            raise DiffpressError("smoothcache: the first and the last step run in full, which leaves none to reuse")

    def apply(self, work: Work) -> str:
        """Measure, plan and cluster; says what is reused. Raises `DiffpressError` where nothing is."""
        found, steps = modules(work.denoiser), len(work.sampling.timesteps)
        groups = {kind: [name for name, of in found.items() if of == kind] for kind in self.kinds}
        anchors = last_steps(steps, min(self.max_consecutive, steps - 1))
        wanted = {name: anchors for group in groups.values() for name in group}
        changes = measured(work, wanted, self.prompts, "measuring layers")
        errors = {kind: relative_errors(changes, group) for kind, group in groups.items()}
        cached = {kind: below(error, self.alpha) for kind, error in errors.items()}
        if not any(reused.any() for reused in cached.values()):
            least = min(float(np.nanmin(error[1:-1])) for error in errors.values())
            raise DiffpressError(
                f"smoothcache: no kind changes less than alpha {self.alpha:g} from step to step; the least does by "
                f"{least:.3g}: raise alpha"
            )
        sets = [
            frozenset(name for kind, group in groups.items() if cached[kind][step] for name in group)
            for step in range(steps)
        ]
        weights, call = savings(work, wanted)
        work.program, kept = program_from(work, sets, weights)
        taken = [work.program.variants[step].features for step in work.program.steps]
        counts = {kind: sum(group[0] in names for names in taken) for kind, group in groups.items()}
        share = 1 - sum(weights[name] for names in taken for name in names) / (call * steps)
        return (
            f"of {steps} steps {', '.join(f'{kind} is reused in {count}' for kind, count in counts.items())}: "
            f"{work.program.marks()}, {share:.0%} of the arithmetic; {len(work.program.variants)} graphs keep "
            f"{kept:.0%} of what was planned"
        )


def relative_errors(changes: Changes, names: list[str]) -> np.ndarray:
    """E [steps, lags] of layers `names`: how far each step is from the one before, the one before that, and so on."""
    return np.mean(
        [changes.distances[name] / np.maximum(changes.sizes[name], TINY)[..., None] for name in names], axis=(0, 1)
    )


def below(errors: np.ndarray, alpha: float) -> np.ndarray:
    """Whether a step [steps] reuses the last computed one: its error [steps, lags] by the steps in between is below
    `alpha`, they are no more than there are lags, and it is neither the first nor the last.
    """
    reused = np.zeros(len(errors), bool)
    last = 0
    for step in range(1, len(errors) - 1):
        lag = step - last
        reused[step] = lag <= errors.shape[1] and errors[step, lag - 1] < alpha
        last = last if reused[step] else step
    return reused
