"""Calibration sets: for every prompt, which calls of the sampling schedule are recorded."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from diffpress.errors import DiffpressError

Method = Literal["uniform", "ndtc", "every-step", "single"]
NDTC_MEAN = NDTC_DEVIATION = 0.4  # of the training horizon T, as in PTQ4DM's code


@dataclass(frozen=True)
class CalibrationSet:
    """Which prompts are run, and which of their calls are kept.

    `uniform`: `steps` calls at a uniform stride (Li et al. 2023, Q-Diffusion, Section 3.2). Under a step program as
    many of each of its graph variants, at a uniform stride over the calls that run it: one stride over all calls can
    miss a variant that runs at regular intervals, and would show parts of the network that few steps run too little.
    `ndtc`: `steps` calls at normally distributed timesteps (Shang et al. 2023, PTQ4DM, Section 3.3). In the paper every
    draw is a fresh noise run down to its t; here each prompt has its own noise and its draws lie along one trajectory.
    `every-step`: all calls, whatever `steps` says (Huang et al. 2024, TFMQ-DM: the finite set of timesteps).
    `single`: the call in the middle alone, which PTQ4DM's ablation finds the worst; for comparison.

    Raises `DiffpressError` for a method there is not, no prompts, or less than one step.
    """

    prompts: tuple[str, ...]
    method: Method = "uniform"
    steps: int = 10  # calls recorded of each prompt, at most as many as the schedule has; see `uniform`

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            known = ", ".join(get_args(Method))
            raise DiffpressError(f"there is no calibration method '{self.method}', choose from: {known}")
        if not self.prompts:
            raise DiffpressError("calibration needs at least one prompt")
        if self.steps < 1:
            raise DiffpressError(f"calibration needs at least one step of each prompt, not {self.steps}")

    def calls(
        self, timesteps: Sequence[float], horizon: float, seed: int, variants: Sequence[str] = ()
    ) -> tuple[tuple[int, ...], ...]:
        """For each prompt the recorded calls, ascending indices into `timesteps`; `horizon` is T of the training.

        `variants` names the graph that each call runs; empty, they all run the same. Prompt i draws the same whichever
        prompts follow it.
        """
        count = len(timesteps)
        if self.method == "ndtc":
            draws = [random.Random(f"ndtc {seed} {index}") for index in range(len(self.prompts))]
            return tuple(tuple(normal_draws(timesteps, self.steps, horizon, draw)) for draw in draws)
        same = {
            "uniform": lambda: strides(variants or ("",) * count, self.steps),
            "every-step": lambda: range(count),
            "single": lambda: [count // 2],
        }[self.method]()
        return (tuple(same),) * len(self.prompts)


def uniform_stride(calls: int, count: int) -> list[int]:
    """`count` call indices at a uniform stride over a schedule (Li et al. 2023, Q-Diffusion), the first among them."""
    count = min(count, calls)
    return sorted({round(index * (calls - 1) / max(1, count - 1)) for index in range(count)})


def strides(variants: Sequence[str], count: int) -> list[int]:
    """Of each graph variant `count` call indices at a uniform stride; `variants` names the one that each call runs."""
    calls: dict[str, list[int]] = {}
    for index, variant in enumerate(variants):
        calls.setdefault(variant, []).append(index)
    return sorted(own[index] for own in calls.values() for index in uniform_stride(len(own), count))


def normal_draws(timesteps: Sequence[float], count: int, horizon: float, draw: random.Random) -> list[int]:
    """`count` distinct calls for t ~ N(0.4 T, (0.4 T)^2) clamped to [0, T]: of each t the nearest call still free."""
    free = set(range(len(timesteps)))
    chosen = []
    for _ in range(min(count, len(timesteps))):
        t = min(max(draw.gauss(NDTC_MEAN * horizon, NDTC_DEVIATION * horizon), 0.0), horizon)
        chosen.append(min(free, key=lambda call: (abs(timesteps[call] - t), call)))
        free.remove(chosen[-1])
    return sorted(chosen)


def require_steps(present: Collection[int], membership: Sequence[int], purpose: str) -> None:
    """Raise `DiffpressError` unless each group of steps has a recorded call.

    `present` are rows of the schedule (`Recordings.rows`), `membership` the group of each row, `purpose` what needs it.
    """
    seen = {membership[row] for row in present}
    missing = [row for row, group in enumerate(membership) if group not in seen]
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise DiffpressError(
            f"the calibration set is too small: {purpose} needs recorded calls at steps {shown}, which have none; "
            "set calibration to more steps or prompts, or to method every-step"
        )
