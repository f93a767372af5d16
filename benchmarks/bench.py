"""Judges a bundle: the compressed pipeline, the same model exported without compression, and diffusers in FP32."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffpress import bundle as bundles
from diffpress.benchmarks import (
    candidates,
    card,
    document,
    front,
    machine,
    memory,
    plain,
    prompts,
    report,
    scores,
    speed,
)
from diffpress.benchmarks.candidates import (
    COMPRESSED,
    EXPORT,
    PLAIN,
    REFERENCE,
    RESCHEDULED,
    STRICT,
    Candidate,
    Drawn,
    Reference,
)
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError
from diffpress.plan import Sampling

KEPT = 16  # images whose latents are compared step by step


def bench(
    bundle_path: str | Path,
    against: str,
    images: int = 200,
    json_file: Path | None = None,
    quiet: bool = False,
    *,
    prompts_file: Path | None = None,
    uncompressed: Path | None = None,
    reference: Reference | None = None,
) -> dict[str, Any]:
    """Measure a bundle against the model it was made from; returns the report and writes it into the bundle.

    `uncompressed` is a folder for the export without compression, made if absent and used if it fits; without one it
    is made in a temporary place. `reference` is the diffusers pipeline, opened if
    absent. Raises `DiffpressError` for a model that is not the bundle's, or unreadable prompts.
    """
    from diffpress.calibration.model import folder_of

    if images < 1:
        raise DiffpressError(f"--images is {images}: at least 1 is needed")
    opened = bundles.load(bundle_path)
    check_model(opened, against)
    chosen = prompts.choose(images, _is_shapes(against), prompts_file)
    with _uncompressed(opened, against, uncompressed, quiet) as export:
        result, pictures = measure(opened, export, against, chosen, quiet, reference)
    if folder_of(against) is None:
        result["model"]["hub"] = against
    result["reproduce"] = document.commands(Path(bundle_path), against, images, opened.manifest, prompts=prompts_file)
    result = document.finite(result)
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    if json_file is not None:
        json_file.write_text(text, "utf-8")
    page = report.render(result, pictures)
    _into(opened, {"report.json": text, "report.html": page, "README.md": card.card(result)}, result)
    return result


def check_model(bundle: Bundle, against: str) -> None:
    """Raise `DiffpressError` unless `against` is the model that the bundle was made from, by its digest."""
    from diffpress.calibration.model import digest, folder_of

    folder = folder_of(against)
    if folder is not None and not folder.is_dir():
        raise DiffpressError(f"there is no model at {against}: give --against the model the bundle was made from")
    made_from = bundle.manifest.get("model", {})
    if made_from.get("digest") not in (None, digest(against)):
        source = made_from.get("source", "another model")
        raise DiffpressError(f"{bundle.path} was made from '{source}': give --against that model, not {against}")


def _is_shapes(against: str) -> bool:
    from diffpress.benchmarks.shapes import PIPELINE
    from diffpress.calibration.model import folder_of, is_shapes

    folder = folder_of(against)
    return is_shapes(against) or (folder is not None and folder.resolve() == PIPELINE.resolve())


@contextmanager
def _uncompressed(bundle: Bundle, against: str, folder: Path | None, quiet: bool) -> Iterator[Bundle]:
    """The same model exported without compression, on its own schedule."""
    from diffpress import api

    steps = candidates.own_schedule(bundle.manifest)[0].steps
    with tempfile.TemporaryDirectory(prefix="diffpress-bench-") as temporary:
        place = folder or Path(temporary) / "uncompressed"
        if not place.exists():
            loras = candidates.loras_of(bundle.manifest)
            yield api.compress(against, "fp32", place, steps=steps, loras=loras, quiet=quiet)
            return
        export = bundles.load(place)
        check_model(export, against)
        if export.manifest.get("passes"):
            raise DiffpressError(f"{place} is compressed: name an empty place or one made with --recipe fp32")
        yield export


def measure(
    bundle: Bundle,
    export: Bundle,
    against: str,
    chosen: prompts.Prompts,
    quiet: bool,
    reference: Reference | None = None,
) -> tuple[dict[str, Any], list[report.Picture]]:
    """Everything the report says, and the pictures it shows."""
    from diffpress.runtime.backends import available
    from diffpress.runtime.pipeline import Pipeline

    sampling = Sampling.from_json(bundle.manifest["sampling"])
    own, scheduler = candidates.own_schedule(bundle.manifest)  # what is not compressed keeps the model's own schedule

    def open_compressed(backend: str, precision: str) -> Candidate:
        return Pipeline.load(bundle, backend, precision)

    backends = tqdm(available(), desc="trying backends", unit="backend", disable=quiet)
    default, tried = speed.fastest(backends, open_compressed, chosen.texts[0])
    backend, precision = default["name"], default["precision"]
    reference = reference or Reference.load(against, own, scheduler, candidates.loras_of(bundle.manifest))
    pipelines: dict[str, Candidate] = {
        REFERENCE: reference,
        EXPORT: Pipeline.load(export, backend, "fp32", sampling=own),
        COMPRESSED: open_compressed(backend, precision),
    }
    if precision != "fp32":
        pipelines[STRICT] = Pipeline.load(export, backend, precision, sampling=own)
    if sampling != own:
        pipelines[RESCHEDULED] = reference.on(sampling)
    timings = speed.time_all(pipelines, chosen.texts, quiet)

    def open_plain(schedule: Sampling) -> Candidate:
        return Pipeline.load(export, backend, precision, sampling=schedule)

    def open_timed(steps: int) -> Candidate:
        return open_plain(plain.schedules(scheduler, own, steps)[plain.TIMED])

    trials = plain.compare(timings, pipelines, open_timed, own.steps, chosen.texts[0], quiet)
    batch, texts = candidates.batch_size(bundle.manifest["latent"]), chosen.texts
    same = {  # what is compared in quality against speed alone
        name: candidates.draw(pipelines.pop(name), texts[:KEPT], range(len(texts[:KEPT])), batch)
        for name in (STRICT, RESCHEDULED)
        if name in pipelines
    }
    rival = plain.rival(trials, scheduler, own, open_plain, pipelines[REFERENCE], texts, batch, quiet)
    if rival is not None:
        pipelines[PLAIN] = rival.candidate
    drawn = _draw_all(pipelines, texts, batch, quiet) | same
    judging = scores.Judging(chosen)
    result = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **document.subject(bundle, sampling, own),
        "prompts": {"source": chosen.source, "count": len(chosen.texts), "seeds": f"0..{len(chosen.texts) - 1}"},
        **document.speed(timings, precision),
        "size_bytes": document.sizes(bundle),
        "peak_rss_bytes": _peaks(bundle, export, against, default, chosen.texts[0], quiet),
        **document.quality(drawn, judging, same_schedule=sampling == own),
        PLAIN: document.fewer_steps(trials, rival.schedule if rival else None, drawn, judging, default),
        "pictures": document.pictures(drawn, chosen.texts),
        "layers": document.layers(bundle),
        "faults": scores.all_faults(drawn),
        "backend": default,
        "backends_tried": tried,
        "machine": machine.machine(),
        "versions": machine.versions(),
    }
    result["candidates"] = front.rows(result["speedup"], result["same_precision"], trials, drawn, rival)
    return result, _pictures(drawn, result["pictures"])


def _draw_all(pipelines: dict[str, Candidate], texts: list[str], batch: int, quiet: bool) -> dict[str, Drawn]:
    """The same prompts and seeds for all; of the plain export only those that are compared step by step."""
    counts = {name: min(KEPT, len(texts)) if name == EXPORT else len(texts) for name in pipelines}
    drawn = {}
    with tqdm(total=sum(counts.values()), desc="drawing", unit="image", disable=quiet) as bar:
        for name, candidate in pipelines.items():
            count = counts[name]
            keep = 0 if name == PLAIN else KEPT
            bar.set_postfix_str(name.replace("_", " "))
            drawn[name] = candidates.draw(candidate, texts[:count], range(count), batch, keep, bar.update)
    return drawn


def _peaks(
    bundle: Bundle, export: Bundle, against: str, default: dict[str, str], prompt: str, quiet: bool
) -> dict[str, int]:
    runs = {"backend": default["name"], "prompt": prompt}
    tasks = {
        REFERENCE: {"bundle": str(bundle.path), "against": against, "prompt": prompt},
        EXPORT: {"bundle": str(export.path), "precision": "fp32", **runs},
        COMPRESSED: {"bundle": str(bundle.path), "precision": default["precision"], **runs},
    }
    bar = tqdm(tasks.items(), desc="measuring memory", unit="process", disable=quiet)
    return {name: memory.peak_rss(task) for name, task in bar}


def _pictures(drawn: dict[str, Drawn], shown: list[dict[str, Any]]) -> list[report.Picture]:
    reference, compressed, fewer = drawn[REFERENCE], drawn[COMPRESSED], drawn.get(PLAIN)
    return [
        report.Picture(
            place, reference.pixels[row["image"]], compressed.pixels[row["image"]],
            None if fewer is None else fewer.pixels[row["image"]],
        )
        for place, row in enumerate(shown)
    ]  # fmt: skip


def _into(bundle: Bundle, files: dict[str, str], result: dict[str, Any]) -> None:
    """Put the report into the bundle and list it in the manifest, with what was measured."""
    folder = bundle.path / "report"
    folder.mkdir(exist_ok=True)
    parts = {name: folder / f"{name}.part" for name in files}  # the manifest never lists a .part
    try:
        for name, text in files.items():
            parts[name].write_text(text, "utf-8")
        for name, part in parts.items():
            os.replace(part, folder / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    measured = {key: result[key] for key in ("latency", "speedup", "quality")}
    bundles.update(bundle, measured=measured, default_backend=result["backend"])
