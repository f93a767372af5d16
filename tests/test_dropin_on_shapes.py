"""One bundle of the embedded pipeline, drawn by both runtimes and by the diffusers pipeline around them."""

from pathlib import Path

import numpy as np
import pytest
import torch

import diffpress
from diffpress import api
from diffpress.benchmarks import quality
from diffpress.benchmarks.shapes import scenes
from diffpress.bundle import Bundle
from diffpress.runtime.pipeline import Pipeline

STEPS, SEEDS = 8, (0, 1, 2, 3)
RECIPE = f"""
steps: {STEPS}
calibration: {{prompts: 1, steps: 2}}
passes:
  - schedule: {{solver: dpm++, spacing: karras}}
  - temporal-table
  - cache: {{interval: 2, branch: 0}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "recipe.yaml").write_text(RECIPE)
    return api.compress("shapes", str(folder / "recipe.yaml"), folder / "bundle", quiet=True)


def test_both_runtimes_and_the_diffusers_pipeline_draw_the_same_pictures(made: Bundle) -> None:
    words = [caption for _, caption in scenes.held_out_captions(len(SEEDS))]
    drawn = []
    for backend in ("onnxruntime", "openvino"):
        drawn.append(Pipeline.load(made, backend, "fp32")(words, SEEDS).pixels)
        images = diffpress.load_pipeline(Path(made.path), backend, "fp32")(
            words,
            num_inference_steps=STEPS,
            guidance_scale=made.manifest["sampling"]["guidance_scale"],
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            output_type="np",
        ).images
        drawn.append((images * 255).round().astype(np.uint8))
    worst = [quality.psnr(drawn[0], other).min() for other in drawn[1:]]
    assert min(worst) > 35, worst
