"""Equivalent scaling: the same product, easier to round."""

import torch
from torch import nn

from diffpress.compress.quantize.scaling import (
    awq_candidates,
    best_multiplier,
    smooth_candidates,
    split_candidates,
)


def outlier_linear() -> tuple[nn.Linear, torch.Tensor]:
    """Two of sixteen input channels are a hundred times as large as the others."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(16, 24)
    layer.weight.data = torch.randn(24, 16, generator=generator)
    x = torch.randn(256, 16, generator=generator)
    x[:, :2] *= 100
    layer.weight.data[:, :2] /= 100
    return layer.requires_grad_(False), x


def test_smoothquant_is_its_equation() -> None:
    largest, weight = torch.tensor([8.0, 2.0, 0.0]), torch.tensor([[0.5, -1.0, 3.0], [0.25, 2.0, 1.0]])
    (found,) = smooth_candidates(largest, weight, [0.75])
    s = torch.tensor([8.0**0.75 / 0.5**0.25, 2.0**0.75 / 2.0**0.25])
    # Up to one factor for all channels, which changes no rounding; a channel that is never used is left alone.
    assert torch.allclose(found[:2] * s, (found[0] * s[0]).expand(2))
    assert found[2] == 1


def test_smoothing_outlier_channels_pays_and_is_found() -> None:
    layer, x = outlier_linear()
    candidates = smooth_candidates(x.abs().amax(0), layer.weight)
    best, ratio = best_multiplier(layer, x, candidates, "int8", "int8")
    assert best is not None
    assert best[:2].max() < 0.1 * best[2:].min()
    assert ratio < 0.05


def test_awq_protects_the_weights_that_matter() -> None:
    layer, x = outlier_linear()
    layer.weight.data[:, :2] *= 100  # now of the size of the others, and their error counts a hundredfold
    best, ratio = best_multiplier(layer, x, awq_candidates(x.abs().mean(0)), "int4", None, block=16)
    assert best is not None
    assert ratio < 0.7


def test_split_brings_the_halves_of_a_joined_input_together() -> None:
    generator = torch.Generator().manual_seed(1)
    layer = nn.Conv2d(12, 8, 3, padding=1).requires_grad_(False)
    x = torch.randn(20, 12, 6, 6, generator=generator)
    x[:, :8] *= 30
    candidates = list(split_candidates(x.abs().amax((0, 2, 3)), 8))
    assert torch.allclose(candidates[-1][8:] * x[:, 8:].abs().max(), x[:, :8].abs().max().expand(4))
    assert all((candidate[:8] == 1).all() for candidate in candidates)
    layer.weight.data[:, 8:] *= 30  # both halves matter
    best, ratio = best_multiplier(layer, x, candidates, "int8", "int8")
    assert best is not None
    assert ratio < 0.5


def test_ones_stay_where_nothing_is_better() -> None:
    layer = nn.Linear(8, 8).requires_grad_(False)
    x = torch.randn(64, 8)
    best, ratio = best_multiplier(layer, x, [torch.tensor([1.0, 1e3] * 4)], "int8", "int8")
    assert best is None
    assert ratio == 1.0
