"""Solvers, schedules and guidance on `shapes`: `python -m diffpress.benchmarks.steps [--quick] --json FILE`.

Each row is a recipe at a step count. Its images are compared with the pipeline's own (50 DDIM steps) and with a
converged solution (200 steps of DPM-Solver++ on Karras sigmas), of the same prompts and seeds. Float rows are drawn by
the uncompressed export on one backend, quantized ones by the simulation of their plan. Goes on where it was stopped: a
row in the work folder is not measured again, and searches find their scores there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diffpress import api
from diffpress.benchmarks import candidates, prompts, scores
from diffpress.benchmarks.candidates import Drawn, Reference
from diffpress.benchmarks.latency import alternate, paired_ratio
from diffpress.benchmarks.recipe_rows import (
    BATCH,
    CONVERGED,
    Row,
    compared,
    export,
    file_name,
    following,
    head,
    references,
)
from diffpress.compress.cache.execute import execution
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.recipe import Recipe
from diffpress.compress.run import PassResult, run
from diffpress.compress.schedule.economy import guidance_of, spread
from diffpress.compress.work import Work
from diffpress.paths import write_json
from diffpress.plan import REUSE
from diffpress.runtime import backends
from diffpress.runtime.pipeline import Pipeline

COUNTS = (5, 6, 8, 10, 12, 16, 20, 25, 50)
SEARCHED = (8, 10, 12)  # step counts of the searches, which take minutes each
FEW = (10, 20)  # step counts of corrections
ECONOMIES: dict[str, tuple[int, Mapping[str, Any] | None]] = {
    "12 steps": (12, None),
    "12 steps, difference reused every 2nd": (12, {"every": 2}),
    "12 steps, difference reused as planned": (12, {"every": 2, "plan": "calibrated", "prompts": 8, "trials": 16}),
    "12 steps, interval as planned": (12, {"mode": "interval", "every": 2, "prompts": 8, "trials": 16}),
    "9 steps": (9, None),
    "20 steps": (20, None),
    "20 steps, difference reused every 2nd": (20, {"every": 2}),
    "20 steps, difference reused as planned": (20, {"every": 2, "plan": "calibrated", "prompts": 8, "trials": 16}),
    "15 steps": (15, None),
}
ROUNDS = 7
PLAIN: dict[str, Mapping[str, Any]] = {
    "DDIM": {"solver": "ddim"},
    "DDIM, trailing": {"solver": "ddim", "spacing": "trailing"},
    "Euler, Karras": {"solver": "euler", "spacing": "karras"},
    "DPM-Solver++": {"solver": "dpm++"},
    "DPM-Solver++, trailing": {"solver": "dpm++", "spacing": "trailing"},
    "DPM-Solver++, Karras": {"solver": "dpm++", "spacing": "karras"},
    "DPM-Solver++, exponential": {"solver": "dpm++", "spacing": "exponential"},
    "DPM-Solver++ 3, trailing": {"solver": "dpm++-3", "spacing": "trailing"},
    "DPM-Solver++ 3, Karras": {"solver": "dpm++-3", "spacing": "karras"},
    "UniPC, trailing": {"solver": "unipc", "spacing": "trailing"},
    "UniPC, Karras": {"solver": "unipc", "spacing": "karras"},
    "EVODiff, trailing": {"solver": "evodiff", "spacing": "trailing"},
    "EVODiff, Karras": {"solver": "evodiff", "spacing": "karras"},
    "DPM-Solver++, Align Your Steps table": {"solver": "dpm++", "spacing": "align-your-steps"},
    "DPM-Solver++, Hyperparameters": {"solver": "dpm++", "spacing": "hyperparameters"},
}
FOUND: dict[str, Mapping[str, Any]] = {
    "DPM-Solver++, GITS": {"solver": "dpm++", "search": "gits"},
    "DPM-Solver++, Align Your Steps": {"solver": "dpm++", "search": "align-your-steps"},
    "DPM-Solver++, AutoDiffusion": {"solver": "dpm++", "search": "autodiffusion", "search_epochs": 4},
    "DPM-Solver++, descent": {"solver": "dpm++", "search": "descent"},
    "Euler, GITS": {"solver": "euler", "search": "gits"},
    "UniPC, descent": {"solver": "unipc", "search": "descent"},
}
QUICK = ("DDIM", "DPM-Solver++, Karras", "UniPC, Karras")


def table() -> dict[str, Row]:
    """All rows by name."""
    rows = {}
    for name, fields in PLAIN.items():
        for steps in COUNTS:
            quick = name in QUICK and steps in (8, 12)
            rows[f"{name}, {steps} steps"] = Row("schedule", (_schedule(fields, steps),), quick=quick)
    for name, fields in FOUND.items():
        for steps in SEARCHED:
            rows[f"{name}, {steps} steps"] = Row("found schedule", (_schedule(fields, steps),))
    karras_spaced = PLAIN["DPM-Solver++, Karras"]
    for name, (steps, economy) in ECONOMIES.items():
        passes: tuple[Any, ...] = (_schedule(karras_spaced, steps),)
        rows[f"guidance: {name}"] = Row("guidance", passes if economy is None else (*passes, {"guidance": economy}))
    for steps in FEW:
        quantized = (_schedule(karras_spaced, steps), {"quantize": {"format": "int8"}})
        rows[f"INT8, {steps} steps"] = Row("INT8, corrected", quantized)
        rows[f"INT8, corrected, {steps} steps"] = Row("INT8, corrected", (*quantized, "correct"))
    return rows


def _schedule(fields: Mapping[str, Any], steps: int) -> dict[str, Any]:
    return {"schedule": {**fields, "steps": steps}}


def measure(
    name: str,
    row: Row,
    exported: Pipeline,
    chosen: prompts.Prompts,
    wanted: tuple[Drawn, Drawn],
    judging: scores.Judging,
    scratch: Path,
) -> dict[str, Any]:
    """The row's entry. `scratch` is where searches keep their scores, shared between rows."""
    work, passes = _work(row.recipe(name), scratch)
    [search] = work.tables.get("search", [None])
    if search is not None and search["name"] != search["method"]:
        # The pass took a schedule that its search did not beat; this table is about what the search found.
        work, _ = _work(
            Row("", ({"schedule": {"solver": _solver(row), "sigmas": search["own"]}},)).recipe(name), scratch
        )
    seeds = list(range(len(chosen.texts)))
    if work.quantization:
        with (
            simulated(work.denoiser, work.quantization, work.sampling.timesteps),
            execution(work.program, work.corrections).watched(work.pipeline, lambda index, call: None),
        ):
            drawn = candidates.draw(Reference(work.pipeline, work.sampling), chosen.texts, seeds, BATCH)
    else:
        drawn = candidates.draw(following(exported, work.sampling, work.program), chosen.texts, seeds, BATCH)
    return {
        "name": name,
        "group": row.group,
        "steps": work.sampling.steps,
        "evaluations": work.program.evaluations(),
        **compared(drawn, wanted, judging),
        "timesteps": list(work.sampling.timesteps),
        "passes": [f"{result.name}: {result.summary}" for result in passes],
        "corrections": work.tables.get("correct"),
        "seconds": sum(result.seconds for result in passes),
    }


def _work(recipe: Recipe, scratch: Path) -> tuple[Work, list[PassResult]]:
    """`shapes` after the passes of a recipe."""
    work = api.begin("shapes", recipe, quiet=True)
    work.scratch = scratch
    return work, run(recipe.built(), work)


def _solver(row: Row) -> str:
    return str(row.passes[0]["schedule"]["solver"])


Shape = tuple[int, float]  # steps and evaluations of a row


def shape(row: Mapping[str, Any]) -> Shape:
    """What the time of a row depends on."""
    return row["steps"], row["evaluations"]


def speedups(shapes: set[Shape], exported: Pipeline, eager: Reference, prompt: str) -> dict[Shape, float]:
    """How many times faster than eager diffusers the export is end to end at batch 1.

    The solver's own arithmetic is lost beside a call of the network, so one schedule stands for all of a shape.
    """
    found = {}
    for steps, evaluations in sorted(shapes):
        recipe = Recipe.model_validate({"name": "x", "passes": [_schedule({"solver": "dpm++"}, steps)]})
        work = api.begin("shapes", recipe, quiet=True)
        run(recipe.built(), work)
        full = round(2 * evaluations) - steps
        program = replace(work.program, guidance=guidance_of(steps, spread(steps, full), REUSE))
        times = alternate(
            {
                "eager": partial(_draw, eager, prompt),
                "export": partial(_draw, following(exported, work.sampling, program), prompt),
            },
            ROUNDS,
        )
        found[steps, evaluations] = paired_ratio(times["eager"], times["export"])
    return found


def _draw(candidate: candidates.Candidate, prompt: str, turn: int) -> None:
    candidate([prompt], [turn])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/steps"), help="measured rows live here")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="a few rows on a few images, in 3 minutes")
    parser.add_argument("--only", nargs="*", help="measure rows whose name holds one of these")
    parser.add_argument("--measured", action="store_true", help="no row that is not in the work folder yet")
    options = parser.parse_args()
    images = 16 if options.quick else options.images
    rows = {name: row for name, row in table().items() if row.quick or not options.quick}
    if options.only is not None:
        rows = {name: row for name, row in rows.items() if any(part in name for part in options.only)}
    folder = options.work / f"{images}"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = prompts.choose(images, shapes=True)
    judging = scores.Judging(chosen)
    backend = backends.available()[0][0]
    exported = export(options.work / "fp32", backend)
    base = api.begin("shapes", Recipe(name="own"), quiet=True)
    eager = Reference(base.pipeline, base.sampling)
    own, converged = references(folder, exported, base, chosen)
    entries: list[dict[str, Any]] = [
        {"name": "DDIM, 50 steps: the pipeline's own", "group": "reference", "steps": 50, "evaluations": 50.0}
        | compared(own, (own, converged), judging),
        {"name": f"DPM-Solver++, Karras, {CONVERGED} steps: converged", "group": "reference", "steps": CONVERGED}
        | {"evaluations": float(CONVERGED)}
        | compared(converged, (own, converged), judging),
    ]
    for name, row in rows.items():
        file = folder / f"{file_name(name)}.json"
        if options.measured and not file.exists():
            continue
        if not file.exists():
            entry = measure(name, row, exported, chosen, (own, converged), judging, folder / "unfinished")
            write_json(file, entry)
        entries.append(json.loads(file.read_text()))
    timed = {shape(entry) for entry in entries if not entry["group"].startswith("INT8")}
    ratios = speedups(timed, exported, eager, chosen.texts[0])
    document = {
        **head(base.sampling),
        "backend": f"{exported.backend} {exported.precision}",
        "images": images,
        # What is simulated has no time of its own.
        "rows": [
            entry | {"speedup_vs_eager": None if entry["group"].startswith("INT8") else ratios[shape(entry)]}
            for entry in entries
        ],
    }
    options.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
