"""The training script on a handful of items: every stage, resumption, and a folder that stock classes open."""

import json
import sys
from pathlib import Path

import pytest
import torch

from diffpress.benchmarks.shapes import train


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(train, "ITEMS", 40)
    monkeypatch.setattr(train, "READER_ITEMS", 40)
    monkeypatch.setattr(train, "ITERATIONS", dict.fromkeys(("clip", "vae", "unet", "reader"), 2))
    for name, place in (("PIPELINE", "weights/pipeline"), ("CLIP", "weights/clip"), ("READER", "weights/reader")):
        monkeypatch.setattr(train, name, tmp_path / place)


def run(monkeypatch: pytest.MonkeyPatch, work: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--work", str(work), "--device", "cpu", *arguments])
    train.main()


def test_all_stages_leave_a_pipeline_that_stock_classes_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    run(monkeypatch, tmp_path / "work")
    for stage in train.ITERATIONS:
        assert json.loads((tmp_path / "work" / f"{stage}.json").read_text())["iteration"] == 2
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "weights" / "pipeline", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("a small red circle on a plain background", num_inference_steps=2, output_type="np").images
    assert image.shape == (64, 64, 3)
    assert (tmp_path / "weights" / "reader").is_file()


def test_a_stopped_stage_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    def result(work: Path, stop: int | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)

        def loss_of(iteration: int, generator: torch.Generator) -> torch.Tensor:
            if iteration == stop:
                raise KeyboardInterrupt
            return (model(torch.randn(8, 3, generator=generator)) - 1).square().mean()

        train.train("toy", model, loss_of, work, 9, 1e-2, save_every=2)
        return model.state_dict()

    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = result(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        result(tmp_path / "parts", stop=5)
    assert json.loads((tmp_path / "parts" / "toy.json").read_text())["iteration"] == 4
    again = result(tmp_path / "parts")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert all(torch.equal(whole[name], value) for name, value in result(tmp_path / "parts").items())  # finished
