import time
from collections.abc import Callable
from typing import Any

import pytest

from diffpress.benchmarks import speed
from diffpress.errors import DiffpressError


def test_times_are_kept_by_candidate(fake_candidate: Callable[..., Any]) -> None:
    timings = speed.time_all({"a": fake_candidate(steps=3), "b": fake_candidate(steps=2)}, ["x", "y"], True, rounds=4)
    assert {name: len(times) for name, times in timings.images.items()} == {"a": 4, "b": 4}
    assert len(timings.stages["a"]) == len(timings.steps["b"]) == 4
    assert timings.stage_medians()["a"] == {"text": 1.0, "denoise": 9.0, "decode": 2.0}
    assert timings.step_medians() == {"a": [3.0] * 3, "b": [3.0] * 2}


def test_components_and_steps_have_percentiles() -> None:
    stages = [{"text": 1.0, "denoise": float(value)} for value in range(1, 102)]
    steps = [[float(value), 2.0 * value] for value in range(1, 102)]
    timings = speed.Timings({"a": [1.0] * 101}, {"a": stages}, {"a": steps})
    expected = {"p50_ms": 51, "p90_ms": 91, "p99_ms": 100, "runs": 101}
    assert timings.stage_summaries()["a"]["denoise"] == expected
    assert timings.stage_summaries()["a"]["text"]["p99_ms"] == 1
    first, second = timings.step_summaries()["a"]
    assert first == expected and second["p90_ms"] == 182


def test_slow_candidates_get_fewer_rounds(monkeypatch: pytest.MonkeyPatch, fake_candidate: Callable[..., Any]) -> None:
    monkeypatch.setattr(speed, "SECONDS", 1e-9)
    assert len(speed.time_all({"a": fake_candidate()}, ["x"], True, rounds=9).images["a"]) == 3


def test_the_fastest_sound_backend_wins(fake_candidate: Callable[..., Any]) -> None:
    def slowed(candidate: Any, seconds: float) -> Any:
        def draw(*arguments: Any) -> Any:
            time.sleep(seconds)
            return candidate(*arguments)

        return draw

    def open_pipeline(backend: str, precision: str) -> Any:
        if backend == "absent":
            raise DiffpressError("not here")
        return {
            ("slow", "fp32"): slowed(fake_candidate(), 0.05),
            ("quick", "bf16"): fake_candidate(),
            ("broken", "bf16"): fake_candidate(problem="image 0: NaN"),
        }[backend, precision]

    pairs = [("slow", "fp32"), ("quick", "bf16"), ("broken", "bf16"), ("absent", "fp32")]
    default, tried = speed.fastest(pairs, open_pipeline, "x")
    assert default == {"name": "quick", "precision": "bf16"}
    assert [entry.get("problem") for entry in tried] == [None, None, "image 0: NaN", "not here"]
    assert tried[0]["p50_ms"] > tried[1]["p50_ms"]
    with pytest.raises(DiffpressError, match=r"no backend.*not here"):
        speed.fastest([("absent", "fp32")], open_pipeline, "x")
