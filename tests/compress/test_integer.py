"""Integer arithmetic against torch's own fake-quant and against brute force."""

import numpy as np
import pytest
import torch

from diffpress.calibration.statistics import BINS, AbsHistogram
from diffpress.compress.numerics.integer import (
    fake_quant,
    quantize,
    scale_of,
    search_input_scale,
    search_weight_scale,
)
from diffpress.compress.numerics.simulate import simulated
from diffpress.plan import LayerQuant


@pytest.fixture
def weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, 3, 3, generator=generator) * torch.tensor([0.1, 1, 3, 1, 1, 1]).reshape(-1, 1, 1, 1)
    weight[4] = 0
    weight[5, 0, 0, 0] = 40  # an outlier
    return weight


def test_per_tensor_equals_torch() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 2
    expected = torch.fake_quantize_per_tensor_affine(x, 0.02, 0, -128, 127)
    assert torch.allclose(fake_quant(x, 0.02), expected, atol=1e-7)


def test_per_channel_equals_torch(weight: torch.Tensor) -> None:
    scale = torch.linspace(0.01, 0.06, 6)
    zeros = torch.zeros(6, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -128, 127)
    assert torch.allclose(fake_quant(weight, scale, axis=0), expected, atol=1e-6)


def test_halves_round_to_even_and_ends_clip() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, 200.0, -200.0])
    assert quantize(x, 1.0).tolist() == [0, 2, 2, 0, 127, -128]
    assert quantize(x, 1.0, bits=4).tolist() == [0, 2, 2, 0, 7, -8]


def test_searched_weight_scale_is_the_best_of_its_candidates(weight: torch.Tensor) -> None:
    found = search_weight_scale(weight, bits=4)
    for channel in (0, 1, 2, 3, 5):
        row = weight[channel].flatten()
        errors = {}
        for i in range(80):
            scale = row.abs().max() / 7 * (1 - 0.01 * i)
            errors[float(scale)] = float((row - fake_quant(row, scale, 4)).abs().pow(2.4).mean())
        assert errors[min(errors, key=lambda s: abs(s - float(found[channel])))] <= min(errors.values()) * (1 + 1e-5)
    assert found[4] == 1
    assert found[2] < 0.99 * scale_of(weight[2].abs().max(), 4)  # cutting the tail pays at four bits


def test_histogram_search_agrees_with_the_values_themselves() -> None:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(2))
    x[:3] = torch.tensor([30.0, -28.0, 25.0])
    histogram = AbsHistogram()
    for part in x.split(1000):
        histogram.update(part)
    found = search_input_scale(histogram.counts, histogram.centres(), histogram.amax)

    def error(scale: float) -> float:
        return float((x - fake_quant(x, scale)).abs().pow(2.4).sum())

    errors = [error(30 / 127 * (1 - 0.01 * i)) for i in range(80)]
    assert error(found) <= 1.02 * min(errors)
    assert max(errors) > 2 * min(errors)  # so that the choice matters


def test_histogram_keeps_every_count_while_its_range_grows() -> None:
    histogram = AbsHistogram()
    for factor in (1, 3, 50, 0):
        histogram.update(torch.linspace(-1, 1, 500) * factor)
    assert histogram.counts.sum() == 2000
    assert histogram.counts.shape == (BINS,)
    assert histogram.amax == 50
    # Three quarters of the values are at most 3, wherever the range ended up.
    assert histogram.counts[histogram.centres() <= 3.1].sum() == pytest.approx(1500 + 31, abs=2)


def test_simulation_rounds_inside_and_restores_outside() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    x = torch.randn(3, 8)
    kept, before = model[0].weight.detach().clone(), model(x)
    scale = search_weight_scale(model[0].weight)
    with simulated(model, {"0": LayerQuant(scale.numpy(), 0.05)}):
        expected = torch.nn.functional.linear(fake_quant(x, 0.05), fake_quant(kept, scale, axis=0), model[0].bias)
        assert torch.equal(model(x), expected)
    assert torch.equal(model[0].weight, kept)
    assert torch.equal(model(x), before)
    assert not np.isnan(before.detach().numpy()).any()
