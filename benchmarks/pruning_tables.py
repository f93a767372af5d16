"""Pruning on `shapes` as tables, from results/pruning.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffpress.benchmarks import markdown

RESULTS = Path(__file__).resolve().parent / "results"
HEAD = (
    "| | parameters | zeros | operations | denoiser | zipped | call | image | latent error | median | PSNR | CLIP "
    "| Fréchet | attributes | seconds | peak memory |"
)
REFERENCE = "fp32"
RATIOS = (10, 20, 30)
METHODS = ("OBS-Diff", "Wanda", "L1")


def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / "pruning.json").read_text("utf-8"))
    return document


def _line(row: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    zipped = row["bytes_zipped"]
    cells = [
        row["name"],
        f"{row['params'] / whole['params']:.0%}",
        f"{row['zeros']:.0%}",
        f"{row['flops'] / whole['flops']:.0%}",
        f"{row['bytes'] / 1e6:.1f} MB",
        markdown.cell(zipped and zipped / 1e6, ".1f", " MB"),
        f"{row['call_speedup']:.2f}x",
        f"{row['speedup_vs_uncompressed']:.2f}x",
        f"{row['latent_rel_l2']:.3f}",
        f"{row['latent_rel_l2_median']:.3f}",
        markdown.cell(row["psnr_db"], ".1f"),
        f"{row['clip_score']:.2f}",
        f"{row['frechet']:.2f}",
        f"{row['attribute_accuracy']:.1%}",
        f"{'+' if row['seconds_shared'] else ''}{row['seconds']:.0f}",
        f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
    ]
    return markdown.row(cells)


def pruning_all() -> str:
    """Every row."""
    document = _document()
    whole = document["rows"][0]
    lines, group = [HEAD, "|---|" + "--:|" * (HEAD.count("|") - 2)], None
    for row in sorted(document["rows"], key=lambda row: _groups(document).index(row["group"])):
        if row["group"] != group:
            group = row["group"]
            lines.append(markdown.group(group, HEAD.count("|") - 1))
        lines.append(_line(row, whole))
    return "\n".join(lines)


def _groups(document: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["group"] for row in document["rows"]))


def pruning() -> str:
    """Latent errors of the methods beside each other, medians and means."""
    document = _document()
    rows = {row["name"]: row for row in document["rows"]}
    names = [*(f"{percent} %" for percent in RATIOS), "2:4", *(f"{percent} % of weights" for percent in (30, 50, 70))]
    lines = [
        "| pruned | OBS-Diff | Wanda | L1, magnitude | OBS-Diff's attributes | denoiser | a call |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        own = rows[f"OBS-Diff, {name}"]
        cells = [name]
        for method in METHODS:
            found = rows.get(f"{method}, {name}", rows.get(f"magnitude, {name}"))
            assert found is not None
            cells.append(markdown.error(found, "latent_rel_l2"))
        cells.append(f"{own['attribute_accuracy']:.1%}")
        size = own["bytes"] if own["zeros"] < 0.01 else own["bytes_zipped"]
        cells.append(f"{size / 1e6:.1f} MB" + ("" if own["zeros"] < 0.01 else " zipped"))
        cells.append(f"{own['call_speedup']:.2f}x")
        lines.append(markdown.row(cells))
    whole = rows[REFERENCE]
    lines += [
        "",
        f"Error of the final latents to the whole network's, median (mean) of {document['images']} held-out captions; "
        f"{document['sampling']['steps']} {document['sampling']['scheduler']} steps. Whole: "
        f"{whole['bytes'] / 1e6:.1f} MB, {whole['bytes_zipped'] / 1e6:.1f} MB zipped, attributes "
        f"{whole['attribute_accuracy']:.1%}. Calls in ONNX Runtime, FP32; {document['machine']['processor']}.",
    ]
    return "\n".join(lines)


def claims() -> str:
    """What pruning was asked to reach, and what it reached."""
    rows = {row["name"]: row for row in _document()["rows"]}
    whole = rows[REFERENCE]

    def gained(row: Mapping[str, Any]) -> float:
        return 100.0 * float(row["attribute_accuracy"] - whole["attribute_accuracy"])

    made: list[tuple[str, str, str, bool]] = []
    for percent in (10, 20, 30):
        made.append(_beats(rows, f"{percent} %"))
    made += [_beats(rows, name) for name in ("2:4", *(f"{percent} % of weights" for percent in (30, 50, 70)))]
    points = gained(rows["OBS-Diff, 20 %"])
    made.append(("20 % of parameters: attributes", "at most 4 points lower", f"{points:+.1f}", points >= -4))
    recovered = {
        "20 % of parameters, distilled": rows["OBS-Diff, 20 %, distilled"],
        "20 % of both, distilled": rows["20 % of both, even norm groups, distilled"],
        "20 % of operations, distilled": rows["20 % of operations, distilled"],
    }
    for name, row in recovered.items():
        fewer = 1 - row["bytes"] / whole["bytes"]
        made.append((f"{name}: attributes", "at most 1 point lower", f"{gained(row):+.1f}", gained(row) >= -1))
        made.append((f"{name}: bytes", "at least 18 % fewer", f"{fewer:.0%}", fewer >= 0.18))
        made.append((f"{name}: a call", "at least 1.15x", f"{row['call_speedup']:.2f}x", row["call_speedup"] >= 1.15))
    return markdown.claims("on `shapes`", made)


def _beats(rows: Mapping[str, Mapping[str, Any]], name: str) -> tuple[str, str, str, bool]:
    """Whether OBS-Diff is nearer to the whole network than the nearest rival, by median and mean."""
    own = rows[f"OBS-Diff, {name}"]
    rivals = [rows[f"{method}, {name}"] for method in ("Wanda", "L1", "magnitude") if f"{method}, {name}" in rows]
    keys = ("latent_rel_l2_median", "latent_rel_l2")
    pairs = [(own[key], min(row[key] for row in rivals)) for key in keys]
    got = ", ".join(f"{ours:.3f} : {theirs:.3f}" for ours, theirs in pairs)
    return f"{name}: latent error against the best rival, median, mean", "lower", got, all(a < b for a, b in pairs)
