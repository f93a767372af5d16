"""Real sizes: full-size pipelines with random weights through every stage, with its seconds and peak memory.

    python -m diffpress.benchmarks.scale --model sd15 --json benchmarks/results/scale.json

`create` writes the pipeline; `compress` calibrates it with 8 prompts (`--prompts`) at 4 steps, quantizes to INT8,
caches every other step and exports, each graph compared with torch on the way; `parity` runs one call of the shipped
denoiser on a backend against torch; `engines` builds for one target. `--sizes` adds engines of the denoiser alone in
FP16, INT8 and INT4, for their bytes; `--stage prune` prunes a fifth of it. Every stage is a process of its own, so that
its peak is its own, and is not repeated once it is done: a broken run goes on. Rows of other models stay in the file.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffpress.benchmarks import isolated, machine
from diffpress.benchmarks.memory import high_water_bytes

PROMPTS, STEPS, INTERVAL, TARGET = 8, 4, 2, "sm89"
STAGES = ("create", "compress", "parity", "engines")
PRUNE = "prune"  # when asked for
FORMATS = ("fp16", "int8", "int4")
Found = dict[str, Any]


def recipe(file: Path, passes: Sequence[Any], prompts: int = PROMPTS) -> str:
    """Write a recipe; its path."""
    calibration = {"prompts": prompts, "steps": STEPS}
    file.write_text(json.dumps({"steps": STEPS, "calibration": calibration, "passes": list(passes)}), "utf-8")
    return str(file)


def create(folder: Path, name: str, options: Mapping[str, Any]) -> Found:
    """The pipeline, as a diffusers folder of float16 weights."""
    from diffpress.benchmarks.scale_models import MODELS, smaller
    from diffpress.benchmarks.scale_models import create as write

    divide, model = options["divide"], MODELS[name]
    if divide > 1 or options["pixels"]:
        model = smaller(model, divide, options["pixels"])
    shutil.rmtree(folder / "model", ignore_errors=True)
    for part in ("unet", "vae"):
        (folder / "model" / part).mkdir(parents=True)
    parameters = write(model, folder / "model", divide)
    return {"parameters": parameters, "bytes": _size(folder / "model")}


def compress(folder: Path, name: str, options: Mapping[str, Any]) -> Found:
    """INT8 and a cache, calibrated, exported and compared with torch."""
    from diffpress import api

    shutil.rmtree(folder / "bundle", ignore_errors=True)
    passes = [{"quantize": {"format": "int8"}}, {"cache": {"interval": INTERVAL}}]
    chosen = recipe(folder / "int8.yaml", passes, options["prompts"])
    made = api.compress(str(folder / "model"), chosen, folder / "bundle", quiet=True)
    return {
        "prompts": options["prompts"],
        "steps": STEPS,
        "cache_interval": INTERVAL,
        "passes": made.manifest["passes"],
        "bytes": _size(folder / "bundle"),
        "denoiser_bytes": made.manifest["sizes"]["denoiser_compressed"],
        "worst_rel_l2": max(entry["max_rel_l2"] for entry in made.manifest["parity"].values()),
    }


def parity(folder: Path, name: str, options: Mapping[str, Any]) -> Found:
    """The first call of the shipped denoiser, both halves of guidance, on a backend: relative error to torch.

    In torch its weights and inputs are rounded as the plan says. `float_rel_l2` is what the rounding does.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from diffpress import bundle as bundles
    from diffpress.compress.numerics.simulate import simulated
    from diffpress.export.deploy import deployable
    from diffpress.export.ship import denoiser_specs
    from diffpress.plan import FULL, Plan
    from diffpress.runtime import backends

    bundle = bundles.load(folder / "bundle")
    plan, latent = Plan.load(bundle.path / "plan"), bundle.manifest["latent"]
    unet: Any = UNet2DConditionModel.from_pretrained(folder / "model" / "unet", torch_dtype=torch.float32).eval()
    constant = {key: torch.tensor([value]) for key, value in bundle.manifest["conditions"].items()}
    text = (bundle.manifest["text"]["tokens"], bundle.manifest["text"]["hidden"])
    size = (latent["channels"], latent["height"], latent["width"])
    spec = denoiser_specs(unet, plan, size, text, constant)[FULL]
    shipped = {layer: deployable(quant) for layer, quant in plan.quantization.items()}
    with torch.no_grad():
        exact = spec.module(*spec.inputs.values())[0].numpy()
        with simulated(unet, shipped, plan.sampling.timesteps, keep=False):
            rounded = spec.module(*spec.inputs.values())[0].numpy()
    feeds = {key: value.numpy() for key, value in spec.inputs.items()}
    del unet, spec
    gc.collect()
    backend, precision = backends.available()[0]
    dialect = bundle.manifest["dialects"].get(backend, {})
    session = backends.open_session(bundle.file(dialect.get(FULL, bundle.manifest["graphs"][FULL])), backend, precision)
    session.prepare(2)
    start = time.perf_counter()
    got = session.run(feeds)["out_sample"]
    seconds = time.perf_counter() - start
    return {
        "backend": backend,
        "precision": precision,
        "call_seconds": seconds,
        "rel_l2": _error(got, rounded),
        "float_rel_l2": _error(rounded, exact),
    }


def prune(folder: Path, name: str, options: Mapping[str, Any]) -> Found:
    """A fifth of the denoiser's parameters pruned by structure, alike everywhere; nothing is exported."""
    from diffpress import api
    from diffpress.compress.recipe import load
    from diffpress.compress.run import run

    passes = [{"prune-structured": {"ratio": 0.2, "allocation": "uniform"}}]
    chosen = load(recipe(folder / "prune.yaml", passes, options["prompts"]))
    work = api.begin(str(folder / "model"), chosen, quiet=True)
    (done,) = run(chosen.built(), work)
    return {
        "prompts": options["prompts"],
        "steps": STEPS,
        "passes": [{"name": done.name, "summary": done.summary, "seconds": done.seconds}],
        "parameters": sum(parameter.numel() for parameter in work.denoiser.parameters()),
    }


def engines(folder: Path, name: str, options: Mapping[str, Any]) -> Found:
    """Engines of everything that a run needs, for one target."""
    from diffpress import api

    made = api.build(folder / "bundle", [TARGET], quiet=True)
    listed = [entry for entry in made.manifest["engines"] if entry["target"] == TARGET]
    keep = ("component", "variant", "precision", "bytes", "seconds")
    return {"target": TARGET, "engines": [{key: entry[key] for key in keep} for entry in listed]}


def engine(folder: Path, name: str, options: Mapping[str, Any], kind: str = "fp16") -> Found:
    """The whole denoiser alone, with FP16, INT8 or INT4 weights, as an engine of one target: its bytes.

    FP16 is the plain network in half precision. INT8 and INT4 are as they ship: what is not quantized is FP32.
    """
    import onnx_ir

    from diffpress.engines import library
    from diffpress.engines.builder import Builder, Job, Options
    from diffpress.export import buildable

    alone = folder / f"engine-{kind}"
    shutil.rmtree(alone, ignore_errors=True)
    try:
        _denoiser(folder, kind, alone)
        gc.collect()
        file = alone / "model.onnx"
        job = Job(file, file.name, ((1, 2, 2),))
        built = Builder(library.find(), job).build(TARGET, Options(), lambda _: None)
        precision = buildable.precision(onnx_ir.load(file))
        size = memoryview(built.engine).nbytes
        return {"target": TARGET, "precision": precision, "bytes": size, "graph_bytes": _size(alone)}
    finally:
        shutil.rmtree(alone, ignore_errors=True)


def _denoiser(folder: Path, kind: str, place: Path) -> None:
    """Its graph in a number format, which is found without calibration where weights alone are rounded."""
    import torch

    from diffpress import api
    from diffpress import bundle as bundles
    from diffpress.compress.recipe import load
    from diffpress.compress.run import run
    from diffpress.export import graphs, ship, store
    from diffpress.plan import FULL, Plan, StepProgram

    passes = [{"quantize": {"format": "int4"}}] if kind == "int4" else []
    chosen = load(recipe(folder / f"{kind}.yaml", passes))
    work = api.begin(str(folder / "model"), chosen, quiet=True)
    if kind == "int8":
        work.quantization = dict(Plan.load(bundles.read(folder / "bundle").path / "plan").quantization)
        work.program = StepProgram((FULL,) * len(work.sampling.timesteps))
    elif passes:
        run(chosen.built(), work)
    if kind != "fp16":
        ship.variants(work.pipeline, work.plan(), place, work.progress)
        return
    unet = work.pipeline.unet
    with torch.no_grad(), graphs.plain_attention(unet):
        (spec,) = ship.denoiser_specs(unet, work.plan(), *ship.sizes(work.pipeline, work.sampling)).values()
        unet.half()
        halved = {key: value if key in spec.fixed else value.half() for key, value in spec.inputs.items()}
        model = graphs.to_onnx(graphs.GraphSpec(spec.module, halved, spec.outputs, spec.fixed))
        graphs.finish(model)
        store.save({"model.onnx": model}, place)


STAGE: dict[str, Callable[[Path, str, Mapping[str, Any]], Found]] = {
    "create": create,
    "compress": compress,
    "parity": parity,
    "engines": engines,
    "prune": prune,
    **{f"engine {kind}": partial(engine, kind=kind) for kind in FORMATS},
}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _error(got: Any, wanted: Any) -> float:
    import numpy as np

    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def row(folder: Path, name: str, stage: str, options: Mapping[str, Any]) -> Found:
    """The row of a stage, run in a process of its own or as an earlier run left it."""
    folder = folder.resolve()
    found = isolated.kept(
        folder / f"{stage.replace(' ', '-')}.json",
        "diffpress.benchmarks.scale",
        {"folder": str(folder), "model": name, "stage": stage, **options},
        f"{name}: stage {stage}",
        DIFFPRESS_CACHE=str(folder / "cache"),
    )
    return {"model": name, "stage": stage, **found}


def _do(task: Mapping[str, Any]) -> Found:
    started = time.perf_counter()
    found = STAGE[task["stage"]](Path(task["folder"]), task["model"], task)
    told = {"seconds": time.perf_counter() - started, "peak_rss_bytes": high_water_bytes()}
    return {**told, "machine": machine.machine(), **found}


def written(file: Path, rows: Sequence[Found], options: Mapping[str, Any]) -> Found:
    """The document with `rows` in place of those of the same model and stage, written to `file`.

    The document's machine is this one. A row that was measured on another has a `machine` of its own: the one that it
    brings, or that of the document in which it stood.
    """
    before: Found = json.loads(file.read_text("utf-8")) if file.is_file() else {"rows": []}
    replaced = {(entry["model"], entry["stage"]) for entry in rows}
    kept = [entry for entry in before["rows"] if (entry["model"], entry["stage"]) not in replaced]
    here = machine.machine()

    def placed(entry: Found, default: Found) -> Found:
        own, rest = entry.get("machine", default), {key: value for key, value in entry.items() if key != "machine"}
        return rest if own == here else {**rest, "machine": own}

    document = {
        "machine": here,
        "versions": machine.versions(),
        **{key: value for key, value in options.items() if value not in (None, 1)},
        "rows": [*(placed(entry, before["machine"]) for entry in kept), *(placed(entry, here) for entry in rows)],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return document


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=("sd15", "sd21", "sdxl"), default=[])
    parser.add_argument(
        "--stage", nargs="+", choices=(*STAGES, PRUNE), default=list(STAGES), help="those to have run at the end"
    )
    parser.add_argument("--sizes", action="store_true", help="build the denoiser in FP16, INT8 and INT4, too")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="that calibrate; larger models take long on a CPU")
    parser.add_argument("--work", type=Path, default=Path("runs/scale"), help="models and bundles live here")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--divide", type=int, default=1, help="widths of the networks, to try things out")
    parser.add_argument("--pixels", type=int, help="along a side of the picture, the model's own if absent")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        sys.stdout.write(json.dumps(_do(json.loads(options.task))) + "\n")
        return
    if not options.model or options.json is None:
        parser.error("give --model and --json")
    size = {"divide": options.divide, "pixels": options.pixels}
    asked = {**size, "prompts": options.prompts}
    stages = [*(stage for stage in (*STAGES, PRUNE) if stage in options.stage)]
    stages += [f"engine {kind}" for kind in FORMATS] if options.sizes else []
    for name in options.model:
        for stage in stages:
            written(options.json, [row(options.work / name, name, stage, asked)], size)


if __name__ == "__main__":
    main()
