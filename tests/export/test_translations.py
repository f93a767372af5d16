"""Networks are translated as they were traced: the same numbers, from one tracing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffpress.export import graphs, store, translations
from diffpress.runtime.backends import open_session


class Parts(nn.Module):
    """Every operator of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(12, 12)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        tokens = self.drop(self.linear(sample.flatten(2).contiguous()))
        heads = tokens.unflatten(-1, (3, -1)).transpose(1, 2)
        first, second, third = heads.flatten(1).chunk(3, dim=-1)
        steps = timestep.to(torch.float64).to("cpu", torch.float32)
        return first * second + third * steps, sample.chunk(2, dim=1)[1]


class InPlace(Parts):
    """What can be translated only once it was taken apart."""

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        kept = sample.clone()
        kept[:, 0].mul_(2.0)
        return super().forward(kept, timestep)


class Inner(Parts):
    """Dimensions in front and in the middle."""

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        rows = sample.flatten(0, 1).unflatten(0, (sample.shape[0], 6))
        return super().forward(rows.unflatten(1, (2, -1)).flatten(1, 2), timestep)


@pytest.fixture
def translated(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every translation whether it was of a network as it was traced."""
    found: list[bool] = []
    export = torch.onnx.export

    def spied(program: object, *inputs: object, **options: object) -> object:
        found.append(options.get("custom_translation_table") is translations.TABLE)
        return export(program, *inputs, **options)

    monkeypatch.setattr(torch.onnx, "export", spied)
    return found


@pytest.mark.parametrize(("kind", "calls"), [(Parts, [True]), (InPlace, [True, False]), (Inner, [True])])
def test_a_network_gives_what_it_gives_in_torch(
    kind: type[Parts], calls: list[bool], translated: list[bool], tmp_path: Path
) -> None:
    module = kind().eval().requires_grad_(False)
    inputs = {"sample": torch.randn(2, 6, 3, 4), "timestep": torch.tensor([3])}
    graph = graphs.to_onnx(graphs.GraphSpec(module, inputs, ("out", "half")))
    assert translated == calls
    graphs.finish(graph)
    store.save({"model.onnx": graph}, tmp_path)
    session = open_session(tmp_path / "model.onnx", "onnxruntime")
    fed = {"sample": torch.randn(5, 6, 3, 4), "timestep": torch.tensor([7])}  # another batch than was traced
    got = session.run({name: value.numpy() for name, value in fed.items()})
    for name, wanted in zip(("out", "half"), module(**fed), strict=True):
        np.testing.assert_allclose(got[name], wanted, rtol=1e-4, atol=1e-5)


def test_a_denoiser_is_traced_once(least_pipeline: Path, translated: list[bool]) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(least_pipeline, subfolder="unet")
    unet.register_forward_hook(lambda *_: None)  # networks with hooks are exported anew in every test

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            return self.unet(sample, timestep, encoder_hidden_states).sample

    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([600.0]),
        "encoder_hidden_states": torch.randn(2, 16, 32),
    }
    graphs.to_onnx(graphs.GraphSpec(Wrapped(), inputs, ("out_sample",)))
    assert translated == [True]
