"""What removes weights from a layer: the Optimal Brain Surgeon, or what it is compared with."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffpress.compress.numerics import obs, obs_groups, saliency
from diffpress.compress.numerics.obs_groups import Cut
from diffpress.compress.prune.structure import HEADS, NEURONS, Structure

Method = Literal["obs", "wanda", "magnitude"]
BATCHES = {HEADS: 1, NEURONS: 16}  # parts that go at a time before the others' scores are looked at again


def prune_structure(
    method: Method, weight: Tensor, hessian: Tensor, structure: Structure, count: int, damping: float
) -> Cut:
    """`weight` [out, columns] of a structure's reader without `count` of its parts; `magnitude` is the L1 norm."""
    strata = None if structure.blocks == 1 else torch.arange(structure.count) * structure.blocks // structure.count
    if method == "obs":
        batch = BATCHES.get(structure.kind, 1) if strata is None else structure.blocks
        return obs_groups.prune_groups(weight, hessian, structure.columns, count, batch, damping, strata=strata)
    return saliency.plain_groups(weight, hessian, structure.columns, count, method, strata)


def prune_unstructured(
    method: Method, weight: Tensor, hessian: obs.Blocks, ratio: float, damping: float, refine: int
) -> Tensor:
    """`weight` [out, columns] with the share `ratio` of it zero."""
    if method == "obs":
        return obs.prune_unstructured(weight, hessian, ratio, damping=damping, refine=refine)
    return saliency.plain_unstructured(weight, hessian, ratio, method)


def prune_nm(
    method: Method, weight: Tensor, hessian: obs.Blocks, n_zero: int, m: int, kernel: int, damping: float, refine: int
) -> Tensor:
    """`weight` [out, columns] with `n_zero` of each `m` input channels zero at each of a kernel's places."""
    if method == "obs":
        return obs.prune_nm(weight, hessian, n_zero, m, kernel, damping=damping, refine=refine)
    return saliency.plain_nm(weight, hessian, n_zero, m, method, kernel)
