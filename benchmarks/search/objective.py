"""What a search lowers and the limits it keeps: losses by name, budgets as gates, the front, the choice.

Budgets are `diffpress.gates`, and what they are held against has the keys of a `report.json`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffpress import gates
from diffpress.benchmarks.bootstrap import interval
from diffpress.errors import DiffpressError
from diffpress.gates import Gate

Measured = Mapping[str, Any]  # of one recipe: speedup, quality, size_bytes and faults, as in `report.json`


@dataclass(frozen=True)
class Loss:
    """A number that a search lowers. `apart`: a distance to the reference's images, which few images tell already.

    `steadier` decides between candidates that the images do not tell apart, where single images weigh much in `of`.
    """

    words: str
    of: Callable[[Measured], float]
    apart: bool = False
    steadier: Callable[[Measured], float] | None = None


def _lost(metric: str, scale: float = 1.0) -> Callable[[Measured], float]:
    return lambda found: scale * (found["quality"][metric]["reference"] - found["quality"][metric]["compressed"])


def _median(found: Measured) -> float:
    return float(found["quality"]["latent_rel_l2_median"])


LOSSES = {
    # One image in tens ends as another picture under nearly any change, and is most of the mean then.
    "latent_error": Loss("latent error", lambda found: float(found["quality"]["latent_rel_l2"]), True, _median),
    "latent_error_median": Loss("median latent error", _median, apart=True),
    "psnr_loss": Loss("PSNR below 0 dB", lambda found: -float(found["quality"]["psnr_db"]), apart=True),
    "ssim_loss": Loss("SSIM below 1", lambda found: 1 - float(found["quality"]["ssim"]), apart=True),
    "clip_loss": Loss("CLIP score lost", _lost("clip_score")),
    "attribute_loss": Loss("attributes lost, points", _lost("attribute_accuracy", 100.0)),
    "frechet": Loss("Fréchet distance", lambda found: float(found["quality"]["frechet"]["compressed"])),
}
# Those that only `shapes` has judges for.
JUDGED = {"clip_loss", "attribute_loss", "frechet", "clip", "attribute_accuracy"}
BUDGETS = (
    "speedup", "speedup_vs_uncompressed", "bytes", "psnr", "psnr_worst", "ssim", "latent_error", "latent_error_median",
    "clip", "frechet", "attribute_accuracy",
)  # fmt: skip
UNMEASURED = 1e3  # how far a limit is missed by what was not measured


def check(minimise: str, budgets: Sequence[Gate], shapes: bool) -> None:
    """Raise `DiffpressError` for what a search does not measure, of this model or at all."""
    if minimise not in LOSSES:
        raise DiffpressError(f"--minimise: there is no loss '{minimise}', choose from: {', '.join(LOSSES)}")
    for gate in budgets:
        if gate.metric not in BUDGETS:
            raise DiffpressError(
                f"--budget '{gate}': a search does not measure {gate.metric}, choose from: {', '.join(BUDGETS)}"
            )
    judged = [name for name in (minimise, *(gate.metric for gate in budgets)) if name in JUDGED]
    if judged and not shapes:
        raise DiffpressError(f"{judged[0]} needs judges that only 'shapes' comes with: take latent_error, psnr or ssim")


def missed(gate: Gate, found: Measured) -> float:
    """By how much a limit is missed, as a share of it; 0 or less where it is kept."""
    value = gate.measure(found)
    if value is None or not math.isfinite(value):
        return UNMEASURED
    if gate.passes(value):
        return min(0.0, -abs(value - gate.limit) / max(abs(gate.limit), 1.0))
    return max(abs(value - gate.limit) / max(abs(gate.limit), 1e-9), 1e-9)


def keeps(budgets: Sequence[Gate], found: Measured) -> bool:
    """Whether every limit is kept."""
    return all(missed(gate, found) <= 0 for gate in budgets)


def failed(budgets: Sequence[Gate], found: Measured) -> str:
    """The limits that are missed, each with its number."""
    told = []
    for gate in budgets:
        if missed(gate, found) > 0:
            value = gate.measure(found)
            told.append(f"{gate} (reached {'nothing' if value is None else gates.number(value) + gate.unit})")
    return ", ".join(told)


def speed(found: Measured) -> float:
    """End to end against eager diffusers."""
    return float(found["speedup"]["vs_eager"])


def front(points: Sequence[tuple[float, float]], margin: float = 0.0) -> list[int]:
    """Which of (speedup, loss) nothing beats: nothing as fast and as good, and better in one of the two.

    With a `margin` those that are beaten by less than it stay, too: by a factor of 1 + margin in speed, and in loss by
    the share `margin` of its size.
    """
    kept = []
    for index, (fast, loss) in enumerate(points):
        least = loss - margin * abs(loss)
        beaten = any(
            other_fast >= fast * (1 + margin) and other_loss <= least and (other_fast > fast or other_loss < loss)
            for other_fast, other_loss in points
        )
        if not beaten and math.isfinite(loss):
            kept.append(index)
    return kept


def choose(candidates: Sequence[Measured], loss: Loss, budgets: Sequence[Gate]) -> int | None:
    """The candidate that loses least, as `least` says, among those within all limits; None where none is."""
    within = [index for index, found in enumerate(candidates) if keeps(budgets, found)]
    best = least([candidates[index] for index in within], loss)
    return None if best is None else within[best]


def least(candidates: Sequence[Measured], loss: Loss) -> int | None:
    """The candidate with the least loss, the faster of equals; None of none.

    Of those whose images do not tell them from it, as `alike` says, the one with the least `steadier` number.
    """
    order = sorted(range(len(candidates)), key=lambda i: (loss.of(candidates[i]), -speed(candidates[i])))
    if not order or (steadier := loss.steadier) is None:
        return order[0] if order else None
    best = candidates[order[0]]
    near = [i for i in order if steadier(candidates[i]) <= steadier(best) and alike(candidates[i], best)]
    return min(near, key=lambda i: (steadier(candidates[i]), -speed(candidates[i])), default=order[0])


def alike(one: Measured, best: Measured) -> bool:
    """Whether the errors of the same images may have one mean: 0 is within the interval of their paired differences.

    The interval is `bootstrap.interval`'s; a single image tells nothing apart.
    """
    found = interval(np.subtract(one["errors"], best["errors"]))
    return found is None or found[0] <= 0 <= found[1]


def nearest(candidates: Sequence[Measured], budgets: Sequence[Gate]) -> int:
    """The candidate that misses the limits by least, in all."""
    return min(range(len(candidates)), key=lambda i: sum(max(0.0, missed(gate, candidates[i])) for gate in budgets))
