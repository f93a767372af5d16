"""Judges a report by gates and says what came of it: as data, in lines, on the report's page, as an error."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from diffpress import gates
from diffpress.benchmarks.markup import scrolling
from diffpress.benchmarks.networks import CLIP, FRECHET, LPIPS, SOURCES
from diffpress.errors import DiffpressError, GateError
from diffpress.gates import METRICS, Gate


def gathered(manifest: Mapping[str, Any], given: Iterable[str] = ()) -> list[Gate]:
    """The gates of a bundle's recipe, then those given, each once; raises `DiffpressError` for one that is none."""
    own = manifest.get("recipe", {}).get("gates", ())
    return list(dict.fromkeys(gates.parse(text) for text in (*own, *given)))


def check_measurable(chosen: Iterable[Gate], shapes: bool, environment: Mapping[str, str] = os.environ) -> None:
    """Raise `DiffpressError` for a gate that `compress` could not judge when all its work is done.

    It has no options for networks: those of the environment judge, and for `shapes` those it comes with.
    """
    given = {name: source.path(None, environment) for name, source in SOURCES.items()}
    for gate in chosen:
        need = {"lpips": LPIPS, "clip": CLIP, "frechet": FRECHET}.get(gate.metric)
        if gate.metric == "attribute_accuracy" and not shapes:
            raise DiffpressError(f"gate '{gate}': {METRICS[gate.metric].absent}")
        if need and given[need] is None and (need == LPIPS or not shapes):
            source = SOURCES[need]
            raise DiffpressError(f"gate '{gate}' needs a network: set {source.variable} to {source.what}")


def judge(report: Mapping[str, Any], chosen: Sequence[Gate]) -> dict[str, Any]:
    """What stands in the report: "gates", an entry each, and "passed", which is true where there are none.

    A metric that was not measured, or is not a finite number, fails; "problem" says why.
    """
    entries = [_entry(report, gate) for gate in chosen]
    return {"gates": entries, "passed": all(entry["passed"] for entry in entries)}


def _entry(report: Mapping[str, Any], gate: Gate) -> dict[str, Any]:
    value, problem = gate.measure(report), None
    if value is None:
        problem = f"not measured: {METRICS[gate.metric].absent}"
    elif not math.isfinite(value):
        value, problem = None, "not a finite number"
    passed = value is not None and gate.passes(value)
    entry: dict[str, Any] = {
        "gate": str(gate),
        "measured": value,
        "limit": gate.limit,
        "unit": gate.unit,
        "passed": passed,
    }
    return entry | ({"problem": problem} if problem else {})


def check(report: Mapping[str, Any]) -> None:
    """Raise `GateError` with every gate that failed, its number and its limit."""
    failed = [gates.described(entry) for entry in report["gates"] if not entry["passed"]]
    if failed:
        count = f"{len(failed)} of {len(report['gates'])} gates"
        raise GateError(f"{report['bundle']} failed {count}: {'; '.join(failed)}; it is kept, and marked as failed")


def lines(report: Mapping[str, Any]) -> list[str]:
    """A line per gate for the command line."""
    width = max((len(entry["gate"]) for entry in report["gates"]), default=0)
    return [
        f"{'passed' if entry['passed'] else 'FAILED'}  {entry['gate']:{width}}  {gates.measured(entry)}"
        for entry in report["gates"]
    ]


def section(report: Mapping[str, Any]) -> str:
    """The gates as a part of the page; nothing where there are none, or the report is from before there were any."""
    entries = report.get("gates") or []
    if not entries:
        return ""
    failed = sum(not entry["passed"] for entry in entries)
    verdicts = {True: "passed", False: '<b class="bad">failed</b>'}
    rows = [
        [escape(entry["gate"]), escape(gates.measured(entry).removeprefix("measured ")), verdicts[entry["passed"]]]
        for entry in entries
    ]
    title = f"{failed} of {len(entries)} gates failed" if failed else "Every gate passed"
    mark = " failed" if failed else ""
    return f'<aside class="gates{mark}"><h3>{title}</h3>{scrolling(["gate", "measured", ""], rows)}</aside>'
