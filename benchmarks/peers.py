"""Ours and the peers side by side: `python -m diffpress.benchmarks.peers [--quick] --json FILE [--work DIR]`.

On `shapes`, in images: every contender draws the same captions from the same seeds, at 50 DDIM steps and at 20 and 12
steps of DPM-Solver++, and is then timed image by image. At Stable Diffusion 1.5's size, with random weights, in single
calls of the denoiser with both halves of guidance. Speed and quality are in every row, against diffusers' eager FP32
pipeline: its 50 DDIM steps on `shapes`, its calls with the same inputs at 1.5's size.

Every contender has a process of its own, and an environment of its own where its versions clash with ours, so one that
cannot be installed, crashes or draws NaN is a row with its reason and the others go on. Images come first; times are
taken in the end, in turns with diffusers' process: one draws, then the other, and each takes its own time.

Goes on where it was stopped: what lies in the work folder is not made or measured again; --retry tries what failed once
more. Nothing else should run on the machine. 1.5's size needs 20 GB of memory and 50 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import diffpress
from diffpress.benchmarks import candidates, machine, peers_rows, peers_venv, prompts, quality, scores
from diffpress.benchmarks.gpu_launch import Failed
from diffpress.benchmarks.latency import paired_ratio, summary
from diffpress.benchmarks.peers_bench import Bench, Found, Start
from diffpress.benchmarks.peers_link import Answers, Worker
from diffpress.benchmarks.peers_rows import CALL, CONVERGED, DDIM, ENVIRONMENTS, OWN, REFERENCE, Contender, Model
from diffpress.benchmarks.peers_worker import Task
from diffpress.benchmarks.recipe_rows import file_name
from diffpress.calibration.model import SHAPES
from diffpress.errors import DiffpressError
from diffpress.runtime.lock import locked

IMAGES, QUICK_IMAGES = 192, 16
ROUNDS = {SHAPES: 15, CALL: 5}
LIMIT_S = 7200.0  # of one answer: compressing a model of 1.5's size takes most of an hour
VENVS = "environments"  # the folder of those
CALIBRATION = 16  # prompts for peers that are calibrated
# Libraries that would report home, or ask a hub.
ENVIRON = {
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "ORT_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
    "PRUNA_METRICS_ENABLED": "false", "NNCF_CI": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
KEYS = (
    "bits_w", "bits_a", "bytes", "params", "latent_rel_l2", "latent_rel_l2_median", "latent_rel_l2_converged",
    "latent_rel_l2_converged_median", "psnr_db", "ssim", "clip_score", "frechet", "attribute_accuracy",
    "speedup_vs_eager", "speedup_vs_uncompressed", "images_per_second", "p50_ms", "p90_ms", "p99_ms", "runs",
    "seconds", "deploys", "backend", "program", "note", "reason",
)  # fmt: skip


# -- rows --------------------------------------------------------------------------------------------------------------


def entry(bench: Bench, model: Model, contender: Contender, schedule: str) -> Found:
    """A row of the result; one that does not run has its reason, and None for all numbers."""
    chosen = model.schedules.get(schedule)
    head: Found = {
        "name": f"{contender.name}, {schedule}",
        "contender": contender.name,
        "group": "peers" if contender.peer else "diffpress",
        "model": model.name,
        "peer": contender.peer,
        "environment": contender.environment,
        "schedule": chosen.words if chosen else None,
        "steps": chosen.steps if chosen else None,
        **dict.fromkeys(KEYS),
    }
    known = bench.known("rows", model, contender.name, schedule) or {"reason": "it was not drawn"}
    if known["reason"] is not None:
        return head | {"reason": known["reason"]}
    found = head | {key: known[key] for key in (*KEYS, "schedule", "steps") if key in known}
    for part in (errors, speeds):
        try:
            found |= part(bench, model, contender, schedule, known)
        except Failed as error:
            found["reason"] = str(error)
    return found


def errors(bench: Bench, model: Model, contender: Contender, schedule: str, known: Mapping[str, Any]) -> Found:
    """Distances to what the reference draws, and what images show; of calls the distances of their outputs."""
    if model.name == CALL:
        outputs = np.load(bench.outputs(model, contender.name, schedule))
        apart = quality.relative_l2(outputs, bench.wanted(model, known["timesteps"]))
        return {"latent_rel_l2": float(apart.mean()), "latent_rel_l2_median": float(np.median(apart))}
    own = candidates.stored(bench.images(model, REFERENCE, DDIM.name))
    drawn, converged = candidates.stored(bench.images(model, contender.name, schedule)), bench.converged(model)
    if own is None or drawn is None or converged is None:
        raise Failed(f"there is nothing to compare it with: {REFERENCE} has not drawn")
    near, there = scores.distances(drawn, own), scores.distances(drawn, converged)
    content = bench.judging.content(drawn.pixels)
    names = ("latent_rel_l2", "latent_rel_l2_median")
    return {
        **{key: near[key] for key in (*names, "psnr_db", "ssim")},
        **({"psnr_db": None} if (contender.name, schedule) == (REFERENCE, DDIM.name) else {}),  # to itself
        **{key.replace("l2", "l2_converged"): there[key] for key in names},
        **{key: getattr(content, key) for key in ("clip_score", "frechet", "attribute_accuracy")},
    }


def speeds(bench: Bench, model: Model, contender: Contender, schedule: str, _: Mapping[str, Any]) -> Found:
    """Times of a row, and its paired ratios; raises `Failed` where it was not timed."""
    times = bench.known("times", model, contender.name, schedule) or {"reason": "it was drawn but not timed"}
    if "reason" in times:
        raise Failed(f"no times: {times['reason']}")
    standard = next(iter(model.schedules))
    own = paired_ratio(times["reference"], times["own"])
    told = summary(times["own"])
    # A schedule of its own has no uncompressed row: what it stands for is the model's.
    beside = bench.known("times", model, contender.plain, standard if schedule == OWN else schedule) or {}
    plain = paired_ratio(beside["reference"], beside["own"]) if "own" in beside else None
    first = (contender.name, schedule) == (REFERENCE, standard)
    return {
        **told,
        "speedup_vs_eager": 1.0 if first else own,
        "speedup_vs_uncompressed": own / plain if plain and contender.plain != contender.name else None,
    }


def pace(bench: Bench, model: Model, pairs: Sequence[tuple[Contender, str]]) -> float | None:
    """Images a second of the reference over all rounds of the run: the machine's own speed drifts between the rows.

    `pairs` are the rows: a contender and the name of its schedule.
    """
    known = [bench.known("times", model, contender.name, schedule) or {} for contender, schedule in pairs]
    times = [ms for found in known for ms in found.get("reference", ())]
    return 1000 / float(np.median(times)) if times and model.name != CALL else None


# -- a run -------------------------------------------------------------------------------------------------------------


def measured(bench: Bench, model: Model) -> list[Found]:
    """Every row of a model: first what all draw, then times."""
    for contender in (bar := tqdm(bench.contenders.values(), desc=f"{model.name}: drawing", unit="contender")):
        bar.set_postfix_str(contender.name)
        bench.draw(model, contender)
    kept: list[Answers] = []

    def beside() -> Answers:
        """The reference's process, which stays; another one where it has ended."""
        if kept and not kept[0].alive:
            kept.pop().close()
        if not kept:
            kept.append(bench.start(bench.contenders[REFERENCE], model))
        return kept[0]

    try:
        for contender in (bar := tqdm(bench.contenders.values(), desc=f"{model.name}: times", unit="contender")):
            bar.set_postfix_str(contender.name)
            bench.time(model, contender, beside)
    finally:
        for worker in kept:
            worker.close()
    pairs = [(contender, name) for contender in bench.contenders.values() for name in contender.schedules(model)]
    rows = [entry(bench, model, contender, schedule) for contender, schedule in pairs]
    rate = pace(bench, model, pairs)
    for row in rows:
        if rate is not None and row["speedup_vs_eager"] is not None:
            row["images_per_second"] = rate * row["speedup_vs_eager"]
    return rows


def task(contender: Contender, model: Model, work: Path, texts: Sequence[str]) -> Task:
    """What a worker is told."""
    schedules = {**model.schedules, peers_rows.CONVERGED.name: CONVERGED}
    return Task(
        name=contender.name,
        make=contender.make,
        options=dict(contender.options),
        model=model.name,
        source=model.source,
        latent=model.latent,
        text=model.text,
        side=model.side,
        guidance=model.guidance,
        schedules={
            name: {"scheduler": peers_rows.scheduler(model, schedule), "steps": schedule.steps}
            for name, schedule in schedules.items()
        },
        work=str(work),
        texts=list(texts),
        single=model.name == CALL,
    )


def starting(work: Path, texts: Sequence[str]) -> Start:
    """Starts contenders in their environments; every library takes the threads that it takes by itself."""
    # The package alone, and not what is installed beside it, which would hide an environment's own versions.
    place, package = work / "path", Path(diffpress.__file__).parent
    place.mkdir(exist_ok=True)
    if not (place / package.name).exists():
        (place / package.name).symlink_to(package)
    # Threads that somebody allowed this process are not theirs.
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | ENVIRON | {
        "PYTHONPATH": os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
    }  # fmt: skip

    def start(contender: Contender, model: Model) -> Answers:
        python, name = Path(sys.executable), contender.environment
        if name is not None:
            python = peers_venv.python_of(name, ENVIRONMENTS[name], work / VENVS)
        told = json.dumps(asdict(task(contender, model, work, texts)))
        command = [str(python), "-m", "diffpress.benchmarks.peers_worker", told]
        log = work / "logs" / f"{model.name}-{file_name(contender.name)}.log"
        return Worker(command, log, environ, LIMIT_S)

    return start


def run(
    bench: Bench, models: Sequence[Callable[[], Model]], environments: Path, file: Path, quick: bool = False
) -> Found:
    """Measure the models and write the document, anew after each."""
    document: Found = {
        "machine": machine.machine(),
        "versions": machine.versions(),
        "environments": {},
        "sampling": {"scheduler": "DDIMScheduler", "steps": DDIM.steps},
        "images": len(bench.chosen.texts),
        "quick": quick,
        "rows": [],
    }
    for opened in models:
        document["rows"] += measured(bench, opened())
        document["environments"] = peers_venv.installed(environments)
        file.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return document


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/peers"), help="environments, graphs, bundles and rows")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="few contenders, images and rounds, and a small model")
    parser.add_argument("--images", type=int, help=f"that are drawn, {IMAGES} or with --quick {QUICK_IMAGES}")
    parser.add_argument("--model", choices=(SHAPES, CALL), nargs="+", default=(SHAPES, CALL))
    parser.add_argument("--only", nargs="*", help="contenders whose name holds one of these, beside diffusers FP32")
    parser.add_argument("--retry", action="store_true", help="try again what failed in an earlier run")
    options = parser.parse_args(arguments)
    quick: bool = options.quick
    images: int = (QUICK_IMAGES if quick else IMAGES) if options.images is None else options.images
    if images < 2:
        parser.error(f"--images is {images}: at least 2 are needed")
    chosen = {name: one for name, one in peers_rows.contenders().items() if one.quick or not quick}
    if options.only is not None:
        chosen = {
            name: one for name, one in chosen.items() if name == REFERENCE or any(p in name for p in options.only)
        }
        if len(chosen) == 1:
            parser.error(f"no contender's name holds {', '.join(options.only)}: {'; '.join(peers_rows.contenders())}")
    work = (options.work / ("quick" if quick else "full")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    models = {SHAPES: lambda: peers_rows.shapes(quick), CALL: lambda: peers_rows.sd15(work / "models" / CALL, quick)}
    bench = Bench(
        work / f"{images}-images",
        chosen,
        prompts.choose(images, shapes=True),
        starting(work, peers_rows.calibration_texts(CALIBRATION)),
        dict.fromkeys(ROUNDS, 3) if quick else ROUNDS,
        options.retry,
    )
    try:
        with locked(work / ".lock", "comparing in the same folder"):
            run(bench, [models[name] for name in options.model], work / VENVS, options.json, quick)
    except DiffpressError as error:
        parser.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()
