"""TaylorSeer as a plan: the coefficients follow a line, and torch extrapolates with them."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffpress.compress.cache.deepcache import CachePass
from diffpress.compress.cache.execute import CachedDenoiser
from diffpress.compress.cache.taylorseer import TaylorSeerPass, extrapolation
from diffpress.compress.families.unet_graph import Corrected, UNetGraph
from diffpress.compress.run import run
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import CONDITIONAL, FULL, Sampling, StepProgram, Variant

STEPS = 8


@pytest.fixture
def longer(work: Work) -> Work:
    """The small denoiser under a schedule of eight steps; nothing is recorded."""
    times = tuple(float(t) for t in range(900, 100, -100))
    assert len(times) == STEPS
    terms = ((("sample", 0, 0.9), ("output", 0, -0.1)),) * STEPS
    sampling = Sampling("DDIMScheduler", STEPS, 3.0, 64, 64, times, (1.0,) * STEPS, 1.0, terms)
    return Work(work.pipeline, sampling, 0, work.recorder, work.progress, work.scratch)


def test_a_line_is_followed_exactly_over_irregular_gaps() -> None:
    full, steps = [0, 1, 4, 9], 14
    scale = extrapolation(full, steps)
    np.testing.assert_allclose(scale[[2, 3]][:, :, 0], [[2, -1], [3, -2]])
    np.testing.assert_allclose(scale[[5, 13]][:, :, 0], [[1 + 1 / 3, -1 / 3], [1 + 4 / 5, -4 / 5]], rtol=1e-6)
    np.testing.assert_array_equal(scale[full][:, :, 0], [[1, 0]] * 4)
    start, slope = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = tuple(float(t) for t in range(steps, 0, -1))
    corrected = Corrected(timesteps, torch.from_numpy(scale), torch.zeros(steps, 1))
    for index in range(2, steps):
        earlier, last = [start + slope * step for step in full if step <= index][-2:]
        got = corrected(torch.tensor([timesteps[index]]), last, earlier)
        torch.testing.assert_close(got, start + slope * index, atol=1e-5, rtol=1e-5)


def test_one_value_is_repeated() -> None:
    wanted = [[1, 0]] * 4 + [[4 / 3, -1 / 3]]
    np.testing.assert_allclose(extrapolation([0, 3], 5)[:, :, 0], wanted, rtol=1e-6)


@torch.no_grad()
def test_torch_runs_the_extrapolation(longer: Work) -> None:
    summary = run([("taylorseer", TaylorSeerPass(interval=3, branch=1))], longer)[0].summary
    assert summary == "4 of 8 steps run in full, the others extrapolate the feature of branch 1"
    assert longer.program.marks() == "##--#--#"
    assert longer.program.variants["cached"] == Variant(("up_1", "up_1@1"))
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 5, 32, generator=generator)
    running = CachedDenoiser(longer.denoiser, longer.program, longer.corrections)
    values: dict[int, Tensor] = {}
    for index, timestep in enumerate(longer.sampling.timesteps):
        sample, time = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([timestep])
        if index in (0, 1, 4, 7):
            wanted, values[index] = UNetGraph(longer.denoiser, writes=("up_1",))(sample, time, text)
        else:
            last, earlier = sorted(values)[-1], sorted(values)[-2]
            slope = (values[last] - values[earlier]) / (last - earlier)
            feature = values[last] + (index - last) * slope
            (wanted,) = UNetGraph(longer.denoiser, ("up_1",))(sample, time, text, feature)
        torch.testing.assert_close(running(sample, time, text).sample, wanted, atol=1e-5, rtol=1e-4)


def test_order_zero_repeats(longer: Work) -> None:
    summary = run([("taylorseer", TaylorSeerPass(interval=4, order=0))], longer)[0].summary
    assert "reuse the feature" in summary and longer.corrections is None
    assert longer.program.marks() == "##---#--" and longer.program.variants["cached"].reads == ("up_0",)


def test_plans_that_cannot_run_are_refused(longer: Work, work: Work) -> None:
    def refused(passed: TaylorSeerPass, planned: Work, message: str) -> None:
        with pytest.raises(DiffpressError, match=message):
            run([("taylorseer", passed)], planned)

    refused(TaylorSeerPass(branch=9), longer, "branch 9 does not exist, this denoiser has branches 0 to")
    longer.program = StepProgram((FULL,) * STEPS, guidance=(FULL, CONDITIONAL) + (FULL,) * 6)
    refused(TaylorSeerPass(), longer, "taylorseer: step 2 computes both halves .* step 1 wrote")
    longer.program = StepProgram((FULL,) * STEPS)
    CachePass(interval=2).apply(longer)
    refused(TaylorSeerPass(), longer, "an earlier pass planned a cache already")
    two: Any = longer.sampling.__dict__ | {"timesteps": (900.0, 100.0)}
    short = Work(work.pipeline, Sampling(**two), 0, work.recorder, work.progress, work.scratch)
    refused(TaylorSeerPass(), short, "the first 2 steps are full, and there are no others")
