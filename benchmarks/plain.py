"""The honest rival of every compression: none, and the best plain schedule that is as fast on the same backend.

How many steps fit into a latency does not depend on the solver, whose arithmetic is lost beside a call of the network:
the count is found with one solver, and then the solvers of RIVALS are compared at that count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from diffpress.benchmarks.candidates import COMPRESSED, EXPORT, STRICT, Candidate, Drawn, draw
from diffpress.benchmarks.latency import alternate, paired_ratio
from diffpress.benchmarks.quality import relative_l2
from diffpress.benchmarks.speed import Timings
from diffpress.compress.schedule.solver import Solver, Spacing, make
from diffpress.errors import DiffpressError
from diffpress.plan import Sampling

TIMED = "DPM-Solver++"
RIVALS: dict[str, tuple[Solver, Spacing | None]] = {
    "DDIM": ("ddim", None),
    TIMED: ("dpm++", None),
    "DPM-Solver++ Karras": ("dpm++", "karras"),
    "UniPC": ("unipc", None),
    "UniPC Karras": ("unipc", "karras"),
    "UniPC trailing": ("unipc", "trailing"),
}
JUDGED = 16  # images that choose between the rivals


@dataclass(frozen=True)
class Trial:
    """One step count against the compressed bundle, timed in alternation."""

    steps: int
    latency_ms: float
    ratio: float  # latency over the compressed one's, median of paired rounds

    @property
    def fits(self) -> bool:
        """Whether it takes at most as long as the compressed bundle."""
        return self.ratio <= 1.0


def schedules(scheduler: Mapping[str, Any], like: Sampling, steps: int) -> dict[str, Sampling]:
    """Every rival's schedule of `steps` steps on the betas of `scheduler` (the manifest's {class, config}).

    A rival that cannot make so few, or so many, is left out.
    """
    from diffpress.calibration.schedule import tabulate

    made = {}
    for name, (solver, spacing) in RIVALS.items():
        try:
            own = make(solver, scheduler["config"], spacing)
            made[name] = tabulate(own, steps, like.guidance_scale, like.height, like.width)
        except DiffpressError:
            continue
    return made


def best_schedule(
    rivals: Mapping[str, Sampling],
    open_plain: Callable[[Sampling], Candidate],
    reference: Candidate,
    texts: Sequence[str],
    batch: int,
    quiet: bool = True,
    on_drawn: Callable[[str, Drawn], object] = lambda *_: None,
) -> tuple[str, Candidate]:
    """The rival whose latents end nearest to the reference's, by the median over the first JUDGED of `texts`.

    `on_drawn` hears what each rival drew of these.
    """
    some = list(texts)[:JUDGED]
    wanted = draw(reference, some, range(len(some)), batch).latents
    errors: dict[str, float] = {}
    opened: dict[str, Candidate] = {}
    for name, sampling in tqdm(rivals.items(), desc="plain schedules", unit="schedule", disable=quiet):
        candidate = open_plain(sampling)
        drawn = draw(candidate, some, range(len(some)), batch)
        on_drawn(name, drawn)
        errors[name] = float(np.median(relative_l2(drawn.latents, wanted)))
        if errors[name] <= min(errors.values()):
            opened = {name: candidate}  # sessions hold a copy of the weights: only the best is kept
    return next(iter(opened.items()))


@dataclass(frozen=True)
class Rival:
    """The best plain schedule that is as fast, and what was drawn on the way to it, by (schedule, steps)."""

    schedule: str
    sampling: Sampling
    drawn: dict[tuple[str, int], Drawn]


def rival(
    trials: Sequence[Trial],
    scheduler: Mapping[str, Any],
    own: Sampling,
    open_plain: Callable[[Sampling], Candidate],
    reference: Candidate,
    texts: Sequence[str],
    batch: int,
    quiet: bool = True,
) -> Rival | None:
    """The rival at the largest step count that fits; None where none does.

    Every schedule draws the first JUDGED of `texts` at that count, and the chosen one at the other counts, too, for
    the picture of quality against speed.
    """
    found = best(list(trials))
    if found is None:
        return None
    rivals, drawn = schedules(scheduler, own, found.steps), {}

    def keep(name: str, images: Drawn) -> None:
        drawn[name, found.steps] = images

    name, _ = best_schedule(rivals, open_plain, reference, texts, batch, quiet, keep)
    some = list(texts)[:JUDGED]
    for steps in sorted({trial.steps for trial in trials} - {found.steps}):
        if sampling := schedules(scheduler, own, steps).get(name):
            drawn[name, steps] = draw(open_plain(sampling), some, range(len(some)), batch)
    return Rival(name, rivals[name], drawn)


def compare(
    timings: Timings,
    pipelines: Mapping[str, Candidate],
    open_plain: Callable[[int], Candidate],
    most: int,
    prompt: str,
    quiet: bool,
) -> list[Trial]:
    """Search from what the timings of the full-length export suggest; `pipelines` has the compressed bundle."""
    stages = timings.stage_medians()[STRICT if STRICT in timings.images else EXPORT]
    middle = float(np.median(timings.images[COMPRESSED]))
    first = estimate(middle, stages["text"], stages["denoise"] / most, stages["decode"], most)
    with tqdm(desc="fewer plain steps", unit="trial", disable=quiet) as bar:

        def opened(steps: int) -> Candidate:
            bar.set_postfix_str(f"{steps} steps")
            bar.update()
            return open_plain(steps)

        rounds = max(3, min(9, len(timings.images[COMPRESSED])))
        return search(opened, pipelines[COMPRESSED], first, most, prompt, rounds)


def estimate(compressed_ms: float, text_ms: float, step_ms: float, decode_ms: float, most: int) -> int:
    """How many plain steps should take as long, between 1 and `most`."""
    return int(np.clip((compressed_ms - text_ms - decode_ms) // step_ms, 1, most))


def search(
    open_plain: Callable[[int], Candidate], compressed: Candidate, first: int, most: int, prompt: str, rounds: int = 5
) -> list[Trial]:
    """The largest step count that is no slower than `compressed`, by walking up or down from the estimate `first`.

    Returns every trial. The best is the largest that fits among them, see `best`.
    """
    trials: dict[int, Trial] = {}

    def fits(steps: int) -> bool:
        opened = open_plain(steps)
        times = alternate(
            {
                "plain": lambda turn: opened([prompt], [turn]),
                "compressed": lambda turn: compressed([prompt], [turn]),
            },
            rounds,
        )
        ratio = paired_ratio(times["plain"], times["compressed"])
        trials[steps] = Trial(steps, float(np.median(times["plain"])), ratio)
        return trials[steps].fits

    steps = first
    if fits(steps):
        while steps < most and fits(steps + 1):
            steps += 1
    else:
        while steps > 1:
            steps -= 1
            if fits(steps):
                break
    return list(trials.values())


def best(trials: list[Trial]) -> Trial | None:
    """The largest step count that fits; None when none does."""
    return max((trial for trial in trials if trial.fits), key=lambda trial: trial.steps, default=None)
