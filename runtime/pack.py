"""Packs what one kind of target needs of a bundle into a file: its engines, or graphs that it builds them from itself.

A package is an uncompressed tar archive: the manifest first, then files in order of their names, no times and no
owners, so the same bundle gives the same bytes. It holds a bundle of its own, whose manifest lists its own digests;
`package.py` reads it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffpress.bundle import FORMAT, MANIFEST, Bundle, load
from diffpress.engines.prepared import Prepared
from diffpress.errors import DiffpressError
from diffpress.plan import StepProgram
from diffpress.runtime import external, matching

CPU = "cpu"
# What TensorRT for RTX builds without a GPU. For every other target, Jetson Orin (sm87) and Hopper (sm90) among them,
# only the full TensorRT builds, and only on the target.
BUILT_HERE = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
OLDEST = 75
IMAGE_TO_IMAGE = "vae_encoder"  # the component that only image-to-image and inpainting need


def pack(
    bundle: Bundle,
    targets: Sequence[str],
    output: Path,
    image_to_image: bool = False,
    graphs: bool = False,
    progress: bool = True,
    prepare: Callable[[Bundle], Prepared] | None = None,
) -> Path:
    """Write the package `output` for `targets` ("cpu", "sm89", ...), and return it.

    A target gets its engines; "cpu" gets graphs, and so does a target that no builder here compiles for: it builds its
    engines on its first start. `graphs` adds them for every target, which `--fallback` needs there; one without engines
    then builds its own, from what `prepare` (`export.buildable.prepare`) finds of its graphs. `image_to_image` adds the
    VAE's encoder. The file appears whole or not at all.

    Raises `DiffpressError` for an unknown target, for missing engines and for a file that is there already.
    """
    check_output(output)
    bundle = load(bundle.path)
    program = StepProgram.from_json(bundle.manifest["program"])
    found = _Found(bundle, program, image_to_image)
    entries, building = _engines(found, _checked(targets), graphs)
    chosen = set(found.small)
    if CPU in targets or graphs or building:
        chosen |= found.graphs(dialects=CPU in targets or graphs)
    if image_to_image and any(not found.has_encoder(entries, target) for target in targets if target not in building):
        chosen |= set(external.parts(bundle, found.components[IMAGE_TO_IMAGE]))
    for entry in entries:
        chosen |= {entry["path"], entry["path"].removesuffix(".engine") + ".json"}
    package: dict[str, Any] = {"targets": sorted(set(targets))}
    if building:
        if prepare is None:
            raise DiffpressError(f"{building[0]} builds its own engines, and what it builds them from is not prepared")
        prepared = prepare(bundle)
        needed = tuple(graph for graph in prepared.graphs if graph.name in found.names)
        package["build"] = {"targets": building, "prepared": replace(prepared, graphs=needed).to_json()}
    manifest = _manifest(bundle, sorted(chosen), entries, package)
    _write(bundle, manifest, output, progress)
    return output


def check_output(output: Path) -> None:
    """Raise `DiffpressError` when a package cannot be written there."""
    if output.suffix != ".tar":
        raise DiffpressError(f"{output} must end in .tar: a package is a tar archive")
    if output.exists():
        raise DiffpressError(f"{output} exists already: choose another --output or remove it first")
    if not output.absolute().parent.is_dir():
        raise DiffpressError(f"there is no folder {output.parent} for {output.name}: make it first")


def identity(manifest: Mapping[str, Any]) -> str:
    """What tells one package from another: a digest of its manifest, of everything but this."""
    package = {key: value for key, value in manifest["package"].items() if key != "id"}
    text = json.dumps({**manifest, "package": package}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class _Found:
    """What a bundle holds, sorted by who needs it."""

    def __init__(self, bundle: Bundle, program: StepProgram, image_to_image: bool) -> None:
        self.bundle, self.program = bundle, program
        files = bundle.manifest["files"]
        missing = [name for name in dict.fromkeys(program.steps) if name not in bundle.manifest["graphs"]]
        if missing:
            raise DiffpressError(f"{bundle.path} has no graph for variant '{missing[0]}': compress again")
        self.variants = {name: str(bundle.manifest["graphs"][name]) for name in dict.fromkeys(program.steps)}
        others = sorted(name for name in files if name.endswith("/model.onnx") and name not in self.variants.values())
        components = {name.removesuffix("/model.onnx"): name for name in others}
        if image_to_image and IMAGE_TO_IMAGE not in components:
            raise DiffpressError(f"{bundle.path} has no {IMAGE_TO_IMAGE}, which image-to-image needs: compress again")
        denoisers = {str(Path(name).parent) for name in self.variants.values()}
        self.components = {
            name: file
            for name, file in components.items()
            if name not in denoisers and (image_to_image or name != IMAGE_TO_IMAGE)
        }
        weights = {part for name in files if name.endswith(".onnx") for part in external.parts(bundle, name)}
        left_out = ("engines/", "report/", "plan/")
        self.small = {name for name in files if name not in weights and not name.startswith(left_out)}

    @property
    def names(self) -> list[str]:
        """Of the engines that a run needs."""
        return [*self.variants, *self.components]

    def has_encoder(self, entries: Sequence[Mapping[str, Any]], target: str) -> bool:
        """Whether these engines for a target are one of the VAE's encoder as well."""
        return any(entry["target"] == target and entry["component"] == IMAGE_TO_IMAGE for entry in entries)

    def graphs(self, dialects: bool) -> set[str]:
        """The graphs that a run needs, with their weights; other backends' dialects of them as well."""
        files = [*self.variants.values(), *self.components.values()]
        if dialects:
            spoken = self.bundle.manifest.get("dialects", {}).values()
            files += [str(table[name]) for table in spoken for name in self.variants if name in table]
        return {part for file in files for part in external.parts(self.bundle, file)}


def _checked(targets: Iterable[str]) -> list[str]:
    found = list(dict.fromkeys(targets))
    for target in found:
        number = re.fullmatch(r"sm(\d{2,3})", target)
        if target != CPU and (number is None or int(number[1]) < OLDEST):
            raise DiffpressError(f"there is no target '{target}': name cpu, sm87 (Jetson Orin), sm89, sm90, ...")
    if not found:
        raise DiffpressError("name at least one target: --target sm87")
    return found


def _engines(found: _Found, targets: Sequence[str], graphs: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """The manifest's entries of the engines that go with the package, and the targets that build their own."""
    bundle, entries, building = found.bundle, [], []
    listed = {engine.path: engine for engine in matching.listed(bundle)}
    for target in targets:
        ours = [entry for entry in bundle.manifest.get("engines", ()) if entry["target"] == target]
        ours = [entry for entry in ours if listed[entry["path"]].name in found.names]
        build = f"diffpress build {bundle.path} --target {target}"
        if not ours and target != CPU:
            if target in BUILT_HERE and not graphs:
                raise DiffpressError(
                    f"{bundle.path} has no engines for {target}: run {build} first, or pack with --graphs and let the "
                    "target build them"
                )
            building.append(target)
        missing = {*found.names} - {IMAGE_TO_IMAGE} - {listed[entry["path"]].name for entry in ours}
        if ours and missing:
            raise DiffpressError(f"{bundle.path} has no {target} engine of {min(missing)}: run {build} again")
        for entry in ours:
            graph = listed[entry["path"]].graph
            if any(bundle.manifest["files"].get(file) != digest for file, digest in graph.items()):
                raise DiffpressError(
                    f"{entry['path']} was built from another graph than the bundle's: run {build} again"
                )
        entries += ours
    return entries, building


def _manifest(
    bundle: Bundle, files: Sequence[str], entries: Sequence[Mapping[str, Any]], package: Mapping[str, Any]
) -> dict[str, Any]:
    digests = bundle.manifest["files"]
    manifest = {
        **bundle.manifest,
        "format": FORMAT,
        "engines": list(entries),
        "dialects": {
            backend: {name: file for name, file in table.items() if file in files}
            for backend, table in bundle.manifest.get("dialects", {}).items()
        },
        "files": {name: digests[name] for name in files},
        "package": {**package, "bytes": {name: bundle.file(name).stat().st_size for name in files}},
    }
    manifest["package"]["id"] = identity(manifest)
    return manifest


def _write(bundle: Bundle, manifest: Mapping[str, Any], output: Path, progress: bool) -> None:
    document = json.dumps(manifest, indent=1).encode()
    sizes = manifest["package"]["bytes"]
    handle, partial = tempfile.mkstemp(prefix=f".{output.name}.", suffix=".partial", dir=output.absolute().parent)
    try:
        with (
            os.fdopen(handle, "wb") as stream,
            tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive,
            tqdm(total=sum(sizes.values()), desc="packing", unit="B", unit_scale=True, disable=not progress) as bar,
        ):
            archive.addfile(_member(MANIFEST, len(document)), io.BytesIO(document))
            for name, size in sorted(sizes.items()):
                with bundle.file(name).open("rb") as source:
                    archive.addfile(_member(name, size), source)
                bar.update(size)
        os.chmod(partial, 0o644)
        check_output(output)
        os.replace(partial, output)
    except OSError as error:
        raise DiffpressError(
            f"{output} could not be written, nothing was left there: {error.strerror or error}"
        ) from error
    finally:
        Path(partial).unlink(missing_ok=True)


def _member(name: str, size: int) -> tarfile.TarInfo:
    """An entry without a time or an owner."""
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o644, 0
    return member
