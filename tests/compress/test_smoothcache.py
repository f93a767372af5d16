"""Errors and plans against what one computes by hand; programs that run; what is refused."""

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
from diffpress.compress.cache.measure import Changes, Distances, last_steps
from diffpress.compress.cache.smoothcache import SmoothCachePass, below, relative_errors
from diffpress.compress.families.unet_graph import modules
from diffpress.compress.run import run
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, StepProgram

STEPS = 12


def test_errors_are_means_over_layers_and_prompts() -> None:
    # A layer at 10, 11, 12, ... and one that is twice as fast: |L_i - L_{i-k}| / |L_i| = k v / (10 + v i).
    prompts = []
    for speed in (1.0, 2.0):
        found = Distances({"a": last_steps(4, 2), "b": last_steps(4, 2)})
        for step in range(4):
            value = torch.full((2, 5), 10.0 + speed * step)
            found(step, {"a": value, "b": torch.full((3,), 7.0)})
        prompts.append(found)
    changes = Changes(
        {name: np.stack([found.distances[name] for found in prompts]) for name in "ab"},
        {name: np.stack([found.sizes[name] for found in prompts]) for name in "ab"},
    )
    errors = relative_errors(changes, ["a"])
    assert errors[3, 0] == pytest.approx((1 / 13 + 2 / 16) / 2) and errors[3, 1] == pytest.approx((2 / 13 + 4 / 16) / 2)
    assert np.isnan(errors[0]).all() and np.isnan(errors[1, 1])
    np.testing.assert_allclose(relative_errors(changes, ["a", "b"]), errors / 2)  # b stands still


def test_steps_are_compared_with_the_last_computed_one() -> None:
    # Each step is 0.1 further away; the third from the last computed one is too far.
    errors = np.tile(0.1 * np.arange(1, 6), (9, 1))
    assert below(errors, 0.25).astype(int).tolist() == [0, 1, 1, 0, 1, 1, 0, 1, 0]
    assert below(errors[:, :1], 0.25).astype(int).tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]  # max_consecutive
    assert below(errors, 9.0).astype(int).tolist() == [0, 1, 1, 1, 1, 1, 0, 1, 0]
    assert not below(errors, 0.1).any()  # below, not at


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


@pytest.mark.parametrize("fields", [{"alpha": 0.3}, {"alpha": 5.0, "kinds": ("resnet", "ff"), "max_consecutive": 2}])
def test_kinds_are_reused_together_and_the_program_runs(work: Work, fields: dict[str, Any]) -> None:
    summary = run([("smoothcache", SmoothCachePass(**fields))], work)[0].summary
    program, kinds = work.program, modules(work.denoiser)
    assert len(program.variants) <= 4 and program.steps[0] == program.steps[-1] == FULL
    assert "-" in program.marks() and program.marks() in summary
    for variant in program.variants.values():
        taken = {kinds[name] for name in variant.reads}
        assert taken <= set(fields.get("kinds", ("resnet", "attn1", "attn2", "ff")))
        assert set(variant.reads) == {name for name, kind in kinds.items() if kind in taken}
    if "max_consecutive" in fields:
        assert program.marks() == "#--#--#--#-#"  # by the number in a row alone
    with torch.no_grad(), executed(work.pipeline, program) as denoiser:
        for timestep in work.sampling.timesteps:
            output = denoiser(torch.ones(2, 4, 8, 8), timestep, torch.ones(2, 5, 32), return_dict=False)[0]
            assert output.isfinite().all()


def test_what_cannot_be_planned_is_refused(work: Work) -> None:
    with pytest.raises(DiffpressError, match=r"changes less than alpha 1e-06 .* raise alpha"):
        SmoothCachePass(alpha=1e-6, prompts=1).apply(work)
    for key, value in (("alpha", 0), ("kinds", []), ("kinds", ["transformer"]), ("threshold", 3)):
        with pytest.raises(DiffpressError, match=f"pass 'smoothcache': .*{key}"):
            recipe.Recipe(name="x", passes=({"smoothcache": {key: value}},)).built()
    run([("cache", recipe.PASSES["cache"]())], work)
    with pytest.raises(DiffpressError, match="planned a cache already"):
        SmoothCachePass().requires(work)
    work.program = StepProgram((FULL,) * STEPS)
    del work.denoiser.up_blocks[1:], work.denoiser.down_blocks[:2]
    work.denoiser.mid_block = None
    with pytest.raises(DiffpressError, match="no module of kind attn1"):
        SmoothCachePass().requires(work)
