"""The sections of the report page below speed: steps, quality, sizes, layers, how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from diffpress.benchmarks import plots
from diffpress.benchmarks.candidates import COMPRESSED, EXPORT, REFERENCE, STRICT
from diffpress.benchmarks.markup import (
    DASH,
    between,
    columns,
    definitions,
    figures,
    key,
    labels,
    legend,
    number,
    scrolling,
    section,
    share,
)
from diffpress.benchmarks.verdict import rescheduled, size

LPIPS = "lpips"
# A cell of the step program: what it is called in the style sheet, and in words.
KINDS = {
    "#": ("full", "computed"),
    "-": ("reuse", "taken from an earlier step"),
    "+": ("corrected", "taken and corrected"),
    "/": ("extrapolated", "extrapolated from two earlier steps"),
    ".": ("within", "as the part around it"),
}
GUIDED = {
    "#": ("full", "both halves"),
    "-": ("reuse", "the conditional half and the last difference"),
    ".": ("within", "the conditional half alone"),
    "=": ("corrected", "the conditional half, with the mean of both halves' features"),
}
RECIPE = "The recipe in full, every field filled in (recipe.yaml)"
TOGETHER = {
    "|": ("call", "a call by itself"),
    "[": ("call on", "first of a call of several steps"),
    "=": ("call on", "in the same call"),
    "]": ("call", "last of the same call"),
}


# Distances to the reference: key, words, decimals.
APART = (
    ("psnr_db", "PSNR to the reference, dB", 2),
    ("psnr_db_worst", "worst image, dB", 2),
    ("ssim", "SSIM", 4),
    (LPIPS, "LPIPS", 4),
    ("latent_rel_l2", "final latents, relative L2", 4),
)


def program_grid(program: Mapping[str, Any]) -> str:
    """The step program as rows of cells: a row per part of the denoiser that it treats apart, a column per step."""
    # A report from before parts were told apart has one row.
    parts = program.get("segments") or [{"name": "denoiser", "marks": program["marks"]}]
    rows = [(part["name"], part["marks"], KINDS) for part in parts]
    extras = (("together", "calls", TOGETHER), ("guidance", "guidance", GUIDED))
    rows += [(name, program[key], kinds) for key, name, kinds in extras if program.get(key)]
    drawn = []
    for name, marks, kinds in rows:
        cells = "".join(
            f'<i class="{kinds[mark][0]}" title="step {index}: {escape(variant)}, {kinds[mark][1]}"></i>'
            for index, (mark, variant) in enumerate(zip(marks, program["steps"], strict=True), 1)
        )
        drawn.append(f'<span>{escape(name)}</span><div class="program">{cells}</div>')
    ends = f'<div class="ruler"><span>1</span><span>step</span><span>{len(program["steps"])}</span></div>'
    return "".join([*drawn, "<span></span>", ends])


def program_legend(program: Mapping[str, Any]) -> str:
    """What the cells of the grid mean; empty where all are alike."""
    used = {mark for part in program.get("segments") or [program] for mark in part["marks"]}
    entries = [KINDS[mark] for mark in KINDS if mark in used] if len(used) > 1 else []
    entries += [("call", "joined: steps that run together in one call")] if program.get("together") else []
    guided = set(program.get("guidance") or "")
    entries += [(GUIDED[mark][0], f"guidance: {GUIDED[mark][1]}") for mark in GUIDED if mark in guided]
    return legend(entries)


def steps(report: Mapping[str, Any]) -> dict[str, str]:
    """The step program as a grid, the time of each step, the error after each."""
    marks, times = report["program"]["marks"], report["steps_ms"]
    full = marks.count("#")
    if full == len(marks):
        note = f"All {full} steps run the whole denoiser."
    else:
        note = f"{full} of {len(marks)} steps run the whole denoiser, "
        note += f"{len(marks) - full} take a part of it from an earlier one. A column is a step, a row a part."
    rival = STRICT if STRICT in times else EXPORT
    others = {"reference_eager": times[REFERENCE], "uncompressed_export": times[rival]}
    named = labels(report)
    kinds = [("full", "full step")] + ([("reuse", "reusing step")] if full < len(marks) else [])
    errors = {name: line for name, line in report["per_step"]["latent_rel_l2"].items() if line is not None}
    entries = []
    if rescheduled(report):
        note += " The compressed schedule is another than the reference's: its latents are compared at the end alone, "
        note += "not step by step."
    else:
        entries.append(("compressed", "compressed" + (" (hollow: reusing step)" if full < len(marks) else "")))
    if EXPORT in errors:
        entries.append(("export", "uncompressed: what the backend alone changes"))
    timed = plots.step_columns(times[COMPRESSED], marks, others, "time of each step")
    apart = plots.error_lines(errors, marks, "error after each step")
    across = legend([*kinds, ("export", named[rival]), ("reference", named[REFERENCE])])
    return {
        "program": program_grid(report["program"]),
        "program_legend": program_legend(report["program"]),
        "program_note": escape(f"{note} Steps are compared on {report['per_step']['images']} images."),
        "step_plots": columns(
            f"<figure><h3>Time of each step</h3>{timed}{across}</figure>" if timed else "",
            f"<figure><h3>Error of the latents after each step</h3>{apart}{legend(entries)}</figure>" if apart else "",
        ),
    }


def quality(report: Mapping[str, Any]) -> dict[str, str]:
    """Reference, compressed and fewer plain steps side by side."""
    own, row, attributes = report["quality"], report["fewer_plain_steps"], report["attributes"]
    spread, measured = report.get("quality_interval") or {}, report.get("metrics") or {}
    fewer = row["steps"] is not None

    def cell(name: str, value: float | None, digits: int, side: str = "") -> str:
        """A number with its interval below it."""
        found = spread.get(name)
        found = found.get(side) if isinstance(found, Mapping) else found if side in ("", "compressed") else None
        percent = name == "attribute_accuracy"
        interval = between(found, 1 if percent else digits, 100 if percent else 1, "%" if percent else "")
        text = share(value) if percent else number(value, digits)
        return text + (f"<small>{interval}</small>" if interval else "")

    rows = []
    for name, label, digits in APART:
        if own.get(name) is None and name == LPIPS:
            continue  # it takes weights that few have
        rows.append([label, DASH, cell(name, own[name], digits), number(row.get(name), digits)])
    for name, label, digits in (
        ("clip_score", "CLIP score", 2),
        ("attribute_accuracy", "attributes confirmed", 4),
        ("frechet", f"Fréchet distance to {measured.get('frechet', {}).get('to') or 'real pictures'}", 3),
    ):
        if any(value is not None for value in own[name].values()):
            sides = [cell(name, own[name][side], digits, side) for side in ("reference", "compressed")]
            plain = row.get(name)
            rows.append([label, *sides, share(plain) if name == "attribute_accuracy" else number(plain, digits)])
        if name == "attribute_accuracy" and attributes["reference"]:
            confirmed = (attributes["reference"], attributes["compressed"], row.get("attributes") or {})
            for kind in ("colour", "shape", "size", "relation"):
                values = [share(side.get(kind)) for side in confirmed]
                if set(values) != {DASH}:
                    rows.append([f"\N{EM SPACE}{kind}", *values])
    head = ["", "reference", "compressed", f"{row['steps']} plain steps" if fewer else ""]
    table = scrolling(head if fewer else head[:3], [r if fewer else r[:3] for r in rows], kind="stack")
    note = f"{own['images']} images, the same prompts and seeds on every side."
    if spread:
        note += " Small figures are 95 % bootstrap intervals over prompts."
    if fewer:
        note += f" Plain steps are those of {row['schedule']} on the uncompressed export, same backend and precision: "
        note += f"they take {row['latency_ratio']:.2f} of the compressed latency (paired, alternating)."
    names = {LPIPS: "LPIPS", "clip_score": "CLIP score", "frechet": "Fréchet distance"}
    for name, metric in measured.items():
        told = metric["note"] or (f"by {metric['by']}" if metric["by"] else "")
        note += f" {names.get(name, name)} {told}." if told else ""
    return {"quality_table": table, "quality_note": escape(note)}


def sizes(report: Mapping[str, Any]) -> dict[str, str]:
    """What lies on disk and what each candidate needs to run."""
    count, peaks, named = report["size_bytes"], report["peak_rss_bytes"], labels(report)
    devices = {name: peak for name, peak in (report.get("peak_device_bytes") or {}).items() if peak is not None}
    memory = [
        [key(name, named[name]), size(peaks[name]), *([size(devices.get(name))] if devices else [])]
        for name in (REFERENCE, EXPORT, COMPRESSED)
    ]
    head = ["", "peak resident memory", *(["peak on the device"] if devices else [])]
    disk = [
        ["denoiser, FP32 weights", size(count["denoiser_reference"])],
        ["denoiser, compressed (all graphs)", size(count["denoiser_compressed"])],
        *([f"\N{EM SPACE}{escape(name)}", size(value)] for name, value in count["folders"].items()),
        ["bundle, all files", size(count["bundle"])],
    ]
    return {
        "size_note": "Peak memory is that of a fresh process that loads it and draws one image, libraries included.",
        "memory_table": scrolling(head, memory, own=key(COMPRESSED, named[COMPRESSED])),
        "size_table": scrolling(["", "on disk"], disk),
    }


def layers(report: Mapping[str, Any]) -> dict[str, str]:
    """What each layer became: by format, and one by one in a table that opens on demand."""
    found: Sequence[Mapping[str, Any]] = report.get("layers") or []
    if not found:
        return {"layers": ""}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in found:
        groups.setdefault(str(row["ships_as"]), []).append(row)
    summary = [
        [
            escape(name),
            str(len(rows)),
            size(_total(rows, "bytes")),
            share(_total(rows, "bytes") / max(1, _total(rows, "float_bytes"))),
        ]
        for name, rows in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    errors = any(row.get("error") is not None for row in found)
    rows = [
        [
            escape(row["layer"]),
            escape("\N{MULTIPLICATION SIGN}".join(map(str, row["shape"]))),
            escape(row["ships_as"]) + ("" if row["exact"] else f"<small>simulated {escape(row['format'])}</small>"),
            size(row["bytes"]),
            share(row["bytes"] / row["float_bytes"]),
            *([figures(row.get("error"))] if errors else []),
        ]
        for row in found
    ]
    head = ["layer", "weights", "format", "size", "of FP32", *(["error alone"] if errors else [])]
    whole = scrolling(head, rows, kind="stack layers tall")
    body = scrolling(["format of weights and inputs", "layers", "size", "of FP32"], summary)
    opened = f"<details><summary>All {len(found)} layers</summary>{whole}</details>"
    note = "Convolutions and linear layers of the denoiser: their weights and scales."
    return {"layers": section("What each layer became", note, body, opened)}


def _total(rows: Sequence[Mapping[str, Any]], name: str) -> int:
    return sum(int(row[name]) for row in rows)


def making(report: Mapping[str, Any]) -> dict[str, str]:
    """Passes, backends, engines, machine, versions and the commands."""
    passes = definitions({entry["name"]: entry.get("summary", "") for entry in report["passes"]})
    tried = [
        [f"{entry['backend']} {entry['precision']}", escape(entry.get("problem") or f"{entry['p50_ms']:.1f}")]
        for entry in report["backends_tried"]
    ]
    chosen = f"{report['backend']['name']} {report['backend']['precision']}"
    engines = [
        [escape(f"{entry['target']}, {entry['path']}"), escape(str(entry["precision"])), size(entry["bytes"])]
        for entry in report["engines"]
    ]
    machine, recipe = report["machine"], report.get("recipe_in_full")
    rows = {
        "processor": machine["processor"],
        "cores": machine["cores"],
        "instructions": ", ".join(machine["instructions"]) or DASH,
        "memory": size(machine["memory_bytes"]),
        "system": machine["system"],
        "Python": machine["python"],
    }
    written = escape(json.dumps(recipe, indent=2)) if recipe else ""
    return {
        "passes": passes or '<p class="note">No pass changed the model.</p>',
        "backends": scrolling(["", "p50 ms"], tried, own=chosen, kind="wordy"),
        "engines": scrolling(["engine", "precision", "size"], engines) if engines else "",
        "machine": definitions(rows),
        "reproduce": escape("\n".join(report["reproduce"])),
        "recipe": f'<details><summary>{RECIPE}</summary><pre tabindex="0">{written}</pre></details>' if recipe else "",
        "versions": escape(", ".join(f"{name} {version}" for name, version in report["versions"].items())),
    }
