"""The sections of the report page below its pictures: parts of HTML by the name of their place in the template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from diffpress.benchmarks import plots
from diffpress.benchmarks.candidates import COMPRESSED, EXPORT, REFERENCE, STRICT
from diffpress.benchmarks.verdict import milliseconds, rescheduled, schedule, size

DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
COLOURS = {REFERENCE: "reference", EXPORT: "export", STRICT: "export", COMPRESSED: "compressed"}
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
}
TOGETHER = {
    "|": ("call", "a call by itself"),
    "[": ("call on", "first of a call of several steps"),
    "=": ("call on", "in the same call"),
    "]": ("call", "last of the same call"),
}


def rows_to_table(head: Sequence[str], rows: Iterable[Sequence[str]], own: str = "") -> str:
    """An HTML table; cells are HTML already, the row whose first cell is `own` is set in bold."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = []
    for row in rows:
        mark = ' class="own"' if own and row[0] == own else ""
        cells = "".join(f"<td>{cell}</td>" for cell in row[1:])
        body.append(f"<tr{mark}><th>{row[0]}</th>{cells}</tr>")
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _key(name: str, label: str) -> str:
    return f'<i class="key" style="background:var(--{COLOURS.get(name, name)})"></i>{escape(label)}'


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    items = (f'<li><i style="background:var(--{colour})"></i>{escape(words)}</li>' for colour, words in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'


def _labels(report: Mapping[str, Any]) -> dict[str, str]:
    backend = report["backend"]
    name = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}.get(backend["name"], backend["name"])
    return {
        REFERENCE: "diffusers, FP32 eager",
        EXPORT: f"uncompressed, {name} FP32",
        STRICT: f"uncompressed, {name} {backend['precision'].upper()}",
        COMPRESSED: f"compressed, {name} {backend['precision'].upper()}",
    }


def speed(report: Mapping[str, Any]) -> dict[str, str]:
    """Bars by stage, and latency with its spread."""
    labels, latency, speedup = _labels(report), dict(report["latency"]), report["speedup"]
    faster = {COMPRESSED: 1.0, REFERENCE: speedup["vs_eager"], EXPORT: speedup["vs_uncompressed_export"]}
    strict = report["same_precision"]
    if strict:
        latency[STRICT], faster[STRICT] = strict["latency"], strict["speedup"]
    order = [name for name in (REFERENCE, EXPORT, STRICT, COMPRESSED) if name in latency]
    bars = [(labels[name], report["stages_ms"][name], milliseconds(latency[name]["p50_ms"])) for name in order]
    legend = _legend([("text", "text encoder"), ("compressed", "denoising"), ("export", "decoder")])
    rows = [
        [escape(labels[name]), *(f"{latency[name][key]:.1f}" for key in ("p50_ms", "p90_ms", "p99_ms")),
         DASH if name == COMPRESSED else f"{faster[name]:.2f}{TIMES}"]
        for name in order
    ]  # fmt: skip
    runs = latency[COMPRESSED]["runs"]
    note = (
        f"One image from prompt to pixels, {runs} runs of each after warm-up, alternating in one process. "
        "The speedup is the median of paired ratios, so what disturbs the machine disturbs both."
    )
    if rescheduled(report):
        note += f" The compressed bundle samples with {schedule(report['sampling'])}, "
        note += f"all others with the model's own {schedule(report['reference'])}."
    head = ["ms", "p50", "p90", "p99", "compressed is faster"]
    return {
        "stage_plot": plots.stage_bars(bars, "latency by stage") + legend,
        "speed_table": rows_to_table(head, rows, own=escape(labels[COMPRESSED])),
        "speed_note": escape(note),
    }


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
    entries += [("call on", "joined: steps that run together in one call")] if program.get("together") else []
    guided = set(program.get("guidance") or "")
    entries += [(GUIDED[mark][0], f"guidance: {GUIDED[mark][1]}") for mark in GUIDED if mark in guided]
    items = "".join(f'<li><i class="cell {kind}"></i>{escape(words)}</li>' for kind, words in entries)
    return f'<ul class="legend">{items}</ul>' if items else ""


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
    labels = _labels(report)
    kinds = [("compressed", "full step")] + ([("reuse", "reusing step")] if full < len(marks) else [])
    errors = {name: line for name, line in report["per_step"]["latent_rel_l2"].items() if line is not None}
    error_legend = []
    if rescheduled(report):
        note += " The compressed schedule is another than the reference's: its latents are compared at the end alone, "
        note += "not step by step."
    else:
        error_legend.append(("compressed", "compressed" + (" (hollow: reusing step)" if full < len(marks) else "")))
    if EXPORT in errors:
        error_legend.append(("export", "uncompressed: what the backend alone changes"))
    return {
        "program": program_grid(report["program"]),
        "program_legend": program_legend(report["program"]),
        "program_note": escape(f"{note} Steps are compared on {report['per_step']['images']} images."),
        "step_plot": plots.step_columns(times[COMPRESSED], marks, others, "time of each step"),
        "step_legend": _legend([*kinds, ("export", labels[rival]), ("reference", labels[REFERENCE])]),
        "error_plot": plots.error_lines(errors, marks, "error after each step"),
        "error_legend": _legend(error_legend),
    }


def quality(report: Mapping[str, Any]) -> dict[str, str]:
    """Reference, compressed and fewer plain steps side by side."""
    own, row, attributes = report["quality"], report["fewer_plain_steps"], report["attributes"]
    fewer = row["steps"] is not None
    rows = [
        ["PSNR to the reference, dB", DASH, _number(own["psnr_db"], 2), _number(row.get("psnr_db"), 2)],
        ["worst image, dB", DASH, _number(own["psnr_db_worst"], 2), _number(row.get("psnr_db_worst"), 2)],
        ["SSIM", DASH, _number(own["ssim"], 4), _number(row.get("ssim"), 4)],
        ["final latents, relative L2", DASH, _number(own["latent_rel_l2"], 4), _number(row.get("latent_rel_l2"), 4)],
    ]
    for name, label, digits in (
        ("clip_score", "CLIP score", 2),
        ("attribute_accuracy", "attributes confirmed", 4),
        ("frechet", "Fréchet distance to real pictures", 3),
    ):
        if own[name]["reference"] is not None:
            sides = (own[name]["reference"], own[name]["compressed"], row.get(name))
            rows.append([label, *(_share(v) if name == "attribute_accuracy" else _number(v, digits) for v in sides)])
        if name == "attribute_accuracy" and attributes["reference"]:
            sides = (attributes["reference"], attributes["compressed"], row.get("attributes") or {})
            for kind in ("colour", "shape", "size", "relation"):
                rows.append([f"\N{EM SPACE}{kind}", *(_share(side.get(kind)) for side in sides)])
    head = ["", "reference", "compressed", f"{row['steps']} plain steps" if fewer else ""]
    table = rows_to_table(head if fewer else head[:3], [r if fewer else r[:3] for r in rows])
    note = f"{own['images']} images, the same prompts and seeds on every side."
    if fewer:
        note += f" Plain steps are those of {row['schedule']} on the uncompressed export, same backend and precision: "
        note += f"they take {row['latency_ratio']:.2f} of the compressed latency (paired, alternating)."
    return {"quality_table": table, "quality_note": escape(note)}


def sizes(report: Mapping[str, Any]) -> dict[str, str]:
    """What lies on disk and what each candidate needs to run."""
    count, peaks = report["size_bytes"], report["peak_rss_bytes"]
    labels = _labels(report)
    memory = [[_key(name, labels[name]), size(peaks[name])] for name in (REFERENCE, EXPORT, COMPRESSED)]
    disk = [
        ["denoiser, FP32 weights", size(count["denoiser_reference"])],
        ["denoiser, compressed (all graphs)", size(count["denoiser_compressed"])],
        *([f"\N{EM SPACE}{escape(name)}", size(value)] for name, value in count["folders"].items()),
        ["bundle, all files", size(count["bundle"])],
    ]
    note = "Peak memory is that of a fresh process that loads it and draws one image, its libraries included."
    return {
        "memory_table": rows_to_table(["", "peak resident memory"], memory, own=_key(COMPRESSED, labels[COMPRESSED])),
        "size_table": rows_to_table(["", "on disk"], disk),
        "size_note": note,
    }


def making(report: Mapping[str, Any]) -> dict[str, str]:
    """Passes, backends, engines, machine, versions and the commands."""
    passes = "".join(
        f"<dt>{escape(str(entry['name']))}</dt><dd>{escape(str(entry.get('summary', '')))}</dd>"
        for entry in report["passes"]
    )
    tried = [
        [f"{entry['backend']} {entry['precision']}", escape(entry.get("problem") or f"{entry['p50_ms']:.1f}")]
        for entry in report["backends_tried"]
    ]
    chosen = f"{report['backend']['name']} {report['backend']['precision']}"
    engines = [
        [escape(f"{entry['target']}, {entry['path']}"), escape(str(entry["precision"])), size(entry["bytes"])]
        for entry in report["engines"]
    ]
    machine = report["machine"]
    rows = {
        "processor": machine["processor"],
        "cores": machine["cores"],
        "instructions": ", ".join(machine["instructions"]) or DASH,
        "memory": size(machine["memory_bytes"]),
        "system": machine["system"],
        "Python": machine["python"],
    }
    table = rows_to_table(["engine", "precision", "size"], engines)
    return {
        "passes": f"<dl>{passes}</dl>" if passes else '<p class="note">No pass changed the model.</p>',
        "backends": rows_to_table(["", "p50 ms"], tried, own=chosen),
        "engines": f'<div class="scroll">{table}</div>' if engines else "",
        "machine": "<dl>" + "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in rows.items()) + "</dl>",
        "reproduce": escape("\n".join(report["reproduce"])),
        "versions": escape(", ".join(f"{name} {version}" for name, version in report["versions"].items())),
    }


def _number(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return DASH if value is None else f"{value:.1%}"
