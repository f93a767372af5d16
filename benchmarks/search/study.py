"""The loop of a search: Optuna suggests, workers try, records are kept and told. It can be killed at any time.

TPE with several objectives (Ozaki et al. 2022, "Multiobjective tree-structured Parzen estimator") on the speedup and
the loss, with the budgets as constraints. Few trials teach it little of a space with many branches, so that two of
three suggestions are one of the best so far with one choice left to the sampler, as in a local search. This process
alone reads and writes the study; a record is a file, written before the study hears of it, so that whatever was
finished is never run again.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from diffpress.benchmarks.search import objective
from diffpress.benchmarks.search import space as spaces
from diffpress.benchmarks.search.objective import Loss
from diffpress.benchmarks.search.space import Space
from diffpress.benchmarks.search.trial import FAILED, HOPELESS, MEASURED, REFUSED, key_of
from diffpress.benchmarks.search.workers import Record, Workers
from diffpress.compress.recipe import Recipe
from diffpress.errors import DiffpressError, require
from diffpress.gates import Gate
from diffpress.paths import write_json

if TYPE_CHECKING:
    import optuna

NAME = "search"
STARTUP = 10  # trials before the sampler trusts what it has seen, those tried first among them
PATIENCE = 100  # suggestions in a row that are known or refused, after which the space holds no more
REFUSAL = 10.0  # what a refused recipe counts as in the sampler's eyes: limits missed by a share of that
BEATEN = 1.0  # and what one counts as that was given up
LOST = 2  # times the workers, and one more: so many trials in a row that fail from outside end a search
CONSTRAINT = "constraints:"  # how optuna's storage names what `Trial.set_constraint` was told
NEAREST = 3  # of the best within the limits, one of which is changed in one choice
ANYWHERE = 3  # every so many suggestions are the sampler's alone
GIVEN = "given"  # attribute of a trial that comes first: {name, recipe, precision, drawn}


class Records:
    """What trials found: a file each, by key; those that failed for another reason than their recipe are forgotten."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        files = sorted(folder.glob("*.json"), key=lambda file: (file.stat().st_mtime_ns, file.name))
        found: dict[str, Record] = {file.stem: json.loads(file.read_text("utf-8")) for file in files}
        # A worker without memory, a full disk: what failed from outside is tried again by the next run.
        self._known = {key: record for key, record in found.items() if record["state"] != FAILED}

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._known.values())

    def get(self, key: str) -> Record | None:
        """The record of a key."""
        return self._known.get(key)

    def add(self, record: Record) -> None:
        """Keep a record, on disk first."""
        write_json(self.folder / f"{record['key']}.json", record, indent=1)
        self._known[record["key"]] = record

    def measured(self) -> list[Record]:
        """Those of trials that went to the end."""
        return [record for record in self if record["state"] == MEASURED]


@dataclass
class Search:
    """What the loop needs to know, and its study."""

    space: Space
    precisions: Sequence[str]
    first: Mapping[str, Recipe]  # by name
    preferred: str  # the precision that they are tried in
    loss: Loss
    budgets: Sequence[Gate]
    records: Records
    storage: Path
    seed: int = 0
    refused: dict[str, str] = field(default_factory=dict)  # by key, recipes that need no trial to be refused
    drawn: set[str] = field(default_factory=set)  # keys of what the space has come up with
    study: optuna.Study = field(init=False)
    random: Random = field(init=False)

    def __post_init__(self) -> None:
        optuna = require("optuna", "search", "search for a recipe")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage, name = _stored(self.storage), ", ".join(sorted(map(str, self.budgets))) or NAME
        names = optuna.get_all_study_names(storage)
        directions = ["maximize", "minimize"]
        self.study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
        if names and name not in names:
            self._take_over(optuna.load_study(study_name=names[-1], storage=storage))
        before = self.study.get_trials(deepcopy=False)
        self.random = Random(self.seed + len(before))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # grouping is marked as experimental
            # Grouped: fields of a pass are drawn together where it is there. Another seed after an interruption, or the
            # same suggestions would come again.
            self.study.sampler = optuna.samplers.TPESampler(
                seed=self.seed + len(before), n_startup_trials=STARTUP, multivariate=True, group=True
            )
        for one in before:
            if one.state == optuna.trial.TrialState.RUNNING:
                # Its process was killed. Should this one be, too, it comes twice, which its record answers.
                fixed = one.system_attrs.get("fixed_params", one.params)
                self.study.enqueue_trial(fixed, user_attrs=one.user_attrs)
                self.study.tell(one.number, state=optuna.trial.TrialState.FAIL)
        queued = {one.user_attrs[GIVEN]["name"] for one in before
                  if GIVEN in one.user_attrs and not one.state.is_finished()}  # fmt: skip
        for name, recipe in self.first.items():
            if name not in queued and self.records.get(key_of(spaces.document(recipe), self.preferred)) is None:
                self._enqueue(name, recipe)

    def _take_over(self, other: optuna.Study) -> None:
        """What a study of the same search under other budgets knows, held against these."""
        import optuna

        for one in other.get_trials(deepcopy=False):
            record = self.records.get(one.user_attrs.get("key", ""))
            if not one.state.is_finished() or (record is None and one.values):
                continue
            attrs = dict(one.system_attrs)
            if record is not None and record["state"] == MEASURED:
                attrs = {key: value for key, value in attrs.items() if not key.startswith(CONSTRAINT)}
                attrs |= {f"{CONSTRAINT}{gate}": objective.missed(gate, record) for gate in self.budgets}
            self.study.add_trial(
                optuna.trial.create_trial(
                    state=one.state,
                    values=one.values,
                    params=one.params,
                    distributions=one.distributions,
                    user_attrs=one.user_attrs,
                    system_attrs=attrs,
                )
            )

    def _enqueue(self, name: str, recipe: Recipe) -> None:
        document = {**spaces.document(recipe), "name": name}
        drawn = self.space.parameters(recipe, self.preferred, self.precisions)
        given = {"name": name, "recipe": document, "precision": self.preferred, "drawn": bool(drawn)}
        self.study.enqueue_trial(drawn or {}, user_attrs={GIVEN: given})

    def suggested(self) -> tuple[optuna.Trial, Record]:
        """A trial of the study, and what it tries: {key, recipe, precision, name}."""
        self._near()
        trial = self.study.ask()
        given = trial.user_attrs.get(GIVEN)
        if given is None or given["drawn"]:  # drawn again where it was, so that the sampler learns from it
            passes, precision = self.space.draw(trial, self.precisions)
            document = self.space.document(f"search-{trial.number}", passes)
        if given is not None:
            document, precision = given["recipe"], given["precision"]
        key = key_of(document, precision)
        if given is None or given["drawn"]:
            self.drawn.add(key)
        return trial, {
            "key": key,
            "recipe": document,
            "precision": precision,
            "name": given["name"] if given else None,
        }

    def _near(self) -> None:
        """Queue one of the best with a choice left out, which the sampler then makes."""
        trials = self.study.get_trials(deepcopy=False)
        if self.queued or len(trials) % ANYWHERE == 0:
            return
        within = [one for one in trials if one.values and one.params and max(one.constraints.values(), default=0) <= 0]
        if within:
            best = self.random.choice(sorted(within, key=lambda one: one.values[1])[:NEAREST])
            left_out = self.random.choice(sorted(best.params))
            self.study.enqueue_trial({name: best.params[name] for name in best.params if name != left_out})

    @property
    def queued(self) -> bool:
        """Whether there is something that does not come from the space's own choices."""
        import optuna

        return bool(self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)))

    def tell(self, trial: optuna.Trial, record: Record) -> None:
        """Tell the study what came of a trial."""
        import optuna

        trial.set_user_attr("key", record["key"])
        if record["state"] == MEASURED:
            for gate in self.budgets:
                trial.set_constraint(str(gate), objective.missed(gate, record))
            self.study.tell(trial, [objective.speed(record), self.loss.of(record)])
            return
        trial.set_user_attr("message", record["message"])
        # Without a constraint the sampler would like what was given up better than all that misses a limit.
        trial.set_constraint("valid", BEATEN if record["state"] == HOPELESS else REFUSAL)
        self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)


def _stored(file: Path) -> optuna.storages.RDBStorage:
    """The study's file, which is not flushed to the disk all the time: what a killed process wrote stays, too."""
    import optuna
    from sqlalchemy import event

    storage = optuna.storages.RDBStorage(f"sqlite:///{file.resolve()}")
    storage.engine.dispose()  # the next connection is the first that is told
    event.listen(storage.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
    return storage


def drive(
    search: Search,
    workers: Workers,
    trials: int,
    task_of: Callable[[Record], Mapping[str, Any]],
    heard: Callable[[Record], object] = lambda _: None,
) -> bool:
    """Run trials until there are `trials` records; whether there still was something to try.

    `task_of` makes the task for what was suggested, `heard` is told every new record. Suggestions that were tried
    already, or that are no recipe, are answered at once and do not count.
    """
    running: dict[int, str] = {}  # slot -> key
    waiting: dict[str, list[optuna.Trial]] = {}  # key -> those that want its record
    more, failed = True, 0
    while True:
        while more and len(running) < workers.count and len(search.records) + len(running) < trials:
            suggestion = _fresh(search, waiting)
            if suggestion is None:
                more = False
                break
            slot = next(slot for slot in range(workers.count) if slot not in running)
            running[slot] = suggestion["key"]
            workers.start(slot, task_of(suggestion))
        if not running:
            return more
        for slot, record in workers.finished():
            search.records.add(record)
            failed = failed + 1 if record["state"] == FAILED else 0
            if failed > LOST * workers.count:
                raise DiffpressError(
                    f"{failed} trials in a row failed, the last one: {record['message']}; the same command goes on"
                )
            for trial in waiting.pop(running.pop(slot)):
                search.tell(trial, record)
            heard(record)


def _fresh(search: Search, waiting: dict[str, list[optuna.Trial]]) -> Record | None:
    """A suggestion that has to be tried, and is in `waiting` from now on; None where none comes."""
    size = search.space.size(search.precisions)
    for _ in range(PATIENCE):
        if len(search.drawn) >= size and not search.queued:
            return None
        trial, wanted = search.suggested()
        key = wanted["key"]
        if key in waiting:
            waiting[key].append(trial)
        elif (record := search.records.get(key)) is not None:
            search.tell(trial, record)
        elif (message := _wrong(search, wanted)) is not None:
            search.tell(trial, {"key": key, "state": REFUSED, "message": message})
        else:
            waiting[key] = [trial]
            return wanted
    return None


def _wrong(search: Search, wanted: Record) -> str | None:
    """Why a recipe can be refused without a trial."""
    if wanted["key"] not in search.refused:
        try:
            Recipe.model_validate(wanted["recipe"]).built()
        except DiffpressError as error:
            search.refused[wanted["key"]] = str(error)
    return search.refused.get(wanted["key"])
