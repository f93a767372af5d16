"""`delta-cache`: residuals of a range of blocks (Chen et al. 2024, "Delta-DiT: A Training-Free Acceleration Method").

What a block adds to its input changes less from step to step than what it hands on, and to reuse it loses nothing of
the input (Section 4.1). Early steps, which draw outlines, reuse the rear blocks, that make details; late steps reuse
the front ones (Section 4.2). On U-Nets the blocks are ResBlocks and transformers; what joins them, skips, resampling
and shortcuts, is always computed.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffpress.compress.cache.program import program_of, require_no_cache
from diffpress.compress.families.unet_graph import modules
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, StepProgram

NAME = "delta-cache"
KINDS = ("resnet", "transformer")
SHARE = 0.5


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DeltaCachePass:
    """A full step every `interval`, counted from the first and again from `switch`; the others reuse residuals.

    Before `switch`, a step or a fraction of the schedule, they are those of the last `share` of all blocks (or of so
    many `blocks`), from there on those of the first.
    """

    interval: Annotated[int, Field(ge=2, description="a full step every so many")] = 3
    switch: Annotated[
        int | float, Field(ge=0, description="from which step front blocks are reused: an index, or a fraction")
    ] = 0.5
    share: Annotated[float | None, Field(gt=0, le=1, description="of the blocks that is reused; a half if absent")] = (
        None
    )
    blocks: Annotated[int | None, Field(ge=1, description="how many blocks are reused, in place of a share")] = None

    def __post_init__(self) -> None:
        if self.share is not None and self.blocks is not None:
            raise DiffpressError(f"{NAME}: share and blocks both say how much is reused: keep one")
        if isinstance(self.switch, float) and self.switch > 1:
            raise DiffpressError(
                f"{NAME}: switch {self.switch:g} is no fraction of the schedule: give 0 to 1, or a step"
            )

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` for blocks and steps that do not exist, where nothing is reused, after a cache."""
        require_no_cache(work, NAME)
        steps, count = len(work.sampling.timesteps), len(_blocks(work))
        if isinstance(self.switch, int) and self.switch > steps:
            raise DiffpressError(f"{NAME}: switch {self.switch} is not a step of the schedule, which has {steps}")
        if self.blocks is not None and self.blocks > count:
            raise DiffpressError(f"{NAME}: {self.blocks} blocks are more than this denoiser has: {count}")
        if self._program(work).steps == (FULL,) * steps:
            raise DiffpressError(f"{NAME}: with this interval all of {steps} steps are full, so that nothing is reused")

    def apply(self, work: Work) -> str:
        """Put the step program into the plan; says what is reused."""
        work.program = self._program(work)
        full, steps = work.program.steps.count(FULL), len(work.program.steps)
        which = f"{self._count(work)} of {len(_blocks(work))} blocks add"
        where = f"the last ones before step {self._switch(work)}, the first ones from there"
        return f"{full} of {steps} steps run in full, the others reuse what {which}: {where}"

    def _switch(self, work: Work) -> int:
        steps = len(work.sampling.timesteps)
        return round(self.switch * steps) if isinstance(self.switch, float) else self.switch

    def _count(self, work: Work) -> int:
        share = SHARE if self.share is None else self.share
        return self.blocks or max(1, round(share * len(_blocks(work))))

    def _program(self, work: Work) -> StepProgram:
        names, count, switch = _blocks(work), self._count(work), self._switch(work)
        rear, front = names[-count:], names[:count]
        reads = [
            (() if index % self.interval == 0 else rear)
            if index < switch
            else (() if (index - switch) % self.interval == 0 else front)
            for index in range(len(work.sampling.timesteps))
        ]
        try:
            return program_of(work.denoiser, reads, work.program.guidance)
        except DiffpressError as error:
            raise DiffpressError(f"{NAME}: {error}") from error


def _blocks(work: Work) -> tuple[str, ...]:
    """Paths of the blocks in forward order."""
    return tuple(name for name, kind in modules(work.denoiser).items() if kind in KINDS)
