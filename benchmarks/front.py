"""Quality against speed: every candidate on the same images, the Pareto front among them, and its picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from diffpress.benchmarks.candidates import COMPRESSED, EXPORT, PLAIN, REFERENCE, RESCHEDULED, STRICT, Drawn
from diffpress.benchmarks.markup import COLOURS, TIMES
from diffpress.benchmarks.plots import LEFT, RIGHT, WIDTH, nice_ticks, steps_between, svg, text
from diffpress.benchmarks.scores import distances

if TYPE_CHECKING:
    from diffpress.benchmarks.plain import Rival, Trial

TRIAL = "trial"  # a plain schedule that was tried and is not the rival
SAME_DB = 60.0  # above this, 8-bit pictures differ by one level in one pixel of fifteen: nobody sees how much above
HEIGHT = 330
TOP, BOTTOM = 34, 50
LETTER, LINE = 9.4, 20.0  # of a name on the plot at its largest, on a phone, in the plot's own units
DIGIT = 12.0  # of a number's on the axis there, in wide fonts

# The candidates that matter are drawn last, above others, and choose the places of their names first.
ORDER = (TRIAL, REFERENCE, RESCHEDULED, EXPORT, STRICT, PLAIN, COMPRESSED)
Box = tuple[float, float, float, float]  # left, top, right, bottom


def first(drawn: Drawn, count: int) -> Drawn:
    """The first `count` images."""
    return Drawn(drawn.pixels[:count], drawn.latents[:count], drawn.trajectory[:, :count])


def rows(
    speeds: Mapping[str, Any],
    trials: Sequence[Trial],
    drawn: Mapping[str, Drawn],
    rival: Rival | None,
) -> list[dict[str, Any]]:
    """A row per candidate: how much faster than the reference, how far from its images; `front` where nothing beats it.

    `speeds` are a report's "speedup" and "same_precision". Of `drawn`, images by candidate, and of what was drawn on
    the way to the rival as many are compared as the shortest has. The ratio of a trial is that of its step count,
    whose schedules take the same time.
    """
    speedup, strict = speeds["speedup"], speeds["same_precision"]
    eager = speedup["vs_eager"]
    faster = {REFERENCE: 1.0, EXPORT: eager / speedup["vs_uncompressed_export"], COMPRESSED: eager}
    faster[RESCHEDULED] = eager / speedup.get("vs_eager_same_schedule", eager)
    if strict:
        faster[STRICT] = eager / strict["speedup"]
    entries: list[tuple[dict[str, Any], Drawn]] = [
        ({"name": name, "schedule": None, "steps": None, "speedup": value}, drawn[name])
        for name, value in faster.items()
        if name in drawn
    ]
    ratios = {trial.steps: trial.ratio for trial in trials}
    for (schedule, steps), images in (rival.drawn if rival else {}).items():
        name = PLAIN if rival and (schedule, steps) == (rival.schedule, rival.sampling.steps) else TRIAL
        row = {"name": name, "schedule": schedule, "steps": steps, "speedup": eager / ratios[steps]}
        entries.append((row, images))
    count = min(len(images.pixels) for _, images in entries)
    reference = first(drawn[REFERENCE], count)
    for row, images in entries:
        apart = distances(first(images, count), reference)
        row |= {key: apart[key] for key in ("images", "psnr_db", "ssim", "latent_rel_l2")}
        if row["name"] == REFERENCE:
            row["psnr_db"] = None  # it is the very same
    found = [row for row, _ in entries]
    return [row | {"front": on_front(row, found)} for row in found]


def on_front(row: Mapping[str, Any], among: Iterable[Mapping[str, Any]]) -> bool:
    """Whether none is as fast and as good, and better in one of the two."""
    speed, quality = row["speedup"], _quality(row)
    return not any(
        other["speedup"] >= speed
        and _quality(other) >= quality
        and (other["speedup"] > speed or _quality(other) > quality)
        for other in among
    )


def _quality(row: Mapping[str, Any]) -> float:
    """PSNR in dB; the reference, which is equal to itself, has no finite one."""
    return math.inf if row["psnr_db"] is None else float(row["psnr_db"])


def words(row: Mapping[str, Any], named: Mapping[str, str]) -> str:
    """What a row is called."""
    return named.get(row["name"]) or f"{row['steps']} {row['schedule']} steps"


def plot(found: Sequence[Mapping[str, Any]], named: Mapping[str, str]) -> str:
    """Speed to the right on a logarithmic scale, PSNR upwards, the front as a staircase; an SVG.

    `named` are short names by candidate; trials have none on the plot. What is above SAME_DB lies on the top line.
    """
    floor = min((_quality(row) for row in found if _quality(row) < SAME_DB), default=SAME_DB - 20)
    step = nice_ticks(SAME_DB - floor, 4)[1]
    lowest = SAME_DB - step * math.ceil((SAME_DB - floor) / step + 0.15)
    speeds = [row["speedup"] for row in found]
    slow, fast = math.log(0.9 * min(speeds)), math.log(1.15 * max(speeds))
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT

    def x_of(value: float) -> float:
        return LEFT + (math.log(value) - slow) / (fast - slow) * (right - LEFT)

    def y_of(value: float) -> float:
        return bottom - (min(value, SAME_DB) - lowest) / (SAME_DB - lowest) * (bottom - TOP)

    body = []
    for index in range(round((SAME_DB - lowest) / step) + 1):
        tick = SAME_DB - index * step
        y = y_of(tick)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(text(LEFT - 6, y + 4, f"{tick:g}" if index else f"\N{GREATER-THAN OR EQUAL TO} {tick:g}", "end"))
    for tick in steps_between(math.exp(slow), math.exp(fast)):
        body.append(f'<line class="grid" x1="{x_of(tick):.1f}" x2="{x_of(tick):.1f}" y1="{TOP}" y2="{bottom}"/>')
        label = f"{tick:g}{TIMES}"
        # Beside its line rather than cut, where that stands at the end.
        body.append(text(min(x_of(tick), WIDTH - DIGIT * len(label) / 2), bottom + 19, label))
    body += [text(0, 17, "PSNR to the reference, dB", "start"), text(right, HEIGHT - 5, "faster than diffusers", "end")]
    stairs = sorted((x_of(row["speedup"]), y_of(_quality(row))) for row in found if row["front"])
    # What can be had at a speed is the best of what is as fast: down at once, then right to the next.
    path = f"M{LEFT} {stairs[0][1]:.1f}H{stairs[0][0]:.1f}" + "".join(f"V{y:.1f}H{x:.1f}" for x, y in stairs[1:])
    body.append(f'<path class="front" d="{path}V{bottom}"/>')
    order = sorted(found, key=lambda row: ORDER.index(row["name"]))
    taken: list[Box] = []
    for row in order:
        x, y = x_of(row["speedup"]), y_of(_quality(row))
        radius = {TRIAL: 3.5, COMPRESSED: 7.0}.get(row["name"], 5.5)
        quality = "identical" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
        title = f"<title>{escape(words(row, named))}: {row['speedup']:.2f}{TIMES}, {quality}</title>"
        kind = COLOURS.get(row["name"], TRIAL)
        body.append(f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{title}</circle>')
        taken.append((x - radius, y - radius, x + radius, y + radius))
    for row in reversed(order):
        if row["name"] in named:
            body.append(_name(named[row["name"]], x_of(row["speedup"]), y_of(_quality(row)), taken))
    return svg("".join(body), "quality against speed", HEIGHT)


def _name(name: str, x: float, y: float, taken: list[Box]) -> str:
    """A name by its mark, at the first place that nothing else takes, or least; `taken` grows by it."""
    width = LETTER * len(name)
    places = [("start", x + 11, y + 5), ("end", x - 11, y + 5)]
    for line in range(3):  # right above and below first
        above, below = y - 12 - line * LINE, y + 22 + line * LINE
        places += [("middle", x, above), ("middle", x, below)]
        places += [
            (anchor, x + aside, base) for base in (above, below) for anchor, aside in (("start", 6), ("end", -6))
        ]

    def box(anchor: str, at: float, base: float) -> Box:
        left = at - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
        return left, base - 0.75 * LINE, left + width, base + 0.25 * LINE

    def covered(place: tuple[str, float, float]) -> float:
        """The area that others have taken; what is outside the plot counts most."""
        left, top, right, bottom = box(*place)
        others = sum(
            max(0.0, min(right, x1) - max(left, x0)) * max(0.0, min(bottom, y1) - max(top, y0))
            for x0, y0, x1, y1 in taken
        )
        outside = max(0.0, LEFT - left) + max(0.0, right - WIDTH) + max(0.0, bottom - HEIGHT + BOTTOM) + max(0.0, -top)
        return others + 1e4 * outside

    place = min(places, key=covered)
    taken.append(box(*place))
    return text(place[1], place[2], name, place[0], "strong")
