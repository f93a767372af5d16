"""Peak memory: each candidate in a fresh process that loads it, draws one image and reports its own high-water mark.

Run as `python -m diffpress.benchmarks.memory JSON`; `peak_rss` starts it. The peak includes libraries.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffpress.benchmarks import isolated
from diffpress.errors import DiffpressError


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


def peak_rss(task: Mapping[str, Any]) -> int:
    """Peak resident bytes of a fresh process that does `task`, see `_draw`; raises `DiffpressError` when it fails."""
    command = [sys.executable, "-m", "diffpress.benchmarks.memory", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=isolated.environment())
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        what = task.get("bundle") or ", ".join(task.get("graphs", ()))
        raise DiffpressError(f"measuring the memory of {what} failed: {last}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_rss_bytes"])


def _draw(task: Mapping[str, Any]) -> None:
    """Load what `task` names and draw one image: {bundle, prompt} and either {against} or {backend, precision}.

    Or {graphs, backend}: open all of them, in fp32, and run each once with a batch of two and ones everywhere.
    """
    if "graphs" in task:
        import numpy as np

        from diffpress.runtime.backends import open_session

        sessions = [open_session(Path(file), task["backend"]) for file in task["graphs"]]
        for session in sessions:
            session.run({name: np.ones([size or 2 for size in port.shape], port.dtype)
                         for name, port in session.inputs.items()})  # fmt: skip
        return
    from diffpress import bundle

    opened = bundle.read(task["bundle"])
    if "against" in task:
        from diffpress.benchmarks.candidates import Reference, loras_of, own_schedule

        draw: Any = Reference.load(task["against"], *own_schedule(opened.manifest), loras_of(opened.manifest))
    else:
        from diffpress.runtime.pipeline import Pipeline

        draw = Pipeline.load(opened, backend=task["backend"], precision=task["precision"])
    draw([task["prompt"]], [0])


if __name__ == "__main__":
    _draw(json.loads(sys.argv[1]))
    sys.stdout.write(json.dumps({"peak_rss_bytes": high_water_bytes()}) + "\n")
