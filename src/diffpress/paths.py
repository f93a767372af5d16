"""Where things are kept that can be made again: recordings, caches of the libraries, packages that were unpacked."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """DIFFPRESS_CACHE, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "diffpress"
    return Path(os.environ.get("DIFFPRESS_CACHE", default))


def write(file: Path, content: bytes) -> None:
    """Write a file whole or not at all, also when several processes write it."""
    _put(file, lambda part: part.write_bytes(content), ".part")


def write_json(file: Path, content: object, indent: int | None = None) -> None:
    """`write` for what JSON can hold."""
    write(file, json.dumps(content, indent=indent).encode())


def whole(file: Path, save: Callable[[Path], object]) -> None:
    """`write` for what a library's `save` writes, to the path it is given, whose suffix is the file's."""
    _put(file, save, file.suffix)


def _put(file: Path, save: Callable[[Path], object], suffix: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}{suffix}")
    try:
        save(part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
