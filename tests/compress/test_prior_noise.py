"""Prior noise as a term of schedules, against loops of diffusers' schedulers written out here."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from diffpress.calibration.schedule import tabulate
from diffpress.calibration.tabulated import Tabulated, playing
from diffpress.compress.schedule import economy
from diffpress.compress.schedule.epsilon import scaled
from diffpress.compress.schedule.prior_noise import with_prior_noise
from diffpress.compress.schedule.stepping import Trajectory
from diffpress.errors import DiffpressError
from diffpress.plan import Sampling
from diffpress.runtime.sampler import sample

STRENGTH = 0.05
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "ddim": DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "euler": EulerDiscreteScheduler(**BETAS),
    "dpm++": DPMSolverMultistepScheduler(**BETAS),
    "unipc": UniPCMultistepScheduler(**BETAS),
}


def table(name: str, steps: int = 7) -> Sampling:
    return tabulate(SCHEDULERS[name], steps, 1.0, 64, 64)


def noise() -> Tensor:
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).double()


def network(scaled_sample: Any, timestep: float) -> Any:
    """Some denoiser, for arrays and tensors: not linear, and different at every timestep."""
    return scaled_sample * (0.9 - timestep / 4000) + 0.1 * scaled_sample**2 / (1 + scaled_sample**2)


def by_hand(name: str, strength: float, steps: int = 7) -> list[Tensor]:
    """The samples that the network is called with, and the last one, by diffusers' own steps."""
    scheduler = SCHEDULERS[name]
    scheduler.set_timesteps(steps)
    latent = noise() * scheduler.init_noise_sigma
    seen = []
    for timestep in scheduler.timesteps:
        unit = float(scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), timestep))
        if timestep < 500:
            latent = latent + strength * noise() / unit
        seen.append(latent)
        output = network(latent * unit, float(timestep))
        latent = scheduler.step(output, timestep, latent, return_dict=False)[0]
    return [*seen, latent]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_call_sees_the_noise_in_numpy_and_in_torch(name: str) -> None:
    sampling, expected = with_prior_noise(table(name), STRENGTH), by_hand(name, STRENGTH)
    start = (noise() * sampling.init_noise_sigma).numpy()
    ours = [start, *sample(sampling, lambda index, x, t: network(x, t), start)]
    played, latent = Tabulated(sampling), torch.from_numpy(start)
    for index, timestep in enumerate(sampling.timesteps):
        np.testing.assert_allclose(ours[index], expected[index], rtol=1e-4, atol=1e-4 * sampling.init_noise_sigma)
        torch.testing.assert_close(latent, expected[index], rtol=1e-4, atol=1e-4 * sampling.init_noise_sigma)
        latent = played.step(network(played.scale_model_input(latent), timestep), timestep, latent).prev_sample
    np.testing.assert_allclose(ours[-1], expected[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latent, expected[-1], rtol=1e-4, atol=1e-4)
    plain = by_hand(name, 0.0)
    assert float((expected[-1] - plain[-1]).norm()) > 1e-2 * float(plain[-1].norm())  # the noise is seen


def test_a_second_image_has_its_own_noise() -> None:
    sampling = with_prior_noise(table("ddim", 4), STRENGTH)
    scheduler = Tabulated(sampling)

    def drawn(seed: int) -> Tensor:
        scheduler.set_timesteps(4)
        latent = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
        for timestep in sampling.timesteps:
            latent = scheduler.step(network(latent, timestep), timestep, latent).prev_sample
        return latent

    alone = drawn(1)
    drawn(0)
    assert torch.equal(drawn(1), alone)


def test_trajectories_of_passes_have_it_too() -> None:
    sampling = with_prior_noise(table("euler", 4), STRENGTH)
    walk = Trajectory(sampling, [torch.zeros(1, 2, 3)] * 2, noise().float())
    for _ in sampling.timesteps:
        walk.advance(walk.output(lambda x, t, text, return_dict: (network(x, t),)))
    torch.testing.assert_close(walk.sample.double(), by_hand("euler", STRENGTH, 4)[-1], rtol=1e-3, atol=1e-3)


def test_one_method_in_two_coordinates_gains_the_same() -> None:
    """Euler's samples are those of DDIM times sqrt(1 + sigma^2)."""
    euler = table("euler")
    euler = replace(euler, init_noise_sigma=1 / euler.input_scale[0])
    roots = [*euler.input_scale, 1.0]  # sqrt of alphas_cumprod
    terms = []
    for now, after in pairwise(roots):
        shift = np.sqrt(1 - after**2) - after / now * np.sqrt(1 - now**2)
        terms.append((("sample", 0, after / now), ("output", 0, float(shift))))
    ddim = replace(euler, terms=tuple(terms), input_scale=(1.0,) * 7, init_noise_sigma=1.0)
    ends = []
    for sampling in (with_prior_noise(ddim, STRENGTH), with_prior_noise(euler, STRENGTH)):
        start = (noise() * sampling.init_noise_sigma).numpy()
        *_, end = sample(sampling, lambda index, x, t: network(x, t), start)
        ends.append(end)
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-4, atol=1e-4)


def test_schedules_with_noise_are_played_from_their_table() -> None:
    plain = table("ddim")
    noisy = with_prior_noise(plain, STRENGTH)
    assert isinstance(playing(SCHEDULERS["ddim"], noisy), Tabulated)
    assert playing(playing(SCHEDULERS["ddim"], noisy), plain) is SCHEDULERS["ddim"]
    assert Sampling.from_json(noisy.to_json()) == noisy
    assert [timestep < 500 for timestep in plain.timesteps] == [False] * 3 + [True] * 4
    assert [len(row) for row in noisy.terms] == [2, 2, 3, 3, 3, 3, 2]
    np.testing.assert_array_equal(economy.effects(noisy), economy.effects(plain))


def test_scaled_epsilon_leaves_the_noise_alone() -> None:
    scheduler = SCHEDULERS["ddim"]
    divisors = [1.0 + 0.01 * index for index in range(7)]
    both = scaled(with_prior_noise(table("ddim"), STRENGTH), scheduler, divisors)
    assert both == with_prior_noise(scaled(table("ddim"), scheduler, divisors), STRENGTH)


def test_schedules_without_a_place_for_it_are_refused() -> None:
    plain = table("ddim")
    for timesteps in ([499.0, *plain.timesteps[1:]], [900.0 - index for index in range(7)]):
        with pytest.raises(DiffpressError, match="set prior_noise to 0"):
            with_prior_noise(replace(plain, timesteps=tuple(timesteps)), STRENGTH)
    with pytest.raises(DiffpressError, match="steps of evodiff"):
        with_prior_noise(replace(plain, solver="evodiff"), STRENGTH)
    with pytest.raises(DiffpressError, match="no noise 0 calls back"):
        list(sample(replace(with_prior_noise(plain, 0.1), solver="evodiff"), lambda *_: noise().numpy(), np.ones(1)))
