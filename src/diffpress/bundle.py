"""The bundle: the folder that ships, and its manifest `diffpress.json`. Standard library only.

A bundle is written to a temporary sibling and renamed, so it is whole or it is not there. The manifest lists the sha256
of every file; `load` refuses a bundle whose files differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from diffpress.errors import DiffpressError

MANIFEST = "diffpress.json"
FORMAT = 1  # of the manifest; a reader refuses a newer one
DIALECT = ".onnxruntime.onnx"  # the end of the names of graphs in ONNX Runtime's dialect


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk: its folder and what its manifest says."""

    path: Path
    manifest: Mapping[str, Any]

    def file(self, name: str) -> Path:
        """The path of a file or folder of the bundle; raises `DiffpressError` for one that lies outside it."""
        if not _inside(self.path, name):
            raise DiffpressError(f"{name} points outside the bundle {self.path}: do not use it, compress again")
        return self.path / name

    def graph(self, variant: str = "full") -> Path:
        """The denoiser's ONNX graph of a step program's variant."""
        return self.file(str(self.manifest["graphs"][variant]))


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST and not name.endswith(".part"))


def is_relative(name: str) -> bool:
    """Whether a name from a manifest or an archive stays in its folder, on every system."""
    path = PurePosixPath(name)
    return not (
        path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name or not path.parts
    )


def _inside(folder: Path, name: str) -> bool:
    """Whether `name` lies in the folder, links followed."""
    return is_relative(name) and (folder / name).resolve().is_relative_to(folder.resolve())


def problems(bundle: Bundle) -> list[str]:
    """What does not match the manifest, a line each; empty when every listed file is whole."""
    found = []
    for name, digest in bundle.manifest["files"].items():
        file = bundle.path / name
        if not _inside(bundle.path, name):
            found.append(f"{name} points outside the bundle")
        elif not file.is_file():
            found.append(f"{name} is missing")
        elif sha256(file) != digest:
            found.append(f"{name} has changed")
    return found


def read(path: str | Path) -> Bundle:
    """Open a bundle without checking its files; `inspect` wants to see a damaged one."""
    folder = Path(path)
    file = folder / MANIFEST
    if folder.is_file() and folder.suffix == ".tar":
        raise DiffpressError(f"{folder} is a package, which only run takes: diffpress unpack {folder}")
    if not folder.is_dir():
        raise DiffpressError(f"there is no bundle at {folder}: compress a model first")
    if not file.is_file():
        raise DiffpressError(f"{folder} is not a bundle: it has no {MANIFEST}")
    try:
        manifest = json.loads(file.read_text("utf-8"))
        version = manifest["format"]
        complete = all(key in manifest for key in ("files", "graphs", "sampling", "program", "latent"))
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise DiffpressError(f"{file} cannot be read ({error}): compress the model again") from error
    if version != FORMAT or not complete:
        raise DiffpressError(f"{file} has format {version}, this diffpress reads format {FORMAT}: compress again")
    return Bundle(folder, manifest)


def load(path: str | Path) -> Bundle:
    """Open a bundle and check every file; raises `DiffpressError` naming the first that differs."""
    bundle = read(path)
    found = problems(bundle)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise DiffpressError(f"bundle {path} is damaged: {found[0]}{more}; compress again or restore the file")
    return bundle


@contextmanager
def create(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well and vanishes when it does not."""
    target = Path(path)
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)
        refuse_existing(target)
        partial.rename(target)
    except OSError as error:
        raise DiffpressError(
            f"{target} could not be written, nothing was left there: {error.strerror or error}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(target: Path) -> None:
    """Raise when something is already there: nobody's bundle is overwritten."""
    if target.exists():
        raise DiffpressError(f"{target} exists already: choose another --output or remove it first")


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Hash every file of `folder` and write the manifest, whole or not at all."""
    document = {**manifest, "format": FORMAT, "files": {name: sha256(folder / name) for name in _files(folder)}}
    part = folder / (MANIFEST + ".part")
    try:
        part.write_text(json.dumps(document, indent=1), "utf-8")
        os.replace(part, folder / MANIFEST)
    finally:
        part.unlink(missing_ok=True)


def update(bundle: Bundle, **changes: Any) -> Bundle:
    """Change top-level entries of the manifest and take in files that were added (engines, reports)."""
    write_manifest(bundle.path, {**bundle.manifest, **changes})
    return read(bundle.path)


def denoiser_bytes(folder: Path) -> int:
    """Bytes of the denoiser's standard graphs and their weights; a run reads these or a dialect's graphs, not both."""
    return sum(file.stat().st_size for file in folder.glob("unet/*.onnx*") if not file.name.endswith(DIALECT))
