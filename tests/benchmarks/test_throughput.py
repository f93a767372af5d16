import time
from collections.abc import Callable
from typing import Any

import pytest

from diffpress.benchmarks import throughput
from diffpress.errors import DiffpressError

SINGLE = {"reference_eager": 20.0, "compressed": 5.0}


class Drawing:
    """Takes 20 ms of its own for a call and 1 ms for each image; refuses more than `most` at once."""

    def __init__(self, most: int, extra: float = 0.0) -> None:
        self.most, self.extra = most, extra
        self.batches: list[tuple[int, ...]] = []

    def __call__(self, prompts: list[str], seeds: list[int], *, keep_latents: bool = False) -> Any:
        if len(prompts) > self.most:
            raise DiffpressError(f"this engine takes {self.most} images at once:\nno more")
        assert len(prompts) == len(seeds)
        self.batches.append(tuple(seeds))
        time.sleep(0.02 + self.extra + 0.001 * len(prompts))


def test_rates_by_batch_and_refusals_by_name() -> None:
    slow, fast = Drawing(8, 0.04), Drawing(2)
    opens: dict[str, Callable[[], Any]] = {"reference_eager": lambda: slow, "compressed": lambda: fast}
    rows = throughput.measure(opens, SINGLE, ["a", "b", "c"], quiet=True)
    assert [row["batch"] for row in rows] == [1, 2, 4, 8]
    one, two, four, _ = rows
    assert 20 < one["images_per_second"]["compressed"] < 1000 / 21
    assert two["images_per_second"]["compressed"] > 1.5 * one["images_per_second"]["compressed"]
    assert one["speedup"]["reference_eager"] == pytest.approx(61 / 21, rel=0.15)
    low, high = one["speedup_interval"]["reference_eager"]
    assert low <= one["speedup"]["reference_eager"] <= high and one["rounds"] == throughput.ROUNDS
    assert four["refused"] == {"compressed": "this engine takes 2 images at once:"}
    assert set(four["images_per_second"]) == {"reference_eager"} and four["speedup"] == {}
    assert {len(batch) for batch in slow.batches} == {1, 2, 4, 8}
    assert len({batch[0] for batch in slow.batches if len(batch) == 2}) > 1  # other noise in each round


def test_candidates_are_opened_for_every_batch_and_may_fail_then() -> None:
    asked: list[str] = []

    def open_it() -> Any:
        asked.append("again")
        if len(asked) > 2:
            raise MemoryError
        return Drawing(8)

    rows = throughput.measure({"compressed": open_it}, SINGLE, ["a"], quiet=True)
    assert len(asked) == 4
    assert [row["refused"] for row in rows] == [{}, {}, {"compressed": "MemoryError"}, {"compressed": "MemoryError"}]
    assert rows[2]["images_per_second"] == {} and rows[2]["rounds"] == 0


def test_what_would_take_too_long_is_not_tried() -> None:
    drawing = Drawing(8)
    rows = throughput.measure({"compressed": lambda: drawing}, {"compressed": 9000.0}, ["a"], quiet=True)
    assert [bool(row["refused"]) for row in rows] == [False, False, True, True]
    assert "would take about 36 s" in rows[2]["refused"]["compressed"]
    assert rows[1]["rounds"] == 2
