"""The nearest arithmetic that targets have to what a plan decided.

A target multiplies int8 by int8, E4M3 by E4M3, or decodes 4-bit weights and multiplies in float. What has no such
partner is shipped in the nearest one that has, and the bundle says so.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from diffpress.compress.numerics.formats import fake_quant, get, to_grid
from diffpress.plan import LayerQuant

WEIGHTS = ("int8", "int4", "e4m3", "e2m1")  # storage that graphs know
INPUTS = ("int8", "e4m3")


def deployable(layer: LayerQuant) -> LayerQuant:
    """`layer` as it ships: the same where it deploys, else formats whose grid holds its numbers or lies nearest."""
    weight, weight_scale = _nearest(layer.weight_format, layer.weight_scale, WEIGHTS)
    if layer.input_format is None or layer.input_scale is None:
        return replace(layer, weight_format=weight, weight_scale=weight_scale)
    inputs, input_scale = _nearest(layer.input_format, layer.input_scale, INPUTS)
    if weight not in INPUTS or get(inputs).is_float != get(weight).is_float:
        # Both sides of a product need one arithmetic. INT8 holds every number of INT4, E4M3 those of INT4 and E2M1.
        weight = "e4m3" if get(inputs).is_float else "int8"
    return replace(layer, weight_format=weight, weight_scale=weight_scale, input_format=inputs, input_scale=input_scale)


def exact(layer: LayerQuant) -> bool:
    """Whether the shipped graph computes with the very numbers of the plan."""
    shipped = deployable(layer)
    # A wider format for inputs would not clip where the plan does; weights have been clipped already.
    if layer.input_format != shipped.input_format:
        return False
    inner, outer = get(layer.weight_format), get(shipped.weight_format)
    codes = to_grid(torch.linspace(inner.smallest, inner.largest, 4097), inner).unique()
    ratio = float((shipped.weight_scale / layer.weight_scale).flat[0])
    return bool(torch.allclose(fake_quant(codes, ratio, outer), codes))


def _nearest(name: str, scale: np.ndarray, known: tuple[str, ...]) -> tuple[str, np.ndarray]:
    """A known format for `name`, and the scale that keeps the range where the grid is another."""
    if name in known:
        return name, scale
    format = get(name)
    if name == "e1m2" and "int4" in known:  # its numbers are halves from -3.5 to 3.5
        return "int4", scale / 2
    target = get("e4m3" if format.is_float else "int8")
    if known is WEIGHTS and not format.is_float:
        return target.name, scale  # more bits at the same scale: the same numbers
    return target.name, (scale * (format.largest / target.largest)).astype(np.float32)
