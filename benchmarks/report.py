"""The report as one HTML file: no network, no script, pictures and plots inside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from diffpress.benchmarks import gates, quality, sections, verdict
from diffpress.benchmarks.candidates import COMPRESSED, EXPORT, REFERENCE
from diffpress.benchmarks.pictures import DIFFERENCE_GAIN, LOSSLESS_SIDE, data_uri, difference
from diffpress.benchmarks.verdict import milliseconds, size

DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
DOT = " \N{MIDDLE DOT} "


@dataclass(frozen=True)
class Picture:
    """One prompt, drawn by each: uint8 [H, W, 3]. `note` says why it is shown ("" or "worst")."""

    prompt: str
    seed: int
    note: str
    reference: np.ndarray
    compressed: np.ndarray
    plain: np.ndarray | None = None


def render(report: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """The page of a report (what `bench` returns) with its pictures."""
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
        **_pictures(report, pictures),
        **sections.speed(report),
        **sections.steps(report),
        **sections.quality(report),
        **sections.sizes(report),
        **sections.making(report),
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
    tiles = [
        ("Latency", p50[COMPRESSED], f"diffusers {p50[REFERENCE]}, plain ONNX {p50[EXPORT]}"),
        (
            "Speedup",
            f"{speedup['vs_eager']:.1f}{TIMES}",
            f"{speedup['vs_uncompressed_export']:.1f}{TIMES} over plain ONNX",
        ),
        (
            "Denoiser",
            DASH if ratio is None else f"{ratio:.0%}",
            f"{size(sizes['denoiser_compressed'])} of {size(sizes['denoiser_reference'])}",
        ),
        ("PSNR", f"{own['psnr_db']:.1f} dB", f"SSIM {own['ssim']:.3f}, {own['images']} images"),
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
    return f'<div class="fault"><h3>Broken images</h3><ul>{shown}</ul>{more}</div>'


def _pictures(report: Mapping[str, Any], pictures: Sequence[Picture]) -> dict[str, str]:
    cards = "".join(_card(picture, report["fewer_plain_steps"]["steps"]) for picture in pictures)
    first = sum(not picture.note for picture in pictures)
    note = f"The first {first} prompts, not chosen"
    if first < len(pictures):
        note += f", then the {len(pictures) - first} pictures of all {report['quality']['images']} that differ most"
    prompts = report["prompts"]
    note += f". Same seeds on every side; differences are shown {DIFFERENCE_GAIN} times larger. "
    note += f"Prompts: {prompts['source']}."
    return {"pictures": cards, "pictures_note": escape(note)}


def _card(picture: Picture, steps: int | None) -> str:
    shown = [
        ("reference", picture.reference),
        ("compressed", picture.compressed),
        ("difference", difference(picture.compressed, picture.reference)),
    ]
    if picture.plain is not None:
        shown.append((f"{steps} plain steps", picture.plain))
    small = ' class="small"' if max(picture.reference.shape[:2]) <= LOSSLESS_SIDE else ""
    images = "".join(
        f'<span><img{small} src="{data_uri(pixels)}" alt="{escape(words)}">{escape(words)}</span>'
        for words, pixels in shown
    )
    psnr = float(quality.psnr(picture.compressed[None], picture.reference[None])[0])
    note = f"{picture.note}, " if picture.note else ""
    small_print = f"<small>{note}seed {picture.seed}, PSNR {psnr:.1f} dB</small>"
    words = f"<figcaption>{escape(picture.prompt)}<br>{small_print}</figcaption>"
    return f'<figure class="pair"><div>{images}</div>{words}</figure>'
