"""Judges a bundle: the compressed pipeline, the same model exported without compression, and diffusers in FP32.

Under `accelerate launch` the first process measures time while the others wait; all of them draw.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    drawing,
    front,
    machine,
    prompts,
    report,
    saved,
    scores,
    timing,
)
from diffpress.benchmarks.candidates import COMPRESSED, PLAIN, REFERENCE, Drawn, Reference
from diffpress.benchmarks.compared import Compared
from diffpress.benchmarks.gates import gathered
from diffpress.benchmarks.gates import judge as judge_gates
from diffpress.benchmarks.networks import Networks
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError


def bench(
    bundle_path: str | Path,
    against: str,
    images: int | None = None,
    json_file: Path | None = None,
    quiet: bool = False,
    *,
    prompts_file: Path | None = None,
    uncompressed: Path | None = None,
    reference: Reference | None = None,
    networks: Networks | None = None,
    save_images: Path | None = None,
    gates: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure a bundle against the model it was made from; returns the report and writes it into the bundle.

    It is judged by the gates of its recipe and those given, and marked as failed where one fails (`gates.check`
    then raises); passing all of them takes the mark away, and where there are none it stays as it is.

    `images` None are as many as `prompts_file` has prompts, or `prompts.IMAGES`. `uncompressed` is a folder for the
    export without compression, made if absent and used if it fits; without one it is made in a temporary place.
    `reference` is the diffusers pipeline, opened if absent. `networks` judge images, those that the environment names
    if absent. `save_images` is a folder for images and prompts. An interrupted bench goes on with the images it lacks.
    Raises `DiffpressError` for a model that is not the bundle's, or unreadable prompts.
    """
    if images is not None and images < 1:
        raise DiffpressError(f"--images is {images}: at least 1 is needed")
    opened = bundles.load(bundle_path)
    check_model(opened, against)
    limits = gathered(opened.manifest, gates)
    chosen = prompts.choose(images, _is_shapes(against), prompts_file)
    if save_images is not None:
        saved.check(save_images)
    networks = networks or Networks.load()
    from diffpress.calibration import processes
    from diffpress.calibration.model import folder_of

    processes.take_own_gpu()
    with _uncompressed(opened, against, uncompressed, quiet) as export:
        compared = Compared(opened, export, against, {} if reference is None else {REFERENCE: reference})
        found = timing.measure(compared, chosen.texts, quiet) if processes.is_main() else None
        choice = processes.from_main(found.choice if found else None)
        folder, wanted = drawing.folder_of(opened, chosen.texts), compared.wanted(chosen.texts, choice)
        drawing.draw_all(wanted, lambda name: compared.open(name, choice), folder, _progress(quiet))
        result: dict[str, Any] | None = None
        if found:
            drawn = drawing.read_all(wanted, folder)
            result = judge(
                compared, found, drawn, scores.Judging(chosen, networks, drawn[REFERENCE].pixels), save_images
            )
            result |= judge_gates(result, limits)
            if folder_of(against) is None:
                result["model"]["hub"] = against
            given = {**({"--prompts": prompts_file} if prompts_file else {}), **networks.options()}
            texts = len(chosen.texts)
            result["reproduce"] = document.commands(Path(bundle_path), against, texts, opened.manifest, given, limits)
            result = document.finite(result)
            assert result is not None
            text = json.dumps(result, indent=1, allow_nan=False) + "\n"
            if json_file is not None:
                json_file.write_text(text, "utf-8")
            page = report.render(result, _pictures(drawn, result["pictures"]))
            _into(opened, {"report.json": text, "report.html": page, "README.md": card.card(result)}, result)
            shutil.rmtree(folder, ignore_errors=True)
        return processes.from_main(result)


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
    from diffpress.calibration import processes

    steps = candidates.own_schedule(bundle.manifest)[0].steps
    temporary = processes.from_main(tempfile.mkdtemp(prefix="diffpress-bench-") if processes.is_main() else None)
    try:
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
    finally:
        if processes.is_main():
            shutil.rmtree(temporary, ignore_errors=True)


def judge(
    compared: Compared,
    found: timing.Found,
    drawn: Mapping[str, Drawn],
    judging: scores.Judging,
    save_images: Path | None = None,
) -> dict[str, Any]:
    """Everything the report says but for how to get it again; saves the images where that is asked for."""
    texts, sampling, own = judging.prompts.texts, compared.sampling, compared.own
    rival = found.rival.schedule if found.rival else None
    distance = document.apart(drawn, judging)
    if save_images is not None:
        saved.save(save_images, drawn, texts, distance)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **document.subject(compared.bundle, sampling, own),
        "prompts": {
            "source": judging.prompts.source,
            "count": len(texts),
            "seeds": f"0..{len(texts) - 1}",
            "digest": judging.prompts.digest,
        },
        **found.entries,
        "size_bytes": document.sizes(compared.bundle, compared.export, compared.model_folder()),
        **document.quality(drawn, judging, distance, same_schedule=sampling == own),
        PLAIN: document.fewer_steps(found.trials, rival, drawn, judging, found.entries["backend"]),
        "candidates": front.rows(found.entries, found.trials, drawn, found.rival),
        "pictures": document.pictures(drawn, texts),
        "layers": document.layers(compared.bundle),
        "metrics": judging.metrics(),
        "faults": scores.all_faults(dict(drawn)),
        "machine": machine.machine(),
        "versions": machine.versions(),
    }


def _progress(quiet: bool) -> Callable[[Iterable[Any], str], Iterable[Any]]:
    from diffpress.calibration import processes

    def show(items: Iterable[Any], what: str) -> Iterable[Any]:
        return tqdm(items, desc=what, unit="batch", disable=quiet or not processes.is_main())

    return show


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
    judged = {"gates": result["gates"], "failed": not result["passed"]} if result["gates"] else {}
    bundles.update(bundle, measured=measured, default_backend=result["backend"], **judged)
