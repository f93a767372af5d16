"""The nearest arithmetic that targets have to what a plan decided.

A target multiplies int8 by int8, E4M3 by E4M3, or decodes int4 or 8-bit weights and multiplies in float. What has no
such partner is shipped in the nearest one that has, and the bundle says so. FP4 is among these: TensorRT has it on
Blackwell alone and only with scales that are E4M3 themselves, ONNX Runtime not at all, and its numbers are all in E4M3
and, doubled, in int8.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from diffpress.compress.numerics.formats import Format, fake_quant, get, to_grid
from diffpress.compress.numerics.simulate import replaced, round_in_place, rounded_weights
from diffpress.plan import LayerQuant

WEIGHTS = ("int4", "int8", "e4m3")  # storage that graphs know, the narrower first
INPUTS = ("int8", "e4m3")


def deployable(layer: LayerQuant) -> LayerQuant:
    """`layer` as it ships: the same where it deploys, else formats whose grid holds its numbers or lies nearest."""
    inputs, input_scale = None, None
    known: tuple[str, ...] = WEIGHTS
    if layer.input_format is not None and layer.input_scale is not None:
        inputs, input_scale = _nearest(layer.input_format, layer.input_scale)
        known = (inputs,)  # both sides of a product need one arithmetic
    weight, weight_scale = layer.weight_format, layer.weight_scale
    if weight_scale.ndim == 2 and inputs is not None:
        # Products of integers or E4M3 have a scale per output channel: the widest of its blocks, on the finer grid.
        ends = weight_scale.max(axis=1) * -get(weight).smallest  # which integers have one farther than `largest`
        weight, weight_scale = inputs, (ends / get(inputs).largest).astype(np.float32)
    elif weight not in known:
        weight, weight_scale = _holding(weight, weight_scale, known) or _nearest(weight, weight_scale, known)
    return replace(layer, weight_format=weight, weight_scale=weight_scale, input_format=inputs, input_scale=input_scale)


def exact(layer: LayerQuant) -> bool:
    """Whether the shipped graph computes with the very numbers of the plan."""
    shipped = deployable(layer)
    # A wider format for inputs would not clip where the plan does; weights are clipped before (`settled`).
    if layer.input_format != shipped.input_format or layer.weight_scale.shape != shipped.weight_scale.shape:
        return False
    inner, outer = get(layer.weight_format), get(shipped.weight_format)
    codes = _numbers(inner)
    ratio = float((shipped.weight_scale / layer.weight_scale).flat[0])
    return bool(torch.allclose(fake_quant(codes, ratio, outer), codes, atol=0.0))


def types(weight: str, inputs: str | None) -> set[str]:
    """What hardware must have for layers of these formats, as `export.engines` calls it: "int8", "fp8", "int4"."""
    one = np.ones(1, np.float32)
    shipped = deployable(LayerQuant(one, None if inputs is None else one, weight, inputs))
    return {{"e4m3": "fp8"}.get(name, name) for name in (shipped.weight_format, shipped.input_format) if name}


def settled(
    denoiser: nn.Module, quantization: Mapping[str, LayerQuant], keep: bool = True
) -> AbstractContextManager[None]:
    """Within the block weights that ship in another format than decided are rounded to the grid that was decided.

    The finer grid that they ship in would hold other numbers of a float weight than the plan's. Without `keep` the
    float weights are given up.
    """
    moved = {
        name: layer for name, layer in quantization.items() if deployable(layer).weight_format != layer.weight_format
    }
    if keep:
        return replaced(denoiser, rounded_weights(denoiser, moved))
    round_in_place(denoiser, moved)
    return nullcontext()


def _holding(name: str, scale: np.ndarray, known: tuple[str, ...]) -> tuple[str, np.ndarray] | None:
    """The first of `known` that has every number of the format `name`, and the scale at which it has them."""
    format = get(name)
    for target in map(get, known):
        # Integers count in steps of the format's smallest number; the small floats are all in E4M3 as they are.
        step = 1.0 if target.is_float else _step(format)
        codes = _numbers(format)
        if torch.equal(fake_quant(codes, step, target), codes):
            return target.name, (scale * step).astype(np.float32)
    return None


def _numbers(format: Format) -> torch.Tensor:
    """Every number of a grid at unit scale, in order."""
    small = format.largest * torch.exp2(-torch.linspace(0, 40, 4097))  # of floats, whose small numbers lie close
    even = torch.linspace(format.smallest, format.largest, 4097)
    return to_grid(torch.cat([even, small, -small]), format).unique()


def _step(format: Format) -> float:
    """The smallest number above zero on the grid."""
    return 2.0 ** (1 - format.mantissa - (2 ** (format.exponent - 1) - 1)) if format.is_float else 1.0


def _nearest(name: str, scale: np.ndarray, known: tuple[str, ...] = INPUTS) -> tuple[str, np.ndarray]:
    """A format of 8 bits, the same kind if `known` has it, and the scale that keeps the range."""
    if name in known:
        return name, scale
    format = get(name)
    preferred = "e4m3" if format.is_float else "int8"
    target = get(preferred if preferred in known else known[-1])
    return target.name, (scale * (format.largest / target.largest)).astype(np.float32)
