"""The verbs as functions. Everything heavy is imported when a verb is called."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffpress
from diffpress import bundle as bundles
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError

if TYPE_CHECKING:
    from diffpress.compress.recipe import Recipe
    from diffpress.compress.work import Work

SHAPES_GUIDANCE = 2.0
GUIDANCE = 7.5  # diffusers' own default for Stable Diffusion


def compress(
    model: str,
    recipe: str,
    output: str | Path,
    *,
    prompts: Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    targets: Sequence[str] = (),
    quiet: bool = False,
) -> Bundle:
    """Compress `model` by `recipe` and write the bundle `output`; with `targets`, build their engines too.

    `model` is a diffusers folder, a hub id or "shapes"; `recipe` a preset's name or a YAML file; `prompts` a text file
    for calibration, a prompt a line. Raises `DiffpressError` and leaves nothing behind when something is wrong.
    """
    from diffpress.errors import require

    require("torch", "compress", "compress a model")
    require("diffusers", "compress", "compress a model")
    from diffpress.calibration import model as models
    from diffpress.calibration import prompts as prompt_lists
    from diffpress.compress import recipe as recipes
    from diffpress.compress.run import run
    from diffpress.export import ship

    chosen = recipes.load(recipe)
    bundles.refuse_existing(Path(output))
    given = None if prompts is None else prompt_lists.read(prompts)
    if targets:
        from diffpress.export import engines

        engines.check_targets(targets)
    work = begin(model, chosen, prompts=given, steps=steps, seed=seed, quiet=quiet)
    parameters = sum(parameter.numel() for parameter in work.denoiser.parameters())
    with bundles.create(output) as folder:
        results = run(chosen.built(), work)
        entries = {
            "model": {
                "source": model if models.is_shapes(model) else str(Path(model).name),
                "class": type(work.pipeline).__name__,
                "digest": models.digest(model),
                "parameters": parameters,
            },
            "recipe": recipes.as_json(chosen),
            "seed": seed,
            "passes": [result.__dict__ for result in results],
            "sizes": {"denoiser_reference": 4 * parameters},
        }
        manifest = ship.ship(work.pipeline, work.plan(), work.features, folder, entries, work.progress)
        bundles.write_manifest(folder, manifest)
        made = bundles.read(folder)
        if targets:
            engines.build(made, targets, progress=not quiet)
    shutil.rmtree(work.scratch, ignore_errors=True)
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
    """Open `model` and bind it to a sampling schedule: what the passes of `recipe` start from.

    Raises `DiffpressError` for a model that is missing, broken or not supported.
    """
    from diffpress.calibration import model as models
    from diffpress.calibration.capture import Execution, Recordings, cache_root, record
    from diffpress.calibration.schedule import tabulate
    from diffpress.calibration.sets import CalibrationSet
    from diffpress.compress import recipe as recipes
    from diffpress.compress.families import unet as family
    from diffpress.compress.work import Work
    from diffpress.export import components

    if steps is not None and steps < 1:
        raise DiffpressError(f"steps must be at least 1, not {steps}")
    progress = _progress(quiet)
    pipeline = models.load_pipeline(model)
    family.check(pipeline.unet)
    guidance = recipe.guidance_scale
    if guidance is None:
        guidance = SHAPES_GUIDANCE if models.is_shapes(model) else GUIDANCE
    factor = components.downscale(pipeline.vae)
    size = pipeline.unet.config.sample_size
    rows, columns = (size, size) if isinstance(size, int) else size
    sampling = tabulate(pipeline.scheduler, steps or recipe.steps, guidance, rows * factor, columns * factor)
    fingerprint, options = models.digest(model), recipe.calibration
    texts = (prompts or _default_prompts(model, options.prompts))[: options.prompts]
    chosen = CalibrationSet(tuple(texts), options.method, options.steps)

    def recorder(execution: Execution) -> Recordings:
        return record(pipeline, fingerprint, sampling, chosen, seed, progress, execution)

    # Everything that a pass's unfinished work depends on.
    key = json.dumps([fingerprint, recipes.as_json(recipe), sampling.to_json(), texts, seed, diffpress.__version__])
    scratch = cache_root() / "unfinished" / hashlib.sha256(key.encode()).hexdigest()[:24]
    return Work(pipeline, sampling, seed, recorder, progress, scratch)


def build(path: str | Path, targets: Sequence[str], *, quiet: bool = False) -> Bundle:
    """Build TensorRT engines of a bundle for `targets` such as "sm89"; no GPU is needed with TensorRT for RTX."""
    from diffpress.export import engines

    return engines.build(bundles.load(path), targets, progress=not quiet)


def _default_prompts(model: str, count: int) -> list[str]:
    from diffpress.calibration import model as models
    from diffpress.calibration import prompts as prompt_lists

    if not models.is_shapes(model):
        return list(prompt_lists.GENERAL)
    from diffpress.benchmarks.shapes import scenes

    # Training combinations: what is measured later, the held-out captions, takes no part in calibration.
    return [caption for _, caption, _ in scenes.dataset(count, seed=5)]


def _progress(quiet: bool) -> Callable[[Iterable[Any], str], Iterable[Any]]:
    from tqdm import tqdm

    def show(items: Iterable[Any], what: str) -> Iterable[Any]:
        return tqdm(items, desc=what, disable=quiet, leave=False)

    return show
