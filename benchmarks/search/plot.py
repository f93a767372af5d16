"""The picture of a search: every trial and finalist by speed and loss, the front as a staircase, the limits. SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from diffpress import gates
from diffpress.benchmarks.plots import Box, log_ticks, nice_ticks, placed
from diffpress.benchmarks.search import objective

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 30, 46
MANY = 10.0  # how many times faster the fastest is where speeds between are not all written
NAME = 15  # size of the names, which are bold
WIDE = 8.0  # how many times larger the largest loss is where the scale becomes logarithmic


def plot(report: Mapping[str, Any]) -> str:
    """Speed to the right on a logarithmic scale, loss upwards, so that what is better lies to the right and below."""
    held = report["finalists"]
    rows = [row for row in report["trials"] if row["state"] == "measured"]
    points = [(objective.speed(entry), entry["loss"]) for entry in held] + [(r["speedup"], r["loss"]) for r in rows]
    speeds, losses = [speed for speed, _ in points], [loss for _, loss in points if math.isfinite(loss)]
    low, high = math.log(min(speeds) * 0.93), math.log(max(speeds) * 1.07)
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    place, ticks = _scale(losses)

    def x_of(speed: float) -> float:
        return LEFT + (math.log(speed) - low) / (high - low) * (right - LEFT)

    def y_of(loss: float) -> float:
        return bottom - place(loss) * (bottom - TOP)

    body = []
    for tick in ticks:
        body.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y_of(tick):.1f}" y2="{y_of(tick):.1f}"/>')
        body.append(_text(LEFT - 7, y_of(tick) + 4, gates.number(tick), "end"))
    for tick in _speeds(math.exp(low), math.exp(high)):
        body.append(f'<line class="grid" x1="{x_of(tick):.1f}" x2="{x_of(tick):.1f}" y1="{TOP}" y2="{bottom}"/>')
        body.append(_text(x_of(tick), bottom + 19, f"{tick:g}\N{MULTIPLICATION SIGN}"))
    words = objective.LOSSES[report["minimise"]].words
    body += [_text(4, 16, words, "start"), _text(right, HEIGHT - 6, "faster than diffusers", "end")]
    for gate in map(gates.parse, report["budgets"]):
        if gate.metric == "speedup" and low < math.log(max(gate.limit, 1e-9)) < high:
            x = x_of(gate.limit)
            body.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
            body.append(_text(x + 5, TOP + 12, str(gate), "start"))
    body += [_dot("tried", x_of(row["speedup"]), y_of(row["loss"]), 3, row["name"], row) for row in rows]
    body.append(_stairs(sorted((x_of(objective.speed(one)), y_of(one["loss"])) for one in held if one["front"]), right))
    first = {one["key"]: one["name"] for one in report["first"]}
    taken: list[Box] = []  # by dots and names, of which none may stand on another
    for one in held:
        kind = "first" if one["key"] in first else "found"
        kind = "chosen" if one["key"] == report["chosen"] else kind
        row = {"speedup": objective.speed(one), "loss": one["loss"]}
        x, y = x_of(row["speedup"]), y_of(one["loss"])
        body.append(_dot(kind, x, y, 7 if kind == "chosen" else 5, one["name"], row))
        taken.append((x - 5, y - 5, x + 5, y + 5))
    for one in held:
        name, x, y = first.get(one["key"]), x_of(objective.speed(one)), y_of(one["loss"])
        if name and (box := placed(name, x, y, taken, right, NAME)):
            taken.append(box)
            body.append(_text(box[0], box[3] - 4, name, "start", "name"))
    inner = "".join(body)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(words)} against speed">{inner}</svg>'


def _scale(losses: Sequence[float]) -> tuple[Any, list[float]]:
    """Where a loss lies between 0 and 1, and round numbers: on a logarithmic scale where they differ by far."""
    low, high = min(losses), max(losses)
    if low > 0 and high / low > WIDE:
        ticks = _fine(low, high)
        start, end = math.log(min(low * 0.8, ticks[0])), math.log(max(high * 1.1, ticks[-1]))
        return (lambda loss: (math.log(max(loss, low * 0.8)) - start) / (end - start)), ticks
    span = (high - low) or max(abs(high), 1e-9)
    step = nice_ticks(span, 5)[1]
    first = math.floor(low / step - 0.2) * step
    count = math.ceil((high - first) / step + 0.2)
    return (lambda loss: (loss - first) / (count * step)), [first + step * index for index in range(count + 1)]


def _fine(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from `low` to `high`."""
    found = [unit * power for power in log_ticks(low, high) for unit in (1, 2, 5)]
    return [tick for tick in found if low * 0.8 <= tick <= high * 1.1]


def _speeds(low: float, high: float) -> list[float]:
    units = (1, 1.5, 2, 3, 4, 5, 6, 8) if high < MANY * low else (1, 2, 5)
    found = [unit * power for power in log_ticks(low, high) for unit in units]
    return [tick for tick in found if low <= tick <= high]


def _stairs(points: Sequence[tuple[float, float]], right: float) -> str:
    """What can be had at a speed is what is as fast at least: up at once, then to the next."""
    if not points:
        return ""
    path = f"M{LEFT} {points[0][1]:.1f}H{points[0][0]:.1f}" + "".join(f"V{y:.1f}H{x:.1f}" for x, y in points[1:])
    return f'<path class="front" d="{path}V{TOP}"/>'


def _dot(kind: str, x: float, y: float, radius: float, name: str, row: Mapping[str, float]) -> str:
    title = f"{name}: {row['speedup']:.2f}\N{MULTIPLICATION SIGN}, {gates.number(row['loss'])}"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(title)}</title></circle>'


def _text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'
