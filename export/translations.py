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


def _unflatten(x: Any, dim: int, sizes: Sequence[Any]) -> Any:
    dim %= len(x.shape)
    return _shaped(x, dim, [size if isinstance(size, int) else -1 for size in sizes], dim + 1)


def _flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    return _shaped(x, start_dim % len(x.shape), [-1], end_dim % len(x.shape) + 1)


def _shaped(x: Any, start: int, sizes: list[int], end: int) -> Any:
    """`x` with `sizes` in place of its dimensions from `start` to `end`; -1 is what is left for it."""
    shape = [0] * start + sizes + list(x.shape[end:])  # 0 stands for a dimension that stays where it is
    if shape.count(-1) > 1 or not all(isinstance(size, int) for size in shape):
        raise NotImplementedError("several dimensions that are known at run time alone")
    wanted: Any = op.Constant(value_ints=shape)
    return op.Reshape(x, wanted)


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
