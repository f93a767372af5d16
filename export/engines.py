"""TensorRT engines of a bundle's graphs, one per component and target, built without a GPU where the library can.

Before anything is built every target is checked for the types that the graphs need, every graph for what TensorRT
cannot take, and the memory of all engines together is planned. An engine is not read back here, because that needs the
GPU it was built for; where that is there, the inspector's answer is stored.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from diffpress.bundle import Bundle, load, update
from diffpress.errors import DiffpressError
from diffpress.export import builder, library, memory, sidecar, targets
from diffpress.export.builder import Builder, Job, Options
from diffpress.export.memory import MemoryPlan
from diffpress.export.prepared import Graph, Prepared
from diffpress.export.progress import LEAST, Progress
from diffpress.export.targets import Target

Report = Callable[[MemoryPlan], None]


def build(
    bundle: Bundle,
    asked: Sequence[str],
    progress: bool = True,
    *,
    images: Sequence[int] = (1,),
    resolution: tuple[int, int] | None = None,
    memory_gb: float | None = None,
    report: Report | None = None,
) -> Bundle:
    """Build engines for `asked` ("sm89", "rtx-4090", "all") into engines/<target>/; returns the bundle that lists them.

    Existing engines of a target are replaced together, those of other targets stay. `images` are the numbers of images
    at once, an optimization profile each; `resolution` (height, width) must be the graphs' own. `memory_gb` is that of
    the card, in place of what the target is known to have; where the plan, which `report` gets of every target first,
    exceeds it, weights are streamed. The bundle changes at the end, at once: an error or Ctrl-C leaves it as it was.

    Raises `DiffpressError` before any work for an unknown target, for a type that one lacks and for a graph that
    TensorRT cannot take; and for one that the library refuses, naming the node.
    """
    check_targets(asked)
    from diffpress.export import buildable  # reads ONNX, which a target that has `prepared` graphs need not

    buildable.check_images(images)
    bundle = load(bundle.path)  # its digests go into the sidecars, so they must be true
    buildable.check_resolution(bundle, resolution)
    prepared = buildable.prepare(bundle, images)
    return build_prepared(bundle, prepared, asked, progress, memory_gb=memory_gb, report=report)


def build_prepared(
    bundle: Bundle,
    prepared: Prepared,
    asked: Sequence[str],
    progress: bool = True,
    *,
    memory_gb: float | None = None,
    report: Report | None = None,
) -> Bundle:
    """The same from graphs that were looked at before, which needs the library alone and no ONNX.

    `prepared` is what `buildable.prepare` found of this bundle. Raises `DiffpressError` as `build` does, and where the
    bundle's graphs are others.
    """
    chosen = _preflight(bundle, prepared.graphs, asked)
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
            entries = [entry for graph in graphs for entry in _build_graph(bundle, graph, chosen, plans, staging, bar)]
        entries.sort(key=lambda entry: names.index(entry["target"]))
        return _move_in(bundle, staging, names, entries, plans)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def supported_targets() -> list[str]:
    """The targets the installed library can build for; raises `DiffpressError` when none is installed."""
    return list(library.capabilities(library.find()))


def check_targets(asked: Sequence[str], types: Collection[str] = (), what: str = "the bundle") -> list[Target]:
    """What `asked` means here: targets that the installed library builds for and that have `types`, which `what` needs.

    Raises `DiffpressError` that says what to do instead.
    """
    trt = library.find()
    return targets.select(asked, list(library.capabilities(trt)), library.package(trt), types, what)


def _preflight(bundle: Bundle, graphs: Sequence[Graph], asked: Sequence[str]) -> list[Target]:
    """The targets, each of which has the types of every graph."""
    for graph in graphs:
        check_targets(asked, graph.types, str(bundle.file(graph.file)))
    return check_targets(asked, frozenset().union(*(graph.types for graph in graphs)), str(bundle.path))


def _cost(graph: Graph) -> int:
    return graph.need.weights + LEAST


def _build_graph(
    bundle: Bundle, graph: Graph, chosen: Sequence[Target], plans: Sequence[MemoryPlan], staging: Path, bar: Progress
) -> list[dict[str, Any]]:
    """Build one graph for every target into `staging`/<target>; returns the manifest's entries."""
    trt = library.find()
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
