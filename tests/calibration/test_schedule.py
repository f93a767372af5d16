"""Coefficient tables against diffusers' schedulers."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffpress.benchmarks.shapes.models import SCHEDULER
from diffpress.calibration.schedule import tabulate
from diffpress.errors import DiffpressError

BETAS = {key: SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset")}


def schedulers() -> list[Any]:
    karras = DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True)
    return [
        DDIMScheduler(**SCHEDULER),
        DPMSolverMultistepScheduler(**BETAS),
        karras,
        EulerDiscreteScheduler(**BETAS),
        UniPCMultistepScheduler(**BETAS),
        PNDMScheduler(**BETAS, skip_prk_steps=True),
    ]


@pytest.mark.parametrize("steps", [1, 2, 12, 50])
@pytest.mark.parametrize("scheduler", schedulers(), ids=lambda s: type(s).__name__)
def test_the_table_gives_diffusers_samples(scheduler: Any, steps: int) -> None:
    sampling = tabulate(scheduler, steps, 1.0, 64, 64)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(5)
    reference = torch.randn(1, 4, 4, 4, generator=generator) * scheduler.init_noise_sigma
    assert sampling.init_noise_sigma == pytest.approx(float(scheduler.init_noise_sigma))
    samples, outputs = [reference.double()], []
    for index, timestep in enumerate(scheduler.timesteps):
        assert sampling.timesteps[index] == float(timestep)
        scaled = scheduler.scale_model_input(reference, timestep)
        output = torch.tanh(scaled)  # a denoiser whose answer depends on its input
        reference = scheduler.step(output, timestep, reference, return_dict=False)[0]
        outputs.append(torch.tanh(samples[-1] * sampling.input_scale[index]))
        history = {"sample": samples, "output": outputs}
        samples.append(sum(c * history[kind][index - lag] for kind, lag, c in sampling.terms[index]))
    assert (samples[-1] - reference).norm() <= 1e-4 * reference.norm()


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(**{key: value for key, value in BETAS.items() if key != "steps_offset"}),
        DDIMScheduler(**{**SCHEDULER, "thresholding": True}),
        DDIMScheduler(**{**SCHEDULER, "clip_sample": True, "prediction_type": "epsilon"}),
    ],
    ids=["ddpm", "thresholding", "clipping"],
)
def test_thresholds_are_refused_by_name(scheduler: Any) -> None:
    with pytest.raises(DiffpressError, match=type(scheduler).__name__):
        tabulate(scheduler, 10, 1.0, 64, 64)
