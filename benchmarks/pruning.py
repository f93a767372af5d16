"""Every way of pruning `shapes`: `python -m diffpress.benchmarks.pruning [--quick] --json FILE`.

Each row is a recipe, run in a process of its own, so that its memory is its own; its denoiser is exported and draws the
same prompts and seeds as the whole one in the same inference library. Rows are made one after the other, since they
find in a common folder what earlier ones measured, and kept in the work folder; times of calls are taken in the end,
alone and alternating. Goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffpress import api
from diffpress.benchmarks import candidates, isolated, prompts, scores
from diffpress.benchmarks.latency import alternate, paired_ratio
from diffpress.benchmarks.memory import high_water_bytes
from diffpress.benchmarks.quantization import bits, deploying, stored_bytes
from diffpress.benchmarks.recipe_rows import BATCH, Row, file_name, head
from diffpress.plan import FULL, StepProgram
from diffpress.runtime import backends
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.program import open_denoiser

STEPS, IMAGES = 20, 100
OPENINGS, CALLS, TURNS = 6, 8, 2  # of both networks, of the denoiser in each, and images in each
DRAWS, TIMED = "openvino", "onnxruntime"  # in FP32: what draws, and what a call is timed in
CALIBRATION = {"prompts": 16, "steps": 10}
DISTILL = {"distill": {"iterations": 1000, "rate": 2e-5}}
REFERENCE = "fp32"


def structured(ratio: float, method: str = "obs", **fields: Any) -> dict[str, Any]:
    """The pass."""
    return {"prune-structured": {"ratio": ratio, "method": method, **fields}}


def two_four(method: str = "obs", **fields: Any) -> dict[str, Any]:
    """The pass."""
    return {"prune-nm": {"method": method, **fields}}


def unstructured(ratio: float, **fields: Any) -> dict[str, Any]:
    """The pass."""
    return {"prune-unstructured": {"ratio": ratio, **fields}}


def table() -> dict[str, Row]:
    """All rows by name, the reference first."""
    rows = {REFERENCE: Row("reference", (), quick=True)}

    def add(name: str, group: str, *passes: Any, quick: bool = False) -> None:
        assert name not in rows
        rows[name] = Row(group, passes, CALIBRATION, quick)

    names = {"magnitude": "L1", "wanda": "Wanda", "obs": "OBS-Diff"}
    # Those of 20 % come first and pay for measuring what parts are worth, which the others find measured.
    for percent in (20, 10, 30):
        for method, said in names.items():
            quick = percent == 30 and method != "wanda"
            add(f"{said}, {percent} %", "structured", structured(percent / 100, method=method), quick=quick)
    add("OBS-Diff, 40 %", "structured", structured(0.4))
    for percent in (20, 40):
        add(f"OBS-Diff, {percent} %, distilled", "structured", structured(percent / 100), DISTILL)
    both = structured(0.2, budget="balanced", norm_groups="even")
    add("20 % of both, even norm groups", "structured otherwise", both)
    add("20 % of both, even norm groups, distilled", "structured otherwise", both, DISTILL)
    operations = structured(0.2, budget="flops")
    add("20 % of operations", "structured otherwise", operations)
    add("20 % of operations, distilled", "structured otherwise", operations, DISTILL)
    add("uniform, 20 %", "structured otherwise", structured(0.2, allocation="uniform"))
    for method, said in (names | {"magnitude": "magnitude"}).items():
        add(f"{said}, 2:4", "2:4", two_four(method), quick=method == "obs")
        for percent in (30, 50, 70):
            add(f"{said}, {percent} % of weights", "unstructured", unstructured(percent / 100, method=method))
    add("OBS-Diff, 2:4, distilled", "2:4", two_four(), DISTILL)
    add("OBS-Diff, 2:4, no refinement", "2:4", two_four(refine=0))
    add("OBS-Diff, 70 % of weights by sensitivity", "unstructured", unstructured(0.7, allocation="sensitivity"))
    for weighting in ("uniform", "linear", "log-increase"):
        passes = structured(0.4, allocation="uniform", weighting=weighting)
        add(f"weighting {weighting}, 40 %", "weighting of steps", passes)
    add("weighting log-decrease, 40 %", "weighting of steps", structured(0.4, allocation="uniform"))
    quantize, cache = {"quantize": {"format": "int8"}}, {"cache": {"interval": 2, "branch": 0}}
    for name, pruning in {"structured 40 %": structured(0.4), "2:4": two_four()}.items():
        add(f"{name}, INT8", "together", pruning, quantize)
        add(f"{name}, INT8, cached", "together", pruning, quantize, cache)
    add("INT8, cached", "together", quantize, cache)
    return rows


def sharing(rows: Mapping[str, Row]) -> set[str]:
    """Names of the rows that find on disk what an earlier row measured or pruned, so their seconds are not all."""
    seen: set[str] = set()
    found = set()
    for name, row in rows.items():
        first: dict[str, Any] = dict(row.passes[0]) if row.passes else {}
        cut = first.get("prune-structured", {"allocation": "uniform"})
        keys = {json.dumps(first)} if "quantize" not in first else set()
        if cut.get("allocation") != "uniform":  # effects of single cuts, whatever is made of them
            keys.add(json.dumps([cut.get("method"), cut.get("norm_groups"), cut.get("weighting")]))
        if keys & seen:
            found.add(name)
        seen |= keys
    return found


def prune(task: Mapping[str, Any]) -> dict[str, Any]:
    """Run a recipe in this process and export its denoiser into a folder; what is known without drawing."""
    from diffpress.compress.recipe import Recipe
    from diffpress.compress.run import run
    from diffpress.export import ship
    from diffpress.export.flops import count

    recipe, folder = Recipe.model_validate(task["recipe"]), Path(task["folder"])
    work = api.begin("shapes", recipe, steps=task["steps"], quiet=True)
    work.scratch = Path(task["scratch"])
    if recipe.passes:
        list(work.record())  # once for all rows, so that the first one does not pay for the others
    started = time.process_time()  # of one thread, so that it does not matter what else the machine does
    done = run(recipe.built(), work)
    seconds = time.process_time() - started
    peak = high_water_bytes()
    bits_w, bits_a = bits(work.quantization)
    files = ship.variants(work.pipeline, work.plan(), folder, work.progress)
    weights = [tensor.numpy().tobytes() for tensor in work.denoiser.state_dict().values()]
    parameters = sum(parameter.numel() for parameter in work.denoiser.parameters())
    zeros = sum(int((parameter == 0).sum()) for parameter in work.denoiser.parameters())
    return {
        "bits_w": bits_w,
        "bits_a": bits_a,
        "params": parameters,
        "zeros": zeros / parameters,
        "flops": count(files[FULL], 2).operations,
        "bytes": stored_bytes(work),
        "bytes_zipped": sum(len(zlib.compress(tensor)) for tensor in weights) if bits_w == 32 else None,
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "deploys": deploying(work),
        "passes": [f"{result.name}: {result.summary}" for result in done],
        "program": work.program.to_json(),
        "files": {name: str(file) for name, file in files.items()},
    }


def made(name: str, row: Row, place: Path, steps: int) -> dict[str, Any]:
    """The row's entry without what drawing tells, from an earlier run or from a process of its own."""
    folder, scratch = place / file_name(name) / "unet", place / "unfinished"
    task = {"recipe": row.document(name), "steps": steps, "folder": str(folder), "scratch": str(scratch)}
    file, what = place / f"{file_name(name)}.json", f"row '{name}'"
    found = isolated.kept(file, "diffpress.benchmarks.pruning", task, what, OMP_NUM_THREADS="1")
    return {"name": name, "group": row.group, **found}


def pipeline(exported: Pipeline, entry: Mapping[str, Any], backend: str) -> Pipeline:
    """The exported pipeline with a row's denoiser in place of its own."""
    program = StepProgram.from_json(entry["program"])
    graphs = {name: Path(file) for name, file in entry["files"].items()}
    denoiser = open_denoiser(program, graphs, lambda file: backends.open_session(file, backend, "fp32"))
    return replace(exported, denoiser=denoiser, backend=backend)


def judged(
    entry: dict[str, Any],
    exported: Pipeline,
    chosen: prompts.Prompts,
    reference: candidates.Drawn | None,
    judging: scores.Judging,
    place: Path,
) -> tuple[dict[str, Any], candidates.Drawn]:
    """The entry with the quality of what the row draws, and that."""
    file = place / f"{file_name(entry['name'])}.npz"
    drawn = candidates.stored(file)
    if drawn is None:
        drawn = candidates.draw(pipeline(exported, entry, DRAWS), chosen.texts, range(len(chosen.texts)), BATCH)
        candidates.store(file, drawn)
    found: dict[str, Any] = {"latent_rel_l2": 0.0, "latent_rel_l2_median": 0.0, "psnr_db": None, "ssim": 1.0}
    if reference is not None:
        apart = scores.distances(drawn, reference)
        found = {key: apart[key] for key in found}
    content = judging.content(drawn.pixels)
    found |= {key: getattr(content, key) for key in ("clip_score", "frechet", "attribute_accuracy")}
    return entry | found, drawn


def timed(entries: Sequence[dict[str, Any]], exported: Pipeline, text: str) -> list[dict[str, Any]]:
    """The entries with times: of one call, both halves of guidance, and of one image, beside the whole network's.

    Both are opened several times, in turns first: where a library puts weights and threads makes two sessions of the
    same graph differ by more than some rows do.
    """
    found = []
    for entry in entries:
        call, image = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
        for opening in range(OPENINGS):
            both = [("own", entry), ("whole", entries[0])]
            opened = {name: pipeline(exported, one, TIMED) for name, one in (both[::-1] if opening % 2 else both)}
            calls = {name: partial(_call, one) for name, one in opened.items()}
            images = {name: partial(_image, one, text) for name, one in opened.items()}
            for name, times in alternate(calls, CALLS, warmup=3).items():
                call[name] += times
            for name, times in alternate(images, TURNS, warmup=0).items():
                image[name] += times
        found.append(
            entry
            | {
                "call_speedup": paired_ratio(call["whole"], call["own"]),
                "speedup_vs_uncompressed": paired_ratio(image["whole"], image["own"]),
                "speedup_vs_eager": None,
            }
        )
    return found


def _call(own: Pipeline, turn: int) -> None:
    session = own.denoiser.sessions[FULL]
    session.run(
        {
            name: np.ones([2 if size is None else size for size in port.shape], port.dtype)
            for name, port in session.inputs.items()
        }
    )


def _image(own: Pipeline, text: str, turn: int) -> None:
    own([text], [turn])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/pruning"), help="measured rows live here")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a few rows on a few images")
    parser.add_argument("--only", nargs="*", help="names of rows to measure, beside fp32")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        sys.stdout.write(json.dumps(prune(json.loads(options.task))) + "\n")
        return
    if options.json is None:
        parser.error("give --json")
    rows = {name: row for name, row in table().items() if row.quick or not options.quick}
    if options.only is not None:
        rows = {name: row for name, row in rows.items() if name == REFERENCE or name in options.only}
    images = 24 if options.quick else IMAGES
    place: Path = (options.work / f"{STEPS}-{images}").resolve()
    place.mkdir(parents=True, exist_ok=True)
    chosen = prompts.choose(images, shapes=True)
    folder = place / "export"
    if not folder.exists():
        api.compress("shapes", "fp32", folder, steps=STEPS, quiet=True)
    entries = [made(name, row, place, STEPS) for name, row in rows.items()]
    shared = sharing(rows)
    entries = [entry | {"seconds_shared": entry["name"] in shared} for entry in entries]
    exported, judging = Pipeline.load(folder, DRAWS, "fp32"), scores.Judging(chosen)
    reference: candidates.Drawn | None = None
    for index, entry in enumerate(entries):
        entries[index], drawn = judged(entry, exported, chosen, reference, judging, place)
        reference = reference or drawn
    entries = timed(entries, exported, chosen.texts[0])
    document = {
        **head(exported.sampling),
        "images": images,
        "calibration": CALIBRATION,
        "rows": [{key: value for key, value in entry.items() if key not in ("files", "program")} for entry in entries],
    }
    options.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
