import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import diffpress
from diffpress.benchmarks import memory
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError


def task(bundle: Bundle) -> dict[str, str]:
    pytest.importorskip("onnxruntime")
    return {"bundle": str(bundle.path), "backend": "onnxruntime", "precision": "fp32", "prompt": "a"}


def test_high_water_rises_and_stays() -> None:
    script = (
        "from diffpress.benchmarks.memory import high_water_bytes as peak\n"
        "start = peak()\n"
        "ballast = b'x' * 60_000_000\n"
        "high = peak()\n"
        "del ballast\n"
        "print(start, high, peak())"
    )
    source = Path(diffpress.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    start, high, after = map(int, done.stdout.split())
    assert high > start + 55_000_000
    assert after > high - 5_000_000  # the kernel counts in batches of pages


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss, used elsewhere, is inherited")
def test_a_child_does_not_inherit_the_peak_of_its_parent(handmade: Bundle) -> None:
    ballast = np.ones(80_000_000)
    peak = memory.peak_rss(task(handmade))
    assert 20_000_000 < peak < ballast.nbytes


def test_a_start_has_parts_which_are_all_of_it(handmade: Bundle) -> None:
    before = time.perf_counter()
    found = memory.fresh(task(handmade))
    taken = (time.perf_counter() - before) * 1000
    assert set(found.parts_ms) == {"import", "load", "first_image"} and min(found.parts_ms.values()) > 0
    assert taken / 2 < found.cold_start_ms < taken  # it ends before the process does
    assert found.peak_device_bytes is None


def test_the_median_start_is_one_that_was(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([9000.0, 2000.0, 3000.0, 70_000.0, 40_000.0, 1.0])

    def fresh(_: object) -> memory.Fresh:
        taken = next(told)
        return memory.Fresh(1, None, {"import": 0.25 * taken, "load": 0.75 * taken, "first_image": 0.0})

    monkeypatch.setattr(memory, "fresh", fresh)
    found = memory.starts({})
    assert [one.cold_start_ms for one in found] == [9000, 2000, 3000]
    assert memory.middle(found) == {"import": 750, "load": 2250, "first_image": 0}
    assert [len(memory.starts({})) for _ in range(2)] == [1, 1]  # slow ones are not started again


def test_the_gpu_is_watched_where_the_task_runs_there(monkeypatch: pytest.MonkeyPatch, handmade: Bundle) -> None:
    from diffpress.benchmarks import gpu_device

    class Device:
        @contextmanager
        def watched(self) -> Iterator[gpu_device.Peak]:
            yield gpu_device.Peak(123)

    monkeypatch.setattr(gpu_device, "Device", Device)
    with memory._watched({"backend": "onnxruntime-cuda"}) as peak:
        assert peak() == 123
    with memory._watched({"against": "shapes", "on_gpu": True}) as peak:
        assert peak() == 123
    with memory._watched({"backend": "onnxruntime"}) as peak:
        assert peak() is None
    assert [memory.on_nvidia(name) for name in ("tensorrt-rtx", "openvino-gpu", "openvino", "")] == [True, *[False] * 3]


def test_a_failure_says_why(handmade: Bundle) -> None:
    broken = task(handmade) | {"precision": "fp7"}
    with pytest.raises(DiffpressError, match="fp7"):
        memory.peak_rss(broken)
