"""The graphs around the denoiser: text encoder, VAE decoder and encoder, with optimum's names for in- and outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffpress.compress.families import texts
from diffpress.compress.families.texts import LAST, STATES
from diffpress.export.graphs import GraphSpec


class TextEncoder(nn.Module):
    """input_ids [N, T] to the `outputs` of a CLIP text model: states [N, T, D], the embedding of the text [N, D']."""

    def __init__(self, encoder: Any, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        self.outputs = outputs

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        if self.outputs == (LAST,):
            return (self.encoder(input_ids).last_hidden_state,)
        made = self.encoder(input_ids, output_hidden_states=True)
        return tuple(
            made.hidden_states[int(name.rpartition(".")[2])] if name.startswith(STATES) else getattr(made, name)
            for name in self.outputs
        )


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
    vae = pipeline.vae
    down = downscale(vae)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, vae.config.latent_channels, height // down, width // down, generator=generator)
    image = torch.rand(2, vae.config.in_channels, height, width, generator=generator) * 2 - 1
    encoders = {}
    for part in texts.text_encoders(pipeline):
        encoder, tokenizer = getattr(pipeline, part.name), getattr(pipeline, part.tokenizer)
        encoded = tokenizer(
            ["a large red circle", ""],
            padding="max_length",
            max_length=texts.tokens(pipeline),
            truncation=True,
            return_tensors="pt",
        )
        outputs = texts.outputs(encoder, part)
        encoders[part.name] = GraphSpec(TextEncoder(encoder, outputs), {"input_ids": encoded.input_ids}, outputs)
    return encoders | {
        "vae_decoder": GraphSpec(VaeDecoder(vae), {"latent_sample": latent}, ("sample",)),
        "vae_encoder": GraphSpec(VaeEncoder(vae), {"sample": image}, ("latent_parameters",)),
    }


def downscale(vae: Any) -> int:
    """Pixels along one side of a latent."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))
