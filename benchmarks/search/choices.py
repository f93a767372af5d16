"""What a space leaves open: values and ranges, the alternatives of a pass, the slots of a list of passes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from diffpress.compress.recipe import PASSES
from diffpress.errors import DiffpressError

WITHOUT = "none"  # the choice that leaves a pass out
_LIMITS = {"from", "to", "step", "log"}


class Draws(Protocol):
    """What picks values: optuna's `Trial`, by its names."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """One of the choices."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """From `low` to `high`, both included."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """From `low` to `high`, both included."""


class Span(BaseModel):
    """A range; whole numbers where its ends are whole."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    low: Annotated[int | float, Field(alias="from")]
    high: Annotated[int | float, Field(alias="to")]
    step: Annotated[int | float | None, Field(gt=0)] = None
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> Span:
        if not self.low < self.high:
            raise ValueError(f"'from' {self.low:g} has to be below 'to' {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a logarithmic range begins above 0 and has no step")
        return self

    @property
    def whole(self) -> bool:
        """Whether it has whole numbers alone."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 1))

    def size(self) -> float:
        """How many values it has, infinite without a step."""
        if not self.whole and self.step is None:
            return math.inf
        return (self.high - self.low) // (self.step or 1) + 1

    def has(self, value: Any) -> bool:
        """Whether `value` lies on it."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / (self.step or 1)
        return math.isclose(steps, round(steps)) if self.whole or self.step is not None else True

    def draw(self, name: str, draws: Draws) -> int | float:
        """A value of it."""
        if self.whole:
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return draws.suggest_int(name, low, high, step=step, log=self.log)
        return draws.suggest_float(name, self.low, self.high, step=self.step, log=self.log)


@dataclass(frozen=True)
class Choice:
    """Values to choose from; the search sees their JSON, which is one for every kind of value."""

    values: tuple[Any, ...]

    def size(self) -> float:
        """How many there are."""
        return len(self.values)

    def has(self, value: Any) -> bool:
        """Whether `value` is one of them."""
        return plain(value) in map(plain, self.values)

    def draw(self, name: str, draws: Draws) -> Any:
        """One of them; the only one is not asked for."""
        if len(self.values) == 1:
            return self.values[0]
        return json.loads(draws.suggest_categorical(name, [json.dumps(value) for value in self.values]))

    def parameter(self, value: Any) -> str | None:
        """What the search calls `value`; None where it is the only one."""
        if len(self.values) == 1:
            return None
        return json.dumps(next(own for own in self.values if plain(own) == plain(value)))  # 2 where the value is 2.0


@dataclass(frozen=True)
class Alternative:
    """A pass and its fields as the space leaves them open; `label` tells it from others of its slot."""

    label: str
    name: str
    fields: Mapping[str, Choice | Span]

    def size(self) -> float:
        """How many ways there are to fill it in."""
        return math.prod(field.size() for field in self.fields.values())

    def draw(self, prefix: str, draws: Draws) -> str | dict[str, Any]:
        """The pass as a recipe has it."""
        fields = {key: field.draw(f"{prefix}.{key}", draws) for key, field in self.fields.items()}
        return {self.name: fields} if fields else self.name

    def parameters(self, prefix: str, step: Any) -> dict[str, Any] | None:
        """What the search would have to draw for the pass `step`; None where it is not among them."""
        found: dict[str, Any] = {}
        for key, known in PASSES[self.name].__pydantic_fields__.items():
            default = known.get_default(call_default_factory=True)
            if key not in self.fields and plain(getattr(step, key)) != plain(default):
                return None
        for key, field in self.fields.items():
            value = getattr(step, key)
            if not field.has(value):
                return None
            drawn = value if isinstance(field, Span) else field.parameter(value)
            if drawn is not None:
                found[f"{prefix}.{key}"] = drawn
        return found


@dataclass(frozen=True)
class Slot:
    """A place in the list of passes: one of its alternatives, or nothing where it is `optional`."""

    name: str
    optional: bool
    alternatives: tuple[Alternative, ...]

    @property
    def labels(self) -> list[str]:
        """What the search chooses from."""
        return [*([WITHOUT] if self.optional else []), *(one.label for one in self.alternatives)]

    def size(self) -> float:
        """How many ways there are to fill it."""
        return self.optional + sum(one.size() for one in self.alternatives)

    def draw(self, draws: Draws) -> list[str | dict[str, Any]]:
        """What stands here: one pass, or none."""
        labels = self.labels
        chosen = labels[0] if len(labels) == 1 else draws.suggest_categorical(self.name, labels)
        return [one.draw(f"{self.name}: {one.label}", draws) for one in self.alternatives if one.label == chosen]

    def parameters(self, label: str) -> dict[str, Any]:
        """The choice of `label`."""
        return {} if len(self.labels) == 1 else {self.name: label}


def slot_of(entry: Mapping[str, Any]) -> Slot:
    """An entry of a space's passes; raises `DiffpressError` naming what no recipe could have."""
    optional, found = False, []
    if not entry:
        raise DiffpressError("an entry of 'passes' is empty: name a pass")
    for name, given in entry.items():
        if name not in PASSES:
            raise DiffpressError(f"there is no pass '{name}', choose from: {', '.join(PASSES)}")
        options = given if isinstance(given, list) else [given or {}]  # alone, `temporal-table:` is the pass itself
        kept = [option for option in options if option is not None]
        optional = optional or len(kept) < len(options)
        for number, option in enumerate(kept, 1):
            found.append(Alternative(f"{name} {number}" if len(kept) > 1 else name, name, _fields(name, option)))
    return Slot("/".join(entry), optional, tuple(found))


def _fields(name: str, given: Any) -> dict[str, Choice | Span]:
    """The fields of a pass, each value of which the pass would take by itself."""
    if not isinstance(given, Mapping):
        raise DiffpressError(f"pass '{name}': its fields are a mapping, not {given!r}")
    known = PASSES[name].__pydantic_fields__
    found: dict[str, Choice | Span] = {}
    for key, value in given.items():
        if key not in known:
            raise DiffpressError(f"pass '{name}' has no key '{key}', it has: {', '.join(known)}")
        try:
            field = _open(value)
            wanted: Any = Annotated[(known[key].annotation, "", *known[key].metadata)]
            adapter: TypeAdapter[Any] = TypeAdapter(wanted)
            for one in (field.low, field.high) if isinstance(field, Span) else field.values:
                adapter.validate_python(one)
        except ValidationError as error:
            raise DiffpressError(f"pass '{name}', key '{key}': {said(error)}") from error
        found[key] = field
    return found


def _open(value: Any) -> Choice | Span:
    if isinstance(value, Mapping) and {"from", "to"} <= value.keys() <= _LIMITS:
        return Span.model_validate(dict(value))
    if isinstance(value, list):
        if not value:
            raise DiffpressError("an empty list offers nothing: for a field that is an empty list write [[]]")
        return Choice(tuple(value))
    return Choice((value,))


def plain(value: Any) -> Any:
    """As JSON holds it: tuples are lists, paths are texts."""
    return json.loads(json.dumps(value, default=str))


def said(error: ValidationError) -> str:
    """The first problem, in our words."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{where}'"
    message = problem["msg"].removeprefix("Value error, ")
    return f"'{where}': {message}, got {problem['input']!r}" if where else message
