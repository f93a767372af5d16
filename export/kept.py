"""Exported networks that are kept in a folder, for who exports the same ones again and again: a search, the tests.

Tracing a network takes several times as long as all that is done with its graph afterwards, and most trials of a search
differ in what happens before and after it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn

from diffpress import paths
from diffpress.export import graphs
from diffpress.export.graphs import GraphSpec

LARGEST = 16e6  # parameters: of larger networks weights are what takes the time, and the disk


def once(
    spec: GraphSpec, folder: Path, export: Callable[[GraphSpec], ir.Model] = graphs.to_onnx, largest: float = LARGEST
) -> ir.Model:
    """The graph of `spec`: read from `folder`, or exported and written there; exported alone where it has no key."""
    small = sum(tensor.numel() for tensor in spec.module.state_dict().values()) <= largest
    key = key_of(spec) if small else None
    if key is None:
        return export(spec)
    file = folder / f"{key}.onnx"
    if not file.exists():
        paths.write(file, ir.to_proto(export(spec)).SerializeToString())
    return ir.from_proto(onnx.ModelProto.FromString(file.read_bytes()))


def key_of(spec: GraphSpec) -> str | None:
    """Names all that an export depends on; None for a network that something was hung into, or that says too much."""
    inputs = [(name, value.shape, str(value.dtype)) for name, value in spec.inputs.items()]
    told: list[Any] = [inputs, spec.outputs, spec.fixed, spec.module.state_dict()]
    for name, module in spec.module.named_modules():
        hooks = module._forward_hooks, module._forward_pre_hooks
        if any(hooks) or any(inspect.isroutine(value) for value in vars(module).values()):
            return None
        config = getattr(module, "config", {})
        said = {**vars(module), **(config.to_dict() if hasattr(config, "to_dict") else config)}
        # Buffers that are not saved are in no state.
        loose = {key: module._buffers[key] for key in sorted(module._non_persistent_buffers_set)}
        told.append((name, type(module), {key: said[key] for key in said if not key.startswith("_")}, loose))
    try:
        return hashlib.sha256(json.dumps(told, default=_plain).encode()).hexdigest()
    except (TypeError, ValueError):
        return None


def _plain(value: Any) -> Any:
    """As JSON holds it: numbers by their bytes, an object by its type and what it holds. Raises `TypeError` else."""
    if isinstance(value, torch.Tensor):
        own = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()  # numpy has no bfloat16
        return [list(value.shape), str(value.dtype), hashlib.sha256(own.tobytes()).hexdigest()]
    if isinstance(value, np.ndarray):
        return [list(value.shape), str(value.dtype), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, type | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, nn.Module):
        return str(type(value))  # it is another module's, and told there
    return [str(type(value)), vars(value)]
