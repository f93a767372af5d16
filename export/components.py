"""The graphs around the denoiser: text encoder, VAE decoder and encoder, with optimum's names for in- and outputs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.calibration.model import text_parts
from diffpress.export.graphs import GraphSpec

LAST, POOLED, STATES = "last_hidden_state", "text_embeds", "hidden_states"


@dataclass(frozen=True)
class TextPart:
    """A text encoder, and what of its graph's outputs the denoiser is told: `hidden` as text, `added` by their names."""

    name: str
    tokenizer: str
    hidden: str
    added: tuple[str, ...] = ()


def text_encoders(pipeline: Any) -> list[TextPart]:
    """The pipeline's text encoders; what they say of each token is joined.

    One alone is asked for its last state; of two, both are asked for the state before the last layer, and the second
    for its embedding of the whole text (Podell et al. 2023, SDXL, Section 2.1).
    """
    pairs = text_parts(pipeline)
    if len(pairs) == 1:
        return [TextPart(*pairs[0], LAST)]
    states = [f"{STATES}.{getattr(pipeline, name).config.num_hidden_layers - 1}" for name, _ in pairs]
    added: tuple[tuple[str, ...], ...] = ((), (POOLED,))
    return [TextPart(*pair, state, more) for pair, state, more in zip(pairs, states, added, strict=True)]


def text_entries(pipeline: Any) -> list[dict[str, Any]]:
    """The same for the manifest."""
    return [{**asdict(part), "added": list(part.added)} for part in text_encoders(pipeline)]


class TextEncoder(nn.Module):
    """input_ids [N, T] to the `outputs` of a CLIP text model: states [N, T, D] and the embedding of the text [N, D']."""

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


def _outputs(encoder: Any, part: TextPart) -> tuple[str, ...]:
    """All that ONNX pipelines look for: where a state in the middle is asked for, every one of them."""
    layers = encoder.config.num_hidden_layers if part.hidden != LAST else 0
    return (*part.added, LAST, *(f"{STATES}.{index}" for index in range(layers)))


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
    texts = {}
    for part in text_encoders(pipeline):
        encoder, tokenizer = getattr(pipeline, part.name), getattr(pipeline, part.tokenizer)
        encoded = tokenizer(
            ["a large red circle", ""],
            padding="max_length",
            max_length=tokens(pipeline),
            truncation=True,
            return_tensors="pt",
        )
        outputs = _outputs(encoder, part)
        texts[part.name] = GraphSpec(TextEncoder(encoder, outputs), {"input_ids": encoded.input_ids}, outputs)
    return texts | {
        "vae_decoder": GraphSpec(VaeDecoder(vae), {"latent_sample": latent}, ("sample",)),
        "vae_encoder": GraphSpec(VaeEncoder(vae), {"sample": image}, ("latent_parameters",)),
    }


def downscale(vae: Any) -> int:
    """Pixels along one side of a latent."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def tokens(pipeline: Any) -> int:
    """Length of an encoded prompt."""
    return int(pipeline.tokenizer.model_max_length)
