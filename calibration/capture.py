"""Runs the reference pipeline and records what the denoiser was given, on disk, so that passes can replay it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffpress.calibration import conditions
from diffpress.calibration.conditions import Text
from diffpress.calibration.model import state_digest
from diffpress.calibration.processes import make_missing, on_fastest_device
from diffpress.calibration.sets import CalibrationSet
from diffpress.errors import DiffpressError
from diffpress.paths import cache_root
from diffpress.plan import FULL, Sampling


@dataclass(frozen=True)
class Call:
    """One recorded call of the denoiser, both guidance halves: sample [2, C, H, W], timestep [1], text [2, T, D].

    Where the denoiser is told more than a text, `text` is all of it (`calibration.conditions`).
    `variant` is the graph of the step program that ran; `features` [2, C', H', W'] are those it read. Of a call that
    computes the conditional half alone, sample and features have one row; the last of the text is the one it takes.
    """

    sample: Tensor
    timestep: Tensor
    text: Text
    variant: str = FULL
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Call:
        """The same call with its tensors on `device`."""
        features = {name: feature.to(device) for name, feature in self.features.items()}
        return Call(self.sample.to(device), self.timestep.to(device), self.text.to(device), self.variant, features)


Observe = Callable[[int, Call], None]  # told every call before it runs, and its index in the schedule


@contextmanager
def _plainly(pipeline: Any, observe: Observe) -> Iterator[None]:
    indices = count()

    def watch(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = torch.as_tensor(args[1], dtype=torch.float32).reshape(1)
        observe(next(indices), Call(args[0].clone(), timestep, conditions.told(kwargs)))

    hook = pipeline.unet.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Execution:
    """How a pipeline runs its denoiser. Within `watched(pipeline, observe)` one image is made and every call observed.

    `key` tells executions apart that give other calls; `variants` names the graph of each call, empty where there is
    one.
    """

    key: str
    watched: Callable[[Any, Observe], AbstractContextManager[None]]
    variants: tuple[str, ...] = ()


PLAIN = Execution("", _plainly)  # the denoiser as it is, in full at every step


@dataclass(frozen=True)
class Recordings:
    """Recorded calls in a folder, a file per prompt; iterating holds one call in memory."""

    folder: Path
    calls: tuple[tuple[int, ...], ...]  # of each prompt, which calls of the schedule

    def __len__(self) -> int:
        return sum(map(len, self.calls))

    def __iter__(self) -> Iterator[Call]:
        for index in range(len(self.calls)):
            yield from _read(_file(self.folder, index))

    def rows(self) -> set[int]:
        """The rows of the schedule that some prompt has a call of."""
        return {row for calls in self.calls for row in calls}


@torch.no_grad()
def record(
    pipeline: Any,
    model_digest: str,
    sampling: Sampling,
    calibration: CalibrationSet,
    seed: int,
    progress: Callable[[Iterable[Any], str], Iterable[Any]],
    execution: Execution = PLAIN,
) -> Recordings:
    """The denoiser's inputs at the calls that `calibration` chooses, made once and reused from disk.

    The key is everything they depend on: model and the denoiser's weights as they are now, prompts, calls, schedule,
    guidance, seed, execution. Prompt i starts from seed + i. An interrupted run goes on with the prompts it lacks.
    Runs on the GPU where there is one; the processes of `accelerate launch` share the prompts out.
    """
    horizon = float(pipeline.scheduler.config.num_train_timesteps)
    chosen = calibration.calls(sampling.timesteps, horizon, seed, execution.variants)
    with on_fastest_device(pipeline):
        state = [model_digest, state_digest(pipeline.unet), str(pipeline.unet.device.type), torch.__version__]
        key = json.dumps([*state, calibration.prompts, chosen, sampling.to_json(), seed, execution.key])
        folder = cache_root() / "calibration" / hashlib.sha256(key.encode()).hexdigest()[:24]
        folder.mkdir(parents=True, exist_ok=True)

        def make(index: int) -> None:
            calls = _run(pipeline, sampling, calibration.prompts[index], seed + index, chosen[index], execution)
            _write(calls, _file(folder, index))

        make_missing(range(len(chosen)), lambda index: not _file(folder, index).exists(), make, progress, "recording")
    return Recordings(folder, chosen)


def _run(
    pipeline: Any, sampling: Sampling, prompt: str, seed: int, chosen: Sequence[int], execution: Execution
) -> list[Call]:
    """Make one image; the calls at the indices `chosen`."""
    kept: list[Call] = []
    made = 0

    def observe(index: int, call: Call) -> None:
        nonlocal made
        made += 1
        if index in chosen:
            kept.append(call.to("cpu"))

    with execution.watched(pipeline, observe):
        pipeline(
            prompt,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            height=sampling.height,
            width=sampling.width,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        )
    if made != len(sampling.timesteps):
        raise DiffpressError(
            f"the pipeline called its denoiser {made} times where the schedule has {len(sampling.timesteps)} calls"
        )
    return kept


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:04}.safetensors"


def _write(calls: Sequence[Call], path: Path) -> None:
    """One file for one prompt, whole or not there; other processes may write the same."""
    tensors = {_stored(name): value for name, value in conditions.named(calls[0].text).items()}
    for index, call in enumerate(calls):
        tensors |= {f"{index}/sample": call.sample, f"{index}/timestep": call.timestep}
        tensors |= {f"{index}/feature/{name}": feature for name, feature in call.features.items()}
    # Copies: steps may share a feature or be views of one schedule, and the format wants each tensor on its own.
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(tensors, partial, {"variants": json.dumps([call.variant for call in calls])})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _stored(condition: str) -> str:
    """What a condition is called in a file of recordings."""
    return "text" if condition == conditions.TEXT else f"text/{condition}"


def _read(path: Path) -> Iterator[Call]:
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        added = [name.removeprefix("text/") for name in sorted(names) if name.startswith("text/")]
        text = conditions.of({name: file.get_tensor(_stored(name)) for name in (conditions.TEXT, *added)})
        for index, variant in enumerate(json.loads(file.metadata()["variants"])):
            start = f"{index}/feature/"
            features = {
                name.removeprefix(start): file.get_tensor(name) for name in sorted(names) if name.startswith(start)
            }
            sample, timestep = file.get_tensor(f"{index}/sample"), file.get_tensor(f"{index}/timestep")
            yield Call(sample, timestep, text, variant, features)
