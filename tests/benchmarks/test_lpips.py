"""LPIPS against torchmetrics' own, on backbones of random weights and the heads that it ships."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchmetrics.functional.image import lpips as published

from diffpress.benchmarks import lpips
from diffpress.benchmarks.lpips import Lpips
from diffpress.errors import DiffpressError

NAMES = {"alex": "alexnet", "vgg": "vgg16"}


@pytest.fixture(scope="module")
def backbones() -> dict[str, nn.Sequential]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {name: lpips.backbone(name) for name in NAMES}


@pytest.fixture
def images() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    first = random.integers(0, 256, (9, 64, 72, 3))
    noise = random.normal(0, 1, first.shape) * np.arange(9)[:, None, None, None] * 8
    return first.astype(np.uint8), np.clip(first + noise, 0, 255).astype(np.uint8)


def torchvision_state(network: nn.Sequential) -> dict[str, torch.Tensor]:
    head = {"classifier.1.weight": torch.zeros(4, 4)}
    return {f"features.{name}": value for name, value in network.state_dict().items()} | head


def reference(name: str, network: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(published, "_get_tv_model_features", lambda *_: network)
    return published._LPIPS(net=name)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "parameters", "side"), [("alex", 2_469_696, 13), ("vgg", 14_714_688, 14)])
def test_backbones_are_those_of_torchvision(
    backbones: dict[str, nn.Sequential], name: str, parameters: int, side: int
) -> None:
    network = backbones[name]
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    taken = []
    values = torch.zeros(1, 3, 224, 224)
    for index, layer in enumerate(network):
        values = layer(values)
        if index in lpips.TAKEN[name]:
            assert isinstance(layer, nn.ReLU)
            taken.append(values.shape[1])
    assert tuple(taken) == lpips.CHANNELS[name] and values.shape[-1] == side


@pytest.mark.parametrize("name", list(NAMES))
def test_distances_are_those_of_torchmetrics(
    backbones: dict[str, nn.Sequential],
    images: tuple[np.ndarray, np.ndarray],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.save(torchvision_state(backbones[name]), tmp_path / "backbone.pth")
    found = Lpips.load(tmp_path / "backbone.pth").distances(*images)
    tensors = [torch.from_numpy(image).permute(0, 3, 1, 2) / 127.5 - 1 for image in images]
    expected = reference(name, backbones[name], monkeypatch)(*tensors).flatten().numpy()
    assert found == pytest.approx(expected, rel=2e-3, abs=1e-7)
    assert found[0] == 0 and (np.diff(found) > 0).all()


def test_whole_state_dicts_bring_their_own_heads(
    backbones: dict[str, nn.Sequential],
    images: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = reference("alex", backbones["alex"], monkeypatch)
    state = whole.state_dict()
    for name in ("lin0.model.1.weight", "lins.0.model.1.weight"):
        state[name] = 3 * state[name]
    torch.save(state, tmp_path / "lpips.pth")
    # As LearnedPerceptualImagePatchSimilarity has it, and in the other format.
    save_file({f"net.{name}": value.clone() for name, value in state.items()}, tmp_path / "lpips.safetensors")
    monkeypatch.setattr(lpips, "_shipped_heads", None)
    pth, safe = (Lpips.load(tmp_path / f"lpips.{end}") for end in ("pth", "safetensors"))
    assert torch.equal(pth.heads[0], state["lin0.model.1.weight"].flatten())
    assert pth.distances(*images) == pytest.approx(safe.distances(*images))


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"nonsense")
    with pytest.raises(DiffpressError, match=r"weights\.pth cannot be read as weights"):
        Lpips.load(file)
    torch.save([1, 2], file)
    with pytest.raises(DiffpressError, match="holds no state dict"):
        Lpips.load(file)
    torch.save({"features.0.weight": torch.zeros(8, 3, 3, 3)}, file)
    with pytest.raises(DiffpressError, match="no LPIPS on AlexNet or VGG16"):
        Lpips.load(file)
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, file)
    with pytest.raises(DiffpressError, match="no whole LPIPS"):
        Lpips.load(file)
    monkeypatch.setattr(lpips.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DiffpressError, match=r"diffpress\[metrics\]"):
        Lpips.load(file)
