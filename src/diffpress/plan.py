"""The plan: what compress decided, as data and nothing else. Standard library and numpy only.

With the changed weights it is the whole decision: export turns it into graphs, the runtime executes its step program.
On disk it is a folder with `plan.json` and `tensors.npz` (read without pickle).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from diffpress.errors import DiffpressError

_ARRAYS = ("weight_scale", "input_scale", "multiplier")  # of a LayerQuant
TIMESTEPS_A_LINE = 16
FULL = "full"  # the variant that computes everything; its graph is model.onnx
# How a call is guided, c and u being the conditional and unconditional output: FULL, both are computed; REUSE, c alone,
# with the difference c - u of the last full call; CONDITIONAL, c alone; MEAN, c alone, from features that are the mean
# of both halves.
REUSE, CONDITIONAL, MEAN = "reuse", "conditional", "mean"
_GUIDED = {FULL: "#", REUSE: "-", CONDITIONAL: ".", MEAN: "="}  # and how people see it
EARLIER = "@1"  # ends the name of a feature's value before the last one written
# What a sampling schedule adds up. PRIOR is the noise that sampling began with, the same at every call; FRESH is drawn
# anew at the call, by stochastic solvers.
SAMPLE, OUTPUT, PRIOR, FRESH = "sample", "output", "noise", "fresh"
Row = tuple[tuple[str, int, float], ...]  # terms: what, how many calls back, times how much


def listed(timesteps: Sequence[float]) -> str:
    """Timesteps for people, a long list without its middle."""
    words = [f"{timestep:.1f}".removesuffix(".0") for timestep in timesteps]
    half = TIMESTEPS_A_LINE // 2
    return " ".join(words if len(words) <= TIMESTEPS_A_LINE else [*words[:half], "...", *words[-half:]])


def check_start(first: int, calls: int) -> None:
    """Raise `DiffpressError` unless sampling of so many calls can begin at call `first`."""
    if not 0 <= first < calls:
        raise DiffpressError(f"sampling cannot begin at call {first}: give 0 to {calls - 1}")


@dataclass(frozen=True)
class Sampling:
    """A sampling schedule, bound to one scheduler and step count, as coefficients.

    Almost every diffusers scheduler is linear in the samples, denoiser outputs and noise it has seen, so call i is

        output_i = denoiser(input_scale[i] * sample_i, timesteps[i])
        sample_{i+1} = sum of coefficient * (sample_{i-lag}, output_{i-lag}, noise or fresh) over terms[i]

    `terms[i]` holds (SAMPLE, OUTPUT, PRIOR or FRESH, lag, coefficient). `output` is after guidance, and where there are
    `offsets` ([calls][C], a mean error by channel) less its own. `noise`, the prior one, is what sampling began with,
    of unit variance: sample_0 / init_noise_sigma, with lag 0; linear solvers alone take it. `fresh`, with lag 0, is
    drawn at the call, of unit variance, too; with a coefficient of 0 it is drawn all the same, as diffusers does, so
    that the draws after it stay in step. Heights are in pixels.

    `levels` are (alpha, sigma) of every call and of the end: an image x0 noised for call i is
    alpha_i * x0 + sigma_i * noise. `order` calls in a row make a step; sampling from an image begins at a step.

    A solver with a memory begins anew where sampling starts in the middle, with fewer terms. `starts[first - 1]` is
    then what is added to the rows from call `first` on, where these have lost what reaches behind it (rows at the end
    that gain nothing are left out), or None where no sampling can begin. So DPM-Solver++ 2M has one short row for each
    start, PNDM five, and UniPC, which never forgets, a few terms for each start and call; all from one probe.

    A solver that is not linear has another name than "linear". For "evodiff" the sum is the data prediction of call i,
    from which `diffpress.evodiff` makes sample_{i+1}: the probe that call i + 1 is made at, not yet a sample of its
    level; `origin` is the timestep that it measures time by, that of the first call of the whole schedule if None.
    """

    scheduler: str
    steps: int
    guidance_scale: float
    height: int
    width: int
    timesteps: tuple[float, ...]
    input_scale: tuple[float, ...]
    init_noise_sigma: float
    terms: tuple[Row, ...]
    solver: str = "linear"
    levels: tuple[tuple[float, float], ...] = ()
    offsets: tuple[tuple[float, ...], ...] = ()
    order: int = 1
    starts: tuple[tuple[Row, ...] | None, ...] = ()
    origin: float | None = None

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise on its way."""
        return any(kind == FRESH for row in self.terms for kind, _, _ in row)

    def starting(self, first: int) -> Sampling:
        """The schedule from call `first` on, for sampling that begins there with a sample of that call's level.

        Raises `DiffpressError` where there is no such call, and where the solver cannot begin, see `starts`.
        """
        check_start(first, len(self.timesteps))
        if not first:
            return self
        rows = [tuple(term for term in row if term[1] <= index) for index, row in enumerate(self.terms[first:])]
        if self.starts:
            added = self.starts[first - 1]
            if added is None:
                raise DiffpressError(
                    f"sampling cannot begin at call {first}: {self.scheduler} makes a step of {self.order} calls"
                )
            rows[: len(added)] = [_added(row, more) for row, more in zip(rows, added, strict=False)]
        elif any(len(row) < len(whole) for row, whole in zip(rows, self.terms[first:], strict=True)):
            raise DiffpressError(
                f"this schedule cannot begin at call {first}: its solver ({self.scheduler}) looks back at calls before "
                "that, and the bundle does not say how it begins anew: compress again"
            )
        return replace(
            self,
            timesteps=self.timesteps[first:],
            input_scale=self.input_scale[first:],
            terms=tuple(rows),
            levels=self.levels[first:],
            offsets=self.offsets[first:],
            starts=(),
            origin=self.timesteps[0] if self.origin is None else self.origin,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; what most schedules lack is left out, so that old versions read them."""
        document = {**self.__dict__, "terms": _as_lists(self.terms)}
        rare: dict[str, list[Any]] = {name: [list(row) for row in document.pop(name)] for name in ("levels", "offsets")}
        rare["starts"] = [None if rows is None else _as_lists(rows) for rows in document.pop("starts")]
        for name, usual in (("solver", "linear"), ("order", 1), ("origin", None)):
            if document[name] == usual:
                del document[name]
        return document | {name: rows for name, rows in rare.items() if rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sampling:
        """The inverse of `to_json`."""
        vectors = {name: tuple(data[name]) for name in ("timesteps", "input_scale")}
        pairs = tuple((float(alpha), float(sigma)) for alpha, sigma in data.get("levels", ()))
        offsets = tuple(tuple(float(offset) for offset in row) for row in data.get("offsets", ()))
        starts = tuple(None if rows is None else _rows(rows) for rows in data.get("starts", ()))
        tables = {"terms": _rows(data["terms"]), "levels": pairs, "offsets": offsets, "starts": starts}
        return cls(**{**data, **vectors, **tables})


def _as_lists(rows: Sequence[Row]) -> list[list[list[Any]]]:
    return [[list(term) for term in row] for row in rows]


def _rows(rows: Sequence[Sequence[Sequence[Any]]]) -> tuple[Row, ...]:
    return tuple(tuple((str(kind), int(lag), float(c)) for kind, lag, c in row) for row in rows)


def _added(row: Row, more: Row) -> Row:
    """The sum of two rows of terms; what cancels out is left out."""
    sums = {(kind, lag): c for kind, lag, c in row}
    for kind, lag, c in more:
        sums[kind, lag] = sums.get((kind, lag), 0.0) + c
    changed = {(kind, lag) for kind, lag, _ in more}
    return tuple((kind, lag, c) for (kind, lag), c in sums.items() if c or (kind, lag) not in changed)


@dataclass(frozen=True)
class Variant:
    """One graph of the denoiser: the features it takes in place of computing them, and those it hands out.

    A read that ends with `EARLIER` is the value that the last write of the feature replaced. `together` is how many
    consecutive steps of the variant may run as one batch: more than 1 where nothing that it reads changes in between,
    which is to say where it does not look at the sample.
    """

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    together: int = 1

    def __post_init__(self) -> None:
        lonely = [feature for feature in self.features if feature not in self.reads]
        if lonely:
            raise DiffpressError(f"a variant reads '{lonely[0]}{EARLIER}', but not '{lonely[0]}' itself")
        for names in (self.reads, self.writes):
            if len(set(names)) < len(names):
                raise DiffpressError(f"a variant names feature '{Counter(names).most_common(1)[0][0]}' twice")
        if kept := [feature for feature in self.writes if feature.endswith(EARLIER)]:
            raise DiffpressError(f"a variant writes '{kept[0]}': earlier values are kept, not written")
        if self.together < 1 or (self.together > 1 and self.writes):
            why = "it hands out features" if self.writes else "that is fewer than one"
            raise DiffpressError(f"a variant cannot run {self.together} steps together: {why}")

    @property
    def features(self) -> tuple[str, ...]:
        """What it reads, each feature once, whichever of its values."""
        return tuple(dict.fromkeys(read.removesuffix(EARLIER) for read in self.reads))


@dataclass(frozen=True)
class StepProgram:
    """Which variant runs at each call of the denoiser, and which halves of guidance it computes.

    `guidance` holds FULL, REUSE, CONDITIONAL or MEAN for each step; empty, which all FULL becomes, where every step
    computes both. A step of one half reads the conditional half of what was written for both, a MEAN step the mean of
    the halves. Raises `DiffpressError` when a step reads what none wrote, or what was written for half of its rows.
    """

    steps: tuple[str, ...]
    variants: Mapping[str, Variant] = field(default_factory=lambda: {FULL: Variant()})
    guidance: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_guidance()
        self._check_variants()
        written: dict[str, int] = {}  # feature to the last step that wrote it, and its earlier value's
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
            if self.guided(index) == MEAN and not any(
                self.guided(written[feature]) == FULL for feature in self.variants[name].reads
            ):
                raise DiffpressError(
                    f"step {index} takes the mean of both halves of guidance, but reads nothing that was written for "
                    f"both: '{CONDITIONAL}' is what it does"
                )
            for feature in self.variants[name].writes:
                if feature in written:
                    written[feature + EARLIER] = written[feature]
                written[feature] = index

    def _check_variants(self) -> None:
        if FULL not in self.variants:
            raise DiffpressError(f"a step program needs a variant named '{FULL}'")
        if self.variants[FULL].reads:
            raise DiffpressError(f"variant '{FULL}' computes everything, but reads '{self.variants[FULL].reads[0]}'")

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
        """How step `index` is guided: FULL, REUSE, CONDITIONAL or MEAN."""
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

    def runs(self) -> tuple[tuple[int, int], ...]:
        """(first step, how many) of every call of a graph: more than one step where a variant runs some together."""
        found: list[tuple[int, int]] = []
        for index, name in enumerate(self.steps):
            first, count = found[-1] if found else (0, 0)
            same = count and self.steps[first] == name and self.guided(first) == self.guided(index)
            if same and count < self.variants[name].together:
                found[-1] = (first, count + 1)
            else:
                found.append((index, 1))
        return tuple(found)

    def starting(self, first: int) -> StepProgram:
        """The program of the steps from `first` on, which are counted from 0, for sampling that begins there.

        A step that reads what none of them wrote runs in full, and one that reuses a difference that none of them
        computed is guided in full; so the first is both. All others are as planned. Raises `DiffpressError` where
        there is no such step.
        """
        check_start(first, len(self.steps))
        steps: list[str] = []
        guidance: list[str] = []
        written: dict[str, str] = {}  # feature to how the step that wrote it was guided
        for index in range(first, len(self.steps)):
            name, how = self.steps[index], self.guided(index)
            if how == REUSE and FULL not in guidance:
                how = FULL
            reads = self.variants[name].reads
            # What a step of one half wrote has not the rows for both.
            if any(read not in written or (how == FULL and written[read] != FULL) for read in reads):
                name = FULL
            for feature in self.variants[name].writes:
                if feature in written:
                    written[feature + EARLIER] = written[feature]
                written[feature] = how
            steps.append(name)
            guidance.append(how)
        return StepProgram(tuple(steps), self.variants, tuple(guidance))

    def marks(self) -> str:
        """A character per step, for people: '#' runs everything, '-' reuses features."""
        return "".join("#" if not self.variants[name].reads else "-" for name in self.steps)

    def guidance_marks(self) -> str:
        """The same of guidance: '#' computes both halves, '-' reuses their difference, '.' leaves guidance out.

        '=' leaves it out and reads the mean of what both halves wrote.
        """
        return "".join(_GUIDED[self.guided(index)] for index in range(len(self.steps)))

    def to_json(self) -> dict[str, Any]:
        """Plain lists and strings."""
        variants = {
            name: {"reads": list(variant.reads), "writes": list(variant.writes)}
            | ({"together": variant.together} if variant.together > 1 else {})
            for name, variant in self.variants.items()
        }
        guidance = {"guidance": list(self.guidance)} if self.guidance else {}
        return {"steps": list(self.steps), "variants": variants, **guidance}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StepProgram:
        """The inverse of `to_json`."""
        variants = {
            name: Variant(tuple(entry["reads"]), tuple(entry["writes"]), entry.get("together", 1))
            for name, entry in data["variants"].items()
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
class Correction:
    """What stands in for a feature F [N, C, ...] at a step that reads it: sum_k scale[step, k] F@k + offset[step].

    `scale` is [steps, depth, C], with k = 0 for the last value written and k = 1 for the one before; `offset` is
    [steps, C]. C is 1 where all channels are corrected alike. Of a feature [N, tokens, C] channels are the last axis.
    Rows of steps that do not read it are not looked at.
    """

    scale: np.ndarray
    offset: np.ndarray

    def __post_init__(self) -> None:
        if self.scale.ndim != 3 or not 1 <= self.depth <= 2 or self.offset.shape != self.scale.shape[::2]:
            raise DiffpressError(
                f"a correction's scales {self.scale.shape} and offsets {self.offset.shape} do not belong together"
            )

    @property
    def depth(self) -> int:
        """How many values of the feature it takes: 1, or 2 with the one before."""
        return self.scale.shape[1]


@dataclass(frozen=True)
class Corrections:
    """Corrections by feature, rows in the order of `timesteps`; steps at one timestep, which PNDM has, share theirs."""

    timesteps: tuple[float, ...]
    features: Mapping[str, Correction]

    def __post_init__(self) -> None:
        wrong = [name for name, entry in self.features.items() if len(entry.scale) != len(self.timesteps)]
        if wrong:
            raise DiffpressError(f"the correction of {wrong[0]} has not one row for each of the schedule's calls")
        first = [self.timesteps.index(timestep) for timestep in self.timesteps]
        for name, entry in self.features.items():
            if any((rows[first] != rows).any() for rows in (entry.scale, entry.offset)):
                raise DiffpressError(f"corrections are found by timestep, but that of {name} has two rows for one")


@dataclass(frozen=True)
class TemporalTable:
    """Precomputed time features: for each module path a table [steps, channels], rows in the order of `timesteps`."""

    timesteps: tuple[float, ...]
    tables: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class MadeFor:
    """What a step program was planned for: it is right nowhere else.

    `model` is the digest of the model that was compressed, `sampling` the schedule as it was then, `passes` the passes
    before, each its name and fields as in a recipe.
    """

    model: str
    sampling: Sampling
    passes: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As `plan.json` holds it."""
        passes = [{name: dict(fields)} for name, fields in self.passes]
        return {"model": self.model, "sampling": self.sampling.to_json(), "passes": passes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MadeFor:
        """The inverse of `to_json`."""
        passes = tuple((str(name), fields) for entry in data["passes"] for name, fields in entry.items())
        return cls(data["model"], Sampling.from_json(data["sampling"]), passes)


@dataclass(frozen=True)
class Plan:
    """Everything compress decided. Layers are named by their module path in the denoiser.

    `made_for` is None in plans from before they said so. Raises `DiffpressError` where the parts are not of one
    schedule.
    """

    sampling: Sampling
    program: StepProgram
    quantization: Mapping[str, LayerQuant] = field(default_factory=dict)
    temporal: TemporalTable | None = None
    corrections: Corrections | None = None
    made_for: MadeFor | None = None

    def __post_init__(self) -> None:
        calls = self.sampling.timesteps
        if len(self.program.steps) != len(calls):
            raise DiffpressError(
                f"the step program has {len(self.program.steps)} steps, the schedule {len(calls)} calls: "
                "it was made for another one"
            )
        for name, part in (("corrections", self.corrections), ("temporal table", self.temporal)):
            if part is not None and tuple(part.timesteps) != tuple(calls):
                raise DiffpressError(
                    f"the {name} of timesteps {listed(part.timesteps)} are not of the schedule's {listed(calls)}"
                )

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
        if self.corrections is not None:
            for name, entry in self.corrections.features.items():
                tensors |= {f"correction/{name}": entry.scale, f"correction_offset/{name}": entry.offset}
        layers = {
            name: {"weight_format": layer.weight_format, "input_format": layer.input_format}
            for name, layer in self.quantization.items()
        }
        document = {
            "sampling": self.sampling.to_json(),
            "program": self.program.to_json(),
            "quantization": layers,
            "temporal": None if self.temporal is None else {"timesteps": list(self.temporal.timesteps)},
        } | ({} if self.made_for is None else {"made_for": self.made_for.to_json()})
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
            corrected = {
                name.removeprefix("correction/"): Correction(value, tensors[name.replace("/", "_offset/", 1)])
                for name, value in tensors.items()
                if name.startswith("correction/")
            }
            sampling = Sampling.from_json(document["sampling"])
            corrections = Corrections(sampling.timesteps, corrected) if corrected else None
            program = StepProgram.from_json(document["program"])
            made_for = MadeFor.from_json(document["made_for"]) if "made_for" in document else None
            return cls(sampling, program, quantization, temporal, corrections, made_for)
        # EOFError and BadZipFile: what numpy raises for an empty and for a cut file.
        except (OSError, EOFError, BadZipFile, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DiffpressError(f"{folder} holds no readable plan: {error}") from error
