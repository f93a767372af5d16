"""What this processor can do at best, measured: large products by type, and bytes per second by how much is moved.

Moved again and again, a few hundred kilobytes stay in a cache and go faster than memory: the roofline has a roof for
each size (Ilic, Pratas and Sousa 2014, "Cache-aware Roofline model"). The fastest run counts, of every library that is
here: a ceiling is what was reached once. GPUs have `gpu_ceilings`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffpress.benchmarks import gpu_ceilings, machine
from diffpress.benchmarks.latency import wall_clock
from diffpress.errors import DiffpressError
from diffpress.runtime import backends

SIZE = 2048  # rows, columns and depth of the products
MOVED = tuple(1 << exponent for exponent in range(18, 29, 2))  # bytes: 256 KiB to 256 MiB
ROUNDS = 5
_PASS = 1 << 26  # bytes that are moved in one measurement, at least


@dataclass(frozen=True)
class Ceilings:
    """Operations per second by type; bytes per second by the bytes that are moved again and again."""

    operations_per_s: Mapping[str, float]
    bytes_per_s: Mapping[int, float]
    method: str

    def bandwidth(self, size: float) -> float:
        """Bytes per second of a working set of `size` bytes: as fast as the next smaller one that was measured."""
        smaller = [known for known in self.bytes_per_s if known <= size]
        return self.bytes_per_s[max(smaller) if smaller else min(self.bytes_per_s)]

    def as_json(self) -> dict[str, Any]:
        """As it stands in a report."""
        return {
            "operations_per_s": dict(self.operations_per_s),
            "bytes_per_s": {str(size): rate for size, rate in self.bytes_per_s.items()},
            "method": self.method,
        }


def measure(kinds: Collection[str], size: int = SIZE, moved: Sequence[int] = MOVED, rounds: int = ROUNDS) -> Ceilings:
    """Measure this processor on all cores that the process may use; `kinds` ("fp32", "int8", ...) are those asked for.

    A type that nothing here multiplies is left out.
    """
    with all_cores():
        found = {kind: 2 * size**3 / seconds for kind, seconds in _products(kinds, size, rounds).items()}
        rates = {count: _bytes_per_s(count, rounds) for count in moved}
    # A smaller set is never slower; what is measured of the smallest is the call.
    steady = {count: max(rate for other, rate in rates.items() if other >= count) for count in rates}
    return Ceilings(
        found, steady, f"products of {size}, reading and copying; the fastest of {rounds} by torch and backends"
    )


def of_gpu(measured: Mapping[str, Any]) -> Ceilings:
    """What `gpu_ceilings.measure` found, whose copies are of the GPU's memory alone."""
    peaks = {kind: peak for kind, peak in measured["operations_per_s"].items() if peak}
    return Ceilings(peaks, {0: measured["bytes_per_s"]}, measured["method"])


def _products(kinds: Collection[str], size: int, rounds: int) -> dict[str, float]:
    """Seconds of the fastest product by type."""
    fastest: dict[str, float] = {}

    def note(kind: str, run: Callable[[], object]) -> None:
        run()
        seconds = min(wall_clock(run) for _ in range(rounds)) / 1000
        fastest[kind] = min(seconds, fastest.get(kind, seconds))

    made = gpu_ceilings.products("cpu", size)
    for kind in kinds:
        try:
            note(kind, made[kind]())
        except (RuntimeError, NotImplementedError, AttributeError):  # this build of torch does not multiply it
            continue
    with tempfile.TemporaryDirectory(prefix="diffpress-ceilings-") as folder:
        for kind, run in _graph_products(Path(folder), size):
            if kind in kinds:
                note(kind, run)
    return fastest


def _graph_products(folder: Path, size: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """The same products as graphs, by the type that each backend multiplies them in."""
    files = {kind: _graph(folder / f"{kind}.onnx", size, kind == "int8") for kind in ("fp32", "int8")}
    sample = np.random.default_rng(0).standard_normal((1, size, size)).astype(np.float32)
    for backend, precision in backends.available():
        if backend not in (backends.OPENVINO, backends.ONNXRUNTIME):
            continue
        for stored, file in files.items():
            if stored == "int8" and precision != "fp32":
                continue  # the same integers
            try:
                session = backends.open_session(file, backend, precision)
                session.run({"sample": sample})
            except DiffpressError:
                continue
            kind = "int8" if stored == "int8" else precision
            yield kind, lambda session=session: session.run({"sample": sample})  # type: ignore[misc]


def _graph(file: Path, size: int, integers: bool) -> Path:
    """One product with a weight and little to hand out, which would take time of its own; INT8 as `quantize` does."""
    from diffpress.export import graphs, qdq, store
    from diffpress.plan import LayerQuant

    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = torch.nn.Linear(size, size, bias=False)

    class Product(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.linear(sample).amax(-1),)

    model = graphs.to_onnx(graphs.GraphSpec(Product().eval(), {"sample": torch.zeros(2, size, size)}, ("out",)))
    if integers:
        scale = np.full(size, 1 / (127 * size**0.5), np.float32)
        qdq.insert(model, {"linear": LayerQuant(scale, np.array([4 / 127], np.float32))}, prefix="")
    graphs.finish(model)
    store.save({file.name: model}, file.parent)
    return file


def _bytes_per_s(size: int, rounds: int) -> float:
    """Of `size` bytes in two arrays, the faster of reading both and copying one to the other."""
    one, other = torch.zeros(2, size // 8)  # float32: half of the bytes each
    repeats = max(1, _PASS // size)

    def read() -> None:
        for _ in range(repeats):
            one.sum(), other.sum()

    def copy() -> None:
        for _ in range(repeats):
            other.copy_(one)

    taken = min(wall_clock(run) for run in (read, copy) for _ in range(1 + rounds))
    return size * repeats / (taken / 1000)


@contextmanager
def all_cores() -> Iterator[None]:
    """Within the block torch uses what backends would use by themselves."""
    before = torch.get_num_threads()
    torch.set_num_threads(machine.machine()["cores"] or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
