"""`planned`: plans taken over where they were made for, and refused elsewhere with a line that says what differs."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.calibration.model import load_pipeline
from diffpress.calibration.schedule import tabulate
from diffpress.compress.cache.deepcache import CachePass
from diffpress.compress.cache.planned import NETWORK, PlannedPass
from diffpress.compress.families.unet_graph import encoder, modules
from diffpress.compress.recipe import PASSES, Recipe
from diffpress.compress.run import run
from diffpress.compress.schedule.guidance import GuidancePass
from diffpress.compress.work import Pass, Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, Correction, Corrections, Plan

STEPS = 4


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline: Path) -> Any:
    return load_pipeline(str(tiny_pipeline))


@pytest.fixture
def begin(pipeline: Any, tmp_path: Path) -> Callable[..., Work]:
    def make(steps: int = STEPS, guidance: float = 3.0, size: int = 32, model: str = "a" * 64) -> Work:
        sampling = tabulate(pipeline.scheduler, steps, guidance, size, size)
        recorder = lambda _: pytest.fail("not recorded")  # noqa: E731
        return Work(pipeline, sampling, 0, recorder, lambda items, _: items, tmp_path, model=model)

    return make


@dataclass(frozen=True)
class Rounds:
    """Stands in for `quantize`, which would need recordings."""

    format: str = "int8"

    def requires(self, work: Work) -> None: ...

    def apply(self, work: Work) -> str:
        return "rounded"


def saved(work: Work, folder: Path, *passes: tuple[str, Pass]) -> Path:
    """The plan of a recipe, on disk."""
    run(passes or [("cache", CachePass(interval=2, branch=1))], work)
    work.plan().save(folder)
    return folder


def test_a_plan_says_what_it_was_made_for(begin: Callable[..., Work], tmp_path: Path) -> None:
    guidance = GuidancePass(every=2)
    folder = saved(
        begin(), tmp_path / "plan", ("guidance", guidance), ("cache", CachePass(interval=2)), ("x", Rounds())
    )
    made = Plan.load(folder).made_for
    assert made is not None
    assert (made.model, made.sampling) == ("a" * 64, begin().sampling)
    # Passes after it do not count, those before it with all of their fields.
    assert [name for name, _ in made.passes] == ["guidance"]
    assert made.passes[0][1]["every"] == 2 and made.passes[0][1]["mode"] == "reuse"
    document = json.loads((folder / "plan.json").read_text())
    del document["made_for"]
    (folder / "plan.json").write_text(json.dumps(document))
    assert Plan.load(folder).made_for is None
    with pytest.raises(DiffpressError, match=r"planned: .* does not say what it was made for: compress it again"):
        PlannedPass(bundle=folder).requires(begin())


def test_a_plan_is_taken_over_with_its_corrections(begin: Callable[..., Work], tmp_path: Path) -> None:
    first = begin()
    run([("cache", CachePass(interval=2, branch=1))], first)
    entry = Correction(np.full((STEPS, 1, 32), 0.9, np.float32), np.zeros((STEPS, 32), np.float32))
    first.corrections = Corrections(first.sampling.timesteps, {"up_1": entry})
    first.plan().save(tmp_path / "plan")
    work = begin()
    (result,) = run([("planned", PlannedPass(bundle=tmp_path / "plan"))], work)
    assert work.program == first.program
    assert work.corrections is not None
    np.testing.assert_array_equal(work.corrections.features["up_1"].scale, entry.scale)
    assert "2 of 4 steps run in full, 2 graph variants" in result.summary and "1 features corrected" in result.summary
    with pytest.raises(DiffpressError, match="an earlier pass planned a cache already"):
        run([("planned", PlannedPass(bundle=tmp_path / "plan"))], work)


def test_every_difference_is_named_with_both_values(begin: Callable[..., Work], tmp_path: Path) -> None:
    taken = PlannedPass(bundle=saved(begin(), tmp_path / "plan"))
    taken.requires(begin())

    def line(work: Work) -> str:
        with pytest.raises(DiffpressError) as caught:
            taken.requires(work)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"planned: the plan of {tmp_path / 'plan'} was made for ")
        return str(caught.value).split("was made for ")[1]

    assert line(begin(steps=5)) == "steps 4, here it is 5"
    assert line(begin(guidance=7.5)) == "guidance_scale 3, here it is 7.5"
    assert line(begin(size=64)) == "resolution 32x32, here it is 64x64"
    assert line(begin(model="b" * 64)) == f"model {'a' * 12}, here it is {'b' * 12}"
    assert line(begin(steps=5, guidance=1.5)) == "steps 4, here it is 5; for guidance_scale 3, here it is 1.5"
    work, own = begin(), begin().sampling

    def other(**changes: Any) -> str:
        work.sampling = replace(own, **changes)
        return line(work)

    assert other(scheduler="PNDMScheduler") == "scheduler DDIMScheduler, here it is PNDMScheduler"
    assert other(timesteps=tuple(t - 1 for t in own.timesteps)).startswith("timesteps ")
    assert "here they are" in other(timesteps=tuple(t - 1 for t in own.timesteps))
    doubled = tuple(tuple((kind, lag, 2 * c) for kind, lag, c in row) for row in own.terms)
    assert other(terms=doubled) == "other coefficients of DDIMScheduler: its options differ here"


def test_the_network_has_to_be_the_same(begin: Callable[..., Work], tmp_path: Path) -> None:
    cache = ("cache", CachePass(interval=2))
    plain = PlannedPass(bundle=saved(begin(), tmp_path / "plain", cache, ("quantize", Rounds())))
    rounded = PlannedPass(bundle=saved(begin(), tmp_path / "rounded", ("quantize", Rounds()), cache))
    run([("planned", plain), ("quantize", Rounds())], begin())
    run([("quantize", Rounds()), ("planned", rounded)], begin())
    with pytest.raises(DiffpressError, match=r"for no pass that changes the network before it, here is quantize$"):
        run([("quantize", Rounds()), ("planned", plain)], begin())
    with pytest.raises(DiffpressError, match=r"for quantize before it, here is no pass that changes the network$"):
        run([("planned", rounded)], begin())
    with pytest.raises(DiffpressError, match=r"for quantize with format int8, here it is fp8$"):
        run([("quantize", Rounds("fp8")), ("planned", rounded)], begin())


def test_every_pass_is_known_to_change_the_network_or_not() -> None:
    for name, kind in PASSES.items():
        package = kind.__module__.split(".")[2]
        assert (name in NETWORK) == (package in ("prune", "quantize", "temporal")), name


def test_guidance_of_a_plan(begin: Callable[..., Work], tmp_path: Path) -> None:
    guidance, cache = ("guidance", GuidancePass(every=2)), ("cache", CachePass(interval=2))
    both = PlannedPass(bundle=saved(begin(), tmp_path / "both", guidance, cache))
    work = begin()
    run([("planned", both)], work)  # it brings its own
    assert work.program.guidance_marks() == "#-#-"
    run([guidance, ("planned", both)], begin())
    alone = PlannedPass(bundle=saved(begin(), tmp_path / "alone", cache))
    with pytest.raises(DiffpressError, match="made for guidance by step ####, here it is #-#-"):
        run([guidance, ("planned", alone)], begin())


def test_a_plan_that_takes_nothing_is_refused(begin: Callable[..., Work], tmp_path: Path) -> None:
    begin().plan().save(tmp_path / "plan")
    with pytest.raises(DiffpressError, match="runs every step in full: there is nothing to take over"):
        PlannedPass(bundle=tmp_path / "plan").requires(begin())


def by_hand(work: Work, *steps: Any, together: int = 1) -> Work:
    fields = {"program": list(steps), "together": together}
    run(Recipe(name="mine", passes=({"planned": fields},)).built(), work)
    return work


def test_a_program_by_hand(begin: Callable[..., Work]) -> None:
    made = by_hand(begin(), "full", "up_1", ["up_1"], [])
    assert made.program.marks() == "#--#" and made.program.variants["cached"].reads == ("up_1",)
    unet = made.denoiser
    made = by_hand(begin(), "full", "encoder", "encoder", "full", together=2)
    assert set(made.program.variants["cached"].reads) == set(encoder(unet))
    assert made.program.runs() == ((0, 1), (1, 2), (3, 1))
    made = by_hand(begin(), "full", ["*.attn2"], ["*.attn2"], "whole")
    wanted = {name for name, kind in modules(unet).items() if kind == "attn2"}
    assert set(made.program.variants["cached"].reads) == wanted and len(made.program.variants) == 3


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (("full", "up_1", "full"), "the program has 3 steps, the schedule 4 calls"),
        (("up_1", "full", "full", "full"), "step 0 reads feature 'up_1' before any step wrote it"),
        (("full", "up_9", "full", "full"), "step 1: this denoiser has no feature 'up_9': there are up_0 to up_8"),
        (("full", "time_embedding", "full", "full"), "step 1: this denoiser has no feature 'time_embedding'"),
        (("full", "*.attn3", "full", "full"), "step 1: pattern '.*attn3' matches no feature"),
        (("full", ["up_0", "up_1"], "full", "full"), "a graph reads one deep feature, not up_0, up_1"),
        (("full", "up_0", "full", ["full", "up_1"]), "step 3: this denoiser has no feature 'full'"),
    ],
)
def test_a_bad_program_by_hand_is_refused(begin: Callable[..., Work], steps: Any, message: str) -> None:
    with pytest.raises(DiffpressError, match=f"pass 'planned': planned: .*{message}"):
        by_hand(begin(), *steps)


def test_more_variants_and_calls_than_there_can_be(begin: Callable[..., Work]) -> None:
    with pytest.raises(DiffpressError, match="5 graph variants are more than 4: group the steps"):
        by_hand(begin(steps=5), "full", "up_0", "up_1", "up_2", "up_3")
    with pytest.raises(DiffpressError, match="no steps can run together: all look at their samples"):
        by_hand(begin(), "full", "up_0", "up_0", "full", together=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give either a bundle or a program"),
        ({"bundle": "there", "program": ["full"]}, "give either a bundle or a program"),
        ({"bundle": "there", "together": 2}, "together belongs to a program"),
        ({"bundle": "nowhere"}, "there is no bundle and no plan at nowhere"),
        ({"program": [["full"], 3]}, "pass 'planned': 'program"),
        ({"bundel": "b"}, "unknown key 'bundel'"),
    ],
)
def test_what_needs_no_model_is_refused_with_the_recipe(
    fields: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/plan.json").write_text("{}")
    with pytest.raises(DiffpressError, match=message):
        Recipe(name="mine", passes=({"planned": fields},)).built()


def test_a_full_step_is_written_as_full(begin: Callable[..., Work]) -> None:
    assert by_hand(begin(), "full", "up_0", ("full",), "up_0").program.steps == (FULL, "cached", FULL, "cached")
