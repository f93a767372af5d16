"""The report as data: what was measured, under the keys that later checks read (`report.json`)."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffpress.benchmarks import quality as quality_of
from diffpress.benchmarks.candidates import COMPRESSED, EXPORT, PLAIN, REFERENCE, RESCHEDULED, STRICT, Drawn
from diffpress.benchmarks.latency import paired_interval, paired_ratio, summary
from diffpress.benchmarks.networks import LPIPS
from diffpress.benchmarks.plain import Trial, best
from diffpress.benchmarks.scores import Content, Judging, Rows, distances, each, error_per_step, intervals, shown
from diffpress.benchmarks.speed import Timings
from diffpress.bundle import Bundle, denoiser_bytes
from diffpress.inspection import corrections_of, layer_rows, program_rows
from diffpress.plan import Sampling, StepProgram


def speed(timings: Timings, precision: str) -> dict[str, Any]:
    """Latency, speedup, stages and steps. `same_precision` is the export in the compressed bundle's own precision.

    `vs_eager_same_schedule` is against diffusers with the compressed bundle's own steps and solver, where those are
    not the model's: what compression gives without the shorter schedule.
    """
    own, strict = timings.images[COMPRESSED], None
    against = {
        "vs_eager": timings.images[REFERENCE],
        "vs_eager_same_schedule": timings.images.get(RESCHEDULED, timings.images[REFERENCE]),
        "vs_uncompressed_export": timings.images[EXPORT],
    }
    if STRICT in timings.images:
        times = timings.images[STRICT]
        strict = {
            "precision": precision,
            "latency": summary(times),
            "speedup": paired_ratio(times, own),
            "speedup_interval": paired_interval(times, own),
        }
    return {
        "latency": {name: summary(timings.images[name]) for name in (REFERENCE, EXPORT, COMPRESSED)},
        "speedup": {name: paired_ratio(times, own) for name, times in against.items()},
        "speedup_interval": {name: paired_interval(times, own) for name, times in against.items()},
        "same_precision": strict,
        "stages_ms": timings.stage_medians(),
        "steps_ms": timings.step_medians(),
        "stage_latency": timings.stage_summaries(),
        "step_latency": timings.step_summaries(),
    }


def sizes(bundle: Bundle, export: Bundle | None = None, model: Path | None = None) -> dict[str, Any]:
    """Bytes: the denoiser before and after, the bundle without its report, and each of its folders.

    `by_candidate` is all that each needs: the folder of the model, where there is one, and the bundles.
    """
    folders = _folders(bundle)
    return {
        "denoiser_reference": bundle.manifest.get("sizes", {}).get("denoiser_reference"),
        "denoiser_compressed": denoiser_bytes(bundle.path),
        "bundle": sum(folders.values()),
        "folders": dict(sorted(folders.items())),
        "by_candidate": {
            REFERENCE: None
            if model is None
            else sum(file.stat().st_size for file in model.rglob("*") if file.is_file()),
            EXPORT: None if export is None else sum(_folders(export).values()),
            COMPRESSED: sum(folders.values()),
        },
    }


def _folders(bundle: Bundle) -> dict[str, int]:
    folders: dict[str, int] = {}
    for file in bundle.path.rglob("*"):
        if file.is_file():
            parts = file.relative_to(bundle.path).parts
            name = f"{parts[0]}/" if len(parts) > 1 else "manifest"
            folders[name] = folders.get(name, 0) + file.stat().st_size
    folders.pop("report/", None)
    return folders


def apart(drawn: Mapping[str, Drawn], judging: Judging) -> Rows:
    """How far each compressed image is from the reference's, by metric, [N] each; LPIPS where it is known."""
    reference, compressed = drawn[REFERENCE], drawn[COMPRESSED]
    found = each(compressed, reference)
    perceived = judging.lpips(compressed.pixels, reference.pixels)
    return found if perceived is None else {**found, LPIPS: perceived}


def quality(drawn: Mapping[str, Drawn], judging: Judging, distance: Rows, same_schedule: bool = True) -> dict[str, Any]:
    """Distances to the reference, content metrics of both sides, the error after each step.

    `distance` is what `apart` found. On another schedule than the reference's, the compressed steps end elsewhere:
    their errors are None.
    """
    reference, compressed = drawn[REFERENCE], drawn[COMPRESSED]
    judged = {"reference": judging.judge(reference.pixels), "compressed": judging.judge(compressed.pixels)}
    compared = {
        metric: {side: getattr(content, metric) for side, (content, _) in judged.items()}
        for metric in ("clip_score", "attribute_accuracy", "frechet")
    }
    comparable = {EXPORT: True, COMPRESSED: same_schedule}
    stepwise = {
        name: error_per_step(drawn[name], reference) if same else None
        for name, same in comparable.items()
        if name in drawn
    }
    return {
        "quality": {
            **distances(compressed, reference, distance),
            LPIPS: float(distance[LPIPS].mean()) if LPIPS in distance else None,
            **compared,
        },
        "quality_interval": intervals(distance, judged["reference"][1], judged["compressed"][1]),
        "attributes": {side: content.attributes for side, (content, _) in judged.items()},
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
    distance: dict[str, Any] = dict.fromkeys(("images", "psnr_db", "psnr_db_worst", "ssim", "latent_rel_l2", LPIPS))
    content = Content()
    if PLAIN in drawn:
        distance |= distances(drawn[PLAIN], drawn[REFERENCE])
        content = judging.content(drawn[PLAIN].pixels)
        perceived = judging.lpips(drawn[PLAIN].pixels, drawn[REFERENCE].pixels)
        distance[LPIPS] = None if perceived is None else float(perceived.mean())
    return entry | distance | asdict(content) | {"trials": [asdict(trial) for trial in trials]}


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
    bundle: Path,
    against: str,
    images: int,
    manifest: Mapping[str, Any],
    given: Mapping[str, Path] | None = None,
    gates: Iterable[object] = (),
) -> list[str]:
    """What to type to get this report again; `given` are options of bench that name files.

    A recipe of one's own is the one that stands in the report, in a file.
    """
    recipe, sampling = manifest.get("recipe", {}), manifest.get("reference", manifest)["sampling"]
    model, place = shlex.quote(against), shlex.quote(str(bundle))
    name = recipe["name"] if _is_preset(recipe) else "recipe.yaml"
    options = "".join(f" {option} {shlex.quote(str(path))}" for option, path in (given or {}).items())
    options += "".join(f" --gate {shlex.quote(str(gate))}" for gate in gates)
    return [
        f"diffpress compress {model} --recipe {name} --steps {sampling['steps']} "
        f"--seed {manifest.get('seed', 0)} --output {place}",
        f"diffpress bench {place} --against {model} --images {images}{options}",
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
