"""AdaRound and LSQ against their definitions."""

import numpy as np
import pytest
import torch
from torch import Tensor

from diffpress.compress.numerics import adaround
from diffpress.compress.numerics.formats import FORMATS, fake_quant, get, to_grid
from diffpress.compress.numerics.ranges import weight_scale
from diffpress.compress.numerics.simulate import rounded_weight
from diffpress.plan import LayerQuant


def layer_of(weight: Tensor, format: str, block: int | None = None, multiplier: np.ndarray | None = None) -> LayerQuant:
    """Ranges that clip a little, so that the ends of the grid are tried too."""
    scaled = weight if multiplier is None else weight / torch.from_numpy(multiplier).reshape(1, -1, 1, 1)
    scale = weight_scale(scaled, get(format), "max", block) * 0.8
    return LayerQuant(scale.numpy(), None, format, None, multiplier)


def cases() -> list[tuple[Tensor, LayerQuant]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, 3, 3, generator=generator)
    weight[0, 0] = 0.0  # pruned weights have no exponent
    multiplier = np.geomspace(0.3, 3, 8).astype(np.float32)
    plain = [(weight, layer_of(weight, name)) for name in FORMATS]
    return [
        *plain,
        (weight, layer_of(weight, "int4", block=4)),
        (weight, layer_of(weight, "e2m1", 4, multiplier)),
        (weight, layer_of(weight, "int8", None, multiplier)),
        (weight[:, :, 0, 0], layer_of(weight[:, :, 0, 0], "int4", block=2)),
    ]


CASES = [
    pytest.param(weight, layer, id=f"{layer.weight_format}-{index}") for index, (weight, layer) in enumerate(cases())
]


@pytest.mark.parametrize(("weight", "layer"), CASES)
def test_hard_rounding_of_the_initial_a_is_to_nearest(weight: Tensor, layer: LayerQuant) -> None:
    cells = adaround.cells(weight, layer)
    a = adaround.initial(cells)
    decided = (cells.fraction - 0.5).abs() > 1e-5  # halfway, both ends are nearest
    assert decided.float().mean() > 0.9
    assert torch.equal(adaround.hard(cells, a)[decided], rounded_weight(weight, layer)[decided])


@pytest.mark.parametrize(("weight", "layer"), CASES)
def test_no_weight_moves_by_more_than_a_step_and_all_stay_on_the_grid(weight: Tensor, layer: LayerQuant) -> None:
    cells = adaround.cells(weight, layer)
    format = cells.format
    a = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 4
    units = (weight / cells.multiplier / cells.scale).clamp(format.smallest, format.largest)
    for rounded in (adaround.hard(cells, a), adaround.hard(cells, -a)):
        points = rounded / cells.multiplier / cells.scale
        assert torch.equal(rounded_weight(rounded, layer), rounded), "rounding again must change nothing"
        assert torch.allclose(to_grid(points, format), points, rtol=1e-5, atol=1e-6)
        assert bool(((points - units).abs() <= cells.step + 1e-4).all())
    # The two ends of a cell are neighbours: no point of the grid lies between them.
    low, high = (adaround.hard(cells, torch.full_like(weight, end)) for end in (-1.0, 1.0))
    middle = (low + high) / 2 / cells.multiplier / cells.scale
    nearest = to_grid(middle, format) * cells.scale * cells.multiplier
    assert bool((torch.isclose(nearest, low, rtol=1e-5) | torch.isclose(nearest, high, rtol=1e-5)).all())


@pytest.mark.parametrize(("weight", "layer"), CASES)
def test_soft_weight_starts_at_the_weight_and_ends_at_the_hard_one(weight: Tensor, layer: LayerQuant) -> None:
    cells = adaround.cells(weight, layer)
    a = adaround.initial(cells)
    ends = cells.place(torch.zeros_like(a)), cells.place(torch.ones_like(a))
    inside = (weight >= ends[0]) & (weight <= ends[1])
    assert inside.float().mean() > 0.3  # the rest is clipped
    assert torch.allclose(adaround.soft(cells, a)[inside], weight[inside], rtol=1e-4, atol=1e-5)
    settled = torch.where(a >= 0, 12.0, -12.0)
    h = adaround.rectified_sigmoid(settled)
    assert set(h.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(adaround.soft(cells, settled), adaround.hard(cells, settled))


def test_zero_stays_zero_on_every_grid() -> None:
    weight = torch.zeros(2, 3)
    for name in FORMATS:
        cells = adaround.cells(weight, LayerQuant(np.ones(2, np.float32), None, name, None))
        assert not adaround.hard(cells, adaround.initial(cells)).any()
        assert not adaround.hard(cells, torch.ones_like(weight)).any()  # pruning may have made it
        cells = adaround.cells(weight + 1e-9, LayerQuant(np.ones(2, np.float32), None, name, None))
        up = adaround.hard(cells, torch.ones_like(weight))
        levels = to_grid(torch.linspace(0, 4, 200_001), cells.format).unique()
        assert torch.equal(up, levels[1].expand_as(up)), f"{name}: one step up of next to zero is the smallest number"


def test_gradient_reaches_a_through_the_soft_weight() -> None:
    weight = torch.tensor([[0.3, -0.7, 1.2]])
    cells = adaround.cells(weight, LayerQuant(np.array([0.5], np.float32), None, "int4", None))
    a = adaround.initial(cells).requires_grad_()
    adaround.soft(cells, a).sum().backward()
    sigmoid = torch.sigmoid(a.detach())
    assert torch.allclose(a.grad, 0.5 * 1.2 * sigmoid * (1 - sigmoid))


def test_regularizer_is_zero_only_when_decided() -> None:
    assert adaround.regularizer(torch.tensor([20.0, -20.0]), 2.0) == 0
    assert adaround.regularizer(torch.zeros(3), 20.0) == pytest.approx(3.0)
    a = torch.tensor([0.4])
    h = adaround.rectified_sigmoid(a)
    assert adaround.regularizer(a, 3.0) == pytest.approx(float(1 - (2 * h - 1) ** 3))


def test_b_waits_a_fifth_then_falls_from_20_to_2() -> None:
    schedule = [adaround.annealed(iteration, 101) for iteration in range(101)]
    assert schedule[:21] == [None] * 21
    rest = schedule[21:]
    assert rest[0] == pytest.approx(20, abs=0.3)
    assert rest[-1] == pytest.approx(2)
    assert np.allclose(np.diff(rest, 2), 0, atol=1e-9)
    assert adaround.annealed(0, 1) is None


@pytest.mark.parametrize("name", FORMATS)
def test_lsq_rounds_like_fake_quant_with_the_published_gradient(name: str) -> None:
    format = get(name)
    x = (torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * format.largest * 0.3).requires_grad_()
    scale = torch.tensor([0.4, 0.7, 1.0, 1.3]).requires_grad_()  # a scale per sample
    out = adaround.lsq(x, scale, format)
    assert torch.allclose(out, fake_quant(x, scale, format), rtol=1e-6)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(upstream)
    units = (x / scale[:, None]).detach()
    outside = (units < format.smallest) | (units > format.largest)
    assert 0 < outside.float().mean() < 0.5
    published = torch.where(outside, units.clamp(format.smallest, format.largest), to_grid(units, format) - units)
    assert torch.allclose(scale.grad, (upstream * published).sum(dim=1), rtol=1e-4, atol=1e-3)
    assert torch.allclose(x.grad, upstream * ~outside)


def test_lsq_finds_a_better_scale_than_it_was_given() -> None:
    format = get("int4")
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    scale = (x.abs().max() / format.largest * 2).requires_grad_()
    before = (adaround.lsq(x, scale, format) - x).square().mean().item()
    optimizer = torch.optim.Adam([scale], lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        (adaround.lsq(x, scale, format) - x).square().mean().backward()
        optimizer.step()
    assert (adaround.lsq(x, scale, format) - x).square().mean() < 0.3 * before
