"""Where to clip: the scale of a weight or of a histogram of activations, by several criteria.

`max` never clips; `percentile` cuts 0.01 % off; `mse` and `l2.4` minimise mean |x - Q(x)|^p while the range shrinks by
hundredths (Shang et al. 2023, PTQ4DM, Section 3.3; p = 2.4 as in its code and in Q-Diffusion's); `entropy` keeps the
distribution nearest in Kullback-Leibler divergence (Migacz 2017, 8-bit inference with TensorRT).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffpress.compress.numerics.formats import FORMATS, Format, fake_quant
from diffpress.errors import DiffpressError

CANDIDATES = 80  # ranges tried by the search, each a hundredth of amax smaller
CHUNK = 1 << 16  # numbers searched at once: they stay in the processor's cache
PERCENTILE = 0.9999
BOUND = 0.999  # leaves room for rounding in what is a bound
POWERS = {"mse": 2.0, "l2.4": 2.4}
WEIGHT_RANGES = ("max", "mse", "l2.4")
FLOATS = {8: ("e4m3", "e5m2", "e3m4", "e2m5"), 4: ("e2m1", "e1m2", "e3m0")}
FLOAT_CANDIDATES = 111
INPUT_RANGES = ("max", "percentile", "mse", "l2.4", "entropy")


def weight_scale(weight: Tensor, format: Format, method: str = "l2.4", block: int | None = None) -> Tensor:
    """Scales [out] of a weight [out, in, ...], or [out, in / block] for blocks of input channels.

    A channel or block of zeros gets scale 1. Raises `DiffpressError` for values that are not finite.
    """
    rows = weight.detach().float()
    if not bool(rows.isfinite().all()):
        raise DiffpressError("its weight holds values that are not finite")
    if block is None:
        rows = rows.reshape(len(rows), 1, -1)
    else:
        if rows.shape[1] % block:
            raise DiffpressError(f"blocks of {block} do not divide {rows.shape[1]} input channels")
        rows = rows.reshape(len(rows), rows.shape[1] // block, -1)
    amax = rows.abs().amax(dim=2)
    full = torch.where(amax > 0, amax / format.largest, 1.0)
    if method == "max":
        return full[:, 0] if block is None else full
    flat, ends = rows.flatten(0, 1), full.flatten()
    at_once = max(1, CHUNK // flat.shape[1])
    parts = zip(flat.split(at_once), ends.split(at_once), strict=True)
    best = torch.cat([_shrunk(part, end, format, POWERS[method]) for part, end in parts])
    return best if block is None else best.reshape(full.shape)


def _shrunk(rows: Tensor, full: Tensor, format: Format, power: float) -> Tensor:
    """Of the scales [R] from `full` down, those with the least mean |x - Q(x)|^power of each row [R, N].

    The search ends where clipping a row's largest number alone costs more than the best scale in all: 8 bits need a
    tenth of the candidates.
    """
    best, best_error = full, torch.full_like(full, torch.inf)
    reach = max(format.largest, -format.smallest)
    for index in range(CANDIDATES):
        scale = full * (1 - 0.01 * index)
        clipped = BOUND * (full * format.largest - scale * reach)
        if bool((clipped.clamp_min(0).pow(power) / rows.shape[1] > best_error).all()):
            break
        error = (rows - fake_quant(rows, scale, format)).abs().pow(power).mean(dim=1)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def input_scale(counts: Tensor, centres: Tensor, amax: float, format: Format, method: str = "l2.4") -> float:
    """One scale for values whose magnitudes are a histogram (counts and bin centres, both [B]) with maximum `amax`.

    Inputs that were always zero get scale 1.
    """
    if amax == 0.0:
        return 1.0
    if method == "max":
        return amax / format.largest
    if method == "percentile":
        shares = counts.cumsum(0) / counts.sum()
        place = int(torch.searchsorted(shares, torch.tensor(PERCENTILE, dtype=shares.dtype)))
        return min(amax, float(centres[min(place, len(centres) - 1)])) / format.largest
    scales = torch.tensor([amax / format.largest * (1 - 0.01 * index) for index in range(CANDIDATES)]).double()
    used = counts > 0
    values, weights = centres[used].double(), counts[used].double()
    grid = fake_quant(values[None].expand(CANDIDATES, -1), scales, format)
    if method == "entropy":
        losses = torch.tensor([_divergence(weights, values, row) for row in grid])
    else:
        losses = (values - grid).abs().pow(POWERS[method]) @ weights
    return float(scales[losses.argmin()])


def _divergence(weights: Tensor, values: Tensor, rounded: Tensor) -> float:
    """KL(P || Q): P the histogram with what was clipped put at the end, Q the same mass spread evenly on each level."""
    levels, member = rounded.unique(return_inverse=True)
    end = values <= rounded.max() if len(levels) > 1 else torch.ones_like(values, dtype=torch.bool)
    inside = weights * end
    mass = torch.zeros(len(levels), dtype=weights.dtype).index_add(0, member, inside)
    width = torch.zeros(len(levels), dtype=weights.dtype).index_add(0, member, end.to(weights.dtype))
    q = torch.where(end, (mass / width.clamp_min(1))[member], 0.0)
    p = inside.clone()
    p[int(end.nonzero().max())] += (weights * ~end).sum()
    p, q = p / p.sum(), q / q.sum()
    some = p > 0
    return float((p[some] * (p[some] / q[some].clamp_min(1e-12)).log()).sum())


def search_float_weight(weight: Tensor, bits: int) -> tuple[str, Tensor]:
    """The float format of `bits` and scales [out] with the least squared error, of 111 ranges from 0.1 to 1.2 max|w|.

    Chen et al. 2024 (low-bitwidth floating point quantization for diffusion models, Section 3.2); ranges per output
    channel rather than per tensor.
    """
    rows = weight.detach().float().reshape(len(weight), -1)
    amax = rows.abs().amax(dim=1)
    best: tuple[str, Tensor, float] = ("", amax, math.inf)
    for name in FLOATS[bits]:
        format = FORMATS[name]
        full = torch.where(amax > 0, amax / format.largest, 1.0)
        scales, errors = full, torch.full_like(full, torch.inf)
        for index in range(FLOAT_CANDIDATES):
            scale = full * (0.1 + 0.01 * index)
            error = (rows - fake_quant(rows, scale, format)).square().sum(dim=1)
            scales, errors = torch.where(error < errors, scale, scales), torch.minimum(error, errors)
        if float(errors.sum()) < best[2]:
            best = (name, scales, float(errors.sum()))
    return best[:2]


def search_float_input(counts: Tensor, centres: Tensor, amax: float, bits: int) -> tuple[str, float]:
    """The same for a histogram: one format and one scale. Inputs that were always zero get scale 1."""
    if amax == 0.0:
        return FLOATS[bits][0], 1.0
    used = counts > 0
    values, weights = centres[used].double(), counts[used].double()
    best = ("", 1.0, math.inf)
    for name in FLOATS[bits]:
        format = FORMATS[name]
        scales = torch.tensor([amax / format.largest * (0.1 + 0.01 * i) for i in range(FLOAT_CANDIDATES)]).double()
        grid = fake_quant(values[None].expand(len(scales), -1), scales, format)
        losses = (values - grid).square() @ weights
        if float(losses.min()) < best[2]:
            best = (name, float(scales[losses.argmin()]), float(losses.min()))
    return best[:2]


def block_of(width: int, block: int) -> int:
    """The block used for `width` input channels: `block`, or the largest power of two below it that divides."""
    while block > 1 and width % block:
        block //= 2
    return block


def grouped(timesteps: Sequence[float], groups: int) -> list[int]:
    """The group of each step of a schedule, in order and of nearly equal size: 5 steps in 2 groups are 0 0 0 1 1.

    Steps at one timestep, which PNDM has, are in one group: nothing tells the denoiser's calls there apart.
    """
    distinct = list(dict.fromkeys(timesteps))
    groups = min(groups, len(distinct))
    return [distinct.index(timestep) * groups // len(distinct) for timestep in timesteps]


def per_step(scales: Sequence[float], membership: Sequence[int]) -> list[float]:
    """A scale per step from a scale per group."""
    return [scales[group] for group in membership]
