"""Runs the reference pipeline and records what the denoiser was given, on disk, so that passes can replay it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffpress.plan import Sampling


@dataclass(frozen=True)
class Call:
    """One recorded call of the denoiser, both guidance halves: sample [2, C, H, W], timestep [1], text [2, T, D]."""

    sample: Tensor
    timestep: Tensor
    text: Tensor


@dataclass(frozen=True)
class Recordings:
    """Recorded calls in a folder, a file per prompt; iterating reads one file at a time."""

    folder: Path
    prompts: int
    steps: int  # calls of each prompt

    def __len__(self) -> int:
        return self.prompts * self.steps

    def __iter__(self) -> Iterator[Call]:
        for index in range(self.prompts):
            data = load_file(self.folder / f"{index:04}.safetensors")
            for sample, timestep in zip(data["samples"], data["timesteps"], strict=True):
                yield Call(sample, timestep.reshape(1), data["text"])


def cache_root() -> Path:
    """Where recordings are kept between runs: DIFFPRESS_CACHE, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "diffpress"
    return Path(os.environ.get("DIFFPRESS_CACHE", default))


def uniform_stride(calls: int, count: int) -> list[int]:
    """`count` call indices at a uniform stride over a schedule (Li et al. 2023, Q-Diffusion), the first among them."""
    count = min(count, calls)
    return sorted({round(index * (calls - 1) / max(1, count - 1)) for index in range(count)})


@torch.no_grad()
def record(
    pipeline: Any,
    model_digest: str,
    sampling: Sampling,
    prompts: Sequence[str],
    steps: int,
    seed: int,
    progress: Callable[[Iterable[Any], str], Iterable[Any]],
) -> Recordings:
    """The denoiser's inputs at `steps` calls of the schedule for every prompt, made once and reused from disk.

    The key is everything they depend on: model, prompts, schedule, guidance, seed. Prompt i starts from seed + i.
    """
    schedule = {name: value for name, value in sampling.to_json().items() if name != "terms"}
    key = json.dumps([model_digest, list(prompts), schedule, steps, seed, torch.__version__])
    folder = cache_root() / "calibration" / hashlib.sha256(key.encode()).hexdigest()[:24]
    chosen = uniform_stride(len(sampling.timesteps), steps)
    recordings = Recordings(folder, len(prompts), len(chosen))
    if folder.is_dir():
        return recordings
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(suffix=".partial", dir=folder.parent))
    try:
        for index, prompt in enumerate(progress(prompts, "recording")):
            tensors = _record_one(pipeline, sampling, prompt, seed + index, chosen)
            save_file(tensors, partial / f"{index:04}.safetensors")
        if not folder.is_dir():  # another run may have made the same
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return recordings


def _record_one(pipeline: Any, sampling: Sampling, prompt: str, seed: int, chosen: list[int]) -> dict[str, Tensor]:
    samples, timesteps, text = [], [], None
    call = 0

    def watch(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal call, text
        if call in chosen:
            samples.append(args[0].clone())
            timesteps.append(torch.as_tensor(args[1], dtype=torch.float32).reshape(()))
            text = kwargs["encoder_hidden_states"]
        call += 1

    hook = pipeline.unet.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        pipeline(
            prompt,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            height=sampling.height,
            width=sampling.width,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        )
    finally:
        hook.remove()
    assert text is not None
    return {"samples": torch.stack(samples), "timesteps": torch.stack(timesteps), "text": text.contiguous()}
