"""The tables and the plot of `benchmarks.peers`, from results/peers.json; `benchmarks.tables` writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffpress.benchmarks import markdown, plots
from diffpress.benchmarks.markdown import Claim

RESULTS = Path(__file__).resolve().parent / "results"
REFERENCE, SHAPES, CALL = "diffusers FP32", "shapes", "sd15"
SPEED, ACCURACY, ERROR = "speedup_vs_eager", "attribute_accuracy", "latent_rel_l2_converged_median"
CALL_ERROR = "latent_rel_l2"
POINT = 0.01  # of attribute accuracy that a row may lie below diffusers and still count as equal
TOLERABLE = 0.1  # error of a call that counts as equal: that of INT8 is a third of it
ASKED = 2.0  # times faster than the best peer
Row = Mapping[str, Any]
Rows = Sequence[Row]


def data() -> dict[str, Any]:
    """The committed run on `shapes`, and behind its rows those of a run of calls at 1.5's size, which has a machine."""
    found: dict[str, Any] = json.loads((RESULTS / "peers.json").read_text("utf-8"))
    calls = RESULTS / f"peers_{CALL}.json"
    if calls.exists():
        other = json.loads(calls.read_text("utf-8"))
        found["rows"] += other["rows"]
        found["calls"] = other["machine"]
    return found


def running(rows: Rows, model: str = SHAPES) -> list[Row]:
    """Those of a model that have a speed."""
    return [row for row in rows if row["model"] == model and row[SPEED] is not None]


def equal(rows: Rows) -> list[Row]:
    """Those whose attribute accuracy counts as equal to that of diffusers' 50 steps, which come first; all without."""
    reference = next((row[ACCURACY] for row in rows if row["contender"] == REFERENCE), 0.0)
    return [row for row in rows if row[ACCURACY] >= reference - POINT - 1e-9]


def fastest_peer() -> Row:
    """Of the committed run, among the rows whose attribute accuracy counts as equal."""
    return max((row for row in equal(running(data()["rows"])) if row["peer"]), key=lambda row: row[SPEED])


# -- fronts ------------------------------------------------------------------------------------------------------------

# What counts as equal is rounded away, or whoever rounds differently would be on every front: by words, a number of
# which more is better.
_GOOD: dict[str, Callable[[Row], float]] = {
    "attribute accuracy, to the point": lambda row: round(row[ACCURACY], 2),
    "PSNR to diffusers' 50 DDIM steps, to the dB, 50 and more are equal": lambda row: (
        50.0 if row["psnr_db"] is None else min(50.0, round(row["psnr_db"]))
    ),
    "median latent error to the converged solution, to two digits": lambda row: -float(f"{row[ERROR]:.2g}"),
}
_CALL_GOOD: dict[str, Callable[[Row], float]] = {
    "error of a call of 1.5's size, to two digits, 0.001 and less are equal": lambda row: (
        -float(f"{max(row[CALL_ERROR], 0.001):.2g}")
    ),
}


def on_front(rows: Rows, good: Callable[[Row], float]) -> list[Row]:
    """The rows that none beats in speed and in what `good` measures."""
    return [rows[index] for index in plots.pareto([(row[SPEED], good(row)) for row in rows])]


# -- claims ------------------------------------------------------------------------------------------------------------


def claims() -> str:
    """What was asked of ours beside the peers, and what was reached."""
    found = data()
    made = [*_fronts(found["rows"]), *_factors(found["rows"])]
    return "\n".join([markdown.claims("on this CPU", made), *_calls(found)])


def _fronts(rows: Rows) -> list[Claim]:
    """For every measure of quality, whether the front of all rows is ours alone."""
    made = []
    pairs = [(running(rows), words, good) for words, good in _GOOD.items()]
    calls = running(rows, CALL)
    pairs += [(calls, words, good) for words, good in _CALL_GOOD.items() if calls]
    for some, words, good in pairs:
        found = on_front(some, good)
        peers = [_short(row) for row in found if row["peer"]]
        got = f"{len(found) - len(peers)} of ours" + (f", and {'; '.join(peers)}" if peers else "")
        made.append((f"on the front of speed and {words}", "ours alone", got, bool(found) and not peers))
    return made


def _factors(rows: Rows) -> list[Claim]:
    """How many times faster than the best peer the best of ours is where quality counts as equal, by schedule."""
    same, calls = equal(running(rows)), running(rows, CALL)
    schedules = list(dict.fromkeys((row["schedule"], row["steps"]) for row in same if row["peer"]))
    scopes = [("on any schedule", same)]
    scopes += [
        (f"in {steps} steps of {name}", [row for row in same if (row["schedule"], row["steps"]) == (name, steps)])
        for name, steps in schedules
    ]
    asked = f"at least {ASKED:g}x"
    made = [(f"attributes at most 1 point below diffusers, {words}", asked, *_factor(some)) for words, some in scopes]
    close = [row for row in calls if row[CALL_ERROR] <= TOLERABLE]
    if close:
        made.append((f"a call of 1.5's size, error at most {TOLERABLE:g}", asked, *_factor(close)))
    return made


def _factor(rows: Rows) -> tuple[str, bool]:
    """The fastest of ours over the fastest peer: in words, and whether that is what was asked."""
    ours, peer = (
        max((row for row in rows if row["peer"] is kind), key=lambda row: row[SPEED], default=None)
        for kind in (False, True)
    )
    if ours is None or peer is None:
        return f"no {'row of ours' if ours is None else 'peer'} there", ours is not None
    factor = ours[SPEED] / peer[SPEED]
    return f"{factor:.2f}x: {_short(ours)} over {_short(peer)}", factor >= ASKED


def _short(row: Row) -> str:
    """A row in few words."""
    steps = "" if row["model"] == CALL else f" ({row['steps']} {row['schedule']})"
    return f"{row['contender']}{steps}"


# -- tables ------------------------------------------------------------------------------------------------------------


def peers() -> str:
    """A line for each contender, the fastest of its rows whose attributes count as equal, and what does not run."""
    found = data()
    rows = running(found["rows"])
    same = equal(rows)
    calls = {row["contender"]: row for row in running(found["rows"], CALL)}
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (row in same, row[SPEED])):
        best[row["contender"]] = row
    heads = ["vs diffusers", "images a second", "attributes", "PSNR", "error to converged", "denoiser"]
    heads += ["a call of SD 1.5's size", "its error"] if calls else []
    lines = [markdown.row(("", "backend", "schedule", *heads)), "|---|---|---|" + "--:|" * len(heads)]
    for row in sorted(best.values(), key=lambda row: row[SPEED], reverse=True):
        call = calls.get(row["contender"], {})
        cells = [
            row["contender"] if row["peer"] else f"**{row['contender']}**",
            row["backend"],
            f"{row['steps']} {row['schedule']}",
            f"{row[SPEED]:.1f}x",
            markdown.cell(row["images_per_second"], ".1f"),
            markdown.cell(row[ACCURACY], ".1%"),
            markdown.cell(row["psnr_db"], ".1f"),
            markdown.cell(row[ERROR], ".3f"),
            markdown.cell(row["bytes"] and row["bytes"] / 1e6, ".1f", " MB"),
        ]
        if calls:
            cells += [markdown.cell(call.get(SPEED), ".2f", "x"), markdown.cell(call.get(CALL_ERROR), ".3f")]
        lines.append(markdown.row(cells))
    absent: dict[str, dict[str, None]] = {}  # by reason, who has it, in their order
    for row in found["rows"]:
        if row["model"] == SHAPES and row["reason"] and row["contender"] not in best:
            absent.setdefault(row["reason"], {})[row["contender"]] = None
    lines += ["", where(found), *_calls(found)]
    if absent:
        told = "; ".join(f"{' and '.join(names)}: {why}" for why, names in absent.items())
        lines += ["", f"No row, and why: {told}."]
    return "\n".join(lines)


def peers_all() -> str:
    """Every row with everything that was measured."""
    found = data()
    lines = [
        "| | backend | bits | vs diffusers | vs uncompressed | images a second | attributes | CLIP | Fréchet | PSNR | SSIM | error to 50 DDIM steps | to converged | denoiser | making | deploys |",  # noqa: E501
        "|---|---|" + "--:|" * 14,
    ]
    group = None
    for row in found["rows"]:
        if row["model"] != group:
            group = row["model"]
            words = "images of `shapes`" if group == SHAPES else "calls of the denoiser at Stable Diffusion 1.5's size"
            lines.append(markdown.group(words, 16))
        if row[SPEED] is None:
            why = str(row["reason"]).replace("|", "/")
            lines.append(markdown.row((row["name"], f"does not run: {why}")) + " |" * 14)
            continue
        note = f" ({row['note']})" if row["note"] else ""
        cells = [
            row["name"] + note,
            row["backend"],
            f"W{row['bits_w']}A{row['bits_a']}",
            f"{row[SPEED]:.2f}x",
            markdown.cell(row["speedup_vs_uncompressed"], ".2f", "x"),
            markdown.cell(row["images_per_second"], ".2f"),
            markdown.cell(row[ACCURACY], ".1%"),
            markdown.cell(row["clip_score"], ".2f"),
            markdown.cell(row["frechet"], ".3f"),
            markdown.cell(row["psnr_db"], ".1f"),
            markdown.cell(row["ssim"], ".3f"),
            markdown.error(row, "latent_rel_l2"),
            markdown.error(row, "latent_rel_l2_converged"),
            markdown.cell(row["bytes"] and row["bytes"] / 1e6, ".1f", " MB"),
            markdown.cell(row["seconds"], ".0f", " s"),
            "yes" if row["deploys"] else "no",
        ]
        lines.append(markdown.row(cells))
    return "\n".join([*lines, "", where(found), *_calls(found)])


def where(found: Mapping[str, Any]) -> str:
    """How a run was made, in a line under its table."""
    here = found["machine"]
    return (
        f"{found['images']} images of held-out captions, the same seeds for all; speed end to end at batch 1, medians "
        f"of runs paired with eager diffusers FP32 at {found['sampling']['steps']} steps of "
        f"{found['sampling']['scheduler']}; {here['processor']}, {here['cores']} cores."
    )


def _calls(found: Mapping[str, Any]) -> list[str]:
    """The same of calls at 1.5's size, where they had a run of their own."""
    here = found.get("calls")
    if here is None:
        return []
    said = (
        "Calls of SD 1.5's size: random weights, both halves of guidance, medians of pairs with eager diffusers FP32 in"
    )
    who = "who has no number had no part in it"
    return ["", f"{said} a run of their own, {who}; {here['processor']}, {here['cores']} cores."]


# -- plot --------------------------------------------------------------------------------------------------------------


def plot() -> str:
    """Error to the converged solution against speed, ours and the peers', each with its front."""
    rows = running(data()["rows"])
    groups = {}
    for words, peer in (("peers", True), ("diffpress", False)):
        some = [row for row in rows if row["peer"] is peer]
        names = (f"{row['contender'].removeprefix('diffpress ')}, {row['steps']} steps" for row in some)
        groups[words] = [(row[SPEED], row[ERROR], name) for row, name in zip(some, names, strict=True)]
    across = f"times faster than diffusers FP32 at {data()['sampling']['steps']} steps"
    return plots.rivals(groups, across, "median error of the latents to the converged solution: up is better")
