"""Evolution over subsets of timesteps: against brute force; and an interrupted search is the one that was not."""

import itertools

import numpy as np
import pytest

from diffpress.compress.schedule.evolve import Candidate, Evolution, crossed, evolve, mutated
from diffpress.errors import DiffpressError

SMALL = Evolution(population=12, epochs=10, keep=4, mutated=6, crossed=3)
FIRST: list[Candidate] = [(15, 10, 5), (12, 8, 4)]


def score(candidate: Candidate) -> float:
    """A landscape with several valleys."""
    target = np.array([13, 6, 1])
    distance = np.abs(np.array(candidate) - target).sum()
    return float(distance + 2 * np.sin(np.array(candidate)).sum())


def test_the_best_subset_of_all_is_found() -> None:
    every = itertools.combinations(range(15, -1, -1), 3)
    wanted = min(every, key=score)
    *_, last = evolve(score, FIRST, 16, SMALL, seed=1)
    assert last.best == wanted and last.epoch == 10


def test_candidates_are_subsets_in_falling_order_and_scored_once() -> None:
    asked: list[Candidate] = []

    def counted(candidate: Candidate) -> float:
        asked.append(candidate)
        return score(candidate)

    *_, last = evolve(counted, FIRST, 16, SMALL)
    assert len(asked) == len(set(asked)) == len(last.scored) <= SMALL.population * SMALL.epochs
    assert set(FIRST) <= set(asked)
    assert all(0 <= c[2] < c[1] < c[0] < 16 for c in asked)
    assert [value for value, _ in last.scored] == sorted(value for value, _ in last.scored)


def test_an_interrupted_search_goes_on_as_if_it_had_not_been() -> None:
    whole = list(evolve(score, FIRST, 16, SMALL, seed=3))
    rest = list(evolve(score, FIRST, 16, SMALL, seed=3, start=whole[3]))
    assert rest == whole[4:]
    assert whole != list(evolve(score, FIRST, 16, SMALL, seed=4))


def test_a_set_with_few_subsets_ends() -> None:
    *_, last = evolve(score, [(2, 1, 0)], 4, SMALL)
    assert len(last.scored) == 4


@pytest.mark.parametrize("seed", range(20))
def test_children(seed: int) -> None:
    generator = np.random.default_rng(seed)
    child = mutated((9, 5, 4, 3, 0), 10, (0.1, 0.25), generator)
    assert len(child) == 5 and all(a > b for a, b in itertools.pairwise(child)) and child[-1] >= 0 and child[0] < 10
    both = crossed((9, 5, 1), (8, 5, 2), generator)
    assert set(both) <= {9, 8, 5, 2, 1} and both[0] > both[1] > both[2]


def test_candidates_that_cannot_be() -> None:
    with pytest.raises(DiffpressError, match="differ in length"):
        list(evolve(score, [(3, 2), (3, 2, 1)], 10, SMALL))
    with pytest.raises(DiffpressError, match="cannot be chosen"):
        list(evolve(score, [(3, 2, 1)], 2, SMALL))
    with pytest.raises(DiffpressError, match="population"):
        Evolution(population=5, mutated=5, crossed=1)
