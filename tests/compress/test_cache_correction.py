"""Corrections of cached features: the least squares against a solver, the fit against a loop written out here."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffpress.calibration.capture import Call
from diffpress.calibration.schedule import tabulate
from diffpress.compress import recipe
from diffpress.compress.cache.correct_pass import CacheCorrectPass
from diffpress.compress.cache.correction import error, fit, gram, neutral, reading, solve, warmed
from diffpress.compress.cache.deepcache import CachePass
from diffpress.compress.cache.execute import CachedDenoiser
from diffpress.compress.cache.program import program_of
from diffpress.compress.families.unet_graph import UNetGraph, encoder, modules
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.run import run
from diffpress.compress.schedule.stepping import start
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, REUSE, LayerQuant, StepProgram, Variant

STEPS, PROMPTS, DEEP = 6, 4, "up_1"


@pytest.fixture
def work(shared_unet: Any, tmp_path: Path) -> Work:
    """Four prompts of a random denoiser, six DDIM steps."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    sampling = tabulate(scheduler, STEPS, 3.0, 64, 64)
    generator = torch.Generator().manual_seed(1)
    calls = [
        Call(torch.zeros(2, 4, 8, 8), torch.tensor([999.0]), torch.randn(2, 5, 32, generator=generator))
        for _ in range(PROMPTS)
    ]
    pipeline = SimpleNamespace(unet=copy.deepcopy(shared_unet), scheduler=scheduler)
    made = Work(pipeline, sampling, 0, lambda _: calls, lambda items, _: items, tmp_path)  # type: ignore[arg-type,return-value]
    made.original = lambda: shared_unet
    return made


def quantized(work: Work, scale: float = 0.05) -> None:
    """One layer that every step runs, and one that only full steps do, far too coarsely."""
    for name in ("up_blocks.1.resnets.1.conv1", "down_blocks.1.resnets.0.conv1"):
        rows = work.denoiser.get_submodule(name).weight.shape[0]
        work.quantization[name] = LayerQuant(np.full(rows, scale, np.float32), np.array([0.1], np.float32))


@pytest.mark.parametrize("depth", [1, 2])
def test_least_squares(depth: int) -> None:
    generator = torch.Generator().manual_seed(0)
    value, earlier, noise = torch.randn(3, 4, 3, 5, 5, generator=generator)
    target = 0.7 * value - 0.4 * earlier + 0.1 * noise + torch.tensor([2.0, 0.0, -1.0])[:, None, None]
    sums = gram(value[:1], earlier[:1], target[:1]) + gram(value[1:], earlier[1:], target[1:])
    found = solve(sums, depth)
    for channel in range(3):
        columns = [*[value[:, channel], earlier[:, channel]][:depth], torch.ones(4, 5, 5)]
        matrix = torch.stack([column.flatten().double() for column in columns], dim=1)
        wanted = torch.linalg.lstsq(matrix, target[:, channel].flatten().double()[:, None]).solution[:, 0]
        torch.testing.assert_close(found[channel], wanted, atol=1e-6, rtol=0)
    shape = (1, -1, 1, 1)
    corrected = found[:, 0].reshape(shape) * value + found[:, -1].reshape(shape)
    corrected = corrected + (found[:, 1].reshape(shape) * earlier if depth == 2 else 0)
    assert error(sums, found) == pytest.approx(float((target - corrected).norm() / target.norm()), rel=1e-5)
    tokens = [tensor.flatten(2).transpose(1, 2) for tensor in (value, earlier, target)]
    torch.testing.assert_close(gram(*tokens), sums)
    together = solve(sums.sum(dim=0, keepdim=True), depth)
    assert error(sums.sum(dim=0, keepdim=True), together) > error(sums, found)


@pytest.mark.parametrize("depth", [1, 2])
def test_identical_features_and_constant_channels(depth: int) -> None:
    value = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    value[:, 1], value[:, 2] = 5.0, 0.0
    same = solve(gram(value, value.clone(), value.clone()), depth)
    assert torch.equal(same, torch.tensor([[*[1.0, 0.0, 0.0][:depth], 0.0]] * 3).double())
    off = solve(gram(value, value.roll(1, 0), value + 0.25), depth)
    expected = torch.tensor([[*[1.0, 0.0][:depth], 0.25]] * 3).double()
    torch.testing.assert_close(off, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def by_hand(work: Work, program: StepProgram, depth: int) -> list[tuple[int, Tensor]]:
    """(step, [C, depth + 1]) of the feature DEEP with an ordinary solver; all prompts are one batch."""
    assert work.original is not None
    exact, calls = work.original(), work.recorded()
    [walk] = start(work.sampling, list(calls), work.seed, "cpu")
    kept: list[Tensor] = []
    found = []
    text = torch.stack([call.text for call in calls], dim=1).flatten(0, 1)
    with simulated(work.denoiser, work.quantization, work.sampling.timesteps):
        for index, name in enumerate(program.steps):
            pair, time = torch.cat([walk.sample] * 2), torch.tensor([work.sampling.timesteps[index]])
            if not program.variants[name].reads:
                output, feature = UNetGraph(work.denoiser, writes=(DEEP,))(pair, time, text)
                kept = [feature, *kept[:1]]
            else:
                _, true = UNetGraph(exact, writes=(DEEP,))(pair, time, text)
                rows = [0, 1, 4, 5]  # of the first half of the prompts, both halves of guidance
                values = kept[:depth]
                coefficients = []
                for channel in range(true.shape[1]):
                    columns = [value[rows, channel].flatten().double() for value in values]
                    matrix = torch.stack([*columns, torch.ones_like(columns[0])], dim=1)
                    target = true[rows, channel].flatten().double()[:, None]
                    coefficients.append(torch.linalg.lstsq(matrix, target).solution[:, 0])
                solved = torch.stack(coefficients)
                found.append((index, solved))
                one = solved.float()[:, :, None, None]
                corrected = one[:, -1] + sum(one[:, k] * value for k, value in enumerate(values))
                (output,) = UNetGraph(work.denoiser, (DEEP,))(pair, time, text, corrected)
            plain, told = output.chunk(2)
            walk.advance(plain + 3.0 * (told - plain))
    return found


@pytest.mark.parametrize(("depth", "rounded"), [(1, False), (1, True), (2, True)])
def test_the_fit_follows_the_corrected_trajectory(work: Work, depth: int, rounded: bool) -> None:
    if rounded:
        quantized(work)
    full: tuple[str, ...] = ()
    program = program_of(work.denoiser, [full, full, (DEEP,), (DEEP,), full, (DEEP,)])
    corrections = fit(work, program, depth)
    rows = work.tables["cache-correct"]
    assert [row["step"] for row in rows] == [2, 3, 5]
    assert [row["depth"] for row in rows] == [depth] * 3  # the judges agree: nothing else is compared below
    assert all(row["after"] < row["before"] for row in rows)
    entry = corrections.features[DEEP]
    assert entry.scale.shape == (STEPS, depth, 32) and entry.offset.shape == (STEPS, 32)
    for index, wanted in by_hand(work, program, depth):
        got = np.concatenate([entry.scale[index].T, entry.offset[index][:, None]], axis=1)
        np.testing.assert_allclose(got, wanted.numpy(), atol=2e-3)
    np.testing.assert_array_equal(entry.scale[[0, 1, 4]], np.tile([[1.0], [0.0]], (3, 1, 32))[:, :depth])


@pytest.mark.parametrize("reads", [(1, 2, 4), (2, 4)])
def test_steps_at_one_timestep_share_what_the_first_that_reads_found(work: Work, reads: tuple[int, ...]) -> None:
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    work.sampling = tabulate(scheduler, STEPS - 1, 3.0, 64, 64)
    assert work.sampling.timesteps[1] == work.sampling.timesteps[2] and len(work.sampling.timesteps) == STEPS
    program = program_of(work.denoiser, [(DEEP,) if index in reads else () for index in range(STEPS)])
    entry = fit(work, program).features[DEEP]
    rows = work.tables["cache-correct"]
    assert [row["step"] for row in rows] == list(reads)
    assert all(row["after"] < row["before"] and row["depth"] == 1 for row in rows)
    index, wanted = by_hand(work, program, depth=1)[0]
    for step in (1, 2):
        got = np.concatenate([entry.scale[step].T, entry.offset[step][:, None]], axis=1)
        np.testing.assert_allclose(got, wanted.numpy(), atol=2e-3)
    assert index == reads[0] and not np.array_equal(entry.scale[4], entry.scale[2])


def test_a_cache_of_what_does_not_change_needs_no_correction(work: Work) -> None:
    # With the upsampler's weights gone its output is its bias, whatever the sample.
    upsampler = work.denoiser.up_blocks[0].upsamplers[0].conv
    upsampler.weight.data.zero_()
    deep = "up_1"
    program = program_of(work.denoiser, [(), (deep,), (deep,), (), (deep,), (deep,)])
    entry = fit(work, program).features[deep]
    np.testing.assert_array_equal(entry.scale, np.ones((STEPS, 1, 32), np.float32))
    np.testing.assert_array_equal(entry.offset, np.zeros((STEPS, 32), np.float32))
    assert {row["depth"] for row in work.tables["cache-correct"]} == {0}


def test_what_does_not_gain_on_other_prompts_is_left_out(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def useless(sums: Tensor, depth: int) -> Tensor:
        return solve(sums, depth) + 10.0

    monkeypatch.setattr("diffpress.compress.cache.correction.solve", useless)
    entry = fit(work, program_of(work.denoiser, [(), (), (DEEP,), (DEEP,), (), (DEEP,)]), depth=2).features[DEEP]
    assert entry.depth == 1 and (entry.scale == 1).all() and (entry.offset == 0).all()


def test_all_kinds_of_features_are_corrected(work: Work) -> None:
    unet = work.denoiser
    kinds = {kind: name for name, kind in modules(unet).items() if name.startswith("down")}
    inner = (kinds["resnet"], kinds["attn2"], kinds["ff"])
    program = program_of(unet, [(), inner, encoder(unet), (), inner, encoder(unet)], (FULL,) * 4 + (REUSE,) * 2)
    corrections = fit(work, program, per_channel=False)
    assert corrections.features.keys() == {*inner, *encoder(unet)}
    assert all(entry.scale.shape == (STEPS, 1, 1) for entry in corrections.features.values())
    assert all(row["after"] <= row["before"] for row in work.tables["cache-correct"])
    work.program, work.corrections = reading(unet, program, corrections), corrections
    with torch.no_grad():
        [walk] = start(work.sampling, list(work.recorded()), 0, "cpu")
        running = CachedDenoiser(unet, work.program, corrections)
        for _ in range(STEPS):
            walk.advance(walk.output(running))
        assert bool(walk.sample.isfinite().all())


def test_steps_that_lack_an_earlier_value_become_full(work: Work) -> None:
    unet = work.denoiser
    program = program_of(unet, [(), (DEEP,), (DEEP,), (DEEP,), (), (DEEP,)])
    assert warmed(unet, program).marks() == "##--#-"
    # A shallow variant computes up_0 anew: with that of the first step there are two.
    nested = program_of(unet, [(), (DEEP,), ("up_0",), (), (DEEP,), ("up_0",)])
    assert warmed(unet, nested).steps == (FULL, FULL, "cached", FULL, "cached_2", "cached")
    deep = reading(unet, warmed(unet, program), neutral(program, work.sampling.timesteps, 2))
    assert deep.variants["cached"].reads == (DEEP, f"{DEEP}@1")
    assert warmed(unet, deep).marks() == deep.marks()
    with pytest.raises(DiffpressError, match="step 1 reads feature 'up_1@1' before"):
        fit(work, program, depth=2)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_pass_corrects_a_planned_cache(work: Work, depth: int) -> None:
    quantized(work)
    passes = recipe.Recipe(
        name="x", passes=({"cache": {"interval": 3, "branch": 1}}, {"cache-correct": {"depth": depth}})
    )
    summary = run(passes.built(), work)[-1].summary
    assert work.corrections is not None and work.corrections.features[DEEP].depth == depth
    assert work.program.marks() == ("#--#--" if depth == 1 else "##-#--")
    assert work.program.variants["cached"] == Variant((DEEP, f"{DEEP}@1")[:depth])
    rows = work.tables["cache-correct"]
    assert "relative error of features" in summary and f"{len(rows)} of {len(rows)} gain" in summary
    again = run([("cache-correct", CacheCorrectPass())], work)[-1].summary  # another pass finds its own anew
    assert work.corrections.features[DEEP].depth == 1 and again


def test_passes_that_cannot_correct_are_refused(work: Work) -> None:
    with pytest.raises(DiffpressError, match="no step reuses a feature: put it behind a pass that plans a cache"):
        run([("cache-correct", CacheCorrectPass())], work)
    CachePass(interval=2, branch=1).apply(work)
    single = replace(work, recorder=lambda _: list(work.recorded())[:1])  # type: ignore[arg-type,return-value]
    single.program = work.program
    with pytest.raises(DiffpressError, match="calibrate with 2 or more, not 1"):
        run([("cache-correct", CacheCorrectPass())], single)
    quantized(work)
    work.original = None
    with pytest.raises(DiffpressError, match="the float model cannot be opened anew"):
        run([("cache-correct", CacheCorrectPass())], work)
