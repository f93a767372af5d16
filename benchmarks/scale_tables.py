"""What real sizes take, as tables from results/scale.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffpress.benchmarks import markdown

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = {"sd15": "Stable Diffusion 1.5", "sd21": "Stable Diffusion 2.1", "sdxl": "Stable Diffusion XL"}
FORMATS = ("fp16", "int8", "int4")


def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / "scale.json").read_text("utf-8"))
    return document


def _rows(document: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["model"], row["stage"]): row for row in document["rows"]}


def scale() -> str:
    """Minutes and peak memory of every stage, a model a line; below, what another processor measured."""
    document = _document()
    rows, elsewhere = _rows(document), list[str]()
    lines = [
        "| | U-Net | compress and export | one call, compared | engines | all | peak memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for model, name in MODELS.items():
        stages = {stage: rows[model, stage] for stage in ("create", "compress", "parity", "engines")
                  if (model, stage) in rows}  # fmt: skip
        if "compress" not in stages:
            continue
        cells = [f"{stages['create']['parameters']['unet'] / 1e6:.0f} M"]
        for stage in ("compress", "parity", "engines"):
            cells.append(markdown.cell(stages[stage]["seconds"] / 60 if stage in stages else None, ".1f", " min"))
        cells.append(f"{sum(row['seconds'] for row in stages.values()) / 60:.1f} min")
        cells.append(f"{max(row['peak_rss_bytes'] for row in stages.values()) / 1e9:.1f} GB")
        prompts = stages["compress"]["prompts"]
        of = f"{prompts} prompt{'s' if prompts > 1 else ''} × {stages['compress']['steps']} steps"
        lines.append(markdown.row((f"{name}, {of}", *cells)))
        elsewhere += _elsewhere(name, stages, document)
    if elsewhere:
        lines += ["", f"Measured on {document['machine']['processor']}, but {'; '.join(elsewhere)}."]
    return "\n".join(lines)


def _elsewhere(name: str, stages: Mapping[str, Mapping[str, Any]], document: Mapping[str, Any]) -> list[str]:
    """Which of a model's stages were measured on another processor than the document's, and on which."""
    found: dict[str, list[str]] = {}
    for stage, row in stages.items():
        if "machine" in row and row["machine"]["processor"] != document["machine"]["processor"]:
            found.setdefault(row["machine"]["processor"], []).append(stage)
    return [
        f"{name}{'' if len(those) == len(stages) else ' (' + ', '.join(those) + ')'} on {processor}"
        for processor, those in found.items()
    ]


def pruning() -> str:
    """Minutes and peak memory of pruning a fifth of the denoiser's parameters by structure, a model a line."""
    rows = _rows(_document())
    lines = ["| a fifth of the parameters pruned | U-Net | left | | peak memory |", "|---|--:|--:|--:|--:|"]
    for model, name in MODELS.items():
        if (model, "prune") in rows:
            row, whole = rows[model, "prune"], rows[model, "create"]["parameters"]["unet"]
            of = f"{row['prompts']} prompt{'s' if row['prompts'] > 1 else ''} × {row['steps']} steps"
            cells = [f"{count / 1e6:.0f} M" for count in (whole, row["parameters"])]
            cells += [f"{row['seconds'] / 60:.1f} min", f"{row['peak_rss_bytes'] / 1e9:.1f} GB"]
            lines.append(markdown.row((f"{name}, {of}", *cells)))
    return "\n".join(lines)


def engines() -> str:
    """Bytes of the denoiser's engine by format, a model a line."""
    rows = _rows(_document())
    lines = ["| engine of the U-Net | FP16 | INT8 | INT4 weights |", "|---|--:|--:|--:|"]
    for model, name in MODELS.items():
        found = [rows.get((model, f"engine {kind}")) for kind in FORMATS]
        if found[0] is None:
            continue
        whole = found[0]["bytes"]
        cells = ["–" if row is None else f"{row['bytes'] / 1e6:.0f} MB ({row['bytes'] / whole:.0%})" for row in found]
        lines.append(markdown.row((f"{name}, {found[0]['target']}", *cells)))
    return "\n".join(lines)
