"""Recipes: what the user asks, as YAML. Unknown keys are errors; presets ship in `recipes/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from diffpress.calibration.sets import Method
from diffpress.compress.cache.budget import CacheBudgetPass
from diffpress.compress.cache.cachequant import CacheQuantPass
from diffpress.compress.cache.correct_pass import CacheCorrectPass
from diffpress.compress.cache.deepcache import CachePass
from diffpress.compress.cache.delta import DeltaCachePass
from diffpress.compress.cache.faster_diffusion import FasterDiffusionPass
from diffpress.compress.cache.invardiff import InvarDiffPass
from diffpress.compress.cache.magcache import MagCachePass
from diffpress.compress.cache.planned import PlannedPass
from diffpress.compress.cache.smoothcache import SmoothCachePass
from diffpress.compress.cache.taylorseer import TaylorSeerPass
from diffpress.compress.cache.tgate import TGatePass
from diffpress.compress.cache.threshold import FreezePass
from diffpress.compress.quantize.finetune import FinetunePass
from diffpress.compress.quantize.mixed_precision import MixedPrecisionPass
from diffpress.compress.quantize.modelopt import ModeloptPass
from diffpress.compress.quantize.post_training import QuantizePass
from diffpress.compress.quantize.reconstruct import ReconstructPass
from diffpress.compress.schedule.correct import CorrectPass
from diffpress.compress.schedule.guidance import GuidancePass
from diffpress.compress.schedule.solver import SchedulePass
from diffpress.compress.temporal.maintain import TemporalPass
from diffpress.compress.temporal.table import TemporalTablePass
from diffpress.compress.work import Pass
from diffpress.errors import DiffpressError

SCHEDULE, CORRECT = "schedule", "correct"
PASSES: dict[str, type[Any]] = {
    SCHEDULE: SchedulePass,
    "guidance": GuidancePass,
    "quantize": QuantizePass,
    "reconstruct": ReconstructPass,
    "temporal": TemporalPass,
    "temporal-table": TemporalTablePass,
    "finetune": FinetunePass,
    "mixed-precision": MixedPrecisionPass,
    "modelopt": ModeloptPass,
    "cache": CachePass,
    "cache-budget": CacheBudgetPass,
    "cachequant": CacheQuantPass,
    "taylorseer": TaylorSeerPass,
    "cache-correct": CacheCorrectPass,
    "faster-diffusion": FasterDiffusionPass,
    "delta-cache": DeltaCachePass,
    "invardiff": InvarDiffPass,
    "smoothcache": SmoothCachePass,
    "planned": PlannedPass,
    "magcache": MagCachePass,
    "freeze": FreezePass,
    "tgate": TGatePass,
    CORRECT: CorrectPass,
}


class CalibrationOptions(BaseModel):
    """How much of the reference pipeline passes get to see."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: Method = "uniform"
    prompts: Annotated[int, Field(ge=1)] = 16
    steps: Annotated[int, Field(ge=1, description="calls recorded per prompt")] = 10


class Recipe(BaseModel):
    """A recipe file: sampling settings, calibration effort, and an ordered list of passes with their fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    description: str = ""
    steps: Annotated[int, Field(ge=1, le=1000)] = 50  # of the model's own scheduler; a schedule pass sets others
    guidance_scale: Annotated[float, Field(ge=0)] | None = None  # None: 2.0 for shapes, else the pipeline's own default
    calibration: CalibrationOptions = CalibrationOptions()
    passes: tuple[str | dict[str, Any], ...] = ()

    def built(self) -> list[tuple[str, Pass]]:
        """The passes in order, validated; raises `DiffpressError` naming the key that is wrong."""
        passes = [_build(entry) for entry in self.passes]
        # Each pass would find out by itself, but only after those before it have worked.
        if SCHEDULE in [name for name, _ in passes[1:]]:
            raise DiffpressError(f"recipe: '{SCHEDULE}' has to be the first pass: the others are bound to the schedule")
        if CORRECT in [name for name, _ in passes[:-1]]:
            raise DiffpressError(f"recipe: '{CORRECT}' has to be the last pass: it corrects what the others leave")
        return passes


def _build(entry: str | Mapping[str, Any]) -> tuple[str, Pass]:
    name, fields = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()), ("", {}))
    if not isinstance(entry, str) and len(entry) != 1:
        raise DiffpressError(f"recipe: each pass is one 'name: fields' entry, not {dict(entry)!r}")
    if name not in PASSES:
        raise DiffpressError(f"recipe: there is no pass '{name}', choose from: {', '.join(PASSES)}")
    try:
        return name, TypeAdapter(PASSES[name]).validate_python(fields or {})
    except ValidationError as error:
        raise DiffpressError(f"recipe: pass '{name}': {_first(error)}") from error


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"]) or "value"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key '{where}'"
    return f"'{where}': {problem['msg'].lower()}, got {problem['input']!r}"


def presets() -> dict[str, Path]:
    """Shipped recipes by name."""
    folder = Path(str(files("diffpress") / "compress" / "recipes"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def load(name_or_file: str) -> Recipe:
    """A preset by name, or a YAML file; raises `DiffpressError` for anything that is not a whole, valid recipe."""
    known = presets()
    file = known.get(name_or_file, Path(name_or_file))
    if not file.is_file():
        raise DiffpressError(
            f"there is no recipe '{name_or_file}': name a preset ({', '.join(known)}) or a YAML file that exists"
        )
    try:
        document = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DiffpressError(f"recipe {file} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise DiffpressError(f"recipe {file} must be a mapping with 'name' and 'passes'")
    try:
        recipe = Recipe.model_validate({"name": file.stem, **document})
    except ValidationError as error:
        raise DiffpressError(f"recipe {file}: {_first(error)}") from error
    recipe.built()
    return recipe


def as_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every pass's fields filled in, for the manifest."""
    passes = [{name: _plain(asdict(built))} for name, built in recipe.built()]  # type: ignore[call-overload]
    return {**recipe.model_dump(), "passes": passes}


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """A path as JSON holds it."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
