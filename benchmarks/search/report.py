"""The document of a search: finalists, front, choice, what every trial came to; and what is said of it in lines."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diffpress import gates
from diffpress.benchmarks import machine
from diffpress.benchmarks.search import objective
from diffpress.benchmarks.search.base import Base
from diffpress.benchmarks.search.objective import Loss
from diffpress.benchmarks.search.trial import MEASURED
from diffpress.benchmarks.search.workers import Record
from diffpress.compress.recipe import parts
from diffpress.gates import Gate

CLEARLY = 0.01  # of its loss, or of the steadier number, by which one has to be beaten
Finalist = dict[str, Any]


def described(recipe: Mapping[str, Any], precision: str) -> str:
    """A recipe in a few words: its passes with the values of their fields."""
    words = []
    for entry in recipe["passes"]:
        name, fields = parts(entry)
        values = " ".join(_value(key, value) for key, value in fields.items())
        words.append(f"{name} {values}".strip())
    return f"{', '.join(words) or 'export only'}, {precision}"


def _value(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return key if value else f"no {key}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def finished(
    held: Sequence[Finalist],
    records: Sequence[Record],
    refused: Mapping[str, str],
    first: Mapping[str, str],
    minimise: str,
    budgets: Sequence[Gate],
    base: Base,
) -> dict[str, Any]:
    """The document without a bundle: `held` are the finalists, `first` the names of recipes that came first, by key."""
    loss = objective.LOSSES[minimise]
    finalists = _judged(held, loss, budgets, first)
    chosen = objective.choose(finalists, loss, budgets)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "minimise": minimise,
        "budgets": [str(gate) for gate in budgets],
        "base": {"backends": dict(base.backends), "export": base.export, "export_vs_eager": base.eager},
        "finalists": finalists,
        "chosen": None if chosen is None else finalists[chosen]["key"],
        "first": _beaten(finalists, first, loss),
        "trials": [_row(record, first, loss) for record in records],
        "refused": dict(refused),
        "machine": machine.machine(),
        "versions": machine.versions(),
    }


def _judged(held: Sequence[Finalist], loss: Loss, budgets: Sequence[Gate], first: Mapping[str, str]) -> list[Finalist]:
    losses = [loss.of(entry) for entry in held]
    best = objective.front([(objective.speed(entry), own) for entry, own in zip(held, losses, strict=True)])
    return [
        {
            **entry,
            "name": first.get(entry["key"]) or described(entry["recipe"], entry["precision"]),
            "loss": losses[index],
            "within": objective.keeps(budgets, entry),
            "front": index in best,
        }
        for index, entry in enumerate(held)
    ]


def _beaten(finalists: Sequence[Finalist], first: Mapping[str, str], loss: Loss) -> list[dict[str, Any]]:
    """Of every recipe that came first, the one that loses least among those that are as fast and lose less than it.

    Where single images weigh much in a loss, the steadier number has to be clearly lower, and the loss no higher.
    """
    found = []
    for own in finalists:
        if own["key"] not in first:
            continue
        better = [
            entry
            for entry in finalists
            if objective.speed(entry) >= objective.speed(own)
            if _loses_less(entry, own, loss)
            if entry["key"] not in first
        ]
        best = objective.least(better, loss)
        beater = None if best is None else better[best]["key"]
        found.append({"name": first[own["key"]], "key": own["key"], "beaten_by": beater})
    return found


def _loses_less(entry: Finalist, own: Finalist, loss: Loss) -> bool:
    deciding = loss.steadier or loss.of
    number, other = deciding(entry), deciding(own)
    return entry["loss"] <= own["loss"] and number < other - CLEARLY * abs(other)


def _row(record: Record, first: Mapping[str, str], loss: Loss) -> dict[str, Any]:
    """A trial: what it tried, and its numbers or what it ended with."""
    kept = ("key", "recipe", "precision", "state", "message", "proxy", "seconds", "total_seconds")
    row = {name: record.get(name) for name in kept}
    row["name"] = first.get(record["key"]) or described(record["recipe"], record["precision"])
    if record["state"] == MEASURED:
        row |= {"speedup": objective.speed(record), "loss": loss.of(record)}
    return row


def of_key(report: Mapping[str, Any], key: str) -> Finalist:
    """The finalist of a key."""
    return next(entry for entry in report["finalists"] if entry["key"] == key)


def nothing(report: Mapping[str, Any], budgets: Sequence[Gate]) -> str:
    """What to say where no finalist keeps the limits: the nearest one, and what it misses."""
    if not report["finalists"]:
        return f"none of {len(report['trials'])} trials came to sound images"
    near = report["finalists"][objective.nearest(report["finalists"], budgets)]
    return (
        f"no recipe of {len(report['trials'])} trials keeps the limits; the nearest, {near['name']} "
        f"({numbers(report, near)}), misses {objective.failed(budgets, near)}: ask for less, or for more --trials"
    )


def numbers(report: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """Speed and loss of a finalist or the bundle."""
    return f"{objective.speed(entry):.2f}x, {report['minimise']} {gates.number(entry['loss'])}"


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """What the command line says in the end."""
    own = of_key(report, report["chosen"])
    count = sum(row["state"] == MEASURED for row in report["trials"])
    yield f"{len(report['trials'])} trials, {count} of them measured to the end{_took(report.get('run'))}"
    yield f"chosen: {own['name']} ({numbers(report, own)})"
    yield f"its bundle, measured again: {numbers(report, report['bundle'])}"
    for one in report["first"]:
        known = of_key(report, one["key"])
        said = "nothing found is as fast and loses less"
        if one["beaten_by"]:
            best = of_key(report, one["beaten_by"])
            said = f"beaten by {best['name']} ({numbers(report, best)})"
        yield f"  {one['name']} ({numbers(report, known)}): {said}"


def _took(run: Mapping[str, Any] | None) -> str:
    return f"; {run['trials']} in {run['seconds'] / 60:.0f} minutes" if run and run["trials"] else ""


def command(model: str, space: str, output: Path, options: Mapping[str, Any]) -> str:
    """What to type for the same search; `options` by the name that the command line has for them."""
    words = ["diffpress", "search", model, "--space", space]
    for name, value in options.items():
        for one in value if isinstance(value, tuple) else [value]:
            words += [] if one is None else [f"--{name}", str(one)]
    return shlex.join([*words, "--output", str(output)])
