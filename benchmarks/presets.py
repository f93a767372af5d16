"""Every shipped recipe on `shapes`, one row each: `python -m diffpress.benchmarks.presets --work DIR --json FILE`.

Goes on where it was stopped: a recipe whose report is in the work folder is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffpress import api
from diffpress import bundle as bundles
from diffpress.benchmarks.bench import bench
from diffpress.benchmarks.candidates import Reference, own_schedule
from diffpress.compress.recipe import presets


def rows(reports: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for diffusers, one for each recipe, and one for the plain steps that are as fast as `balanced`."""
    first = next(iter(reports.values()))
    quality = first["quality"]
    empty = dict.fromkeys(("psnr_db", "ssim", "latent_rel_l2", "frechet"))
    made: list[dict[str, Any]] = [
        {
            "name": "diffusers",
            "group": "reference",
            "backend": "torch eager fp32",
            "steps": first.get("reference", first["sampling"])["steps"],
            "bytes": first["size_bytes"]["denoiser_reference"],
            **empty,
            "clip_score": quality["clip_score"]["reference"],
            "attribute_accuracy": quality["attribute_accuracy"]["reference"],
            "speedup_vs_eager": 1.0,
            "speedup_same_schedule": 1.0,
            "speedup_vs_uncompressed": None,
            "deploys": True,
        }
    ]
    for name, report in reports.items():
        own = report["quality"]
        bits = 8 if any(done["name"] == "quantize" for done in report["passes"]) else 32
        made.append(
            {
                "name": name,
                "group": "recipe",
                "backend": f"{report['backend']['name']} {report['backend']['precision']}",
                "steps": report["sampling"]["steps"],
                "bits_w": bits,
                "bits_a": bits,
                "bytes": report["size_bytes"]["denoiser_compressed"],
                **{key: own[key] for key in ("psnr_db", "ssim", "latent_rel_l2")},
                **{key: own[key]["compressed"] for key in ("clip_score", "attribute_accuracy", "frechet")},
                "speedup_vs_eager": report["speedup"]["vs_eager"],
                "speedup_same_schedule": report["speedup"]["vs_eager_same_schedule"],
                "speedup_vs_uncompressed": report["speedup"]["vs_uncompressed_export"],
                "deploys": True,
            }
        )
    if "balanced" in reports:
        made += _baseline(reports["balanced"])
    return made


def _baseline(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    row = report["fewer_plain_steps"]
    if row["steps"] is None:
        return []
    # Timed against the compressed bundle alone, so the paired ratio carries over and the milliseconds do not.
    ratio, speedup = row["latency_ratio"], report["speedup"]
    return [
        {
            "name": f"{row['steps']} plain {row['schedule']} steps",
            "group": "equal latency to balanced",
            "backend": f"{report['backend']['name']} {report['backend']['precision']}",
            "steps": row["steps"],
            "bytes": report["size_bytes"]["denoiser_reference"],
            **{key: row.get(key) for key in ("psnr_db", "ssim", "latent_rel_l2", "clip_score", "frechet")},
            "attribute_accuracy": row["attribute_accuracy"],
            "speedup_vs_eager": speedup["vs_eager"] / ratio,
            "speedup_same_schedule": None,
            "speedup_vs_uncompressed": speedup["vs_uncompressed_export"] / ratio,
            "deploys": True,
        }
    ]


@dataclass(frozen=True)
class Remembered(Reference):
    """Draws the same images once, as the reference of every recipe; timing is not cut short."""

    drawn: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def __call__(self, prompts: list[str], seeds: list[int], *, keep_latents: bool = False) -> Any:
        """As `Reference` does."""
        if not keep_latents:  # as timing calls it
            return super().__call__(prompts, seeds)
        key = (*prompts, *seeds)
        if key not in self.drawn:
            self.drawn[key] = super().__call__(prompts, seeds, keep_latents=True)
        return self.drawn[key]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/presets"), help="bundles and reports live here")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--only", nargs="*", default=sorted(presets()), help="recipes to measure")
    options = parser.parse_args()
    reports: dict[str, Any] = {}
    reference: Remembered | None = None
    for name in options.only:
        folder = options.work / name
        if not (folder / bundles.MANIFEST).exists():
            api.compress("shapes", name, folder)
        report = folder / "report" / "report.json"
        if not report.exists():
            if reference is None:
                manifest = bundles.read(folder).manifest
                reference = Remembered.load("shapes", *own_schedule(manifest))
            bench(folder, "shapes", options.images, uncompressed=options.work / "fp32", reference=reference)
        reports[name] = json.loads(report.read_text("utf-8"))
    last = next(reversed(reports.values()))
    document = {
        **{key: last[key] for key in ("machine", "versions", "sampling")},
        "images": last["quality"]["images"],
        "rows": rows(reports),
    }
    options.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
