"""Operations and bytes of graphs against torch's own counter and against counts by hand."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffpress.compress.families.unet_graph import UNetGraph
from diffpress.errors import DiffpressError
from diffpress.export import flops, graphs, qdq, store
from diffpress.export.graphs import GraphSpec
from diffpress.plan import LayerQuant


class Layers(nn.Module):
    """Strides, groups, a linear layer without a transposed weight, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.linear = nn.Linear(16, 24)
        self.weight = nn.Parameter(torch.randn(24, 10))

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        tokens = self.grouped(self.strided(sample)).flatten(2).transpose(1, 2)
        queries = self.linear(tokens)
        attended = torch.softmax((queries * 0.2) @ queries.transpose(1, 2), dim=-1) @ queries
        return (attended @ self.weight,)


@pytest.fixture(scope="module")
def layers() -> ir.Model:
    model = graphs.to_onnx(GraphSpec(Layers(), {"sample": torch.randn(2, 8, 12, 12)}, ("out",), ()))
    graphs.finish(model)
    return model


def counted(module: nn.Module, *inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_layers_are_counted_as_torch_counts_them(layers: ir.Model, batch: int) -> None:
    assert flops.count(layers, batch).operations == counted(Layers(), torch.randn(batch, 8, 12, 12))


def test_bytes_by_hand(layers: ir.Model) -> None:
    work = flops.count(layers, 1)
    weights = 4 * (16 * 8 * 9 + 16 * 4 * 9 + 24 * 16 + 24 * 10)
    tokens = 6 * 6
    # in and out of: both convolutions, linear, queries @ keys (in alone), weights @ values (without weights), the last
    moved = (8 * 144 + 16 * tokens) + 2 * 16 * tokens + (16 + 24) * tokens + 2 * 24 * tokens + 2 * 24 * tokens
    moved += (24 + 10) * tokens
    assert (work.weight_bytes, work.activation_bytes) == (weights, 4 * moved)
    assert [product.op for product in work.products[:2]] == ["Conv", "Conv"]


def test_floats_as_a_backend_computes_them(layers: ir.Model) -> None:
    whole, half = flops.count(layers, 1), flops.count(layers, 1, "bf16")
    assert half.flops == {"bf16": whole.operations}
    assert (2 * half.weight_bytes, 2 * half.activation_bytes) == (whole.weight_bytes, whole.activation_bytes)
    assert flops.count(layers, 1, "tf32").bytes == whole.bytes


def test_a_graph_is_left_as_it_was(layers: ir.Model) -> None:
    before = [str(value.shape) for node in layers.graph for value in node.outputs]
    flops.count(layers, 3)
    assert [str(value.shape) for node in layers.graph for value in node.outputs] == before


def test_a_whole_denoiser_within_two_percent(least_pipeline: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(least_pipeline / "unet").eval()
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([5.0]),
        "encoder_hidden_states": torch.randn(2, 16, 32),
    }
    with graphs.plain_attention(unet), torch.no_grad():
        model = graphs.to_onnx(GraphSpec(UNetGraph(unet), inputs, ("out_sample",)))
        wanted = counted(UNetGraph(unet), *inputs.values())
    graphs.finish(model)
    store.save({"model.onnx": model}, tmp_path)  # weights in a file beside it
    work = flops.count(tmp_path / "model.onnx", 2)
    assert work.operations == pytest.approx(wanted, rel=0.02)
    assert set(work.flops) == {"fp32"}
    weights = sum(p.numel() for p in unet.parameters() if p.ndim > 1)
    assert work.weight_bytes == 4 * weights


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 32)

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        return (self.linear(self.conv(sample).flatten(2).transpose(1, 2)),)


@pytest.mark.parametrize(
    ("weight", "inputs", "kind", "bits"),
    [("int8", "int8", "int8", 8), ("e4m3", "e4m3", "fp8", 8), ("int8", None, "fp32", 8), ("int4", None, "fp32", 4)],
)
def test_formats_of_products(weight: str, inputs: str | None, kind: str, bits: int) -> None:
    model = graphs.to_onnx(GraphSpec(Two(), {"sample": torch.randn(2, 8, 4, 4)}, ("out",), ()))
    scale = np.full((32, 1) if weight == "int4" else 32, 0.01, np.float32)
    layer = LayerQuant(scale, None if inputs is None else np.array([0.02], np.float32), weight, inputs)
    assert qdq.insert(model, {"linear": layer}, prefix="") == {"linear"}
    graphs.finish(model)
    conv, linear = flops.count(model, 1).products
    assert (conv.kind, linear.kind) == ("fp32", kind)
    assert linear.weight_bytes == 32 * 16 * bits // 8
    assert linear.activation_bytes == 16 * (16 * (1 if inputs else 4) + 32 * 4)
    half = flops.count(model, 1, "bf16").products[1]
    assert half.kind == ("bf16" if kind == "fp32" else kind)
    assert half.weight_bytes == linear.weight_bytes  # what is in fewer bits stays so
    assert half.activation_bytes == 16 * (16 * (1 if inputs else 2) + 32 * 2)


def test_control_flow_is_refused() -> None:
    inner = ir.Graph([], [], nodes=[], name="inner")
    value = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.BOOL))
    node = ir.node("If", inputs=[value], attributes={"then_branch": inner, "else_branch": inner.clone()}, name="either")
    graph = ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 20})
    with pytest.raises(DiffpressError, match="either"):
        flops.count(ir.Model(graph, ir_version=10), 1)
