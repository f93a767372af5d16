"""The denoiser layer by layer, as a table: what was decided, what ships, how many bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from diffpress.compress.numerics.formats import get
from diffpress.export.deploy import deployable, exact
from diffpress.plan import LayerQuant

MEASURED = ("error", "latency_ms", "float_ms", "why", "candidates")


def rows(
    denoiser: nn.Module, quantization: Mapping[str, LayerQuant], sensitivity: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """A row per Conv2d and Linear: path, kind, weight shape, parameters, formats decided and shipped, weight bytes.

    `exact` says whether the shipped arithmetic has the very numbers that were decided; where not, they were simulated.
    From the rows of `sensitivity` come, by layer: the relative error it causes alone, latencies estimated as it is and
    in float, why it stays in float, and the candidates there were.
    """
    measured = {row["layer"]: {key: row[key] for key in MEASURED} for row in sensitivity}
    untouched = {**dict.fromkeys(MEASURED), "why": "first, last and time layers stay as they are"} if measured else {}
    found = []
    for name, module in denoiser.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        layer = quantization.get(name)
        count = module.weight.numel()
        row: dict[str, Any] = {
            "layer": name,
            "kind": type(module).__name__,
            "shape": list(module.weight.shape),
            "parameters": count,
            "format": "float32",
            "ships_as": "float32",
            "exact": True,
            "bytes": 4 * count,
            "input_scales": None,
            "balanced": None,
        }
        if layer is not None:
            shipped = deployable(layer)
            row |= {
                "format": layer.name,
                "ships_as": shipped.name,
                "exact": exact(layer),
                "bytes": math.ceil(count * get(shipped.weight_format).bits / 8) + 4 * shipped.weight_scale.size,
                "input_scales": 0 if layer.input_scale is None else len(layer.input_scale),
                "balanced": layer.multiplier is not None,
            }
        found.append(row | measured.get(name, untouched))
    return found
