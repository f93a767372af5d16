"""One format per layer under a budget: the multiple-choice knapsack, solved greedily.

Errors of layers are nearly independent, so their squares add. The least error for a number of bytes then is a knapsack,
solved by error per byte on each layer's convex hull (Sinha and Zoltners 1979, The Multiple-Choice Knapsack Problem).
Every prefix of that one ordered list is a solution, so a budget of measured loss is found by bisection over it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffpress.errors import DiffpressError

FLOAT_BYTES = 2  # budgets are shares of FP16


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Budget:
    """What may be spent; with `bytes` the least error for them, without it the fewest bytes within the losses."""

    bytes: Annotated[float | None, Field(gt=0, description="share of the denoiser's bytes in FP16")] = None
    latent: Annotated[float | None, Field(gt=0, description="relative error of the final latent")] = None
    accuracy: Annotated[float | None, Field(gt=0, description="loss of attribute accuracy in points")] = None
    clip: Annotated[float | None, Field(gt=0, description="loss of CLIP score in percent of it")] = None

    def losses(self) -> dict[str, float]:
        """The losses that have a limit."""
        limits = {name: getattr(self, name) for name in ("latent", "accuracy", "clip")}
        return {name: limit for name, limit in limits.items() if limit is not None}


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to quantize a layer: bytes of its weight and scales, relative error it causes alone, time of a call."""

    name: str
    bytes: int
    error: float = math.nan
    latency_ms: float | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer to decide on. `options` in order of preference; `why` it stays in float where that is decided."""

    kind: str
    shape: tuple[int, ...]
    float_ms: float | None = None
    options: tuple[Option, ...] = ()
    why: str = ""

    @property
    def bytes(self) -> int:
        """In FP16."""
        return FLOAT_BYTES * math.prod(self.shape)


def ordered(table: Mapping[str, Layer]) -> list[tuple[str, Option]]:
    """Changes of one layer's format that lead from all float to the fewest bytes, those that cost least first.

    The cost is squared error gained per byte saved. Formats above a layer's convex hull are never taken.
    """
    moves: list[tuple[float, str, Option]] = []
    for name, layer in table.items():
        size, error = layer.bytes, 0.0
        while smaller := [option for option in layer.options if option.bytes < size]:
            slopes = [(option.error**2 - error) / (size - option.bytes) for option in smaller]
            slope = min(slopes)
            option = smaller[slopes.index(slope)]  # the first: that which is preferred
            moves.append((slope, name, option))
            size, error = option.bytes, option.error**2
    # Slopes of one layer only rise, and sorting is stable: its own changes keep their order.
    return [(name, option) for _, name, option in sorted(moves, key=lambda move: move[0])]


def choose(
    table: Mapping[str, Layer],
    at_most_bytes: float | None = None,
    loss: Callable[[dict[str, str]], float] | None = None,
    at_most_loss: float = 0.0,
    rest: float = 0.0,
) -> dict[str, str]:
    """The name of the option that each quantized layer gets; layers that are absent stay in float.

    With `at_most_bytes` (which counts `rest`, the bytes of all that is not in the table) the cheapest changes until it
    is met; without, as many as `loss` of the outcome allows, which is taken to rise with their number; with neither,
    each layer's first option. Raises `DiffpressError` for a budget that cannot be met.
    """
    moves = ordered(table)

    def after(count: int) -> dict[str, str]:
        return {name: option.name for name, option in moves[:count]}

    def size(count: int) -> float:
        taken = {name: option.bytes for name, option in moves[:count]}
        return rest + sum(taken.get(name, layer.bytes) for name, layer in table.items())

    if at_most_bytes is not None:
        count = next((count for count in range(len(moves) + 1) if size(count) <= at_most_bytes), -1)
        if count < 0:
            raise DiffpressError(
                f"a budget of {at_most_bytes:.0f} bytes cannot be met: the smallest choice takes "
                f"{size(len(moves)):.0f}; add a smaller format to 'candidates' or allow more"
            )
        if loss is not None and (lost := loss(after(count))) > at_most_loss:
            raise DiffpressError(
                f"what fits the budget of bytes loses {lost:.4g} where {at_most_loss:.4g} is allowed; raise either"
            )
        return after(count)
    if loss is None:
        return {name: layer.options[0].name for name, layer in table.items() if layer.options}
    if not moves or loss(after(len(moves))) <= at_most_loss:
        return after(len(moves))
    good, bad = 0, len(moves)  # float loses nothing, but for what is decided elsewhere
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if loss(after(middle)) <= at_most_loss else (good, middle)
    if good == 0 and (lost := loss({})) > at_most_loss:
        raise DiffpressError(
            f"what 'override' asks for loses {lost:.4g} where {at_most_loss:.4g} is allowed; override less or raise it"
        )
    return after(good)
