"""Full-size pipelines: their parameters are those of the public models, and small ones go through every stage."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from diffpress.benchmarks import isolated, scale, scale_models
from diffpress.calibration.model import load_pipeline
from diffpress.errors import DiffpressError
from diffpress.runtime.tokenizer import Tokenizer

# Of the published checkpoints.
PARAMETERS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


@pytest.mark.parametrize("name", scale_models.MODELS)
def test_networks_have_the_parameters_of_the_published_ones(name: str) -> None:
    made = scale_models.networks(scale_models.MODELS[name])
    assert {key: sum(p.numel() for p in network.parameters()) for key, network in made.items()} == PARAMETERS[name]
    assert all(parameter.is_meta for network in made.values() for parameter in network.parameters())


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def small(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    found = scale.create(folder, request.param, {"divide": 10, "pixels": 64, "prompts": 2})
    return request.param, folder, found


def test_what_was_written_opens_and_runs(small: tuple[str, Path, Any]) -> None:
    _, folder, found = small
    pipeline = load_pipeline(str(folder / "model"))
    assert sum(p.numel() for p in pipeline.unet.parameters()) == found["parameters"]["unet"]
    kept = pipeline.unet.state_dict()
    with safe_open(folder / "model/unet/diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(kept)
        assert all(torch.equal(file.get_tensor(key).float(), kept[key]) for key in kept)
    text = pipeline.text_encoder.state_dict()
    with safe_open(folder / "model/text_encoder/model.safetensors", framework="pt") as file:
        assert all(torch.equal(file.get_tensor(key).float(), text[key]) for key in text)
    made = pipeline("a star", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0))
    image = np.asarray(made.images)
    assert image.shape == (1, 64, 64, 3) and np.isfinite(image).all() and image.std() > 0


def test_texts_are_told_apart_as_transformers_does(small: tuple[str, Path, Any]) -> None:
    name, folder, _ = small
    pipeline = load_pipeline(str(folder / "model"))
    texts = ["A star, and 2 moons!", "", "é ring " * 60]
    for part in ("tokenizer", "tokenizer_2")[: 2 if name == "sdxl" else 1]:
        ours = Tokenizer.load(folder / "model" / part).encode(texts)
        theirs = getattr(pipeline, part)(texts, padding="max_length", truncation=True, return_tensors="np").input_ids
        assert np.array_equal(ours, theirs)
        assert ours.max() == scale_models.VOCABULARY - 1 and ours[:, 0].tolist() == [scale_models.VOCABULARY - 2] * 3
    if name == "sdxl":
        assert ours[1, -1] == 0  # the second one pads with "!"


def test_weights_are_random_but_tame(small: tuple[str, Path, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = scale_models.weight("conv.weight", torch.Size((64, 32, 3, 3)), generator)
    assert float(kernel.abs().max()) <= 1 / np.sqrt(32 * 9) and abs(float(kernel.mean())) < 1e-3
    factors = scale_models.weight("norm.weight", torch.Size((64,)), generator)
    assert abs(float(factors.mean()) - 1) < 0.05 and float(factors.std()) > 0


def test_stages_are_run_once_and_rows_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, options = tmp_path / "work" / "sd15", {"divide": 10, "pixels": 64, "prompts": 2}
    first = scale.row(work, "sd15", "create", options)
    assert first["model"] == "sd15" and first["stage"] == "create"
    assert first["seconds"] > 0 and first["peak_rss_bytes"] > 1 << 27
    assert first["machine"] == scale.machine.machine()
    monkeypatch.setattr(isolated, "subprocess", SimpleNamespace(run=lambda *_, **__: pytest.fail("run again")))
    assert scale.row(work, "sd15", "create", options) == first
    file = tmp_path / "scale.json"
    scale.written(file, [first, {"model": "sdxl", "stage": "create", "seconds": 1.0}], options)
    document = scale.written(file, [{**first, "seconds": 2.0}], options)
    assert json.loads(file.read_text()) == document
    assert {(row["model"], row["seconds"]) for row in document["rows"]} == {("sd15", 2.0), ("sdxl", 1.0)}
    assert document["divide"] == 10 and document["machine"]["cores"]


def test_rows_of_another_machine_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, first, second = tmp_path / "scale.json", {"processor": "first", "cores": 2}, {"processor": "second"}

    def written_on(machine: dict[str, Any], stage: str, seconds: float) -> dict[str, dict[str, Any] | None]:
        """By stage, the machine that a row has for itself."""
        monkeypatch.setattr(scale.machine, "machine", lambda: dict(machine))
        document = scale.written(file, [{"model": "sd15", "stage": stage, "seconds": seconds}], {})
        assert document["machine"] == machine and json.loads(file.read_text()) == document
        return {row["stage"]: row.get("machine") for row in document["rows"]}

    assert written_on(first, "create", 1.0) == {"create": None}
    assert written_on(first, "compress", 2.0) == {"create": None, "compress": None}
    assert written_on(second, "parity", 3.0) == {"create": first, "compress": first, "parity": None}
    assert written_on(second, "create", 4.0) == {"compress": first, "parity": None, "create": None}
    assert written_on(first, "engines", 5.0) == {"compress": None, "parity": second, "create": second, "engines": None}
    # What was measured on another machine and kept there in the work folder is new in the document.
    brought = {"model": "sd15", "stage": "engines", "machine": second}
    assert scale.written(file, [brought], {})["rows"][-1] == brought


def test_a_stage_that_fails_is_not_taken_for_done(tmp_path: Path) -> None:
    with pytest.raises(DiffpressError, match="stage compress ended with"):
        scale.row(tmp_path / "sd15", "sd15", "compress", {"divide": 1, "pixels": None})
    assert not (tmp_path / "sd15" / "compress.json").exists()
