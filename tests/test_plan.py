import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffpress.errors import DiffpressError
from diffpress.plan import (
    CONDITIONAL,
    FULL,
    MEAN,
    REUSE,
    Correction,
    Corrections,
    LayerQuant,
    MadeFor,
    Plan,
    Sampling,
    StepProgram,
    TemporalTable,
    Variant,
)

VARIANTS = {FULL: Variant(writes=("feature_0",)), "cached": Variant(reads=("feature_0",))}


def sampling() -> Sampling:
    terms = ((("sample", 0, 0.1 + 0.2), ("output", 0, -1e-17)), (("output", 1, 1 / 3),))
    return Sampling("DDIMScheduler", 2, 7.5, 32, 64, (999.0, 1.5), (1.0, 0.3), 14.6, terms)


def plan() -> Plan:
    layers = {
        "down_blocks.0.attn/q": LayerQuant(np.array([0.5, 0.25], np.float32), np.array([1 / 3], np.float32)),
        "up": LayerQuant(np.ones((2, 3), np.float32), None, "int4", None, np.arange(1, 7, dtype=np.float32)),
    }
    table = TemporalTable((999.0, 1.5), {"down_blocks.0.resnets.0": np.arange(6, dtype=np.float32).reshape(2, 3)})
    return Plan(sampling(), StepProgram((FULL, "cached"), VARIANTS), layers, table)


def test_a_plan_comes_back_from_disk_bit_for_bit(tmp_path: Path) -> None:
    saved = plan()
    saved.save(tmp_path / "new" / "plan")
    loaded = Plan.load(tmp_path / "new" / "plan")
    assert loaded.sampling == saved.sampling and loaded.program == saved.program
    assert loaded.quantization.keys() == saved.quantization.keys()
    for name, layer in saved.quantization.items():
        for key, value in layer.__dict__.items():
            np.testing.assert_array_equal(getattr(loaded.quantization[name], key), value)
    assert [layer.name for layer in loaded.quantization.values()] == ["int8", "int4 weights"]
    assert loaded.temporal is not None and saved.temporal is not None
    assert loaded.temporal.timesteps == saved.temporal.timesteps
    for path, table in saved.temporal.tables.items():
        np.testing.assert_array_equal(loaded.temporal.tables[path], table)
        assert loaded.temporal.tables[path].dtype == table.dtype


def test_corrections_come_back_bit_for_bit(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    features = {
        "up_1": Correction(*(random.random(shape, np.float32) for shape in ((2, 2, 3), (2, 3)))),
        "down_blocks.0.resnets.0": Correction(np.ones((2, 1, 1), np.float32), np.zeros((2, 1), np.float32)),
    }
    program = StepProgram((FULL, FULL), {FULL: Variant(writes=tuple(features)), "cached": Variant(("up_1", "up_1@1"))})
    Plan(sampling(), program, corrections=Corrections(sampling().timesteps, features)).save(tmp_path)
    loaded = Plan.load(tmp_path)
    assert loaded.corrections is not None and loaded.corrections.timesteps == (999.0, 1.5)
    assert loaded.program == program and loaded.program.variants["cached"].features == ("up_1",)
    assert loaded.corrections.features.keys() == features.keys() and loaded.temporal is None
    for name, entry in features.items():
        np.testing.assert_array_equal(loaded.corrections.features[name].scale, entry.scale)
        np.testing.assert_array_equal(loaded.corrections.features[name].offset, entry.offset)
        assert loaded.corrections.features[name].depth == entry.depth


def test_corrections_that_do_not_fit_are_refused() -> None:
    entry = Correction(np.ones((2, 1, 3), np.float32), np.zeros((2, 3), np.float32))
    with pytest.raises(DiffpressError, match="do not belong together"):
        Correction(entry.scale, entry.offset[:1])
    assert Corrections((5.0, 5.0), {"up_0": entry}).features == {"up_0": entry}
    for uneven in (
        Correction(entry.scale * [[[1]], [[2]]], entry.offset),
        Correction(entry.scale, entry.offset + np.array([[0.0], [1.0]])),
    ):
        with pytest.raises(DiffpressError, match="that of up_0 has two rows for one"):
            Corrections((5.0, 5.0), {"up_0": uneven})
    with pytest.raises(DiffpressError, match="correction of up_0 has not one row for each"):
        Corrections((5.0, 4.0, 3.0), {"up_0": entry})


def test_a_plan_of_nothing_comes_back(tmp_path: Path) -> None:
    Plan(sampling(), StepProgram((FULL, FULL))).save(tmp_path)
    loaded = Plan.load(tmp_path)
    assert loaded.quantization == {} and loaded.temporal is None
    assert loaded.program.variants == {FULL: Variant()}


def test_sampling_and_program_survive_json() -> None:
    assert Sampling.from_json(json.loads(json.dumps(sampling().to_json()))) == sampling()
    program = plan().program
    assert StepProgram.from_json(json.loads(json.dumps(program.to_json()))) == program


def test_marks_show_what_is_computed_and_what_is_reused() -> None:
    assert StepProgram((FULL, "cached", "cached", FULL), VARIANTS).marks() == "#--#"
    assert StepProgram(()).marks() == ""


@pytest.mark.parametrize(
    ("steps", "variants", "message"),
    [
        (("cached", FULL), VARIANTS, "step 0 reads feature 'feature_0' before any step wrote it"),
        ((FULL, "skipped"), VARIANTS, "step 1 runs variant 'skipped', which is not one of: full, cached"),
        (("only",), {"only": Variant()}, "needs a variant named 'full'"),
        ((FULL, "cached"), {FULL: Variant(), "cached": Variant(("feature_0",), ("feature_0",))}, "step 1 reads"),
        (("cached",), {FULL: Variant(("feature_0",))}, "variant 'full' computes everything, but reads 'feature_0'"),
    ],
)
def test_a_program_that_cannot_run_is_refused(
    steps: tuple[str, ...], variants: dict[str, Variant], message: str
) -> None:
    with pytest.raises(DiffpressError, match=message):
        StepProgram(steps, variants)


@pytest.mark.parametrize(
    ("reads", "writes", "together", "message"),
    [
        (("a@1",), (), 1, "reads 'a@1', but not 'a' itself"),
        (("a", "b", "a"), (), 1, "names feature 'a' twice"),
        ((), ("b", "b"), 1, "names feature 'b' twice"),
        ((), ("a@1",), 1, "writes 'a@1': earlier values are kept, not written"),
        (("a",), ("b",), 2, "cannot run 2 steps together: it hands out features"),
        (("a",), (), 0, "cannot run 0 steps together"),
    ],
)
def test_a_variant_that_cannot_be_is_refused(
    reads: tuple[str, ...], writes: tuple[str, ...], together: int, message: str
) -> None:
    with pytest.raises(DiffpressError, match=message):
        Variant(reads, writes, together)


def test_an_earlier_value_is_there_once_a_feature_was_written_twice() -> None:
    variants = {FULL: Variant(writes=("a",)), "cached": Variant(("a", "a@1"))}
    StepProgram((FULL, FULL, "cached"), variants)
    with pytest.raises(DiffpressError, match="step 1 reads feature 'a@1' before any step wrote it"):
        StepProgram((FULL, "cached", FULL), variants)
    # The value before the last is of a step that left a half out: as wrong as the last would be.
    with pytest.raises(DiffpressError, match=r"step 4 computes both halves .* but step 1 wrote feature 'a@1'"):
        StepProgram((FULL, FULL, FULL, "cached", "cached"), variants, (FULL, REUSE, FULL, REUSE, FULL))


def test_parts_of_another_schedule_are_refused() -> None:
    whole = plan()
    with pytest.raises(DiffpressError, match="the step program has 1 steps, the schedule 2 calls: it was made for"):
        replace(whole, program=StepProgram((FULL,)))
    entry = Correction(np.ones((2, 1, 1), np.float32), np.zeros((2, 1), np.float32))
    replace(whole, corrections=Corrections((999.0, 1.5), {"feature_0": entry}))
    with pytest.raises(DiffpressError, match=r"the corrections of timesteps 999 2 are not of the schedule's 999 1.5"):
        replace(whole, corrections=Corrections((999.0, 2.0), {"feature_0": entry}))
    with pytest.raises(DiffpressError, match=r"the temporal table of timesteps 999 are not of the schedule's 999 1.5"):
        replace(whole, temporal=TemporalTable((999.0,), {}))


def test_a_plan_keeps_what_it_was_made_for(tmp_path: Path) -> None:
    made = MadeFor("digest", sampling(), (("quantize", {"format": "int8", "exclude": ["a"]}), ("x", {})))
    replace(plan(), made_for=made).save(tmp_path)
    assert Plan.load(tmp_path).made_for == made
    plan().save(tmp_path)  # as all plans were before
    assert Plan.load(tmp_path).made_for is None


def test_guidance_of_a_program() -> None:
    guided = StepProgram((FULL, "cached", FULL, "cached"), VARIANTS, (FULL, REUSE, CONDITIONAL, CONDITIONAL))
    assert (guided.guidance_marks(), guided.marks(), guided.evaluations()) == ("#-..", "#-#-", 2.5)
    assert guided.halves(FULL) == (2, 1) and guided.halves("cached") == (1,) and guided.halves("absent") == ()
    assert StepProgram.from_json(json.loads(json.dumps(guided.to_json()))) == guided
    plain = StepProgram((FULL, "cached"), VARIANTS)
    assert "guidance" not in plain.to_json()  # bundles of before, and what is keyed by it, stay as they are
    assert StepProgram(plain.steps, VARIANTS, (FULL, FULL)) == plain
    assert (plain.guidance_marks(), plain.evaluations(), plain.halves(FULL)) == ("##", 2.0, (2,))


def test_guidance_that_ends_with_the_mean_of_both_halves() -> None:
    program = StepProgram((FULL, "cached", FULL, "cached"), VARIANTS, (FULL, MEAN, FULL, MEAN))
    assert (program.guidance_marks(), program.evaluations()) == ("#=#=", 3.0)
    assert program.halves(FULL) == (2,) and program.halves("cached") == (1,)
    assert StepProgram.from_json(json.loads(json.dumps(program.to_json()))) == program
    shared = {FULL: Variant(writes=("feature_0",)), "cached": Variant(("feature_0",), together=3)}
    apart = StepProgram((FULL, "cached", "cached", "cached"), shared, (FULL, CONDITIONAL, MEAN, MEAN))
    assert apart.runs() == ((0, 1), (1, 1), (2, 2))  # what reads other values is another call


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        (("all",) * 4, "guidance of step 0 is 'all', which is not one of: full, reuse, conditional, mean"),
        ((FULL, REUSE), "a step program of 4 steps has 2 of guidance"),
        ((CONDITIONAL, REUSE, FULL, FULL), "step 1 reuses the difference of guidance before any step computed it"),
        ((FULL, FULL, REUSE, FULL), "step 3 computes both halves .* but step 2 wrote feature 'feature_0'"),
        (
            (FULL, FULL, MEAN, FULL),
            "step 2 takes the mean of both halves .* but reads nothing that was written for both",
        ),
        ((FULL, FULL, REUSE, MEAN), "step 3 takes the mean of both halves .* 'conditional' is what it does"),
    ],
)
def test_guidance_that_cannot_run_is_refused(guidance: tuple[str, ...], message: str) -> None:
    with pytest.raises(DiffpressError, match=message):
        StepProgram((FULL, "cached", FULL, "cached"), VARIANTS, guidance)


@pytest.mark.parametrize("file", ["plan.json", "tensors.npz"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b"\xff\xfe", b"PK\x03\x04"])
def test_a_broken_plan_is_one_clear_error(tmp_path: Path, file: str, content: bytes | None) -> None:
    plan().save(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(DiffpressError, match="holds no readable plan") as caught:
        Plan.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_pickled_tensors_are_not_executed(tmp_path: Path) -> None:
    plan().save(tmp_path)
    np.savez(tmp_path / "tensors.npz", evil=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DiffpressError, match="holds no readable plan"):
        Plan.load(tmp_path)
