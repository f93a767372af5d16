"""Where things are kept that can be made again: recordings, caches of the libraries, packages that were unpacked."""

from __future__ import annotations

import os
import tempfile
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
