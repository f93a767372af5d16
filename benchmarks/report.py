"""The report as one HTML file: no network, pictures and plots inside it; a few lines of script move the sliders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from diffpress.benchmarks import capacity, details, gates, sections, verdict
from diffpress.benchmarks.candidates import COMPRESSED, EXPORT, PLAIN, REFERENCE
from diffpress.benchmarks.markup import DASH, TIMES, between
from diffpress.benchmarks.pictures import DIFFERENCE_GAIN, LOSSLESS_SIDE, data_uri, difference
from diffpress.benchmarks.verdict import milliseconds, size

OPEN_FIRST, OPEN_WORST = 4, 2  # pictures that are seen at once; the others open on demand
DOT = " \N{MIDDLE DOT} "


@dataclass(frozen=True)
class Picture:
    """One prompt, drawn by each: uint8 [H, W, 3]. `index` is that of its words in the report's "pictures"."""

    index: int
    reference: np.ndarray
    compressed: np.ndarray
    plain: np.ndarray | None = None


def render(report: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """The page of a report (what `bench` returns) with its pictures; every number on it is one of the report."""
    template = (files("diffpress") / "benchmarks" / "report.html").read_text("utf-8")
    found = verdict.verdict(report)
    model = str(report["model"].get("source", "model"))
    parts = {
        "title": escape(f"{model}, {report['recipe']}: diffpress report"),
        "kicker": _kicker(report, model),
        "headline": escape(found.headline),
        "quality": escape(found.quality),
        "tiles": _tiles(report),
        "faults": _faults(report["faults"]),
        "gates": gates.section(report),
        "rival": found.rival,
        "rival_text": escape(found.rival_text),
        **sections.trade_off(report),
        **_pictures(report, pictures),
        **sections.speed(report),
        **capacity.running(report),
        **capacity.roofline(report),
        **details.steps(report),
        **details.quality(report),
        **details.sizes(report),
        **details.layers(report),
        **details.making(report),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _kicker(report: Mapping[str, Any], model: str) -> str:
    sampling = report["sampling"]
    words = (
        f"{verdict.schedule(sampling)}, guidance {sampling['guidance_scale']:g}, "
        f"{sampling['width']}{TIMES}{sampling['height']} pixels"
    )
    if verdict.rescheduled(report):
        words += f", against {verdict.schedule(report['reference'])}"
    recipe = f"recipe <b>{escape(str(report['recipe']))}</b>"
    return DOT.join(["<b>diffpress</b>", f"{escape(model)}, {recipe}", escape(words), report["created"][:10]])


def _tiles(report: Mapping[str, Any]) -> str:
    speedup, own, sizes = report["speedup"], report["quality"], report["size_bytes"]
    p50 = {name: milliseconds(row["p50_ms"]) for name, row in report["latency"].items()}
    ratio = verdict.size_ratio(report)
    faster, nearer = (report.get(name) or {} for name in ("speedup_interval", "quality_interval"))
    spread = between(faster.get("vs_eager"), 1, unit=TIMES)
    over = f"{speedup['vs_uncompressed_export']:.1f}{TIMES} over plain ONNX"
    db = between(nearer.get("psnr_db"), 1, unit=" dB")
    tiles = [
        ("Speedup", f"{speedup['vs_eager']:.1f}{TIMES}", f"{spread}, {over}" if spread else over),
        ("Latency", p50[COMPRESSED], f"diffusers {p50[REFERENCE]}, plain ONNX {p50[EXPORT]}"),
        (
            "Denoiser",
            DASH if ratio is None else f"{ratio:.0%}",
            f"{size(sizes['denoiser_compressed'])} of {size(sizes['denoiser_reference'])}",
        ),
        (
            "PSNR",
            f"{own['psnr_db']:.1f} dB",
            f"{db}, SSIM {own['ssim']:.3f}" if db else f"SSIM {own['ssim']:.3f}, {own['images']} images",
        ),
    ]
    accuracy = own["attribute_accuracy"]
    if accuracy["compressed"] is not None:
        tiles.append(("Attributes right", f"{accuracy['compressed']:.1%}", f"reference {accuracy['reference']:.1%}"))
    return "".join(f'<div class="tile"><span>{a}</span><b>{b}</b><span>{escape(c)}</span></div>' for a, b, c in tiles)


def _faults(faults: Sequence[str]) -> str:
    if not faults:
        return ""
    shown = "".join(f"<li>{escape(line)}</li>" for line in faults[:10])
    more = f"<p>and {len(faults) - 10} more</p>" if len(faults) > 10 else ""
    return f'<aside class="fault"><h3>Broken images</h3><ul>{shown}</ul>{more}</aside>'


def _pictures(report: Mapping[str, Any], pictures: Sequence[Picture]) -> dict[str, str]:
    told = [report["pictures"][picture.index] for picture in pictures]
    cards = [_card(picture, words, report[PLAIN]["steps"]) for picture, words in zip(pictures, told, strict=True)]
    chosen = [index for index, words in enumerate(told) if words["note"]]
    first = [index for index in range(len(told)) if index not in chosen]
    seen = sorted([*first[:OPEN_FIRST], *chosen[:OPEN_WORST]])
    shown = f'<div class="pairs">{"".join(cards[index] for index in seen)}</div>'
    if len(seen) < len(cards):
        rest = "".join(card for index, card in enumerate(cards) if index not in seen)
        title = f"{len(cards) - len(seen)} more pictures"
        shown += f'<details><summary>{title}</summary><div class="pairs">{rest}</div></details>'
    note = f"The first {len(first)} prompts, not chosen"
    if chosen:
        note += f", and the {len(chosen)} of all {report['quality']['images']} that differ most"
    note += f". Same seeds on every side; differences are shown {DIFFERENCE_GAIN} times larger. "
    note += f"Prompts: {report['prompts']['source']}."
    return {"pictures": shown, "pictures_note": escape(note)}


def _card(picture: Picture, told: Mapping[str, Any], steps: int | None) -> str:
    """The reference and the compressed picture under a slider, and beside them what differs and the plain rival."""
    small = " small" if max(picture.reference.shape[:2]) <= LOSSLESS_SIDE else ""
    height, width = picture.reference.shape[:2]

    def image(pixels: np.ndarray, words: str, kind: str = "") -> str:
        source = f'src="{data_uri(pixels)}" width="{width}" height="{height}" alt="{escape(words)}"'
        return f'<span class="shot {kind}"><img class="{small}" {source}><b>{escape(words)}</b></span>'

    slider = (
        f'<div class="slider">{image(picture.reference, "reference", "left")}'
        f"{image(picture.compressed, 'compressed', 'right')}"
        f'<input type="range" min="0" max="100" value="50" aria-label="how much of the reference is shown"></div>'
    )
    beside = image(difference(picture.compressed, picture.reference), "difference")
    if picture.plain is not None:
        beside += image(picture.plain, f"{steps} steps")
    note = f"{told['note']}, " if told["note"] else ""
    words = f"{note}seed {told['seed']}, PSNR {told['psnr_db']:.1f} dB"
    caption = f"<figcaption>{escape(told['prompt'])} <small>{escape(words)}</small></figcaption>"
    return f'<figure class="pair"><div class="shots">{slider}<div class="beside">{beside}</div></div>{caption}</figure>'
