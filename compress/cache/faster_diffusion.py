"""`faster-diffusion`: encoder propagation (Li et al. 2023, Faster Diffusion: Rethinking the Role of the UNet Encoder).

The encoder of a U-Net, down path and mid block, changes little from step to step. Key steps run everything; the others
run the decoder with the skips and the mid output of the last key step (Section 3.2). Such decoders do not look at the
sample, so those between two keys run as one batch. Noise added to the late samples brings texture back (Section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffpress.calibration.tabulated import playing
from diffpress.compress.cache.movement import movements
from diffpress.compress.cache.program import program_of, require_no_cache
from diffpress.compress.families.unet_graph import encoder
from diffpress.compress.schedule.economy import refreshes
from diffpress.compress.schedule.prior_noise import with_prior_noise
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, StepProgram

NAME = "faster-diffusion"
PUBLISHED, PUBLISHED_STEPS = (0, 1, 2, 3, 5, 10, 15, 25, 35), 50  # Section 4.1, Stable Diffusion


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FasterDiffusionPass:
    """Run the encoder at key steps only; the first step is always one.

    `keys` are step indices, a number m for every m-th step, "published" for the paper's of 50 steps, stretched to the
    schedule, or "calibrated": as many as `key_steps`, where the features that are reused are off by the least in the
    sum over steps, or a new one where they are off by more than `threshold`.
    """

    keys: Annotated[
        int | tuple[int, ...] | Literal["published", "calibrated"],
        Field(description="steps that run the encoder: a list, every so many, published or calibrated"),
    ] = "published"
    key_steps: Annotated[int | None, Field(ge=1, description="how many keys to calibrate")] = None
    threshold: Annotated[
        float | None, Field(gt=0, description="relative distance of the features at which a calibrated key is due")
    ] = None
    together: Annotated[int, Field(ge=1, description="decoders of how many steps may run as one batch")] = 4
    prior_noise: Annotated[float, Field(ge=0, lt=1, description="part of the initial noise added at t < 500")] = 0.0
    prompts: Annotated[int, Field(ge=1, description="calibration prompts that keys are found from")] = 4

    def __post_init__(self) -> None:
        given = [name for name in ("key_steps", "threshold") if getattr(self, name) is not None]
        if self.keys == "calibrated" and len(given) != 1:
            raise DiffpressError(f"{NAME}: calibrated keys need one of key_steps and threshold")
        if self.keys != "calibrated" and given:
            raise DiffpressError(f"{NAME}: {given[0]} is for keys: calibrated")
        if isinstance(self.keys, int) and self.keys < 2:
            raise DiffpressError(f"{NAME}: keys every {self.keys} steps leave nothing to reuse: give 2 or more")

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` for keys outside of the schedule, where nothing is reused, and after a cache."""
        require_no_cache(work, NAME)
        steps = len(work.sampling.timesteps)
        if self.keys != "calibrated":
            self._program(work, fixed_keys(self.keys, steps))
        elif self.key_steps is not None and self.key_steps >= steps:
            raise DiffpressError(f"{NAME}: {self.key_steps} key steps of {steps} leave nothing to reuse")
        if self.prior_noise:
            try:
                with_prior_noise(work.sampling, self.prior_noise)
            except DiffpressError as error:
                raise DiffpressError(f"{NAME}: {error}") from error

    def apply(self, work: Work) -> str:
        """Put the step program into the plan, and prior noise into the schedule; says which steps are keys."""
        note = ""
        if self.keys == "calibrated":
            keys, moved = self._calibrated(work)
            rows = [_row(work, keys, moved, index) for index in range(len(work.sampling.timesteps))]
            work.tables[NAME] = rows
            reused = [row["off"] for row in rows if row["key"] != row["step"]]
            note = f"; reused features are off by {np.mean(reused):.1%} in the mean" if reused else ""
        else:
            keys = fixed_keys(self.keys, len(work.sampling.timesteps))
        work.program = self._program(work, keys)
        steps, calls = len(work.program.steps), len(work.program.runs())
        together = f" in {calls} calls of a graph" if calls < steps else ""
        if self.prior_noise:
            noisy = with_prior_noise(work.sampling, self.prior_noise)
            work.pipeline.scheduler, work.sampling = playing(work.pipeline.scheduler, noisy), noisy
            note += f"; {self.prior_noise:g} of the initial noise added to late samples"
        return f"{len(keys)} of {steps} steps run the encoder{together}: {' '.join(map(str, keys))}{note}"

    def _program(self, work: Work, keys: Sequence[int]) -> StepProgram:
        steps, reads = len(work.sampling.timesteps), encoder(work.denoiser)
        if len(keys) == steps:
            raise DiffpressError(f"{NAME}: every one of {steps} steps is a key, so that nothing is reused")
        try:
            taken = [() if index in keys else reads for index in range(steps)]
            return program_of(work.denoiser, taken, work.program.guidance, together=self.together)
        except DiffpressError as error:
            raise DiffpressError(f"{NAME}: {error}") from error

    def _calibrated(self, work: Work) -> tuple[list[int], np.ndarray]:
        """The keys, and how far features have moved between any two steps."""
        moved = movements(work, encoder(work.denoiser), self.prompts)
        costs = moved.copy()
        for key, step in zip(*np.indices(costs.shape).reshape(2, -1), strict=True):
            # What a key writes for the conditional half alone, a step of both halves cannot read.
            if work.program.guided(key) != FULL and work.program.guided(step) == FULL:
                costs[key, step] = np.inf
        if self.threshold is None:
            return refreshes(costs, self.key_steps or 1), moved
        keys = [0]
        for step in range(1, len(costs)):
            if costs[keys[-1], step] > self.threshold:
                keys.append(step)
        return keys, moved


def fixed_keys(keys: int | tuple[int, ...] | str, steps: int) -> list[int]:
    """The key steps, in order, of a list, of every `keys`-th step, or of those published.

    Raises `DiffpressError` for an index that the schedule does not have.
    """
    if isinstance(keys, int):
        return list(range(0, steps, keys))
    if isinstance(keys, str):
        return sorted({min(round(key * steps / PUBLISHED_STEPS), steps - 1) for key in PUBLISHED})
    outside = [key for key in keys if not 0 <= key < steps]
    if outside:
        raise DiffpressError(f"{NAME}: key {outside[0]} is not a step of the schedule, which has 0 to {steps - 1}")
    return sorted({0, *keys})


def _row(work: Work, keys: Sequence[int], moved: np.ndarray, step: int) -> dict[str, Any]:
    key = max(key for key in keys if key <= step)
    return {"step": step, "timestep": work.sampling.timesteps[step], "key": key, "off": float(moved[key, step])}
