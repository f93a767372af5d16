"""The line protocol with real processes: answers, errors, noise on stdout, deaths; and a contest behind it."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffpress
from diffpress.benchmarks import candidates
from diffpress.benchmarks.gpu_launch import Failed
from diffpress.benchmarks.peers_link import Worker, reason
from diffpress.benchmarks.peers_worker import Contest
from diffpress.errors import DiffpressError

CHILD = """
import os, signal, sys, time
from diffpress.benchmarks.peers_link import channel, serve
answered = channel()
def handle(do, message):
    print("a library talks")
    os.system("echo a program talks")
    if do == "twice":
        return {"twice": 2 * message["value"]}
    if do == "raise":
        raise ValueError("first line\\nsecond line")
    if do == "exit":
        sys.stderr.write("out of luck\\n")
        sys.stderr.flush()
        os._exit(3)
    if do == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
serve(handle, sys.stdin, answered)
"""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Starts processes that answer, and ends them."""
    made: list[Worker] = []
    source = str(Path(diffpress.__file__).parents[1])

    def start(limit_s: float = 60.0) -> Worker:
        environ = os.environ | {"PYTHONPATH": source}
        made.append(Worker([sys.executable, "-c", CHILD], tmp_path / "logs" / "child.log", environ, limit_s))
        return made[-1]

    yield start
    for worker in made:
        worker.close()


def test_answers_come_through_what_libraries_print(child: Callable[..., Worker], tmp_path: Path) -> None:
    worker = child()
    assert [worker.ask("twice", value=value) for value in (3, 4)] == [{"twice": 6}, {"twice": 8}]
    worker.close()
    log = (tmp_path / "logs" / "child.log").read_text("utf-8")
    assert log.count("a library talks") == 2 and log.count("a program talks") == 2
    assert not worker.alive


def test_an_error_is_an_answer_and_the_process_goes_on(child: Callable[..., Worker], tmp_path: Path) -> None:
    worker = child()
    with pytest.raises(Failed, match=r"^first line$"):
        worker.ask("raise")
    assert "Traceback" in (tmp_path / "logs" / "child.log").read_text("utf-8")
    assert worker.ask("twice", value=1) == {"twice": 2}


@pytest.mark.parametrize(("do", "said"), [("exit", "out of luck"), ("die", signal.SIGKILL.name)])
def test_a_death_says_why_and_stays_one(child: Callable[..., Worker], do: str, said: str) -> None:
    worker = child()
    worker.ask("twice", value=1)
    for _ in range(2):
        with pytest.raises(Failed, match=said):
            worker.ask(do)
    assert not worker.alive


def test_one_that_takes_too_long_is_ended(child: Callable[..., Worker]) -> None:
    worker = child(limit_s=5.0)
    worker.ask("twice", value=1)
    start = time.monotonic()
    with pytest.raises(Failed, match="did not answer within 5 s"):
        worker.ask("sleep")
    worker.close()
    assert time.monotonic() - start < 20 and not worker.alive


def test_reasons_are_one_line() -> None:
    assert reason(ValueError("\n  what it is \n more")) == "what it is"
    assert reason(KeyError()) == "KeyError" and len(reason(ValueError("x" * 1000))) <= 300


class Counting:
    """A contender that draws its seeds and counts."""

    def __init__(self, fault: float = 0.0) -> None:
        self.fault, self.followed, self.called = fault, list[str](), list[int]()

    def follow(self, schedule: str) -> dict[str, Any]:
        self.followed.append(schedule)
        return {"steps": 4, "timesteps": [3.0, 2.0, 1.0, 0.0], "period": 2}

    def draw(self, texts: Sequence[str], seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        self.called.append(len(texts))
        rows = np.array(seeds, np.float32).reshape(-1, 1, 1, 1) + self.fault
        return np.zeros((len(seeds), 2, 2, 3), np.uint8) + np.uint8(len(texts)), np.broadcast_to(
            rows, (len(seeds), 4, 2, 2)
        )

    def begin(self, text: np.ndarray, timesteps: Sequence[float]) -> Callable[[int, np.ndarray], np.ndarray]:
        def call(index: int, sample: np.ndarray) -> np.ndarray:
            self.called.append(index)
            return sample[-1:] * timesteps[index] + self.fault

        return call


def test_a_contest_draws_in_batches(tmp_path: Path) -> None:
    contender, file = Counting(), tmp_path / "drawn.npz"
    contest = Contest(contender, single=False)
    facts = contest("follow", {"schedule": "a"})
    assert facts["steps"] == 4 and "torch" in facts["versions"]
    told = {"schedule": "a", "texts": ["x"] * 5, "seeds": [4, 3, 2, 1, 0], "batch": 2, "file": str(file)}
    assert contest("draw", told) == {"images": 5} and contender.called == [2, 2, 1]
    drawn = candidates.stored(file)
    assert drawn is not None and drawn.latents[:, 0, 0, 0].tolist() == [4, 3, 2, 1, 0]
    contest("time", {"schedule": "b", "text": "x", "seed": 1})
    assert contender.followed == ["a", "b"] and contender.called[-1] == 1


def test_a_contest_calls_every_step_and_times_one_turn(tmp_path: Path) -> None:
    contender, inputs, file = Counting(), tmp_path / "in.npz", tmp_path / "out.npy"
    samples = np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1, 1) * np.ones((4, 2, 4, 2, 2), np.float32)
    np.savez(inputs, samples=samples, text=np.zeros((2, 3, 5), np.float32), timesteps=[3.0, 2.0, 1.0, 0.0])
    contest = Contest(contender, single=True)
    assert contest("calls", {"schedule": "a", "inputs": str(inputs), "file": str(file)}) == {"calls": 4}
    assert np.load(file)[:, 0, 0, 0].tolist() == [0, 2, 2, 0] and contender.called == [0, 1, 2, 3]
    contest("time", {"schedule": "a", "inputs": str(inputs)})
    assert contender.called[4:] == [0, 1]  # its period


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    contest = Contest(Counting(fault=float("nan")), single=False)
    told = {"schedule": "a", "texts": ["x"], "seeds": [0], "batch": 1, "file": str(tmp_path / "drawn.npz")}
    with pytest.raises(DiffpressError, match="NaN"):
        contest("draw", told)
    assert not (tmp_path / "drawn.npz").exists()
