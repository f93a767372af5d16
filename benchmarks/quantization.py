"""Every quantization method on `shapes`: `python -m diffpress.benchmarks.quantization [--quick] --json FILE`.

Each row is a recipe. Its plan is simulated in torch with the rounding that ships (or, where no target has the
arithmetic, with the rounding that was asked for), and its images are compared with FP32 of the same prompts, seeds,
scheduler and steps. Goes on where it was stopped: a row in the work folder is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffpress import api
from diffpress.benchmarks import candidates, prompts, scores
from diffpress.benchmarks.candidates import Drawn, Reference
from diffpress.benchmarks.recipe_rows import Row, file_name, head
from diffpress.compress.numerics.formats import get
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.quantize.post_training import SHORTCUTS
from diffpress.compress.recipe import Recipe
from diffpress.compress.run import run
from diffpress.compress.work import Work
from diffpress.export.deploy import deployable, exact
from diffpress.paths import write_json
from diffpress.plan import LayerQuant

KEPT = 16  # images whose latents are compared step by step
EMPTY = dict.fromkeys(("speedup_vs_eager", "speedup_vs_uncompressed"))
EVERY_STEP = {"method": "every-step", "prompts": 12}  # of 4, ranges fit the prompts too well
# Iterations of a unit and of finetuning: enough for a small model on two cores, a tenth and less of the papers'.
RECONSTRUCT = {"reconstruct": {"iterations": 600, "scale_iterations": 150, "calls": 128}}
FINETUNE = {"finetune": {"iterations": 400}}
CONVOLUTIONS = ("*.conv*", "*.proj_in", "*.proj_out", "*samplers*")


def _quantize(format: str, **fields: Any) -> dict[str, Any]:
    return {"quantize": {"format": format, **fields}}


def table() -> dict[str, Row]:
    """All rows by name, the reference first."""
    rows = {"fp32": Row("reference", (), quick=True)}
    for method in ("single", "uniform", "ndtc", "every-step"):
        rows[f"int8, {method} calibration"] = Row(
            "INT8 by calibration set", (_quantize("int8"),), {"method": method}, quick=method == "uniform"
        )
    for name in ("max", "percentile", "mse", "entropy"):
        rows[f"int8, {name} ranges"] = Row("INT8 by range", (_quantize("int8", range=name),))
    refined: dict[str, tuple[dict[str, Any], Mapping[str, Any] | None]] = {
        "shortcuts quantized, too": ({"float_inputs": ()}, None),
        "shortcuts quantized and split": ({"split": True}, None),
        "SmoothQuant": ({"scaling": "smooth"}, None),
        "3 groups of steps": ({"scales": 3}, EVERY_STEP),
        "a scale per step": ({"scales": "step"}, EVERY_STEP),
        "SmoothQuant and a scale per step": ({"scaling": "smooth", "scales": "step"}, EVERY_STEP),
    }
    for name, (fields, calibration) in refined.items():
        rows[f"int8, {name}"] = Row("INT8 refined", (_quantize("int8", **fields),), calibration)
    others: dict[str, dict[str, Any]] = {
        "fp8": {"format": "fp8"},
        "fp8, max ranges": {"format": "fp8", "range": "max"},
        "fp8, SmoothQuant": {"format": "fp8", "scaling": "smooth"},
        "float8-simulated": {"format": "float8-simulated"},
        "fp4 weights, fp8 inputs": {"format": "fp4"},
        "float4-simulated": {"format": "float4-simulated"},
        "int4 weights, blocks of 64": {"format": "int4"},
        "int4 weights, blocks of 128": {"format": "int4", "block": 128},
        "int4 weights, AWQ": {"format": "int4", "scaling": "awq"},
        "int4 weights, AWQ, linear layers": {"format": "int4", "scaling": "awq", "exclude": CONVOLUTIONS},
    }
    for name, fields in others.items():
        rows[name] = Row("other formats", ({"quantize": fields},), quick=name in ("fp8", "int4 weights, blocks of 64"))
    rows["fp8, a scale per step"] = Row("other formats", (_quantize("fp8", scales="step"),), EVERY_STEP)
    for bits in ("W4A8", "W4A4"):
        rows |= _four_bits(bits, f"{bits.lower()}-simulated")
    for name in ("INT8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG", "FP8_DEFAULT_CFG", "INT4_AWQ_CFG"):
        rows[f"modelopt {name}"] = Row("nvidia-modelopt", ({"modelopt": {"config": name}},))
    for name in ("INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG"):
        as_ours = {"modelopt": {"config": name, "exclude": SHORTCUTS}}
        rows[f"modelopt {name}, shortcuts in float"] = Row("nvidia-modelopt", (as_ours,))
    return rows


def _four_bits(bits: str, format: str) -> dict[str, Row]:
    """The methods that few bits need. Time layers stay in float but where a row's name speaks of them."""
    largest = {"range": "max", "weight_range": "max"}
    shortcuts = {"keep_eight_bits": ("*samplers*",), "float_inputs": ()}
    learned = (_quantize(format), RECONSTRUCT)
    stepped = (_quantize(format, scales="step"), RECONSTRUCT)
    chains: dict[str, tuple[tuple[Any, ...], Mapping[str, Any] | None]] = {
        "round to nearest": ((_quantize(format, **largest),), None),
        "round to nearest, every layer": (
            (
                _quantize(format, **largest, keep_eight_bits=(), float_inputs=()),
                _temporal("round-to-nearest"),
            ),
            None,
        ),
        "searched ranges": ((_quantize(format),), None),
        "searched ranges, shortcuts too": ((_quantize(format, **shortcuts),), None),
        "searched ranges, shortcuts too, split": ((_quantize(format, **shortcuts, split=True),), None),
        "Q-Diffusion": (learned, None),
        "Q-Diffusion, time layers to nearest": ((*learned, _temporal("round-to-nearest")), None),
        "Q-Diffusion, time layers reconstructed": ((*learned, _temporal("reconstruct")), None),
        "QuEST": ((*learned, _temporal("reconstruct"), FINETUNE), None),
        "Q-Diffusion with a scale per step": (stepped, EVERY_STEP),
        "TFMQ-DM": ((*stepped, _temporal("reconstruct")), EVERY_STEP),
        "Temporal Feature Matters": ((*stepped, _temporal("select")), EVERY_STEP),
    }
    return {
        f"{bits} {name}": Row(bits, passes, calibration, quick=name == "round to nearest")
        for name, (passes, calibration) in chains.items()
    }


def _temporal(method: str) -> dict[str, Any]:
    return {"temporal": {"method": method, "weight_format": "int4"}}


def stored_bytes(work: Work) -> int:
    """Bytes of the denoiser as it ships: weights in their format with their scales, all else in float32."""
    total = 4 * sum(parameter.numel() for parameter in work.denoiser.parameters())
    total += 4 * sum(buffer.numel() for buffer in work.denoiser.buffers())
    for name, layer in work.quantization.items():
        shipped, count = deployable(layer), work.denoiser.get_submodule(name).weight.numel()
        scales = sum(array.size for array in (shipped.weight_scale, shipped.input_scale, shipped.multiplier)
                     if array is not None)  # fmt: skip
        total += math.ceil(count * get(shipped.weight_format).bits / 8) + 4 * scales - 4 * count
    return total


def deploying(work: Work) -> float | None:
    """Share of the quantized weights whose layers ship with the very numbers of the plan; None without any."""
    counts = {name: work.denoiser.get_submodule(name).weight.numel() for name in work.quantization}
    whole = sum(counts[name] for name, layer in work.quantization.items() if exact(layer))
    return whole / sum(counts.values()) if counts else None


def bits(layers: Mapping[str, LayerQuant]) -> tuple[int, int]:
    """Most frequent bits of weights and of inputs."""
    if not layers:
        return 32, 32
    inputs = [get(layer.input_format).bits if layer.input_format else 32 for layer in layers.values()]
    weights = [get(layer.weight_format).bits for layer in layers.values()]
    return max(set(weights), key=weights.count), max(set(inputs), key=inputs.count)


def measure(
    name: str,
    row: Row,
    base: Work,
    chosen: prompts.Prompts,
    reference: Drawn | None,
    judging: scores.Judging,
    scratch: Path,
) -> tuple[dict[str, Any], Drawn]:
    """The row's entry, and what it drew. `scratch` is where passes keep unfinished work."""
    work = api.begin("shapes", row.recipe(name), steps=base.sampling.steps, quiet=True)
    work.scratch = scratch  # shared: rows that begin alike learn the same units
    passes = run(row.recipe(name).built(), work)
    seeds = list(range(len(chosen.texts)))
    with simulated(work.denoiser, work.quantization, work.sampling.timesteps):
        drawn = candidates.draw(Reference(work.pipeline, work.sampling), chosen.texts, seeds, 30, KEPT)
    content = judging.content(drawn.pixels)
    bits_w, bits_a = bits(work.quantization)
    entry: dict[str, Any] = {
        "name": name,
        "group": row.group,
        "bits_w": bits_w,
        "bits_a": bits_a,
        "bytes": stored_bytes(work),
        "params": sum(parameter.numel() for parameter in work.denoiser.parameters()),
    }
    compared: dict[str, Any] = {
        "latent_rel_l2": 0.0,
        "latent_rel_l2_median": 0.0,
        "psnr_db": None,
        "ssim": 1.0,
        "latent_rel_l2_per_step": None,
    }
    if reference is not None:
        found = scores.distances(drawn, reference)
        compared |= {key: found[key] for key in ("latent_rel_l2", "latent_rel_l2_median", "psnr_db", "ssim")}
        if work.sampling == base.sampling:  # the steps of another schedule end elsewhere
            compared["latent_rel_l2_per_step"] = scores.error_per_step(drawn, reference)
    entry |= compared | EMPTY
    entry |= {key: getattr(content, key) for key in ("clip_score", "frechet", "attribute_accuracy")}
    notes = [f"{result.name}: {result.summary}" for result in passes]
    spent = [result.seconds for result in passes]
    return entry | {"seconds": sum(spent), "deploys": deploying(work), "passes": notes, "pass_seconds": spent}, drawn


def alone(entry: Mapping[str, Any], rows: Mapping[str, Row], entries: Sequence[Mapping[str, Any]]) -> float:
    """Seconds the row's passes take where no other row has begun alike: what one row learns, the next reads."""
    row = rows[entry["name"]]
    total = 0.0
    for count in range(1, len(row.passes) + 1):
        alike = (other for other in entries if rows[other["name"]].beginning(count) == row.beginning(count))
        total += max(other["pass_seconds"][count - 1] for other in alike)
    return total


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/quantization"), help="measured rows live here")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="a few rows on a few images of 20 steps, in 3 minutes")
    parser.add_argument("--only", nargs="*", help="names of rows to measure, beside fp32")
    options = parser.parse_args()
    rows = {name: row for name, row in table().items() if row.quick or not options.quick}
    if options.only is not None:
        rows = {name: row for name, row in rows.items() if name == "fp32" or name in options.only}
    steps, images = (20, 24) if options.quick else (50, options.images)
    folder = options.work / f"{steps}-{images}"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = prompts.choose(images, shapes=True)
    judging = scores.Judging(chosen)
    base = api.begin("shapes", Recipe(name="fp32", steps=steps))
    reference = candidates.stored(folder / "fp32.npz")
    entries = []
    for name, row in rows.items():
        file = folder / f"{file_name(name)}.json"
        if not file.exists() or reference is None:
            entry, drawn = measure(name, row, base, chosen, reference, judging, folder / "unfinished")
            if reference is None:
                reference = drawn
                candidates.store(folder / "fp32.npz", drawn)
            write_json(file, entry)
        entries.append(json.loads(file.read_text()))
    document = {
        **head(base.sampling),
        "images": images,
        "rows": [entry | {"seconds": alone(entry, rows, entries)} for entry in entries],
    }
    options.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
