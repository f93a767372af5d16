"""The Hessian of a layer's inputs over recorded calls, each step with its weight; `compress.numerics.obs` takes it.

H = (2 / sum w) sum_t alpha_t sum X_t X_t^T (OBS-Diff, Zhu et al. 2025, timestep-aware Hessian): X_t [in, tokens] is
what a layer is given at step t, of both guidance halves, and w counts every image with its alpha. A convolution's X are
its windows, in the order of `weight.flatten(1)`. It is a running mean: memory grows neither with calls nor with steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from diffpress.calibration.statistics import padded
from diffpress.errors import DiffpressError

Weighting = Literal["uniform", "log-decrease", "linear", "log-increase"]

CHUNK_BYTES = 64 << 20  # of unfolded windows at once: enough columns for a fast product, however large the image
UNIT = 16  # input channels that a block of the diagonal never cuts: whole N:M groups


def alphas(method: Weighting, steps: int, low: float = 0.8, high: float = 1.2) -> tuple[float, ...]:
    """The weight of each step, the first (noisiest) first.

    "log-decrease" is low + (high - low) ln(T - t + 1) / ln T for t = 1..T, "log-increase" the same backwards, "linear"
    falls from high to low, "uniform" is 1. A single step has weight high, or 1.
    """
    if method not in get_args(Weighting):
        raise DiffpressError(f"no weighting is called {method}: choose from {', '.join(get_args(Weighting))}")
    if method == "uniform":
        return (1.0,) * steps
    if steps == 1:
        return (high,)
    if method == "linear":
        return tuple(high - (high - low) * step / (steps - 1) for step in range(steps))
    falling = [low + (high - low) * math.log(steps - step) / math.log(steps) for step in range(steps)]
    return tuple(falling if method == "log-decrease" else reversed(falling))


def unsupported(layer: nn.Module) -> str | None:
    """Why a layer has no Hessian here, in words that end a sentence; None where it has one."""
    if isinstance(layer, nn.Linear):
        return None
    if not isinstance(layer, nn.Conv2d):
        return f"{type(layer).__name__} is neither Linear nor Conv2d"
    return None if layer.groups == 1 else f"it is a Conv2d with {layer.groups} groups"


def columns_of(layer: Any) -> int:
    """How many columns `weight.flatten(1)` of a Linear or Conv2d has."""
    return int(layer.weight[0].numel())


def kernel_of(layer: Any) -> int:
    """How many of these columns each input channel has."""
    return int(layer.weight[0, 0].numel())


def widths_of(layer: nn.Module, span: int | None = None) -> list[int]:
    """The widths of the blocks of the diagonal that are kept of a layer's Hessian: the whole of it without `span`.

    Blocks are of whole channels, UNIT of them at least, nearly alike, and of at most `span` columns where that is
    enough for UNIT channels. What lies outside them is left out: our approximation for convolutions whose whole
    Hessian does not fit, not the paper's, in which inputs of different blocks count as unrelated.
    """
    columns = columns_of(layer)
    if span is None or span >= columns:
        return [columns]
    unit = UNIT * kernel_of(layer)
    units = math.ceil(columns / unit)
    parts = math.ceil(units / max(1, span // unit))
    ends = [min(columns, unit * (units * part // parts)) for part in range(parts + 1)]
    return [stop - start for start, stop in pairwise(ends)]


def bytes_of(layer: nn.Module, span: int | None = None) -> int:
    """The memory of a layer's Hessian in bytes; solving for the weights takes about four times as much for a while."""
    return sum(4 * width**2 for width in widths_of(layer, span))


class Hessian:
    """The Hessian of one layer's input, a stream.

    `blocks` are those of its diagonal, a single one without `span`, float32 [width, width]: scaled as above for all
    that was seen, none before anything was. `rows` bounds how many tokens of a call are taken: drawn at random, and
    each standing for as many as were left out.
    """

    # Float32: a float64 sum would double the memory that decides how many layers share a run, and its products are
    # slow on GPUs. Thousands of terms of one sign leave an error near 1e-5 of the diagonal, damping adds 1e-2 to it.
    def __init__(self, layer: nn.Module, span: int | None = None, rows: int | None = None, seed: int = 0) -> None:
        reason = unsupported(layer)
        if reason:
            raise DiffpressError(f"a layer has no Hessian, since {reason}: leave it out")
        self.layer = layer
        self.widths = widths_of(layer, span)
        self.blocks: list[Tensor] = []
        self.weight = 0.0  # the sum of w
        self._rows = rows
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def matrix(self) -> Tensor:
        """The whole Hessian [in, in]; raises `DiffpressError` where only blocks were kept, or nothing was seen."""
        if len(self.blocks) != 1:
            raise DiffpressError(f"of this Hessian there are {len(self.blocks)} blocks, where the whole is needed")
        return self.blocks[0]

    def update(self, x: Tensor, weight: float = 1.0) -> None:
        """Take in the layer's input, [..., in] or [N, in, H, W], of a step with this alpha."""
        if weight == 0:
            return
        if not self.blocks:
            self.blocks = [torch.zeros(width, width, device=x.device) for width in self.widths]
        images = len(x) if x.ndim > 1 else 1
        total = self.weight + weight * images
        keep = self.weight / total
        parts, factor = _inputs(self.layer, x.detach().float(), self._rows, self._generator)
        for part in parts:
            for block, own in zip(self.blocks, part.split(self.widths), strict=True):
                block.addmm_(own, own.t(), beta=keep, alpha=2 * weight * factor / total)
            keep = 1.0
        self.weight = total

    def merge(self, other: Hessian) -> None:
        """Take in all that `other` has seen; the same as seeing it here, but for rounding."""
        if other.widths != self.widths:
            raise DiffpressError(f"Hessians of blocks of {self.widths} and {other.widths} columns cannot be merged")
        total = self.weight + other.weight
        if not self.blocks:
            self.blocks = [block.clone() for block in other.blocks]
        elif other.blocks:
            for mine, theirs in zip(self.blocks, other.blocks, strict=True):
                mine.mul_(self.weight / total).add_(theirs.to(mine.device), alpha=other.weight / total)
        self.weight = total


def _inputs(layer: Any, x: Tensor, rows: int | None, generator: torch.Generator) -> tuple[Iterator[Tensor], float]:
    """The columns X [in, tokens] that a layer multiplies, part by part, and for how many each of them stands."""
    windows = x.reshape(-1, x.shape[-1]).t() if isinstance(layer, nn.Linear) else _windows(layer, x)
    places = windows.shape[1:] if isinstance(layer, nn.Linear) else windows.shape[3:]
    tokens = math.prod(places)
    if rows is None or rows >= tokens:
        return _all(windows, columns_of(layer)), 1.0
    drawn = torch.randperm(tokens, generator=generator)[:rows].to(x.device)
    return _some(windows, columns_of(layer), torch.unravel_index(drawn, places)), tokens / rows


def _windows(layer: Any, x: Tensor) -> Tensor:
    """What a convolution reads of x [N, in, H, W] for each of its outputs [in, kh, kw, N, h, w]; a view."""
    image = padded(layer, x)
    for axis in (0, 1):
        image = image.unfold(2 + axis, layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1, layer.stride[axis])
    return image[..., :: layer.dilation[0], :: layer.dilation[1]].permute(1, 4, 5, 0, 2, 3)


def _all(windows: Tensor, columns: int) -> Iterator[Tensor]:
    """Everything [columns, tokens], in parts of CHUNK_BYTES: some images, or some lines of one."""
    if windows.ndim == 2:
        yield windows
        return
    height, width = windows.shape[4:]
    lines = max(1, CHUNK_BYTES // (4 * columns * width))
    for images in windows.split(max(1, lines // height), dim=3):
        for part in images.split(min(lines, height), dim=4):
            yield part.reshape(columns, -1)


def _some(windows: Tensor, columns: int, places: Sequence[Tensor]) -> Iterator[Tensor]:
    """The tokens [columns, tokens] at some places, in parts of CHUNK_BYTES."""
    count = max(1, CHUNK_BYTES // (4 * columns))
    for parts in zip(*(place.split(count) for place in places), strict=True):
        yield windows[(..., *parts)].reshape(columns, -1)
