"""Plans for a latency or an error: the dynamic program against brute force, predictions against least squares."""

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

from diffpress.calibration.capture import Execution, Recordings, record
from diffpress.calibration.model import load_pipeline
from diffpress.calibration.schedule import tabulate
from diffpress.calibration.sets import CalibrationSet
from diffpress.compress.cache.budget import CacheBudgetPass, errors, faster, frontier
from diffpress.compress.cache.deepcache import CachePass
from diffpress.compress.cache.predict import Observed
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, Corrections, StepProgram

STEPS = 8


def cost(full: tuple[int, ...], steps: int, depth: int, error: np.ndarray) -> float:
    total = 0.0
    ends = (*full, steps)
    for index, (last, following) in enumerate(pairwise(ends)):
        before = ends[index - 1] if index and depth == 2 else -1
        total += sum(error[step, last, before] for step in range(last + 1, following))
    return total


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("longest", [2, 8])
def test_the_dynamic_program_equals_brute_force(depth: int, longest: int) -> None:
    error = np.random.default_rng(depth).random((STEPS, STEPS, STEPS))
    found = frontier(STEPS, depth, longest, lambda step, last, before: float(error[step, last, before]))
    start = (0, 1) if depth == 2 else (0,)
    for count in range(len(start), STEPS + 1):
        plans = [(*start, *rest) for rest in combinations(range(len(start), STEPS), count - len(start))]
        plans = [plan for plan in plans if all(b - a - 1 <= longest for a, b in pairwise((*plan, STEPS)))]
        if not plans:
            assert count not in found
            continue
        least = min(plans, key=lambda plan: cost(plan, STEPS, depth, error))
        assert found[count][1] == least
        assert found[count][0] == pytest.approx(cost(least, STEPS, depth, error))
    assert found[STEPS] == (0.0, tuple(range(STEPS)))


def observed(features: np.ndarray) -> Observed:
    """Of features [T, C, values]."""
    moments = np.einsum("tcv,scv->tsc", features, features)
    return Observed(moments, features.sum(2), features.shape[2], np.arange(1.0, len(features) + 1))


def test_predictions_are_those_of_least_squares() -> None:
    features = np.random.default_rng(0).normal(size=(4, 3, 50)) + 2
    seen = observed(features)
    for sources in ((1,), (1, 0)):
        left = 0.0
        for channel in range(3):
            columns = np.stack([*(features[source, channel] for source in sources), np.ones(50)], 1)
            left += float(np.linalg.lstsq(columns, features[3, channel], rcond=None)[1][0])
        assert seen.residual(3, sources) == pytest.approx((left / (features[3] ** 2).sum()) ** 0.5, rel=1e-4)
    gone = np.linalg.norm(features[1] - features[3]) / np.linalg.norm(features[3])
    assert seen.stale(3, 1) == pytest.approx(gone)
    assert errors(seen, 0)(3, 1, 0) == pytest.approx(4 * gone)
    assert errors(seen, 2)(3, 1, 0) == pytest.approx(4 * seen.residual(3, (1, 0)))


def test_a_feature_on_a_line_is_predicted_from_two() -> None:
    at, slope = np.random.default_rng(1).normal(size=(2, 3, 40))
    seen = observed(np.stack([at + step * slope for step in range(5)]))
    assert seen.residual(4, (1, 0)) < 1e-4 < seen.residual(4, (1,)) < seen.stale(4, 1)


def test_how_much_faster() -> None:
    assert faster({FULL: 10.0, "cached": 2.0}, 5, 20) == pytest.approx(200 / 80)


@pytest.fixture
def work(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setenv("DIFFPRESS_CACHE", str(tmp_path / "cache"))
    pipeline = load_pipeline(str(tiny_pipeline))
    sampling = tabulate(pipeline.scheduler, 6, 3.0, 32, 32)
    chosen = CalibrationSet(("a red ring", "a star", "a blue disc", "two squares"), "every-step")

    def recorder(how: Execution) -> Recordings:
        return record(pipeline, "tiny", sampling, chosen, 3, lambda items, _: items, how)

    made = Work(pipeline, sampling, 3, recorder, lambda items, _: items, tmp_path)
    made.latency = latency
    return made


def latency(program: StepProgram, corrections: Corrections | None) -> dict[str, float]:
    assert all(len(program.variants[name].reads) == 2 for name in program.steps if name != FULL)
    return {FULL: 10.0, "cached": 1.0}


def test_a_speedup_is_kept_and_the_frontier_told(work: Work) -> None:
    step = CacheBudgetPass(speedup=1.5, branches=(0, 1), probes=2)
    step.requires(work)
    summary = step.apply(work)
    rows = work.tables["cache-budget"]
    assert [row["branch"] for row in rows] == [0, 1]
    assert all(row["full"] == 3 and row["speedup"] == pytest.approx(60 / 33) for row in rows)
    assert work.program.steps.count(FULL) == 3 and work.program.marks().startswith("##")
    best = min(rows, key=lambda row: row["measured"])
    assert work.program.variants["cached"].features == (f"up_{best['branch']}",)
    assert f"{best['measured']:.3%}" in summary


def test_an_error_is_kept_or_nothing_is_cached(work: Work) -> None:
    strict = CacheBudgetPass(error=1e-12, probes=2)
    assert "every step stays full" in strict.apply(work)
    assert work.program.steps == (FULL,) * 6
    loose = CacheBudgetPass(error=10.0, probes=2)
    loose.apply(work)
    rows = work.tables["cache-budget"]
    assert work.program.steps.count(FULL) == min(row["full"] for row in rows) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give a speedup or an error, and not both"),
        ({"speedup": 2, "error": 0.1}, "give a speedup or an error, and not both"),
    ],
)
def test_one_limit_has_to_be_given(fields: dict[str, float], message: str) -> None:
    with pytest.raises(DiffpressError, match=message):
        CacheBudgetPass(**fields)  # type: ignore[arg-type]


def test_what_cannot_be_planned_is_refused(work: Work) -> None:
    with pytest.raises(DiffpressError, match="branch 9 does not exist, there are branches 0 to 8"):
        CacheBudgetPass(speedup=2, branches=(9,)).requires(work)
    with pytest.raises(DiffpressError, match=r"speedup of 9 cannot be reached: the cheapest plan has 2\.50"):
        CacheBudgetPass(speedup=9, probes=2).apply(work)
    CachePass().apply(work)
    with pytest.raises(DiffpressError, match="keep one of the two"):
        CacheBudgetPass(speedup=2).requires(work)
    work.latency = None
    work.program = StepProgram((FULL,) * 6)
    with pytest.raises(DiffpressError, match="no inference library is installed"):
        CacheBudgetPass(speedup=2).requires(work)
