"""Simulation of a plan: rounding inside the block, the model as it was outside."""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import conv2d, linear

from diffpress.compress.numerics.formats import fake_quant, get
from diffpress.compress.numerics.ranges import weight_scale
from diffpress.compress.numerics.simulate import rounded_input, rounded_weight, simulated
from diffpress.plan import LayerQuant

INT8 = get("int8")


def numbers(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_rounds_inside_and_restores_outside() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    x = torch.randn(3, 8)
    kept, before = model[0].weight.detach().clone(), model(x)
    scale = weight_scale(model[0].weight, INT8)
    with simulated(model, {"0": LayerQuant(scale.numpy(), numbers(0.05))}):
        expected = linear(fake_quant(x, 0.05, INT8), fake_quant(kept, scale, INT8), model[0].bias)
        assert torch.allclose(model(x), expected)
    assert torch.equal(model[0].weight, kept)
    assert torch.equal(model(x), before)


def test_a_multiplier_changes_what_is_rounded_and_nothing_else() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1)
    multiplier = numbers(1, 0.5, 4, 0.1)
    x = torch.randn(2, 4, 5, 5) * torch.tensor([1, 2, 0.25, 10.0]).reshape(1, -1, 1, 1)
    fine = np.full(6, 1e-6, np.float32)
    quant = LayerQuant(fine * 1e2, numbers(1e-5), "e4m3", "e4m3", multiplier)
    # Of the scaled numbers: what Q sees is x * m and W / m.
    m = torch.from_numpy(multiplier).reshape(1, -1, 1, 1)
    scale = torch.from_numpy(quant.weight_scale)
    e4m3 = get("e4m3")
    expected = conv2d(fake_quant(x * m, 1e-5, e4m3), fake_quant(layer.weight / m, scale, e4m3), layer.bias, padding=1)
    model = nn.Sequential(layer)
    with simulated(model, {"0": quant}):
        assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    none = LayerQuant(np.full(6, 1e-4, np.float32), None, "int8", None, multiplier)
    assert torch.equal(rounded_input(x, none), x)


def test_power_of_two_multipliers_move_the_scale_exactly() -> None:
    weight = torch.randn(5, 8)
    plain = LayerQuant(np.full(5, 0.02, np.float32), numbers(0.1))
    moved = LayerQuant(np.full(5, 0.005, np.float32), numbers(0.4), multiplier=np.full(8, 4, np.float32))
    assert torch.equal(rounded_weight(weight, plain), rounded_weight(weight, moved))
    x = torch.randn(3, 8)
    assert torch.equal(rounded_input(x, plain), rounded_input(x, moved))


def test_every_step_has_its_own_scale() -> None:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time_proj = nn.Identity()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            self.time_proj(timestep)
            return self.layer(x)

    model, x = Denoiser(), torch.randn(2, 4)
    fine = np.full(4, 1e-4, np.float32)
    quant = LayerQuant(fine, numbers(0.5, 0.05, 0.005))
    weight = rounded_weight(model.layer.weight, quant)
    with torch.no_grad(), simulated(model, {"layer": quant}, (900.0, 500.0, 1.5)):
        for timestep, scale in ((1.0, 0.005), (900.0, 0.5), (499.0, 0.05)):
            got = model(x, torch.tensor([timestep]))
            assert torch.allclose(got, linear(fake_quant(x, scale, INT8), weight, model.layer.bias))
