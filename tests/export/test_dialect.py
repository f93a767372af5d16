"""ONNX Runtime's dialect of a graph against the Q/DQ graph it came from."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from diffpress.bundle import Bundle
from diffpress.compress.numerics.formats import get
from diffpress.compress.numerics.ranges import weight_scale
from diffpress.errors import DiffpressError
from diffpress.export import attention, dialect, graphs, qdq, store
from diffpress.plan import LayerQuant
from diffpress.runtime import onnx_runtime
from diffpress.runtime.backends import open_session
from diffpress.runtime.pipeline import Pipeline

SCHEDULE = (900.0, 600.0, 300.0, 1.0)
STEPS = (0.02, 0.01, 0.03, 0.02)
LAYERS = ("first", "down", "narrow", "to_q", "to_k", "to_v", "to_out.0", "vector")


class Small(nn.Module):
    """What a U-Net has: convolutions of each kind, attention, a linear layer on vectors."""

    heads, scale, rescale_output_factor = 2, 8**-0.5, 1.0

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
        self.narrow = nn.Conv2d(16, 16, 1)
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(16, 16)])
        self.vector = nn.Linear(16, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        image = self.narrow(self.down(self.first(sample)).tanh())
        tokens = image.permute(0, 2, 3, 1).flatten(1, 2)
        attended = graphs.PlainAttention()(self, tokens)
        return self.vector(attended.mean(1)) + 0 * timestep


class Wrapped(nn.Module):
    def __init__(self, unet: Small) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (self.unet(sample, timestep),)


@cache
def small() -> tuple[Small, ir.Model]:
    """The network and its graph in float, as the exporter leaves it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Small().eval().requires_grad_(False)
        inputs = {"sample": torch.randn(2, 4, 6, 10), "timestep": torch.tensor([600.0])}
        return model, graphs.to_onnx(graphs.GraphSpec(Wrapped(model), inputs, ("out_sample",)))


def quant(name: str, scales: tuple[float, ...] = (0.02,), weight: str = "int8", inputs: str = "int8") -> LayerQuant:
    module: Any = small()[0].get_submodule(name)
    scale = weight_scale(module.weight, get(weight), "max").numpy()
    return LayerQuant(scale, np.array(scales, np.float32), weight, inputs)


def exported(plan: dict[str, LayerQuant]) -> ir.Model:
    graph = small()[1].clone()
    assert qdq.insert(graph, plan, SCHEDULE) == set(plan)
    graphs.finish(graph)
    return graph


def outputs(folder: Path, batch: int = 3, timestep: float = 300.0) -> list[np.ndarray]:
    """What both files of `folder` give for one input; the batch is not the one they were traced with."""
    sample = torch.randn(batch, 4, 6, 10, generator=torch.Generator().manual_seed(1)).numpy()
    feeds = {"sample": sample, "timestep": np.array([timestep], np.float32)}
    sessions = [open_session(folder / name, "onnxruntime") for name in ("model.onnx", "model.onnxruntime.onnx")]
    return [session.run({name: feeds[name] for name in session.inputs})["out_sample"] for session in sessions]


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("scales", [(0.02,), STEPS], ids=["one scale", "by step"])
def test_equals_the_qdq_graph(tmp_path: Path, scales: tuple[float, ...]) -> None:
    plan = {name: quant(name, scales) for name in LAYERS}
    graph = exported(plan)
    rewritten = dialect.onnxruntime(graph)
    assert rewritten is not None
    store.save({"model.onnx": graph, "model.onnxruntime.onnx": rewritten}, tmp_path)
    for timestep in (300.0, 600.0):
        standard, ours = outputs(tmp_path, timestep=timestep)
        assert error(ours, standard) < 1e-5
    found = ops(rewritten)
    assert found.count("MatMulIntegerToFloat") == len(LAYERS)
    assert found.count("MultiHeadAttention") == 1
    assert not {"Conv", "Gemm", "MatMul", "Softmax", "DequantizeLinear"} & set(found)
    assert found.count("QuantizeLinear") == len(LAYERS) - 2  # the queries, keys and values share theirs
    assert {"Conv", "Softmax", "DequantizeLinear"} <= set(ops(graph))  # the standard graph is as it was


def test_weights_are_stored_once_for_both_graphs(tmp_path: Path) -> None:
    graph = exported({name: quant(name) for name in LAYERS})
    store.save({"model.onnx": graph}, tmp_path / "alone")
    rewritten = dialect.onnxruntime(graph)
    assert rewritten is not None
    tables = sum(value.const_value.nbytes for name, value in rewritten.graph.initializers.items() if "places" in name)
    store.save({"model.onnx": graph, "model.onnxruntime.onnx": rewritten}, tmp_path / "both")
    sizes = [(tmp_path / name / store.DATA).stat().st_size for name in ("alone", "both")]
    assert sizes[1] - sizes[0] <= tables + 64 * len(rewritten.graph.initializers)


def test_layers_of_other_formats_keep_their_qdq_and_their_convolution(tmp_path: Path) -> None:
    plan = {"first": quant("first", weight="e4m3", inputs="e4m3"), "down": quant("down")}
    graph = exported(plan)
    rewritten = dialect.onnxruntime(graph)
    assert rewritten is not None
    assert ops(rewritten).count("MatMulIntegerToFloat") == 1
    assert ops(rewritten).count("Conv") == 2  # in fp8, and the one that is not quantized
    assert ops(rewritten).count("DequantizeLinear") == 2
    store.save({"model.onnx": graph, "model.onnxruntime.onnx": rewritten}, tmp_path)
    standard, ours = outputs(tmp_path)
    assert error(ours, standard) < 1e-5


def test_a_graph_without_int8_layers_has_no_dialect() -> None:
    assert dialect.onnxruntime(exported({})) is None
    assert dialect.onnxruntime(exported({"first": quant("first", weight="e4m3", inputs="e4m3")})) is None


def test_fused_attention_equals_the_plain_one_in_float(tmp_path: Path) -> None:
    graph = exported({})
    fused = graph.clone()
    assert attention.fuse_attention(fused) == 1
    store.save({"model.onnx": graph, "model.onnxruntime.onnx": fused}, tmp_path)
    standard, ours = outputs(tmp_path)
    assert error(ours, standard) < 1e-5


def test_attention_whose_weights_are_also_read_elsewhere_stays() -> None:
    graph = exported({})
    softmax = next(node for node in graph.graph if node.op_type == "Softmax")
    graph.graph.outputs.append(softmax.outputs[0])
    assert attention.fuse_attention(graph) == 0
    assert "Softmax" in ops(graph)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pads", "dilation"),
    [((5, 7), 3, 1, (1, 1, 1, 1), 1), ((6, 6), 3, 2, (0, 0, 1, 1), 1), ((8, 5), 2, 1, (0, 0, 0, 0), 2)],
)
def test_places_are_those_a_convolution_reads(
    size: tuple[int, int], kernel: int, stride: int, pads: tuple[int, int, int, int], dilation: int
) -> None:
    index, height, width = dialect.places(size, (kernel, kernel), ((stride,) * 2, pads, (dilation,) * 2))
    x, weight = torch.randn(1, 1, *size), torch.randn(1, 1, kernel, kernel)
    padded = nn.functional.pad(x, (pads[1], pads[3], pads[0], pads[2]))
    want = nn.functional.conv2d(padded, weight, stride=stride, dilation=dilation)
    flat = np.append(x.numpy().ravel(), np.float32(0))  # the last is the padding
    got = flat[index] @ weight.numpy().ravel()
    assert want.shape[2:] == (height, width)
    assert np.allclose(got, want.numpy().ravel(), atol=1e-5)


def test_without_vnni_the_session_asks_for_exact_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The largest products: sums of two leave 16 bits.
    plan = {name: quant(name, (1e-3,)) for name in LAYERS}
    graph = exported(plan)
    rewritten = dialect.onnxruntime(graph)
    assert rewritten is not None
    store.save({"model.onnx": graph, "model.onnxruntime.onnx": rewritten}, tmp_path)
    asked = []
    library = onnx_runtime.library()

    class Options(library.SessionOptions):  # type: ignore[misc,name-defined]
        def add_session_config_entry(self, key: str, value: str) -> None:
            asked.append((key, value))
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(library, "SessionOptions", Options)
    monkeypatch.setattr(onnx_runtime, "has_vnni", lambda: False)
    standard, ours = outputs(tmp_path)
    assert error(ours, standard) < 1e-5
    assert asked.count(("session.x64quantprecision", "1")) == 1  # for the dialect, not for the Q/DQ graph


def fed_by(value: ir.Value, op: str) -> bool:
    node = value.producer()
    return node is not None and node.op_type == op


def test_a_bundle_has_a_dialect_and_runs_without_it(tiny_balanced: Bundle, tmp_path: Path) -> None:
    manifest = tiny_balanced.manifest
    listed = manifest["dialects"]["onnxruntime"]
    assert listed["full"] == "unet/model.onnxruntime.onnx"
    for name, file in listed.items():
        assert file in manifest["files"] and file in manifest["parity"], name
        model = ir.load(tiny_balanced.file(file))
        assert "MatMulIntegerToFloat" in ops(model)
        # Beside the shortcuts, whose weights alone are quantized.
        names = [
            node for node in model.graph if node.op_type == "Conv" and not fed_by(node.inputs[1], "DequantizeLinear")
        ]
        weights = {value.name for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT8}
        assert weights and len(names) <= 2  # the first and the last convolution, which are not quantized
    data = {p.name for p in (tiny_balanced.path / "unet").iterdir() if p.name.endswith("_data")}
    assert data == {"model.onnx_data"}
    assert manifest["sizes"]["denoiser_compressed"] == sum(
        file.stat().st_size
        for file in (tiny_balanced.path / "unet").iterdir()
        if ".onnx" in file.name and file.name not in {Path(name).name for name in listed.values()}
    )
    older = tmp_path / "older"
    shutil.copytree(tiny_balanced.path, older)
    document = json.loads((older / "diffpress.json").read_text())
    for file in document.pop("dialects")["onnxruntime"].values():
        (older / file).unlink()
        del document["files"][file]
    (older / "diffpress.json").write_text(json.dumps(document))
    opened = [Pipeline.load(source, "onnxruntime", "fp32") for source in (tiny_balanced, str(older))]
    used = [Path(pipeline.denoiser.sessions["full"]._file).name for pipeline in opened]  # type: ignore[attr-defined]
    assert used == ["model.onnxruntime.onnx", "model.onnx"]
    ours, standard = (pipeline(["a red ring"], [1], keep_latents=True).latents[0] for pipeline in opened)
    # One step of a network of random weights, which amplifies values that round the other way.
    assert error(ours, standard) < 0.05


def test_a_listed_dialect_that_is_gone_is_named(tiny_balanced: Bundle) -> None:
    file = "unet/model.onnxruntime.onnx"
    files = {name: digest for name, digest in tiny_balanced.manifest["files"].items() if name != file}
    bundle = Bundle(tiny_balanced.path, {**tiny_balanced.manifest, "files": files})
    with pytest.raises(DiffpressError, match=r"does not list the file unet/model\.onnxruntime\.onnx"):
        Pipeline.load(bundle, "onnxruntime", "fp32")
