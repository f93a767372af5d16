"""`mixed-precision`: the format of every layer, from what each costs in error, bytes and time, under a budget.

Layers are measured alone (`sensitivity`), their time is estimated where a machine is described (`latency`), and the
budget is met with the least error (`budget`). Layers that do not pay stay in float.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffpress.calibration.processes import make_missing, on_fastest_device
from diffpress.compress.families import unet as family
from diffpress.compress.names import require_matches
from diffpress.compress.numerics.formats import get
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.quantize.budget import FLOAT_BYTES, Budget, Layer, Option, choose
from diffpress.compress.quantize.latency import FLOAT, Target, Traffic, does_not_pay, observe_traffic
from diffpress.compress.quantize.post_training import FORMATS, Format, QuantizePass, quantize_layers
from diffpress.compress.quantize.sensitivity import Candidates, Error, Numbers, deviation, digest, measure, probe
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import LayerQuant

Quantization = Mapping[str, LayerQuant]


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
        require_matches("mixed-precision: override", self.override, modules)
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
        lost = _losses(work, self.budget.losses(), self.prompts)

        def plan(chosen: Mapping[str, str]) -> dict[str, LayerQuant]:
            names = {**chosen, **fixed}
            return {name: candidates[name][names[name]] for name in table if name in names}

        chosen = choose(
            free,
            self.budget.bytes and self.budget.bytes * total,
            (lambda chosen: lost(plan(chosen))) if lost else None,
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
                made = quantize_layers(
                    work, QuantizePass(format=format, keep_eight_bits=(), float_inputs=()), wanted[format]
                )
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
            kind = "linear" if module.weight.ndim == 2 else "conv {}x{}".format(*module.weight.shape[2:])
            why = "override" if pin == FLOAT else "" if pin else does_not_pay(module, self.min_parameters)
            options = tuple(Option(key, _bytes(size, quant)) for key, quant in candidates[name].items())
            layer = Layer(kind, tuple(module.weight.shape), None, options, why)
            if self.target is not None and name in traffic:
                layer = self._timed(layer, self.target, traffic[name], candidates[name], pin is not None)
            table[name] = layer
        return table

    def _timed(self, layer: Layer, target: Target, call: Traffic, quants: Quantization, pinned: bool) -> Layer:
        """With estimated latencies; options that gain too little are left out, unless an override asks for them."""
        float_ms = target.latency_ms(call, math.prod(layer.shape) * target.float_bytes)
        options = [
            dataclasses.replace(option, latency_ms=target.latency_ms(call, option.bytes, quants[option.name]))
            for option in layer.options
        ]
        gains = [float_ms / o.latency_ms if float_ms and o.latency_ms else math.inf for o in options]
        paying = [o for o, gain in zip(options, gains, strict=True) if pinned or gain >= 1 + self.min_gain]
        why = f"estimated {max(gains):.2f} times as fast" if options and not paying else layer.why
        return dataclasses.replace(layer, float_ms=float_ms, options=tuple(paying), why=why)


def _losses(work: Work, limits: Mapping[str, float], prompts: int) -> Callable[[Quantization], float] | None:
    """The loss of a choice in units of its limit, the worst where several have one; None without limits.

    Measured by one process and kept in `work.scratch`, where all read it. Losses are those since now.
    """
    if not limits:
        return None
    known = Numbers(work.scratch / "losses")
    context, run = probe(work, "latent", prompts, 1)

    @cache
    def reference() -> Callable[[], float]:
        return deviation(run)

    def measured(name: str, quantization: Quantization) -> float:
        """Error of the final latent, or a score."""
        key = f"{name}-{digest(context, quantization)}"

        def make(_: str) -> None:
            compute = reference() if name == "latent" else lambda: _score(work, name)
            with simulated(work.denoiser, quantization, work.sampling.timesteps):
                known[key] = compute()

        with on_fastest_device(work.pipeline):
            make_missing([key], lambda key: key not in known, make, work.progress, f"measuring {name}")
        return known[key]

    def loss(name: str, quantization: Quantization) -> float:
        now = measured(name, quantization)
        if name == "latent":
            return now
        before = measured(name, {})
        # Accuracy in points, CLIP in percent of the score.
        return (before - now) * (1.0 if name == "accuracy" else 100 / abs(before))

    return lambda quantization: max(loss(name, quantization) / limit for name, limit in limits.items())


def _score(work: Work, metric: str) -> float:
    assert work.scorer is not None
    return work.scorer(metric)


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
