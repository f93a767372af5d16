"""From what every step may take to a program of few graphs: steps share a variant that takes no more than each may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from diffpress.compress.cache.program import MOST_VARIANTS, program_of
from diffpress.compress.families.unet_graph import UNetGraph
from diffpress.compress.work import Work
from diffpress.plan import FULL, StepProgram

EXACT = 20_000  # choices of all variants but one, up to which all are tried
CANDIDATES = 256  # sets that are tried as variants where there are more
Taken = frozenset[str]


def clustered(
    sets: Sequence[Taken], weights: Mapping[str, float], most: int = MOST_VARIANTS - 1, rows: Sequence[float] = ()
) -> list[Taken]:
    """For each step the set it takes: a subset of its own in `sets`, of at most `most` different ones beside the empty.

    What is kept, the sum of `weights` of what steps take, times `rows` of the step (1 if absent), is as large as it can
    be where that can be found by trying all; else it is found by greedy choice (at least 1 - 1/e of the largest among
    the candidates: the gain is submodular) and exchanges. A variant that no step needs is left out.
    """
    factors = np.asarray(rows if len(rows) else np.ones(len(sets)), dtype=float)
    distinct = sorted({taken for taken in sets if taken}, key=sorted)
    steps = np.array([sum(factors[i] for i, own in enumerate(sets) if own == taken) for taken in distinct])
    candidates = _intersections(distinct, CANDIDATES)
    # What each candidate keeps at the steps of each set; its intersection with others is another candidate.
    gains = np.array(
        [
            [
                _weight(one, weights) * count if one <= taken else 0.0
                for taken, count in zip(distinct, steps, strict=True)
            ]
            for one in candidates
        ]
    ).reshape(len(candidates), len(distinct))
    chosen = [candidates[index] for index in _best(gains, most)]
    return [_heaviest([one for one in chosen if one <= taken], weights) for taken in sets]


def _weight(taken: Taken, weights: Mapping[str, float]) -> float:
    return sum(weights[name] for name in sorted(taken))


def _heaviest(fitting: Sequence[Taken], weights: Mapping[str, float]) -> Taken:
    return max(fitting, key=lambda taken: _weight(taken, weights), default=frozenset())


def _intersections(sets: Sequence[Taken], limit: int) -> list[Taken]:
    """All intersections of some of `sets` but the empty one, or, where there are more than `limit`, the sets, those
    of two, and of as many more: the best variant of a group of steps is the intersection of what they may take.
    """
    found = dict.fromkeys(sets)
    newest = list(sets)
    while newest and len(found) <= limit:
        made = dict.fromkeys(one & other for one in newest for other in sets)
        newest = [taken for taken in made if taken and taken not in found]
        found |= dict.fromkeys(newest)
    return list(found)


def _best(gains: np.ndarray, most: int) -> list[int]:
    """At most `most` rows of gains [candidates, sets] with the largest sum of column maxima, none of them idle."""
    count = len(gains)
    tries = 1
    for left in range(min(most, count) - 1):
        tries = tries * (count - left) // (left + 1)
    chosen = _all_tried(gains, min(most, count)) if tries <= EXACT and most < 5 else _greedy(gains, most)
    for index in list(chosen):
        others = [one for one in chosen if one != index]
        if _sum(gains, others) == _sum(gains, chosen):
            chosen = others
    return chosen


def _sum(gains: np.ndarray, chosen: Sequence[int]) -> float:
    return float(gains[list(chosen)].max(axis=0, initial=0.0).sum())


def _all_tried(gains: np.ndarray, most: int) -> list[int]:
    best: tuple[float, list[int]] = (0.0, [])

    def extend(chosen: list[int], covered: np.ndarray) -> None:
        nonlocal best
        totals = np.maximum(gains, covered).sum(axis=1)
        if len(chosen) + 1 == most:
            index = int(totals.argmax())
            if totals[index] > best[0]:
                best = (float(totals[index]), [*chosen, index])
            return
        for index in range(chosen[-1] + 1 if chosen else 0, len(gains)):
            extend([*chosen, index], np.maximum(covered, gains[index]))

    if most > 0:
        extend([], np.zeros(gains.shape[1]))
    return list(dict.fromkeys(best[1]))


def _greedy(gains: np.ndarray, most: int) -> list[int]:
    """One candidate after the other, then exchanges of one while they gain."""
    chosen: list[int] = []

    def improved(without: list[int]) -> list[int]:
        covered = gains[without].max(axis=0, initial=0.0)
        return [*without, int(np.maximum(gains, covered).sum(axis=1).argmax())]

    while len(chosen) < most:
        chosen = improved(chosen)
    better = True
    while better:
        better = False
        for index in chosen:
            other = improved([one for one in chosen if one != index])
            if _sum(gains, other) > _sum(gains, chosen) * (1 + 1e-12):
                chosen, better = other, True
                break
    return list(dict.fromkeys(chosen))


def program_from(work: Work, sets: Sequence[Taken], weights: Mapping[str, float]) -> tuple[StepProgram, float]:
    """The step program of clustered `sets`, and the share of their weight that it keeps (1 where none has any).

    A step of both halves of guidance that would read what one half wrote computes it instead.
    """
    guided = [work.program.guided(index) == FULL for index in range(len(sets))]
    rows = [1.0 if both else 0.5 for both in guided]
    allowed, taken = list(sets), clustered(sets, weights, rows=rows)
    while (fitting := _readable(work.denoiser, taken, guided)) != taken:
        # What has to go may be what made the best groups: group again without it. Sets only shrink, so this ends.
        allowed = [own - (was - now) for own, was, now in zip(allowed, taken, fitting, strict=True)]
        taken = clustered(allowed, weights, rows=rows)
    planned, kept = (
        sum(row * _weight(one, weights) for row, one in zip(rows, steps, strict=True)) for steps in (sets, taken)
    )
    return program_of(work.denoiser, taken, work.program.guidance), kept / planned if planned else 1.0


def _readable(unet: Any, sets: Sequence[Taken], guided: Sequence[bool]) -> list[Taken]:
    """The sets without what was written for the conditional half alone where both halves are computed."""

    @cache
    def written(taken: Taken) -> tuple[str, ...]:
        graph = UNetGraph(unet, tuple(sorted(taken)))
        return tuple(name for name in wanted if graph.computes(name))

    wanted = sorted({name for taken in sets for name in taken})
    last: dict[str, bool] = {}  # whether the last value of a feature is of both halves
    found = []
    for taken, both in zip(sets, guided, strict=True):
        kept = frozenset(name for name in taken if last.get(name, True) or not both)
        last |= dict.fromkeys(written(kept), both)
        found.append(kept)
    return found
