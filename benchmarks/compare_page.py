"""A comparison as one HTML file, in the dress of the report: no network, no script."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

from diffpress.benchmarks import plots
from diffpress.benchmarks.candidates import PLAIN
from diffpress.benchmarks.compare import heading, rows
from diffpress.benchmarks.markup import rows_to_table

TITLE = "Speed and quality side by side"


def render(document: Mapping[str, Any]) -> str:
    """The page of what `compare` returns."""
    head = ["", *(escape(run["name"]) for run in document["runs"])]
    table = rows_to_table(head, [[escape(label), *map(escape, cells)] for label, cells in rows(document)])
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in document["notes"])
    drawn = plot(document)
    figure = f'<h2>Quality against speed</h2>\n<figure class="alone">{drawn}</figure>' if drawn else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{TITLE}</title>\n{_style()}\n</head>\n'
        "<body>\n<main>\n"
        f'<header><div class="kicker"><b>diffpress</b> {escape(heading(document))}</div><h1>{TITLE}</h1></header>\n'
        f'<div class="scroll">{table}</div>\n{notes}\n{figure}\n</main>\n</body>\n</html>\n'
    )


def plot(document: Mapping[str, Any]) -> str:
    """Latent error against speed, a mark per run, and a line through plain steps that are as fast; "" without any."""
    runs = {
        run["name"]: [(run["speedup"]["vs_eager"], run["quality"].get("latent_rel_l2"))] for run in document["runs"]
    }
    plain = [
        (run["speedup"]["vs_eager"] / run[PLAIN]["latency_ratio"], run[PLAIN]["latent_rel_l2"])
        for run in document["runs"]
        if run[PLAIN]["steps"]
    ]
    series = {name: _drawable(points) for name, points in runs.items() if _drawable(points)}
    if not series:
        return ""
    line = ("plain steps as fast as these", _drawable(plain))
    return plots.scatter(series, line, "times faster than diffusers", "relative error of the final latents")


def _drawable(points: list[tuple[float | None, float | None]]) -> list[tuple[float, float]]:
    """Those that a logarithmic scale has a place for."""
    return [(x, y) for x, y in points if x and y and x > 0 and y > 0]


def _style() -> str:
    """The report's own style sheet, and what it lacks."""
    page = (files("diffpress") / "benchmarks" / "report.html").read_text("utf-8")
    found = re.search(r"<style>.*?</style>", page, re.DOTALL)
    return f"{found[0] if found else ''}\n<style>figure.alone {{ max-width: 720px; margin: 0; }}</style>"
