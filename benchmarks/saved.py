"""Images and prompts of a bench in a folder, for a second look by people and by other tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from diffpress.benchmarks.candidates import Drawn
from diffpress.errors import DiffpressError
from diffpress.paths import write
from diffpress.runtime.image import save_png

INDEX = "prompts.jsonl"


def check(folder: Path) -> None:
    """Raise `DiffpressError` unless the folder is empty or could be made: nobody's pictures are mixed with others."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DiffpressError(f"--save-images {folder} exists and is not an empty folder: name another one")


def save(folder: Path, drawn: Mapping[str, Drawn], texts: Sequence[str], rows: Mapping[str, np.ndarray]) -> None:
    """Write CANDIDATE/00000.png for every image, and a line of JSON for every prompt: its seed, files and `rows`.

    `rows` are metrics [N] of the compressed images by prompt. The index is written last.
    """
    lines = []
    for index, text in enumerate(texts):
        files = {}
        for name, images in drawn.items():
            if index < len(images.pixels):
                files[name] = f"{name}/{index:05}.png"
                save_png(folder / files[name], images.pixels[index])
        metrics = {name: float(values[index]) if np.isfinite(values[index]) else None for name, values in rows.items()}
        lines.append(json.dumps({"index": index, "seed": index, "prompt": text, "files": files, **metrics}))
    write(folder / INDEX, ("\n".join(lines) + "\n").encode())
