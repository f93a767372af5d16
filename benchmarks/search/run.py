"""`diffpress search` from its arguments to a bundle; the same command goes on where it was interrupted."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

import diffpress
from diffpress import bundle as bundles
from diffpress.benchmarks import document
from diffpress.benchmarks.search import base as bases
from diffpress.benchmarks.search import finals, objective, page, trial
from diffpress.benchmarks.search import report as reports
from diffpress.benchmarks.search.base import Base
from diffpress.benchmarks.search.ground import EXPORT, Ground, Settings
from diffpress.benchmarks.search.objective import LOSSES
from diffpress.benchmarks.search.space import Space, load
from diffpress.benchmarks.search.space import document as document_of
from diffpress.benchmarks.search.study import Records, Search, drive
from diffpress.benchmarks.search.workers import Local, Ray, Record, Workers, cores
from diffpress.bundle import Bundle
from diffpress.compress.cache.budget import CacheBudgetPass
from diffpress.compress.recipe import Recipe, parts
from diffpress.errors import DiffpressError
from diffpress.gates import Gate
from diffpress.paths import write, write_json
from diffpress.plan import FULL, StepProgram

SETTINGS, STUDY = "search.json", "study.sqlite3"
REPORT, PAGE, RECIPE, BUNDLE = "report.json", "report.html", "recipe.yaml", "bundle"
IMPLIED = {"speedup", "speedup_vs_uncompressed", "latent_error", "latent_error_median"}
TIMED = "cache-budget"  # the pass that plans by times it takes
WORKERS = 4  # on this machine, where nobody says how many


@dataclass(frozen=True)
class Asked:
    """What a search is asked for, beside its model and its space."""

    budgets: tuple[Gate, ...]
    minimise: str = "latent_error"
    trials: int = 40
    workers: int | None = None
    ray: str | None = None
    prompts: Path | None = None
    images: int = 16
    seed: int = 0


def search(model: str, space: str, output: Path, asked: Asked, quiet: bool = False) -> tuple[Bundle, dict[str, Any]]:
    """Search for the recipe of `space` that loses least within the budgets; returns its bundle and the report.

    `output` is a folder to make, or one of the same search to go on with. Raises `DiffpressError` for what does not
    fit together, and where no recipe keeps the budgets, naming the nearest; the front is in the folder then, too.
    """
    from diffpress.calibration import model as models

    shapes, folder = models.is_shapes(model), models.folder_of(model)
    objective.check(asked.minimise, asked.budgets, shapes)
    if folder is not None and not folder.is_dir():
        raise DiffpressError(f"there is no model at {model}: give a diffusers folder, a hub id or 'shapes'")
    opened, first = load(space)
    bases.pairs(opened)
    settings, begun = _settings(model, opened, asked, shapes), time.monotonic()
    with _claimed(output, settings, opened, first, asked.minimise):
        base = _begun(settings, opened, output, quiet)
        found = Search(
            space=opened,
            precisions=sorted(base.backends),
            first=first,
            preferred=base.preferred,
            loss=LOSSES[asked.minimise],
            budgets=asked.budgets,
            records=Records(output / "trials"),
            storage=output / STUDY,
            seed=settings.seed,
        )
        before = len(found.records)
        if before < asked.trials:
            _try(found, asked, settings, base, output, quiet)
        ground = Ground(settings, output, "finals")
        report = _finals(found, asked, ground, base, quiet)
        fields = ("trials", "minimise", "images", "seed", "workers", "ray", "prompts")
        options = {"budget": asked.budgets, **{name: getattr(asked, name) for name in fields}}
        report |= {"model": model, "space": space, "reproduce": reports.command(model, space, output, options)}
        _write(output, report)
        if report["chosen"] is None:
            raise DiffpressError(f"{reports.nothing(report, asked.budgets)}; the front is in {output / PAGE}")
        made = _ship(report, ground, quiet)
        report["bundle"] = _checked(made, report, asked, ground, base)
        report["run"] = {"trials": len(found.records) - before, "seconds": time.monotonic() - begun}
        _write(output, report)
        return made, report


def _settings(model: str, space: Space, asked: Asked, shapes: bool) -> Settings:
    """Prompts of a user calibrate, judge trials and judge finalists, a third each."""
    from diffpress.calibration import prompts as prompt_lists

    given: dict[str, Any] = {}
    if asked.prompts is not None:
        texts = list(dict.fromkeys(prompt_lists.read(asked.prompts)))
        if len(texts) < 3:
            raise DiffpressError(
                f"prompts file {asked.prompts} holds {len(texts)} different prompts: calibration, trials and finals "
                "need one each at least"
            )
        given["calibration"] = tuple(texts[::3])
        given["judged"] = tuple(text for index, text in enumerate(texts) if index % 3)
    return Settings(model, space.steps, space.guidance_scale, asked.seed, asked.images, shapes, **given)


@contextmanager
def _claimed(
    output: Path, settings: Settings, space: Space, first: Mapping[str, Recipe], minimise: str
) -> Iterator[None]:
    """Hold the folder for one search at a time; raises `DiffpressError` for a folder of something else."""
    from diffpress.calibration.model import digest
    from diffpress.runtime.lock import locked

    file, fresh = output / SETTINGS, not output.exists()
    # A search that was killed before it wrote its settings left a lock alone.
    empty = output.is_dir() and all(one.name.startswith(".") for one in output.iterdir())
    if not (fresh or empty or file.is_file()):
        raise DiffpressError(f"{output} exists already and holds no search: choose another --output")
    own = {
        "version": diffpress.__version__,
        "model": digest(settings.model),
        "settings": asdict(settings),
        "space": space.model_dump(mode="json"),
        "first": {name: recipe.model_dump(mode="json") for name, recipe in first.items()},
        "minimise": minimise,
    }
    own = json.loads(json.dumps(own))
    output.mkdir(parents=True, exist_ok=True)
    with locked(output / ".lock", "searching in the same folder"):
        before = json.loads(file.read_text("utf-8")) if file.is_file() else own
        other = next((name for name, value in own.items() if before.get(name) != value), None)
        if other is not None:
            raise DiffpressError(
                f"{output} holds a search with another {other}: choose another --output, or ask for the same"
            )
        write_json(file, own, indent=1)
        for left in output.glob(".*.partial"):  # of bundles that a killed process was writing
            shutil.rmtree(left, ignore_errors=True)
        try:
            yield
        except DiffpressError:
            if fresh and not (output / EXPORT).exists():  # not even the model could be opened
                shutil.rmtree(output, ignore_errors=True)
            raise


def _begun(settings: Settings, space: Space, output: Path, quiet: bool) -> Base:
    """The export, the images that trials are held against, and how fast the export is."""
    ground = Ground(settings, output, "trials")
    with tqdm(total=3, desc="exporting the model", disable=quiet, leave=False) as bar:
        _ = ground.bundle
        bar.set_description("drawing references")
        bar.update()
        _ = ground.reference
        bar.set_description("timing the export")
        bar.update()
        return bases.measure(ground, space)


def _workers(asked: Asked, output: Path) -> Workers:
    if asked.ray is not None:
        return Ray(asked.ray, asked.workers)
    import torch

    most = 1 if torch.cuda.is_available() else min(len(cores()), WORKERS)
    return Local(asked.workers or most, output / "logs")


def _try(found: Search, asked: Asked, settings: Settings, base: Base, output: Path, quiet: bool) -> None:
    """The trials; what can no longer reach the finals loses its graphs."""
    records = found.records
    # Who is beaten in speed and error misses limits on them, too; other limits it may be the first to keep.
    others = [gate for gate in asked.budgets if gate.metric not in IMPLIED]
    first = {trial.key_of(document_of(recipe)) for recipe in found.first.values()}
    running: dict[str, str] = {}  # key of a trial -> that of its recipe, whose graphs another trial may have made

    def task_of(suggestion: Record) -> dict[str, Any]:
        if suggestion["precision"] not in base.backends:
            raise DiffpressError(f"this search was begun where {suggestion['precision']} runs, which it does not here")
        running[suggestion["key"]] = trial.key_of(suggestion["recipe"])
        names = ("precision", "operations", "quantized", "errors")
        rivals = [
            {
                **{name: one[name] for name in names},
                "name": reports.described(one["recipe"], one["precision"]),
                "speedup": objective.speed(one),
            }
            for one in records.measured()
            if objective.keeps(others, one)
        ]
        return {
            **suggestion,
            "backend": base.backends[suggestion["precision"]],
            "export_backend": base.export,
            "eager": base.eager,
            "settings": asdict(settings),
            "place": str(output.resolve()),
            "threads": workers.threads,
            "rivals": rivals,
            "proxy": found.loss.apart and suggestion["name"] is None,
            "home": socket.gethostname(),
        }

    def heard(record: Record) -> None:
        del running[record["key"]]
        measured = records.measured()
        best = objective.choose(measured, found.loss, found.budgets)
        said = "none within the limits yet" if best is None else f"best {found.loss.of(measured[best]):.3g}"
        bar.set_postfix_str(said, refresh=False)
        bar.update()
        kept = finals.select(measured, (), found.loss, asked.budgets)
        wanted = first | {*running.values(), *(trial.key_of(one["recipe"]) for one in kept)}
        for one in records:
            if trial.key_of(one["recipe"]) not in wanted:
                trial.forget(trial.folder_of(output, one["recipe"]))

    bar = tqdm(total=asked.trials, initial=len(records), desc="trials", unit="trial", disable=quiet)
    with bar, _workers(asked, output) as workers:
        drive(found, workers, asked.trials, task_of, heard)


def _finals(found: Search, asked: Asked, ground: Ground, base: Base, quiet: bool) -> dict[str, Any]:
    """The report, without a bundle yet."""
    measured = found.records.measured()
    if not measured:
        reasons = [record["message"] for record in found.records] or list(found.refused.values())
        raise DiffpressError(
            f"none of {len(found.records)} trials could be measured; the first: {(reasons or ['nothing was tried'])[0]}"
        )
    first = {trial.key_of(document_of(recipe), base.preferred): name for name, recipe in found.first.items()}
    chosen = finals.select(measured, list(first), found.loss, asked.budgets)
    with tqdm(total=len(chosen) + 1, desc="finals", unit="finalist", disable=quiet) as bar:
        held = finals.hold(chosen, ground, base.export, lambda: bar.update())
    whole = reports.finished(held, list(found.records), found.refused, first, asked.minimise, asked.budgets, base)
    return whole | {"images": {"trials": ground.settings.images, "finals": len(ground.prompts.texts)}}


def _ship(report: Mapping[str, Any], ground: Ground, quiet: bool) -> Bundle:
    """The chosen recipe as a file, and its bundle where it is not there yet."""
    from diffpress import api

    settings, output = ground.settings, ground.place
    own = reports.of_key(report, report["chosen"])
    recipe = {**own["recipe"], "name": "searched", "description": f"{own['name']}: found by diffpress search"}
    if any(parts(entry)[0] == TIMED for entry in recipe["passes"]):
        tried, _ = trial.make(own["recipe"], trial.folder_of(output, own["recipe"]), ground, {})
        recipe["passes"] = pinned(recipe["passes"], tried.program)
    limits = ", ".join(report["budgets"])
    head = f"# {reports.numbers(report, own)} on {own['backend']} {own['precision']}, within {limits}.\n"
    write(output / RECIPE, (head + yaml.safe_dump(recipe, sort_keys=False)).encode())
    prompts = None
    if settings.calibration is not None:
        prompts = output / "calibration.txt"
        write(prompts, ("\n".join(settings.calibration) + "\n").encode())
    place = output / BUNDLE
    if (place / bundles.MANIFEST).is_file():
        there = bundles.read(place)
        if there.manifest.get("search") == own["key"]:
            return there
    if place.exists():
        shutil.rmtree(place)  # of an earlier choice
    made = api.compress(settings.model, str(output / RECIPE), place, prompts=prompts, seed=settings.seed, quiet=quiet)
    default = {"name": own["backend"], "precision": own["precision"]}
    return bundles.update(made, default_backend=default, search=own["key"])


def pinned(passes: Sequence[Any], program: StepProgram) -> list[Any]:
    """A recipe's passes, with what `TIMED` ones decided in the trial in place of them: they would measure anew."""
    reads = {name: list(variant.features) or FULL for name, variant in program.variants.items()}
    found: list[Any] = []
    for entry in passes:
        name, fields = parts(entry)
        if name != TIMED:
            found.append(entry)
            continue
        found.append({"planned": {"program": [reads.get(step, FULL) for step in program.steps]}})
        if depth := CacheBudgetPass(**fields).depth:  # it corrects what it plans
            found.append({"cache-correct": {"depth": depth}})
    return found


def _checked(made: Bundle, report: Mapping[str, Any], asked: Asked, ground: Ground, base: Base) -> dict[str, Any]:
    """How the bundle measures: it was made anew, from the recipe that is shipped with it."""
    from diffpress.runtime.pipeline import Pipeline

    own = reports.of_key(report, report["chosen"])
    pipeline = Pipeline.load(made, own["backend"], own["precision"])
    found = ground.judge(pipeline)
    if found["faults"]:
        raise DiffpressError(f"the bundle {made.path} draws broken images: {found['faults'][0]}")
    (speedup,) = finals.timed([pipeline], ground, base.export)
    sizes = document.sizes(made)
    found |= {"speedup": speedup, "size_bytes": {name: sizes[name] for name in own["size_bytes"]}}
    missed = objective.failed(asked.budgets, found)
    return {**found, "loss": LOSSES[asked.minimise].of(found), "missed": missed}


def _write(output: Path, report: Mapping[str, Any]) -> None:
    whole = document.finite(dict(report))
    write(output / REPORT, (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode())
    write(output / PAGE, page.render(whole).encode())
