"""One ONNX graph to one TensorRT engine, through the calls that `tensorrt` and `tensorrt_rtx` share.

Nothing here reads ONNX by itself, so that a target which has the library and no onnx can build as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from diffpress.engines import library, turing
from diffpress.engines.progress import monitor
from diffpress.errors import DiffpressError
from diffpress.paths import cache_root, write

Profile = dict[str, dict[str, list[int]]]  # input -> "min", "opt", "max" -> shape
Batch = tuple[int, int, int]  # min, opt, max
NO_GPU = "reading an engine back needs the GPU it was built for"


@dataclass(frozen=True)
class Job:
    """A graph to build; `name` is what messages call it, `batches` the rows of each optimization profile."""

    file: Path
    name: str
    batches: tuple[Batch, ...]


@dataclass(frozen=True)
class Options:
    """What depends on the target: flags of the builder by their names there."""

    sparse: bool = False
    streaming: bool = False


@dataclass(frozen=True)
class Built:
    """An engine and what is known of it."""

    engine: Any  # bytes-like
    profiles: tuple[Profile, ...]
    flags: tuple[str, ...]
    figures: dict[str, int]  # bytes of "weights" and "activations" as the builder counts them, where it says so
    halved: bool  # whether float products are computed in half precision (`turing`)


class Builder:
    """Builds one graph for several targets; the graph is parsed once for those that take it alike."""

    def __init__(self, trt: ModuleType, job: Job) -> None:
        self.trt, self.job = trt, job
        self.logger = library.logger(trt)
        self.builder = trt.Builder(self.logger)
        self.parsed: dict[bool, tuple[Any, Any]] = {}  # network and the parser, which owns the weights

    def build(self, target: str, options: Options, tick: Callable[[float], None]) -> Built:
        """The engine for `target`; `tick` gets the fraction done. Raises `DiffpressError` naming the node."""
        halved = target in turing.TARGETS
        network = self._network(halved)
        shapes = profiles(network, self.job)
        config = self.builder.create_builder_config()
        capability = library.capabilities(self.trt)[target]
        if capability is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(capability, 0)
        for shape in shapes:
            profile = self.builder.create_optimization_profile()
            for name, sizes in shape.items():
                profile.set_shape(name, sizes["min"], sizes["opt"], sizes["max"])
            config.add_optimization_profile(profile)
        flags = set_flags(self.trt, config, options)
        if target in library.present():
            config.profiling_verbosity = self.trt.ProfilingVerbosity.DETAILED  # for `layers`
        cache = TimingCache(self.trt, target)
        cache.attach(config)
        self.logger.errors.clear()
        self.logger.figures.clear()
        engine = serialize(self.trt, self.builder, network, config, tick)
        if engine is None:
            reason = library.builder_error(self.logger.errors)
            raise DiffpressError(f"{library.refusal(self.trt, self.job.name, target)}: {reason}")
        cache.keep(config)
        return Built(engine, shapes, flags, dict(self.logger.figures), halved)

    def _network(self, halved: bool) -> Any:
        if halved not in self.parsed:
            self.parsed[halved] = parse(self.trt, self.builder, self.logger, self.job)
            if halved:
                turing.multiply_in_half(self.trt, self.parsed[halved][0])
        return self.parsed[halved][0]


def parse(trt: ModuleType, builder: Any, logger: Any, job: Job) -> tuple[Any, Any]:
    """A strongly typed network and its parser; raises `DiffpressError` naming the node that is not understood."""
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(job.file)):  # from the file, so that external data is found
        raise DiffpressError(f"{library.refusal(trt, job.name)}: {library.parser_error(parser)}")
    return network, parser


def profiles(network: Any, job: Job) -> tuple[Profile, ...]:
    """An optimization profile for each of the job's ranges of rows."""
    made: tuple[Profile, ...] = tuple({} for _ in job.batches)
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = list(tensor.shape)
        if -1 in shape[1:]:
            raise DiffpressError(
                f"{job.name}: input '{tensor.name}' has a dynamic dimension besides the batch: export it with the "
                "shapes it will run with"
            )
        for profile, batch in zip(made, job.batches, strict=True):
            rows = {kind: [size, *shape[1:]] for kind, size in zip(("min", "opt", "max"), batch, strict=True)}
            profile[tensor.name] = rows if -1 in shape else dict.fromkeys(rows, shape)
    return made


def envelope(found: Sequence[Profile]) -> Profile:
    """All that some profile takes: the least and the largest shapes, and the first one's favourite."""
    return {
        name: {
            "min": min(profile[name]["min"] for profile in found),
            "opt": shapes["opt"],
            "max": max(profile[name]["max"] for profile in found),
        }
        for name, shapes in found[0].items()
    }


def set_flags(trt: ModuleType, config: Any, options: Options) -> tuple[str, ...]:
    """Set the builder's flags for `options`, those that the library has; returns their names."""
    wanted = {"SPARSE_WEIGHTS": options.sparse, "WEIGHT_STREAMING": options.streaming}
    names = tuple(name for name, asked in wanted.items() if asked and hasattr(trt.BuilderFlag, name))
    for name in names:
        config.set_flag(getattr(trt.BuilderFlag, name))
    return names


def serialize(trt: ModuleType, builder: Any, network: Any, config: Any, tick: Callable[[float], None]) -> Any:
    """Build in a thread, so that Ctrl-C reaches Python at once; the progress monitor then stops the builder."""
    watching = monitor(trt, tick)
    config.progress_monitor = watching
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(builder.build_serialized_network, network, config)
        try:
            return future.result()
        finally:
            watching.stopped = True


def layers(trt: ModuleType, engine: Any, target: str) -> tuple[list[Any] | None, str | None]:
    """What the engine inspector says of each layer, or None and the reason. Needs a GPU of the target."""
    if target not in library.present():
        return None, f"{NO_GPU} ({target})"
    logger = library.logger(trt)
    runtime = trt.Runtime(logger)
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        return None, library.builder_error(logger.errors)
    text = loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        found = json.loads(text)
    except ValueError as error:
        return None, f"the inspector's answer is not JSON: {error}"
    return (found.get("Layers", []) if isinstance(found, dict) else found), None


def sparse_kernels(layers: Iterable[Any]) -> int:
    """How many of the inspector's layers run a kernel for sparse weights: TensorRT says so in the tactic's name."""
    named = (layer.get("TacticName", "") for layer in layers if isinstance(layer, dict))
    return sum("sparse" in str(name).lower() for name in named)


class TimingCache:
    """What the full TensorRT measured of kernels, kept between builds by library version and target.

    TensorRT for RTX measures none: its timing cache does nothing since 1.2, and its runtime cache is made at run time.
    """

    def __init__(self, trt: ModuleType, target: str) -> None:
        name = f"{library.package(trt)}-{trt.__version__}-{target}.cache"
        self.file = cache_root() / "timing" / name if trt.__name__ == "tensorrt" else None

    def attach(self, config: Any) -> None:
        """Let the build use what earlier ones measured."""
        if self.file is None:
            return
        known = self.file.read_bytes() if self.file.is_file() else b""
        cache = config.create_timing_cache(known)
        if cache is None:  # from a build that was cut off
            cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)

    def keep(self, config: Any) -> None:
        """Store what the build measured, whole or not at all."""
        cache = config.get_timing_cache() if self.file is not None else None
        if self.file is None or cache is None:
            return
        write(self.file, bytes(cache.serialize()))
