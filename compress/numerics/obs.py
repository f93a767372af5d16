"""Optimal Brain Surgeon: weights are removed and those that stay are changed so that the layer's output moves least.

A layer maps X [in, tokens] to W X. Removing weights costs tr((W - W') H (W - W')^T), where H [in, in] is, up to a
factor, the sum of X X^T over inputs seen while calibrating (`calibration.hessian`). Weights are [out, in], or the
`weight.flatten(1)` of a convolution, whose `kernel` is how many columns each input channel has.

Column by column as SparseGPT does (Frantar and Alistarh 2023, Algorithm 1), with the Hessian of OBS-Diff (Zhu et al.
2025). A Hessian may be one matrix or the blocks of its diagonal, each then solved for itself. Every function computes
in float64 up to EXACT columns, above in float32, and in float64 again where that fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffpress.errors import DiffpressError

EXACT = 2048  # columns up to which float64 costs little: 32 MiB a matrix, and a second for the largest layers
DAMPING = 0.01  # of the mean diagonal

Blocks = Tensor | Sequence[Tensor]  # a Hessian [in, in], or the blocks of its diagonal
Choose = Callable[[Tensor, int], Tensor]  # scores [columns, out] and their first column -> which go


class Factor(NamedTuple):
    """U [in, in] with H^-1 = U^T U, which inputs were always zero [in], and what was added to H's diagonal."""

    upper: Tensor
    dead: Tensor
    damping: float


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Factor:
    """The upper Cholesky factor of the inverse of H [in, in], damped.

    A dead input, H_ii = 0, gets H_ii = 1; then `damping` times the mean of the others' diagonal is added. Raises
    `DiffpressError` for a Hessian that is not finite, and for one that is not positive definite even so.
    """
    for dtype in precisions(len(hessian)):
        # Reversed, J H J = L L^T gives H^-1 = U^T U with U = J L^-1 J: one decomposition, and no inverse is squared.
        matrix = hessian.flip(0, 1).to(dtype)
        dead, added = damp(matrix, damping)
        lower, info = torch.linalg.cholesky_ex(matrix)
        del matrix
        if int(info) != 0:
            continue
        _invert(lower)
        upper = lower.flip(0, 1)
        del lower
        if bool(upper.isfinite().all()):
            return Factor(upper, dead.flip(0), added)
    raise indefinite(hessian, damping)


def _invert(lower: Tensor, block: int = 256) -> None:
    """Invert a lower triangular matrix in place, from the top down; a third of the work of solving for the identity."""
    for start in range(0, len(lower), block):
        rows = lower[start : start + block]
        width = len(rows)
        identity = torch.eye(width, dtype=lower.dtype, device=lower.device)
        corner = torch.linalg.solve_triangular(rows[:, start : start + width], identity, upper=False)
        rows[:, :start] = -(corner @ (rows[:, :start] @ lower[:start, :start]))
        rows[:, start : start + width] = corner


def precisions(columns: int) -> tuple[torch.dtype, ...]:
    """In which types to compute, one after the other until it works."""
    return (torch.float64,) if columns <= EXACT else (torch.float32, torch.float64)


def damp(matrix: Tensor, damping: float) -> tuple[Tensor, float]:
    """Damp a Hessian [in, in] in place: which inputs are dead, and what was added to the diagonal."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise DiffpressError(f"a Hessian is a square matrix, not one of shape {list(matrix.shape)}")
    if not bool(matrix.isfinite().all()):
        raise DiffpressError("the Hessian has values that are not finite: calibrate in float32, or leave the layer out")
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    added = damping * float(diagonal[~dead].mean()) if bool((~dead).any()) else 0.0
    matrix[dead, :] = 0  # as in any sum of X X^T; here whatever was given
    matrix[:, dead] = 0
    diagonal[dead] = 1
    diagonal += added
    return dead, added


def indefinite(hessian: Tensor, damping: float) -> DiffpressError:
    """The error for a Hessian that cannot be inverted."""
    return DiffpressError(
        f"the Hessian of {len(hessian)} inputs is not positive definite with a damping of {damping:g} of its mean "
        "diagonal: raise the damping, or calibrate with more prompts or steps"
    )


def prune_unstructured(
    weight: Tensor, hessian: Blocks, ratio: float, block: int = 128, damping: float = DAMPING, refine: int = 0
) -> Tensor:
    """`weight` [out, in] with a share `ratio` of it zero and the rest compensated; same type.

    In each block of columns those with the smallest w^2 / U_jj^2 go. Of the first c columns exactly
    floor(ratio * out * c + 1/2) weights go, so that many of the layer for c = in; more are zero only where more were
    zero before, or belong to dead inputs. `refine`: see `compensate`.
    """
    check_ratio(ratio)

    def solve(part: Tensor, matrix: Tensor, first: int) -> Tensor:
        def choose(scores: Tensor, column: int) -> Tensor:
            start, stop = first + column, first + column + len(scores)
            return smallest(scores, budget(ratio, len(part), stop) - budget(ratio, len(part), start))

        return _solve(part, matrix, choose, block, block, damping, refine)

    return _by_block(weight, hessian, solve)


def prune_nm(
    weight: Tensor,
    hessian: Blocks,
    n_zero: int,
    m: int,
    kernel: int = 1,
    block: int = 128,
    damping: float = DAMPING,
    refine: int = 0,
) -> Tensor:
    """`weight` [out, in] with the `n_zero` smallest w^2 / U_jj^2 of each `m` inputs zero, the rest compensated.

    A group is m consecutive input channels at the same place of the kernel, as sparse tensor cores want it. The
    result does not depend on `block`. Raises `DiffpressError` for channels that m does not divide.
    """
    check_nm(weight, n_zero, m, kernel)

    def solve(part: Tensor, matrix: Tensor, first: int) -> Tensor:
        check_nm(part, n_zero, m, kernel)  # a block of the diagonal may cut a group in two
        order = channels_inside(part.shape[1], kernel).to(part.device)
        ordered = matrix if kernel == 1 else matrix[order][:, order]
        width = math.ceil(block / m) * m
        solved = _solve(part[:, order], ordered, lambda scores, _: lowest(scores, n_zero), m, width, damping, refine)
        return solved[:, order.argsort()]

    return _by_block(weight, hessian, solve)


def compensate(
    weight: Tensor, hessian: Blocks, gone: Tensor, block: int = 128, damping: float = DAMPING, refine: int = 0
) -> Tensor:
    """`weight` [out, in] with those of the mask `gone` zero and the rest compensated.

    A sweep changes the columns right of a removed weight alone, which is not the best there is: `refine` steps of
    conjugate gradients on what stays follow, each about as costly as the sweep; on layers of `shapes` and other prompts
    than calibrated with, 10 of them left 0.2 to 0.8 of the error. Never worse than no compensation, row by row.
    """

    def solve(part: Tensor, matrix: Tensor, first: int) -> Tensor:
        mask = gone[:, first : first + part.shape[1]].t()

        def choose(scores: Tensor, column: int) -> Tensor:
            return mask[column : column + len(scores)]

        return _solve(part, matrix, choose, block, block, damping, refine)

    return _by_block(weight, hessian, solve)


def blocks_of(hessian: Blocks, columns: int) -> list[Tensor]:
    """The blocks of the Hessian's diagonal; together they must have `columns` columns."""
    blocks = [hessian] if isinstance(hessian, Tensor) else list(hessian)
    if sum(map(len, blocks)) != columns:
        sizes = " and ".join(str(len(block)) for block in blocks)
        raise DiffpressError(f"a weight of {columns} columns cannot go with a Hessian of {sizes}")
    return blocks


@torch.no_grad()
def _by_block(weight: Tensor, hessian: Blocks, solve: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """`solve(part, block, first column)` for each block of the Hessian's diagonal and its columns of the weight."""
    blocks = blocks_of(hessian, weight.shape[1])
    parts, first = [], 0
    for matrix in blocks:
        part = weight[:, first : first + len(matrix)]
        parts.append(solve(part, matrix.to(weight.device), first).to(weight.dtype))
        first += len(matrix)
    return torch.cat(parts, dim=1)


def _solve(
    weight: Tensor, hessian: Tensor, choose: Choose, step: int, block: int, damping: float, refine: int
) -> Tensor:
    """Sweep, take back what did not help, refine. `choose` is asked every `step` columns; `block` is a multiple."""
    factor = inverse_factor(hessian, damping)
    # Columns become rows, which are contiguous: the inner loop touches one after the other.
    given = weight.t().to(factor.upper.dtype).masked_fill(factor.dead[:, None], 0).contiguous()
    solved, gone, losses = _sweep(given, factor.upper, choose, step, block)

    matrix = hessian.to(given.dtype)

    def applied(change: Tensor) -> Tensor:
        return (matrix @ change).add_(change, alpha=factor.damping)

    # The sweep is greedy: a column it has passed stays as it is, though others it relied on may go later. Where that
    # ended worse than plain removal (rows are independent), plain removal it is.
    removed = given * gone
    worse = (removed * applied(removed)).sum(dim=0) < losses
    solved[:, worse] = (given - removed)[:, worse]
    if refine:
        diagonal = matrix.diagonal() + factor.damping
        diagonal[factor.dead] = 1
        solved = _refined(given, solved, gone, applied, diagonal[:, None], refine)
    return solved.t()


def _sweep(given: Tensor, upper: Tensor, choose: Choose, step: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Remove column by column and change all later columns; given [in, out] is W^T.

    Gives what is left, the mask of what went, and the cost of it [out], which is the sum of the squared errors.
    """
    columns = given.clone()
    gone = torch.zeros_like(columns, dtype=torch.bool)
    losses = torch.zeros_like(columns[0])
    for start in range(0, len(columns), block):
        stop = min(start + block, len(columns))
        part, errors = columns[start:stop], torch.empty_like(columns[start:stop])
        local = upper[start:stop, start:stop].contiguous()
        diagonal = local.diagonal().clone()
        for j in range(stop - start):
            if j % step == 0:
                ahead = slice(j, j + step)
                scores = (part[ahead] / diagonal[ahead, None]).square_()
                gone[start:stop][ahead] = choose(scores, start + j)
            going = gone[start + j]
            error = torch.div(part[j] * going, diagonal[j], out=errors[j])
            part[j].masked_fill_(going, 0)
            part[j + 1 :].addr_(local[j, j + 1 :], error, alpha=-1)
        losses += errors.square().sum(dim=0)
        columns[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)  # the later blocks, all at once
    return columns, gone, losses


def _refined(
    given: Tensor, solved: Tensor, gone: Tensor, applied: Callable[[Tensor], Tensor], diagonal: Tensor, steps: int
) -> Tensor:
    """Conjugate gradients over the weights that stay, every row of the layer for itself; all [in, out].

    Minimises z^T H z of the change z = given - solved, preconditioned by H's diagonal; no step raises it.
    """
    change = given - solved
    residual = applied(change).neg_().masked_fill_(gone, 0)
    scaled = residual / diagonal
    direction = scaled.clone()
    size = (residual * scaled).sum(dim=0)
    for _ in range(steps):
        image = applied(direction).masked_fill_(gone, 0)
        curvature = (direction * image).sum(dim=0)
        length = torch.where(curvature > 0, size / curvature, 0)
        change += length * direction
        residual -= length * image
        scaled = residual / diagonal
        before, size = size, (residual * scaled).sum(dim=0)
        direction = scaled + torch.where(before > 0, size / before, 0) * direction
    return (given - change).masked_fill_(gone, 0)


@torch.no_grad()
def reconstruction_error(weight: Tensor, pruned: Tensor, hessian: Blocks) -> float:
    """tr((W - W') H (W - W')^T) / tr(W H W^T): the squared error of the layer's output, relative; both [out, in].

    0 where both are 0, infinite where only the layer's own output is.
    """

    def energy(matrix: Tensor) -> float:
        total, first = 0.0, 0
        for block in blocks_of(hessian, matrix.shape[1]):
            dtype = precisions(len(block))[0]
            part = matrix[:, first : first + len(block)].to(dtype)
            total += float((part @ block.to(part) * part).sum(dtype=torch.float64))
            first += len(block)
        return max(0.0, total)

    error, whole = energy(weight.double() - pruned.double()), energy(weight)
    return error / whole if whole else (math.inf if error else 0.0)


def check_ratio(ratio: float) -> None:
    """Raises `DiffpressError` for shares that are none."""
    if not 0 <= ratio < 1:
        raise DiffpressError(f"a share of {ratio:g} of the weights cannot be removed: give one from 0 to below 1")


def check_nm(weight: Tensor, n_zero: int, m: int, kernel: int) -> None:
    """Raises `DiffpressError` for N:M patterns that are none, and for weights [out, in] they do not fit."""
    if not 0 < n_zero < m:
        raise DiffpressError(f"{n_zero} zeros in every {m} weights are no N:M pattern: give from 1 to {m - 1}")
    if weight.shape[1] % (m * kernel):
        raise DiffpressError(
            f"{weight.shape[1] / kernel:g} input channels cannot be cut into groups of {m}: leave the layer out"
        )


def budget(ratio: float, out: int, columns: int) -> int:
    """How many weights go of so many columns: ratio * out * columns, halves up."""
    return math.floor(ratio * out * columns + 0.5)


def channels_inside(columns: int, kernel: int) -> Tensor:
    """The order of unfolded columns (channel, place) in which channels of one place are neighbours [columns]."""
    return torch.arange(columns).reshape(-1, kernel).t().flatten()


def smallest(scores: Tensor, count: int) -> Tensor:
    """A mask of exactly the `count` smallest scores; any shape."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().topk(count, largest=False, sorted=False).indices] = True
    return mask.reshape(scores.shape)


def lowest(scores: Tensor, count: int) -> Tensor:
    """A mask of exactly the `count` smallest of each column of scores [m, ...]."""
    indices = scores.topk(count, dim=0, largest=False, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, indices, True)
