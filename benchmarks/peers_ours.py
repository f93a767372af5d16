"""diffpress among the contenders: a recipe's bundle for each schedule, made where it is missing."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import diffpress
from diffpress import api
from diffpress import bundle as bundles
from diffpress.benchmarks.candidates import Candidate
from diffpress.benchmarks.latency import alternate
from diffpress.benchmarks.peers_rows import CALLS, SCHEDULES
from diffpress.benchmarks.peers_worker import Facts, Task
from diffpress.benchmarks.quantization import bits
from diffpress.benchmarks.recipe_rows import file_name
from diffpress.benchmarks.speed import fastest
from diffpress.bundle import Bundle
from diffpress.compress.recipe import SCHEDULE, load, presets
from diffpress.paths import write_json
from diffpress.plan import Plan, StepProgram
from diffpress.runtime.backends import available
from diffpress.runtime.pipeline import Pipeline

CALIBRATION = {"steps": 4}  # of single calls, whose weights are random, with as few prompts as the passes take
SOLVERS = {"ddim": "DDIM", "dpm++": "DPM-Solver++", "unipc": "UniPC"}
ROUNDS = 3  # that choose the backend of single calls


class Ours:
    """A recipe's bundles as `Contender`, on the backend and precision that are fastest here, or as the task says."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._opened: dict[str, tuple[Pipeline, Facts]] = {}
        self._now: Pipeline

    def follow(self, schedule: str) -> Facts:
        if schedule not in self._opened:
            self._opened[schedule] = self._open(schedule)
        self._now, facts = self._opened[schedule]
        return facts

    def draw(self, texts: Sequence[str], seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        images = self._now(list(texts), list(seeds), keep_latents=True)
        return images.pixels, images.latents[-1]

    def begin(self, text: np.ndarray, timesteps: Sequence[float]) -> Callable[[int, np.ndarray], np.ndarray]:
        return started(self._now, text)

    def _open(self, schedule: str) -> tuple[Pipeline, Facts]:
        name = file_name(f"{self._task.options['recipe']} {schedule}")
        folder = self._task.place / "bundles" / name
        made, own = folder.with_name(f"{name}.json"), code(self._task.options["recipe"])
        if not made.exists() or json.loads(made.read_text("utf-8"))["of"] != own:
            for old in folder.parent.glob(f"{name}-*-backend.json"):
                old.unlink()
            shutil.rmtree(folder, ignore_errors=True)
            start = time.perf_counter()
            file = folder.with_name(f"{name}.yaml")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yaml.safe_dump(document(self._task, schedule)), "utf-8")
            api.compress(self._task.source, str(file), folder, quiet=True)
            took = {"seconds": time.perf_counter() - start, "of": own}
            write_json(made, took)
        bundle = bundles.read(folder)
        backend, precision = self._choice(bundle)
        pipeline = Pipeline.load(bundle, backend, precision)
        plan, program = Plan.load(folder / "plan"), pipeline.denoiser.program
        bits_w, bits_a = bits(plan.quantization)
        return pipeline, {
            "steps": pipeline.sampling.steps,
            "timesteps": list(pipeline.sampling.timesteps),
            "schedule": words(bundle),
            "program": program.marks(),
            "period": period(program),
            "backend": f"{backend} {precision}",
            "bits_w": bits_w,
            "bits_a": bits_a,
            "params": bundle.manifest["model"]["parameters"],
            "bytes": bundle.manifest["sizes"]["denoiser_compressed"],
            "seconds": json.loads(made.read_text("utf-8"))["seconds"],
            "deploys": True,
        }

    def _choice(self, bundle: Bundle) -> tuple[str, str]:
        """The fastest backend and precision, found once: drawing and timing are of the same."""
        wanted = self._task.options.get("precision")
        file = bundle.path.with_name(f"{bundle.path.name}-{wanted or 'any'}-backend.json")
        if not file.exists():
            pairs = [pair for pair in available() if wanted in (None, pair[1])]

            def open_pipeline(backend: str, precision: str) -> Candidate:
                return Pipeline.load(bundle, backend, precision)

            if self._task.single:
                chosen = quickest(self._task, bundle, pairs)
            else:
                found, _ = fastest(pairs, open_pipeline, self._task.texts[0])
                chosen = found["name"], found["precision"]
            write_json(file, chosen)
        backend, precision = json.loads(file.read_text("utf-8"))
        return backend, precision


@cache
def code(recipe: str) -> str:
    """A digest of a preset and of all that makes and runs its bundles, which are made anew where it changes.

    Comments have no say: `benchmarks.tables` writes into them what was measured.
    """
    asked = yaml.safe_load(presets()[recipe].read_text("utf-8"))
    found = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    for folder in ("calibration", "compress", "export", "runtime"):
        for file in sorted((Path(diffpress.__file__).parent / folder).rglob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


def document(task: Task, schedule: str) -> dict[str, Any]:
    """The preset as a recipe for a schedule; of single calls with as many steps as are measured."""
    recipe: dict[str, Any] = yaml.safe_load(presets()[task.options["recipe"]].read_text("utf-8"))
    if task.single:
        prompts = max((fewest for _, fewest in load(task.options["recipe"]).fewest_prompts), default=1)
        recipe |= {"steps": CALLS, "calibration": CALIBRATION | {"prompts": prompts}}
    chosen = SCHEDULES.get(schedule)
    if chosen is not None and chosen.spacing is not None:
        entry = {"solver": chosen.solver, "spacing": chosen.spacing, "steps": chosen.steps}
        recipe["passes"] = [{SCHEDULE: entry}, *recipe["passes"]]
    return recipe


def words(bundle: Bundle) -> str:
    """The schedule of a bundle, as tables name it."""
    passes = [entry[SCHEDULE] for entry in bundle.manifest["recipe"]["passes"] if SCHEDULE in entry]
    return SOLVERS.get(passes[0]["solver"], passes[0]["solver"]) if passes else "DDIM"


def started(pipeline: Pipeline, text: np.ndarray) -> Callable[[int, np.ndarray], np.ndarray]:
    """A bundle's denoiser before its first step, as `Contender.begin`; steps may compute one half of guidance alone."""
    program, timesteps = pipeline.denoiser.program, pipeline.sampling.timesteps
    denoise = pipeline.denoiser.start(text, timesteps)

    def call(index: int, sample: np.ndarray) -> np.ndarray:
        rows = sample if program.guided(index) == "full" else sample[-1:]
        return denoise(index, rows, timesteps[index])[-1:]

    return call


def period(program: StepProgram) -> int:
    """After how many steps a program does the same again; all of them where it never does."""
    steps = [(name, program.guided(index)) for index, name in enumerate(program.steps)]
    return next(turn for turn in range(1, len(steps) + 1) if steps[turn:] == steps[: len(steps) - turn])


def quickest(task: Task, bundle: Bundle, pairs: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """The backend and precision whose calls take least; one at a time is open, since a large model fits once."""
    generator = np.random.default_rng(0)
    sample = generator.normal(size=(2, *task.latent)).astype(np.float32)
    text = generator.normal(size=(2, *task.text)).astype(np.float32)
    took = {}
    for pair in pairs:
        pipeline = Pipeline.load(bundle, *pair)
        turn = range(period(pipeline.denoiser.program))

        def sweep(_: int, pipeline: Pipeline = pipeline, turn: range = turn) -> None:
            call = started(pipeline, text)
            for index in turn:
                call(index, sample)

        took[pair] = float(np.median(alternate({"own": sweep}, ROUNDS)["own"]))
        del pipeline, sweep
    return min(took, key=lambda pair: took[pair])
