import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffpress.api import SHAPES_GUIDANCE
from diffpress.benchmarks.shapes import evaluate, models, scenes
from diffpress.benchmarks.shapes.networks import open_networks
from diffpress.errors import DiffpressError


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a training that has just begun."""
    folder = tmp_path_factory.mktemp("work")
    tokenizer = models.make_tokenizer(folder / "tokenizer")
    # The CLIP is trained beside heads that are dropped afterwards.
    makers = {
        "clip": lambda: torch.nn.ModuleDict({"clip": models.make_clip(tokenizer)}),
        "vae": models.make_vae,
        "unet": models.make_unet,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, make in {**makers, "reader": models.Reader}.items():
            values = make().state_dict().items()  # type: ignore[operator]
            tensors = {f"average.{key}": value.clone() for key, value in values if value.is_floating_point()}
            save_file(tensors, folder / f"{name}.state.safetensors")
    return folder


@pytest.fixture
def few_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, retrieval, reconstruction = evaluate.real_scenes, evaluate.retrieval, evaluate.reconstruction
    monkeypatch.setattr(evaluate, "real_scenes", lambda two_objects=0: whole(two_objects)[-24:])
    monkeypatch.setattr(evaluate, "retrieval", lambda judge: retrieval(judge, batches=1, pairs=4))
    monkeypatch.setattr(evaluate, "reconstruction", lambda vae: reconstruction(vae, 8))


@pytest.mark.usefixtures("few_renders")
def test_a_training_that_still_runs_can_be_evaluated(work: Path, tmp_path: Path) -> None:
    numbers, picture = tmp_path / "numbers.json", tmp_path / "grid.png"
    settings = ["--weights", str(work), "--images", "7", "--steps", "1", "--batch", "4"]
    assert evaluate.main([*settings, "--json", str(numbers), "--grid", str(picture)]) == 0
    found: dict[str, Any] = json.loads(numbers.read_text())
    assert found["reader"]["renders"] == 24 and found["clip"]["chance"] == 1 / 8
    assert found["vae"]["psnr_db"] > 0 and found["sampling"]["guidance_scale"] == SHAPES_GUIDANCE
    generated = found["generated"]
    assert (generated["one_object"]["images"], generated["two_objects"]["images"]) == (3, 4)
    assert {"right", "shuffled_captions", "chance"} <= generated["all"].keys()
    assert generated["two_objects"]["right"].keys() >= {"colour", "shape", "size", "relation", "overall"}
    assert Image.open(picture).size[0] > 6 * 192


@pytest.mark.usefixtures("few_renders")
def test_what_is_not_trained_yet_is_left_out(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    early = tmp_path / "early"
    early.mkdir()
    for name in ("tokenizer", "clip.state.safetensors"):
        (early / name).symlink_to(work / name)
    evaluate.main(["--weights", str(early)])
    assert set(json.loads(capsys.readouterr().out)) == {"weights", "clip"}


def test_the_assembled_folder_opens_too(work: Path, tmp_path: Path) -> None:
    state = open_networks(work)
    state.pipeline.save_pretrained(tmp_path / "pipeline")
    state.clip.save_pretrained(tmp_path / "clip")
    save_file(state.reader.state_dict(), tmp_path / "reader.safetensors")
    found = open_networks(tmp_path)
    assert found.vae.config.scaling_factor == state.vae.config.scaling_factor > 0
    texts = ["a small red star on a plain background", "one large blue ring, dotted background"]
    images = [evaluate.generate(one.pipeline, texts, 1, 3.0, 2, seed=5) for one in (state, found)]
    assert np.array_equal(*images)
    # A batch of one draws the same: noise belongs to the image, not to its batch.
    alone = evaluate.generate(found.pipeline, texts, 1, 3.0, 1, seed=5).astype(int)
    assert np.abs(alone - images[1]).max() <= 1


def test_an_empty_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DiffpressError, match="neither trained weights"):
        open_networks(tmp_path)
    with pytest.raises(SystemExit):
        evaluate.main(["--weights", str(tmp_path)])
    assert "neither trained weights" in capsys.readouterr().err


def test_real_scenes_hold_every_scene_of_one_object() -> None:
    items = evaluate.real_scenes(5)
    single = [scene for scene in items if len(scene.things) == 1]
    assert len(set(single)) == len(single) == 8 * 6 * 2 * 5 and len(items) == len(single) + 5


def test_shuffling_keeps_the_number_of_objects_and_moves_everyone() -> None:
    truths = [scene for scene, _ in scenes.held_out_captions(30)]
    shuffled = evaluate._shuffled(truths)
    assert sorted(map(str, shuffled)) == sorted(map(str, truths))
    assert all(len(a.things) == len(b.things) for a, b in zip(truths, shuffled, strict=True))
    assert all(a is not b for a, b in zip(truths, shuffled, strict=True))


def test_chance_is_the_agreement_of_independent_draws() -> None:
    thing = [scenes.Thing(colour, "star", "small") for colour in ("red", "red", "orange", "orange")]
    truths = [scenes.Scene((one,), "single", "plain") for one in thing]
    found = {head: np.zeros(4, int) for head in models.Reader.HEADS}
    found["first_colour"] = np.array([0, 0, 0, 1])
    found["first_shape"] = np.full(4, scenes.SHAPES.index("star"))
    chance = evaluate._chance(found, truths)
    assert chance["colour"] == pytest.approx(0.75 * 0.5 + 0.25 * 0.5) and chance["shape"] == 1.0
