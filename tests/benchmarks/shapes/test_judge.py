from pathlib import Path

import numpy as np
import pytest
import torch

from diffpress.benchmarks.shapes import models, scenes
from diffpress.benchmarks.shapes.judge import Found, Judge, confirmed, pixels_to_tensor, shares


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """Networks that were never trained: shapes and ranges are right, answers are not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = models.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
        return Judge(models.Reader().eval(), models.make_clip(tokenizer).eval(), tokenizer)


@pytest.fixture
def truths() -> list[scenes.Scene]:
    return [scene for scene, _ in scenes.held_out_captions(12)]


def seen(items: list[scenes.Scene]) -> Found:
    """What a perfect reader would see."""
    return {head: np.maximum(values.numpy(), 0) for head, values in models.reader_labels(items).items()}


def test_a_perfect_reader_confirms_everything(truths: list[scenes.Scene]) -> None:
    found = shares(confirmed(seen(truths), truths))
    assert found == dict.fromkeys(("overall", "colour", "shape", "size", "axis", "relation"), 1.0)


def test_what_is_not_named_is_not_counted(truths: list[scenes.Scene]) -> None:
    single = np.array([len(scene.things) == 1 for scene in truths])
    marks = confirmed(seen(truths), truths)
    assert np.array_equal(np.isnan(marks["colour"][:, 1]), single)
    assert np.array_equal(np.isnan(marks["relation"]), single)
    assert shares(confirmed(seen(truths[:1]), truths[:1]))["relation"] is None


def test_one_wrong_attribute_is_one_mark(truths: list[scenes.Scene]) -> None:
    found = seen(truths)
    found["first_colour"][0] = (found["first_colour"][0] + 1) % len(scenes.COLOURS)
    named = 2 * sum(len(scene.things) for scene in truths)
    parts = shares(confirmed(found, truths))
    assert parts["overall"] == pytest.approx(1 - 1 / named)
    assert parts["colour"] == pytest.approx(1 - 2 / named) and parts["shape"] == 1


def test_exchanged_objects_break_the_relation() -> None:
    first, second = scenes.Thing("red", "star", "small"), scenes.Thing("blue", "ring", "small")
    asked = scenes.Scene((first, second), "horizontal", "plain")
    drawn = [
        scenes.Scene((second, first), "horizontal", "plain"),
        scenes.Scene((first, second), "vertical", "plain"),
        scenes.Scene((first, scenes.Thing("green", "ring", "large")), "horizontal", "plain"),
    ]
    assert confirmed(seen(drawn), [asked] * 3)["relation"].tolist() == [0, 0, 1]


def test_pixels_are_normalised_as_in_training() -> None:
    pixels = np.array([[[[0, 255, 128]]]], np.uint8)
    assert pixels_to_tensor(pixels).flatten().tolist() == pytest.approx([-1, 1, 128 / 127.5 - 1], abs=1e-6)


def test_networks_answer_for_any_number_of_images(judge: Judge) -> None:
    images = np.random.default_rng(0).integers(0, 255, (70, 64, 64, 3)).astype(np.uint8)
    captions = [words for _, words in scenes.held_out_captions(70)]
    assert {head: values.shape for head, values in judge.read(images).items()} == dict.fromkeys(
        models.Reader.HEADS, (70,)
    )
    features = judge.features(images)
    assert features.shape == judge.caption_features(captions).shape == (70, 96)
    assert judge.features(images[65:66])[0] == pytest.approx(features[65], abs=1e-4)
    assert 0 <= judge.clip_score(images, captions) <= 100


def test_clip_score_is_that_of_transformers(judge: Judge) -> None:
    images = np.random.default_rng(1).integers(0, 255, (3, 64, 64, 3)).astype(np.uint8)
    captions = [words for _, words in scenes.held_out_captions(3)]
    ids = judge.tokenizer(captions, padding="max_length", max_length=models.TOKENS, return_tensors="pt").input_ids
    with torch.no_grad():
        found = judge.clip(input_ids=ids, pixel_values=pixels_to_tensor(images))
    cosine = (found.image_embeds * found.text_embeds).sum(1).clamp(min=0)
    assert judge.clip_score(images, captions) == pytest.approx(100 * cosine.mean().item(), abs=1e-3)


def test_loading(judge: Judge, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    judge.clip.save_pretrained(tmp_path / "clip")
    save_file(judge.reader.state_dict(), tmp_path / "reader.safetensors")
    judge.tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = Judge.load(tmp_path / "clip", tmp_path / "reader.safetensors", tmp_path / "tokenizer")
    images = np.random.default_rng(2).integers(0, 255, (2, 64, 64, 3)).astype(np.uint8)
    assert loaded.features(images) == pytest.approx(judge.features(images), abs=1e-5)
    assert all(np.array_equal(loaded.read(images)[head], values) for head, values in judge.read(images).items())
