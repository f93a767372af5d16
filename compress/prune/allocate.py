"""How much of each part of a network goes, so that a budget is met at the least error: knapsack along convex hulls.

Errors of different parts are taken as independent, so their squares add up. Of each part the steps on the lower convex
hull of (saved, squared error) are candidates; taking always the one that costs least for what it saves is optimal but
for the last step, which saves more than was asked (Fox 1966, "Discrete optimization via marginal analysis").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from diffpress.errors import DiffpressError

SLACK = 1e-9  # of the budget: sums of floats


@dataclass(frozen=True)
class Choice:
    """What can be done to a part: `removed` of its pieces go, which saves `saved` and makes the squared `error`."""

    removed: int
    saved: float
    error: float


def allocate(choices: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, Choice]:
    """A choice for each part that together save at least `budget`, at the least sum of errors.

    The choices of a part are in order of what they save and begin with one that removes nothing. Raises
    `DiffpressError` when all together save less.
    """
    _check(choices, budget)
    chosen = {name: options[0] for name, options in choices.items()}
    steps = []
    for name, options in choices.items():
        hull = _hull(options)
        for order, (a, b) in enumerate(pairwise(hull)):
            steps.append(((b.error - a.error) / (b.saved - a.saved), name, order, b))
    saved = 0.0
    for _, name, _, step in sorted(steps, key=lambda step: step[:3]):  # along a hull the price rises: its order is kept
        if saved >= budget * (1 - SLACK):
            break
        if step.saved <= chosen[name].saved:  # equal prices may come out of order by rounding
            continue
        saved += step.saved - chosen[name].saved
        chosen[name] = step
    return chosen


def uniform(choices: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, Choice]:
    """The same share of what may go of each part, the least that meets `budget`; raises as `allocate` does."""
    _check(choices, budget)
    shares = sorted({choice.removed / options[-1].removed for options in choices.values() for choice in options[1:]})
    for share in shares:
        chosen = {
            name: min(options, key=lambda choice: (abs(choice.removed - share * options[-1].removed), -choice.removed))
            for name, options in choices.items()
        }
        if sum(choice.saved for choice in chosen.values()) >= budget * (1 - SLACK):
            break
    return chosen


class TooMuch(DiffpressError):
    """More is asked for than all parts together have."""


def _check(choices: Mapping[str, Sequence[Choice]], budget: float) -> None:
    most = sum(options[-1].saved for options in choices.values())
    if budget > most * (1 + SLACK):
        raise TooMuch(f"at most {most:.4g} can be saved of the {budget:.4g} that are asked for")


def _hull(options: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull, without those that save nothing more."""
    hull: list[Choice] = []
    for point in options:
        if not math.isfinite(point.error) or (hull and point.saved <= hull[-1].saved):
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(a: Choice, b: Choice, c: Choice) -> bool:
    """Whether b lies above the line from a to c; on it, it is a smaller step of the same price."""
    return (b.error - a.error) * (c.saved - a.saved) > (1 + SLACK) * (c.error - a.error) * (b.saved - a.saved)
