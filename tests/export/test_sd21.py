"""A pipeline like Stable Diffusion 2.1: v-prediction, linear projections, heads by level, OpenCLIP's text encoder.

Its U-Net is `UNet2DConditionModel` with `use_linear_projection`, a list as `attention_head_dim` and `upcast_attention`;
its tokenizer pads with "!", and its text encoder has GELU where the first has its sigmoid form.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from diffpress import api
from diffpress.bundle import Bundle
from diffpress.plan import Plan
from diffpress.runtime.pipeline import Pipeline

STEPS = 6
PROMPTS, SEEDS = ["a red ring", "a blue star"], (1, 2)
BOTH = """
calibration: {prompts: 2, steps: 3}
passes:
  - quantize: {format: int8, range: max}
  - temporal-table
  - cache: {interval: 2, branch: 1}
  - cache-correct
"""


@pytest.fixture(scope="module")
def model(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("sd21") / "pipeline"
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = UNet2DConditionModel.from_config(
            dict(pipeline.unet.config), use_linear_projection=True, attention_head_dim=[2, 4, 8], upcast_attention=True
        )
        text = pipeline.text_encoder.config
        text.hidden_act, text.pad_token_id = "gelu", pipeline.tokenizer.convert_tokens_to_ids("!")
        text_encoder = CLIPTextModel(text)
    pipeline.tokenizer.save_pretrained(folder.parent / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder.parent / "tokenizer", pad_token="!")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    StableDiffusionPipeline(
        pipeline.vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return api.compress(str(model), "fp32", tmp_path_factory.mktemp("fp32") / "bundle", steps=STEPS, quiet=True)


def reference(model: Path) -> Any:
    from diffpress.calibration.model import load_pipeline

    pipeline = load_pipeline(str(model))
    images = pipeline(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
    ).images
    return images.numpy()


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def test_the_runtime_draws_the_latents_that_diffusers_draws(exported: Bundle, model: Path) -> None:
    assert json.loads((model / "tokenizer" / "tokenizer_config.json").read_text())["pad_token"] == "!"
    wanted = reference(model)
    for backend in ("onnxruntime", "openvino"):
        got = Pipeline.load(exported, backend, "fp32")(PROMPTS, SEEDS, guidance_scale=7.5, keep_latents=True)
        assert error(got.latents[-1], wanted) < 1e-4


def test_int8_table_cache_and_its_correction_work_together(model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(BOTH)
    made = api.compress(str(model), str(tmp_path / "recipe.yaml"), tmp_path / "bundle", steps=STEPS, quiet=True)
    plan = Plan.load(made.path / "plan")
    assert plan.temporal is not None and plan.corrections is not None
    assert set(plan.program.steps) == {"full", "cached"}
    projections = [name for name in plan.quantization if name.endswith((".proj_in", ".proj_out"))]
    assert len(projections) == 22 and all(plan.quantization[name].weight_scale.ndim == 1 for name in projections)
    # Every attention is found in the graph, with each level's own number of heads.
    dialect = made.manifest["dialects"]["onnxruntime"]["full"]
    fused = [node for node in onnx.load(made.file(dialect)).graph.node if node.op_type == "MultiHeadAttention"]
    heads = {attribute.i for node in fused for attribute in node.attribute if attribute.name == "num_heads"}
    assert (len(fused), heads) == (22, {2, 4, 8})
    for entry in made.manifest["parity"].values():
        assert entry["max_rel_l2"] <= entry["tolerance"]
    first, second = (
        Pipeline.load(made, backend, "fp32")(PROMPTS, SEEDS, keep_latents=True)
        for backend in ("onnxruntime", "openvino")
    )
    assert first.problem is None
    assert error(first.latents[-1], second.latents[-1]) < 0.3  # random weights amplify integers' rounding
    assert error(first.latents[-1], reference(model)) < 0.5
