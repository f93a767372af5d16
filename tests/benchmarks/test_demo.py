from pathlib import Path
from typing import Any

import pytest

from diffpress.benchmarks import demo as module
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError


@pytest.mark.parametrize("builds", [True, False])
def test_demo_says_what_came_out(
    made_up_report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: bool
) -> None:
    from diffpress import api

    asked: dict[str, Any] = {}

    def compress(model: str, recipe: str, output: Path, **options: Any) -> Bundle:
        asked.update(options, model=model, recipe=recipe)
        return Bundle(output, {})

    def bench(path: Path, against: str, **options: Any) -> dict[str, Any]:
        asked.update(options, against=against)
        return made_up_report

    monkeypatch.setattr(api, "compress", compress)
    monkeypatch.setattr(module, "bench", bench)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: builds or None)
    text = module.demo(tmp_path / "out", quiet=True)
    assert (asked["model"], asked["recipe"], asked["against"]) == ("shapes", "balanced", "shapes")
    assert asked["targets"] == (["sm89"] if builds else [])
    assert asked["images"] >= 50 and asked["quiet"]
    assert str(tmp_path / "out" / "balanced" / "report" / "report.html") in text
    assert "7.0× faster" in text and "15 plain DPM-Solver++ Karras steps" in text
    assert ("no engine" in text) is not builds


def test_demo_overwrites_nothing(tmp_path: Path) -> None:
    with pytest.raises(DiffpressError, match="exists already"):
        module.demo(tmp_path)
