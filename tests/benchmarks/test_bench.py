import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffpress import bundle as bundles
from diffpress.benchmarks import bench as module
from diffpress.benchmarks import ceilings, document, drawing, memory, plain, prompts, roofline
from diffpress.benchmarks.bench import bench
from diffpress.benchmarks.candidates import Reference
from diffpress.benchmarks.networks import Networks
from diffpress.benchmarks.shapes.models import SCHEDULER
from diffpress.bundle import Bundle
from diffpress.compress import recipe as recipes
from diffpress.errors import DiffpressError

LATENCY = {"p50_ms", "p90_ms", "p99_ms", "runs"}


@pytest.fixture
def opened(handmade: Bundle, tiny_pipeline: Path) -> Bundle:
    """The handmade bundle, said to be made from the tiny pipeline."""
    from diffpress.calibration.model import digest

    model = {"source": "tiny", "class": "StableDiffusionPipeline", "digest": digest(str(tiny_pipeline))}
    scheduler = {"class": "DDIMScheduler", "config": SCHEDULER}
    return bundles.update(handmade, model=model, scheduler=scheduler)


@pytest.fixture
def export(opened: Bundle, tmp_path: Path) -> Path:
    """Stands for the export without compression."""
    folder = tmp_path / "export"
    shutil.copytree(opened.path, folder)
    bundles.update(bundles.read(folder), passes=[])
    return folder


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, fake_candidate: Callable[..., Any]) -> Iterator[list[tuple[Any, ...]]]:
    """Fakes what draws; collects what was opened."""
    from diffpress.runtime import backends
    from diffpress.runtime.pipeline import Pipeline

    asked: list[tuple[Any, ...]] = []

    def load(source: Bundle, backend: str, precision: str, sampling: Any = None) -> Any:
        steps = 6 if sampling is None else sampling.steps
        asked.append((source.path.name, backend, precision, steps))
        error = 0.1 if source.path.name == "bundle" else 0.0
        return fake_candidate(error=error, shift=int(50 * error), steps=steps)

    monkeypatch.setattr(backends, "available", lambda: [("openvino", "bf16")])
    monkeypatch.setattr(Pipeline, "load", load)
    monkeypatch.setattr(Reference, "load", lambda model, sampling, *_: fake_candidate(steps=sampling.steps))

    def measured(candidates: dict[str, Bundle], pairs: dict[str, Any], quiet: bool) -> dict[str, Any]:
        asked.append(({name: one.path.name for name, one in candidates.items()}, pairs))
        return {"ceilings": {}, "graphs": [], "images": []}

    trials = [plain.Trial(4, 9.0, 0.9), plain.Trial(5, 11.0, 1.1)]
    monkeypatch.setattr(plain, "compare", lambda timings, pipelines, open_timed, *_: open_timed(4) and trials)
    parts = {"import": 1.0, "load": 2.0, "first_image": 4.0}
    monkeypatch.setattr(memory, "fresh", lambda task: memory.Fresh(1000 + ("against" in task), None, parts))
    monkeypatch.setattr(roofline, "measure", measured)
    yield asked


def check_keys(report: dict[str, Any]) -> None:
    """What the issue promises to later checks."""
    for name in ("reference_eager", "uncompressed_export", "compressed"):
        assert set(report["latency"][name]) == LATENCY
        assert report["peak_rss_bytes"][name] > 0
        assert report["cold_start_ms"][name] > 0 and report["peak_device_bytes"][name] is None
        assert report["cold_start_ms"][name] == pytest.approx(sum(report["cold_start_parts_ms"][name].values()))
        assert [set(row) for row in report["stage_latency"][name].values()] == [LATENCY] * 3
        assert [set(row) for row in report["step_latency"][name]] == [LATENCY] * len(report["steps_ms"][name])
        assert report["size_bytes"]["by_candidate"][name] > 0
    assert set(report["speedup"]) == {"vs_eager", "vs_eager_same_schedule", "vs_uncompressed_export"}
    assert set(report["speedup_interval"]) == set(report["speedup"])
    for name, ratio in report["speedup"].items():
        low, high = report["speedup_interval"][name]
        assert low <= ratio <= high
    assert [row["batch"] for row in report["throughput"]] == [1, 2, 4, 8]
    assert set(report["metrics"]) == {"lpips", "clip_score", "frechet"}
    assert report["roofline"].keys() >= {"ceilings", "graphs", "images"}
    assert report["size_bytes"].keys() >= {"denoiser_reference", "denoiser_compressed", "bundle"}
    assert report["quality"].keys() >= {"images", "psnr_db", "ssim", "latent_rel_l2"}
    for name in ("clip_score", "attribute_accuracy", "frechet"):
        assert set(report["quality"][name]) == {"reference", "compressed"}
    assert report["fewer_plain_steps"].keys() >= {"steps", "latency_ms", "psnr_db", "attribute_accuracy", "schedule"}
    if report["quality"]["images"] > 1 and not report["faults"]:
        for name in ("psnr_db", "ssim", "latent_rel_l2"):
            low, high = report["quality_interval"][name]
            assert low <= report["quality"][name] + 1e-9 and report["quality"][name] <= high + 1e-9
    assert report.keys() >= {"sampling", "machine", "versions", "per_step", "stages_ms", "steps_ms", "backends_tried"}
    json.dumps(report, allow_nan=False)


def test_report_lands_in_the_bundle(
    opened: Bundle, export: Path, tiny_pipeline: Path, tmp_path: Path, faked: list[Any]
) -> None:
    file = tmp_path / "numbers.json"
    report = bench(opened.path, str(tiny_pipeline), images=5, json_file=file, quiet=True, uncompressed=export)
    check_keys(report)
    assert report["quality"]["images"] == 5
    assert report["quality"]["latent_rel_l2"] == pytest.approx(0.1)
    assert report["per_step"]["latent_rel_l2"]["compressed"] == pytest.approx([0.1] * 6)
    assert report["per_step"]["latent_rel_l2"]["uncompressed_export"] == pytest.approx([0.0] * 6)
    assert report["fewer_plain_steps"]["psnr_db"] == pytest.approx(100)
    assert (report["fewer_plain_steps"]["steps"], report["fewer_plain_steps"]["latency_ms"]) == (4, 9.0)
    assert report["same_precision"]["precision"] == "bf16"
    assert report["metrics"]["lpips"]["note"] and report["quality"]["lpips"] is None
    where = {"compressed": "bundle", "uncompressed_export": "export"}
    pairs = {"compressed": [("openvino", "bf16")], "uncompressed_export": [("openvino", "fp32"), ("openvino", "bf16")]}
    assert (where, pairs) in faked
    texts = prompts.choose(5, shapes=False).texts
    assert not drawing.folder_of(opened, texts).exists()  # what an interrupted bench would have gone on with
    assert report["program"]["marks"] == "#--#--"
    assert json.loads(file.read_text()) == report
    assert (report["gates"], report["passed"]) == ([], True)
    assert set(report["prompts"]) == {"source", "count", "seeds", "digest"}
    # The plain rival runs in the compressed bundle's precision, the export of the table in FP32.
    assert ("export", "openvino", "fp32", 6) in faked and ("export", "openvino", "bf16", 4) in faked
    again = bundles.load(opened.path)
    assert json.loads(again.file("report/report.json").read_text()) == report
    assert "data:image/png" in again.file("report/report.html").read_text()
    assert "base_model: " in again.file("report/README.md").read_text()
    by_name = {row["name"]: row for row in report["candidates"]}
    assert by_name["compressed"]["psnr_db"] == pytest.approx(20 * math.log10(255 / 5))
    assert by_name["uncompressed_export"]["images"] == by_name["trial"]["images"] == 5
    assert {row["steps"] for row in report["candidates"]} == {None, 4, 5}  # the rival and what was tried on the way
    assert sum(row["name"] == "fewer_plain_steps" for row in report["candidates"]) == 1
    assert [row["image"] for row in report["pictures"]] == list(range(5))
    assert report["pictures"][0]["psnr_db"] == pytest.approx(20 * math.log10(255 / 5))
    assert again.manifest["default_backend"] == {"name": "openvino", "precision": "bf16"}
    assert set(again.manifest["measured"]) == {"latency", "speedup", "quality"}
    assert not again.manifest.keys() & {"gates", "failed"}
    # Once more: the report is replaced, the bundle stays whole and does not grow by it.
    second = bench(opened.path, str(tiny_pipeline), images=2, quiet=True, uncompressed=export)
    assert second["size_bytes"]["folders"].keys() == report["size_bytes"]["folders"].keys()
    assert bundles.problems(bundles.read(opened.path)) == []


def test_broken_images_are_reported_not_raised(
    opened: Bundle,
    export: Path,
    tiny_pipeline: Path,
    faked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    fake_candidate: Callable[..., Any],
) -> None:
    from diffpress.runtime.pipeline import Pipeline

    def load(source: Bundle, backend: str, precision: str, sampling: Any = None) -> Any:
        steps = 6 if sampling is None else sampling.steps
        broken = fake_candidate(error=math.nan if source.path.name == "bundle" else 0, steps=steps)
        return broken

    monkeypatch.setattr(Pipeline, "load", load)
    report = bench(opened.path, str(tiny_pipeline), images=2, quiet=True, uncompressed=export)
    assert report["faults"][0] == "compressed, image 0: latents are NaN or infinite"
    assert report["quality"]["latent_rel_l2"] is None
    assert "images are broken" in (opened.path / "report" / "report.html").read_text()


def test_an_interrupted_bench_draws_what_it_lacks(
    opened: Bundle,
    export: Path,
    tiny_pipeline: Path,
    faked: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_candidate: Callable[..., Any],
) -> None:
    file = tmp_path / "own.txt"
    file.write_text("\n".join(f"prompt {index}" for index in range(40)))
    texts = prompts.choose(None, False, file).texts
    folder, drawn = drawing.folder_of(opened, texts), []
    make = fake_candidate(steps=6)

    def load(model: str, sampling: Any, *_: Any) -> Any:
        def draw(prompts: list[str], seeds: list[int], *, keep_latents: bool = False) -> Any:
            if keep_latents and len(seeds) == 16 and seeds[0] == 16 and not drawn:
                drawn.append("stopped")
                raise KeyboardInterrupt
            drawn.extend(seeds if keep_latents and drawn else [])
            return make(prompts, seeds, keep_latents=keep_latents)

        return draw

    monkeypatch.setattr(Reference, "load", load)
    monkeypatch.setattr(plain, "compare", lambda *_: [plain.Trial(1, 20.0, 2.0)])  # no rival, which draws, too
    arguments: dict[str, Any] = {"prompts_file": file, "quiet": True, "uncompressed": export}
    with pytest.raises(KeyboardInterrupt):
        bench(opened.path, str(tiny_pipeline), **arguments)
    assert [path.name for path in folder.glob("reference_eager-*/*")] == ["000000.npz"]
    report = bench(opened.path, str(tiny_pipeline), save_images=tmp_path / "images", **arguments)
    assert drawn == ["stopped", *range(16, 40)]  # not the first 16 again
    assert report["quality"]["images"] == 40 and report["per_step"]["images"] == 16 and not folder.exists()
    assert report["reproduce"][1].endswith(f"--images 40 --prompts {file}")
    lines = (tmp_path / "images" / "prompts.jsonl").read_text().splitlines()
    assert len(lines) == 40 and json.loads(lines[39])["files"]["compressed"] == "compressed/00039.png"
    assert len(list((tmp_path / "images").rglob("*.png"))) == 40 + 40 + 16 + 16  # of exports few
    with pytest.raises(DiffpressError, match="not an empty folder"):
        bench(opened.path, str(tiny_pipeline), save_images=tmp_path / "images", **arguments)


def test_networks_that_are_given_judge(opened: Bundle, export: Path, tiny_pipeline: Path, faked: list[Any]) -> None:
    lpips: Any = SimpleNamespace(distances=lambda a, b: np.linspace(0.1, 0.3, len(a)))
    clip: Any = SimpleNamespace(scores=lambda pixels, texts: pixels.mean(axis=(1, 2, 3)))
    given = Networks(lpips=lpips, clip=clip, paths={"lpips": Path("a.pth"), "clip_score": Path("clip")})
    report = bench(opened.path, str(tiny_pipeline), 3, quiet=True, uncompressed=export, networks=given)
    check_keys(report)
    assert report["quality"]["lpips"] == report["fewer_plain_steps"]["lpips"] == pytest.approx(0.2)
    low, high = report["quality_interval"]["lpips"]
    assert 0.1 <= low < 0.2 < high <= 0.3
    score = report["quality"]["clip_score"]
    assert score["compressed"] == pytest.approx(score["reference"] + 5)
    assert report["quality_interval"]["clip_score"]["change"] == pytest.approx([5, 5])
    assert report["metrics"]["lpips"] == {"by": "a.pth", "note": None} and report["metrics"]["frechet"]["note"]
    assert report["reproduce"][1].endswith("--images 3 --lpips-weights a.pth --clip-model clip")


def test_an_interrupted_bench_leaves_the_bundle_as_it_was(
    opened: Bundle, export: Path, tiny_pipeline: Path, faked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> str:
        raise KeyboardInterrupt

    before = sorted(opened.path.rglob("*"))
    monkeypatch.setattr(module.report, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench(opened.path, str(tiny_pipeline), images=1, quiet=True, uncompressed=export)
    assert sorted(opened.path.rglob("*")) == before
    assert bundles.problems(bundles.read(opened.path)) == []


def test_a_failed_gate_marks_the_bundle_until_all_pass(
    opened: Bundle, export: Path, tiny_pipeline: Path, tmp_path: Path, faked: list[Any]
) -> None:
    def judged(*gates: str) -> dict[str, Any]:
        fields = {"uncompressed": export, "json_file": tmp_path / "numbers.json", "gates": gates}
        report = bench(opened.path, str(tiny_pipeline), images=2, quiet=True, **fields)
        assert json.loads((tmp_path / "numbers.json").read_text()) == report
        return report

    opened = bundles.update(opened, recipe={"name": "mine", "gates": ["latent_error <= 0.2"]})
    report = judged("latent_error < 0.05", "attribute_accuracy >= -1pt")
    assert [entry["passed"] for entry in report["gates"]] == [True, False, False] and report["passed"] is False
    assert report["gates"][1]["measured"] == pytest.approx(0.1)
    assert report["gates"][2]["problem"].startswith("not measured")
    assert report["reproduce"][1].endswith(
        "--gate 'latent_error <= 0.2' --gate 'latent_error < 0.05' --gate 'attribute_accuracy >= -1pt'"
    )
    marked = bundles.load(opened.path)  # whole, and runnable
    assert marked.manifest["failed"] is True and marked.manifest["gates"] == report["gates"]
    assert "2 of 3 gates failed" in marked.file("report/report.html").read_text()
    assert judged()["passed"] is True  # the recipe's own
    assert bundles.load(opened.path).manifest["failed"] is False
    judged("latent_error < 0.05")
    bundles.update(bundles.read(opened.path), recipe={"name": "none"})
    judged()  # nothing was asked, so nothing is known
    assert bundles.load(opened.path).manifest["failed"] is True


def test_a_gate_that_is_none_is_refused_before_work(
    opened: Bundle, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.timing, "measure", lambda *_: pytest.fail("work was started"))
    with pytest.raises(DiffpressError, match="nothing measures 'grace'"):
        bench(opened.path, str(tiny_pipeline), images=2, gates=["grace > 1"])


def test_there_may_be_no_rival(
    opened: Bundle, export: Path, tiny_pipeline: Path, faked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "compare", lambda *_: [plain.Trial(1, 20.0, 2.0)])
    report = bench(opened.path, str(tiny_pipeline), images=1, quiet=True, uncompressed=export)
    check_keys(report)
    row = report["fewer_plain_steps"]
    assert row["steps"] is row["psnr_db"] is row["attribute_accuracy"] is None and row["trials"][0]["ratio"] == 2.0


def test_without_a_folder_the_export_is_made_and_thrown_away(
    opened: Bundle, export: Path, tiny_pipeline: Path, faked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffpress import api

    made: list[Path] = []

    def compress(model: str, recipe: str, output: Path, *, steps: int, loras: Any, quiet: bool) -> Bundle:
        assert (model, recipe, steps, loras, quiet) == (str(tiny_pipeline), "fp32", 6, (), True)
        made.append(Path(output))
        return Bundle(Path(shutil.copytree(export, output)), bundles.read(export).manifest)

    monkeypatch.setattr(api, "compress", compress)
    bench(opened.path, str(tiny_pipeline), images=1, quiet=True)
    assert len(made) == 1 and not made[0].exists()


def test_bad_input(opened: Bundle, export: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    against = str(tiny_pipeline)
    with pytest.raises(DiffpressError, match="at least 1"):
        bench(opened.path, against, images=0)
    with pytest.raises(DiffpressError, match="no model at"):
        bench(opened.path, str(tmp_path / "nowhere"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text("{}")
    with pytest.raises(DiffpressError, match=r"made from 'tiny'.*not "):
        bench(opened.path, str(tmp_path / "other"))
    with pytest.raises(DiffpressError, match="is compressed"):
        bench(opened.path, against, images=1, uncompressed=opened.path)
    opened.file("tokenizer/merges.txt").write_text("changed")
    with pytest.raises(DiffpressError, match=r"damaged.*merges"):
        bench(opened.path, against, images=1)


def test_commands_can_be_typed() -> None:
    preset = json.loads(json.dumps(recipes.as_json(recipes.load("int8"))))
    manifest = {"recipe": preset, "sampling": {"steps": 20}, "seed": 3}
    given = {"--prompts": Path("my words.txt")}
    compress, judged = document.commands(Path("my bundle"), "a/b", 60, manifest, given, ["clip >= -1%"])
    assert compress == "diffpress compress a/b --recipe int8 --steps 20 --seed 3 --output 'my bundle'"
    options = "--images 60 --prompts 'my words.txt' --gate 'clip >= -1%'"
    assert judged == f"diffpress bench 'my bundle' --against a/b {options}"


def test_a_recipe_of_ones_own_is_the_one_in_the_report(tmp_path: Path) -> None:
    """What stands in the report as `recipe_in_full` loads as the recipe that it was, also under a preset's name."""
    written = tmp_path / "mine.yaml"
    written.write_text("name: int8\npasses:\n  - quantize: {format: int8, range: l2.4}\n")
    recipe = json.loads(json.dumps(recipes.as_json(recipes.load(str(written)))))
    compress, _ = document.commands(Path("b"), "a/b", 60, {"recipe": recipe, "sampling": {"steps": 20}})
    assert "--recipe recipe.yaml" in compress
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe, indent=2))
    assert json.loads(json.dumps(recipes.as_json(recipes.load(str(tmp_path / "recipe.yaml"))))) == recipe


def test_null_stands_for_what_json_does_not_know() -> None:
    assert document.finite({"a": [1.0, math.nan], "b": (math.inf, "x", True)}) == {
        "a": [1.0, None],
        "b": [None, "x", True],
    }


def test_a_real_bundle_draws_what_diffusers_draws(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing faked: export without compression, judged against itself; the backend's rounding is all that differs."""
    from diffpress import api

    pytest.importorskip("openvino")
    sizes = partial(ceilings.measure, size=128, moved=(1 << 18, 1 << 22), rounds=2)
    monkeypatch.setattr(ceilings, "measure", sizes)
    monkeypatch.setattr(memory, "STARTS", 1)
    made = api.compress(str(tiny_pipeline), "fp32", tmp_path / "bundle", steps=3, quiet=True)
    shutil.copytree(made.path, tmp_path / "plain")
    report = bench(made.path, str(tiny_pipeline), images=3, quiet=True, uncompressed=tmp_path / "plain")
    check_keys(report)
    assert max(report["per_step"]["latent_rel_l2"]["uncompressed_export"]) < 1e-4
    assert report["quality"]["psnr_db"] > 35 and report["faults"] == []
    assert all("p50_ms" in entry for entry in report["backends_tried"])
    assert report["peak_rss_bytes"]["reference_eager"] > report["peak_rss_bytes"]["compressed"] > 20_000_000
    assert np.isfinite(report["speedup"]["vs_eager"])
    assert not any(row["refused"] for row in report["throughput"])
    for row in report["roofline"]["graphs"]:
        assert row["reason"] is None and row["operations"] > 1e6 and row["measured_seconds"] > 0, row
    backends = {(row["backend"], row["precision"]) for row in report["roofline"]["images"]}
    assert backends >= {(entry["backend"], entry["precision"]) for entry in report["backends_tried"]}
    trials = report["fewer_plain_steps"]["trials"]
    assert trials and report["fewer_plain_steps"]["schedule"] in plain.RIVALS
