"""T-GATE all the way: the shipped graphs draw step by step what torch draws, without the text behind the gate."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from diffpress import api, inspection
from diffpress.bundle import Bundle
from diffpress.calibration.model import load_pipeline
from diffpress.calibration.tabulated import playing
from diffpress.compress.cache.execute import executed
from diffpress.plan import Plan, Sampling, StepProgram
from diffpress.runtime.pipeline import Pipeline

PROMPTS, SEEDS, STEPS, GATE = ["a red ring", "a blue star"], [3, 4], 5, 2
PASSES = [{"schedule": {"solver": "dpm++", "steps": STEPS, "spacing": "karras"}}, {"tgate": {"gate": GATE}}]


@pytest.fixture(scope="module")
def shipped(least_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("tgate")
    file = folder / "tgate.yaml"
    file.write_text(json.dumps({"calibration": {"prompts": 1, "steps": 1}, "passes": PASSES}))
    return api.compress(str(least_pipeline), str(file), folder / "bundle", quiet=True)


def test_nothing_behind_the_gate_reads_the_text(shipped: Bundle) -> None:
    full, cached = (
        {
            name
            for node in onnx.load(shipped.file(f"unet/{file}"), load_external_data=False).graph.node
            for name in node.input
        }
        for file in ("model.onnx", "cached.onnx")
    )
    reads = Plan.load(shipped.file("plan")).program.variants["cached"].reads
    assert all(read.endswith(".attn2") for read in reads) and len(reads) == 4
    # An exported graph declares the text nevertheless, as it does every usual input.
    assert "encoder_hidden_states" in full and "encoder_hidden_states" not in cached and {*reads} <= cached
    assert len(cached) < len(full)


def test_a_bundle_draws_what_torch_draws_step_by_step(shipped: Bundle, least_pipeline: Path) -> None:
    program = StepProgram.from_json(shipped.manifest["program"])
    assert program.guidance_marks() == "##===" and program == Plan.load(shipped.file("plan")).program
    sampling = Sampling.from_json(shipped.manifest["sampling"])
    pipeline = load_pipeline(str(least_pipeline))
    config = shipped.manifest["scheduler"]["config"]
    pipeline.scheduler = playing(DPMSolverMultistepScheduler.from_config(config), sampling)
    wanted: list[np.ndarray] = []

    def keep(_: Any, __: int, ___: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        wanted.append(values["latents"].numpy().copy())
        return values

    with executed(pipeline, program):
        pipeline(
            PROMPTS,
            num_inference_steps=STEPS,
            guidance_scale=sampling.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            output_type="latent",
            callback_on_step_end=keep,
        )
    for backend in ("onnxruntime", "openvino"):
        opened = Pipeline.load(shipped, backend, "fp32")
        drawn = opened(PROMPTS, SEEDS, keep_latents=True)
        assert drawn.problem is None and len(drawn.latents) == len(wanted) == STEPS
        for got, expected in zip(drawn.latents, wanted, strict=True):
            assert np.linalg.norm(got - expected) < 1e-3 * np.linalg.norm(expected), backend
        alone = opened(PROMPTS[1:], SEEDS[1:], keep_latents=True).latents[-1]  # another batch, the same picture
        assert np.linalg.norm(alone - drawn.latents[-1][1:]) < 1e-4 * np.linalg.norm(alone)
        assert np.isfinite(opened(PROMPTS, SEEDS, guidance_scale=1.0, keep_latents=True).latents[-1]).all()


def test_the_bundle_says_that_it_takes_the_mean(shipped: Bundle) -> None:
    seen = inspection.inspect(shipped.path)
    assert seen["program"]["guidance"] == "##===" and seen["program"]["marks"] == "##---" and seen["problems"] == []
    text = inspection.as_text(seen)
    assert (
        re.search(r"^guidance +##===$", text, re.MULTILINE)
        and "= the conditional one, with the mean of the features of both" in text
    )
