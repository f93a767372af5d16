"""The sampler: executes a `Sampling`, the linear form of a diffusers scheduler, or EVODiff's steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from diffpress import evodiff
from diffpress.errors import DiffpressError
from diffpress.plan import FRESH, OUTPUT, PRIOR, SAMPLE, Sampling

# (index of the call, scaled sample [N, C, h, w], timestep) -> output after guidance [N, C, h, w]
Denoise = Callable[[int, np.ndarray, float], np.ndarray]
Draw = Callable[[], np.ndarray]  # the next noise [N, C, h, w] of every image's own generator, of unit variance
Adjust = Callable[[int, np.ndarray], np.ndarray]  # (index of the call, sample after it) -> the sample to go on with
SOLVERS = ("linear", "evodiff")


def check(sampling: Sampling) -> None:
    """Raise `DiffpressError` for missing rows, terms before the start, unknown solvers and offsets of another shape."""
    calls = len(sampling.timesteps)
    if not calls or len(sampling.input_scale) != calls or len(sampling.terms) != calls:
        raise DiffpressError("the sampling schedule's rows do not match its timesteps: compress again")
    for index, row in enumerate(sampling.terms):
        for kind, lag, _ in row:
            reach = {SAMPLE: index, OUTPUT: index, PRIOR: 0, FRESH: 0}.get(kind, -1)
            if not 0 <= lag <= reach or (kind in (PRIOR, FRESH) and sampling.solver != "linear"):
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


def sample(
    sampling: Sampling,
    denoise: Denoise,
    latents: np.ndarray,
    *,
    prior: np.ndarray | None = None,
    draw: Draw | None = None,
    adjust: Adjust | None = None,
) -> Iterator[np.ndarray]:
    """Yield the sample [N, C, h, w] after each call, starting from `latents` (noise times init_noise_sigma).

    `prior` is the noise of unit variance that terms of PRIOR noise add, that of the latents if None; `draw` makes what
    stochastic solvers add, in the order of the calls. With EVODiff what is yielded is the next call's probe, and at the
    end the sample. Sums run in float64 and are kept in float32. Only what a later row asks for is remembered.
    """
    check(sampling)
    if sampling.offsets and len(sampling.offsets[0]) != latents.shape[1]:
        channels = len(sampling.offsets[0])
        raise DiffpressError(f"the sampling schedule's offsets have {channels} channels, latents {latents.shape[1]}")
    if sampling.stochastic and draw is None:
        raise DiffpressError(f"the sampling schedule ({sampling.scheduler}) draws noise, but there is no generator")
    offsets = np.array(sampling.offsets, np.float32)
    last_use = {
        (kind, index - lag): index for index, row in enumerate(sampling.terms) for kind, lag, _ in row
    }  # rows come in order, so the last one to ask wins
    history: dict[tuple[str, int], np.ndarray] = {}
    state: evodiff.State | None = None
    current = latents.astype(np.float32, copy=False)
    began = latents.astype(np.float64) / sampling.init_noise_sigma if prior is None else prior.astype(np.float64)
    for index, (timestep, scale, row) in enumerate(
        zip(sampling.timesteps, sampling.input_scale, sampling.terms, strict=True)
    ):
        scaled = current if scale == 1.0 else current * np.float32(scale)
        history[SAMPLE, index] = current
        output = denoise(index, scaled, timestep)
        history[OUTPUT, index] = output - offsets[index][:, None, None] if sampling.offsets else output
        total = np.zeros(current.shape, np.float64)
        for kind, lag, coefficient in row:
            if kind == FRESH and draw is not None:
                total += coefficient * draw()  # drawn where the coefficient is 0, too: the next draw follows it
            elif kind == PRIOR:
                total += coefficient * began
            else:
                total += coefficient * history[kind, index - lag].astype(np.float64)
        if sampling.solver == "evodiff":
            total, state = evodiff.advance(sampling, index, current.astype(np.float64), total, state)
        current = total.astype(np.float32)
        if adjust is not None:
            current = adjust(index, current)
        history = {key: value for key, value in history.items() if last_use.get(key, -1) > index}
        yield current
