"""The model on prompts of its own, as schedules are searched and judged: whole trajectories without a pipeline around.

A search asks for the same prompts and noise under many schedules, so text is encoded once and rows of a batch may stand
at noise levels of their own. Guidance is part of the model here, as it is of the trajectories that users see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffpress.calibration import conditions
from diffpress.calibration.conditions import Text
from diffpress.calibration.tabulated import Tabulated
from diffpress.compress.schedule.sigmas import sigma_table, timestep_of
from diffpress.plan import Sampling

# out_sample [N, C, h, w] from sample [N, C, h, w], timesteps [N] and text [N, T, D]
Network = Callable[[Tensor, Tensor, Text], Tensor]


@dataclass(frozen=True)
class Trajectories:
    """N prompts with their noise: text [N, T, D] twice, noise [N, C, h, w] of standard deviation 1.

    `alphas` [T] is the scheduler's alphas_cumprod, `prediction` its prediction_type; at most `batch` images are
    evaluated together.
    """

    network: Network
    conditional: Text
    unconditional: Text
    noise: Tensor
    guidance_scale: float
    alphas: np.ndarray
    prediction: str
    batch: int = 32

    @classmethod
    def begin(
        cls, pipeline: Any, network: Network, sampling: Sampling, prompts: Sequence[str], seed: int, batch: int = 32
    ) -> Trajectories:
        """Encode the prompts with `pipeline`; image i starts from the noise of seed + i, as everywhere in diffpress."""
        text, empty = conditions.encode(pipeline, prompts, sampling)
        factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        shape = (1, pipeline.unet.config.in_channels, sampling.height // factor, sampling.width // factor)
        noise = [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed + index)) for index in range(len(prompts))
        ]
        config = pipeline.scheduler.config
        alphas = pipeline.scheduler.alphas_cumprod.double().numpy()
        scale = sampling.guidance_scale
        return cls(network, text, empty, torch.cat(noise), scale, alphas, config.prediction_type, batch)

    def __len__(self) -> int:
        return len(self.noise)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Largest and smallest noise level that the model was trained on."""
        table = sigma_table(self.alphas)
        return float(table[-1]), float(table[0])

    def start(self) -> Tensor:
        """x [N, C, h, w] at the largest sigma, variance exploding."""
        return self.noise * math.sqrt(1 + self.sigma_range[0] ** 2)

    def output(self, sample: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        """The guided network's answer [M, C, h, w] to samples [M, ...] at timesteps [M] of the prompts `rows` [M]."""
        made = []
        for part in torch.arange(len(sample)).split(self.batch):
            x, t, prompt = sample[part], timesteps[part], rows[part]
            if self.guidance_scale <= 1:
                made.append(self.network(x, t, self.conditional[prompt]))
                continue
            text = conditions.cat([self.unconditional[prompt], self.conditional[prompt]])
            without, given = self.network(torch.cat([x, x]), torch.cat([t, t]), text).chunk(2)
            made.append(without + self.guidance_scale * (given - without))
        return torch.cat(made)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D [M, C, h, w] of x = x0 + sigma eps for sigma [M]; row i is of prompt i modulo N."""
        rows = torch.arange(len(x)) % len(self)
        level = sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x)
        scale = (1 + level**2).rsqrt()
        timesteps = torch.from_numpy(timestep_of(sigma.cpu().numpy(), self.alphas)).to(x)
        output = self.output(x * scale, timesteps, rows)
        if self.prediction == "epsilon":
            return x - level * output
        if self.prediction == "sample":
            return output
        return scale**2 * x - level * scale * output

    def final(self, sampling: Sampling) -> Tensor:
        """The latents [N, C, h, w] at the end of a schedule."""
        scheduler = Tabulated(sampling, None)
        rows, sample = torch.arange(len(self)), self.noise * sampling.init_noise_sigma
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(sample)
            output = self.output(scaled, timestep.expand(len(self)), rows)
            sample = scheduler.step(output, timestep, sample).prev_sample
        return sample


def torch_network(unet: Any) -> Network:
    """The denoiser itself."""

    def call(sample: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        with torch.no_grad():
            x, t, told = sample.to(unet.device), timesteps.to(unet.device), text.to(unet.device)
            output: Tensor = unet(x, t, **conditions.arguments(told), return_dict=False)[0]
            return output.cpu()

    return call


def relative_error(latents: Tensor, reference: Tensor) -> Tensor:
    """|latents - reference| / |reference| of each image [N]."""
    error = (latents - reference).flatten(1).double().norm(dim=1)
    return error / reference.flatten(1).double().norm(dim=1).clamp_min(1e-12)
