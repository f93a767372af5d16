"""nvidia-modelopt: its arithmetic is ours, and what is read of its models computes what they compute."""

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffpress.calibration.capture import Call
from diffpress.calibration.schedule import tabulate
from diffpress.compress.cache.execute import replay
from diffpress.compress.families import unet as family
from diffpress.compress.numerics.formats import fake_quant, get
from diffpress.compress.numerics.simulate import rounded_input, rounded_weight, simulated
from diffpress.compress.quantize import modelopt
from diffpress.compress.quantize.modelopt import ModeloptPass
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError


@pytest.fixture
def mtq() -> Any:
    return pytest.importorskip(
        "modelopt.torch.quantization", reason="nvidia-modelopt is absent: pip install 'diffpress[modelopt]'"
    )


@pytest.fixture(scope="module")
def shared_unet() -> Any:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            mid_block_type=None,
            block_out_channels=(48, 48),  # feed-forward layers are 192 wide: blocks of 128 do not divide it
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
        ).requires_grad_(False)


@pytest.fixture
def work(shared_unet: Any, tmp_path: Path) -> Work:
    from diffusers import DDIMScheduler

    sampling = tabulate(DDIMScheduler(clip_sample=False), 4, 3.0, 64, 64)
    generator = torch.Generator().manual_seed(1)
    calls = [
        Call(
            torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([t]), torch.randn(2, 5, 32, generator=generator)
        )
        for t in sampling.timesteps
    ]
    pipeline = SimpleNamespace(unet=copy.deepcopy(shared_unet))
    return Work(pipeline, sampling, 0, lambda _: calls, lambda items, _: items, tmp_path)  # type: ignore[arg-type,return-value]


def beyond(shape: tuple[int, ...], largest: float) -> Tensor:
    """Numbers of which a part lies outside of the range that ends at `largest`, on both sides."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)) * largest / 2


def agree(ours: Tensor, theirs: Tensor) -> None:
    """Element for element, but for the last bit of a float32."""
    assert torch.allclose(ours, theirs, rtol=3e-7, atol=0)
    assert ours.unique().numel() > 10  # something was rounded, and not to zero


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
@pytest.mark.parametrize("amax", [1.27, 3.14159, 0.0127])
def test_integers_per_tensor_are_equal(mtq: Any, bits: int, largest: int, amax: float) -> None:
    x = beyond((4000,), amax)
    theirs = mtq.tensor_quant.fake_tensor_quant(x, torch.tensor(amax), None, bits, False, False)
    ours = fake_quant(x, amax / largest, get(f"int{bits}"))
    agree(ours, theirs)
    # Both use the whole grid of two's complement: there is one more number below zero than above.
    assert ours.min() == pytest.approx(-(largest + 1) / largest * amax)
    assert ours.max() == pytest.approx(amax)


def test_where_the_scale_is_a_power_of_two_not_one_bit_differs(mtq: Any) -> None:
    x = beyond((20000,), 0.5)
    for bits, format in ((8, get("int8")), (4, get("int4"))):
        amax = torch.tensor(format.largest / 256)
        theirs = mtq.tensor_quant.fake_tensor_quant(x, amax, None, bits, False, False)
        assert torch.equal(fake_quant(x, 1 / 256, format), theirs)
    theirs = mtq.tensor_quant.scaled_e4m3(x, torch.tensor(448 / 1024), None, 4, 3)
    assert torch.equal(fake_quant(x, 1 / 1024, get("e4m3")), theirs)


def test_integers_per_channel_are_equal(mtq: Any) -> None:
    weight = beyond((24, 16, 3, 3), 1.0) * torch.linspace(0.01, 3, 24).reshape(-1, 1, 1, 1)
    amax = weight.abs().amax(dim=(1, 2, 3), keepdim=True)
    theirs = mtq.tensor_quant.fake_tensor_quant(weight, amax, None, 8, False, False)
    agree(fake_quant(weight, amax.flatten() / 127, get("int8")), theirs)


def test_int4_blocks_are_equal(mtq: Any) -> None:
    weight = beyond((32, 128), 1.0)
    quantizer = mtq.nn.TensorQuantizer(mtq.config.QuantizerAttributeConfig(num_bits=4, block_sizes={-1: 32}))
    scale = weight.reshape(32, 4, 32).abs().amax(dim=2) / 7
    agree(fake_quant(weight, scale, get("int4")), quantizer(weight))


@pytest.mark.parametrize("amax", [1.0, 0.37, 1000.0])
def test_e4m3_is_equal_down_to_its_subnormal_numbers(mtq: Any, amax: float) -> None:
    x = torch.cat([beyond((4000,), amax), beyond((4000,), amax / 1000), beyond((4000,), amax / 100000)])
    theirs = mtq.tensor_quant.scaled_e4m3(x, torch.tensor(amax), None, 4, 3)
    agree(fake_quant(x, amax / 448, get("e4m3")), theirs)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def silence(model: nn.Module, left: Mapping[str, str], mtq: Any) -> None:
    """Switch off what a plan does not hold, so that the rest can be compared."""
    for name, part in model.named_modules():
        if isinstance(part, mtq.nn.TensorQuantizer) and any(f"{name}.".startswith(f"{path}.") for path in left):
            part.disable()


@pytest.mark.parametrize(
    ("config", "formats"),
    [
        ("INT8_DEFAULT_CFG", {"int8"}),
        ("INT8_SMOOTHQUANT_CFG", {"int8"}),
        ("FP8_DEFAULT_CFG", {"e4m3"}),
        ("INT4_AWQ_CFG", {"int4 weights"}),
        ("W4A8_AWQ_BETA_CFG", {"e4m3"}),
        ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", {"e4m3 weights"}),
    ],
)
@torch.no_grad()
def test_what_is_read_computes_what_the_model_computes(mtq: Any, work: Work, config: str, formats: set[str]) -> None:
    call = next(iter(work.record()))
    plain = work.run(call)
    step = ModeloptPass(config=config)
    step.requires(work)
    layers = step.layers(work)
    model = modelopt.quantized_copy(work, config, layers)
    found = modelopt.read(model, layers)
    assert {layer.name for layer in found.layers.values()} == formats
    silence(model, found.left, mtq)
    theirs, rounded = rounded_by(model, found, lambda: replay(model, work.program, work.corrections, call))
    before = {name: module.weight.clone() for name, module in layers.items()}
    step.apply(work)
    assert all(torch.equal(work.originals[f"{name}.weight"], before[name]) for name in found.weights)
    assert bool(found.weights) == (config == "W4A8_AWQ_BETA_CFG")  # the one that rounds weights twice
    for name, (given, wanted) in rounded.items():
        layer, part, weight = found.layers[name], model.get_submodule(name), layers[name].weight
        m = torch.ones(weight.shape[1]) if layer.multiplier is None else torch.from_numpy(layer.multiplier)
        columns = m.reshape(1, -1, *[1] * (weight.ndim - 2))
        mostly_agree(rounded_weight(weight, layer) / columns, part.weight_quantizer(part.weight))
        mostly_agree(rounded_input(given, layer) * (columns if given.ndim == 4 else m), wanted)
    with simulated(work.denoiser, work.quantization, work.sampling.timesteps):
        ours = work.run(call)
    # A number that a last bit sends to its next step changes all that follows: less than rounding does, even so.
    assert error(ours, theirs) < 0.25 * error(theirs, plain)


def rounded_by(model: nn.Module, found: Any, run: Any) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """What the model answers, and what each of its input quantizers was given and made of it."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        return lambda _, given, made: seen.update({name: (given[0], made)})

    hooks = [model.get_submodule(f"{name}.input_quantizer").register_forward_hook(watch(name)) for name in found.layers]
    answer = run()
    for hook in hooks:
        hook.remove()
    assert set(seen) == set(found.layers)
    return answer, seen


def mostly_agree(ours: Tensor, theirs: Tensor) -> None:
    """Element for element, but for those that their last bit puts on either side of the middle of two steps."""
    off = (ours - theirs).abs() > 1e-5 * theirs.abs() + 1e-9
    assert off.float().mean() < 1e-3


def test_smoothing_is_read_as_a_multiplier_and_leaves_the_weights_alone(mtq: Any, work: Work) -> None:
    before = {name: value.clone() for name, value in work.denoiser.state_dict().items()}
    ModeloptPass(config="INT8_SMOOTHQUANT_CFG").apply(work)
    smoothed = {name for name, layer in work.quantization.items() if layer.multiplier is not None}
    linear = {name for name, part in work.denoiser.named_modules() if isinstance(part, nn.Linear)}
    assert smoothed == linear & set(work.quantization)
    after = work.denoiser.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_pass_says_what_it_left_and_prints_nothing(mtq: Any, work: Work, capsys: Any) -> None:
    step = ModeloptPass(exclude=("up_blocks.*",))
    step.requires(work)
    capsys.readouterr()
    summary = step.apply(work)
    assert capsys.readouterr().out == ""
    left = {row["quantizer"]: row["why"] for row in work.tables["modelopt"]}
    assert "down_blocks.0.attentions.0.proj_out" in left  # as its configurations have it
    norms = {name for name in left if ".norm" in name}
    assert norms  # it rounds what a LayerNorm is given
    assert not any(name.startswith(("up_blocks", "conv_in", "time_")) for name in work.quantization)
    assert set(work.quantization) | set(left) >= set(step.layers(work))
    assert "down_blocks.0.attentions.0.proj_out" in summary
    assert "INT8_DEFAULT_CFG" in summary


def test_convolutions_are_named_where_weights_are_in_blocks(mtq: Any, work: Work) -> None:
    ModeloptPass(config="INT4_BLOCKWISE_WEIGHT_ONLY_CFG").apply(work)
    left = {row["quantizer"]: row["why"] for row in work.tables["modelopt"]}
    modules = family.quantizable(work.denoiser)
    assert {n for n, why in left.items() if why == modelopt.KERNELS} == {
        name for name, module in modules.items() if isinstance(module, nn.Conv2d)
    }
    assert work.quantization
    assert all(isinstance(modules[name], nn.Linear) for name in work.quantization)


def test_an_enabled_attention_quantizer_is_named(mtq: Any, work: Work) -> None:
    layers = family.quantizable(work.denoiser)
    model = modelopt.quantized_copy(work, "INT8_DEFAULT_CFG", layers)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.softmax_quantizer"
    assert path not in modelopt.read(model, layers).left
    model.get_submodule(path).enable()
    assert "neither weights nor inputs" in modelopt.read(model, layers).left[path]


def test_input_scales_found_at_run_time_are_named_and_the_weights_are_read(mtq: Any, work: Work) -> None:
    ModeloptPass(config="FP8_PER_CHANNEL_PER_TOKEN_CFG").apply(work)
    assert {layer.name for layer in work.quantization.values()} == {"e4m3 weights"}
    left = {row["quantizer"]: row["why"] for row in work.tables["modelopt"]}
    assert all(left[f"{name}.input_quantizer"] == "scales are found at run time" for name in work.quantization)


def linear(width: int) -> tuple[nn.Sequential, dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(width, 16)).requires_grad_(False)
    return model, {"0": model[0]}


@pytest.mark.parametrize(("width", "blocks"), [(256, 2), (192, 3), (320, 5), (96, None)])
def test_blocks_that_do_not_divide_are_read_as_narrower_ones(mtq: Any, width: int, blocks: int | None) -> None:
    model, layers = linear(width)
    theirs = mtq.quantize(copy.deepcopy(model), mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, lambda m: m(torch.ones(1, width)))
    layer = modelopt.read(theirs, layers).layers["0"]
    assert layer.weight_scale.shape == ((16,) if blocks is None else (16, blocks))
    agree(rounded_weight(model[0].weight, layer), theirs[0].weight_quantizer(theirs[0].weight))


def test_nvfp4_weights_are_read_with_their_rounded_block_scales(mtq: Any) -> None:
    model, layers = linear(64)
    theirs = mtq.quantize(copy.deepcopy(model), mtq.NVFP4_DEFAULT_CFG, lambda m: m(torch.ones(1, 64)))
    found = modelopt.read(theirs, layers)
    assert found.layers["0"].weight_scale.shape == (16, 4)
    assert found.layers["0"].name == "e2m1 weights"
    assert found.left == {"0.input_quantizer": "scales are found at run time"}
    packed, scales, overall = mtq.qtensor.NVFP4QTensor.quantize(model[0].weight.clone(), 16)
    wanted = packed.dequantize(scale=scales, double_scale=overall, block_sizes={-1: 16}, dtype=torch.float32)
    assert torch.allclose(rounded_weight(model[0].weight, found.layers["0"]), wanted, rtol=1e-5, atol=1e-7)


def test_zero_channels_and_zero_inputs_have_a_scale(mtq: Any) -> None:
    model, layers = linear(64)
    model[0].weight.data[3] = 0
    theirs = mtq.quantize(copy.deepcopy(model), mtq.INT8_DEFAULT_CFG, lambda m: m(torch.zeros(1, 64)))
    layer = modelopt.read(theirs, layers).layers["0"]
    assert (layer.weight_scale > 0).all()
    assert layer.input_scale is not None
    assert (layer.input_scale > 0).all()
    assert (rounded_weight(model[0].weight, layer)[3] == 0).all()


def test_inputs_that_are_not_finite_are_an_error_of_one_line(mtq: Any, work: Work) -> None:
    work.denoiser.conv_in.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(DiffpressError, match="INT8_DEFAULT_CFG failed on this denoiser") as caught:
        ModeloptPass().apply(work)
    assert "\n" not in str(caught.value)
    assert not work.quantization


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (ModeloptPass(config="INT9_CFG"), "no configuration 'INT9_CFG', choose from: .*FP8_DEFAULT_CFG"),
        (ModeloptPass(exclude=("nothing.*",)), "'nothing.*' matches no layer"),
        (ModeloptPass(exclude=("*",)), "no layer to quantize"),
        (ModeloptPass(config="NVFP4_DEFAULT_CFG"), "there is no GPU here"),
        (ModeloptPass(config="NVFP4_SVDQUANT_DEFAULT_CFG"), "there is no GPU here"),
        (ModeloptPass(config="MXFP8_DEFAULT_CFG"), "there is no GPU here"),
    ],
)
def test_what_cannot_be_done_is_refused(mtq: Any, work: Work, step: ModeloptPass, told: str) -> None:
    if "GPU" in told and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(DiffpressError, match=told):
        step.requires(work)


def test_a_quantized_model_is_refused(mtq: Any, work: Work) -> None:
    ModeloptPass(config="FP8_DEFAULT_CFG").apply(work)
    with pytest.raises(DiffpressError, match="in the place of 'quantize'"):
        ModeloptPass().requires(work)


def test_without_the_package_the_extra_is_named(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    with pytest.raises(DiffpressError, match=r"pip install 'diffpress\[modelopt\]'"):
        ModeloptPass().requires(work)
