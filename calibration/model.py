"""Opens the pipeline to compress: a diffusers folder, a hub id, or `shapes`."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpress.calibration import structure
from diffpress.calibration.lora import Lora, fuse
from diffpress.errors import DiffpressError

SHAPES = "shapes"
# By class, what is not opened: neither changes the picture but by looking at it or marking it.
CLASSES: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"safety_checker": None, "requires_safety_checker": False},
    "StableDiffusionXLPipeline": {"add_watermarker": False},
}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_WEIGHTS = (".safetensors", ".bin")


def is_shapes(model: str) -> bool:
    """Whether `model` names the embedded pipeline."""
    return model == SHAPES


def folder_of(model: str) -> Path | None:
    """The local folder `model` names, or None for a hub id."""
    if is_shapes(model):
        from importlib.resources import files

        return Path(str(files("diffpress") / "benchmarks" / "shapes" / "weights" / "pipeline"))
    path = Path(model)
    # "owner/name" may be a hub id; whatever exists here, or is written as a path, is not.
    looks_local = path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1
    return path.expanduser() if looks_local else None


def digest(model: str) -> str:
    """Identifies a model by its configuration and weight files (names, sizes, and the head and tail of their bytes)."""
    folder = folder_of(model)
    if folder is None:
        return hashlib.sha256(model.encode()).hexdigest()
    state = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix in (".json", ".txt", *_WEIGHTS):
            state.update(f"{file.relative_to(folder).as_posix()}:{file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                # Gigabytes of weights are told apart by their ends; a full hash would cost seconds at every start.
                state.update(stream.read(1 << 20))
                stream.seek(max(0, file.stat().st_size - (1 << 20)))
                state.update(stream.read())
    return state.hexdigest()


def state_digest(module: nn.Module) -> str:
    """Identifies a module's tensors as they are in memory: names, shapes, types and values."""
    state = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        # A checksum, since a cryptographic hash of gigabytes takes several times as long.
        check = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        state.update(f"{name}:{list(tensor.shape)}:{tensor.dtype}:{check}\n".encode())
    return state.hexdigest()


def networks(pipeline: Any) -> dict[str, nn.Module]:
    """The networks that a pipeline has, by its names for them."""
    found = {name: getattr(pipeline, name, None) for name in PARTS}
    return {name: part for name, part in found.items() if part is not None}


def text_parts(pipeline: Any) -> list[tuple[str, str]]:
    """The pipeline's names of every text encoder and its tokenizer."""
    pairs = [(name, name.replace("text_encoder", "tokenizer")) for name in networks(pipeline)]
    return [pair for pair in pairs if pair[0].startswith("text_encoder")]


def _check_class(name: str) -> None:
    if name not in CLASSES:
        raise DiffpressError(
            f"pipeline class {name} is not supported yet: diffpress compresses {' and '.join(CLASSES)}"
        )


def _check_folder(folder: Path, model: str) -> None:
    if not folder.is_dir():
        raise DiffpressError(f"there is no model at {model}: give a diffusers folder, a hub id or 'shapes'")
    index = folder / "model_index.json"
    if not index.is_file():
        raise DiffpressError(f"{model} is not a diffusers pipeline: it has no model_index.json")
    try:
        name = json.loads(index.read_text("utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise DiffpressError(f"{index} cannot be read: {error}") from error
    _check_class(name)


def _check_parts(pipeline: Any, model: str) -> None:
    """transformers makes an empty tokenizer up where files are missing; every prompt would be the same to it."""
    for encoder, tokenizer in text_parts(pipeline):
        config, given = getattr(pipeline, encoder).config, getattr(pipeline, tokenizer)
        if len(given) < config.vocab_size or given.model_max_length > config.max_position_embeddings:
            raise DiffpressError(
                f"model {model} has no whole tokenizer ({len(given)} tokens, its text encoder knows "
                f"{config.vocab_size}): check that {tokenizer}/ has all its files"
            )
    lengths = {getattr(pipeline, tokenizer).model_max_length for _, tokenizer in text_parts(pipeline)}
    if len(lengths) > 1:
        raise DiffpressError(f"model {model} has tokenizers of different lengths, {sorted(lengths)}: not supported yet")
    if pipeline.vae.config.get("latents_mean") is not None:
        raise DiffpressError(f"model {model} has a VAE that centres its latents (latents_mean): not supported yet")


def _check_finite(pipeline: Any, model: str) -> None:
    for name, network in networks(pipeline).items():
        for path, parameter in network.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise DiffpressError(
                    f"model {model} has values that are not finite (NaN or infinite) in {name}'s {path}: "
                    "load its weights anew or take another checkpoint"
                )


def load_pipeline(model: str, loras: Sequence[Lora] = ()) -> Any:
    """The pipeline in float32 on the CPU, in evaluation mode, without safety checker and progress bar; LoRAs fused.

    A folder that `structure.save` wrote of a U-Net with parts cut out opens as it was. Raises `DiffpressError` when it
    is missing, broken or of a class that is not supported yet, or a LoRA does not fit.
    """
    import diffusers

    folder = folder_of(model)
    if folder is not None:
        _check_folder(folder, model)
    try:
        name = diffusers.DiffusionPipeline.load_config(str(folder or model))["_class_name"]
        _check_class(name)
        given = CLASSES[name]
        if folder is not None and (folder / "unet" / structure.RECORD).exists():
            given = {**given, "unet": structure.load(folder / "unet")}
        pipeline = getattr(diffusers, name).from_pretrained(
            str(folder or model), dtype=torch.float32, feature_extractor=None, **given
        )
    except DiffpressError:
        raise
    # diffusers, transformers, safetensors and json each raise their own kind for a file that is absent or cut short.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise DiffpressError(f"model {model} could not be loaded, check that it is whole: {reason}") from error
    _check_parts(pipeline, model)
    pipeline.set_progress_bar_config(disable=True)
    for part in networks(pipeline).values():
        # A checkpoint stored in half precision must not stay there: the reference is float32.
        part.to(torch.float32)
    fuse(pipeline, loras)
    for part in networks(pipeline).values():
        part.eval().requires_grad_(False)
    _check_finite(pipeline, model)
    return pipeline
