"""Opens what training left: the committed folder, or the work folder of a training that still runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from diffpress.benchmarks.shapes import models, scenes
from diffpress.benchmarks.shapes.judge import pixels_to_tensor
from diffpress.errors import DiffpressError


@dataclass(frozen=True)
class Networks:
    """The networks of `shapes` in evaluation mode; None where training has not come that far."""

    tokenizer: Any
    clip: Any = None
    vae: Any = None
    pipeline: Any = None
    reader: Any = None


def open_networks(folder: Path) -> Networks:
    """Read `folder`: pipeline/, clip/ and reader.safetensors, or training state (its averaged weights)."""
    if (folder / "pipeline" / "model_index.json").is_file():
        return _assembled(folder)
    if (folder / "tokenizer").is_dir() and any(folder.glob("*.state.safetensors")):
        return _training_state(folder)
    raise DiffpressError(
        f"{folder} holds neither trained weights nor training state: give --weights the folder of either"
    )


def _assembled(folder: Path) -> Networks:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel

    pipeline = StableDiffusionPipeline.from_pretrained(folder / "pipeline", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    clip = CLIPModel.from_pretrained(folder / "clip").float().eval() if (folder / "clip").is_dir() else None
    file, reader = folder / "reader.safetensors", None
    if file.is_file():
        reader = models.Reader()
        reader.load_state_dict(load_file(file))
        reader.eval()
    return Networks(pipeline.tokenizer, clip, pipeline.vae, pipeline, reader)


def _training_state(work: Path) -> Networks:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")

    def averaged(name: str, make: Callable[[], Any]) -> Any:
        file = work / f"{name}.state.safetensors"
        if not file.is_file():
            return None
        network = make()
        tensors = {key[8:]: value for key, value in load_file(file).items() if key.startswith("average.")}
        missing = network.load_state_dict(tensors, strict=False).missing_keys
        # The average has no integer buffers; anything else means that the state is of another network.
        if any(network.state_dict()[key].is_floating_point() for key in missing):
            raise DiffpressError(f"{file} holds the state of another network: train that stage again")
        return network.eval()

    towers = averaged("clip", lambda: nn.ModuleDict({"clip": models.make_clip(tokenizer)}))  # beside training's heads
    clip = towers["clip"] if towers is not None else None
    vae = averaged("vae", models.make_vae)
    unet = averaged("unet", models.make_unet)
    reader = averaged("reader", models.Reader)
    pipeline = None
    if clip is not None and vae is not None:
        vae.register_to_config(scaling_factor=_scaling_factor(vae))
    if clip is not None and vae is not None and unet is not None:
        text = CLIPTextModel(clip.config.text_config).eval()
        text.load_state_dict(clip.text_model.state_dict(), strict=False)
        pipeline = StableDiffusionPipeline(
            vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=models.make_scheduler(),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
    return Networks(tokenizer, clip, vae, pipeline, reader)


@torch.no_grad()
def _scaling_factor(vae: Any) -> float:
    """As training computes it, over the same first 512 pictures of its data."""
    images = np.stack([image for _, _, image in scenes.dataset(512, 0)])
    latents = vae.encode(pixels_to_tensor(images)).latent_dist.mean
    return round(1 / latents.std().item(), 5)
