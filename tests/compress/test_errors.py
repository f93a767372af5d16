"""Relative errors over many tensors."""

import math

import pytest
import torch

from diffpress.compress.numerics.errors import relative_l2


def test_pairs_count_as_one_vector_and_come_one_by_one() -> None:
    got, wanted = (torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    whole = float((got - wanted).norm() / wanted.norm())
    assert relative_l2(zip(got, wanted, strict=True)) == pytest.approx(whole, rel=1e-6)
    assert relative_l2([(wanted, wanted)]) == 0
    # In float32 the sum of squares would overflow, and so small a difference from it would be lost.
    large = torch.full((4,), 1e25)
    assert relative_l2([(large + 1e22, large), (large, large)]) == pytest.approx(1e-3 / math.sqrt(2), rel=1e-3)


def test_nothing_wanted_is_no_division_by_zero_and_bad_values_show() -> None:
    zero = torch.zeros(2)
    assert relative_l2([(zero, zero)]) == 0
    assert relative_l2([(zero + 1, zero)]) == pytest.approx(math.sqrt(2) * 1e15)
    assert math.isnan(relative_l2([(zero / 0, zero + 1)]))
