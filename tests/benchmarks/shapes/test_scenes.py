"""The scene generator: seeded, split by combination, and drawn as captioned."""

import numpy as np
import pytest

from diffpress.benchmarks.shapes import models, scenes


def test_items_do_not_depend_on_how_many_are_drawn() -> None:
    few, many = list(scenes.dataset(4, seed=9)), list(scenes.dataset(10, seed=9))
    for (a, words, image), (b, more, other) in zip(few, many, strict=False):
        assert (a, words) == (b, more)
        assert np.array_equal(image, other)


def test_training_never_shows_a_held_out_combination() -> None:
    for scene, _, _ in scenes.dataset(600, seed=1, held_out=False):
        assert not scenes.HELD_OUT_PAIRS & {(thing.colour, thing.shape) for thing in scene.things}
        if len(scene.things) == 2:
            first, second = scene.things
            assert (first.shape, scene.axis, second.shape) not in scenes.HELD_OUT_ARRANGEMENTS


def test_every_held_out_caption_has_one() -> None:
    pairs = scenes.held_out_captions(300)
    assert all(scene.held_out for scene, _ in pairs)
    assert {len(scene.things) for scene, _ in pairs} == {1, 2}


def test_every_colour_and_shape_is_trained_in_some_other_pair() -> None:
    for colour in scenes.COLOURS:
        assert any((colour, shape) not in scenes.HELD_OUT_PAIRS for shape in scenes.SHAPES)
    for shape in scenes.SHAPES:
        assert any((colour, shape) not in scenes.HELD_OUT_PAIRS for colour in scenes.COLOURS)


def test_variety_is_what_was_promised() -> None:
    assert len(scenes.SHAPES) >= 6
    assert len(scenes.COLOURS) >= 8
    assert len(scenes.SIZES) >= 2
    assert len(scenes.BACKGROUNDS) >= 4
    assert set(scenes.RELATIONS) == {"left of", "right of", "above", "below"}


def test_captions_name_everything_in_the_order_of_the_relation() -> None:
    scene = scenes.Scene(
        (scenes.Thing("red", "ring", "small"), scenes.Thing("blue", "star", "large")), "vertical", "dotted"
    )
    seen = {scenes.caption(scene, np.random.default_rng(seed)) for seed in range(60)}
    assert len(seen) > 8
    for words in seen:
        red, blue = words.index("small red ring"), words.index("large blue star")
        assert ("above" in words) == (red < blue)
        assert ("below" in words) == (blue < red)
        assert "dotted" in words


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_the_object_has_its_colour_and_its_place(shape: str) -> None:
    left, right = scenes.Thing("red", shape, "large"), scenes.Thing("blue", shape, "large")
    image = scenes.render(scenes.Scene((left, right), "horizontal", "plain"), np.random.default_rng(0)).astype(int)
    reddish = (image[..., 0] > 180) & (image[..., 2] < 90)
    bluish = (image[..., 2] > 180) & (image[..., 0] < 90)
    assert reddish.sum() > 100
    assert bluish.sum() > 100
    assert not reddish[:, 32:].any()
    assert not bluish[:, :32].any()


def test_a_near_miss_differs_and_is_a_scene() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = scenes.sample_scene(rng)
        other = scenes.swapped(scene, rng)
        assert other != scene
        assert len(other.things) == len(scene.things)


def test_every_caption_fits_the_tokenizer(tmp_path: pytest.TempPathFactory) -> None:
    tokenizer = models.make_tokenizer(tmp_path / "tokenizer")  # type: ignore[operator]
    for _, words, _ in scenes.dataset(300, seed=4, held_out=None):
        ids = tokenizer(words).input_ids
        assert len(ids) <= models.TOKENS
        assert len(ids) == len(words.replace(",", " ,").split()) + 2  # a word, a token
