"""TensorRT and TensorRT for RTX natively: an engine, its execution contexts, and addresses on the device.

Both libraries have one API. A context serves one batch size, because a captured graph must be the only user of its
context; all contexts of all engines share their working memory, because one runs at a time. Inputs that lie on the
device, the features of earlier steps, are bound where they are.
"""

from __future__ import annotations

import importlib
import mmap
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from diffpress.engines.library import logger
from diffpress.errors import DiffpressError
from diffpress.paths import write
from diffpress.runtime.cuda import ALIGNMENT, Device, Graph
from diffpress.runtime.session import DeviceArray, Feeds, Port, check_targets

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # backend -> the module it imports
EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx"}  # backend -> the extra that brings it
DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64"}
DTYPES |= {"BOOL": "bool", "UINT8": "uint8"}
GRAPHS = 8  # captured per context: feature buffers take turns, so there are a few sets of addresses


@cache
def library(backend: str) -> ModuleType:
    """Import the library of a backend; raises `DiffpressError` saying which extra brings it."""
    try:
        return importlib.import_module(MODULES[backend])
    except ImportError as error:
        raise DiffpressError(
            f"'{MODULES[backend]}' is not installed, which is needed to run engines of {backend}: "
            f"pip install 'diffpress[{EXTRAS[backend]}]'"
        ) from error


def version(backend: str) -> str | None:
    """The version of a backend's library that is installed, or None."""
    try:
        return str(library(backend).__version__)
    except DiffpressError:
        return None


@dataclass
class _Context:
    """An execution context for one batch size, its own input and output memory, and what was captured of it."""

    rows: int
    context: Any
    buffers: dict[str, DeviceArray]
    scratch: int = 0  # the address it was given
    bound: dict[str, int] = field(default_factory=dict)
    seen: set[tuple[int, ...]] = field(default_factory=set)
    graphs: OrderedDict[tuple[int, ...], Graph] = field(default_factory=OrderedDict)


class TensorRt:
    """A session on an engine. Batches above what its profiles take run in parts, row by row the same."""

    def __init__(self, file: Path, backend: str, device: Device, digest: str | None = None, cache: Path | None = None):
        """Read an engine whose bytes must have the sha256 `digest`. `cache`: where TensorRT for RTX keeps its kernels.

        Raises `DiffpressError` when the file is not that engine or the library refuses it.
        """
        self._trt: Any = library(backend)
        self._file, self._backend, self._device = file, backend, device
        device.activate()
        self._logger = logger(self._trt)
        # Engines that carry host code are refused: the library's default, and nothing in a bundle is executed.
        self._runtime = self._trt.Runtime(self._logger)
        self._engine = self._read(digest)
        if not hasattr(self._engine, "device_memory_size_v2"):
            raise DiffpressError(
                f"{backend} {self._trt.__version__} is too old to run engines here: install 10.1 or newer"
            )
        self._profiles: list[dict[str, tuple[tuple[int, ...], ...]]] = []
        inputs: dict[str, Port] = {}
        outputs: dict[str, Port] = {}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            read = self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            (inputs if read else outputs)[name] = self._port(name)
        self.inputs: Mapping[str, Port] = inputs
        self.outputs: Mapping[str, Port] = outputs
        for profile in range(self._engine.num_optimization_profiles):
            shapes = {name: self._engine.get_tensor_profile_shape(name, profile) for name in inputs}
            self._profiles.append({name: tuple(tuple(shape) for shape in three) for name, three in shapes.items()})
        self._contexts: dict[int, _Context] = {}
        streams = self._stream_weights()
        self._scratch_bytes = int(self._engine.device_memory_size_v2)
        self._graphs = not streams  # weights that come and go during a run are nothing for a graph
        self._capturable = self._graphs and backend == "tensorrt"  # TensorRT for RTX captures by itself
        self._config, self._cache, self._cached = self._runtime_config(cache), cache, 0

    # -- opening ---------------------------------------------------------------------------------------------------

    def _read(self, digest: str | None) -> Any:
        try:
            with (
                self._file.open("rb") as stream,
                mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,  # not a second copy in memory
            ):
                if digest is not None and sha256(content).hexdigest() != digest:
                    raise DiffpressError(f"{self._file} has changed since it was built: build it again")
                engine = self._runtime.deserialize_cuda_engine(content)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise DiffpressError(f"{self._file} cannot be read ({error}): build it again") from error
        if engine is None:
            raise self._failed("cannot load")
        return engine

    def _port(self, name: str) -> Port:
        if self._engine.get_tensor_location(name) != self._trt.TensorLocation.DEVICE:
            raise DiffpressError(f"{self._file}: tensor '{name}' lies on the host, which no graph of a bundle asks for")
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise DiffpressError(f"{self._file}: tensor '{name}' is of type {kind}, which numpy does not have")
        shape = tuple(None if size < 0 else int(size) for size in self._engine.get_tensor_shape(name))
        return Port(shape, np.dtype(DTYPES[kind]))

    def _stream_weights(self) -> bool:
        """Let the library choose how much of the weights stays on the device, where the engine leaves that open."""
        streamable = int(getattr(self._engine, "streamable_weights_size", 0))
        if not streamable:
            return False
        self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
        return int(self._engine.weight_streaming_budget_v2) < streamable

    def _runtime_config(self, cache: Path | None) -> Any:
        """TensorRT for RTX compiles kernels here: once for each shape, kept on disk, captured as CUDA graphs."""
        trt = self._trt
        if self._backend != "tensorrt-rtx":
            return None
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        whole = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        config.cuda_graph_strategy = whole if self._graphs else trt.CudaGraphStrategy.DISABLED
        # The batch sizes are few and come again: their own kernels at once, not a general one until they are there.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if cache is not None:
            kernels = config.create_runtime_cache()
            with suppress(OSError):
                kernels.deserialize(cache.read_bytes())  # what does not fit this machine is left out by the library
            config.set_runtime_cache(kernels)
        return config

    def _save_cache(self) -> None:
        if self._config is None or self._cache is None:
            return
        content = bytes(self._config.get_runtime_cache().serialize())
        if len(content) != self._cached:
            with suppress(OSError):  # without it the next start compiles again
                write(self._cache, content)
            self._cached = len(content)

    # -- running ---------------------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        """An array on the device."""
        return self._device.empty(shape, dtype)

    def prepare(self, batch: int) -> None:
        self._device.activate()
        for rows in {last - first for first, last in self._parts(batch)} - self._contexts.keys():
            made = self._contexts[rows] = self._new_context(rows)
            for array in made.buffers.values():
                self._device.zero(array)  # an index of a table must be within it
            self._execute(made, {name: array.address for name, array in made.buffers.items()})
            self._device.synchronize()
            self._save_cache()

    def run(self, feeds: Feeds, into: Feeds | None = None) -> dict[str, np.ndarray]:
        into = into or {}
        check_targets(self._file, self.outputs, into)
        if missing := self.inputs.keys() - feeds.keys():
            raise DiffpressError(f"{self._file} cannot run without input '{min(missing)}'")
        rows = self._rows(feeds)
        self.prepare(rows)
        made: dict[str, Any] = dict(into)
        for name, port in self.outputs.items():
            shape = tuple(rows if size is None else size for size in port.shape)
            made[name] = into[name] if name in into else np.empty(shape, port.dtype)
            if made[name].shape != shape:
                raise DiffpressError(
                    f"{self._file} cannot run: output '{name}' is {list(shape)}, not {list(made[name].shape)}"
                )
        parts = self._parts(rows)
        for first, last in parts:
            whole = len(parts) == 1

            def part(value: Any, port: Port, first: int = first, last: int = last, whole: bool = whole) -> Any:
                return value if whole or port.shape[:1] != (None,) else value[first:last]

            self._run_part(
                self._contexts[last - first],
                {name: part(feeds[name], port) for name, port in self.inputs.items()},
                {name: part(made[name], port) for name, port in self.outputs.items()},
            )
        return made

    def _rows(self, feeds: Feeds) -> int:
        """The batch of the feeds, whose shapes are checked."""
        shapes = {name: tuple(feeds[name].shape) for name in self.inputs}
        rows = {shapes[name][:1] for name, port in self.inputs.items() if port.shape[:1] == (None,)} or {(1,)}
        fit = all(
            len(shapes[name]) == len(port.shape)
            and all(wanted in (None, size) for size, wanted in zip(shapes[name], port.shape, strict=True))
            for name, port in self.inputs.items()
        )
        if len(rows) != 1 or not fit or rows == {(0,)}:
            raise DiffpressError(f"{self._file} cannot run on inputs of the shapes {shapes}")
        return int(*rows.pop())

    def _parts(self, batch: int) -> list[tuple[int, int]]:
        """The rows (first, last + 1) of each run: as many at once as some profile takes."""
        if self._is_static():
            return [(0, 1)]
        size = max(self._limits(profile)[2] for profile in range(len(self._profiles)))
        return [(first, min(first + size, batch)) for first in range(0, batch, size)]

    def _is_static(self) -> bool:
        return all(None not in port.shape for port in self.inputs.values())

    def _limits(self, profile: int) -> tuple[int, int, int]:
        """The fewest, the best and the most rows of a profile."""
        for name, port in self.inputs.items():
            if port.shape[:1] == (None,):
                least, best, most = (shape[0] for shape in self._profiles[profile][name])
                return least, best, most
        return 1, 1, 1

    def _new_context(self, rows: int) -> _Context:
        limits = {profile: self._limits(profile) for profile in range(len(self._profiles))}
        fitting = [profile for profile, (least, _, most) in limits.items() if least <= rows <= most]
        if not fitting:
            takes = ", ".join(f"{least} to {most}" for least, _, most in limits.values())
            raise DiffpressError(f"{self._file} takes {takes} rows, not {rows}: build it with another profile")
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy if self._config is None else self._config)
        if context is None:
            raise self._failed("cannot make a context for")
        closest = min(fitting, key=lambda profile: abs(limits[profile][1] - rows))
        if closest and not context.set_optimization_profile_async(closest, self._device.stream):
            raise self._failed("cannot run")
        buffers = {}
        for name, port in {**self.inputs, **self.outputs}.items():
            shape = tuple(rows if size is None else size for size in port.shape)
            if name in self.inputs and not context.set_input_shape(name, shape):
                raise self._failed("cannot run")
            buffers[name] = self._device.empty(shape, port.dtype)
        return _Context(rows, context, buffers)

    def _run_part(self, made: _Context, feeds: Feeds, targets: Feeds) -> None:
        device, held, addresses = self._device, [], {}
        for name, port in self.inputs.items():
            value, own = feeds[name], made.buffers[name].address
            if isinstance(value, DeviceArray) and value.dtype == port.dtype:
                addresses[name] = value.address
                if value.address % ALIGNMENT:
                    device.copy(own, value.address, value.nbytes)
                    addresses[name] = own
                continue
            held.append(np.ascontiguousarray(np.asarray(value), port.dtype))
            device.upload(own, held[-1])
            addresses[name] = own
        for name, target in targets.items():
            there = isinstance(target, DeviceArray) and target.address % ALIGNMENT == 0
            addresses[name] = target.address if there else made.buffers[name].address
        self._execute(made, addresses)
        for name, target in targets.items():
            if not isinstance(target, DeviceArray):
                device.download(target, addresses[name])
            elif addresses[name] != target.address:
                device.copy(target.address, addresses[name], target.nbytes)
        device.synchronize()  # and only now may the arrays of the host go

    def _execute(self, made: _Context, addresses: Mapping[str, int]) -> None:
        """Run with these addresses: plainly at first, then as the graph that was captured of them."""
        scratch = self._device.scratch(self._scratch_bytes)
        if made.scratch != scratch.address:  # it moved, or is new
            made.context.set_device_memory(scratch.address, scratch.size)
            made.scratch = scratch.address
            made.graphs.clear()
            made.seen.clear()
        key = tuple(addresses.values())
        if key in made.graphs:
            made.graphs.move_to_end(key)
            self._device.launch(made.graphs[key])
            return
        for name, address in addresses.items():
            if made.bound.get(name) != address and not made.context.set_tensor_address(name, address):
                raise self._failed("cannot run")
            made.bound[name] = address

        def enqueue() -> bool:
            return bool(made.context.execute_async_v3(self._device.stream))

        if key in made.seen and self._capturable:  # the first run after a change of shapes does more than kernels
            graph = self._device.captured(enqueue)
            if graph is not None:
                made.graphs[key] = graph
                if len(made.graphs) > GRAPHS:
                    made.graphs.popitem(last=False)
                self._device.launch(graph)
                return
            self._capturable = False  # an engine with control flow on the host, for one
            self._logger.errors.clear()
        made.seen.add(key)
        if not enqueue():
            raise self._failed("cannot run")

    def _failed(self, what: str) -> DiffpressError:
        reason = self._logger.errors[0] if self._logger.errors else "the library gave no reason"
        self._logger.errors.clear()
        return DiffpressError(f"{self._backend} {what} {self._file}: {reason}")
