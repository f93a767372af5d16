"""Sigmas and timesteps against diffusers' own conversion."""

import numpy as np
import pytest

from diffpress.compress.schedule.sigmas import sigma_of, sigma_table, timestep_of
from diffpress.errors import DiffpressError


def test_timesteps_of_sigmas_are_those_of_diffusers() -> None:
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    alphas = scheduler.alphas_cumprod.numpy()
    table = sigma_table(alphas)
    assert table[[0, -1]] == pytest.approx([0.02917, 14.6146], rel=1e-3)  # Stable Diffusion's
    sigmas = np.array([20.0, 14.0, 3.3, 1.0, 0.5, 0.07, 0.03, 0.001])
    expected = scheduler._sigma_to_t(sigmas, np.log(table))
    np.testing.assert_allclose(timestep_of(sigmas, alphas), expected, atol=1e-6)
    assert timestep_of(1e6, alphas) == 999 and timestep_of(0.0, alphas) == 0

    places = np.array([0, 0.25, 17.5, 500, 998.9, 999])
    np.testing.assert_allclose(timestep_of(sigma_of(places, alphas), alphas), places, atol=1e-9)
    np.testing.assert_allclose(sigma_of(np.arange(1000), alphas), table)


def test_pure_noise_has_no_sigma() -> None:
    with pytest.raises(DiffpressError, match="zero terminal SNR"):
        timestep_of(1.0, [0.99, 0.5, 0.0])
