import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffpress import bundle, inspection
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError


def edit(opened: Bundle, **changes: Any) -> None:
    """Change the manifest by hand."""
    (opened.path / bundle.MANIFEST).write_text(json.dumps({**opened.manifest, **changes}))


def test_the_data_says_what_the_bundle_holds(handmade: Bundle) -> None:
    seen = inspection.inspect(handmade.path)
    assert json.loads(json.dumps(seen)) == seen
    assert seen["problems"] == [] and seen["unlisted"] == []
    assert set(seen["files"].values()) == {"OK"} and seen["files"].keys() == handmade.manifest["files"].keys()
    assert seen["program"]["marks"] == "#--#--"
    assert seen["program"]["variants"]["cached"] == {
        "graph": "unet/cached.onnx",
        "calls": 4,
        "reads": ["feature_0"],
        "writes": [],
    }
    assert seen["quantization"] == {"layers": 2, "formats": {"int8": 2}}
    assert seen["sampling"]["steps"] == 6 and seen["sampling"]["calls"] == 6
    sizes = seen["sizes"]
    assert sizes["groups"]["unet"] == sum(path.stat().st_size for path in handmade.file("unet").iterdir())
    assert sizes["bundle"] == sum(sizes["groups"].values())
    assert sizes["bundle"] == sum(path.stat().st_size for path in handmade.path.rglob("*") if path.is_file())


def test_the_text_shows_it_all(handmade: Bundle) -> None:
    engine = {"target": "sm89", "path": "engines/sm89/full.engine", "precision": "int8+fp32", "bytes": 1_500_000}
    measured = {
        "latency": {"compressed": {"p50_ms": 101.26, "p90_ms": 120.0, "p99_ms": 130.0, "runs": 5}},
        "speedup": {"vs_eager": 6.123456, "vs_uncompressed_export": 2.0},
        "quality": {
            "images": 200,
            "psnr_db": 31.4159,
            "clip_score": {"reference": 0.31, "compressed": 0.3},
            "frechet": {"reference": None},
        },
    }
    opened = bundle.update(
        handmade, engines=[engine], measured=measured, default_backend={"name": "openvino", "precision": "bf16"}
    )
    text = inspection.as_text(inspection.inspect(opened.path))
    for part in (
        "by hand (StableDiffusionPipeline",
        "balanced, seed 0",
        "quantize: 2 layers to int8 (1.2 s)",
        "cache: 4 of 6 steps reuse features (0.5 s)",
        "DDIMScheduler, 6 steps, guidance 3, 32x32 pixels",
        "#--#--  1-6",
        "- cached: unet/cached.onnx, 4 calls; reads feature_0",
        "2 layers (2 int8)",
        "40.0 kB as FP32 weights, 11.0 kB here (28%)",
        "p50 101.3 p90 120.0 p99 130.0 ms",
        "6.123x",
        "31.42",
        "reference 0.31, compressed 0.3",
        "frechet              not measured",
        "openvino bf16",
        "engines/sm89/full.engine, int8+fp32, 1.5 MB",
        "unet/model.onnx: 1.0e-06 from torch (at most 1e-03)",
        "OK  unet/cached.onnx",
        f"all {len(opened.manifest['files'])} files are whole",
    ):
        assert part in text, part
    assert all(line == line.rstrip() and len(line) <= 150 for line in text.splitlines())


def test_a_long_program_is_drawn_in_rows(handmade: Bundle) -> None:
    program = {**handmade.manifest["program"], "steps": ["full", "cached"] * 60}
    edit(handmade, program=program)
    text = inspection.as_text(inspection.inspect(handmade.path))
    rows = [line.strip() for line in text.splitlines() if "#-#-" in line]
    assert rows == [f"steps         {'#-' * 25}  1-50", f"{'#-' * 25}  51-100", f"{'#-' * 10}  101-120"]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda b: b.file("unet/model.onnx_data").unlink(), "unet/model.onnx_data is missing"),
        (lambda b: b.file("unet/model.onnx").write_bytes(b"x"), "unet/model.onnx has changed"),
        (lambda b: shutil.rmtree(b.file("plan")), "the plan cannot be read"),
        (lambda b: edit(b, sampling=[1, 2]), "the sampling schedule cannot be read"),
        (lambda b: edit(b, program={"steps": ["cached"], "variants": {}}), "the step program cannot be read"),
        (lambda b: edit(b, graphs={}), "the step program cannot be read"),
        (lambda b: edit(b, files={"../x": "0"}), "../x points outside the bundle"),
    ],
)
def test_a_damaged_bundle_is_shown_with_its_problems(
    handmade: Bundle, damage: Callable[[Bundle], None], problem: str
) -> None:
    damage(handmade)
    seen = inspection.inspect(handmade.path)
    assert any(problem in line for line in seen["problems"])
    text = inspection.as_text(seen)
    assert "balanced, seed 0" in text and problem in text and "files are whole" not in text


def test_only_the_damaged_file_is_not_ok(handmade: Bundle) -> None:
    handmade.file("unet/model.onnx").write_bytes(b"x")
    handmade.file("notes.txt").write_text("mine")
    seen = inspection.inspect(handmade.path)
    states = {name: state for name, state in seen["files"].items() if state != "OK"}
    assert states == {"unet/model.onnx": "has changed"}
    assert seen["unlisted"] == ["notes.txt"]
    assert "not listed   notes.txt" in inspection.as_text(seen)


def test_a_manifest_with_only_what_must_be_there_is_shown(handmade: Bundle) -> None:
    needed = ("format", "files", "graphs", "sampling", "program", "latent")
    manifest = {name: handmade.manifest[name] for name in needed}
    (handmade.path / bundle.MANIFEST).write_text(json.dumps(manifest))
    seen = inspection.inspect(handmade.path)
    assert seen["problems"] == []
    assert "files are whole" in inspection.as_text(seen)


def test_what_is_no_bundle_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DiffpressError, match="is not a bundle"):
        inspection.inspect(tmp_path)


def test_layers_are_a_table_and_what_was_simulated_is_said(handmade: Bundle) -> None:
    row = {"layer": "conv_in", "shape": [32, 4, 3, 3], "format": "int4", "ships_as": "int8", "exact": False}
    other = {"layer": "to_q", "shape": [32, 32], "format": "int8", "ships_as": "int8", "exact": True, "error": 0.012345}
    assert inspection.layer_rows(handmade) == []
    assert inspection.layer_lines([]) == ["this bundle has no table of layers"]
    (handmade.file("plan") / inspection.LAYERS).write_text(json.dumps([row, other]))
    seen = inspection.inspect(handmade.path)
    assert seen["quantization"]["simulated"] == [{"format": "int4", "ships_as": "int8", "layers": 1}]
    assert "1 layers: no target computes int4, ships as int8" in inspection.as_text(seen)
    lines = inspection.layer_lines(inspection.layer_rows(handmade))
    assert lines[0].split() == ["layer", "shape", "format", "ships_as", "exact", "error"]
    assert lines[1].split() == ["conv_in", "32x4x3x3", "int4", "int8", "no", "-"]
    assert lines[2].split() == ["to_q", "32x32", "int8", "int8", "yes", "0.01235"]
