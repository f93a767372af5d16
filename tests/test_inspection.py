import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress import bundle, inspection
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError
from diffpress.plan import CONDITIONAL, FULL, REUSE, Correction, Corrections, Plan, StepProgram, Variant
from diffpress.segments import GUIDANCE_LEGEND, calls_row, described, segments


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
        "steps": 4,
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
    default = {"name": "openvino", "precision": "bf16"}
    planned = {"sm89": {"total": 9_000_000_000, "available": 7_200_000_000, "weight_streaming": True}}
    rows = [{"fatal": False, "text": "node 'a'"}, {"fatal": True, "text": "node 'b' (QuantizeLinear): not so"}]
    changes = {"engines": [engine], "memory": planned, "lint": {"unet/model.onnx": rows, "unet/cached.onnx": rows[:1]}}
    opened = bundle.update(handmade, measured=measured, default_backend=default, **changes)
    text = inspection.as_text(inspection.inspect(opened.path))
    for part in (
        "by hand (StableDiffusionPipeline",
        "balanced, seed 0",
        "quantize: 2 layers to int8 (1.2 s)",
        "cache: 4 of 6 steps reuse features (0.5 s)",
        "DDIMScheduler, 6 steps, guidance 3, 32x32 pixels",
        "steps         feature_0        #--#--  1-6",
        "              everything else  ######",
        "# computed; - taken from an earlier step",
        "cached: unet/cached.onnx, 4 calls; reads feature_0",
        "2 layers (2 int8)",
        "40.0 kB as FP32 weights, 11.0 kB here (28%)",
        "p50 101.3 p90 120.0 p99 130.0 ms",
        "6.123x",
        "31.42",
        "reference 0.31, compressed 0.3",
        "frechet              not measured",
        "openvino bf16",
        "engines/sm89/full.engine, int8+fp32, 1.5 MB",
        "memory        sm89: 9.0 GB of 7.2 GB planned, weights streamed",
        "no engine     unet/model.onnx: node 'b' (QuantizeLinear): not so",
        "unet/model.onnx: 1.0e-06 from torch (at most 1e-03)",
        "OK  unet/cached.onnx",
        f"all {len(opened.manifest['files'])} files are whole",
    ):
        assert part in text, part
    assert "node 'a'" not in text
    assert all(line == line.rstrip() and len(line) <= 150 for line in text.splitlines())


def test_gates_are_shown_with_what_they_came_to(handmade: Bundle) -> None:
    assert "gate" not in inspection.as_text(inspection.inspect(handmade.path))
    passed = {"gate": "ssim >= 0.9", "measured": 0.95, "limit": 0.9, "unit": "", "passed": True}
    failed = {"gate": "speedup >= 3", "measured": 2.4, "limit": 3.0, "unit": "", "passed": False}
    bundle.update(handmade, gates=[passed, failed], failed=True)
    seen = inspection.inspect(handmade.path)
    assert (seen["gates"], seen["failed"]) == ([passed, failed], True)
    lines = inspection.as_text(seen).splitlines()
    assert "gate          passed  ssim >= 0.9 (measured 0.95)" in lines
    assert "gate          FAILED  speedup >= 3 (measured 2.4)" in lines
    assert "failed        this bundle does not do what its gates ask" in lines
    bundle.update(handmade, gates=[passed], failed=False)
    text = inspection.as_text(inspection.inspect(handmade.path))
    assert "passed  ssim" in text and "failed" not in text.lower()


def test_a_long_program_is_drawn_in_rows(handmade: Bundle) -> None:
    program = {**handmade.manifest["program"], "steps": ["full", "cached"] * 60}
    edit(handmade, program=program)
    text = inspection.as_text(inspection.inspect(handmade.path))
    rows = [line.split("feature_0  ")[1].strip() for line in text.splitlines() if "#-#-" in line]
    assert rows == [f"{'#-' * 25}  1-50", f"{'#-' * 25}  51-100", f"{'#-' * 10}  101-120"]


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


def taking(steps: str, *reads: Sequence[str], together: int = 1, guidance: Sequence[str] = ()) -> StepProgram:
    """A program by hand: step "0" runs all and hands out what others read, step "1" reads reads[0], and so on."""
    wanted = dict.fromkeys(read.removesuffix("@1") for names in reads for read in names)
    variants = {FULL: Variant(writes=tuple(wanted))}
    variants |= {f"v{index}": Variant(tuple(names), (), together) for index, names in enumerate(reads, 1)}
    return StepProgram(tuple(FULL if step == "0" else f"v{step}" for step in steps), variants, tuple(guidance))


def drawn(program: StepProgram, corrections: Corrections | None = None) -> dict[str, str]:
    return {segment.name: segment.marks for segment in segments(program, corrections)}


ENCODER = (*(f"skip_{index}" for index in range(9)), "up_8")
BLOCK = "down_blocks.{}.attentions.{}.transformer_blocks.0"
MODULES = [f"{BLOCK.format(block, index)}.{kind}" for block in (0, 1) for index in (0, 1) for kind in ("attn1", "ff")]
MODULES += [f"up_blocks.1.resnets.{index}" for index in range(3)]


@pytest.mark.parametrize(
    ("program", "rows"),
    [
        (taking("0000"), {"all layers": "####"}),
        (taking("0110", ["up_1"]), {"deeper than branch 1": "#--#", "shallow layers": "####"}),
        (
            taking("012", ["up_0"], ["up_3"]),  # the shallow cut takes what the deep one takes, too
            {"deeper than branch 3": "#--", "branches 1 to 3": "#-#", "up to branch 0": "###"},
        ),
        (taking("0110", ENCODER), {"encoder": "#--#", "decoder, 9 layers": "####"}),
        (
            taking("012", ENCODER, ["up_0"]),
            {
                "deeper than branch 8": "#--",
                "branches 1 to 8": "##-",
                "input convolution": "#-#",
                "up to branch 0": "###",
            },
        ),
        (taking("010", ["whole"]), {"whole": "#-#"}),
        (taking("012", ["whole"], ["up_1"]), {"deeper than branch 1": "#--", "shallow layers": "#-#"}),
        (taking("01", ["skip_2"]), {"skip_2": "#-", "everything else": "##"}),
        (
            taking("012", MODULES[:1], MODULES[:2]),
            {MODULES[0]: "#--", MODULES[1]: "##-", "everything else": "###"},
        ),
        (
            taking("0120", MODULES[:8], [*MODULES[:8:2], *MODULES[8:]]),
            {"4 attn1": "#--#", "4 ff": "#-##", "3 resnet": "##-#", "everything else": "####"},
        ),
        (
            # A module within the layers that a deep feature stands for is not run; its names do not always tell.
            taking("012", ["mid_block.resnets.0", "up_blocks.0.resnets.0"], ["up_1"]),
            {
                "mid_block.resnets.0": "#--",
                "up_blocks.0.resnets.0": "#-.",
                "deeper than branch 1": "##-",
                "shallow layers": "###",
            },
        ),
        (
            taking("012", [BLOCK.format(0, 0) + ".ff"], ["down_blocks.0.attentions.0"]),
            {BLOCK.format(0, 0) + ".ff": "#--", "down_blocks.0.attentions.0": "##-", "everything else": "###"},
        ),
    ],
)
def test_a_row_for_every_part_that_a_program_treats_apart(program: StepProgram, rows: dict[str, str]) -> None:
    assert drawn(program) == rows


def test_many_ways_to_treat_modules_stay_a_few_rows() -> None:
    kinds = ("attn1", "attn2", "ff")
    names = [f"{BLOCK.format(block, 0)}.{kind}" for block in range(6) for kind in kinds]
    names += [f"{part}.{index}.0" for part in ("up_blocks.0.resnets", "down_blocks.0.attentions") for index in range(6)]
    parts = [names[0::2], names[1::3], names[2::5]]
    found = drawn(taking("0123", *parts))
    assert len(found) <= 8 and set("".join(found.values())) == {"#", "-"}
    assert any(", " in name for name in found)  # several kinds in one row
    counted = sum(int(word.split()[0]) for name in found if name[0].isdigit() for word in name.split(", "))
    single = sum("." in name for name in found)
    assert counted + single == len({name for part in parts for name in part})


def test_corrected_and_extrapolated_features_have_marks_of_their_own() -> None:
    scale, offset = np.ones((5, 2, 1), np.float32), np.zeros((5, 1), np.float32)
    scale[:, 1] = 0  # step 2 takes the feature as it is,
    offset[3] = 0.1  # step 3 moves it,
    scale[4, 1] = -0.5  # step 4 looks at two values
    corrections = Corrections((5.0, 4.0, 3.0, 2.0, 1.0), {"up_1": Correction(scale, offset)})
    program = taking("00111", ["up_1", "up_1@1"])
    assert drawn(program, corrections) == {"deeper than branch 1": "##-+/", "shallow layers": "#####"}
    assert drawn(program)["deeper than branch 1"] == "##///"  # without the plan: what the graph can do


def test_steps_that_run_together_are_bracketed() -> None:
    assert calls_row(taking("01110110", ENCODER, together=3)) == "|[=]|[]|"
    assert calls_row(taking("0110", ENCODER)) == ""


def test_long_lists_of_features_are_counted() -> None:
    assert described(["up_1"]) == "up_1"
    assert described(["up_1", "up_1@1"]) == "up_1 and the value before"
    assert described(ENCODER) == "10 features"
    assert described([*MODULES[:4], f"{MODULES[0]}@1"]) == "4 features and the values before of 1"


def test_inspect_draws_the_program(handmade: Bundle) -> None:
    """Encoder propagation with three steps a call, corrected, under guidance that leaves halves out; 53 steps."""
    steps = ("0111" * 14)[:53]
    guidance = [FULL] * 50 + [REUSE, REUSE, CONDITIONAL]
    program = taking(steps, ENCODER, together=3, guidance=guidance)
    edit(handmade, program=program.to_json(), graphs={FULL: "unet/model.onnx", "v1": "unet/cached.onnx"})
    sampling = replace(
        Plan.load(handmade.file("plan")).sampling, timesteps=tuple(float(t) for t in range(53, 0, -1)), steps=53
    )
    entry = Correction(np.full((53, 1, 1), 0.9, np.float32), np.zeros((53, 1), np.float32))
    Plan(sampling, program, corrections=Corrections(sampling.timesteps, {"up_8": entry})).save(handmade.file("plan"))
    seen = inspection.inspect(handmade.path)
    assert json.loads(json.dumps(seen)) == seen
    assert seen["program"]["segments"] == [
        {"name": "encoder", "marks": steps.replace("0", "#").replace("1", "+")},
        {"name": "decoder, 9 layers", "marks": "#" * 53},
    ]
    assert seen["program"]["variants"]["v1"] | {"reads": []} == {
        "graph": "unet/cached.onnx",
        "steps": 39,
        "calls": 14,
        "reads": [],
        "writes": [],
        "together": 3,
    }
    lines = inspection.as_text(seen).splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("steps"))
    pad = " " * 33
    assert (
        lines[first : first + 13]
        == [
            f"steps         encoder            {'#+++' * 12}#+  1-50",
            f"              decoder, 9 layers  {'#' * 50}",
            f"together{pad[8:]}{'|[=]' * 12}||",  # step 50 is guided otherwise than those after it
            f"guidance{pad[8:]}{'#' * 50}",
            "steps         encoder            ++#  51-53",
            "              decoder, 9 layers  ###",
            f"together{pad[8:]}[]|",
            f"guidance{pad[8:]}--.",
            "              # computed; + taken and corrected",
            "              [=] steps that run together in one call; | a step by itself",
            f"              guidance: {GUIDANCE_LEGEND}",
            "variant       full: unet/model.onnx, 14 calls; writes 10 features",
            "variant       v1: unet/cached.onnx, 14 calls for 39 steps; reads 10 features",
        ]
    )


def test_what_is_drawn_of_guidance_alone(handmade: Bundle) -> None:
    program = StepProgram((FULL,) * 4, guidance=(FULL, REUSE, REUSE, CONDITIONAL))
    edit(handmade, program=program.to_json())
    text = inspection.as_text(inspection.inspect(handmade.path))
    assert "steps         all layers  ####  1-4\nguidance                  #--.\n" in text
    assert "# computed" not in text  # nothing else is to be told apart
