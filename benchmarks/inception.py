"""Inception features for Fréchet distances (Heusel et al. 2017), with weights that the user has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffpress.errors import DiffpressError, require

BATCH = 16


@dataclass(frozen=True)
class Inception:
    """What maps uint8 [N, 3, H, W] on `device` to features [N, D]; it scales the images itself."""

    network: Callable[[torch.Tensor], torch.Tensor]
    device: str

    @classmethod
    def load(cls, file: Path) -> Inception:
        """Open the TorchScript archive of StyleGAN and EDM (inception-2015-12-05.pt), or of another such network.

        A state dict of the same network (weights-inception-2015-12-05-6726825d.pth) is opened by torch-fidelity. Raises
        `DiffpressError` for a file that is neither.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        make = _of_state if file.suffix == ".pth" else _of_archive
        try:
            return cls(make(file, device), device)
        except DiffpressError:
            raise
        # torch, zipfile and pickle each raise their own kind for a file that is something else.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DiffpressError(
                f"{file} is no network of features: give the TorchScript archive inception-2015-12-05.pt ({reason})"
            ) from error

    @torch.no_grad()
    def features(self, images: np.ndarray) -> np.ndarray:
        """Features [N, D] of uint8 [N, H, W, 3]."""
        parts = []
        for start in range(0, len(images), BATCH):
            rows = torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2).contiguous()
            parts.append(self.network(rows.to(self.device)).flatten(1).double().cpu())
        return torch.cat(parts).numpy()


def _of_archive(file: Path, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    network: Any = torch.jit.load(file, map_location=device).eval()
    if "return_features" in str(network.forward.schema):  # it classifies where nobody asks for features
        return lambda images: network(images, return_features=True)
    return network  # type: ignore[no-any-return]


def _of_state(file: Path, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    fidelity: Any = require("torch_fidelity.feature_extractor_inceptionv3", "metrics", "open Inception's state dict")
    network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file)).to(device).eval()
    return lambda images: network(images)[0]
