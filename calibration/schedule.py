"""Turns a diffusers scheduler into a table of coefficients by probing it."""

from __future__ import annotations

import copy
from typing import Any

import torch

from diffpress.errors import DiffpressError
from diffpress.plan import Sampling

LINEAR = 1e-4  # relative error up to which a scheduler counts as linear


def tabulate(scheduler: Any, steps: int, guidance_scale: float, height: int, width: int) -> Sampling:
    """The coefficients of `steps` steps of a deterministic scheduler; height and width in pixels.

    Each call is fed a fresh unit vector as its sample and another as its output, whatever the call before returned: a
    linear scheduler answers with the coefficients themselves. Raises `DiffpressError` for one that is not linear.
    """
    probed = copy.deepcopy(scheduler)
    probed.set_timesteps(steps)
    timesteps = [float(t) for t in probed.timesteps]
    calls = len(timesteps)
    basis = torch.eye(2 * calls, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    scales, rows = [], []
    for index, timestep in enumerate(probed.timesteps):
        unit = torch.ones(1, dtype=torch.float64)
        scales.append(float(probed.scale_model_input(unit, timestep)))
        arguments: dict[str, Any] = {"return_dict": False}
        if "generator" in probed.step.__code__.co_varnames:
            arguments["generator"] = generator
        # diffusers' steps want a batch and channels; the basis lies along the last axis.
        sample, output = (basis[2 * index + part].reshape(1, 1, 1, -1) for part in (0, 1))
        after = probed.step(output, timestep, sample, **arguments)[0].reshape(-1)
        terms = []
        for column in torch.nonzero(after).flatten().tolist():
            call, part = divmod(column, 2)
            terms.append(("output" if part else "sample", index - call, float(after[column])))
        rows.append(tuple(terms))
    sampling = Sampling(
        scheduler=type(scheduler).__name__,
        steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        timesteps=tuple(timesteps),
        input_scale=tuple(scales),
        init_noise_sigma=float(probed.init_noise_sigma),
        terms=tuple(rows),
    )
    # Noise reaches into columns of calls that have not been made.
    causal = all(lag >= 0 for row in rows for _, lag, _ in row)
    if not causal or not _reproduces(sampling, scheduler):
        raise DiffpressError(
            f"scheduler {sampling.scheduler} adds noise or thresholds as it is configured, which a table of "
            "coefficients cannot hold: use DDIM, Euler or DPM-Solver++ without thresholding"
        )
    return sampling


def _reproduces(sampling: Sampling, scheduler: Any) -> bool:
    """Whether the table gives the scheduler's own result on random outputs."""
    fresh = copy.deepcopy(scheduler)
    fresh.set_timesteps(sampling.steps)
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, 1, 4, 4, dtype=torch.float64, generator=generator) * sampling.init_noise_sigma
    samples, outputs = [sample], []
    for index, timestep in enumerate(fresh.timesteps):
        outputs.append(torch.randn(1, 1, 4, 4, dtype=torch.float64, generator=generator))
        fresh.scale_model_input(sample, timestep)
        sample = fresh.step(outputs[-1], timestep, sample, return_dict=False)[0]
        history = {"sample": samples, "output": outputs}
        samples.append(sum(c * history[kind][index - lag] for kind, lag, c in sampling.terms[index]))  # type: ignore[arg-type]
    return bool((samples[-1] - sample).norm() <= LINEAR * sample.norm())
