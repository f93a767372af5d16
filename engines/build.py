"""TensorRT engines of a bundle's graphs, one per component and target, from what is known of the graphs (`prepared`).

An engine is not read back here, because that needs the GPU it was built for; where that is there, the inspector's
answer is stored.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffpress.bundle import Bundle, update
from diffpress.engines import builder, library, memory, sidecar, targets
from diffpress.engines.builder import Builder, Job, Options
from diffpress.engines.memory import MemoryPlan
from diffpress.engines.preflight import check_targets
from diffpress.engines.prepared import Graph, Prepared
from diffpress.engines.progress import LEAST, Progress
from diffpress.engines.targets import Target
from diffpress.errors import DiffpressError

Report = Callable[[MemoryPlan], None]


def build(
    bundle: Bundle,
    prepared: Prepared,
    asked: Sequence[str],
    progress: bool = True,
    *,
    package: str | None = None,
    memory_gb: float | None = None,
    report: Report | None = None,
) -> Bundle:
    """Build engines for `asked` ("sm89", "rtx-4090", "all") into engines/<target>/; returns the bundle that lists them.

    Existing engines of a target are replaced together, those of other targets stay. `prepared` is what
    `export.buildable.prepare` found of this bundle. The library is that of `package`, the installed one if absent.
    `memory_gb` is that of the card, in place of what the target is known to have; where the plan, which `report` gets
    of every target first, exceeds it, weights are streamed. The bundle changes at the end, at once: an error or Ctrl-C
    leaves it as it was.

    Raises `DiffpressError` before any work for an unknown target, for a type that one lacks, and where the bundle's
    graphs are others; and for a graph that the library refuses, naming the node.
    """
    chosen = _preflight(bundle, prepared.graphs, asked, package)
    for graph in prepared.graphs:
        if changed := [name for name, digest in graph.digests.items() if bundle.manifest["files"].get(name) != digest]:
            raise DiffpressError(f"{bundle.path}: {changed[0]} is another one than was packed: pack the bundle again")
    graphs, needs = prepared.graphs, {graph.name: graph.need for graph in prepared.graphs}
    plans = [memory.plan(target, needs, prepared.features, memory_gb) for target in chosen]
    if report is not None:
        for plan in plans:
            report(plan)
    names = [target.name for target in chosen]
    prefix = f".{bundle.path.name}."
    staging = Path(tempfile.mkdtemp(prefix=prefix, suffix=".engines", dir=bundle.path.resolve().parent))
    try:
        with Progress(sum(map(_cost, graphs)) * len(chosen), progress) as bar:
            making = [_build_graph(bundle, graph, package, chosen, plans, staging, bar) for graph in graphs]
            entries = [entry for made in making for entry in made]
        entries.sort(key=lambda entry: names.index(entry["target"]))
        return _move_in(bundle, staging, names, entries, plans)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _preflight(bundle: Bundle, graphs: Sequence[Graph], asked: Sequence[str], package: str | None) -> list[Target]:
    """The targets, each of which has the types of every graph."""
    for graph in graphs:
        check_targets(asked, graph.types, str(bundle.file(graph.file)), package)
    return check_targets(asked, frozenset().union(*(graph.types for graph in graphs)), str(bundle.path), package)


def _cost(graph: Graph) -> int:
    return graph.need.weights + LEAST


def _build_graph(
    bundle: Bundle,
    graph: Graph,
    package: str | None,
    chosen: Sequence[Target],
    plans: Sequence[MemoryPlan],
    staging: Path,
    bar: Progress,
) -> list[dict[str, Any]]:
    """Build one graph for every target into `staging`/<target>; returns the manifest's entries."""
    trt = library.find(package)
    making = Builder(trt, Job(bundle.file(graph.file), graph.file, graph.batches))
    entries = []
    for target, plan in zip(chosen, plans, strict=True):
        bar.start(f"{graph.name} for {target.name}")
        known = targets.GENERATIONS.get(target.name)
        sparse = bool(graph.sparse) and (known is None or known.sparse)
        start = time.perf_counter()
        built = making.build(
            target.name, Options(sparse, plan.streaming), lambda fraction: bar.tick(_cost(graph), fraction)
        )
        seconds = time.perf_counter() - start
        folder = staging / target.name
        folder.mkdir(exist_ok=True)
        file = folder / f"{graph.name}.engine"
        with file.open("wb") as stream:
            stream.write(built.engine)
        need = plan.engines[graph.name]
        written = sidecar.sidecar(trt, graph, target, built, file.stat().st_size, seconds, need)
        layers, written["layers_reason"] = builder.layers(trt, built.engine, target.name)
        if layers is not None:
            written["layers"] = f"{graph.name}.layers.json"
            written["sparse"]["kernels"] = builder.sparse_kernels(layers)
            (folder / written["layers"]).write_text(json.dumps(layers, indent=1), "utf-8")
        file.with_suffix(".json").write_text(json.dumps(written, indent=1), "utf-8")
        entries.append(sidecar.entry(written, f"engines/{target.name}/{graph.name}.engine"))
        bar.finish(_cost(graph))
    return entries


def _move_in(
    bundle: Bundle, staging: Path, names: Sequence[str], entries: list[dict[str, Any]], plans: Sequence[MemoryPlan]
) -> Bundle:
    """Swap the new folders in and list them; on any failure the old ones are put back."""
    engines = bundle.path / "engines"
    made = not engines.exists()
    engines.mkdir(exist_ok=True)
    kept = [entry for entry in bundle.manifest.get("engines", []) if entry["target"] not in names]
    planned = bundle.manifest.get("memory", {}) | {plan.target: plan.to_json() for plan in plans}
    try:
        for target in names:
            if (engines / target).exists():
                (engines / target).rename(staging / f"{target}.old")
            (staging / target).rename(engines / target)
        return update(bundle, engines=kept + entries, memory=planned)
    except BaseException:
        for target in names:
            if not (staging / target).exists():
                shutil.rmtree(engines / target, ignore_errors=True)
            if (staging / f"{target}.old").exists():
                (staging / f"{target}.old").rename(engines / target)
        if made:
            shutil.rmtree(engines, ignore_errors=True)
        raise
