"""Compares an exported graph with the torch module it came from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffpress.errors import DiffpressError, require

FLOAT_TOLERANCE = 1e-4  # relative L2 error of any output
NOISE = 1e-5  # relative, about what two float libraries differ by after a few layers
DRAWS = 4  # of the noise: which values fall over the edge is chance
AMPLIFIED = 5  # times the largest answer of a network to such noise


def tolerance(module: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """What a faithful graph of `module` may differ by: a few times what noise in the last bits of its inputs does.

    A float network answers with noise of the same size. One that rounds to integers does not: a value on the edge
    between two falls the other way, and the layers behind amplify it. Timesteps stay as they are; a decoder looks at
    nothing but features and text.
    """
    values = list(inputs.values())
    if not values[0].is_floating_point():
        return FLOAT_TOLERANCE
    generator = torch.Generator().manual_seed(0)

    def noisy(value: Tensor) -> Tensor:
        return value * (1 + NOISE * torch.randn(value.shape, generator=generator)) if value.ndim > 1 else value

    exact = _tuple(module(*values))
    errors = []
    for _ in range(DRAWS):
        moved = _tuple(module(*map(noisy, values)))
        errors += [float((b - a).norm() / a.norm().clamp_min(1e-12)) for a, b in zip(exact, moved, strict=True)]
    return max(FLOAT_TOLERANCE, AMPLIFIED * max(errors))


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check(file: Path, module: nn.Module, inputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
    """Run `file` in ONNX Runtime against `module`, whose outputs are called `names`.

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
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    outputs: Sequence[np.ndarray] = session.run(list(names), {name: value.numpy() for name, value in inputs.items()})
    limit, worst = tolerance(module, inputs), 0.0
    for got, name, tensor in zip(outputs, names, _tuple(module(*inputs.values())), strict=True):
        want = tensor.numpy()
        error = float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-12))
        if not error <= limit:  # a NaN fails too
            raise DiffpressError(
                f"{file.name}: output '{name}' differs from torch by {error:.2e} relative, more than {limit:.0e}; "
                "this export is not to be trusted, please report the model"
            )
        worst = max(worst, error)
    return {"max_rel_l2": worst, "tolerance": limit}
