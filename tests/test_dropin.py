"""A bundle as a diffusers pipeline: what the runtime draws, and what diffusers' own pipelines do with its parts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffpress
from diffpress import api
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError
from diffpress.runtime.pipeline import Pipeline

STEPS = 6
PROMPTS, SEEDS = ["a red ring", "a blue star"], (1, 2)
PLANNED = f"""
steps: {STEPS}
calibration: {{prompts: 1, steps: 2}}
passes:
  - schedule: {{solver: dpm++, spacing: trailing}}
  - guidance: {{mode: reuse, every: 2, plan: uniform}}
  - temporal-table
  - cache: {{interval: 2, branch: 1}}
"""
PLAIN = f"steps: {STEPS}\ncontrolnet: true\n"


def compressed(recipe: str, tiny_pipeline: Path, folder: Path) -> Bundle:
    file = folder / "recipe.yaml"
    file.write_text(recipe)
    return api.compress(str(tiny_pipeline), str(file), folder / "bundle", quiet=True)


@pytest.fixture(scope="module")
def plain(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compressed(PLAIN, tiny_pipeline, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def planned(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compressed(PLANNED, tiny_pipeline, tmp_path_factory.mktemp("planned"))


@pytest.fixture(scope="module")
def reference(tiny_pipeline: Path) -> Any:
    from diffpress.calibration.model import load_pipeline

    return load_pipeline(str(tiny_pipeline))


@pytest.fixture
def opened(plain: Bundle) -> Any:
    return diffpress.load_pipeline(plain.path, "onnxruntime", "fp32")


@pytest.fixture
def bound(planned: Bundle) -> Any:
    return diffpress.load_pipeline(planned.path, "onnxruntime", "fp32")


def generators(seeds: tuple[int, ...] = SEEDS) -> list[Any]:
    import torch

    return [torch.Generator().manual_seed(seed) for seed in seeds]


def drawn(pipeline: Any, **changes: Any) -> Any:
    asked = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "generator": generators(), "output_type": "latent"}
    return pipeline(PROMPTS, **{**asked, **changes}).images


def error(got: Any, wanted: Any) -> float:
    got, wanted = np.asarray(got), np.asarray(wanted)
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_plain_bundle_draws_what_diffusers_draws(plain: Bundle, reference: Any, backend: str) -> None:
    pipeline = diffpress.load_pipeline(plain.path, backend, "fp32")
    for changes in ({}, {"guidance_scale": 1.0}, {"negative_prompt": ["a green bar", "noise"]}, {"output_type": "np"}):
        assert error(drawn(pipeline, **changes), drawn(reference, **changes)) < 1e-4


def test_a_plain_bundle_takes_any_scheduler_and_step_count(opened: Any, reference: Any) -> None:
    from diffusers import EulerAncestralDiscreteScheduler

    opened.scheduler = EulerAncestralDiscreteScheduler.from_config(opened.scheduler.config)
    kept = reference.scheduler
    reference.scheduler = EulerAncestralDiscreteScheduler.from_config(kept.config)
    try:
        assert error(drawn(opened, num_inference_steps=4), drawn(reference, num_inference_steps=4)) < 1e-4
    finally:
        reference.scheduler = kept


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_a_step_program_runs_as_in_the_runtime_image_after_image(planned: Bundle, bound: Any, guidance: float) -> None:
    own = Pipeline.load(planned, "onnxruntime", "fp32")
    assert {*own.denoiser.program.steps} > {"full"}
    wanted = own(PROMPTS, SEEDS, guidance_scale=guidance, keep_latents=True)
    seen = []

    def on_step(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"].numpy())
        return tensors

    for _ in range(2):
        seen.clear()
        drawn(bound, guidance_scale=guidance, callback_on_step_end=on_step)
        assert len(seen) == STEPS
        assert error(np.stack(seen), np.stack(wanted.latents)) < 1e-5
    pixels = drawn(bound, guidance_scale=guidance, output_type="np")
    assert np.abs(pixels * 255 - wanted.pixels).max() <= 1


def test_an_image_that_was_broken_off_leaves_nothing_behind(bound: Any) -> None:
    wanted = drawn(bound)

    def stop(pipeline: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = step == 2
        return tensors

    drawn(bound, callback_on_step_end=stop)
    assert error(drawn(bound), wanted) == 0.0
    assert error(drawn(bound, generator=generators((8, 9))), wanted) > 0.1


def test_text_that_a_callback_changes_is_the_text_of_the_next_step(bound: Any) -> None:
    wanted = drawn(bound)

    def change(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {**tensors, "prompt_embeds": tensors["prompt_embeds"] * 1.5}

    inputs = ["latents", "prompt_embeds"]
    after = drawn(bound, callback_on_step_end=change, callback_on_step_end_tensor_inputs=inputs)
    assert error(after, wanted) > 1e-3


def test_a_plan_refuses_what_it_was_not_made_for(bound: Any) -> None:
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    with pytest.raises(DiffpressError, match=f"num_inference_steps={STEPS}"):
        drawn(bound, num_inference_steps=STEPS + 1)
    own = bound.scheduler
    for other in (DDIMScheduler, EulerDiscreteScheduler):
        bound.scheduler = other.from_config(own.config, timestep_spacing="trailing")
        with pytest.raises(DiffpressError, match=r"planned for DPMSolverMultistepScheduler at 6 steps: keep"):
            drawn(bound)
    bound.scheduler = own
    with pytest.raises(DiffpressError, match="same noise"):
        drawn(bound, generator=generators((1, 1)), guidance_scale=1.0)
    assert drawn(bound).shape == (2, 4, 8, 8)


def test_what_graphs_do_not_take_is_refused_in_a_line(opened: Any) -> None:
    import torch

    for changes, said in (
        ({"height": 64, "width": 64}, "bound to the resolution"),
        ({"clip_skip": 1}, "no clip_skip"),
        ({"cross_attention_kwargs": {"gligen": 1}}, "take no cross_attention_kwargs"),
    ):
        with pytest.raises(DiffpressError, match=said) as caught:
            drawn(opened, **changes)
        assert "\n" not in str(caught.value)
    with pytest.raises(DiffpressError, match="one timestep"):
        opened.unet(torch.zeros(2, 4, 8, 8), torch.tensor([1.0, 2.0]), torch.zeros(2, 24, 32))


def picture() -> Any:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_pipelines_made_from_it_start_from_pictures(opened: Any, reference: Any, kind: str) -> None:
    import diffusers
    from PIL import Image

    made = getattr(diffusers, kind)
    asked = {"image": picture(), "strength": 0.5}
    if "Inpaint" in kind:
        asked |= {"mask_image": Image.new("L", (32, 32), 255), "height": 32, "width": 32}
    got, wanted = (drawn(made.from_pipe(part), **{**asked}) for part in (opened, reference))
    assert got.shape == (2, 4, 8, 8)
    assert error(got, wanted) < 1e-4


def test_a_plan_begins_in_the_middle_with_what_it_can(planned: Bundle, bound: Any) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    wanted = drawn(bound)
    pipeline = StableDiffusionImg2ImgPipeline.from_pipe(bound)
    first = drawn(pipeline, image=picture(), strength=0.5)
    assert error(drawn(pipeline, image=picture(), strength=0.5), first) == 0.0
    with pytest.raises(DiffpressError, match="num_inference_steps=6"):
        drawn(pipeline, image=picture(), strength=0.5, num_inference_steps=12)
    # Where one begins there is nothing to reuse: it runs in full, as the program from there on says.
    runs = []
    for name, session in bound.unet._denoiser.sessions.items():
        original = session.run
        session.run = lambda *args, _name=name, _run=original, **kwargs: (runs.append(_name), _run(*args, **kwargs))[1]
    drawn(pipeline, image=picture(), strength=0.5)
    program = Pipeline.load(planned, "onnxruntime", "fp32").denoiser.starting(3).program
    assert tuple(runs) == program.steps
    assert error(drawn(bound), wanted) == 0.0


def test_a_controlnet_works_where_the_recipe_asks_for_its_inputs(opened: Any, reference: Any, bound: Any) -> None:
    import torch
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    with torch.random.fork_rng():
        torch.manual_seed(3)
        controlnet = ControlNetModel.from_unet(reference.unet, conditioning_channels=3).eval()
        for part in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
            torch.nn.init.normal_(part.weight, std=0.2)  # zeros, else, which change nothing
    controlnet.config.conditioning_channels = 3
    hint = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    # A hint is eight times a latent along a side, here it is four: its encoder strides less.
    controlnet.controlnet_cond_embedding.blocks[1].stride = (1, 1)

    def controlled(pipeline: Any) -> Any:
        made = StableDiffusionControlNetPipeline.from_pipe(pipeline, controlnet=controlnet)
        return drawn(made, image=hint, controlnet_conditioning_scale=0.8)

    got, wanted = controlled(opened), controlled(reference)
    assert error(got, wanted) < 1e-4
    assert error(got, drawn(opened)) > 1e-2
    with pytest.raises(DiffpressError, match="controlnet: true"):
        controlled(bound)
    with pytest.raises(DiffpressError, match=r"takes 13 residuals of a ControlNet, not|takes \d+ residuals"):
        opened.unet(
            torch.zeros(1, 4, 8, 8),
            1.0,
            torch.zeros(1, 24, 32),
            down_block_additional_residuals=(torch.zeros(1, 32, 8, 8),),
            mid_block_additional_residual=torch.zeros(1, 64, 2, 2),
        )


def test_the_runtime_does_not_mind_a_controlnets_graph(plain: Bundle, opened: Any) -> None:
    own = Pipeline.load(plain, "onnxruntime", "fp32")
    assert plain.manifest["graphs"]["controlnet"] == "unet/controlnet.onnx"
    assert error(drawn(opened), own(PROMPTS, SEEDS, guidance_scale=5.0, keep_latents=True).latents[-1]) < 1e-5


def test_what_is_no_bundle_and_what_is_fused_too_late_is_refused(tmp_path: Path, opened: Any) -> None:
    with pytest.raises(DiffpressError, match="not a bundle"):
        diffpress.load_pipeline(tmp_path)
    with pytest.raises(DiffpressError, match="fused before compression"):
        opened.unet.load_lora_adapter({})
