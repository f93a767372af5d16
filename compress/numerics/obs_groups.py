"""Optimal Brain Surgeon on groups of columns: whole inputs of a layer are removed and the others compensate for them.

A group may be one neuron's column, the unfolded columns of a convolution's input channel, or the block of an attention
head. As SlimGPT (Ling et al. 2024) and OBS-Diff (Zhu et al. 2025, structured) do, one group or a small batch at a time;
removing a group is exact elimination from the inverse Hessian, so the weights stay the best there are for the columns
that are left (and the damped Hessian).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffpress.compress.numerics.obs import DAMPING, damp, indefinite, precisions
from diffpress.errors import DiffpressError

Score = Literal["exact", "diagonal"]


class Cut(NamedTuple):
    """Which groups stay, ascending, which go, in their order, and the weight [out, in], whose removed columns are 0."""

    kept: Tensor
    removed: Tensor
    weight: Tensor


def prune_columns(
    weight: Tensor, hessian: Tensor, count: int, batch: int = 16, damping: float = DAMPING, strata: Tensor | None = None
) -> Cut:
    """Remove `count` columns of `weight` [out, in], `batch` at a time, by sum_r W_rc^2 / [H^-1]_cc."""
    return prune_groups(weight, hessian, 1, count, batch, damping, strata=strata)


@torch.no_grad()
def prune_groups(
    weight: Tensor,
    hessian: Tensor,
    groups: int | Tensor,
    count: int,
    batch: int = 1,
    damping: float = DAMPING,
    score: Score = "exact",
    strata: Tensor | None = None,
) -> Cut:
    """Remove `count` groups of columns of `weight` [out, in], `batch` at a time, and compensate with all the others.

    `groups` is their size, or their columns [groups, size]; columns in none always stay. Of the groups G that are left,
    those with the smallest score go. "exact": sum_r W_rG ([H^-1]_GG)^-1 W_rG^T, what removing G alone costs;
    "diagonal", of the papers: sum W_rG^2 / diag(chol([H^-1]_GG))^2. `strata` [groups] labels groups, and each label
    loses equally many: the channels of a group norm. Raises `DiffpressError` for counts that cannot be, and a
    Hessian that cannot be inverted.
    """
    columns = as_columns(weight, groups).to(weight.device)
    check_count(count, len(columns), strata)
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise DiffpressError(
            f"to remove columns of a weight of {weight.shape[1]} takes the whole Hessian, not {list(hessian.shape)}"
        )
    hessian = hessian.to(weight.device)
    for dtype in precisions(len(hessian)):
        matrix = hessian.to(dtype, copy=True)
        dead, _ = damp(matrix, damping)
        lower, info = torch.linalg.cholesky_ex(matrix)
        del matrix
        if int(info) != 0:
            continue
        inverse = torch.cholesky_inverse(lower)
        del lower
        rows = weight.t().to(dtype).masked_fill(dead[:, None], 0).contiguous()
        removed = _eliminate(rows, inverse, columns, count, max(1, batch), score, strata)
        if removed is not None:
            return cut(removed, len(columns), rows.t().to(weight.dtype))
    raise indefinite(hessian, damping)


def _eliminate(
    rows: Tensor, inverse: Tensor, groups: Tensor, count: int, batch: int, score: Score, strata: Tensor | None
) -> list[int] | None:
    """Which groups go, in order; rows [in, out] = W^T and H^-1 change in place. None where rounding got the better."""
    left = torch.arange(len(groups), device=rows.device)
    removed: list[int] = []
    while len(removed) < count:
        scores = _scores(rows, inverse, groups[left], score)
        if scores is None:
            return None
        wanted = min(batch, count - len(removed))
        picked = pick(left[scores.argsort()].tolist(), wanted, count, removed, strata)
        index = groups[torch.tensor(picked, device=rows.device)].flatten()
        band = inverse[index]  # [size, in]
        lower, info = torch.linalg.cholesky_ex(band[:, index])
        if int(info) != 0:
            return None
        half = torch.linalg.solve_triangular(lower, band, upper=False)
        rows.addmm_(half.t(), torch.linalg.solve_triangular(lower, rows[index], upper=False), alpha=-1)
        inverse.addmm_(half.t(), half, alpha=-1)
        # Zero but for rounding; from here on these inputs are unrelated to the others.
        rows[index] = 0
        inverse[index, :] = 0
        inverse[:, index] = 0
        inverse[index, index] = 1
        removed += picked
        left = left[~torch.isin(left, torch.tensor(picked, device=left.device))]
    return removed


def _scores(rows: Tensor, inverse: Tensor, groups: Tensor, score: Score) -> Tensor | None:
    """What each group [G, size] costs, float64 [G]; None where its block of H^-1 is not positive definite."""
    chosen = rows[groups]  # [G, size, out]
    blocks = inverse[groups[:, :, None], groups[:, None, :]].double()
    lower, info = torch.linalg.cholesky_ex(blocks)
    if bool(info.any()):
        return None
    if score == "diagonal":
        energy = chosen.square().sum(dim=2, dtype=torch.float64)
        return (energy / lower.diagonal(dim1=1, dim2=2).square()).sum(dim=1)
    products = (chosen @ chosen.transpose(1, 2)).double()
    return torch.cholesky_solve(products, lower).diagonal(dim1=1, dim2=2).sum(dim=1)


def pick(best: list[int], wanted: int, count: int, removed: list[int], strata: Tensor | None) -> list[int]:
    """The first `wanted` of `best` that their strata can still lose, where `count` of all groups go in the end."""
    if strata is None:
        return best[:wanted]
    labels = strata.tolist()
    share = count // len(set(labels))
    room = dict.fromkeys(labels, share)
    for group in removed:
        room[labels[group]] -= 1
    picked: list[int] = []
    for group in best:
        if len(picked) < wanted and room[labels[group]] > 0:
            room[labels[group]] -= 1
            picked.append(group)
    return picked


def as_columns(weight: Tensor, groups: int | Tensor) -> Tensor:
    """The columns of each group [groups, size]: those given, or consecutive ones of that size."""
    width = weight.shape[1]
    if isinstance(groups, int):
        if groups < 1 or width % groups:
            raise DiffpressError(f"{width} columns cannot be cut into groups of {groups}")
        return torch.arange(width).reshape(-1, groups)
    used = groups.flatten()
    if groups.ndim != 2 or used.min() < 0 or used.max() >= width or len(used.unique()) != len(used):
        raise DiffpressError(f"groups [groups, size] name each of {width} columns at most once")
    return groups


def check_count(count: int, groups: int, strata: Tensor | None) -> None:
    """Raises `DiffpressError` for a number of groups that cannot go."""
    if not 0 <= count < groups:
        raise DiffpressError(f"{count} of {groups} groups cannot be removed: at least one must stay")
    if strata is None:
        return
    sizes = strata.unique(return_counts=True)[1]
    if len(strata) != groups or count % len(sizes) or count // len(sizes) >= int(sizes.min()):
        raise DiffpressError(
            f"{count} of {groups} groups cannot be taken equally from {len(sizes)} strata, each keeping one"
        )


def cut(removed: list[int], groups: int, weight: Tensor) -> Cut:
    """The result of removing those of so many groups."""
    gone = torch.tensor(removed, dtype=torch.long)
    stays = torch.ones(groups, dtype=torch.bool)
    stays[gone] = False
    return Cut(stays.nonzero().flatten(), gone, weight)
