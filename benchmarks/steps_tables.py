"""The tables and the plot of `benchmarks.steps`, from results/steps.json; `benchmarks.tables` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffpress.benchmarks import markdown, plots, recipe_tables

RESULTS = Path(__file__).resolve().parent / "results"
TOLD = (8, 10, 12, 20)  # step counts that the README tells
# What a found schedule of a solver has to beat, by the solver's name in row names.
UNIFORM = {"Euler": "DDIM, trailing"}
METHODS = ("GITS", "Align Your Steps", "AutoDiffusion")
DRAWN = {
    "DDIM": "DDIM",
    "DPM-Solver++, trailing": "DPM-Solver++, uniform",
    "DPM-Solver++, Karras": "DPM-Solver++, Karras",
    "UniPC, Karras": "UniPC, Karras",
    "DPM-Solver++, descent": "DPM-Solver++, found",
}


def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((RESULTS / "steps.json").read_text("utf-8"))
    return data


def _split(name: str) -> str:
    """The name of a row without its step count."""
    return name.rsplit(", ", 1)[0]


def steps() -> str:
    """Medians of the latent error to the converged solution at a few step counts."""
    data = _data()
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in data["rows"]:
        if row["group"] in ("schedule", "found schedule"):
            found.setdefault(_split(row["name"]), {})[row["steps"]] = row
    lines = [
        markdown.row(("error to the converged latents, median (mean)", *(f"{n} steps" for n in TOLD))),
        "|---|" + "--:|" * len(TOLD),
    ]
    for name, by_steps in found.items():
        cells = [markdown.error(by_steps.get(count), "latent_rel_l2_converged") for count in TOLD]
        lines.append(markdown.row((name, *cells)))
    return "\n".join([*lines, "", _where(data)])


def steps_all() -> str:
    """Every row."""
    data = _data()
    lines = [
        "| | evaluations | speed | error to 50 DDIM steps | median | error to converged | median | PSNR | CLIP | Fréchet | attributes |",  # noqa: E501
        "|---|" + "--:|" * 10,
    ]
    group = ""
    for row in data["rows"]:
        if row["group"] != group:
            group = row["group"]
            lines.append(f"| **{group}** |" + " |" * 10)
        cells = [
            row["name"],
            f"{row['evaluations']:g}",
            markdown.cell(row["speedup_vs_eager"], ".1f", "x"),
            *(
                markdown.cell(row[f"latent_rel_l2{end}"], ".4f")
                for end in ("", "_median", "_converged", "_converged_median")
            ),
            markdown.cell(row["psnr_db"], ".1f"),
            markdown.cell(row["clip_score"], ".2f"),
            markdown.cell(row["frechet"], ".2f"),
            markdown.cell(row["attribute_accuracy"], ".1%"),
        ]
        lines.append(markdown.row(cells))
    return "\n".join([*lines, "", _where(data)])


def _where(data: Mapping[str, Any]) -> str:
    machine = data["machine"]
    return (
        f"{data['images']} images of held-out captions, guidance {data['sampling']['guidance']:g}; speed end to end at "
        f"batch 1 on {data['backend']} against eager diffusers at {data['sampling']['steps']} steps of "
        f"{data['sampling']['scheduler']}; {machine['processor']}, {machine['cores']} cores."
    )


def steps_claims() -> str:
    """What schedules were asked to reach on `shapes`, and what they reached."""
    rows = {row["name"]: row for row in _data()["rows"]}
    made: list[tuple[str, str, str, bool]] = []
    for count in (8, 10, 12):
        for solver in ("DPM-Solver++", "UniPC", "Euler"):
            plain, found = _of(rows, solver, count)
            if not found:
                continue
            for key, word in (("latent_rel_l2_converged", "mean"), ("latent_rel_l2_converged_median", "median")):
                best, rival = (min(group, key=lambda name: rows[name][key]) for group in (found, plain))
                share = rows[best][key] / rows[rival][key]
                made.append((f"{best}: {word} error of {_split(rival)}", "at most 75 %", f"{share:.0%}", share <= 0.75))
    for method in METHODS:
        for count in (8, 10, 12):
            names = [f"DPM-Solver++, {name}, {count} steps" for name in (method, "trailing")]
            if names[0] in rows:
                own, plain_error = (rows[name]["latent_rel_l2_converged_median"] for name in names)
                what = f"{method}, {count} steps: median error against uniform"
                made.append((what, "lower", f"{own:.3f} : {plain_error:.3f}", own < plain_error))
    fast = recipe_tables.reached()["fast"]
    own_points = recipe_tables.points(fast)
    speed, psnr = fast["speedup_vs_eager"], fast["psnr_db"]
    made += [
        ("`fast`: end to end against diffusers at 50 steps", "at least 15x", f"{speed:.1f}x", speed >= 15),
        ("`fast`: PSNR to its images", "at least 35 dB", f"{psnr:.1f} dB", psnr >= 35),
        ("`fast`: attributes", "at most 1 point lower", f"{own_points:+.1f}", own_points >= -1),
    ]
    return markdown.claims("on `shapes`", made)


def _of(rows: Mapping[str, Any], solver: str, count: int) -> tuple[list[str], list[str]]:
    """Names of the rows of a solver at a step count: without a search, and found."""
    names = [name for name in rows if name.endswith(f", {count} steps") and name.startswith(f"{solver}, ")]
    if solver in UNIFORM:
        names.append(f"{UNIFORM[solver]}, {count} steps")
    plain = [name for name in names if _split(name).endswith(("trailing", "Karras", "exponential"))]
    return plain, [name for name in names if rows[name]["group"] == "found schedule"]


def corrections() -> str:
    """INT8 with and without corrections, from the same table."""
    data = _data()
    lines = [
        "| INT8 | error to converged, median (mean) | to 50 DDIM steps, median (mean) | attributes |",
        "|---|--:|--:|--:|",
    ]
    for row in data["rows"]:
        if row["group"] == "INT8, corrected":
            own = f"{row['latent_rel_l2_median']:.4f} ({row['latent_rel_l2']:.4f})"
            converged = f"{row['latent_rel_l2_converged_median']:.4f} ({row['latent_rel_l2_converged']:.4f})"
            lines.append(f"| {row['name']} | {converged} | {own} | {row['attribute_accuracy']:.1%} |")
    return "\n".join(lines)


def guidance() -> str:
    """What economy of guidance costs, beside fewer steps with all of it."""
    data = _data()
    lines = ["| | evaluations | speed | error to converged, median (mean) | PSNR |", "|---|--:|--:|--:|--:|"]
    for row in data["rows"]:
        if row["group"] == "guidance":
            converged = f"{row['latent_rel_l2_converged_median']:.4f} ({row['latent_rel_l2_converged']:.4f})"
            speed = markdown.cell(row["speedup_vs_eager"], ".1f")
            lines.append(f"| {row['name']} | {row['evaluations']:g} | {speed}x | {converged} | {row['psnr_db']:.1f} |")
    return "\n".join(lines)


def plot() -> str:
    """Median error to the converged solution against evaluations, as an SVG that stands alone."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in _data()["rows"]:
        label = DRAWN.get(_split(row["name"]))
        if label is not None and row["group"] in ("schedule", "found schedule"):
            series.setdefault(label, []).append((row["evaluations"], row["latent_rel_l2_converged_median"]))
    return plots.curves(series, "evaluations of the network", "median error of the latents to the converged solution")
