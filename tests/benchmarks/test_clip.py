"""CLIP scores against transformers' own processing and network, with a small CLIP of random weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from diffpress.benchmarks.clip import Clip
from diffpress.errors import DiffpressError

TEXTS = ["a red star", "two blue rings on a plain background", "a green square " * 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPImageProcessorPil

    from diffpress.benchmarks.shapes import models

    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = models.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
        models.make_clip(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=64, image_mean=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return folder


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 96, 130, 3)).astype(np.uint8)


def test_scores_are_cosines_of_what_transformers_computes(folder: Path, images: np.ndarray) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    clip: Any = CLIPModel.from_pretrained(folder)
    tokenizer: Any = CLIPTokenizer.from_pretrained(folder)
    processor: Any = CLIPImageProcessorPil.from_pretrained(folder)
    rows = tokenizer(TEXTS, padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        output = clip(**rows, **processor(list(images), return_tensors="pt"))
    cosines = functional.cosine_similarity(output.image_embeds, output.text_embeds)
    opened = Clip.load(folder)
    assert opened.mean == (0.4, 0.5, 0.6)
    assert opened.scores(images, TEXTS) == pytest.approx(100 * cosines.clamp(min=0).numpy(), abs=0.05)


def test_pixels_are_prepared_as_transformers_does(folder: Path, images: np.ndarray) -> None:
    from transformers import CLIPImageProcessorPil

    processor: Any = CLIPImageProcessorPil.from_pretrained(folder)
    for some in (images, images.transpose(0, 2, 1, 3), images[:, :96, :96]):
        expected = processor(list(some), return_tensors="np")["pixel_values"]
        assert np.abs(Clip.load(folder)._prepared(np.ascontiguousarray(some)) - expected).max() < 1e-5


def test_folders_that_hold_no_clip_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffpressError, match="is no CLIP that transformers saved"):
        Clip.load(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(DiffpressError, match="tokenizer"):
        Clip.load(tmp_path)
