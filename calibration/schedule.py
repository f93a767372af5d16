"""Turns a diffusers scheduler into a table of coefficients by probing it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from diffpress.calibration import probe
from diffpress.errors import DiffpressError
from diffpress.plan import FRESH, Sampling

LINEAR = 1e-4  # relative error up to which a scheduler counts as linear
OUTSIDE = 0.01  # by how much of itself a sigma may leave the model's range: published schedules are rounded


def tabulate(
    scheduler: Any,
    steps: int,
    guidance_scale: float,
    height: int,
    width: int,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float = 0.0,
) -> Sampling:
    """The coefficients of `steps` steps of a scheduler, see `probe`; height and width in pixels.

    The steps are those of the scheduler's configuration, or stand where `timesteps` or `sigmas` say, see `place`. `eta`
    is what pipelines hand to the schedulers that take one (DDIM: 0 is deterministic, 1 draws as DDPM). Sampling can
    begin in the middle only after `with_starts`. Raises `DiffpressError` for a scheduler that is not linear, and for
    steps that it cannot make.
    """
    probed = _placed(scheduler, steps, timesteps, sigmas)
    name = type(scheduler).__name__
    try:
        table = list(probe.rows(probed, eta))
    except probe.CANNOT as error:
        raise DiffpressError(f"scheduler {name} cannot make {steps} steps as it is configured: {error}") from error
    except probe.ManyDraws as error:
        raise DiffpressError(_refusal(scheduler)) from error
    if not all(math.isfinite(coefficient) for row, _ in table for _, _, coefficient in row):
        raise DiffpressError(
            f"scheduler {name} divides by zero on this schedule: end it above zero, or use euler, dpm++ or unipc"
        )
    sampling = Sampling(
        scheduler=name,
        steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        timesteps=tuple(float(t) for t in probed.timesteps),
        input_scale=tuple(scale for _, scale in table),
        init_noise_sigma=float(probed.init_noise_sigma),
        terms=tuple(row for row, _ in table),
        order=int(getattr(scheduler, "order", 1)),
    )
    # What no probe was told of reaches into columns of calls that have not been made.
    causal = all(lag >= 0 for row in sampling.terms for _, lag, _ in row)
    if not causal or not _reproduces(sampling, _placed(scheduler, steps, timesteps, sigmas), eta):
        raise DiffpressError(_refusal(scheduler))
    return probe.with_levels(sampling, _placed(scheduler, steps, timesteps, sigmas))


def with_starts(
    sampling: Sampling,
    scheduler: Any,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float = 0.0,
) -> Sampling:
    """`sampling`, just tabulated from `scheduler` with the same arguments, so that it can begin at any of its steps."""
    if sampling.solver != "linear":
        return sampling  # begins anew by itself
    placed = _placed(scheduler, sampling.steps, timesteps, sigmas)
    return replace(sampling, starts=probe.starts(sampling, placed, eta))


def _refusal(scheduler: Any) -> str:
    """One line: what a table of coefficients cannot hold of a scheduler, and what to use instead."""
    name = type(scheduler).__name__
    config = getattr(scheduler, "config", {})
    switches = [key for key in ("thresholding", "clip_sample") if config.get(key)]
    if switches:
        return (
            f"scheduler {name} clips what it predicts ({switches[0]}: true), which no table of coefficients holds: set "
            f"{switches[0]} to false in its configuration, or take another one with the schedule pass"
        )
    if name == "DPMSolverSDEScheduler":
        return (
            f"scheduler {name} draws from a Brownian tree, which no table of coefficients holds: use the schedule pass "
            "with solver dpm++-sde or euler-ancestral"
        )
    return (
        f"scheduler {name} is not linear in what it is given as it is configured, so that no table of coefficients "
        "holds it: use the schedule pass with solver dpm++, unipc, euler or ddim"
    )


def place(scheduler: Any, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> None:
    """Put a scheduler's steps where a list says, in place; one of the two lists is None. Fractions are allowed.

    `timesteps` [N] are where the denoiser is called; sampling ends where the scheduler is configured to end, as if they
    had been given to its own `set_timesteps`. `sigmas` [N + 1] = sqrt(1 / alphas_cumprod - 1) are the noise levels of
    the calls and the one at which sampling ends, 0 for none, as k-diffusion and diffusers' Euler take them. Raises
    `DiffpressError` for lists that are not strictly decreasing or leave what the model was trained on, and for
    schedulers that walk in strides of their own.
    """
    name, trained = type(scheduler).__name__, _trained_sigmas(scheduler)
    if timesteps is not None:
        check_timesteps(timesteps, len(trained) - 1)
    else:
        check_sigmas(sigmas or (), float(trained[0]), float(trained[-1]))
    count = len(timesteps) if timesteps is not None else len(sigmas or ()) - 1
    scheduler.set_timesteps(count)
    if len(scheduler.timesteps) != count or len(getattr(scheduler, "sigmas", ())) != count + 1:
        raise DiffpressError(
            f"scheduler {name} takes no timesteps or sigmas of one's own: use euler, which is the step of DDIM between "
            "any two, dpm++ or unipc"
        )
    rows = np.arange(len(trained), dtype=np.float64)
    if timesteps is not None:
        # As diffusers has them: sigma is linear between two trained timesteps, the timestep linear in log sigma.
        levels = [*np.interp(timesteps, rows, trained), float(scheduler.sigmas[-1])]
        if not levels[-2] > levels[-1]:
            raise DiffpressError(
                f"the last of the timesteps is {timesteps[-1]:g}, where scheduler {name} ends already: leave it out"
            )
    else:
        levels = list(sigmas or ())
        timesteps = np.interp(np.log(levels[:-1]), np.log(trained), rows).tolist()
        if levels[-1] == 0 and "final_sigmas_type" in scheduler.config:
            scheduler.register_to_config(final_sigmas_type="zero")  # the solvers look here how to make the last step
    # The solvers whose steps read nothing but these two; set_timesteps has reset what they remember.
    scheduler.sigmas = torch.tensor(levels, dtype=torch.float32)
    scheduler.timesteps = torch.tensor(timesteps, dtype=torch.float32)


def check_timesteps(timesteps: Sequence[float], largest: float = math.inf) -> None:
    """Raise `DiffpressError` unless timesteps [N] fall strictly, from at most `largest` to at least 0."""
    _check_falling("timesteps", timesteps)
    if timesteps[-1] < 0:
        raise DiffpressError(f"timesteps holds {timesteps[-1]:g}: give none below 0")
    if timesteps[0] > largest:
        raise DiffpressError(
            f"timestep {timesteps[0]:g} is outside of what the model was trained on: give them from {largest:g} to 0"
        )


def check_sigmas(sigmas: Sequence[float], smallest: float = 0.0, largest: float = math.inf) -> None:
    """Raise `DiffpressError` unless sigmas [N + 1] fall strictly within the model's range; the last may be 0."""
    _check_falling("sigmas", sigmas)
    if len(sigmas) < 2:
        raise DiffpressError("one of sigmas makes no step: give the level at which sampling ends, too, 0 for no noise")
    if sigmas[-1] < 0:
        raise DiffpressError(f"sigmas holds {sigmas[-1]:g}: give numbers above 0, or 0 as the last one")
    for sigma in (sigmas[0], sigmas[-1] or sigmas[-2]):
        if not smallest * (1 - OUTSIDE) <= sigma <= largest * (1 + OUTSIDE):
            raise DiffpressError(
                f"sigma {sigma:g} is outside of what the model was trained on: give them from {largest:.4g} to "
                f"{smallest:.4g}, and 0 as the last one to end without noise"
            )


def _check_falling(what: str, values: Sequence[float]) -> None:
    if not values:
        raise DiffpressError(f"{what} is empty: give one for each step")
    wrong = [value for value in values if not math.isfinite(value)]
    if wrong:
        raise DiffpressError(f"{what} holds {wrong[0]}: give finite numbers")
    for before, after in pairwise(values):
        if before == after:
            raise DiffpressError(f"{what} holds {before:g} twice: give every step its own")
        if before < after:
            raise DiffpressError(f"{what} rises from {before:g} to {after:g}: give them in falling order, noise first")


def _trained_sigmas(scheduler: Any) -> np.ndarray:
    """sqrt(1 / alphas_cumprod - 1) [T] of the trained timesteps, rising; in diffusers' float32 arithmetic."""
    alphas = scheduler.alphas_cumprod
    return np.asarray(((1 - alphas) / alphas) ** 0.5, dtype=np.float64)


def _placed(scheduler: Any, steps: int, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> Any:
    """A copy of the scheduler that stands before its first step."""
    copied, name = copy.deepcopy(scheduler), type(scheduler).__name__
    try:
        if timesteps is None and sigmas is None:
            copied.set_timesteps(steps)
        else:
            place(copied, timesteps, sigmas)
    except (ValueError, IndexError, AssertionError) as error:
        raise DiffpressError(f"scheduler {name} cannot make {steps} steps as it is configured: {error}") from error
    return copied


def _reproduces(sampling: Sampling, fresh: Any, eta: float) -> bool:
    """Whether the table gives the scheduler's own result on random outputs; `fresh` stands before its first step."""
    generator = torch.Generator().manual_seed(1)

    def draw() -> torch.Tensor:
        return torch.randn(1, 1, 4, 4, dtype=torch.float64, generator=generator)

    sample = draw() * sampling.init_noise_sigma
    samples, outputs, step = [sample], [], probe.stepping(fresh, eta)
    for index, timestep in enumerate(fresh.timesteps):
        outputs.append(draw())
        noise = draw()
        fresh.scale_model_input(sample, timestep)
        with probe.drawing(fresh, noise):
            sample = step(outputs[-1], timestep, sample)
        history = {"sample": samples, "output": outputs}
        total = torch.zeros_like(sample)
        for kind, lag, c in sampling.terms[index]:
            total += c * (noise if kind == FRESH else history[kind][index - lag])
        samples.append(total)
    return bool((samples[-1] - sample).norm() <= LINEAR * sample.norm())
