"""The quantize pass on a tiny random U-Net: what it decides, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from diffpress import api
from diffpress.compress.cache.program import program_of
from diffpress.compress.families import unet as family
from diffpress.compress.families.unet_graph import modules
from diffpress.compress.numerics.formats import get
from diffpress.compress.numerics.simulate import rounded_input, simulated
from diffpress.compress.quantize.post_training import FORMATS, QuantizePass
from diffpress.compress.recipe import CalibrationOptions, Recipe
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError

STEPS = 4
SMALL = CalibrationOptions(method="every-step", prompts=1)


@pytest.fixture
def work(tiny_pipeline: Path) -> Work:
    return api.begin(str(tiny_pipeline), Recipe(name="test", calibration=SMALL), steps=STEPS, quiet=True)


def error(work: Work) -> float:
    """Relative error of the denoiser's output over the recorded calls."""
    calls = list(work.record())
    with torch.no_grad():
        wanted = [work.run(call) for call in calls]
        with simulated(work.denoiser, work.quantization, work.sampling.timesteps):
            got = [work.run(call) for call in calls]
    return float(np.mean([float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)]))


def applied(work: Work, **fields: Any) -> str:
    step = QuantizePass(**fields)
    step.requires(work)
    return step.apply(work)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_quantizes_every_layer(work: Work, name: Any) -> None:
    summary = applied(work, format=name)
    assert set(work.quantization) == set(family.quantizable(work.denoiser))
    assert f"{len(work.quantization)} layers to {name}" in summary
    narrow = "4" in name
    for path, layer in work.quantization.items():
        assert ("conv_shortcut" not in path) or layer.input_format is None
        wide = any(part in path for part in ("conv_shortcut", "samplers"))
        assert get(layer.weight_format).bits == (4 if narrow and not wide and name != "fp8" else 8)
    assert 0 < error(work) < {8: 0.2, 4: 1.5}[4 if narrow else 8]


def test_wider_formats_err_less(work: Work) -> None:
    errors = []
    for name in ("w4a4-simulated", "w4a8-simulated", "int8"):
        applied(work, format=name)
        errors.append(error(work))
    assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2]


def test_int4_weights_have_blocks_and_float_inputs(work: Work) -> None:
    applied(work, format="int4", block=32)
    layer = work.quantization["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    assert layer.weight_scale.shape == (64, 2)
    assert layer.input_scale is None and layer.input_format is None
    coarse = work.quantization["down_blocks.0.downsamplers.0.conv"]
    assert coarse.weight_format == "int8" and coarse.weight_scale.ndim == 1


@torch.no_grad()
def inputs_of(work: Work, name: str) -> list[torch.Tensor]:
    """What layer `name` is given on each recorded call."""
    seen: list[torch.Tensor] = []
    calls = list(work.record())  # first, since recording runs the layer, too
    hook = work.denoiser.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for call in calls:
        work.run(call)
    hook.remove()
    return seen


def test_range_max_takes_the_largest_value_seen_and_l24_may_cut_it(work: Work) -> None:
    name = "down_blocks.0.resnets.0.conv1"
    weight = work.denoiser.get_submodule(name).weight
    applied(work, range="max", weight_range="max", exclude=("mid_block.*",))
    kept = work.quantization[name]
    assert kept.input_scale == pytest.approx(max(float(x.abs().max()) for x in inputs_of(work, name)) / 127)
    assert kept.weight_scale == pytest.approx(weight.abs().amax(dim=(1, 2, 3)).detach().numpy() / 127)
    assert not any(path.startswith("mid_block") for path in work.quantization)
    applied(work)
    assert work.quantization[name].input_scale <= kept.input_scale  # type: ignore[operator]


def test_steps_and_groups_have_their_scales_and_err_less(work: Work) -> None:
    one, name = "w4a4-simulated", "mid_block.resnets.0.conv1"
    given = inputs_of(work, name)

    def away() -> float:
        layer = work.quantization[name]
        return sum(float((rounded_input(x, layer, row) - x).square().sum()) for row, x in enumerate(given))

    applied(work, format=one, range="mse")
    plain = away()
    applied(work, format=one, range="mse", scales="step")
    scaled = [layer.input_scale for layer in work.quantization.values() if layer.input_scale is not None]
    assert len(scaled) > 10 and all(len(scales) == STEPS for scales in scaled)
    assert away() < plain
    applied(work, format=one, scales=2)
    scales = work.quantization["mid_block.resnets.0.conv1"].input_scale
    assert scales is not None
    assert scales[0] == scales[1] != scales[2] == scales[3]


def test_smoothing_and_the_split_shortcut_choose_multipliers(work: Work) -> None:
    assert "inputs scaled" in applied(work, format="int8", scaling="smooth")
    smooth = {name for name, layer in work.quantization.items() if layer.multiplier is not None}
    assert len(smooth) > 10
    applied(work, format="w4a4-simulated", split=True)
    split = {name: layer.multiplier for name, layer in work.quantization.items() if layer.multiplier is not None}
    assert all(layer.input_format for layer in work.quantization.values())  # shortcuts, too, where they are split
    joined = family.concatenations(work.denoiser)
    assert split and set(split) <= set(joined)
    for name, multiplier in split.items():
        assert multiplier is not None
        assert (multiplier[: joined[name]] == 1).all()
        assert len(set(multiplier[joined[name] :].tolist())) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exclude": ("nothing*",)}, r"exclude pattern 'nothing\*' matches no layer, such as 'down_blocks"),
        ({"keep_eight_bits": ("nothing*",)}, r"keep_eight_bits pattern 'nothing\*' matches no layer"),
        ({"float_inputs": ("nothing*",)}, r"float_inputs pattern 'nothing\*' matches no layer"),
        ({"exclude": ("*",)}, "leave no layer to quantize"),
        ({"format": "int4", "scaling": "smooth"}, "leaves inputs in float"),
        ({"format": "int4", "scales": "step"}, "leaves inputs in float"),
        ({"scaling": "awq"}, "rounds inputs too"),
        ({"alpha": 0.5}, "alpha needs scaling"),
    ],
)
def test_what_contradicts_itself_is_refused(work: Work, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffpressError, match=message):
        QuantizePass(**fields).requires(work)


@pytest.mark.parametrize(
    "fields", [{"format": "int7"}, {"scales": 5}, {"block": 8}, {"alpha": 2.0, "scaling": "smooth"}]
)
def test_values_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        QuantizePass(**fields)


def test_a_weight_that_is_not_finite_is_named(work: Work) -> None:
    work.record()
    work.denoiser.get_submodule("mid_block.resnets.0.conv1").weight.data[0, 0, 0, 0] = torch.inf
    with pytest.raises(DiffpressError, match="mid_block"):
        applied(work, format="int4")


def test_steps_that_were_never_recorded_are_named(tiny_pipeline: Path) -> None:
    recipe = Recipe(name="test", calibration=CalibrationOptions(prompts=1, steps=2))
    few = api.begin(str(tiny_pipeline), recipe, steps=STEPS, quiet=True)
    with pytest.raises(DiffpressError, match="calibration set is too small: quantize with scales: step"):
        applied(few, scales="step")


def test_steps_that_take_a_layer_from_others_need_no_scale_of_their_own(work: Work) -> None:
    """Per-step scales under a plan whose cached steps read several modules: their layers run in full steps alone."""
    taken = [name for name, kind in modules(work.denoiser).items() if kind in ("attn1", "ff")]
    work.program = program_of(work.denoiser, [(), taken, (), ("up_1",)])
    applied(work, format="int8", scales="step")
    inside = next(
        name for name in work.quantization if name.startswith("down_blocks.1.attentions.1.transformer_blocks.0.attn1")
    )
    deep = next(name for name in work.quantization if name.startswith("mid_block.resnets"))
    ahead = next(name for name in work.quantization if name.startswith("up_blocks.2.resnets.2.conv1"))
    scales = {name: work.quantization[name].input_scale for name in (inside, deep, ahead)}
    assert scales[inside][1] == scales[inside][0] and scales[inside][3] == scales[inside][2]
    assert len(set(scales[deep][:3].tolist())) == 3 and scales[deep][3] == scales[deep][2]
    assert len(set(scales[ahead].tolist())) == 4
    assert 0 < error(work) < 0.2
