import numpy as np
import pytest
from scipy import stats

from diffpress.benchmarks import bootstrap


def test_intervals_of_means_are_those_of_scipy() -> None:
    rows = np.random.default_rng(1).gamma(2, 3, 40)
    found = bootstrap.interval(rows, resamples=20_000)
    expected = stats.bootstrap((rows,), np.mean, method="percentile", n_resamples=20_000, random_state=2)
    assert found == pytest.approx(list(expected.confidence_interval), rel=0.02)


def test_intervals_of_means_cover_the_true_one() -> None:
    random = np.random.default_rng(3)
    inside = []
    for _ in range(300):
        low, high = bootstrap.interval(random.gamma(2, 3, 60), resamples=500) or (0, 0)
        inside.append(low <= 6 <= high)
    assert 0.89 <= np.mean(inside) <= 0.98


def test_shares_count_what_rows_hold() -> None:
    rows = np.array([[2, 2], [0, 1], [1, 2], [4, 4]])
    assert bootstrap.share(rows[None])[0] == pytest.approx(7 / 9)
    low, high = bootstrap.interval(rows, bootstrap.share) or (0, 0)
    assert 0 <= low < 7 / 9 < high <= 1
    assert bootstrap.share(np.zeros((1, 3, 2)))[0] == 0


def test_many_rows_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(4).normal(size=100)
    whole = bootstrap.interval(rows)
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 1000)
    assert bootstrap.interval(rows) == pytest.approx(whole, abs=0.03)


def test_one_row_says_nothing() -> None:
    assert bootstrap.interval(np.ones(1)) is None
    assert bootstrap.interval(np.ones(2)) == [1.0, 1.0]
