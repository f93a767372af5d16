"""Operators of torch that the exporter knows only in parts, as ONNX: with them a traced network is translated as it is.

Otherwise torch traces it once more to take them apart, which takes as long as everything else together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset20 as op
from torch.export import ExportedProgram

_aten = torch.ops.aten


def _same(x: Any, *_: Any, **__: Any) -> Any:
    return op.Identity(x)


def _cast(x: Any, dtype: int, *_: Any, **__: Any) -> Any:
    return op.Cast(x, to=dtype)


def _cast_on(x: Any, device: Any, dtype: int, *_: Any, **__: Any) -> Any:
    return op.Cast(x, to=dtype)


def _shaped(x: Any, shape: list[int]) -> Any:
    """With a 0 for a dimension that stays as it is."""
    sizes: Any = op.Constant(value_ints=shape)
    return op.Reshape(x, sizes)


def _unflatten(x: Any, dim: int, sizes: Sequence[int]) -> Any:
    if dim not in (-1, len(x.shape) - 1):
        raise NotImplementedError("unflatten of a dimension that is not the last")
    return _shaped(x, [0] * (len(x.shape) - 1) + [int(size) for size in sizes])


def _flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    if end_dim not in (-1, len(x.shape) - 1):
        raise NotImplementedError("flatten of dimensions that are not the last")
    return _shaped(x, [0] * (start_dim % len(x.shape)) + [-1])


def _chunk(x: Any, chunks: int, dim: int = 0) -> Any:
    return op.Split(x, axis=dim, num_outputs=chunks)


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    _aten.dropout.default: _same,  # networks are exported as they run
    _aten.contiguous.default: _same,
    _aten.to.dtype: _cast,
    _aten.to.device: _cast_on,
    _aten.unflatten.int: _unflatten,
    _aten.flatten.using_ints: _flatten,
    _aten.chunk.default: _chunk,
}


def as_it_is(program: ExportedProgram) -> ExportedProgram:
    """The program, which the exporter then does not take apart."""
    object.__setattr__(program, "run_decompositions", lambda *_: program)
    return program
