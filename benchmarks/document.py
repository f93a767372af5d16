"""The report as data: what was measured, under the keys that later checks read (`report.json`)."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffpress.benchmarks import quality as quality_of
from diffpress.benchmarks.candidates import COMPRESSED, EXPORT, PLAIN, REFERENCE, RESCHEDULED, STRICT, Drawn
from diffpress.benchmarks.latency import paired_ratio, summary
from diffpress.benchmarks.plain import Trial, best
from diffpress.benchmarks.scores import Content, Judging, distances, error_per_step, shown
from diffpress.benchmarks.speed import Timings
from diffpress.bundle import Bundle, denoiser_bytes
from diffpress.inspection import corrections_of, layer_rows, program_rows
from diffpress.plan import Sampling, StepProgram


def speed(timings: Timings, precision: str) -> dict[str, Any]:
    """Latency, speedup, stages and steps. `same_precision` is the export in the compressed bundle's own precision.

    `vs_eager_same_schedule` is against diffusers with the compressed bundle's own steps and solver, where those are
    not the model's: what compression gives without the shorter schedule.
    """
    own = timings.images[COMPRESSED]
    strict = None
    if STRICT in timings.images:
        ratio = paired_ratio(timings.images[STRICT], own)
        strict = {"precision": precision, "latency": summary(timings.images[STRICT]), "speedup": ratio}
    return {
        "latency": {name: summary(timings.images[name]) for name in (REFERENCE, EXPORT, COMPRESSED)},
        "speedup": {
            "vs_eager": paired_ratio(timings.images[REFERENCE], own),
            "vs_eager_same_schedule": paired_ratio(timings.images.get(RESCHEDULED, timings.images[REFERENCE]), own),
            "vs_uncompressed_export": paired_ratio(timings.images[EXPORT], own),
        },
        "same_precision": strict,
        "stages_ms": timings.stage_medians(),
        "steps_ms": timings.step_medians(),
    }


def sizes(bundle: Bundle) -> dict[str, Any]:
    """Bytes: the denoiser before and after, the bundle without its report, and each of its folders."""
    folders: dict[str, int] = {}
    for file in bundle.path.rglob("*"):
        if file.is_file():
            parts = file.relative_to(bundle.path).parts
            name = f"{parts[0]}/" if len(parts) > 1 else "manifest"
            folders[name] = folders.get(name, 0) + file.stat().st_size
    folders.pop("report/", None)
    return {
        "denoiser_reference": bundle.manifest.get("sizes", {}).get("denoiser_reference"),
        "denoiser_compressed": denoiser_bytes(bundle.path),
        "bundle": sum(folders.values()),
        "folders": dict(sorted(folders.items())),
    }


def quality(drawn: Mapping[str, Drawn], judging: Judging, same_schedule: bool = True) -> dict[str, Any]:
    """Distances to the reference, content metrics of both sides, the error after each step.

    On another schedule than the reference's, the compressed steps end elsewhere: their errors are None.
    """
    reference, compressed = drawn[REFERENCE], drawn[COMPRESSED]
    contents = {REFERENCE: judging.content(reference.pixels), COMPRESSED: judging.content(compressed.pixels)}
    sides = {"reference": contents[REFERENCE], "compressed": contents[COMPRESSED]}
    metrics = ("clip_score", "attribute_accuracy", "frechet")
    compared = {metric: {side: getattr(found, metric) for side, found in sides.items()} for metric in metrics}
    comparable = {EXPORT: True, COMPRESSED: same_schedule}
    stepwise = {
        name: error_per_step(drawn[name], reference) if same else None
        for name, same in comparable.items()
        if name in drawn
    }
    return {
        "quality": {**distances(compressed, reference), **compared},
        "attributes": {side: found.attributes for side, found in sides.items()},
        "per_step": {"images": reference.trajectory.shape[1], "latent_rel_l2": stepwise},
    }


def fewer_steps(
    trials: list[Trial], rival: str | None, drawn: Mapping[str, Drawn], judging: Judging, backend: Mapping[str, str]
) -> dict[str, Any]:
    """The row "fewer plain steps at equal latency": the export without compression, on the best of plain.RIVALS."""
    found = best(trials)
    entry: dict[str, Any] = {
        "schedule": rival,
        "backend": backend["name"],
        "precision": backend["precision"],
        "steps": found.steps if found else None,
        "latency_ms": found.latency_ms if found else None,
        "latency_ratio": found.ratio if found else None,
    }
    apart: dict[str, Any] = dict.fromkeys(("images", "psnr_db", "psnr_db_worst", "ssim", "latent_rel_l2"))
    content = Content()
    if PLAIN in drawn:
        apart = distances(drawn[PLAIN], drawn[REFERENCE])
        content = judging.content(drawn[PLAIN].pixels)
    return entry | apart | asdict(content) | {"trials": [asdict(trial) for trial in trials]}


def subject(bundle: Bundle, sampling: Sampling, own: Sampling) -> dict[str, Any]:
    """What was judged: model, recipe, schedule and step program; `own` is the schedule of the reference."""
    manifest = bundle.manifest
    program = StepProgram.from_json(manifest["program"])
    names = ("scheduler", "steps", "guidance_scale", "height", "width")
    return {
        "bundle": bundle.path.resolve().name,
        "model": dict(manifest.get("model", {})),
        "recipe": manifest.get("recipe", {}).get("name"),
        "recipe_in_full": manifest.get("recipe"),
        "passes": list(manifest.get("passes", [])),
        "sampling": {name: getattr(sampling, name) for name in names},
        "reference": {name: getattr(own, name) for name in names},
        "program": {"marks": program.marks(), "steps": list(program.steps)}
        | program_rows(program, corrections_of(bundle, len(program.steps))),
        "engines": [
            {key: entry.get(key) for key in ("target", "path", "precision", "bytes")}
            for entry in manifest.get("engines", [])
        ],
    }


def pictures(drawn: Mapping[str, Drawn], texts: Sequence[str]) -> list[dict[str, Any]]:
    """The images that the page shows: of what prompt and seed, why ("" or "worst"), how far from the reference."""
    reference, compressed = drawn[REFERENCE], drawn[COMPRESSED]
    psnr = quality_of.psnr(compressed.pixels, reference.pixels)
    return [
        {"image": index, "prompt": texts[index], "seed": index, "note": note, "psnr_db": float(psnr[index])}
        for index, note in shown(reference, compressed)
    ]


def layers(bundle: Bundle) -> list[dict[str, Any]]:
    """What each layer of the denoiser became: weights, formats decided and shipped, bytes before and after."""
    kept = ("layer", "kind", "shape", "format", "ships_as", "exact", "bytes", "error")
    return [
        {name: row.get(name) for name in kept} | {"float_bytes": 4 * math.prod(row["shape"])}
        for row in layer_rows(bundle)
    ]


def commands(
    bundle: Path, against: str, images: int, manifest: Mapping[str, Any], *, prompts: Path | None = None
) -> list[str]:
    """What to type to get this report again; a recipe of one's own is the one that stands in the report, in a file."""
    recipe, sampling = manifest.get("recipe", {}), manifest.get("reference", manifest)["sampling"]
    model, place = shlex.quote(against), shlex.quote(str(bundle))
    name = recipe["name"] if _is_preset(recipe) else "recipe.yaml"
    judged = f" --prompts {shlex.quote(str(prompts))}" if prompts else ""
    return [
        f"diffpress compress {model} --recipe {name} --steps {sampling['steps']} "
        f"--seed {manifest.get('seed', 0)} --output {place}",
        f"diffpress bench {place} --against {model} --images {images}{judged}",
    ]


def _is_preset(recipe: Mapping[str, Any]) -> bool:
    """Whether the shipped recipe of this name is the very same."""
    from diffpress.compress import recipe as recipes

    name = recipe.get("name")
    return name in recipes.presets() and json.loads(json.dumps(recipes.as_json(recipes.load(name)))) == recipe


def finite(value: Any) -> Any:
    """The same document with null in place of NaN and infinities, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
