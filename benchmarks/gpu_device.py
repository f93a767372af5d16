"""An NVIDIA GPU as what it is measured with: time by CUDA events, memory by the driver, energy by NVML.

Needs the driver alone, since a target may have no torch; events are recorded on the legacy default stream, between two
synchronisations of the whole context, so that the streams of every library are within them. NVML needs `nvidia-ml-py`.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ctypes import POINTER, c_float, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffpress.errors import DiffpressError
from diffpress.runtime import cuda

ABSENT = "no NVIDIA GPU found"
POLL_S = 0.002  # between two looks at the memory
BYTE = np.dtype("uint8")
_POINTER = POINTER(c_void_p)
# Beside those of `runtime.cuda`, which has no need of them; names as in the CUDA Driver API reference.
_CALLS: dict[str, tuple[Any, ...]] = {
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetPCIBusId": (ctypes.c_char_p, c_int, c_int),
    "cuCtxSynchronize": (),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuEventCreate": (_POINTER, c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
}


@dataclass
class Peak:
    """The most memory that was in use at once while it was watched, beyond what was before, in bytes."""

    bytes: int = 0


class Device:
    """The first GPU; raises `DiffpressError` where there is none. `library` and `memory` stand in for the driver's."""

    torch = "cuda"  # where torch runs
    runs_torch = True  # whether that is this device

    def __init__(self, library: Any = None, memory: cuda.Device | None = None) -> None:
        self._library, self._memory = library, memory
        if library is None:
            if cuda.gpu() is None:
                raise DiffpressError(f"{ABSENT}: this benchmark measures nothing else")
            if sys.platform == "win32":
                self._library = ctypes.WinDLL("nvcuda.dll")
            else:
                self._library = ctypes.CDLL("libcuda.so.1")
        for name, arguments in _CALLS.items():
            getattr(self._library, name).argtypes = arguments
        self._events: tuple[int, int] | None = None

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise DiffpressError(f"CUDA: error {code} from {name}")

    def activate(self) -> cuda.Device:
        """The runtime's view of the GPU, whose context is this thread's from here on."""
        if self._memory is None:
            self._memory = cuda.device()
        self._memory.activate()
        return self._memory

    def synchronize(self) -> None:
        """Wait for all work of this process, on every stream."""
        self._call("cuCtxSynchronize")

    def time(self, call: Callable[[], object]) -> float:
        """Milliseconds on the GPU from before `call` until all its work is done, waiting for its launches included."""
        self.activate()
        if self._events is None:
            made = (c_void_p(), c_void_p())
            for event in made:
                self._call("cuEventCreate", ctypes.byref(event), 0)
            self._events = (made[0].value or 0, made[1].value or 0)
        start, end = self._events
        self.synchronize()
        self._call("cuEventRecord", start, None)
        call()
        self.synchronize()
        self._call("cuEventRecord", end, None)
        self._call("cuEventSynchronize", end)
        elapsed = c_float()
        self._call("cuEventElapsedTime", ctypes.byref(elapsed), start, end)
        return float(elapsed.value)

    def used_bytes(self) -> int:
        """Memory of the GPU in use, by anybody."""
        self.activate()
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return int(total.value - free.value)

    @contextmanager
    def watched(self) -> Iterator[Peak]:
        """Within the block the memory in use is watched; other programs on the GPU would be counted in."""
        peak, stop, before = Peak(), threading.Event(), self.used_bytes()

        def look() -> None:
            with suppress(DiffpressError):  # the context may be broken by what is watched, which says so itself
                while True:
                    peak.bytes = max(peak.bytes, self.used_bytes() - before)
                    if stop.wait(POLL_S):
                        return

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield peak
        finally:
            stop.set()
            thread.join()

    def copied_bytes_per_s(self, size: int, rounds: int = 10) -> float:
        """Bytes read and written per second by copies of `size` bytes within the device, the fastest of `rounds`."""
        memory = self.activate()
        source, target = (memory.empty((size,), BYTE) for _ in range(2))
        repeats = 4

        def copies() -> None:
            for _ in range(repeats):
                memory.copy(target.address, source.address, size)

        taken = [self.time(copies) for _ in range(1 + rounds)][1:]  # the first one touches the pages
        return 2 * size * repeats / (min(taken) / 1000)

    def describe(self) -> dict[str, Any]:
        """Name, target ("sm89"), memory, versions of the driver and of CUDA, and what NVML adds."""
        gpu = cuda.gpu()
        assert gpu is not None
        version = c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        nvml, reason = opened(self.bus())
        return {
            "name": gpu.name,
            "target": gpu.target,
            "memory_bytes": gpu.memory_bytes,
            "integrated": gpu.integrated,
            "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
            "driver": driver_version(),
            **({} if nvml is None else nvml.describe()),
            "nvml": reason or "read",
        }

    def bus(self) -> str:
        """The PCI bus id, by which NVML knows the same GPU; CUDA_VISIBLE_DEVICES does not change it."""
        text = ctypes.create_string_buffer(32)
        self._call("cuDeviceGetPCIBusId", text, len(text), 0)
        return text.value.decode()

    def energy(self, call: Callable[[], object], seconds: float) -> dict[str, Any]:
        """Joules of one `call`, from as many as fit `seconds`; None and the reason where NVML does not say."""
        nvml, reason = opened(self.bus())
        if nvml is None:
            return {"energy_j": None, "power_w": None, "energy_reason": reason}
        return metered(nvml, call, seconds, self.synchronize)


def driver_version(file: Path = Path("/sys/module/nvidia/version")) -> str | None:
    """Of the kernel's module; None where there is no such file (Windows, Jetson)."""
    try:
        return file.read_text("ascii").strip()
    except OSError:
        return None


@dataclass(frozen=True)
class Nvml:
    """NVIDIA's management library and one GPU of it."""

    library: Any = field(repr=False)
    handle: Any

    def joules(self) -> float:
        """Energy that the GPU has used since the driver was loaded; its counter is from Volta on."""
        return float(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000

    def describe(self) -> dict[str, Any]:
        """The driver, the limit of the power, clocks and temperature now; what a GPU does not say is left out."""
        ask: dict[str, Callable[[], Any]] = {
            "driver": lambda: _text(self.library.nvmlSystemGetDriverVersion()),
            "power_limit_w": lambda: self.library.nvmlDeviceGetPowerManagementLimit(self.handle) / 1000,
            "clock_sm_mhz": lambda: self.library.nvmlDeviceGetMaxClockInfo(self.handle, self.library.NVML_CLOCK_SM),
            "clock_memory_mhz": lambda: self.library.nvmlDeviceGetMaxClockInfo(
                self.handle, self.library.NVML_CLOCK_MEM
            ),
        }
        found = {}
        for name, question in ask.items():
            with suppress(self.library.NVMLError):
                found[name] = question()
        return found


def opened(bus: str) -> tuple[Nvml | None, str | None]:
    """NVML for the GPU at a PCI bus id, or None and why not."""
    try:
        library: Any = importlib.import_module("pynvml")
    except ImportError:
        return None, "nvidia-ml-py is not installed: pip install nvidia-ml-py"
    try:
        library.nvmlInit()
        found = Nvml(library, library.nvmlDeviceGetHandleByPciBusId(bus.encode()))
        found.joules()
    except library.NVMLError as error:
        return None, f"NVML does not measure this GPU's energy: {error}"
    return found, None


def metered(
    nvml: Nvml,
    call: Callable[[], object],
    seconds: float,
    synchronize: Callable[[], object],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Joules per call and mean watts over as many calls as fit `seconds`, at least one.

    The counter moves every tenth of a second or so, so that a single call is not enough.
    """
    synchronize()
    before, start, count = nvml.joules(), clock(), 0
    while count == 0 or clock() - start < seconds:
        call()
        synchronize()
        count += 1
    used, taken = nvml.joules() - before, clock() - start
    return {"energy_j": used / count, "power_w": used / taken, "energy_reason": None}


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
