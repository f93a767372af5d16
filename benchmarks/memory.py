"""Fresh processes: peak memory and cold start of a candidate that is loaded and draws one image in one of its own.

Run as `python -m diffpress.benchmarks.memory JSON`; `fresh` starts it. The peak includes libraries, the start the
interpreter and imports.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffpress.benchmarks import isolated, machine
from diffpress.errors import DiffpressError

STARTS = 3  # of each candidate, fewer where one takes long
SECONDS = 60  # that the starts of one candidate may take together


@dataclass(frozen=True)
class Fresh:
    """What a fresh process needed: peaks in bytes, and the ms from its start to the first image, by part."""

    peak_rss_bytes: int
    peak_device_bytes: int | None  # of the NVIDIA GPU, where it ran on one
    parts_ms: Mapping[str, float]  # import, load, first_image

    @property
    def cold_start_ms(self) -> float:
        """All parts together."""
        return sum(self.parts_ms.values())


def high_water_bytes() -> int:
    """The largest resident size this process has had, in bytes.

    Linux: VmHWM, which starts anew with the program. ru_maxrss does not: a child inherits it from the process that
    started it, so a small program started by a large one looks large.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def fresh(task: Mapping[str, Any]) -> Fresh:
    """What a fresh process that does `task` (see `_do`) needs; raises `DiffpressError` when it fails."""
    command = [sys.executable, "-m", "diffpress.benchmarks.memory", json.dumps({**task, "started": time.time()})]
    environment = isolated.environment()
    if machine.launched():
        environment.pop("OMP_NUM_THREADS", None)  # it is the launcher's, and this process is alone
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        what = task.get("bundle") or ", ".join(task.get("graphs", ()))
        raise DiffpressError(f"measuring the memory of {what} failed: {last}")
    return Fresh(**json.loads(done.stdout.splitlines()[-1]))


def starts(task: Mapping[str, Any]) -> list[Fresh]:
    """As many fresh processes as fit the time, at least one; the files that they read are in memory after the first."""
    found = [fresh(task)]
    most = min(STARTS, int(SECONDS * 1000 / found[0].cold_start_ms))
    return found + [fresh(task) for _ in range(most - 1)]


def middle(found: list[Fresh]) -> dict[str, float]:
    """The cold start by part, in ms: that of the process whose whole start is the median, or the one below."""
    chosen = sorted(found, key=lambda one: one.cold_start_ms)[(len(found) - 1) // 2]
    return dict(chosen.parts_ms)


def peak_rss(task: Mapping[str, Any]) -> int:
    """Peak resident bytes of a fresh process that does `task`."""
    return fresh(task).peak_rss_bytes


def _do(task: Mapping[str, Any]) -> Fresh:
    """Load what `task` names and draw one image: {bundle, prompt} and either {against} or {backend, precision}.

    With {on_gpu} the model of {against} goes there. Or {graphs, backend}: open all of them, in fp32, and run each once
    with a batch of two and ones everywhere.
    """
    marks = [float(task["started"])]
    with _watched(task) as peak:
        load = _imported(task)
        marks.append(time.time())
        draw = load()
        marks.append(time.time())
        draw()
        marks.append(time.time())
    parts = zip(("import", "load", "first_image"), np.diff(marks).tolist(), strict=True)
    return Fresh(high_water_bytes(), peak(), {name: seconds * 1000 for name, seconds in parts})


def _imported(task: Mapping[str, Any]) -> Callable[[], Callable[[], object]]:
    """Import the libraries that the task needs; what it returns loads, and what that returns draws."""
    from diffpress import bundle

    if "against" in task:
        import diffusers  # noqa: F401
        import torch  # noqa: F401

        from diffpress.benchmarks.candidates import Reference, loras_of, own_schedule

        def load_reference() -> Callable[[], object]:
            manifest = bundle.read(task["bundle"]).manifest
            reference = Reference.load(task["against"], *own_schedule(manifest), loras_of(manifest))
            if task.get("on_gpu"):
                reference.pipeline.to("cuda")
            return lambda: reference([task["prompt"]], [0])

        return load_reference
    from diffpress.runtime.backends import check, open_session
    from diffpress.runtime.pipeline import Pipeline

    check(task["backend"], task.get("precision", "fp32"))

    def load_graphs() -> Callable[[], object]:
        sessions = [open_session(Path(file), task["backend"]) for file in task["graphs"]]
        return lambda: [
            session.run({name: np.ones([size or 2 for size in port.shape], port.dtype)
                         for name, port in session.inputs.items()})
            for session in sessions
        ]  # fmt: skip

    def load_bundle() -> Callable[[], object]:
        pipeline = Pipeline.load(bundle.read(task["bundle"]), task["backend"], task["precision"])
        return lambda: pipeline([task["prompt"]], [0])

    return load_graphs if "graphs" in task else load_bundle


@contextmanager
def _watched(task: Mapping[str, Any]) -> Iterator[Callable[[], int | None]]:
    """Within the block the GPU's memory is watched, where the task runs there; the function says its peak so far."""
    if not (task.get("on_gpu") or on_nvidia(task.get("backend", ""))):
        yield lambda: None
        return
    from diffpress.benchmarks.gpu_device import Device

    with Device().watched() as peak:
        yield lambda: peak.bytes


def on_nvidia(backend: str) -> bool:
    """Whether a backend runs on an NVIDIA GPU."""
    return backend.startswith(("onnxruntime-", "tensorrt"))


if __name__ == "__main__":
    made = _do(json.loads(sys.argv[1]))
    sys.stdout.write(json.dumps(asdict(made)) + "\n")
