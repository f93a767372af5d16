"""Builds engines on the target, for packages that no machine without its GPU can build for; needs TensorRT alone.

`export` builds the engines of bundles, with checks, plans of memory and several targets; this does the least that a
package's orders ask for: strongly typed network, ONNX parser, one profile, one engine per graph, with its sidecar.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

import diffpress
from diffpress.bundle import Bundle, update
from diffpress.errors import DiffpressError
from diffpress.runtime import backends, external, tensor_rt
from diffpress.runtime.engines import Machine

STORED = {"INT8": "int8", "FP8": "fp8", "INT4": "int4", "FP4": "fp4"}
COMPUTED = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}


def library(machine: Machine, backend: str = "auto") -> str:
    """The installed library that builds and runs here, the one that was asked for if any; raises `DiffpressError`."""
    found = installed(machine, backend)
    if not found:
        wanted = _wanted(backend)
        raise DiffpressError(
            f"this package builds its engines on its first start, and {' or '.join(wanted)} is not installed: "
            f"pip install 'diffpress[{tensor_rt.EXTRAS[wanted[0]]}]' (on a Jetson it comes with JetPack), or --backend "
            "onnxruntime-cuda"
        )
    return found[0]


def installed(machine: Machine, backend: str = "auto") -> list[str]:
    """The libraries that could build and run here, the preferred one first."""
    return [name for name in _wanted(backend) if name in machine.versions]


def _wanted(backend: str) -> list[str]:
    return [backend] if backend in backends.ENGINES else ["tensorrt", "tensorrt-rtx"]


def build(
    bundle: Bundle, orders: Sequence[Mapping[str, Any]], machine: Machine, library: str, progress: bool = True
) -> Bundle:
    """Build what the orders of a package name into engines/<target>/ of its folder, and return the bundle with them.

    The folder changes at the end, at once. Raises `DiffpressError` for a graph that the library refuses.
    """
    target = machine.gpu.target
    trt: Any = tensor_rt.library(library)
    prefix = f".{bundle.path.name}."
    staging = Path(tempfile.mkdtemp(prefix=prefix, suffix=".engines", dir=bundle.path.resolve().parent))
    try:
        entries = []
        made = staging / target
        made.mkdir()
        with tqdm(total=len(orders), desc=f"engines for {target}", unit="engine", disable=not progress) as bar:
            for order in orders:
                bar.set_postfix_str(order["variant"] or order["component"])
                entries.append(_built(trt, bundle, order, target, library, made, bar))
                bar.update()
        folder = bundle.file(f"engines/{target}")
        if folder.exists():
            folder.rename(staging / "old")
        folder.parent.mkdir(exist_ok=True)
        made.rename(folder)
        kept = [entry for entry in bundle.manifest.get("engines", ()) if entry["target"] != target]
        return update(bundle, engines=[*kept, *entries])
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _built(
    trt: Any, bundle: Bundle, order: Mapping[str, Any], target: str, library: str, folder: Path, bar: tqdm
) -> dict[str, Any]:
    """Build one engine and its sidecar into `folder`; returns the manifest's entry."""
    start, logger, graph = time.perf_counter(), tensor_rt.make_logger(trt), order["graph"]
    parts = external.parts(bundle, graph)
    builder = trt.Builder(logger)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)  # it owns the weights: keep it until the engine is there
    if not parser.parse_from_file(str(bundle.file(graph))):
        error = parser.get_error(0) if parser.num_errors else None
        node = f"node '{error.node_name()}': {' '.join(error.desc().split())}" if error else "no reason was given"
        raise DiffpressError(f"{library} cannot build {graph} for {target}: {node}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    shapes = _shapes(network, order["batch"], graph)
    for name, shape in shapes.items():
        profile.set_shape(name, shape["min"], shape["opt"], shape["max"])
    config.add_optimization_profile(profile)
    if hasattr(trt, "ComputeCapability"):  # TensorRT for RTX builds for any target, unless told for several
        known = trt.ComputeCapability.__members__
        config.num_compute_capabilities = 1
        config.set_compute_capability(known.get(target.upper(), trt.ComputeCapability.CURRENT), 0)
    engine = _interruptible(trt, builder, network, config, bar)
    if engine is None:
        reason = logger.errors[0] if logger.errors else "the library gave no reason"
        raise DiffpressError(f"{library} cannot build {graph} for {target}: {reason}")
    name = order["variant"] or order["component"]
    file = folder / f"{name}.engine"
    with file.open("wb") as stream:
        stream.write(engine)
    sidecar = {
        "target": target,
        "component": order["component"],
        "variant": order["variant"],
        "precision": _precision(trt, network),
        "shapes": shapes,
        "graph": graph,
        "sha256": {part: bundle.manifest["files"][part] for part in parts},
        "bytes": file.stat().st_size,
        "seconds": round(time.perf_counter() - start, 3),
        "versions": {library: str(trt.__version__), "diffpress": diffpress.__version__},
    }
    file.with_suffix(".json").write_text(json.dumps(sidecar, indent=1), "utf-8")
    shown = ("target", "component", "variant", "precision", "bytes", "seconds")
    return {**{key: sidecar[key] for key in shown}, "path": f"engines/{target}/{name}.engine"}


def _shapes(network: Any, batch: Sequence[int], graph: str) -> dict[str, dict[str, list[int]]]:
    """The profile of every input; only its first dimension may be open."""
    found = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = [int(size) for size in tensor.shape]
        if -1 in shape[1:]:
            raise DiffpressError(f"{graph}: input '{tensor.name}' has a dynamic dimension besides the batch")
        sizes = dict(zip(("min", "opt", "max"), batch, strict=True))
        found[tensor.name] = {kind: [rows, *shape[1:]] if -1 in shape else shape for kind, rows in sizes.items()}
    return found


def _precision(trt: Any, network: Any) -> str:
    """The types of what is dequantized, then of the outputs: "int8+fp32"."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    stored = [layer.get_input(0).dtype.name for layer in layers if layer.type == trt.LayerType.DEQUANTIZE]
    outputs = [network.get_output(index).dtype.name for index in range(network.num_outputs)]
    names = [STORED[name] for name in stored if name in STORED]
    names += [COMPUTED[name] for name in outputs if name in COMPUTED]
    return "+".join(dict.fromkeys(names))


def _interruptible(trt: Any, builder: Any, network: Any, config: Any, bar: tqdm) -> Any:
    """Build in a thread, so that Ctrl-C reaches Python at once; the progress monitor then stops the builder."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped, self.root = False, ""
            self.bars: dict[str, tqdm] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.root = name
            elif parent == self.root:  # the phases below flicker
                self.bars[name] = tqdm(total=steps, desc=name, leave=False, position=1, disable=bar.disable)

        def phase_finish(self, name: str) -> None:
            if name in self.bars:
                self.bars.pop(name).close()

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.bars:
                self.bars[name].update(step + 1 - self.bars[name].n)
            return not self.stopped

    monitor = Monitor()
    config.progress_monitor = monitor
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(builder.build_serialized_network, network, config)
        try:
            return future.result()
        finally:
            monitor.stopped = True
