import math

import numpy as np
import pytest
import torch

from diffpress.errors import DiffpressError
from diffpress.runtime.noise import Generator, randn


@pytest.mark.parametrize("size", [*range(1, 50), 100, 255, 256, 257, 1000, 1024, 4099, 16384])
def test_equal_to_torch_at_every_size(size: int) -> None:
    expected = torch.randn(size, generator=torch.Generator().manual_seed(size))
    np.testing.assert_allclose(randn(size, (size,)), expected.numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**53 + 3, 2**64 - 1, -1, -(2**63)])
@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (3,)])
def test_equal_to_torch_at_every_seed(seed: int, shape: tuple[int, ...]) -> None:
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    ours = randn(seed, shape)
    assert ours.shape == shape
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=2e-6)


def test_a_million_values_stay_close_in_the_tails() -> None:
    expected = torch.randn(2**20 + 5, generator=torch.Generator().manual_seed(3)).numpy()
    assert np.abs(randn(3, (2**20 + 5,)) - expected).max() < 4e-6
    assert math.isclose(float(expected.std()), 1, abs_tol=1e-2)


@pytest.mark.parametrize("sizes", [(48, 48, 48), (100, 17, 256), (5, 3, 1, 4), (3, 48, 2, 50, 1), (1, 0, 1, 16, 7)])
def test_draws_follow_each_other_as_in_torch(sizes: tuple[int, ...]) -> None:
    theirs, ours = torch.Generator().manual_seed(11), Generator(11)
    for size in sizes:
        np.testing.assert_allclose(ours.randn((size,)), torch.randn(size, generator=theirs).numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5, "7"])
def test_a_seed_that_torch_refuses_is_refused(seed: int) -> None:
    with pytest.raises(DiffpressError, match="seed"):
        randn(seed, (16,))
