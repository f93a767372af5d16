"""Judges pictures with the networks of `shapes`: what the reader sees in them, and CLIP's score and features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffpress.benchmarks.shapes import CLIP, PIPELINE, READER, models, scenes

BATCH = 64
KINDS = ("colour", "shape", "size")

Found = dict[str, np.ndarray]  # what the reader sees: class index by head, [N] each


def pixels_to_tensor(images: np.ndarray) -> Tensor:
    """Uint8 [N, H, W, 3] to float32 [N, 3, H, W] in -1..1, normalised as in training."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def _batches(images: np.ndarray) -> Iterable[Tensor]:
    for start in range(0, len(images), BATCH):
        yield pixels_to_tensor(images[start : start + BATCH])


@dataclass(frozen=True)
class Judge:
    """The reader and the CLIP of `shapes`, frozen, on the CPU."""

    reader: Any
    clip: Any
    tokenizer: Any

    @classmethod
    def load(cls, clip: Path = CLIP, reader: Path = READER, tokenizer: Path = PIPELINE / "tokenizer") -> Judge:
        """The committed networks, or others of the same kind."""
        from transformers import CLIPModel, CLIPTokenizer

        network = models.Reader()
        network.load_state_dict(load_file(reader))
        return cls(
            network.eval(), CLIPModel.from_pretrained(clip).float().eval(), CLIPTokenizer.from_pretrained(tokenizer)
        )

    @torch.no_grad()
    def read(self, images: np.ndarray) -> Found:
        """What the reader sees in uint8 [N, 64, 64, 3]."""
        parts = [self.reader(batch) for batch in _batches(images)]
        return {name: torch.cat([part[name].argmax(1) for part in parts]).numpy() for name in models.Reader.HEADS}

    @torch.no_grad()
    def features(self, images: np.ndarray) -> np.ndarray:
        """CLIP's projected image features [N, D], not normalised (for Fréchet distances)."""
        tower, head = self.clip.vision_model, self.clip.visual_projection
        return torch.cat([head(tower(pixel_values=batch).pooler_output) for batch in _batches(images)]).numpy()

    @torch.no_grad()
    def caption_features(self, captions: Sequence[str]) -> np.ndarray:
        """CLIP's projected text features [N, D], not normalised."""
        limit = self.clip.config.text_config.max_position_embeddings
        ids = self.tokenizer(
            list(captions), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).input_ids
        tower, head = self.clip.text_model, self.clip.text_projection
        return torch.cat([head(tower(rows).pooler_output) for rows in ids.split(BATCH)]).numpy()

    def clip_score(self, images: np.ndarray, captions: Sequence[str]) -> float:
        """The mean of `clip_scores`."""
        return float(self.clip_scores(self.features(images), captions).mean())

    def clip_scores(self, features: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """100 max(cos(image, caption), 0) [N] of images' features: Hessel et al. (2021) without their factor 2.5."""
        cosine = (normalised(features) * normalised(self.caption_features(captions))).sum(axis=1)
        return np.asarray(100 * np.clip(cosine, 0, None))


def normalised(rows: np.ndarray) -> np.ndarray:
    """Rows [N, D] of length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def confirmed(found: Found, truths: Sequence[scenes.Scene]) -> dict[str, np.ndarray]:
    """Whether the reader sees what each scene names: 1 yes, 0 no, NaN where there is nothing to name.

    `colour`, `shape`, `size` [N, 2] by slot (places in reading order), `axis` [N], and `relation` [N] for two objects:
    the axis is right and the objects fit better in the order that was asked for than exchanged.
    """
    labels = {name: values.numpy() for name, values in models.reader_labels(list(truths)).items()}
    single = np.array([len(scene.things) == 1 for scene in truths])

    def matches(kind: str, slots: tuple[str, str]) -> np.ndarray:
        pairs = zip(slots, ("first", "second"), strict=True)
        return np.stack([(found[f"{a}_{kind}"] == labels[f"{b}_{kind}"]).astype(float) for a, b in pairs], axis=1)

    result: dict[str, np.ndarray] = {kind: matches(kind, ("first", "second")) for kind in KINDS}
    in_order = sum(result[kind].sum(axis=1) for kind in KINDS)
    exchanged = sum(matches(kind, ("second", "first")).sum(axis=1) for kind in KINDS)
    result["axis"] = (found["axis"] == labels["axis"]).astype(float)
    result["relation"] = np.where(single, np.nan, result["axis"] * (in_order > exchanged))
    for kind in KINDS:
        result[kind][single, 1] = np.nan
    return result


def shares(marks: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Share of confirmed attributes by kind, and `overall`: the colours and shapes of all objects together."""
    parts = {name: _share(values) for name, values in marks.items()}
    return {"overall": _share(np.concatenate([marks["colour"].ravel(), marks["shape"].ravel()])), **parts}


def by_prompt(marks: dict[str, np.ndarray]) -> np.ndarray:
    """What `overall` counts, by prompt: (confirmed, asked for) [N, 2]."""
    rows = np.concatenate([marks["colour"], marks["shape"]], axis=1)
    return np.stack([np.nansum(rows, axis=1), (~np.isnan(rows)).sum(axis=1)], axis=1)


def _share(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None
