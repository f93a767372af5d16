import json
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from diffpress.benchmarks.search import space as spaces
from diffpress.benchmarks.search.choices import Span
from diffpress.compress import recipe as recipes
from diffpress.compress.recipe import Recipe
from diffpress.errors import DiffpressError

Write = Callable[[str], str]
SMALL = """
precision: [fp32, bf16]
passes:
  - schedule: [null, {solver: [unipc, dpm++], spacing: karras, steps: {from: 6, to: 12, step: 2}}]
  - cache: [null, {interval: {from: 2, to: 4}}, {full: [[0, 2], [0, 3]]}]
    taylorseer: {interval: [2, 3], branch: 0}
  - quantize: {format: int8}
  - temporal-table: [null, {}]
"""


class Dice:
    """Draws at random, or what it is told, and remembers what it was asked."""

    def __init__(self, seed: int = 0, told: dict[str, Any] | None = None) -> None:
        self.random, self.told = random.Random(seed), told
        self.asked: dict[str, Any] = {}

    def _drawn(self, name: str, options: Sequence[Any]) -> Any:
        value = self.random.choice(options) if self.told is None else self.told[name]
        assert value in options
        assert name not in self.asked
        self.asked[name] = value
        return value

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        return str(self._drawn(name, choices))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return int(self._drawn(name, range(low, high + 1, step)))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        assert step is not None
        return float(self._drawn(name, [low + index * step for index in range(round((high - low) / step) + 1)]))


def test_the_size_is_the_number_of_recipes_that_are_drawn(space_file: Write) -> None:
    space, _ = spaces.load(space_file(SMALL))
    drawn = set()
    for seed in range(5_000):
        passes, precision = space.draw(Dice(seed), ["fp32", "bf16"])
        drawn.add(json.dumps([passes, precision]))
    assert space.size(["fp32", "bf16"]) == len(drawn) == 2 * (1 + 2 * 4) * (1 + 3 + 2 + 2) * 2


def test_what_is_drawn_is_a_recipe_and_what_would_be_drawn_for_it_is_known(space_file: Write) -> None:
    space, _ = spaces.load(space_file(SMALL))
    for seed in range(200):
        dice = Dice(seed)
        passes, precision = space.draw(dice, ["fp32", "bf16"])
        recipe = Recipe.model_validate(space.document("drawn", passes))
        recipe.built()
        assert space.parameters(recipe, precision, ["fp32", "bf16"]) == dice.asked
        assert space.draw(Dice(told=dice.asked), ["fp32", "bf16"]) == (passes, precision)


@pytest.mark.parametrize(
    "passes",
    [
        ["temporal-table", {"quantize": {"format": "int8"}}],  # another order
        [{"quantize": {"format": "int8"}}, {"cache": {"interval": 3}}],
        [{"quantize": {"format": "fp8"}}],  # another value
        [{"cache": {"interval": 7}}, {"quantize": {"format": "int8"}}],
        [{"cache": {"interval": 3, "branch": 1}}, {"quantize": {"format": "int8"}}],  # a field that is not open
        [{"quantize": {"format": "int8"}}, "temporal-table", "correct"],  # a pass that is not there
        ["temporal-table"],  # without one that is always there
    ],
)
def test_other_recipes_are_not_in_the_space(passes: list[Any], space_file: Write) -> None:
    space, _ = spaces.load(space_file(SMALL))
    recipe = Recipe.model_validate({"name": "other", "passes": passes})
    assert space.parameters(recipe, "fp32", ["fp32", "bf16"]) is None


def test_a_precision_that_does_not_run_is_not_in_the_space(space_file: Write) -> None:
    space, _ = spaces.load(space_file(SMALL))
    recipe = Recipe.model_validate({"name": "int8", "passes": [{"quantize": {"format": "int8"}}]})
    assert space.parameters(recipe, "bf16", ["fp32"]) is None
    found = space.parameters(recipe, "fp32", ["fp32"])
    assert found == {"schedule": "none", "cache/taylorseer": "none", "temporal-table": "none"}


def test_two_places_of_a_pass_have_names_of_their_own(space_file: Write) -> None:
    space, _ = spaces.load(
        space_file("passes: [{cache: [null, {interval: [2, 3]}]}, {cache: [null, {interval: [4]}]}]")
    )
    assert [slot.name for slot in space.slots] == ["cache", "cache #2"]
    dice = Dice(1)
    space.draw(dice, ["fp32"])
    assert {"cache", "cache #2"} <= dice.asked.keys()


def test_the_default_space_tries_every_shipped_recipe_first_and_holds_more() -> None:
    space, first = spaces.load("default")
    assert first.keys() == recipes.presets().keys()
    assert space.size(["fp32"]) > 1000
    for seed in range(50):
        passes, _ = space.draw(Dice(seed), ["fp32"])
        Recipe.model_validate(space.document("drawn", passes)).built()
    known = {name for name, recipe in first.items() if space.parameters(recipe, "fp32", ["fp32"]) is not None}
    assert {"fp32", "int8", "fast"} <= known


def test_shared_options_go_into_every_recipe(space_file: Write) -> None:
    space, _ = spaces.load(
        space_file("{steps: 8, guidance_scale: 1.5, calibration: {prompts: 4}, passes: [{cache: {interval: [2, 3]}}]}")
    )
    recipe = Recipe.model_validate(space.document("drawn", []))
    assert (recipe.steps, recipe.guidance_scale, recipe.calibration.prompts) == (8, 1.5, 4)


@pytest.mark.parametrize(
    ("span", "values"),
    [
        ({"from": 2, "to": 5}, [2, 3, 4, 5]),
        ({"from": 2, "to": 6, "step": 2}, [2, 4, 6]),
        ({"from": 0.5, "to": 1.0, "step": 0.25}, [0.5, 0.75, 1.0]),
    ],
)
def test_ranges_hold_both_ends(span: dict[str, Any], values: list[float]) -> None:
    made = Span.model_validate(span)
    assert made.size() == len(values)
    assert all(made.has(value) for value in values)
    assert not any(made.has(value) for value in (values[0] - 0.1, values[-1] + 0.1, values[0] + 0.1, "2", True))
    assert {made.draw("x", Dice(seed)) for seed in range(100)} == set(values)


def test_a_range_without_a_step_has_no_end_of_values() -> None:
    made = Span.model_validate({"from": 0.1, "to": 0.4, "log": True})
    assert made.size() == math.inf and made.has(0.2345) and not made.has(0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes: [", "is not readable YAML"),
        ("- cache", "must be a mapping with 'passes'"),
        ("{}", "there is nothing to choose from"),
        ("passes: [{cache: {interval: 3}}]", "there is nothing to choose from"),
        ("pases: []", "unknown key 'pases'"),
        ("steps: 0", "'steps': Input should be greater than or equal to 1, got 0"),
        ("precision: [fp31]", "there is no precision 'fp31', choose from: fp32"),
        ("passes: [{cash: {interval: [2, 3]}}]", "there is no pass 'cash', choose from: schedule"),
        ("passes: [{}]", "an entry of 'passes' is empty"),
        ("passes: [{cache: {intervall: [2, 3]}}]", "pass 'cache' has no key 'intervall', it has: interval, branch"),
        (
            "passes: [{cache: {interval: [2, 1]}}]",
            "pass 'cache', key 'interval': Input should be greater than or equal",
        ),
        ("passes: [{cache: {interval: {from: 1, to: 4}}}]", "pass 'cache', key 'interval': Input should be greater"),
        ("passes: [{cache: {interval: {from: 5, to: 4}}}]", "'from' 5 has to be below 'to' 4"),
        ("passes: [{cache: {interval: {from: 2, to: 4, log: true, step: 1}}}]", "a logarithmic range begins above 0"),
        ("passes: [{cache: {interval: []}}]", "an empty list offers nothing"),
        ("passes: [{cache: 3}]", "pass 'cache': its fields are a mapping, not 3"),
        ("first: [balanced, none.yaml]", "there is no recipe '"),
        ("{first: [fast, int8], steps: 20}", "recipe 'fast' has other steps or guidance than the space"),
    ],
)
def test_a_space_that_is_wrong_is_refused_in_one_line(text: str, message: str, space_file: Write) -> None:
    with pytest.raises(DiffpressError, match=re.escape(message)) as raised:
        spaces.load(space_file(text))
    assert str(raised.value).startswith("space ") and "\n" not in str(raised.value)


def test_a_space_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        DiffpressError, match=r"there is no space 'none\.yaml': name a YAML file that exists, or 'default'"
    ):
        spaces.load("none.yaml")


def test_recipes_to_try_first_lie_beside_the_space(space_file: Write, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("{passes: [{cache: {interval: 2}}], gates: ['speedup >= 2']}")
    file = space_file("first: [mine.yaml, fp32]")
    _, first = spaces.load(file)
    assert list(first) == ["mine", "fp32"]
    assert "gates" not in spaces.document(first["mine"])  # what is asked of a recipe is not the recipe
    (tmp_path / "mine.yaml").write_text("{controlnet: true, passes: []}")
    with pytest.raises(DiffpressError, match="has a LoRA or a ControlNet"):
        spaces.load(file)
