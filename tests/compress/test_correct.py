"""The correct pass: a known bias and a known scale of the output are found and undone, and nothing else is touched."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffpress import api
from diffpress.calibration.capture import Call
from diffpress.calibration.model import load_pipeline
from diffpress.calibration.schedule import tabulate
from diffpress.calibration.tabulated import Tabulated, playing
from diffpress.compress import recipe
from diffpress.compress.run import run
from diffpress.compress.schedule import correct
from diffpress.compress.schedule.correct import CorrectPass, basis, combined, nearest
from diffpress.compress.schedule.epsilon import scaled
from diffpress.compress.schedule.solver import make
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import Plan, Sampling
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.sampler import sample

STEPS = 10
BIAS = (0.3, -0.1, 0.02, 0.0)


@pytest.fixture
def work(shared_unet: Any, tmp_path: Path) -> Work:
    """Six prompts under the very schedule that counts as converged: all that is off is what a test puts there."""
    from diffusers import DDIMScheduler

    scheduler = make("dpm++", DDIMScheduler(beta_schedule="scaled_linear", beta_end=0.012).config, "karras")
    sampling = tabulate(scheduler, STEPS, 3.0, 64, 64)
    generator = torch.Generator().manual_seed(1)
    calls = [
        Call(torch.zeros(2, 4, 8, 8), torch.tensor([t]), torch.randn(2, 5, 32, generator=generator))
        for _ in range(6)
        for t in sampling.timesteps[:1]
    ]
    pipeline = SimpleNamespace(unet=copy.deepcopy(shared_unet), scheduler=scheduler)
    made = Work(pipeline, sampling, 0, lambda _: calls, lambda items, _: items, tmp_path)  # type: ignore[arg-type,return-value]
    made.original = lambda: shared_unet
    return made


def biased(work: Work) -> None:
    work.denoiser.conv_out.bias += torch.tensor(BIAS)


def louder(work: Work, factor: float = 1.02) -> None:
    work.denoiser.conv_out.weight *= factor
    work.denoiser.conv_out.bias *= factor


def apply(work: Work, **fields: Any) -> tuple[str, list[dict[str, Any]]]:
    summary = run([("correct", CorrectPass(**{"reference_steps": STEPS, **fields}))], work)[0].summary
    return summary, work.tables["correct"]


def test_a_known_bias_is_measured_and_subtracted(work: Work) -> None:
    biased(work)
    before = work.sampling
    summary, rows = apply(work, epsilon_scaling="none")
    np.testing.assert_allclose(np.array(work.sampling.offsets), np.tile(BIAS, (STEPS, 1)), atol=1e-6)
    assert replace(work.sampling, offsets=()) == before
    assert isinstance(work.pipeline.scheduler, Tabulated)
    assert rows[0]["judged"] > 0.05 and rows[1]["judged"] < 1e-4 and rows[1]["kept"]
    assert "mean errors subtracted" in summary and "kept" in summary


def test_a_known_scale_is_found_and_undone(work: Work) -> None:
    louder(work)
    own = work.sampling
    summary, rows = apply(work, mean=False)
    wanted = scaled(own, work.pipeline.scheduler, [1.02] * STEPS)
    assert work.sampling.offsets == () and "epsilon divided by 1.02" in summary
    for row, other in zip(work.sampling.terms, wanted.terms, strict=True):
        assert [term[:2] for term in row] == [term[:2] for term in other]
        np.testing.assert_allclose([term[2] for term in row], [term[2] for term in other], rtol=2e-4)
    assert rows[0]["judged"] > 30 * rows[1]["judged"]


def test_a_scale_that_rises_with_the_timestep_is_found(work: Work) -> None:
    wanted = [1.01 + 0.01 * timestep / 1000 for timestep in work.sampling.timesteps]
    work.sampling = scaled(work.sampling, work.pipeline.scheduler, [1 / divisor for divisor in wanted])
    _, rows = apply(work, mean=False, epsilon_scaling="linear")
    assert rows[1]["kept"] and rows[0]["judged"] > 30 * rows[1]["judged"]
    assert f"{wanted[0]:.3f}" in rows[1]["correction"] and f"{wanted[-1]:.3f}" in rows[1]["correction"]


def test_a_scale_far_off_is_followed_no_farther_than_is_sane(work: Work) -> None:
    louder(work, 3.0)
    _, rows = apply(work, mean=False)
    divisor = float(rows[1]["correction"].split()[-1])
    assert 1 < divisor <= 1.5


def test_both_at_once(work: Work) -> None:
    louder(work)
    biased(work)
    _, rows = apply(work)
    assert [row["correction"].split()[0] for row in rows] == ["none", "mean", "epsilon"]
    assert rows[2]["judged"] < rows[1]["judged"] < rows[0]["judged"] / 2


def test_what_gains_nothing_is_left_out(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, sampling = work.pipeline.scheduler, work.sampling
    summary, rows = apply(work)
    assert work.sampling is sampling and work.pipeline.scheduler is scheduler
    assert [row.get("kept") for row in rows] == [None, False, False]
    assert summary.endswith("the schedule stays as it was") and summary.count("gains nothing") == 2
    # The judges are the second half: an error that the first half alone has is none of theirs.
    work.tables.clear()
    biased(work)
    monkeypatch.setattr(correct, "_gains", lambda before, after: len(before) != 3)
    assert [row.get("kept") for row in apply(work)[1]] == [None, False, False]
    assert work.sampling is sampling


def test_a_gain_has_to_be_more_than_chance() -> None:
    before = torch.tensor([0.02, 0.03, 0.02, 0.8])
    assert correct._gains(before, before * 0.95)
    assert not correct._gains(before, before)
    assert not correct._gains(before, before * torch.tensor([0.8, 1.2, 0.8, 1.15]))
    # One picture that tips over decides nothing.
    assert not correct._gains(before, before * torch.tensor([1.05, 1.05, 1.05, 0.1]))


def test_an_interrupted_run_samples_the_float_model_once(work: Work, shared_unet: Any) -> None:
    biased(work)
    apply(work, mean=False)
    work.tables.clear()
    asked: list[Tensor] = []
    hook = shared_unet.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0]))
    inner = shared_unet.conv_in.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0]))
    work.sampling = tabulate(work.pipeline.scheduler.base, STEPS, 3.0, 64, 64)
    apply(work, mean=False)
    hook.remove()
    inner.remove()
    assert asked == []


def test_least_squares_weigh_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randn(3, 4, 2, 2, generator=generator) for _ in range(2)]
    residual = 0.5 * columns[0] - 2 * columns[1]
    residual[2] += 100  # an image that is another one
    found = nearest(columns, residual, torch.tensor([1.0, 2.0, 1e-12]))
    np.testing.assert_allclose(found, [0.5, -2], atol=1e-3)


def test_bases_span_what_they_say(work: Work) -> None:
    times = np.array(work.sampling.timesteps)
    np.testing.assert_allclose(combined([0.1], basis("constant", work.sampling, 1000)), np.full(STEPS, 1.1))
    linear = combined([0.1, -0.2], basis("linear", work.sampling, 1000))
    np.testing.assert_allclose(linear, 1.1 - 0.2 * times / 1000)


def offset(table: Sampling) -> Sampling:
    rows = np.random.default_rng(5).normal(size=(len(table.timesteps), 4))
    return replace(table, offsets=tuple(tuple(float(value) for value in row) for row in rows))


@pytest.mark.parametrize("solver", ["ddim", "dpm++", "euler"])
def test_offsets_are_subtracted_from_outputs_in_both_runtimes(solver: str) -> None:
    from diffusers import DDIMScheduler

    scheduler = make(solver, DDIMScheduler(beta_schedule="scaled_linear").config)  # type: ignore[arg-type]
    plain = tabulate(scheduler, 5, 3.0, 64, 64)
    table = offset(plain)
    shifts = torch.tensor(table.offsets)[:, None, :, None, None]
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * plain.init_noise_sigma
    *_, by_hand = sample(plain, lambda i, s, t: np.tanh(s) - shifts[i].numpy(), x.numpy())
    *_, ours = sample(table, lambda i, s, t: np.tanh(s), x.numpy())
    np.testing.assert_allclose(ours, by_hand, rtol=1e-5, atol=1e-5)
    played = playing(scheduler, table)
    assert isinstance(played, Tabulated) and playing(scheduler, plain) is scheduler
    for t in played.timesteps:
        x = played.step(played.scale_model_input(x, t).tanh(), t, x).prev_sample
    np.testing.assert_allclose(x.numpy(), by_hand, rtol=1e-5, atol=1e-5)
    assert Sampling.from_json(json.loads(json.dumps(table.to_json()))) == table
    assert "offsets" not in plain.to_json()  # as versions before there were any wrote it, and read it


FLAT = (0.1,) * 4


@pytest.mark.parametrize("offsets", [(FLAT,) * 4, (FLAT, (0.1,), *(FLAT,) * 3), ((),) * 5, ((float("nan"),) * 4,) * 5])
def test_malformed_offsets_are_refused(offsets: tuple[tuple[float, ...], ...]) -> None:
    from diffusers import DDIMScheduler

    table = replace(tabulate(DDIMScheduler(clip_sample=False), 5, 3.0, 64, 64), offsets=offsets)
    with pytest.raises(DiffpressError, match="offsets are no") as caught:
        list(sample(table, lambda i, s, t: s, np.zeros((1, 4, 2, 2), np.float32)))
    assert "\n" not in str(caught.value)
    fits = replace(table, offsets=((0.1,) * 4,) * 5)
    with pytest.raises(DiffpressError, match="offsets have 4 channels, latents 3"):
        list(sample(fits, lambda i, s, t: s, np.zeros((1, 3, 2, 2), np.float32)))


def test_what_it_cannot_do_is_refused(work: Work) -> None:
    with pytest.raises(DiffpressError, match="'correct' has to be the last pass"):
        recipe.Recipe(name="x", passes=("correct", "quantize")).built()
    with pytest.raises(DiffpressError, match="corrects nothing"):
        recipe.Recipe(name="x", passes=({"correct": {"mean": False, "epsilon_scaling": "none"}},)).built()
    apply(work)
    with pytest.raises(DiffpressError, match="keep one of the two"):
        apply(work)
    work.tables.clear()
    work.recorder = lambda _: list(work.recorded())[:1]  # type: ignore[arg-type,return-value]
    work._recorded = (work._recorded[0], work.recorder(None)) if work._recorded else None  # type: ignore[arg-type]
    with pytest.raises(DiffpressError, match="calibrate with 2 or more, not 1"):
        apply(work)
    work.pipeline.scheduler.register_to_config(prediction_type="flow_prediction")
    with pytest.raises(DiffpressError, match=r"correct: prediction type .* set epsilon_scaling to none"):
        apply(work)
    work.original = None
    with pytest.raises(DiffpressError, match="float model cannot be opened"):
        apply(work)


PASSES = [
    {"schedule": {"solver": "dpm++", "sigmas": [14.6, 3.1, 0.8, 0.15, 0.03]}},
    "temporal-table",
    {"cache": {"interval": 2}},
    {"correct": {"reference_steps": 10}},
]


def test_a_bundle_runs_the_corrections_that_torch_found(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffpress.compress.cache.execute import executed

    monkeypatch.setattr(correct, "_gains", lambda before, after: True)  # random networks have nothing to correct
    chosen = recipe.Recipe(name="x", steps=6, calibration={"prompts": 2, "steps": 4}, passes=tuple(PASSES))
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(chosen.model_dump(include={"steps", "calibration", "passes"})))
    bundle = api.compress(str(tiny_pipeline), str(file), tmp_path / "bundle", quiet=True)
    sampling = Sampling.from_json(bundle.manifest["sampling"])
    plan = Plan.load(bundle.file("plan"))
    assert len(sampling.offsets) == 4 and len(sampling.offsets[0]) == 4 and plan.sampling == sampling
    assert bundle.manifest["passes"][-1]["summary"].count("kept") == 2
    prompts, seeds = ["a red ring", "a blue star"], [3, 4]
    got = Pipeline.load(bundle, "onnxruntime", "fp32")(prompts, seeds, keep_latents=True).latents[-1]
    # The same in torch: the pipeline's own loop with the table and the program.
    pipeline = load_pipeline(str(tiny_pipeline))
    pipeline.scheduler = playing(pipeline.scheduler, sampling)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.no_grad(), executed(pipeline, plan.program):
        wanted = pipeline(prompts, num_inference_steps=4, generator=generators, output_type="latent").images.numpy()
    assert np.linalg.norm(got - wanted) < 1e-4 * np.linalg.norm(wanted)
