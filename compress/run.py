"""Runs a recipe's passes in order."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from diffpress.compress.work import Pass, Work
from diffpress.errors import DiffpressError


@dataclass(frozen=True)
class PassResult:
    """What one pass did."""

    name: str
    summary: str
    seconds: float


def run(passes: Sequence[tuple[str, Pass]], work: Work) -> list[PassResult]:
    """Apply each pass to `work`; an error names the passes that ran before."""
    done: list[PassResult] = []
    for name, step in passes:
        started = time.perf_counter()
        try:
            step.requires(work)
            summary = step.apply(work)
        except DiffpressError as error:
            before = f" (after {', '.join(result.name for result in done)})" if done else ""
            raise DiffpressError(f"pass '{name}'{before}: {error}") from error
        done.append(PassResult(name, summary, time.perf_counter() - started))
    return done
