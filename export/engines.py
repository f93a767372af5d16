"""TensorRT engines of a bundle's graphs, one per component and target, built without a GPU where the library can.

TensorRT for RTX builds for any target it knows; the full TensorRT builds for the GPU of this machine. Both are driven
through the same calls: strongly typed network, ONNX parser, one optimization profile. An engine is not read back here,
because that needs the GPU it was built for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir
from tqdm import tqdm

import diffpress
from diffpress.bundle import Bundle, load, update
from diffpress.errors import DiffpressError
from diffpress.export import turing
from diffpress.plan import FULL, StepProgram

LIBRARIES = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}  # module -> package, the preferred one first
OTHERS = ("text_encoder", "text_encoder_2", "vae_decoder")  # what a run needs beside the denoiser, where it is there
NAMES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
NAMES |= {ir.DataType.INT8: "int8", ir.DataType.FLOAT8E4M3FN: "fp8", ir.DataType.INT4: "int4"}
LEAST = {"int4": 80, "fp8": 89}  # the oldest compute capability, times ten, that has the type

Profile = dict[str, dict[str, list[int]]]  # input -> "min", "opt", "max" -> shape


@dataclass(frozen=True)
class _Graph:
    """A graph of the bundle, what its engine is called and what its sidecar says about it."""

    name: str  # the denoiser's variant, or the component
    file: str  # relative to the bundle
    denoiser: bool
    batch: tuple[int, int, int]  # min, opt, max of the rows of one image
    precision: str
    types: frozenset[str]  # that it computes with or stores, of `NAMES`
    digests: Mapping[str, str]  # file -> sha256, of the graph and its external data


def build(bundle: Bundle, targets: Sequence[str], progress: bool = True) -> Bundle:
    """Build engines for `targets` ("sm89", ...) into engines/<target>/ and return the bundle that lists them.

    Existing engines of a target are replaced together, those of other targets stay. The bundle changes at the end, at
    once: an error or Ctrl-C leaves it as it was. Raises `DiffpressError` for an unknown target before any work, and for
    a type that one lacks, and for a graph the library refuses, naming the node.
    """
    check_targets(targets)
    targets = list(dict.fromkeys(targets))
    bundle = load(bundle.path)  # its digests go into the sidecars, so they must be true
    graphs = _graphs(bundle)
    for graph in graphs:
        check_types(graph.types, targets, str(bundle.file(graph.file)))
    prefix = f".{bundle.path.name}."
    staging = Path(tempfile.mkdtemp(prefix=prefix, suffix=".engines", dir=bundle.path.resolve().parent))
    try:
        with tqdm(total=len(graphs) * len(targets), desc="engines", unit="engine", disable=not progress) as bar:
            entries = [entry for graph in graphs for entry in _build_graph(bundle, graph, targets, staging, bar)]
        entries.sort(key=lambda entry: targets.index(entry["target"]))
        return _move_in(bundle, staging, targets, entries)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def supported_targets() -> list[str]:
    """The targets the installed library can build for; raises `DiffpressError` when none is installed."""
    return list(_capabilities(_library()))


def check_targets(targets: Sequence[str]) -> None:
    """Raise `DiffpressError` when a target is not one of `supported_targets`."""
    supported = supported_targets()
    unknown = [target for target in targets if target not in supported]
    if unknown or not targets:
        asked = f"target '{unknown[0]}'" if unknown else "an empty list of targets"
        choice = ", ".join(supported) or "none, because it builds for this machine's GPU and there is none"
        raise DiffpressError(f"{LIBRARIES[_library().__name__]} cannot build for {asked}; supported: {choice}")


def check_types(types: Collection[str], targets: Sequence[str], what: str) -> None:
    """Raise `DiffpressError` when a target lacks one of `types` ("fp8", "int4", ...), which `what` needs."""
    for target in targets:
        for kind in sorted(LEAST.keys() & types):
            if int(target.removeprefix("sm")) < LEAST[kind]:
                raise DiffpressError(
                    f"{what} needs {kind}, which {target} does not have: build for sm{LEAST[kind]} or newer, "
                    "or compress with format int8"
                )


def _library() -> ModuleType:
    for module in LIBRARIES:
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    raise DiffpressError(
        "neither tensorrt-rtx nor tensorrt is installed, one of which is needed to build engines: "
        "pip install 'diffpress[tensorrt-rtx]'"
    )


def _capabilities(trt: ModuleType) -> dict[str, Any]:
    """Target -> the library's value for it; None where the library knows no other target than the machine's GPU."""
    if hasattr(trt, "ComputeCapability"):
        members = trt.ComputeCapability.__members__.items()
        return {name.lower(): value for name, value in members if re.fullmatch(r"SM\d+", name)}
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"sm" + line.strip().replace(".", ""): None for line in found.splitlines() if line.strip()}


def _graphs(bundle: Bundle) -> list[_Graph]:
    files = [(name, str(file), True) for name, file in bundle.manifest["graphs"].items()]
    listed = bundle.manifest["files"]
    files += [(name, f"{name}/model.onnx", False) for name in OTHERS if f"{name}/model.onnx" in listed]
    try:
        program = StepProgram.from_json(bundle.manifest["program"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DiffpressError(f"{bundle.path} holds no readable step program: compress again") from error
    graphs = []
    for name, file, denoiser in files:
        try:
            model = ir.load(bundle.file(file))  # external data stays on disk
        except Exception as error:  # protobuf, onnx-ir and the file system each raise their own kind
            raise DiffpressError(f"{bundle.file(file)} is not a readable ONNX graph: {error}") from error
        values = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
        data = sorted({str(value.location) for value in values if isinstance(value, ir.ExternalTensor)})
        parts = [file, *(f"{Path(file).parent.as_posix()}/{location}" for location in data)]
        listed = bundle.manifest["files"]
        if missing := [part for part in parts if part not in listed]:
            raise DiffpressError(f"{bundle.path} does not list {missing[0]}, which {file} needs: compress again")
        digests = {part: listed[part] for part in parts}
        batch = _batch(program, name) if denoiser else (1, 1, 1)
        graphs.append(_Graph(name, file, denoiser, batch, _precision(model), _types(model), digests))
    return graphs


def _batch(program: StepProgram, variant: str) -> tuple[int, int, int]:
    """From one half of guidance to the largest batch of the variant's calls; fastest with the most frequent one.

    A call has both halves of guidance or one, of one step or of all that it runs together.
    """
    sizes = Counter(
        count * (2 if program.guided(first) == FULL else 1)
        for first, count in program.runs()
        if program.steps[first] == variant
    )
    most = [size for size, _ in sizes.most_common()] or [2]
    return 1, most[0], max(most)


def _types(model: ir.Model) -> frozenset[str]:
    outputs = [value for node in model.graph.all_nodes() for value in node.outputs]
    constants = [value for graph in model.graphs() for value in graph.initializers.values()]
    return frozenset(NAMES[value.dtype] for value in (*outputs, *constants) if value.dtype in NAMES)


def _precision(model: ir.Model) -> str:
    """The arithmetic a graph asks for, "int8+fp32": the stored types of what it dequantizes, then of its outputs."""
    found = [value.dtype for value in model.graph.outputs]
    for node in model.graph.all_nodes():
        weight = node.inputs[0].const_value if node.op_type == "DequantizeLinear" and node.inputs[0] else None
        if weight is not None:
            found.insert(0, weight.dtype)
    return "+".join(dict.fromkeys(NAMES[dtype] for dtype in found if dtype in NAMES))


def _build_graph(
    bundle: Bundle, graph: _Graph, targets: Sequence[str], staging: Path, bar: tqdm
) -> list[dict[str, Any]]:
    """Build one graph for every target into `staging`/<target>; returns the manifest's entries."""
    trt = _library()
    logger = _logger(trt)
    builder = trt.Builder(logger)
    parsed: dict[bool, tuple[Any, Any]] = {}  # with the parser, which owns the weights
    entries = []
    for target in targets:
        bar.set_postfix_str(f"{graph.name} for {target}")
        halved = target in turing.TARGETS
        if halved not in parsed:
            parsed[halved] = _parsed(trt, builder, logger, bundle, graph)
            if halved:
                turing.multiply_in_half(trt, parsed[halved][0])
        network = parsed[halved][0]
        shapes = _profile(network, graph.batch, graph)
        config = builder.create_builder_config()
        capability = _capabilities(trt)[target]
        if capability is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(capability, 0)
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape["min"], shape["opt"], shape["max"])
        config.add_optimization_profile(profile)
        start = time.perf_counter()
        engine = _interruptible(trt, builder, network, config, bar)
        if engine is None:
            raise DiffpressError(f"{_refusal(trt, graph, target)}: {_builder_error(logger.errors)}")
        (staging / target).mkdir(exist_ok=True)
        file = staging / target / f"{graph.name}.engine"
        with file.open("wb") as stream:
            stream.write(engine)
        sidecar = {
            "target": target,
            "component": "unet" if graph.denoiser else graph.name,
            "variant": graph.name if graph.denoiser else None,
            "precision": graph.precision.replace("fp32", "fp16+fp32") if halved else graph.precision,
            "shapes": shapes,
            "graph": graph.file,
            "sha256": dict(graph.digests),
            "bytes": file.stat().st_size,
            "seconds": round(time.perf_counter() - start, 3),
            "versions": _versions(trt),
        }
        file.with_suffix(".json").write_text(json.dumps(sidecar, indent=1), "utf-8")
        listed = ("target", "component", "variant", "precision", "bytes", "seconds")
        path = f"engines/{target}/{graph.name}.engine"
        entries.append({**{key: sidecar[key] for key in listed}, "path": path})
        bar.update()
    return entries


def _parsed(trt: ModuleType, builder: Any, logger: Any, bundle: Bundle, graph: _Graph) -> tuple[Any, Any]:
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(bundle.file(graph.file))):  # from the file, so that external data is found
        raise DiffpressError(f"{_refusal(trt, graph)}: {_parser_error(parser)}")
    return network, parser


def _profile(network: Any, batch: tuple[int, int, int], graph: _Graph) -> Profile:
    shapes: Profile = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = list(tensor.shape)
        if -1 in shape[1:]:
            raise DiffpressError(f"{graph.file}: input '{tensor.name}' has a dynamic dimension besides the batch")
        rows = {kind: [size, *shape[1:]] for kind, size in zip(("min", "opt", "max"), batch, strict=True)}
        shapes[tensor.name] = rows if -1 in shape else dict.fromkeys(rows, shape)
    return shapes


def _versions(trt: ModuleType) -> dict[str, str]:
    own = {LIBRARIES[trt.__name__]: str(trt.__version__), "diffpress": diffpress.__version__}
    return own | {"onnx": importlib.metadata.version("onnx")}


def _logger(trt: ModuleType) -> Any:
    """A TensorRT logger that keeps errors for the message to the user and drops the rest."""

    class Logger(trt.ILogger):  # type: ignore[name-defined]  # the base class is known when the library is
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

    return Logger()


def _interruptible(trt: ModuleType, builder: Any, network: Any, config: Any, bar: tqdm) -> Any:
    """Build in a thread, so that Ctrl-C reaches Python at once; the progress monitor then stops the builder."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]  # as Logger
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = False
            self.root = ""
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


def _refusal(trt: ModuleType, graph: _Graph, target: str | None = None) -> str:
    aim = f" for {target}" if target else ""
    return f"{LIBRARIES[trt.__name__]} cannot build {graph.file}{aim}"


def _parser_error(parser: Any) -> str:
    """The parser's first error in one line, with the node it stopped at."""
    if not parser.num_errors:
        return "the parser gave no reason"
    error = parser.get_error(0)
    node = f"node '{error.node_name()}' ({error.node_operator()}): " if error.node_operator() else ""
    return node + " ".join(error.desc().split())


def _builder_error(errors: Sequence[str]) -> str:
    """The builder's first error without its source positions, which tell the user nothing."""
    text = " ".join(errors[0].split()) if errors else "the builder gave no reason"
    text = re.sub(r"^.*?Error Code \d+: [^(]*\((.*)\)$", r"\1", text)
    text = re.sub(r"^\[[^\]]*\]\s*", "", text)
    return re.sub(r"\.? In \S+ at \S+:\d+", "", text)


def _move_in(bundle: Bundle, staging: Path, targets: Sequence[str], entries: list[dict[str, Any]]) -> Bundle:
    """Swap the new folders in and list them; on any failure the old ones are put back."""
    engines = bundle.path / "engines"
    made = not engines.exists()
    engines.mkdir(exist_ok=True)
    kept = [entry for entry in bundle.manifest.get("engines", []) if entry["target"] not in targets]
    try:
        for target in targets:
            if (engines / target).exists():
                (engines / target).rename(staging / f"{target}.old")
            (staging / target).rename(engines / target)
        return update(bundle, engines=kept + entries)
    except BaseException:
        for target in targets:
            if not (staging / target).exists():
                shutil.rmtree(engines / target, ignore_errors=True)
            if (staging / f"{target}.old").exists():
                (staging / f"{target}.old").rename(engines / target)
        if made:
            shutil.rmtree(engines, ignore_errors=True)
        raise
