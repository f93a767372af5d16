"""The quality of a set of images against the reference's, as numbers; the content metrics need `shapes`' networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffpress.benchmarks import quality
from diffpress.benchmarks.candidates import Drawn
from diffpress.benchmarks.prompts import Prompts

RENDERS_SEED = 3_000_017
RENDERS = 4  # drawings of each caption that the Fréchet distance is taken to: the real side should not be the noisy one


@dataclass(frozen=True)
class Content:
    """What an image shows, judged on its own: CLIP score, confirmed attributes, distance to real pictures."""

    clip_score: float | None = None
    attribute_accuracy: float | None = None
    frechet: float | None = None
    attributes: dict[str, float | None] | None = None


class Judging:
    """Scores sets of images of the same prompts; without `shapes`' networks the content metrics are None."""

    def __init__(self, prompts: Prompts) -> None:
        self._judge: Any = None
        self._prompts = prompts
        if prompts.scenes is None:
            return
        from diffpress.benchmarks.shapes import scenes
        from diffpress.benchmarks.shapes.judge import Judge

        self._judge = Judge.load()
        drawn = [
            scenes.render(scene, np.random.default_rng([RENDERS_SEED, index, again]))
            for index, scene in enumerate(prompts.scenes)
            for again in range(RENDERS)
        ]
        self._real = self._judge.features(np.stack(drawn))

    def content(self, pixels: np.ndarray) -> Content:
        """Judge uint8 [N, H, W, 3], one image for each prompt."""
        if self._judge is None:
            return Content()
        from diffpress.benchmarks.shapes.judge import confirmed, shares

        parts = shares(confirmed(self._judge.read(pixels), self._prompts.scenes or []))
        distance = quality.frechet(self._judge.features(pixels), self._real) if len(pixels) > 1 else None
        return Content(
            clip_score=self._judge.clip_score(pixels, self._prompts.texts),
            attribute_accuracy=parts.pop("overall"),
            frechet=distance,
            attributes=parts,
        )


def distances(drawn: Drawn, reference: Drawn) -> dict[str, Any]:
    """How far the same prompts and seeds came out: means over images, the worst PSNR, the median error."""
    psnr = quality.psnr(drawn.pixels, reference.pixels)
    apart = quality.relative_l2(drawn.latents, reference.latents)
    return {
        "images": len(psnr),
        "psnr_db": float(psnr.mean()),
        "psnr_db_worst": float(psnr.min()),
        "ssim": float(quality.ssim(drawn.pixels, reference.pixels).mean()),
        "latent_rel_l2": float(apart.mean()),
        "latent_rel_l2_median": float(np.median(apart)),  # the mean is that of the few images that end elsewhere
    }


def error_per_step(drawn: Drawn, reference: Drawn) -> list[float]:
    """Relative L2 error of the latents after each step, mean over the images of the trajectory."""
    count = min(drawn.trajectory.shape[1], reference.trajectory.shape[1])
    pairs = zip(drawn.trajectory[:, :count], reference.trajectory[:, :count], strict=True)
    return [float(quality.relative_l2(a, b).mean()) for a, b in pairs]


def all_faults(sets: dict[str, Drawn]) -> list[str]:
    """Broken images of every candidate, a line each, the candidate's name first."""
    return [f"{name}, {line}" for name, drawn in sets.items() for line in quality.faults(drawn.pixels, drawn.latents)]


def shown(reference: Drawn, compressed: Drawn, first: int = 8, worst: int = 4) -> list[tuple[int, str]]:
    """Which images a report shows: the first ones, unchosen, and the worst by PSNR. (index, "" or "worst")."""
    psnr = quality.psnr(compressed.pixels, reference.pixels)
    plain: Sequence[int] = range(min(first, len(psnr)))
    bad = [int(i) for i in np.argsort(psnr) if i not in plain][:worst]
    return [(index, "") for index in plain] + [(index, "worst") for index in bad]
