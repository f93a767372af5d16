"""The graphs around the denoiser: text encoder, VAE decoder and encoder, with optimum's names for in- and outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffpress.export.graphs import GraphSpec


class TextEncoder(nn.Module):
    """input_ids [N, T] to last_hidden_state [N, T, D]."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids).last_hidden_state


class VaeDecoder(nn.Module):
    """latent_sample [N, C, h, w], already divided by the scaling factor, to sample [N, 3, H, W] in -1..1."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.vae.decode(latent_sample, return_dict=False)[0]


class VaeEncoder(nn.Module):
    """sample [N, 3, H, W] in -1..1 to latent_parameters [N, 2C, h, w]: mean, then log variance."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> Tensor:
        return self.vae.encode(sample, return_dict=False)[0].parameters


def specs(pipeline: Any, height: int, width: int) -> dict[str, GraphSpec]:
    """A graph per component folder; height and width in pixels."""
    vae, text = pipeline.vae, pipeline.text_encoder
    down = downscale(vae)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, vae.config.latent_channels, height // down, width // down, generator=generator)
    image = torch.rand(2, vae.config.in_channels, height, width, generator=generator) * 2 - 1
    encoded = pipeline.tokenizer(
        ["a large red circle", ""],
        padding="max_length",
        max_length=tokens(pipeline),
        truncation=True,
        return_tensors="pt",
    )
    return {
        "text_encoder": GraphSpec(TextEncoder(text), {"input_ids": encoded.input_ids}, ("last_hidden_state",)),
        "vae_decoder": GraphSpec(VaeDecoder(vae), {"latent_sample": latent}, ("sample",)),
        "vae_encoder": GraphSpec(VaeEncoder(vae), {"sample": image}, ("latent_parameters",)),
    }


def downscale(vae: Any) -> int:
    """Pixels along one side of a latent."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def tokens(pipeline: Any) -> int:
    """Length of an encoded prompt."""
    return int(pipeline.tokenizer.model_max_length)
