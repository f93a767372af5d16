"""Which files beside an ONNX graph hold its weights, read from the file's bytes without the onnx package.

Protocol buffers are sequences of (field << 3 | wire type) and a value; the numbers of the fields are those of
onnx.proto. Only names are looked at, weights are stepped over, so a file of gigabytes costs milliseconds.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from diffpress.bundle import Bundle, is_relative
from diffpress.errors import DiffpressError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# Message -> field -> the message in it; TENSOR's entries are read, not entered.
MODEL, GRAPH, NODE, ATTRIBUTE, TENSOR, SPARSE, FUNCTION = range(7)
INSIDE: dict[int, dict[int, int]] = {
    MODEL: {7: GRAPH, 25: FUNCTION},
    GRAPH: {1: NODE, 5: TENSOR, 15: SPARSE},
    NODE: {5: ATTRIBUTE},
    ATTRIBUTE: {5: TENSOR, 6: GRAPH, 10: TENSOR, 11: GRAPH, 22: SPARSE, 23: SPARSE},
    SPARSE: {1: TENSOR, 2: TENSOR},
    FUNCTION: {7: NODE, 11: ATTRIBUTE},
    TENSOR: {},
}
EXTERNAL_DATA, KEY, VALUE = 13, 1, 2
Buffer = mmap.mmap | bytes


def locations(file: Path) -> list[str]:
    """The files that tensors of a graph lie in, as the graph names them: relative to its folder.

    Raises `DiffpressError` for what is not an ONNX file.
    """
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return sorted(set(_locations(content, MODEL, 0, len(content))))
    except (ValueError, IndexError, OSError, RecursionError) as error:
        raise DiffpressError(f"{file} is not a readable ONNX graph ({error}): compress again") from error


def parts(bundle: Bundle, graph: str) -> list[str]:
    """A graph of the bundle and the files of its weights, all of which the manifest must list.

    Raises `DiffpressError` for weights that lie outside the bundle or are not listed.
    """
    listed = bundle.manifest["files"]
    if graph not in listed:
        raise DiffpressError(f"{bundle.path} does not list the file {graph}: compress again")
    found = [graph]
    for location in locations(bundle.file(graph)):
        path = PurePosixPath(graph).parent / location
        if not is_relative(path.as_posix()) or not is_relative(location):
            raise DiffpressError(f"{bundle.file(graph)}: its weights {location} lie outside the bundle: do not use it")
        if path.as_posix() not in listed:
            raise DiffpressError(f"{bundle.path} does not list {path}, which {graph} needs: compress again")
        found.append(path.as_posix())
    return found


def _locations(content: Buffer, message: int, start: int, end: int) -> Iterator[str]:
    for field, first, last in _fields(content, start, end):
        if message == TENSOR and field == EXTERNAL_DATA:
            entry = {key: content[a:b] for key, a, b in _fields(content, first, last)}
            if entry.get(KEY) == b"location":
                yield entry.get(VALUE, b"").decode("utf-8")
        elif field in INSIDE[message]:
            yield from _locations(content, INSIDE[message][field], first, last)


def _fields(content: Buffer, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field, first byte, last byte + 1) of every value of bytes between `start` and `end`."""
    at = start
    while at < end:
        tag, at = _varint(content, at)
        kind = tag & 7
        if kind == VARINT:
            _, at = _varint(content, at)
        elif kind == BYTES:
            size, at = _varint(content, at)
            if at + size > end:
                raise ValueError("it is truncated")
            yield tag >> 3, at, at + size
            at += size
        elif kind in (FIXED32, FIXED64):
            at += 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
    if at != end:
        raise ValueError("it is truncated")


def _varint(content: Buffer, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number at byte {at} is too long")
