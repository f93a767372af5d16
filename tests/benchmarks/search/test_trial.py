"""Trials on the least pipeline, in this process: what they measure, what they give up, what they leave behind."""

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress import api
from diffpress.benchmarks.search import proxy, trial
from diffpress.benchmarks.search import run as search
from diffpress.benchmarks.search.ground import Ground, Settings
from diffpress.calibration.prompts import GENERAL
from diffpress.compress.recipe import Recipe
from diffpress.compress.run import run
from diffpress.compress.work import Work
from diffpress.export import flops, ship
from diffpress.plan import FULL

CACHE = {"name": "cache", "steps": 6, "passes": [{"cache": {"interval": 2}}]}


@pytest.fixture(scope="module")
def ground(least_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    settings = Settings(str(least_pipeline), steps=6, guidance_scale=None, seed=0, images=4, shapes=False)
    return Ground(settings, tmp_path_factory.mktemp("search"), "trials", 1)


def task(ground: Ground, recipe: dict[str, Any], **more: Any) -> dict[str, Any]:
    key = trial.key_of(recipe, "fp32")
    own = {"key": key, "recipe": recipe, "precision": "fp32", "backend": "onnxruntime"}
    shared = {"export_backend": "onnxruntime", "eager": 2.0, "place": str(ground.place), "threads": 1}
    settings = json.loads(json.dumps(ground.settings.__dict__))
    ends = {"rivals": [], "proxy": False, "home": socket.gethostname()}
    return {**own, **shared, **ends, "settings": settings, **more}


def worked(ground: Ground, passes: Sequence[Any]) -> Work:
    recipe = Recipe.model_validate({"name": "own", "steps": 6, "passes": passes})
    work = api.begin(ground.settings.model, recipe, quiet=True)
    run(recipe.built(), work)
    return work


def rival(speedup: float, error: float, ops: float, quantized: bool = False) -> dict[str, Any]:
    own = {"name": "other", "precision": "fp32", "quantized": quantized}
    return {**own, "speedup": speedup, "operations": ops, "errors": [error] * 8}


def test_trials_finals_and_calibration_see_other_prompts_and_noise() -> None:
    settings = Settings("any", 6, None, seed=0, images=12, shapes=False)
    trials, finals = settings.prompts("trials").texts, settings.prompts("finals").texts
    assert len(trials) == 12 and len(finals) == 24
    assert not set(trials) & set(finals) and not set(GENERAL) & {*trials, *finals}
    assert not set(settings.noise("trials")) & set(settings.noise("finals"))
    shapes = Settings("shapes", 6, None, seed=0, images=12, shapes=True)
    scenes = shapes.prompts("trials").scenes
    assert scenes is not None and len(scenes) == 12
    assert shapes.prompts("trials").texts != shapes.prompts("finals").texts[:12]
    assert Settings.of(json.loads(json.dumps(settings.__dict__))) == settings


def test_the_export_and_the_references_are_made_once(ground: Ground) -> None:
    assert ground.reference.pixels.shape == (4, 16, 16, 3)
    assert ground.bundle.manifest["sampling"]["steps"] == 6
    files = [ground.place / "reference-trials.npz", ground.bundle.path / "diffpress.json"]
    made = [file.stat().st_mtime_ns for file in files]
    again = Ground(ground.settings, ground.place, "trials")
    assert np.array_equal(again.reference.latents, ground.reference.latents)
    assert again.bundle.manifest == ground.bundle.manifest
    assert [file.stat().st_mtime_ns for file in files] == made


def test_a_recipe_without_passes_draws_what_diffusers_draws(ground: Ground) -> None:
    record = trial.run(task(ground, {"name": "plain", "steps": 6, "passes": []}))
    assert record["state"] == "measured", record["message"]
    assert record["quality"]["latent_rel_l2"] < 1e-4 and record["quality"]["psnr_db"] > 50
    assert record["quality"]["clip_score"] == {"reference": None, "compressed": None}
    ratio = record["speedup"]["vs_uncompressed_export"]
    assert 0.5 < ratio < 2 and record["speedup"]["vs_eager"] == pytest.approx(2 * ratio)
    size = record["size_bytes"]
    assert 1 < size["denoiser_compressed"] / size["denoiser_reference"] < 1.2
    assert record["seconds"].keys() == {"passes", "proxy", "export", "draw", "time"}


def test_a_trial_measures_what_its_proxy_sees(ground: Ground) -> None:
    record = trial.run(task(ground, CACHE))
    assert record["state"] == "measured", record["message"]
    assert record["quality"]["latent_rel_l2"] == pytest.approx(np.mean(record["errors"])) and record["errors"][0] > 0
    work = worked(ground, CACHE["passes"])  # type: ignore[arg-type]
    assert proxy.errors(work, ground) == pytest.approx(record["errors"], rel=1e-2)
    assert record["operations"] == pytest.approx(proxy.operations(work))
    assert record["passes"][0].startswith("cache: ")
    assert not list(work.scratch.parent.glob("*/schedule-*"))


def test_the_same_recipe_in_another_arithmetic_is_not_made_again(ground: Ground) -> None:
    folder = trial.folder_of(ground.place, CACHE)
    first = trial.run(task(ground, CACHE))
    made = (folder / "made.json").stat().st_mtime_ns
    again = trial.run(task(ground, CACHE, backend="openvino", key="another"))
    assert again["state"] == "measured" and (folder / "made.json").stat().st_mtime_ns == made
    assert "passes" not in again["seconds"] and again["operations"] == first["operations"]
    assert again["quality"]["latent_rel_l2"] == pytest.approx(first["quality"]["latent_rel_l2"], rel=1e-2)


def test_int8_in_torch_is_near_int8_in_the_graph(ground: Ground) -> None:
    passes = [{"quantize": {"format": "int8"}}]
    record = trial.run(task(ground, {"name": "int8", "steps": 6, "passes": passes}))
    assert record["state"] == "measured" and record["quantized"], record["message"]
    found = proxy.errors(worked(ground, passes), ground)
    assert np.mean(found) == pytest.approx(record["quality"]["latent_rel_l2"], rel=0.25)


def test_operations_are_those_of_the_graphs(ground: Ground, tmp_path: Path) -> None:
    work = worked(ground, [{"schedule": {"steps": 4}}, {"guidance": {"every": 2}}, {"cache": {"interval": 2}}])
    assert len(set(work.program.steps)) == 2 and len(set(map(work.program.guided, range(4)))) == 2
    files = ship.variants(work.pipeline, work.plan(), tmp_path / "unet", work.progress)
    program = work.program
    exact = sum(
        flops.count(files[name], 2 if program.guided(index) == FULL else 1).operations
        for index, name in enumerate(program.steps)
    )
    assert proxy.operations(work) == pytest.approx(exact, rel=0.02)


def test_what_a_pass_refuses_is_a_record_that_leaves_nothing(ground: Ground) -> None:
    recipe = {"name": "correct", "steps": 6, "passes": ["cache-correct"]}
    record = trial.run(task(ground, recipe))
    assert record["state"] == "refused"
    assert record["message"].startswith("pass 'cache-correct': cache-correct: no step reuses a feature")
    assert not trial.folder_of(ground.place, recipe).exists()


def test_a_hopeless_trial_is_not_exported(ground: Ground) -> None:
    recipe = {"name": "late", "steps": 6, "passes": [{"cache": {"interval": 3}}]}
    rivals = [rival(9.0, 1e-6, 1e6), rival(3.0, 9.0, 1e6)]
    record = trial.run(task(ground, recipe, rivals=rivals, proxy=True))
    assert record["state"] == "hopeless" and "where 'other' has 9.0x at 1e-06" in record["message"]
    assert not trial.folder_of(ground.place, recipe).exists()


def test_only_what_is_clearly_better_in_both_ends_a_trial(ground: Ground) -> None:
    work = worked(ground, CACHE["passes"])  # type: ignore[arg-type]
    ops, error = proxy.operations(work), float(np.mean(proxy.errors(work, ground)))

    def give_up(*rivals: dict[str, Any]) -> dict[str, Any]:
        return proxy.give_up(work, ground, ops, "fp32", rivals)

    assert give_up() == {}
    assert give_up(rival(5.0, 0.0, ops)) == {}  # as fast: nothing is drawn
    own, fast = rival(5.0, error, ops), rival(6.0, 0.9 * error, ops / 2)  # whose rate would make 3.0x
    assert proxy.predicted(ops, "fp32", False, [own, fast]) == pytest.approx(5.0)
    assert proxy.predicted(ops, "bf16", False, [own, fast]) is None
    assert proxy.predicted(ops, "fp32", True, [own, fast]) is None
    assert give_up(own, fast) == {"speedup": pytest.approx(5.0), "error": pytest.approx(error)}
    assert give_up(own, rival(5.7, 0.5 * error, ops / 2)) == {}  # not clearly faster: nothing is drawn
    with pytest.raises(proxy.Hopeless, match=r"about 5\.0x"):
        give_up(own, rival(6.0, 0.7 * error, ops / 1.2))
    with pytest.raises(proxy.Hopeless):
        give_up(own, rival(5.8, 0.79 * error, ops / 1.2))


def test_a_recipe_ships_the_program_that_was_tried(ground: Ground) -> None:
    """What a pass decided by times that it took is written out; run again, it may decide otherwise."""
    around: list[Any] = [{"cache": {"interval": 3}}, "temporal-table", {"cache-correct": {"depth": 2}}]
    tried = worked(ground, around)
    assert search.pinned(around, tried.program) == around
    rest = ["temporal-table", {"quantize": {"format": "int8"}}]
    pinned = json.loads(json.dumps(search.pinned([{"cache-budget": {"speedup": 2.0}}, *rest], tried.program)))
    assert [*pinned[0], *pinned[1]] == ["planned", "cache-correct"] and pinned[2:] == rest
    again = worked(ground, pinned[:2])
    assert again.program == tried.program and again.corrections is not None
    assert search.pinned([{"cache-budget": {"speedup": 2.0, "depth": 0}}], tried.program) == pinned[:1]
