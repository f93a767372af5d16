"""Every scheduler against diffusers' own loop: from noise, from the middle, with its noise, and what is refused."""

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffpress.calibration.schedule import tabulate, with_starts
from diffpress.calibration.tabulated import Tabulated
from diffpress.compress.schedule.epsilon import replaced_outputs
from diffpress.errors import DiffpressError
from diffpress.plan import FRESH, PRIOR, Sampling
from diffpress.runtime.noise import Generator
from diffpress.runtime.sampler import sample

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
DDIM = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
MULTI = "DPMSolverMultistepScheduler"
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", DDIM),
    "ddim, eta 1": ("DDIMScheduler", DDIM),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2-ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++ 2m": (MULTI, {}),
    "dpm++ 2m karras": (MULTI, {"use_karras_sigmas": True}),
    "dpm++ 3m": (MULTI, {"solver_order": 3}),
    "dpm++ 2m sde": (MULTI, {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++ single": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc-3": ("UniPCMultistepScheduler", {"solver_order": 3, "prediction_type": "epsilon"}),
    "lcm": ("LCMScheduler", {}),
    "tcd, eta 0.3": ("TCDScheduler", {}),
}
SEEDS = (5, 2**40 + 1)
SHAPE = (1, 4, 3, 5)  # 60 numbers: the last 16 of torch's draws are drawn again
STEPS = 8


def make(name: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """diffusers' scheduler and the options of its step."""
    cls, config = SCHEDULERS[name]
    return getattr(diffusers, cls)(**{**BETAS, **config, **changes}), {
        "eta": float(name.split()[-1])
    } if "eta" in name else {}


def tables(name: str, steps: int = STEPS) -> Sampling:
    scheduler, options = make(name)
    return with_starts(tabulate(scheduler, steps, 1.0, 64, 64, **options), scheduler, **options)


def denoise(x: Any, timestep: Any) -> Any:
    """A denoiser of numpy arrays and tensors: not linear, and different at every timestep."""
    return np.sin(x) + float(timestep) / 1000 if isinstance(x, np.ndarray) else torch.sin(x) + float(timestep) / 1000


def walked(name: str, first: int = 0, start: torch.Tensor | None = None, steps: int = STEPS) -> list[np.ndarray]:
    """diffusers' samples from `first` on, as its image-to-image pipeline begins; `start` None is noise."""
    scheduler, options = make(name)
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    if start is None:
        start = torch.cat([torch.randn(SHAPE, generator=g) for g in generators]) * scheduler.init_noise_sigma
    if first and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    if "generator" in scheduler.step.__code__.co_varnames:
        options["generator"] = generators
    found, x = [], start
    for t in scheduler.timesteps[first:]:
        output = denoise(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
        found.append(x.numpy())
    return found


def ours(sampling: Sampling, start: np.ndarray | None = None, **options: Any) -> list[np.ndarray]:
    generators = [Generator(seed) for seed in SEEDS]
    if start is None:
        start = np.concatenate([g.randn(SHAPE) for g in generators]) * np.float32(sampling.init_noise_sigma)

    def draw() -> np.ndarray:
        return np.concatenate([g.randn(SHAPE) for g in generators])

    return list(sample(sampling, lambda _, x, t: denoise(x, t), start, draw=draw, **options))


def close(got: Any, wanted: Any, error: float = 1e-4) -> None:
    assert np.linalg.norm(got - wanted) <= error * np.linalg.norm(wanted)


@pytest.mark.parametrize("steps", [1, 3, STEPS, 20])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_latents_are_diffusers_own(name: str, steps: int) -> None:
    wanted, got = walked(name, steps=steps), ours(tables(name, steps))
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sampling_begins_at_every_step_as_diffusers_does(name: str) -> None:
    sampling, start = tables(name), torch.randn(2, *SHAPE[1:], generator=torch.Generator().manual_seed(1))
    steps = range(sampling.order, len(sampling.timesteps), sampling.order)
    for first in {steps[0], steps[1], steps[len(steps) // 2], steps[-1]}:
        wanted = walked(name, first, start)
        for mine, theirs in zip(ours(sampling.starting(first), start.numpy()), wanted, strict=True):
            close(mine, theirs)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_levels_are_what_diffusers_adds(name: str) -> None:
    sampling, (scheduler, _) = tables(name), make(name)
    scheduler.set_timesteps(STEPS)
    x, noise = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert len(sampling.levels) == len(sampling.timesteps) + 1 and sampling.levels[-1] == (1.0, 0.0)
    for index, (alpha, sigma) in list(enumerate(sampling.levels[:-1])):
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(index)
        close(alpha * x + sigma * noise, scheduler.add_noise(x, noise, scheduler.timesteps[index : index + 1]), 1e-6)


@pytest.mark.parametrize("name", ["euler-ancestral", "dpm++ 2m sde", "lcm", "unipc"])
def test_the_table_in_torch_draws_the_same(name: str) -> None:
    sampling = tables(name)
    scheduler = Tabulated(sampling)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    x = torch.cat([torch.randn(SHAPE, generator=g) for g in generators]) * sampling.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(scheduler.scale_model_input(x, t), t), t, x, generators).prev_sample
    close(x.numpy(), walked(name)[-1])


def test_a_memory_costs_a_table_as_long_as_it_reaches() -> None:
    names = [name for name in SCHEDULERS if not name.startswith("dpm2")]
    rows = {name: [len(rows) for rows in tables(name, 12).starts if rows is not None] for name in names}
    for name in ("ddim", "ddim, eta 1", "ddpm", "euler", "euler-ancestral", "lcm", "tcd, eta 0.3"):
        assert rows[name] == []
    assert max(rows["dpm++ 2m"]) == max(rows["dpm++ 2m sde"]) == 1 and max(rows["dpm++ 3m"]) == 2
    assert max(rows["pndm"]) == 5
    # Never forgets: every row gains, but no more than the terms of the first calls.
    unipc = tables("unipc", 12)
    assert rows["unipc"][0] >= 9
    assert max(len(row) for row in unipc.starts[1] or ()) <= 6 < max(len(row) for row in unipc.terms)


@pytest.mark.parametrize("name", ["dpm++ 2m", "pndm", "unipc", "lcm", "heun"])
def test_starts_come_back_from_json(name: str) -> None:
    sampling = tables(name)
    assert Sampling.from_json(sampling.to_json()) == sampling
    assert Sampling.from_json(sampling.starting(2).to_json()) == sampling.starting(2)


def test_a_step_of_two_calls_is_not_cut_in_two() -> None:
    with pytest.raises(DiffpressError, match="cannot begin at call 3: HeunDiscreteScheduler makes a step of 2 calls"):
        tables("heun").starting(3)


@pytest.mark.parametrize("name", ["dpm++ 2m", "unipc", "euler-ancestral"])
def test_scaled_outputs_reach_the_starts(name: str) -> None:
    """What a correction does to the table it does to where it begins in the middle, too."""
    sampling = tables(name)
    factors = [1 + 0.01 * index for index in range(STEPS)]
    of_sample = [0.02 * index for index in range(STEPS)]
    changed = replaced_outputs(sampling, factors, of_sample).starting(3)
    start = np.concatenate([Generator(seed).randn(SHAPE) for seed in SEEDS])

    def run(table: Sampling, by: int | None) -> np.ndarray:
        generators = [Generator(seed) for seed in SEEDS]
        seen: list[np.ndarray] = []

        def answer(index: int, x: np.ndarray, timestep: float) -> np.ndarray:
            output = denoise(x, timestep)
            if by is None:
                return np.asarray(output)
            raw = x / np.float32(table.input_scale[index])
            return np.asarray(factors[by + index] * output + of_sample[by + index] * raw)

        draw = lambda: np.concatenate([g.randn(SHAPE) for g in generators])  # noqa: E731
        seen += sample(table, answer, start, draw=draw)
        return seen[-1]

    close(run(changed, None), run(sampling.starting(3), 3), 1e-5)


def test_prior_noise_is_given_or_left_out() -> None:
    plain = tables("euler")
    noisy = replace(plain, terms=tuple((*row, (PRIOR, 0, 0.1)) for row in plain.terms)).starting(4)
    start, prior = (np.concatenate([Generator(seed + k).randn(SHAPE) for seed in SEEDS]) for k in (0, 9))
    given, left_out = ours(noisy, start, prior=prior), ours(noisy, start, prior=np.zeros_like(start))
    close(left_out[-1], ours(plain.starting(4), start)[-1], 1e-6)
    close(given[0], left_out[0] + 0.1 * prior, 1e-6)


def test_noise_needs_a_generator_and_its_own_place() -> None:
    sampling = tables("euler-ancestral")
    assert [row[-1][0] for row in sampling.terms] == [FRESH] * STEPS and sampling.terms[-1][-1][2] == 0
    assert sampling.stochastic and not tables("euler").stochastic
    start = np.zeros(SHAPE, np.float32)
    with pytest.raises(DiffpressError, match=r"EulerAncestralDiscreteScheduler.* no generator"):
        list(sample(sampling, lambda _, x, t: x, start))
    late = replace(sampling, terms=(((FRESH, 1, 1.0),), *sampling.terms[1:]))
    with pytest.raises(DiffpressError, match="no fresh 1 calls back"):
        list(sample(late, lambda _, x, t: x, start, draw=lambda: start))


class DPMSolverSDEScheduler(diffusers.EulerDiscreteScheduler):  # type: ignore[misc]
    """Stands in for diffusers' own, which needs torchsde: noise that comes from nowhere diffusers could be asked."""

    def step(self, *args: Any, **options: Any) -> Any:
        after, *_ = super().step(*args, **options)
        return (after + torch.randn(after.shape, dtype=after.dtype),)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.DDIMScheduler(**BETAS, **{**DDIM, "clip_sample": True}), "DDIM.* set clip_sample to false"),
        (diffusers.DDPMScheduler(**BETAS), "DDPM.* set clip_sample to false"),
        (diffusers.DPMSolverMultistepScheduler(**BETAS, thresholding=True), "Multistep.* set thresholding to false"),
        (diffusers.SASolverScheduler(**BETAS), "SASolverScheduler is not linear.* use the schedule pass with solver"),
        (DPMSolverSDEScheduler(**BETAS), "Brownian tree.* dpm\\+\\+-sde or euler-ancestral"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_no_table_holds_is_refused_by_name(scheduler: Any, message: str) -> None:
    with pytest.raises(DiffpressError, match=message) as caught:
        tabulate(scheduler, 10, 1.0, 64, 64)
    assert "\n" not in str(caught.value)
