"""The quality of a set of images against the reference's, as numbers with their intervals over prompts.

What an image shows is judged by the networks of `shapes` where its captions are drawn, and by networks that the user
gives (`networks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffpress.benchmarks import quality
from diffpress.benchmarks.bootstrap import interval, share
from diffpress.benchmarks.candidates import Drawn
from diffpress.benchmarks.networks import CLIP, FRECHET, LPIPS, SOURCES, Networks
from diffpress.benchmarks.prompts import Prompts

RENDERS_SEED = 3_000_017
RENDERS = 4  # drawings of each caption that the Fréchet distance is taken to: the real side should not be the noisy one
DISTANCES = ("psnr_db", "ssim", "latent_rel_l2")  # and LPIPS, where it is known
ATTRIBUTES = "attribute_accuracy"

Rows = dict[str, np.ndarray]  # a metric by prompt: [N], or (how many, of how many) [N, 2]


@dataclass(frozen=True)
class Content:
    """What an image shows, judged on its own: CLIP score, confirmed attributes, distance to real pictures."""

    clip_score: float | None = None
    attribute_accuracy: float | None = None
    frechet: float | None = None
    attributes: dict[str, float | None] | None = None


class Judging:
    """Scores sets of images of the same prompts; what no network is there for is None.

    The Fréchet distance is to drawings of the captions for `shapes`, else to the images of `reference` (uint8
    [N, H, W, 3]), which have none themselves.
    """

    def __init__(self, prompts: Prompts, networks: Networks | None = None, reference: np.ndarray | None = None) -> None:
        self.networks = networks or Networks()
        self._judge: Any = None
        self.prompts, self._reference = prompts, reference
        self._real: np.ndarray | None = None  # features
        if prompts.scenes is None:
            if reference is not None:
                self._real = self._features(reference)
            return
        from diffpress.benchmarks.shapes import scenes
        from diffpress.benchmarks.shapes.judge import Judge

        self._judge = Judge.load()
        drawn = [
            scenes.render(scene, np.random.default_rng([RENDERS_SEED, index, again]))
            for index, scene in enumerate(prompts.scenes)
            for again in range(RENDERS)
        ]
        self._real = self._features(np.stack(drawn))

    def content(self, pixels: np.ndarray) -> Content:
        """Judge uint8 [N, H, W, 3], one image for each prompt."""
        return self.judge(pixels)[0]

    def judge(self, pixels: np.ndarray) -> tuple[Content, Rows]:
        """As `content`, and the CLIP score and the confirmed attributes by prompt."""
        rows: Rows = {}
        parts: dict[str, float | None] | None = None
        features = None if self._judge is None else self._judge.features(pixels)
        scores = self._clip_scores(pixels, features)
        if scores is not None:
            rows[CLIP] = scores
        if self._judge is not None:
            from diffpress.benchmarks.shapes.judge import by_prompt, confirmed, shares

            marks = confirmed(self._judge.read(pixels), self.prompts.scenes or [])
            parts, rows[ATTRIBUTES] = shares(marks), by_prompt(marks)
        found = Content(
            clip_score=None if scores is None else float(scores.mean()),
            attribute_accuracy=parts.pop("overall") if parts else None,
            frechet=self._distance(pixels, features),
            attributes=parts,
        )
        return found, rows

    def lpips(self, pixels: np.ndarray, reference: np.ndarray) -> np.ndarray | None:
        """LPIPS of each image [N]; None where its weights were not given."""
        network = self.networks.lpips
        return None if network is None else self.networks.attempt(LPIPS, lambda: network.distances(pixels, reference))

    def metrics(self) -> dict[str, dict[str, str | None]]:
        """By metric of a network: what measured it, and a note where nothing did."""
        own = {CLIP: "CLIP of shapes", FRECHET: "CLIP of shapes"} if self._judge is not None else {}
        found: dict[str, dict[str, str | None]] = {}
        for metric, source in SOURCES.items():
            path = self.networks.paths.get(metric)
            by = path.name if path else own.get(metric)
            note = self.networks.notes.get(metric) or (None if by else source.note)
            found[metric] = {"by": by, "note": note}
        to = "drawings of the captions" if self._judge is not None else "the reference's images"
        found[FRECHET]["to"] = to if found[FRECHET]["by"] else None
        return found

    def _clip_scores(self, pixels: np.ndarray, features: np.ndarray | None) -> np.ndarray | None:
        network, texts = self.networks.clip, self.prompts.texts
        if network is not None:
            return self.networks.attempt(CLIP, lambda: network.scores(pixels, texts))
        return None if features is None else self._judge.clip_scores(features, texts)

    def _features(self, pixels: np.ndarray) -> np.ndarray | None:
        network = self.networks.inception
        if network is not None:
            return self.networks.attempt(FRECHET, lambda: network.features(pixels))
        return None if self._judge is None else self._judge.features(pixels)

    def _distance(self, pixels: np.ndarray, features: np.ndarray | None) -> float | None:
        if self._real is None or len(pixels) < 2 or (pixels is self._reference and self._judge is None):
            return None
        own = features if self.networks.inception is None else self._features(pixels)
        return None if own is None else quality.frechet(own, self._real)


def each(drawn: Drawn, reference: Drawn) -> Rows:
    """How far every image came out from the same prompt and seed of the reference: `DISTANCES`, [N] each."""
    return {
        "psnr_db": quality.psnr(drawn.pixels, reference.pixels),
        "ssim": quality.ssim(drawn.pixels, reference.pixels),
        "latent_rel_l2": quality.relative_l2(drawn.latents, reference.latents),
    }


def distances(drawn: Drawn, reference: Drawn, rows: Rows | None = None) -> dict[str, Any]:
    """How far the same prompts and seeds came out: means over images, the worst PSNR, the median error.

    `rows` is what `each` found, where that is known already.
    """
    found = rows or each(drawn, reference)
    psnr, apart = found["psnr_db"], found["latent_rel_l2"]
    return {
        "images": len(psnr),
        "psnr_db": float(psnr.mean()),
        "psnr_db_worst": float(psnr.min()),
        "ssim": float(found["ssim"].mean()),
        "latent_rel_l2": float(apart.mean()),
        "latent_rel_l2_median": float(np.median(apart)),  # the mean is that of the few images that end elsewhere
    }


def intervals(rows: Rows, reference: Rows, compressed: Rows) -> dict[str, Any]:
    """95 % bootstrap intervals over prompts: of distances, and of what is judged on each side and of its change.

    `rows` are distances by prompt, the others what `Judging.judge` found. A Fréchet distance has none: images that are
    drawn twice look like a smaller set to it, whose distance is larger.
    """
    found: dict[str, Any] = {name: interval(values) for name, values in rows.items()}
    for name in sorted(reference.keys() & compressed.keys()):
        shares = reference[name].ndim == 2
        how = (share,) if shares else ()
        change = compressed[name] - reference[name]
        if shares:
            change[:, 1] = reference[name][:, 1]  # as many are asked for on both sides
        sides = {"reference": reference[name], "compressed": compressed[name], "change": change}
        found[name] = {side: interval(values, *how) for side, values in sides.items()}
    return found


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
