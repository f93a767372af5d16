"""`magcache`: MagCache as a step program (Ma et al. 2025, "Fast Video Generation with Magnitude-Aware Cache").

What the network adds to its input, the residual r_t, changes in magnitude by a ratio gamma_t that hardly depends on the
prompt (the "magnitude law"). How far the product of the ratios since the last full step is from 1 is the error of
reusing its residual; steps are skipped while the sum of these errors is below a threshold, and only so many in a row.
Where the authors keep a state for each half of guidance, one plan serves both here: ratios are the mean over halves and
prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffpress.compress.cache.program import program_of, require_no_cache
from diffpress.compress.cache.walk import TINY, Inputs, cached_feature, common_rows, may_read, walk
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError

NAME = "magcache"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class MagCachePass:
    """Reuse what all layers add (with `branch`, what is deeper than it) while its magnitude tells that it holds."""

    threshold: Annotated[float, Field(ge=0, description="sum of errors below which steps are skipped")] = 0.24
    max_consecutive: Annotated[int, Field(ge=1, description="steps skipped in a row at most")] = 5
    retain: Annotated[float, Field(ge=0, lt=1, description="share of the steps, the first ones, that stay full")] = 0.1
    branch: Annotated[int | None, Field(ge=0, description="reuse the deep feature of this branch instead")] = None
    prompts: Annotated[int, Field(ge=1, description="calibration prompts that ratios are measured on")] = 4

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` when the branch does not exist or a program stands already."""
        cached_feature(work, self.branch, NAME)
        require_no_cache(work, NAME)

    def apply(self, work: Work) -> str:
        """Measure the ratios and put the step program into the plan; says which steps reuse."""
        feature, calls = cached_feature(work, self.branch, NAME), len(work.sampling.timesteps)
        measured = measured_ratios(work, feature, self.prompts)
        retained = max(1, int(calls * self.retain))
        full = mask(measured, self.threshold, self.max_consecutive, retained, work.program.guidance)
        reads = [() if runs else (feature,) for runs in full]
        work.program = program_of(work.denoiser, reads, work.program.guidance)
        work.tables[NAME] = [
            {"step": index, "ratio": ratio, "full": runs}
            for index, (ratio, runs) in enumerate(zip(measured, full, strict=True))
        ]
        return f"{sum(full)} of {calls} steps run in full, the others reuse {feature}: {work.program.marks()}"


def measured_ratios(work: Work, feature: str, prompts: int) -> list[float]:
    """gamma of every call: the mean over positions, prompts and halves of |r_t| / |r_(t-1)|, norms over channels.

    That of the first call is 1. Raises `DiffpressError` where features are not finite.
    """
    calls = len(work.sampling.timesteps)
    before: list[Tensor] = []
    sums, counts = [0.0] * calls, [0] * calls

    def observe(index: int, _: Inputs, features: Mapping[str, Tensor]) -> None:
        norms = features[feature].double().norm(dim=1)
        if index:
            value, earlier = common_rows(norms, before.pop())
            ratio = (value / earlier.clamp_min(TINY)).flatten(1).mean(dim=1)
            sums[index] += float(ratio.sum())
            counts[index] += len(ratio)
        before[:] = [norms]

    walk(work, (feature,), prompts, observe, "measuring magnitudes")
    found = [1.0, *(total / count for total, count in zip(sums[1:], counts[1:], strict=True))]
    if not all(abs(ratio) < float("inf") for ratio in found):
        raise DiffpressError("the denoiser gives values that are not finite")
    return found


def mask(
    ratios: Sequence[float], threshold: float, max_consecutive: int, retained: int = 1, guidance: Sequence[str] = ()
) -> list[bool]:
    """Which steps run in full: the first `retained`, and where the errors |1 - prod gamma| of the steps since the last
    full one, its own among them, sum up to `threshold` or more, or more than `max_consecutive` would be skipped.
    """
    found: list[bool] = []
    writer, product, error = 0, 1.0, 0.0
    for index, ratio in enumerate(ratios):
        product *= ratio
        error += abs(1 - product)
        skip = index >= max(1, retained) and error < threshold and index - writer <= max_consecutive
        if not (skip and may_read(guidance, writer, index)):
            writer, product, error = index, 1.0, 0.0
        found.append(writer == index)
    return found
