"""CacheQuant's schedule: the dynamic program against all groupings, distances against full runs written out here."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from diffpress.calibration.schedule import tabulate
from diffpress.compress import recipe
from diffpress.compress.cache.cachequant import CacheQuantPass, distances, groups
from diffpress.compress.cache.deepcache import CachePass
from diffpress.compress.families.unet_graph import UNetGraph
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.run import run
from diffpress.compress.schedule.stepping import start
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, REUSE, LayerQuant, StepProgram

STEPS = 9


@pytest.fixture
def longer(work: Work) -> Work:
    """The recorded prompts under nine steps of DDIM."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    sampling = tabulate(scheduler, STEPS, 3.0, 64, 64)
    made = Work(work.pipeline, sampling, 0, work.recorder, work.progress, work.scratch)
    made.original = lambda: work.denoiser
    return made


def cost(apart: np.ndarray, firsts: Any) -> float:
    ends = [*firsts[1:], len(apart)]
    return sum(apart[first, i] for first, end in zip(firsts, ends, strict=True) for i in range(first, end))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("steps", "count", "shortest", "longest"), [(10, 4, 1, 6), (9, 3, 2, 8), (10, 1, 5, 10), (7, 7, 1, 2)]
)
def test_groups_are_the_best_of_all(seed: int, steps: int, count: int, shortest: int, longest: int) -> None:
    apart = np.random.default_rng(seed).random((steps, steps))
    if seed % 2:
        apart[:3, 6:] = np.inf  # some are not allowed
    possible = [
        firsts
        for rest in combinations(range(1, steps), count - 1)
        for firsts in [(0, *rest)]
        if all(shortest <= b - a <= longest for a, b in zip(firsts, (*firsts[1:], steps), strict=True))
    ]
    best = min(cost(apart, firsts) for firsts in possible)
    if np.isfinite(best):
        found = groups(apart, count, shortest, longest)
        assert tuple(found) in possible and cost(apart, found) == pytest.approx(best)
    else:
        with pytest.raises(DiffpressError, match="do not fall into"):
            groups(apart, count, shortest, longest)


@torch.no_grad()
@pytest.mark.parametrize("rounded", [False, True])
def test_distances_are_those_of_full_runs(longer: Work, rounded: bool) -> None:
    if rounded:
        name = "down_blocks.1.resnets.0.conv1"
        scale = np.full(longer.denoiser.get_submodule(name).weight.shape[0], 0.05, np.float32)
        longer.quantization[name] = LayerQuant(scale, np.array([0.1], np.float32))
    found = distances(longer, "up_1", prompts=2, window=4)
    texts = list(longer.recorded())[::2]  # two calls of each prompt
    features = []
    [walk] = start(longer.sampling, texts, 0, "cpu")
    text = torch.stack([call.text for call in texts], dim=1).flatten(0, 1)
    with simulated(longer.denoiser, longer.quantization, longer.sampling.timesteps):
        for timestep in longer.sampling.timesteps:
            pair = torch.cat([walk.sample] * 2)
            output, feature = UNetGraph(longer.denoiser, writes=("up_1",))(pair, torch.tensor([timestep]), text)
            features.append(feature)
            plain, told = output.chunk(2)
            walk.advance(plain + 3.0 * (told - plain))
    for j in range(STEPS):
        for i in range(STEPS):
            wanted = float((features[i] - features[j]).abs().mean()) if j <= i <= j + 4 else 0.0
            assert found[j, i] == pytest.approx(wanted, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_pass_plans_and_corrects(longer: Work, depth: int) -> None:
    entry = {"cachequant": {"interval": 3, "branch": 1, "depth": depth}}
    summary = run(recipe.Recipe(name="x", passes=(entry,)).built(), longer)[0].summary
    marks = longer.program.marks()
    assert marks.startswith("#" if depth == 1 else "##") and 3 <= marks.count("#") <= 2 + depth
    assert marks in summary and "of the feature distance of even groups; relative error of features" in summary
    assert longer.corrections is not None and longer.corrections.features["up_1"].depth == depth


def test_the_correction_can_be_left_to_a_later_pass(longer: Work) -> None:
    longer.original = None
    summary = run([("cachequant", CacheQuantPass(interval=3, correct=False))], longer)[0].summary
    assert longer.corrections is None and "relative error" not in summary


def test_steps_of_one_half_begin_no_group_of_both(longer: Work) -> None:
    guidance = (FULL, REUSE, FULL, REUSE, REUSE, REUSE, REUSE, FULL, REUSE)
    longer.program = StepProgram((FULL,) * STEPS, guidance=guidance)
    CacheQuantPass(interval=2, correct=False).apply(longer)
    assert longer.program.guidance == guidance
    assert longer.program.steps.count(FULL) == 5


def test_plans_that_cannot_run_are_refused(longer: Work) -> None:
    def refused(passed: CacheQuantPass, message: str) -> None:
        with pytest.raises(DiffpressError, match=message):
            run([("cachequant", passed)], longer)

    refused(CacheQuantPass(branch=9), "branch 9 does not exist")
    refused(CacheQuantPass(interval=20), "9 steps do not fall into 1 groups of 10 to 40 steps: take a smaller interval")
    longer.original, longer.quantization = None, {"x": LayerQuant(np.ones(1, np.float32), input_format=None)}
    refused(CacheQuantPass(), "the float model cannot be opened anew")
    longer.quantization = {}
    CachePass(interval=2).apply(longer)
    refused(CacheQuantPass(), "an earlier pass planned a cache already")
