"""Reads packages (`pack.py` writes them): unpacks one beside itself, once, and builds its engines on the first start.

Nothing of an archive is believed: every entry must be a plain file that the manifest lists, of the size and with the
digest that it lists, and lands within the folder. The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffpress import bundle as bundles
from diffpress.bundle import MANIFEST, Bundle
from diffpress.engines.build import build
from diffpress.engines.prepared import Prepared
from diffpress.errors import DiffpressError
from diffpress.paths import cache_root
from diffpress.runtime import backends, matching, tensor_rt
from diffpress.runtime.lock import locked
from diffpress.runtime.matching import Machine, Mismatch
from diffpress.runtime.pack import identity

LARGEST_MANIFEST = 64 << 20  # bytes; it is read into memory before anything is known about it
CHUNK = 1 << 20


def opened(source: str | Path, backend: str = "auto", progress: bool = True, fallback: bool = False) -> Bundle:
    """The bundle at `source`, a folder or a package, checked file by file and ready to run on `backend`.

    A package is unpacked beside itself (box.tar to box.unpacked/, or the user's cache folder where that cannot be
    written) unless it already is. One that builds its engines on the target does so on its first start; with `fallback`
    a missing library is no error, its graphs will run. Two processes do not do either twice. Raises `DiffpressError`.
    """
    path = Path(source)
    bundle = bundles.load(_unpacked(path, progress) if path.is_file() else path)
    return _built(bundle, backend, progress, fallback)


def unpack(file: Path, output: Path) -> Bundle:
    """Unpack a package into the new folder `output`; raises `DiffpressError` and leaves nothing if it is not whole."""
    with _archive(file) as archive:
        manifest, document = _manifest(file, archive)
        bundles.refuse_existing(output)
        _check_space(file, manifest, output)
        with bundles.create(output) as folder:
            _extract(file, archive, manifest, folder)
            (folder / MANIFEST).write_bytes(document)
    return bundles.read(output)


def _unpacked(file: Path, progress: bool) -> Path:
    """The folder that a package was unpacked into, now or earlier."""
    with _archive(file) as archive:
        manifest, _ = _manifest(file, archive)
    folder = file.with_suffix(".unpacked")
    if not os.access(file.absolute().parent, os.W_OK):
        folder = cache_root() / "runtime" / "packages" / manifest["package"]["id"][:32]
        folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(_lock_of(folder), f"it unpacks {file}", progress):
        _clean(folder)
        if folder.exists():
            known = bundles.read(folder).manifest.get("package", {})
            if known.get("id") == manifest["package"]["id"]:
                return folder
            if not known:
                raise DiffpressError(f"{folder} is not what a package was unpacked into: move it, or the package")
            shutil.rmtree(folder)
        unpack(file, folder)
    return folder


def _built(bundle: Bundle, backend: str, progress: bool, fallback: bool) -> Bundle:
    """The bundle with engines that this machine's GPU runs, where it is a package that builds them on its target."""
    order = bundle.manifest.get("package", {}).get("build")
    if not order or backend not in ("auto", *backends.ENGINES):
        return bundle
    machine = Machine.here()
    if machine is None or machine.gpu.target not in order["targets"]:
        return bundle  # what is chosen to run it says why, or does without engines
    library = _library(machine, backend)
    if library is None and fallback:
        return bundle
    if library is None:
        wanted = _wanted(backend)
        raise DiffpressError(
            f"this package builds its engines on its first start, and {' or '.join(wanted)} is not installed: "
            f"pip install 'diffpress[{tensor_rt.EXTRAS[wanted[0]]}]' (on a Jetson it comes with JetPack), or --backend "
            "onnxruntime-cuda"
        )
    prepared = Prepared.from_json(order["prepared"])
    names = [graph.name for graph in prepared.graphs]

    def fits(candidate: Bundle) -> bool:
        try:
            return bool(matching.fitting(candidate, names, machine, library))
        except Mismatch:
            return False

    if fits(bundle):
        return bundle
    with locked(_lock_of(bundle.path), f"it builds engines for {bundle.path}", progress):
        bundle = bundles.load(bundle.path)  # another process may have built them
        if not fits(bundle):
            _clean(bundle.path)
            memory_gb = machine.gpu.memory_bytes / 1e9
            bundle = build(bundle, prepared, [machine.gpu.target], progress, package=library, memory_gb=memory_gb)
    return bundle


def _library(machine: Machine, backend: str) -> str | None:
    """The installed library that builds and runs engines here, the full TensorRT rather than the one for RTX."""
    return next((name for name in _wanted(backend) if name in machine.versions), None)


def _wanted(backend: str) -> list[str]:
    return [backend] if backend in backends.ENGINES else list(backends.ENGINES)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _clean(folder: Path) -> None:
    """Remove what a process that was killed left beside the folder; only for who holds its lock."""
    for left in (*folder.parent.glob(f".{folder.name}.*.partial"), *folder.parent.glob(f".{folder.name}.*.engines")):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _archive(file: Path) -> Iterator[tarfile.TarFile]:
    if not file.is_file():
        raise DiffpressError(f"there is no package at {file}: diffpress pack makes one")
    try:
        with tarfile.open(file, "r:") as archive:
            yield archive
    except (tarfile.TarError, EOFError) as error:
        raise DiffpressError(f"{file} is not a whole package ({error}): copy it again, or pack it again") from error


def _manifest(file: Path, archive: tarfile.TarFile) -> tuple[dict[str, Any], bytes]:
    """The manifest of a package, its first entry, and its bytes."""
    first = archive.next()
    if first is None or first.name != MANIFEST or not _is_plain(first) or first.size > LARGEST_MANIFEST:
        raise DiffpressError(f"{file} is not a package of diffpress: diffpress pack makes one")
    stream = archive.extractfile(first)
    document = b"" if stream is None else stream.read()
    try:
        manifest = json.loads(document)
        package, files = manifest["package"], manifest["files"]
        if manifest["format"] != bundles.FORMAT:
            raise DiffpressError(
                f"{file} has format {manifest['format']}, this diffpress reads {bundles.FORMAT}: pack again"
            )
        whole = package["id"] == identity(manifest) and package["bytes"].keys() == files.keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DiffpressError(f"{file} is not a package of diffpress ({error!r}): pack it again") from error
    if not whole:
        raise DiffpressError(f"the manifest of {file} has changed: copy it again, or pack it again")
    return manifest, document


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Whether an entry is a file and nothing else: no link, folder, device or file with holes."""
    return member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()


def _check_space(file: Path, manifest: Mapping[str, Any], output: Path) -> None:
    needed = sum(manifest["package"]["bytes"].values())
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise DiffpressError(f"{file} needs {needed / 1e9:.1f} GB at {parent}, which has {free / 1e9:.1f} GB free")


def _extract(file: Path, archive: tarfile.TarFile, manifest: Mapping[str, Any], folder: Path) -> None:
    files, sizes = manifest["files"], manifest["package"]["bytes"]
    seen = set[str]()
    while (member := archive.next()) is not None:
        name = member.name
        if not _is_plain(member) or not bundles.is_relative(name):
            raise DiffpressError(f"{file} holds {name}, a link or a path that leads out of it: do not use it")
        if name not in files or name in seen:
            raise DiffpressError(f"{file} holds {name}, which its manifest does not list so: pack it again")
        if member.size != sizes[name]:
            raise DiffpressError(f"{file}: {name} has {member.size} bytes instead of {sizes[name]}: copy it again")
        seen.add(name)
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if _copied(archive, member, target) != files[name]:
            raise DiffpressError(f"{file}: {name} has changed: copy it again, or pack it again")
    if missing := files.keys() - seen:
        raise DiffpressError(f"{file} is truncated, it lacks {min(missing)}: copy it again, or pack it again")


def _copied(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> str:
    """Write an entry's bytes and return their sha256."""
    digest, stream = hashlib.sha256(), archive.extractfile(member)
    assert stream is not None  # it is a plain file
    with target.open("xb") as sink:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            sink.write(chunk)
    return digest.hexdigest()
