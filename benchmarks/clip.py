"""CLIP scores (Hessel et al. 2021) with a CLIP that the user has: a folder as transformers saves it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffpress.errors import DiffpressError

BATCH = 16
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIPs


@dataclass(frozen=True)
class Clip:
    """A CLIP, its tokenizer, and how its images are normalised."""

    network: Any
    tokenizer: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def load(cls, folder: Path) -> Clip:
        """Open a folder with a CLIPModel and its tokenizer, and never anything else; raises `DiffpressError`."""
        from transformers import CLIPModel, CLIPTokenizer

        try:
            network = CLIPModel.from_pretrained(folder, local_files_only=True).float().eval().requires_grad_(False)
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            file = folder / "preprocessor_config.json"
            config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        # transformers, safetensors and json each raise their own kind for what is absent or cut short.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DiffpressError(f"{folder} is no CLIP that transformers saved: {reason}") from error
        if len(tokenizer) < network.config.text_config.vocab_size:  # made up where its files are missing
            raise DiffpressError(f"{folder} has no whole tokenizer: copy the CLIP's tokenizer files there")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        mean, std = (tuple(config.get(key, known)) for key, known in (("image_mean", MEAN), ("image_std", STD)))
        return cls(network.to(device), tokenizer, mean, std)

    def scores(self, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """100 max(cos(image, text), 0) of each pair: uint8 [N, H, W, 3] -> [N]; CLIPScore without its factor 2.5."""
        a, b = self.image_features(images), self.text_features(texts)
        cosine = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        return np.asarray(100 * np.clip(cosine, 0, None))

    @torch.no_grad()
    def image_features(self, images: np.ndarray) -> np.ndarray:
        """Projected features [N, D] of uint8 [N, H, W, 3]."""
        tower, head = self.network.vision_model, self.network.visual_projection
        found = []
        for start in range(0, len(images), BATCH):
            pixels = torch.from_numpy(self._prepared(images[start : start + BATCH])).to(self.network.device)
            found.append(head(tower(pixel_values=pixels).pooler_output).cpu())
        return torch.cat(found).double().numpy()

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Projected features [N, D]; of a long text its beginning."""
        limit = self.network.config.text_config.max_position_embeddings
        tower, head = self.network.text_model, self.network.text_projection
        found = []
        for start in range(0, len(texts), BATCH):
            some = list(texts[start : start + BATCH])
            rows = self.tokenizer(some, padding=True, max_length=limit, truncation=True, return_tensors="pt")
            found.append(head(tower(**rows.to(self.network.device)).pooler_output).cpu())
        return torch.cat(found).double().numpy()

    def _prepared(self, images: np.ndarray) -> np.ndarray:
        """As CLIPImageProcessor: the shorter side resized (bicubic), the middle cut out, normalised [N, 3, S, S]."""
        side = self.network.config.vision_config.image_size
        rows = []
        for pixels in images:
            height, width = pixels.shape[:2]
            scale = side / min(height, width)
            size = (int(width * scale), int(height * scale)) if height != width else (side, side)
            resized = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
            left, top = (size[0] - side) // 2, (size[1] - side) // 2
            cut = np.asarray(resized, np.float32)[top : top + side, left : left + side] / 255
            rows.append((cut - np.float32(self.mean)) / np.float32(self.std))
        return np.ascontiguousarray(np.stack(rows).transpose(0, 3, 1, 2), np.float32)
