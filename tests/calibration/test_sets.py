"""Which calls a calibration set records."""

from itertools import pairwise
from math import erf, sqrt

import pytest

from diffpress.calibration.sets import CalibrationSet, require_steps, uniform_stride
from diffpress.errors import DiffpressError

SCHEDULE = [float(t) for t in range(981, 0, -20)]  # 50 calls, from noise to picture


@pytest.mark.parametrize(("calls", "count"), [(50, 10), (50, 1), (3, 10), (7, 7)])
def test_uniform_stride(calls: int, count: int) -> None:
    chosen = uniform_stride(calls, count)
    assert len(chosen) == min(calls, count)
    assert chosen[0] == 0
    assert count == 1 or chosen[-1] == calls - 1
    gaps = {b - a for a, b in pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_uniform_every_step_and_single_are_the_same_for_every_prompt() -> None:
    prompts = ("a", "b")
    assert CalibrationSet(prompts, "uniform", 3).calls([5.0, 4.0, 3.0, 2.0, 1.0], 6, 0) == ((0, 2, 4),) * 2
    assert CalibrationSet(prompts, "every-step", 3).calls([5.0, 4.0, 3.0, 2.0], 6, 0) == ((0, 1, 2, 3),) * 2
    assert CalibrationSet(prompts, "single", 3).calls([5.0, 4.0, 3.0], 6, 0) == ((1,),) * 2
    assert CalibrationSet(prompts, "single", 3).calls([5.0], 6, 0) == ((0,),) * 2


def test_uniform_has_as_many_calls_of_every_variant_of_a_program() -> None:
    chosen = CalibrationSet(("a",), "uniform", 10)
    interval = [("full", "cached")[call % 5 > 0] for call in range(50)]
    (calls,) = chosen.calls(SCHEDULE, 1000, 0, interval)
    assert [interval[call] for call in calls].count("full") == 10
    assert len(calls) == len(set(calls)) == 20
    assert calls == tuple(sorted(calls))
    assert chosen.calls(SCHEDULE, 1000, 0, ["full"] * 50) == chosen.calls(SCHEDULE, 1000, 0)
    rare = ["rare" if call in (0, 30) else "often" for call in range(50)]
    (calls,) = chosen.calls(SCHEDULE, 1000, 0, rare)
    assert {0, 30} <= set(calls)
    assert len(calls) == 12
    (calls,) = CalibrationSet(("a",), "uniform", 1).calls(SCHEDULE, 1000, 0, rare)
    assert {rare[call] for call in calls} == {"rare", "often"}


def test_ndtc_follows_the_clamped_normal_distribution_of_the_paper() -> None:
    draws = CalibrationSet(("prompt",) * 4000, "ndtc", 1).calls(SCHEDULE, 1000, 0)
    timesteps = [SCHEDULE[call] for (call,) in draws]

    def expected(t: float) -> float:
        return 0.5 * (1 + erf((t - 400) / 400 / sqrt(2)))

    # Borders half-way between calls, so that rounding to the nearest call moves nothing across them.
    for border in (11, 191, 391, 591, 971):
        share = sum(t < border for t in timesteps) / len(timesteps)
        assert share == pytest.approx(expected(border), abs=0.025), border
    assert sum(t == 1 for t in timesteps) > 500  # clamped at the picture's end, not the noise's
    assert sum(t == 981 for t in timesteps) < 400


def test_ndtc_draws_of_a_prompt_are_distinct_seeded_and_independent_of_other_prompts() -> None:
    chosen = CalibrationSet(("a", "b", "c"), "ndtc", 20).calls(SCHEDULE, 1000, 7)
    assert all(list(calls) == sorted(set(calls)) and len(calls) == 20 for calls in chosen)
    assert chosen[0] != chosen[1]
    assert CalibrationSet(("a", "b"), "ndtc", 20).calls(SCHEDULE, 1000, 7) == chosen[:2]
    assert CalibrationSet(("a", "b", "c"), "ndtc", 20).calls(SCHEDULE, 1000, 8) != chosen
    assert CalibrationSet(("a",), "ndtc", 99).calls(SCHEDULE, 1000, 7) == (tuple(range(50)),)


def test_a_set_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(DiffpressError, match="'often', choose from: uniform, ndtc, every-step, single"):
        CalibrationSet(("a",), "often")  # type: ignore[arg-type]
    with pytest.raises(DiffpressError, match="at least one prompt"):
        CalibrationSet(())
    with pytest.raises(DiffpressError, match="at least one step"):
        CalibrationSet(("a",), steps=0)


def test_required_steps_are_named() -> None:
    require_steps({0, 4}, [0, 0, 0, 1, 1], "this")
    with pytest.raises(DiffpressError, match=r"quantize needs recorded calls at steps 3, 4, which have none"):
        require_steps({0, 2}, [0, 0, 0, 1, 1], "quantize")
    with pytest.raises(DiffpressError, match=r"0, 1, 2, 3, 4, 5, 6, 7, \.\.\., which"):
        require_steps(set(), list(range(50)), "this")
