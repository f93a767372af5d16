"""Work split between processes: nothing is left out, made twice or begun too early."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffpress.calibration import processes


def show(items: Iterable[Any], text: str) -> Iterable[Any]:
    return items


def test_what_no_other_process_has_made_is_made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[list[int]] = []
    made: list[int] = []

    @contextmanager
    def split(items: list[int]) -> Iterator[list[int]]:
        yield items[:2]

    state = SimpleNamespace(split_between_processes=split, wait_for_everyone=lambda: waits.append(list(made)))
    monkeypatch.setattr(processes, "_state", lambda: state)
    processes.make_missing(range(5), lambda item: item not in [1, *made], made.append, show, "making")
    assert waits == [[], [0, 2]]  # none begins before all have looked; the rest only when all are through
    assert made == [0, 2, 3, 4]


def test_one_process_makes_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    for _ in range(2):
        processes.make_missing(range(3), lambda item: item not in made, made.append, show, "making")
    assert made == [0, 1, 2]
    assert processes.is_main()


@pytest.mark.parametrize("fails", [False, True])
def test_a_network_comes_back_from_the_gpu(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    where = []
    network = SimpleNamespace(device=torch.device("cpu"), to=lambda device: where.append(str(device)))
    monkeypatch.setattr(processes, "_state", lambda: SimpleNamespace(device=torch.device("cuda", 1)))
    with pytest.raises(RuntimeError) if fails else nullcontext(), processes.on_fastest_device(network):
        assert where == ["cuda:1"]
        if fails:
            raise RuntimeError("out of memory")
    assert where == ["cuda:1", "cpu"]
