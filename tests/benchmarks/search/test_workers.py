import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffpress.benchmarks.search.workers import Local, Ray, cores
from diffpress.errors import DiffpressError

ROOT = Path(__file__).parents[3]


def task(key: str, place: Path, model: str) -> dict[str, Any]:
    settings = {"model": model, "steps": 4, "guidance_scale": None, "seed": 0, "images": 2, "shapes": False}
    own = {"key": key, "recipe": {"name": key, "passes": []}, "precision": "fp32", "backend": "onnxruntime"}
    more = {"export_backend": "onnxruntime", "eager": 2.0, "threads": 1, "rivals": [], "proxy": False, "home": "here"}
    return {**own, **more, "settings": settings, "place": str(place)}


def test_errors_are_records_and_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    with Local(1, tmp_path / "logs") as workers:
        assert workers.threads == len(cores())
        workers.start(0, task("a", tmp_path / "search", str(tmp_path / "none")))
        ((slot, record),) = workers.finished()
        assert (slot, record["key"], record["state"]) == (0, "a", "refused")
        assert "there is no model at" in record["message"] and record["total_seconds"] > 0

        first = workers._processes[0]
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        workers.start(0, task("b", tmp_path / "search", str(tmp_path / "none")))
        ((_, record),) = workers.finished()
        assert (record["key"], record["state"]) == ("b", "failed")
        assert record["message"] == (
            "the worker's process was ended by signal 9, for want of memory perhaps: "
            f"see {tmp_path / 'logs' / 'worker-0.txt'}"
        )

        broken = {name: value for name, value in task("c", tmp_path, "none").items() if name != "settings"}
        workers.start(0, broken)
        ((_, record),) = workers.finished()
        assert workers._processes[0].pid != first.pid
        assert (record["state"], record["message"]) == ("failed", "KeyError: 'settings'")
        last = workers._processes[0]
    assert last.wait(10) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to cores here")
def test_a_worker_keeps_to_its_cores_and_ends_with_its_input() -> None:
    core = cores()[-1]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "diffpress.benchmarks.search.worker", "--cores", str(core)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("{}\n")  # no task at all: what goes wrong is said outside of records
    process.stdin.flush()
    assert process.stdout.readline() == ""
    assert process.wait(120) == 1
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    while True:  # until it has bound itself
        bound = os.sched_getaffinity(process.pid)
        if bound == {core}:
            break
        assert process.poll() is None
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0


@pytest.mark.parametrize("count", [1, 2, 5])
def test_cores_are_shared_out(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffpress.benchmarks.search.workers.cores", lambda: [2, 3, 6, 7])
    workers = Local(count, tmp_path)
    shares = {1: [[2, 3, 6, 7]], 2: [[2, 3], [6, 7]], 5: [[2], [3], [6], [7], [2]]}
    assert workers._shares == shares[count]


def test_a_cluster_that_is_not_there_is_said() -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'diffpress[ray]'")
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(DiffpressError, match=f"no Ray cluster answers at '{address}': start one with 'ray start"):
            Ray(address, None)
