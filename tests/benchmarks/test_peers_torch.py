"""Contenders in diffusers' pipeline draw what diffusers draws, in torch and with graphs in place of its networks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffpress.benchmarks import peers, peers_graphs, peers_rows, peers_torch
from diffpress.benchmarks.candidates import Reference
from diffpress.benchmarks.peers_rows import DDIM, DPM_12
from diffpress.calibration.model import load_pipeline
from diffpress.calibration.schedule import tabulate
from diffpress.errors import DiffpressError

STEPS = 3
TEXTS, SEEDS = ["a small red circle", "a large blue square"], [5, 6]


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Any]:
    """Makes tasks of few steps."""

    def make(name: str, **changes: Any) -> Any:
        made = peers.task(peers_rows.contenders()[name], peers_rows.shapes(), tmp_path, TEXTS)
        schedules = {key: {**entry, "steps": STEPS} for key, entry in made.schedules.items()}
        return type(made)(**{**made.__dict__, "schedules": schedules, **changes})

    return make


@pytest.fixture(scope="module")
def wanted() -> dict[str, Any]:
    """What the reference of every report draws in so few steps, by schedule."""
    pipeline, found = load_pipeline("shapes"), {}
    for schedule in (DDIM, DPM_12):
        entry = peers_rows.scheduler(peers_rows.shapes(), schedule)
        import diffusers

        scheduler = getattr(diffusers, entry["class"]).from_config(entry["config"])
        pipeline.scheduler = scheduler
        images = Reference(pipeline, tabulate(scheduler, STEPS, 2.0, 64, 64))(TEXTS, SEEDS, keep_latents=True)
        found[schedule.name] = images
    return found


def test_eager_draws_what_diffusers_draws_on_every_schedule(task: Callable[..., Any], wanted: dict[str, Any]) -> None:
    made = peers_torch.opened(task("diffusers FP32"))
    for schedule in (DPM_12, DDIM):
        facts = made.follow(schedule.name)
        pixels, latents = made.draw(TEXTS, SEEDS)
        np.testing.assert_allclose(latents, wanted[schedule.name].latents[-1], rtol=0, atol=1e-5)
        assert np.abs(pixels.astype(int) - wanted[schedule.name].pixels).max() <= 1
        assert facts["steps"] == STEPS == len(facts["timesteps"]) and (facts["bits_w"], facts["deploys"]) == (32, True)
    assert facts["bytes"] == 4 * facts["params"]


def test_calls_are_those_of_the_network_at_any_timestep(task: Callable[..., Any]) -> None:
    made = peers_torch.opened(task("diffusers FP32", single=True))
    made.follow(DDIM.name)
    sample, text = np.ones((2, 4, 16, 16), np.float32), np.ones((2, *made._task.text), np.float32)
    got = made.begin(text, [700.0, 13.5])(1, sample)
    with torch.no_grad():
        found = made.pipeline.unet(torch.from_numpy(sample), 13.5, torch.from_numpy(text)).sample
    np.testing.assert_array_equal(got, found[-1:].numpy())


def test_bf16_is_near_and_smaller(task: Callable[..., Any], wanted: dict[str, Any]) -> None:
    made = peers_torch.opened(task("diffusers BF16"))
    facts = made.follow(DDIM.name)
    _, latents = made.draw(TEXTS, SEEDS)
    apart = np.linalg.norm(latents - wanted[DDIM.name].latents[-1]) / np.linalg.norm(latents)
    assert 1e-4 < apart < 0.1 and facts["bytes"] == 2 * facts["params"] and facts["bits_a"] == 16


def test_deepcache_reuses_and_repeats_itself(task: Callable[..., Any], wanted: dict[str, Any]) -> None:
    pytest.importorskip("DeepCache")
    made = peers_torch.opened(task("DeepCache, interval 2"))
    assert made.follow(DDIM.name)["period"] == 2
    drawn = [made.draw(TEXTS, SEEDS)[1] for _ in range(2)]
    np.testing.assert_array_equal(*drawn)  # nothing of an image is left for the next
    assert np.abs(drawn[0] - wanted[DDIM.name].latents[-1]).max() > 1e-3


def test_calibration_sees_pairs_of_halves(task: Callable[..., Any]) -> None:
    made = peers_torch.opened(task("diffusers FP32"))
    calls = list(made.recorded())
    assert len(calls) == peers_torch.STEPS * len(TEXTS)
    assert {tuple(call["sample"].shape) for call in calls} == {(2, 4, 16, 16)}
    first, second = calls[:2]
    for call in (first, second):  # both halves of guidance see the same latents, and other texts
        assert (call["sample"][0] == call["sample"][1]).all()
        assert (call["encoder_hidden_states"][0] != call["encoder_hidden_states"][1]).any()
    assert (first["encoder_hidden_states"][0] == second["encoder_hidden_states"][0]).all()  # the empty prompt


def test_what_is_not_installed_says_which_extra(task: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tomesd", None)
    with pytest.raises(DiffpressError, match=r"diffpress\[peers\]"):
        peers_torch.opened(task("ToMe, half of the tokens"))


@pytest.mark.parametrize("name", ["ONNX Runtime FP32", "OpenVINO FP32"])
def test_graphs_draw_what_diffusers_draws(
    task: Callable[..., Any], wanted: dict[str, Any], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shared = tmp_path_factory.getbasetemp() / "graphs"  # exported once for both
    made = peers_graphs.opened(task(name, work=str(shared)))
    facts = made.follow(DPM_12.name)
    for some in (slice(None), slice(1)):  # of a batch and of one, as quality and times are taken
        _, latents = made.draw(TEXTS[some], SEEDS[some])
        np.testing.assert_allclose(latents, wanted[DPM_12.name].latents[-1][some], rtol=0, atol=5e-3)
    assert facts["backend"] == f"{name.split(' FP')[0].lower().replace(' ', '')} fp32" and facts["seconds"] > 0
    assert 1 <= facts["bytes"] / (4 * facts["params"]) < 1.2  # the weights, and what the exporter notes beside them


def test_something_is_made_once_and_whole(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").touch()
        raise ValueError("out of space")

    place = tmp_path / "graphs"
    with pytest.raises(ValueError, match="out of space"):
        peers_graphs.once(place, broken)
    assert not place.exists()
    made: list[Path] = []
    seconds = [peers_graphs.once(place, lambda folder: made.append(folder)) for _ in range(2)]
    assert len(made) == 1 and seconds[0] == seconds[1] >= 0 and not (place / "half").exists()


def test_a_folder_for_older_transformers_has_the_names_that_they_know(tiny_pipeline: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    before = load_file(tiny_pipeline / "text_encoder/model.safetensors")
    peers_graphs.for_older_transformers(tiny_pipeline, tmp_path)
    after = load_file(tmp_path / "text_encoder/model.safetensors")
    assert all(torch.equal(after[f"text_model.{name.removeprefix('text_model.')}"], before[name]) for name in before)
    assert len(after) == len(before) and (tmp_path / "unet/config.json").exists()
    vocabulary = json.loads((tmp_path / "tokenizer/vocab.json").read_text())
    assert vocabulary == CLIPTokenizer.from_pretrained(tiny_pipeline / "tokenizer").get_vocab()
    assert (tmp_path / "tokenizer/merges.txt").read_text().splitlines()[0].startswith("#version")
    peers_graphs.for_older_transformers(tmp_path, tmp_path / "again")  # one that has them is copied as it is
    assert load_file(tmp_path / "again/text_encoder/model.safetensors").keys() == after.keys()
