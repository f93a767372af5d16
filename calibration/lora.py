"""LoRAs, fused into the weights before anything else happens to them (Hu et al. 2022): W + scale alpha / r B A.

diffusers and peft read the formats (diffusers', peft's, kohya's) and fuse. They warn of what does not fit and go on, so
everything is checked here before a weight changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from diffpress.errors import DiffpressError, require

USUAL = "pytorch_lora_weights.safetensors"  # what diffusers calls the file
# Parts of keys of other kinds of adapters, which a sum with B A is not.
OTHERS = {"dora_scale": "DoRA", "lora_magnitude": "DoRA", "hada_w": "LoHa", "lokr_w": "LoKr", "oft_": "OFT"}
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


def fuse(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Add every LoRA to the U-Net and the text encoder of a diffusers pipeline, in place.

    Raises `DiffpressError`, with no weight changed, for a file that is missing or broken, for keys that are of nothing
    in this model, and for shapes that are not those of its layers.
    """
    if not loras:
        return
    require("peft", "compress", "fuse a LoRA")
    for lora in loras:
        _check(pipeline, lora.file)
    for lora in loras:
        # The file and not its tensors: peft's own scaling (alpha, rslora) stands in the metadata.
        pipeline.load_lora_weights(
            str(lora.file.parent), weight_name=lora.file.name, use_safetensors=True, local_files_only=True
        )
        try:
            pipeline.fuse_lora(lora_scale=lora.scale)
        finally:
            pipeline.unload_lora_weights()


def _check(pipeline: Any, file: Path) -> None:
    """Raise `DiffpressError` unless every tensor of `file` belongs to a layer of the pipeline and fits it."""
    halves: dict[str, dict[str, Tensor]] = {}  # by the layer that they belong to: A and B
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    for key, tensor in _normalized(file, parts).items():
        layer, _, kind = key.rpartition(".lora_")
        if kind not in ("A.weight", "B.weight"):
            raise DiffpressError(f"lora: {file.name} has '{key}', which is no part of a LoRA: only LoRAs are fused")
        halves.setdefault(layer, {})[kind[0]] = tensor
    layers = {f"{part}.{path}": module for part, root in parts.items() for path, module in root.named_modules()}
    strangers = [layer for layer in halves if layer not in layers]
    if strangers or not halves:
        what = f"'{strangers[0]}' (and {len(strangers) - 1} more)" if strangers else "nothing"
        raise DiffpressError(f"lora: {file.name} changes {what}, which this model lacks: it was made for another model")
    for layer, pair in halves.items():
        if pair.keys() != {"A", "B"}:
            raise DiffpressError(f"lora: {file.name} has one half of '{layer}' only: the file is not whole")
        _check_shapes(file.name, layer, layers[layer], pair["A"], pair["B"])


def _check_shapes(name: str, layer: str, module: nn.Module, down: Tensor, up: Tensor) -> None:
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise DiffpressError(
            f"lora: {name} changes '{layer}', a {type(module).__name__}: only linear and conv layers can"
        )
    weight, rank = module.weight, len(down)
    fits = down.ndim == up.ndim == weight.ndim and down.shape[1:] == weight.shape[1:]
    if not (fits and up.shape[:2] == (len(weight), rank) and up[0, 0].numel() == 1):
        raise DiffpressError(
            f"lora: {name} has {list(up.shape)} times {list(down.shape)} for '{layer}', whose weight is "
            f"{list(weight.shape)}: it was made for another model"
        )
    if not bool(down.isfinite().all() and up.isfinite().all()):
        raise DiffpressError(f"lora: {name} has values that are not finite (NaN or infinite) for '{layer}'")


def _normalized(file: Path, parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of `file` under peft's names, `<part>.<layer>.lora_A.weight`, whichever format it has."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise DiffpressError(f"lora: {file} cannot be read, it is damaged or no safetensors file: {error}") from error
    for key in tensors:
        other = next((kind for part, kind in OTHERS.items() if part in key), None)
        if other is not None:
            raise DiffpressError(
                f"lora: {file.name} is a {other}, not a LoRA ('{key}'): merge it with the tool it is from"
            )
    try:
        named, _ = StableDiffusionPipeline.lora_state_dict(dict(tensors))
    # diffusers asserts and raises what its renaming runs into: a key without its other half, say.
    except (ValueError, KeyError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DiffpressError(f"lora: {file.name} is not in a format that diffusers reads: {reason}") from error
    found = {key: value for key, value in named.items() if not key.startswith(tuple(f"{part}." for part in parts))}
    for part, root in parts.items():
        own = {key.removeprefix(f"{part}."): value for key, value in named.items() if key.startswith(f"{part}.")}
        own = {key: value for key, value in own.items() if not key.endswith(".alpha")}
        if part == "text_encoder":
            own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own)) if own else {}
            # transformers 5 dropped a level that files still have; diffusers drops it as well.
            if not hasattr(root, "text_model"):
                own = {key.removeprefix("text_model."): value for key, value in own.items()}
        elif own and "lora_A" not in next(iter(own)):
            own = convert_unet_state_dict_to_peft(own)
        found |= {f"{part}.{key}": value for key, value in own.items()}
    return found
