"""ONNX Runtime on the CPU, and on NVIDIA GPUs through its providers CUDA, TensorRT and TensorRT for RTX."""

from __future__ import annotations

import importlib
import mmap
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from diffpress.bundle import DIALECT
from diffpress.errors import DiffpressError, require
from diffpress.paths import cache_root
from diffpress.runtime.session import DeviceArray, Feeds, Port, check_targets, first_line

# By the name of the backend; each falls back on the next for nodes that it does not take.
PROVIDERS = {
    "onnxruntime": ("CPUExecutionProvider",),
    "onnxruntime-cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "onnxruntime-tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
    "onnxruntime-tensorrt-rtx": ("NvTensorRTRTXExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
CPU = PROVIDERS["onnxruntime"][0]


@cache
def library() -> ModuleType:
    """Import onnxruntime without its telemetry, which is on by default."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, when the library starts
    return require("onnxruntime", "cpu", "run on ONNX Runtime")


def has_provider(backend: str) -> bool:
    """Whether the installed build has the provider of `backend`; its GPU may be missing all the same."""
    return PROVIDERS[backend][0] in library().get_available_providers()


def provider_options(backend: str, precision: str, file: Path) -> list[tuple[str, dict[str, str]]]:
    """The providers of `backend` in order, with the options that this file needs; all values are texts."""
    kept = cache_root() / "runtime" / "onnxruntime"
    options = {
        CPU: {},
        # Unset, float products would be in tf32 wherever the GPU has it.
        "CUDAExecutionProvider": {"device_id": "0", "use_tf32": "1" if precision == "tf32" else "0"},
        "TensorrtExecutionProvider": {
            "device_id": "0",
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(kept / "tensorrt"),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(kept / "tensorrt"),
            # With Q/DQ nodes the scales are the graph's; without this the library would drop them.
            "trt_int8_enable": "1" if _has_qdq(file) else "0",
        },
        "NvTensorRTRTXExecutionProvider": {"device_id": "0", "nv_runtime_cache_path": str(kept / "tensorrt-rtx")},
    }
    available = set(library().get_available_providers())
    return [(name, options[name]) for name in PROVIDERS[backend] if name in available]


def _has_qdq(file: Path) -> bool:
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return text.find(b"DequantizeLinear") >= 0


class OnnxRuntime:
    """ONNX Runtime; takes any batch size, so there is nothing to prepare."""

    _device = "cuda"  # where a `DeviceArray` is, as the library calls it
    _copies = False  # whether arrays of the host are copied when they are bound

    def __init__(self, file: Path, backend: str, precision: str, threads: int | None) -> None:
        self._library: Any = library()
        self._errors = _errors()
        self._file, self._backend, self._precision = file, backend, precision
        options = self._library.SessionOptions()
        options.log_severity_level = 4  # fatal; errors arrive as exceptions and would be said twice
        options.graph_optimization_level = self._library.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.execution_mode = self._library.ExecutionMode.ORT_SEQUENTIAL
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
        # Each variant has its own threads; those of the idle one must not spin while another runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = self._opened(options)
        except self._errors as error:
            raise DiffpressError(f"ONNX Runtime cannot open {file}: {first_line(error)}") from error
        self.inputs: Mapping[str, Port] = {node.name: _port(node) for node in self._session.get_inputs()}
        self.outputs: Mapping[str, Port] = {node.name: _port(node) for node in self._session.get_outputs()}
        self._binding: Any = None
        self._bound: dict[str, Any] = {}  # what is bound now, by input or output

    def _opened(self, options: Any) -> Any:
        providers = provider_options(self._backend, self._precision, self._file)
        for folder in (value for _, table in providers for key, value in table.items() if key.endswith("_path")):
            Path(folder).mkdir(parents=True, exist_ok=True)
        if self._file.name.endswith(DIALECT) and not has_vnni():
            # Without VNNI its products of uint8 by int8 saturate in between; these are exact, and slower. What this
            # does to Q/DQ that is left in the graph (other formats) it then refuses to run.
            options.add_session_config_entry("session.x64quantprecision", "1")
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            return self._library.InferenceSession(str(self._file), options, providers=providers)
        except self._errors:
            # Its integer fusions take FP8 Q/DQ for INT8 and then refuse what they made; without them it runs.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            return self._library.InferenceSession(str(self._file), options, providers=providers)

    def prepare(self, batch: int) -> None:
        pass

    def run(self, feeds: Feeds, into: Feeds | None = None) -> dict[str, np.ndarray]:
        try:
            if into or any(isinstance(value, DeviceArray) for value in feeds.values()):
                return self._run_bound(feeds, into or {})
            return dict(zip(self.outputs, self._session.run(None, dict(feeds)), strict=True))
        except self._errors as error:
            raise DiffpressError(f"ONNX Runtime cannot run {self._file}: {first_line(error)}") from error

    def _run_bound(self, feeds: Feeds, into: Feeds) -> dict[str, np.ndarray]:
        """Run with outputs bound to memory. The binding stays, because to make one anew for each run takes longer than
        all that it saves: `run` without one does not copy what it hands out, either.
        """
        check_targets(self._file, self.outputs, into)
        binding, bound = self._binding, self._bound
        self._binding = None  # a run that fails leaves none
        if binding is None or feeds.keys() != self.inputs.keys():
            binding, bound = self._session.io_binding(), {}
        for name, value in feeds.items():
            there = isinstance(value, DeviceArray)
            if bound.get(name) is value and (there or not self._copies):
                continue
            if there:
                bound[name] = value
                binding.bind_input(name, self._device, 0, value.dtype, value.shape, value.address)
            else:
                bound[name] = np.ascontiguousarray(value)  # held, because the binding knows only its address
                binding.bind_cpu_input(name, bound[name])
        for name, port in self.outputs.items():
            if name not in into:
                bound.pop(name, None)
                binding.bind_output(name, "cpu")  # the library allocates, anew for each run
            elif bound.get(name) is not into[name]:
                target = bound[name] = into[name]
                there = isinstance(target, DeviceArray)
                device, address = (self._device, target.address) if there else ("cpu", target.ctypes.data)
                binding.bind_output(name, device, 0, port.dtype, target.shape, address)
        self._session.run_with_iobinding(binding)
        self._binding, self._bound = binding, bound
        made = zip(self.outputs, binding.get_outputs(), strict=True)
        return {name: into[name] if name in into else value.numpy() for name, value in made}


class OnnxRuntimeOnGpu(OnnxRuntime):
    """ONNX Runtime on an NVIDIA GPU; what is kept between runs stays in its memory."""

    _copies = True

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        """An array in the memory of the GPU, allocated by the library."""
        return DeviceArray(_Block(self._library, shape, dtype, self._device), shape, dtype)


class _Block:
    """Memory that belongs to an `OrtValue`, as `Memory`."""

    def __init__(self, library: Any, shape: tuple[int, ...], dtype: np.dtype, device: str) -> None:
        self._value = library.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, device, 0)
        self._shape, self._dtype = shape, dtype
        self.address = int(self._value.data_ptr())

    def write(self, offset: int, source: np.ndarray) -> None:
        # The library copies whole values only; only such are filled.
        if offset or source.shape != self._shape:
            raise ValueError("a part of a value cannot be written")
        self._value.update_inplace(source)

    def read(self, offset: int, target: np.ndarray) -> None:
        values = self._value.numpy().reshape(-1)
        start = offset // self._dtype.itemsize
        target.reshape(-1)[:] = values[start : start + target.size]


@cache
def has_vnni() -> bool:
    """Whether this x86 processor is known to have exact products of uint8 by int8; False where nobody says so."""
    try:
        flags = Path("/proc/cpuinfo").read_text("ascii", errors="replace").split()
    except OSError:
        return False
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags)


def _errors() -> tuple[type[Exception], ...]:
    """Every error class of the library, which share no base but Exception, and those of wrong input names."""
    module = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    kinds = (kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (*kinds, ValueError, RuntimeError)


def _port(node: Any) -> Port:
    names = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(bool)": "bool"}
    dtype = names.get(node.type, node.type.removeprefix("tensor(").removesuffix(")"))
    return Port(tuple(size if isinstance(size, int) else None for size in node.shape), np.dtype(dtype))
