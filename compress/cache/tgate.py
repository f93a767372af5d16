"""`tgate`: T-GATE as a step program (Zhang et al. 2024, "Cross-Attention Makes Inference Cumbersome in Text-to-Image
Diffusion Models").

What cross-attention says converges within the first steps. From step `gate` on its outputs are those of the step
before, frozen as the mean of both halves of guidance, and the text is not read any more, so that one half is left to
compute.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffpress.compress.cache.program import program_of, require_no_cache
from diffpress.compress.families.unet_graph import modules
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, MEAN, StepProgram

NAME = "tgate"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TGatePass:
    """Freeze every cross-attention from a step on; guidance ends there, or keeps both halves, each with its own."""

    gate: Annotated[int | None, Field(ge=1, description="the first step that does not look at the text")] = None  # half
    guidance: Annotated[
        Literal["mean", "keep"], Field(description="end it, with the mean of both halves; or keep both")
    ] = "mean"

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` where nothing would be frozen, or guidance does not fit."""
        require_no_cache(work, NAME)
        calls = len(work.sampling.timesteps)
        if self._gate(work) >= calls:
            raise DiffpressError(
                f"{NAME}: gate {self._gate(work)} is behind the last of {calls} steps, 0 to {calls - 1}"
            )
        if not _crossed(work):
            raise DiffpressError(f"{NAME}: this denoiser has no cross-attention that could be frozen")
        try:
            self._program(work)
        except DiffpressError as error:
            raise DiffpressError(f"{NAME}: {error}") from error

    def apply(self, work: Work) -> str:
        """Put the step program into the plan; says what is frozen."""
        work.program = self._program(work)
        gate, calls = self._gate(work), len(work.program.steps)
        what = "without guidance" if MEAN in work.program.guidance else "with guidance as it was"
        return f"{len(_crossed(work))} cross-attentions are frozen from step {gate} of {calls} on, {what}"

    def _gate(self, work: Work) -> int:
        return max(1, len(work.sampling.timesteps) // 2) if self.gate is None else self.gate

    def _program(self, work: Work) -> StepProgram:
        gate, calls, frozen = self._gate(work), len(work.sampling.timesteps), _crossed(work)
        guidance = work.program.guidance
        # Without guidance there is one half, which is its own mean.
        if self.guidance == "mean" and work.sampling.guidance_scale > 1:
            guidance = ((guidance or (FULL,) * calls)[:gate]) + (MEAN,) * (calls - gate)
        return program_of(work.denoiser, [frozen if index >= gate else () for index in range(calls)], guidance)


def _crossed(work: Work) -> tuple[str, ...]:
    return tuple(path for path, kind in modules(work.denoiser).items() if kind == "attn2")
