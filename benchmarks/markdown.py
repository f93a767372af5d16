"""What the tables of the READMEs are made of: cells, and claims beside what was asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Claim = tuple[str, str, str, bool]  # what, what was asked, what was reached, and whether that is enough


def cell(value: Any, form: str, unit: str = "") -> str:
    """A number with its unit; a dash where there is none."""
    return "–" if value is None else format(value, form) + unit


def error(measured: Mapping[str, Any] | None, key: str) -> str:
    """Median and, in brackets, mean of an error over images; a dash where it was not measured."""
    median = measured and measured.get(f"{key}_median")
    return "–" if measured is None or median is None else f"{median:.3f} ({measured[key]:.3f})"


def row(cells: Iterable[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def group(name: str, heads: int) -> str:
    """The line above the rows of a group, in a table of so many columns."""
    return row([f"**{name}**"]) + " |" * (heads - 1)


def claims(head: str, made: Iterable[Claim]) -> str:
    """A table of claims under a head that says where they were measured."""
    lines = [f"| {head} | asked | reached | |", "|---|---|--:|---|"]
    lines += [row((what, asked, got, "yes" if met else "**no**")) for what, asked, got, met in made]
    return "\n".join(lines)
