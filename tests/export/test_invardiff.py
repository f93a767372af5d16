"""A plan of whole steps and single modules all the way: the shipped graphs draw, step by step, what torch draws."""

import json
from pathlib import Path

import numpy as np
import torch

from diffpress import api
from diffpress.calibration.model import load_pipeline
from diffpress.compress.cache.execute import executed
from diffpress.plan import Plan, Sampling, StepProgram
from diffpress.runtime.pipeline import Pipeline

PROMPTS, SEEDS, STEPS = ["a red ring", "a blue star"], [3, 4], 8
PASS = {"invardiff": {"prompts": 1, "tau_step": 0.4, "tau_module": 0.5, "kinds": ["resnet", "attn1", "ff"]}}


def test_a_bundle_draws_what_torch_draws(least_pipeline: Path, tmp_path: Path) -> None:
    file = tmp_path / "invardiff.yaml"
    file.write_text(json.dumps({"steps": STEPS, "calibration": {"prompts": 1, "steps": 1}, "passes": [PASS]}))
    shipped = api.compress(str(least_pipeline), str(file), tmp_path / "bundle", quiet=True)
    program = StepProgram.from_json(shipped.manifest["program"])
    assert program == Plan.load(shipped.file("plan")).program
    kinds = [set(program.variants[step].features) for step in program.steps]
    assert {"whole"} in kinds and any(taken and "whole" not in taken for taken in kinds)
    sampling = Sampling.from_json(shipped.manifest["sampling"])
    pipeline = load_pipeline(str(least_pipeline))
    wanted: list[np.ndarray] = []
    with executed(pipeline, program):
        pipeline(
            PROMPTS,
            num_inference_steps=STEPS,
            guidance_scale=sampling.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            output_type="latent",
            callback_on_step_end=lambda _, __, ___, kept: wanted.append(kept["latents"].numpy().copy()) or {},
        )
    drawn = Pipeline.load(shipped, "onnxruntime", "fp32")(PROMPTS, SEEDS, keep_latents=True)
    assert drawn.problem is None and drawn.latents is not None
    for got, latents in zip(drawn.latents[-STEPS:], wanted, strict=True):
        assert np.linalg.norm(got - latents) < 1e-3 * np.linalg.norm(latents)
