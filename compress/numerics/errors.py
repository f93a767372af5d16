"""How far results are from those they stand for."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

TINY = 1e-30  # a sum of squares below it counts as this much: what should be zero everywhere is no division by zero


def relative_l2(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """||got - wanted|| / ||wanted|| over all (got, wanted) of equal shapes, of which one pair is held at a time.

    Sums are of doubles; differences are taken in the type that is given. Not finite where values are not.
    """
    away = total = 0.0
    for got, wanted in pairs:
        away += float((got - wanted).double().square().sum())
        total += float(wanted.double().square().sum())
    return math.sqrt(away / max(total, TINY))
