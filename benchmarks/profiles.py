"""What each operator of a graph takes, by the profiles of ONNX Runtime and OpenVINO.

Profiling costs time itself, so only the shares are to be trusted.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffpress.runtime import backends
from diffpress.runtime.onnx_runtime import OnnxRuntime, OnnxRuntimeOnGpu
from diffpress.runtime.open_vino import OpenVino
from diffpress.runtime.session import Feeds

RUNS = 5


@dataclass(frozen=True)
class Timed:
    """An operator as a backend runs it, fused ones under the name of one of them; its median time in a call."""

    name: str
    op: str  # as the backend calls it
    seconds: float


def profile(file: Path, backend: str, precision: str, feeds: Feeds, runs: int = RUNS) -> list[Timed] | None:
    """Every operator of a graph with its time, the slowest first; None for a backend that does not say.

    Raises `DiffpressError` when the backend refuses the graph or the feeds.
    """
    if backend == backends.OPENVINO:
        found = _openvino(file, precision, feeds, runs)
    elif backend in (backends.ONNXRUNTIME, backends.CUDA):
        found = _onnxruntime(file, backend, precision, feeds, runs)
    else:
        return None
    timed = [Timed(name, op, float(np.median(times))) for (name, op), times in found.items()]
    return sorted((one for one in timed if one.seconds > 0), key=lambda one: -one.seconds)


class _ProfiledOpenVino(OpenVino):
    def __init__(self, file: Path, precision: str) -> None:
        super().__init__(file, precision, None)
        self._config["PERF_COUNT"] = True

    def operators(self) -> Any:
        (request,) = self._requests.values()
        return request.get_profiling_info()


def _openvino(file: Path, precision: str, feeds: Feeds, runs: int) -> dict[tuple[str, str], list[float]]:
    session = _ProfiledOpenVino(file, precision)
    found = defaultdict(list)
    for turn in range(1 + runs):
        session.run(feeds)
        for entry in session.operators() if turn else ():
            found[entry.node_name, entry.node_type].append(entry.real_time.total_seconds())
    return found


def _onnxruntime(
    file: Path, backend: str, precision: str, feeds: Feeds, runs: int
) -> dict[tuple[str, str], list[float]]:
    base = OnnxRuntime if backend == backends.ONNXRUNTIME else OnnxRuntimeOnGpu
    with tempfile.TemporaryDirectory(prefix="diffpress-profile-") as folder:

        class Profiled(base):  # type: ignore[valid-type,misc]
            def _opened(self, options: Any) -> Any:
                options.enable_profiling = True
                options.profile_file_prefix = str(Path(folder) / "profile")
                return super()._opened(options)

            def events(self) -> list[dict[str, Any]]:
                return json.loads(Path(self._session.end_profiling()).read_text("utf-8"))  # type: ignore[no-any-return]

        session = Profiled(file, backend, precision, None)
        for _ in range(1 + runs):
            session.run(feeds)
        found = defaultdict(list)
        for event in session.events():
            name, arguments = str(event.get("name", "")), event.get("args", {})
            if event.get("cat") == "Node" and name.endswith("_kernel_time"):
                key = name.removesuffix("_kernel_time"), str(arguments.get("op_name", ""))
                found[key].append(float(event["dur"]) / 1e6)
    return {key: times[1:] or times for key, times in found.items()}  # the first run warms up
