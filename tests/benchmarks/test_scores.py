from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.benchmarks import scores
from diffpress.benchmarks.candidates import Drawn, draw
from diffpress.benchmarks.prompts import Prompts


@pytest.fixture
def sets(fake_candidate: Callable[..., Any]) -> dict[str, Drawn]:
    candidates = {"reference": fake_candidate(), "off": fake_candidate(error=0.1, shift=5)}
    return {name: draw(one, ["x"] * 6, range(6), batch=4, keep=2) for name, one in candidates.items()}


def test_distances(sets: dict[str, Drawn]) -> None:
    found = scores.distances(sets["off"], sets["reference"])
    assert found["images"] == 6
    for name in ("psnr_db", "psnr_db_worst"):
        assert found[name] == pytest.approx(20 * np.log10(255 / 5))
    assert found["latent_rel_l2"] == found["latent_rel_l2_median"] == pytest.approx(0.1)
    assert 0.9 < found["ssim"] < 1


def test_intervals_of_distances_hold_their_means(sets: dict[str, Drawn]) -> None:
    sets["off"].pixels[3] += 20
    rows = scores.each(sets["off"], sets["reference"])
    means, found = scores.distances(sets["off"], sets["reference"], rows), scores.intervals(rows, {}, {})
    assert found.keys() == set(scores.DISTANCES)
    for name, (low, high) in found.items():
        assert low <= means[name] <= high
    assert found["latent_rel_l2"] == pytest.approx([0.1, 0.1])
    assert (
        found["psnr_db"][1] == pytest.approx(20 * np.log10(255 / 5)) and found["psnr_db"][0] < found["psnr_db"][1] - 2
    )


def test_intervals_of_both_sides_and_of_the_change() -> None:
    random = np.random.default_rng(0)
    prompts = random.normal(30, 5, 40)  # some prompts score higher than others, which the change does not show
    reference = {"clip_score": prompts, "attribute_accuracy": np.array([[2, 2], [1, 2]] * 20)}
    compressed = {
        "clip_score": prompts - random.normal(1, 0.1, 40),
        "attribute_accuracy": np.array([[2, 2], [0, 2]] * 20),
    }
    found = scores.intervals({}, reference, compressed)
    low, high = found["clip_score"]["change"]
    assert -1.1 < low < high < -0.9
    assert high - low < 0.1 < (found["clip_score"]["reference"][1] - found["clip_score"]["reference"][0]) / 20
    assert found["attribute_accuracy"]["reference"][0] <= 0.75 <= found["attribute_accuracy"]["reference"][1]
    low, high = found["attribute_accuracy"]["change"]
    assert -0.35 < low < -0.25 < high < -0.15
    assert scores.intervals({}, {"clip_score": prompts}, {}) == {}


def test_error_per_step(sets: dict[str, Drawn]) -> None:
    assert scores.error_per_step(sets["off"], sets["reference"]) == pytest.approx([0.1] * 3)


def test_error_per_step_of_fewer_images(sets: dict[str, Drawn]) -> None:
    few = Drawn(sets["off"].pixels, sets["off"].latents, sets["off"].trajectory[:, :1])
    assert scores.error_per_step(few, sets["reference"]) == pytest.approx([0.1] * 3)


def test_without_the_networks_of_shapes_content_is_unknown(sets: dict[str, Drawn]) -> None:
    content = scores.Judging(Prompts(["x"] * 6, "nowhere")).content(sets["off"].pixels)
    assert content == scores.Content(None, None, None, None)


def test_faults_name_the_candidate(sets: dict[str, Drawn]) -> None:
    assert scores.all_faults(sets) == []
    sets["off"].pixels[3] = 0
    assert scores.all_faults(sets) == ["off, image 3: constant"]


def test_the_worst_pictures_are_shown_too(sets: dict[str, Drawn]) -> None:
    sets["off"].pixels[4] += 20
    assert scores.shown(sets["reference"], sets["off"], first=3, worst=1) == [(0, ""), (1, ""), (2, ""), (4, "worst")]
    assert len(scores.shown(sets["reference"], sets["off"])) == 6


def test_content_of_shapes(monkeypatch: pytest.MonkeyPatch, sets: dict[str, Drawn], tmp_path: Path) -> None:
    from diffpress.benchmarks import prompts
    from diffpress.benchmarks.shapes import models
    from diffpress.benchmarks.shapes.judge import Judge

    tokenizer = models.make_tokenizer(tmp_path)
    untrained = Judge(models.Reader().eval(), models.make_clip(tokenizer).eval(), tokenizer)
    monkeypatch.setattr(Judge, "load", lambda: untrained)
    judging = scores.Judging(prompts.choose(6, shapes=True))
    content = judging.content(sets["off"].pixels)
    assert content.clip_score is not None and content.attribute_accuracy is not None
    assert content.frechet and content.frechet > 0
    rows = judging.judge(sets["off"].pixels)[1]
    assert rows["clip_score"].mean() == pytest.approx(content.clip_score)
    hits, asked = rows["attribute_accuracy"].sum(axis=0)
    assert hits / asked == pytest.approx(content.attribute_accuracy)
    assert set(rows["attribute_accuracy"][:, 1]) <= {2, 4}  # colour and shape of one object or two
    assert content.attributes and set(content.attributes) == {"colour", "shape", "size", "axis", "relation"}
    one = scores.Judging(prompts.choose(1, shapes=True))
    assert one.content(sets["off"].pixels[:1]).frechet is None
