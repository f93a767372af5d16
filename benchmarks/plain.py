"""The honest rival of every compression: no compression, and fewer steps of a better sampler at equal latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from diffpress.benchmarks.candidates import COMPRESSED, EXPORT, STRICT, Candidate
from diffpress.benchmarks.latency import alternate, paired_ratio
from diffpress.benchmarks.speed import Timings
from diffpress.plan import Sampling

SOLVER = "DPMSolverMultistepScheduler"  # DPM-Solver++, Lu et al. (2022)


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


def schedule(scheduler: Mapping[str, Any], like: Sampling, steps: int) -> Sampling:
    """The schedule of `steps` DPM-Solver++ steps on the betas of `scheduler` (the manifest's {class, config})."""
    from diffusers import DPMSolverMultistepScheduler

    from diffpress.calibration.schedule import tabulate

    solver = DPMSolverMultistepScheduler.from_config(dict(scheduler["config"]))
    return tabulate(solver, steps, like.guidance_scale, like.height, like.width)


def compare(
    timings: Timings,
    pipelines: Mapping[str, Candidate],
    open_plain: Callable[[int], Candidate],
    most: int,
    prompt: str,
    quiet: bool,
) -> tuple[list[Trial], Candidate | None]:
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
) -> tuple[list[Trial], Candidate | None]:
    """The largest step count that is no slower than `compressed`, by walking up or down from the estimate `first`.

    Returns every trial and the candidate of the best one: (trials, None) when even one step is slower. The best is the
    largest that fits among the trials, see `best`.
    """
    trials: dict[int, Trial] = {}
    opened: dict[int, Candidate] = {}

    def fits(steps: int) -> bool:
        opened[steps] = open_plain(steps)
        times = alternate(
            {
                "plain": lambda turn: opened[steps]([prompt], [turn]),
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
            del opened[steps]  # its sessions hold a copy of the weights
            steps += 1
    else:
        while steps > 1:
            steps -= 1
            if fits(steps):
                break
    found = best(list(trials.values()))
    return list(trials.values()), opened[found.steps] if found else None


def best(trials: list[Trial]) -> Trial | None:
    """The largest step count that fits; None when none does."""
    return max((trial for trial in trials if trial.fits), key=lambda trial: trial.steps, default=None)
