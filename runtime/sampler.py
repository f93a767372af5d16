"""The sampler: executes a `Sampling`, the linear form of a diffusers scheduler. It knows no scheduler by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from diffpress.errors import DiffpressError
from diffpress.plan import Sampling

# (index of the call, scaled sample [N, C, h, w], timestep) -> output after guidance [N, C, h, w]
Denoise = Callable[[int, np.ndarray, float], np.ndarray]


def check(sampling: Sampling) -> None:
    """Raise `DiffpressError` when rows are missing or a term looks before the start."""
    calls = len(sampling.timesteps)
    if not calls or len(sampling.input_scale) != calls or len(sampling.terms) != calls:
        raise DiffpressError("the sampling schedule's rows do not match its timesteps: compress again")
    for index, row in enumerate(sampling.terms):
        for kind, lag, _ in row:
            if kind not in ("sample", "output") or not 0 <= lag <= index:
                raise DiffpressError(f"row {index} of the sampling schedule has no {kind} {lag} calls back")


def sample(sampling: Sampling, denoise: Denoise, latents: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the sample [N, C, h, w] after each call, starting from `latents` (noise times init_noise_sigma).

    Sums run in float64 and are kept in float32. Only what a later row asks for is remembered.
    """
    check(sampling)
    last_use = {
        (kind, index - lag): index for index, row in enumerate(sampling.terms) for kind, lag, _ in row
    }  # rows come in order, so the last one to ask wins
    history: dict[tuple[str, int], np.ndarray] = {}
    current = latents.astype(np.float32, copy=False)
    for index, (timestep, scale, row) in enumerate(
        zip(sampling.timesteps, sampling.input_scale, sampling.terms, strict=True)
    ):
        scaled = current if scale == 1.0 else current * np.float32(scale)
        history["sample", index] = current
        history["output", index] = denoise(index, scaled, timestep)
        total = np.zeros(current.shape, np.float64)
        for kind, lag, coefficient in row:
            total += coefficient * history[kind, index - lag].astype(np.float64)
        current = total.astype(np.float32)
        history = {key: value for key, value in history.items() if last_use.get(key, -1) > index}
        yield current
