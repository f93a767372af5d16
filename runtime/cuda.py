"""NVIDIA's driver by ctypes: which GPU there is, memory, copies, one stream, graphs. It needs no package at all.

The driver's library comes with the GPU's driver, on a Jetson too. TensorRT uses the device's primary context, which is
the one taken here, so addresses and streams are the same for both. Names as in the CUDA Driver API reference.
"""

from __future__ import annotations

import ctypes
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_ulonglong, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from diffpress.errors import DiffpressError
from diffpress.runtime.session import DeviceArray

ALIGNMENT = 256  # bytes; what TensorRT asks of every address
MAJOR, MINOR, INTEGRATED = 75, 76, 18  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR, _INTEGRATED
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: it does not wait for the default stream
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate while this one captures
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY

_POINTER = POINTER(c_void_p)
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (_POINTER, c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemsetD8Async": (c_uint64, ctypes.c_ubyte, c_size_t, c_void_p),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (_POINTER, c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, _POINTER),
    "cuGraphInstantiateWithFlags": (_POINTER, c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}


class CudaError(DiffpressError):
    """The driver refused a call; the message names both."""

    def __init__(self, function: str, code: int, name: str) -> None:
        hint = ": the GPU's memory is full, close other programs or make fewer images at once"
        super().__init__(f"CUDA: {name} from {function}{hint if code == OUT_OF_MEMORY else ''}")
        self.code = code


@dataclass(frozen=True)
class Gpu:
    """The first GPU that the driver shows (CUDA_VISIBLE_DEVICES chooses)."""

    name: str
    target: str  # "sm89"
    memory_bytes: int
    integrated: bool  # shares the memory of the machine, as a Jetson's does


class Driver:
    """The functions of the driver's library; each raises `CudaError` when it does not return CUDA_SUCCESS."""

    def __init__(self, library: Any) -> None:
        self._functions: dict[str, Any] = {}
        for name, arguments in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int
            self._functions[name] = function
        self("cuInit", 0)

    def __call__(self, name: str, *arguments: Any) -> None:
        code = self._functions[name](*arguments)
        if code:
            text = c_char_p()
            self._functions["cuGetErrorName"](code, ctypes.byref(text))
            raise CudaError(name, code, (text.value or str(code).encode()).decode())

    def given(self, name: str, kind: Callable[[], Any], *arguments: Any) -> Any:
        """Call a function that writes its result through its first argument, and return that."""
        value = kind()
        self(name, ctypes.byref(value), *arguments)
        return value.value

    def gpu(self) -> Gpu | None:
        """The first GPU, or None when the driver shows none."""
        if not self.given("cuDeviceGetCount", c_int):
            return None
        device = self.given("cuDeviceGet", c_int, 0)
        name = ctypes.create_string_buffer(256)
        self("cuDeviceGetName", name, len(name), device)
        major, minor, shared = (
            self.given("cuDeviceGetAttribute", c_int, which, device) for which in (MAJOR, MINOR, INTEGRATED)
        )
        memory = self.given("cuDeviceTotalMem_v2", c_size_t, device)
        return Gpu(name.value.decode("utf-8", "replace"), f"sm{major}{minor}", memory, bool(shared))


class Device:
    """The first GPU's primary context, one stream on which all work is in order, and memory that is used again.

    Not for two threads at once: a pipeline runs one call at a time.
    """

    def __init__(self, driver: Driver) -> None:
        self._call = driver
        self._context = driver.given("cuDevicePrimaryCtxRetain", c_void_p, driver.given("cuDeviceGet", c_int, 0))
        self.activate()
        self.stream: int = driver.given("cuStreamCreate", c_void_p, NON_BLOCKING)
        self._free: defaultdict[int, list[int]] = defaultdict(list)  # addresses by size
        self._scratch: Block | None = None

    def activate(self) -> None:
        """Make the context that of this thread; the libraries ask for the thread's."""
        self._call("cuCtxSetCurrent", self._context)

    def synchronize(self) -> None:
        """Wait until all work is done."""
        self._call("cuStreamSynchronize", self.stream)

    def free_bytes(self) -> int:
        """Memory of the GPU that nobody uses."""
        total = c_size_t()
        return int(self._call.given("cuMemGetInfo_v2", c_size_t, ctypes.byref(total)))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        """An array whose values are not set. Equal sizes in equal order get equal addresses, as graphs need."""
        return DeviceArray(self.allocate(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize), shape, dtype)

    def allocate(self, size: int) -> Block:
        """At least `size` bytes, aligned."""
        self.activate()
        size = max(-(-size // ALIGNMENT), 1) * ALIGNMENT
        if self._free[size]:
            return Block(self, self._free[size].pop(), size)
        try:
            address = self._call.given("cuMemAlloc_v2", c_uint64, size)
        except CudaError as error:
            if error.code != OUT_OF_MEMORY:
                raise
            self.trim()
            address = self._call.given("cuMemAlloc_v2", c_uint64, size)
        return Block(self, address, size)

    def give_back(self, address: int, size: int) -> None:
        """Keep memory that is not used any more for the next of its size."""
        self._free[size].append(address)

    def trim(self) -> None:
        """Return what is kept to the driver."""
        self.synchronize()
        for addresses in self._free.values():
            while addresses:
                self._call("cuMemFree_v2", addresses.pop())

    def scratch(self, size: int) -> Block:
        """Working memory that all engines share, because one runs at a time; it moves when it has to grow."""
        if self._scratch is None or self._scratch.size < size:
            self.synchronize()
            self._scratch = None
            self.trim()
            self._scratch = self.allocate(size)
        return self._scratch

    def zero(self, array: DeviceArray) -> None:
        """Set every byte to 0."""
        self._call("cuMemsetD8Async", array.address, 0, array.nbytes, self.stream)

    def upload(self, address: int, source: np.ndarray) -> None:
        """Copy a contiguous array to the device; keep it until `synchronize`."""
        self._call("cuMemcpyHtoDAsync_v2", address, source.ctypes.data, source.nbytes, self.stream)

    def download(self, target: np.ndarray, address: int) -> None:
        """Copy into a contiguous array; its values are there after `synchronize`."""
        self._call("cuMemcpyDtoHAsync_v2", target.ctypes.data, address, target.nbytes, self.stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy bytes within the device."""
        self._call("cuMemcpyDtoDAsync_v2", target, source, size, self.stream)

    def captured(self, work: Callable[[], bool]) -> Graph | None:
        """What `work` puts on the stream, as a graph; None when it cannot be captured. It is not run."""
        self.synchronize()
        try:
            self._call("cuStreamBeginCapture_v2", self.stream, THREAD_LOCAL)
        except CudaError:
            return None
        done = False
        try:
            done = work()
        finally:
            graph = c_void_p()
            with suppress(CudaError):  # a capture that was broken off has no graph
                self._call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        if not graph.value:
            return None
        try:
            return (
                Graph(self._call, self._call.given("cuGraphInstantiateWithFlags", c_void_p, graph, 0)) if done else None
            )
        except CudaError:
            return None
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self, graph: Graph) -> None:
        """Run a graph on the stream."""
        self._call("cuGraphLaunch", graph.handle, self.stream)


class Graph:
    """A captured sequence of kernels, destroyed with this object."""

    def __init__(self, driver: Driver, handle: int) -> None:
        self._call, self.handle = driver, handle

    def __del__(self) -> None:
        with suppress(Exception):  # the driver may be gone at the end of the process
            self._call("cuGraphExecDestroy", self.handle)


class Block:
    """Memory on the device, as `session.Memory`; it goes back to the device's store with this object."""

    def __init__(self, device: Device, address: int, size: int) -> None:
        self._device, self.address, self.size = device, address, size

    def write(self, offset: int, source: np.ndarray) -> None:
        self._device.activate()
        self._device.upload(self.address + offset, source)
        self._device.synchronize()

    def read(self, offset: int, target: np.ndarray) -> None:
        self._device.activate()
        self._device.download(target, self.address + offset)
        self._device.synchronize()

    def __del__(self) -> None:
        self._device.give_back(self.address, self.size)


@cache
def driver() -> Driver | None:
    """The machine's driver, or None where there is none or it does not start."""
    try:
        if sys.platform == "win32":
            return Driver(ctypes.WinDLL("nvcuda.dll"))
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except (OSError, AttributeError, CudaError):  # no library, one that is too old, no GPU for it
        return None


@cache
def gpu() -> Gpu | None:
    """The first GPU of this machine, or None."""
    found = driver()
    return None if found is None else found.gpu()


@cache
def device() -> Device:
    """The first GPU, opened; raises `DiffpressError` when there is none."""
    found = driver()
    if found is None or gpu() is None:
        raise DiffpressError("there is no NVIDIA GPU here, or no driver for it: use --backend auto")
    return Device(found)
