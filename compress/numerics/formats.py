"""Number formats and rounding to their grids. Symmetric everywhere: zero is zero, as the deployment targets demand.

A value x becomes scale * grid(x / scale), where the grid of a format is its integers or its floats at unit scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffpress.errors import DiffpressError


@dataclass(frozen=True)
class Format:
    """A grid of numbers: integers (`exponent` 0) or floats with `exponent` and `mantissa` bits and a sign.

    `smallest` and `largest` are the ends of the grid at unit scale. `deploys` says whether a target computes with it or
    stores it; the others only simulate.
    """

    name: str
    bits: int
    smallest: float
    largest: float
    exponent: int = 0
    mantissa: int = 0
    deploys: bool = True

    @property
    def is_float(self) -> bool:
        """Whether it has an exponent."""
        return self.exponent > 0


def _integer(bits: int, deploys: bool) -> Format:
    half = 1 << (bits - 1)
    return Format(f"int{bits}", bits, -half, half - 1, deploys=deploys)


def _float(exponent: int, mantissa: int, deploys: bool, largest: float | None = None) -> Format:
    """Every code is a number (no infinities), as in low-bitwidth floating point (Chen et al. 2024, Section 3.1)."""
    top = 2.0 ** (2**exponent - 1 - _bias(exponent)) * (2 - 2.0**-mantissa)
    top = top if largest is None else largest
    return Format(f"e{exponent}m{mantissa}", 1 + exponent + mantissa, -top, top, exponent, mantissa, deploys)


def _bias(exponent: int) -> int:
    return 2 ** (exponent - 1) - 1


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        _integer(8, True),
        _integer(6, False),
        _integer(4, True),
        _float(4, 3, True, largest=448.0),  # E4M3FN: its highest code is NaN
        _float(5, 2, False),
        _float(3, 4, False),
        _float(2, 5, False),
        _float(2, 1, True),  # FP4 of Blackwell
        _float(1, 2, False),
        _float(3, 0, False),
    )
}


def get(name: str) -> Format:
    """The format of that name; raises `DiffpressError` naming those there are."""
    if name not in FORMATS:
        raise DiffpressError(f"there is no number format '{name}', choose from: {', '.join(FORMATS)}")
    return FORMATS[name]


def to_grid(units: Tensor, format: Format) -> Tensor:
    """The nearest numbers of the grid to `units` (any shape); halves go to even, ends clip."""
    clipped = units.clamp(format.smallest, format.largest)
    if not format.is_float:
        return clipped.round()
    # Within one power of two a float grid is uniform; below the smallest normal number it stays so.
    power = torch.frexp(clipped)[1] - 1 + _bias(format.exponent)
    step = torch.exp2((power.clamp_min(1) - format.mantissa - _bias(format.exponent)).to(units.dtype))
    return (clipped / step).round() * step


def spread(scale: Tensor | float, x: Tensor) -> Tensor | float:
    """`scale` shaped to multiply x: one number; [out] along the first axis; or [out, blocks] of x's second axis."""
    if not isinstance(scale, Tensor) or scale.ndim == 0:
        return scale
    if scale.ndim == 1:
        return scale.reshape(-1, *[1] * (x.ndim - 1))
    width = x.shape[1] // scale.shape[1]
    if width * scale.shape[1] != x.shape[1]:
        raise DiffpressError(f"{scale.shape[1]} blocks do not divide {x.shape[1]} input channels")
    return scale.repeat_interleave(width, dim=1).reshape(*x.shape[:2], *[1] * (x.ndim - 2))


def quantize(x: Tensor, scale: Tensor | float, format: Format) -> Tensor:
    """x in units of its scale, on the grid."""
    return to_grid(x / spread(scale, x), format)


def fake_quant(x: Tensor, scale: Tensor | float, format: Format) -> Tensor:
    """x after a trip to the grid and back, same shape."""
    factor = spread(scale, x)
    return to_grid(x / factor, format) * factor
