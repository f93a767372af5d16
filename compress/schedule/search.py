"""Schedules found for the model at hand: every method proposes noise levels, one score judges them all.

The score of a schedule is how far its final latents are from the converged solution of the same prompts and noise, with
the solver that will run: the geometric mean over images of the relative error, so that the one image of many that ends
elsewhere (its trajectory forks) does not decide. Methods that have settings choose them by the score. Finalists, and
the schedules that need no search, are scored again on fresh noise, and the best of all is taken.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffpress.compress.schedule import align, gits
from diffpress.compress.schedule.evolve import Candidate, Evolution, evolve
from diffpress.compress.schedule.sigmas import karras, sigma_of, timestep_of
from diffpress.compress.schedule.trajectory import Trajectories, relative_error
from diffpress.errors import DiffpressError
from diffpress.plan import Sampling

Method = Literal["gits", "align-your-steps", "autodiffusion", "descent"]
Sigmas = tuple[float, ...]  # falling, one for each step and a final zero

CONVERGED = 100  # steps of DPM-Solver++ on Karras sigmas: on `shapes` 0.3 % from those of 200
GRID = 48  # intervals of the teacher; the paper's 60 gives the same paths on `shapes`
GAMMAS = (1.0, 1.05, 1.1, 1.15, 1.2)  # of GITS, which the paper tunes by hand
EARLY = (1.0, 0.8, 0.7, 0.6, 0.5)  # the same for least KLUB: below 1, which stands for its early stop
FINALISTS = 4
ROUNDS = 5  # of descent


@dataclass(frozen=True)
class Found:
    """What a search found and what is taken; errors are on noise that chose nothing."""

    method: Method
    own: Sigmas  # what the method found
    own_error: float
    others: dict[str, float]
    name: str  # of what is taken: the method, or one of `others` that it did not beat
    sigmas: Sigmas  # of what is taken
    evaluations: int  # schedules scored

    @property
    def error(self) -> float:
        """Of what is taken."""
        return self.own_error if self.name == self.method else self.others[self.name]

    def line(self) -> str:
        """For people: the error beside that of the other schedules."""
        beside = ", ".join(f"{name} {error:.4f}" for name, error in self.others.items())
        beaten = "" if self.name == self.method else f" (not beaten by {self.method}, {self.own_error:.4f})"
        return (
            f"{self.name}{beaten} taken, error {self.error:.4f} (without a search: {beside}; "
            f"{self.evaluations} schedules scored)"
        )


@dataclass
class Scores:
    """Errors of schedules on one set of trajectories, kept in a file, so that a search that is run again goes on."""

    trajectories: Trajectories
    solve: Callable[[Sigmas], Sampling]
    reference: Tensor
    file: Path
    progress: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        self.known: dict[Sigmas, float] = {}
        if self.file.exists():
            self.known = {tuple(sigmas): value for sigmas, value in json.loads(self.file.read_text("utf-8"))}

    @property
    def data(self) -> Tensor:
        """x0 [N, C, h, w] that paths of the forward process start from: the converged solution."""
        return self.reference

    def __call__(self, sigmas: Sequence[float]) -> float:
        """The geometric mean of the images' relative error; infinite for a schedule that the solver cannot make."""
        key = tuple(float(f"{sigma:.6g}") for sigma in sigmas)
        if key not in self.known:
            try:
                sampling = self.solve(key)
            except DiffpressError:
                return math.inf
            error = relative_error(self.trajectories.final(sampling), self.reference)
            self.known[key] = float(error.clamp_min(1e-6).log().mean().exp())
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(list(self.known.items())))
            partial.replace(self.file)
            self.progress()
        return self.known[key]


def find(
    method: Method,
    begin: Callable[[int], Trajectories],
    solve: Callable[[Sigmas], Sampling],
    converged: Sampling,
    plain: dict[str, Sigmas],
    steps: int,
    folder: Path,
    *,
    seed: int = 0,
    solver: str = "",
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
    evolution: Evolution | None = None,
) -> Found:
    """The best schedule of `steps` steps that `method` finds.

    `begin(draw)` opens trajectories with the noise of draw 0 (which searches) or 1 (which judges); `solve` is the
    solver's table at given sigmas, `converged` the schedule of the solution that errors are measured from. `plain`
    are schedules without a search: where a search may start, and what it has to beat. Scores and teachers are kept in
    `folder`, which searches with another `solver` or step count may share; an interrupted search goes on there. Raises
    `DiffpressError` where no schedule can be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bar = _ticks(progress, f"searching {steps} steps by {method}")
    sets = []
    for draw in (0, 1):
        trajectories = begin(draw)
        solution = _kept(folder / f"converged-{draw}.npy", functools.partial(trajectories.final, converged))
        reference = torch.from_numpy(solution)
        sets.append(
            Scores(trajectories, solve, reference, folder / f"scores-{draw}-{solver}.json", lambda: next(bar, None))
        )
    scores, fresh = sets
    smallest = scores.trajectories.sigma_range[1]
    # Where the last step begins matters most of all: plain schedules are tried with a later one, too.
    starts = [
        *plain.values(),
        *(_ending(sigmas, smallest * factor) for sigmas in plain.values() for factor in (1.7, 3)),
    ]
    if method == "gits":
        proposals = _gits(scores, steps, folder)
    elif method == "align-your-steps":
        proposals = _align(scores, steps, folder, seed)
    elif method == "autodiffusion":
        proposals = _autodiffusion(scores, starts, evolution or Evolution(), seed)
    else:
        proposals = _descent(scores, starts)
    ranked = sorted({sigmas: scores(sigmas) for sigmas in proposals}.items(), key=lambda item: item[1])
    finalists = {sigmas: fresh(sigmas) for sigmas, _ in ranked[:FINALISTS]}
    others = {name: fresh(sigmas) for name, sigmas in plain.items()}
    best = min(finalists, key=lambda sigmas: finalists[sigmas])
    errors: dict[str, float] = {method: finalists[best], **others}
    name = min(errors, key=lambda one: errors[one])
    evaluations = len(scores.known) + len(fresh.known)
    found = Found(method, best, finalists[best], others, name, plain.get(name, best), evaluations)
    if not math.isfinite(found.error):
        raise DiffpressError(f"schedule: this solver makes no schedule that {method} proposes: take another one")
    return found


def _gits(scores: Scores, steps: int, folder: Path) -> list[Sigmas]:
    """Shortest paths through grids of two densities, by both metrics and all GAMMAS."""
    found = []
    for rho in (7.0, 3.0):
        grid = karras(*scores.trajectories.sigma_range, GRID, rho)

        def costs(grid: list[float] = grid) -> Tensor:
            start = scores.trajectories.start()
            points, directions = gits.teacher(scores.trajectories.denoise, start, grid)
            metrics: tuple[gits.Metric, ...] = ("deviation", "l2")
            return torch.stack([gits.cost_matrix(points, directions, grid, metric) for metric in metrics])

        for matrix in torch.from_numpy(_kept(folder / f"gits-{rho:g}.npy", costs)):
            found += _paths(matrix, grid, steps, GAMMAS)
    return found


def _align(scores: Scores, steps: int, folder: Path, seed: int) -> list[Sigmas]:
    """Paths of least KLUB on a grid, then the paper's coordinate search from the best, stopped early by the score."""
    trajectories = scores.trajectories
    grid = karras(*trajectories.sigma_range, GRID, 7.0)

    def costs() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        paths = align.noised(scores.data, grid, generator)
        levels = zip(paths, reversed(grid), strict=True)
        denoised = [trajectories.denoise(x, torch.full((len(x),), sigma)) for x, sigma in levels]
        return align.klub_matrix(torch.stack(denoised[::-1]), grid)

    matrix = torch.from_numpy(_kept(folder / "klub.npy", costs))
    found = _paths(matrix, grid, steps, EARLY)
    smallest = trajectories.sigma_range[1]

    def sample_at(count: int, sigma: Tensor, generator: torch.Generator) -> Tensor:
        x0 = scores.data[torch.arange(count) % len(trajectories)]
        noise = torch.randn(x0.shape, generator=generator)
        return x0 + sigma.reshape(-1, *[1] * (x0.ndim - 1)) * noise

    def score(sigmas: Sequence[float]) -> float:
        return scores((*sigmas[:-1], 0.0))

    file = folder / f"align-{steps}.json"
    begun = json.loads(file.read_text("utf-8")) if file.exists() else None
    first = (*min(found, key=scores)[:-1], smallest)
    rounds = align.optimise(
        trajectories.denoise,
        sample_at,
        first,
        seed=seed,
        samples=max(32, len(trajectories)),
        candidates=7,
        rounds=6,
        score=score,
        start=align.Progress(**{name: _tupled(value) for name, value in begun.items()}) if begun else None,
    )
    last = first
    if begun:
        last = tuple(begun["sigmas"])
    for state in rounds:
        file.write_text(json.dumps(asdict(state)))
        last = state.sigmas
    return [*found, (*last[:-1], 0.0)]


def _autodiffusion(scores: Scores, starts: Sequence[Sigmas], evolution: Evolution, seed: int) -> list[Sigmas]:
    """Evolution over subsets of the trained timesteps. Every score is on file, so a search run again goes on."""
    alphas = scores.trajectories.alphas

    def placed(candidate: Candidate) -> Sigmas:
        return (*(float(sigma) for sigma in sigma_of(candidate, alphas)), 0.0)

    first = list(dict.fromkeys(_whole(timestep_of(sigmas[:-1], alphas)) for sigmas in starts))
    *_, last = evolve(lambda candidate: scores(placed(candidate)), first, len(alphas), evolution, seed=seed)
    return [placed(candidate) for _, candidate in last.scored[:FINALISTS]]


def _descent(scores: Scores, starts: Sequence[Sigmas]) -> list[Sigmas]:
    """Coordinate search on the score itself: each sigma tries to move towards its neighbours, less and less far."""
    smallest = scores.trajectories.sigma_range[1]
    best = min(starts, key=scores)
    for round_ in range(ROUNDS):
        share = 0.5 * 0.6**round_
        # From the end: the last levels decide most.
        for index in range(len(best) - 2, 0, -1):
            below = best[index + 1] or 0.99 * smallest
            moved = [best[index] * (other / best[index]) ** share for other in (best[index - 1], below)]
            tried = [(*best[:index], sigma, *best[index + 1 :]) for sigma in moved if sigma >= smallest]
            best = min([best, *tried], key=scores)
    return [best]


def _paths(costs: Tensor, grid: Sequence[float], steps: int, gammas: Sequence[float]) -> list[Sigmas]:
    """Distinct shortest paths; the last interval ends at zero."""
    paths = [tuple(grid[i] for i in gits.shortest(costs, steps, gamma)) for gamma in gammas]
    return list(dict.fromkeys((*path[:-1], 0.0) for path in paths))


def _ending(sigmas: Sigmas, smallest: float) -> Sigmas:
    """The same steps, squeezed in log sigma so that the last begins at `smallest`."""
    first, last = sigmas[0], sigmas[-2]
    if len(sigmas) < 3 or not last < smallest < first:
        return sigmas
    share = math.log(first / smallest) / math.log(first / last)
    return (*(first * (sigma / first) ** share for sigma in sigmas[:-1]), 0.0)


def _whole(timesteps: np.ndarray) -> Candidate:
    """Distinct trained timesteps, falling, nearest to fractional ones."""
    whole: list[int] = []
    for timestep in np.rint(timesteps).astype(int).tolist():
        whole.append(min(timestep, whole[-1] - 1) if whole else timestep)
    # Where the end ran out of room, everything below moves up by as much as is missing.
    return tuple(max(timestep, len(whole) - 1 - index) for index, timestep in enumerate(whole))


def _kept(file: Path, make: Callable[[], Tensor]) -> np.ndarray:
    """An array from its file, or made and put there."""
    if not file.exists():
        partial = file.with_suffix(".partial.npy")
        np.save(partial, make().numpy())
        partial.replace(file)
    found: np.ndarray = np.load(file)
    return found


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _ticks(progress: Callable[[Iterable[Any], str], Iterable[Any]], what: str) -> Iterator[int]:
    """A bar without an end: how many schedules a search scores is not known before."""
    return iter(progress(iter(int, 1), what))
