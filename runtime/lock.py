"""A lock between processes on one machine. The system frees it when its holder ends, however that ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tqdm import tqdm

POLL_S = 0.2


@contextmanager
def locked(file: Path, what: str, progress: bool = True) -> Iterator[None]:
    """Hold the lock `file`, which stays behind, empty; while another process holds it, wait and say for `what`."""
    with file.open("a+b") as stream:
        if not _taken(stream):
            with tqdm(
                desc=f"waiting for another process: {what}", bar_format="{desc} ({elapsed})", disable=not progress
            ) as bar:
                while not _taken(stream):
                    time.sleep(POLL_S)
                    bar.update()
        try:
            yield
        finally:
            _release(stream)


if sys.platform == "win32":
    import msvcrt

    def _taken(stream: IO[bytes]) -> bool:
        stream.seek(0)
        try:
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _release(stream: IO[bytes]) -> None:
        stream.seek(0)
        msvcrt.locking(stream.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _taken(stream: IO[bytes]) -> bool:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _release(stream: IO[bytes]) -> None:
        fcntl.flock(stream, fcntl.LOCK_UN)
