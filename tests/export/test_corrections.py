"""Corrections of depth 2 all the way: a shipped bundle, in the numpy runtime, follows torch step by step."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffpress import api
from diffpress.bundle import Bundle
from diffpress.calibration.model import load_pipeline
from diffpress.compress.cache.execute import CachedDenoiser
from diffpress.plan import Plan
from diffpress.runtime.pipeline import Pipeline

PASSES = [{"cache": {"interval": 3, "branch": 1}}, {"cache-correct": {"depth": 2}}]
STEPS = 6


@pytest.fixture(scope="module")
def made(least_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("corrections")
    file = folder / "corrected.yaml"
    file.write_text(json.dumps({"calibration": {"prompts": 2, "steps": 1}, "passes": PASSES}))
    return api.compress(str(least_pipeline), str(file), folder / "bundle", steps=STEPS, quiet=True)


@torch.no_grad()
def test_the_runtime_follows_torch_step_by_step(made: Bundle, least_pipeline: Path) -> None:
    plan = Plan.load(made.file("plan"))
    assert plan.corrections is not None and plan.program.marks() == "##-#--"
    entry = plan.corrections.features["up_1"]
    assert entry.depth == 2 and plan.program.variants["cached"].reads == ("up_1", "up_1@1")
    torchs = CachedDenoiser(load_pipeline(str(least_pipeline)).unet, plan.program, plan.corrections)
    plain = CachedDenoiser(load_pipeline(str(least_pipeline)).unet, plan.program)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, *hidden_shape(made), generator=generator)
    ours = Pipeline.load(made, "onnxruntime", "fp32").denoiser.start(hidden.numpy(), plan.sampling.timesteps)
    seen = 0.0
    for index, timestep in enumerate(plan.sampling.timesteps):
        sample = torch.randn(2, 4, 8, 8, generator=generator)
        wanted = answer(torchs, sample, timestep, hidden)
        got = ours(index, sample.numpy(), timestep)
        assert np.linalg.norm(got - wanted) < 1e-3 * np.linalg.norm(wanted), index
        other = answer(plain, sample, timestep, hidden)
        seen = max(seen, float(np.linalg.norm(other - wanted) / np.linalg.norm(wanted)))
    assert seen > 1e-2  # without them it is another answer


def hidden_shape(made: Bundle) -> tuple[int, int]:
    text: dict[str, Any] = made.manifest["text"]
    return text["tokens"], text["hidden"]


def answer(denoiser: CachedDenoiser, sample: Tensor, timestep: float, hidden: Tensor) -> np.ndarray:
    return np.asarray(denoiser(sample, timestep, hidden).sample.numpy())
