"""Feature networks from files: a TorchScript archive, and a state dict through torch-fidelity."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffpress.benchmarks.inception import Inception
from diffpress.errors import DiffpressError


class Classifier(nn.Module):
    """As StyleGAN's archive: classes, or features where they are asked for."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        features = images.float().mean(dim=(2, 3))
        return features if return_features else features.softmax(dim=1)


class Plain(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3), keepdim=True)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 8, 10, 3)).astype(np.uint8)


@pytest.mark.parametrize("network", [Classifier(), Plain()])
def test_features_of_an_archive(network: nn.Module, images: np.ndarray, tmp_path: Path) -> None:
    torch.jit.script(network).save(tmp_path / "inception.pt")
    found = Inception.load(tmp_path / "inception.pt").features(images)
    assert found.shape == (20, 3)  # [N, D], from channels first
    assert found == pytest.approx(images.mean(axis=(1, 2)), rel=1e-5)


def test_a_state_dict_is_opened_by_torch_fidelity(
    images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Extractor(nn.Module):
        def __init__(self, name: str, features: list[str], weights: str) -> None:
            super().__init__()
            assert (name, features) == ("inception-v3-compat", ["2048"])
            self.scale = torch.load(weights, weights_only=True)["scale"]

        def forward(self, images: Tensor) -> tuple[Tensor]:
            assert images.dtype == torch.uint8
            return (images.float().mean(dim=(2, 3)) * self.scale,)

    file = tmp_path / "inception.pth"
    torch.save({"scale": torch.tensor(2.0)}, file)
    fake: Any = SimpleNamespace(FeatureExtractorInceptionV3=Extractor)
    monkeypatch.setitem(sys.modules, "torch_fidelity", fake)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", fake)
    assert Inception.load(file).features(images) == pytest.approx(2 * images.mean(axis=(1, 2)), rel=1e-5)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(DiffpressError, match=r"diffpress\[metrics\]"):
        Inception.load(file)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "inception.pt").write_bytes(b"nonsense")
    with pytest.raises(DiffpressError, match="is no network of features"):
        Inception.load(tmp_path / "inception.pt")
