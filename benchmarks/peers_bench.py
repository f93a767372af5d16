"""A run of `peers`: contenders draw, call and are timed in processes of their own; what was found is kept in files."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffpress.benchmarks import candidates, machine, peers_ours, prompts, scores
from diffpress.benchmarks.gpu_launch import Failed
from diffpress.benchmarks.latency import alternate
from diffpress.benchmarks.peers_link import Answers
from diffpress.benchmarks.peers_rows import CALL, CONVERGED, REFERENCE, Contender, Model, signal_and_noise
from diffpress.benchmarks.recipe_rows import file_name
from diffpress.paths import whole, write_json

BATCH = 16  # images at once where only their quality matters
SETTLE_S = 0.05  # between two processes' turns: idle threads of a library spin for a while before they sleep
Found = dict[str, Any]
Start = Callable[[Contender, Model], Answers]  # raises `Failed` where its environment cannot be made


@dataclass(frozen=True)
class Bench:
    """Where the state lies, who is compared, and how the process of a contender is started."""

    work: Path
    contenders: Mapping[str, Contender]
    chosen: prompts.Prompts
    start: Start
    rounds: Mapping[str, int]  # by model
    retry: bool = False  # what failed in an earlier run

    @cached_property
    def judging(self) -> scores.Judging:
        """The networks that judge images."""
        return scores.Judging(self.chosen)

    def file(self, kind: str, model: Model, contender: str, schedule: str, end: str = "json") -> Path:
        """Where something about a row is kept."""
        return self.work / model.name / kind / f"{file_name(f'{contender} {schedule}')}.{end}"

    def known(self, kind: str, model: Model, contender: str, schedule: str) -> Found | None:
        """What was found of a row, in this run or an earlier one; nothing of who has no part in this one."""
        if contender not in self.contenders:
            return None
        file = self.file(kind, model, contender, schedule)
        found: Found | None = json.loads(file.read_text("utf-8")) if file.exists() else None
        return None if found is None or found.get("of") != self.of(model, self.contenders[contender]) else found

    def keep(self, kind: str, model: Model, contender: Contender, schedule: str, found: Mapping[str, Any]) -> None:
        """Keep what was found of a row, with what it is of."""
        file, of = self.file(kind, model, contender.name, schedule), self.of(model, contender)
        write_json(file, {**found, "of": of})

    def of(self, model: Model, contender: Contender) -> str:
        """Names what a row is of: a contender as it is set up now, the schedules, versions, and for ours the code."""
        schedules = {name: asdict(schedule) for name, schedule in model.schedules.items()}
        own: list[Any] = [asdict(contender), schedules, machine.versions()]
        if "recipe" in contender.options:
            own.append(peers_ours.code(contender.options["recipe"]))
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]

    def missing(self, kind: str, model: Model, contender: Contender) -> list[str]:
        """The schedules of which something is still to be found."""
        found = {name: self.known(kind, model, contender.name, name) for name in contender.schedules(model)}
        return [name for name, entry in found.items() if entry is None or (self.retry and entry.get("reason"))]

    @contextmanager
    def opened(self, contender: Contender, model: Model) -> Iterator[Answers]:
        """A process of the contender, until the block is left; raises `Failed` where it is not called at all."""
        if model.name == CALL and contender.not_called:
            raise Failed(contender.not_called)
        worker = self.start(contender, model)
        try:
            yield worker
        finally:
            worker.close()

    # -- quality -------------------------------------------------------------------------------------------------------

    def draw(self, model: Model, contender: Contender) -> None:
        """Let a contender draw, or call, on each of its schedules where that is missing."""
        missing = self.missing("rows", model, contender)
        while missing:
            try:
                with self.opened(contender, model) as worker:
                    while missing:
                        found = self._show(worker, model, contender, missing[0])
                        self.keep("rows", model, contender, missing.pop(0), found)
            except Failed as error:  # the next schedule has a process that nothing has happened to
                self.keep("rows", model, contender, missing.pop(0), {"reason": str(error)})

    def _show(self, worker: Answers, model: Model, contender: Contender, schedule: str) -> Found:
        """Facts of a row; what it drew, or the outputs of its calls, are in a file then."""
        facts = worker.ask("follow", schedule=schedule)
        if model.name == CALL:
            inputs, file = self.inputs(model, facts["timesteps"]), self.outputs(model, contender.name, schedule)
            worker.ask("calls", schedule=schedule, inputs=str(inputs), file=str(file))
        else:
            self._ask_images(worker, schedule, self.images(model, contender.name, schedule), facts.get("batch", BATCH))
        return {"reason": None, **facts}

    def _ask_images(self, worker: Answers, schedule: str, file: Path, batch: int) -> None:
        texts = self.chosen.texts
        worker.ask("draw", schedule=schedule, texts=texts, seeds=[*range(len(texts))], batch=batch, file=str(file))

    def images(self, model: Model, contender: str, schedule: str) -> Path:
        """Where what a row drew is kept."""
        return self.file("rows", model, contender, schedule, "npz")

    def outputs(self, model: Model, contender: str, schedule: str) -> Path:
        """Where the outputs of its calls are kept."""
        return self.file("rows", model, contender, schedule, "npy")

    def converged(self, model: Model) -> candidates.Drawn | None:
        """What the reference draws in so many steps that more would change nothing; raises `Failed`."""
        file = self.images(model, REFERENCE, CONVERGED.name)
        if not file.exists():
            with self.opened(self.contenders[REFERENCE], model) as worker:
                self._ask_images(worker, CONVERGED.name, file, BATCH)
        return candidates.stored(file)

    def inputs(self, model: Model, timesteps: Sequence[float]) -> Path:
        """A file of inputs for calls at `timesteps`: one image under the noise of each, the same for both halves."""
        key = hashlib.sha256(json.dumps(list(timesteps)).encode()).hexdigest()[:12]
        file = self.work / model.name / "inputs" / f"{key}.npz"
        if not file.exists():
            generator = np.random.default_rng(0)
            image, noise = generator.normal(size=(2, 1, *model.latent))
            text = generator.normal(size=(2, *model.text))
            samples = [np.repeat(a * image + b * noise, 2, 0) for a, b in signal_and_noise(model, timesteps)]
            stacked, texts = np.array(samples, np.float32), text.astype(np.float32)
            whole(file, lambda part: np.savez(part, samples=stacked, text=texts, timesteps=timesteps))
        return file

    def wanted(self, model: Model, timesteps: Sequence[float]) -> np.ndarray:
        """What the reference's calls return for the same inputs [K, C, h, w]; raises `Failed`."""
        inputs = self.inputs(model, timesteps)
        file = inputs.with_suffix(".npy")
        if not file.exists():
            with self.opened(self.contenders[REFERENCE], model) as worker:
                standard = next(iter(model.schedules))
                worker.ask("calls", schedule=standard, inputs=str(inputs), file=str(file))
        outputs: np.ndarray = np.load(file)
        return outputs

    # -- times ---------------------------------------------------------------------------------------------------------

    def time(self, model: Model, contender: Contender, beside: Callable[[], Answers]) -> None:
        """Time a contender's rows that have been drawn, in turns with the reference in its process."""
        missing = [
            name
            for name in self.missing("times", model, contender)
            if (self.known("rows", model, contender.name, name) or {"reason": "not drawn"})["reason"] is None
        ]
        if not missing:
            return
        reference: Answers | None = None
        try:
            with self.opened(contender, model) as worker:
                reference = beside()
                calls = {REFERENCE: self._turn(reference, model, next(iter(model.schedules)))}
                calls |= {name: self._turn(worker, model, name) for name in missing}
                times = alternate(calls, self.rounds[model.name], clock=_as_said)
            found: dict[str, Found] = {name: {"own": times[name], "reference": times[REFERENCE]} for name in missing}
        except Failed as error:
            if reference is not None and not reference.alive:
                return  # which is not the contender's fault: the next run times it
            found = {name: {"reason": str(error)} for name in missing}
        for name, entry in found.items():
            self.keep("times", model, contender, name, entry)

    def _turn(self, worker: Answers, model: Model, schedule: str) -> Callable[[int], float]:
        """A function of the round: the milliseconds that the worker says an image, or a call, took."""
        facts, texts = worker.ask("follow", schedule=schedule), self.chosen.texts
        inputs = str(self.inputs(model, facts["timesteps"])) if model.name == CALL else None

        def measure(turn: int) -> float:
            time.sleep(SETTLE_S)
            given = {"inputs": inputs} if inputs else {"text": texts[turn % len(texts)], "seed": turn}
            return float(worker.ask("time", schedule=schedule, **given)["ms"])

        return measure


def _as_said(call: Callable[[], object]) -> float:
    """The clock is the worker's: what passes between processes is nobody's time."""
    said = call()
    assert isinstance(said, float)
    return said
