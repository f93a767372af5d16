"""Asks a diffusers scheduler for its coefficients: unit vectors in, coefficients out, noise among them.

Each call is fed a fresh unit vector as its sample and another as its output, whatever the call before returned; where
it draws noise it is given a third. A linear scheduler answers with the coefficients themselves.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffpress.errors import DiffpressError
from diffpress.plan import FRESH, OUTPUT, SAMPLE, Row, Sampling

PARTS = (SAMPLE, OUTPUT, FRESH)  # of the basis at each call
SAME = 1e-9  # by how much of a row's largest coefficient one may differ and count as the same
CANNOT = (ValueError, IndexError, AssertionError)  # what diffusers raises for steps that a scheduler cannot make


class ManyDraws(Exception):
    """The scheduler draws noise more than once at a call."""


def rows(placed: Any, eta: float, first: int = 0) -> Iterator[tuple[Row, float]]:
    """The terms of every call and the scale of its input, for sampling that begins at call `first`.

    `placed` is a scheduler that stands before its first step; it is used up. Raises `ManyDraws`, and what diffusers
    does where the scheduler cannot begin there.
    """
    timesteps = placed.timesteps[first:]
    if first and hasattr(placed, "set_begin_index"):  # as diffusers' image-to-image does; the others go by timesteps
        placed.set_begin_index(first)
    basis = torch.eye(len(PARTS) * len(timesteps), dtype=torch.float64)
    step = stepping(placed, eta)
    for index, timestep in enumerate(timesteps):
        scale = float(placed.scale_model_input(torch.ones(1, dtype=torch.float64), timestep))
        # diffusers' steps want a batch and channels; the basis lies along the last axis.
        sample, output, fresh = (basis[len(PARTS) * index + part].reshape(1, 1, 1, -1) for part in range(len(PARTS)))
        with drawing(placed, fresh) as drawn:
            after = step(output, timestep, sample).reshape(-1)
        if len(drawn) > 1:
            raise ManyDraws
        terms = []
        for column in torch.nonzero(after).flatten().tolist():
            call, part = divmod(column, len(PARTS))
            terms.append((PARTS[part], index - call, float(after[column])))
        if drawn and (FRESH, 0) not in {term[:2] for term in terms}:
            terms.append((FRESH, 0, 0.0))  # drawn all the same
        yield tuple(terms), scale


def stepping(scheduler: Any, eta: float) -> Callable[[Tensor, Any, Tensor], Tensor]:
    """`scheduler.step` as diffusers' pipelines call it: (output, timestep, sample) to the sample after it."""
    options: dict[str, Any] = {"return_dict": False}
    known = inspect.signature(scheduler.step).parameters
    if "eta" in known:
        options["eta"] = eta
    if "generator" in known:
        options["generator"] = torch.Generator().manual_seed(0)
    return lambda output, timestep, sample: scheduler.step(output, timestep, sample, **options)[0]


@contextmanager
def drawing(scheduler: Any, noise: Tensor) -> Iterator[list[Tensor]]:
    """Within, `scheduler` is given `noise` wherever it asks diffusers for some; yields what it was given so far."""
    module: Any = sys.modules[type(scheduler).step.__module__]
    kept, given = getattr(module, "randn_tensor", None), list[Tensor]()
    if kept is None:
        yield given
        return

    def draw(*_: Any, **__: Any) -> Tensor:
        given.append(noise)
        return noise

    module.randn_tensor = draw
    try:
        yield given
    finally:
        module.randn_tensor = kept


def levels(placed: Any) -> tuple[tuple[float, float], ...]:
    """(alpha, sigma) of every call: what `add_noise` makes of an image and of noise there; and of the end, (1, 0).

    Empty for a scheduler that noises no image. `placed` stands before its first step, and is used up.
    """
    if not hasattr(placed, "add_noise"):
        return ()
    unit = torch.eye(2, dtype=torch.float64).reshape(2, 1, 1, 1, 2)
    found = []
    for index in range(len(placed.timesteps)):
        if hasattr(placed, "set_begin_index"):
            placed.set_begin_index(index)
        pair = placed.add_noise(unit[0], unit[1], placed.timesteps[index : index + 1]).flatten().tolist()
        found.append((pair[0], pair[1]))
    return (*found, (1.0, 0.0))


def starts(sampling: Sampling, placed: Any, eta: float) -> tuple[tuple[Row, ...] | None, ...]:
    """`Sampling.starts` of a schedule that was probed from a copy of `placed`; empty for one without a memory."""
    reach = max(lag for row in sampling.terms for _, lag, _ in row)
    if not reach:
        return ()
    calls = len(sampling.timesteps)
    return tuple(
        _start(sampling, copy.deepcopy(placed), eta, first, reach) if first % sampling.order == 0 else None
        for first in range(1, calls)
    )


def _start(sampling: Sampling, placed: Any, eta: float, first: int, reach: int) -> tuple[Row, ...] | None:
    """What is added to each row from call `first` on where sampling begins there; None where it cannot."""
    added: list[Row] = []
    same = 0  # rows in a row that gain nothing
    try:
        for index, (row, scale) in enumerate(rows(placed, eta, first)):
            whole = sampling.terms[first + index]
            added.append(_difference(row, tuple(term for term in whole if term[1] <= index)))
            if not all(math.isfinite(c) for _, _, c in row) or scale != sampling.input_scale[first + index]:
                return None
            same = 0 if added[-1] else same + 1
            if same > reach:
                break  # nothing is left of how it began
    except CANNOT:
        return None
    return tuple(added[: len(added) - same])


def _difference(row: Row, other: Row) -> Row:
    """row - other, without what is the same."""
    ours, theirs = ({(kind, lag): c for kind, lag, c in terms} for terms in (row, other))
    least = SAME * max((abs(c) for _, _, c in (*row, *other)), default=0.0)
    keys = dict.fromkeys((*ours, *theirs))
    found = [(key, ours.get(key, 0.0) - theirs.get(key, 0.0)) for key in keys]
    return tuple((*key, c) for key, c in found if not abs(c) <= least)


def with_levels(sampling: Sampling, placed: Any) -> Sampling:
    """`sampling` with its noise levels; `placed` is used up. Raises `DiffpressError` where they are not finite."""
    found = levels(placed)
    if not all(math.isfinite(value) for pair in found for value in pair):
        raise DiffpressError(f"scheduler {sampling.scheduler} has noise levels that are not finite")
    return replace(sampling, levels=found)
