"""Equivalent scaling: a layer's input times m, its weight divided by m, per input channel, so that both round better.

The product does not change. Candidates for m come from SmoothQuant (Xiao et al. 2023, equation 4), AWQ (Lin et al.
2024, equation 4) and the split shortcut of Q-Diffusion (Li et al. 2023, Section 3.3) in its one-convolution form: of
two joined halves with different ranges, one is scaled to meet the other. The layer's output error on sampled inputs
decides, and m = 1 always takes part, so a layer never gets worse on the sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from diffpress.calibration.statistics import AbsHistogram
from diffpress.compress.numerics.formats import fake_quant, get
from diffpress.compress.numerics.ranges import input_scale, weight_scale

ALPHAS = tuple(index / 10 for index in range(11))
LIMIT = 1e3  # of how far a channel may be scaled, so that half precision holds every number


def smooth_candidates(input_max: Tensor, weight: Tensor, alphas: Iterable[float] = ALPHAS) -> Iterator[Tensor]:
    """1 / (max|x|^alpha / max|W|^(1 - alpha)) per input channel; `input_max` is [in], `weight` [out, in, ...]."""
    weight_max = weight.abs().amax(dim=[dim for dim in range(weight.ndim) if dim != 1])
    usable = (input_max > 0) & (weight_max > 0)
    for alpha in alphas:
        factor = input_max.clamp_min(1e-9) ** alpha / weight_max.clamp_min(1e-9) ** (1 - alpha)
        yield _normal(torch.where(usable, factor, torch.nan))


def awq_candidates(input_mean: Tensor, alphas: Iterable[float] = ALPHAS) -> Iterator[Tensor]:
    """1 / mean|x|^alpha per input channel [in]: weights of channels that carry more are rounded finer."""
    for alpha in alphas:
        yield _normal(torch.where(input_mean > 0, input_mean**alpha, torch.nan))


def split_candidates(input_max: Tensor, hidden: int) -> Iterator[Tensor]:
    """One for the first `hidden` channels, and for the rest a power of the ratio of the halves' ranges."""
    ratio = input_max[:hidden].max() / input_max[hidden:].max().clamp_min(1e-9)
    for power in (0.25, 0.5, 0.75, 1.0):
        factor = torch.ones_like(input_max)
        factor[hidden:] = (ratio**power).clamp(1 / LIMIT, LIMIT)
        yield factor


def _normal(factor: Tensor) -> Tensor:
    """1 / factor with a geometric mean of one over the channels that are numbers, one for the others."""
    logs = factor.log()
    known = logs.isfinite()
    centred = torch.where(known, logs - (logs[known].mean() if bool(known.any()) else 0.0), 0.0)
    return (-centred).exp().clamp(1 / LIMIT, LIMIT)


@torch.no_grad()
def best_multiplier(
    module: nn.Conv2d | nn.Linear,
    samples: Tensor,
    candidates: Iterable[Tensor],
    weight_format: str,
    input_format: str | None,
    block: int | None = None,
) -> tuple[Tensor | None, float]:
    """The candidate [in] with the least output error on `samples`, or None for ones; and its error over that of ones.

    `samples` are rows [N, in] of a linear layer's input or crops [N, in, k, k] of a convolution's. Weight ranges are
    their maxima here, since a search for each candidate would take a hundred times as long and rank them the same.
    """
    weight, wanted = module.weight, _output(module, samples, module.weight)

    def error(multiplier: Tensor | None) -> float:
        m = 1.0 if multiplier is None else multiplier.reshape(1, -1, *[1] * (weight.ndim - 2))
        rows = weight / m
        rounded = fake_quant(rows, weight_scale(rows, get(weight_format), "max", block), get(weight_format)) * m
        inputs = samples
        if input_format is not None:
            x = samples if multiplier is None else samples * multiplier.reshape(1, -1, *[1] * (samples.ndim - 2))
            seen = AbsHistogram()
            seen.update(x)
            scale = input_scale(seen.counts, seen.centres(), seen.amax, get(input_format))
            inputs = fake_quant(x, scale, get(input_format))
            inputs = inputs if multiplier is None else inputs / multiplier.reshape(1, -1, *[1] * (samples.ndim - 2))
        return float((_output(module, inputs, rounded) - wanted).square().sum())

    plain = error(None)
    best, least = None, plain
    for candidate in candidates:
        found = error(candidate)
        if found < least:
            best, least = candidate, found
    return best, least / plain if plain > 0 else 1.0


def _output(module: nn.Conv2d | nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
    """Without bias, and of a convolution only where its kernel lies inside the crop."""
    if isinstance(module, nn.Linear):
        return linear(x, weight)
    return conv2d(x, weight, None, module.stride, 0, module.dilation)
