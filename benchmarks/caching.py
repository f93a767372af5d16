"""Every caching method on `shapes`: `python -m diffpress.benchmarks.caching [--quick] --json FILE`.

Each row is a recipe. It is compressed into a bundle, whose images the runtime draws on the fastest backend, and they
are compared with those of the row's own full schedule, of the pipeline's own (50 DDIM steps) and of a converged
solution, of the same prompts and seeds. Every row is timed end to end, paired and alternating (`caching_speed`), and
stands beside the best plain schedule that is as fast; peers run in torch (`caching_peers`). Goes on where it was
stopped: what lies in the work folder is not measured again, times neither, but with --again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from diffpress import api, bundle
from diffpress.benchmarks import caching_peers, caching_speed, candidates, prompts, quality, scores, speed
from diffpress.benchmarks.caching_rows import FULL, check, full_of, listed, selected, table
from diffpress.benchmarks.caching_tables import OWN
from diffpress.benchmarks.candidates import Drawn
from diffpress.benchmarks.quantization import bits
from diffpress.benchmarks.recipe_rows import (
    BATCH,
    Row,
    compared,
    drawn_once,
    export,
    file_name,
    following,
    head,
    references,
)
from diffpress.compress.recipe import Recipe
from diffpress.errors import DiffpressError
from diffpress.paths import write_json
from diffpress.plan import Plan, Sampling
from diffpress.runtime import backends
from diffpress.runtime.pipeline import Pipeline


def compressed(name: str, row: Row, folder: Path) -> bundle.Bundle:
    """The row's bundle, made in `folder` where it is not there."""
    if not (folder / bundle.MANIFEST).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        recipe = folder.with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump(json.loads(json.dumps(row.document(name)))), "utf-8")
        api.compress("shapes", str(recipe), folder, quiet=True)
    return bundle.read(folder)


def measure(
    name: str,
    row: Row,
    pipeline: Pipeline,
    drawn: Drawn,
    full: Drawn,
    wanted: tuple[Drawn, Drawn],
    judging: scores.Judging,
) -> dict[str, Any]:
    """What the row's bundle is, and how good its images are."""
    manifest = pipeline.bundle.manifest
    plan = Plan.load(pipeline.bundle.path / "plan")
    bits_w, bits_a = bits(plan.quantization)
    return {
        "name": name,
        "group": row.group,
        "full": full_of(name, row),
        "peer": False,
        "backend": f"{pipeline.backend} {pipeline.precision}",
        "steps": plan.sampling.steps,
        "evaluations": plan.program.evaluations(),
        "program": plan.program.marks(),
        "variants": len(set(plan.program.steps)),
        "bits_w": bits_w,
        "bits_a": bits_a,
        "bytes": bundle.denoiser_bytes(pipeline.bundle.path),
        "params": manifest["model"]["parameters"],
        **errors(drawn, full, wanted, judging),
        "seconds": sum(entry["seconds"] for entry in manifest["passes"]),
        "deploys": True,
        "passes": [f"{entry['name']}: {entry['summary']}" for entry in manifest["passes"]],
    }


def errors(drawn: Drawn, full: Drawn, wanted: tuple[Drawn, Drawn], judging: scores.Judging) -> dict[str, Any]:
    """Distances to both references and to the row's own full schedule; the reference itself is not compared."""
    found = compared(drawn, wanted, judging)
    own = quality.relative_l2(drawn.latents, full.latents)
    if drawn is wanted[0]:
        found["psnr_db"] = None  # the same images
    return found | {"latent_rel_l2_full": float(own.mean()), "latent_rel_l2_full_median": float(np.median(own))}


def fastest(exported: Path, file: Path, prompt: str) -> tuple[str, str]:
    """The backend and precision that run the uncompressed export fastest; asked once for a work folder."""
    if not file.exists():
        best, _ = speed.fastest(backends.available(), lambda *pair: Pipeline.load(exported, *pair), prompt)
        write_json(file, best)
    best = json.loads(file.read_text("utf-8"))
    return best["name"], best["precision"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/caching"), help="bundles and measured rows live here")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="a few rows on a few images, in 3 minutes")
    parser.add_argument("--only", nargs="*", help="measure rows whose name holds one of these, beside fp32")
    parser.add_argument("--measured", action="store_true", help="no row that is not in the work folder yet")
    parser.add_argument("--again", action="store_true", help="time again what has been timed, on a quiet machine")
    options = parser.parse_args(arguments)
    images, rounds = (8, 2) if options.quick else (options.images, caching_speed.ROUNDS)
    folder = options.work / (f"{images}-quick" if options.quick else f"{images}")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = prompts.choose(images, shapes=True)
    check(selected(table("fp32"), options.quick, options.only))
    uncompressed = options.work / "bundles" / "fp32"
    float_export = export(uncompressed, backends.available()[0][0])
    pair = fastest(uncompressed, options.work / "fastest.json", chosen.texts[0])
    rows = selected(table(pair[1]), options.quick, options.only)
    if options.measured:
        rows = {name: row for name, row in rows.items() if (folder / f"{file_name(name)}.json").exists()}
    judging = scores.Judging(chosen)
    base = api.begin("shapes", Recipe(name="own"), quiet=True)
    wanted = references(folder, float_export, base, chosen)
    entries: list[dict[str, Any]] = []
    fulls = {FULL[OWN]: wanted[0]}
    failed: list[str] = []
    for name, row in (bar := tqdm(rows.items(), desc="rows", unit="row")):
        bar.set_postfix_str(name)
        file, full = folder / f"{file_name(name)}.json", full_of(name, row)
        if not file.exists() or name in FULL.values():
            place = options.work / "bundles" / file_name(full if row.group == "reference" else name)
            try:
                made = compressed(name, row, place)
            except DiffpressError as error:  # the others are measured all the same, in what may take hours
                failed.append(f"{name}: {error}")
                continue
            pipeline = Pipeline.load(made, pair[0], row.precision or pair[1])
            if name in FULL.values() and name not in fulls:
                sampling = Sampling.from_json(made.manifest["sampling"])
                reference = following(float_export, sampling, pipeline.denoiser.program)
                fulls[name] = drawn_once(folder / f"{file_name(name)}.npz", reference, chosen)
        if not file.exists():
            drawn = fulls[name] if name in FULL.values() else _draw(pipeline, chosen)
            entry = measure(name, row, pipeline, drawn, fulls[full], wanted, judging)
            write_json(file, entry)
        entries.append(json.loads(file.read_text("utf-8")))
    if failed:
        raise DiffpressError(listed(failed))
    entries += caching_peers.measured(folder, options.quick, base.sampling, chosen, wanted, judging)
    timing = caching_speed.Place(options.work / "bundles", folder, chosen.texts, pair, wanted, judging, rounds)
    entries = caching_speed.timed(timing, entries, options.again)
    document = {
        **head(base.sampling),
        "backend": " ".join(pair),
        "images": images,
        "rows": entries,
    }
    options.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


def _draw(pipeline: Pipeline, chosen: prompts.Prompts) -> Drawn:
    return candidates.draw(pipeline, chosen.texts, list(range(len(chosen.texts))), BATCH)


if __name__ == "__main__":
    main()
