"""Recipes among the contenders: what they become on a schedule, and which turn a call is timed over."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.benchmarks import peers, peers_ours, peers_rows
from diffpress.benchmarks.peers_rows import CALLS, DDIM, DPM_12, OWN
from diffpress.compress.recipe import Recipe
from diffpress.plan import FULL, REUSE, StepProgram, Variant


def task(recipe: str, folder: Path, **changes: Any) -> Any:
    contender = peers_rows.contenders()[f"diffpress {recipe}"]
    made = peers.task(contender, peers_rows.shapes(), folder, ["a red ball"])
    return type(made)(**{**made.__dict__, **changes})


def test_a_preset_is_put_on_a_schedule_and_stays_itself(tmp_path: Path) -> None:
    plain = peers_ours.document(task("int8", tmp_path), DDIM.name)
    moved = peers_ours.document(task("int8", tmp_path), DPM_12.name)
    own = peers_ours.document(task("fast", tmp_path), OWN)
    assert moved["passes"][1:] == plain["passes"]
    assert moved["passes"][0] == {"schedule": {"solver": "dpm++", "spacing": "karras", "steps": 12}}
    assert [next(iter(entry)) for entry in own["passes"] if not isinstance(entry, str)].count("schedule") == 1
    for document in (plain, moved, own):
        Recipe.model_validate({"name": "x", **document}).built()


@pytest.mark.parametrize(("recipe", "prompts"), [("balanced", 1), ("cachequant", 2)])
def test_single_calls_are_calibrated_briefly(tmp_path: Path, recipe: str, prompts: int) -> None:
    found = peers_ours.document(task(recipe, tmp_path, single=True), DDIM.name)
    assert found["steps"] == CALLS and found["calibration"] == {"prompts": prompts, "steps": 4}


@pytest.mark.parametrize(
    ("steps", "guidance", "turn"),
    [
        ("ffffff", "", 1),
        ("fccfccfccf", "", 3),
        ("fccccfcccc", "", 5),
        ("fcffcc", "", 6),
        ("ffff", "frfr", 2),
        ("fccfcc", "frrfff", 6),
        ("f", "", 1),
    ],
)
def test_the_turn_of_a_program(steps: str, guidance: str, turn: int) -> None:
    variants = {FULL: Variant(writes=("deep",)), "cached": Variant(reads=("deep",))}
    names = tuple(FULL if mark == "f" else "cached" for mark in steps)
    program = StepProgram(names, variants, tuple(FULL if mark == "f" else REUSE for mark in guidance))
    assert peers_ours.period(program) == turn
    rows = [(name, program.guided(index)) for index, name in enumerate(names)]
    for shorter in range(1, turn):  # by the definition: no shorter turn repeats itself
        assert any(rows[index] != rows[index - shorter] for index in range(shorter, len(rows)))


def test_ours_is_compressed_once_and_its_calls_are_its_networks(tmp_path: Path) -> None:
    options = {"recipe": "fp32", "precision": "fp32"}
    schedules = {DDIM.name: {"scheduler": {}, "steps": 50}}
    made = task("fp32", tmp_path, options=options, single=True, schedules=schedules)
    ours = peers_ours.Ours(made)
    facts = ours.follow(DDIM.name)
    assert facts["steps"] == CALLS == len(facts["timesteps"]) and facts["period"] == 1 and facts["bits_w"] == 32
    assert facts["schedule"] == "DDIM" and facts["deploys"] and facts["backend"].endswith(" fp32")
    generator = np.random.default_rng(1)
    sample = generator.normal(size=(2, 4, 16, 16)).astype(np.float32)
    text = generator.normal(size=(2, *made.text)).astype(np.float32)
    got = ours.begin(text, facts["timesteps"])(3, sample)

    import torch

    from diffpress.calibration.model import load_pipeline

    unet = load_pipeline("shapes").unet
    with torch.no_grad():
        wanted = unet(torch.from_numpy(sample), facts["timesteps"][3], torch.from_numpy(text)).sample[-1:].numpy()
    assert got.shape == wanted.shape and np.abs(got - wanted).max() < 1e-3 * np.abs(wanted).max()
    file = tmp_path / "made" / "shapes" / "bundles"
    before = {path: path.stat().st_mtime_ns for path in file.rglob("*") if path.is_file()}
    assert peers_ours.Ours(made).follow(DDIM.name) == facts
    assert before == {path: path.stat().st_mtime_ns for path in file.rglob("*") if path.is_file()}


def test_comments_of_a_preset_make_no_bundle_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "own.yaml"
    monkeypatch.setattr(peers_ours, "presets", lambda: {"own": file})

    def digest(text: str) -> str:
        file.write_text(text)
        peers_ours.code.cache_clear()
        return peers_ours.code("own")

    first = digest("# 2x faster\npasses: []\n")
    assert digest("# 3x faster\npasses: []\n") == first != digest("# 2x faster\npasses: [temporal-table]\n")
