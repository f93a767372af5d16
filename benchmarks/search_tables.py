"""What a search found on `shapes`, from results/search.json, the report of one; `benchmarks.tables` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffpress.benchmarks import markdown
from diffpress.benchmarks.search import objective, report
from diffpress.benchmarks.search.trial import MEASURED

FILE = Path(__file__).resolve().parent / "results" / "search.json"
MINUTES = 45.0  # asked of 40 trials on two cores


def data() -> dict[str, Any]:
    """The committed report."""
    found: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
    return found


def search() -> str:
    """The front of the finals and the recipes that came first, by speed, and who beats each of these."""
    found = data()
    first = {one["key"]: one["beaten_by"] for one in found["first"]}
    heads = ["vs diffusers", "latent error", "median", "PSNR", "attributes", "denoiser", "as fast and nearer"]
    lines = [markdown.row(["", *heads]), "|---|" + "--:|" * (len(heads) - 1) + "---|"]
    shown = [entry for entry in found["finalists"] if entry["front"] or entry["key"] in first]
    for entry in sorted(shown, key=objective.speed):
        own, name, quality, size = entry["key"], entry["name"], entry["quality"], entry["size_bytes"]
        beater = first.get(own)
        cells = [
            f"`{name}`" if own in first else f"**{name}**, chosen" if own == found["chosen"] else name,
            f"{objective.speed(entry):.1f}x",
            f"{quality['latent_rel_l2']:.4f}",
            f"{quality['latent_rel_l2_median']:.4f}",
            f"{quality['psnr_db']:.1f}",
            f"{quality['attribute_accuracy']['compressed']:.1%}",
            f"{size['denoiser_compressed'] / size['denoiser_reference']:.0%}",
            report.of_key(found, beater)["name"] if beater else "none" if own in first else "",
        ]
        lines.append(markdown.row(cells))
    made, run, machine = found["bundle"], found["run"], found["machine"]
    count = sum(row["state"] == MEASURED for row in found["trials"])
    lines += [
        "",
        f"`{found['reproduce']}`: {run['trials']} trials ({count} measured to the end) in {run['seconds'] / 60:.0f} "
        f"minutes, from the first line to the bundle. Finalists are judged on {found['images']['finals']} images of "
        f"other captions and noise than trials. The bundle, measured once more: {report.numbers(found, made)}. "
        f"{machine['processor']}, {machine['cores']} cores.",
    ]
    return "\n".join(lines)


def claims() -> str:
    """What a search was asked to reach, and what it reached."""
    found = data()
    own, minutes = report.of_key(found, found["chosen"]), found["run"]["seconds"] / 60
    first = [report.of_key(found, one["key"]) for one in found["first"]]
    within = [entry for entry in first if entry["within"]]
    keys = ("latent_rel_l2", "latent_rel_l2_median")
    worse = [entry for entry in within if all(entry["quality"][key] > own["quality"][key] for key in keys)]
    left = [one["name"] for one in found["first"] if not one["beaten_by"]]
    beaten = f"{len(first) - len(left)} of {len(first)}" + (f", not {', '.join(left)}" if left else "")
    made = [
        (
            f"{len(found['trials'])} trials and the bundle",
            f"under {MINUTES:.0f} minutes",
            f"{minutes:.0f} minutes",
            minutes < MINUTES,
        ),
        (
            "shipped recipes within the limits that err more than the chosen, in mean and median",
            "all",
            f"{len(worse)} of {len(within)}",
            len(worse) == len(within),
        ),
        ("shipped recipes beaten in speed and error at once by one that was found", "all", beaten, not left),
    ]
    return markdown.claims("on `shapes`", made)
