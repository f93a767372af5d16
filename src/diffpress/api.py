"""The verbs as functions. Everything heavy is imported when a verb is called."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffpress
from diffpress import bundle as bundles
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError

if TYPE_CHECKING:
    from diffpress.benchmarks.scores import Judging
    from diffpress.calibration.lora import Lora
    from diffpress.compress.recipe import Recipe
    from diffpress.compress.schedule.trajectory import Trajectories
    from diffpress.compress.work import Work
    from diffpress.plan import Corrections, StepProgram

SHAPES_GUIDANCE = 2.0
SEARCHED_SEED = 500_009  # noise of a search's trajectories, its next draws multiples of it
SEARCHED_BATCH = 32
TIMED_ROUNDS = 15
SCORED_IMAGES = 48
SCORED_SEED = 100_003  # of captions and noise that reports do not use: what chooses a format is not what judges it


def compress(
    model: str,
    recipe: str,
    output: str | Path,
    *,
    prompts: Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    targets: Sequence[str] = (),
    loras: Sequence[Lora] = (),
    gates: Sequence[str] = (),
    quiet: bool = False,
) -> Bundle:
    """Compress `model` by `recipe` and write the bundle `output`; with `targets`, build their engines too.

    `model` is a diffusers folder, a hub id or "shapes"; `recipe` a preset's name or a YAML file; `prompts` a text file
    for calibration, a prompt a line; `steps` those of the model's own scheduler, the recipe's if absent; `loras` are
    fused before the recipe's own; `gates` are kept beside the recipe's own, for `bench` to judge. Raises
    `DiffpressError` and leaves nothing behind when something is wrong.

    Under `accelerate launch` every process calls this; they share calibration and measuring, and the first writes.
    """
    from diffpress.errors import require

    require("torch", "compress", "compress a model")
    require("diffusers", "compress", "compress a model")
    from diffpress.calibration import model as models
    from diffpress.calibration import processes
    from diffpress.calibration import prompts as prompt_lists
    from diffpress.calibration.lora import described
    from diffpress.compress import recipe as recipes
    from diffpress.compress.run import run
    from diffpress.export import ship

    chosen = recipes.load(recipe)
    if loras:
        chosen = recipes.with_loras(chosen, loras)
    chosen = recipes.with_gates(chosen, gates)
    bundles.refuse_existing(Path(output))
    given = None if prompts is None else prompt_lists.read(prompts)
    if targets:
        from diffpress.engines.preflight import check_targets

        check_targets(targets, _types(chosen), f"recipe {chosen.name}")
    work = begin(model, chosen, prompts=given, steps=steps, seed=seed, quiet=quiet)
    parameters = sum(parameter.numel() for parameter in work.denoiser.parameters())
    own, scratch = ship.schedule(work.sampling, work.pipeline.scheduler), work.scratch  # a pass may set another one
    processes.wait()  # until all have seen that there is no such bundle yet
    if not processes.is_main():
        run(chosen.built(), work)
        processes.wait()  # until the bundle is there
        return bundles.read(output)
    with bundles.create(output) as folder:
        results = run(chosen.built(), work)
        if targets:  # what passes chose by themselves is known now, before the export
            check_targets(targets, _planned_types(work), f"what recipe {chosen.name} chose")
        entries = {
            "model": {
                "source": model if models.is_shapes(model) else str(Path(model).name),
                "class": type(work.pipeline).__name__,
                "digest": models.digest(model),
                "parameters": parameters,
                **({"lora": described(chosen.lora)} if chosen.lora else {}),
            },
            "recipe": recipes.as_json(chosen),
            "seed": seed,
            "reference": own,
            "passes": [result.__dict__ for result in results],
            "sizes": {"denoiser_reference": 4 * parameters},
        }
        sensitivity = work.tables.get("sensitivity", ())
        manifest = ship.ship(
            work.pipeline, work.plan(), folder, entries, work.progress, sensitivity, chosen.controlnet, keep=False
        )
        bundles.write_manifest(folder, manifest)
        made = bundles.read(folder)
        if targets:
            from diffpress.export import engines

            engines.build(made, targets, progress=not quiet)
    processes.wait()
    shutil.rmtree(scratch, ignore_errors=True)
    return bundles.read(output)


def begin(
    model: str,
    recipe: Recipe,
    *,
    prompts: Sequence[str] | None = None,
    steps: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Work:
    """Open `model` and bind it to its own sampling schedule: what the passes of `recipe` start from.

    That is its scheduler at `steps` steps, the recipe's if absent; a schedule pass goes over to another one.

    Raises `DiffpressError` for a model that is missing, broken or not supported.
    """
    from diffpress.calibration import model as models
    from diffpress.calibration.capture import Execution, Recordings, record
    from diffpress.calibration.lora import digest
    from diffpress.calibration.schedule import tabulate, with_starts
    from diffpress.calibration.sets import CalibrationSet
    from diffpress.compress import recipe as recipes
    from diffpress.compress.families import unet as family
    from diffpress.compress.schedule.solver import make
    from diffpress.compress.work import Work
    from diffpress.export import components
    from diffpress.paths import cache_root

    if steps is not None and steps < 1:
        raise DiffpressError(f"steps must be at least 1, not {steps}")
    recipe.check_steps(steps or recipe.steps)
    progress = _progress(quiet)
    pipeline = models.load_pipeline(model, recipe.lora)
    family.check(pipeline.unet)
    if recipe.lcm:
        pipeline.scheduler = make("lcm", pipeline.scheduler.config)
    guidance = recipe.guidance_scale
    if guidance is None:
        own = inspect.signature(pipeline.__call__).parameters["guidance_scale"].default
        guidance = SHAPES_GUIDANCE if models.is_shapes(model) else float(own)
    factor = components.downscale(pipeline.vae)
    height, width = (side * factor for side in family.latent_size(pipeline.unet))
    sampling = tabulate(pipeline.scheduler, steps or recipe.steps, guidance, height, width)
    sampling = with_starts(sampling, pipeline.scheduler)
    fingerprint, options = models.digest(model) + digest(recipe.lora), recipe.calibration
    texts = (prompts or _default_prompts(model, options.prompts))[: options.prompts]
    recipe.check_prompts(len(texts))
    chosen = CalibrationSet(tuple(texts), options.method, options.steps)

    def recorder(execution: Execution) -> Recordings:
        return record(pipeline, fingerprint, work.sampling, chosen, seed, progress, execution)

    # Everything that a pass's unfinished work depends on; a schedule of its own is added by `Work.follow`.
    asked = {**recipes.as_json(recipe), "gates": ()}  # they judge the work, and change nothing in it
    key = json.dumps([fingerprint, asked, sampling.to_json(), texts, seed, diffpress.__version__])
    scratch = cache_root() / "unfinished" / hashlib.sha256(key.encode()).hexdigest()[:24]
    work = Work(pipeline, sampling, seed, recorder, progress, scratch, model=fingerprint)
    work.trajectories = _trajectories(work, texts)
    work.latency = _latency(work)
    work.original = lambda: models.load_pipeline(model, recipe.lora).unet
    if models.is_shapes(model):
        work.scorer = _scorer(work)
    return work


def build(
    path: str | Path,
    targets: Sequence[str],
    *,
    quiet: bool = False,
    images: Sequence[int] = (1,),
    memory_gb: float | None = None,
) -> Bundle:
    """Build TensorRT engines of a bundle for `targets` such as "sm89", "rtx-4090", "all".

    `images` are the numbers of images at once that they are made for, `memory_gb` the memory of the GPU where it is not
    that of the smallest that was asked for. No GPU is needed with TensorRT for RTX.
    """
    from diffpress.export import engines

    return engines.build(bundles.load(path), targets, progress=not quiet, images=images, memory_gb=memory_gb)


def _types(recipe: Recipe) -> set[str]:
    """What GPUs must have for the formats that passes name, in the words of `engines`; known before any work."""
    from diffpress.compress.quantize.post_training import FORMATS, typical
    from diffpress.export import deploy

    named: set[str] = set()
    for _, step in recipe.built():
        fields = [getattr(step, "format", None), *getattr(step, "candidates", ())]
        named |= FORMATS.keys() & {*fields, *getattr(step, "override", {}).values()}
    pairs = [FORMATS[name] for name in named]
    return {kind for weight, inputs in pairs for kind in deploy.types(typical(weight), inputs and typical(inputs))}


def _planned_types(work: Work) -> set[str]:
    """What GPUs must have for the formats that passes gave to layers."""
    from diffpress.export import deploy

    layers = work.quantization.values()
    return {kind for layer in layers for kind in deploy.types(layer.weight_format, layer.input_format)}


def _default_prompts(model: str, count: int) -> list[str]:
    from diffpress.calibration import model as models
    from diffpress.calibration import prompts as prompt_lists

    if not models.is_shapes(model):
        return list(prompt_lists.GENERAL)
    from diffpress.benchmarks.shapes import scenes

    # Training combinations: what is measured later, the held-out captions, takes no part in calibration.
    return [caption for _, caption, _ in scenes.dataset(count, seed=5)]


def _trajectories(work: Work, texts: Sequence[str]) -> Callable[[int, int], Trajectories]:
    """Opens trajectories of the calibration prompts from noise that calibration does not see, a new one each draw."""
    from diffpress.compress.schedule.trajectory import Trajectories

    @cache
    def network() -> Any:
        return _fastest(work)

    def begin(count: int, draw: int) -> Trajectories:
        prompts = [texts[index % len(texts)] for index in range(count)]
        seed = work.seed + SEARCHED_SEED * (1 + draw)
        # One batch size, since a runtime compiles for each.
        return Trajectories.begin(work.pipeline, network(), work.sampling, prompts, seed, min(count, SEARCHED_BATCH))

    return begin


def _fastest(work: Work) -> Any:
    """The denoiser as it is now, as `trajectory.Network`: in torch on a GPU, else a graph in an inference library."""
    import numpy as np
    import torch

    from diffpress.calibration.conditions import Text, named
    from diffpress.compress.schedule.trajectory import torch_network
    from diffpress.export import ship
    from diffpress.runtime import backends

    runnable = [name for name, precision in backends.available() if precision == "fp32"]
    if torch.cuda.is_available():
        return torch_network(copy.deepcopy(work.pipeline.unet).to("cuda"))
    if not runnable:
        return torch_network(work.pipeline.unet)
    file = ship.network(work.pipeline, work.scratch / "network")
    session = backends.open_session(file, runnable[0], "fp32")

    def run(sample: torch.Tensor, timesteps: torch.Tensor, text: Text) -> torch.Tensor:
        given = {"sample": sample, "timestep": timesteps, **named(text)}
        feeds = {name: tensor.numpy().astype(np.float32) for name, tensor in given.items()}
        return torch.from_numpy(session.run(feeds)["out_sample"].copy())

    return run


def _latency(work: Work) -> Callable[[StepProgram, Corrections | None], dict[str, float]] | None:
    """Times variants of the work's denoiser as it is now on the fastest backend here; None where there is none."""
    from diffpress.runtime import backends

    pairs = backends.available()
    if not pairs:
        return None

    def measure(program: StepProgram, corrections: Corrections | None) -> dict[str, float]:
        import tempfile
        from dataclasses import replace
        from functools import partial
        from statistics import median

        import numpy as np

        from diffpress.benchmarks.latency import alternate
        from diffpress.export import ship

        plan = replace(work.plan(), program=program, corrections=corrections)
        with tempfile.TemporaryDirectory() as folder:
            files = ship.variants(work.pipeline, plan, Path(folder), work.progress)
            rounds: dict[str, Callable[[int], object]] = {}
            for backend, precision in pairs:
                for name, file in files.items():
                    session = backends.open_session(file, backend, precision)
                    feeds = {
                        port: np.zeros([2 if size is None else size for size in entry.shape], entry.dtype)
                        for port, entry in session.inputs.items()
                    }
                    rounds[f"{backend} {precision} {name}"] = partial(_run, session, feeds)
            times = alternate(rounds, TIMED_ROUNDS, warmup=2)
        found = {key: median(values) for key, values in times.items()}
        # A whole run decides which backend is the fastest, as it will.
        names = [f"{backend} {precision}" for backend, precision in pairs]
        fastest = min(names, key=lambda pair: sum(found[f"{pair} {name}"] for name in program.steps))
        return {name: found[f"{fastest} {name}"] for name in files}

    return measure


def _run(session: Any, feeds: dict[str, Any], _: int) -> None:
    session.run(feeds)


def _scorer(work: Work) -> Callable[[str], float]:
    """What `shapes`' judges think of the work's pipeline as it is now, under its step program.

    "accuracy" (confirmed attributes, in percent) or "clip", of held-out captions and seeds that no report is made of.
    """

    @cache
    def judging() -> tuple[list[str], Judging]:
        from diffpress.benchmarks.prompts import Prompts
        from diffpress.benchmarks.scores import Judging
        from diffpress.benchmarks.shapes import scenes

        pairs = scenes.held_out_captions(SCORED_IMAGES, seed=SCORED_SEED)
        texts = [caption for _, caption in pairs]
        return texts, Judging(Prompts(texts, "held-out captions", [scene for scene, _ in pairs]))

    def score(metric: str) -> float:
        from diffpress.benchmarks.candidates import Reference, draw
        from diffpress.compress.cache.execute import execution

        texts, judge = judging()
        seeds = [SCORED_SEED + index for index in range(SCORED_IMAGES)]
        with execution(work.program, work.corrections).watched(work.pipeline, lambda index, call: None):
            content = judge.content(draw(Reference(work.pipeline, work.sampling), texts, seeds, batch=16).pixels)
        found = {"accuracy": content.attribute_accuracy, "clip": content.clip_score}.get(metric)
        if found is None:
            raise DiffpressError(f"nothing here measures '{metric}'")
        return 100 * found if metric == "accuracy" else found

    return score


def _progress(quiet: bool) -> Callable[[Iterable[Any], str], Iterable[Any]]:
    from tqdm import tqdm

    from diffpress.calibration import processes

    def show(items: Iterable[Any], what: str) -> Iterable[Any]:
        return tqdm(items, desc=what, disable=quiet or not processes.is_main(), leave=False)

    return show
