"""Where things are kept that can be made again: recordings, caches of the libraries, packages that were unpacked."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """DIFFPRESS_CACHE, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "diffpress"
    return Path(os.environ.get("DIFFPRESS_CACHE", default))


def write(file: Path, content: bytes) -> None:
    """Write a file whole or not at all, also when several processes write it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".part", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)


def whole(file: Path, save: Callable[[Path], object]) -> None:
    """`write` for what a library's `save` writes, to the path it is given, whose suffix is the file's."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{os.getpid()}-{threading.get_ident()}-{file.name}")
    try:
        save(part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
