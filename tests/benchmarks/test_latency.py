import gc
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from diffpress.benchmarks.latency import alternate, paired_interval, paired_ratio, summary


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


class Workload:
    """Two programs on a machine that others use, simulated: `slow` takes 2.5 times as long as `fast`, then comes noise.

    A round's load slows both; each call has noise of its own, and now and then something stops it for long.
    """

    RATIO = 2.5

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.turn, self.load = -1, 1.0
        self.asked = 0.0

    def program(self, milliseconds: float, turn: int) -> None:
        if turn != self.turn:
            self.turn, self.load = turn, self.random.uniform(1, 4)
        self.asked = milliseconds

    def clock(self, call: Callable[[], object]) -> float:
        call()
        stalled = 5 if self.random.random() < 0.05 else 1
        return self.asked * self.load * self.random.lognormal(0, 0.05) * stalled

    def rounds(self, count: int) -> tuple[list[float], list[float]]:
        times: dict[float, list[float]] = {10 * self.RATIO: [], 10.0: []}
        for turn in range(count):
            for milliseconds, kept in times.items():
                kept.append(self.clock(partial(self.program, milliseconds, turn)))
        return tuple(times.values())  # type: ignore[return-value]


@pytest.mark.parametrize(("rounds", "width"), [(9, 0.4), (15, 0.3), (40, 0.18)])
def test_intervals_of_paired_ratios_cover_the_true_one(rounds: int, width: float) -> None:
    inside, ratios, widths = [], [], []
    for seed in range(300):
        slow, fast = Workload(seed).rounds(rounds)
        low, high = paired_interval(slow, fast) or (0, 0)
        ratios.append(paired_ratio(slow, fast))
        assert low <= ratios[-1] <= high
        inside.append(low <= Workload.RATIO <= high)
        widths.append(high - low)
    # Meant are 95 %; percentiles of a median of few rounds reach 91 to 94, and chance moves 300 trials by 3 points.
    assert 0.89 <= np.mean(inside) <= 0.985
    assert np.mean(ratios) == pytest.approx(Workload.RATIO, rel=0.01)
    # The times themselves vary by a factor of four, their ratio is known to a few per cent.
    assert np.median(widths) < width


def test_a_known_ratio_comes_out_of_alternating_runs() -> None:
    work = Workload(0)
    programs = {"slow": partial(work.program, 10 * Workload.RATIO), "fast": partial(work.program, 10.0)}
    times = alternate(programs, rounds=60, clock=work.clock)
    low, high = paired_interval(times["slow"], times["fast"]) or (0, 0)
    assert low <= Workload.RATIO <= high < low + 0.2


def test_a_ratio_of_work_that_is_done() -> None:
    def spin(seconds: float, _: int) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    def own_time(call: Callable[[], object]) -> float:  # other programs on this machine do not count
        start = time.thread_time()
        call()
        return (time.thread_time() - start) * 1000

    programs = {"slow": partial(spin, 0.012), "fast": partial(spin, 0.004)}
    times = alternate(programs, rounds=21, clock=own_time)
    low, high = paired_interval(times["slow"], times["fast"]) or (0, 0)
    assert low <= paired_ratio(times["slow"], times["fast"]) <= high
    assert low == pytest.approx(3, rel=0.05) and high == pytest.approx(3, rel=0.05)


def test_the_same_times_have_the_same_interval_and_one_round_has_none() -> None:
    slow, fast = np.random.default_rng(0).uniform(1, 2, (2, 12))
    assert paired_interval(slow, fast) == paired_interval(slow, fast)
    assert paired_interval([1.0], [2.0]) is None
    with pytest.raises(ValueError, match="same rounds"):
        paired_interval([1.0, 2.0], [1.0])
