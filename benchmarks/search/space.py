"""The space of a search: recipes in a recipe's words, where a list offers values and {from, to} a range.

    precision: [fp32, bf16]              # of what is not quantized; those that run here, where it is left out
    first: [balanced, my.yaml]           # recipes to try first
    passes:                              # in a recipe's order
      - schedule: [null, {solver: [unipc, dpm++], spacing: karras, steps: {from: 6, to: 30}}]
      - cache: [null, {interval: {from: 2, to: 5}}]     # null: without the pass
        taylorseer: {interval: [2, 3]}                  # beside it: one of the two
      - quantize: {format: int8, exclude: [[], ["up_blocks.2.*"]]}     # a list of lists offers lists

A search draws from it through `Draws`, so that nothing here knows the library that searches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffpress.benchmarks.search.choices import WITHOUT, Draws, Slot, said, slot_of
from diffpress.compress import recipe as recipes
from diffpress.compress.recipe import CalibrationOptions, Recipe
from diffpress.errors import DiffpressError
from diffpress.runtime.backends import PRECISIONS

DEFAULT = "default"
PRECISION = "precision"


class Space(BaseModel):
    """A space file; what is not a choice holds for every recipe of the search."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    description: str = ""
    steps: Annotated[int, Field(ge=1, le=1000)] = 50  # of the model's own scheduler, which is the reference
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    calibration: CalibrationOptions = CalibrationOptions()
    precision: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    first: tuple[str, ...] = ()
    passes: tuple[dict[str, Any], ...] = ()

    @cached_property
    def slots(self) -> list[Slot]:
        """The places of passes; raises `DiffpressError` naming what is wrong in them."""
        found: list[Slot] = []
        for entry in self.passes:
            slot = slot_of(entry)
            others = sum(one.name.split(" #")[0] == slot.name for one in found)
            found.append(Slot(f"{slot.name} #{others + 1}" if others else slot.name, slot.optional, slot.alternatives))
        return found

    def size(self, precisions: Sequence[str]) -> float:
        """How many recipes it has, those that are tried first not counted."""
        return len(precisions) * math.prod(slot.size() for slot in self.slots)

    def document(self, name: str, passes: Sequence[str | Mapping[str, Any]]) -> dict[str, Any]:
        """A recipe with these passes, as a file would have it."""
        shared = self.model_dump(mode="json", include={"steps", "guidance_scale", "calibration"}, exclude_defaults=True)
        return {"name": name, **shared, "passes": list(passes)}

    def draw(self, draws: Draws, precisions: Sequence[str]) -> tuple[list[str | dict[str, Any]], str]:
        """The passes of a recipe, and a precision."""
        precision = precisions[0] if len(precisions) == 1 else draws.suggest_categorical(PRECISION, precisions)
        return [step for slot in self.slots for step in slot.draw(draws)], precision

    def parameters(self, recipe: Recipe, precision: str, precisions: Sequence[str]) -> dict[str, Any] | None:
        """What `draw` would have to draw for a recipe; None where the space does not hold it."""
        if precision not in precisions:
            return None
        found = {} if len(precisions) == 1 else {PRECISION: precision}
        left = recipe.built()
        for slot in self.slots:
            taken = None
            for one in slot.alternatives if left else ():
                name, step = left[0]
                inner = one.parameters(f"{slot.name}: {one.label}", step) if one.name == name else None
                if inner is not None:
                    taken = slot.parameters(one.label) | inner
                    break
            if taken is not None:
                left = left[1:]
            elif slot.optional:
                taken = slot.parameters(WITHOUT)
            else:
                return None
            found |= taken
        return None if left else found


def load(name_or_file: str) -> tuple[Space, dict[str, Recipe]]:
    """A space, "default" or a YAML file, and the recipes to try first by name.

    Raises `DiffpressError` for one that is not whole, holds nothing to choose from, or tries other recipes than
    such of its own steps and guidance first.
    """
    shipped = Path(str(files(__package__) / "default.yaml"))
    file = shipped if name_or_file == DEFAULT else Path(name_or_file)
    if not file.is_file():
        raise DiffpressError(f"there is no space '{name_or_file}': name a YAML file that exists, or 'default'")
    try:
        document = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DiffpressError(f"space {file} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise DiffpressError(f"space {file} must be a mapping with 'passes'")
    try:
        space = Space.model_validate(document)
        unknown = set(space.precision or ()) - set(PRECISIONS)
        if unknown:
            raise DiffpressError(f"there is no precision '{min(unknown)}', choose from: {', '.join(PRECISIONS)}")
        if space.size(space.precision or PRECISIONS[:1]) + len(space.first) < 2:
            raise DiffpressError("there is nothing to choose from: give a field a list of values or a range")
        return space, {Path(name).stem: _first(space, name, file.parent) for name in space.first}
    except ValidationError as error:
        raise DiffpressError(f"space {file}: {said(error)}") from error
    except DiffpressError as error:
        raise DiffpressError(f"space {file}: {error}") from error


def document(recipe: Recipe) -> dict[str, Any]:
    """A recipe as `Space.document` has those that are drawn: what is not said is the default."""
    return {"passes": [], **recipe.model_dump(mode="json", exclude_defaults=True, exclude={"gates"})}


def _first(space: Space, name: str, beside: Path) -> Recipe:
    """A recipe to try first: a preset, or a file, relative ones beside the space."""
    own = name if name in recipes.presets() or Path(name).is_absolute() else str(beside / name)
    recipe = recipes.load(own)
    if (recipe.steps, recipe.guidance_scale) != (space.steps, space.guidance_scale):
        raise DiffpressError(f"recipe '{name}' has other steps or guidance than the space, whose reference is one")
    if recipe.lora or recipe.controlnet:
        raise DiffpressError(f"recipe '{name}' has a LoRA or a ControlNet, which a search does not handle")
    return recipe
