"""The sampler: executes a `Sampling`, the linear form of a diffusers scheduler, or EVODiff's steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from diffpress import evodiff
from diffpress.errors import DiffpressError
from diffpress.plan import Sampling

# (index of the call, scaled sample [N, C, h, w], timestep) -> output after guidance [N, C, h, w]
Denoise = Callable[[int, np.ndarray, float], np.ndarray]
SOLVERS = ("linear", "evodiff")


def check(sampling: Sampling) -> None:
    """Raise `DiffpressError` for missing rows, terms before the start, unknown solvers and offsets of another shape."""
    calls = len(sampling.timesteps)
    if not calls or len(sampling.input_scale) != calls or len(sampling.terms) != calls:
        raise DiffpressError("the sampling schedule's rows do not match its timesteps: compress again")
    for index, row in enumerate(sampling.terms):
        for kind, lag, _ in row:
            reach = {"sample": index, "output": index, "noise": 0}.get(kind, -1)
            if not 0 <= lag <= reach or (kind == "noise" and sampling.solver != "linear"):
                raise DiffpressError(f"row {index} of the sampling schedule has no {kind} {lag} calls back")
    if sampling.solver not in SOLVERS:
        raise DiffpressError(f"the sampling schedule's solver is '{sampling.solver}': this needs a newer diffpress")
    if sampling.solver == "evodiff":
        evodiff.check(sampling)
    offsets = sampling.offsets
    if offsets and (len(offsets) != calls or len({len(row) for row in offsets}) != 1 or not offsets[0]):
        raise DiffpressError("the sampling schedule's offsets are no table of calls and channels: compress again")
    if not all(math.isfinite(offset) for row in offsets for offset in row):
        raise DiffpressError("the sampling schedule's offsets are not all finite: compress again")


def sample(sampling: Sampling, denoise: Denoise, latents: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the sample [N, C, h, w] after each call, starting from `latents` (noise times init_noise_sigma).

    With EVODiff what is yielded is the next call's probe, and at the end the sample. Sums run in float64 and are kept
    in float32. Only what a later row asks for is remembered.
    """
    check(sampling)
    if sampling.offsets and len(sampling.offsets[0]) != latents.shape[1]:
        channels = len(sampling.offsets[0])
        raise DiffpressError(f"the sampling schedule's offsets have {channels} channels, latents {latents.shape[1]}")
    offsets = np.array(sampling.offsets, np.float32)
    last_use = {
        (kind, index - lag): index for index, row in enumerate(sampling.terms) for kind, lag, _ in row
    }  # rows come in order, so the last one to ask wins
    history: dict[tuple[str, int], np.ndarray] = {}
    state: evodiff.State | None = None
    current = latents.astype(np.float32, copy=False)
    for index, (timestep, scale, row) in enumerate(
        zip(sampling.timesteps, sampling.input_scale, sampling.terms, strict=True)
    ):
        scaled = current if scale == 1.0 else current * np.float32(scale)
        history["sample", index] = current
        output = denoise(index, scaled, timestep)
        history["output", index] = output - offsets[index][:, None, None] if sampling.offsets else output
        total = np.zeros(current.shape, np.float64)
        for kind, lag, coefficient in row:
            if kind == "noise":
                total += (coefficient / sampling.init_noise_sigma) * latents.astype(np.float64)
            else:
                total += coefficient * history[kind, index - lag].astype(np.float64)
        if sampling.solver == "evodiff":
            total, state = evodiff.advance(sampling, index, current.astype(np.float64), total, state)
        current = total.astype(np.float32)
        history = {key: value for key, value in history.items() if last_use.get(key, -1) > index}
        yield current
