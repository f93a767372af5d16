"""What the shipped recipes reach on `shapes`, from results/peers.json; `benchmarks.tables` writes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffpress.benchmarks import markdown, peers_tables
from diffpress.benchmarks.candidates import PLAIN
from diffpress.benchmarks.peers_tables import ACCURACY, REFERENCE, SPEED
from diffpress.compress.recipe import presets as shipped

Row = Mapping[str, Any]
MAX = Path(__file__).resolve().parent / "results" / "max.json"
OURS = "diffpress "  # before a recipe's name, among contenders


def reached() -> dict[str, Row]:
    """By name, the row of diffusers FP32 and that of every shipped recipe: at its own steps, or else the model's 50."""
    first: dict[str, Row] = {}
    for row in peers_tables.running(peers_tables.data()["rows"]):
        first.setdefault(row["contender"], row)
    return {REFERENCE: first[REFERENCE], **{name: first[OURS + name] for name in shipped()}}


def points(row: Row) -> float:
    """Percentage points of attribute accuracy above diffusers'."""
    return 100.0 * float(row[ACCURACY] - reached()[REFERENCE][ACCURACY])


def presets() -> str:
    """Speed and quality of every recipe, with the fastest peer whose attributes count as equal."""
    lines = [
        "| recipe | backend | steps | vs diffusers | vs uncompressed | denoiser | PSNR | latent error | to converged | CLIP | Fréchet | attributes |",  # noqa: E501
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    rows = reached()
    for name, row in {**rows, "": peers_tables.fastest_peer()}.items():
        said = f"`{name}`" if name in rows and name != REFERENCE else f"{row['contender']}, {row['schedule']}"
        cells = [
            said,
            row["backend"],
            str(row["steps"]),
            f"{row[SPEED]:.1f}x",
            markdown.cell(row["speedup_vs_uncompressed"], ".1f", "x"),
            f"{row['bytes'] / 1e6:.1f} MB",
            markdown.cell(row["psnr_db"], ".1f"),
            markdown.cell(row["latent_rel_l2"], ".3f"),
            markdown.cell(row["latent_rel_l2_converged"], ".3f"),
            markdown.cell(row["clip_score"], ".2f"),
            markdown.cell(row["frechet"], ".3f"),
            markdown.cell(row[ACCURACY], ".1%"),
        ]
        lines.append(markdown.row(cells))
    return "\n".join([*lines, "", peers_tables.where(peers_tables.data())])


def claims() -> str:
    """What `balanced` was asked to reach, and what it reached."""
    rows = reached()
    own = rows["balanced"]
    share, plain = own["bytes"] / rows[REFERENCE]["bytes"], own["speedup_vs_uncompressed"]
    made = [
        ("end to end against diffusers FP32", "at least 6x", f"{own[SPEED]:.1f}x", own[SPEED] >= 6),
        ("end to end against the uncompressed export in FP32", "at least 2x", f"{plain:.1f}x", plain >= 2),
        ("denoiser on disk, share of its FP32 bytes", "at most 30 %", f"{share:.1%}", share <= 0.30),
        ("attribute accuracy", "at most 1 point lower", f"{points(own):+.1f} points", points(own) >= -1),
    ]
    return markdown.claims("`balanced`, 50 DDIM steps", made)


def max_claims() -> str:
    """What `max` was asked to reach, and what it and its twin of more steps reached; from two runs of `bench`."""
    lines = ["| | asked | `max`, 6 steps | 20 steps, cached |", "|---|---|--:|--:|"]
    runs = json.loads(MAX.read_text("utf-8"))["runs"]
    shares = [run["size_bytes"]["denoiser_compressed"] / run["size_bytes"]["denoiser_reference"] for run in runs]
    scored = [run["quality"][ACCURACY] for run in runs]
    lost = [100.0 * (entry["compressed"] - entry["reference"]) for entry in scored]
    eager, same = ([run["speedup"][key] for run in runs] for key in ("vs_eager", "vs_eager_same_schedule"))
    psnr = [run["quality"]["psnr_db"] for run in runs]
    asked: list[tuple[str, str, list[float], str, Callable[[float], bool]]] = [
        ("end to end against diffusers' 50 steps", "at least 25x", eager, ".1f", lambda x: x >= 25),
        ("end to end against diffusers at as many steps", "at least 10x", same, ".1f", lambda x: x >= 10),
        ("denoiser on disk, share of its FP32 bytes", "at most 20 %", shares, ".1%", lambda x: x <= 0.2),
        ("attributes, points", "at most 2 lower", lost, "+.1f", lambda x: x >= -2),
        ("PSNR to the images of diffusers' 50 steps, dB", "at least 30", psnr, ".1f", lambda x: x >= 30),
    ]
    for what, words, reached, form, met in asked:
        cells = [f"{x:{form}}" if met(x) else f"**{x:{form}}**" for x in reached]
        lines.append(markdown.row((what, words, *cells)))
    plain = [f"{run[PLAIN]['psnr_db']:.1f} dB in {run[PLAIN]['steps']} steps" for run in runs]
    lines.append(markdown.row((f"plain {runs[0][PLAIN]['schedule']} steps as fast, uncompressed", "", *plain)))
    return "\n".join(lines)


def comment(name: str) -> str:
    """The first line of a shipped recipe's file."""
    own, reference = reached()[name], reached()[REFERENCE]
    share = own["bytes"] / reference["bytes"]
    return (
        f"# On `shapes`: {own[SPEED]:.1f}x diffusers FP32 ({own['backend']}), {share:.0%} of its denoiser bytes, "
        f"PSNR {own['psnr_db']:.1f} dB, attributes {points(own):+.1f} points.\n"
    )
