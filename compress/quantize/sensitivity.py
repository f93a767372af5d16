"""What quantizing each layer alone costs: the error of the denoiser's output on recorded calls, or of the final latent.

Layers are independent, so they are split between the processes of `accelerate launch`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from diffpress.calibration import conditions
from diffpress.calibration.capture import Call
from diffpress.calibration.model import state_digest
from diffpress.calibration.processes import make_missing, on_fastest_device
from diffpress.calibration.sets import uniform_stride
from diffpress.compress.cache.execute import CachedDenoiser, execution
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.schedule.stepping import Trajectory, first_calls, seeded
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import LayerQuant, StepProgram

Error = Literal["output", "latent"]
Candidates = Mapping[str, Mapping[str, LayerQuant]]  # of each layer, by the name of its formats


class Numbers:
    """Measured numbers in a folder, a file each, whole or not there: an interrupted run goes on from them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __contains__(self, key: str) -> bool:
        return (self._folder / key).is_file()

    def __getitem__(self, key: str) -> float:
        return float((self._folder / key).read_text())

    def __setitem__(self, key: str, value: float) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._folder / f"{key}.{os.getpid()}.partial"
        unfinished.write_text(repr(value))
        unfinished.replace(self._folder / key)


@torch.no_grad()
def final_latents(
    work: Work,
    prompts: Sequence[Call],
    program: StepProgram | None = None,
    watch: Callable[[Tensor], object] = lambda _: None,
    first: int = 0,
) -> list[Tensor]:
    """The final latent [C, H, W] for the text of each call, sampled as one batch.

    By the schedule's table, under the step program (the work's, if none is given), from the noise of recorded prompts:
    seeds count from `work.seed` + `first`. `watch` is shown every output [2 N, C, H, W] of the denoiser.
    """
    unet = work.denoiser
    noise = seeded(prompts, work.seed + first).to(unet.device)
    trajectory = Trajectory(work.sampling, [call.text for call in prompts], noise)
    denoiser = CachedDenoiser(unet, program or work.program, work.corrections)

    def watched(*inputs: Any, **options: Any) -> Any:
        output = denoiser(*inputs, **options)
        watch(output[0])
        return output

    for _ in work.sampling.timesteps:
        trajectory.advance(trajectory.output(watched))
    return list(trajectory.sample)


def probe(work: Work, error: Error, prompts: int, calls: int) -> tuple[str, Callable[[], list[Tensor]]]:
    """What errors are measured on: a key of all it depends on, and a function that computes it with the denoiser as it
    stands: final latents of the first `prompts` recorded, or outputs of `calls` recorded calls at an even stride.
    """
    recordings = work.record()
    if error == "latent":
        given = first_calls(recordings, prompts)
    else:
        wanted = set(uniform_stride(len(recordings), calls))
        given = [call for index, call in enumerate(recordings) if index in wanted]
    context = [state_digest(work.denoiser), work.sampling.to_json(), work.program.to_json(), work.seed, error]
    context.append(execution(work.program, work.corrections).key)  # corrections of what steps take
    key = hashlib.sha256(json.dumps(context).encode())
    for call in given:
        key.update(conditions.contents(call.text))
        for tensor in (call.sample, call.timestep):
            key.update(tensor.cpu().contiguous().numpy().tobytes())

    @torch.no_grad()
    def run() -> list[Tensor]:
        return final_latents(work, given) if error == "latent" else [work.run(call) for call in given]

    return key.hexdigest(), run


def deviation(run: Callable[[], list[Tensor]]) -> Callable[[], float]:
    """Runs once, as the reference; the returned function is the mean ||x - x'|| / ||x|| of a run later on.

    Raises `DiffpressError` where the reference is not finite.
    """
    reference = [tensor.double() for tensor in run()]
    if not all(bool(tensor.isfinite().all()) for tensor in reference):
        raise DiffpressError("the denoiser gives values that are not finite before anything is quantized")

    def measured() -> float:
        pairs = zip(run(), reference, strict=True)
        return fmean(float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)) for got, wanted in pairs)

    return measured


def measure(
    work: Work, candidates: Candidates, error: Error = "output", prompts: int = 4, calls: int = 16
) -> dict[str, dict[str, float]]:
    """Relative error when a layer alone computes as one of its candidates, by layer and name; NaN if not finite.

    What an interrupted run, or another process, has measured is read from `work.scratch`.
    """
    context, run = probe(work, error, prompts, calls)
    known = Numbers(work.scratch / "sensitivity")
    keys = {
        (layer, name): digest(context, {layer: quant})
        for layer, named in candidates.items()
        for name, quant in named.items()
    }

    @cache
    def reference() -> Callable[[], float]:
        return deviation(run)

    def one(pair: tuple[str, str]) -> None:
        measured = reference()
        layer, name = pair
        with simulated(work.denoiser, {layer: candidates[layer][name]}, work.sampling.timesteps):
            known[keys[pair]] = measured()

    with on_fastest_device(work.denoiser):
        make_missing(keys, lambda pair: keys[pair] not in known, one, work.progress, "measuring sensitivity")
    return {layer: {name: known[keys[layer, name]] for name in named} for layer, named in candidates.items()}


def digest(context: str, layers: Mapping[str, LayerQuant]) -> str:
    """Identifies what a number was measured of: these layers quantized so, and `context`, the key of a `probe`."""
    state = hashlib.sha256(context.encode())
    for name, quant in layers.items():
        state.update(f" {name} ".encode() + quant.contents())
    return state.hexdigest()[:24]
