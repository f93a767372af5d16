import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from diffpress import bundle as bundles
from diffpress.benchmarks import compare_page
from diffpress.benchmarks.compare import as_json, as_text, compare, rows
from diffpress.benchmarks.gates import judge
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError
from diffpress.gates import parse


class Pair:
    """Two reports of one model; change the second, then write both."""

    def __init__(self, folder: Path, report: dict[str, Any]) -> None:
        self.folder, self.first, self.second = folder, report, copy.deepcopy(report)
        report["model"]["digest"] = self.second["model"]["digest"] = "a" * 64
        self.second |= {"bundle": "fast", "recipe": "fast"}
        self.second["speedup"] = {"vs_eager": 14.0, "vs_uncompressed_export": 5.0}
        self.second["quality"]["latent_rel_l2"] = 0.3

    def compared(self) -> dict[str, Any]:
        """What `compare` says of the two."""
        return compare(self.files())

    def files(self) -> list[str]:
        files = [self.folder / "a.json", self.folder / "b.json"]
        for file, report in zip(files, (self.first, self.second), strict=True):
            file.write_text(json.dumps(report))
        return [str(file) for file in files]


@pytest.fixture
def pair(tmp_path: Path, made_up_report: dict[str, Any]) -> Pair:
    return Pair(tmp_path, made_up_report)


def test_two_runs_stand_side_by_side(pair: Pair) -> None:
    pair.second["speedup_interval"] = {"vs_eager": [13.5, 14.6], "vs_uncompressed_export": None}
    pair.second["quality_interval"] = {"psnr_db": [29.0, 31.0], "clip_score": {"compressed": [30.0, 31.5]}}
    pair.second |= judge(pair.second, [parse("speedup >= 20"), parse("ssim >= 0.9")])
    document = pair.compared()
    found = dict(rows(document))
    assert document["same_machine"] is True
    assert [run["name"] for run in document["runs"]] == ["balanced", "fast"]
    assert found["faster than diffusers"] == ["7.00x", "14.00x [13.50, 14.60]"]
    assert found["than the plain export"] == ["2.50x", "5.00x"]
    assert found["steps"] == ["DDIMScheduler, 4 steps, 2 in full"] * 2
    assert found["latency, p50"] == ["100 ms", "100 ms"]
    assert found["denoiser"] == ["5.0 MB (25% of FP32)"] * 2
    assert found["PSNR, dB"] == ["30.0", "30.0 [29.0, 31.0]"]
    assert found["CLIP score"] == ["30.90 (-0.32%)", "30.90 [30.00, 31.50] (-0.32%)"]
    assert found["attributes"] == ["98.5% (-0.5 pt)"] * 2
    assert found["plain steps as fast"] == ["15 DPM-Solver++ Karras, 26.0 dB"] * 2
    assert found["gates"] == ["–", "1 of 2 failed"]
    assert "LPIPS" not in found and "machine" not in found  # nobody has the one, all have the same other
    text = as_text(document)
    assert "fast failed: speedup >= 20 (measured 14)." in text and "95 %" in text
    lines = text.splitlines()
    assert lines[0] == "shapes against DDIMScheduler, 4 steps, 20 images (held-out captions of shapes)"
    column = lines[2].index("fast")
    assert all(line[column - 1] == " " != line[column] for line in lines[2 : 3 + len(found)])


def test_times_of_different_machines_are_not_shown(pair: Pair) -> None:
    pair.second["machine"]["cores"] = 64
    pair.second["latency"]["compressed"]["p50_ms"] = 31.234
    pair.second |= judge(pair.second, [parse("p50_ms <= 20"), parse("p50_ms <= 0.01x")])
    document = pair.compared()
    assert document["same_machine"] is False and "The machines differ" in document["notes"][0]
    found = dict(rows(document))
    assert found["machine"] == ["a processor, 2 cores", "a processor, 64 cores"]
    assert found["faster than diffusers"] == ["7.00x", "14.00x"]
    for shown in (as_text(document), compare_page.render(document)):
        assert " ms" not in shown and "31.2" not in shown
    assert "31.2" not in as_json(document) and '"latency"' not in as_json(document)
    assert "p50_ms <= 20 (a time of its own machine); p50_ms <= 0.01x (measured 0.04462x)" in as_text(document)


def test_the_data_is_the_document(pair: Pair) -> None:
    document = pair.compared()
    assert json.loads(as_json(document)) == document
    assert document["model"]["digest"] == "a" * 64 and document["prompts"]["count"] == 20
    assert document["runs"][1]["latency"]["compressed"]["p50_ms"] == 100.0
    assert "latency_ms" not in document["runs"][0]["fewer_plain_steps"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"digest": "b" * 64}}, r"b\.json was made from 'shapes' \(digest bbbbbbbb\), .*a\.json was"),
        ({"model": {"lora": [{"file": "ink.safetensors"}]}}, "with ink.safetensors"),
        ({"prompts": {"count": 60}}, "judged on 60 images .*--images"),
        ({"prompts": {"seeds": "5..24"}}, r"seeds 5\.\.24"),
        ({"prompts": {"source": "mine.txt"}}, r"20 images \(mine.txt"),
        ({"sampling": {"guidance_scale": 7.5}}, "held against DDIMScheduler, 4 steps, guidance 7.5"),
        ({"sampling": {"steps": 8}}, "8 steps.*--steps"),
    ],
)
def test_what_cannot_be_compared_is_refused(pair: Pair, change: dict[str, Any], message: str) -> None:
    for key, entries in change.items():
        pair.second[key] |= entries
    with pytest.raises(DiffpressError, match=message) as caught:
        pair.compared()
    assert "\n" not in str(caught.value)


def test_only_the_references_schedule_must_agree(pair: Pair) -> None:
    pair.second["reference"] = dict(pair.second["sampling"])
    pair.second["sampling"] |= {"scheduler": "UniPCMultistepScheduler", "steps": 10}
    assert dict(rows(pair.compared()))["steps"][1].startswith("UniPCMultistepScheduler, 10 steps")
    pair.second["reference"] |= {"steps": 10}
    with pytest.raises(DiffpressError, match="held against"):
        pair.compared()


def test_the_digest_of_prompts_decides_where_both_have_one(pair: Pair) -> None:
    pair.first["prompts"] |= {"digest": "1" * 64, "source": "here.txt"}
    pair.second["prompts"] |= {"digest": "1" * 64, "source": "there.txt"}
    pair.compared()
    pair.second["prompts"] |= {"digest": "2" * 64, "source": "here.txt"}
    with pytest.raises(DiffpressError, match="digest 22222222"):
        pair.compared()


def test_bundles_and_files_may_be_mixed(pair: Pair, handmade: Bundle) -> None:
    folder = handmade.file("report")
    folder.mkdir()
    with pytest.raises(DiffpressError, match="was not measured yet: diffpress bench"):
        compare([str(handmade.path), *pair.files()])
    (folder / "report.json").write_text(json.dumps(pair.second | {"bundle": "bundle"}))
    bundles.update(handmade)
    names = [run["name"] for run in compare([*pair.files(), str(handmade.path)])["runs"]]
    assert names == ["balanced", "fast", "bundle"]
    (folder / "report.json").write_text(json.dumps(pair.second | {"bundle": "better"}))
    with pytest.raises(DiffpressError, match=r"report\.json has changed since"):
        compare([str(handmade.path), *pair.files()])


def test_equal_names_are_told_apart_by_their_places(pair: Pair) -> None:
    pair.second["bundle"] = pair.first["bundle"]
    assert [run["name"] for run in pair.compared()["runs"]] == pair.files()


def test_what_is_no_report_is_refused(pair: Pair, tmp_path: Path) -> None:
    first, second = pair.files()
    table = Path(__file__).parents[2] / "benchmarks/results/steps.json"
    (tmp_path / "text").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    for other, message in (
        (tmp_path / "nowhere", "neither a bundle nor a report"),
        (tmp_path / "text", "it is not JSON"),
        (tmp_path / "list.json", "not a report of 'diffpress bench'"),
        (table, "it has no bundle"),
        (tmp_path, "it has no diffpress.json"),
        (first, "each named once"),
    ):
        with pytest.raises(DiffpressError, match=message):
            compare([first, str(other)])
    with pytest.raises(DiffpressError, match="two runs or more"):
        compare([second])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("program", {}, "KeyError('marks')"), ("quality", None, "AttributeError"), ("prompts", [], "AttributeError")],
)
def test_what_is_missing_inside_a_report_is_refused(pair: Pair, key: str, value: Any, message: str) -> None:
    pair.second[key] = value
    with pytest.raises(DiffpressError, match=rf"one of the reports is not whole \({re.escape(message)}.*bench"):
        pair.compared()


def test_versions_that_differ_and_broken_images_are_noted(pair: Pair) -> None:
    pair.second["versions"] = {"diffpress": "0.1.0", "openvino": "2027.0"}
    pair.second["faults"] = ["compressed, image 1: constant"]
    notes = pair.compared()["notes"]
    assert notes == ["Versions differ: openvino (2026.4.1, 2027.0).", "fast: images are broken, see its report."]


def test_the_page_is_whole_and_loads_nothing(pair: Pair) -> None:
    pair.second["bundle"] = "<fast> & good"
    page = compare_page.render(pair.compared())
    assert "&lt;fast&gt; &amp; good" in page and "<fast>" not in page
    assert "<script" not in page and "@import" not in page and "url(" not in page
    assert not re.search(r'(src|href)="', page) and "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "prefers-color-scheme: dark" in page and "--compressed:" in page  # the report's own style
    for tag in ("main", "table", "svg", "style", "figure", "body"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>") > 0, tag
    assert page.count("<title>balanced, 7: 0.1</title>") == 1
    assert page.count("<title>&lt;fast&gt; &amp; good, 14: 0.3</title>") == 1


def test_runs_without_an_error_are_not_drawn(pair: Pair) -> None:
    pair.second["quality"]["latent_rel_l2"] = None  # broken images
    page = compare_page.render(pair.compared())
    assert "balanced, 7: 0.1" in page and ", 14:" not in page
    pair.first["quality"]["latent_rel_l2"] = 0.0  # equal images: no place on a logarithmic scale
    assert "<svg" not in compare_page.render(pair.compared())
