"""The loop with artificial objectives: what it finds, what it runs, and what it remembers."""

import json
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from diffpress.benchmarks.search import objective
from diffpress.benchmarks.search import space as spaces
from diffpress.benchmarks.search.objective import LOSSES
from diffpress.benchmarks.search.study import GIVEN, Records, Search, drive
from diffpress.benchmarks.search.trial import key_of
from diffpress.errors import DiffpressError
from diffpress.gates import parse

Record = dict[str, Any]
Write = Callable[[str], str]
Objective = Callable[[Mapping[str, Any], str], Record]
SPACE = """
first: [fp32, fast]
passes:
  - schedule: {solver: [unipc, ddim], steps: {from: 4, to: 40}}
  - cache: [null, {interval: {from: 2, to: 5}}]
  - quantize: [null, {format: int8, range: l2.4}]
"""
BUDGETS = [parse("speedup >= 6"), parse("bytes <= 0.5x")]


@pytest.fixture
def artificial(measured: Callable[..., Record]) -> Objective:
    """Few steps and caches are fast, many steps and full ones near; a cache hurts DDIM more; INT8 is small."""

    def answer(recipe: Mapping[str, Any], precision: str) -> Record:
        given = [entry for entry in recipe["passes"] if isinstance(entry, dict)]
        passes = {name: fields for entry in given for name, fields in entry.items()}
        schedule, interval = passes.get("schedule", {}), passes.get("cache", {}).get("interval", 1)
        steps, ddim = schedule.get("steps", 50), schedule.get("solver", "ddim") == "ddim"
        error = (3.0 if ddim else 1.0) / steps**1.5 + (interval - 1) ** 2 * (0.02 if ddim else 0.004)
        found = measured(150 / (steps * (0.3 + 0.7 / interval) + 3), error + (0.002 if "quantize" in passes else 0))
        found["size_bytes"]["denoiser_compressed"] = 280 if "quantize" in passes else 1000
        return found

    return answer


def opened(file: str, folder: Path, budgets: Any = BUDGETS, seed: int = 0) -> Search:
    space, first = spaces.load(file)
    folder.mkdir(exist_ok=True)
    return Search(
        space=space,
        precisions=["fp32"],
        first=first,
        preferred="fp32",
        loss=LOSSES["latent_error"],
        budgets=budgets,
        records=Records(folder / "trials"),
        storage=folder / "study.sqlite3",
        seed=seed,
    )


def all_there_is(artificial: Objective) -> list[float]:
    """The loss of every recipe of the space within the limits."""
    losses = []
    for solver, steps, interval, int8 in product(("unipc", "ddim"), range(4, 41), (1, 2, 3, 4, 5), (False, True)):
        passes: list[Any] = [{"schedule": {"solver": solver, "steps": steps}}]
        passes += [{"cache": {"interval": interval}}] * (interval > 1) + [{"quantize": {}}] * int8
        found = artificial({"passes": passes}, "fp32")
        if objective.keeps(BUDGETS, found):
            losses.append(LOSSES["latent_error"].of(found))
    return losses


def test_few_trials_come_near_the_best_within_the_limits(
    space_file: Write, tmp_path: Path, inline: Any, artificial: Objective
) -> None:
    """740 recipes, 320 of them within the limits; 40 trials end in the best tenth of these."""
    known = all_there_is(artificial)
    assert len(known) == 320
    for seed in range(2):
        found, workers = opened(space_file(SPACE), tmp_path / str(seed), seed=seed), inline(artificial)
        assert drive(found, workers, 40, dict)
        records = found.records.measured()
        assert len(records) == 40 == len(set(workers.asked))
        chosen = objective.choose(records, found.loss, BUDGETS)
        assert chosen is not None
        assert sum(loss < found.loss.of(records[chosen]) for loss in known) < 32
        # Limits draw the search: of what it came up with itself, more lies within them than of the space.
        assert sum(objective.keeps(BUDGETS, one) for one in records) > 20


def test_most_suggestions_change_one_choice_of_one_of_the_best(
    space_file: Write, tmp_path: Path, inline: Any, artificial: Objective
) -> None:
    found = opened(space_file(SPACE), tmp_path)
    drive(found, inline(artificial), 30, dict)
    trials = found.study.get_trials()
    near = [one for one in trials if GIVEN not in one.user_attrs and "fixed_params" in one.system_attrs]
    assert len(trials) / 2 < len(near) < len(trials) * 0.7
    for one in near:
        kept = one.system_attrs["fixed_params"].items()
        before = [other for other in trials[: one.number] if kept <= other.params.items()]
        good = [other for other in before if other.values and max(other.constraints.values()) <= 0]
        assert any(len(other.params) == len(kept) + 1 for other in good)


def test_recipes_that_come_first_are_the_first_trials_and_teach_the_sampler(
    space_file: Write, tmp_path: Path, inline: Any, artificial: Objective
) -> None:
    found, workers = opened(space_file(SPACE), tmp_path), inline(artificial)
    drive(found, workers, 4, dict)
    first = [key_of(spaces.document(recipe), "fp32") for recipe in found.first.values()]
    assert workers.asked[:2] == first
    trials = found.study.get_trials()
    assert [trial.user_attrs["key"] for trial in trials[:2]] == first
    assert not trials[0].params  # fp32 has no schedule, which the space always has
    assert not trials[1].params  # nor has it the table of fast


def test_a_first_recipe_of_the_space_is_drawn_in_it(
    space_file: Write, tmp_path: Path, inline: Any, artificial: Objective
) -> None:
    text = "{first: [cache], passes: [{cache: [null, {interval: {from: 2, to: 5}, branch: 0}]}]}"
    found = opened(space_file(text), tmp_path)
    drive(found, inline(artificial), 1, dict)
    (trial,) = found.study.get_trials()
    assert trial.params == {"cache": "cache", "cache: cache.interval": 3}
    assert trial.values == pytest.approx([150 / (50 * (0.3 + 0.7 / 3) + 3), 3 / 50**1.5 + 0.08])


def test_a_recipe_is_never_run_twice_and_a_small_space_comes_to_an_end(
    space_file: Write, tmp_path: Path, inline: Any, artificial: Objective
) -> None:
    found, workers = opened(space_file("passes: [{cache: {interval: [2, 3, 4]}}]"), tmp_path), inline(artificial)
    assert not drive(found, workers, 40, dict)
    assert len(workers.asked) == len(set(workers.asked)) == 3 == len(found.records)
    told = {trial.user_attrs["key"]: trial.values for trial in found.study.get_trials() if trial.values}
    assert told.keys() == set(workers.asked)


def test_what_no_pass_would_take_is_refused_at_once_with_its_reason(
    space_file: Write, tmp_path: Path, inline: Any, artificial: Objective
) -> None:
    text = "passes: [{correct: [null, {}]}, {cache: [null, {interval: [2, 3]}]}]"
    found, workers = opened(space_file(text), tmp_path), inline(artificial)
    assert not drive(found, workers, 40, dict)
    assert len(workers.asked) == 4  # of six: nothing, correct, and both caches
    assert set(found.refused.values()) == {
        "recipe: 'correct' has to be the last pass: it corrects what the others leave"
    }
    refused = [trial for trial in found.study.get_trials() if "message" in trial.user_attrs]
    assert refused and all(trial.constraints["valid"] > 0 and trial.state.name == "PRUNED" for trial in refused)


def test_trials_that_end_early_count_and_tell_why(
    space_file: Write, tmp_path: Path, inline: Any, artificial: Objective
) -> None:
    def moody(recipe: Mapping[str, Any], precision: str) -> Record:
        steps = next((entry["schedule"]["steps"] for entry in recipe["passes"] if "schedule" in entry), 0)
        if steps % 3 == 0:
            return {"state": ("hopeless", "refused", "failed")[steps % 9 // 3], "message": f"{steps} steps"}
        return artificial(recipe, precision)

    found = opened(space_file("passes: [{schedule: {steps: {from: 10, to: 60}}}]"), tmp_path)
    drive(found, inline(moody), 20, dict)
    assert len(found.records) == 20 and 0 < len(found.records.measured()) < 20
    ended = [trial for trial in found.study.get_trials() if trial.state.name == "PRUNED"]
    assert {trial.user_attrs["message"] for trial in ended} == {
        record["message"] for record in found.records if record["state"] != "measured"
    }


def test_limits_reach_the_sampler(space_file: Write, tmp_path: Path, inline: Any, artificial: Objective) -> None:
    found = opened(space_file(SPACE), tmp_path)
    drive(found, inline(artificial), 12, dict)
    for trial in found.study.get_trials():
        record = found.records.get(trial.user_attrs["key"])
        assert record is not None
        assert trial.constraints.keys() == {str(gate) for gate in BUDGETS}
        assert (max(trial.constraints.values()) <= 0) == objective.keeps(BUDGETS, record)


def test_a_search_that_was_stopped_goes_on_with_what_it_has(
    space_file: Write, tmp_path: Path, inline: Any, artificial: Objective
) -> None:
    file = space_file(SPACE)
    alone, workers = opened(file, tmp_path / "one"), inline(artificial)

    class Killed(Exception):
        pass

    def until(recipe: Mapping[str, Any], precision: str) -> Record:
        if len(alone.records) == 7:
            raise Killed
        return artificial(recipe, precision)

    workers.answer = until
    with pytest.raises(Killed):
        drive(alone, workers, 12, dict)
    running = [trial for trial in alone.study.get_trials() if trial.state.name == "RUNNING"]
    assert len(running) == 2  # their results never came
    before = {file.name: file.read_bytes() for file in (tmp_path / "one/trials").iterdir()}
    assert len(before) == 7

    again, others = opened(file, tmp_path / "one"), inline(artificial)
    drive(again, others, 12, dict)
    assert len(again.records) == 12 and len(others.asked) == 5
    assert {record["key"] for record in again.records} == {*workers.asked, *others.asked}
    assert set(others.asked[:2]) == {*workers.asked} - {Path(name).stem for name in before}  # what was running
    assert all((tmp_path / "one/trials" / name).read_bytes() == content for name, content in before.items())
    states = [trial.state.name for trial in again.study.get_trials()]
    assert "RUNNING" not in states and states.count("FAIL") == 2


def test_a_record_that_the_study_never_heard_of_is_told_and_not_run_again(
    space_file: Write, tmp_path: Path, inline: Any, artificial: Objective
) -> None:
    file = space_file("passes: [{cache: {interval: [2, 3, 4]}}]")
    found = opened(file, tmp_path)
    recipe = {"name": "x", "passes": [{"cache": {"interval": 3}}]}
    key = key_of(recipe, "fp32")
    own = {"key": key, "recipe": recipe, "precision": "fp32", "backend": "none"}
    found.records.add(own | artificial(recipe, "fp32"))
    workers = inline(artificial)
    drive(found, workers, 3, dict)
    assert len(workers.asked) == 2 and key not in workers.asked
    told = {trial.user_attrs["key"] for trial in found.study.get_trials()}
    assert told <= {record["key"] for record in found.records}


def test_records_are_read_as_they_were_written(tmp_path: Path, measured: Callable[..., Record]) -> None:
    records = Records(tmp_path)
    for key in ("b", "a"):
        records.add(measured(2.0, 0.1, key=key))
    again = Records(tmp_path)
    assert [record["key"] for record in again] == ["b", "a"]
    assert again.get("a") == json.loads(json.dumps(measured(2.0, 0.1, key="a"))) and again.get("c") is None


def test_a_recipe_is_known_by_what_it_does() -> None:
    recipe = {"name": "a", "description": "one", "passes": [{"cache": {"interval": 3, "branch": 0}}]}
    same = {"passes": ["cache"], "name": "b", "gates": ["speedup >= 2"], "steps": 50}
    assert key_of(recipe, "fp32") == key_of(same, "fp32")
    others = [recipe, {"passes": [{"cache": {"interval": 2}}]}, {"passes": []}, {"passes": ["correct", "cache"]}]
    assert len({key_of(other, "fp32") for other in others} | {key_of(recipe, "bf16")}) == 5


def failing(recipe: Mapping[str, Any], precision: str) -> Record:
    return {"state": "failed", "message": "the disk is full"}


def test_what_fails_from_outside_ends_the_search_and_is_tried_again(
    space_file: Write, tmp_path: Path, inline: Any, artificial: Objective
) -> None:
    file = space_file(SPACE)
    with pytest.raises(DiffpressError, match="5 trials in a row failed, the last one: the disk is full"):
        drive(opened(file, tmp_path), inline(failing), 40, dict)
    found = opened(file, tmp_path)
    assert len(found.records) == 0
    drive(found, inline(artificial), 6, dict)
    first = {key_of(spaces.document(recipe), "fp32") for recipe in found.first.values()}
    assert first <= {record["key"] for record in found.records.measured()}


def test_other_budgets_go_on_with_what_is_known_held_against_them(
    space_file: Write, tmp_path: Path, inline: Any, artificial: Objective
) -> None:
    file = space_file(SPACE)
    before, workers = opened(file, tmp_path, [parse("speedup >= 6")]), inline(artificial)
    drive(before, workers, 12, dict)
    other = parse("bytes <= 0.5x")
    found = opened(file, tmp_path, [other])
    told = [trial for trial in found.study.get_trials() if trial.values]
    assert len(told) == sum(1 for trial in before.study.get_trials() if trial.values) > 0
    for trial in told:
        record = found.records.get(trial.user_attrs["key"])
        assert record is not None and trial.constraints == {str(other): objective.missed(other, record)}
    again = inline(artificial)
    drive(found, again, 14, dict)
    assert len(again.asked) == 2 and not {*again.asked} & {*workers.asked}


def test_what_was_given_up_misses_the_limits_in_the_samplers_eyes(
    space_file: Write, tmp_path: Path, inline: Any
) -> None:
    found = opened(space_file(SPACE), tmp_path)
    drive(found, inline(lambda *_: {"state": "hopeless", "message": "beaten"}), 3, dict)
    assert all(trial.constraints["valid"] > 0 for trial in found.study.get_trials() if "key" in trial.user_attrs)
