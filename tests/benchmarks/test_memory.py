import os
import subprocess
import sys
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


def test_a_failure_says_why(handmade: Bundle) -> None:
    broken = task(handmade) | {"precision": "fp7"}
    with pytest.raises(DiffpressError, match="fp7"):
        memory.peak_rss(broken)
