"""What caching is planned from: how far features move along the sampler's path, and what keeping one of them saves."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffpress.calibration import conditions
from diffpress.calibration.capture import Call
from diffpress.calibration.conditions import Text
from diffpress.calibration.model import state_digest
from diffpress.calibration.processes import make_missing, on_fastest_device
from diffpress.compress.families.unet_graph import UNetGraph, modules
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.quantize.sensitivity import digest
from diffpress.compress.schedule.stepping import Trajectory, first_calls, seeded
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError

NONE = -1  # an anchor that is not there
Watch = Callable[[int, Mapping[str, Tensor]], None]  # told a step and the features it computed, [halves, ...] each


@dataclass(frozen=True)
class Changes:
    """Of every feature and prompt: |X_i - X_a|_1 for each anchor a of step i, [prompts, steps, anchors], NaN where
    there is none; and |X_i|_1, [prompts, steps].
    """

    distances: Mapping[str, np.ndarray]
    sizes: Mapping[str, np.ndarray]


def last_steps(steps: int, most: int) -> np.ndarray:
    """Anchors [steps, most]: the step before, the one before that, and so on."""
    lagged = np.arange(steps)[:, None] - np.arange(1, most + 1)
    return np.where(lagged < 0, NONE, lagged)


def watch_full_steps(work: Work, calls: Sequence[Call], prompt: int, names: Sequence[str], watch: Watch) -> None:
    """Sample recorded prompt `prompt` with every step in full, both halves of guidance, and show what each computed.

    `calls` are the first calls of all prompts. Weights and inputs are rounded as earlier passes planned.
    """
    graph, device = UNetGraph(work.denoiser, writes=names), work.denoiser.device
    noise = seeded(calls[: prompt + 1], work.seed)[prompt:].to(device)
    walk = Trajectory(work.sampling, [calls[prompt].text], noise)
    steps = count()

    def denoiser(sample: Tensor, timestep: float, text: Text, return_dict: bool) -> tuple[Tensor]:
        output, *values = graph(sample, torch.tensor([timestep], dtype=torch.float32, device=device), text)
        watch(next(steps), dict(zip(names, values, strict=True)))
        return (output,)

    with simulated(work.denoiser, work.quantization, work.sampling.timesteps):
        for _ in work.sampling.timesteps:
            walk.advance(walk.output(denoiser))


class Distances:
    """Watches features by name and keeps of them what a later step is compared with: see `Changes`."""

    def __init__(self, anchors: Mapping[str, np.ndarray]) -> None:
        self._anchors = anchors
        self._last_use = {name: _last_use(wanted) for name, wanted in anchors.items()}
        self._kept: dict[str, dict[int, Tensor]] = {name: {} for name in anchors}
        self.distances = {name: np.full(wanted.shape, np.nan) for name, wanted in anchors.items()}
        self.sizes = {name: np.full(len(wanted), np.nan) for name, wanted in anchors.items()}

    def __call__(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Compare the features of `step` with their anchors."""
        for name, value in values.items():
            kept, last_use = self._kept[name], self._last_use[name]
            self.sizes[name][step] = _l1(value)
            for at, anchor in enumerate(self._anchors[name][step]):
                if anchor != NONE:
                    self.distances[name][step, at] = _l1(value - kept[int(anchor)])
            kept[step] = value
            for old in [old for old in kept if last_use.get(old, NONE) <= step]:
                del kept[old]

    @property
    def held(self) -> int:
        """How many features are in memory now."""
        return sum(map(len, self._kept.values()))


def _last_use(anchors: np.ndarray) -> dict[int, int]:
    return {int(anchor): step for step, row in enumerate(anchors) for anchor in row if anchor != NONE}


def _l1(value: Tensor) -> float:
    return float(value.abs().sum(dtype=torch.float64))


def measured(work: Work, anchors: Mapping[str, np.ndarray], prompts: int, text: str) -> Changes:
    """`Changes` of the features named in `anchors`, [steps, anchors] each, along the paths of the first `prompts`.

    One prompt is sampled at a time, and of its features no more is held than steps to come are compared with. What an
    interrupted run, or another process, has measured is read from `work.scratch`. Raises `DiffpressError` for values
    that are not finite.
    """
    # Ask for recordings first: they are of the weights as they are, outside of `simulated`.
    calls = first_calls(work.recorded(), prompts)
    context = [state_digest(work.denoiser), work.sampling.to_json(), work.seed]
    plan = {name: wanted.tolist() for name, wanted in anchors.items()}
    key = digest(json.dumps([*context, plan]), work.quantization)
    files = [
        work.scratch / "changes" / f"{key}-{_hash(conditions.contents(call.text))}-{index}"
        for index, call in enumerate(calls)
    ]

    @torch.no_grad()
    def make(index: int) -> None:
        found = Distances(anchors)
        watch_full_steps(work, calls, index, tuple(anchors), found)
        numbers = {f"distance/{name}": values for name, values in found.distances.items()}
        _save(numbers | {f"size/{name}": values for name, values in found.sizes.items()}, files[index])

    with on_fastest_device(work.denoiser):
        make_missing(range(len(calls)), lambda index: not files[index].is_file(), make, work.progress, text)
    read = [load_file(file) for file in files]
    changes = Changes(
        {name: np.stack([numbers[f"distance/{name}"] for numbers in read]) for name in anchors},
        {name: np.stack([numbers[f"size/{name}"] for numbers in read]) for name in anchors},
    )
    if not all(np.isfinite(sizes).all() for sizes in changes.sizes.values()):
        raise DiffpressError("the denoiser computes features that are not finite")
    return changes


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _save(numbers: dict[str, np.ndarray], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.partial")
    save_file(numbers, unfinished)
    unfinished.replace(file)


@torch.no_grad()
def savings(work: Work, names: Collection[str]) -> tuple[dict[str, float], float]:
    """Arithmetic of a call that reading each feature saves, and that of a whole call: operations for one row.

    Matrix products, convolutions and attention are counted; a ResBlock whose work is kept still runs its shortcut.
    """
    unet = work.denoiser
    call = first_calls(work.recorded(), 1)[0].to(unet.device)
    inputs = call.sample[-1:], call.timestep, call.text[-1:]
    whole, counts = _operations(unet, (), inputs)
    paths = modules(unet)
    found: dict[str, float] = {}
    for name in names:
        if name in paths:
            found[name] = counts.get(name, 0) - counts.get(f"{name}.conv_shortcut", 0)
        else:
            found[name] = whole - _operations(unet, (name,), inputs)[0]
    return found, whole


def _operations(
    unet: Any, reads: tuple[str, ...], inputs: tuple[Tensor, Tensor, Text]
) -> tuple[float, dict[str, float]]:
    """Of a graph, and of every module in it by its path."""
    features = UNetGraph(unet, writes=reads)(*inputs)[1:] if reads else ()
    counter = FlopCounterMode(display=False)
    # The fused kernels of CPUs are not known to the counter.
    with sdpa_kernel(SDPBackend.MATH), counter:
        UNetGraph(unet, reads)(*inputs, *features)
    start = f"{UNetGraph.__name__}.unet."
    counts = {
        name.removeprefix(start): float(sum(kinds.values()))
        for name, kinds in counter.get_flop_counts().items()
        if name.startswith(start)
    }
    return float(counter.get_total_flops()), counts
