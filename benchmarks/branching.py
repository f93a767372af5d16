"""ONNX `If` against a graph per variant: `python -m diffpress.benchmarks.branching --json FILE`.

A cached step can be a second graph beside the full one, or a branch of an `If` in a single graph that holds every
weight once. Both are made of the same exported graphs of `shapes` (recipe `cache`), and take turns in
one process; engines are built for one target and weighed, and need no GPU for that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from diffpress import api, bundle
from diffpress.benchmarks import machine
from diffpress.benchmarks.latency import alternate, paired_ratio
from diffpress.benchmarks.memory import peak_rss
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError
from diffpress.export import engines, store
from diffpress.export.graphs import OPSET
from diffpress.plan import FULL
from diffpress.runtime import backends
from diffpress.runtime.backends import open_session

CHOICE = "full"  # the input that says which branch runs
KEPT = "_kept"  # ends the name of the input that a feature comes back through
PLAIN, TWO, ONE = "uncached", "two graphs", "one graph with If"
BATCH = 2  # both halves of guidance of one image


def branched(full: onnx.ModelProto, cached: onnx.ModelProto) -> onnx.ModelProto:
    """One graph that computes what `full` does where its input `full` (bool []) is true, else what `cached` does.

    Both are whole in memory. Features that `full` hands out are inputs, named with `KEPT` at the end, and outputs; the
    cached branch passes on what it takes. Weights that both hold stand once, in the outer graph. Raises
    `DiffpressError` where `cached` reads what `full` does not hand out.
    """
    features = [value.name for value in full.graph.output[1:]]
    if (
        unknown := {value.name for value in cached.graph.input}
        - {value.name for value in full.graph.input}
        - {*features}
    ):
        raise DiffpressError(f"the full graph does not hand out '{sorted(unknown)[0]}', which the cached one reads")
    shared: dict[tuple[int, str, tuple[int, ...]], onnx.TensorProto] = {}
    branches = [
        _branch(model, scope, features, shared) for model, scope in ((full, "full"), (cached, "cached"))
    ]  # the full one first, so that weights have its names
    outputs = list(full.graph.output)
    choose = helper.make_node(
        "If", [CHOICE], [value.name for value in outputs], name="If", then_branch=branches[0], else_branch=branches[1]
    )
    kept = [helper.make_tensor_value_info(value.name + KEPT, TensorProto.FLOAT, _dims(value)) for value in outputs[1:]]
    choice = helper.make_tensor_value_info(CHOICE, TensorProto.BOOL, [])
    graph = helper.make_graph([choose], "branched", [choice, *full.graph.input, *kept], outputs, [*shared.values()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=full.ir_version)


def _branch(
    model: onnx.ModelProto,
    scope: str,
    features: Sequence[str],
    shared: dict[tuple[int, str, tuple[int, ...]], onnx.TensorProto],
) -> onnx.GraphProto:
    """`model` as a branch: inputs and weights of the outer graph, everything else by names of its own."""
    names = {value.name: value.name + KEPT * (value.name in features) for value in model.graph.input}
    for tensor in model.graph.initializer:
        key = (
            tensor.data_type,
            hashlib.sha256(onnx.numpy_helper.to_array(tensor).tobytes()).hexdigest(),
            (*tensor.dims,),
        )
        if key not in shared:
            shared[key] = onnx.TensorProto()
            shared[key].CopyFrom(tensor)
            shared[key].name = f"{scope}/{tensor.name}"
        names[tensor.name] = shared[key].name
    nodes = []
    for node in model.graph.node:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        names |= {name: f"{scope}/{name}" for name in node.output if name}
        copied.name = f"{scope}/{node.name}"
        del copied.input[:], copied.output[:]
        copied.input.extend(names[name] if name else "" for name in node.input)
        copied.output.extend(names[name] if name else "" for name in node.output)
        nodes.append(copied)
    made = {value.name: value for value in model.graph.output}
    outputs = []
    for name in (model.graph.output[0].name, *features):
        passed = f"{scope}/passed/{name}"
        # A branch may not hand out a value of the outer graph.
        nodes.append(helper.make_node("Identity", [names[name]], [passed], name=passed))
        value = made.get(name) or next(entry for entry in model.graph.input if entry.name == name)
        outputs.append(helper.make_tensor_value_info(passed, TensorProto.FLOAT, _dims(value)))
    return helper.make_graph(nodes, scope, [], outputs)


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def make(work: Path) -> dict[str, Bundle]:
    """Bundles of the embedded pipeline: without a cache, with two graphs, and with the two in one.

    Those that `work` holds already are not made again.
    """
    for name, recipe in (("plain", "fp32"), ("two", "cache")):
        if not (work / name).exists():
            api.compress("shapes", recipe, work / name, quiet=True)
    made = {PLAIN: bundle.load(work / "plain"), TWO: bundle.load(work / "two")}
    if not (work / "one" / bundle.MANIFEST).exists():
        graphs = [onnx.load(made[TWO].graph(name)) for name in (FULL, "cached")]
        shutil.copytree(work / "two", work / "one", ignore=shutil.ignore_patterns("engines", bundle.MANIFEST))
        shutil.rmtree(work / "one" / "unet")
        store.save({"model.onnx": ir.from_proto(branched(*graphs))}, work / "one" / "unet")
        entries = {key: value for key, value in made[TWO].manifest.items() if key not in ("files", "engines")}
        bundle.write_manifest(work / "one", {**entries, "graphs": {FULL: "unet/model.onnx"}})
    return made | {ONE: bundle.load(work / "one")}


def files(made: Bundle) -> list[Path]:
    """The denoiser's graphs."""
    return [made.graph(name) for name in made.manifest["graphs"]]


def calls(made: dict[str, Bundle], backend: str) -> dict[str, Callable[[int], object]]:
    """A full and a cached call of either kind, by "kind full" and "kind cached", on the same arrays."""
    full, cached = (open_session(file, backend) for file in files(made[TWO]))
    single = open_session(files(made[ONE])[0], backend)
    random = np.random.default_rng(0)
    timestep = made[TWO].manifest["sampling"]["timesteps"][0]
    feeds = {
        name: random.standard_normal([BATCH if size is None else size for size in port.shape]).astype(port.dtype)
        for name, port in full.inputs.items()
    } | {"timestep": np.array([timestep], np.float32)}
    features = {name: value for name, value in full.run(feeds).items() if name in cached.inputs}
    kept = feeds | {name + KEPT: value for name, value in features.items()}
    shallow = {name: value for name, value in (feeds | features).items() if name in cached.inputs}
    return {
        f"{TWO} full": lambda _: full.run(feeds),
        f"{TWO} cached": lambda _: cached.run(shallow),
        f"{ONE} full": lambda _: single.run({**kept, CHOICE: np.array(True)}),
        f"{ONE} cached": lambda _: single.run({**kept, CHOICE: np.array(False)}),
    }


def measure(made: dict[str, Bundle], rounds: int) -> list[dict[str, Any]]:
    """Rows of both kinds on every CPU backend: medians, ratios of paired rounds, memory of a process with nothing else.

    Above 1 a ratio says that the `If` is slower.
    """
    rows = []
    for backend in dict.fromkeys(name for name, _ in backends.available()):
        times = alternate(calls(made, backend), rounds, warmup=2)
        for kind in (TWO, ONE):
            row: dict[str, Any] = {"name": kind, "backend": backend}
            for step in ("full", "cached"):
                row[f"{step}_ms"] = float(np.median(times[f"{kind} {step}"]))
                row[f"{step}_vs_two"] = paired_ratio(times[f"{kind} {step}"], times[f"{TWO} {step}"])
            row["peak_rss_bytes"] = peak_rss({"graphs": [str(file) for file in files(made[kind])], "backend": backend})
            row["file_bytes"] = sum(file.stat().st_size for file in (made[kind].path / "unet").glob("*.onnx*"))
            rows.append(row)
    return rows


def weigh(made: dict[str, Bundle], target: str) -> list[dict[str, Any]]:
    """Rows of the denoiser's engines for `target`, sizes also relative to the single engine without a cache.

    Where the library refuses a graph, `refused` says why: shared INT8 weights outside of the branches, for one.
    """
    rows: list[dict[str, Any]] = []
    for kind in (PLAIN, TWO, ONE):
        row: dict[str, Any] = {"name": kind, "backend": f"tensorrt-rtx {target}"}
        rows.append(row)
        try:
            built = engines.build(made[kind], [target], progress=False)
        except DiffpressError as error:
            row["refused"] = str(error)
            continue
        own = [entry for entry in built.manifest["engines"] if entry["component"] == "unet"]
        row["engine_bytes"] = sum(entry["bytes"] for entry in own)
        row["engine_bytes_by_variant"] = {entry["variant"]: entry["bytes"] for entry in own}
        row["engine_bytes_vs_uncached"] = row["engine_bytes"] / rows[0]["engine_bytes"]
        row["build_s"] = sum(entry["seconds"] for entry in own)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/branching"), help="bundles live here")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--target", default="sm89")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    made = make(options.work)
    document = {
        "machine": machine.machine(),
        "versions": machine.versions(),
        "model": f"shapes, recipe cache, fp32, batch {BATCH}",
        "rows": [*measure(made, options.rounds), *weigh(made, options.target)],
    }
    options.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
