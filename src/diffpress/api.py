"""The verbs as functions. Everything heavy is imported when a verb is called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpress import bundle as bundles
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError

if TYPE_CHECKING:
    from diffpress.calibration.capture import Recordings

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
    from diffpress.calibration.capture import record
    from diffpress.calibration.schedule import tabulate
    from diffpress.compress import recipe as recipes
    from diffpress.compress.families import unet as family
    from diffpress.compress.run import run
    from diffpress.compress.work import Work
    from diffpress.export import components, ship

    chosen = recipes.load(recipe)
    bundles.refuse_existing(Path(output))
    given = None if prompts is None else prompt_lists.read(prompts)
    if targets:
        from diffpress.export import engines

        engines.check_targets(targets)
    if steps is not None and steps < 1:
        raise DiffpressError(f"steps must be at least 1, not {steps}")
    progress = _progress(quiet)
    pipeline = models.load_pipeline(model)
    family.check(pipeline.unet)
    parameters = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    guidance = chosen.guidance_scale
    if guidance is None:
        guidance = SHAPES_GUIDANCE if models.is_shapes(model) else GUIDANCE
    factor = components.downscale(pipeline.vae)
    size = pipeline.unet.config.sample_size
    rows, columns = (size, size) if isinstance(size, int) else size
    sampling = tabulate(pipeline.scheduler, steps or chosen.steps, guidance, rows * factor, columns * factor)
    fingerprint = models.digest(model)

    @cache
    def recorded() -> Recordings:
        texts = (given or _default_prompts(model, chosen.calibration.prompts))[: chosen.calibration.prompts]
        return record(pipeline, fingerprint, sampling, texts, chosen.calibration.steps, seed, progress)

    with bundles.create(output) as folder:
        work = Work(pipeline, sampling, seed, recorded, progress)
        results = run(chosen.built(), work)
        entries = {
            "model": {
                "source": model if models.is_shapes(model) else str(Path(model).name),
                "class": type(pipeline).__name__,
                "digest": fingerprint,
                "parameters": parameters,
            },
            "recipe": recipes.as_json(chosen),
            "seed": seed,
            "passes": [result.__dict__ for result in results],
            "sizes": {"denoiser_reference": 4 * parameters},
        }
        bundles.write_manifest(folder, ship.ship(pipeline, work.plan(), work.features, folder, entries, progress))
        made = bundles.read(folder)
        if targets:
            engines.build(made, targets, progress=not quiet)
    return bundles.read(output)


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
