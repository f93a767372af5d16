import itertools
import random

import pytest

from diffpress.compress.prune.allocate import Choice, allocate, uniform
from diffpress.errors import DiffpressError


def curve(error: float, count: int = 5, price: float = 1.0, power: float = 2.0) -> list[Choice]:
    return [Choice(n, price * n, error * (n / (count - 1)) ** power) for n in range(count)]


def test_what_costs_least_goes_first() -> None:
    chosen = allocate({"dear": curve(9.0), "cheap": curve(1.0)}, 4)
    assert {name: choice.removed for name, choice in chosen.items()} == {"dear": 0, "cheap": 4}
    assert all(choice.removed == 0 for choice in allocate({"a": curve(1.0)}, 0).values())


def test_it_is_optimal_where_the_budget_is_met_exactly() -> None:
    drawn = random.Random(0)
    for _ in range(20):
        choices = {name: curve(drawn.random(), price=1.0, power=1 + drawn.random() * 2) for name in "abc"}
        budget = drawn.randrange(13)
        best = min(
            sum(choice.error for choice in some)
            for some in itertools.product(*choices.values())
            if sum(choice.saved for choice in some) >= budget
        )
        chosen = allocate(choices, budget).values()
        assert sum(choice.saved for choice in chosen) >= budget
        assert sum(choice.error for choice in chosen) == pytest.approx(best)


def test_a_jump_is_not_half_taken() -> None:
    # The first piece hurts as much as all: along the hull all go at once.
    jump = [Choice(0, 0, 0), Choice(1, 1, 5.0), Choice(2, 2, 5.1), Choice(3, 3, 5.2)]
    chosen = allocate({"jump": jump, "steady": curve(100.0, 4, power=1.0)}, 1)
    assert (chosen["jump"].removed, chosen["steady"].removed) == (3, 0)


def test_uniform_is_the_same_share_and_the_smallest_that_does() -> None:
    chosen = uniform({"small": curve(1.0, 5), "large": curve(1.0, 9)}, 6)
    assert {name: choice.removed for name, choice in chosen.items()} == {"small": 2, "large": 4}


def test_more_than_there_is_cannot_be_saved() -> None:
    for method in (allocate, uniform):
        with pytest.raises(DiffpressError, match="at most 4 can be saved of the 5 "):
            method({"a": curve(1.0)}, 5)
