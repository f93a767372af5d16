"""Reports side by side, as data and as text; `compare_page` draws them.

Runs can be compared that drew the same prompts and seeds, and were held against the same reference of the same model.
A time belongs to its machine: from different ones only ratios are kept, each to what ran beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffpress import bundle as bundles
from diffpress import gates
from diffpress.benchmarks.candidates import COMPRESSED, PLAIN
from diffpress.benchmarks.verdict import milliseconds, schedule, size, size_ratio
from diffpress.bundle import sha256
from diffpress.errors import DiffpressError

REPORT = "report/report.json"  # in a bundle
NEEDED = ("bundle", "model", "sampling", "prompts", "speedup", "latency", "quality", "size_bytes", "machine", PLAIN)
MACHINE = ("processor", "cores", "instructions", "memory_bytes", "system")
RIVAL = ("schedule", "steps", "latency_ratio", "psnr_db", "latent_rel_l2", "attribute_accuracy")  # nothing in ms
SIZES = ("denoiser_reference", "denoiser_compressed", "bundle")
DASH = "\N{EN DASH}"

Report = Mapping[str, Any]


def compare(sources: Sequence[str]) -> dict[str, Any]:
    """What bundles or report files say, ready for JSON: what they share, notes, and a run each, in their order.

    Raises `DiffpressError` for one that holds no report, and for those that cannot be compared honestly.
    """
    if len(set(sources)) < max(2, len(sources)):
        raise DiffpressError("comparing takes two runs or more, each named once: bundles or report.json files")
    reports = [_read(source) for source in sources]
    try:
        document = _document(sources, reports)
        rows(document)  # all that will be shown is there
    except (AttributeError, KeyError, TypeError) as error:
        raise DiffpressError(f"one of the reports is not whole ({error!r}): bench the bundles again") from error
    return document


def _document(sources: Sequence[str], reports: Sequence[Report]) -> dict[str, Any]:
    first = reports[0]
    for source, report in zip(sources[1:], reports[1:], strict=True):
        _check(sources[0], first, source, report)
    machines = [{key: report["machine"].get(key) for key in MACHINE} for report in reports]
    same = all(machine == machines[0] for machine in machines)
    names = [str(report["bundle"]) for report in reports]
    if len(set(names)) < len(names):
        names = list(sources)
    runs = [_run(name, source, report, same) for name, source, report in zip(names, sources, reports, strict=True)]
    shared = {"model": dict(first["model"]), "reference": _reference(first), "prompts": dict(first["prompts"])}
    return {**shared, "same_machine": same, "notes": _notes(same, runs), "runs": runs}


def _read(source: str) -> Report:
    """The report of a bundle, or of a file."""
    file = Path(source)
    if file.is_dir() or file.suffix == ".tar":
        bundle = bundles.read(file)
        file = bundle.file(REPORT)
        if not file.is_file():
            raise DiffpressError(f"{source} was not measured yet: diffpress bench {source} --against MODEL")
        if bundle.manifest["files"].get(REPORT) != sha256(file):
            raise DiffpressError(f"{file} has changed since it was measured: bench the bundle again")
    try:
        report = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise DiffpressError(f"{source} is neither a bundle nor a report: {error.strerror or error}") from error
    except ValueError as error:
        raise DiffpressError(f"{source} is not a report: it is not JSON") from error
    missing = [key for key in NEEDED if not isinstance(report, dict) or key not in report]
    if missing:
        raise DiffpressError(f"{source} is not a report of 'diffpress bench': it has no {', '.join(missing)}")
    return report


def _check(first: str, a: Report, other: str, b: Report) -> None:
    """Raise unless the two were measured on the same thing."""
    checks: dict[str, tuple[Callable[[Report], Any], Callable[[Report], str], str]] = {
        "was made from": (_identity, _model, "compare bundles of one model"),
        "was held against": (_reference, _sampled, "compare bundles made with the same --steps and guidance"),
    }
    for verb, (of, words, advice) in checks.items():
        if of(a) != of(b):
            raise DiffpressError(f"{other} {verb} {words(b)}, {first} {verb} {words(a)}: {advice}")
    # A report from before prompts had a digest is taken at its word.
    source = "digest" if "digest" in a["prompts"] and "digest" in b["prompts"] else "source"
    if any(a["prompts"].get(key) != b["prompts"].get(key) for key in (source, "count", "seeds")):
        advice = "bench them with the same --prompts and --images"
        raise DiffpressError(f"{other} was judged on {_prompts(b)}, {first} on {_prompts(a)}: {advice}")


def _identity(report: Report) -> tuple[Any, ...]:
    """Tells models apart: the digest of the files, and the LoRAs that were fused."""
    model = report["model"]
    return model.get("digest") or model.get("source"), model.get("lora")


def _model(report: Report) -> str:
    model = report["model"]
    loras = "".join(f" with {entry.get('file')}" for entry in model.get("lora") or ())
    return f"'{model.get('source')}'{loras} (digest {str(model.get('digest'))[:8]})"


def _reference(report: Report) -> dict[str, Any]:
    """The schedule of the reference; a report from before there was a choice has one for both sides."""
    return dict(report.get("reference") or report["sampling"])


def _sampled(report: Report) -> str:
    own = _reference(report)
    return f"{schedule(own)}, guidance {own['guidance_scale']:g}, {own['width']}x{own['height']} pixels"


def _prompts(report: Report) -> str:
    found = report["prompts"]
    digest = f", digest {found['digest'][:8]}" if "digest" in found else ""
    return f"{found['count']} images ({found['source']}, seeds {found['seeds']}{digest})"


def _run(name: str, source: str, report: Report, times: bool) -> dict[str, Any]:
    """What is kept of a report; without `times` nothing that depends on the machine alone."""
    rival = report[PLAIN]
    run = {
        "name": name,
        "source": source,
        **{key: report.get(key) for key in ("created", "recipe", "sampling", "backend", "machine", "versions")},
        "full_steps": report["program"]["marks"].count("#"),
        **{key: report.get(key) for key in ("speedup", "speedup_interval", "quality", "quality_interval")},
        "size_bytes": {key: report["size_bytes"][key] for key in SIZES},
        PLAIN: {key: rival.get(key) for key in RIVAL},
        "faults": len(report["faults"]),
        "gates": [entry if times else _timeless(entry) for entry in report.get("gates") or ()],
        "passed": report.get("passed"),
    }
    if times:
        run |= {"latency": report["latency"], "peak_rss_bytes": report["peak_rss_bytes"]}
    return run


def _timeless(entry: Report) -> dict[str, Any]:
    """A judged gate without its number, where that is a time."""
    gate = gates.parse(entry["gate"])
    is_time = gate.metric.endswith("_ms") and not gate.unit
    return {**entry, "measured": None, "problem": "a time of its own machine"} if is_time else dict(entry)


def _notes(same: bool, runs: Sequence[Report]) -> list[str]:
    notes = []
    if not same:
        notes.append(
            "The machines differ: no times and no memory are shown, only ratios to what ran on the same machine, which "
            "depend on the machine, too."
        )
    names = dict.fromkeys(name for run in runs for name in run["versions"] or ())
    found = {name: [(run["versions"] or {}).get(name, DASH) for run in runs] for name in names}
    differ = [f"{name} ({', '.join(versions)})" for name, versions in found.items() if len(set(versions)) > 1]
    if differ:
        notes.append(f"Versions differ: {', '.join(differ)}.")
    if any(run["speedup_interval"] or run["quality_interval"] for run in runs):
        notes.append("In brackets: 95 % confidence intervals.")
    for run in runs:
        if run["faults"]:
            notes.append(f"{run['name']}: images are broken, see its report.")
        failed = [gates.described(entry) for entry in run["gates"] if not entry["passed"]]
        notes += [f"{run['name']} failed: {'; '.join(failed)}."] if failed else []
    return notes


def rows(document: Report) -> list[tuple[str, list[str]]]:
    """The lines of the comparison: what each is about, and a cell per run; those that no run has are left out."""
    lines: dict[str, Callable[[Report], str]] = {
        "recipe": lambda run: str(run["recipe"] or DASH),
        "steps": _steps,
        "backend": lambda run: f"{run['backend']['name']} {run['backend']['precision']}",
        "machine": lambda run: f"{run['machine']['processor']}, {run['machine']['cores']} cores",
        "faster than diffusers": lambda run: _speedup(run, "vs_eager"),
        "than the plain export": lambda run: _speedup(run, "vs_uncompressed_export"),
        "latency, p50": lambda run: milliseconds(run["latency"][COMPRESSED]["p50_ms"]),
        "latency, p99": lambda run: milliseconds(run["latency"][COMPRESSED]["p99_ms"]),
        "peak memory": lambda run: size(run["peak_rss_bytes"][COMPRESSED]),
        "denoiser": _denoiser,
        "bundle": lambda run: size(run["size_bytes"]["bundle"]),
        "PSNR, dB": lambda run: _quality(run, "psnr_db", ".1f"),
        "SSIM": lambda run: _quality(run, "ssim", ".4f"),
        "LPIPS": lambda run: _quality(run, "lpips", ".4f"),
        "latent error": lambda run: _quality(run, "latent_rel_l2", ".4f"),
        "CLIP score": lambda run: _against(run, "clip_score", ".2f"),
        "Fréchet distance": lambda run: _against(run, "frechet", ".3f"),
        "attributes": lambda run: _against(run, "attribute_accuracy", ".1%"),
        "plain steps as fast": _rival,
        "gates": _gates,
    }
    hidden = {"machine"} if document["same_machine"] else {"latency, p50", "latency, p99", "peak memory"}
    shown = [(label, [of(run) for run in document["runs"]]) for label, of in lines.items() if label not in hidden]
    return [(label, cells) for label, cells in shown if any(cell != DASH for cell in cells)]


def _steps(run: Report) -> str:
    """The schedule, and how many steps run the whole network where not all do."""
    full = run["full_steps"]
    return schedule(run["sampling"]) + (f", {full} in full" if full < run["sampling"]["steps"] else "")


def _speedup(run: Report, name: str) -> str:
    return _with_interval(run["speedup"][name], (run["speedup_interval"] or {}).get(name), ".2f", "x")


def _denoiser(run: Report) -> str:
    ratio = size_ratio(run)
    return size(run["size_bytes"]["denoiser_compressed"]) + (f" ({ratio:.0%} of FP32)" if ratio else "")


def _quality(run: Report, name: str, digits: str) -> str:
    return _with_interval(run["quality"].get(name), (run["quality_interval"] or {}).get(name), digits)


def _against(run: Report, name: str, digits: str) -> str:
    """A metric that the reference has as well, with the difference to it."""
    sides = run["quality"].get(name) or {}
    own, reference = sides.get(COMPRESSED), sides.get("reference")
    if own is None:
        return DASH
    interval = ((run["quality_interval"] or {}).get(name) or {}).get(COMPRESSED)
    text = _with_interval(own, interval, digits)
    if reference is None:
        return text
    if digits.endswith("%"):
        return f"{text} ({100 * (own - reference):+.1f} pt)"
    return text + (f" ({100 * (own - reference) / reference:+.2f}%)" if reference else "")


def _rival(run: Report) -> str:
    row = run[PLAIN]
    if row["steps"] is None:
        return DASH
    return f"{row['steps']} {row['schedule']}" + (f", {row['psnr_db']:.1f} dB" if row["psnr_db"] is not None else "")


def _gates(run: Report) -> str:
    count, failed = len(run["gates"]), sum(not entry["passed"] for entry in run["gates"])
    if not count:
        return DASH
    return f"{failed} of {count} failed" if failed else f"{count} passed"


def _with_interval(value: float | None, interval: Sequence[float | None] | None, digits: str, unit: str = "") -> str:
    if value is None:
        return DASH
    known = [bound for bound in interval or () if bound is not None]
    brackets = f" [{known[0]:{digits}}, {known[1]:{digits}}]" if len(known) == 2 else ""
    return f"{value:{digits}}{unit}{brackets}"


def heading(document: Report) -> str:
    """What all runs share, in a line."""
    found = document["prompts"]
    against = f"{document['model'].get('source')} against {schedule(document['reference'])}"
    return f"{against}, {found['count']} images ({found['source']})"


def as_text(document: Report) -> str:
    """Aligned columns for the command line: a column per run, and the notes."""
    table = [["", *(run["name"] for run in document["runs"])], *([label, *cells] for label, cells in rows(document))]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    notes = ["", *document["notes"]] if document["notes"] else []
    return "\n".join([heading(document), "", *lines, *notes])


def as_json(document: Report) -> str:
    """The same as data."""
    return json.dumps(document, indent=1, allow_nan=False) + "\n"
