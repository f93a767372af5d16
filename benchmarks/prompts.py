"""The prompts a bench draws: held-out captions for `shapes`, a varied list for other models, or a user's file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffpress.calibration.prompts import read
from diffpress.errors import DiffpressError

IMAGES = 200  # where nobody says how many
# Subjects, styles, counts, colours, light and composition, so that no single kind of picture decides the outcome.
VARIED = (
    "a lighthouse on a cliff at dusk, long exposure",
    "a red bicycle leaning against a blue wooden door",
    "a bowl of ramen with a soft-boiled egg, studio light",
    "an old fisherman with a white beard, portrait photograph",
    "a steam train crossing a stone viaduct in autumn",
    "two cats asleep on a green velvet sofa",
    "a watercolour of a village by a lake",
    "an astronaut riding a horse on the moon",
    "a glass of water on a wooden table, morning sun",
    "a street market in the rain, neon reflections",
    "three yellow lemons on a grey plate",
    "a snowy owl in flight over a frozen field",
    "an isometric drawing of a tiny bakery",
    "a vintage car parked under palm trees",
    "macro photograph of a dragonfly on a leaf",
    "a castle on a floating island, oil painting",
    "a child flying a kite on a windy beach",
    "the interior of a library with tall windows",
    "a robot watering plants in a greenhouse",
    "a black and white photograph of a jazz trio",
    "a mountain lake with a small wooden boat, mist",
    "a stack of pancakes with blueberries and syrup",
    "a fox in a birch forest, first snow",
    "a poster of a rocket launch in flat colours",
)


@dataclass(frozen=True)
class Prompts:
    """What to draw: texts, where they come from, and for `shapes` the scenes they say."""

    texts: list[str]
    source: str
    scenes: list[Any] | None = None

    @property
    def digest(self) -> str:
        """Of the texts in their order: where it is the same, the same was asked for."""
        return hashlib.sha256("\n".join(self.texts).encode()).hexdigest()


def choose(count: int | None, shapes: bool, file: Path | None = None) -> Prompts:
    """`count` prompts; None takes all of a file, else `IMAGES`. The built-in list is repeated as often as needed.

    Raises `DiffpressError` for a file without prompts, or with fewer than `count`: images of the same prompt are not
    as many opinions.
    """
    if file is not None:
        texts = read(file)
        if count is not None and count > len(texts):
            raise DiffpressError(
                f"{file} holds {len(texts)} prompts, {count} images are asked for: add prompts or draw fewer"
            )
        return Prompts(texts[:count], str(file))
    count = count or IMAGES
    if shapes:
        from diffpress.benchmarks.shapes.scenes import held_out_captions

        pairs = held_out_captions(count)
        return Prompts([words for _, words in pairs], "held-out captions of shapes", [scene for scene, _ in pairs])
    return Prompts(_repeated(list(VARIED), count), "built-in list")


def _repeated(texts: list[str], count: int) -> list[str]:
    return [texts[index % len(texts)] for index in range(count)]
