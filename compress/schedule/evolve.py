"""Timesteps found by evolution: AutoDiffusion, its search for a subset of the trained timesteps.

Li et al. 2023, AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated Diffusion Model
Acceleration, Section 3.4. A candidate is a set of K timesteps; each epoch keeps the best, mutates and crosses them, and
fills up with random ones. The paper scores 1000 samples by the distance of their features to real ones (KID, FID); here
the score is whatever the caller measures, of the same noise for every candidate, so that candidates compare in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from diffpress.errors import DiffpressError

Candidate = tuple[int, ...]  # distinct timesteps, falling


@dataclass(frozen=True)
class Evolution:
    """How long and how wide the search is; the defaults are the paper's."""

    population: int = 50
    epochs: int = 10
    keep: int = 10  # the best, who have children
    mutated: int = 25
    crossed: int = 10
    rate: tuple[float, float] = (0.1, 0.25)  # of genes that a mutation changes: drawn between the two for each child

    def __post_init__(self) -> None:
        if min(self.population, self.epochs, self.keep) < 1 or self.mutated + self.crossed > self.population:
            raise DiffpressError("evolution needs a population that holds its mutated and crossed children")


@dataclass(frozen=True)
class Generation:
    """Where a search stands after an epoch: every candidate scored so far, best first. `epoch` counts finished ones."""

    scored: tuple[tuple[float, Candidate], ...]
    epoch: int

    @property
    def best(self) -> Candidate:
        """The candidate of least score."""
        return self.scored[0][1]


def evolve(
    score: Callable[[Candidate], float],
    first: Sequence[Candidate],
    count: int,
    evolution: Evolution,
    *,
    seed: int = 0,
    start: Generation | None = None,
) -> Iterator[Generation]:
    """Search subsets of range(count) for the least score, one `Generation` an epoch.

    `first` are candidates to begin with, all of one length; the first population is made of them, their mutations
    and random ones. `start`, a Generation that was yielded before, goes on from there and gives what an uninterrupted
    search with the same arguments gives. No candidate is scored twice.
    """
    steps = len(first[0])
    if any(len(candidate) != steps for candidate in first) or not 1 <= steps <= count:
        raise DiffpressError(f"{steps} of {count} timesteps cannot be chosen, or candidates differ in length")
    known = {candidate: value for value, candidate in start.scored} if start else {}
    for epoch in range(start.epoch if start else 0, evolution.epochs):
        parents = [candidate for _, candidate in _ranked(known)[: evolution.keep]]
        children = _children(parents or first, known, count, evolution, np.random.default_rng((seed, epoch)))
        known |= {child: float(score(child)) for child in children}
        yield Generation(tuple(_ranked(known)), epoch + 1)


def _children(
    parents: Sequence[Candidate],
    known: Container[Candidate],
    count: int,
    evolution: Evolution,
    generator: np.random.Generator,
) -> list[Candidate]:
    """Parents that have no score yet, their mutations, their crossings, and random ones to fill up."""
    children = [parent for parent in dict.fromkeys(map(tuple, parents)) if parent not in known]
    steps, kept = len(parents[0]), len(parents) - len(children)

    def add(make: Callable[[], Candidate], wanted: int) -> None:
        end = len(children) + wanted
        for _ in range(4 * wanted):  # subsets run out where count is small
            child = make()
            if len(children) < end and child not in known and child not in children:
                children.append(child)

    def one() -> Candidate:
        return parents[int(generator.integers(len(parents)))]

    def random() -> Candidate:
        return tuple(sorted(generator.choice(count, steps, replace=False).tolist(), reverse=True))

    add(lambda: mutated(one(), count, evolution.rate, generator), evolution.mutated)
    add(lambda: crossed(one(), one(), generator), evolution.crossed)
    add(random, max(0, evolution.population - kept - len(children)))
    return children


def mutated(parent: Candidate, count: int, rate: tuple[float, float], generator: np.random.Generator) -> Candidate:
    """Genes drawn anew between their neighbours, one at least; the order is kept, so that the rest still fits."""
    genes = list(parent)
    chosen = generator.random(len(genes)) < generator.uniform(*rate)
    if not chosen.any():
        chosen[generator.integers(len(genes))] = True
    for index in np.flatnonzero(chosen):
        above = genes[index - 1] if index else count
        below = genes[index + 1] if index + 1 < len(genes) else -1
        genes[index] = int(generator.integers(below + 1, above))
    return tuple(genes)


def crossed(first: Candidate, second: Candidate, generator: np.random.Generator) -> Candidate:
    """As many distinct timesteps, drawn from those of both parents."""
    both = sorted({*first, *second}, reverse=True)
    chosen = generator.choice(len(both), len(first), replace=False)
    return tuple(both[index] for index in sorted(chosen))


def _ranked(known: dict[Candidate, float]) -> list[tuple[float, Candidate]]:
    return sorted((value, candidate) for candidate, value in known.items())
