"""What tests of the search share: records as trials give them, and workers without processes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import pytest

Record = dict[str, Any]


def _measured(speedup: float, loss: float, **more: Any) -> Record:
    """What a trial measured, with made-up numbers where they do not matter."""
    judged = {"reference": 0.9, "compressed": 0.9 - loss}
    quality = {"latent_rel_l2": loss, "latent_rel_l2_median": loss, "psnr_db": 50 - 100 * loss, "ssim": 1 - loss}
    quality |= {"psnr_db_worst": 40 - 100 * loss, "images": 4}
    quality |= {"clip_score": judged, "attribute_accuracy": judged, "frechet": {"reference": 1.0, "compressed": 2.0}}
    return {
        "state": "measured",
        "speedup": {"vs_eager": speedup, "vs_uncompressed_export": speedup / 3},
        "quality": quality,
        "size_bytes": {"denoiser_reference": 1000, "denoiser_compressed": 400},
        "faults": [],
        "errors": [loss] * 4,
        "operations": 1e9 / speedup,
        "quantized": False,
        **more,
    }


class _Inline:
    """Workers that call a function of (recipe, precision) when they are waited for."""

    threads: int | None = None

    def __init__(self, answer: Callable[[Mapping[str, Any], str], Record], count: int = 2) -> None:
        self.count, self.answer = count, answer
        self.asked: list[str] = []
        self._tasks: dict[int, Mapping[str, Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, slot: int, task: Mapping[str, Any]) -> None:
        assert slot not in self._tasks
        self._tasks[slot] = task
        self.asked.append(task["key"])

    def finished(self) -> list[tuple[int, Record]]:
        slot = min(self._tasks)
        task = self._tasks.pop(slot)
        own = {name: task[name] for name in ("key", "recipe", "precision")}
        return [(slot, own | {"backend": "none"} | self.answer(task["recipe"], task["precision"]))]


@pytest.fixture
def measured() -> Callable[..., Record]:
    """Makes what a trial measures, from its speedup and its loss."""
    return _measured


@pytest.fixture
def inline() -> type[_Inline]:
    """Workers that call a function."""
    return _Inline


@pytest.fixture
def a_report() -> dict[str, Any]:
    """The document of a search with three finalists, one of which came first; change it freely."""
    from diffpress.benchmarks.search import report
    from diffpress.benchmarks.search.base import Base
    from diffpress.gates import parse

    base = Base({"bf16": "openvino", "fp32": "openvino"}, "openvino", 3.0)
    entries = []
    for key, passes, speedup, loss in (
        ("a", [{"cache": {"interval": 3, "branch": 0}}], 6.0, 0.05),
        ("b", [{"quantize": {"format": "int8"}}, "temporal-table"], 7.0, 0.02),
        ("c", [{"schedule": {"solver": "<unipc>", "steps": 8}}], 12.0, 0.3),
    ):
        found = _measured(speedup, loss)
        entries.append(found | {"key": key, "recipe": {"passes": passes}, "precision": "fp32", "backend": "openvino"})
    trials = [
        *entries,
        {"key": "d", "recipe": {"passes": []}, "precision": "fp32", "state": "refused", "message": "cache: <no>"},
    ]
    refused = {"e": "recipe: 'correct' has to be the last pass"}
    found = report.finished(
        entries, trials, refused, {"a": "cache"}, "latent_error", [parse("speedup >= 6.5"), parse("psnr >= 21")], base
    )
    more = {
        "model": "shapes",
        "space": "default",
        "reproduce": "diffpress search",
        "images": {"trials": 4, "finals": 12},
    }
    return found | more


@pytest.fixture
def space_file(tmp_path: Path) -> Callable[[str], str]:
    """Writes a space and returns its path."""

    def write(text: str) -> str:
        file = tmp_path / "space.yaml"
        file.write_text(text)
        return str(file)

    return write
