"""Jobs of the GPU benchmark in processes of their own, and why one did not end well."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffpress.benchmarks import isolated

LIMIT_S = 2400  # of one job: an engine or a compilation of a large model may take half an hour
LONGEST = 300  # letters of a reason

Job = dict[str, Any]
Launch = Callable[[Job, Path], dict[str, Any]]


class Failed(Exception):
    """A job did not end well; the message is a row's reason."""


def launched(job: Job, log: Path) -> dict[str, Any]:
    """Do a job in a process of its own, whose output goes to `log`; raises `Failed` with its reason."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file, result = log.with_suffix(".job.json"), log.with_suffix(".result.json")
    file.write_text(json.dumps({**job, "result": str(result)}), "utf-8")
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "diffpress.benchmarks.gpu_worker", str(file)]
    with log.open("wb") as stream:
        try:
            code = subprocess.run(
                command, stdout=stream, stderr=stream, timeout=LIMIT_S, env=isolated.environment()
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise Failed(f"it did not finish within {LIMIT_S} s, see {log.name}") from error
    if code or not result.exists():
        raise Failed(told(code, log.read_text("utf-8", errors="replace")))
    found: dict[str, Any] = json.loads(result.read_text("utf-8"))
    return found


def told(code: int, log: str) -> str:
    """Why a process ended, in one line: its last words, and the signal that ended it."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    words = (lines or ["it said nothing"])[-1][:LONGEST]
    return f"ended by {signal.Signals(-code).name}: {words}" if code < 0 else words
