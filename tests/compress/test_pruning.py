"""The pruning passes on a small U-Net: what leaves, what stays exact, what they refuse, and that they go on."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffpress.calibration import hessian_run
from diffpress.calibration.capture import Call
from diffpress.calibration.hessian import kernel_of
from diffpress.compress.families import unet as family
from diffpress.compress.numerics.simulate import rounded_weight
from diffpress.compress.prune import packages, structure
from diffpress.compress.prune.distill import DistillPass, touched
from diffpress.compress.prune.outputs import Outputs
from diffpress.compress.prune.sparse import PruneNMPass, PruneUnstructuredPass, layers
from diffpress.compress.prune.structured import PruneStructuredPass
from diffpress.compress.quantize.post_training import QuantizePass
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import Sampling

TIMESTEPS = (801.0, 601.0, 401.0, 201.0, 1.0)
Fresh = Callable[[], Work]


@pytest.fixture(scope="module")
def network() -> Any:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=8,
        )
    return unet.eval().requires_grad_(False)


class Recorded(list[Call]):
    def rows(self) -> set[int]:
        return set(range(len(TIMESTEPS)))


@pytest.fixture
def fresh(network: Any, tmp_path: Path) -> Fresh:
    generator = torch.Generator().manual_seed(0)
    calls = Recorded()
    base = torch.randn(4, 8, 8, generator=generator)
    for index in range(8):  # samples that have something in common, as real ones do
        sample = base + 0.3 * torch.randn(2, 4, 8, 8, generator=generator)
        text = torch.randn(2, 5, 16, generator=generator)
        calls.append(Call(sample, torch.tensor([TIMESTEPS[index % 5]]), text))
    terms = tuple((("sample", 0, 0.9), ("output", 0, -0.2)) for _ in TIMESTEPS)
    sampling = Sampling("toy", 5, 3.0, 64, 64, TIMESTEPS, (1.0,) * 5, 1.0, terms)

    def made() -> Work:
        pipeline = SimpleNamespace(unet=copy.deepcopy(network), tokenizer=SimpleNamespace(model_max_length=5))
        work = Work(pipeline, sampling, 0, lambda _: calls, lambda items, _: items, tmp_path)  # type: ignore[arg-type,return-value]
        work.original = lambda: copy.deepcopy(network)
        return work

    return made


def parameters(work: Work) -> int:
    return sum(parameter.numel() for parameter in work.denoiser.parameters())


def error(work: Work, network: Any) -> float:
    pruned = work.pipeline.unet
    work.pipeline.unet = network
    outputs = Outputs(work, list(work.record()))
    work.pipeline.unet = pruned
    return outputs.error()


def test_structures_leave_and_what_is_spared_stays(fresh: Fresh, network: Any) -> None:
    work = fresh()
    said = PruneStructuredPass(ratio=0.15).apply(work)
    assert parameters(work) <= 0.85 * parameters(fresh())
    assert "of the parameters removed: " in said and "error of the output on recorded calls" in said
    cut = structure.widths(work.denoiser)
    assert cut and not {*packages.ends(network, structure.structures(network))} & {*cut}
    assert not any(path.startswith(("down_blocks.0.resnets.0", "up_blocks.2.resnets.1")) for path in cut)
    assert 0 < error(work, network) < 0.5 and not work.originals


def test_one_package_looks_at_its_calls_once(fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sensitivities were measured with serves to solve: nothing was cut in between."""
    collect, looks = hessian_run._collect, 0

    def counted(*given: Any) -> Any:
        nonlocal looks
        looks += 1
        return collect(*given)

    monkeypatch.setattr(hessian_run, "_collect", counted)
    once, twice, steps = fresh(), fresh(), []
    for work in (once, twice):
        PruneStructuredPass(ratio=0.15, packages=1).apply(work)
        steps.append(looks)
        monkeypatch.setattr(PruneStructuredPass, "_once", lambda *_: False)
        for kept in tmp_path.glob("prune-structured*"):  # what would be read in place of a second look
            shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
    assert steps == [packages.PARTS, 3 * packages.PARTS] and not list(tmp_path.glob("hessians-*"))
    pairs = zip(once.denoiser.named_parameters(), twice.denoiser.named_parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_the_surgeon_hurts_less_than_its_rivals(fresh: Fresh, network: Any) -> None:
    errors = {}
    for method in ("obs", "wanda", "magnitude"):
        work = fresh()
        PruneStructuredPass(ratio=0.2, method=method, allocation="uniform", exclude=()).apply(work)
        errors[method] = error(work, network)
    assert errors["obs"] < 0.8 * min(errors["wanda"], errors["magnitude"])


def test_a_share_of_the_operations_and_even_norm_groups(fresh: Fresh, network: Any) -> None:
    _, total = structure.flops(network, 8, 8, 5)
    work = fresh()
    PruneStructuredPass(ratio=0.1, budget="flops", norm_groups="even", exclude=(), kinds=("channels",)).apply(work)
    _, left = structure.flops(work.denoiser, 8, 8, 5)
    assert left <= 0.9 * total
    assert error(work, network) < 1
    for path, count in structure.widths(work.denoiser).items():
        assert work.denoiser.get_submodule(path).norm2.num_groups == 8, (path, count)


def test_measured_latency_is_a_budget(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    work = fresh()
    with pytest.raises(DiffpressError, match="no inference library is installed"):
        PruneStructuredPass(budget="latency").requires(work)
    whole = parameters(work)
    work.latency = lambda program, corrections: {"full": parameters(work) / whole}  # as long as it is large
    PruneStructuredPass(ratio=0.2, budget="latency", allocation="uniform", exclude=()).apply(work)
    assert parameters(work) <= 0.8 * whole
    with pytest.raises(DiffpressError, match=r"no cut that was tried makes a call take 5%"):
        PruneStructuredPass(ratio=0.95, budget="latency", allocation="uniform", exclude=()).apply(work)


@pytest.mark.parametrize(
    "chosen", [PruneStructuredPass(ratio=0.15, allocation="uniform"), PruneUnstructuredPass(), PruneNMPass()]
)
def test_an_interrupted_run_ends_where_a_whole_one_does(
    fresh: Fresh, chosen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fresh()
    chosen.apply(whole)
    for file in tmp_path.rglob("package-*"):
        if file.name != "package-000.safetensors":
            file.unlink()
    asked = []
    collect = packages.collect
    monkeypatch.setattr(packages, "collect", lambda *given, **more: asked.append(1) or collect(*given, **more))
    again = fresh()
    chosen.apply(again)
    assert 0 < len(asked) < chosen.packages
    states = whole.denoiser.state_dict(), again.denoiser.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_so_many_weights_are_zero_and_others_make_up_for_them(fresh: Fresh, network: Any) -> None:
    errors = {}
    for method in ("obs", "magnitude"):
        work = fresh()
        PruneUnstructuredPass(ratio=0.5, method=method).apply(work)
        for layer in layers("", work, None)[0].values():
            assert int((layer.weight == 0).sum()) == round(0.5 * layer.weight.numel())
        errors[method] = error(work, network)
    assert errors["obs"] < 0.8 * errors["magnitude"]


def test_weights_leave_where_that_does_least(fresh: Fresh, network: Any) -> None:
    spread, even = fresh(), fresh()
    few = list(layers("", spread, None)[0])[::6]  # of every kind; each is pruned three times to see what it does
    spared = tuple(path for path in family.quantizable(network) if path not in few)
    PruneUnstructuredPass(ratio=0.5, exclude=spared).apply(even)
    PruneUnstructuredPass(ratio=0.5, exclude=spared, allocation="sensitivity", refine=0).apply(spread)
    chosen = layers("", spread, spared)[0]
    assert list(chosen) == few
    shares = {name: float((layer.weight == 0).float().mean()) for name, layer in chosen.items()}
    total = sum(shares[name] * layer.weight.numel() for name, layer in chosen.items())
    assert total >= 0.49 * sum(layer.weight.numel() for layer in chosen.values())
    assert len({round(share, 1) for share in shares.values()}) > 1 and error(spread, network) < error(even, network)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_two_of_four_input_channels_at_every_place_and_zeros_stay_in_8_bits(fresh: Fresh, format: str) -> None:
    work = fresh()
    said = PruneNMPass().apply(work)
    assert said.startswith("50.0% of the weights of ")
    QuantizePass(format=format, exclude=()).apply(work)
    for name, layer in layers("", work, None)[0].items():
        weight = layer.weight.flatten(1)
        assert layer.weight.shape[1] % 4 == 0
        groups = weight.unflatten(1, (-1, 4, kernel_of(layer))) == 0
        assert bool((groups.sum(dim=2) == 2).all())
        rounded = rounded_weight(layer.weight, work.quantization[name])
        assert bool((rounded[layer.weight == 0] == 0).all())


def test_layers_that_do_not_fit_a_pattern_are_named(fresh: Fresh) -> None:
    work = fresh()
    before = {name: layer.weight.clone() for name, layer in layers("", work, None)[0].items()}
    said = PruneNMPass(n=4, m=16, exclude=("*ff*",), smallest=32).apply(work)
    assert "fewer than 32 input channels" in said
    pruned = [layer.weight for name, layer in layers("", work, None)[0].items() if not layer.weight.equal(before[name])]
    assert pruned and all(float((weight == 0).float().mean()) == 0.75 for weight in pruned)  # 4 of 16 stay
    with pytest.raises(DiffpressError, match="no layer has input channels for groups of 7"):
        PruneNMPass(n=2, m=7).requires(fresh())


@pytest.mark.parametrize(
    ("pruning", "rate"), [(PruneStructuredPass(ratio=0.3, method="magnitude", exclude=()), 2e-4), (PruneNMPass(), 1e-3)]
)
def test_distillation_lowers_the_error_and_keeps_zeros(fresh: Fresh, network: Any, pruning: Any, rate: float) -> None:
    work = fresh()
    with pytest.raises(DiffpressError, match="put a pruning pass before it"):
        DistillPass().requires(work)
    pruning.apply(work)
    zeros = {name: work.denoiser.get_submodule(name).weight == 0 for name in work.sparse}
    before, paths = error(work, network), touched(work)
    frozen = {key: value.clone() for key, value in work.denoiser.state_dict().items() if key not in paths}
    said = DistillPass(iterations=60, rate=rate).apply(work)
    assert "calls that were not learned from" in said and not said.startswith("nothing")
    assert error(work, network) < before
    assert all(bool((work.denoiser.get_submodule(name).weight[mask] == 0).all()) for name, mask in zeros.items())
    assert all(torch.equal(value, frozen[key]) for key, value in work.denoiser.state_dict().items() if key in frozen)


@pytest.mark.parametrize("count", [0, 1])
def test_distillation_needs_calls_to_learn_from_and_to_judge_by(fresh: Fresh, count: int) -> None:
    work = fresh()
    work.recorder = lambda _: Recorded(fresh().record())[:count]  # type: ignore[arg-type,return-value]
    with pytest.raises(DiffpressError, match=f"of {count} recorded calls none is left to judge by"):
        DistillPass().apply(work)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            PruneStructuredPass(exclude=("nothing.*",)),
            "prune-structured: exclude pattern 'nothing.*' matches no structure",
        ),
        (PruneStructuredPass(exclude=("*",)), "nothing is left that could be cut"),
        (PruneUnstructuredPass(exclude=("*",)), "the exclude patterns leave no layer to prune"),
        (PruneUnstructuredPass(exclude=("nothing",)), "prune-unstructured: exclude pattern 'nothing' matches no layer"),
        (
            PruneUnstructuredPass(ratio=0.97, allocation="sensitivity"),
            "a ratio of 0.97 cannot be spread, no layer may lose more than 0.95",
        ),
        (PruneNMPass(n=4, m=4), "prune-nm: 4 of every 4 is no pattern: n must be below m"),
    ],
)
def test_what_makes_no_sense_is_refused_before_work(fresh: Fresh, wrong: Any, message: str) -> None:
    with pytest.raises(DiffpressError, match=message.replace("*", r"\*")):
        wrong.requires(fresh())


def test_more_than_there_is_to_cut_is_refused_and_changes_nothing(fresh: Fresh) -> None:
    work = fresh()
    with pytest.raises(DiffpressError, match=r"ratio 0.9 of the denoiser's parameters is more than the 0\.\d\d"):
        PruneStructuredPass(ratio=0.9, allocation="uniform").apply(work)
    assert parameters(work) == parameters(fresh())


def test_pruning_comes_before_quantization_and_caches(fresh: Fresh) -> None:
    work = fresh()
    QuantizePass().apply(work)
    for late in (PruneStructuredPass(), PruneNMPass(), PruneUnstructuredPass()):
        with pytest.raises(DiffpressError, match="layers are quantized already"):
            late.requires(work)
