"""The table of steps: rows are recipes that can be read, and what is told of them follows from the numbers."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffpress.benchmarks import steps, steps_tables


def test_every_row_is_a_recipe() -> None:
    rows = steps.table()
    for name, row in rows.items():
        assert row.recipe(name).built(), name
        assert row.passes[0]["schedule"]["steps"] == int(name.split(" steps")[0].split()[-1])
    assert {row.group for row in rows.values()} == {"schedule", "found schedule", "guidance", "INT8, corrected"}
    quick = [name for name, row in rows.items() if row.quick]
    assert 4 <= len(quick) <= 8  # three minutes
    for solver in steps.PLAIN:
        assert sum(name.startswith(f"{solver}, ") and row.group == "schedule" for name, row in rows.items()) >= 9


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A made-up table in which every error is 0.1, to be changed and then told."""
    made: dict[str, Any] = {}
    for name, row in steps.table().items():
        keys = ("latent_rel_l2", "latent_rel_l2_median", "latent_rel_l2_converged", "latent_rel_l2_converged_median")
        count = row.passes[0]["schedule"]["steps"]
        made[name] = {"name": name, "group": row.group, "steps": count, "evaluations": float(count)}
        made[name] |= dict.fromkeys(keys, 0.1)
        made[name] |= {"psnr_db": 40.0, "clip_score": None, "frechet": None, "attribute_accuracy": 0.9}
        made[name] |= {"speedup_vs_eager": 2.0}
    document = {
        "machine": {"processor": "x", "cores": 2},
        "backend": "openvino fp32",
        "images": 4,
        "sampling": {"guidance": 2.0, "steps": 50, "scheduler": "DDIMScheduler"},
    }

    class Told(dict[str, Any]):
        def tell(self) -> None:
            (tmp_path / "steps.json").write_text(json.dumps({**document, "rows": list(self.values())}))

    monkeypatch.setattr(steps_tables, "RESULTS", tmp_path)
    return Told(made)


def test_claims_compare_with_the_best_plain_schedule_of_the_same_solver(rows: Any) -> None:
    rows["DPM-Solver++, Karras, 8 steps"]["latent_rel_l2_converged"] = 0.08
    rows["DPM-Solver++, descent, 8 steps"]["latent_rel_l2_converged"] = 0.056
    rows["UniPC, Karras, 8 steps"]["latent_rel_l2_converged"] = 0.01  # another solver's
    rows["DPM-Solver++, GITS, 10 steps"]["latent_rel_l2_converged_median"] = 0.2
    rows.tell()
    claims = steps_tables.steps_claims().splitlines()
    wanted = "| DPM-Solver++, descent, 8 steps: mean error of DPM-Solver++, Karras | at most 75 % | 70% | yes |"
    assert wanted in claims
    assert any(line.startswith("| UniPC, descent, 8 steps: mean error of UniPC, Karras") for line in claims)
    assert "| GITS, 10 steps: median error against uniform | lower | 0.200 : 0.100 | **no** |" in claims


def test_tables_and_plot_hold_every_schedule(rows: Any) -> None:
    rows["DDIM, 8 steps"]["latent_rel_l2_converged_median"] = 0.321
    rows.tell()
    told = steps_tables.steps()
    assert "| DDIM | 0.321 (0.100) |" in told and "| DPM-Solver++, GITS | 0.100 (0.100) |" in told
    every = steps_tables.steps_all().splitlines()
    assert {line.split(" |")[0].removeprefix("| ") for line in every} >= rows.keys()
    assert "| INT8, corrected, 10 steps |" in steps_tables.corrections()
    assert "| guidance: 9 steps | 9 |" in steps_tables.guidance()
    plot = steps_tables.plot()
    assert plot.startswith("<svg xmlns") and plot.count("<polyline") == len(steps_tables.DRAWN)
    assert "UniPC, Karras, 50: 0.1" in plot
