import random
from collections.abc import Callable
from typing import Any

import pytest

from diffpress.benchmarks.search import objective
from diffpress.benchmarks.search.objective import LOSSES
from diffpress.errors import DiffpressError
from diffpress.gates import parse

Measured = Callable[..., dict[str, Any]]


def brute_force(points: list[tuple[float, float]]) -> list[int]:
    """The definition, word by word."""
    kept = []
    for index, (fast, loss) in enumerate(points):
        as_good = [(other, lost) for other, lost in points if other >= fast and lost <= loss]
        if not any(other > fast or lost < loss for other, lost in as_good):
            kept.append(index)
    return kept


@pytest.mark.parametrize("seed", range(30))
def test_the_front_is_what_nothing_beats(seed: int) -> None:
    dice = random.Random(seed)
    points = [(float(dice.randint(1, 6)), dice.randint(-3, 6) / 2) for _ in range(12)]
    assert objective.front(points) == brute_force(points)
    near = objective.front(points, 0.2)
    assert set(objective.front(points)) <= set(near)
    for index, (fast, loss) in enumerate(points):
        ahead = [(other, lost) for other, lost in points if other >= 1.2 * fast and lost <= loss - 0.2 * abs(loss)]
        clearly = any((other, lost) != (fast, loss) for other, lost in ahead)
        assert (index in near) != clearly


def test_what_is_not_finite_is_not_on_the_front() -> None:
    assert objective.front([(9.0, float("inf")), (2.0, 0.5), (5.0, float("nan"))]) == [1]


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_loses_least_of_those_within_all_limits(seed: int, measured: Measured) -> None:
    dice = random.Random(seed)
    found = [measured(dice.randint(1, 12), dice.randint(0, 8) / 20) for _ in range(10)]
    budgets = [parse("speedup >= 6"), parse("psnr > 20")]
    within = [i for i, one in enumerate(found) if one["speedup"]["vs_eager"] >= 6 and one["quality"]["psnr_db"] > 20]
    chosen = objective.choose(found, LOSSES["latent_error"], budgets)
    if not within:
        assert chosen is None
        return
    assert chosen in within
    least = min(found[i]["quality"]["latent_rel_l2"] for i in within)
    fastest = max(found[i]["speedup"]["vs_eager"] for i in within if found[i]["quality"]["latent_rel_l2"] == least)
    own = found[chosen]
    assert (own["quality"]["latent_rel_l2"], own["speedup"]["vs_eager"]) == (least, fastest)


def _of(errors: list[float], fast: float, measured: Measured) -> dict[str, Any]:
    found = measured(fast, sum(errors) / len(errors)) | {"errors": errors}
    found["quality"]["latent_rel_l2_median"] = sorted(errors)[len(errors) // 2]
    return found


def test_one_image_that_ends_elsewhere_does_not_decide(measured: Measured) -> None:
    near, lucky = [0.01, 0.012] * 15 + [0.011, 1.2], [0.02, 0.03] * 16
    worse = [one + 0.3 for one in near]
    found = [_of(near, 8, measured), _of(lucky, 9, measured), _of(worse, 10, measured)]
    means = [one["quality"]["latent_rel_l2"] for one in found]
    assert means[1] < means[0] < means[2]
    assert objective.least(found, LOSSES["latent_error"]) == 0
    assert [objective.alike(one, found[1]) for one in found] == [True, True, False]
    assert objective.choose(found, LOSSES["latent_error"], [parse("speedup >= 9")]) == 1
    # A mean that the images do tell apart decides, whatever the median says.
    often = [0.01] * 20 + [0.5] * 12
    assert objective.least([_of(often, 8, measured), found[1]], LOSSES["latent_error"]) == 1
    assert objective.least([], LOSSES["latent_error"]) is None


@pytest.mark.parametrize(
    ("gate", "missed"),
    [
        ("speedup >= 6", 0.5),
        ("speedup >= 3", 0.0),
        ("bytes <= 0.3x", 1 / 3),
        ("bytes <= -70%", 1 / 7),
        ("attribute_accuracy >= -1pt", 9.0),
        ("psnr >= 40", 0.0),
        ("psnr > 40", 1e-9),
    ],
)
def test_limits_are_missed_by_a_share_of_them(gate: str, missed: float, measured: Measured) -> None:
    found = measured(3.0, 0.1)
    assert objective.missed(parse(gate), found) == pytest.approx(missed, abs=1e-12)
    assert objective.keeps([parse(gate)], found) == (missed == 0)


def test_what_was_not_measured_is_missed_by_far(measured: Measured) -> None:
    found = measured(9.0, 0.1)
    found["quality"]["clip_score"] = {"reference": None, "compressed": None}
    gates = [parse("clip >= -1%"), parse("speedup >= 10")]
    assert objective.missed(gates[0], found) == objective.UNMEASURED
    assert objective.failed(gates, found) == "clip >= -1% (reached nothing), speedup >= 10 (reached 9)"


def test_the_nearest_misses_least_in_all(measured: Measured) -> None:
    budgets = [parse("speedup >= 10"), parse("latent_error <= 0.1")]
    found = [measured(9.0, 0.5), measured(8.0, 0.1), measured(10.0, 0.2)]
    assert objective.nearest(found, budgets) == 1


def test_every_loss_grows_with_what_is_lost(measured: Measured) -> None:
    good, bad = measured(1.0, 0.1), measured(1.0, 0.2)
    bad["quality"]["frechet"] = {"reference": 1.0, "compressed": 3.0}
    for name, loss in LOSSES.items():
        assert loss.of(bad) > loss.of(good), name
    assert LOSSES["attribute_loss"].of(good) == pytest.approx(10)
    assert LOSSES["psnr_loss"].of(good) == pytest.approx(-40)


@pytest.mark.parametrize(
    ("minimise", "budget", "shapes", "message"),
    [
        ("beauty", "speedup >= 2", True, "there is no loss 'beauty', choose from: latent_error"),
        ("latent_error", "cold_start_ms <= 5", True, "a search does not measure cold_start_ms, choose from: speedup"),
        ("frechet", "speedup >= 2", False, "frechet needs judges that only 'shapes' comes with"),
        ("latent_error", "clip >= -1%", False, "clip needs judges"),
    ],
)
def test_what_a_search_does_not_measure_is_refused(minimise: str, budget: str, shapes: bool, message: str) -> None:
    with pytest.raises(DiffpressError, match=message):
        objective.check(minimise, [parse(budget)], shapes)
