"""A pipeline that tells its denoiser more than a text (SDXL): the bundle draws what diffusers draws."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import diffpress
from diffpress.api import compress
from diffpress.bundle import Bundle
from diffpress.calibration.model import load_pipeline
from diffpress.compress.cache.execute import executed
from diffpress.compress.families.unet import conditions
from diffpress.compress.numerics.simulate import simulated
from diffpress.errors import DiffpressError
from diffpress.plan import Plan
from diffpress.runtime.pipeline import Pipeline

STEPS, SCALE = 4, 5.0
PROMPTS, SEEDS = ["a red ring", "a blue star"], [1, 2]
RECIPES = {
    "plain": "[]",
    "cached": "[{cache: {interval: 2, branch: 1}}]",
    "frozen": "[{tgate: {gate: 2}}]",
    "encoder": "[{faster-diffusion: {keys: 2}}]",
    "int8": "[{quantize: {}}]",
    "everything": "[{quantize: {}}, temporal-table, {cache: {interval: 2}}]",
}


@pytest.fixture(scope="module")
def made(tiny_xl: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bundles")

    @cache
    def make(name: str) -> Bundle:
        recipe = folder / f"{name}.yaml"
        recipe.write_text(
            f"steps: {STEPS}\nguidance_scale: {SCALE}\ncalibration: {{prompts: 4, steps: 4}}\npasses: {RECIPES[name]}\n"
        )
        return compress(str(tiny_xl), str(recipe), folder / name, quiet=True)

    return make


def drawn(pipeline: Any, negative: str | None = None, scale: float = SCALE) -> np.ndarray:
    """diffusers' own latents."""
    made = pipeline(
        PROMPTS,
        negative_prompt=None if negative is None else [negative] * len(PROMPTS),
        num_inference_steps=STEPS,
        guidance_scale=scale,
        height=32,
        width=32,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
    )
    return np.asarray(made.images)


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("negative", [None, "", "a moon"])
def test_the_runtime_draws_what_diffusers_draws(made: Any, tiny_xl: Path, backend: str, negative: str | None) -> None:
    reference = drawn(load_pipeline(str(tiny_xl)), negative)
    runtime = Pipeline.load(made("plain"), backend, "fp32")
    got = runtime(PROMPTS, SEEDS, negative_prompt=negative, keep_latents=True)
    assert error(got.latents[-1], reference) < 1e-4


def test_nothing_and_the_empty_text_are_different_to_it(made: Any) -> None:
    runtime = Pipeline.load(made("plain"), "onnxruntime", "fp32")
    nothing, empty = (runtime(PROMPTS, SEEDS, negative, keep_latents=True).latents[-1] for negative in (None, ""))
    assert error(nothing, empty) > 1e-3


def test_pictures_without_guidance_and_their_pixels(made: Any, tiny_xl: Path) -> None:
    pipeline = load_pipeline(str(tiny_xl))
    runtime = Pipeline.load(made("plain"), "onnxruntime", "fp32")
    got = runtime(PROMPTS, SEEDS, guidance_scale=1.0, keep_latents=True)
    assert error(got.latents[-1], drawn(pipeline, scale=1.0)) < 1e-4
    with torch.no_grad():
        image = pipeline.vae.decode(torch.from_numpy(got.latents[-1]) / pipeline.vae.config.scaling_factor).sample
    wanted = ((image / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(got.pixels - wanted).max() <= 0.51


@pytest.mark.parametrize("negative", [None, "a moon"])
def test_a_diffusers_pipeline_around_the_bundle_draws_the_same(made: Any, tiny_xl: Path, negative: str | None) -> None:
    pipeline = diffpress.load_pipeline(made("plain").path, "onnxruntime", "fp32")
    assert type(pipeline).__name__ == "StableDiffusionXLPipeline"
    assert error(drawn(pipeline, negative), drawn(load_pipeline(str(tiny_xl)), negative)) < 1e-4
    assert error(drawn(pipeline, scale=1.0), drawn(load_pipeline(str(tiny_xl)), scale=1.0)) < 1e-4


def test_a_diffusers_pipeline_around_the_bundle_runs_its_step_program(made: Any) -> None:
    pipeline = diffpress.load_pipeline(made("cached").path, "onnxruntime", "fp32")
    runtime = Pipeline.load(made("cached"), "onnxruntime", "fp32")
    wanted = runtime(PROMPTS, SEEDS, keep_latents=True).latents[-1]
    assert {*runtime.denoiser.program.steps} > {"full"} and error(drawn(pipeline), wanted) < 1e-5
    with pytest.raises(DiffpressError, match="takes no clip_skip"):
        pipeline("a red ring", num_inference_steps=STEPS, clip_skip=1)
    with pytest.raises(DiffpressError, match="need text_embeds, time_ids among added_cond_kwargs"):
        pipeline.unet(torch.zeros(2, 4, 8, 8), 1.0, torch.zeros(2, 24, 48))


@pytest.mark.parametrize("name", ["cached", "frozen", "encoder"])
def test_cached_steps_draw_what_the_program_draws_in_torch(made: Any, tiny_xl: Path, name: str) -> None:
    bundle, pipeline = made(name), load_pipeline(str(tiny_xl))
    plan = Plan.load(bundle.path / "plan")
    exact = drawn(pipeline)
    with executed(pipeline, plan.program, plan.corrections):
        reference = drawn(pipeline)
    got = Pipeline.load(bundle, "onnxruntime", "fp32")(PROMPTS, SEEDS, keep_latents=True).latents[-1]
    assert error(got, reference) < 1e-4
    assert error(got, exact) > 1e-3


@pytest.mark.parametrize("name", ["int8", "everything"])
def test_integers_draw_what_their_simulation_draws(made: Any, tiny_xl: Path, name: str) -> None:
    bundle, pipeline = made(name), load_pipeline(str(tiny_xl))
    plan = Plan.load(bundle.path / "plan")
    exact = drawn(pipeline)
    with simulated(pipeline.unet, plan.quantization, plan.sampling.timesteps), executed(pipeline, plan.program):
        reference = drawn(pipeline)
    got = Pipeline.load(bundle, "onnxruntime", "fp32")(PROMPTS, SEEDS, keep_latents=True).latents[-1]
    assert plan.quantization
    assert error(got, reference) < 0.7 * error(exact, reference)  # random weights amplify rounding


def test_the_table_is_of_the_time_alone(made: Any) -> None:
    plan = Plan.load(made("everything").path / "plan")
    assert plan.temporal is not None
    assert {name: table.shape for name, table in plan.temporal.tables.items()} == {"time_embedding": (STEPS, 128)}


def test_graphs_have_the_names_and_layout_of_onnx_pipelines(made: Any, tiny_xl: Path) -> None:
    bundle = made("plain")

    def ports(part: str) -> tuple[list[str], list[str]]:
        graph = onnx.load(str(bundle.path / part / "model.onnx"), load_external_data=False).graph
        return [value.name for value in graph.input], [value.name for value in graph.output]

    assert ports("unet")[0] == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    states = [f"hidden_states.{index}" for index in range(3)]
    assert ports("text_encoder") == (["input_ids"], ["last_hidden_state", *states[:2]])
    assert ports("text_encoder_2") == (["input_ids"], ["text_embeds", "last_hidden_state", *states])
    assert (bundle.path / "tokenizer_2" / "tokenizer_config.json").is_file()
    assert bundle.manifest["conditions"] == {"time_ids": [32, 32, 0, 0, 32, 32]}
    assert bundle.manifest["latent"]["scaling_factor"] == 0.13025
    unet = load_pipeline(str(tiny_xl)).unet
    assert conditions(unet, 24) == {"encoder_hidden_states": (24, 32), "text_embeds": (24,), "time_ids": (6,)}
