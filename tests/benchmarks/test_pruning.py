"""The table of pruning: its rows are recipes that exist, its numbers come from one file, and a row is made once."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffpress.benchmarks import isolated, pruning, pruning_tables
from diffpress.errors import DiffpressError


def test_rows_are_recipes_and_every_method_has_its_rivals() -> None:
    rows = pruning.table()
    assert next(iter(rows)) == pruning.REFERENCE and rows[pruning.REFERENCE].passes == ()
    for name, row in rows.items():
        row.recipe(name).built()
    for kind in ("10 %", "20 %", "30 %", "2:4", "30 % of weights", "50 % of weights", "70 % of weights"):
        rivals = {name.split(",")[0] for name in rows if name.endswith(f", {kind}")}
        assert {"OBS-Diff", "Wanda"} <= rivals and rivals & {"L1", "magnitude"}, kind
    assert {"OBS-Diff, 20 %, distilled", "uniform, 20 %", "structured 40 %, INT8, cached"} <= set(rows)
    assert 3 < sum(row.quick for row in rows.values()) < 8


def test_rows_that_find_measurements_say_so() -> None:
    shared = pruning.sharing(pruning.table())
    assert {"OBS-Diff, 10 %", "L1, 30 %", "OBS-Diff, 20 %, distilled", "OBS-Diff, 2:4, distilled"} <= shared
    whole = {"fp32", "L1, 20 %", "Wanda, 20 %", "OBS-Diff, 20 %", "OBS-Diff, 2:4", "uniform, 20 %", "INT8, cached"}
    assert not whole & shared


def test_a_row_that_is_there_is_not_made_again_and_one_that_fails_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(json.loads(command[-1]))
        return SimpleNamespace(returncode=int(len(asked) == 1), stdout='a line\n{"params": 5}\n')

    monkeypatch.setattr(isolated, "subprocess", SimpleNamespace(run=run, PIPE=None))
    row = pruning.table()["OBS-Diff, 2:4"]
    with pytest.raises(DiffpressError, match="row 'OBS-Diff, 2:4' ended with 1"):
        pruning.made("OBS-Diff, 2:4", row, tmp_path, 20)
    for _ in range(2):
        found = pruning.made("OBS-Diff, 2:4", row, tmp_path, 20)
        assert found == {"name": "OBS-Diff, 2:4", "group": "2:4", "params": 5}
    assert len(asked) == 2 and asked[1]["recipe"]["passes"] == [{"prune-nm": {"method": "obs"}}]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A made-up document in the file that the tables read."""
    rows = []
    for place, (name, row) in enumerate(pruning.table().items()):
        error = 0.0 if name == pruning.REFERENCE else 0.1 if name.startswith("OBS") else 0.2
        rows.append(
            {"name": name, "group": row.group, "params": 100 - place, "zeros": 0.5 if "weights" in name else 0.0}
            | {"flops": 1000 - place, "bytes": 400e6, "bytes_zipped": 300e6, "call_speedup": 1.2}
            | {"speedup_vs_uncompressed": 1.1, "latent_rel_l2": error, "latent_rel_l2_median": error}
            | {"psnr_db": None if not error else 40.0, "clip_score": 86.0, "frechet": 2.0, "attribute_accuracy": 0.99}
            | {"seconds": 12.3, "seconds_shared": False, "peak_rss_bytes": 7e8}
        )
    sampling = {"steps": 20, "scheduler": "DDIM"}
    document = {"rows": rows, "images": 10, "sampling": sampling, "machine": {"processor": "a processor"}}
    (tmp_path / "pruning.json").write_text(json.dumps(document))
    monkeypatch.setattr(pruning_tables, "RESULTS", tmp_path)
    return rows


def test_tables_have_a_line_for_every_row_and_claims_say_what_was_reached(told: list[dict[str, Any]]) -> None:
    lines = pruning_tables.pruning_all().splitlines()
    assert len(lines) == 2 + len(told) + len({row["group"] for row in told})
    assert len({line.count("|") for line in lines}) == 1
    short = pruning_tables.pruning().splitlines()
    assert short[2].startswith("| 10 % | 0.100 (0.100) | 0.200 (0.200) | 0.200 (0.200) | 99.0% | 400.0 MB | 1.20x")
    claims = {line.split(" | ")[0]: line for line in pruning_tables.claims().splitlines()[2:]}
    assert all(line.endswith("| yes |") for name, line in claims.items() if "rival" in name)
    assert claims["| 20 % of parameters, distilled: bytes"].endswith("| 0% | **no** |")
