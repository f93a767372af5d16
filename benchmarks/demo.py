"""The demo: compress the embedded pipeline, build an engine where that is possible, judge it, say what came out."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

from diffpress.benchmarks import verdict
from diffpress.benchmarks.bench import bench
from diffpress.bundle import refuse_existing

IMAGES = 60  # enough to show the loss; the figures in the README come from 200
TARGET = "sm89"  # GeForce RTX 40


def demo(output: str | Path, quiet: bool = False) -> str:
    """Make `output`/balanced and its report; returns what the command line shows: a table and where to look next.

    Raises `DiffpressError` when `output` is taken. Under ten minutes on two cores.
    """
    from diffpress import api

    started = time.perf_counter()
    folder = Path(output)
    refuse_existing(folder)
    targets = [TARGET] if importlib.util.find_spec("tensorrt_rtx") else []
    bundle = api.compress("shapes", "balanced", folder / "balanced", targets=targets, quiet=quiet)
    report = bench(bundle.path, "shapes", images=IMAGES, quiet=quiet, uncompressed=folder / "uncompressed")
    found = verdict.verdict(report)
    engine = f"engine for {TARGET}: {bundle.path / 'engines' / TARGET}" if targets else (
        "no engine: pip install 'diffpress[tensorrt-rtx]' builds one without a GPU"
    )  # fmt: skip
    return "\n".join(
        [
            found.headline,
            found.quality,
            found.rival_text,
            "",
            verdict.table(report),
            "",
            engine,
            f"report: {bundle.path / 'report' / 'report.html'}",
            f'try:    diffpress run {bundle.path} "a large red star on a plain background" -o star.png',
            f"({time.perf_counter() - started:.0f} seconds, {report['quality']['images']} images)",
        ]
    )
