"""Prompts for calibration: from a file, or built in."""

from __future__ import annotations

from pathlib import Path

from diffpress.errors import DiffpressError

# Varied in subject, light, medium and length, so that ranges are not those of one kind of picture.
GENERAL = (
    "a photograph of an astronaut riding a horse",
    "a lighthouse on a cliff at dusk, waves below, oil painting",
    "close-up portrait of an old fisherman, soft light, 85mm",
    "a red bicycle leaning against a white wall",
    "an isometric drawing of a small kitchen",
    "a bowl of ramen with egg and spring onions, studio photo",
    "a snowy mountain village at night under the stars",
    "a watercolour of a fox in a birch forest",
    "a crowded street market in the rain, neon signs",
    "a glass of water on a wooden table",
    "a steam locomotive crossing a stone bridge",
    "macro photo of a bee on a sunflower",
    "a minimalist poster with the sun over the sea",
    "a golden retriever puppy sleeping on a sofa",
    "an astronaut's helmet reflecting a city, digital art",
    "a field of tulips and a windmill, wide angle",
)


def read(file: Path) -> list[str]:
    """The prompts of a text file, one a line; raises `DiffpressError` when it has none."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DiffpressError(f"prompts file {file} cannot be read: {error}") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise DiffpressError(f"prompts file {file} holds no prompts: write one on each line")
    return prompts
