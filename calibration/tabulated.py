"""Plays a table of coefficients where a diffusers pipeline expects a scheduler."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffpress import evodiff
from diffpress.calibration.schedule import tabulate
from diffpress.errors import DiffpressError
from diffpress.plan import FRESH, OUTPUT, PRIOR, SAMPLE, Sampling

SAME = 1e-5  # by how much coefficients of one schedule may differ, relative: other machines round otherwise


class Tabulated:
    """A `Sampling` as a scheduler: what `pipeline(prompt, num_inference_steps=...)` asks of one, and nothing else.

    The counterpart of `runtime.sampler` in torch: the same sums in float64, kept in the type of the sample. `base` is
    the scheduler the table was made from, which lends its configuration and its file; a loop that asks for neither
    needs none. With EVODiff what a step returns is the next call's probe, and so is what a pipeline's callbacks see.
    """

    order = 1

    def __init__(self, sampling: Sampling, base: Any = None) -> None:
        self.sampling, self.base = sampling, base
        self.init_noise_sigma = sampling.init_noise_sigma
        self.num_inference_steps = sampling.steps
        # Rows come in order, so the last one to ask for a sample or an output wins.
        self._last_use = {
            (kind, index - lag): index for index, row in enumerate(sampling.terms) for kind, lag, _ in row
        }
        self.set_timesteps()

    @property
    def config(self) -> Any:
        """Of the scheduler that the table was made from."""
        return self.base.config

    @property
    def alphas_cumprod(self) -> Any:
        """Of the same: [T], what is left of the image at every trained timestep, squared."""
        return self.base.alphas_cumprod

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None) -> None:
        """Stand before the first step; raises `DiffpressError` for a step count that is not the table's."""
        if num_inference_steps not in (None, self.sampling.steps):
            raise DiffpressError(
                f"this schedule has {self.sampling.steps} steps and no other count, not {num_inference_steps}"
            )
        self.timesteps = torch.tensor(self.sampling.timesteps, dtype=torch.float32, device=device)
        self._index = 0
        self._history: dict[tuple[str, int], Tensor] = {}
        self._start = torch.zeros(())  # the sample of the first call
        self._state: evodiff.State | None = None
        self._own = torch.Generator().manual_seed(0)  # of noise that nobody brings a generator for

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the denoiser is given for `sample` [N, C, h, w] at the step the schedule stands at."""
        scale = self.sampling.input_scale[self._at()]
        return sample if scale == 1.0 else sample * scale

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The sample [N, C, h, w] after the step: an object with `prev_sample`, or a tuple of it.

        A stochastic schedule draws its noise from `generator`, or from one for each image, as diffusers does; from one
        of its own, the same each time, where there is none.
        """
        index = self._at()
        if self.sampling.offsets:
            offsets = torch.tensor(self.sampling.offsets[index], dtype=model_output.dtype, device=model_output.device)
            model_output = model_output - offsets[:, None, None]
        self._history[SAMPLE, index], self._history[OUTPUT, index] = sample, model_output
        total = torch.zeros_like(sample, dtype=torch.float64)
        if index == 0:
            self._start = sample
        for kind, lag, coefficient in self.sampling.terms[index]:
            if kind == FRESH:
                drawn = randn_tensor(sample.shape, generator or self._own, sample.device, sample.dtype)
                total += coefficient * drawn.double()
            elif kind == PRIOR:
                total += (coefficient / self.sampling.init_noise_sigma) * self._start.double()
            else:
                total += coefficient * self._history[kind, index - lag].double()
        self._history = {key: value for key, value in self._history.items() if self._last_use.get(key, -1) > index}
        if self.sampling.solver == "evodiff":
            total, self._state = evodiff.advance(self.sampling, index, sample.double(), total, self._state)
        self._index += 1
        after = total.to(sample.dtype)
        return SimpleNamespace(prev_sample=after) if return_dict else (after,)

    def add_noise(self, *_: Any, **__: Any) -> Tensor:
        """Raises `DiffpressError`: a table knows the level of its first sample alone."""
        raise DiffpressError(
            "this schedule is a table of coefficients, which begins with noise: image to image needs a scheduler of "
            "diffusers, compress with one that is not made of explicit steps"
        )

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write the configuration of the scheduler that the table was made from: diffusers has no file for a table."""
        self.base.save_pretrained(folder, **options)

    def _at(self) -> int:
        if self._index == len(self.timesteps):
            raise DiffpressError(f"the schedule's {len(self.timesteps)} steps are made: call set_timesteps first")
        return self._index


def playing(scheduler: Any, sampling: Sampling) -> Any:
    """A scheduler with which `sampling.steps` steps of a pipeline are those of `sampling`.

    `scheduler` itself where that is what it does with so many steps; else the table, played by `Tabulated`.
    """
    base = scheduler.base if isinstance(scheduler, Tabulated) else scheduler
    return base if _makes(base, sampling) else Tabulated(sampling, base)


def _makes(scheduler: Any, sampling: Sampling) -> bool:
    """Whether the scheduler's own steps are those of the table, up to rounding."""
    if type(scheduler).__name__ != sampling.scheduler or sampling.solver != "linear" or sampling.offsets:
        return False
    try:
        own = tabulate(scheduler, sampling.steps, sampling.guidance_scale, sampling.height, sampling.width)
    except DiffpressError:
        return False
    pairs = [(own.init_noise_sigma, sampling.init_noise_sigma)]
    for ours, theirs in ((own.timesteps, sampling.timesteps), (own.input_scale, sampling.input_scale)):
        if len(ours) != len(theirs):
            return False
        pairs += zip(ours, theirs, strict=True)
    for row, other in zip(own.terms, sampling.terms, strict=True):
        if [term[:2] for term in row] != [term[:2] for term in other]:
            return False
        pairs += ((a[2], b[2]) for a, b in zip(row, other, strict=True))
    return all(math.isclose(a, b, rel_tol=SAME, abs_tol=SAME) for a, b in pairs)
