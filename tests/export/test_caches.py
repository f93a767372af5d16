"""Caching methods all the way: the shipped graphs draw, step by step, what torch draws under the same program."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from diffpress import api
from diffpress.benchmarks.candidates import Reference
from diffpress.bundle import Bundle
from diffpress.calibration.model import load_pipeline
from diffpress.calibration.tabulated import Tabulated
from diffpress.compress.cache.execute import executed
from diffpress.compress.families.unet_graph import modules
from diffpress.plan import Plan
from diffpress.runtime.pipeline import Pipeline

PROMPTS, SEEDS = ["a red ring", "a blue star"], [3, 4]
# Five decoders between two keys run as three and two; the noise is enough to be seen in six steps.
FASTER = {"faster-diffusion": {"keys": [1], "together": 3, "prior_noise": 0.05}}
DELTA = {"delta-cache": {"interval": 3, "switch": 3, "share": 0.4}}
STEPPED = {"quantize": {"scales": "step", "range": "max", "weight_range": "max"}}
RECIPES: dict[str, tuple[int, tuple[Any, ...]]] = {
    "faster": (7, (FASTER,)),
    "delta": (6, (DELTA,)),
    "twice": (6, ({"cachequant": {"interval": 3}},)),  # steps 1 and 2 are at one timestep, and take the same correction
    "stepped": (4, (STEPPED, {"faster-diffusion": {"keys": 3, "together": 2}})),
}
Make = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def model_of(least_pipeline: Path, pndm_pipeline: Path) -> Callable[[str], Path]:
    return lambda name: pndm_pipeline if name == "twice" else least_pipeline


@pytest.fixture(scope="module")
def made(model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = tmp_path_factory.mktemp("caches")

    @cache
    def make(name: str) -> Bundle:
        steps, passes = RECIPES[name]
        file, calibration = folder / f"{name}.yaml", {"prompts": 2 if name == "twice" else 1, "method": "every-step"}
        file.write_text(json.dumps({"steps": steps, "calibration": calibration, "passes": passes}))
        return api.compress(str(model_of(name)), str(file), folder / name, quiet=True)

    return make


def drawn(made: Bundle, backend: str, chosen: slice = slice(None)) -> list[np.ndarray]:
    images = Pipeline.load(made, backend, "fp32")(PROMPTS[chosen], SEEDS[chosen], keep_latents=True)
    assert images.problem is None
    return images.latents


def in_torch(model: Path, plan: Plan, cached: bool = True) -> list[np.ndarray]:
    pipeline = load_pipeline(str(model))
    pipeline.scheduler = Tabulated(plan.sampling, pipeline.scheduler)
    reference = Reference(pipeline, plan.sampling)
    if not cached:
        return reference(PROMPTS, SEEDS, keep_latents=True).latents
    with executed(pipeline, plan.program, plan.corrections):
        return reference(PROMPTS, SEEDS, keep_latents=True).latents


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", ["faster", "delta", "twice"])
def test_a_bundle_draws_what_torch_draws_step_by_step(made: Make, model_of: Callable[[str], Path], name: str) -> None:
    shipped = made(name)
    plan = Plan.load(shipped.file("plan"))
    wanted = in_torch(model_of(name), plan)
    assert len(wanted) == RECIPES[name][0] + (name == "twice")
    assert error(wanted[-1], in_torch(model_of(name), plan, cached=False)[-1]) > 1e-3  # the cache is seen
    for backend in ("onnxruntime", "openvino"):
        for chosen in (slice(0, 2), slice(1, 2)):  # two images, and one of them
            for got, whole in zip(drawn(shipped, backend, chosen), wanted, strict=True):
                assert error(got, whole[chosen]) < 1e-3, (backend, chosen)


def test_decoders_run_together_and_leave_nothing_for_the_next_image(made: Make) -> None:
    shipped = made("faster")
    program = Plan.load(shipped.file("plan")).program
    assert program.runs() == ((0, 1), (1, 1), (2, 3), (5, 2)) and len(program.steps) == 7
    pipeline = Pipeline.load(shipped, "onnxruntime", "fp32")
    assert pipeline.denoiser.sessions["cached"].inputs["timestep"].shape == (None,)
    alone = pipeline(PROMPTS[1:], SEEDS[1:], keep_latents=True).latents
    pipeline(PROMPTS, SEEDS)
    for got, wanted in zip(pipeline(PROMPTS[1:], SEEDS[1:], keep_latents=True).latents, alone, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_what_is_reused_is_not_in_the_graph(made: Make, least_pipeline: Path) -> None:
    shipped = made("delta")
    program = Plan.load(shipped.file("plan")).program
    assert program.steps == ("full", "cached", "cached", "full", "cached_2", "cached_2")
    unet = load_pipeline(str(least_pipeline)).unet
    resnets = {name for name, kind in modules(unet).items() if kind == "resnet"}
    for variant, entry in program.variants.items():
        graph = onnx.load(shipped.file(shipped.manifest["graphs"][variant]), load_external_data=False).graph
        kernels = {node.input[1] for node in graph.node if node.op_type == "Conv"}
        found = {name for name in resnets if any(f"{name}.conv1.weight" in kernel for kernel in kernels)}
        assert found == resnets - set(entry.reads), variant
        assert found == {name for name in resnets if any(f"{name}.conv2.weight" in kernel for kernel in kernels)}
        attentions = {name for name, kind in modules(unet).items() if kind == "transformer"} - set(entry.reads)
        assert sum(node.op_type == "Softmax" for node in graph.node) == 2 * len(attentions)


def test_scales_by_step_reach_decoders_of_several_steps(made: Make) -> None:
    shipped = made("stepped")
    plan = Plan.load(shipped.file("plan"))
    assert plan.program.runs() == ((0, 1), (1, 2), (3, 1))
    assert any(layer.input_scale is not None and len(layer.input_scale) == 4 for layer in plan.quantization.values())
    pipeline = Pipeline.load(shipped, "onnxruntime", "fp32")
    variants = {name: replace(entry, together=1) for name, entry in plan.program.variants.items()}
    denoiser = replace(pipeline.denoiser, program=replace(plan.program, variants=variants))
    assert denoiser.program.runs() == ((0, 1), (1, 1), (2, 1), (3, 1))
    apart = replace(pipeline, denoiser=denoiser)(PROMPTS, SEEDS, keep_latents=True).latents
    for got, wanted in zip(drawn(shipped, "onnxruntime"), apart, strict=True):
        assert error(got, wanted) < 1e-3
