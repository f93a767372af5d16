"""Sensitivity: what is measured, that it is what the scheduler makes, and that it goes on after an interruption."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from diffpress.compress.cache.deepcache import CachePass
from diffpress.compress.numerics.formats import get
from diffpress.compress.numerics.ranges import weight_scale
from diffpress.compress.quantize import sensitivity
from diffpress.compress.quantize.sensitivity import final_latents, measure
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, Correction, Corrections, LayerQuant, StepProgram, Variant

NAMES = [
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v",
    "up_blocks.0.resnets.0.conv1",
    "up_blocks.1.resnets.1.conv2",
]


def weights_only(work: Work, names: list[str]) -> dict[str, dict[str, LayerQuant]]:
    layers = {name: work.denoiser.get_submodule(name) for name in names}
    scales = {name: weight_scale(layer.weight, get("int8"), "max").numpy() for name, layer in layers.items()}
    return {name: {"int8 weights": LayerQuant(scale, None, "int8", None)} for name, scale in scales.items()}


@pytest.mark.parametrize("error", ["output", "latent"])
def test_a_layer_made_sensitive_ranks_first(work: Work, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = work.denoiser.get_submodule(NAMES[2]).weight
    changed = weight.data.clone()
    changed[:, 0] *= 300  # one input channel takes the range, and the others' weights round to nothing
    monkeypatch.setattr(weight, "data", changed)
    errors = measure(work, weights_only(work, NAMES), error, prompts=2)
    found = {name: by["int8 weights"] for name, by in errors.items()}
    assert max(found, key=found.__getitem__) == NAMES[2]
    assert all(0 < value < found[NAMES[2]] / 2 for name, value in found.items() if name != NAMES[2])


def test_what_rounding_does_not_change_costs_nothing(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = work.denoiser.get_submodule(NAMES[0]).weight
    integers = torch.randint(-127, 128, weight.shape, generator=torch.Generator().manual_seed(0)).float()
    integers[:, 0] = 127
    monkeypatch.setattr(weight, "data", integers / 1024)
    errors = measure(work, weights_only(work, NAMES[:2]))
    assert errors[NAMES[0]]["int8 weights"] == 0
    assert errors[NAMES[1]]["int8 weights"] > 0


def test_an_interrupted_measurement_goes_on_and_a_finished_one_is_read(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = weights_only(work, NAMES)

    def interrupted(items: Any, _: str) -> Any:
        yield from itertools.islice(items, 2)
        raise KeyboardInterrupt

    work.progress = interrupted
    with pytest.raises(KeyboardInterrupt):
        measure(work, candidates)
    left: list[Any] = []
    work.progress = lambda items, _: left.extend(items) or left  # type: ignore[func-returns-value]
    errors = measure(work, candidates)
    assert [name for name, _ in left] == NAMES[2:]
    monkeypatch.setattr(sensitivity, "deviation", lambda run: pytest.fail("measured again"))
    assert measure(work, candidates) == errors
    assert not list(work.scratch.rglob("*.partial"))
    with pytest.raises(pytest.fail.Exception):  # other ranges are another measurement
        layer = candidates[NAMES[0]]["int8 weights"]
        measure(work, {NAMES[0]: {"int8 weights": LayerQuant(layer.weight_scale * 2, None, "int8", None)}})


def test_a_denoiser_that_is_not_finite_is_named(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = work.denoiser.get_submodule(NAMES[0]).weight
    monkeypatch.setattr(weight, "data", weight.data * torch.nan)
    with pytest.raises(DiffpressError, match="not finite before"):
        measure(work, {NAMES[1]: {"int8 weights": LayerQuant(np.ones(32, np.float32), None, "int8", None)}})


@torch.no_grad()
def test_final_latents_are_those_of_the_scheduler(work: Work) -> None:
    prompts = [call for call in work.record() if float(call.timestep) == work.sampling.timesteps[0]]
    stock = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    stock.set_timesteps(work.sampling.steps)
    for index, (call, got) in enumerate(zip(prompts, final_latents(work, prompts), strict=True)):
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(index))
        for timestep in stock.timesteps:
            plain, told = work.denoiser(torch.cat([x, x]), timestep, call.text).sample.chunk(2)
            x = stock.step(plain + work.sampling.guidance_scale * (told - plain), timestep, x).prev_sample
        assert torch.allclose(got, x[0], atol=1e-4)
    CachePass(interval=2, branch=0).apply(work)
    assert not torch.allclose(final_latents(work, prompts)[0], got, atol=1e-4)  # cached steps are run as such


def test_numbers_belong_to_the_corrections_of_features(work: Work) -> None:
    work.program = StepProgram((FULL, "cached") * 2, {FULL: Variant(writes=("up_0",)), "cached": Variant(("up_0",))})
    keys = set()
    for scale in (None, 1.0, 0.5):
        if scale is not None:
            entry = Correction(np.full((4, 1, 1), scale, np.float32), np.zeros((4, 1), np.float32))
            work.corrections = Corrections(work.sampling.timesteps, {"up_0": entry})
        keys.add(sensitivity.probe(work, "latent", 1, 1)[0])
    assert len(keys) == 3
