from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.benchmarks.candidates import Reference, batch_size, draw
from diffpress.plan import Sampling

STEPS = 3


@pytest.fixture(scope="module")
def reference(tiny_pipeline: Path) -> Reference:
    from diffusers import DDIMScheduler

    from diffpress.benchmarks.shapes.models import SCHEDULER
    from diffpress.calibration.schedule import tabulate

    sampling: Sampling = tabulate(DDIMScheduler(**SCHEDULER), STEPS, 3.0, 32, 32)
    return Reference.load(str(tiny_pipeline), sampling, {"class": "DDIMScheduler", "config": SCHEDULER})


def test_reference_draws_what_diffusers_draws(reference: Reference) -> None:
    import torch

    images = reference(["a red star", "a blue ring"], [4, 5], keep_latents=True)
    expected = reference.pipeline(
        ["a red star", "a blue ring"],
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (4, 5)],
        output_type="pil",
    ).images
    assert np.array_equal(images.pixels, np.stack([np.asarray(image) for image in expected]))
    assert [latent.shape for latent in images.latents] == [(2, 4, 8, 8)] * STEPS


def test_reference_times_its_stages_and_steps(reference: Reference) -> None:
    images = reference(["a red star"], [0])
    assert images.latents == []
    assert len(images.step_ms) == STEPS and min(images.step_ms) > 0
    assert sum(images.step_ms) == pytest.approx(images.stage_ms["denoise"])
    assert all(value > 0 for value in images.stage_ms.values())
    assert not reference.pipeline.unet._forward_pre_hooks


def test_another_schedule_leaves_the_reference_as_it_was(reference: Reference) -> None:
    import torch
    from diffusers import StableDiffusionPipeline, UniPCMultistepScheduler

    from diffpress.benchmarks.shapes.models import SCHEDULER
    from diffpress.calibration.schedule import tabulate

    before = reference(["a red star"], [0], keep_latents=True)
    scheduler = UniPCMultistepScheduler.from_config(dict(SCHEDULER), use_karras_sigmas=True)
    other = reference.on(tabulate(scheduler, 5, 3.0, 32, 32))
    drawn = other(["a red star"], [0], keep_latents=True)
    again = reference(["a red star"], [0], keep_latents=True)
    assert np.array_equal(before.latents[-1], again.latents[-1])
    assert other.pipeline.unet is reference.pipeline.unet and len(drawn.latents) == 5
    expected = StableDiffusionPipeline(**reference.pipeline.components | {"scheduler": scheduler})(
        "a red star",
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(0)],
        output_type="latent",
    ).images
    assert np.allclose(drawn.latents[-1], expected.numpy(), atol=1e-4)


def test_drawing_in_batches_keeps_order_and_trajectories(fake_candidate: Callable[..., Any]) -> None:
    candidate, told = fake_candidate(), []
    drawn = draw(candidate, ["x"] * 7, range(7), batch=3, keep=4, on_batch=told.append)
    assert told == [3, 3, 1]
    assert drawn.pixels.shape == (7, 64, 64, 3) and drawn.latents.shape == (7, 4, 8, 8)
    assert drawn.trajectory.shape == (3, 4, 4, 8, 8)
    alone = candidate(["x"], [5], keep_latents=True)
    assert np.array_equal(drawn.pixels[5], alone.pixels[0])
    assert np.array_equal(drawn.trajectory[-1], drawn.latents[:4])
    assert draw(candidate, ["x"], [0], batch=3).trajectory.shape[1] == 0


@pytest.mark.parametrize(("side", "size"), [(8, 16), (16, 16), (32, 4), (64, 1), (128, 1)])
def test_batch_size(side: int, size: int) -> None:
    assert batch_size({"channels": 4, "height": side, "width": side}) == size
