"""A contender in a process of its own, which draws, calls and times itself when it is told to: see `peers_link`.

    python -m diffpress.benchmarks.peers_worker TASK        # a JSON object: see `Task`

It may run in another environment than diffpress was installed into: what it imports from here needs numpy, and each
contender whatever draws.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffpress.benchmarks.candidates import Drawn, store
from diffpress.benchmarks.latency import wall_clock
from diffpress.benchmarks.peers_link import channel, questions, serve
from diffpress.errors import DiffpressError
from diffpress.paths import whole

Facts = dict[str, Any]  # what is known of a contender: bits_w, bits_a, bytes, params, backend, seconds, deploys, ...
PACKAGES = (
    "torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "nncf", "DeepCache", "tomesd", "torchao",
    "nvidia-modelopt", "optimum", "optimum-onnx", "pruna",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What to open. `schedules` are {scheduler {class, config}, steps} by name, `latent` is [C, h, w], `text` [T, D].

    `work` is where what a contender makes is kept, `texts` are prompts to calibrate with.
    """

    name: str
    make: str
    options: Mapping[str, Any]
    model: str
    source: str
    latent: Sequence[int]
    text: Sequence[int]
    side: int
    guidance: float
    schedules: Mapping[str, Mapping[str, Any]]
    work: str
    texts: Sequence[str]
    single: bool  # whether single calls of the denoiser are asked for, not images

    @property
    def place(self) -> Path:
        """A folder for what is made of this model, shared by contenders."""
        return Path(self.work) / "made" / self.model


class Contender(Protocol):
    """What `OPEN` opens."""

    def follow(self, schedule: str) -> Facts:
        """Make ready for a schedule; what is known of it."""

    def draw(self, texts: Sequence[str], seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [N, H, W, 3] and their final latents [N, C, h, w], on the schedule that was last named."""

    def begin(self, text: np.ndarray, timesteps: Sequence[float]) -> Callable[[int, np.ndarray], np.ndarray]:
        """A denoiser that stands before its first step, with both halves' text [2, T, D]: a function of (step, sample
        [2, C, h, w]) to the output of the conditional half [1, C, h, w], called in the order of steps. `timesteps`
        are those of the schedule; the reference takes any.
        """


def _torch(task: Task) -> Contender:
    from diffpress.benchmarks.peers_torch import opened

    return opened(task)


def _pruna(task: Task) -> Contender:
    from diffpress.benchmarks.peers_torch import smashed

    return smashed(task)


def _graphs(task: Task) -> Contender:
    from diffpress.benchmarks.peers_graphs import opened

    return opened(task)


def _optimum(task: Task) -> Contender:
    from diffpress.benchmarks.peers_graphs import with_optimum

    return with_optimum(task)


def _ours(task: Task) -> Contender:
    from diffpress.benchmarks.peers_ours import Ours

    return Ours(task)


OPEN: Mapping[str, Callable[[Task], Contender]] = {
    "torch": _torch,
    "pruna": _pruna,
    "onnxruntime": _graphs,
    "openvino": _graphs,
    "modelopt-onnx": _graphs,
    "optimum": _optimum,
    "diffpress": _ours,
}


class Contest:
    """Answers what a parent asks of an open contender."""

    def __init__(self, contender: Contender, single: bool) -> None:
        self._contender, self._single = contender, single
        self._now: str | None = None
        self._facts: dict[str, Facts] = {}

    def __call__(self, do: str, message: dict[str, Any]) -> dict[str, Any]:
        """follow {schedule}, draw {texts, seeds, batch, file}, calls {inputs, file}, or time {text, seed} or {inputs}.

        The last three with the schedule, too.
        """
        self._follow(message["schedule"])
        if do == "follow":
            return {**self._facts[message["schedule"]], "versions": versions()}
        return {"draw": self._draw, "calls": self._calls, "time": self._time}[do](message)

    def _follow(self, schedule: str) -> None:
        if schedule != self._now:
            self._facts[schedule] = self._contender.follow(schedule)
            self._now = schedule

    def _draw(self, message: Mapping[str, Any]) -> dict[str, Any]:
        texts, seeds, batch = message["texts"], message["seeds"], message["batch"]
        found = [
            self._contender.draw(texts[start : start + batch], seeds[start : start + batch])
            for start in range(0, len(texts), batch)
        ]
        pixels, latents = (np.concatenate(part) for part in zip(*found, strict=True))
        _finite(latents)
        drawn = Drawn(pixels, latents, np.empty((0, 0, *latents.shape[1:]), np.float32))
        store(Path(message["file"]), drawn)
        return {"images": len(pixels)}

    def _calls(self, message: Mapping[str, Any]) -> dict[str, Any]:
        run, count = self._begun(message, None)
        outputs = np.concatenate(run())
        _finite(outputs)
        whole(Path(message["file"]), lambda part: np.save(part, outputs))
        return {"calls": count}

    def _begun(self, message: Mapping[str, Any], count: int | None) -> tuple[Callable[[], list[np.ndarray]], int]:
        """A function that makes the first `count` calls with the given inputs, and how many these are."""
        with np.load(message["inputs"]) as arrays:
            samples, text, timesteps = arrays["samples"][:count], arrays["text"], arrays["timesteps"].tolist()
        call = self._contender.begin(text, timesteps)
        return lambda: [call(index, sample) for index, sample in enumerate(samples)], len(samples)

    def _time(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Milliseconds of an image, or of a call: the mean over one turn of what repeats itself."""
        gc.collect()
        gc.disable()  # as `latency.alternate` has it
        try:
            if not self._single:
                return {"ms": wall_clock(lambda: self._contender.draw([message["text"]], [message["seed"]]))}
            run, count = self._begun(message, self._facts[message["schedule"]].get("period", 1))
            return {"ms": wall_clock(run) / count}
        finally:
            gc.enable()


def _finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise DiffpressError("it draws NaN or infinite values")


def versions() -> dict[str, str]:
    """Versions of what may be at work in this environment."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Open what the task names, say so, and answer."""
    answered = channel()
    task = Task(**json.loads(sys.argv[1]))
    opened: list[Contest] = []

    def handle(do: str, message: dict[str, Any]) -> dict[str, Any]:
        if not opened:  # at the first question, so that a failure to open is an answer
            opened.append(Contest(OPEN[task.make](task), task.single))
            gc.freeze()
        return opened[0](do, message)

    serve(handle, questions(), answered)


if __name__ == "__main__":
    main()
