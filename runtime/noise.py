"""torch.randn without torch: the same normal noise from the same seed, so pictures compare seed by seed."""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Sequence

import numpy as np

from diffpress.errors import DiffpressError

BLOCK = 16  # torch transforms uniforms in blocks of 16: 8 radii, then 8 angles


class Generator:
    """Draws as `torch.Generator().manual_seed(seed)` does on a CPU: one after the other, each where the last ended."""

    def __init__(self, seed: int) -> None:
        self._words = _mersenne_twister(seed)
        self._spare: deque[float] = deque()  # what a draw of few numbers made and did not need

    def randn(self, shape: Sequence[int]) -> np.ndarray:
        """Normal noise, float32, equal to `torch.randn(shape, generator=...)` to 2e-6.

        Follows aten/src/ATen/native/cpu/DistributionTemplates.h: `normal_fill` from 16 values on (Box-Muller in float32
        on 24-bit uniforms), below that one by one in double.
        """
        size = math.prod(shape)
        values = _few(self._words, size, self._spare) if size < BLOCK else _many(self._words, size)
        return values.reshape(tuple(shape))


def randn(seed: int, shape: Sequence[int]) -> np.ndarray:
    """The first noise [*shape] of a seed, which may be negative, as in torch, and has up to 64 bits."""
    return Generator(seed).randn(shape)


def _mersenne_twister(seed: int) -> np.random.RandomState:
    try:
        number = operator.index(seed)
    except TypeError as error:
        raise DiffpressError(f"seed {seed!r} is not a whole number") from error
    if not -(2**63) <= number < 2**64:
        raise DiffpressError(f"seed {number} has more than 64 bits: choose a smaller one")
    # torch accepts 64 bits and hands the lower 32 to its mt19937, whose start is numpy's legacy one.
    return np.random.RandomState(number % 2**32)


def _words(twister: np.random.RandomState, count: int) -> np.ndarray:
    return twister.randint(0, 2**32, count, dtype=np.uint32)  # the full range: the generator's own words


def _many(twister: np.random.RandomState, size: int) -> np.ndarray:
    """`normal_fill`: whole blocks, and a ragged end is drawn again as the last 16 values."""

    def block_uniforms(count: int) -> np.ndarray:
        return (_words(twister, count) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    uniforms = block_uniforms(size)
    whole = size - size % BLOCK
    values = np.empty(size, np.float32)
    values[:whole] = _box_muller(uniforms[:whole])
    if whole < size:
        values[-BLOCK:] = _box_muller(block_uniforms(BLOCK))
    return values


def _box_muller(uniforms: np.ndarray) -> np.ndarray:
    pairs = uniforms.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - pairs[:, 0]))
    angle = np.float32(2 * math.pi) * pairs[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


def _few(twister: np.random.RandomState, size: int, spare: deque[float]) -> np.ndarray:
    """`normal_distribution<double>`: 53-bit uniforms, two values from each pair; the second may wait in `spare`."""
    count = (size - len(spare) + 1) // 2 if size > len(spare) else 0
    words = _words(twister, 4 * count).astype(np.uint64).reshape(count, 2, 2)
    bits = (words[..., 0] << np.uint64(32) | words[..., 1]) & np.uint64(2**53 - 1)
    uniforms = bits.astype(np.float64) * 2.0**-53
    angle, radius = 2 * math.pi * uniforms[:, 0], np.sqrt(-2 * np.log1p(-uniforms[:, 1]))
    spare.extend(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1).tolist())
    return np.array([spare.popleft() for _ in range(size)], np.float32)
