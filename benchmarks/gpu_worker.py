"""One job of the GPU benchmark in a process of its own: what crashes or breaks the GPU's context ends one row.

Run as `python -m diffpress.benchmarks.gpu_worker JOB.json`; `gpu` writes the job and reads its result.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffpress.benchmarks import candidates, gpu_bundles, gpu_ceilings, prompts
from diffpress.benchmarks.candidates import Candidate
from diffpress.benchmarks.gpu_device import Device
from diffpress.benchmarks.gpu_rows import FLOAT, MODELS, PLAIN, RECIPES, Model, Row, torch_place
from diffpress.benchmarks.latency import alternate, paired_ratio, summary
from diffpress.bundle import MANIFEST, denoiser_bytes
from diffpress.errors import DiffpressError
from diffpress.paths import write_json
from diffpress.plan import FULL, Plan, StepProgram
from diffpress.runtime.pipeline import Pipeline

WARMUP = 3
BITS = {"int8": 8, "e4m3": 8, "int4": 4}
REST = 16  # bits of what is not quantized


@dataclass(frozen=True)
class Settings:
    """How much is measured: rounds of single images and of single calls, seconds of images for the energy of one."""

    work: Path
    images: int
    rounds: int
    call_rounds: int
    seconds: float
    compile_mode: str

    @classmethod
    def of(cls, job: Mapping[str, Any]) -> Settings:
        """As a job has them."""
        return cls(Path(job["work"]), **{key: job[key] for key in cls.__dataclass_fields__ if key != "work"})


def opened(row: Row, model: Model, settings: Settings, place: str) -> Candidate:
    """What a row runs, ready to draw; `place` is where torch runs."""
    if not row.in_torch:
        return Pipeline.load(gpu_bundles.opened(settings.work, model.name, row), row.runner, "auto")
    from diffpress.benchmarks.gpu_torch import Torch

    cached = row.recipe in RECIPES and RECIPES[row.recipe][0] != PLAIN
    plan = None
    if cached:
        plan = Plan.load(gpu_bundles.folder_of(settings.work, model.name, row.recipe) / "plan")
    source = gpu_bundles.source(model, settings.work)
    return Torch.load(source, model, row, place, plan, settings.compile_mode)


def probe(row: Row, model: Model, settings: Settings, device: Device, drawn: Path) -> dict[str, Any]:
    """Open a row alone: whether it runs, what its denoiser's calls take, memory, energy; its images into `drawn`."""
    texts = prompts.choose(settings.images, shapes=model.name == "shapes").texts
    if not row.in_torch:
        gpu_bundles.opened(settings.work, model.name, row)  # engines are built before the clock runs
    start = time.perf_counter()
    with device.watched() as peak:
        candidate = opened(row, model, settings, device.torch)
        images = candidate(texts[:1], [0])
        loaded = time.perf_counter() - start
    if images.problem:
        raise DiffpressError(f"it draws nothing of use: {images.problem}")
    candidates.store(drawn, candidates.draw(candidate, texts, range(len(texts)), 1))
    if row.in_torch and not device.runs_torch:
        return {**describe(row, model, settings), "calls": {}, "note": "drawn by the CPU, which torch runs on here"}
    image = partial(candidate, texts[:1], [0])
    return {
        **describe(row, model, settings),
        "load_s": loaded,
        "peak_device_bytes": peak.bytes,
        **device.energy(image, settings.seconds),
        "calls": calls(row, model, settings, device, candidate),
    }


def describe(row: Row, model: Model, settings: Settings) -> dict[str, Any]:
    """Steps, evaluations, bits and bytes of a row, from its bundle where it has one."""
    folder = gpu_bundles.folder_of(settings.work, model.name, row.recipe)
    if not (folder / "plan").exists():
        size = 32 if row.recipe == FLOAT else REST
        return {"steps": model.steps, "bits_w": size, "bits_a": size, "bytes": None, "program": None}
    plan = Plan.load(folder / "plan")
    return {
        "steps": plan.sampling.steps,
        "evaluations": plan.program.evaluations(),
        "program": plan.program.marks(),
        "bits_w": _bits([layer.weight_format for layer in plan.quantization.values()]),
        "bits_a": _bits([layer.input_format for layer in plan.quantization.values()]),
        "bytes": denoiser_bytes(folder),
    }


def _bits(formats: Sequence[str | None]) -> int:
    """The most frequent."""
    found = [BITS[name] if name else REST for name in formats] or [REST]
    return max(set(found), key=found.count)


def calls(
    row: Row, model: Model, settings: Settings, device: Device, candidate: Candidate
) -> dict[str, dict[str, Any]]:
    """By variant of the step program, the time of a call with both halves of guidance, and the work that it does."""
    made = candidate.calls() if row.in_torch else session_calls(candidate)  # type: ignore[attr-defined]
    times = alternate(made, settings.call_rounds, WARMUP, clock=device.time)
    folder = gpu_bundles.folder_of(settings.work, model.name, row.recipe)
    return {name: {**summary(values), "work": work_of(folder, name)} for name, values in times.items()}


def session_calls(pipeline: Any) -> dict[str, Callable[[int], object]]:
    """As `Torch.calls`, of the runtime's pipeline; samples come from the host and go back to it, as in its sampler."""
    program: StepProgram = pipeline.denoiser.program
    latent, text = (pipeline.bundle.manifest[name] for name in ("latent", "text"))
    generator = np.random.default_rng(0)
    sample = generator.normal(size=(2, *(latent[name] for name in ("channels", "height", "width")))).astype(np.float32)
    hidden = generator.normal(size=(2, text["tokens"], text["hidden"])).astype(np.float32)
    timesteps = pipeline.sampling.timesteps
    denoise = pipeline.denoiser.start(hidden, timesteps)
    first = {name: program.steps.index(name) for name in dict.fromkeys(program.steps)}

    def run(index: int) -> object:
        return denoise(index, sample[-1:] if program.guided(index) != FULL else sample, timesteps[index])

    for index in first.values():  # what a variant reads has been written by then
        run(index)
    return {name: lambda _, index=index: run(index) for name, index in first.items()}  # type: ignore[misc]


def work_of(folder: Path, variant: str) -> dict[str, Any] | None:
    """Operations by type and bytes of a call of a variant, from its graph; None where it cannot be counted here."""
    if not (folder / MANIFEST).exists() or importlib.util.find_spec("onnx_ir") is None:
        return None
    from diffpress.export import flops

    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    counted = flops.count(folder / manifest["graphs"][variant], 2)
    return {
        "operations": dict(counted.flops),
        "weight_bytes": counted.weight_bytes,
        "activation_bytes": counted.activation_bytes,
    }


def times(rows: Iterable[Row], model: Model, settings: Settings, device: Device) -> dict[str, dict[str, Any]]:
    """Single images of rows, alternating; by row the latency and how many times faster than each other row it is."""
    texts = prompts.choose(settings.images, shapes=model.name == "shapes").texts
    chosen = {row.name: opened(row, model, settings, device.torch) for row in rows}

    def draw(candidate: Candidate, turn: int) -> object:
        return candidate([texts[turn % len(texts)]], [turn])

    called = {name: partial(draw, candidate) for name, candidate in chosen.items()}
    found = alternate(called, settings.rounds, WARMUP, clock=device.time)
    return {
        name: {
            **summary(values),
            "speedups": {other: paired_ratio(slow, values) for other, slow in found.items() if other != name},
        }
        for name, values in found.items()
    }


def run(job: Mapping[str, Any], device: Callable[[], Device] = Device) -> dict[str, Any]:
    """Do what a job says and return its result; raises `DiffpressError`, and whatever libraries raise."""
    if job["do"] == "make":
        return gpu_bundles.make(Path(job["work"]), MODELS[job["model"]], job["recipe"])
    found = device()
    if job["do"] == "ceilings":
        return gpu_ceilings.measure(found, job["memory_bytes"], **job.get("sizes", {}))
    settings, model = Settings.of(job), MODELS[job["model"]]
    chosen = [Row(*pair) for pair in job["rows"]]
    if job["do"] == "probe":
        return probe(chosen[0], model, settings, found, Path(job["drawn"]))
    return times(chosen, model, settings, found)


class HostDevice(Device):
    """The GPU where torch cannot use it: the float32 reference is drawn by the CPU."""

    torch, runs_torch = "cpu", False


def main() -> None:
    """Read a job, do it and write its result beside it, whole or not at all."""
    file = Path(sys.argv[1])
    job = json.loads(file.read_text("utf-8"))
    made = run(job, Device if torch_place() == "cuda" else HostDevice)
    write_json(Path(job["result"]), made)


if __name__ == "__main__":
    try:
        main()
    except DiffpressError as error:
        sys.exit(str(error))  # the last line of its log, which becomes the row's reason
