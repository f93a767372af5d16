"""Exported graphs of the embedded pipeline against the simulation in torch, by the latent of the finished image."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffpress import api
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.quantize.post_training import QuantizePass
from diffpress.compress.recipe import CalibrationOptions, Recipe
from diffpress.compress.work import Work
from diffpress.export import graphs, qdq, ship, store
from diffpress.export.deploy import deployable
from diffpress.runtime.backends import open_session
from diffpress.runtime.noise import randn
from diffpress.runtime.pipeline import guide
from diffpress.runtime.sampler import sample

STEPS, PROMPTS, RECORDED = 10, 2, 4
Network = Callable[[np.ndarray, float, np.ndarray], np.ndarray]  # sample, timestep and text to its output


@pytest.fixture(scope="module")
def work() -> Work:
    few = CalibrationOptions(prompts=PROMPTS, steps=RECORDED)
    return api.begin("shapes", Recipe(name="test", calibration=few), steps=STEPS, quiet=True)


@pytest.fixture(scope="module")
def exported(work: Work) -> Any:
    call = next(iter(work.record()))
    with graphs.plain_attention(work.denoiser):
        shapes: Any = (tuple(call.sample.shape[1:]), tuple(call.text.shape[1:]))
        (spec,) = ship.denoiser_specs(work.denoiser, work.plan(), *shapes).values()
        return graphs.to_onnx(spec)


def in_torch(work: Work) -> Network:
    def run(x: np.ndarray, timestep: float, text: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return work.denoiser(torch.from_numpy(x), timestep, torch.from_numpy(text), return_dict=False)[0].numpy()

    return run


def finished(work: Work, network: Network, nudge: float = 0.0) -> np.ndarray:
    """The latents after the last step; `nudge` is relative noise on those before the first."""
    calls = list(work.record())[::RECORDED]
    text = torch.stack([call.text for call in calls], dim=1).flatten(0, 1).numpy()  # unconditional rows first
    start = np.concatenate([randn(seed, (1, *calls[0].sample.shape[1:])) for seed in range(len(calls))])
    start = start * np.float32(work.sampling.init_noise_sigma)
    start = start * (1 + nudge * np.random.default_rng(0).standard_normal(start.shape)).astype(np.float32)

    def denoise(index: int, x: np.ndarray, timestep: float) -> np.ndarray:
        return network(x, timestep, text)

    *_, last = sample(work.sampling, guide(denoise, work.sampling.guidance_scale, work.program), start)
    return last


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest relative error of an image's latent."""
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_a_finished_image_is_that_of_the_simulation(work: Work, exported: Any, format: Any, tmp_path: Path) -> None:
    work.quantization.clear()
    QuantizePass(format=format, range="max", weight_range="max").apply(work)
    assert all(deployable(layer) == layer for layer in work.quantization.values())
    model = exported.clone()
    assert qdq.insert(model, work.quantization, work.sampling.timesteps) == set(work.quantization)
    graphs.finish(model)
    store.save({"model.onnx": model}, tmp_path)
    session = open_session(tmp_path / "model.onnx", "onnxruntime")

    def in_onnx(x: np.ndarray, timestep: float, text: np.ndarray) -> np.ndarray:
        feeds = {"sample": x, "timestep": np.array([timestep], np.float32), "encoder_hidden_states": text}
        return session.run(feeds)["out_sample"]

    plain = finished(work, in_torch(work))
    with simulated(work.denoiser, work.quantization, work.sampling.timesteps):
        wanted, again = (finished(work, in_torch(work), nudge) for nudge in (0.0, 1e-6))
    graph = finished(work, in_onnx)
    if format == "int4":
        assert error(graph, wanted) < 0.01 < error(wanted, plain)
        return
    # Rounded inputs fall over edges by the last bits of a float: noise in those bits of the first latents changes what
    # the simulation itself gives by nearly what quantization costs. The graph must be no farther away, and no worse.
    assert error(graph, wanted) < 1.5 * error(again, wanted) + 1e-3
    assert error(graph, plain) < 1.25 * error(wanted, plain)
