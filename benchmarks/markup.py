"""Small pieces of the report page: tables, legends, lists, numbers as people read them. Text in, HTML out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from diffpress.benchmarks.candidates import COMPRESSED, EXPORT, PLAIN, REFERENCE, RESCHEDULED, STRICT

STACKED = 4  # numbers side by side on a phone
DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
# Classes of the style sheet, which gives each its colour.
COLOURS = {
    REFERENCE: "reference",
    RESCHEDULED: "reference",
    EXPORT: "export",
    STRICT: "strict",
    COMPRESSED: "compressed",
    PLAIN: "plain",
}


def rows_to_table(head: Sequence[str], rows: Iterable[Sequence[str]], own: str = "") -> str:
    """An HTML table; cells are HTML already, the row whose first cell is `own` is set in bold."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = []
    for row in rows:
        mark = ' class="own"' if own and row[0] == own else ""
        cells = "".join(f"<td>{cell}</td>" for cell in row[1:])
        body.append(f'<tr{mark}><th scope="row">{row[0]}</th>{cells}</tr>')
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def scrolling(head: Sequence[str], rows: Iterable[Sequence[str]], own: str = "", kind: str = "") -> str:
    """As `rows_to_table`; the table scrolls by itself where it is too wide.

    `kind` are classes; a "stack" is, where there is little room, a name and its numbers below it.
    """
    numbers = len(head) - 1
    abreast = numbers if numbers <= STACKED else math.ceil(numbers / 2)
    # Reached by the keyboard, or what lies outside could not be scrolled to.
    return f'<div class="scroll {kind}" style="--columns:{abreast}" tabindex="0">{rows_to_table(head, rows, own)}</div>'


def definitions(entries: Mapping[str, Any]) -> str:
    """Terms and what they are: a list; empty for no entries."""
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in entries.items())
    return f"<dl>{rows}</dl>" if rows else ""


def key(name: str, label: str) -> str:
    """A coloured square and words that stand for a candidate."""
    return f'<i class="key {COLOURS.get(name, name)}"></i>{escape(label)}'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """(class of the colour, words) in a row; empty for no entries."""
    items = "".join(f'<li><i class="key {colour}"></i>{escape(words)}</li>' for colour, words in entries)
    return f'<ul class="legend">{items}</ul>' if items else ""


def section(title: str, note: str, *body: str) -> str:
    """A section of the page with a heading, small print and what `body` holds; empty where that is."""
    inner = "".join(body)
    if not inner:
        return ""
    small = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{small}{inner}</section>"


def columns(*parts: str) -> str:
    """What stands side by side where there is room, what is empty left out."""
    inner = "".join(f"<div>{part}</div>" for part in parts if part)
    return f'<div class="plots">{inner}</div>' if inner else ""


def labels(report: Mapping[str, Any]) -> dict[str, str]:
    """What each candidate is called where there is room for the library."""
    backend, short = report["backend"], short_labels(report)
    library = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}.get(backend["name"], backend["name"])
    return {
        REFERENCE: "diffusers, FP32 eager",
        EXPORT: f"uncompressed, {library} FP32",
        STRICT: f"uncompressed, {library} {backend['precision'].upper()}",
        COMPRESSED: f"compressed, {library} {backend['precision'].upper()}",
        PLAIN: short[PLAIN],
    }


def short_labels(report: Mapping[str, Any]) -> dict[str, str]:
    """What each candidate is called in plots and tables of many columns."""
    precision, row = report["backend"]["precision"].upper(), report[PLAIN]
    return {
        REFERENCE: "diffusers",
        RESCHEDULED: f"diffusers, {report['sampling']['steps']} steps",
        EXPORT: "export FP32",
        STRICT: f"export {precision}",
        COMPRESSED: "compressed",
        PLAIN: f"{row['steps']} {row['schedule']} steps",
    }


def number(value: float | None, digits: int) -> str:
    """A number with so many decimals, a dash for None."""
    return DASH if value is None else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    """A fraction as a percentage, a dash for None."""
    return DASH if value is None else f"{value:.1%}"


def figures(value: float | None, count: int = 3) -> str:
    """A number of any size with so many figures, and all of those before the point; a dash for None."""
    if value is None:
        return DASH
    return f"{value:.0f}" if abs(value) >= 10**count else f"{value:#.{count}g}".rstrip(".")


def between(interval: Sequence[float | None] | None, digits: int, scale: float = 1.0, unit: str = "") -> str:
    """A confidence interval in words, empty where it was not measured."""
    if not interval or None in interval:
        return ""
    low, high = (f"{scale * value:.{digits}f}" for value in interval if value is not None)
    return f"{low}{DASH}{high}{unit}"
