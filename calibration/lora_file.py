"""Reads LoRA files: which layer each pair of matrices belongs to, and how much of their product is added.

Three ways to write a layer's name are in use: its path, as diffusers and peft have it; the path with underscores, as
kohya's scripts have it; and diffusers' own from before peft, where attention's projections were processors. The
renaming that diffusers does warns of what it does not know and goes on; here every tensor finds its layer, or the file
is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffpress.errors import DiffpressError

METADATA = "lora_adapter_metadata"  # where diffusers keeps the configuration of an adapter, as JSON
# How names end, longest first; the halves are A (down) and B (up) of the product B A.
_ENDS = re.compile(
    r"(?:\.lora_(?P<peft>[AB])|[._]lora(?:_linear_layer)?[._](?P<word>down|up))(?:\.default)?\.weight$|\.(?P<alpha>alpha)$"
)
# Parts of keys of other kinds of adapters, which a sum with B A is not.
_OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude": "DoRA",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "oft_": "OFT",
    "lora_mid": "LoCon in Tucker form",
}
# Prefixes of kohya's names.
_FLAT = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}
_OLD = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # in text encoders


@dataclass(frozen=True)
class Product:
    """What a LoRA adds to the layer `path` of a part: scale B A, with A [r, in, ...] and B [out, r, ...]."""

    part: str
    path: str
    down: Tensor
    up: Tensor
    scale: float


def read(file: Path, parts: Mapping[str, nn.Module]) -> list[Product]:
    """Every product of a LoRA for `parts` ("unet", "text_encoder").

    Raises `DiffpressError` for a file that is broken or another kind of adapter, and for tensors that are of no layer,
    do not fit theirs, or are not finite.
    """
    tensors, metadata = _load(file)
    layers = {part: _layers(root) for part, root in parts.items()}
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        other = next((kind for part, kind in _OTHERS.items() if part in key), None)
        if other is not None:
            raise DiffpressError(f"lora: {file.name} is a {other}, not a LoRA ('{key}'): merge it by its own tool")
        end = _ENDS.search(key)
        if end is None:
            raise DiffpressError(f"lora: {file.name} has '{key}', which is no part of a LoRA: only LoRAs are fused")
        half = end["peft"] or {"down": "A", "up": "B"}.get(end["word"], "alpha")
        where = _located(key[: end.start()], layers)
        if where is None:
            raise DiffpressError(f"lora: {file.name} changes '{key}', which this model lacks: it is for another model")
        found.setdefault(where, {})[half] = tensor
    if not found:
        raise DiffpressError(f"lora: {file.name} is empty")
    return [
        _product(file.name, part, path, halves, layers[part][path], metadata) for (part, path), halves in found.items()
    ]


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stream:
            metadata = json.loads((stream.metadata() or {}).get(METADATA, "{}"))
            if not isinstance(metadata, dict):
                raise ValueError(f"its {METADATA} are no JSON object")
            return {key: stream.get_tensor(key) for key in stream.keys()}, metadata  # noqa: SIM118  # it is no dict
    except (SafetensorError, OSError, ValueError) as error:
        raise DiffpressError(f"lora: {file} cannot be read, it is damaged or no safetensors file: {error}") from error


def _layers(root: nn.Module) -> dict[str, nn.Module]:
    named = root.named_modules()
    return {path: module for path, module in named if isinstance(getattr(module, "weight", None), Tensor)}


def _located(name: str, layers: Mapping[str, Mapping[str, nn.Module]]) -> tuple[str, str] | None:
    """The part and the path that a name means; None for no layer that there is."""
    for part, known in layers.items():
        for prefix in _FLAT[part]:
            if name.startswith(prefix):
                spelled = _spellings(name.removeprefix(prefix), "text_model_")
                return next(((part, path) for path in known if path.replace(".", "_") in spelled), None)
        if name.startswith(f"{part}."):
            dotted = name.removeprefix(f"{part}.").replace(".processor.", ".")
            module, _, last = dotted.rpartition(".")
            if part == "text_encoder":
                dotted = f"{module}.{_OLD.get(last, last)}"
            elif last == "to_out":
                dotted = f"{dotted}.0"
            return next(((part, path) for path in _spellings(dotted, "text_model.") if path in known), None)
    return None


def _spellings(name: str, level: str) -> tuple[str, str]:
    """With and without a level of text encoders that transformers 5 dropped."""
    return name, name.removeprefix(level)


def _product(
    file: str, part: str, path: str, halves: Mapping[str, Tensor], layer: nn.Module, metadata: Mapping[str, Any]
) -> Product:
    name = f"{part}.{path}"
    if not {"A", "B"} <= halves.keys():
        raise DiffpressError(f"lora: {file} has one half of '{name}' only: the file is not whole")
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise DiffpressError(f"lora: {file} changes '{name}', a {type(layer).__name__}, not a linear or conv layer")
    down, up, weight = halves["A"].float(), halves["B"].float(), layer.weight
    fits = down.ndim == up.ndim == weight.ndim and down.shape[1:] == weight.shape[1:] and len(down) > 0
    if not (fits and up.shape[:2] == (len(weight), len(down)) and up[0, 0].numel() == 1):
        raise DiffpressError(
            f"lora: {file} has {list(up.shape)} times {list(down.shape)} for '{name}', whose weight is "
            f"{list(weight.shape)}: it is for another model"
        )
    try:
        scale = _scale(part, path, len(down), halves.get("alpha"), metadata)
    except (re.error, ValueError, TypeError, AttributeError, IndexError) as error:
        raise DiffpressError(f"lora: {file} has an alpha for '{name}' that cannot be read: {error}") from error
    if not (math.isfinite(scale) and bool(down.isfinite().all() and up.isfinite().all())):
        raise DiffpressError(f"lora: {file} has values that are not finite (NaN or infinite) for '{name}'")
    return Product(part, path, down, up, scale)


def _scale(part: str, path: str, rank: int, alpha: Tensor | None, metadata: Mapping[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) where the metadata says so (Kalajdzievski 2023, rsLoRA); 1 where nothing does."""
    if alpha is not None:
        return float(alpha.flatten()[0]) / rank
    chosen = metadata.get(f"{part}.lora_alpha")
    for pattern, value in (metadata.get(f"{part}.alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?{pattern}", path):  # as peft reads them
            chosen = value
            break
    if chosen is None:
        return 1.0
    return float(chosen) / (math.sqrt(rank) if metadata.get(f"{part}.use_rslora") else rank)
