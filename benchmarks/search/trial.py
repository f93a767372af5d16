"""One trial: a recipe is run and exported, draws the search's images, is timed beside the uncompressed export.

It takes and returns plain data, so that it runs wherever its folder and model are found: here, or on a cluster.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from diffpress.benchmarks.search import ground as grounds
from diffpress.benchmarks.search import proxy
from diffpress.benchmarks.search.ground import Ground, Made, Settings
from diffpress.errors import DiffpressError
from diffpress.paths import write_json
from diffpress.runtime.lock import locked

MEASURED, HOPELESS, REFUSED, FAILED = "measured", "hopeless", "refused", "failed"
UNSAID = ("name", "description", "gates")  # keys of a recipe that change nothing in what it does
EXPORTED = "exported"  # networks as they were traced: most trials share theirs with others
ROUNDS = 5  # of timing, beside other trials; what ends on the front is timed again alone


def key_of(recipe: Mapping[str, Any], precision: str = "") -> str:
    """Names a recipe, or a recipe in a precision, by what it does: defaults are filled in, names do not count."""
    from diffpress.compress import recipe as recipes

    said = dict(recipe)
    with suppress(DiffpressError):  # what no file could say is told apart as it stands
        said = recipes.as_json(recipes.Recipe.model_validate({"name": "", **recipe}))
    kept = {name: value for name, value in said.items() if name not in UNSAID}
    return hashlib.sha256(json.dumps([kept, precision], sort_keys=True).encode()).hexdigest()[:12]


def run(task: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a trial; an error is a record, too, and ends no other trial.

    A task is {key, recipe, precision, backend, export_backend, eager, settings, place, threads, rivals, proxy, home}:
    `backend` runs it, `export_backend` the export that it is timed beside, which is `eager` times as fast as diffusers.
    """
    started = time.perf_counter()
    record: dict[str, Any] = {name: task[name] for name in ("key", "recipe", "precision", "backend")}
    try:
        record |= _measured(task)
    except proxy.Hopeless as error:
        record |= {"state": HOPELESS, "message": str(error)}
    except DiffpressError as error:
        record |= {"state": REFUSED, "message": str(error)}
    except Exception as error:  # noqa: BLE001 whatever a trial ends with, the others go on
        record |= {"state": FAILED, "message": f"{type(error).__name__}: {error}"}
    return record | {"total_seconds": time.perf_counter() - started, "host": socket.gethostname()}


@lru_cache(maxsize=1)
def _ground(settings: str, place: str, threads: int | None) -> Ground:
    """Kept between the trials of a process."""
    return Ground(Settings.of(json.loads(settings)), Path(place), "trials", threads)


def _measured(task: Mapping[str, Any]) -> dict[str, Any]:
    place = Path(task["place"])
    ground = _ground(json.dumps(task["settings"]), task["place"], task["threads"])
    recipe, backend, precision = task["recipe"], task["backend"], task["precision"]
    seconds: dict[str, float] = {}
    folder = folder_of(place, recipe)
    found, told = make(recipe, folder, ground, seconds, precision, task["rivals"] if task["proxy"] else ())
    own = ground.opened(found, backend, precision)
    clock = time.perf_counter()
    measured = ground.judge(own)
    seconds["draw"] = time.perf_counter() - clock
    if measured["faults"]:
        more = f" and {len(measured['faults']) - 1} more" if len(measured["faults"]) > 1 else ""
        raise DiffpressError(f"broken images: {measured['faults'][0]}{more}")
    clock = time.perf_counter()
    ratio = grounds.faster(ground.exported(task["export_backend"]), own, ground.prompts.texts, ROUNDS)
    seconds["time"] = time.perf_counter() - clock
    if task["home"] != socket.gethostname():
        shutil.rmtree(folder, ignore_errors=True)  # nobody looks for it here again
    speedup = {"vs_eager": ratio * task["eager"], "vs_uncompressed_export": ratio}
    return {
        **told,
        **measured,
        **ground.sizes(found),
        "state": MEASURED,
        "speedup": speedup,
        "seconds": seconds,
    }


def folder_of(place: Path, recipe: Mapping[str, Any]) -> Path:
    """Where the graphs of a recipe lie."""
    return place / "graphs" / key_of(recipe)


def forget(folder: Path) -> None:
    """Remove the graphs of a recipe; whatever interrupts it, what is left does not pass for whole."""
    (folder / "made.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def make(
    recipe: Mapping[str, Any],
    folder: Path,
    ground: Ground,
    seconds: dict[str, float],
    precision: str = "",
    rivals: Any = (),
) -> tuple[Made, dict[str, Any]]:
    """The denoiser of a recipe, made in `folder` where it is not there, and what was found out on the way.

    Raises `DiffpressError` for a recipe that a pass refuses, and `Hopeless` beside `rivals`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock"), "making the same recipe", progress=False):
        made = Made.read(folder)
        told_file = folder / "told.json"
        if made is not None:
            return made, json.loads(told_file.read_text("utf-8"))
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted trial left
        made, told = _make(recipe, folder, ground, seconds, precision, rivals)
        write_json(told_file, told)
        made.write(folder)
        return made, told


def _make(
    recipe: Mapping[str, Any],
    folder: Path,
    ground: Ground,
    seconds: dict[str, float],
    precision: str,
    rivals: Any,
) -> tuple[Made, dict[str, Any]]:
    from diffpress import api
    from diffpress.compress.recipe import Recipe
    from diffpress.compress.run import run as run_passes
    from diffpress.export import kept, ship

    settings, chosen, clock = ground.settings, Recipe.model_validate(recipe), time.perf_counter()
    work = api.begin(settings.model, chosen, prompts=settings.calibration, seed=settings.seed, quiet=True)
    scratch = work.scratch
    passes = run_passes(chosen.built(), work)
    seconds["passes"] = time.perf_counter() - clock
    clock = time.perf_counter()
    ops = proxy.operations(work)
    try:
        guess = proxy.give_up(work, ground, ops, precision, rivals)
        seconds["proxy"] = time.perf_counter() - clock
        clock = time.perf_counter()
        known = partial(kept.once, folder=ground.place / EXPORTED)
        files = ship.variants(work.pipeline, work.plan(), folder, work.progress, dialects=True, export=known)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    seconds["export"] = time.perf_counter() - clock
    size = sum(file.stat().st_size for file in files.values()) + (folder / "model.onnx_data").stat().st_size
    made = Made(files, work.program, work.sampling, size)
    told = {
        "operations": ops,
        "quantized": bool(work.quantization),
        "proxy": guess,
        "passes": [f"{result.name}: {result.summary}" for result in passes],
    }
    return made, told
