"""The report of a search as one HTML file: the choice, the picture, the front, and every trial with its end."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import yaml

from diffpress import gates
from diffpress.benchmarks.search import objective
from diffpress.benchmarks.search.plot import plot
from diffpress.benchmarks.search.report import numbers, of_key

TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
STATES = {"measured": "measured", "hopeless": "given up early", "refused": "refused by a pass", "failed": "failed"}


def render(report: Mapping[str, Any]) -> str:
    """The page of a report, before or after there is a bundle."""
    template = (files(__package__) / "page.html").read_text("utf-8")
    parts = {
        "title": escape(f"{report['model']}: diffpress search"),
        "kicker": escape(f"{report['model']}, {report['machine']['processor']}, {report['created'][:10]}"),
        "headline": escape(_headline(report)),
        "lede": escape(_lede(report)),
        "plot": plot(report) if report["finalists"] else "",
        "note": escape(_note(report)),
        "front": _table(report, [entry for entry in report["finalists"] if entry["front"]]),
        "others": _table(report, [entry for entry in report["finalists"] if not entry["front"]]),
        "first": _first(report),
        "trials": _trials(report),
        "refused": _refused(report),
        "recipe": escape(_recipe(report)),
        "reproduce": escape(report["reproduce"]),
        "versions": escape(", ".join(f"{name} {version}" for name, version in report["versions"].items())),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _headline(report: Mapping[str, Any]) -> str:
    if report["chosen"] is None:
        return "No recipe within the limits"
    own = report.get("bundle") or of_key(report, report["chosen"])
    loss = objective.LOSSES[report["minimise"]].words
    return f"{objective.speed(own):.1f}{TIMES} faster than diffusers, {loss} {gates.number(own['loss'])}"


def _lede(report: Mapping[str, Any]) -> str:
    limits = f"Limits: {', '.join(report['budgets'])}."
    if report["chosen"] is None:
        return f"{limits} The front below says what there is."
    own = of_key(report, report["chosen"])
    said = f"{own['name']}. {limits}"
    made = report.get("bundle")
    if made is None:
        return said
    missed = f" It misses {made['missed']}." if made["missed"] else ""
    again = f"its bundle, measured again, {numbers(report, made)}"
    return f"{said} In the finals it had {numbers(report, own)}; {again}.{missed}"


def _note(report: Mapping[str, Any]) -> str:
    states = Counter(row["state"] for row in report["trials"])
    count = ", ".join(f"{states[state]} {words}" for state, words in STATES.items() if states[state])
    return (
        f"{len(report['trials'])} trials: {count}. Trials are judged on {report['images']['trials']} images and timed "
        f"beside each other (small marks); finalists on {report['images']['finals']} of other prompts and noise, and "
        f"timed alone: medians of ratios of alternating runs against eager diffusers. The staircase is the front."
        f"{_decided(report)}"
    )


def _decided(report: Mapping[str, Any]) -> str:
    if objective.LOSSES[report["minimise"]].steadier is None:
        return ""
    return (
        " Single images that end as another picture weigh much in the mean: of finalists whose means the images do not "
        "tell apart (bootstrap of paired differences, 95 %) the one with the least median is chosen."
    )


def _cells(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of cells that are HTML already."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    if not body:
        return ""
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _table(report: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    loss = objective.LOSSES[report["minimise"]]
    median = ["median"] if loss.steadier else []
    head = ["recipe", "vs diffusers", "vs uncompressed", escape(loss.words), *median]
    head += ["PSNR", "attributes", "bytes", "within limits"]
    rows = []
    for entry in sorted(entries, key=objective.speed):
        quality, size = entry["quality"], entry["size_bytes"]
        accuracy = quality["attribute_accuracy"]["compressed"]
        name = escape(entry["name"])
        rows.append(
            [
                f"<b>{name}</b>" if entry["key"] == report["chosen"] else name,
                f"{objective.speed(entry):.2f}{TIMES}",
                f"{entry['speedup']['vs_uncompressed_export']:.2f}{TIMES}",
                gates.number(entry["loss"]),
                *([gates.number(loss.steadier(entry))] if loss.steadier else []),
                f"{quality['psnr_db']:.1f}",
                DASH if accuracy is None else f"{accuracy:.1%}",
                f"{size['denoiser_compressed'] / size['denoiser_reference']:.0%}",
                "yes" if entry["within"] else "no",
            ]
        )
    return _cells(head, rows)


def _first(report: Mapping[str, Any]) -> str:
    rows = []
    for one in report["first"]:
        best = of_key(report, one["beaten_by"]) if one["beaten_by"] else None
        own = escape(numbers(report, of_key(report, one["key"])))
        rows.append([escape(one["name"]), own, *(_named(report, best) if best else ("none", DASH))])
    return _cells(["came first", "", "as fast and loses less", ""], rows)


def _named(report: Mapping[str, Any], entry: Mapping[str, Any]) -> tuple[str, str]:
    return escape(entry["name"]), escape(numbers(report, entry))


def _trials(report: Mapping[str, Any]) -> str:
    rows = []
    for row in report["trials"]:
        told = f"{row['speedup']:.2f}{TIMES}, {gates.number(row['loss'])}" if "speedup" in row else row["message"] or ""
        seconds = row["total_seconds"]
        rows.append(
            [
                escape(row["name"]),
                STATES[row["state"]],
                f'<span class="told">{escape(told)}</span>',
                DASH if seconds is None else f"{seconds:.0f} s",
            ]
        )
    return _cells(["recipe", "", "", "time"], rows)


def _refused(report: Mapping[str, Any]) -> str:
    """Recipes that needed no trial, by reason."""
    reasons = Counter(report["refused"].values())
    items = "".join(f"<li>{escape(reason)} ({count})</li>" for reason, count in reasons.most_common())
    return f"<h3>Refused before a trial</h3><ul>{items}</ul>" if items else ""


def _recipe(report: Mapping[str, Any]) -> str:
    if report["chosen"] is None:
        return ""
    return yaml.safe_dump(of_key(report, report["chosen"])["recipe"], sort_keys=False)
