"""Streaming statistics against the same statistics of everything at once."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from diffpress.calibration.capture import Call
from diffpress.calibration.reservoir import Reservoir
from diffpress.calibration.statistics import (
    BINS,
    AbsHistogram,
    observe_channels,
    observe_inputs,
    row_of,
    sample_inputs,
    unreached,
)
from diffpress.errors import DiffpressError


def quiet(items: Iterable[Any], _: str) -> Iterable[Any]:
    return items


def histogram_of(*parts: Tensor) -> AbsHistogram:
    histogram = AbsHistogram()
    for part in parts:
        histogram.update(part)
    return histogram


def assert_same(a: AbsHistogram, b: AbsHistogram) -> None:
    assert torch.equal(a.counts, b.counts)
    assert (a.limit, a.amax, a.lowest, a.highest) == (b.limit, b.amax, b.lowest, b.highest)


def parts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    scales = (0.01, 3.0, 0.0, 1e-6, 100.0, 0.5)
    drawn = [torch.randn(7, 50, generator=generator) * scale for scale in scales]
    return [
        *drawn,
        torch.tensor([1.0, -2.0, 4.0, 128.0]),
        -torch.rand(9, generator=generator),
    ]  # powers of two: borders


def test_a_histogram_is_numpys_and_does_not_depend_on_the_order() -> None:
    values = torch.cat([part.flatten() for part in parts()])
    streamed = histogram_of(*parts())
    expected, _ = np.histogram(values.abs().numpy(), BINS, (0, streamed.limit))
    assert np.array_equal(streamed.counts.numpy(), expected)
    assert streamed.amax == float(values.abs().max()) < streamed.limit <= 2 * streamed.amax
    assert (streamed.lowest, streamed.highest) == (float(values.min()), float(values.max()))
    assert_same(streamed, histogram_of(values))
    assert_same(streamed, histogram_of(*reversed(parts())))


@pytest.mark.parametrize("at", range(9))
def test_merging_is_the_same_as_seeing_everything(at: int) -> None:
    merged, other = histogram_of(*parts()[:at]), histogram_of(*parts()[at:])
    kept = other.counts.clone()
    merged.merge(other)
    assert_same(merged, histogram_of(*parts()))
    assert torch.equal(other.counts, kept)


def test_zero_constant_and_nothing_are_told_apart() -> None:
    zeros, threes = histogram_of(torch.zeros(5), torch.zeros(2)), histogram_of(torch.full((4,), -3.0))
    assert (zeros.total, zeros.amax, zeros.constant) == (7, 0.0, True)
    assert (threes.total, threes.amax, threes.constant) == (4, 3.0, True)
    assert not histogram_of(torch.tensor([-3.0, 3.0])).constant
    assert (AbsHistogram().total, AbsHistogram().amax, AbsHistogram().constant) == (0, 0.0, False)


class Network(nn.Module):
    """Three layers and one that nothing reaches; the timestep scales the input, so steps differ."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.rows = nn.Linear(4, 5)
        self.last = nn.Linear(5, 2)
        self.idle = nn.Linear(2, 2)

    def forward(self, call: Call) -> Tensor:
        hidden = self.conv(call.sample * call.timestep)
        return self.last(torch.relu(self.rows(hidden.flatten(2).transpose(1, 2))))


@pytest.fixture
def network() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network().requires_grad_(False)


@pytest.fixture
def calls() -> list[Call]:
    generator = torch.Generator().manual_seed(1)
    text = torch.zeros(2, 1, 1)
    timesteps = (9.0, 4.0, 1.0) * 2
    return [Call(torch.randn(2, 3, 9, 9, generator=generator), torch.tensor([t]), text) for t in timesteps]


def inputs_of(network: Network, call: Call) -> dict[str, Tensor]:
    conv = call.sample * call.timestep
    rows = conv2d(conv, network.conv.weight, network.conv.bias, 2, 1).flatten(2).transpose(1, 2)
    return {"conv": conv, "rows": rows, "last": torch.relu(network.rows(rows))}


def layers(network: Network, *names: str) -> dict[str, nn.Module]:
    return {name: network.get_submodule(name) for name in names or ("conv", "rows", "last")}


def test_inputs_are_counted_per_layer_and_group(network: Network, calls: list[Call]) -> None:
    row = row_of((9.0, 4.0, 1.0))
    watched = layers(network, "conv", "rows", "last", "idle")
    found = observe_inputs(network, watched, calls, quiet, lambda call: min(row(call), 1), 2)
    for name in ("conv", "rows", "last"):
        for group, members in enumerate([(0, 3), (1, 2, 4, 5)]):
            assert_same(found[name][group], histogram_of(*(inputs_of(network, calls[i])[name] for i in members)))
    assert unreached(found) == ["idle"]
    assert found["rows"][0].amax > 1.5 * found["rows"][1].amax  # the groups are not the same
    (whole,) = observe_inputs(network, layers(network, "conv"), calls, quiet)["conv"]
    assert whole.total == sum(call.sample.numel() for call in calls)


def test_multipliers_scale_channels_before_counting(network: Network, calls: list[Call]) -> None:
    factors = {"conv": torch.tensor([1.0, 10.0, 0.0]), "last": torch.arange(5.0)}
    found = observe_inputs(network, layers(network), calls, quiet, multipliers=factors)
    inputs = [inputs_of(network, call) for call in calls]
    assert_same(found["conv"][0], histogram_of(*(x["conv"] * factors["conv"].reshape(1, 3, 1, 1) for x in inputs)))
    assert_same(found["last"][0], histogram_of(*(x["last"] * factors["last"] for x in inputs)))
    assert_same(found["rows"][0], histogram_of(*(x["rows"] for x in inputs)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_name_layer_and_timestep(network: Network, calls: list[Call], value: float) -> None:
    network.rows.bias[3] = value
    for observe in (observe_inputs, observe_channels, sample_inputs):
        with pytest.raises(DiffpressError, match=r"layer last .* not finite .* at timestep 9"):
            observe(network, layers(network), calls, quiet)
    assert not network.last._forward_pre_hooks


def test_channel_ranges_are_those_of_all_inputs(network: Network, calls: list[Call]) -> None:
    found = observe_channels(network, layers(network), calls, quiet)
    conv = torch.cat([inputs_of(network, call)["conv"] for call in calls]).abs()
    last = torch.cat([inputs_of(network, call)["last"].flatten(0, 1) for call in calls]).abs()
    assert torch.equal(found["conv"].largest, conv.amax(dim=(0, 2, 3)))
    assert torch.allclose(found["conv"].mean, conv.mean(dim=(0, 2, 3)))
    assert torch.equal(found["last"].largest, last.amax(dim=0))
    assert torch.allclose(found["last"].mean, last.mean(dim=0))
    for observe in (observe_channels, sample_inputs):
        with pytest.raises(DiffpressError, match="reaches 1 layers, such as idle"):
            observe(network, layers(network, "conv", "idle"), calls, quiet)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """The largest difference [A, B] between rows of a and of b."""
    return (a[:, None] - b[None]).abs().amax(dim=2)


def test_sampled_rows_are_rows_and_bounded(network: Network, calls: list[Call]) -> None:
    everything = torch.cat([inputs_of(network, call)["rows"].flatten(0, 1) for call in calls])
    sampled = sample_inputs(network, layers(network, "rows"), calls, quiet, count=40)["rows"]
    assert sampled.shape == (40, 4)
    assert (distances(sampled, everything).amin(dim=1) == 0).all()
    assert len(sampled.unique(dim=0)) == 40
    again = sample_inputs(network, layers(network, "rows"), calls, quiet, count=40)["rows"]
    other = sample_inputs(network, layers(network, "rows"), calls, quiet, count=40, seed=1)["rows"]
    assert torch.equal(sampled, again)
    assert not torch.equal(sampled, other)
    assert len(sample_inputs(network, layers(network, "rows"), calls, quiet, limit=16 * 7 + 3)["rows"]) == 7
    assert len(sample_inputs(network, layers(network, "rows"), calls, quiet, count=10**6)["rows"]) == len(everything)


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        (9, {"kernel_size": 3, "padding": 1}),
        (20, {"kernel_size": 3, "padding": 1, "stride": 2}),
        (30, {"kernel_size": (3, 5), "padding": (0, 2), "stride": (3, 1), "dilation": (2, 1)}),
        (9, {"kernel_size": 1}),
        (9, {"kernel_size": 3, "padding": "same", "padding_mode": "circular"}),
        (2, {"kernel_size": 3, "padding": 1}),
        (1, {"kernel_size": 3, "padding": 1, "stride": 2}),
    ],
)
def test_a_convolution_of_a_crop_is_part_of_the_convolution(size: int, fields: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(3, 4, **fields).requires_grad_(False)
    samples = [torch.randn(2, 3, size, size + 1, generator=generator) for _ in range(3)]
    calls = [Call(sample, torch.ones(1), torch.zeros(2, 1, 1)) for sample in samples]
    crops = sample_inputs(lambda call: conv(call.sample), {"conv": conv}, calls, quiet, count=25)["conv"]
    got = conv2d(crops, conv.weight, conv.bias, conv.stride, 0, conv.dilation)
    full = torch.cat([conv(sample) for sample in samples])
    height, width = min(6, full.shape[2]), min(6, full.shape[3])
    assert got.shape[2:] == (height, width)
    assert len(crops) == min(25, 6 * (full.shape[2] - height + 1) * (full.shape[3] - width + 1))
    windows = full.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    nearest = distances(got.flatten(1), windows.flatten(1)).min(dim=1)
    assert nearest.values.max() < 1e-5
    assert len(nearest.indices.unique()) == len(crops)  # none twice


def test_a_reservoir_keeps_every_part_of_the_stream_alike() -> None:
    reservoir = Reservoir(3000, 0)
    sizes = (5000, 1, 20000, 4999, 10000)
    for part, size in enumerate(sizes):
        reservoir.offer(size, lambda indices, part=part: torch.stack([torch.full_like(indices, part), indices], dim=1))
    assert len(reservoir.items.unique(dim=0)) == 3000
    kept = reservoir.items[:, 0].bincount(minlength=5)
    expected = torch.tensor(sizes) * 3000 / sum(sizes)
    assert ((kept - expected).abs() <= 5 * expected.sqrt().clamp_min(1)).all()


def test_a_call_belongs_to_the_nearest_row() -> None:
    row = row_of((900.0, 500.5, 500.5, 1.0))

    def call(timestep: float) -> Call:
        return Call(torch.zeros(1), torch.tensor([timestep]), torch.zeros(1))

    assert [row(call(t)) for t in (900.0, 500.5, 1.0)] == [0, 1, 3]
