"""Quality gates: what a bundle has to reach, a line each. Standard library only; `benchmarks.gates` judges them.

    speedup >= 3                     the number itself
    attribute_accuracy >= -1.0pt     percentage points more or less than the reference
    clip >= -0.2%                    change in percent of the reference
    bytes <= 0.3x                    a multiple of the reference

The reference is what a report compares with: diffusers in FP32 with the same prompts and seeds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffpress.errors import DiffpressError

ITSELF, RATIO = ("",), ("", "x")  # units of what is measured against the reference already
CHANGE = ("", "%", "x")
SHARE = (*CHANGE, "pt")
CLOSE = 1e-9  # 98 % minus 99 % is one point and a rounding error; it passes a limit of one point


@dataclass(frozen=True)
class Metric:
    """A number of `report.json` and that of the reference, by their keys; `points` makes percentage points of both."""

    value: str
    reference: str = ""
    units: tuple[str, ...] = CHANGE
    points: float = 1.0
    absent: str = "the report does not have it"


def _percentile(name: str) -> Metric:
    return Metric(f"latency.compressed.{name}", f"latency.reference_eager.{name}")


METRICS = {
    "speedup": Metric("speedup.vs_eager", units=RATIO),
    "speedup_vs_uncompressed": Metric("speedup.vs_uncompressed_export", units=RATIO),
    "p50_ms": _percentile("p50_ms"),
    "p90_ms": _percentile("p90_ms"),
    "p99_ms": _percentile("p99_ms"),
    "cold_start_ms": Metric("cold_start_ms.compressed", "cold_start_ms.reference_eager"),
    "bytes": Metric(
        "size_bytes.denoiser_compressed", "size_bytes.denoiser_reference", absent="the size of its model is not known"
    ),
    "bundle_bytes": Metric("size_bytes.bundle", units=ITSELF),
    "peak_rss_bytes": Metric("peak_rss_bytes.compressed", "peak_rss_bytes.reference_eager"),
    "psnr": Metric("quality.psnr_db", units=ITSELF),
    "psnr_worst": Metric("quality.psnr_db_worst", units=ITSELF),
    "ssim": Metric("quality.ssim", units=ITSELF),
    "lpips": Metric("quality.lpips", units=ITSELF, absent="no weights of LPIPS were there"),
    "latent_error": Metric("quality.latent_rel_l2", units=ITSELF),
    "latent_error_median": Metric("quality.latent_rel_l2_median", units=ITSELF),
    # CLIP scores are a hundred times a cosine, so they are points already.
    "clip": Metric(
        "quality.clip_score.compressed", "quality.clip_score.reference", SHARE, absent="no CLIP model judged the images"
    ),
    "frechet": Metric(
        "quality.frechet.compressed",
        "quality.frechet.reference",
        absent="that takes two images and a network to judge them",
    ),
    "attribute_accuracy": Metric(
        "quality.attribute_accuracy.compressed",
        "quality.attribute_accuracy.reference",
        SHARE,
        points=100.0,
        absent="only the captions of 'shapes' have a network that reads images",
    ),
    "faults": Metric("faults", units=ITSELF),  # broken images, of whichever side
}

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_GATE = re.compile(rf"\s*(\w+)\s*(>=|<=|>|<)\s*({_NUMBER})\s*(pt|%|x)?\s*")
_KNOWN = f"metrics: {', '.join(METRICS)}"


@dataclass(frozen=True)
class Gate:
    """A metric and its limit, in `unit`: "", "pt", "%" or "x"."""

    metric: str
    operator: str
    limit: float
    unit: str

    def __str__(self) -> str:
        return f"{self.metric} {self.operator} {self.limit:.12g}{self.unit}"

    def passes(self, measured: float) -> bool:
        """Whether what was measured, in this gate's unit, keeps the limit."""
        if math.isclose(measured, self.limit, rel_tol=CLOSE, abs_tol=CLOSE):
            return self.operator.endswith("=")
        return (measured > self.limit) == self.operator.startswith(">")

    def measure(self, report: Mapping[str, Any]) -> float | None:
        """The report's number in this gate's unit; None where it was not measured, NaN where there is no number."""
        metric = METRICS[self.metric]
        value = _at(report, metric.value)
        if value is None or not self.unit or not metric.reference:
            return value
        reference = _at(report, metric.reference)
        if reference is None:
            return None
        if self.unit == "pt":
            return metric.points * (value - reference)
        if not reference:
            return math.nan
        return value / reference if self.unit == "x" else 100 * (value - reference) / abs(reference)


def parse(text: str) -> Gate:
    """Read a gate such as "clip >= -0.2%"; raises `DiffpressError` that names the metrics, or the units of one."""
    found = _GATE.fullmatch(text)
    if found is None:
        raise DiffpressError(
            f"gate '{text}' is not understood: write METRIC >= NUMBER, as in 'speedup >= 3', 'clip >= -0.2%' or "
            f"'attribute_accuracy >= -1pt' (also <=, > and <); {_KNOWN}"
        )
    name, operator, limit, unit = found.groups(default="")
    if name not in METRICS:
        raise DiffpressError(f"gate '{text}': nothing measures '{name}'; {_KNOWN}")
    units = METRICS[name].units
    if unit not in units:
        others = f" or one with {' or '.join(units[1:])}" if units[1:] else ""
        raise DiffpressError(f"gate '{text}': {name} is not measured in '{unit}': write a plain number{others}")
    return Gate(name, operator, float(limit), unit)


def described(entry: Mapping[str, Any]) -> str:
    """A judged gate (an entry of a report's "gates") with its number: "speedup >= 3 (measured 2.4)"."""
    return f"{entry['gate']} ({measured(entry)})"


def measured(entry: Mapping[str, Any]) -> str:
    """The number of a judged gate in words, with as many digits as tell it from its limit."""
    value, limit = entry["measured"], entry["limit"]
    if value is None:
        return str(entry["problem"])
    short = number(value)
    told = short if value == limit or short != number(limit) else f"{value:.10g}"
    return f"measured {told}{entry['unit']}"


def failures(manifest: Mapping[str, Any]) -> str | None:
    """What a bundle failed by, from its manifest; None for one that is not marked as failed."""
    if not manifest.get("failed"):
        return None
    return "; ".join(described(entry) for entry in manifest.get("gates", ()) if not entry["passed"])


def number(value: float) -> str:
    """Four figures, and all of a large number's before the point."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _at(report: Mapping[str, Any], path: str) -> float | None:
    """What stands at a path of keys, a list by its length; None where there is nothing."""
    found: Any = report
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return len(found) if isinstance(found, list) else found
