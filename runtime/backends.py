"""Inference libraries behind one small interface: a session runs one graph, arrays in, arrays out."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from diffpress.bundle import DIALECT
from diffpress.errors import DiffpressError, require

ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
PRECISIONS = ("fp32", "bf16")
Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Port:
    """An input or output of a graph; None in `shape` is a dimension the graph leaves open (the batch)."""

    shape: tuple[int | None, ...]
    dtype: np.dtype

    def takes(self, array: np.ndarray) -> bool:
        """Whether the library can use the memory of `array` as it is."""
        sizes = zip(array.shape, self.shape, strict=True) if array.ndim == len(self.shape) else [(0, 1)]
        fits = all(wanted in (None, size) for size, wanted in sizes)
        return fits and array.dtype == self.dtype and array.flags.c_contiguous and array.flags.writeable


class Session(Protocol):
    """One graph, ready to run. The arrays that `run` returns are the caller's."""

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]

    def prepare(self, batch: int) -> None:
        """Do now what the first run of this batch size would have to do."""

    def run(self, feeds: Feeds, into: Feeds | None = None) -> dict[str, np.ndarray]:
        """Every output of the graph; those named in `into` are written into its arrays, which come back as they are.

        Raises `DiffpressError` when the library refuses the feeds, and for arrays in `into` that are not as the outputs
        are, contiguous and writeable. None of them may share memory with a feed.
        """


def available() -> list[tuple[str, str]]:
    """The (backend, precision) pairs that run on this machine, the preferred one first."""
    pairs = []
    if _installed(OPENVINO):
        pairs += [(OPENVINO, "fp32")]
        if _has_bf16():
            pairs += [(OPENVINO, "bf16")]
    if _installed(ONNXRUNTIME):
        pairs += [(ONNXRUNTIME, "fp32")]
    return pairs


def check(backend: str, precision: str) -> None:
    """Raise `DiffpressError` saying what to do unless (backend, precision) runs on this machine."""
    if backend not in _BACKENDS:
        raise DiffpressError(f"there is no backend '{backend}': choose one of {', '.join(_BACKENDS)}")
    if precision not in PRECISIONS:
        raise DiffpressError(f"there is no precision '{precision}': choose one of {', '.join(PRECISIONS)}")
    if backend == ONNXRUNTIME:
        _onnxruntime()
    else:
        _openvino()
    if backend == ONNXRUNTIME and precision != "fp32":
        raise DiffpressError(f"ONNX Runtime computes in fp32 here, not {precision}: use --backend openvino")
    if precision == "bf16" and not _has_bf16():
        raise DiffpressError("this processor has no bf16 arithmetic: use --precision fp32")


def open_session(file: Path, backend: str, precision: str = "fp32", threads: int | None = None) -> Session:
    """Open an ONNX graph. `threads` None leaves their number to the library.

    Raises `DiffpressError` when the backend or precision does not run here or the file cannot be read.
    """
    check(backend, precision)
    if threads is not None and threads < 1:
        raise DiffpressError(f"threads is {threads}: at least 1 is needed")
    if not file.is_file():
        raise DiffpressError(f"there is no graph at {file}")
    return _BACKENDS[backend](file, precision, threads)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _check_targets(file: Path, outputs: Mapping[str, Port], into: Feeds) -> None:
    for name, array in into.items():
        if name not in outputs:
            raise DiffpressError(f"{file} has no output '{name}' to write, it has: {', '.join(outputs)}")
        if not outputs[name].takes(array):
            port = outputs[name]
            shape = ", ".join("batch" if size is None else str(size) for size in port.shape)
            raise DiffpressError(
                f"output '{name}' of {file} cannot be written into a {array.dtype} array of {list(array.shape)}: "
                f"give a contiguous, writeable {port.dtype} array of [{shape}]"
            )


def _first_line(error: Exception) -> str:
    """The telling line of a library's error: OpenVINO starts with the places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '", "FrontEnd API"))]
    return (telling or lines or [type(error).__name__])[0]


@cache
def _onnxruntime() -> ModuleType:
    """Import onnxruntime without its telemetry, which is on by default."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, when the library starts
    return require("onnxruntime", "cpu", "run on ONNX Runtime")


class _OnnxRuntime:
    """ONNX Runtime on the CPU; takes any batch size, so there is nothing to prepare."""

    def __init__(self, file: Path, precision: str, threads: int | None) -> None:
        library: Any = _onnxruntime()
        self._errors = _onnxruntime_errors()
        self._file = file
        options = library.SessionOptions()
        options.log_severity_level = 4  # fatal; errors arrive as exceptions and would be said twice
        options.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.execution_mode = library.ExecutionMode.ORT_SEQUENTIAL
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
        # Each variant has its own threads; those of the idle one must not spin while another runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = self._opened(library, options)
        except self._errors as error:
            raise DiffpressError(f"ONNX Runtime cannot open {file}: {_first_line(error)}") from error
        self.inputs: Mapping[str, Port] = {node.name: _onnxruntime_port(node) for node in self._session.get_inputs()}
        self.outputs: Mapping[str, Port] = {node.name: _onnxruntime_port(node) for node in self._session.get_outputs()}
        self._binding: Any = None
        self._bound: dict[str, np.ndarray] = {}  # what is bound now, by input or output

    def _opened(self, library: Any, options: Any) -> Any:
        if self._file.name.endswith(DIALECT) and not _has_vnni():
            # Without VNNI its products of uint8 by int8 saturate in between; these are exact, and slower. What this
            # does to Q/DQ that is left in the graph (other formats) it then refuses to run.
            options.add_session_config_entry("session.x64quantprecision", "1")
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            return library.InferenceSession(str(self._file), options, providers=["CPUExecutionProvider"])
        except self._errors:
            # Its integer fusions take FP8 Q/DQ for INT8 and then refuse what they made; without them it runs.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            return library.InferenceSession(str(self._file), options, providers=["CPUExecutionProvider"])

    def prepare(self, batch: int) -> None:
        pass

    def run(self, feeds: Feeds, into: Feeds | None = None) -> dict[str, np.ndarray]:
        try:
            if into:
                return self._run_bound(feeds, into)
            return dict(zip(self.outputs, self._session.run(None, dict(feeds)), strict=True))
        except self._errors as error:
            raise DiffpressError(f"ONNX Runtime cannot run {self._file}: {_first_line(error)}") from error

    def _run_bound(self, feeds: Feeds, into: Feeds) -> dict[str, np.ndarray]:
        """Run with outputs bound to memory. The binding stays, because to make one anew for each run takes longer than
        all that it saves: `run` without one does not copy what it hands out, either.
        """
        _check_targets(self._file, self.outputs, into)
        binding, bound = self._binding, self._bound
        self._binding = None  # a run that fails leaves none
        if binding is None or feeds.keys() != self.inputs.keys():
            binding, bound = self._session.io_binding(), {}
        for name, value in feeds.items():
            if bound.get(name) is not value:
                bound[name] = np.ascontiguousarray(value)  # held, because the binding knows only its address
                binding.bind_cpu_input(name, bound[name])
        for name, port in self.outputs.items():
            if name not in into:
                bound.pop(name, None)
                binding.bind_output(name, "cpu")  # the library allocates, anew for each run
            elif bound.get(name) is not into[name]:
                bound[name] = into[name]
                binding.bind_output(name, "cpu", 0, port.dtype, into[name].shape, into[name].ctypes.data)
        self._session.run_with_iobinding(binding)
        self._binding, self._bound = binding, bound
        made = zip(self.outputs, binding.get_outputs(), strict=True)
        return {name: into[name] if name in into else value.numpy() for name, value in made}


@cache
def _has_vnni() -> bool:
    """Whether this x86 processor is known to have exact products of uint8 by int8; False where nobody says so."""
    try:
        flags = Path("/proc/cpuinfo").read_text("ascii", errors="replace").split()
    except OSError:
        return False
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags)


def _onnxruntime_errors() -> tuple[type[Exception], ...]:
    """Every error class of the library, which share no base but Exception, and those of wrong input names."""
    module = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    kinds = (kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (*kinds, ValueError, RuntimeError)


def _onnxruntime_port(node: Any) -> Port:
    names = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(bool)": "bool"}
    dtype = names.get(node.type, node.type.removeprefix("tensor(").removesuffix(")"))
    return Port(tuple(size if isinstance(size, int) else None for size in node.shape), np.dtype(dtype))


@cache
def _openvino() -> ModuleType:
    """Import openvino without its telemetry, which would otherwise report every import and write to the home folder."""
    silenced = "openvino" not in sys.modules and "openvino_telemetry" not in sys.modules
    if silenced:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # import fails: openvino takes its stub
    try:
        return require("openvino", "cpu", "run on OpenVINO")
    finally:
        if silenced:
            del sys.modules["openvino_telemetry"]


@cache
def _core() -> Any:
    return _openvino().Core()


def _has_bf16() -> bool:
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class _OpenVino:
    """OpenVINO on the CPU. Static shapes are faster, so a model is compiled for each batch size that is seen."""

    def __init__(self, file: Path, precision: str, threads: int | None) -> None:
        self._file = file
        self._config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],  # unset, it would be bf16
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads is not None:
            self._config["INFERENCE_NUM_THREADS"] = threads
        try:
            self._model = _core().read_model(str(file))
        except RuntimeError as error:
            raise DiffpressError(f"OpenVINO cannot open {file}: {_first_line(error)}") from error
        # A tensor can carry the names of several nodes; the one of the ONNX file is that of the parameter or result.
        self.inputs: Mapping[str, Port] = {port.node.friendly_name: _openvino_port(port) for port in self._model.inputs}
        self.outputs: Mapping[str, Port] = {
            port.node.friendly_name.removesuffix("/sink_port_0"): _openvino_port(port) for port in self._model.outputs
        }
        self._requests: dict[int, Any] = {}

    def prepare(self, batch: int) -> None:
        if batch in self._requests:
            return
        model = self._model.clone()
        shapes = {name: [batch if size is None else size for size in port.shape] for name, port in self.inputs.items()}
        try:
            model.reshape({port: shapes[name] for name, port in zip(self.inputs, model.inputs, strict=True)})
            self._requests[batch] = _core().compile_model(model, "CPU", self._config).create_infer_request()
        except RuntimeError as error:
            raise DiffpressError(f"OpenVINO cannot compile {self._file}: {_first_line(error)}") from error

    def run(self, feeds: Feeds, into: Feeds | None = None) -> dict[str, np.ndarray]:
        into = into or {}
        _check_targets(self._file, self.outputs, into)
        batch = next((feeds[name].shape[0] for name, port in self.inputs.items() if None in port.shape), 1)
        self.prepare(batch)
        request = self._requests[batch]
        arrays = [np.asarray(feeds[name], port.dtype, order="C") for name, port in self.inputs.items()]
        bound = {index: into[name] for index, name in enumerate(self.outputs) if name in into}
        own = {index: request.get_output_tensor(index) for index in bound}
        try:
            for index, array in bound.items():
                request.set_output_tensor(index, _openvino().Tensor(array, shared_memory=True))
            # Inputs are lent; outputs are copied unless they are written where they belong: the next run reuses them.
            results = request.infer(dict(enumerate(arrays)), share_inputs=True, share_outputs=bool(bound))
            return {
                name: into[name] if index in bound else np.array(results[index]) if bound else results[index]
                for index, name in enumerate(self.outputs)
            }
        except (RuntimeError, ValueError) as error:
            raise DiffpressError(f"OpenVINO cannot run {self._file}: {_first_line(error)}") from error
        finally:
            for index, tensor in own.items():  # or later runs would go on writing into the caller's arrays
                request.set_output_tensor(index, tensor)


def _openvino_port(port: Any) -> Port:
    shape = tuple(None if size.is_dynamic else size.get_length() for size in port.partial_shape)
    return Port(shape, np.dtype(port.element_type.to_dtype()))


_BACKENDS: dict[str, Callable[[Path, str, int | None], Session]] = {OPENVINO: _OpenVino, ONNXRUNTIME: _OnnxRuntime}
