"""Searches for a schedule, on a mixture of Gaussians whose best denoiser is known, and published schedules."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from diffpress.benchmarks.shapes.models import SCHEDULER
from diffpress.calibration.schedule import tabulate
from diffpress.compress.recipe import Recipe
from diffpress.compress.run import run
from diffpress.compress.schedule import published, search
from diffpress.compress.schedule.sigmas import sigma_of, timestep_of
from diffpress.compress.schedule.solver import SchedulePass, make
from diffpress.compress.schedule.trajectory import Trajectories, relative_error
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError

ALPHAS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
MEANS = torch.tensor([[1.0, 0.6], [-0.8, 0.9], [0.1, -1.1], [0.9, -0.5]])
WEIGHTS, STD, COUNT = torch.tensor([0.4, 0.3, 0.2, 0.1]), 0.15, 200


def x0_of(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] for x [N, 2] = x0 + sigma eps."""
    variance = STD**2 + sigma.square()[:, None]
    likely = (WEIGHTS.log() - (x[:, None] - MEANS).square().sum(-1) / (2 * variance)).softmax(1)
    own = (STD**2 * x[:, None] + (variance - STD**2)[..., None] * MEANS) / variance[..., None]
    return (likely[..., None] * own).sum(1)


class Mixture:
    """A network of the mixture [N, 2, 1, 1]; counts the rows it was asked for."""

    def __init__(self, prediction: str) -> None:
        self.prediction, self.rows = prediction, 0

    def __call__(self, sample: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        self.rows += len(sample)
        sigma = torch.from_numpy(sigma_of(timesteps.numpy(), ALPHAS)).float()
        x = sample.flatten(1) * (1 + sigma.square()).sqrt()[:, None]
        x0 = x0_of(x, sigma)
        eps = (x - x0) / sigma[:, None]
        alpha = (1 + sigma.square()).rsqrt()[:, None]
        answers = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - alpha * sigma[:, None] * x0}
        return answers[self.prediction].reshape(sample.shape)


def trajectories(network: Mixture, draw: int = 0) -> Trajectories:
    noise = torch.randn(COUNT, 2, 1, 1, generator=torch.Generator().manual_seed(draw))
    text = torch.zeros(COUNT, 1, 1)
    return Trajectories(network, text, text, noise, 1.0, ALPHAS, network.prediction, batch=COUNT)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    scheduler = diffusers.DDIMScheduler(**{**SCHEDULER, "prediction_type": "epsilon"})
    sampling = tabulate(scheduler, 50, 1.0, 64, 64)
    made = Work(SimpleNamespace(scheduler=scheduler, unet=None), sampling, 0, lambda _: pytest.fail("not recorded"),
                lambda items, _: items, tmp_path)  # fmt: skip
    network = Mixture("epsilon")
    made.trajectories = lambda count, draw: trajectories(network, draw)
    return made


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_denoiser_of_a_network_is_its_x0(prediction: str) -> None:
    own = trajectories(Mixture(prediction))
    sigma = torch.linspace(0.05, 14, COUNT)
    x = torch.randn(COUNT, 2, 1, 1, generator=torch.Generator().manual_seed(5)) * sigma[:, None, None, None]
    assert torch.allclose(own.denoise(x, sigma).flatten(1), x0_of(x.flatten(1), sigma), atol=2e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_end_of_a_schedule_is_that_of_the_scheduler(prediction: str) -> None:
    own = trajectories(Mixture(prediction))
    scheduler = make("dpm++", {**SCHEDULER, "prediction_type": prediction}, "karras")
    end = own.final(tabulate(scheduler, 6, 1.0, 64, 64))
    scheduler.set_timesteps(6)
    x = own.noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(own.network(x, t.expand(COUNT), own.conditional), t, x, return_dict=False)[0]
    assert float(relative_error(end, x).max()) < 1e-4


def test_guidance_is_part_of_the_model() -> None:
    def network(sample: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return sample * 0 + text[:, 0, 0].reshape(-1, 1, 1, 1) + timesteps.reshape(-1, 1, 1, 1)

    noise, ones = torch.zeros(3, 2, 1, 1), torch.ones(3, 1, 1)
    own = Trajectories(network, ones * torch.arange(3.0).reshape(3, 1, 1), ones * 10, noise, 3.0, ALPHAS, "epsilon", 2)
    answer = own.output(torch.zeros(4, 2, 1, 1), torch.arange(4.0), torch.tensor([0, 1, 2, 0]))
    assert answer[:, 0, 0, 0].tolist() == [10 + 3 * (p - 10) + t for t, p in enumerate([0, 1, 2, 0])]


@pytest.mark.parametrize("method", ["gits", "align-your-steps", "autodiffusion", "descent"])
def test_every_search_beats_uniform_steps(method: search.Method, work: Work) -> None:
    step = SchedulePass(solver="dpm++", steps=5, search=method, search_epochs=3)
    [result] = run([("schedule", step)], work)
    assert work.sampling.steps == 5 and "schedules scored" in result.summary
    errors = dict(zip(("taken", "uniform"), _numbers(result.summary), strict=False))
    assert errors["taken"] < 0.8 * errors["uniform"], result.summary


@pytest.mark.parametrize("method", ["gits", "descent"])
def test_with_first_order_steps_karras_is_beaten_too(method: search.Method, work: Work) -> None:
    found = SchedulePass(solver="euler", steps=6, search=method)._found(work)
    assert found.name == method and found.error < min(found.others.values()), found


def test_a_search_run_again_reads_its_scores(work: Work, tmp_path: Path) -> None:
    network = Mixture("epsilon")
    work.trajectories = lambda count, draw: trajectories(network, draw)
    step = SchedulePass(solver="dpm++", steps=4, search="autodiffusion", search_epochs=2)
    found = step._found(work)
    asked, network.rows = network.rows, 0
    assert step._found(work) == found
    assert network.rows == 0 < asked
    # Half of the scores are lost: only they are made again, and the end is the same.
    file = next((tmp_path / "search").glob("scores-0*.json"))
    file.write_text(json.dumps(json.loads(file.read_text())[:20]))
    assert step._found(work) == found
    assert 0 < network.rows < asked


def test_a_plain_schedule_that_is_better_is_taken_and_named(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = (14.0, 0.05, 0.04, 0.035, 0.0)
    monkeypatch.setattr(search, "_descent", lambda scores, starts: [bad])
    found = SchedulePass(steps=4, search="descent")._found(work)
    assert found.name in found.others and found.error == min(found.others.values()) < found.own_error
    assert found.own == bad != found.sigmas
    assert "not beaten by descent" in found.line()


def test_bad_searches_are_refused(work: Work) -> None:
    with pytest.raises(DiffpressError, match="spacing and search both say"):
        SchedulePass(spacing="karras", search="gits")
    with pytest.raises(DiffpressError, match="recipe: pass 'schedule': 'search'"):
        Recipe.model_validate({"name": "x", "passes": [{"schedule": {"search": "luck"}}]}).built()
    with pytest.raises(DiffpressError, match="ddim"):
        run([("schedule", SchedulePass(solver="ddim", steps=5, search="gits"))], work)
    work.trajectories = None
    with pytest.raises(DiffpressError, match="give sigmas or a spacing"):
        run([("schedule", SchedulePass(steps=5, search="gits"))], work)


# "Hyperparameters are all you need": the timesteps that the paper prints for Stable Diffusion 1.5.
HYPERPARAMETERS = {
    8: [999, 857, 719, 586, 457, 334, 219, 113, 23],
    6: [999, 810, 627, 454, 290, 142, 18],
    5: [999, 773, 557, 354, 170, 18],
}


@pytest.mark.parametrize("steps", HYPERPARAMETERS)
def test_hyperparameters_are_those_of_the_paper(steps: int) -> None:
    got = timestep_of(published.hyperparameters(steps, ALPHAS), ALPHAS)
    assert np.abs(got - HYPERPARAMETERS[steps]).max() < 3


def test_align_your_steps_is_the_table_of_diffusers() -> None:
    got = published.align_your_steps(10, ALPHAS)
    wanted = diffusers.schedulers.AysSchedules["StableDiffusionSigmas"]
    assert np.allclose(got, [min(sigma, got[0]) for sigma in wanted], rtol=1e-6) and got[0] == pytest.approx(
        14.61, 0.01
    )


def test_karras_is_what_diffusers_makes() -> None:
    scheduler = make("dpm++", SCHEDULER, "karras")
    scheduler.set_timesteps(9)
    assert np.allclose(published.karras(9, ALPHAS), scheduler.sigmas, rtol=2e-3)


@pytest.mark.parametrize("spacing", ["align-your-steps", "hyperparameters"])
def test_published_schedules_in_a_recipe(spacing: Any, work: Work) -> None:
    [result] = run([("schedule", SchedulePass(solver="dpm++", steps=8, spacing=spacing))], work)
    assert f"dpm++ {spacing}, 8 steps" in result.summary and len(work.sampling.timesteps) == 8


def _numbers(summary: str) -> list[float]:
    """The error of what was taken, and of uniform steps."""
    words = summary.split("error ")[1].replace(",", " ").replace("(", " ").split()
    return [float(words[0]), float(words[words.index("uniform") + 1])]
