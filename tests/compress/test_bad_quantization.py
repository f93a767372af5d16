"""What cannot be quantized: one clear line that says what to do, or a named skip, never silence."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffpress import api, cli
from diffpress.calibration.capture import Call
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.quantize.post_training import QuantizePass
from diffpress.compress.recipe import CalibrationOptions, Recipe
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError

STEPS = 4
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"  # it reads the text


@pytest.fixture
def work(tiny_pipeline: Path) -> Work:
    small = CalibrationOptions(method="every-step", prompts=1)
    return api.begin(str(tiny_pipeline), Recipe(name="test", calibration=small), steps=STEPS, quiet=True)


def applied(work: Work, **fields: Any) -> str:
    step = QuantizePass(**{"range": "max", "weight_range": "max", **fields})  # nothing here is about ranges
    step.requires(work)
    return step.apply(work)


def with_text(work: Work, text: Tensor | float) -> None:
    """Recorded calls whose prompts all encode to `text`."""
    calls = [Call(call.sample, call.timestep, torch.full_like(call.text, text)) for call in work.record()]

    class Same(list):
        def rows(self) -> set[int]:
            return set(range(STEPS))

    work.record = lambda: Same(calls)  # type: ignore[method-assign]


@pytest.mark.parametrize("number", [0.0, 0.5])
def test_a_layer_whose_input_never_changes_stays_in_float_and_is_named(work: Work, number: float) -> None:
    with_text(work, number)
    summary = applied(work)
    assert LAYER not in work.quantization and len(work.quantization) > 20
    assert re.search(rf"left in float: .*{re.escape(LAYER)}.* \(their input is {number:g} always\)", summary)
    assert " more (" in summary  # every such projection is counted, the first six are named
    applied(work, format="int4")  # needs no range of inputs
    assert LAYER in work.quantization


def test_an_input_that_is_not_finite_names_the_layer_the_step_and_what_to_do(work: Work) -> None:
    with_text(work, torch.nan)
    with pytest.raises(DiffpressError, match=rf"layer {LAYER} .*not finite .* at timestep \d+: .*another checkpoint"):
        applied(work)
    assert not work.quantization


def test_kinds_of_layers_that_nothing_quantizes_are_named(work: Work) -> None:
    block = work.denoiser.mid_block.resnets[0]
    block.add_module("odd", nn.Conv1d(4, 4, 3))
    work.denoiser.up_blocks[0].upsamplers[0].conv = nn.ConvTranspose2d(64, 64, 3, padding=1)
    summary = applied(work, format="int4")
    expected = "up_blocks.0.upsamplers.0.conv (ConvTranspose2d), mid_block.resnets.0.odd (Conv1d)"
    assert f"left in float: {expected} (no quantization for this kind of layer)" in summary
    assert "up_blocks.0.upsamplers.0.conv" not in work.quantization


def test_a_layer_that_no_step_runs_is_named(work: Work) -> None:
    work.denoiser.mid_block.resnets[0].add_module("spare", nn.Linear(32, 32))
    assert "left in float: mid_block.resnets.0.spare (no recorded call runs them)" in applied(work)


def test_nothing_left_to_quantize_is_an_error(work: Work) -> None:
    with_text(work, 0.0)
    others = tuple(name for name in QuantizePass()._layers(work) if name != LAYER)
    with pytest.raises(DiffpressError, match=rf"no layer can be quantized, .*{LAYER} \(their input is 0 always\)"):
        applied(work, exclude=others)


def test_blocks_that_would_be_all_scales_become_one_scale_per_channel() -> None:
    step = QuantizePass(format="int4", block=64)
    blocks = {width: step.block_for(nn.Linear(width, 4), "int4") for width in (128, 48, 40, 7)}
    assert blocks == {128: 64, 48: 16, 40: None, 7: None}


def test_steps_at_one_timestep_share_their_scale(pndm_pipeline: Path) -> None:
    every = CalibrationOptions(method="every-step", prompts=1)
    work = api.begin(str(pndm_pipeline), Recipe(name="test", calibration=every), steps=STEPS, quiet=True)
    schedule = work.sampling.timesteps
    twin = next(row for row in range(1, len(schedule)) if schedule[row] == schedule[row - 1])
    assert len(schedule) == STEPS + 1
    applied(work, scales="step", float_inputs=())
    for layer in work.quantization.values():
        assert layer.input_scale is not None and len(layer.input_scale) == len(schedule)
        assert layer.input_scale[twin] == layer.input_scale[twin - 1]
    assert any(len(set(layer.input_scale.tolist())) == STEPS for layer in work.quantization.values())  # type: ignore[union-attr]
    with torch.no_grad(), simulated(work.denoiser, work.quantization, schedule):
        assert all(bool(work.run(call).isfinite().all()) for call in work.record())


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("{calibration: {prompts: 1, steps: 2}, passes: [{quantize: {scales: step}}]}", "calibration set is too small"),
        ("{calibration: {prompts: 0}, passes: [quantize]}", "prompts"),
        ("passes: [{quantize: {exclude: ['nothing*']}}]", "exclude pattern 'nothing*' matches no layer"),
        ("passes: [{quantize: {exclude: ['*']}}]", "leave no layer"),
        ("passes: [{quantize: {format: int4, scales: step}}]", "leaves inputs in float"),
        ("passes: [{quantize: {format: int8, scaling: awq}}]", "use scaling: smooth"),
        ("passes: [{quantize: {format: e9m9}}]", "'format'"),
        ("passes: [reconstruct]", "quantize"),
    ],
)
def test_through_the_command_line_it_is_one_line_and_nothing_is_left(
    recipe: str, message: str, tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(recipe)
    words = ["compress", str(tiny_pipeline), "--recipe", str(file), "--output", str(tmp_path / "b"), "--quiet"]
    assert cli.main([*words, "--steps", str(STEPS)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("diffpress: error: ") and err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == [file]


def test_weights_that_are_not_finite_are_named_before_any_work(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_pipeline, model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.weight"][0, 0, 0, 0] = np.nan
    save_file(tensors, weights, {"format": "pt"})
    assert cli.main(["compress", str(model), "--recipe", "int8", "--output", str(tmp_path / "b"), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert "not finite (NaN or infinite) in unet's conv_in.weight: load its weights anew" in err
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize(
    ("recipe", "target", "kind"),
    [
        ("passes: [{quantize: {format: fp8}}]", "sm75", "fp8"),
        ("passes: [{quantize: {format: fp8}}]", "sm86", "fp8"),
        ("passes: [{quantize: {format: int4}}]", "sm75", "int4"),
        ("passes: [{quantize: {format: fp4}}]", "sm86", "fp8"),
        ("passes: [quantize, {mixed-precision: {candidates: [int8, int4]}}]", "sm75", "int4"),
        ("passes: [{mixed-precision: {candidates: [int8], override: {'*proj*': fp8}}}]", "sm80", "fp8"),
    ],
)
def test_a_format_that_the_target_lacks_is_refused_before_the_model_is_opened(
    recipe: str, target: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("diffpress.calibration.model.load_pipeline", lambda *_: pytest.fail("work was started"))
    file = tmp_path / "mine.yaml"
    file.write_text(recipe)
    with pytest.raises(DiffpressError, match=rf"recipe \w+ needs {kind}, which {target} does not have: build for sm"):
        api.compress("shapes", str(file), tmp_path / "b", targets=["sm89", target], quiet=True)
    assert list(tmp_path.iterdir()) == [file]
