"""A process that does what it is told line by line: a JSON object in, a JSON object out, over stdin and stdout.

The parent's side is `Worker`, the child's `serve`. A question is {"do": ...}; its answer {"ok": ...} or {"error":
"why, in one line"}, after which the process goes on. What libraries print does not get between the lines: it goes to
the log, with stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import Empty, Queue, SimpleQueue
from threading import Thread
from typing import IO, Any, Protocol

from diffpress.benchmarks.gpu_launch import LONGEST, Failed, told

PATIENCE_S = 10.0  # that a process has to end by itself once nothing more will be asked


class Answers(Protocol):
    """What can be asked: a `Worker`."""

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""

    def ask(self, do: str, /, **message: Any) -> dict[str, Any]:
        """The answer; raises `Failed` with the reason."""

    def close(self) -> None:
        """No more questions."""


class Worker:
    """A process that answers. `limit_s` is how long an answer may take; then the process is ended."""

    def __init__(self, command: Sequence[str], log: Path, environ: Mapping[str, str], limit_s: float) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log, self._limit_s = log, limit_s
        self._lines: Queue[str] = Queue()
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, env=dict(environ)
            )
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.decode("utf-8", "replace"))
        self._lines.put("")  # it has closed the channel: there will be no more

    def ask(self, do: str, /, **message: Any) -> dict[str, Any]:
        """The answer; raises `Failed` where that is an error, and where the process has ended or takes too long."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **message}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=self._limit_s)
        except Empty as error:
            self._process.kill()
            raise Failed(f"it did not answer within {self._limit_s:g} s, see {self._log.name}") from error
        except OSError:  # a broken pipe: it has ended
            line = ""
        if not line:
            code = self._process.wait()
            raise Failed(told(code, self._log.read_text("utf-8", errors="replace")))
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        found: dict[str, Any] = answer["ok"]
        return found

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return self._process.poll() is None

    def close(self) -> None:
        """Let it end; one that does not is ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(PATIENCE_S)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()


def serve(handle: Callable[[str, dict[str, Any]], dict[str, Any]], asked: Iterable[str], answered: IO[str]) -> None:
    """Answer questions until there are none."""
    for line in asked:
        message = json.loads(line)
        try:
            answer: dict[str, Any] = {"ok": handle(message.pop("do"), message)}
        except Exception as error:  # noqa: BLE001 -- whatever a library raises is the reason why its row has no numbers
            traceback.print_exc()
            answer = {"error": reason(error)}
        answered.write(json.dumps(answer) + "\n")
        answered.flush()


def questions() -> Iterator[str]:
    """Lines of stdin as they come. The process ends at once when stdin does: whoever asked is gone, killed perhaps,
    and what it asked for would disturb its next run."""
    lines: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        with os.fdopen(os.dup(sys.stdin.fileno()), encoding="utf-8") as stream:
            for line in stream:
                lines.put(line)
        os._exit(0)

    Thread(target=read, daemon=True).start()
    return iter(lines.get, None)


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:LONGEST]


def channel() -> IO[str]:
    """What answers are written to: the stdout that this process was given. From now on stdout is stderr, for all."""
    kept = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return kept
