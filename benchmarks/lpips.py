"""LPIPS: how different two images look to a network (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep
Features as a Perceptual Metric"), on AlexNet or VGG16, with weights that the user has.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffpress.errors import DiffpressError

BATCH = 8
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in -1..1, as published
# Behind which of the backbone's layers features are taken, and how many channels they have.
TAKEN = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
_BACKBONE = re.compile(r"(?:^|\.)(?:features|slice\d)\.(\d+)\.(weight|bias)$")
_HEAD = re.compile(r"(?:^|\.)lin(\d)\.model\.\d\.weight$")


def backbone(name: str) -> nn.Sequential:
    """The convolutions of AlexNet ("alex", Krizhevsky 2014) or VGG16 ("vgg"), numbered as torchvision does."""
    if name == "alex":
        return nn.Sequential(
            *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        )
    layers: list[nn.Module] = []
    before = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):  # 0: half the resolution
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2, 2)]
        before = width or before
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Lpips:
    """A backbone, and a weight [C] for each channel of the features taken from it."""

    name: str
    backbone: nn.Sequential
    heads: tuple[Tensor, ...]

    @classmethod
    def load(cls, file: Path) -> Lpips:
        """Read a state dict (.pth, .pt or .safetensors) of `lpips.LPIPS`, of torchmetrics' or of torchvision's network.

        The last holds the backbone alone: the heads are then those that torchmetrics ships. Raises `DiffpressError` for
        a file that is neither.
        """
        state = read_state(file)
        layers = {f"{m[1]}.{m[2]}": value for name, value in state.items() if (m := _BACKBONE.search(name))}
        kinds = {(64, 3, 11, 11): "alex", (64, 3, 3, 3): "vgg"}
        name = kinds.get(tuple(layers["0.weight"].shape)) if "0.weight" in layers else None
        if name is None:
            raise DiffpressError(
                f"{file} is no LPIPS on AlexNet or VGG16: give the state dict of lpips.LPIPS(net='alex') or of "
                "torchvision's alexnet or vgg16"
            )
        found = {int(m[1]): value for key, value in state.items() if (m := _HEAD.search(key))}
        heads = found or _shipped_heads(name, file)
        network = backbone(name)
        try:
            network.load_state_dict(layers)
            rows = tuple(heads[index].reshape(width) for index, width in enumerate(CHANNELS[name]))
        except (RuntimeError, KeyError) as error:
            raise DiffpressError(f"{file} is no whole LPIPS ({name}): {str(error).splitlines()[0]}") from error
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(name, network.eval().requires_grad_(False).to(device), tuple(row.float().to(device) for row in rows))

    @torch.no_grad()
    def distances(self, images: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """LPIPS of each image: uint8 [N, H, W, 3] twice -> [N]; 0 is equal."""
        parts = [
            self._distances(images[start : start + BATCH], reference[start : start + BATCH])
            for start in range(0, len(images), BATCH)
        ]
        return np.concatenate(parts)

    def _distances(self, images: np.ndarray, reference: np.ndarray) -> np.ndarray:
        pairs = zip(self._features(images), self._features(reference), self.heads, strict=True)
        # The mean over places of the weighted squares of differences between features of length 1.
        per_layer = [torch.einsum("nchw,c->nhw", (a - b) ** 2, head).mean((1, 2)) for a, b, head in pairs]
        return torch.stack(per_layer).sum(0).double().cpu().numpy()

    def _features(self, pixels: np.ndarray) -> list[Tensor]:
        """What is taken [N, C, h, w], each place of length 1."""
        device = self.heads[0].device
        shift, scale = (torch.tensor(row, device=device).reshape(1, 3, 1, 1) for row in (SHIFT, SCALE))
        values = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        values, found = (values - shift) / scale, []
        for index, layer in enumerate(self.backbone):
            values = layer(values)
            if index in TAKEN[self.name]:
                found.append(values / (values.norm(dim=1, keepdim=True) + 1e-10))
        return found


def read_state(file: Path) -> Mapping[str, Tensor]:
    """The tensors of a state dict in a file; raises `DiffpressError` where there are none."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    # torch, pickle, zipfile and safetensors each raise their own kind for a file that is something else.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DiffpressError(f"{file} cannot be read as weights: {reason}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DiffpressError(f"{file} holds no state dict: save one with torch.save(network.state_dict(), ...)")
    return state


def _shipped_heads(name: str, file: Path) -> dict[int, Tensor]:
    spec = importlib.util.find_spec("torchmetrics")
    if spec is None or spec.origin is None:
        raise DiffpressError(
            f"{file} is a backbone alone, whose heads torchmetrics has: pip install 'diffpress[metrics]', or give the "
            "state dict of lpips.LPIPS"
        )
    state = read_state(Path(spec.origin).parent / "functional" / "image" / "lpips_models" / f"{name}.pth")
    return {int(m[1]): value for key, value in state.items() if (m := _HEAD.search(key))}
