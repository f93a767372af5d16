"""What removes weights from a layer: the Optimal Brain Surgeon, or what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from diffpress.calibration.capture import Call
from diffpress.calibration.hessian import Hessian, Weighting
from diffpress.compress.numerics import obs, obs_groups, saliency
from diffpress.compress.numerics.obs_groups import Cut
from diffpress.compress.prune import packages
from diffpress.compress.prune.structure import HEADS, NEURONS, Structure
from diffpress.compress.work import Work

Method = Literal["obs", "wanda", "magnitude"]
BATCHES = {HEADS: 1, NEURONS: 16}  # parts that go at a time before the others' scores are looked at again


def collected(
    method: Method,
    work: Work,
    names: Sequence[str],
    calls: Sequence[Call],
    weighting: Weighting,
    span: int | None = None,
) -> Mapping[str, Hessian | None]:
    """The Hessians of layers by module path, as `packages.collect` finds them; magnitudes need none."""
    return dict.fromkeys(names) if method == "magnitude" else packages.collect(work, names, calls, weighting, span)


def _blocks(hessian: Hessian | None) -> obs.Blocks | None:
    return None if hessian is None else hessian.blocks


def prune_structure(
    method: Method, weight: Tensor, hessian: Hessian | None, structure: Structure, count: int, damping: float
) -> Cut:
    """`weight` [out, columns] of a structure's reader without `count` of its parts; `magnitude` is the L1 norm."""
    strata = None if structure.blocks == 1 else torch.arange(structure.count) * structure.blocks // structure.count
    if method == "obs":
        batch = BATCHES.get(structure.kind, 1) if strata is None else structure.blocks
        assert hessian is not None  # `collected` gives one
        return obs_groups.prune_groups(weight, hessian.matrix, structure.columns, count, batch, damping, strata=strata)
    return saliency.plain_groups(weight, _blocks(hessian), structure.columns, count, method, strata)


def prune_unstructured(
    method: Method, weight: Tensor, hessian: Hessian | None, ratio: float, damping: float, refine: int
) -> Tensor:
    """`weight` [out, columns] with the share `ratio` of it zero."""
    if method == "obs":
        assert hessian is not None
        return obs.prune_unstructured(weight, hessian.blocks, ratio, damping=damping, refine=refine)
    return saliency.plain_unstructured(weight, _blocks(hessian), ratio, method)


def prune_nm(
    method: Method,
    weight: Tensor,
    hessian: Hessian | None,
    n_zero: int,
    m: int,
    kernel: int,
    damping: float,
    refine: int,
) -> Tensor:
    """`weight` [out, columns] with `n_zero` of each `m` input channels zero at each of a kernel's places."""
    if method == "obs":
        assert hessian is not None
        return obs.prune_nm(weight, hessian.blocks, n_zero, m, kernel, damping=damping, refine=refine)
    return saliency.plain_nm(weight, _blocks(hessian), n_zero, m, method, kernel)
