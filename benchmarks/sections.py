"""The sections of the report page about speed: parts of HTML by the name of their place in the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from diffpress.benchmarks import front
from diffpress.benchmarks.candidates import COMPRESSED, EXPORT, REFERENCE, STRICT
from diffpress.benchmarks.markup import (
    DASH,
    TIMES,
    between,
    columns,
    key,
    labels,
    legend,
    number,
    scrolling,
    section,
    short_labels,
)
from diffpress.benchmarks.verdict import milliseconds, rescheduled, schedule

HALVES = {"#": "both halves", "-": "half, difference kept", ".": "half", "=": "half, mean features"}


@dataclass(frozen=True)
class Part:
    """A component of a latency: what runs, for how long in ms, and the class of its colour."""

    label: str
    ms: float
    colour: str


def parts(report: Mapping[str, Any], name: str) -> list[Part]:
    """Where the time of an image goes: text encoder, each kind of step, decoder; medians of each by itself."""
    stages, times, program = report["stages_ms"][name], report["steps_ms"].get(name) or [], report["program"]
    kinds: dict[str, list[float]] = {}
    colours: dict[str, str] = {}
    guidance = program.get("guidance") or ""
    if name == COMPRESSED and len(times) == len(program["steps"]):
        for index, (variant, mark) in enumerate(zip(program["steps"], program["marks"], strict=True)):
            kind = f"{variant} ({HALVES[guidance[index]]})" if guidance else str(variant)
            kinds.setdefault(kind, []).append(times[index])
            colours.setdefault(kind, "full" if mark == "#" else "reuse")
    else:
        kinds, colours = {"": times}, {"": "full"}
    steps = [
        Part(" ".join(filter(None, [str(len(ms)), kind, "step" if len(ms) == 1 else "steps"])), sum(ms), colours[kind])
        for kind, ms in kinds.items()
        if ms
    ] or [Part("denoising", stages["denoise"], "full")]
    return [Part("text encoder", stages["text"], "text"), *steps, Part("VAE decoder", stages["decode"], "decode")]


def waterfall(found: Sequence[Part], longest: float) -> str:
    """Components one below the other, each beginning where the last one ended; `longest` ms are the whole width."""
    rows, start = [], 0.0
    for part in found:
        place = f"margin-left:{100 * start / longest:.2f}%;width:{100 * part.ms / longest:.2f}%"
        rows.append(
            f'<span class="name">{escape(part.label)}</span><span class="track"><i class="{part.colour}" '
            f'style="{place}"></i></span><span class="value">{milliseconds(part.ms)}</span>'
        )
        start += part.ms
    return f'<div class="fall">{"".join(rows)}</div>'


def bars(rows: Sequence[tuple[str, Sequence[Part], str]]) -> str:
    """Rows of (name, components, words at the end) as horizontal bars on one scale."""
    longest = max(sum(part.ms for part in found) for _, found, _ in rows)
    drawn = []
    for name, found, words in rows:
        pieces = "".join(
            f'<i class="{part.colour}" style="width:{100 * part.ms / longest:.2f}%" '
            f'title="{escape(part.label)}: {milliseconds(part.ms)}"></i>'
            for part in found
        )
        drawn.append(
            f'<div class="bar"><span class="name">{escape(name)}</span>'
            f'<span class="track">{pieces}</span><span class="value">{escape(words)}</span></div>'
        )
    return f'<div class="bars">{"".join(drawn)}</div>'


def speed(report: Mapping[str, Any]) -> dict[str, str]:
    """Bars of whole images, the waterfall of each, and latency with its spread."""
    named, latency, speedup = labels(report), dict(report["latency"]), report["speedup"]
    faster = {COMPRESSED: 1.0, REFERENCE: speedup["vs_eager"], EXPORT: speedup["vs_uncompressed_export"]}
    spread = report.get("speedup_interval") or {}
    spreads = {REFERENCE: spread.get("vs_eager"), EXPORT: spread.get("vs_uncompressed_export")}
    strict = report["same_precision"]
    if strict:
        latency[STRICT], faster[STRICT] = strict["latency"], strict["speedup"]
        spreads[STRICT] = strict.get("speedup_interval")
    order = [name for name in (REFERENCE, EXPORT, STRICT, COMPRESSED) if name in latency]
    found = {name: parts(report, name) for name in order}
    falls = "".join(
        f"<figure><h3>{escape(named[name])}</h3>{waterfall(found[name], sum(part.ms for part in found[name]))}</figure>"
        for name in order
        if name != STRICT
    )
    rows = []
    for name in order:
        against = DASH if name == COMPRESSED else f"{faster[name]:.2f}{TIMES}"
        if interval := between(spreads.get(name), 2, unit=TIMES):
            against += f"<small>{interval}</small>"
        times = [f"{latency[name][column]:.1f}" for column in ("p50_ms", "p90_ms", "p99_ms")]
        rows.append([escape(named[name]), *times, against])
    note = (
        f"One image from prompt to pixels, {latency[COMPRESSED]['runs']} runs of each after warm-up, alternating in "
        "one process. The speedup is the median of paired ratios, so what disturbs the machine disturbs both."
    )
    if spread:
        note += " Small figures are 95 % bootstrap intervals of it."
    if rescheduled(report):
        note += f" The compressed bundle samples with {schedule(report['sampling'])}, "
        note += f"all others with the model's own {schedule(report['reference'])}."
    kinds = [("text", "text encoder"), ("full", "steps")]
    if any(part.colour == "reuse" for part in found[COMPRESSED]):
        kinds += [("reuse", "steps that reuse features")]
    whole = [(named[name], found[name], milliseconds(latency[name]["p50_ms"])) for name in order]
    head = ["ms", "p50", "p90", "p99", "compressed is faster"]
    return {
        "bars": bars(whole),
        "bars_legend": legend([*kinds, ("decode", "VAE decoder")]),
        "waterfalls": f'<div class="plots three">{falls}</div>',
        "speed_table": scrolling(head, rows, escape(named[COMPRESSED]), "stack"),
        "speed_note": escape(note),
    }


def trade_off(report: Mapping[str, Any]) -> dict[str, str]:
    """Quality against speed: the plot and its numbers; nothing where candidates were not compared."""
    found = report.get("candidates")
    if not found:
        return {"trade_off": ""}
    short = short_labels(report)
    rows = [
        [
            key(row["name"], front.words(row, short)),
            f"{row['speedup']:.2f}{TIMES}",
            "identical" if row["psnr_db"] is None else number(row["psnr_db"], 1),
            number(row["ssim"], 3),
            "yes" if row["front"] else "",
        ]
        for row in sorted(found, key=lambda row: -row["speedup"])
    ]
    note = (
        f"Every candidate on the same {found[0]['images']} images, so figures differ from those of the whole set "
        "below. The line is the Pareto front: nothing that was tried is faster and better than what lies on it."
    )
    table = scrolling(["", "faster", "PSNR, dB", "SSIM", "on front"], rows, key(COMPRESSED, short[COMPRESSED]), "stack")
    plot = f"<figure>{front.plot(found, short)}</figure>"
    return {"trade_off": section("Quality against speed", note, columns(plot, table))}
