"""Which of a bundle's engines fit this machine: its GPU, the installed library, the graphs they were built from.

An engine has a sidecar, a JSON file beside it, that says for which target, with which library and of which graph it was
built. Both libraries load only engines of their own release: TensorRT for RTX always (its documentation, "Engine
Compatibility"), TensorRT unless an engine is built to carry a runtime with it, which would be code in a bundle.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError
from diffpress.paths import cache_root
from diffpress.runtime import cuda, tensor_rt
from diffpress.runtime.session import Session

LIBRARIES = ("tensorrt-rtx", "tensorrt")  # as packages and as backends, the preferred one first


class Mismatch(DiffpressError):
    """No engine fits this machine; the message says why and what to do."""


@dataclass(frozen=True)
class Engine:
    """An engine of a bundle, as its sidecar describes it."""

    name: str  # of the denoiser's variant, or of the component
    path: str  # relative to the bundle
    target: str  # "sm89"
    library: str
    version: str
    precision: str
    bytes: int
    graph: Mapping[str, str]  # file -> sha256, of the graph and its weights


@dataclass(frozen=True)
class Machine:
    """What engines have to fit: the target of the GPU, and the versions of the libraries that are installed."""

    gpu: cuda.Gpu
    versions: Mapping[str, str]

    @classmethod
    def here(cls) -> Machine | None:
        """This machine, or None when it has no NVIDIA GPU."""
        gpu = cuda.gpu()
        if gpu is None:
            return None
        found = {library: tensor_rt.version(library) for library in LIBRARIES}
        return cls(gpu, {library: version for library, version in found.items() if version is not None})


def listed(bundle: Bundle) -> list[Engine]:
    """Every engine of the bundle; raises `DiffpressError` when a sidecar is missing or not as diffpress writes it."""
    found = []
    for entry in bundle.manifest.get("engines", ()):
        try:
            path = str(entry["path"])
            sidecar = path.removesuffix(".engine") + ".json"
            if path not in bundle.manifest["files"] or sidecar not in bundle.manifest["files"]:
                raise DiffpressError(f"{bundle.path} does not list {path} and its sidecar: build the engines again")
            found.append(_engine(path, json.loads(bundle.file(sidecar).read_text("utf-8"))))
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            raise DiffpressError(
                f"{bundle.path}: the engines are not as diffpress wrote them ({error!r}): build them again"
            ) from error
    return found


def _engine(path: str, sidecar: Mapping[str, Any]) -> Engine:
    libraries = [name for name in LIBRARIES if name in sidecar["versions"]]
    if len(libraries) != 1:
        raise ValueError(f"{path} was built with {libraries or 'no library'}")
    library = libraries[0]
    return Engine(
        str(sidecar["variant"] or sidecar["component"]),
        path,
        str(sidecar["target"]),
        library,
        str(sidecar["versions"][library]),
        str(sidecar["precision"]),
        int(sidecar["bytes"]),
        {str(file): str(digest) for file, digest in sidecar["sha256"].items()},
    )


def fitting(
    bundle: Bundle,
    names: Collection[str],
    machine: Machine | None,
    library: str | None = None,
    optional: Collection[str] = (),
) -> dict[str, Engine]:
    """By name, an engine for each of `names` that `machine` can run, all of one library (`library` if given), and for
    those of `optional` that have one.

    Raises `Mismatch` with one line that says what is wrong and what to do.
    """
    wanted = f"--backend {library}" if library else "an engine"
    if machine is None:
        raise Mismatch(f"{wanted} needs an NVIDIA GPU and its driver, and there is none here: use --backend auto")
    gpu, engines = machine.gpu, listed(bundle)
    here = f"this GPU is a {gpu.name} ({gpu.target})"
    build = f"diffpress build {bundle.path} --target {gpu.target}"
    if not engines:
        raise Mismatch(f"{bundle.path} has no engines, {here}: {build}, or --fallback")
    ours = [engine for engine in engines if engine.target == gpu.target]
    if not ours:
        targets = ", ".join(dict.fromkeys(engine.target for engine in engines))
        raise Mismatch(f"{bundle.path} has engines for {targets}, {here}: {build}, or --fallback")
    reasons = []
    for candidate in (library,) if library else LIBRARIES:
        chosen = {engine.name: engine for engine in ours if engine.library == candidate}
        reason = _reason(bundle, chosen, names, candidate, machine, build)
        if reason is None:
            return {name: chosen[name] for name in (*names, *optional) if name in chosen}
        if chosen or library:
            reasons.append(reason)
    raise Mismatch(reasons[0])


def _reason(
    bundle: Bundle, chosen: Mapping[str, Engine], names: Collection[str], library: str, machine: Machine, build: str
) -> str | None:
    """Why these engines of one library for one target cannot be run, or None."""
    if not chosen:
        return f"{bundle.path} has no {machine.gpu.target} engines of {library}: use --backend auto, or --fallback"
    first = next(iter(chosen.values()))
    what = f"{bundle.path}: its {first.target} engines were built with {library} {first.version}"
    installed = machine.versions.get(library)
    if installed is None:
        return f"{what}, which is not installed: pip install {library}=={first.version}, or --fallback"
    if any(engine.version != installed for engine in chosen.values()):
        return (
            f"{what}, {installed} is installed, and engines run with their own version only: "
            f"pip install {library}=={first.version}, or {build}, or --fallback"
        )
    if missing := [name for name in names if name not in chosen]:
        return f"{bundle.path} has no {first.target} engine of {missing[0]}: {build}, or --fallback"
    for engine in chosen.values():
        # A package for one target may hold engines alone: what it does not list cannot contradict it.
        files = bundle.manifest["files"]
        if any(files.get(file, digest) != digest for file, digest in engine.graph.items()):
            return (
                f"{bundle.path}: {engine.path} was built from another graph than the bundle's: {build}, or --fallback"
            )
        size = bundle.file(engine.path).stat().st_size
        if size != engine.bytes:
            return f"{bundle.path}: {engine.path} has {size} bytes instead of {engine.bytes}: {build}, or --fallback"
    return None


def open_engine(bundle: Bundle, engine: Engine) -> Session:
    """Open an engine on this machine's GPU; raises `DiffpressError` when its bytes are not those of the manifest."""
    digest = bundle.manifest["files"][engine.path]
    kept = cache_root() / "runtime" / engine.library / f"{digest[:32]}-{engine.version}.cache"
    return tensor_rt.TensorRt(bundle.file(engine.path), engine.library, cuda.device(), digest, kept)
