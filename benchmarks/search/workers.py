"""Where trials run: processes of this machine, or actors of a Ray cluster. Each slot runs one trial at a time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol, Self

import diffpress
from diffpress.benchmarks.search.trial import FAILED
from diffpress.errors import DiffpressError, require

Task = Mapping[str, Any]
Record = dict[str, Any]
CARRIED = ("DIFFPRESS_CACHE", "HF_HOME", "HF_HUB_OFFLINE")  # variables that a cluster's processes should have, too


class Workers(Protocol):
    """Slots for trials; `threads` is what each may use, None for what the libraries choose."""

    count: int
    threads: int | None

    def __enter__(self) -> Self:
        """Ready for tasks."""

    def __exit__(self, *error: object) -> None:
        """Ends what still runs."""

    def start(self, slot: int, task: Task) -> None:
        """Begin a task in a slot that is free."""

    def finished(self) -> list[tuple[int, Record]]:
        """Waits for one task at least: slots and records. A worker that died gives a record of a failure."""


def cores() -> list[int]:
    """Of this machine that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS and Windows
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def failure(task: Task, message: str) -> Record:
    """The record of a trial that has none of its own."""
    kept = {name: task[name] for name in ("key", "recipe", "precision", "backend")}
    return {**kept, "state": FAILED, "message": message}


class Local:
    """Processes of this machine, each with its share of the cores; what they say goes to files in `logs`."""

    def __init__(self, count: int, logs: Path) -> None:
        found = cores()
        self.count, self._logs = count, logs
        self.threads: int | None = max(1, len(found) // count)
        shares = [found[slot * self.threads % len(found) :][: self.threads] for slot in range(count)]
        self._shares = shares if hasattr(os, "sched_setaffinity") else [[] for _ in shares]
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._pool = ThreadPoolExecutor(count)
        self._running: dict[Future[Record], int] = {}

    def __enter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for process in list(self._processes.values()):
            process.kill()
        self._pool.shutdown()

    def start(self, slot: int, task: Task) -> None:
        """Begin a task; the first of a slot starts its process."""
        self._running[self._pool.submit(self._ask, slot, task)] = slot

    def finished(self) -> list[tuple[int, Record]]:
        """Waits for one task at least."""
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        return [(self._running.pop(future), future.result()) for future in done]

    def _ask(self, slot: int, task: Task) -> Record:
        process = self._processes.get(slot) or self._begun(slot)
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line.endswith("\n"):
            record: Record = json.loads(line)
            return record
        self._processes.pop(slot, None)
        code = process.wait()
        why = f"was ended by signal {-code}, for want of memory perhaps" if code < 0 else f"ended with code {code}"
        return failure(task, f"the worker's process {why}: see {self._log(slot)}")

    def _begun(self, slot: int) -> subprocess.Popen[str]:
        share = ["--cores", ",".join(map(str, self._shares[slot]))] if self._shares[slot] else []
        environment = {**os.environ, **_environment(), "OMP_NUM_THREADS": str(self.threads)}
        with self._log(slot).open("a") as log:
            self._processes[slot] = subprocess.Popen(
                [sys.executable, "-m", "diffpress.benchmarks.search.worker", *share],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the search, which then ends them
            )
        return self._processes[slot]

    def _log(self, slot: int) -> Path:
        return self._logs / f"worker-{slot}.txt"


def _environment() -> dict[str, str]:
    """So that a process finds this very package, installed or not."""
    source = str(Path(diffpress.__file__).parents[1])
    return {"PYTHONPATH": os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])}


class Runner:
    """An actor of a Ray cluster."""

    def run(self, task: Task) -> Record:
        """The record of a trial."""
        from diffpress.benchmarks.search import trial

        return trial.run(task)


def _knock(address: str) -> None:
    """Raise `ConnectionError` where nobody listens: Ray itself asks for a quarter of an hour."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # "auto" and "local" are no addresses
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(str(error)) from error


class Ray:
    """Actors of the Ray cluster at `address` ("auto" for the one of this machine, "local" to start one).

    The model has to be found on every machine under the same name. A trial's folder is written where it runs; what
    ends on the front is made and timed again on the machine of the search.
    """

    def __init__(self, address: str, count: int | None) -> None:
        self._ray = require("ray", "ray", "run trials on a Ray cluster")
        carried = {name: os.environ[name] for name in CARRIED if name in os.environ}
        chosen: dict[str, Any] = {"address": address, "runtime_env": {"env_vars": carried | _environment()}}
        if address == "local":
            chosen |= {"num_cpus": count or len(cores()), "include_dashboard": False}
        try:
            _knock(address)
            self._ray.init(**chosen, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise DiffpressError(
                f"no Ray cluster answers at '{address}': start one with 'ray start --head', or take --workers instead"
            ) from error
        total = int(self._ray.cluster_resources().get("CPU", 0))
        self.count = count or max(1, total // 2)
        if total < self.count:
            self._ray.shutdown()
            raise DiffpressError(f"the Ray cluster has {total} processors: ask for --workers {max(total, 1)} or fewer")
        sizes = [int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]]
        fits = (most for most in range(total // self.count, 0, -1) if sum(size // most for size in sizes) >= self.count)
        self.threads: int | None = next(fits, 1)  # no actor is spread over machines
        self._actors: dict[int, Any] = {}
        self._running: dict[Any, tuple[int, Task]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def start(self, slot: int, task: Task) -> None:
        """Begin a task; the first of a slot starts its actor."""
        if slot not in self._actors:
            self._actors[slot] = self._ray.remote(num_cpus=self.threads)(Runner).remote()
        self._running[self._actors[slot].run.remote(task)] = slot, task

    def finished(self) -> list[tuple[int, Record]]:
        """Waits for one task at least."""
        done, _ = self._ray.wait(list(self._running), num_returns=1)
        found = []
        for reference in done:
            slot, task = self._running.pop(reference)
            try:
                found.append((slot, self._ray.get(reference)))
            except self._ray.exceptions.RayError as error:
                del self._actors[slot]
                lines = str(error).strip().splitlines() or [type(error).__name__]
                found.append((slot, failure(task, f"the worker died: {lines[0]}")))
        return found
