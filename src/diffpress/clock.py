"""Which step of a bundle's schedule a call of the denoiser is, as the scheduler of a diffusers pipeline is asked."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from diffpress.errors import DiffpressError
from diffpress.plan import Sampling

NEAR = 1e-3  # by how much a timestep may differ from the plan's: schedulers round in single precision


class Clock:
    """Where in its schedule the denoiser is called, which nobody but the pipeline's scheduler can know.

    Every diffusers pipeline calls `set_timesteps` for an image and `scale_model_input` before each call of the
    denoiser. A denoiser that is called without them is called under another scheduler.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._scheduler: Any = None  # that was told to begin an image
        self._last: int | None = None  # the call before in this image
        self._told = False  # of the next call

    def begin(self, scheduler: Any) -> None:
        """An image begins; raises `DiffpressError` unless its timesteps are those of the plan."""
        self._scheduler = None
        if not _near([float(timestep) for timestep in scheduler.timesteps], self.sampling.timesteps):
            raise DiffpressError(
                f"this bundle is planned for {self.sampling.scheduler} at {self.sampling.steps} steps: call it with "
                f"num_inference_steps={self.sampling.steps}, or compress for the steps that you want"
            )
        self._scheduler, self._last, self._told = scheduler, None, False

    def announce(self) -> None:
        """The denoiser is about to be called."""
        self._told = True

    def tick(self, timestep: float) -> tuple[int, bool]:
        """The index of the call at `timestep`, and whether it is the first of its image.

        An image may begin at a later call (image to image). Raises `DiffpressError` for what the plan does not know.
        """
        timesteps, planned = self.sampling.timesteps, f"{self.sampling.scheduler} at {self.sampling.steps} steps"
        if not self._told or self._scheduler is None:
            raise DiffpressError(
                f"this bundle is planned for {planned}: keep the pipeline's own scheduler, or compress for another one "
                "with a 'schedule' pass"
            )
        if self._last is not None:
            index = self._last + 1
        else:
            begin = getattr(self._scheduler, "begin_index", None)
            same = [index for index, entry in enumerate(timesteps) if _near([entry], [timestep])]
            index = begin if begin is not None else same[0] if same else len(timesteps)
        if index >= len(timesteps) or not _near([timesteps[index]], [timestep]):
            raise DiffpressError(
                f"the denoiser is called at timestep {timestep:g}, where the plan for {planned} does not stand: leave "
                "the timesteps to the scheduler"
            )
        first = self._last is None
        self._last, self._told = index, False
        return index, first


def watch(scheduler: Any, clock: Clock) -> None:
    """Make `scheduler` tell `clock` what it is asked, and be as it is in everything else."""
    kind = type(scheduler)

    @functools.wraps(kind.set_timesteps)  # pipelines look at the signature
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.set_timesteps(self, *args, **kwargs)
        clock.begin(self)

    @functools.wraps(kind.scale_model_input)
    def scale_model_input(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.announce()
        return kind.scale_model_input(self, *args, **kwargs)

    methods = {"set_timesteps": set_timesteps, "scale_model_input": scale_model_input, "__module__": kind.__module__}
    scheduler.__class__ = type(kind.__name__, (kind,), methods)


def _near(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) and all(math.isclose(a, b, rel_tol=0, abs_tol=NEAR) for a, b in pairs)
