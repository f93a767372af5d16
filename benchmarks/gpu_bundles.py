"""What the GPU benchmark measures, made: pipelines, their bundles in half precision, engines of them for this GPU.

Bundles need no GPU; made elsewhere, a work folder can be copied to a machine that has nothing but a runtime.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from diffpress import api
from diffpress import bundle as bundles
from diffpress.benchmarks.gpu_rows import Model, Row, document
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError
from diffpress.export import engines
from diffpress.runtime import backends
from diffpress.runtime.matching import Machine


def source(model: Model, work: Path) -> str:
    """What `compress` and diffusers open: the embedded pipeline, or a folder of random weights, made where missing."""
    if model.name == "shapes":
        return model.name
    folder = work / "models" / model.name
    if not (folder / "model_index.json").exists():
        from diffpress.benchmarks import scale_models

        shutil.rmtree(folder, ignore_errors=True)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for part in ("unet", "vae"):
            (partial / part).mkdir(parents=True)
        scale_models.create(scale_models.MODELS[model.name], partial)
        partial.rename(folder)
    return str(folder)


def file_name(name: str) -> str:
    """A row's or recipe's name as that of a file or folder."""
    return re.sub("[^a-z0-9]+", "-", name.lower())


def folder_of(work: Path, model: str, recipe: str) -> Path:
    """Where the bundle of a recipe lies."""
    return work / "bundles" / model / file_name(recipe)


def made(work: Path, model: str, recipe: str) -> bool:
    """Whether it is there."""
    return (folder_of(work, model, recipe) / bundles.MANIFEST).exists()


def make(work: Path, model: Model, recipe: str) -> dict[str, Any]:
    """Compress, export and halve one recipe, where it is not there yet. Raises `DiffpressError`."""
    import yaml

    from diffpress.export import half

    folder = folder_of(work, model.name, recipe)
    if not made(work, model.name, recipe):
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(json.loads(json.dumps(document(model, recipe)))), "utf-8")
        floats = folder.with_suffix(".float")
        if not (floats / bundles.MANIFEST).exists():
            api.compress(source(model, work), str(file), floats)
        half.halve(bundles.read(floats), folder)
        shutil.rmtree(floats)  # twice the size of what is kept
    return {"bundle": folder.name}


def opened(work: Path, model: str, row: Row) -> Bundle:
    """The bundle that a row of a library runs, with engines for this GPU where it is one that runs engines.

    Raises `DiffpressError` where it is missing or the library refuses to build it.
    """
    bundle = bundles.read(folder_of(work, model, row.recipe))
    if row.runner not in backends.ENGINES:
        return bundle
    machine = Machine.here()
    if machine is None:
        raise DiffpressError(f"{row.runner} needs a GPU to build engines for")
    folder = bundle.path.with_name(f"{bundle.path.name}.{machine.gpu.target}-{row.runner}")
    if not (folder / bundles.MANIFEST).exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(bundle.path, partial, copy_function=_link)  # only its manifest will be written anew
        (partial / bundles.MANIFEST).unlink()
        shutil.copyfile(bundle.path / bundles.MANIFEST, partial / bundles.MANIFEST)
        engines.build(bundles.read(partial), [machine.gpu.target], package=row.runner)
        partial.rename(folder)
    return bundles.read(folder)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
