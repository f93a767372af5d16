"""Symmetric signed integer quantization: x_q = clip(round(x / s), -2^(b-1), 2^(b-1) - 1), zero point 0."""

from __future__ import annotations

import torch
from torch import Tensor

CANDIDATES = 80  # ranges tried by the search, each a hundredth of amax smaller


def bounds(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of a signed `bits`-bit number."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def quantize(x: Tensor, scale: Tensor | float, bits: int = 8, axis: int | None = None) -> Tensor:
    """Integers (as float) of x; `scale` is one number, or [x.shape[axis]] along `axis`. Rounds half to even."""
    low, high = bounds(bits)
    return torch.clamp(torch.round(x / _along(scale, x, axis)), low, high)


def fake_quant(x: Tensor, scale: Tensor | float, bits: int = 8, axis: int | None = None) -> Tensor:
    """x after a trip through integers and back, same shape."""
    return quantize(x, scale, bits, axis) * _along(scale, x, axis)


def _along(scale: Tensor | float, x: Tensor, axis: int | None) -> Tensor | float:
    if axis is None or not isinstance(scale, Tensor):
        return scale
    return scale.reshape([-1 if dim == axis else 1 for dim in range(x.ndim)])


def scale_of(amax: Tensor | float, bits: int = 8) -> Tensor | float:
    """The scale whose largest integer is amax."""
    return amax / bounds(bits)[1]


def search_weight_scale(weight: Tensor, bits: int = 8, power: float = 2.4) -> Tensor:
    """Scale per output channel [O] of a weight [O, ...] that minimises mean |w - Q(w)|^power.

    Of the ranges amax * (1 - 0.01 i), i = 0..79 (Shang et al. 2023, PTQ4DM, Section 3.3; L2.4 as in its code).
    A channel of zeros gets scale 1.
    """
    rows = weight.detach().reshape(weight.shape[0], -1).float()
    amax = rows.abs().amax(dim=1)
    full = torch.where(amax > 0, scale_of(amax, bits), torch.ones_like(amax))
    best, best_error = full, torch.full_like(full, torch.inf)
    for index in range(CANDIDATES):
        scale = full * (1 - 0.01 * index)
        error = (rows - fake_quant(rows, scale, bits, axis=0)).abs().pow(power).mean(dim=1)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def search_input_scale(counts: Tensor, centres: Tensor, amax: float, bits: int = 8, power: float = 2.4) -> float:
    """One scale for values whose magnitudes are a histogram (counts and bin centres, both [B]); same search.

    Inputs that were always zero get scale 1.
    """
    if amax == 0.0:
        return 1.0
    used = counts > 0
    counts, centres = counts[used], centres[used]
    scales = torch.tensor([float(scale_of(amax * (1 - 0.01 * index), bits)) for index in range(CANDIDATES)])
    values = centres[None].expand(CANDIDATES, -1).double()
    errors = (values - fake_quant(values, scales.double(), bits, axis=0)).abs().pow(power) @ counts.double()
    return float(scales[errors.argmin()])
