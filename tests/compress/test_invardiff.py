"""Rates and thresholds against what one computes by hand; plans that keep their rules; programs that run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffpress.calibration.capture import Call
from diffpress.calibration.model import load_pipeline
from diffpress.calibration.schedule import tabulate
from diffpress.compress import recipe
from diffpress.compress.cache.execute import executed
from diffpress.compress.cache.invardiff import (
    InvarDiffPass,
    at_most,
    last_computed,
    rates,
    smallest,
    step_first,
)
from diffpress.compress.cache.measure import NONE, last_steps
from diffpress.compress.families.unet_graph import WHOLE, modules
from diffpress.compress.quantize.sensitivity import final_latents
from diffpress.compress.run import run
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, LayerQuant, StepProgram, Variant

STEPS = 12


def adjacent(positions: list[list[float]]) -> np.ndarray:
    changes = np.abs(np.diff(np.array(positions), axis=1))
    return np.concatenate([np.full((len(positions), 1), np.nan), changes], axis=1)


def test_rates_by_hand() -> None:
    # On a line at constant speed every change is as large as the one before.
    line = adjacent([[0, 1, 2, 3, 4], [0, 2, 4, 6, 8]])
    before = last_steps(5, 1)[:, 0]
    np.testing.assert_array_equal(rates(line, line, before), [np.inf, np.inf, 1, 1, 1])
    # Each change half, or a third, of the one before; the mean over prompts is of rates, not of changes.
    slower = adjacent([[0, 8, 12, 14, 15], [0, 27, 36, 39, 40]])
    np.testing.assert_allclose(rates(slower, slower, before)[2:], (1 / 2 + 1 / 3) / 2)
    # What stands still costs nothing; what starts to move does.
    still = adjacent([[5, 5, 5, 6, 6]])
    found = rates(still, still, before)
    assert found[2] == 0 and found[3] > 1e20 and found[4] == 0


def test_rates_against_an_anchor_grow_with_the_run() -> None:
    positions = np.array([[0.0, 1, 2, 3, 4, 5]])
    cached = np.array([False, False, True, True, False, False])
    anchors = last_computed(cached)
    assert anchors.tolist() == [NONE, 0, 1, 1, 1, 4]
    apart = np.abs(positions - positions[:, np.maximum(anchors, 0)])
    # |X_i - X_1| / |X_1 - X_0| = i - 1; step 5 again has the step before.
    np.testing.assert_array_equal(rates(apart, adjacent([list(positions[0])]), anchors), [np.inf, np.inf, 1, 2, 3, 1])


def test_thresholds_cache_the_expected_count() -> None:
    random = np.random.default_rng(0)
    for count, tau in ((10, 0.5), (11, 0.5), (48, 0.63), (48, 0.0), (7, 0.99)):
        found = random.permutation(count).astype(float)
        small = smallest(np.concatenate([[np.inf], found]), tau)
        assert small.sum() == int(np.ceil(tau * (count - 1) - 1e-9)) and not small[0]
        assert not small[1:].any() or found[small[1:]].max() < found[~small[1:]].min()
    assert not smallest(np.full(3, np.inf), 0.5).any()


def test_rows_of_cached_steps_end() -> None:
    row = np.array([0, 1, 1, 1, 1, 0, 1, 0], bool)
    assert at_most(row, 2).astype(int).tolist() == [0, 1, 1, 0, 1, 0, 1, 0]
    assert at_most(row, 1).astype(int).tolist() == [0, 1, 0, 1, 0, 0, 1, 0]
    assert (at_most(row, None) == row).all()


def test_steps_come_first_and_all_modules_run_after_them() -> None:
    whole = np.array([0, 0, 1, 0, 0], bool)
    sets = step_first(whole, {"a": np.ones(5, bool), "b": np.array([0, 1, 1, 1, 0], bool)}, WHOLE)
    assert sets == [frozenset("a"), frozenset("ab"), frozenset({WHOLE}), frozenset(), frozenset("a")]


@pytest.fixture
def work(tiny_pipeline: Path, tmp_path: Path) -> Work:
    pipeline = load_pipeline(str(tiny_pipeline))
    pipeline.unet.requires_grad_(False)
    sampling = tabulate(pipeline.scheduler, STEPS, 3.0, 32, 32)
    generator = torch.Generator().manual_seed(1)
    calls = [
        Call(torch.zeros(2, 4, 8, 8), torch.tensor(sampling.timesteps[:1]), torch.randn(2, 5, 32, generator=generator))
        for _ in range(2)
    ]
    return Work(pipeline, sampling, 0, lambda _: calls, lambda items, _: items, tmp_path)  # type: ignore[arg-type,return-value]


FIELDS: dict[str, dict[str, Any]] = {
    "both": {"prompts": 2},
    "modules": {"tau_step": 0, "tau_module": {"attn1": 0.6, "ff": 0.4}, "kinds": ("attn1", "attn2", "ff")},
    "deep": {"step_feature": "up_1", "max_consecutive": 2, "tau_step": 0.8, "tau_module": 0.4, "resamplings": 0},
    "early": {"rho": 0.4, "tau_step": 0.9, "tau_module": 0},
}


@pytest.mark.parametrize("name", FIELDS)
def test_plans_keep_their_rules_and_run(work: Work, name: str) -> None:
    fields = {"prompts": 1, **FIELDS[name]}
    summary = run([("invardiff", InvarDiffPass(**fields))], work)[0].summary
    program, kinds = work.program, modules(work.denoiser)
    first = max(1, int(fields.get("rho", 0.1) * STEPS))
    assert len(program.variants) <= 4 and "-" in program.marks() and program.marks() in summary
    assert program.steps[:first] == (FULL,) * first and program.steps[-1] == FULL
    reads = [set(program.variants[step].reads) for step in program.steps]
    step_feature = fields.get("step_feature", WHOLE)
    for index, taken in enumerate(reads):
        if step_feature in taken:
            assert taken == {step_feature} and reads[index + 1] <= {step_feature}
        else:
            assert {kinds[module] for module in taken} <= set(fields.get("kinds", ("resnet", "transformer")))
    assert any(step_feature in taken for taken in reads) == (fields.get("tau_step", 0.5) > 0)
    if most := fields.get("max_consecutive"):
        for name in set().union(*reads):
            marks = "".join("-" if name in taken else "#" for taken in reads)
            assert "-" * (most + 1) not in marks
    with torch.no_grad(), executed(work.pipeline, program) as denoiser:
        for timestep in work.sampling.timesteps:
            output = denoiser(torch.ones(2, 4, 8, 8), timestep, torch.ones(2, 5, 32), return_dict=False)[0]
            assert output.isfinite().all()


def test_a_plan_is_the_same_every_time(work: Work, tmp_path: Path) -> None:
    planned = InvarDiffPass(prompts=2)
    planned.apply(work)
    first = work.program
    work.program, work.scratch = StepProgram((FULL,) * STEPS), tmp_path / "other"
    planned.apply(work)
    assert work.program == first


def test_rounded_layers_are_measured(work: Work) -> None:
    from diffpress.compress.cache.measure import measured

    plain = measured(work, {WHOLE: last_steps(STEPS, 1)}, 1, "")
    weight = work.denoiser.down_blocks[0].resnets[0].conv1.weight
    coarse = LayerQuant(np.full(len(weight), float(weight.abs().max()) / 2, np.float32), None, "int8", None)
    work.quantization["down_blocks.0.resnets.0.conv1"] = coarse
    rounded = measured(work, {WHOLE: last_steps(STEPS, 1)}, 1, "")
    assert not np.allclose(plain.sizes[WHOLE], rounded.sizes[WHOLE], rtol=1e-6)


def test_little_reuse_is_nearer_than_much(work: Work) -> None:
    texts = list(work.record())
    plain = torch.stack(final_latents(work, texts))
    errors = []
    for tau in (0.2, 0.9):
        work.program = StepProgram((FULL,) * STEPS)
        InvarDiffPass(tau_step=tau, tau_module=0, prompts=2).apply(work)
        errors.append(float((torch.stack(final_latents(work, texts)) - plain).norm()))
    assert 0 < errors[0] < errors[1]


def test_what_cannot_be_planned_is_refused(work: Work) -> None:
    for fields, message in (
        ({"kinds": ("transformer", "ff")}, "a transformer contains"),
        ({"tau_module": {"ff": 0.2}}, "tau_module has ff, which kinds does not name"),
        ({"tau_step": 0, "tau_module": 0}, "nothing is reused"),
        ({"tau_step": 0, "kinds": ()}, "nothing is reused"),
    ):
        with pytest.raises(DiffpressError, match=message):
            InvarDiffPass(**fields)  # type: ignore[arg-type]
    for key, value in (("tau_step", 1), ("step_feature", "skip_1"), ("kinds", ["mlp"]), ("thresholds", 3)):
        with pytest.raises(DiffpressError, match=f"pass 'invardiff': .*{key}"):
            recipe.Recipe(name="x", passes=({"invardiff": {key: value}},)).built()
    with pytest.raises(DiffpressError, match="no step reuses anything: raise tau_step"):
        InvarDiffPass(tau_step=1e-9, tau_module=0, rho=0.8, prompts=1).apply(work)
    with pytest.raises(DiffpressError, match="no feature 'up_9'"):
        InvarDiffPass(step_feature="up_9").requires(work)
    with pytest.raises(DiffpressError, match="of 12 steps none is left"):
        InvarDiffPass(rho=0.95).requires(work)
    work.program = StepProgram((FULL, "cached") * 6, {FULL: Variant((), ("up_0",)), "cached": Variant(("up_0",))})
    with pytest.raises(DiffpressError, match="planned a cache already"):
        InvarDiffPass().requires(work)
