"""LoRAs, fused into the weights before anything else happens to them: W + scale alpha / r B A (Hu et al. 2022)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffpress.calibration import lora_file
from diffpress.errors import DiffpressError

USUAL = "pytorch_lora_weights.safetensors"  # what diffusers calls the file
LCM = "lcm"
LCM_STEPS, LCM_GUIDANCE = (4, 8), (1.0, 2.0)  # Luo et al. 2023, LCM-LoRA: what it was distilled for


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Lora:
    """A line `lora:` of a recipe: a safetensors file, or a folder with one, and how much of it is added.

    `lcm` says that it makes a latent consistency model of the model, which has its own scheduler and few steps. Where
    that is left open, the name tells: `lcm` in that of the file or of its folder.
    """

    path: Path
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    lcm: bool | None = None

    @property
    def is_lcm(self) -> bool:
        """Whether it is an LCM-LoRA."""
        path = self.path.expanduser()
        return any(LCM in name.lower() for name in (path.name, path.parent.name)) if self.lcm is None else self.lcm

    @property
    def file(self) -> Path:
        """The file with the weights; raises `DiffpressError` where there is none, or none of the right kind."""
        path = self.path.expanduser()
        if path.is_dir():
            found = sorted(path.glob("*.safetensors"))
            path = path / USUAL if path / USUAL in found or len(found) != 1 else found[0]
            if not path.is_file():
                names = ", ".join(entry.name for entry in found) or "none"
                raise DiffpressError(f"lora: {path.parent} should hold one safetensors file, it has: {names}")
        if path.suffix != ".safetensors":
            raise DiffpressError(f"lora: {path} is no safetensors file, and pickles are never opened: convert it first")
        if not path.is_file():
            raise DiffpressError(f"lora: there is no file at {path}")
        return path


def digest(loras: Sequence[Lora]) -> str:
    """Identifies LoRAs by the bytes of their files and their scales, in order; empty for none."""
    if not loras:
        return ""
    state = hashlib.sha256()
    for lora in loras:
        with lora.file.open("rb") as stream:
            state.update(f"{lora.scale!r} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return state.hexdigest()


def described(loras: Sequence[Lora]) -> list[dict[str, Any]]:
    """LoRAs as a manifest names them."""
    return [{"file": lora.file.name, "scale": lora.scale, "digest": digest([lora])} for lora in loras]


@torch.no_grad()
def fuse(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Add every LoRA to the U-Net and the text encoder of a diffusers pipeline, in place.

    Raises `DiffpressError`, with no weight changed, for a file that is missing or broken, for keys that are of nothing
    in this model, and for shapes that are not those of its layers.
    """
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    products = [(lora.scale, lora_file.read(lora.file, parts)) for lora in loras]
    for scale, found in products:
        for entry in found:
            weight = parts[entry.part].get_submodule(entry.path).weight
            product = entry.up.flatten(1) @ entry.down.flatten(1)
            weight += scale * entry.scale * product.reshape(weight.shape).to(weight)
