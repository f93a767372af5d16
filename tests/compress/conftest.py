"""A small denoiser with two recorded prompts, for passes that measure and choose."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffpress.calibration.capture import Call
from diffpress.calibration.schedule import tabulate
from diffpress.compress.work import Work

STEPS, GUIDANCE = 4, 3.0


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


@pytest.fixture(scope="module")
def shared_unet() -> Any:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            mid_block_type=None,
            block_out_channels=(32, 32),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
        ).requires_grad_(False)


class _Recorded(list[Call]):
    """Recordings in memory, of every second call."""

    def rows(self) -> set[int]:
        return set(range(0, STEPS, 2))


@pytest.fixture
def work(shared_unet: Any, tmp_path: Path) -> Work:
    """Two recorded prompts with two calls each; weights are put back by every test that changes them."""
    sampling = tabulate(_scheduler(), STEPS, GUIDANCE, 64, 64)
    generator = torch.Generator().manual_seed(1)
    calls = _Recorded()
    for _ in range(2):
        text = torch.randn(2, 5, 32, generator=generator)
        for timestep in sampling.timesteps[::2]:
            sample = torch.randn(1, 4, 8, 8, generator=generator).repeat(2, 1, 1, 1)
            calls.append(Call(sample, torch.tensor([timestep]), text))
    return Work(SimpleNamespace(unet=shared_unet), sampling, 0, lambda _: calls, lambda items, _: items, tmp_path)  # type: ignore[arg-type,return-value]
