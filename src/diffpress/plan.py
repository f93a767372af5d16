"""The plan: what compress decided, as data and nothing else. Standard library and numpy only.

With the changed weights it is the whole decision: export turns it into graphs, the runtime executes its step program.
On disk it is a folder with `plan.json` and `tensors.npz` (read without pickle).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from diffpress.errors import DiffpressError

_ARRAYS = ("weight_scale", "input_scale", "multiplier")  # of a LayerQuant
TIMESTEPS_A_LINE = 16
FULL = "full"  # the variant that computes everything; its graph is model.onnx
# How a call is guided, c and u being the conditional and unconditional output: FULL, both are computed; REUSE, c alone,
# with the difference c - u of the last full call; CONDITIONAL, c alone.
REUSE, CONDITIONAL = "reuse", "conditional"
_GUIDED = {FULL: "#", REUSE: "-", CONDITIONAL: "."}  # and how people see it


def listed(timesteps: Sequence[float]) -> str:
    """Timesteps for people, a long list without its middle."""
    words = [f"{timestep:.1f}".removesuffix(".0") for timestep in timesteps]
    half = TIMESTEPS_A_LINE // 2
    return " ".join(words if len(words) <= TIMESTEPS_A_LINE else [*words[:half], "...", *words[-half:]])


@dataclass(frozen=True)
class Sampling:
    """A sampling schedule, bound to one scheduler and step count, as coefficients.

    Every deterministic diffusers scheduler is linear in the samples and denoiser outputs it has seen, so call i is

        output_i = denoiser(input_scale[i] * sample_i, timesteps[i])
        sample_{i+1} = sum of coefficient * (sample_{i-lag} or output_{i-lag}) over terms[i]

    `terms[i]` holds ("sample" or "output", lag, coefficient). `output` is after guidance, and where there are `offsets`
    ([calls][C], a mean error by channel) less its own. Heights are in pixels.

    A solver that is not linear has another name than "linear". For "evodiff" the sum is the data prediction of call i,
    from which `diffpress.evodiff` makes sample_{i+1}: the probe that call i + 1 is made at, not yet a sample of its
    level. `levels` are then (alpha, sigma) of every call and of the end.
    """

    scheduler: str
    steps: int
    guidance_scale: float
    height: int
    width: int
    timesteps: tuple[float, ...]
    input_scale: tuple[float, ...]
    init_noise_sigma: float
    terms: tuple[tuple[tuple[str, int, float], ...], ...]
    solver: str = "linear"
    levels: tuple[tuple[float, float], ...] = ()
    offsets: tuple[tuple[float, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; what most schedules lack is left out, so that old versions read them."""
        document = {**self.__dict__, "terms": [[list(term) for term in row] for row in self.terms]}
        rare = {name: [list(row) for row in document.pop(name)] for name in ("levels", "offsets")}
        if self.solver == "linear":
            del document["solver"]
        return document | {name: rows for name, rows in rare.items() if rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sampling:
        """The inverse of `to_json`."""
        terms = tuple(tuple((str(k), int(lag), float(c)) for k, lag, c in row) for row in data["terms"])
        vectors = {name: tuple(data[name]) for name in ("timesteps", "input_scale")}
        pairs = tuple((float(alpha), float(sigma)) for alpha, sigma in data.get("levels", ()))
        offsets = tuple(tuple(float(offset) for offset in row) for row in data.get("offsets", ()))
        return cls(**{**data, **vectors, "terms": terms, "levels": pairs, "offsets": offsets})


@dataclass(frozen=True)
class Variant:
    """One graph of the denoiser: the features it takes in place of computing them, and those it hands out."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepProgram:
    """Which variant runs at each call of the denoiser, and which halves of guidance it computes.

    `guidance` holds FULL, REUSE or CONDITIONAL for each step; empty, which all FULL becomes, where every step computes
    both. Raises `DiffpressError` when a step reads what none wrote, or what was written for half of its rows.
    """

    steps: tuple[str, ...]
    variants: Mapping[str, Variant] = field(default_factory=lambda: {FULL: Variant()})
    guidance: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_guidance()
        if FULL not in self.variants:
            raise DiffpressError(f"a step program needs a variant named '{FULL}'")
        written: dict[str, int] = {}  # feature to the last step that wrote it
        for index, name in enumerate(self.steps):
            if name not in self.variants:
                known = ", ".join(self.variants)
                raise DiffpressError(f"step {index} runs variant '{name}', which is not one of: {known}")
            for feature in self.variants[name].reads:
                if feature not in written:
                    raise DiffpressError(f"step {index} reads feature '{feature}' before any step wrote it")
                if self.guided(index) == FULL and self.guided(written[feature]) != FULL:
                    raise DiffpressError(
                        f"step {index} computes both halves of guidance, but step {written[feature]} wrote feature "
                        f"'{feature}', which it reads, for the conditional half alone: let the intervals of both agree"
                    )
            written.update(dict.fromkeys(self.variants[name].writes, index))

    def _check_guidance(self) -> None:
        if set(self.guidance) <= {FULL}:
            object.__setattr__(self, "guidance", ())  # one form of what is the same
            return
        if len(self.guidance) != len(self.steps):
            raise DiffpressError(f"a step program of {len(self.steps)} steps has {len(self.guidance)} of guidance")
        for index, name in enumerate(self.guidance):
            if name not in _GUIDED:
                raise DiffpressError(f"guidance of step {index} is '{name}', which is not one of: {', '.join(_GUIDED)}")
            if name == REUSE and FULL not in self.guidance[:index]:
                raise DiffpressError(f"step {index} reuses the difference of guidance before any step computed it")

    def guided(self, index: int) -> str:
        """How step `index` is guided: FULL, REUSE or CONDITIONAL."""
        return self.guidance[index] if self.guidance else FULL

    def halves(self, variant: str) -> tuple[int, ...]:
        """Batches per image that the steps of a variant run with under guidance, the most frequent first: 1 or 2."""
        runs = Counter(
            2 if self.guided(index) == FULL else 1 for index, name in enumerate(self.steps) if name == variant
        )
        return tuple(count for count, _ in runs.most_common())

    def evaluations(self) -> float:
        """Calls of the denoiser under guidance; one that computes the conditional half alone counts as half a call."""
        return sum(1.0 if self.guided(index) == FULL else 0.5 for index in range(len(self.steps)))

    def marks(self) -> str:
        """A character per step, for people: '#' runs everything, '-' reuses features."""
        return "".join("#" if not self.variants[name].reads else "-" for name in self.steps)

    def guidance_marks(self) -> str:
        """The same of guidance: '#' computes both halves, '-' reuses their difference, '.' leaves guidance out."""
        return "".join(_GUIDED[self.guided(index)] for index in range(len(self.steps)))

    def to_json(self) -> dict[str, Any]:
        """Plain lists and strings."""
        variants = {
            name: {"reads": list(variant.reads), "writes": list(variant.writes)}
            for name, variant in self.variants.items()
        }
        guidance = {"guidance": list(self.guidance)} if self.guidance else {}
        return {"steps": list(self.steps), "variants": variants, **guidance}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StepProgram:
        """The inverse of `to_json`."""
        variants = {
            name: Variant(tuple(entry["reads"]), tuple(entry["writes"])) for name, entry in data["variants"].items()
        }
        return cls(tuple(data["steps"]), variants, tuple(data.get("guidance", ())))


@dataclass(frozen=True)
class LayerQuant:
    """How one layer computes; everything symmetric. Formats are named as in `compress.numerics.formats`.

    The weight W [out, in, ...] of the model stands in the graph as Q(W / multiplier), the layer's input x as
    Q(x * multiplier): the product is the same, the ranges are easier. `weight_scale` is [out], or [out, blocks] for
    equal blocks of input channels. `input_scale` is [1], or [steps] when every step has its own; it and `input_format`
    are None where inputs stay in float. `multiplier` is [in], or None for ones.
    """

    weight_scale: np.ndarray
    input_scale: np.ndarray | None = None
    weight_format: str = "int8"
    input_format: str | None = "int8"
    multiplier: np.ndarray | None = None

    def __post_init__(self) -> None:
        if (self.input_format is None) != (self.input_scale is None):
            raise DiffpressError("a quantized layer needs a scale and a format for its input, or neither")

    @property
    def name(self) -> str:
        """Both formats, for people: "int8", "int4 x int8", "int4 weights"."""
        if self.input_format is None:
            return f"{self.weight_format} weights"
        same = self.input_format == self.weight_format
        return self.weight_format if same else f"{self.weight_format} x {self.input_format}"

    def contents(self) -> bytes:
        """All that it holds, for the key of a result that depends on it."""
        arrays = (self.weight_scale, self.input_scale, self.multiplier)
        parts = (b"-" if array is None else array.tobytes() for array in arrays)
        return f"{self.weight_format} {self.input_format}".encode() + b"".join(parts)


@dataclass(frozen=True)
class TemporalTable:
    """Precomputed time features: for each module path a table [steps, channels], rows in the order of `timesteps`."""

    timesteps: tuple[float, ...]
    tables: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Plan:
    """Everything compress decided. Layers are named by their module path in the denoiser."""

    sampling: Sampling
    program: StepProgram
    quantization: Mapping[str, LayerQuant] = field(default_factory=dict)
    temporal: TemporalTable | None = None

    def save(self, folder: Path) -> None:
        """Write `plan.json` and `tensors.npz` into `folder`, which is made if absent."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{field}/{name}": value
            for name, layer in self.quantization.items()
            for field in _ARRAYS
            if (value := getattr(layer, field)) is not None
        }
        if self.temporal is not None:
            tensors |= {f"temporal/{name}": table for name, table in self.temporal.tables.items()}
        layers = {
            name: {"weight_format": layer.weight_format, "input_format": layer.input_format}
            for name, layer in self.quantization.items()
        }
        document = {
            "sampling": self.sampling.to_json(),
            "program": self.program.to_json(),
            "quantization": layers,
            "temporal": None if self.temporal is None else {"timesteps": list(self.temporal.timesteps)},
        }
        (folder / "plan.json").write_text(json.dumps(document, indent=1))
        np.savez(folder / "tensors.npz", **tensors)

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read what `save` wrote; raises `DiffpressError` when it is not a plan."""
        try:
            document = json.loads((folder / "plan.json").read_text())
            with np.load(folder / "tensors.npz", allow_pickle=False) as file:
                tensors = dict(file)
            quantization = {
                name: LayerQuant(
                    tensors[f"weight_scale/{name}"],
                    tensors.get(f"input_scale/{name}"),
                    entry["weight_format"],
                    entry["input_format"],
                    tensors.get(f"multiplier/{name}"),
                )
                for name, entry in document["quantization"].items()
            }
            temporal = None
            if document["temporal"] is not None:
                tables = {name[9:]: value for name, value in tensors.items() if name.startswith("temporal/")}
                temporal = TemporalTable(tuple(document["temporal"]["timesteps"]), tables)
            program = StepProgram.from_json(document["program"])
            return cls(Sampling.from_json(document["sampling"]), program, quantization, temporal)
        # EOFError and BadZipFile: what numpy raises for an empty and for a cut file.
        except (OSError, EOFError, BadZipFile, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DiffpressError(f"{folder} holds no readable plan: {error}") from error
