"""Pruning without compensation, to compare with: magnitude, L1 of structures, and Wanda (Sun et al. 2024).

On the interface of `obs` and `obs_groups`: weights [out, in], Hessians or their blocks, of which only Wanda takes
something: the inputs' norms, whose squares are the diagonal up to a factor that changes nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffpress.compress.numerics.obs import (
    Blocks,
    blocks_of,
    budget,
    channels_inside,
    check_nm,
    check_ratio,
    lowest,
    smallest,
)
from diffpress.compress.numerics.obs_groups import Cut, as_columns, check_count, cut, pick
from diffpress.errors import DiffpressError

Criterion = Literal["magnitude", "wanda"]


def saliency(weight: Tensor, hessian: Blocks | None, criterion: Criterion) -> Tensor:
    """How much each weight matters [out, in]: |W|, or |W_rc| ||x_c||_2 (Wanda, equation 1)."""
    magnitudes = weight.float().abs()
    if criterion == "magnitude":
        return magnitudes
    if hessian is None:
        raise DiffpressError("wanda needs the norms of the layer's inputs: give its Hessian")
    diagonal = torch.cat([block.diagonal() for block in blocks_of(hessian, weight.shape[1])])
    return magnitudes * diagonal.to(magnitudes).sqrt()


@torch.no_grad()
def plain_unstructured(weight: Tensor, hessian: Blocks | None, ratio: float, criterion: Criterion) -> Tensor:
    """`weight` with exactly floor(ratio * out * in + 1/2) of it zero (or more, if more were).

    Magnitudes compete within the layer, Wanda's scores within each output row; rows differ by at most one zero.
    """
    check_ratio(ratio)
    scores = saliency(weight, hessian, criterion)
    out, columns = scores.shape
    if criterion == "magnitude":
        return weight.masked_fill(smallest(scores, budget(ratio, out, columns)), 0)
    ends = torch.tensor([budget(ratio, rows, columns) for rows in range(out + 1)], device=scores.device)
    rank = scores.argsort(dim=1, stable=True).argsort(dim=1)
    return weight.masked_fill(rank < ends.diff()[:, None], 0)


@torch.no_grad()
def plain_nm(
    weight: Tensor, hessian: Blocks | None, n_zero: int, m: int, criterion: Criterion, kernel: int = 1
) -> Tensor:
    """`weight` with the `n_zero` least salient of each m input channels zero; groups as in `obs.prune_nm`."""
    check_nm(weight, n_zero, m, kernel)
    order = channels_inside(weight.shape[1], kernel).to(weight.device)
    scores = saliency(weight, hessian, criterion)[:, order].reshape(len(weight), -1, m)
    gone = lowest(scores.permute(2, 0, 1), n_zero).permute(1, 2, 0).flatten(1)
    return weight.masked_fill(gone[:, order.argsort()], 0)


@torch.no_grad()
def plain_groups(
    weight: Tensor,
    hessian: Blocks | None,
    groups: int | Tensor,
    count: int,
    criterion: Criterion,
    strata: Tensor | None = None,
) -> Cut:
    """The `count` groups of columns with the least total saliency removed: "magnitude" is the L1 norm."""
    columns = as_columns(weight, groups).to(weight.device)
    check_count(count, len(columns), strata)
    scores = saliency(weight, hessian, criterion).sum(dim=0, dtype=torch.float64)[columns].sum(dim=1)
    removed = pick(scores.argsort(stable=True).tolist(), count, count, [], strata)
    pruned = weight.clone()
    pruned[:, columns[torch.tensor(removed, dtype=torch.long, device=weight.device)].flatten()] = 0
    return cut(removed, len(columns), pruned)
