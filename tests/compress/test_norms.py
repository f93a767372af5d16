"""Norms of channels that left evenly: the fit is the least squares, and it makes a cut network better."""

import copy
from typing import Any

import pytest
import torch

from diffpress.compress.prune.norms import cut_evenly
from diffpress.compress.prune.structure import cut
from diffpress.errors import DiffpressError

PATH = "down_blocks.0.resnets.0"
KEPT = [channel for channel in range(32) if channel % 4 != 1]


def inputs(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    return sample, torch.tensor([100.0, 700.0]), torch.randn(2, 5, 32, generator=generator)


@torch.no_grad()
def normalised(unet: Any, seed: int) -> torch.Tensor:
    """What the norm hands on [N, C, h, w]."""
    seen: list[torch.Tensor] = []
    hook = unet.get_submodule(PATH).norm2.register_forward_hook(lambda _, __, output: seen.append(output))
    unet(*inputs(seed))
    hook.remove()
    return seen[0]


@pytest.fixture
def unet(shared_unet: Any) -> Any:
    unet = copy.deepcopy(shared_unet)
    with torch.no_grad():
        # Channels of trained networks lie apart.
        unet.get_submodule(PATH).conv1.bias.normal_(std=1.0, generator=torch.Generator().manual_seed(3))
    return unet


def test_the_fit_is_the_least_squares_of_all_calls(unet: Any) -> None:
    wanted = torch.cat([normalised(unet, seed)[:, KEPT] for seed in (0, 1)])
    held = normalised(unet, 2)[:, KEPT]
    plain, refitted = copy.deepcopy(unet), unet
    cut(plain, {PATH: KEPT}, "even")
    now = torch.cat([normalised(plain, seed) for seed in (0, 1)])

    def forward() -> None:
        for seed in (0, 1):
            unet(*inputs(seed))

    cut_evenly(refitted, {PATH: KEPT}, forward)
    got = torch.cat([normalised(refitted, seed) for seed in (0, 1)])
    for channel in range(len(KEPT)):
        column = now[:, channel].flatten()
        matrix = torch.stack([column, torch.ones_like(column)], dim=1)
        fit = matrix @ torch.linalg.lstsq(matrix, wanted[:, channel].flatten()[:, None]).solution
        assert torch.allclose(got[:, channel].flatten(), fit[:, 0], atol=1e-4)
    before, after = (now - wanted).norm(), (got - wanted).norm()
    assert after < 0.7 * before
    # It holds for what it was not fitted on, too.
    assert (normalised(refitted, 2) - held).norm() < 0.8 * (normalised(plain, 2) - held).norm()
    assert not unet.get_submodule(PATH).norm2._forward_hooks


def test_a_channel_that_stands_still_and_a_bad_choice(unet: Any) -> None:
    with torch.no_grad():
        for parameter in unet.get_submodule(PATH).norm2.parameters():
            parameter[0] = 0
    for wrong in ([0, 1, 2], []):
        with pytest.raises(DiffpressError):
            cut_evenly(unet, {PATH: wrong}, lambda: unet(*inputs(0)))
    cut_evenly(unet, {PATH: KEPT}, lambda: unet(*inputs(0)))
    assert all(bool(parameter.isfinite().all()) for parameter in unet.parameters())
    assert float(unet.get_submodule(PATH).norm2.weight[0]) == 0
