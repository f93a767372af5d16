"""`quantize`: post-training quantization of weights and layer inputs, symmetric, in any number format.

Ranges come from recorded calls. Attention products, softmax and normalisation stay in float: no target gains from them
(TensorRT fuses attention whole). First and last convolution and the time modules are left out, as peers do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from diffpress.calibration.sets import require_steps
from diffpress.calibration.statistics import (
    AbsHistogram,
    observe_channels,
    observe_inputs,
    row_of,
    sample_inputs,
    unreached,
)  # fmt: skip
from diffpress.compress.families import unet as family
from diffpress.compress.names import phrases, require_matches
from diffpress.compress.numerics.formats import get
from diffpress.compress.numerics.ranges import (
    block_of,
    grouped,
    input_scale,
    per_step,
    search_float_input,
    search_float_weight,
    weight_scale,
)  # fmt: skip
from diffpress.compress.quantize import scaling
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import LayerQuant

Layer = nn.Conv2d | nn.Linear
Format = Literal[
    "int8", "fp8", "fp4", "int4", "w4a8-simulated", "w4a4-simulated", "float8-simulated", "float4-simulated"
]  # fmt: skip
SEARCHED = {"float8": 8, "float4": 4}  # bits; exponent and mantissa are searched
# Of weights and of inputs; no format for inputs that stay in float.
FORMATS: dict[str, tuple[str, str | None]] = {
    "int8": ("int8", "int8"),
    "fp8": ("e4m3", "e4m3"),
    "fp4": ("e2m1", "e4m3"),
    "int4": ("int4", None),
    "w4a8-simulated": ("int4", "int8"),
    "w4a4-simulated": ("int4", "int4"),
    "float8-simulated": ("float8", "float8"),
    "float4-simulated": ("float4", "float8"),
}
WIDER = {"int4": "int8", "e2m1": "e4m3", "float4": "float8"}  # for the layers of `keep_eight_bits`
FOUR_BIT_EXCEPTIONS = ("*conv_shortcut", "*downsamplers*", "*upsamplers*")
# Two joined ranges, and what they make goes on to the output: on `shapes` one of them makes most of INT8's error. They
# are a hundredth of the work; nvidia-modelopt's own diffusion examples keep them in float, too.
SHORTCUTS = ("*conv_shortcut",)
SMALLEST_BLOCK = 16  # below it the scales would take more room than the numbers; an odd layer has one per channel
SAMPLES = 512  # rows or crops of a layer's input that a search for its multiplier looks at


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class QuantizePass:
    """Number formats for weights and layer inputs, and how their ranges are found.

    `scaling` moves range between inputs and weights (`smooth` for quantized inputs, `awq` for weights alone); `split`
    does so between the halves of the joined inputs of shortcuts. `scales` is how many input scales a layer has over the
    steps: one, two to four groups of steps, or one for each. `exclude` keeps layers in float, `float_inputs` only their
    inputs, by shell patterns over their paths.
    """

    format: Format = "int8"
    range: Literal["max", "percentile", "mse", "l2.4", "entropy"] = "l2.4"
    weight_range: Literal["max", "mse", "l2.4"] = "l2.4"
    block: Annotated[
        int, Field(ge=16, description="input channels that share a scale where weights alone are int4")
    ] = 64
    scaling: Literal["none", "smooth", "awq"] = "none"
    alpha: Annotated[float | None, Field(ge=0, le=1, description="of smooth or awq; searched per layer if absent")] = (
        None
    )
    split: bool = False
    scales: Literal[1, 2, 3, 4, "step"] = 1
    exclude: Annotated[tuple[str, ...], Field(description="shell patterns of layers that stay in float")] = ()
    keep_eight_bits: Annotated[
        tuple[str, ...], Field(description="shell patterns of layers that get 8 bits where others get 4")
    ] = FOUR_BIT_EXCEPTIONS
    float_inputs: Annotated[
        tuple[str, ...] | None,
        Field(description="shell patterns of layers whose weights alone get INT8; shortcuts, unless they are split"),
    ] = None

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` when a pattern matches nothing or options contradict each other."""
        names = family.quantizable(work.denoiser)
        require_matches("quantize: exclude", self.exclude, names)
        if self.keep_eight_bits != FOUR_BIT_EXCEPTIONS:
            require_matches("quantize: keep_eight_bits", self.keep_eight_bits, names)
        require_matches("quantize: float_inputs", self.float_inputs or (), names)
        if not self._layers(work):
            raise DiffpressError("quantize: the exclude patterns leave no layer to quantize")
        weights_only = FORMATS[self.format][1] is None
        if weights_only and (self.scaling == "smooth" or self.scales != 1):
            raise DiffpressError(
                f"quantize: format {self.format} leaves inputs in float; scaling: awq is what it knows"
            )
        if not weights_only and self.scaling == "awq":
            raise DiffpressError(f"quantize: format {self.format} rounds inputs too; use scaling: smooth")
        if self.alpha is not None and self.scaling == "none":
            raise DiffpressError("quantize: alpha needs scaling: smooth or awq")

    def apply(self, work: Work) -> str:
        """Find scales from recorded calls and put them into the plan; says how many layers."""
        layers = self._layers(work)
        multipliers = self._multipliers(work, layers)
        left: dict[str, str] = {}
        decided = quantize_layers(work, self, layers, multipliers, left)
        if not decided:
            raise DiffpressError(
                f"quantize: no layer can be quantized, all are left in float: {'; '.join(phrases(left))}"
            )
        work.quantization.update(decided)
        layers = {name: module for name, module in layers.items() if name in decided}
        total = sum(parameter.numel() for parameter in work.denoiser.parameters())
        covered = sum(module.weight.numel() for module in layers.values())
        notes = [f"{len(layers)} layers to {self.format} with {covered / total:.0%} of the parameters"]
        notes += [f"ranges by {self.range}"] if FORMATS[self.format][1] else []
        notes += [f"{len(multipliers)} inputs scaled"] if self.scaling != "none" or self.split else []
        notes += [f"scales: {self.scales}"] if self.scales != 1 else []
        left |= dict.fromkeys(family.unhandled(work.denoiser), "no quantization for this kind of layer")
        notes += [f"left in float: {'; '.join(phrases(left))}"] if left else []
        return ", ".join(notes)

    def formats_of(self, name: str) -> tuple[str, str | None]:
        """Of the weight and the input of the layer `name`."""
        weight, inputs = FORMATS[self.format]
        if any(fnmatch(name, pattern) for pattern in self.keep_eight_bits):
            weight = WIDER.get(weight, weight)
            inputs = WIDER.get(inputs, inputs) if inputs else None
        floating = (() if self.split else SHORTCUTS) if self.float_inputs is None else self.float_inputs
        if any(fnmatch(name, pattern) for pattern in floating):
            weight, inputs = "int8", None  # the best of the 8-bit types where nothing has to match the input's
        return weight, inputs

    def block_for(self, module: Layer, weight_format: str) -> int | None:
        """Input channels that share a weight scale; None for a scale per output channel."""
        if FORMATS[self.format][1] is not None or weight_format != "int4":
            return None
        block = block_of(module.weight.shape[1], self.block)
        return block if block >= SMALLEST_BLOCK else None

    def _layers(self, work: Work) -> dict[str, Layer]:
        return {
            name: module
            for name, module in family.quantizable(work.denoiser).items()
            if not any(fnmatch(name, pattern) for pattern in self.exclude)
        }

    def _multipliers(self, work: Work, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
        joined = family.concatenations(work.denoiser) if self.split else {}
        wanted = {
            name: module
            for name, module in layers.items()
            if (self.scaling != "none" or name in joined) and getattr(module, "groups", 1) == 1
        }
        if not wanted:
            return {}
        channels = observe_channels(work.run, wanted, work.record(), work.progress)
        samples = sample_inputs(work.run, wanted, work.record(), work.progress, SAMPLES, work.seed)
        alphas = scaling.ALPHAS if self.alpha is None else (self.alpha,)
        found = {}
        for name, module in work.progress(wanted.items(), "balancing channels"):
            candidates = []
            if self.scaling == "smooth":
                candidates += list(scaling.smooth_candidates(channels[name].largest, module.weight, alphas))
            elif self.scaling == "awq":
                candidates += list(scaling.awq_candidates(channels[name].mean, alphas))
            if name in joined:
                candidates += list(scaling.split_candidates(channels[name].largest, joined[name]))
            weight, inputs = self.formats_of(name)
            best, _ = scaling.best_multiplier(
                module,
                samples[name],
                candidates,
                typical(weight),
                inputs and typical(inputs),
                self.block_for(module, weight),
            )
            if best is not None:
                found[name] = best
        return found


def typical(name: str) -> str:
    """A format to judge by where the real one is still to be searched."""
    return {"float8": "e4m3", "float4": "e2m1"}.get(name, name)


def quantize_layers(
    work: Work,
    options: QuantizePass,
    layers: Mapping[str, Layer],
    multipliers: Mapping[str, Tensor] | None = None,
    left: dict[str, str] | None = None,
) -> dict[str, LayerQuant]:
    """The quantization of each layer by `options`; `work` does not change.

    A layer stays out whose input no recorded call shows, or shows as one number: that has no range. `left` takes such
    layers and the reason. `multipliers` are [in] by layer.
    Raises `DiffpressError` naming the layer whose weight or input cannot be quantized.
    """
    multipliers = multipliers or {}
    schedule = work.sampling.timesteps
    membership = grouped(schedule, len(schedule) if options.scales == "step" else int(options.scales))
    seen: Mapping[str, list[AbsHistogram]] = {}
    if FORMATS[options.format][1] is not None:
        require_steps(work.record().rows(), membership, f"quantize with scales: {options.scales}")
        row = row_of(schedule)
        seen = observe_inputs(
            work.run,
            layers,
            work.record(),
            work.progress,
            group_of=lambda call: membership[row(call)],
            groups=membership[-1] + 1,
            multipliers=multipliers,
        )
        useless = _useless(seen)
        if left is not None:
            left |= useless
        layers = {name: module for name, module in layers.items() if name not in useless}
    result = {}
    for name, module in work.progress(layers.items(), "searching ranges"):
        try:
            _require_seen(seen.get(name, ()), work, membership)
            result[name] = _quantize_layer(name, module, options, seen.get(name), membership, multipliers.get(name))
        except DiffpressError as error:
            raise DiffpressError(f"layer {name} cannot be quantized: {error}") from error
    return result


def _require_seen(seen: Sequence[AbsHistogram], work: Work, membership: Sequence[int]) -> None:
    """Raises `DiffpressError` where a group of steps runs a layer, but no call of it was recorded.

    Cached steps may not run it: then there is nothing to see.
    """
    full = {membership[index] for index, name in enumerate(work.program.steps) if not work.program.variants[name].reads}
    if any(not seen[group].total for group in full if group < len(seen)):
        raise DiffpressError("some steps were never observed: record more (calibration: steps) or use fewer scales")


def _useless(seen: Mapping[str, list[AbsHistogram]]) -> dict[str, str]:
    """Layers whose recorded inputs give no range, and why."""
    why = dict.fromkeys(unreached(seen), "no recorded call runs them")
    for name, groups in seen.items():
        whole = AbsHistogram()
        for group in groups:
            whole.merge(group)
        if whole.constant:
            why[name] = f"their input is {whole.highest:g} always"
    return why


def _quantize_layer(
    name: str,
    module: Layer,
    options: QuantizePass,
    seen: list[AbsHistogram] | None,
    membership: list[int],
    multiplier: Tensor | None,
) -> LayerQuant:
    weight_format, input_format = options.formats_of(name)
    weight = module.weight.detach()
    if multiplier is not None:
        weight = weight / multiplier.reshape(1, -1, *[1] * (weight.ndim - 2))
    if weight_format in SEARCHED:
        weight_format, scale = search_float_weight(weight, SEARCHED[weight_format])
    else:
        block = options.block_for(module, weight_format)
        scale = weight_scale(weight, get(weight_format), options.weight_range, block)
    factors = None if multiplier is None else multiplier.numpy().astype(np.float32)
    if input_format is None or seen is None:
        return LayerQuant(scale.numpy(), None, weight_format, None, factors)
    whole = AbsHistogram()
    for group in seen:
        whole.merge(group)
    if input_format in SEARCHED:
        input_format, _ = search_float_input(whole.counts, whole.centres(), whole.amax, SEARCHED[input_format])
    format = get(input_format)
    shown = {
        index: input_scale(group.counts, group.centres(), group.amax, format, options.range)
        for index, group in enumerate(seen)
        if group.total
    }
    # Groups of steps that take the layer's work from others never look at theirs.
    nearest = [min((abs(other - index), other) for other in shown)[1] for index in range(len(seen))]
    scales = [shown[index] for index in nearest]
    scales = scales if len(scales) == 1 else per_step(scales, membership)
    return LayerQuant(scale.numpy(), np.array(scales, np.float32), weight_format, input_format, factors)
