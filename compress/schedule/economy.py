"""Which steps compute both halves of guidance: plans as data, without a network.

With classifier-free guidance the output is u + g (c - u); a step that computes the conditional output c alone takes the
difference c - u of the last full step, which is wrong by (g - 1) times how far it has moved since.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from diffpress.errors import DiffpressError
from diffpress.plan import FULL, OUTPUT, SAMPLE, Sampling, StepProgram


def spread(steps: int, full: int) -> list[int]:
    """`full` of `steps` indices, evenly, the first among them."""
    return [math.ceil(index * steps / full) for index in range(full)]


def guidance_of(steps: int, full: Sequence[int], other: str) -> tuple[str, ...]:
    """The row of a step program that is FULL at the indices `full` and `other` elsewhere."""
    chosen = set(full)
    return tuple(FULL if index in chosen else other for index in range(steps))


def effects(sampling: Sampling) -> np.ndarray:
    """What is left of output i in the final sample, |coefficient| [calls], other outputs being what they are.

    Schedules are linear: the recurrence of `Sampling.terms`, run backwards from the last sample. Noise that terms add
    depends on no output.
    """
    calls = len(sampling.timesteps)
    samples, outputs = np.zeros(calls + 1), np.zeros(calls)
    samples[calls] = 1.0
    for index in reversed(range(calls)):
        for kind, lag, coefficient in sampling.terms[index]:
            if kind in (SAMPLE, OUTPUT):
                (samples if kind == SAMPLE else outputs)[index - lag] += samples[index + 1] * coefficient
    return np.abs(outputs)


def distances(differences: Sequence[Tensor]) -> np.ndarray:
    """Mean ||d_i - d_j|| [K, K] over images, of differences d [N, C, H, W] at K steps."""
    rows = [
        [float((a - b).flatten(1).double().norm(dim=1).mean()) for b in differences]
        for a in differences  # K^2 passes over K tensors: small beside one call of the network
    ]
    return np.array(rows)


def refreshes(costs: np.ndarray, full: int, earliest: Sequence[int] | None = None) -> list[int]:
    """The steps 0 = r_1 < r_2 < ... at which the difference is computed, at most `full`, of least cost.

    costs[j, i] is that of step i with the difference of step j; the sum over all other steps is minimal, by dynamic
    programming over the last refresh. Step k may follow refresh j only if `earliest[k]` <= j.
    """
    steps = len(costs)
    if full < 1:
        raise DiffpressError("reuse needs at least one step that computes both halves of guidance")
    inside = np.cumsum(np.triu(costs, 1), axis=1)  # [j, i]: steps j + 1 to i with the difference of j
    best = inside[:, -1].copy()  # with refresh j the last one
    following: list[np.ndarray] = []
    for _ in range(full - 1):
        value, choice = inside[:, -1].copy(), np.full(steps, -1)
        for j in range(steps):
            for k in range(j + 1, steps):
                total = inside[j, k - 1] + best[k]
                if total < value[j] and (earliest is None or earliest[k] <= j):
                    value[j], choice[j] = total, k
        best = value
        following.append(choice)
    path = [0]
    for choice in reversed(following):
        after = int(choice[path[-1]])
        if after < 0:
            break
        path.append(after)
    return path


def earliest_refresh(program: StepProgram) -> list[int]:
    """For each step the last one that wrote a feature it reads, 0 where there is none: no step between that one and a
    full step that reads may leave a half out. (A value before the last was written earlier, which asks for less.)
    """
    written: dict[str, int] = {}
    found = []
    for index, name in enumerate(program.steps):
        variant = program.variants[name]
        found.append(max((written[feature] for feature in variant.features), default=0))
        written.update(dict.fromkeys(variant.writes, index))
    return found


def neighbours(full: Sequence[int], steps: int) -> list[list[int]]:
    """The plans that differ from `full` in one refresh, moved by one step; the first stays."""
    moved = []
    for place, index in enumerate(full[1:], 1):
        for to in (index - 1, index + 1):
            if 0 < to < steps and to not in full:
                moved.append([*full[:place], to, *full[place + 1 :]])
    return moved
