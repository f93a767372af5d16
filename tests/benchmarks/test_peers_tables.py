"""What is told of ours beside the peers, from a few made-up rows; and fronts against the definition."""

import itertools
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.benchmarks import peers, peers_tables, plots, recipe_tables

DDIM, FEW = ("DDIM", 50), ("DPM-Solver++", 12)


def row(contender: str, speed: float | None, model: str = "shapes", **changes: Any) -> dict[str, Any]:
    schedule, steps = changes.pop("on", DDIM)
    made: dict[str, Any] = {
        **dict.fromkeys(peers.KEYS),
        "name": f"{contender}, {schedule}, {steps} steps",
        "contender": contender,
        "model": model,
        "peer": not contender.startswith("diffpress"),
        "schedule": schedule,
        "steps": steps,
        "backend": "a library",
        "speedup_vs_eager": speed,
        "deploys": True,
    }
    if speed is not None:
        made |= {"p50_ms": 100 / speed, "bits_w": 8, "bits_a": 8, "bytes": 7_000_000, "latent_rel_l2": 0.03}
        made |= {"latent_rel_l2_median": 0.02, "seconds": 3.0}
        if model == "shapes":
            made |= {"attribute_accuracy": 0.99, "psnr_db": 45.0, "ssim": 0.9, "images_per_second": 10 * speed}
            made |= {"latent_rel_l2_converged": 0.06, "latent_rel_l2_converged_median": 0.05, "clip_score": 85.0}
            made |= {"frechet": 1.0}
    return made | changes


ROWS = [
    row("diffusers FP32", 1.0, psnr_db=None, latent_rel_l2=0.0, latent_rel_l2_median=0.0),
    row("diffusers FP32", 4.0, on=FEW, psnr_db=40.0),
    row("OpenVINO", 3.0, psnr_db=52.0),
    row("OpenVINO", 11.0, on=FEW, psnr_db=40.0),
    row("reckless", 40.0, on=FEW, psnr_db=20.0, attribute_accuracy=0.7, latent_rel_l2_converged_median=0.9),
    row("absent", None, reason="no matching distribution | none"),
    row("diffpress int8", 9.0, psnr_db=51.0),
    row("diffpress int8", 24.0, on=FEW, psnr_db=41.0, note="linear layers alone"),
    row("diffusers FP32", 1.0, "sd15", latent_rel_l2=0.0),
    row("OpenVINO", 3.0, "sd15"),
    row("reckless", 9.0, "sd15", latent_rel_l2=0.4),
    row("diffpress int8", 5.0, "sd15"),
]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = {
        "machine": {"processor": "a processor", "cores": 2},
        "sampling": {"scheduler": "DDIMScheduler", "steps": 50},
        "images": 7,
        "rows": ROWS,
    }
    (tmp_path / "peers.json").write_text(json.dumps(document))
    monkeypatch.setattr(peers_tables, "RESULTS", tmp_path)


def test_without_calls_nothing_is_said_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [entry for entry in ROWS if entry["model"] == "shapes"]
    document = {
        "machine": {"processor": "a processor", "cores": 2},
        "sampling": {"scheduler": "DDIMScheduler", "steps": 50},
    }
    (tmp_path / "peers.json").write_text(json.dumps({**document, "images": 7, "rows": rows}))
    monkeypatch.setattr(peers_tables, "RESULTS", tmp_path)
    assert "call" not in peers_tables.peers() + peers_tables.claims()
    assert len({line.count("|") for line in peers_tables.peers().splitlines() if line.startswith("|")}) == 1


def test_calls_that_had_a_run_of_their_own_stand_beside_it(written: None, tmp_path: Path) -> None:
    document = json.loads((tmp_path / "peers.json").read_text())
    images, calls = ([one for one in ROWS if (one["model"] == "sd15") is kind] for kind in (False, True))
    (tmp_path / "peers.json").write_text(json.dumps({**document, "rows": images + calls}))
    together = [peers_tables.peers(), peers_tables.peers_all(), peers_tables.claims()]
    (tmp_path / "peers.json").write_text(json.dumps({**document, "rows": images}))
    other = {"machine": {"processor": "another", "cores": 4}, "rows": calls}
    (tmp_path / "peers_sd15.json").write_text(json.dumps(other))
    apart = [peers_tables.peers(), peers_tables.peers_all(), peers_tables.claims()]
    for before, after in zip(together, apart, strict=True):
        (said,) = (line for line in after.splitlines() if line and line not in before.splitlines())
        assert said.startswith("Calls of SD 1.5's size") and said.endswith("had no part in it; another, 4 cores.")
        assert [line for line in after.splitlines() if line not in ("", said)] == list(
            filter(None, before.splitlines())
        )


def test_fronts_are_what_the_definition_says() -> None:
    generator = np.random.default_rng(3)
    for _ in range(200):
        count = int(generator.integers(0, 9))
        points = [(float(x), float(y)) for x, y in generator.integers(0, 4, (count, 2))]  # few values: many ties
        beaten = {
            i
            for i, j in itertools.product(range(count), repeat=2)
            if points[j][0] >= points[i][0] and points[j][1] >= points[i][1] and points[j] != points[i]
        }
        assert plots.pareto(points) == sorted(set(range(count)) - beaten), points


def test_the_table_has_each_contender_once_at_its_fastest_good_row(written: None) -> None:
    lines = peers_tables.peers().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:] if line.startswith("| ")]
    assert [line[0] for line in cells] == ["reckless", "**diffpress int8**", "OpenVINO", "diffusers FP32"]
    assert {len(line) for line in cells} == {11}
    ours = cells[1]
    assert ours[2:6] == ["12 DPM-Solver++", "24.0x", "240.0", "99.0%"] and ours[-2:] == ["5.00x", "0.030"]
    assert any("absent: no matching distribution" in line for line in lines)
    assert "7 images" in lines[-3] and "a processor, 2 cores" in lines[-3]


def test_every_row_is_told_and_has_all_columns(written: None) -> None:
    lines = peers_tables.peers_all().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 2 + len(ROWS) and {line.count("|") for line in table} == {17}
    assert any("absent" in line and "does not run: no matching distribution / none" in line for line in table)
    assert sum("(linear layers alone)" in line for line in table) == 1


def test_claims_say_where_a_peer_is_in_front_and_by_how_much_ours_is_faster(written: None) -> None:
    told = {line.split(" | ")[0].removeprefix("| "): line for line in peers_tables.claims().splitlines()[2:]}
    assert len(told) == 4 + 4
    parts = ("attribute accuracy", "PSNR", "latent error", "error of a call")
    parts += ("any schedule", "50 steps", "12 steps", "error at most")
    by = {part: next(line for what, line in told.items() if part in what) for part in parts}
    assert "reckless (12 DPM-Solver++)" in by["attribute accuracy"] and by["attribute accuracy"].endswith("| **no** |")
    # 52 dB are no better than 51, which is faster; a fast one with few dB stays on the front.
    assert "OpenVINO" not in by["PSNR"] and "reckless" in by["PSNR"]
    assert "diffusers FP32" in by["error of a call"] and "OpenVINO" not in by["error of a call"]
    assert "2.18x: diffpress int8 (12 DPM-Solver++) over OpenVINO (12 DPM-Solver++)" in by["any schedule"]
    assert by["any schedule"].endswith("| yes |") and "3.00x" in by["50 steps"]
    assert "1.67x: diffpress int8 over OpenVINO" in by["error at most"] and by["error at most"].endswith("| **no** |")


def test_recipes_have_the_row_of_their_own_schedule_or_of_all_steps(
    written: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe_tables, "shipped", lambda: {"int8": Path("int8.yaml")})
    found = recipe_tables.reached()
    assert list(found) == ["diffusers FP32", "int8"] and found["int8"]["steps"] == 50
    assert recipe_tables.points(found["int8"]) == pytest.approx(0)
    lines = recipe_tables.presets().splitlines()
    assert len({line.count("|") for line in lines[:-2]}) == 1
    assert lines[3].startswith("| `int8` | a library | 50 | 9.0x |") and lines[4].startswith(
        "| OpenVINO, DPM-Solver++ |"
    )
    told = "9.0x diffusers FP32 (a library), 100% of its denoiser bytes, PSNR 51.0 dB, attributes +0.0 points"
    assert recipe_tables.comment("int8") == f"# On `shapes`: {told}.\n"
    balanced = row("diffpress balanced", 5.0, speedup_vs_uncompressed=2.5, bytes=1_000_000)
    document = peers_tables.data() | {"rows": [*ROWS, balanced]}
    monkeypatch.setattr(peers_tables, "data", lambda: document)
    monkeypatch.setattr(recipe_tables, "shipped", lambda: {"balanced": Path("balanced.yaml")})
    told = recipe_tables.claims()
    assert told.count("| yes |") == 3 and "| 5.0x | **no** |" in told


def test_the_plot_stands_alone_and_names_the_fronts(written: None) -> None:
    text = peers_tables.plot()
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    marks = [mark for mark in root.iter() if mark.find(f"{space}title") is not None]
    assert len(marks) == 7  # the rows of shapes that run
    words = [element.text for element in root.iter(f"{space}text")]
    assert "int8, 12 steps" in words and "peers" in words and "diffpress" in words
    assert len(list(root.iter(f"{space}polyline"))) == 2
    _, _, width, height = (float(part) for part in root.attrib["viewBox"].split())
    for circle in root.iter(f"{space}circle"):
        assert 0 < float(circle.attrib["cx"]) < width and 0 < float(circle.attrib["cy"]) < height


def test_names_of_the_plot_do_not_lie_on_each_other() -> None:
    crowd = [(2.0 + 0.02 * i, 0.05 - 0.0005 * i, f"a rather long name {i}") for i in range(30)]
    root = ElementTree.fromstring(plots.rivals({"peers": crowd, "ours": [(9.0, 0.02, "ours")]}, "x", "y"))
    named = [text for text in root.iter("{http://www.w3.org/2000/svg}text") if text.attrib.get("class") == "name"]
    boxes = [
        (float(t.attrib["x"]), float(t.attrib["y"]), float(t.attrib["x"]) + 4.9 * len(t.text or "")) for t in named
    ]
    assert 2 <= len(named) < 31
    for (left, y, right), (left_b, y_b, right_b) in itertools.combinations(boxes, 2):
        assert right <= left_b or right_b <= left or abs(y - y_b) >= 10.9
