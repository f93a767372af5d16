"""Speed, memory and energy on an NVIDIA GPU: `python -m diffpress.benchmarks.gpu --json FILE [--quick]`.

diffusers (FP16 eager and compiled), ONNX Runtime with CUDA, TensorRT and TensorRT for RTX, whatever of them is
installed, run `shapes` and a pipeline of Stable Diffusion 1.5's size with random weights: uncompressed, cached, in
8 bits, and together. All have the same scheduler, steps, prompts and seeds. Every row is opened in a process of its
own, which draws its images (compared with diffusers' in FP32) and measures its calls, memory and energy; those that run
are then timed image by image, in turns with diffusers FP16 eager. What cannot run is a row with its reason.

Goes on where it was stopped: what lies in the work folder is not made again, nor measured again with the same driver
and libraries. `--prepare` makes the bundles on a machine without a GPU, whose work folder can then be copied to one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from diffpress.benchmarks import candidates, gpu_bundles, gpu_rows, machine, quality
from diffpress.benchmarks.gpu_bundles import file_name
from diffpress.benchmarks.gpu_device import ABSENT, Device
from diffpress.benchmarks.gpu_launch import Failed, Job, Launch, launched
from diffpress.benchmarks.gpu_rows import BASELINE, MODELS, RECIPES, WHOLE, Model, Row
from diffpress.errors import DiffpressError
from diffpress.paths import write_json
from diffpress.runtime import cuda

NOTE = (
    "Measured once on this device with these versions; clocks, power limits, drivers and other programs move every "
    "number. Ratios are medians of paired rounds. `sd15` has random weights: its images show nothing, its times are "
    "those of the size."
)
LATENCIES = ("p50_ms", "p90_ms", "p99_ms", "runs")


@dataclass(frozen=True)
class Bench:
    """A run of the benchmark on one GPU: where its state lies, and how much it measures."""

    work: Path
    target: str  # "sm89"
    torch: str | None  # where torch runs
    state: Path
    launch: Launch
    quick: bool = False
    retry: bool = False
    images: int = 4
    compile_mode: str = "max-autotune"
    only: Sequence[str] = ()
    lacking: dict[tuple[str, str], str] = field(default_factory=dict)  # (model, recipe) -> why it has no bundle

    def rows(self) -> list[Row]:
        """The rows to measure; what others are compared with is always among them."""
        chosen = gpu_rows.rows(self.quick)
        needed = (WHOLE, BASELINE)
        return [row for row in chosen if row in needed or not self.only or any(part in row.name for part in self.only)]

    def job(self, do: str, model: Model, rows: Iterable[Row] = (), **more: Any) -> Job:
        """As `gpu_worker` takes it."""
        return {
            "do": do,
            "model": model.name,
            "rows": [[row.runner, row.recipe] for row in rows],
            "work": str(self.work),
            "images": 1 if self.quick else self.images,
            "rounds": 5 if self.quick else model.rounds,
            "call_rounds": 10 if self.quick else 100,
            "seconds": 1 if self.quick else 5,
            "compile_mode": self.compile_mode,
            **more,
        }

    def log(self, model: Model, name: str) -> Path:
        """Where the output of a job goes."""
        return self.state / model.name / "logs" / f"{file_name(name)}.log"

    def file(self, model: Model, row: Row, kind: str = "rows", end: str = "json") -> Path:
        """Where something about a row is kept."""
        return self.state / model.name / kind / f"{file_name(row.name)}.{end}"

    def prepare(self, model: Model, recipes: Iterable[str]) -> None:
        """Make the bundles that are missing; one that cannot be made is noted and the others are made."""
        missing = [recipe for recipe in recipes if not gpu_bundles.made(self.work, model.name, recipe)]
        for recipe in (bar := tqdm(missing, desc=f"{model.name}: bundles", unit="bundle")):
            bar.set_postfix_str(recipe)
            try:
                self.launch(self.job("make", model, recipe=recipe), self.log(model, f"make {recipe}"))
            except Failed as error:
                self.lacking[model.name, recipe] = f"its bundle could not be made: {error}"

    def obstacle(self, model: Model, row: Row) -> str | None:
        """Why a row cannot even be tried."""
        found = gpu_rows.obstacle(row, self.target, self.torch)
        if found is None and (not row.in_torch or row.group == gpu_rows.CACHED):
            found = self.lacking.get((model.name, row.recipe))
        return found

    def probed(self, model: Model, row: Row) -> dict[str, Any]:
        """What is known of a row by itself: measured now, or earlier; {"reason"} where it does not run."""
        file = self.file(model, row)
        if file.exists():
            known: dict[str, Any] = json.loads(file.read_text("utf-8"))
            if not (self.retry and known["reason"]):
                return known
        reason = self.obstacle(model, row)
        if reason is not None:
            return {"reason": reason}  # not kept: the next run may find it installed
        job = self.job("probe", model, [row], drawn=str(self.file(model, row, end="npz")))
        try:
            found = {"reason": None, **self.launch(job, self.log(model, row.name))}
        except Failed as error:
            found = {"reason": str(error)}
        write_json(file, found)
        return found

    def timed(self, model: Model, rows: Sequence[Row]) -> None:
        """Time the rows of one runner together, beside the baseline; where that fails, one by one."""
        missing = [row for row in rows if not self._has_times(model, row)]
        if not missing:
            return
        beside = [BASELINE] if self._runs(model, BASELINE) else []
        try:
            self._keep_times(model, missing, [*beside, *rows], rows[0].runner)
        except Failed as together:
            for row in missing if len(rows) > 1 else ():
                plain = [row.plain] if self._runs(model, row.plain) else []
                try:
                    self._keep_times(model, [row], [*beside, *plain, row], f"{row.name} alone")
                except Failed as error:
                    write_json(self.file(model, row, "times"), {"reason": str(error)})
            if len(rows) == 1:
                write_json(self.file(model, rows[0], "times"), {"reason": str(together)})

    def _has_times(self, model: Model, row: Row) -> bool:
        file = self.file(model, row, "times")
        return file.exists() and not (self.retry and "reason" in json.loads(file.read_text("utf-8")))

    def _runs(self, model: Model, row: Row) -> bool:
        file = self.file(model, row)
        return file.exists() and json.loads(file.read_text("utf-8"))["reason"] is None

    def _keep_times(self, model: Model, kept: Sequence[Row], rows: Iterable[Row], name: str) -> None:
        chosen = list(dict.fromkeys(rows))
        found = self.launch(self.job("times", model, chosen), self.log(model, f"times {name}"))
        for row in kept:
            write_json(self.file(model, row, "times"), found[row.name])

    def measured(self, model: Model, ceilings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Every row of a model, measured."""
        rows = self.rows()
        possible = [row for row in rows if gpu_rows.obstacle(row, self.target, self.torch) is None]
        self.prepare(model, [recipe for recipe in RECIPES if any(row.recipe == recipe for row in possible)])
        known: dict[Row, dict[str, Any]] = {}
        for row in (bar := tqdm(rows, desc=f"{model.name}: rows", unit="row")):
            bar.set_postfix_str(row.name)
            known[row] = self.probed(model, row)

        def fits(row: Row) -> bool:
            return known[row]["reason"] is None and not (row.in_torch and self.torch != "cuda")

        groups = gpu_rows.by_runner(rows, fits)
        for some in tqdm(groups.values(), desc=f"{model.name}: times", unit="runner"):
            self.timed(model, some)
        return [self.entry(model, row, known[row], ceilings) for row in rows]

    def entry(self, model: Model, row: Row, known: Mapping[str, Any], ceilings: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the result."""
        head = {"name": row.name, "model": model.name, "group": row.group, "runner": row.runner, "recipe": row.recipe}
        if known["reason"] is not None:
            return {**head, "reason": known["reason"]}
        file = self.file(model, row, "times")
        times: dict[str, Any] = (
            json.loads(file.read_text("utf-8")) if file.exists() else {"reason": "it runs on the CPU here"}
        )
        faster = times.get("speedups", {})
        return {
            **head,
            **known,
            "calls": {name: judged(call, ceilings) for name, call in known["calls"].items()},
            "latency_ms": {key: times[key] for key in LATENCIES} if "reason" not in times else None,
            "times_reason": times.get("reason"),
            "speedup_vs_eager": 1.0 if row == BASELINE else faster.get(BASELINE.name),
            "speedup_vs_uncompressed": 1.0 if row == row.plain else faster.get(row.plain.name),
            **self.errors(model, row),
        }

    def errors(self, model: Model, row: Row) -> dict[str, Any]:
        """Distances of final latents and images to those of diffusers in FP32 and FP16, of the same seeds."""
        keys = ("latent_rel_l2", "latent_rel_l2_median", "latent_rel_l2_fp16", "psnr_db", "ssim")
        found: dict[str, Any] = dict.fromkeys(keys)
        drawn = candidates.stored(self.file(model, row, end="npz"))
        whole = candidates.stored(self.file(model, WHOLE, end="npz")) if self._runs(model, WHOLE) else None
        half = candidates.stored(self.file(model, BASELINE, end="npz")) if self._runs(model, BASELINE) else None
        if drawn is not None and whole is not None and row != WHOLE:
            distance = quality.relative_l2(drawn.latents, whole.latents)
            found |= {"latent_rel_l2": float(distance.mean()), "latent_rel_l2_median": float(np.median(distance))}
            found["psnr_db"] = float(np.median(quality.psnr(drawn.pixels, whole.pixels)))
            found["ssim"] = float(np.median(quality.ssim(drawn.pixels, whole.pixels)))
        if drawn is not None and half is not None and row not in (WHOLE, BASELINE):
            found["latent_rel_l2_fp16"] = float(quality.relative_l2(drawn.latents, half.latents).mean())
        return found


def judged(call: Mapping[str, Any], ceilings: Mapping[str, Any]) -> dict[str, Any]:
    """A call with what it reached of the device's ceilings.

    `of_roofline` is the least time on these ceilings over the measured one. None where one is missing.
    """
    found, work = {key: call[key] for key in LATENCIES}, call["work"]
    if work is None:
        return found
    seconds, moved = call["p50_ms"] / 1000, work["weight_bytes"] + work["activation_bytes"]
    operations = sum(work["operations"].values())
    found |= {**work, "operations_per_s": operations / seconds, "bytes_per_s": moved / seconds, "of_roofline": None}
    peaks = ceilings.get("operations_per_s", {})
    if all(peaks.get(kind) for kind in work["operations"]) and ceilings.get("bytes_per_s"):
        arithmetic = sum(count / peaks[kind] for kind, count in work["operations"].items())
        least = max(arithmetic, moved / ceilings["bytes_per_s"])
        found |= {
            "roofline_ms": least * 1000,
            "of_roofline": least / seconds,
            "of_arithmetic": arithmetic / seconds,
            "of_bandwidth": moved / ceilings["bytes_per_s"] / seconds,
        }
    return found


def run(
    bench: Bench, models: Sequence[str], described: Mapping[str, Any], file: Path, memory_bytes: int
) -> dict[str, Any]:
    """Measure the models and write the document, anew after each of them."""
    try:
        job = {"do": "ceilings", "memory_bytes": memory_bytes}
        ceilings = bench.launch(job, bench.state / "logs" / "ceilings.log")
    except Failed as error:  # the rows can do without
        ceilings = {"operations_per_s": {}, "bytes_per_s": None, "reasons": {"all": str(error)}}
    document: dict[str, Any] = {
        "device": dict(described),
        "machine": machine.machine(),
        "versions": machine.versions(),
        "note": NOTE,
        "quick": bench.quick,
        "compile_mode": bench.compile_mode,
        "models": {name: asdict(MODELS[name]) for name in models},
        "ceilings": ceilings,
        "rows": [],
    }
    for name in models:
        document["rows"] += bench.measured(MODELS[name], ceilings)
        file.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return document


def main(arguments: Sequence[str] | None = None, launch: Launch = launched) -> None:
    """Command line; exits with 2 and one line where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="bundles, engines and measured rows")
    parser.add_argument("--json", type=Path, help="the result; needed but for --prepare")
    parser.add_argument("--model", choices=list(MODELS), nargs="+", help="all, or shapes alone with --quick")
    parser.add_argument("--images", type=int, default=4, help="that are compared with diffusers' in FP32")
    parser.add_argument("--quick", action="store_true", help="few rows and rounds, to see whether everything runs")
    parser.add_argument("--only", nargs="*", default=(), help="rows whose name holds one of these")
    parser.add_argument("--prepare", action="store_true", help="make the bundles and measure nothing; needs no GPU")
    parser.add_argument("--retry", action="store_true", help="try again what failed in an earlier run")
    parser.add_argument("--compile-mode", default="max-autotune", help="of torch.compile")
    options = parser.parse_args(arguments)
    models = options.model or (["shapes"] if options.quick else list(MODELS))
    work = options.work.absolute()

    def bench(target: str, state: Path) -> Bench:
        return Bench(
            work, target, gpu_rows.torch_place(), state, launch, options.quick, options.retry, options.images,
            options.compile_mode, options.only,
        )  # fmt: skip

    try:
        if options.prepare:
            made = bench("sm89", work / "prepared")
            for name in models:
                made.prepare(MODELS[name], gpu_rows.QUICK if options.quick else RECIPES)
            if made.lacking:
                raise DiffpressError("; ".join(f"{' '.join(key)}: {why}" for key, why in made.lacking.items()))
            return
        if options.json is None:
            parser.error("--json FILE is needed: the result is written there")
        gpu = cuda.gpu()
        if gpu is None:
            raise DiffpressError(f"{ABSENT}: this benchmark measures nothing else")
        described = Device().describe()
        # What was measured with another driver or library, or otherwise, is not mixed in.
        key = json.dumps([described, machine.versions(), options.compile_mode, options.images], sort_keys=True)
        place = hashlib.sha256(key.encode()).hexdigest()[:12] + ("-quick" if options.quick else "")
        run(bench(gpu.target, work / file_name(gpu.name) / place), models, described, options.json, gpu.memory_bytes)
    except DiffpressError as error:
        parser.exit(error.exit_code, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
