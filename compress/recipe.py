"""Recipes: what the user asks, as YAML. Unknown keys are errors; presets ship in `recipes/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from diffpress import gates
from diffpress.calibration.lora import LCM_GUIDANCE, LCM_STEPS, Lora
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
from diffpress.compress.prune.distill import DistillPass
from diffpress.compress.prune.sparse import PruneNMPass, PruneUnstructuredPass
from diffpress.compress.prune.structured import PruneStructuredPass
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
from diffpress.compress.work import Pass, require_prompts
from diffpress.errors import DiffpressError

SCHEDULE, CORRECT = "schedule", "correct"
PASSES: dict[str, type[Any]] = {
    SCHEDULE: SchedulePass,
    "guidance": GuidancePass,
    "prune-structured": PruneStructuredPass,
    "prune-nm": PruneNMPass,
    "prune-unstructured": PruneUnstructuredPass,
    "distill": DistillPass,
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
    steps: Annotated[int, Field(ge=1, description="calls recorded per prompt, of each kind of step")] = 10


_LORAS = TypeAdapter(tuple[Lora, ...])


class Recipe(BaseModel):
    """A recipe file: sampling settings, calibration effort, and an ordered list of passes with their fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    description: str = ""
    steps: Annotated[int, Field(ge=1, le=1000)] = 50  # of the model's own scheduler; a schedule pass sets others
    guidance_scale: Annotated[float, Field(ge=0)] | None = None  # None: 2.0 for shapes, else the pipeline's own default
    calibration: CalibrationOptions = CalibrationOptions()
    lora: tuple[Lora, ...] = ()  # fused before anything else: they are part of what is compressed and compared with
    controlnet: bool = False  # ship the denoiser a second time, with inputs for a ControlNet's residuals
    passes: tuple[str | dict[str, Any], ...] = ()
    gates: tuple[str, ...] = ()  # what the bundle has to reach, such as "speedup >= 3"; see `diffpress.gates`

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, data: Any) -> Any:
        """One LoRA is a list of one; what an LCM-LoRA demands stands where the recipe says nothing."""
        if not isinstance(data, Mapping) or "lora" not in data:
            return data
        lora = [data["lora"]] if isinstance(data["lora"], Mapping | Lora) else data["lora"]
        try:
            is_lcm = any(entry.is_lcm for entry in _LORAS.validate_python(lora))
        except ValidationError:  # the field itself says what is wrong
            is_lcm = False
        demanded = {"steps": LCM_STEPS[0], "guidance_scale": LCM_GUIDANCE[0]} if is_lcm else {}
        return {**demanded, **data, "lora": lora}

    @property
    def lcm(self) -> bool:
        """Whether a LoRA makes a latent consistency model of the model, which LCM's scheduler samples."""
        return any(entry.is_lcm for entry in self.lora)

    def check_steps(self, steps: int) -> None:
        """Raise `DiffpressError` for a step count that an LCM-LoRA was not made for."""
        low, high = LCM_STEPS
        if self.lcm and not low <= steps <= high:
            raise DiffpressError(f"recipe: an LCM-LoRA draws in {low} to {high} steps, not in {steps}: set 'steps' so")

    @property
    def fewest_prompts(self) -> list[tuple[str, int]]:
        """Each pass's name, and how many calibration prompts it needs."""
        return [(name, getattr(step, "fewest_prompts", 1)) for name, step in self.built()]

    def check_prompts(self, count: int) -> None:
        """Raise `DiffpressError` where a pass needs more than `count` calibration prompts.

        Each would find out by itself, but only after those before it have worked.
        """
        for name, fewest in self.fewest_prompts:
            require_prompts(name, fewest, count)

    def built(self) -> list[tuple[str, Pass]]:
        """The passes in order, validated; raises `DiffpressError` naming the key that is wrong."""
        passes = [_build(entry) for entry in self.passes]
        for text in self.gates:
            gates.parse(text)
        # Each pass would find out by itself, but only after those before it have worked.
        if SCHEDULE in [name for name, _ in passes[1:]]:
            raise DiffpressError(f"recipe: '{SCHEDULE}' has to be the first pass: the others are bound to the schedule")
        if CORRECT in [name for name, _ in passes[:-1]]:
            raise DiffpressError(f"recipe: '{CORRECT}' has to be the last pass: it corrects what the others leave")
        # They all keep features of steps for others; residuals are added to features.
        caching = [name for name, step in passes if type(step).__module__.startswith(f"{__package__}.cache.")]
        if self.controlnet and caching:
            raise DiffpressError(
                f"recipe: '{caching[0]}' keeps features, which a ControlNet changes at every step: leave it or "
                "'controlnet' out"
            )
        self._check_lcm(passes)
        return passes

    def _check_lcm(self, passes: Sequence[tuple[str, Pass]]) -> None:
        if not self.lcm:
            return
        self.check_steps(self.steps)
        low, high = LCM_GUIDANCE
        if self.guidance_scale is not None and not low <= self.guidance_scale <= high:
            raise DiffpressError(
                f"recipe: an LCM-LoRA takes a guidance_scale of {low:g} to {high:g}, not {self.guidance_scale:g}"
            )
        if SCHEDULE in [name for name, _ in passes]:
            raise DiffpressError(f"recipe: an LCM-LoRA brings its own scheduler and steps: leave '{SCHEDULE}' out")


def parts(entry: str | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The name and the fields of a pass as a recipe writes it: a name, or a mapping from it."""
    name, fields = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()), ("", {}))
    return name, fields or {}


def _build(entry: str | Mapping[str, Any]) -> tuple[str, Pass]:
    name, fields = parts(entry)
    if not isinstance(entry, str) and len(entry) != 1:
        raise DiffpressError(f"recipe: each pass is one 'name: fields' entry, not {dict(entry)!r}")
    if name not in PASSES:
        raise DiffpressError(f"recipe: there is no pass '{name}', choose from: {', '.join(PASSES)}")
    try:
        return name, TypeAdapter(PASSES[name]).validate_python(fields)
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


def with_loras(recipe: Recipe, loras: Sequence[Lora]) -> Recipe:
    """`recipe` with other LoRAs fused before its own; raises `DiffpressError` where it then contradicts itself."""
    said = recipe.model_dump(include=recipe.model_fields_set)
    changed = Recipe.model_validate({**said, "lora": (*loras, *recipe.lora)})
    changed.built()
    return changed


def with_gates(recipe: Recipe, more: Sequence[str]) -> Recipe:
    """`recipe` with further gates after its own; raises `DiffpressError` for one that is none."""
    changed = recipe.model_copy(update={"gates": tuple(dict.fromkeys((*recipe.gates, *more)))})
    changed.built()
    return changed


def as_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every pass's fields filled in, for the manifest."""
    passes = [{name: _plain(asdict(built))} for name, built in recipe.built()]  # type: ignore[call-overload]
    return {**recipe.model_dump(mode="json"), "passes": passes}


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """A path as JSON holds it."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
