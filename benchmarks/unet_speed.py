"""A call of a U-Net of SD 1.5's size, FP32 against INT8: `python -m diffpress.benchmarks.unet_speed --json FILE`.

The weights are random, so nothing is said about quality; the arithmetic and the sizes are the real ones. The graphs of
a backend take turns in one process. Beside them stand the ceilings of this machine: large matrix products in int8, bf16
and fp32. ONNX Runtime's INT8 is timed in its dialect (`export.dialect`), as bundles ship it, and as the plain Q/DQ
graph; its FP32 as exported, and with the dialect's attention, so that it shows what the integers alone bring.
Needs about 18 GB of memory and 6 GB of disk; the graphs stay in the work folder and are not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffpress.benchmarks import ceilings, machine
from diffpress.benchmarks.latency import alternate, paired_ratio, summary
from diffpress.calibration.capture import Call
from diffpress.calibration.statistics import observe_inputs
from diffpress.compress.families import unet as family
from diffpress.compress.families.unet_graph import UNetGraph
from diffpress.compress.numerics.formats import get
from diffpress.compress.numerics.ranges import weight_scale
from diffpress.compress.quantize.post_training import QuantizePass
from diffpress.export import dialect, graphs, qdq, store
from diffpress.export.attention import fuse_attention
from diffpress.export.graphs import GraphSpec
from diffpress.export.ship import dialect_file_of, file_of
from diffpress.plan import FULL, LayerQuant
from diffpress.runtime.backends import open_session

SIDE, TOKENS, WIDTH = 64, 77, 768
STANDARD, DIALECT = file_of(FULL), dialect_file_of(FULL)
# graph, backend, precision of what is not quantized
RUNS = {
    "openvino fp32": (f"fp32/{STANDARD}", "openvino", "fp32"),
    "openvino bf16": (f"fp32/{STANDARD}", "openvino", "bf16"),
    "openvino int8": (f"int8/{STANDARD}", "openvino", "fp32"),
    "openvino int8, rest bf16": (f"int8/{STANDARD}", "openvino", "bf16"),
    "onnxruntime fp32": (f"fp32/{STANDARD}", "onnxruntime", "fp32"),
    "onnxruntime fp32, attention fused": (f"fp32/{DIALECT}", "onnxruntime", "fp32"),
    "onnxruntime int8, plain Q/DQ": (f"int8/{STANDARD}", "onnxruntime", "fp32"),
    "onnxruntime int8": (f"int8/{DIALECT}", "onnxruntime", "fp32"),
}
# By backend: run -> the key of how many times faster than it a row is
REFERENCES = {
    "openvino": {"openvino fp32": "speedup_vs_fp32", "openvino bf16": "speedup_vs_bf16"},
    "onnxruntime": {
        "onnxruntime fp32": "speedup_vs_fp32",
        "onnxruntime fp32, attention fused": "speedup_vs_fp32_attention_fused",
    },
}


def build() -> Any:
    """Stable Diffusion 1.5's U-Net with random weights: 859.5 M parameters."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(sample_size=SIDE, cross_attention_dim=WIDTH)  # its other defaults are 1.5's
    return unet.eval().requires_grad_(False)


def inputs(batch: int) -> dict[str, Tensor]:
    """Noise, a timestep in the middle, random text states."""
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(batch, 4, SIDE, SIDE, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(batch, TOKENS, WIDTH, generator=generator),
    }


def quantization(unet: Any, feeds: dict[str, Tensor]) -> dict[str, LayerQuant]:
    """INT8 as `quantize` gives it by default, ranges by their maxima over one call."""
    layers = family.quantizable(unet)
    call = Call(feeds["sample"], feeds["timestep"], feeds["encoder_hidden_states"])

    def run(one: Call) -> Any:
        return unet(one.sample, one.timestep, encoder_hidden_states=one.text)

    seen = observe_inputs(run, layers, [call], lambda items, _: items)
    options = QuantizePass(format="int8")
    found = {}
    for name, module in layers.items():
        weight_format, input_format = options.formats_of(name)
        scale = weight_scale(module.weight, get(weight_format), "max").numpy()
        largest = np.array([seen[name][0].amax / 127], np.float32)
        found[name] = LayerQuant(scale, largest if input_format else None, weight_format, input_format)
    return found


def make(folder: Path) -> None:
    """Write fp32 and int8, each as the standard graph and in ONNX Runtime's dialect, where they are not there yet."""
    missing = [name for name in ("fp32", "int8") if not (folder / name / "done").exists()]
    if not missing:
        return
    unet = build()
    feeds = inputs(1)
    plan = quantization(unet, feeds) if "int8" in missing else {}
    with graphs.plain_attention(unet):
        for name in missing:
            spec = GraphSpec(UNetGraph(unet), inputs(2), ("out_sample",))
            model = graphs.to_onnx(spec)
            if name == "int8":
                qdq.insert(model, plan)
            graphs.finish(model)
            rewritten = dialect.onnxruntime(model)
            if rewritten is None:  # nothing in int8
                rewritten = model.clone()
                fuse_attention(rewritten)
            store.save({STANDARD: model, DIALECT: rewritten}, folder / name)
            (folder / name / "done").touch()


def measure(folder: Path, rounds: int, wanted: list[str]) -> dict[str, Any]:
    """Times of all runs, their ratios, and the ceilings in operations per second."""
    feeds = {name: value.numpy() for name, value in inputs(1).items()}
    times: dict[str, list[float]] = {}
    # Backend by backend: together they do not fit into the memory of a small machine, and no ratio crosses them.
    for backend in REFERENCES:
        calls: dict[str, Callable[[int], object]] = {}
        for name in (name for name in wanted if RUNS[name][1] == backend):
            graph, _, precision = RUNS[name]
            session = open_session(folder / graph, backend, precision)
            calls[name] = lambda _, session=session: session.run(feeds)  # type: ignore[misc]
            del session
        if calls:
            times |= alternate(calls, rounds)
    rows = []
    for name, values in times.items():
        row: dict[str, Any] = {"name": name, **summary(values)}
        for reference, key in REFERENCES[RUNS[name][1]].items():
            if reference in times and reference != name:
                row[key] = paired_ratio(times[reference], values)
        rows.append(row)
    peaks = ceilings.measure(("int8", "bf16", "fp32"), rounds=rounds).operations_per_s
    return {"rows": rows, "ceilings_tera_operations_per_s": {name: rate / 1e12 for name, rate in peaks.items()}}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/unet"), help="graphs live here")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS), help="runs to time")
    options = parser.parse_args()
    make(options.work)
    document = {
        "machine": machine.machine(),
        "versions": machine.versions(),
        "model": "UNet2DConditionModel of Stable Diffusion 1.5's size, random weights, 64x64 latents, batch 1",
        "parameters": 859_520_964,
        **measure(options.work, options.rounds, options.only),
    }
    options.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
