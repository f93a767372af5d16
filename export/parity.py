"""Compares an exported graph with the torch module it came from."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffpress.bundle import DIALECT
from diffpress.errors import DiffpressError, require

FLOAT_TOLERANCE = 1e-4  # relative L2 error of any output
MAP = 512 * 512  # positions of an output up to which that holds: norms sum over maps, and sums round
NOISE = 1e-5  # relative, about what two float libraries differ by after a few layers
DRAWS = 4  # of the noise: which values fall over the edge is chance
AMPLIFIED = 5  # times the largest answer of a network to such noise


@dataclass(frozen=True)
class Expected:
    """What a graph has to give for example inputs: its outputs by name, each to a relative error of `tolerance`."""

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    tolerance: float


def expected(module: nn.Module, inputs: Mapping[str, Tensor], names: Sequence[str], draws: int = DRAWS) -> Expected:
    """What `module` gives, whose outputs are called `names`, and how near a faithful graph of it comes.

    A few times what noise in the last bits of its inputs does, which is drawn `draws` times: a float network answers
    with noise of the same size. One that rounds to integers does not: a value on the edge between two falls the other
    way, and the layers behind amplify it. Timesteps stay as they are, as does what counts pixels; a decoder looks at
    nothing but features and text.
    """
    values = list(inputs.values())
    exact = _tuple(module(*values))
    generator = torch.Generator().manual_seed(0)

    def noisy(value: Tensor) -> Tensor:
        if value.ndim <= 1 or bool((value == value.round()).all()):
            return value
        return value * (1 + NOISE * torch.randn(value.shape, generator=generator))

    errors = [0.0]
    for _ in range(draws if values[0].is_floating_point() else 0):
        moved = _tuple(module(*map(noisy, values)))
        errors += [float((b - a).norm() / a.norm().clamp_min(1e-12)) for a, b in zip(exact, moved, strict=True)]
    return Expected(
        {name: value.numpy() for name, value in inputs.items()},
        {name: tensor.numpy() for name, tensor in zip(names, exact, strict=True)},
        max(FLOAT_TOLERANCE * _rounding(exact), AMPLIFIED * max(errors)),
    )


def _rounding(outputs: Sequence[Tensor]) -> float:
    """By how much more the sums over a large map [..., H, W] round: as the root of how many numbers they add."""
    largest = max((math.prod(output.shape[2:]) for output in outputs if output.ndim == 4), default=0)
    return max(1.0, math.sqrt(largest / MAP))


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def compare(file: Path, wanted: Expected) -> dict[str, Any]:
    """Run `file` in ONNX Runtime, for which no torch module need be in memory any more.

    Returns the manifest's entry; raises `DiffpressError` beyond the tolerance.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    ort = require("onnxruntime", "cpu", "check exported graphs")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # The graph is what is checked, not how this library fuses it (which fails on FP8).
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Its uint8 by int8 products saturate on processors without VNNI; this makes them exact, and slower, on all.
    options.add_session_config_entry("session.x64quantprecision", "1")
    # Weights stay as they are stored, in the file's pages: unpacked and rearranged, INT8 ones would take five times
    # the memory, for one call. ONNX Runtime's own dialect has its weights transposed beforehand, in INT8.
    options.add_session_config_entry("session.disable_prepacking", "1")
    kept = [] if file.name.endswith(DIALECT) else ["ConstantFolding"]
    session = ort.InferenceSession(str(file), options, ["CPUExecutionProvider"], disabled_optimizers=kept)
    outputs: Sequence[np.ndarray] = session.run(list(wanted.outputs), dict(wanted.inputs))
    worst = 0.0
    for got, (name, want) in zip(outputs, wanted.outputs.items(), strict=True):
        error = float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-12))
        if not error <= wanted.tolerance:  # a NaN fails too
            raise DiffpressError(
                f"{file.name}: output '{name}' differs from torch by {error:.2e} relative, more than "
                f"{wanted.tolerance:.0e}; this export is not to be trusted, please report the model"
            )
        worst = max(worst, error)
    return {"max_rel_l2": worst, "tolerance": wanted.tolerance}


def check(file: Path, module: nn.Module, inputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
    """`compare` with what `module` gives now; noise is drawn only where the graph is not as near as any must be."""
    try:
        return compare(file, expected(module, inputs, names, draws=0))
    except DiffpressError:
        return compare(file, expected(module, inputs, names))
