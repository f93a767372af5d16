"""A schedule of its own, all the way: calibration, export, runtime and report follow it, the reference does not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffpress import api, inspection
from diffpress.benchmarks import ceilings, memory
from diffpress.benchmarks.bench import bench
from diffpress.benchmarks.candidates import Reference, own_schedule
from diffpress.bundle import Bundle
from diffpress.calibration.model import load_pipeline
from diffpress.calibration.tabulated import Tabulated
from diffpress.compress.recipe import Recipe
from diffpress.compress.run import run
from diffpress.plan import Plan, Sampling
from diffpress.runtime.pipeline import Pipeline

PROMPTS, SEEDS = ["a red ring", "a blue star"], [3, 4]
KARRAS = {"schedule": {"solver": "dpm++", "steps": 4, "spacing": "karras"}}
EVODIFF = {"schedule": {"solver": "evodiff", "steps": 5, "spacing": "karras"}}
EXPLICIT = {"schedule": {"solver": "dpm++", "sigmas": [14.6, 3.1, 0.8, 0.15, 0.03]}}


def compressed(model: Path, folder: Path, *passes: Any) -> Bundle:
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({"steps": 6, "calibration": {"prompts": 1}, "passes": passes}))
    return api.compress(str(model), str(file), folder / "bundle", quiet=True)


def latents(bundle: Bundle) -> list[np.ndarray]:
    drawn = Pipeline.load(bundle, "onnxruntime", "fp32")(PROMPTS, SEEDS, keep_latents=True)
    assert drawn.problem is None
    return drawn.latents


@pytest.fixture(scope="module")
def karras(least_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compressed(least_pipeline, tmp_path_factory.mktemp("karras"), KARRAS, "temporal-table")


def test_a_bundle_draws_what_diffusers_draws_with_that_scheduler(karras: Bundle, least_pipeline: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler

    pipeline = load_pipeline(str(least_pipeline))
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    wanted = pipeline(
        PROMPTS,
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
    ).images.numpy()
    got = latents(karras)
    assert len(got) == 4
    assert np.linalg.norm(got[-1] - wanted) < 1e-4 * np.linalg.norm(wanted)
    assert len(Plan.load(karras.file("plan")).temporal.timesteps) == 4  # type: ignore[union-attr]
    # Other tools open the scheduler that lies in the bundle.
    stored = DPMSolverMultistepScheduler.from_pretrained(karras.path / "scheduler")
    stored.set_timesteps(4)
    assert tuple(map(float, stored.timesteps)) == Sampling.from_json(karras.manifest["sampling"]).timesteps


def test_the_reference_keeps_the_models_own_schedule(karras: Bundle, least_pipeline: Path) -> None:
    own, scheduler = own_schedule(karras.manifest)
    assert (own.scheduler, own.steps, scheduler["class"]) == ("DDIMScheduler", 6, "DDIMScheduler")
    assert karras.manifest["sampling"]["steps"] == 4
    drawn = Reference.load(str(least_pipeline), own, scheduler)(PROMPTS, SEEDS, keep_latents=True)
    assert len(drawn.latents) == 6
    text = inspection.as_text(inspection.inspect(karras.path))
    assert "dpm++ karras, 4 steps at 999 " in text and "the model's own DDIMScheduler, 6 steps" in text


def test_a_report_compares_the_ends_of_different_schedules(
    karras: Bundle, least_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What takes long and knows no schedule, or is timed elsewhere.
    monkeypatch.setattr("diffpress.runtime.backends.available", lambda: [("onnxruntime", "fp32")])
    monkeypatch.setattr("diffpress.benchmarks.plain.compare", lambda *_: [])
    start = memory.Fresh(1, None, {"import": 1.0, "load": 1.0, "first_image": 1.0})
    monkeypatch.setattr(memory, "fresh", lambda _: start)
    monkeypatch.setattr("diffpress.benchmarks.ceilings.measure", lambda kinds: ceilings.Ceilings({}, {0: 1.0}, ""))
    report = bench(karras.path, str(least_pipeline), images=2, quiet=True)
    assert report["per_step"]["latent_rel_l2"]["compressed"] is None
    assert len(report["per_step"]["latent_rel_l2"]["uncompressed_export"]) == 6
    assert max(report["per_step"]["latent_rel_l2"]["uncompressed_export"]) < 1e-4
    assert report["quality"]["latent_rel_l2"] > 0 and report["faults"] == []
    assert (report["sampling"]["steps"], report["reference"]["steps"]) == (4, 6)
    lengths = {name: len(times) for name, times in report["steps_ms"].items()}
    assert (lengths["reference_eager"], lengths["uncompressed_export"], lengths["compressed"]) == (6, 6, 4)
    assert "--steps 6" in report["reproduce"][0]
    page = (karras.path / "report" / "report.html").read_text()
    assert "against DDIMScheduler, 6 steps" in page and "compared at the end alone" in page


def test_calibration_and_later_passes_follow(least_pipeline: Path) -> None:
    passes = (EXPLICIT, {"quantize": {"scales": "step"}}, {"cache": {"interval": 2}})
    recipe = Recipe(name="x", steps=6, calibration={"prompts": 1, "method": "every-step"}, passes=passes)
    work = api.begin(str(least_pipeline), recipe, quiet=True)
    run(recipe.built()[:1], work)
    assert isinstance(work.pipeline.scheduler, Tabulated)
    recorded = [float(call.timestep) for call in work.record()]
    assert recorded == list(work.sampling.timesteps) and any(t % 1 for t in recorded)
    run(recipe.built()[1:], work)
    plan = work.plan()
    scales = {len(layer.input_scale) for layer in plan.quantization.values() if layer.input_scale is not None}
    assert scales == {4} and plan.program.marks() == "#-#-"


@pytest.mark.parametrize(("schedule", "steps"), [(EXPLICIT, 4), (EVODIFF, 5)])
def test_what_diffusers_does_not_make_runs_in_torch_and_without_it(
    schedule: Any, steps: int, least_pipeline: Path, tmp_path: Path
) -> None:
    bundle = compressed(least_pipeline, tmp_path, schedule, "temporal-table")
    # The very schedule in torch, opened from what the manifest says, is the table.
    sampling = Sampling.from_json(bundle.manifest["sampling"])
    reference = Reference.load(str(least_pipeline), sampling, bundle.manifest["scheduler"])
    assert isinstance(reference.pipeline.scheduler, Tabulated)
    wanted = reference(PROMPTS, SEEDS, keep_latents=True).latents
    assert len(wanted) == steps
    for mine, theirs in zip(latents(bundle), wanted, strict=True):
        assert np.linalg.norm(mine - theirs) < 1e-4 * np.linalg.norm(theirs)
