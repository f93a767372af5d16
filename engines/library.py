"""The TensorRT library that is installed: which it is, what it builds for, and its errors in the user's words.

TensorRT for RTX builds for any target it knows, without a GPU; the full TensorRT builds for the GPU of this machine.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import subprocess
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from diffpress.errors import DiffpressError

LIBRARIES = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}  # module -> package, the preferred one first
FIGURES = {"Total Activation Memory": "activations", "Total Weights Memory": "weights"}  # that builders log, in bytes


def find(package: str | None = None) -> ModuleType:
    """The installed library, the one of `package` if given; raises `DiffpressError` when there is none."""
    wanted = [module for module, name in LIBRARIES.items() if package in (None, name)]
    for module in wanted:
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    missing = "neither tensorrt-rtx nor tensorrt is installed, one of which" if package is None else f"{package}, which"
    raise DiffpressError(
        f"{missing} is needed to build engines{'' if package is None else ', is not installed'}: "
        f"pip install 'diffpress[{package or 'tensorrt-rtx'}]'"
    )


def package(trt: ModuleType) -> str:
    """The name it is installed by."""
    return LIBRARIES[trt.__name__]


def capabilities(trt: ModuleType) -> dict[str, Any]:
    """Target -> the library's value for it; None where the library knows no other target than the machine's GPU."""
    if hasattr(trt, "ComputeCapability"):
        members = trt.ComputeCapability.__members__.items()
        known = {name.lower(): value for name, value in members if re.fullmatch(r"SM\d+", name)}
        # A GPU that it has no name for: it is tried, and the library's own refusal is the answer.
        return known | {name: trt.ComputeCapability.CURRENT for name in present() if name not in known}
    return dict.fromkeys(present())


def present() -> list[str]:
    """The targets of this machine's GPUs, as its driver names them."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return _by_driver()
    return list(dict.fromkeys("sm" + line.strip().replace(".", "") for line in found.splitlines() if line.strip()))


def _by_driver() -> list[str]:
    """The same from CUDA's driver: Jetson machines have no nvidia-smi that answers this."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, major, minor, device = (ctypes.c_int() for _ in range(4))
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found: dict[str, None] = {}
    for index in range(count.value):
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        found[f"sm{major.value}{minor.value}"] = None
    return list(found)


def logger(trt: ModuleType) -> Any:
    """A TensorRT logger that keeps what messages to the user need: errors, a line each, and `figures` of memory.

    The figures are those of the engine that was built last.
    """

    class Logger(trt.ILogger):  # type: ignore[name-defined]  # the base class is known when the library is
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.figures: dict[str, int] = {}

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(" ".join(message.split()))
            name, _, value = message.partition(": ")
            if name in FIGURES and (size := re.match(r"\d+", value)):
                self.figures[FIGURES[name]] = int(size.group())

    return Logger()


def refusal(trt: ModuleType, file: str, target: str | None = None) -> str:
    """The beginning of the sentence that says what cannot be built."""
    aim = f" for {target}" if target else ""
    return f"{package(trt)} cannot build {file}{aim}"


def parser_error(parser: Any) -> str:
    """The parser's first error in one line, with the node it stopped at."""
    if not parser.num_errors:
        return "the parser gave no reason"
    error = parser.get_error(0)
    node = f"node '{error.node_name()}' ({error.node_operator()}): " if error.node_operator() else ""
    return node + " ".join(error.desc().split())


def builder_error(errors: Sequence[str]) -> str:
    """The builder's first error without its source positions, which tell the user nothing."""
    text = " ".join(errors[0].split()) if errors else "the builder gave no reason"
    text = re.sub(r"^.*?Error Code \d+: [^(]*\((.*)\)$", r"\1", text)
    text = re.sub(r"^\[[^\]]*\]\s*", "", text)
    return re.sub(r"\.? In \S+ at \S+:\d+", "", text)
