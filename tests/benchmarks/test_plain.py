from collections.abc import Callable, Mapping
from typing import Any

import pytest

from diffpress.benchmarks import plain
from diffpress.benchmarks.shapes.models import SCHEDULER
from diffpress.plan import Sampling


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes a plain candidate of n steps take n ms and the compressed one `limit_ms`."""

    def use(limit_ms: float) -> None:
        def alternate(candidates: Mapping[str, Any], rounds: int) -> dict[str, list[float]]:
            steps = candidates["plain"](0)
            candidates["compressed"](0)
            return {"plain": [float(steps)] * rounds, "compressed": [limit_ms] * rounds}

        monkeypatch.setattr(plain, "alternate", alternate)

    return use


def search(first: int, most: int = 50) -> list[plain.Trial]:
    return plain.search(lambda steps: lambda prompts, seeds: steps, lambda prompts, seeds: None, first, most, "x")


@pytest.mark.parametrize("first", [1, 5, 6, 9, 50])
def test_the_largest_step_count_that_fits_is_found(timed: Callable[[float], None], first: int) -> None:
    timed(6.5)
    found = plain.best(search(first))
    assert found and found.steps == 6 and found.ratio == pytest.approx(6 / 6.5)


def test_there_may_be_none(timed: Callable[[float], None]) -> None:
    timed(0.5)
    trials = search(3)
    assert plain.best(trials) is None
    assert [trial.steps for trial in trials] == [3, 2, 1]


def test_no_more_steps_than_the_reference(timed: Callable[[float], None]) -> None:
    timed(1000)
    assert plain.best(search(50)).steps == 50  # type: ignore[union-attr]


@pytest.mark.parametrize(("compressed", "steps"), [(100.0, 18), (5.0, 1), (1e6, 50)])
def test_estimate(compressed: float, steps: int) -> None:
    assert plain.estimate(compressed, text_ms=2, step_ms=5, decode_ms=8, most=50) == steps


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_schedules_are_those_of_the_solvers_on_the_same_betas(steps: int) -> None:
    like = Sampling("DDIMScheduler", 50, 3.0, 64, 64, (), (), 1.0, ())
    found = plain.schedules({"class": "DDIMScheduler", "config": SCHEDULER}, like, steps)
    assert plain.TIMED in found and found.keys() <= plain.RIVALS.keys()
    assert len(found) == len(plain.RIVALS) or steps == 1
    for schedule in found.values():
        assert (schedule.steps, schedule.guidance_scale, schedule.height) == (steps, 3.0, 64)
        assert len(schedule.terms) == len(schedule.timesteps) == steps


def test_the_rival_is_the_nearest_to_the_reference(fake_candidate: Callable[..., Any]) -> None:
    errors = {"a": 0.3, "b": 0.1, "c": 0.2}
    opened: dict[str, Any] = {}

    def open_plain(schedule: Any) -> Any:
        opened[schedule] = fake_candidate(error=errors[schedule])
        return opened[schedule]

    names: Any = {name: name for name in errors}
    heard: dict[str, int] = {}
    reference = fake_candidate(error=0.0)
    name, candidate = plain.best_schedule(
        names, open_plain, reference, ["x"] * 20, 8, True, lambda name, drawn: heard.update({name: len(drawn.pixels)})
    )
    assert heard == dict.fromkeys("abc", plain.JUDGED)
    assert name == "b" and list(opened) == ["a", "b", "c"] and candidate is opened["b"]


def test_the_rival_at_every_step_count_that_was_timed(fake_candidate: Callable[..., Any]) -> None:
    """All schedules at the count that fits, the best of them at the others."""
    scheduler, own = {"class": "DDIMScheduler", "config": SCHEDULER}, Sampling("x", 50, 3.0, 64, 64, (), (), 1.0, ())

    def open_plain(schedule: Sampling) -> Any:
        first = schedule.timesteps[1]  # tells the schedules apart; the lowest is the nearest
        return fake_candidate(error=first, steps=schedule.steps)

    trials = [plain.Trial(6, 9.0, 0.9), plain.Trial(7, 11.0, 1.1), plain.Trial(8, 12.0, 1.2)]
    found = plain.rival(trials, scheduler, own, open_plain, fake_candidate(), ["x"] * 3, batch=2)
    assert found is not None and found.sampling.steps == 6
    assert [name for name, steps in found.drawn if steps == 6] == list(plain.RIVALS)
    assert [key for key in found.drawn if key[1] != 6] == [(found.schedule, 7), (found.schedule, 8)]
    assert {len(drawn.pixels) for drawn in found.drawn.values()} == {3}
    assert plain.rival(trials[1:], scheduler, own, open_plain, fake_candidate(), ["x"], batch=2) is None
