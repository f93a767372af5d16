"""CUDA's driver and TensorRT for machines without a GPU: memory of the host, engines that are ONNX graphs."""

from __future__ import annotations

import ctypes
import json
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_ulonglong, c_void_p
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnxruntime

# As in cuda.h, written down apart from the code that is tested: what it passes is converted by these.
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_void_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}
CONTEXT, STREAM = 0x1111_2222_3333, 0x7FFF_0000_1234  # more than 32 bits: handles must not be cut
INVALID, NO_MEMORY, CAPTURE = 1, 2, 900


class FakeCuda:
    """The driver's library. A stream runs what is put on it at once, unless it captures: then the graph does later."""

    def __init__(self, capability: tuple[int, int] = (8, 9), capacity: int = 1 << 30) -> None:
        self.capability, self.capacity = capability, capacity
        self.memory: dict[int, Any] = {}  # address -> buffer
        self.calls: list[str] = []
        self.capturing: list[Any] | None = None
        self.broken = False  # of a capture: a call that is not allowed in one
        self.graphs: dict[int, list[Any]] = {}
        self._functions: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name not in PROTOTYPES:
            raise AttributeError(name)
        if name not in self._functions:
            implemented = getattr(type(self), f"do_{name}")

            def call(*arguments: Any) -> int:
                self.calls.append(name)
                return int(implemented(self, *arguments) or 0)

            self._functions[name] = ctypes.CFUNCTYPE(c_int, *PROTOTYPES[name])(call)
            self._functions[name].keep = call
        return self._functions[name]

    def used(self) -> int:
        return sum(len(buffer) for buffer in self.memory.values())

    def put(self, work: Any) -> None:
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def inside(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + len(held) for start, held in self.memory.items())

    def do_cuInit(self, flags: int) -> int:
        return INVALID if flags else 0

    def do_cuDeviceGetCount(self, count: Any) -> None:
        count[0] = 1

    def do_cuDeviceGet(self, device: Any, ordinal: int) -> None:
        device[0] = ordinal

    def do_cuDeviceGetName(self, name: int, size: int, device: int) -> None:
        ctypes.memmove(name, b"Fake RTX 4090\0", 14)

    def do_cuDeviceGetAttribute(self, value: Any, which: int, device: int) -> None:
        value[0] = {75: self.capability[0], 76: self.capability[1], 18: 0}[which]

    def do_cuDeviceTotalMem_v2(self, size: Any, device: int) -> None:
        size[0] = self.capacity

    def do_cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        context[0] = CONTEXT

    def do_cuCtxSetCurrent(self, context: int) -> int:
        return 0 if context == CONTEXT else INVALID

    def do_cuMemGetInfo_v2(self, free: Any, total: Any) -> None:
        free[0], total[0] = self.capacity - self.used(), self.capacity

    def do_cuMemAlloc_v2(self, address: Any, size: int) -> int:
        if self.capturing is not None or self.used() + size > self.capacity:
            return NO_MEMORY
        raw = (c_ubyte * (size + 256))()
        start = -ctypes.addressof(raw) % 256
        view = memoryview(raw)[start : start + size]
        address[0] = ctypes.addressof(raw) + start
        ctypes.memset(address[0], 0xAB, size)  # not zeros: nobody may count on them
        self.memory[address[0]] = view
        return 0

    def do_cuMemFree_v2(self, address: int) -> int:
        return 0 if self.memory.pop(address, None) is not None else INVALID

    def do_cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> int:
        if stream != STREAM or not self.inside(address, size):
            return INVALID
        self.put(lambda: ctypes.memset(address, value, size))
        return 0

    def do_cuMemcpyHtoDAsync_v2(self, target: int, source: int, size: int, stream: int) -> int:
        if stream != STREAM or self.capturing is not None or not self.inside(target, size):
            return INVALID
        ctypes.memmove(target, source, size)
        return 0

    def do_cuMemcpyDtoHAsync_v2(self, target: int, source: int, size: int, stream: int) -> int:
        if stream != STREAM or self.capturing is not None or not self.inside(source, size):
            return INVALID
        ctypes.memmove(target, source, size)
        return 0

    def do_cuMemcpyDtoDAsync_v2(self, target: int, source: int, size: int, stream: int) -> int:
        if stream != STREAM or not self.inside(source, size) or not self.inside(target, size):
            return INVALID
        self.put(lambda: ctypes.memmove(target, source, size))
        return 0

    def do_cuStreamCreate(self, stream: Any, flags: int) -> int:
        stream[0] = STREAM
        return 0 if flags == 1 else INVALID

    def do_cuStreamSynchronize(self, stream: int) -> int:
        return CAPTURE if self.capturing is not None or stream != STREAM else 0

    def do_cuStreamBeginCapture_v2(self, stream: int, mode: int) -> None:
        self.capturing, self.broken = [], False

    def do_cuStreamEndCapture(self, stream: int, graph: Any) -> int:
        captured, self.capturing = self.capturing, None
        if self.broken or captured is None:
            return CAPTURE
        graph[0] = 0x5000_0000_0000 + self.calls.count("cuStreamEndCapture")
        self.graphs[graph[0]] = captured
        return 0

    def do_cuGraphInstantiateWithFlags(self, executable: Any, graph: int, flags: int) -> None:
        executable[0] = graph + 0x1_0000_0000
        self.graphs[executable[0]] = self.graphs[graph]

    def do_cuGraphLaunch(self, executable: int, stream: int) -> int:
        for work in self.graphs[executable]:
            work()
        return 0 if stream == STREAM else INVALID

    def do_cuGraphExecDestroy(self, executable: int) -> int:
        return 0 if self.graphs.pop(executable, None) is not None else INVALID

    def do_cuGraphDestroy(self, graph: int) -> int:
        return 0 if self.graphs.pop(graph, None) is not None else INVALID

    def do_cuGetErrorName(self, code: int, name: Any) -> None:
        names = {NO_MEMORY: b"CUDA_ERROR_OUT_OF_MEMORY", CAPTURE: b"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"}
        self._name = names.get(code, b"CUDA_ERROR_INVALID_VALUE")
        name[0] = self._name


def engine_bytes(graph: bytes, profiles: list[dict[str, list[list[int]]]], host_code: bool = False) -> bytes:
    """What `FakeTensorRt` takes for an engine: a line of JSON, then an ONNX graph with its weights inside."""
    return json.dumps({"profiles": profiles, "capture": not host_code}).encode() + b"\n" + graph


SCRATCH = 1000  # bytes that every engine asks for


class FakeTensorRt:
    """TensorRT's module, or that of TensorRT for RTX, on a `FakeCuda`."""

    TensorIOMode = SimpleNamespace(INPUT=0, OUTPUT=1)
    TensorLocation = SimpleNamespace(DEVICE=0, HOST=1)
    ExecutionContextAllocationStrategy = SimpleNamespace(STATIC=0, USER_MANAGED=2)
    CudaGraphStrategy = SimpleNamespace(DISABLED=0, WHOLE_GRAPH_CAPTURE=1)
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY=0, EAGER=1)

    class ILogger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)

    def __init__(self, cuda: FakeCuda, name: str = "tensorrt", version: str = "10.9.0.34") -> None:
        self.cuda, self.__name__, self.__version__ = cuda, name, version
        self.contexts: list[Any] = []
        module = self

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, content: Any) -> Any:
                head, _, graph = bytes(content).partition(b"\n")
                try:
                    return FakeEngine(module, self.logger, json.loads(head), graph)
                except ValueError:
                    self.logger.log(1, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization\nmagic tag")
                    return None

        self.Runtime = Runtime


class FakeEngine:
    streamable_weights_size = 0
    weight_streaming_budget_v2 = 0
    device_memory_size_v2 = SCRATCH
    kinds: ClassVar[dict[str, str]] = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64", "tensor(float16)": "HALF"}

    def __init__(self, module: FakeTensorRt, logger: Any, head: dict[str, Any], graph: bytes) -> None:
        self.module, self.logger, self.head = module, logger, head
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.outputs = {node.name: node for node in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(head["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> int:
        return 0 if name in self.inputs else 1

    def get_tensor_location(self, name: str) -> int:
        return 0

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.kinds[{**self.inputs, **self.outputs}[name].type])

    def get_tensor_shape(self, name: str) -> list[int]:
        return [s if isinstance(s, int) else -1 for s in {**self.inputs, **self.outputs}[name].shape]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        return self.head["profiles"][profile][name]

    def get_weight_streaming_automatic_budget(self) -> int:
        return 500

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(cache=None)
        config.set_execution_context_allocation_strategy = lambda value: setattr(config, "memory", value)
        config.create_runtime_cache = FakeCache
        config.set_runtime_cache = lambda cache: setattr(config, "cache", cache)
        config.get_runtime_cache = lambda: config.cache
        return config

    def create_execution_context(self, how: Any) -> FakeContext:
        graphs = int(self.weight_streaming_budget_v2 >= self.streamable_weights_size)
        assert how == 2 or (how.memory == 2 and how.cuda_graph_strategy == graphs)  # memory of ours
        context = FakeContext(self, getattr(how, "cache", None))
        self.module.contexts.append(context)
        return context


class FakeCache:
    """Kernels that were compiled."""

    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, content: bytes) -> bool:
        self.content = content
        return True

    def serialize(self) -> bytes:
        return self.content


class FakeContext:
    def __init__(self, engine: FakeEngine, cache: FakeCache | None) -> None:
        self.engine, self.cache = engine, cache
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.profile, self.runs, self.fresh = 0, 0, True

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return stream == STREAM

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.head["profiles"][self.profile][name]
        self.shapes[name], self.fresh = shape, True
        fits = all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True))
        if not fits:
            self.engine.logger.log(1, f"[E] {name}: the shape {shape} is out of\nthe profile")
        return fits

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= SCRATCH and address % 256 == 0 and self.engine.module.cuda.inside(address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % 256 == 0

    def execute_async_v3(self, stream: int) -> bool:
        cuda = self.engine.module.cuda
        if cuda.capturing is not None and (self.fresh or not self.engine.head["capture"]):
            cuda.broken = True
            return False
        self.fresh = False
        addresses = dict(self.addresses)  # a graph keeps those that it was captured with

        def kernels() -> None:
            self.runs += 1
            feeds = {name: self.at(addresses[name], name, self.shapes[name]).copy() for name in self.engine.inputs}
            for name, value in zip(self.engine.outputs, self.engine.session.run(None, feeds), strict=True):
                self.at(addresses[name], name, value.shape)[...] = value

        if self.cache is not None:
            self.cache.content += str(sorted(self.shapes.items())).encode()
        cuda.put(kernels)
        return stream == STREAM

    def at(self, address: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The device's memory there as an array."""
        kind = {"FLOAT": np.float32, "INT64": np.int64, "HALF": np.float16}[self.engine.get_tensor_dtype(name).name]
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        assert self.engine.module.cuda.inside(address, size), f"{name} is not in the device's memory"
        return np.frombuffer((c_ubyte * size).from_address(address), kind).reshape(shape)
