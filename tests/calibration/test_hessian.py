"""Streamed Hessians against those of everything at once."""

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffpress.calibration import hessian as hessian_module
from diffpress.calibration import hessian_run
from diffpress.calibration.capture import Call
from diffpress.calibration.hessian import Hessian, alphas, bytes_of, unsupported, widths_of
from diffpress.calibration.hessian_run import collect_in_parts, load, same_inputs, save
from diffpress.calibration.model import load_pipeline
from diffpress.calibration.statistics import Run, row_of
from diffpress.errors import DiffpressError


def quiet(items: Iterable[Any], _: str) -> Iterable[Any]:
    return items


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def direct(parts: list[tuple[Tensor, float]]) -> Tensor:
    """H from X [in, tokens] of one image each, with its weight, in float64."""
    total = sum(weight for _, weight in parts)
    return 2 / total * sum(weight * x.double() @ x.double().t() for x, weight in parts)


def test_alphas_are_the_formulas() -> None:
    assert alphas("uniform", 3) == (1.0, 1.0, 1.0)
    assert alphas("linear", 5) == pytest.approx((1.2, 1.1, 1.0, 0.9, 0.8))
    # T = 4: ln 4, ln 3, ln 2, ln 1 over ln 4.
    falling = (1.2, 0.8 + 0.4 * math.log(3) / math.log(4), 1.0, 0.8)
    assert alphas("log-decrease", 4) == pytest.approx(falling)
    assert alphas("log-increase", 4) == pytest.approx(falling[::-1])
    assert alphas("log-decrease", 4, low=0.0, high=2.0)[2:] == pytest.approx((1.0, 0.0))
    assert [alphas(method, 1) for method in ("uniform", "linear", "log-decrease")] == [(1.0,), (1.2,), (1.2,)]
    with pytest.raises(DiffpressError, match="no weighting is called cosine: choose from uniform, log-decrease"):
        alphas("cosine", 3)  # type: ignore[arg-type]


def test_a_linear_layers_hessian_is_the_direct_one() -> None:
    stream, expected = Hessian(nn.Linear(6, 3)), []
    for step, alpha in enumerate(alphas("log-decrease", 5)):
        x = drawn(2, 7, 6, seed=step)
        stream.update(x, alpha)
        expected += [(image.t(), alpha) for image in x]
    assert stream.blocks[0].dtype == torch.float32
    assert torch.allclose(stream.matrix.double(), direct(expected), rtol=1e-5, atol=1e-6)
    before = stream.matrix.clone()
    stream.update(drawn(2, 7, 6, seed=9), 0.0)
    assert torch.equal(stream.matrix, before)
    uniform, plain = Hessian(nn.Linear(6, 3)), Hessian(nn.Linear(6, 3))
    uniform.update(x, 3.0)
    plain.update(x)
    assert torch.allclose(uniform.matrix, plain.matrix)  # a factor common to all steps cancels
    vectors = Hessian(nn.Linear(6, 3))
    vectors.update(drawn(4, 6))  # of time features: a token each
    assert torch.allclose(vectors.matrix.double(), direct([(x[:, None], 1.0) for x in drawn(4, 6)]), rtol=1e-5)


CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 2), "padding": (0, 2), "stride": (3, 1), "dilation": (2, 1)},
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
]


@pytest.mark.parametrize("chunk", [1, 4 * 4 * 9 * 9 * 3, 64 << 20])  # a line at a time, some lines, everything
@pytest.mark.parametrize("fields", CONVOLUTIONS)
def test_a_convolutions_hessian_is_the_direct_one(
    fields: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hessian_module, "CHUNK_BYTES", chunk)
    conv = nn.Conv2d(4, 5, bias=False, **fields).requires_grad_(False)
    stream, outputs, images = Hessian(conv), [], []
    for seed, alpha in ((0, 1.2), (1, 0.8)):
        x = drawn(3, 4, 9, 8, seed=seed)
        stream.update(x, alpha)
        images += [(x[i : i + 1], alpha) for i in range(3)]
    # ||conv||^2 = tr(W X X^T W^T) for any weight, so H is right in every direction, and its columns in order.
    assert stream.matrix.shape == (conv.weight[0].numel(), conv.weight[0].numel())
    energies, expected = [], []
    for seed in range(30):
        conv.weight.copy_(drawn(*conv.weight.shape, seed=seed + 10))
        weight = conv.weight.flatten(1).double()
        energies.append(float((weight @ stream.matrix.double() * weight).sum()))
        outputs = [alpha * conv(image).double().square().sum() for image, alpha in images]
        expected.append(float(sum(outputs)) * 2 / sum(alpha for _, alpha in images))
    assert energies == pytest.approx(expected, rel=1e-5)
    # And X itself, column for column.
    parts, each = hessian_module._inputs(conv, images[0][0], None, torch.Generator())
    x = torch.cat(list(parts), dim=1)
    out = conv(images[0][0])
    assert each == 1.0
    assert torch.allclose((conv.weight.flatten(1) @ x).reshape(out[0].shape), out[0], atol=1e-5)
    if not isinstance(fields.get("padding", 0), str):
        geometry = {key: value for key, value in fields.items() if key != "kernel_size"}
        assert torch.equal(x, nn.functional.unfold(images[0][0], conv.kernel_size, **geometry)[0])


def test_a_sample_of_the_tokens_stands_for_all() -> None:
    for layer, shape in ((nn.Linear(6, 3), (2, 500, 6)), (nn.Conv2d(2, 3, 3), (2, 2, 24, 24))):
        mixing = drawn(shape[-1], shape[-1], seed=7)
        whole, sampled, again = Hessian(layer), Hessian(layer, rows=150), Hessian(layer, rows=150)
        for seed in range(20):
            x = drawn(*shape, seed=seed) @ mixing
            for stream in (whole, sampled, again):
                stream.update(x)
        assert torch.equal(sampled.matrix, again.matrix)
        difference = (sampled.matrix - whole.matrix).norm() / whole.matrix.norm()
        assert 1e-4 < difference < 0.15
        assert float(sampled.matrix.trace()) == pytest.approx(float(whole.matrix.trace()), rel=0.1)
        enough = Hessian(layer, rows=10**6)
        for seed in range(20):
            enough.update(drawn(*shape, seed=seed) @ mixing)
        assert torch.equal(enough.matrix, whole.matrix)


def test_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_module, "UNIT", 4)
    conv = nn.Conv2d(22, 3, 3)
    whole, split = Hessian(conv), Hessian(conv, span=80)
    for stream in (whole, split):
        stream.update(drawn(2, 22, 5, 5))
    assert split.widths == [72, 36, 54 + 36] or all(width <= 80 for width in split.widths)
    assert sum(split.widths) == 198
    assert all(width % 36 == 0 for width in split.widths[:-1])
    first = 0
    for block, width in zip(split.blocks, split.widths, strict=True):
        part = slice(first, first + width)
        assert torch.allclose(block, whole.matrix[part, part], rtol=1e-5, atol=1e-6)
        first += width
    assert bytes_of(conv) == 4 * 198**2 == whole.matrix.nbytes
    assert bytes_of(conv, 80) == sum(block.nbytes for block in split.blocks)
    assert widths_of(conv, 198) == [198]
    with pytest.raises(DiffpressError, match="3 blocks"):
        _ = split.matrix


def test_the_largest_convolution_of_stable_diffusion_can_be_split() -> None:
    with torch.device("meta"):
        conv = nn.Conv2d(2560, 1280, 3)
    assert bytes_of(conv) == 4 * 23040**2
    widths = widths_of(conv, 5760)
    assert widths == [5760] * 4
    assert bytes_of(conv, 5760) == bytes_of(conv) // 4
    assert [width % (16 * 9) for width in widths_of(conv, 6000)] == [0] * 4


def test_merging_is_the_same_as_seeing_everything() -> None:
    layer = nn.Linear(6, 3)
    streams = [Hessian(layer) for _ in range(4)]
    for seed, alpha in enumerate(alphas("log-decrease", 6)):
        x = drawn(2, 7, 6, seed=seed)
        streams[0].update(x, alpha)
        streams[1 + seed % 2].update(x, alpha)
    kept = streams[2].matrix.clone()
    streams[1].merge(streams[2])
    assert torch.allclose(streams[1].matrix, streams[0].matrix, rtol=1e-5, atol=1e-6)
    assert streams[1].weight == pytest.approx(streams[0].weight)
    assert torch.equal(streams[2].matrix, kept)
    before = streams[1].matrix.clone()
    streams[1].merge(streams[3])  # which saw nothing
    assert torch.equal(streams[1].matrix, before)
    streams[3].merge(streams[2])
    streams[3].blocks[0].zero_()
    assert torch.equal(streams[2].matrix, kept)  # a copy
    with pytest.raises(DiffpressError, match=r"blocks of \[6\] and \[5\] columns cannot be merged"):
        streams[0].merge(Hessian(nn.Linear(5, 3)))


class Network(nn.Module):
    """A convolution, three readers of one input of which one is changed in place before, and one nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.point = nn.Conv2d(3, 4, 1, stride=2)
        self.query = nn.Linear(4, 5)
        self.key = nn.Linear(4, 5)
        self.value = nn.Linear(4, 5)
        self.last = nn.Linear(5, 2)
        self.idle = nn.Linear(2, 2)

    def forward(self, call: Call) -> Tensor:
        image = call.sample * call.timestep
        tokens = (self.conv(image) + self.point(image)).flatten(2).transpose(1, 2)
        first = self.query(tokens) * self.key(tokens)
        value = self.value(tokens.mul_(2))
        return self.last(first + value)


REACHED = ("conv", "point", "query", "key", "value", "last")


@pytest.fixture
def network() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network().requires_grad_(False)


@pytest.fixture
def calls() -> list[Call]:
    text = torch.zeros(2, 1, 1)
    return [Call(drawn(2, 3, 9, 9, seed=i), torch.tensor([t]), text) for i, t in enumerate((9.0, 4.0, 1.0) * 2)]


def collect(run: Run, layers: dict[str, nn.Module], calls: list[Call], *given: Any, **more: Any) -> dict[str, Hessian]:
    """The Hessians over all calls as one part, which is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        return collect_in_parts(run, layers, [calls], Path(folder), *given, **more)


def layers(network: Network, *names: str) -> dict[str, nn.Module]:
    return {name: network.get_submodule(name) for name in names or REACHED}


def weight_of(call: Call) -> float:
    return alphas("log-decrease", 3)[row_of((9.0, 4.0, 1.0))(call)]


def test_what_reads_the_same_input_is_found(network: Network, calls: list[Call]) -> None:
    leaders = same_inputs(network, layers(network, *REACHED, "idle"), calls[0])
    assert leaders == {name: name for name in (*REACHED, "idle")} | {"key": "query"}
    assert not network.key._forward_pre_hooks


def test_collected_hessians_are_the_direct_ones(network: Network, calls: list[Call]) -> None:
    found = collect(network, layers(network), calls, quiet, weight_of)
    for name in ("conv", "query", "value"):
        parts = []
        for call in calls:
            image = call.sample * call.timestep
            tokens = (network.conv(image) + network.point(image)).flatten(2)
            inputs = nn.functional.unfold(image, 3, padding=1, stride=2) if name == "conv" else tokens
            parts += [(x * (2 if name == "value" else 1), weight_of(call)) for x in inputs]
        assert torch.allclose(found[name].matrix.double(), direct(parts), rtol=1e-4, atol=1e-5)
    shared = collect(network, layers(network), calls, quiet, weight_of, {"key": "query", "query": "query"})
    assert shared["key"] is shared["query"]
    without_leader = collect(network, layers(network, "key"), calls, quiet, weight_of, {"key": "query"})
    for stream in (shared["query"], without_leader["key"]):
        assert torch.equal(stream.matrix, found["key"].matrix)
    uniform = collect(network, layers(network, "conv"), calls, quiet)["conv"].matrix
    assert not torch.allclose(uniform, found["conv"].matrix, rtol=1e-3)


def test_what_has_no_hessian_is_named(network: Network, calls: list[Call]) -> None:
    with pytest.raises(DiffpressError, match="reaches 1 layers, such as idle"):
        collect(network, layers(network, "conv", "idle"), calls, quiet)
    assert unsupported(nn.Linear(2, 2)) is None
    assert unsupported(nn.Conv2d(2, 2, 1)) is None
    network.norm = nn.GroupNorm(2, 4)
    network.grouped = nn.Conv2d(4, 4, 3, groups=2)
    for name, words in (("norm", "GroupNorm is neither"), ("grouped", "Conv2d with 2 groups")):
        with pytest.raises(DiffpressError, match=f"layer {name} has no Hessian, since .*{words}"):
            collect(network, layers(network, "conv", name), calls, quiet)
        with pytest.raises(DiffpressError, match=words):
            Hessian(network.get_submodule(name))
    network.conv.bias[0] = math.inf
    with pytest.raises(DiffpressError, match=r"layer query gets an input that is not finite .* at timestep 9"):
        collect(network, layers(network), calls, quiet)


def test_saved_hessians_come_back(network: Network, calls: list[Call], tmp_path: Path) -> None:
    found = collect(network, layers(network), calls, quiet, leaders={"key": "query"})
    found["last"] = Hessian(network.last)  # as of a part in which no call reached it
    save(found, tmp_path / "part")
    save(found, tmp_path / "part")  # by another process
    assert [path.name for path in tmp_path.iterdir()] == ["part"]
    assert len(list((tmp_path / "part").glob("*.safetensors"))) == len(REACHED) - 1
    read = load(layers(network), tmp_path / "part")
    assert read["key"] is read["query"]
    for name in REACHED:
        assert read[name].weight == found[name].weight
        assert all(map(torch.equal, read[name].blocks, found[name].blocks))
    assert read["last"].blocks == []
    read["conv"].update(drawn(2, 3, 9, 9))  # goes on
    doubled = load(layers(network), tmp_path / "part", into=load(layers(network), tmp_path / "part"))
    assert doubled["conv"].weight == 2 * found["conv"].weight
    assert torch.allclose(doubled["key"].matrix, found["key"].matrix)
    with pytest.raises(DiffpressError, match="Hessians of other layers"):
        load(layers(network, "conv"), tmp_path / "part")
    with pytest.raises(DiffpressError, match="Hessians of other shapes"):
        load({**layers(network), "conv": nn.Conv2d(5, 4, 3)}, tmp_path / "part")


def test_parts_are_made_once_and_merged(
    network: Network, calls: list[Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = collect(network, layers(network), calls, quiet, weight_of)
    parts = [calls[:1], calls[1:4], calls[4:]]
    runs: list[float] = []

    def run(call: Call) -> Tensor:
        if len(runs) == 2:
            raise KeyboardInterrupt
        runs.append(float(call.timestep))
        return network(call)

    def gather() -> dict[str, Hessian]:
        return collect_in_parts(run, layers(network), parts, tmp_path, quiet, weight_of, {"key": "query"})

    with pytest.raises(KeyboardInterrupt):
        gather()
    assert [path.name for path in tmp_path.iterdir()] == ["0000"]
    runs.append(0.0)
    found = gather()
    assert len(runs) == 3 + 5  # the first part's call is not made again
    for name in REACHED:
        assert torch.allclose(found[name].matrix, expected[name].matrix, rtol=1e-4, atol=1e-5)
    again = gather()
    assert len(runs) == 3 + 5
    assert all(torch.equal(again[name].matrix, found[name].matrix) for name in REACHED)
    assert again["key"] is again["query"]
    # Several processes: this one makes the first of those that lack, and finds the others made.
    monkeypatch.setattr(hessian_run, "_collect", None)
    assert torch.equal(gather()["conv"].matrix, found["conv"].matrix)


def test_a_unets_attention_shares_its_hessians(tiny_pipeline: Path) -> None:
    unet = load_pipeline(str(tiny_pipeline)).unet.requires_grad_(False)
    found = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    call = Call(drawn(2, 4, 8, 8), torch.tensor([500.0]), drawn(2, 8, 32))

    def run(call: Call) -> Any:
        return unet(call.sample, call.timestep, call.text)

    leaders = same_inputs(run, found, call)
    own, texts = set(), set()
    for name in found:
        block, _, part = name.rpartition(".")
        if block.endswith("attn1") and part.startswith("to_") and part != "to_out":
            assert leaders[name] == f"{block}.to_q"
        elif block.endswith("attn2") and part in ("to_k", "to_v"):
            texts.add(leaders[name])
        else:
            own.add(name)
    assert len(texts) == 1
    assert all(leaders[name] == name for name in own)
    hessians = collect(run, found, [call], quiet, leaders=leaders)
    for name in own | texts:
        module: Any = found[name]
        assert hessians[name].matrix.shape == (module.weight[0].numel(),) * 2
