"""What a device can do at best, measured: large matrix products by type, and a copy within its memory.

Random values, because products of zeros draw less power and run at a higher clock. The fastest of the rounds counts: a
ceiling is what was reached once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from diffpress.benchmarks.gpu_device import Device

SIZE = 8192  # rows, columns and depth
COPIED = 1 << 30  # bytes, or an eighth of the device's memory where that is less
ROUNDS, WARMUP, REPEATS = 12, 3, 4


def measure(
    device: Device, memory_bytes: int, size: int = SIZE, rounds: int = ROUNDS, place: str = "cuda"
) -> dict[str, Any]:
    """Operations per second by type, bytes per second (read and written), and for what is missing the reason.

    Products are torch's, on its device `place`; the copy needs the driver alone.
    """
    found: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for kind, make in products(place, size).items():
        try:
            found[kind] = 2 * size**3 * REPEATS / _fastest_s(device, make(), rounds)
        # What a build of torch or a GPU lacks it says by any of these.
        except (RuntimeError, NotImplementedError, AttributeError, ImportError, AssertionError, ValueError) as error:
            found[kind] = None
            reasons[kind] = (str(error).strip().splitlines() or [type(error).__name__])[0]
        finally:
            _empty_cache(place)
    return {
        "operations_per_s": found,
        "bytes_per_s": device.copied_bytes_per_s(min(COPIED, memory_bytes // 8), rounds),
        "reasons": reasons,
        "method": f"square products of {size}, copies within the device; the fastest of {rounds}",
    }


def products(place: str, size: int) -> dict[str, Callable[[], Callable[[], object]]]:
    """By type, a function that makes the operands on the torch device `place` and returns their product."""

    def operands(kind: str, spread: float = 1.0) -> tuple[Any, Any, Any]:
        torch: Any = importlib.import_module("torch")
        generator = torch.Generator(device=place).manual_seed(0)
        made = [torch.randn(size, size, device=place, generator=generator) * spread for _ in range(2)]
        left, right = ((one.clamp(-127, 127) if spread != 1 else one).to(getattr(torch, kind)) for one in made)
        return torch, left, right.t()  # the columns of the right one lie in a row, as its kernels want

    def plain(kind: str, tf32: bool = False) -> Callable[[], object]:
        torch, left, right = operands(kind)

        def run() -> object:
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = tf32
            try:
                return left @ right
            finally:
                torch.backends.cuda.matmul.allow_tf32 = before

        return run

    def integers() -> Callable[[], object]:
        torch, left, right = operands("int8", 40.0)
        return lambda: torch._int_mm(left, right)

    def eighths() -> Callable[[], object]:
        torch, left, right = operands("float8_e4m3fn")
        one = torch.ones((), device=place)
        return lambda: torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return {
        "fp32": lambda: plain("float32"),
        "tf32": lambda: plain("float32", tf32=True),
        "fp16": lambda: plain("float16"),
        "bf16": lambda: plain("bfloat16"),
        "int8": integers,
        "fp8": eighths,
    }


def _fastest_s(device: Device, product: Callable[[], object], rounds: int) -> float:
    """Seconds of `REPEATS` products."""

    def repeated() -> None:
        for _ in range(REPEATS):
            product()

    return min([device.time(repeated) for _ in range(WARMUP + rounds)][WARMUP:]) / 1000


def _empty_cache(place: str) -> None:
    if place == "cuda" and "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()
