"""Grids against torch's own fake-quant, its float8 cast, and enumeration of every code."""

import pytest
import torch

from diffpress.compress.numerics.formats import FORMATS, fake_quant, get, quantize, spread, to_grid
from diffpress.errors import DiffpressError

INT8, INT4 = get("int8"), get("int4")


def test_per_tensor_equals_torch() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 2
    expected = torch.fake_quantize_per_tensor_affine(x, 0.02, 0, -128, 127)
    assert torch.allclose(fake_quant(x, 0.02, INT8), expected, atol=1e-7)


def test_per_channel_equals_torch() -> None:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    scale = torch.linspace(0.01, 0.06, 6)
    expected = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(6, dtype=torch.int32), 0, -128, 127)
    assert torch.allclose(fake_quant(weight, scale, INT8), expected, atol=1e-6)


def test_halves_round_to_even_and_ends_clip() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, 200.0, -200.0])
    assert quantize(x, 1.0, INT8).tolist() == [0, 2, 2, 0, 127, -128]
    assert quantize(x, 1.0, INT4).tolist() == [0, 2, 2, 0, 7, -8]


def test_e4m3_is_the_hardware_type() -> None:
    x = torch.cat([torch.randn(5000, generator=torch.Generator().manual_seed(2)) * 10.0**k for k in range(-5, 3)])
    x = torch.cat([x, torch.tensor([448.0, -448.0, 463.9, 464.1, 1e6, 0.0, 2**-9, 2**-10, 1.5 * 2**-10])])
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(to_grid(x, get("e4m3")), expected)


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.is_float])
def test_float_grids_are_their_codes_and_rounding_is_to_the_nearest(name: str) -> None:
    format = get(name)
    bias = 2 ** (format.exponent - 1) - 1
    codes = {
        (2.0 ** (max(e, 1) - bias)) * ((e > 0) + m / 2**format.mantissa)
        for e in range(2**format.exponent)
        for m in range(2**format.mantissa)
    }
    codes = {code for code in codes if code <= format.largest}
    grid = torch.tensor(sorted(codes | {-code for code in codes}))
    assert grid.max() == format.largest
    assert torch.equal(to_grid(grid, format), grid)
    x = torch.linspace(-1.2, 1.2, 4001) * format.largest
    nearest = (x[:, None] - grid).abs().min(dim=1).values
    assert torch.allclose((x - to_grid(x, format)).abs(), nearest, atol=1e-6 * format.largest)


def test_e2m1_has_the_eight_magnitudes_of_fp4() -> None:
    x = torch.linspace(0, 7, 701)
    assert to_grid(x, get("e2m1")).unique().tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_blocks_have_their_own_scales() -> None:
    weight = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(3))
    scale = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.05, 0.5], [1.0, 0.01]])
    rounded = fake_quant(weight, scale, INT4)
    for block in range(2):
        part = slice(4 * block, 4 * block + 4)
        assert torch.equal(rounded[:, part], fake_quant(weight[:, part], scale[:, block], INT4))
    with pytest.raises(DiffpressError, match="3 blocks do not divide 8"):
        spread(torch.ones(4, 3), weight)


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(DiffpressError, match="no number format 'int7', choose from: int8"):
        get("int7")
