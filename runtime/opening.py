"""On what a bundle runs here, and how its graphs are opened there: engines of this GPU, or graphs on a library."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError
from diffpress.runtime import backends, external, matching
from diffpress.runtime.matching import Engine, Machine, Mismatch
from diffpress.runtime.session import Session


@dataclass(frozen=True)
class Opening:
    """A bundle and what runs it: a backend, a precision, and the engines where it is one that runs engines."""

    bundle: Bundle
    backend: str
    precision: str
    threads: int | None = None
    engines: Mapping[str, Engine] = field(default_factory=dict)  # by name
    note: str | None = None  # why it is not what was asked for, in one line

    def graphs(self, graphs: Mapping[str, str]) -> dict[str, Path]:
        """What to open for each of these graphs (name -> file in the bundle): an engine, or the graph as it is listed,
        in the backend's dialect where it has one.
        """
        dialects = self.bundle.manifest.get("dialects")
        dialect = dialects.get(self.backend, {}) if isinstance(dialects, Mapping) else {}
        return {name: self.file(name, dialect.get(name, file)) for name, file in graphs.items()}

    def file(self, name: str, graph: str) -> Path:
        """What to open for one graph; raises `DiffpressError` when the bundle does not list it or its weights."""
        if name in self.engines:
            return self.bundle.file(self.engines[name].path)
        return self.bundle.file(external.parts(self.bundle, graph)[0])

    def open(self, file: Path, precision: str | None = None) -> Session:
        """Open what `file` returned; `precision` instead of the chosen one, which engines do not ask for.

        A graph beside engines, an optional one, runs on a library that takes graphs.
        """
        for engine in self.engines.values():
            if self.bundle.file(engine.path) == file:
                return matching.open_engine(self.bundle, engine)
        if self.engines:
            return backends.open_session(file, *_fallback("fp32"), self.threads)
        return backends.open_session(file, self.backend, precision or self.precision, self.threads)

    def component(self, name: str, precision: str | None = None) -> Session:
        """Open a component beside the denoiser: "vae_decoder", "text_encoder", ..."""
        return self.open(self.file(name, f"{name}/model.onnx"), precision)


def choose_opening(
    bundle: Bundle,
    names: Collection[str],
    backend: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    fallback: bool = False,
    machine: Callable[[], Machine | None] = Machine.here,
    optional: Collection[str] = (),
) -> Opening:
    """Choose what runs the graphs `names` (variants and components) of a bundle here, and those of `optional` that
    engines need not have.

    "auto" takes engines that fit this GPU first, then CUDA, then what the bundle's bench found fastest among what runs
    here. Engines that are there, with their library, for a GPU that is there, and do not fit, are an error, and so are
    those that `backend` asks for; with `fallback`, ONNX Runtime (or OpenVINO, where only that is installed) runs the
    graphs instead and `note` says why. Raises `DiffpressError`.
    """
    if backend in backends.ENGINES or backend == "auto":
        found = machine()
        library = None if backend == "auto" else backend
        try:
            if library or (found and _could_run(bundle, found) and precision == "auto"):
                if precision != "auto":
                    raise DiffpressError(
                        f"{backend} runs engines in the precision that they were built with: leave out --precision"
                    )
                chosen = matching.fitting(bundle, names, found, library, optional)
                first = next(iter(chosen.values()))
                return Opening(bundle, first.library, first.precision, threads, chosen)
        except Mismatch as error:
            if not fallback:
                raise
            return _graphs(bundle, *_fallback(precision), threads, str(error))
    preferred = bundle.manifest.get("default_backend")
    return _graphs(bundle, *choose(backend, precision, preferred, backends.available()), threads)


def _could_run(bundle: Bundle, machine: Machine) -> bool:
    """Whether the bundle has engines of a library that is installed: then they are meant to be used."""
    return any(engine.library in machine.versions for engine in matching.listed(bundle))


def _fallback(precision: str) -> tuple[str, str]:
    """ONNX Runtime where it is installed, on CUDA if that runs here."""
    runnable = [pair for pair in backends.available() if precision in ("auto", pair[1])]
    ordered = [pair for pair in runnable if pair[0].startswith(backends.ONNXRUNTIME)] + runnable
    return ordered[0] if ordered else choose("auto", precision, None, runnable)


def _graphs(bundle: Bundle, backend: str, precision: str, threads: int | None, note: str | None = None) -> Opening:
    backends.check(backend, precision)
    engines = bundle.manifest.get("engines", ())
    if engines and not any(file in bundle.manifest["files"] for file in bundle.manifest["graphs"].values()):
        targets = ", ".join(dict.fromkeys(entry["target"] for entry in engines))
        raise DiffpressError(
            f"{bundle.path} holds engines for {targets} and no graphs, which {backend} runs: pack it with --target cpu "
            f"as well{f' ({note})' if note else ''}"
        )
    return Opening(bundle, backend, precision, threads, note=note)


def choose(backend: str, precision: str, preferred: Any, runnable: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Resolve "auto" among `runnable`: a GPU that is there before the processor, then the bundle's measured default
    where it runs here and fits what was asked, else the first pair that fits. What is asked for by name is kept.
    """

    def fits(pair: tuple[str, str]) -> bool:
        return backend in ("auto", pair[0]) and precision in ("auto", pair[1])

    if backend != "auto" and precision != "auto":
        return backend, precision
    default = [(preferred["name"], preferred["precision"])] if preferred else []
    on_gpu = [pair for pair in runnable if pair[0] == backends.CUDA and fits(pair)]
    for pair in [pair for pair in default if pair in (on_gpu or runnable)] + on_gpu + list(runnable):
        if fits(pair):
            return pair
    if backend == "auto" and not runnable:
        raise DiffpressError("no inference library is installed: pip install 'diffpress[cpu]'")
    # Nothing fits: name a pair whose check says what is wrong.
    if precision == "auto":
        precision = backends.GRAPHS[backend][0] if backend in backends.GRAPHS else "fp32"
    return backends.OPENVINO if backend == "auto" else backend, precision
