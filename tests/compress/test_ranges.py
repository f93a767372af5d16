"""Range searches against brute force on the values themselves."""

import pytest
import torch
from torch import Tensor

from diffpress.calibration.statistics import AbsHistogram
from diffpress.compress.numerics.formats import fake_quant, get
from diffpress.compress.numerics.ranges import block_of, grouped, input_scale, weight_scale
from diffpress.errors import DiffpressError

INT8, INT4 = get("int8"), get("int4")


@pytest.fixture
def weight() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, 3, 3, generator=generator) * torch.tensor([0.1, 1, 3, 1, 1, 1]).reshape(-1, 1, 1, 1)
    weight[4] = 0
    weight[5, 0, 0, 0] = 40  # an outlier
    return weight


@pytest.fixture
def values() -> Tensor:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(2))
    x[:3] = torch.tensor([30.0, -28.0, 25.0])
    return x


def histogram_of(values: Tensor) -> AbsHistogram:
    histogram = AbsHistogram()
    for part in values.split(1000):
        histogram.update(part)
    return histogram


@pytest.mark.parametrize(("method", "power"), [("l2.4", 2.4), ("mse", 2.0)])
@pytest.mark.parametrize("name", ["int4", "e2m1"])
def test_a_searched_weight_scale_is_the_best_of_its_candidates(
    weight: Tensor, name: str, method: str, power: float
) -> None:
    format = get(name)
    found = weight_scale(weight, format, method)
    for channel in (0, 1, 2, 3, 5):
        row = weight[channel].flatten()
        scales = [float(row.abs().max()) / format.largest * (1 - 0.01 * i) for i in range(80)]
        errors = [float((row - fake_quant(row, scale, format)).abs().pow(power).mean()) for scale in scales]
        mine = float((row - fake_quant(row, float(found[channel]), format)).abs().pow(power).mean())
        assert mine <= min(errors) * (1 + 1e-4)
    assert found[4] == 1
    assert found[2] < 0.99 * weight[2].abs().max() / format.largest  # cutting the tail pays at four bits


@pytest.mark.parametrize("name", ["int8", "e4m3", "int4"])
@pytest.mark.parametrize("tail", [0.0, 1.0])
def test_a_search_that_ends_early_misses_nothing(name: str, tail: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(32, 500, generator=generator) / torch.rand(32, 500, generator=generator).clamp_min(0.02) ** tail
    rows[7] = 0
    found = weight_scale(rows, get(name))
    monkeypatch.setattr("diffpress.compress.numerics.ranges.BOUND", 0.0)  # so every candidate is tried
    assert torch.equal(found, weight_scale(rows, get(name)))


def test_max_never_clips_and_blocks_are_searched_one_by_one(weight: Tensor) -> None:
    scale = weight_scale(weight, INT8, "max")
    assert torch.allclose(scale[5] * 127, torch.tensor(40.0))
    blocks = weight_scale(weight, INT4, "l2.4", block=2)
    assert blocks.shape == (6, 2)
    assert torch.equal(blocks[:, 1], weight_scale(weight[:, 2:], INT4, "l2.4"))
    with pytest.raises(DiffpressError, match="blocks of 3 do not divide 4"):
        weight_scale(weight, INT4, "l2.4", block=3)


def test_a_weight_that_is_not_finite_is_refused(weight: Tensor) -> None:
    weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(DiffpressError, match="not finite"):
        weight_scale(weight, INT8)


@pytest.mark.parametrize(("method", "power"), [("l2.4", 2.4), ("mse", 2.0)])
def test_a_histogram_gives_the_scale_that_the_values_give(values: Tensor, method: str, power: float) -> None:
    seen = histogram_of(values)
    found = input_scale(seen.counts, seen.centres(), seen.amax, INT8, method)

    def error(scale: float) -> float:
        return float((values - fake_quant(values, scale, INT8)).abs().pow(power).sum())

    errors = [error(30 / 127 * (1 - 0.01 * i)) for i in range(80)]
    assert error(found) <= 1.02 * min(errors)
    assert max(errors) > 2 * min(errors)  # so that the choice matters


def test_percentile_and_entropy_cut_outliers_and_max_does_not(values: Tensor) -> None:
    seen = histogram_of(values)
    scales = {
        method: input_scale(seen.counts, seen.centres(), seen.amax, INT8, method)
        for method in ("max", "percentile", "entropy")
    }
    assert scales["max"] == pytest.approx(30 / 127)
    exact = float(values.abs().sort().values[int(0.9999 * len(values)) - 1])
    assert scales["percentile"] * 127 == pytest.approx(exact, rel=0.01)
    assert 3 / 127 < scales["entropy"] < 0.5 * scales["max"]


def test_entropy_keeps_a_uniform_distribution_whole() -> None:
    seen = histogram_of(torch.linspace(-1, 1, 50000))
    assert input_scale(seen.counts, seen.centres(), seen.amax, INT8, "entropy") > 0.97 / 127


def test_inputs_that_were_always_zero_have_scale_one() -> None:
    seen = histogram_of(torch.zeros(100))
    assert input_scale(seen.counts, seen.centres(), seen.amax, INT8) == 1.0


def test_groups_and_blocks() -> None:
    assert grouped([9.0, 7.0, 5.0, 3.0, 1.0], 2) == [0, 0, 0, 1, 1]
    assert grouped([9.0, 5.0, 1.0], 8) == [0, 1, 2]
    assert grouped([9.0, 5.0, 5.0, 1.0], 8) == [0, 1, 1, 2]  # equal steps share theirs, and none is left empty
    assert [block_of(width, 64) for width in (128, 48, 320, 7)] == [64, 16, 64, 1]
