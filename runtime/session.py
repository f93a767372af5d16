"""The one interface to inference libraries: a session runs one graph, arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from diffpress.errors import DiffpressError


class Memory(Protocol):
    """A block of memory on a device, freed with its last array."""

    address: int

    def write(self, offset: int, source: np.ndarray) -> None:
        """Copy a contiguous host array to `offset` bytes behind the start."""

    def read(self, offset: int, target: np.ndarray) -> None:
        """Copy from `offset` bytes behind the start into a contiguous host array, when all work before is done."""


@dataclass(frozen=True)
class DeviceArray:
    """A contiguous array on a device. Rows are views; numpy's functions see a copy on the host."""

    memory: Memory
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int = 0  # bytes behind the start of the memory

    @property
    def address(self) -> int:
        """Where its first value is, for the device."""
        return self.memory.address + self.offset

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> DeviceArray:
        first, last, step = rows.indices(len(self))
        if step != 1:
            raise ValueError("rows of an array on a device follow each other")
        one = self.nbytes // max(len(self), 1)
        return DeviceArray(self.memory, (max(last - first, 0), *self.shape[1:]), self.dtype, self.offset + first * one)

    def fill(self, source: np.ndarray) -> DeviceArray:
        """Copy a host array of the same shape here; returns itself."""
        self.memory.write(self.offset, np.ascontiguousarray(source, self.dtype).reshape(self.shape))
        return self

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        host = np.empty(self.shape, self.dtype)
        self.memory.read(self.offset, host)
        return host if dtype is None else host.astype(dtype, copy=False)


Feeds = Mapping[str, Any]  # name -> np.ndarray, or a DeviceArray that the same library made


@dataclass(frozen=True)
class Port:
    """An input or output of a graph; None in `shape` is a dimension the graph leaves open (the batch)."""

    shape: tuple[int | None, ...]
    dtype: np.dtype

    def takes(self, array: np.ndarray | DeviceArray) -> bool:
        """Whether the library can use the memory of `array` as it is."""
        sizes = zip(array.shape, self.shape, strict=True) if len(array.shape) == len(self.shape) else [(0, 1)]
        fits = all(wanted in (None, size) for size, wanted in sizes) and array.dtype == self.dtype
        return fits and (isinstance(array, DeviceArray) or (array.flags.c_contiguous and array.flags.writeable))


class Session(Protocol):
    """One graph, ready to run. The arrays that `run` returns are the caller's."""

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]

    def prepare(self, batch: int) -> None:
        """Do now what the first run of this batch size would have to do."""

    def run(self, feeds: Feeds, into: Feeds | None = None) -> dict[str, np.ndarray]:
        """Every output of the graph; those named in `into` are written into its arrays, which come back as they are.

        Raises `DiffpressError` when the library refuses the feeds, and for arrays in `into` that are not as the outputs
        are, contiguous and writeable. None of them may share memory with a feed.
        """


@runtime_checkable
class Allocating(Protocol):
    """A session whose library has a device of its own and takes what lies there, beside arrays of the host."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        """An array on the device that every session of the library takes; its values are not set."""


def check_targets(what: object, outputs: Mapping[str, Port], into: Feeds) -> None:
    """Raise `DiffpressError` unless every array of `into` can take its output; `what` names the graph."""
    for name, array in into.items():
        if name not in outputs:
            raise DiffpressError(f"{what} has no output '{name}' to write, it has: {', '.join(outputs)}")
        if not outputs[name].takes(array):
            port = outputs[name]
            shape = ", ".join("batch" if size is None else str(size) for size in port.shape)
            raise DiffpressError(
                f"output '{name}' of {what} cannot be written into a {array.dtype} array of {list(array.shape)}: "
                f"give a contiguous, writeable {port.dtype} array of [{shape}]"
            )


def first_line(error: Exception) -> str:
    """The telling line of a library's error: OpenVINO starts with the places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '", "FrontEnd API"))]
    return (telling or lines or [type(error).__name__])[0]
