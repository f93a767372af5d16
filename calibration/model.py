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

from diffpress.calibration.lora import Lora, fuse
from diffpress.errors import DiffpressError

SHAPES = "shapes"
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
    if name != "StableDiffusionPipeline":
        raise DiffpressError(
            f"pipeline class {name} is not supported yet: diffpress compresses StableDiffusionPipeline"
        )


def _check_tokenizer(pipeline: Any, model: str) -> None:
    """transformers makes an empty tokenizer up where files are missing; every prompt would be the same to it."""
    tokens, expected = len(pipeline.tokenizer), pipeline.text_encoder.config.vocab_size
    if tokens < expected or pipeline.tokenizer.model_max_length > pipeline.text_encoder.config.max_position_embeddings:
        raise DiffpressError(
            f"model {model} has no whole tokenizer ({tokens} tokens, its text encoder knows {expected}): "
            "check that tokenizer/ has all its files"
        )


def _check_finite(pipeline: Any, model: str) -> None:
    for name in ("unet", "vae", "text_encoder"):
        for path, parameter in getattr(pipeline, name).named_parameters():
            if not bool(parameter.isfinite().all()):
                raise DiffpressError(
                    f"model {model} has values that are not finite (NaN or infinite) in {name}'s {path}: "
                    "load its weights anew or take another checkpoint"
                )


def load_pipeline(model: str, loras: Sequence[Lora] = ()) -> Any:
    """The pipeline in float32 on the CPU, in evaluation mode, without safety checker and progress bar; LoRAs fused.

    Raises `DiffpressError` when it is missing, broken or of a class that is not supported yet, or a LoRA does not fit.
    """
    from diffusers import StableDiffusionPipeline

    folder = folder_of(model)
    if folder is not None:
        _check_folder(folder, model)
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(folder or model),
            dtype=torch.float32,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    # diffusers, transformers, safetensors and json each raise their own kind for a file that is absent or cut short.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise DiffpressError(f"model {model} could not be loaded, check that it is whole: {reason}") from error
    _check_tokenizer(pipeline, model)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        # A checkpoint stored in half precision must not stay there: the reference is float32.
        part.to(torch.float32)
    fuse(pipeline, loras)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.eval().requires_grad_(False)
    _check_finite(pipeline, model)
    return pipeline
