"""Selective finetuning on a tiny U-Net: it lowers errors, touches only what it may, and goes on when interrupted."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffpress.calibration.capture import Call
from diffpress.compress import training
from diffpress.compress.families import unet as family
from diffpress.compress.families.unet_graph import UNetGraph
from diffpress.compress.numerics.formats import get
from diffpress.compress.numerics.ranges import weight_scale
from diffpress.compress.numerics.simulate import rounded_weight, simulated
from diffpress.compress.quantize.finetune import FinetunePass, InputScales, Student, objective
from diffpress.compress.temporal.maintain import quantize_time_layers
from diffpress.compress.temporal.table import TemporalTablePass
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import LayerQuant, Sampling

TIMESTEPS = (801.0, 601.0, 401.0, 201.0, 1.0)
RECORDED = (0, 2, 4)  # rows of the schedule


@pytest.fixture(scope="module")
def network() -> Any:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=8,
        )
    return unet.eval().requires_grad_(False)


def recorded() -> list[Call]:
    generator = torch.Generator().manual_seed(0)
    calls = []
    for index in range(6):
        sample = torch.randn(2, 4, 8, 8, generator=generator)
        timestep = torch.tensor([TIMESTEPS[RECORDED[index % 3]]])
        calls.append(Call(sample, timestep, torch.randn(2, 5, 16, generator=generator)))
    return calls


def make_work(
    network: Any, scratch: Path, weights: str = "int4", inputs: str | None = "int4", time: bool = True
) -> Work:
    """A work whose every layer is quantized, inputs by their largest value."""
    ones = (1.0,) * len(TIMESTEPS)
    sampling = Sampling("DDIMScheduler", len(TIMESTEPS), 3.0, 32, 32, TIMESTEPS, ones, 1.0, ())
    unet = copy.deepcopy(network)
    work = Work(SimpleNamespace(unet=unet), sampling, 0, lambda _: recorded(), lambda items, _: items, scratch)  # type: ignore[arg-type,return-value]
    layers, largest = family.quantizable(unet), {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: largest.update({name: max(largest.get(name, 0.0), float(args[0].abs().max()))})
        )
        for name, module in layers.items()
    ]
    with torch.no_grad():
        for call in recorded():
            work.run(call)
    for hook in hooks:
        hook.remove()
    for name, module in layers.items():
        scale = None if inputs is None else np.array([largest[name] / get(inputs).largest], np.float32)
        work.quantization[name] = LayerQuant(weight_scale(module.weight, get(weights)).numpy(), scale, weights, inputs)
    if time:
        work.quantization.update(quantize_time_layers(unet, torch.tensor(TIMESTEPS), weights, inputs))
    return work


def quick(**fields: Any) -> FinetunePass:
    return FinetunePass(**{"iterations": 60, "weight_rate": 1e-3, "scale_rate": 1e-2, **fields})


@torch.no_grad()
def output_error(work: Work, network: Any) -> float:
    """||output - target|| / ||target|| of the simulated plan against the untouched network, over the recorded calls."""
    got, wanted = [], []
    with simulated(work.denoiser, work.quantization, TIMESTEPS):
        got = [work.run(call) for call in recorded()]
    wanted = [UNetGraph(network)(call.sample, call.timestep, call.text)[0] for call in recorded()]
    return float((torch.stack(got) - torch.stack(wanted)).norm() / torch.stack(wanted).norm())


def parameters(work: Work) -> dict[str, Tensor]:
    return {name: parameter.clone() for name, parameter in work.denoiser.named_parameters()}


def changed(work: Work, before: dict[str, Tensor]) -> set[str]:
    return {name for name, parameter in work.denoiser.named_parameters() if not torch.equal(parameter, before[name])}


def test_finetuning_at_w4a4_lowers_the_error_of_the_output(network: Any, tmp_path: Path) -> None:
    work = make_work(network, tmp_path)
    weights, error = parameters(work), output_error(work, network)
    scales = {name: layer.input_scale for name, layer in work.quantization.items()}
    step = quick()
    step.requires(work)
    summary = step.apply(work)
    after = output_error(work, network)
    assert after < 0.8 * error
    assert f"{error:.2%} -> {after:.2%}" in summary, "it says what the simulation of the plan shows"
    # Only what it names has changed, and that is at most its share of the parameters.
    chosen = step.selection(work)
    moved = changed(work, weights)
    allowed = {f"{name}.weight" for name in (*chosen.time, *chosen.rest)} | {f"{name}.bias" for name in chosen.time}
    assert moved <= allowed
    assert any(path.endswith("time_emb_proj.bias") for path in moved)
    total = sum(parameter.numel() for parameter in network.parameters())
    factors = sum(len(np.unique(scale)) for scale in scales.values() if scale is not None)
    assert sum(weights[path].numel() for path in allowed) + factors == pytest.approx(chosen.share * total)
    assert chosen.share <= 0.07
    assert chosen.left_out, "this network has more time projections than fit"
    for name, layer in work.quantization.items():
        if f"{name}.weight" in moved:
            weight = work.denoiser.get_submodule(name).weight
            assert torch.equal(weight, rounded_weight(weight, layer)), "on its grid"
            assert torch.equal(work.originals[f"{name}.weight"], weights[f"{name}.weight"])
        assert layer.input_scale is not None
        assert not np.array_equal(layer.input_scale, scales[name]), name
        assert layer.input_scale.shape == scales[name].shape  # type: ignore[union-attr]
        assert layer.input_scale.dtype == np.float32


def test_time_alone_trains_nothing_but_time_layers(network: Any, tmp_path: Path) -> None:
    work = make_work(network, tmp_path)
    weights, layers = parameters(work), dict(work.quantization)
    step = quick(layers="time")
    step.requires(work)
    step.apply(work)
    moved = changed(work, weights)
    assert moved
    assert all(".time_emb_proj." in path for path in moved)
    for name, layer in work.quantization.items():
        if name in family.time_layers(network):
            # A scale for each recorded step has its own change; steps between them follow their neighbours.
            change = np.log(layer.input_scale / layers[name].input_scale)  # type: ignore[operator]
            assert len(np.unique(change.round(6))) > 2
            assert change[1] == pytest.approx((change[0] + change[2]) / 2, abs=1e-5)
        else:
            assert layer is layers[name]


@pytest.mark.parametrize("layers", ["feed-forward", "attention", "both"])
def test_with_a_table_the_rest_is_trained(network: Any, tmp_path: Path, layers: str) -> None:
    work = make_work(network, tmp_path, "int4", "int8", time=False)
    TemporalTablePass().apply(work)
    weights, error = parameters(work), output_error(work, network)
    with pytest.raises(DiffpressError, match="table stands in their place"):
        quick(layers="time").requires(work)
    step = quick(layers=layers)
    summary = step.apply(work)
    assert "no time projections: a table" in summary
    assert output_error(work, network) < error
    moved = changed(work, weights)
    ends = {"feed-forward": (".ff.net.",), "attention": (".attn1.", ".attn2.")}
    wanted = ends.get(layers, sum(ends.values(), ()))
    assert moved
    assert all(path.endswith(".weight") and any(end in path for end in wanted) for path in moved)
    assert step.selection(work).share <= 0.07


def test_time_projections_in_float_learn_in_float(network: Any, tmp_path: Path) -> None:
    work = make_work(network, tmp_path, time=False)
    weights, error = parameters(work), output_error(work, network)
    quick().apply(work)
    name = FinetunePass().selection(work).time[0]
    assert f"{name}.weight" in changed(work, weights)
    assert name not in work.quantization
    assert output_error(work, network) < 0.8 * error


def test_an_interrupted_run_ends_where_a_whole_one_does(
    network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 4)
    step = quick(iterations=14)
    whole = make_work(network, tmp_path / "whole")
    step.apply(whole)

    def until_ten(items: Iterable[Any], _: str) -> Iterator[Any]:
        for count, item in enumerate(items):
            if count == 10:
                raise KeyboardInterrupt
            yield item

    broken = make_work(network, tmp_path / "pieces")
    broken.progress = until_ten
    weights, layers = parameters(broken), dict(broken.quantization)
    with pytest.raises(KeyboardInterrupt):
        step.apply(broken)
    assert not changed(broken, weights)
    assert broken.quantization == layers
    done: list[int] = []
    rest = make_work(network, tmp_path / "pieces")
    rest.progress = lambda items, _: [item for item in items if not done.append(item)]  # type: ignore[func-returns-value]
    step.apply(rest)
    assert done == list(range(8, 14))
    assert not changed(rest, parameters(whole))
    for name, layer in whole.quantization.items():
        assert np.array_equal(layer.input_scale, rest.quantization[name].input_scale)  # type: ignore[arg-type]
    # Other settings do not go on from that state.
    other = make_work(network, tmp_path / "pieces")
    done.clear()
    other.progress = rest.progress
    quick(iterations=14, weight_rate=2e-3).apply(other)
    assert done == list(range(14))


@pytest.mark.parametrize(
    ("weights", "inputs", "block", "scaled"),
    [
        ("int4", "int4", None, False),
        ("int8", "int8", None, True),
        ("int4", None, 8, True),
        ("e2m1", "e4m3", None, False),
    ],
)
def test_the_student_computes_what_the_plan_says(
    network: Any, tmp_path: Path, weights: str, inputs: str | None, block: int | None, scaled: bool
) -> None:
    work = make_work(network, tmp_path, weights, inputs)
    for name, layer in work.quantization.items():
        weight = work.denoiser.get_submodule(name).weight
        multiplier = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)) + 0.5 if scaled else None
        if multiplier is not None:
            weight = weight / multiplier.reshape(1, -1, *[1] * (weight.ndim - 2))
            layer = replace(layer, multiplier=multiplier.numpy())
        work.quantization[name] = replace(layer, weight_scale=weight_scale(weight, get(weights), block=block).numpy())
    student = Student(work, FinetunePass(layers="both").selection(work))
    for call in recorded()[:3]:
        with torch.no_grad(), simulated(work.denoiser, work.quantization, TIMESTEPS):
            expected = work.run(call)
        with student.attached():
            seen, output = student(call)
            exact = student.full_precision(call)[1]
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
        assert output.requires_grad
        assert seen
        torch.testing.assert_close(exact, UNetGraph(network)(call.sample, call.timestep, call.text)[0])


def test_targets_are_those_before_any_rounding(network: Any, tmp_path: Path) -> None:
    work = make_work(network, tmp_path)
    for name, layer in work.quantization.items():
        weight = work.denoiser.get_submodule(name).weight
        work.originals[f"{name}.weight"], weight.data = weight.data, rounded_weight(weight.data, layer)
    selection = FinetunePass().selection(work)
    student, call = Student(work, selection), recorded()[0]
    with student.attached():
        wanted, target = student.full_precision(call)
    torch.testing.assert_close(target, UNetGraph(network)(call.sample, call.timestep, call.text)[0])
    assert wanted.keys() == {*selection.time, *selection.rest}


def test_weights_start_from_their_learned_rounding_but_not_all_at_its_middle(network: Any, tmp_path: Path) -> None:
    work = make_work(network, tmp_path)
    generator = torch.Generator().manual_seed(0)
    for name, layer in work.quantization.items():
        weight = work.denoiser.get_submodule(name).weight
        step = torch.from_numpy(layer.weight_scale).reshape(-1, *[1] * (weight.ndim - 1))
        up = torch.rand(weight.shape, generator=generator).round()  # any rounding, up or down
        learned = ((weight.data / step).floor() + up) * step
        work.originals[f"{name}.weight"], weight.data = weight.data, rounded_weight(learned, layer)
    student = Student(work, FinetunePass().selection(work))
    for path, value in student.weights().items():
        name, _, kind = path.rpartition(".")
        present = work.denoiser.get_parameter(path)
        if kind == "weight":
            assert torch.equal(rounded_weight(value.detach(), work.quantization[name]), present)
            assert float((value == present).float().mean()) < 0.1
        else:
            assert torch.equal(value, present)


def test_the_objective_is_the_sum_of_its_parts(network: Any, tmp_path: Path) -> None:
    work = make_work(network, tmp_path)
    selection = replace(
        FinetunePass(layers="both").selection(work), rest=["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    )
    student, call = Student(work, selection), recorded()[0]
    with student.attached(), torch.no_grad():
        (wanted, target), (got, output) = student.full_precision(call), student(call)
        away = {name: float((got[name] - wanted[name]).square().mean()) for name in wanted}
        expected = sum(away[name] for name in selection.time) / len(selection.time) + away[selection.rest[0]]
        expected += 2 * float((output - target).square().mean())
        assert float(objective(student, selection, call, 2)) == pytest.approx(expected, rel=1e-5)


def test_groups_of_steps_stay_groups() -> None:
    layer = LayerQuant(np.ones(4, np.float32), np.array([2, 2, 3, 3, 5], np.float32))
    scales = InputScales(layer, torch.zeros(1))
    scales.log_factor = torch.tensor([0.1, 0.2, 0.4])
    assert scales.learned([0, 3, 4]) == pytest.approx(layer.input_scale * np.exp([0.1, 0.1, 0.2, 0.2, 0.4]))  # type: ignore[operator]
    # The group of steps 2 and 3 was not visited: it lies between its neighbours.
    got = scales.learned([1, 4])
    assert got[:2] == pytest.approx(2 * np.exp([0.1, 0.1]))
    assert 3 * np.exp(0.1) < got[2] < got[3] < 3 * np.exp(0.4)


def test_what_does_not_help_is_not_kept(network: Any, tmp_path: Path) -> None:
    work = make_work(network, tmp_path)
    weights, layers = parameters(work), dict(work.quantization)
    summary = quick(iterations=3, weight_rate=10.0, scale_rate=2.0).apply(work)
    assert "stays as it was" in summary
    assert not changed(work, weights)
    assert work.quantization == layers


def test_what_it_cannot_do_is_said(network: Any, tmp_path: Path) -> None:
    work = make_work(network, tmp_path)
    with pytest.raises(DiffpressError, match="input scales are more than"):
        FinetunePass(share=1e-4).requires(work)
    with pytest.raises(ValueError, match="less than or equal"):
        FinetunePass(share=0.5)
    work.quantization.clear()
    with pytest.raises(DiffpressError, match="put 'quantize' before it"):
        FinetunePass().requires(work)
