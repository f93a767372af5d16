"""EVODiff's step: the formulas written out number by number, numpy against torch, and what divides by nothing."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from diffpress import evodiff
from diffpress.calibration.tabulated import Tabulated
from diffpress.errors import DiffpressError
from diffpress.plan import Sampling
from diffpress.runtime import sampler

ALPHAS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)  # Stable Diffusion's
SHAPE = (2, 3, 4, 5)
Model = Callable[[np.ndarray, float], np.ndarray]  # (sample, timestep) -> v


def schedule(timesteps: list[int], end: float = 0.0) -> Sampling:
    """A v-prediction network called at `timesteps`; `end` is sigma where sampling ends."""
    levels = [(math.sqrt(ALPHAS[t]), math.sqrt(1 - ALPHAS[t])) for t in timesteps]
    terms = tuple((("sample", 0, alpha), ("output", 0, -sigma)) for alpha, sigma in levels)
    ends = (math.sqrt(1 - end**2), end)
    scales = (1.0,) * len(timesteps)
    return Sampling(
        "test",
        len(timesteps),
        1.0,
        64,
        64,
        tuple(map(float, timesteps)),
        scales,
        1.0,
        terms,
        "evodiff",
        (*levels, ends),
    )


TIMESTEPS = [999, 900, 700, 450, 300, 120, 30]


def network(x: np.ndarray, timestep: float) -> np.ndarray:
    """Some network: not linear, different at every timestep, and its channels look at each other."""
    return np.asarray(2 * x / (1 + np.abs(x)) + 0.3 * x[:, ::-1] * timestep / 1000)


def noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def in_numpy(sampling: Sampling, start: np.ndarray, model: Model = network) -> list[np.ndarray]:
    return list(sampler.sample(sampling, lambda _, x, t: model(x, t).astype(np.float32), start))


def in_torch(sampling: Sampling, start: np.ndarray, dtype: torch.dtype = torch.float32) -> list[np.ndarray]:
    scheduler, x, found = Tabulated(sampling), torch.from_numpy(start).to(dtype), []
    for t in scheduler.timesteps:
        output = torch.from_numpy(network(scheduler.scale_model_input(x).numpy(), float(t))).to(dtype)
        x = scheduler.step(output, t, x).prev_sample
        found.append(x.numpy())
    return found


def by_hand(sampling: Sampling, start: np.ndarray) -> list[np.ndarray]:
    """The method's formulas as they are stated, for one channel of one picture after the other, in plain numbers.

    All channels have to be known for the network, so the loop over them stands inside of the one over steps.
    """
    kappa = [sigma / alpha for alpha, sigma in sampling.levels]
    sigma = [sigma for _, sigma in sampling.levels]
    time = [(t + 1) / 1000 for t in sampling.timesteps]
    t_min, last = 1 / 1000, len(time)
    plain = last - 1 if sigma[-1] == 0 else last  # the first level that is reached by a step of first order again

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    def proj(a: list[float], b: list[float]) -> float:
        return min(max(dot(a, b) / dot(b, b), -2.0), 2.0)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    probes = [start.astype(np.float64)]
    predictions: list[np.ndarray] = []
    kept: dict[tuple[int, int], Any] = {}  # x_E, D1, rho of the step under way, for each channel
    for i in range(last):
        alpha = sampling.levels[i][0]
        predictions.append(alpha * probes[i] - sigma[i] * network(probes[i], sampling.timesteps[i]))
        after = np.empty(SHAPE)
        for n, c in np.ndindex(SHAPE[:2]):
            m_t = predictions[i][n, c].ravel().tolist()
            x = probes[i][n, c].ravel().tolist()
            if 2 <= i < plain:  # the step to level i ends: t is level i, 0 and 1 are those before
                m0 = predictions[i - 1][n, c].ravel().tolist()
                euler, d1, rho = kept[n, c]
                ell = math.log(kappa[i - 2] / kappa[i - 1]) / math.log(kappa[i - 1] / kappa[i])
                h = 1 / kappa[i] - 1 / kappa[i - 1]
                w = 0.5 * (1 - ((time[i] + t_min) / (time[0] + t_min)) ** 2)
                base = math.sqrt((sigma[i] / sigma[i - 1]) / (sigma[i - 1] / sigma[i - 2]))
                r2 = (1 - w) * base + w * proj(m_t, m0)
                d2 = [a - r2 * b for a, b in zip(m_t, m0, strict=True)]
                b1, b2 = [d / (ell * h) for d in d1], [ell * d / h for d in d2]
                pairs = list(zip(b1, b2, strict=True))
                eta = 0.5 * sigmoid(abs(0.5 * proj([q + p for p, q in pairs], [q - p for p, q in pairs])))
                b = [-(eta / ell) * p + ell * (1 - eta) * q for p, q in zip(d1, d2, strict=True)]
                rest = [v - e - 0.5 * sigma[i] * h * q / rho for v, e, q in zip(x, euler, b, strict=True)]
                zeta = sigmoid(abs(proj(rest, d1) / (h * sigma[i])) - 0.5)
                x = [e + 0.5 * sigma[i] * h * q / zeta for e, q in zip(euler, b, strict=True)]
            j = i + 1  # and the step to level j begins
            if sigma[j] == 0:
                euler = [sampling.levels[j][0] * m for m in m_t]
            else:
                h = 1 / kappa[j] - 1 / kappa[i]
                euler = [sigma[j] / sigma[i] * v + sigma[j] * h * m for v, m in zip(x, m_t, strict=True)]
            probe = euler
            if i >= 1 and j < plain:
                m1 = predictions[i - 1][n, c].ravel().tolist()
                ell = math.log(kappa[i - 1] / kappa[i]) / math.log(kappa[i] / kappa[j])
                w = 0.5 * (1 - ((time[j] + t_min) / (time[0] + t_min)) ** 2)
                base = math.sqrt((sigma[j] / sigma[i]) / (sigma[i] / sigma[i - 1]))
                r1 = (1 - w) * base + w * proj(m_t, m1)
                d1 = [a - r1 * b for a, b in zip(m_t, m1, strict=True)]
                rho = min(max(sigmoid(0.25 * abs(r1)) * ell, 0.25 * ell), 1.5 * ell)
                probe = [e + 0.5 * sigma[j] * h * d / rho for e, d in zip(euler, d1, strict=True)]
                kept[n, c] = (euler, d1, rho)
            after[n, c] = np.reshape(probe, SHAPE[2:])
        probes.append(after)
    return probes[1:]


def off(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("end", [0.0, 0.02])
@pytest.mark.parametrize("calls", [1, 2, 3, 7])
def test_every_step_is_what_the_formulas_say(calls: int, end: float) -> None:
    sampling = schedule(TIMESTEPS[:calls], end)
    got, wanted = in_numpy(sampling, noise()), by_hand(sampling, noise())
    assert len(got) == len(wanted) == calls
    assert got[-1].dtype == np.float32
    assert max(map(off, got, wanted)) < 1e-5


def test_torch_and_numpy_agree() -> None:
    sampling = schedule(TIMESTEPS, 0.02)
    assert max(map(off, in_numpy(sampling, noise()), in_torch(sampling, noise()))) < 1e-6
    exact = in_torch(sampling, noise().astype(np.float64), torch.float64)
    assert max(map(off, exact, by_hand(sampling, noise()))) < 1e-12
    assert in_torch(sampling, noise())[0].dtype == np.float32


def first_order(sampling: Sampling, start: np.ndarray, model: Model) -> np.ndarray:
    """DDIM, equation 12 of its paper, for v-prediction."""
    x = start.astype(np.float64)
    for ((alpha, sigma), (after, noisy)), t in zip(pairwise(sampling.levels), sampling.timesteps, strict=True):
        v = model(x, t)
        x = after * (alpha * x - sigma * v) + noisy * (sigma * x + alpha * v)
    return x


def test_few_steps_are_those_of_ddim() -> None:
    for calls, end in ((1, 0.1), (2, 0.1), (3, 0.0)):
        sampling = schedule(TIMESTEPS[:calls], end)
        assert off(in_numpy(sampling, noise())[-1], first_order(sampling, noise(), network)) < 1e-5


@pytest.mark.parametrize("end", [0.0, 0.02])
def test_predictions_that_vanish_or_stay_the_same_divide_by_nothing(end: float) -> None:
    # The network of data that is one point: every prediction is that point, here black in one channel.
    point = np.array([0.7, 0.0, -1.2], np.float32).reshape(1, 3, 1, 1)
    sampling = schedule(TIMESTEPS, end)
    level = dict(zip(sampling.timesteps, sampling.levels, strict=False))

    def exactly(x: np.ndarray, t: float) -> np.ndarray:
        alpha, sigma = level[t]
        return np.asarray((alpha * x - point) / sigma)

    with np.errstate(all="raise", under="ignore"):
        for start in (noise(), np.zeros(SHAPE, np.float32)):
            got = in_numpy(sampling, start, exactly)
            assert all(np.isfinite(x).all() for x in got)
            # Not the point itself: r is not 1 where levels are uneven, so that D1 keeps a part of what is constant.
            assert np.abs(got[-1] - point * sampling.levels[-1][0]).max() < (1e-5 if end == 0 else 0.2)
        black = in_numpy(sampling, np.zeros(SHAPE, np.float32), lambda x, t: np.zeros_like(x))
        assert not any(x.any() for x in black)


def test_equal_predictions_on_even_levels_are_exact() -> None:
    # Halving the noise of a variance-exploding process makes base and projection 1, and the differences vanish.
    levels = tuple((1.0, sigma) for sigma in (8.0, 4.0, 2.0, 1.0, 0.5))
    rows = ((("output", 0, 1.0),),) * 4
    sampling = Sampling("test", 4, 1.0, 64, 64, (9.0, 6.0, 4.0, 2.0), (1.0,) * 4, 1.0, rows, "evodiff", levels)
    got = in_numpy(sampling, noise() * 8, lambda x, _: np.full_like(x, 0.7))
    wanted = 0.7 + (noise() * 8 - 0.7) * 0.5 / 8
    assert off(got[-1], wanted) < 1e-6


def test_a_gaussian_is_followed() -> None:
    """Data of one Gaussian: predictions are linear in the sample, and the solution is known."""
    mean, std = 0.6, 0.5

    def exact(x: np.ndarray, sampling: Sampling) -> np.ndarray:
        (alpha, sigma), (after, noisy) = sampling.levels[0], sampling.levels[-1]
        width = math.hypot(after * std, noisy) / math.hypot(alpha * std, sigma)
        return np.asarray(after * mean + (x - alpha * mean) * width)

    def error(steps: int) -> float:
        sampling = schedule(np.linspace(999, 20, steps + 1).round().astype(int).tolist()[:-1], 0.1)
        level = dict(zip(sampling.timesteps, sampling.levels, strict=False))

        def v(x: np.ndarray, t: float) -> np.ndarray:
            alpha, sigma = level[t]
            m = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
            return np.asarray((alpha * x - m) / sigma)

        got = in_numpy(sampling, noise(), v)
        assert all(np.isfinite(x).all() for x in got)
        return off(got[-1], exact(noise().astype(np.float64), sampling))

    assert error(10) < 0.1
    assert error(160) < 0.3 * error(20)


def test_a_schedule_survives_json_and_older_ones_are_linear() -> None:
    sampling = schedule(TIMESTEPS)
    assert Sampling.from_json(json.loads(json.dumps(sampling.to_json()))) == sampling
    old = sampling.to_json()
    del old["solver"], old["levels"]
    assert Sampling.from_json(old) == replace(sampling, solver="linear", levels=())


def test_it_begins_in_the_middle_as_the_whole_schedule_is_there() -> None:
    """A network that knows the one image there is keeps every sample on its line, wherever sampling begins."""
    sampling, clean = schedule(TIMESTEPS), np.float32(0.7)
    alphas = dict(zip(sampling.timesteps, sampling.levels, strict=False))

    def model(x: np.ndarray, timestep: float) -> np.ndarray:
        alpha, sigma = alphas[timestep]
        return np.asarray((alpha * x - clean) / sigma)  # v = (alpha x - x0) / sigma

    for first in range(len(TIMESTEPS)):
        began = sampling.starting(first)
        alpha, sigma = sampling.levels[first]
        *_, end = in_numpy(began, np.asarray(alpha * clean + sigma * noise(), np.float32), model)
        np.testing.assert_allclose(end, np.full_like(end, clean), atol=1e-4)
        assert began.origin == (999.0 if first else None) and began.levels == sampling.levels[first:]
    assert sampling.starting(2).starting(1) == sampling.starting(3)
    assert Sampling.from_json(sampling.starting(3).to_json()) == sampling.starting(3)
    # Time is that of the whole schedule: a step in the middle is the same one.
    assert evodiff._step(sampling.starting(2), 3) == evodiff._step(sampling, 5)


GOOD = schedule(TIMESTEPS)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (replace(GOOD, solver="magic"), "'magic': this needs a newer diffpress"),
        (replace(GOOD, levels=()), "levels"),
        (replace(GOOD, levels=GOOD.levels[:-1]), "levels"),
        (replace(GOOD, levels=(GOOD.levels[1], *GOOD.levels[1:])), "levels"),
        (replace(GOOD, levels=GOOD.levels[::-1]), "levels"),
        (replace(GOOD, levels=(*GOOD.levels[:-1], (1.0, -0.1))), "levels"),
        (replace(GOOD, levels=(*GOOD.levels[:-1], (1.0, math.nan))), "levels"),
        (replace(GOOD, levels=((0.0, 1.0), *GOOD.levels[1:])), "levels"),
        (replace(GOOD, levels=(*GOOD.levels[:3], (1.0, 0.0), *GOOD.levels[4:])), "levels"),
    ],
)
def test_what_cannot_be_walked_is_refused(broken: Sampling, told: str) -> None:
    with pytest.raises(DiffpressError, match=told) as caught:
        in_numpy(broken, noise())
    assert "\n" not in str(caught.value)
