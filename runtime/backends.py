"""Which backends there are, which of them run here, and how a graph is opened on one; a file per library does it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from diffpress.errors import DiffpressError
from diffpress.runtime import cuda, onnx_runtime, open_vino
from diffpress.runtime.session import Feeds, Port, Session

__all__ = ["Feeds", "Port", "Session", "available", "check", "open_session"]

ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
CUDA = "onnxruntime-cuda"
# Backends that run graphs, and the precisions of each; the first is what "auto" means.
GRAPHS = {
    OPENVINO: ("fp32", "bf16"),
    "openvino-gpu": ("fp32", "fp16"),
    ONNXRUNTIME: ("fp32",),
    CUDA: ("fp32", "tf32"),
    "onnxruntime-tensorrt": ("fp32",),
    "onnxruntime-tensorrt-rtx": ("fp32",),
}
ENGINES = ("tensorrt", "tensorrt-rtx")  # backends that run engines, whose precision was decided when they were built
PRECISIONS = ("fp32", "bf16", "fp16", "tf32")


def available() -> list[tuple[str, str]]:
    """The (backend, precision) pairs that run graphs on this machine, the preferred one first.

    Those that first build engines for minutes, ONNX Runtime's TensorRT providers, are left to who names them.
    """
    pairs = []
    if cuda.gpu() is not None and _installed(ONNXRUNTIME) and onnx_runtime.has_provider(CUDA):
        pairs += [(CUDA, precision) for precision in GRAPHS[CUDA]]
    if _installed(OPENVINO):
        pairs += [(OPENVINO, "fp32")]
        if open_vino.has_bf16():
            pairs += [(OPENVINO, "bf16")]
        if open_vino.has_gpu():
            pairs += [("openvino-gpu", precision) for precision in GRAPHS["openvino-gpu"]]
    if _installed(ONNXRUNTIME):
        pairs += [(ONNXRUNTIME, "fp32")]
    return pairs


def check(backend: str, precision: str) -> None:
    """Raise `DiffpressError` saying what to do unless (backend, precision) runs graphs on this machine."""
    if backend in ENGINES:
        raise DiffpressError(f"{backend} runs engines, not graphs: open the bundle that has them")
    if backend not in GRAPHS:
        raise DiffpressError(f"there is no backend '{backend}': choose one of {', '.join((*GRAPHS, *ENGINES))}")
    if precision not in PRECISIONS:
        raise DiffpressError(f"there is no precision '{precision}': choose one of {', '.join(PRECISIONS)}")
    if backend.startswith(OPENVINO):
        open_vino.library()
        _check_openvino(backend, precision)
    else:
        onnx_runtime.library()
        _check_onnxruntime(backend, precision)


def _check_openvino(backend: str, precision: str) -> None:
    if backend == OPENVINO and precision == "bf16" and not open_vino.has_bf16():
        raise DiffpressError("this processor has no bf16 arithmetic: use --precision fp32")
    if precision not in GRAPHS[backend]:
        raise DiffpressError(f"{backend} computes in {' or '.join(GRAPHS[backend])}, not {precision}")
    if backend != OPENVINO and not open_vino.has_gpu():
        raise DiffpressError("OpenVINO sees no Intel GPU here: install its driver, or use --backend openvino")


def _check_onnxruntime(backend: str, precision: str) -> None:
    if precision not in GRAPHS[backend]:
        choice = " or ".join(GRAPHS[backend])
        raise DiffpressError(f"ONNX Runtime computes in {choice} here, not {precision}: use --backend openvino")
    if backend == ONNXRUNTIME:
        return
    if not onnx_runtime.has_provider(backend):
        provider = onnx_runtime.PROVIDERS[backend][0]
        raise DiffpressError(
            f"the installed ONNX Runtime has no {provider}, which {backend} needs: install a build that has it "
            "(pip install onnxruntime-gpu has CUDA and TensorRT)"
        )
    if cuda.gpu() is None:
        raise DiffpressError(
            f"{backend} needs an NVIDIA GPU and its driver, and there is none here: use --backend auto"
        )


def open_session(file: Path, backend: str, precision: str = "fp32", threads: int | None = None) -> Session:
    """Open an ONNX graph. `threads` None leaves their number to the library.

    Raises `DiffpressError` when the backend or precision does not run here or the file cannot be read.
    """
    check(backend, precision)
    if threads is not None and threads < 1:
        raise DiffpressError(f"threads is {threads}: at least 1 is needed")
    if not file.is_file():
        raise DiffpressError(f"there is no graph at {file}")
    return _OPEN[backend](file, backend, precision, threads)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


_OPEN: dict[str, Callable[[Path, str, str, int | None], Session]] = {
    OPENVINO: lambda file, _, precision, threads: open_vino.OpenVino(file, precision, threads),
    "openvino-gpu": lambda file, _, precision, threads: open_vino.OpenVino(file, precision, threads, "GPU"),
    ONNXRUNTIME: onnx_runtime.OnnxRuntime,
    CUDA: onnx_runtime.OnnxRuntimeOnGpu,
    "onnxruntime-tensorrt": onnx_runtime.OnnxRuntimeOnGpu,
    "onnxruntime-tensorrt-rtx": onnx_runtime.OnnxRuntimeOnGpu,
}
