"""Small picture work with Pillow: labelled grids, differences, data URIs."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

DIFFERENCE_GAIN = 4  # differences are drawn this many times larger, or nothing would be seen
LOSSLESS_SIDE = 256  # pixels; larger pictures are embedded as JPEG, or a report would weigh tens of megabytes


@dataclass(frozen=True)
class Labelled:
    """A picture, uint8 [H, W, 3], with words below it; `good` draws a green edge, or a red one (None: no edge)."""

    pixels: np.ndarray
    words: str
    good: bool | None = None


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b| amplified by `DIFFERENCE_GAIN`: uint8 [H, W, 3] thrice."""
    return np.clip(np.abs(a.astype(np.int16) - b.astype(np.int16)) * DIFFERENCE_GAIN, 0, 255).astype(np.uint8)


def data_uri(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] as a data URI: PNG, or JPEG above `LOSSLESS_SIDE`."""
    stream = io.BytesIO()
    if max(pixels.shape[:2]) <= LOSSLESS_SIDE:
        Image.fromarray(pixels).save(stream, "PNG", optimize=True)
        kind = "png"
    else:
        Image.fromarray(pixels).save(stream, "JPEG", quality=92)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def grid(items: Sequence[Labelled], columns: int, side: int = 192) -> Image.Image:
    """Lay pictures out in rows, each enlarged to `side` pixels with its words below, readable by a person."""
    font = ImageFont.load_default(13)
    margin, edge, line = 14, 4, 17
    width_in_letters = side // 7
    wrapped = [textwrap.wrap(item.words, width_in_letters) for item in items]
    rows = [range(start, min(start + columns, len(items))) for start in range(0, len(items), columns)]
    heights = [side + 8 + line * max(len(wrapped[i]) for i in row) + margin for row in rows]
    sheet = Image.new("RGB", (columns * (side + margin) + margin, sum(heights) + margin), "white")
    draw = ImageDraw.Draw(sheet)
    top = margin
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            left = margin + column * (side + margin)
            picture = Image.fromarray(items[index].pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top))
            good = items[index].good
            if good is not None:
                box = (left - edge, top - edge, left + side + edge - 1, top + side + edge - 1)
                draw.rectangle(box, outline="#2e7d32" if good else "#c62828", width=edge)
            for number, text in enumerate(wrapped[index]):
                draw.text((left, top + side + 8 + line * number), text, fill="#222222", font=font)
        top += height
    return sheet
