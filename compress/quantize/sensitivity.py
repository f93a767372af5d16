"""`mixed-precision`: what quantizing each layer costs, and the format of every layer under a budget.

Every layer is quantized alone and the error it causes is measured, either of the denoiser's output on recorded calls or
of the final latent after the whole sampling. Errors of layers are nearly independent, so their squares add: the least
error for a number of bytes is a knapsack with one format per layer, solved greedily by error per byte on each layer's
convex hull (Sinha and Zoltners 1979, The Multiple-Choice Knapsack Problem). Every prefix of that one ordered list is a
solution, so a budget of measured loss is found by bisection over it. Layers that do not pay stay in float.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from diffpress.calibration.capture import Call
from diffpress.calibration.model import state_digest
from diffpress.calibration.sets import uniform_stride
from diffpress.compress.cache.execute import CachedDenoiser
from diffpress.compress.families import unet as family
from diffpress.compress.numerics.formats import get
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.quantize.post_training import FORMATS, Format, QuantizePass, quantize_layers
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import LayerQuant

Error = Literal["output", "latent"]
Candidates = Mapping[str, Mapping[str, LayerQuant]]  # of each layer, by the name of its formats
FLOAT = "float"
FLOAT_BYTES = 2  # budgets are shares of FP16
TILE = 16  # int8 matrix products work on tiles of this many channels


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Target:
    """What a machine was measured to do, for estimates of latency; without a target there are none.

    `rates` are 10^9 multiply-adds a second, of "float" and of formats that multiply ("int8", "e4m3"). `bandwidth` is
    10^9 bytes a second, `float_bytes` what a float number takes there.
    """

    rates: dict[str, Annotated[float, Field(gt=0)]]
    bandwidth: Annotated[float, Field(gt=0)]
    float_bytes: Literal[2, 4] = 2

    def latency_ms(self, call: Traffic, weight_bytes: int, quant: LayerQuant | None = None) -> float | None:
        """One call of a layer; None where the target has no rate, and for formats that only simulate.

        A roofline (Williams et al. 2009): the longer of its arithmetic and of moving weights, inputs and outputs once.
        Assumed are inputs rounded in a pass of their own, float outputs, and weights in few bits that are decoded on
        the way and multiplied in float where inputs are float.
        """
        arithmetic, rounding = FLOAT, 0.0
        input_bytes: float = call.inputs * self.float_bytes
        if quant is not None and quant.input_format is not None:
            if quant.input_format != quant.weight_format or not get(quant.input_format).deploys:
                return None
            arithmetic, rounding = quant.input_format, input_bytes
            input_bytes = call.inputs * get(arithmetic).bits / 8
            rounding += input_bytes
        if arithmetic not in self.rates:
            return None
        moving = (weight_bytes + input_bytes + call.outputs * self.float_bytes) / self.bandwidth
        return 1e-6 * (max(call.multiply_adds / self.rates[arithmetic], moving) + rounding / self.bandwidth)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One call of a layer, both guidance halves: its multiply-adds, and numbers it reads and writes."""

    multiply_adds: int
    inputs: int
    outputs: int


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
    """A row of the table under way. `options` in order of preference; `why` it stays in float where that is decided."""

    kind: str
    shape: tuple[int, ...]
    float_ms: float | None = None
    options: tuple[Option, ...] = ()
    why: str = ""

    @property
    def bytes(self) -> int:
        """In FP16."""
        return FLOAT_BYTES * math.prod(self.shape)


class Memory:
    """Numbers by key in a JSON file that is whole after each new one: an interrupted run goes on from it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._values: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def recall(self, key: str, compute: Callable[[], float]) -> float:
        """The number of that key, computed at the first asking."""
        if key not in self._values:
            self._values[key] = compute()
            self._file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self._file.with_suffix(f".{os.getpid()}.partial")
            unfinished.write_text(json.dumps(self._values))
            unfinished.replace(self._file)
        return self._values[key]


@contextmanager
def on_fastest_device(work: Work) -> Iterator[None]:
    """Within the block the denoiser is on a GPU where there is one."""
    home = next(work.denoiser.parameters()).device
    work.denoiser.to("cuda" if torch.cuda.is_available() else home)
    try:
        yield
    finally:
        work.denoiser.to(home)


@torch.no_grad()
def final_latents(work: Work, prompts: Sequence[Call]) -> list[Tensor]:
    """The final latent [C, H, W] for the text of each call, sampled as one batch.

    By the schedule's coefficients, under the step program, from the noise of recorded prompts: seeds count from
    `work.seed`.
    """
    unet, sampling = work.denoiser, work.sampling
    shape = prompts[0].sample[:1].shape
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(work.seed + i)) for i in range(len(prompts))]
    samples = [torch.cat(noise).to(unet.device) * sampling.init_noise_sigma]
    outputs: list[Tensor] = []
    history = {"sample": samples, "output": outputs}
    texts = torch.stack([call.text for call in prompts], dim=1).to(unet.device)
    halves, text = len(texts), texts.flatten(0, 1)  # the unconditional half first, where guidance needs it
    denoiser = CachedDenoiser(unet, work.program, work.features)
    for index, timestep in enumerate(sampling.timesteps):
        scaled = samples[-1] * sampling.input_scale[index]
        output = denoiser(torch.cat([scaled] * halves), timestep, text, return_dict=False)[0]
        if halves == 2:
            plain, told = output.chunk(2)
            output = plain + sampling.guidance_scale * (told - plain)
        outputs.append(output)
        parts = [factor * history[kind][index - lag] for kind, lag, factor in sampling.terms[index]]
        samples.append(torch.stack(parts).sum(dim=0))
    return list(samples[-1])


def probe(work: Work, error: Error, prompts: int, calls: int) -> tuple[str, Callable[[], list[Tensor]]]:
    """What errors are measured on: a key of all it depends on, and a function that computes it with the denoiser as it
    stands: final latents of the first `prompts` recorded, or outputs of `calls` recorded calls at an even stride.
    """
    recordings = work.record()
    if error == "latent":
        given = _first_prompts(recordings, prompts)
    else:
        wanted = set(uniform_stride(len(recordings), calls))
        given = [call for index, call in enumerate(recordings) if index in wanted]
    context = [state_digest(work.denoiser), work.sampling.to_json(), work.program.to_json(), work.seed, error]
    key = hashlib.sha256(json.dumps(context).encode())
    for call in given:
        for tensor in (call.sample, call.timestep, call.text):
            key.update(tensor.cpu().contiguous().numpy().tobytes())

    @torch.no_grad()
    def run() -> list[Tensor]:
        return final_latents(work, given) if error == "latent" else [work.run(call) for call in given]

    return key.hexdigest(), run


def _first_prompts(recordings: Iterable[Call], count: int) -> list[Call]:
    """The first call of each of the first prompts; a prompt is told by its text."""
    found: list[Call] = []
    for call in recordings:
        if not any(torch.equal(call.text, other.text) for other in found):
            found.append(call)
            if len(found) == count:
                break
    return found


def deviation(run: Callable[[], list[Tensor]]) -> Callable[[], float]:
    """Runs once, as the reference; the returned function is the mean ||x - x'|| / ||x|| of a run later on.

    Raises `DiffpressError` where the reference is not finite.
    """
    reference = [tensor.double() for tensor in run()]
    if not all(bool(tensor.isfinite().all()) for tensor in reference):
        raise DiffpressError("the denoiser gives values that are not finite before anything is quantized")

    def measured() -> float:
        pairs = zip(run(), reference, strict=True)
        return fmean(float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)) for got, wanted in pairs)

    return measured


def measure(
    work: Work, candidates: Candidates, error: Error = "output", prompts: int = 4, calls: int = 16
) -> dict[str, dict[str, float]]:
    """Relative error when a layer alone computes as one of its candidates, by layer and name; NaN if not finite.

    What an interrupted run has measured is read from `work.scratch`.
    """
    context, run = probe(work, error, prompts, calls)
    memory = Memory(work.scratch / "sensitivity.json")
    pairs = [(layer, name) for layer, named in candidates.items() for name in named]
    keys = {(layer, name): _key(context, layer, candidates[layer][name]) for layer, name in pairs}
    missing = [pair for pair, key in keys.items() if key not in memory]
    if missing:
        with on_fastest_device(work):
            measured = deviation(run)
            for layer, name in work.progress(missing, "measuring sensitivity"):
                with simulated(work.denoiser, {layer: candidates[layer][name]}, work.sampling.timesteps):
                    memory.recall(keys[layer, name], measured)
    return {
        layer: {name: memory.recall(keys[layer, name], lambda: math.nan) for name in named}
        for layer, named in candidates.items()
    }


def _key(context: str, layer: str, quant: LayerQuant) -> str:
    state = hashlib.sha256(f"{context} {layer} {quant.name}".encode())
    for array in (quant.weight_scale, quant.input_scale, quant.multiplier):
        state.update(b"-" if array is None else array.tobytes())
    return state.hexdigest()[:24]


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
    good, bad = 0, len(moves)  # float loses nothing
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if loss(after(middle)) <= at_most_loss else (good, middle)
    return after(good)


def does_not_pay(module: nn.Conv2d | nn.Linear, min_parameters: int = 0) -> str:
    """Why a layer of this size gains nothing from few bits, or nothing."""
    outputs, inputs = module.weight.shape[:2]
    if outputs % TILE or inputs % TILE:
        return f"{inputs} inputs and {outputs} outputs are not both multiples of {TILE}"
    if module.weight.numel() < min_parameters:
        return f"{module.weight.numel()} parameters are fewer than {min_parameters}"
    return ""


@torch.no_grad()
def observe_traffic(work: Work, layers: Mapping[str, nn.Module]) -> dict[str, Traffic]:
    """What every layer that a recorded call runs computes and moves in it."""
    seen: dict[str, Traffic] = {}

    def watch(name: str) -> Callable[..., None]:
        def note(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            each = module.weight[0].numel()  # multiply-adds of one number of the output
            seen[name] = Traffic(output.numel() * each, inputs[0].numel(), output.numel())

        return note

    hooks = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    try:
        for call in work.record():
            work.run(call)
            if len(seen) == len(layers):
                break
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class MixedPrecisionPass:
    """The format of every layer, by measured sensitivity and a budget.

    Candidates are what an earlier pass quantized, and `candidates`: formats as `quantize` knows them, in order of
    preference. `override` maps shell patterns over layers to a format or "float"; the last that matches decides.
    """

    candidates: tuple[Format, ...] = ()
    budget: Budget = Budget()
    error: Annotated[Error, Field(description="of the denoiser's output, or of the final latent: slower, nearer")] = (
        "output"
    )
    prompts: Annotated[int, Field(ge=1, description="sampled for errors of the final latent")] = 4
    calls: Annotated[int, Field(ge=1, description="recorded calls replayed for errors of the output")] = 16
    min_parameters: Annotated[int, Field(ge=0, description="smaller layers stay in float")] = 4096
    min_gain: Annotated[float, Field(description="estimated speed that a layer must gain: 0.05 is 5 %")] = 0.05
    target: Target | None = None
    override: dict[str, Format | Literal["float"]] = dataclasses.field(default_factory=dict)

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` for a pattern that matches nothing, nothing to choose from, or a missing scorer."""
        modules = _modules(work)
        for pattern in self.override:
            if not any(fnmatch(name, pattern) for name in modules):
                raise DiffpressError(
                    f"mixed-precision: override pattern '{pattern}' matches no layer, such as '{next(iter(modules))}'"
                )
        if not self.candidates and not work.quantization:
            raise DiffpressError("mixed-precision: name formats as candidates, or put 'quantize' before it")
        if any(f"{name}.weight" in work.originals for name in modules):
            raise DiffpressError("mixed-precision: passes that change weights, such as 'reconstruct', come after it")
        if self.target is not None and FLOAT not in self.target.rates:
            raise DiffpressError("mixed-precision: the target's rates need one of 'float' to compare with")
        scored = [name for name in self.budget.losses() if name != "latent"]
        if scored and work.scorer is None:
            raise DiffpressError(f"mixed-precision: nothing here measures the loss of {scored[0]}; use bytes or latent")

    def apply(self, work: Work) -> str:
        """Measure, choose, and make the choice the plan; the table is kept in `work.tables["sensitivity"]`."""
        candidates = self._candidates(work)
        table = self._table(work, candidates)
        kept = {name: {o.name: candidates[name][o.name] for o in layer.options} for name, layer in table.items()}
        errors = measure(work, kept, self.error, self.prompts, self.calls)
        table = {name: _with_errors(layer, errors[name]) for name, layer in table.items()}
        fixed = {name: layer.options[0].name for name, layer in table.items() if self._pin(name) and layer.options}
        free = {name: layer for name, layer in table.items() if name not in fixed}
        total = FLOAT_BYTES * sum(parameter.numel() for parameter in work.denoiser.parameters())
        saved = sum(table[name].bytes - table[name].options[0].bytes for name in fixed)

        def plan(chosen: Mapping[str, str]) -> dict[str, LayerQuant]:
            names = {**chosen, **fixed}
            return {name: candidates[name][names[name]] for name in table if name in names}

        limits = self.budget.losses()
        chosen = choose(
            free,
            self.budget.bytes and self.budget.bytes * total,
            self._loss(work, limits, plan) if limits else None,
            1.0,  # of whichever limit is nearest
            total - saved - sum(layer.bytes for layer in free.values()),
        )
        work.quantization.clear()
        work.quantization.update(plan(chosen))
        rows = [_row(name, layer, work.quantization.get(name)) for name, layer in table.items()]
        work.tables["sensitivity"] = rows
        return _summary(rows, 1 - sum(FLOAT_BYTES * row["parameters"] - row["bytes"] for row in rows) / total)

    def _pin(self, name: str) -> str | None:
        """What an override makes of a layer."""
        return next((to for pattern, to in reversed(self.override.items()) if fnmatch(name, pattern)), None)

    def _candidates(self, work: Work) -> dict[str, dict[str, LayerQuant]]:
        """In order of preference; a layer keeps what an earlier pass found for the same formats."""
        found: dict[str, dict[str, LayerQuant]] = {}
        wanted: dict[Format, dict[str, Any]] = {}
        for name, module in _modules(work).items():
            pin, old = self._pin(name), work.quantization.get(name)
            named: Sequence[Any] = self.candidates if pin is None else () if pin == FLOAT else (pin,)
            if pin is None and does_not_pay(module, self.min_parameters):
                named, old = (), None
            found[name] = {old.name: old} if old and (pin is None or any(_is(old, format) for format in named)) else {}
            for format in named:
                if old is None or not _is(old, format):
                    wanted.setdefault(format, {})[name] = module
        for format in [*self.candidates, *(format for format in wanted if format not in self.candidates)]:
            if format in wanted:
                made = quantize_layers(work, QuantizePass(format=format, keep_eight_bits=()), wanted[format])
                for name, quant in made.items():
                    found[name].setdefault(quant.name, quant)
        return found

    def _table(self, work: Work, candidates: Candidates) -> dict[str, Layer]:
        """Every layer with the options that pay, errors not yet known."""
        modules = _modules(work)
        traffic = observe_traffic(work, modules) if self.target is not None else {}
        table = {}
        for name, module in modules.items():
            pin, size = self._pin(name), module.weight.numel()
            why = "override" if pin == FLOAT else "" if pin else does_not_pay(module, self.min_parameters)
            options = [Option(key, _bytes(size, quant)) for key, quant in candidates[name].items()]
            float_ms = None
            if self.target is not None and name in traffic:
                float_ms = self.target.latency_ms(traffic[name], size * self.target.float_bytes)
                estimate = partial(self.target.latency_ms, traffic[name])
                options = [
                    dataclasses.replace(o, latency_ms=estimate(o.bytes, candidates[name][o.name])) for o in options
                ]
                gains = [float_ms / o.latency_ms if float_ms and o.latency_ms else math.inf for o in options]
                paying = [o for o, gain in zip(options, gains, strict=True) if pin or gain >= 1 + self.min_gain]
                if options and not paying:
                    why = f"estimated {max(gains):.2f} times as fast"
                options = paying
            kind = "linear" if module.weight.ndim == 2 else "conv {}x{}".format(*module.weight.shape[2:])
            table[name] = Layer(kind, tuple(module.weight.shape), float_ms, tuple(options), why)
        return table

    def _loss(
        self, work: Work, limits: Mapping[str, float], plan: Callable[[Mapping[str, str]], dict[str, LayerQuant]]
    ) -> Callable[[dict[str, str]], float]:
        """The loss of a choice in units of its limit, the worst where several have one; kept in `work.scratch`."""
        memory = Memory(work.scratch / "losses.json")
        context, run = probe(work, "latent", self.prompts, self.calls)
        prepared: dict[str, Callable[[], float]] = {}  # the float reference is made when it is first needed

        def measured(name: str, quantization: Mapping[str, LayerQuant]) -> float:
            # A scorer runs the whole pipeline, whose other parts stay where they are.
            with on_fastest_device(work) if name == "latent" else nullcontext():
                if name not in prepared:
                    prepared[name] = deviation(run) if name == "latent" else _scored(work, name)
                with simulated(work.denoiser, quantization, work.sampling.timesteps):
                    return prepared[name]()

        def loss(chosen: dict[str, str]) -> float:
            layers = plan(chosen)
            state = "".join(_key(context, name, quant) for name, quant in layers.items())
            stem = hashlib.sha256(state.encode()).hexdigest()[:24]
            return max(
                memory.recall(f"{name} {stem}", partial(measured, name, layers)) / limit
                for name, limit in limits.items()
            )

        return loss


def _scored(work: Work, metric: str) -> Callable[[], float]:
    """Loss of a score since now: accuracy in points, CLIP in percent of the score."""
    assert work.scorer is not None
    score = work.scorer
    before = score(metric)
    unit = 1.0 if metric == "accuracy" else 100 / abs(before)
    return lambda: (before - score(metric)) * unit


def _modules(work: Work) -> dict[str, Any]:
    """The layers to decide on: those that can be quantized, and those that an earlier pass did."""
    named = {name: work.denoiser.get_submodule(name) for name in work.quantization}
    return {**family.quantizable(work.denoiser), **named}


def _is(quant: LayerQuant, format: Format) -> bool:
    return FORMATS[format] == (quant.weight_format, quant.input_format)


def _bytes(parameters: int, quant: LayerQuant) -> int:
    """Of weight, float32 scales and multiplier, in the plan's own formats."""
    factors = quant.weight_scale.size + (0 if quant.multiplier is None else quant.multiplier.size)
    return math.ceil(parameters * get(quant.weight_format).bits / 8) + 4 * factors


def _with_errors(layer: Layer, errors: Mapping[str, float]) -> Layer:
    known = [dataclasses.replace(o, error=errors[o.name]) for o in layer.options if math.isfinite(errors[o.name])]
    lost = layer.options and not known
    return dataclasses.replace(layer, options=tuple(known), why="not finite when quantized" if lost else layer.why)


def _row(name: str, layer: Layer, quant: LayerQuant | None) -> dict[str, Any]:
    """Of the table that ships: what was chosen for a layer, and what else there was."""
    stays = Option(FLOAT, layer.bytes, 0.0, layer.float_ms)
    taken = stays if quant is None else next(option for option in layer.options if option.name == quant.name)
    return {
        "layer": name,
        "kind": layer.kind,
        "shape": list(layer.shape),
        "parameters": math.prod(layer.shape),
        "format": taken.name,
        "bytes": taken.bytes,
        "error": taken.error,
        "latency_ms": taken.latency_ms,
        "float_ms": layer.float_ms,
        "why": "" if quant else layer.why or ("budget" if layer.options else "no candidate"),
        "candidates": [dataclasses.asdict(option) for option in layer.options],
    }


def _summary(rows: Sequence[Mapping[str, Any]], share: float) -> str:
    formats = Counter(row["format"] for row in rows if row["format"] != FLOAT)
    reasons = Counter(_short(row["why"]) for row in rows if row["format"] == FLOAT)
    kept = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    made = ", ".join(f"{count} {name}" for name, count in formats.items())
    text = f"{formats.total()} of {len(rows)} layers quantized ({made or 'none'}), {share:.1%} of the FP16 bytes"
    return text + (f"; {reasons.total()} stay in float ({kept})" if kept else "")


def _short(why: str) -> str:
    known = {"budget": "by the budget", "override": "by override", "no candidate": "without a candidate"}
    return known.get(why, "not finite" if why.startswith("not finite") else "that do not pay")
