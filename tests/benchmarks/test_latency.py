import gc
import time

import numpy as np
import pytest

from diffpress.benchmarks.latency import alternate, paired_ratio, summary


def test_candidates_alternate_and_their_order_rotates() -> None:
    calls: list[tuple[str, int]] = []
    candidates = {name: (lambda turn, name=name: calls.append((name, turn))) for name in "abc"}
    told: list[str] = []
    times = alternate(candidates, rounds=3, warmup=1, on_call=told.append)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
    rounds = [calls[i : i + 3] for i in range(0, 12, 3)]
    assert [sorted(name for name, _ in one) for one in rounds] == [["a", "b", "c"]] * 4
    assert [one[0][0] for one in rounds[1:]] == ["a", "b", "c"]
    assert [one[0][1] for one in rounds] == [0, 0, 1, 2]
    assert len(told) == 12


def test_warm_up_is_not_counted() -> None:
    seen = []

    def slow_once(turn: int) -> None:
        if not seen:
            time.sleep(0.2)
        seen.append(turn)

    assert max(alternate({"a": slow_once}, rounds=2)["a"]) < 150
    assert len(seen) == 3


def test_the_garbage_collector_is_left_as_it_was() -> None:
    def fail(turn: int) -> None:
        assert not gc.isenabled()
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        alternate({"a": fail}, rounds=1)
    assert gc.isenabled()


def test_summary() -> None:
    found = summary([float(value) for value in range(1, 102)])
    assert found == {"p50_ms": 51, "p90_ms": 91, "p99_ms": 100, "runs": 101}


def test_paired_ratio_ignores_what_disturbs_a_round() -> None:
    load = np.array([1, 1, 8, 1, 3])
    assert paired_ratio(30 * load, 10 * load) == pytest.approx(3)
    with pytest.raises(ValueError, match="same rounds"):
        paired_ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="one round"):
        alternate({"a": lambda turn: None}, rounds=0)
