"""How much has to go for a call of the denoiser to be so much faster here: measured, on the fastest runtime."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from diffpress.compress.prune import structure
from diffpress.compress.prune.allocate import TooMuch
from diffpress.compress.prune.structure import NormGroups, Structure
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, StepProgram

PROBES = 5  # halvings of the interval in which the share lies: each exports and times a network
MOST = 0.9  # of the parameters: nobody asks for a speed that takes more


def counts(
    work: Work, ratio: float, spread: Callable[[float], Mapping[str, int]], norm_groups: NormGroups
) -> dict[str, int]:
    """Parts that leave each structure so that a call takes at most 1 - `ratio` of its time; the fewest that do.

    `spread` gives them for a share of the parameters. Which parts they are makes no difference to the time, so the
    first stay here. Raises `DiffpressError` where nothing that can be cut is enough.
    """
    low, high = 0.0, MOST
    found: dict[str, int] | None = None
    for probe in range(PROBES):
        share = min(high, ratio) if probe == 0 else (low + high) / 2
        try:
            candidate = dict(spread(share))
        except TooMuch:  # there is not so much to cut
            high = share
            continue
        if _speed(work, candidate, norm_groups) <= 1 - ratio:
            found, high = candidate, share
        else:
            low = share
    if found is None:
        raise DiffpressError(
            f"no cut that was tried makes a call take {1 - ratio:.0%} of its time here: lower the ratio, or take "
            "budget: flops"
        )
    return found


def _speed(work: Work, removed: Mapping[str, int], norm_groups: NormGroups) -> float:
    """The time of a call with these parts removed, in terms of that with all, one measured after the other."""
    whole: Any = work.pipeline.unet
    cut = copy.deepcopy(whole)
    known = structure.structures(cut, norm_groups=norm_groups)
    structure.cut(cut, {path: _first(known[path], count) for path, count in removed.items() if count}, norm_groups)
    try:
        before = _milliseconds(work)
        work.pipeline.unet = cut
        return _milliseconds(work) / before
    finally:
        work.pipeline.unet = whole


def _first(one: Structure, removed: int) -> list[int]:
    """The first parts of every block, without `removed` of all."""
    each, gone = one.count // one.blocks, removed // one.blocks
    return [part for part in range(one.count) if part % each < each - gone]


def _milliseconds(work: Work) -> float:
    assert work.latency is not None
    return work.latency(StepProgram((FULL,) * len(work.sampling.timesteps)), None)[FULL]
