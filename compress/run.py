"""Runs a recipe's passes in order."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from diffpress.compress.cache.check import check_program
from diffpress.compress.work import Pass, Work
from diffpress.errors import DiffpressError


@dataclass(frozen=True)
class PassResult:
    """What one pass did."""

    name: str
    summary: str
    seconds: float


def run(passes: Sequence[tuple[str, Pass]], work: Work) -> list[PassResult]:
    """Apply each pass to `work`; an error names the passes that ran before.

    A step program that a pass leaves is checked there, and remembers what it was made for.
    """
    done: list[PassResult] = []
    for name, step in passes:
        started = time.perf_counter()
        try:
            step.requires(work)
            made_for, before_it = work.made_for(), (work.program, work.corrections)
            summary = step.apply(work)
            # A pass that goes over to another schedule plans nothing, it starts anew.
            if work.sampling.timesteps != made_for.sampling.timesteps:
                work.planned_for = None
            elif before_it[0] != work.program or before_it[1] is not work.corrections:
                check_program(work)
                work.planned_for = made_for
        except DiffpressError as error:
            before = f" (after {', '.join(result.name for result in done)})" if done else ""
            raise DiffpressError(f"pass '{name}'{before}: {error}") from error
        work.passes.append((name, _fields(step)))
        done.append(PassResult(name, summary, time.perf_counter() - started))
    return done


def _fields(step: Any) -> dict[str, Any]:
    """The keys of a pass as JSON holds them."""
    found: dict[str, Any] = (
        json.loads(json.dumps(asdict(step), default=str)) if is_dataclass(step) and not isinstance(step, type) else {}
    )
    return found
