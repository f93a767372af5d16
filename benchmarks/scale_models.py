"""Pipelines of full size with random weights, from their public configurations: nothing is downloaded.

The numbers are those of the models' config.json files: runwayml/stable-diffusion-v1-5 (Rombach et al. 2022),
stabilityai/stable-diffusion-2-1 and stabilityai/stable-diffusion-xl-base-1.0 (Podell et al. 2023).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, TOKENS = 49408, 77  # of CLIP's tokenizer and of its prompts
BEGIN, END = "<|startoftext|>", "<|endoftext|>"  # the last two of the vocabulary, as in CLIP's
GROUPS = 32  # of the normalisations, which every width is a multiple of
HEAD = 64  # channels of a head of CLIP's text models

CROSS_DOWN, PLAIN_DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
FOUR_LEVELS = {
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, PLAIN_DOWN),
    "up_block_types": (PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}


@dataclass(frozen=True)
class Text:
    """A CLIP text model."""

    heads: int
    layers: int
    act: str
    projection: int
    pooled: bool = False  # whether it is the class with a projection


@dataclass(frozen=True)
class Model:
    """A pipeline: configurations of its networks; `pixels` along a side."""

    unet: Mapping[str, Any]
    texts: tuple[Text, ...]
    pixels: int
    scaling_factor: float
    scheduler: tuple[str, Mapping[str, Any]]


CLIP_L, CLIP_H = Text(12, 12, "quick_gelu", 768), Text(16, 23, "gelu", 512)
MODELS = {
    "sd15": Model(
        {**FOUR_LEVELS, "cross_attention_dim": 768, "attention_head_dim": 8},
        (CLIP_L,),
        512,
        0.18215,
        ("PNDMScheduler", {**BETAS, "skip_prk_steps": True, "set_alpha_to_one": False}),
    ),
    "sd21": Model(
        {
            **FOUR_LEVELS,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        (CLIP_H,),
        768,
        0.18215,
        ("DDIMScheduler", {**BETAS, "set_alpha_to_one": False, "clip_sample": False,
                           "prediction_type": "v_prediction"}),
    ),
    "sdxl": Model(
        {
            "down_block_types": (PLAIN_DOWN, CROSS_DOWN, CROSS_DOWN),
            "up_block_types": (CROSS_UP, CROSS_UP, PLAIN_UP),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "layers_per_block": 2,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        (CLIP_L, Text(20, 32, "gelu", 1280, pooled=True)),
        1024,
        0.13025,
        ("EulerDiscreteScheduler", {**BETAS, "timestep_spacing": "leading"}),
    ),
}  # fmt: skip


def smaller(model: Model, divide: int, pixels: int | None = None) -> Model:
    """The same with widths, heads and text layers divided: for trying things out."""
    texts = tuple(
        replace(text, heads=_part(text.heads, divide), layers=max(2, text.layers // divide)) for text in model.texts
    )
    texts = tuple(replace(text, projection=HEAD * text.heads) for text in texts)
    unet = dict(model.unet)
    unet["block_out_channels"] = _widths(unet["block_out_channels"], divide)
    heads = unet["attention_head_dim"]
    unet["attention_head_dim"] = (
        _part(heads, divide) if isinstance(heads, int) else tuple(_part(head, divide) for head in heads)
    )
    unet["cross_attention_dim"] = sum(HEAD * text.heads for text in texts)
    if "projection_class_embeddings_input_dim" in unet:
        unet["projection_class_embeddings_input_dim"] = texts[-1].projection + 6 * unet["addition_time_embed_dim"]
    return replace(model, unet=unet, texts=texts, pixels=pixels or model.pixels)


def _part(count: int, divide: int) -> int:
    return max(1, count // divide)


def _widths(channels: Sequence[int], divide: int) -> tuple[int, ...]:
    return tuple(GROUPS * max(1, width // divide // GROUPS) for width in channels)


def networks(model: Model, divide: int = 1) -> dict[str, nn.Module]:
    """The pipeline's networks by its names for them, without memory for their weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        channels = _widths(VAE["block_out_channels"], divide)  # type: ignore[arg-type]
        found: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel(sample_size=model.pixels // 8, **model.unet),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                sample_size=model.pixels,
                scaling_factor=model.scaling_factor,
                **{**VAE, "block_out_channels": channels},
            ),
        }
        for index, text in enumerate(model.texts):
            config = CLIPTextConfig(
                vocab_size=VOCABULARY,
                hidden_size=HEAD * text.heads,
                intermediate_size=4 * HEAD * text.heads,
                num_hidden_layers=text.layers,
                num_attention_heads=text.heads,
                max_position_embeddings=TOKENS,
                hidden_act=text.act,
                projection_dim=text.projection,
                bos_token_id=0,
                eos_token_id=2,  # as these models have it: the end of a text is then the largest of its ids
                pad_token_id=1,
            )
            kind = CLIPTextModelWithProjection if text.pooled else CLIPTextModel
            found["text_encoder" if index == 0 else f"text_encoder_{index + 1}"] = kind(config)
    return found


def create(model: Model, folder: Path, divide: int = 1, seed: int = 0) -> dict[str, int]:
    """Write the pipeline as a diffusers folder, float16; returns the parameters of every network.

    One tensor is in memory at a time.
    """
    import diffusers

    made = networks(model, divide)
    scheduler, config = model.scheduler
    generator = torch.Generator().manual_seed(seed)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if len(model.texts) > 1 else "StableDiffusionPipeline",
        "_diffusers_version": importlib.metadata.version("diffusers"),
        "scheduler": ["diffusers", scheduler],
    }
    index |= {"force_zeros_for_empty_prompt": True} if len(model.texts) > 1 else {"requires_safety_checker": False}
    for name, network in made.items():
        library = "diffusers" if name in ("unet", "vae") else "transformers"
        index[name] = [library, type(network).__name__]
        stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
        any_network: Any = network
        if library == "diffusers":
            any_network.save_config(folder / name)
        else:
            any_network.config.save_pretrained(folder / name)
        write_weights(folder / name / f"{stem}.safetensors", network.state_dict(), generator)
        if library == "transformers":
            tokenizer = name.replace("text_encoder", "tokenizer")
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
            make_tokenizer(folder / tokenizer, pad="!" if name.endswith("2") else END)
    getattr(diffusers, scheduler)(**config).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index, indent=1), "utf-8")
    return {name: sum(parameter.numel() for parameter in network.parameters()) for name, network in made.items()}


def write_weights(file: Path, shapes: Mapping[str, Tensor], generator: torch.Generator) -> None:
    """Random float16 weights for tensors (of the meta device) by name, in the safetensors format."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in shapes.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in shapes.items():
            stream.write(weight(name, tensor.shape, generator).half().contiguous().numpy().tobytes())


def weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """As torch would begin to train it: uniform within 1 / sqrt(inputs), so that signals keep their size.

    Factors of normalisations lie around one, all else that has one dimension around zero.
    """
    bound = 1 / math.sqrt(math.prod(shape[1:]) if len(shape) > 1 else max(shape))
    values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return values + 1 if len(shape) == 1 and name.endswith("weight") else values


def make_tokenizer(folder: Path, pad: str = END) -> None:
    """CLIP's tokenizer with the bytes of a text as its tokens: no vocabulary of words is at hand.

    Ids reach as far as CLIP's, those of bytes and marks are the same; the words between them are never found.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    pieces += [f"<|word {index}|>" for index in range(len(pieces), VOCABULARY - 2)]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, BEGIN, END])}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS, pad_token=pad).save_pretrained(folder)
