"""Plots as SVG text, drawn by hand: no library, no script; colours are classes that the page's style sheet knows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 480, 250  # of a plot, in its own units; it scales with the page
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 34
FOOT = 44  # below the plots of the report's page, whose letters are larger on a phone


def svg(body: str, label: str, height: float = HEIGHT) -> str:
    """A plot that the page's style sheet colours, and what it is called for who cannot see it."""
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">{body}</svg>'


def text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "") -> str:
    """Words at a point of a plot; `anchor` as in SVG, `kind` a class."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def nice_ticks(top: float, count: int = 4) -> list[float]:
    """Round numbers from 0 to just above `top`, about `count` of them."""
    if not top > 0:
        return [0.0, 1.0]
    rough = top / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose `low`..`high`."""
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high) - 1e-12) + 1)]


def _power(value: float) -> str:
    """A power of ten as people write it."""
    digits = str.maketrans("-0123456789", "\N{SUPERSCRIPT MINUS}⁰¹²³⁴⁵⁶⁷⁸⁹")
    return f"10{str(round(math.log10(value))).translate(digits)}"


def _axes(ticks: Mapping[str, float], steps: int, x_of: Sequence[float], unit: str) -> str:
    """Horizontal grid lines at the heights of `ticks`, labelled by their keys, and step numbers below."""
    parts = []
    for words, y in ticks.items():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(LEFT - 6, y + 4, words, "end"))
    stride = max(1, int(nice_ticks(steps, 5)[1]))
    shown = [i for i in range(steps) if i == 0 or (i + 1) % stride == 0]
    parts += [text(x_of[i], HEIGHT - FOOT + 18, str(i + 1)) for i in shown]
    parts.append(text(WIDTH - RIGHT, HEIGHT - 3, "step", "end"))
    parts.append(text(0, HEIGHT - 3, unit, "start"))
    return "".join(parts)


def error_lines(series: Mapping[str, Sequence[float | None]], marks: str, label: str) -> str:
    """Relative error after each step on a logarithmic scale; keys of `series` are classes, `marks` the step program."""
    values = [value for line in series.values() for value in line if value and value > 0]
    if not values:
        return ""
    ticks = log_ticks(min(values), max(values))
    if len(ticks) < 2:
        ticks = [ticks[0] / 10, ticks[0]]
    low, high = math.log10(ticks[0]), math.log10(ticks[-1])
    bottom = HEIGHT - FOOT

    def y_of(value: float) -> float:
        return bottom - (math.log10(max(value, ticks[0])) - low) / (high - low) * (bottom - TOP)

    steps = max(len(line) for line in series.values())
    x_of = _centres(steps)
    body = [_axes({_power(tick): y_of(tick) for tick in ticks}, steps, x_of, "relative L2")]
    for name, line in series.items():
        known = [(i, value) for i, value in enumerate(line) if value is not None]
        path = " ".join(f"{x_of[i]:.1f},{y_of(value):.1f}" for i, value in known)
        body.append(f'<polyline class="line {name}" points="{path}"/>')
        for i, value in known:
            reused = name == "compressed" and i < len(marks) and marks[i] == "-"
            kind = f"dot {name} open" if reused else f"dot {name}"
            title = f"<title>step {i + 1}: {value:.3g}</title>"
            body.append(f'<circle class="{kind}" cx="{x_of[i]:.1f}" cy="{y_of(value):.1f}" r="2.6">{title}</circle>')
    return svg("".join(body), label)


def step_columns(steps_ms: Sequence[float], marks: str, others: Mapping[str, Sequence[float]], label: str) -> str:
    """A column per step, full or reusing; `others` are lines at the median step of other candidates (key: class)."""
    levels = {name: sorted(line)[len(line) // 2] for name, line in others.items() if line}
    if not steps_ms:
        return ""
    ticks = nice_ticks(max([*steps_ms, *levels.values()]))
    bottom = HEIGHT - FOOT

    def y_of(value: float) -> float:
        return bottom - value / ticks[-1] * (bottom - TOP)

    x_of = _centres(len(steps_ms))
    width = (WIDTH - LEFT - RIGHT) / len(steps_ms)
    body = [_axes({f"{tick:g}": y_of(tick) for tick in ticks}, len(steps_ms), x_of, "ms")]
    for i, value in enumerate(steps_ms):
        kind = "reuse" if i < len(marks) and marks[i] == "-" else "full"
        y = y_of(value)
        title = f"<title>step {i + 1} ({kind}): {value:.2f} ms</title>"
        body.append(
            f'<rect class="{kind}" x="{x_of[i] - 0.4 * width:.1f}" y="{y:.1f}" width="{0.8 * width:.1f}" '
            f'height="{bottom - y:.1f}">{title}</rect>'
        )
    for name, level in levels.items():
        y = y_of(level)
        title = f"<title>{level:.2f} ms</title>"
        body.append(
            f'<line class="line {name}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}">{title}</line>'
        )
    return svg("".join(body), label)


def _centres(steps: int) -> list[float]:
    width = (WIDTH - LEFT - RIGHT) / max(1, steps)
    return [LEFT + width * (i + 0.5) for i in range(steps)]


COLOURS = ("#757c86", "#c8741a", "#0b6fc2", "#8250b8", "#1a7f4b", "#b3261e")
ALONE = (
    "text{font:11px system-ui,sans-serif;fill:#57606a}.grid{stroke:#8b949e;stroke-opacity:.25}"
    "polyline{fill:none;stroke-width:2}@media(prefers-color-scheme:dark){text{fill:#adbac7}}"
)


def curves(series: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str) -> str:
    """Lines of (x, y) on two logarithmic scales, named in a legend; an SVG file that needs no page around it."""
    points = [point for line in series.values() for point in line]
    ticks = log_ticks(min(y for _, y in points), max(y for _, y in points))
    low, high = math.log10(ticks[0]), math.log10(ticks[-1])
    places = sorted({x for x, _ in points})
    first, last = math.log10(places[0]), math.log10(places[-1])
    bottom, top = HEIGHT - BOTTOM, TOP + 14

    def x_of(value: float) -> float:
        return LEFT + 8 + (math.log10(value) - first) / (last - first) * (WIDTH - LEFT - RIGHT - 16)

    def y_of(value: float) -> float:
        return bottom - (math.log10(value) - low) / (high - low) * (bottom - top)

    body = [f"<style>{ALONE}</style>"]
    for tick in ticks:
        y = y_of(tick)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(text(LEFT - 6, y + 4, _power(tick), "end"))
    body += [text(x_of(place), bottom + 17, f"{place:g}") for place in places]
    body += [text(WIDTH - RIGHT, HEIGHT - 3, across, "end"), text(0, 11, up, "start")]
    for number, ((name, line), colour) in enumerate(zip(series.items(), COLOURS, strict=False)):
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in sorted(line))
        body.append(f'<polyline stroke="{colour}" points="{path}"/>')
        for x, y in line:
            title = f"<title>{escape(name)}, {x:g}: {y:.3g}</title>"
            body.append(f'<circle fill="{colour}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3">{title}</circle>')
        # The curves fall to the right, which leaves the lower left corner free.
        y = bottom - 6 - 15 * (len(series) - 1 - number)
        body.append(f'<rect fill="{colour}" x="{LEFT + 8}" y="{y - 8}" width="10" height="10"/>')
        body.append(text(LEFT + 24, y + 1, name, "start"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
    return f'{head} aria-label="{escape(up)}">{"".join(body)}</svg>\n'


_MARKS = ("circle", "square", "diamond", "cross", "triangle")


def _mark(kind: str, x: float, y: float, colour: str, title: str = "") -> str:
    """A mark of about 7 units around (x, y)."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    if kind == "circle":
        return f'<circle fill="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.2">{inner}</circle>'
    shapes = {
        "square": f"M{x - 3:.1f} {y - 3:.1f}h6v6h-6z",
        "diamond": f"M{x:.1f} {y - 4:.1f}l4 4l-4 4l-4 -4z",
        "triangle": f"M{x:.1f} {y - 4:.1f}l4 7h-8z",
        "cross": f"M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6",
    }
    paint = f'stroke="{colour}" stroke-width="2"' if kind == "cross" else f'fill="{colour}"'
    return f'<path {paint} d="{shapes[kind]}">{inner}</path>'


def scatter(
    series: Mapping[str, Sequence[tuple[float, float]]],
    line: tuple[str, Sequence[tuple[float, float]]],
    across: str,
    up: str,
) -> str:
    """Points (x, y) of many series and one line, both scales logarithmic, the legend below; an SVG that stands alone.

    Series differ by mark and colour; raises `ValueError` for more than these can tell apart.
    """
    styles = [(mark, colour) for mark in _MARKS for colour in COLOURS[1:]]
    if len(series) > len(styles):
        raise ValueError(f"{len(series)} series, but {len(styles)} marks to tell them apart")
    points = [point for dots in (*series.values(), line[1]) for point in dots]
    ticks = log_ticks(min(y for _, y in points), max(y for _, y in points))
    low, high = math.log10(ticks[0]), math.log10(ticks[-1]) + (len(ticks) == 1)
    first, last = math.log10(min(x for x, _ in points) * 0.95), math.log10(max(x for x, _ in points) * 1.05)
    chart = 300
    bottom, top = chart - BOTTOM, TOP + 14

    def x_of(value: float) -> float:
        return LEFT + (math.log10(value) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        return bottom - (math.log10(value) - low) / (high - low) * (bottom - top)

    body = [f"<style>{ALONE}</style>"]
    for tick in ticks:
        y = y_of(tick)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(text(LEFT - 6, y + 4, _power(tick), "end"))
    for place in steps_between(10**first, 10**last):
        x = x_of(place)
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        body.append(text(x, bottom + 17, f"{place:g}"))
    body += [text(WIDTH - RIGHT, chart - 3, across, "end"), text(0, 11, up, "start")]
    path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in sorted(line[1]))
    body.append(f'<polyline stroke="{COLOURS[0]}" points="{path}"/>')
    for (name, dots), (mark, colour) in zip(series.items(), styles, strict=False):
        body += [_mark(mark, x_of(x), y_of(y), colour, f"{name}, {x:.3g}: {y:.3g}") for x, y in dots]
    entries = [(line[0], "", COLOURS[0])]
    entries += [(name, *style) for name, style in zip(series, styles, strict=False)]
    for number, (name, mark, colour) in enumerate(entries):
        x, y = 8 + (number % 2) * WIDTH / 2, chart + 14 + 15 * (number // 2)
        key = f'<rect fill="{colour}" x="{x - 5:.1f}" y="{y - 1:.1f}" width="11" height="2"/>'
        body.append(_mark(mark, x, y, colour) if mark else key)
        body.append(text(x + 10, y + 4, name, "start"))
    height = chart + 8 + 15 * math.ceil(len(entries) / 2)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
    return f'{head} aria-label="{escape(up)}">{"".join(body)}</svg>\n'


Box = tuple[float, float, float, float]  # left, top, right, bottom


def rivals(groups: Mapping[str, Sequence[tuple[float, float, str]]], across: str, up: str) -> str:
    """Named points (x, error, name) of two groups, both scales logarithmic, small errors on top, and their fronts.

    A front joins the points of a group that none of it beats; these are named where there is room. Stands alone.
    """
    width, height = 760, 420
    points = [point for some in groups.values() for point in some]
    low, high = math.log10(min(y for _, y, _ in points) * 0.8), math.log10(max(y for _, y, _ in points) * 1.25)
    first, last = math.log10(min(x for x, _, _ in points) * 0.9), math.log10(max(x for x, _, _ in points) * 1.1)
    bottom, top = height - BOTTOM, TOP + 14

    def x_of(value: float) -> float:
        return LEFT + (math.log10(value) - first) / (last - first) * (width - LEFT - RIGHT)

    def y_of(value: float) -> float:
        return top + (math.log10(value) - low) / (high - low) * (bottom - top)

    body = [f"<style>{ALONE}.name{{font-size:9px}}</style>"]
    for tick in steps_between(10**low, 10**high, (1, 2, 5)):
        y = y_of(tick)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(text(LEFT - 6, y + 4, f"{tick:g}", "end"))
    for place in steps_between(10**first, 10**last):
        x = x_of(place)
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        body.append(text(x, bottom + 17, f"{place:g}"))
    body += [text(width - RIGHT, height - 3, across, "end"), text(0, 11, up, "start")]
    # Names keep clear of every point and of each other.
    taken: list[Box] = [(x_of(x) - 4, y_of(y) - 4, x_of(x) + 4, y_of(y) + 4) for x, y, _ in points]
    for number, ((name, some), (mark, colour)) in enumerate(zip(groups.items(), _PAIR, strict=False)):
        best = [some[index] for index in pareto([(x, -y) for x, y, _ in some])]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y, _ in sorted(best))
        body.append(f'<polyline stroke="{colour}" points="{path}"/>')
        body += [_mark(mark, x_of(x), y_of(y), colour, f"{words}: {x:.3g}, {y:.3g}") for x, y, words in some]
        for x, y, words in sorted(best, reverse=True):
            if box := placed(words, x_of(x), y_of(y), taken, width):
                taken.append(box)
                body.append(text(box[0], box[3] - 2, words, "start", "name"))
        x = width - RIGHT - 90 * (len(groups) - number)
        body += [_mark(mark, x, 8, colour), text(x + 10, 12, name, "start")]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
    return f'{head} aria-label="{escape(up)}">{"".join(body)}</svg>\n'


_PAIR = (("square", COLOURS[0]), ("circle", COLOURS[2]))


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats: that is at least as large in both numbers and larger in one."""
    kept: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: points[index], reverse=True):
        last = points[kept[-1]] if kept else None
        # From the largest first number on down, what is kept has ever larger second ones; twins stay together.
        if last is None or points[index][1] > last[1] or points[index] == last:
            kept.append(index)
    return sorted(kept)


def placed(words: str, x: float, y: float, taken: Sequence[Box], width: float, size: float = 9) -> Box | None:
    """Where a name in letters of `size` fits beside (x, y), the right of it first; None where all is taken.

    `taken` are boxes to keep clear of, `width` is where the picture ends.
    """
    long, tall = 0.545 * size * len(words), 1.22 * size
    sides, heights = (x + 6, x - 6 - long, x - long / 2), (y - 6, y - 6 - tall, y + 6, y - 6 - 2 * tall, y + 6 + tall)
    for above in heights:
        for left in sides[: 2 if above == heights[0] else None]:
            box = (left, above, left + long, above + tall)
            inside = left >= LEFT and box[2] <= width and above >= TOP
            if inside and not any(_overlap(box, other) for other in taken):
                return box
    return None


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def steps_between(low: float, high: float, units: Sequence[int] = (1, 2, 3, 5, 7)) -> list[float]:
    """`units` times powers of ten from `low` to `high`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [unit * 10.0**power for power in powers for unit in units if low <= unit * 10.0**power <= high]
