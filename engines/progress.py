"""How far the building of engines is, and how long it still takes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from tqdm import tqdm

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left{postfix}"
LEAST = 1_000_000  # what an engine without weights costs, in bytes of weights: a second where 100 MB take 2


class Progress:
    """A bar over all engines, each by the bytes of its weights, which is what the time of a build goes with."""

    def __init__(self, weights: float, shown: bool) -> None:
        self.bar = tqdm(total=weights, desc="engines", bar_format=FORMAT, disable=not shown)
        self.done = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def start(self, what: str) -> None:
        """`what` is being built now."""
        self.bar.set_postfix_str(what)

    def tick(self, cost: float, fraction: float) -> None:
        """So much of the present engine is done, which costs `cost` in all."""
        self.bar.update(max(0.0, self.done + cost * min(fraction, 1.0) - self.bar.n))

    def finish(self, cost: float) -> None:
        """The present engine is done."""
        self.tick(cost, 1.0)
        self.done += cost


def monitor(trt: ModuleType, tick: Callable[[float], None]) -> Any:
    """A progress monitor for a builder that calls `tick` with the fraction done; `stopped` makes the builder stop.

    Phases lie in one another: a phase's fraction is its own steps and, of the step that runs, its phases within.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]  # the base class is known when the library is
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = False
            self.phases: dict[str, tuple[str | None, int, float]] = {}  # name to parent, steps, steps done

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = (parent, max(steps, 1), 0.0)

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.phases:
                parent, steps, _ = self.phases[name]
                self.phases[name] = (parent, steps, step + 1.0)
                tick(self._fraction())
            return not self.stopped

        def _fraction(self) -> float:
            inside: dict[str | None, float] = {}  # parent to how far its furthest phase is
            for name in reversed(self.phases):  # those within start after
                parent, steps, done = self.phases[name]
                value = min(1.0, (done + min(1.0, inside.get(name, 0.0))) / steps)
                inside[parent] = max(inside.get(parent, 0.0), value)
            return inside.get(None, 0.0)

    return Monitor()
