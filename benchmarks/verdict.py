"""What the numbers of a report say, in words: the verdict, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Mean PSNR in dB and what it looks like; where two pictures differ by noise alone, 40 dB is out of sight.
LOOKS = (
    (42.0, "indistinguishable from the reference by eye"),
    (34.0, "nearly identical to the reference"),
    (27.0, "close to the reference"),
    (20.0, "different from the reference in visible details"),
    (0.0, "different pictures from the reference"),
)
SAME_DB = 0.5  # a smaller difference in PSNR decides nothing
SAME_POINTS = 1.0  # neither does one in attribute accuracy, in percentage points


@dataclass(frozen=True)
class Verdict:
    """The first thing a report says. `rival` is "better", "worse", "equal", "mixed" or "none": fewer plain steps."""

    headline: str
    quality: str
    rival: str
    rival_text: str


def verdict(report: Mapping[str, Any]) -> Verdict:
    """Judge a report; every claim is a number of it."""
    ratio = size_ratio(report)
    times = f"{report['speedup']['vs_eager']:.1f}\N{MULTIPLICATION SIGN} faster than diffusers"
    if rescheduled(report):
        times += f" ({report['speedup']['vs_eager_same_schedule']:.1f}\N{MULTIPLICATION SIGN} at equal steps)"
    size = f"denoiser at {ratio:.0%} of its size" if ratio else "denoiser of unknown size"
    psnr = report["quality"]["psnr_db"]
    rival, text = _rival(report)
    if report["faults"]:
        return Verdict(f"{times}, {size}, but images are broken", _broken(report["faults"]), rival, text)
    return Verdict(
        f"{times}, {size}", f"Pictures are {looks(psnr)} (PSNR {psnr:.1f} dB).{_content(report)}", rival, text
    )


def looks(psnr_db: float) -> str:
    """What a mean PSNR looks like."""
    return next((words for bound, words in LOOKS if psnr_db >= bound), LOOKS[-1][1])


def schedule(sampling: Mapping[str, Any]) -> str:
    """A schedule in words, from a report's entry for it."""
    return f"{sampling['scheduler']}, {sampling['steps']} steps"


def rescheduled(report: Mapping[str, Any]) -> bool:
    """Whether the compressed steps are others than the reference's, so that they cannot be compared one by one."""
    errors = report["per_step"]["latent_rel_l2"]
    return "compressed" in errors and errors["compressed"] is None


def size_ratio(report: Mapping[str, Any]) -> float | None:
    """Bytes of the compressed denoiser over those of its FP32 weights."""
    reference = report["size_bytes"]["denoiser_reference"]
    return report["size_bytes"]["denoiser_compressed"] / reference if reference else None


def _broken(faults: list[str]) -> str:
    more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"Broken images: {faults[0]}{more}. Do not ship this bundle."


def _content(report: Mapping[str, Any]) -> str:
    accuracy = report["quality"]["attribute_accuracy"]
    if accuracy["reference"] is None or accuracy["compressed"] is None:
        return ""
    points = 100 * (accuracy["compressed"] - accuracy["reference"])
    change = (
        "as many as" if abs(points) < 0.05 else f"{abs(points):.1f} points {'more' if points > 0 else 'fewer'} than"
    )
    return f" They show {accuracy['compressed']:.1%} of the colours and shapes asked for, {change} the reference."


def _rival(report: Mapping[str, Any]) -> tuple[str, str]:
    """Compare with fewer plain steps: fidelity by PSNR, content by attribute accuracy where it is known."""
    row, own = report["fewer_plain_steps"], report["quality"]
    if row["steps"] is None:
        return "none", "Not even one step of the uncompressed export is as fast: there is nothing to compare with."
    fidelity = _sign(row["psnr_db"] - own["psnr_db"], SAME_DB)
    accuracy = own["attribute_accuracy"]["compressed"]
    content = 0
    words = f"PSNR {row['psnr_db']:.1f} dB against {own['psnr_db']:.1f} dB"
    if accuracy is not None and row["attribute_accuracy"] is not None:
        content = _sign(100 * (row["attribute_accuracy"] - accuracy), SAME_POINTS)
        words += f", attribute accuracy {row['attribute_accuracy']:.1%} against {accuracy:.1%}"
    plural = "step" if row["steps"] == 1 else "steps"
    start = f"In the same time the uncompressed export does {row['steps']} plain {row['schedule']} {plural}: {words}. "
    if fidelity * content < 0:
        return "mixed", start + "Each is better in one of the two."
    total = fidelity + content
    if total > 0:
        return "better", start + "Fewer plain steps would have been the better choice here."
    if total < 0:
        return "worse", start + "Compression is the better choice here."
    return "equal", start + "Neither is better by more than chance."


def _sign(difference: float, threshold: float) -> int:
    return 0 if abs(difference) < threshold else (1 if difference > 0 else -1)


def size(count: float | None) -> str:
    """Bytes in powers of ten."""
    if count is None:
        return "\N{EN DASH}"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def milliseconds(value: float | None) -> str:
    """Three figures, in ms or s."""
    if value is None:
        return "\N{EN DASH}"
    if value >= 10_000:
        return f"{value / 1000:.1f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def table(report: Mapping[str, Any]) -> str:
    """The compact table that the command line prints after a demo, in aligned columns."""
    names = {
        "reference_eager": "diffusers FP32",
        "uncompressed_export": "ONNX, uncompressed",
        "compressed": "compressed",
    }
    own, row = report["quality"], report["fewer_plain_steps"]
    p50 = {name: report["latency"][name]["p50_ms"] for name in names}
    accuracy = own["attribute_accuracy"]
    lines = [["", "latency", "speedup", "denoiser", "peak memory", "PSNR", "attributes"]]
    faster = {
        "reference_eager": 1.0,
        "uncompressed_export": report["speedup"]["vs_eager"] / report["speedup"]["vs_uncompressed_export"],
        "compressed": report["speedup"]["vs_eager"],
    }
    for name, label in names.items():
        compressed = name == "compressed"
        lines.append(
            [
                label,
                milliseconds(p50[name]),
                f"{faster[name]:.1f}x",
                size(report["size_bytes"]["denoiser_compressed" if compressed else "denoiser_reference"]),
                size(report["peak_rss_bytes"][name]),
                f"{own['psnr_db']:.1f} dB" if compressed else "",
                _percent(accuracy["compressed"] if compressed else accuracy["reference"])
                if name != "uncompressed_export"
                else "",
            ]
        )
    if row["steps"] is not None:
        label = f"{row['steps']} plain {row['schedule']} steps"
        # Timed against the compressed bundle alone, so the paired ratio carries over and the milliseconds do not.
        latency = milliseconds(p50["compressed"] * row["latency_ratio"])
        lines.append(
            [
                label,
                latency,
                f"{report['speedup']['vs_eager'] / row['latency_ratio']:.1f}x",
                size(report["size_bytes"]["denoiser_reference"]),
                "",
                f"{row['psnr_db']:.1f} dB",
                _percent(row["attribute_accuracy"]),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = (
        line[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )
    return "\n".join(text.rstrip() for text in rows)


def notes(report: Mapping[str, Any]) -> list[str]:
    """What the table has no place for, a line each: how sure the speedup is, throughput, cold start, the roofline."""
    low, high = report["speedup_interval"]["vs_eager"] or (None, None)
    lines = [] if low is None else [f"speedup over diffusers: {low:.2f} to {high:.2f} (95 % interval)"]
    rates = {row["batch"]: row["images_per_second"].get("compressed") for row in report["throughput"]}
    known = ", ".join(f"{rate:.3g} at batch {batch}" for batch, rate in rates.items() if rate)
    lines += [f"images per second: {known}"] if known else []
    start = report["cold_start_ms"]
    lines += [f"cold start: {milliseconds(start['compressed'])}, diffusers {milliseconds(start['reference_eager'])}"]
    backend = report["backend"]
    for row in report["roofline"]["images"]:
        own = (row["candidate"], row["backend"], row["precision"])
        if own == ("compressed", backend["name"], backend["precision"]) and row["share_of_ceiling"] is not None:
            lines.append(
                f"denoising runs at {row['share_of_ceiling']:.0%} of what this machine's arithmetic and memory allow"
            )
    return lines + [f"{name}: {metric['note']}" for name, metric in report["metrics"].items() if metric["note"]]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
