"""Pictures: from the decoder's floats to bytes and to a file, and from files to what the encoder takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffpress.errors import DiffpressError


def to_pixels(decoded: np.ndarray) -> np.ndarray:
    """Floats [N, 3, H, W] in -1..1 to bytes [N, H, W, 3], rounded as diffusers does; what is not finite becomes 0."""
    unit = np.clip(np.nan_to_num(decoded, nan=-1.0) * 0.5 + 0.5, 0.0, 1.0)
    return (unit.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)


def open_picture(path: str | Path) -> Image.Image:
    """Read a picture as RGB, turned upright; raises `DiffpressError` where there is none or it cannot be read."""
    file = Path(path)
    if not file.is_file():
        raise DiffpressError(f"there is no image at {file}")
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    # What Pillow raises for another kind of file, a cut one, and one that would not fit into memory.
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DiffpressError(f"{file} is not an image that can be read: {error}") from error


def to_floats(pictures: Sequence[Image.Image], height: int, width: int) -> np.ndarray:
    """Floats [N, 3, height, width] in -1..1, resized as diffusers' VaeImageProcessor does (Lanczos, all of it)."""
    rows = [np.asarray(_resized(picture.convert("RGB"), height, width), np.float32) for picture in pictures]
    return np.float32(2) * (np.stack(rows).transpose(0, 3, 1, 2) / np.float32(255)) - np.float32(1)


def to_mask(pictures: Sequence[Image.Image], height: int, width: int, rows: int, columns: int) -> np.ndarray:
    """0 or 1 [N, 1, rows, columns] for a latent: 1 where the picture, resized, is at least half white.

    Each latent takes the first of its pixels, as diffusers' interpolation of the mask does.
    """
    resized = [_resized(picture.convert("RGB"), height, width).convert("L") for picture in pictures]
    white = np.stack([np.asarray(picture, np.float32) / np.float32(255) >= 0.5 for picture in resized])
    down, right = np.arange(rows) * height // rows, np.arange(columns) * width // columns
    return white[:, None, down][..., right].astype(np.float32)


def _resized(picture: Image.Image, height: int, width: int) -> Image.Image:
    return picture.resize((width, height), resample=Image.Resampling.LANCZOS)


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
