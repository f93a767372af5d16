"""The knapsack: budgets hold, prefixes are optimal, bisection finds the last choice that a loss allows."""

import itertools
import math

import numpy as np
import pytest

from diffpress.compress.quantize.budget import Layer, Option, choose, ordered
from diffpress.errors import DiffpressError


def table(count: int, seed: int = 0) -> dict[str, Layer]:
    """Layers of 1000 parameters and up with an option of 8 bits and one of 4, of random errors."""
    draw = np.random.default_rng(seed)
    made = {}
    for index in range(count):
        size = int(draw.integers(10, 200)) * 100
        errors = sorted(draw.uniform(0.001, 0.1, 2))
        options = (Option("int8", size, errors[0]), Option("int4 weights", size // 2, errors[1]))
        made[f"layer{index}"] = Layer("linear", (size // 100, 100), None, options)
    return made


def size_of(layers: dict[str, Layer], chosen: dict[str, str]) -> int:
    return sum(
        next(option.bytes for option in layer.options if option.name == chosen[name]) if name in chosen else layer.bytes
        for name, layer in layers.items()
    )


def error_of(layers: dict[str, Layer], chosen: dict[str, str]) -> float:
    return math.sqrt(
        sum(next(o.error for o in layers[name].options if o.name == format) ** 2 for name, format in chosen.items())
    )


def test_budgets_are_respected_and_more_bytes_never_cost_more_error() -> None:
    layers = table(30)
    whole, rest = size_of(layers, {}), 5000
    before: tuple[float, int] | None = None
    for share in (1.0, 0.8, 0.6, 0.5, 0.4, 0.3):
        chosen = choose(layers, share * whole + rest, rest=rest)
        assert size_of(layers, chosen) <= share * whole
        now = error_of(layers, chosen), sum(len(name) for name in chosen.values())
        assert before is None or now[0] > before[0]
        before = now
    assert choose(layers, whole + rest, rest=rest) == {}
    with pytest.raises(DiffpressError, match="cannot be met: the smallest choice takes"):
        choose(layers, 0.2 * whole)


@pytest.mark.parametrize("seed", range(4))
def test_every_prefix_is_the_best_choice_for_its_bytes(seed: int) -> None:
    layers = table(5, seed)
    every = [
        {name: format for name, format in zip(layers, formats, strict=True) if format}
        for formats in itertools.product(("", "int8", "int4 weights"), repeat=len(layers))
    ]
    moves = ordered(layers)
    for count in range(len(moves) + 1):
        chosen = {name: option.name for name, option in moves[:count]}
        size = size_of(layers, chosen)
        best = min(error_of(layers, other) for other in every if size_of(layers, other) <= size)
        assert error_of(layers, chosen) == pytest.approx(best)


def test_options_above_the_hull_and_those_that_save_nothing_are_skipped() -> None:
    poor = Layer("linear", (10, 10), None, (Option("int8", 100, 0.5), Option("int4 weights", 50, 0.1)))
    useless = Layer("linear", (10, 10), None, (Option("int8", 250, 0.0),))
    assert [(name, option.name) for name, option in ordered({"a": poor, "b": useless})] == [("a", "int4 weights")]


@pytest.mark.parametrize("threshold", [0, 1, 7, 22, 40])
def test_bisection_finds_the_last_choice_within_the_loss(threshold: int) -> None:
    layers = table(20, seed=1)
    moves = ordered(layers)
    sizes = {size_of(layers, {n: o.name for n, o in moves[:count]}): count for count in range(len(moves) + 1)}
    asked = []

    def loss(chosen: dict[str, str]) -> float:
        asked.append(sizes[size_of(layers, chosen)])
        return 0.25 * asked[-1]

    chosen = choose(layers, loss=loss, at_most_loss=0.25 * threshold)
    assert sizes[size_of(layers, chosen)] == min(threshold, len(moves))
    assert len(asked) <= 2 + math.ceil(math.log2(len(moves)))


def test_both_budgets_hold_or_are_refused() -> None:
    layers = table(10)
    half = 0.5 * size_of(layers, {})
    assert choose(layers, half, loss=lambda _: 1.0, at_most_loss=2.0) == choose(layers, half)
    with pytest.raises(DiffpressError, match="loses 3 where 2 is allowed"):
        choose(layers, half, loss=lambda _: 3.0, at_most_loss=2.0)


def test_a_loss_that_is_there_with_every_layer_in_float_is_refused() -> None:
    with pytest.raises(DiffpressError, match="'override' asks for loses 3 where 2 is allowed"):
        choose(table(4), loss=lambda chosen: 3.0 + len(chosen), at_most_loss=2.0)


def test_without_a_budget_every_layer_gets_what_is_preferred() -> None:
    assert set(choose(table(5)).values()) == {"int8"}
