"""AdaRound and step-size learning as arithmetic: where each weight may go, and gradients through rounding.

AdaRound (Nagel et al. 2020, Up or Down?, Section 3.2): every weight stays between the two grid points around it, and h
in [0, 1] says how far up. h is learned softly and ends at 0 or 1. On a float grid the distance of the two points is
that of the element's exponent, held fixed (Chen et al. 2024, low-bitwidth floating point).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffpress.compress.numerics.formats import Format, get, spread, to_grid
from diffpress.plan import LayerQuant

ZETA, GAMMA = 1.1, -0.1  # the stretch of the sigmoid, so that h reaches 0 and 1 at finite a
WARM_UP = 0.2  # share of the iterations without regularizer
SHARPEST, SOFTEST = 20.0, 2.0  # its exponent b at the start and at the end


def rectified_sigmoid(a: Tensor) -> Tensor:
    """h(a) = clip(1.2 sigmoid(a) - 0.1, 0, 1), any shape (Louizos et al. 2018; AdaRound, equation 23)."""
    return (torch.sigmoid(a) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def step_of(units: Tensor, format: Format) -> Tensor | float:
    """The distance of the grid's points around each element of `units` (in units of their scale)."""
    if not format.is_float:
        return 1.0
    bias = 2 ** (format.exponent - 1) - 1
    power = torch.frexp(units.clamp(format.smallest, format.largest))[1] - 1  # floor(log2 |x|), of zero -1
    power = power.masked_fill(units == 0, 1 - bias).clamp_min(1 - bias)
    return torch.exp2((power - format.mantissa).to(units.dtype))


@dataclass(frozen=True)
class Cells:
    """Between which grid points the elements of a weight [out, in, ...] lie: `lower` and `lower + step`.

    Both in units of `scale`; `fraction` is how far up the element is. The weight is (point * scale) * multiplier.
    """

    lower: Tensor
    step: Tensor | float
    fraction: Tensor  # in [0, 1)
    scale: Tensor | float
    multiplier: Tensor | float
    format: Format

    def place(self, h: Tensor) -> Tensor:
        """The weight with every element `h` of the way up its cell; the ends of the grid clip."""
        points = (self.lower + self.step * h).clamp(self.format.smallest, self.format.largest)
        # In this order the products are those of `rounded_weight`, to the last bit.
        return points * self.scale * self.multiplier


def cells(weight: Tensor, layer: LayerQuant) -> Cells:
    """The cells of a weight [out, in, ...] on the grid that `layer` gives it."""
    format = get(layer.weight_format)
    multiplier: Tensor | float = 1.0
    if layer.multiplier is not None:
        multiplier = torch.from_numpy(layer.multiplier).to(weight).reshape(1, -1, *[1] * (weight.ndim - 2))
    scale = spread(torch.from_numpy(layer.weight_scale).to(weight), weight)
    units = weight / multiplier / scale
    step = step_of(units, format)
    index = (units / step).floor()
    fraction = units / step - index
    # Zeros stay zeros: pruning may have made them.
    return Cells(index * step, torch.where(weight == 0, 0.0, step), fraction, scale, multiplier, format)


def initial(cells: Cells) -> Tensor:
    """The a at which h is the fractional part: learning starts at the weight, and `hard` rounds to nearest."""
    return torch.logit((cells.fraction - GAMMA) / (ZETA - GAMMA))


def soft(cells: Cells, a: Tensor) -> Tensor:
    """The weight while it is learned: s clip(floor(W / s) + h(a)) (AdaRound, equation 22)."""
    return cells.place(rectified_sigmoid(a))


def hard(cells: Cells, a: Tensor) -> Tensor:
    """The weight in the end, exactly on the grid: up where a >= 0."""
    return cells.place((a >= 0).to(cells.lower))


def regularizer(a: Tensor, b: float) -> Tensor:
    """Sum of 1 - |2 h(a) - 1|^b: zero once every h is 0 or 1 (AdaRound, equation 24)."""
    return (1 - (2 * rectified_sigmoid(a) - 1).abs().pow(b)).sum()


def annealed(iteration: int, iterations: int) -> float | None:
    """The regularizer's b at `iteration`: None in the first fifth, then 20 down to 2, linearly."""
    warm = WARM_UP * iterations
    if iteration < warm:
        return None
    done = (iteration - warm) / max(1.0, iterations - 1 - warm)
    return SHARPEST + (SOFTEST - SHARPEST) * min(1.0, done)


def lsq(x: Tensor, scale: Tensor | float, format: Format) -> Tensor:
    """x [N, ...] on the grid and back, with gradients; `scale` is one number or [N].

    Rounding is straight-through: dx is 1 inside the grid's range and 0 outside; dscale is grid(x / s) - x / s inside
    and the end of the grid outside (Esser et al. 2020, Learned Step Size Quantization, Section 2.1).
    """
    factor = spread(scale, x)
    units = x / factor
    inside = units.clamp(format.smallest, format.largest)  # carries the gradient, the grid carries the value
    return (inside + (to_grid(units, format) - inside).detach()) * factor
