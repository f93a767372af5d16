import json
from pathlib import Path
from typing import Any

import pytest

from diffpress.benchmarks import search_tables


@pytest.fixture
def told(a_report: dict[str, Any], measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A report as it is committed; write it again after a change."""
    found = a_report | {
        "bundle": measured(6.9, 0.021) | {"loss": 0.021},
        "run": {"trials": 4, "seconds": 1800.0},
        "machine": {"processor": "A", "cores": 2},
    }
    monkeypatch.setattr(search_tables, "FILE", tmp_path / "search.json")
    (tmp_path / "search.json").write_text(json.dumps(found))
    return found


def test_the_front_and_what_came_first_stand_in_the_table(told: dict[str, Any]) -> None:
    lines = search_tables.search().splitlines()
    assert lines[2:5] == [
        "| `cache` | 6.0x | 0.0500 | 0.0500 | 45.0 | 85.0% | 40% | quantize int8, temporal-table, fp32 |",
        "| **quantize int8, temporal-table, fp32**, chosen | 7.0x | 0.0200 | 0.0200 | 48.0 | 88.0% | 40% |  |",
        "| schedule <unipc> 8, fp32 | 12.0x | 0.3000 | 0.3000 | 20.0 | 60.0% | 40% |  |",
    ]
    assert "4 trials (3 measured to the end) in 30 minutes" in lines[-1] and "on 12 images" in lines[-1]
    assert "measured once more: 6.90x, latent_error 0.021. A, 2 cores." in lines[-1]


def test_what_was_asked_of_it(told: dict[str, Any]) -> None:
    lines = search_tables.claims().splitlines()[2:]
    assert lines == [
        "| 4 trials and the bundle | under 45 minutes | 30 minutes | yes |",
        # `cache` is not within the limits.
        "| shipped recipes within the limits that err more than the chosen, in mean and median | all | 0 of 0 | yes |",
        "| shipped recipes beaten in speed and error at once by one that was found | all | 1 of 1 | yes |",
    ]
    told["first"][0]["beaten_by"] = None
    told["finalists"][0]["within"] = True
    told["run"]["seconds"] = 3000.0
    search_tables.FILE.write_text(json.dumps(told))
    lines = search_tables.claims().splitlines()[2:]
    assert lines[0].endswith("| under 45 minutes | 50 minutes | **no** |")
    assert lines[1].endswith("| all | 1 of 1 | yes |") and lines[2].endswith("| all | 0 of 1, not cache | **no** |")
    told["finalists"][0]["quality"]["latent_rel_l2_median"] = 0.01
    search_tables.FILE.write_text(json.dumps(told))
    assert search_tables.claims().splitlines()[3].endswith("| all | 0 of 1 | **no** |")
