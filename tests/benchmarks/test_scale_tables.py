import json
from pathlib import Path

import pytest

from diffpress.benchmarks import scale_tables


def test_stages_add_up_and_engines_are_shares_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {"create": (60, 2e9), "compress": (600, 9e9), "parity": (30, 6e9), "engines": (90, 4e9)}
    rows = [{"model": "sd15", "stage": stage, "seconds": seconds, "peak_rss_bytes": peak}
            for stage, (seconds, peak) in stages.items()]  # fmt: skip
    rows[0]["parameters"] = {"unet": 860e6}
    rows[1] |= {"prompts": 8, "steps": 4}
    for kind, size in (("fp16", 1.8e9), ("int8", 0.9e9)):
        rows.append({"model": "sd15", "stage": f"engine {kind}", "bytes": size, "target": "sm89"})
    rows += [{"model": "sdxl", "stage": "create", "seconds": 1, "peak_rss_bytes": 1}]  # not compressed yet: no line
    (tmp_path / "scale.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(scale_tables, "RESULTS", tmp_path)
    assert scale_tables.scale().splitlines()[2:] == [
        "| Stable Diffusion 1.5, 8 prompts × 4 steps | 860 M | 10.0 min | 0.5 min | 1.5 min | 13.0 min | 9.0 GB |"
    ]
    document = {"rows": rows, "machine": {"processor": "A", "cores": 2}}
    for row in rows[:2]:  # of the other two one names the same processor, one none
        row["machine"] = {"processor": "B", "cores": 2}
    rows[2]["machine"] = {"processor": "A", "cores": 4}
    (tmp_path / "scale.json").write_text(json.dumps(document))
    assert scale_tables.scale().splitlines()[3:] == [
        "", "Measured on A, but Stable Diffusion 1.5 (create, compress) on B."
    ]  # fmt: skip
    for row in rows[:4]:
        row["machine"] = {"processor": "B"}
    (tmp_path / "scale.json").write_text(json.dumps(document))
    assert scale_tables.scale().endswith("|\n\nMeasured on A, but Stable Diffusion 1.5 on B.")
    assert scale_tables.engines().splitlines()[2:] == [
        "| Stable Diffusion 1.5, sm89 | 1800 MB (100%) | 900 MB (50%) | – |"
    ]
    rows.append({"model": "sd15", "stage": "prune", "prompts": 2, "steps": 4, "parameters": 688e6})
    rows[-1] |= {"seconds": 120, "peak_rss_bytes": 11e9}
    (tmp_path / "scale.json").write_text(json.dumps(document))
    assert scale_tables.pruning().splitlines()[2:] == [
        "| Stable Diffusion 1.5, 2 prompts × 4 steps | 860 M | 688 M | 2.0 min | 11.0 GB |"
    ]
