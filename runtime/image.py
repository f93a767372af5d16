"""Pictures: from the decoder's floats to bytes, and to a file."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from diffpress.errors import DiffpressError


def to_pixels(decoded: np.ndarray) -> np.ndarray:
    """Floats [N, 3, H, W] in -1..1 to bytes [N, H, W, 3], rounded as diffusers does; what is not finite becomes 0."""
    unit = np.clip(np.nan_to_num(decoded, nan=-1.0) * 0.5 + 0.5, 0.0, 1.0)
    return (unit.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)


def save_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write uint8 pixels [H, W, 3] as PNG, whole or not at all; the folder is made if absent.

    Raises `DiffpressError` when the file cannot be written.
    """
    target = Path(path)
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(part, format="PNG")
        os.replace(part, target)
    except OSError as error:
        raise DiffpressError(f"{target} could not be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # it is gone when all went well, and cannot be there when its folder is a file
            part.unlink()
