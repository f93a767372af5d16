"""Step programs made from what every step takes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffpress.calibration.model import load_pipeline
from diffpress.calibration.schedule import tabulate
from diffpress.compress.cache import check
from diffpress.compress.cache.check import check_program
from diffpress.compress.cache.deepcache import CachePass
from diffpress.compress.cache.execute import CachedDenoiser
from diffpress.compress.cache.program import program_of
from diffpress.compress.families.unet import branches
from diffpress.compress.families.unet_graph import WHOLE, encoder, feature_shapes, modules, up
from diffpress.compress.run import run
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, REUSE, Correction, Corrections, StepProgram, Variant


@pytest.fixture(scope="module")
def unet(tiny_pipeline: Path) -> Any:
    return load_pipeline(str(tiny_pipeline)).unet


def test_steps_that_take_nothing_are_full_and_write_nothing(unet: Any) -> None:
    program = program_of(unet, [()] * 3)
    assert program.steps == (FULL,) * 3 and program.variants == {FULL: Variant()}


def test_a_feature_is_written_by_those_whose_value_is_read(unet: Any) -> None:
    inner, outer = next(iter(modules(unet))), "up_0"
    program = program_of(unet, [(), (inner,), (outer,), (), (inner,)])
    assert program.steps == (FULL, "cached", "cached_2", FULL, "cached")
    # Step 1 computes up_0 anew, so that step 2 reads what it wrote; the first block's work is only ever full's.
    assert program.variants[FULL].writes == (inner,)
    assert program.variants["cached"] == Variant((inner,), (outer,))
    assert program.variants["cached_2"] == Variant((outer,))


def test_corrections_of_two_values_read_the_earlier_one(unet: Any) -> None:
    entry = Correction(np.ones((4, 2, 1), np.float32), np.zeros((4, 1), np.float32))
    corrections = Corrections((4.0, 3.0, 2.0, 1.0), {"up_1": entry})
    program = program_of(unet, [(), (), ("up_1",), ("up_1",)], corrections=corrections)
    assert program.variants["cached"] == Variant(("up_1", "up_1@1"))
    with pytest.raises(DiffpressError, match="step 1 reads feature 'up_1@1' before any step wrote it"):
        program_of(unet, [(), ("up_1",), (), ()], corrections=corrections)


def test_what_no_step_computed_is_not_read(unet: Any) -> None:
    with pytest.raises(DiffpressError, match="step 0 reads feature 'up_0' before"):
        program_of(unet, [("up_0",), ()])
    with pytest.raises(DiffpressError, match="no feature 'up_77'"):
        program_of(unet, [(), ("up_77",)])


def test_more_variants_than_a_bundle_carries_are_refused(unet: Any) -> None:
    names = list(modules(unet))[:4]
    with pytest.raises(DiffpressError, match="5 graph variants are more than 4"):
        program_of(unet, [(), *((name,) for name in names)])


def test_consecutive_steps_of_a_decoder_run_together(unet: Any) -> None:
    key, rest = (), encoder(unet)
    program = program_of(unet, [key, rest, rest, rest, key, rest], together=2)
    assert program.runs() == ((0, 1), (1, 2), (3, 1), (4, 1), (5, 1))
    economic = program_of(unet, [key, rest, rest, rest], (FULL, FULL, REUSE, REUSE), together=4)
    assert economic.runs() == ((0, 1), (1, 1), (2, 2))


def test_steps_that_look_at_their_sample_do_not_run_together(unet: Any) -> None:
    program = program_of(unet, [(), encoder(unet), encoder(unet), (), ("up_1",)], together=2)
    assert program.variants["cached"].together == 2 and program.variants["cached_2"].together == 1
    # A decoder that hands out what a later step takes runs by itself, too: of a batch no value before the last is kept.
    program = program_of(unet, [(), encoder(unet), encoder(unet), ("up_0",)], together=2)
    assert program.variants["cached"].writes == ("up_0",) and program.variants["cached"].together == 1


@pytest.fixture
def work(tiny_pipeline: Path, tmp_path: Path) -> Work:
    pipeline = load_pipeline(str(tiny_pipeline))
    sampling = tabulate(pipeline.scheduler, 4, 3.0, 32, 32)
    return Work(pipeline, sampling, 0, lambda _: pytest.fail("not recorded"), lambda items, _: items, tmp_path)


def correction(channels: int = 1, depth: int = 1, steps: int = 4) -> Correction:
    return Correction(np.ones((steps, depth, channels), np.float32), np.zeros((steps, channels), np.float32))


def test_plans_that_can_run_are_let_through(work: Work) -> None:
    check_program(work)
    names = list(modules(work.denoiser))
    corrections = Corrections(work.sampling.timesteps, {"up_1": correction(32, 2), names[-1]: correction(32)})
    work.program = program_of(work.denoiser, [(), (), ("up_1",), (names[-1],)], corrections=corrections)
    work.corrections = corrections
    check_program(work)
    work.program = program_of(work.denoiser, [(), encoder(work.denoiser), encoder(work.denoiser), ()], together=2)
    check_program(work)


def full_and(**variants: Variant) -> StepProgram:
    writes = dict.fromkeys(feature for variant in variants.values() for feature in variant.features)
    return StepProgram((FULL, FULL, *variants)[:4], {FULL: Variant(writes=tuple(writes)), **variants})


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (StepProgram((FULL,) * 5), "the plan has 5 steps, the schedule 4 calls"),
        (full_and(a=Variant(("up_9",)), b=Variant()), "no feature 'up_9': there are up_0 to up_8"),
        (full_and(a=Variant(("time_embedding.linear_1",)), b=Variant()), "no feature 'time_embedding.linear_1'"),
        (full_and(a=Variant(("up_1", "up_2")), b=Variant()), "one deep feature, not up_1, up_2"),
        (full_and(a=Variant(("up_1",), ("up_3",)), b=Variant()), "reads up_1 does not compute 'up_3'"),
        (full_and(a=Variant(("up_1",), ("up_1",)), b=Variant()), "reads up_1 does not compute 'up_1'"),
        (full_and(a=Variant(("up_1",), (), 2), b=Variant()), "variant 'a' look at their samples"),
        (full_and(a=Variant(("up_1", "up_1@1")), b=Variant()), "disagree about its value before the last"),
    ],
)
def test_plans_that_cannot_run_are_refused(work: Work, program: StepProgram, message: str) -> None:
    work.program = program
    with pytest.raises(DiffpressError, match=message):
        check_program(work)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"up_1": correction(7)}, "the correction of feature 'up_1' has 7 channels, the feature 32"),
        ({"up_99": correction()}, "no feature 'up_99'"),
        ({"up_1": correction(depth=2)}, "disagree about its value before the last"),
    ],
)
def test_corrections_that_do_not_fit_are_refused(work: Work, features: dict[str, Correction], message: str) -> None:
    work.program = program_of(work.denoiser, [(), (), ("up_1",), ()])
    work.corrections = Corrections(work.sampling.timesteps, features)
    with pytest.raises(DiffpressError, match=message):
        check_program(work)
    work.corrections = Corrections((4.0, 3.0, 2.0, 1.0), features)
    with pytest.raises(DiffpressError, match="corrections of timesteps 4 3 2 1 are not of the schedule's"):
        check_program(work)


def test_no_feature_depends_on_the_batch_and_one_that_does_is_refused(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = work.denoiser
    names = (*encoder(unet), *map(up, range(branches(unet) - 1)), WHOLE, *modules(unet))
    assert feature_shapes(unet, names, 8, 8, 2) == feature_shapes(unet, names, 8, 8, 3)
    ff = next(name for name, kind in modules(unet).items() if kind == "ff")
    network = unet.get_submodule(ff)
    work.program = program_of(unet, [(), (ff,), (), ()])
    check_program(work)

    hook = network.register_forward_hook(lambda _, __, output: output.sum(0, keepdim=True))
    with pytest.raises(DiffpressError, match="for a batch of 2: it has no row per sample"):
        check_program(work)
    hook.remove()
    monkeypatch.setattr(check, "feature_shapes", lambda unet, names, height, width, batch: {ff: (8 * batch, 32)})
    with pytest.raises(DiffpressError, match=r"depends on the batch: .16, 32. for 2 samples, .24, 32. for 3"):
        check_program(work)


def test_a_pass_that_leaves_a_bad_plan_is_named(work: Work) -> None:
    class Bad:
        def requires(self, work: Work) -> None: ...

        def apply(self, work: Work) -> str:
            work.program = full_and(a=Variant(("up_77",)), b=Variant())
            return "done"

    with pytest.raises(DiffpressError, match=r"pass 'bad' .after cache.: this denoiser has no feature 'up_77'"):
        run([("cache", CachePass(interval=2)), ("bad", Bad())], work)


def test_state_never_leaks_between_images_batches_and_odd_step_counts(unet: Any) -> None:
    """A program that looks two values back, over batches of 1, 2 and 1 images and a run that broke off."""
    entry = Correction(np.tile(np.float32([[[2.0], [-1.0]]]), (5, 1, 1)), np.zeros((5, 1), np.float32))
    timesteps = (900.0, 700.0, 500.0, 300.0, 100.0)
    corrections = Corrections(timesteps, {"up_1": entry})
    program = program_of(unet, [(), (), ("up_1",), (), ("up_1",)], corrections=corrections)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        rows: (torch.randn(rows, 4, 8, 8, generator=generator), torch.randn(rows, 5, 32, generator=generator))
        for rows in (2, 4)
    }

    @torch.no_grad()
    def image(denoiser: CachedDenoiser, rows: int, steps: int = 5) -> list[torch.Tensor]:
        sample, text = inputs[rows]
        return [denoiser(sample / (1 + step), timesteps[step], text, return_dict=False)[0] for step in range(steps)]

    alone = {rows: image(CachedDenoiser(unet, program, corrections), rows) for rows in (2, 4)}
    denoiser = CachedDenoiser(unet, program, corrections)
    for rows, steps in ((2, 5), (4, 5), (2, 3), (4, 5), (2, 5)):
        got = image(denoiser, rows, steps)
        assert all(torch.equal(a, b) for a, b in zip(got, alone[rows], strict=False))
    plain = unet(inputs[2][0] / 3, timesteps[2], inputs[2][1]).sample
    assert not torch.allclose(alone[2][2], plain, atol=1e-3)  # the cache is seen
