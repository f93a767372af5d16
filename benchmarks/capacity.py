"""The sections of the report page about the machine: throughput, cold start, how far graphs are from its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from diffpress.benchmarks.candidates import COMPRESSED
from diffpress.benchmarks.markup import DASH, columns, figures, key, labels, scrolling, section, share, short_labels
from diffpress.benchmarks.verdict import milliseconds, size

OPERATORS = 8  # of a graph, that are named


def running(report: Mapping[str, Any]) -> dict[str, str]:
    """Throughput by batch and cold start, where they were measured."""
    found = _throughput(report, report.get("throughput") or []), _cold(report, report.get("cold_start_ms") or {})
    return {"running": section("Throughput and cold start", "", columns(*found))}


def _throughput(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    named = short_labels(report)
    names = [name for name in named if any(name in row["images_per_second"] for row in rows)]
    cells = [[key(name, named[name]), *(figures(row["images_per_second"].get(name)) for row in rows)] for name in names]
    head = ["images per second, by batch", *(str(row["batch"]) for row in rows)]
    table = scrolling(head, cells, key(COMPRESSED, named[COMPRESSED]), "stack")
    reasons = dict.fromkeys(
        f"Batch {row['batch']}, {named.get(name, name)}: {reason}."
        for row in rows
        for name, reason in (row.get("refused") or {}).items()
    )
    small = "".join(f'<p class="note">{escape(reason)}</p>' for reason in reasons)
    return f"<h3>Throughput</h3>{table}{small}"


def _cold(report: Mapping[str, Any], found: Mapping[str, float | None]) -> str:
    named = short_labels(report)
    each: Mapping[str, Mapping[str, float]] = report.get("cold_start_parts_ms") or {}
    parts = list(next(iter(each.values()), {}))
    rows = [
        [key(name, words), *(milliseconds(each[name][part]) for part in parts), milliseconds(found[name])]
        for name, words in named.items()
        if name in found
    ]
    head = ["fresh process to first image", *(escape(part.replace("_", " ")) for part in parts), "in all"]
    table = scrolling(head, rows, key(COMPRESSED, named[COMPRESSED]), "stack" if parts else "")
    return f"<h3>Cold start</h3>{table}" if rows else ""


def roofline(report: Mapping[str, Any]) -> dict[str, str]:
    """How far each graph is from what the machine can do, and which operators hold it back, where that was counted."""
    found = report.get("roofline") or {}
    graphs = found.get("graphs") or []
    if not graphs:
        return {"roofline": ""}
    head, named = ["GFLOP", "moved", "at best", "measured", "of the limit"], labels(report)
    images = [_row(row, named, "denoising", "all calls of an image") for row in found.get("images") or []]
    rows = [
        [
            *_row(row, named, row["graph"], f"{row['calls_per_image']} calls of batch {row['rows']}"),
            row.get("bound") or DASH,
        ]
        for row in graphs
    ]
    tables = scrolling(["", *head], images, kind="stack") if images else ""
    single = scrolling(["graph", *head, "bound by"], rows, kind="stack")
    tables += f"<details><summary>Graph by graph</summary>{single}</details>"
    chosen = report["backend"]
    details = [
        _operators(row)
        for row in graphs
        if (row["candidate"], row["backend"], row["precision"]) == (COMPRESSED, chosen["name"], chosen["precision"])
    ]
    title = "How far from the machine's limit"
    return {"roofline": section(title, _ceilings(found), tables, *details)}


def _ceilings(found: Mapping[str, Any]) -> str:
    ceilings = found["ceilings"]
    rates = [f"{kind} {figures(rate / 1e9)}" for kind, rate in ceilings["operations_per_s"].items()]
    moving = [rate / 1e9 for rate in ceilings["bytes_per_s"].values()]
    spread = f"{figures(min(moving))} to {figures(max(moving))} GB/s by how much is moved" if moving else ""
    words = "; ".join(filter(None, [f"{', '.join(rates)} billion operations per second" if rates else "", spread]))
    return (
        f"Measured ceilings: {words}. At best is the least time of a graph's products, each the longer of its "
        "arithmetic and of what it moves."
    )


def _row(row: Mapping[str, Any], named: Mapping[str, str], what: str, calls: str) -> list[str]:
    """Work and times of a graph or of all that an image needs; what could not be counted or run says why."""
    told = f"{row['backend']} {row['precision']}, {calls}"
    told += f": {row['reason']}" if row.get("reason") else ""
    words = named.get(row["candidate"], row["candidate"]).partition(",")[0]
    operations, moved = row.get("operations"), row.get("bytes")
    seconds = [row.get("seconds_at_ceiling"), row.get("measured_seconds")]
    return [
        key(row["candidate"], f"{words}, {what}") + f"<small>{escape(told)}</small>",
        DASH if operations is None else figures(operations / 1e9),
        DASH if moved is None else size(moved),
        *(DASH if value is None else milliseconds(1e3 * value) for value in seconds),
        share(row.get("share_of_ceiling")),
    ]


def _operators(row: Mapping[str, Any]) -> str:
    """What a graph spends its time with: at the ceiling, and by the backend's own profile."""
    least = [
        [
            escape(one["name"]),
            escape(f"{one['operator']} {one['type']}"),
            size(one["bytes"]),
            milliseconds(1e3 * one["seconds_at_ceiling"]),
            DASH if one["measured_seconds"] is None else milliseconds(1e3 * one["measured_seconds"]),
        ]
        for one in (row.get("by_operator") or [])[:OPERATORS]
    ]
    slowest = [
        [escape(one["name"]), escape(one["operator"]), share(one["share"])]
        for one in (row.get("slowest") or [])[:OPERATORS]
    ]
    tables = []
    if least:
        table = scrolling(["longest at best", "", "moved", "at best", "measured"], least, kind="stack layers")
        tables.append(table)
    if slowest:
        tables.append(scrolling(["slowest on the backend", "", "of its time"], slowest, kind="stack layers"))
    if not tables:
        return ""
    return f"<details><summary>Operators of {escape(row['graph'])}</summary>{''.join(tables)}</details>"
