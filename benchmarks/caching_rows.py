"""The rows of the caching table: recipes of every method at a few settings, and what each is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffpress.benchmarks.caching_tables import EIGHT_BITS, FEWER, OWN, SHORT
from diffpress.benchmarks.recipe_rows import Row
from diffpress.errors import DiffpressError

BUDGETS = {10: (8, 7), 12: (10, 9), 16: (13, 12)}  # steps of a schedule, and the plain ones that their calls may last
FULL = {OWN: "fp32", SHORT: "fp32, 20 steps", EIGHT_BITS: "fp32"}  # the row without a cache that each is compared with
FULL |= {f"{steps} steps": f"fp32, {steps} steps" for steps in BUDGETS}
INT8 = {"quantize": {"format": "int8", "range": "l2.4"}}
DEEP = "DeepCache"

# Names up to the first comma are methods. Rows of 50 steps:
LONG: dict[str, tuple[Any, ...]] = {
    f"{DEEP}, interval 2": ({"cache": {"interval": 2}},),
    f"{DEEP}, interval 3": ({"cache": {"interval": 3}},),
    f"{DEEP}, interval 5": ({"cache": {"interval": 5}},),
    f"{DEEP}, interval 5, around step 15": ({"cache": {"interval": 5, "center": 15}},),
    "DeepCache corrected, interval 3": ({"cache": {"interval": 3}}, {"cache-correct": {"depth": 2}}),
    "DeepCache corrected, interval 5": ({"cache": {"interval": 5}}, {"cache-correct": {"depth": 2}}),
    "DeepCache and guidance, interval 2": ({"guidance": {"every": 2}}, {"cache": {"interval": 2}}),
    "DeepCache and guidance, interval 4": ({"guidance": {"every": 4}}, {"cache": {"interval": 4}}),
    "Faster Diffusion, published keys": ({"faster-diffusion": {"keys": "published"}},),
    "Faster Diffusion, published keys and noise": ({"faster-diffusion": {"keys": "published", "prior_noise": 0.003}},),
    "Faster Diffusion, 12 calibrated keys": ({"faster-diffusion": {"keys": "calibrated", "key_steps": 12}},),
    "Delta-cache, interval 2": ({"delta-cache": {"interval": 2}},),
    "Delta-cache, interval 3": ({"delta-cache": {"interval": 3}},),
    "InvarDiff, published": ({"invardiff": {"tau_step": 0.63, "tau_module": 0.22}},),
    "InvarDiff, half": ({"invardiff": {"tau_step": 0.5}},),
    "SmoothCache, 0.08": ({"smoothcache": {"alpha": 0.08}},),
    "SmoothCache, 0.15": ({"smoothcache": {"alpha": 0.15}},),
    "MagCache, 0.12": ({"magcache": {"threshold": 0.12}},),
    "MagCache, 0.24": ({"magcache": {"threshold": 0.24}},),
    "TeaCache frozen, 0.1": ({"freeze": {"rule": "teacache", "threshold": 0.1}},),
    "TeaCache frozen, 0.2": ({"freeze": {"rule": "teacache", "threshold": 0.2}},),
    "First block frozen, 0.1": ({"freeze": {"rule": "first-block", "threshold": 0.1}},),
    "First block frozen, 0.2": ({"freeze": {"rule": "first-block", "threshold": 0.2}},),
    "T-GATE, from step 10": ({"tgate": {"gate": 10}},),
    "T-GATE, from step 25": ({"tgate": {"gate": 25}},),
    "TaylorSeer, interval 2": ({"taylorseer": {"interval": 2, "branch": 0}},),
    "TaylorSeer, interval 3": ({"taylorseer": {"interval": 3, "branch": 0}},),
    "CacheQuant, interval 3": ({"cachequant": {"interval": 3}},),
    "CacheQuant, interval 5": ({"cachequant": {"interval": 5}},),
    "Budgeted, calls 2x faster": ({"cache-budget": {"speedup": 2.0}},),
    "Budgeted, calls 3x faster": ({"cache-budget": {"speedup": 3.0}},),
    "Budgeted, calls 4x faster": ({"cache-budget": {"speedup": 4.0}},),
}
# Rows on top of the best schedule of 20 steps, which stand there with ", 20 steps" after their names:
FEW: dict[str, tuple[Any, ...]] = {
    f"{DEEP}, interval 2": LONG[f"{DEEP}, interval 2"],
    "DeepCache corrected, interval 2": ({"cache": {"interval": 2}}, {"cache-correct": {"depth": 2}}),
    "Faster Diffusion, every 2nd": ({"faster-diffusion": {"keys": 2}},),
    "Delta-cache, interval 2": LONG["Delta-cache, interval 2"],
    "InvarDiff, half": LONG["InvarDiff, half"],
    "SmoothCache, 0.15": LONG["SmoothCache, 0.15"],
    "MagCache, 0.12": LONG["MagCache, 0.12"],
    "TaylorSeer, interval 2": LONG["TaylorSeer, interval 2"],
    "CacheQuant, interval 2": ({"cachequant": {"interval": 2}},),
    "Budgeted, calls 1.4x faster": ({"cache-budget": {"speedup": 1.4}},),
    "Budgeted, calls 1.7x faster": ({"cache-budget": {"speedup": 1.7}},),
}
# Cache and INT8 together, 50 steps: what each part of CacheQuant adds.
INTERVALS = (3, 5)
ABLATION: dict[str, tuple[Any, ...]] = {
    "INT8": (INT8, "temporal-table"),
    **{
        f"INT8 and a cache, interval {interval}, {part}": passes
        for interval in INTERVALS
        for part, passes in {
            "naive": (INT8, {"cache": {"interval": interval}}, "temporal-table"),
            # Planned first, so that INT8 is calibrated under the plan.
            "+ schedule": ({"cachequant": {"interval": interval, "correct": False}}, INT8, "temporal-table"),
            "+ correction": (
                {"cachequant": {"interval": interval, "correct": False}},
                INT8,
                "temporal-table",
                {"cache-correct": {"depth": 2}},
            ),
            # The plain schedule, everything else the same.
            "correction alone": (
                {"cache": {"interval": interval}},
                INT8,
                "temporal-table",
                {"cache-correct": {"depth": 2}},
            ),
        }.items()
    },
}
QUICK = (f"{DEEP}, interval 3", f"{DEEP}, interval 2, 20 steps")


@dataclass(frozen=True)
class Case(Row):
    """A row of this table; `precision` where it is not that of the fastest backend."""

    precision: str | None = None


def table(precision: str) -> dict[str, Case]:
    """All rows by name, those without a cache first; `precision` is the fastest backend's."""
    plain: dict[str, tuple[Any, ...]] = {FULL[OWN]: (), FULL[SHORT]: (schedule(20),)}
    rows = {name: Case("reference", passes, quick=True, precision="fp32") for name, passes in plain.items()}
    if precision != "fp32":  # what the arithmetic alone changes
        rows |= {
            name.replace("fp32", precision): Case("reference", passes, quick=True) for name, passes in plain.items()
        }
    rows |= {name: Case(OWN, passes, quick=name in QUICK) for name, passes in LONG.items()}
    few = {f"{name}, 20 steps": passes for name, passes in FEW.items()}
    rows |= {name: Case(SHORT, (schedule(20), *passes), quick=name in QUICK) for name, passes in few.items()}
    for steps, lengths in BUDGETS.items():
        rows[FULL[f"{steps} steps"]] = Case("reference", (schedule(steps),), precision="fp32")
        for plain_steps in lengths:
            budget = {"cache-budget": {"speedup": round(steps / plain_steps, 3)}}
            rows[f"Budgeted, as long as {plain_steps}, {steps} steps"] = Case(FEWER, (schedule(steps), budget))
    return rows | {name: Case(EIGHT_BITS, passes) for name, passes in ABLATION.items()}


def schedule(steps: int) -> dict[str, Any]:
    """The best plain schedule, as a pass."""
    return {"schedule": {"solver": "unipc", "spacing": "karras", "steps": steps}}


def full_of(name: str, row: Row) -> str:
    """The name of the row without a cache that it is compared with."""
    return FULL.get(row.group) or FULL.get(name.rsplit(", ", 1)[-1], FULL[OWN])


def check(rows: Mapping[str, Row]) -> None:
    """Raise `DiffpressError` that names every row whose recipe cannot be read, before any is measured."""
    wrong = []
    for name, row in rows.items():
        try:
            row.recipe(name).built()
        except DiffpressError as error:
            wrong.append(f"{name}: {error}")
    if wrong:
        raise DiffpressError(listed(wrong))


def listed(wrong: Sequence[str]) -> str:
    """The rows that cannot be measured, a line each with the reason."""
    return f"{len(wrong)} rows cannot be measured:\n" + "\n".join(wrong)


def selected(rows: Mapping[str, Case], quick: bool, only: Iterable[str] | None) -> dict[str, Case]:
    """The rows to measure; those without a cache are always among them."""
    chosen = {name: row for name, row in rows.items() if row.quick or not quick}
    if only is not None:
        wanted = tuple(only)
        chosen = {
            name: row
            for name, row in chosen.items()
            if row.group == "reference" or any(part in name for part in wanted)
        }
    return chosen
