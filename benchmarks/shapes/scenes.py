"""Captioned scenes: one or two coloured shapes on a background, drawn from signed distances with numpy.

A `Scene` is the truth, `caption` says it in words, `render` draws it. Splits are by combination: the colour-shape pairs
of `HELD_OUT_PAIRS` and the arrangements of `HELD_OUT_ARRANGEMENTS` never occur in training captions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

SIZE = 64  # pixels, height and width

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 36),
    "orange": (250, 136, 16),
    "yellow": (250, 222, 30),
    "green": (36, 160, 52),
    "cyan": (40, 208, 218),
    "blue": (40, 72, 222),
    "purple": (134, 44, 176),
    "pink": (252, 132, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES: dict[str, float] = {"small": 8.0, "large": 13.5}  # outer radius in pixels
BACKGROUNDS = ("plain", "gradient", "striped", "checkered", "dotted")
AXES = ("single", "horizontal", "vertical")
# Words for "the first named object stands ... the second": (axis, whether the first named is the left or upper one).
RELATIONS: dict[str, tuple[str, bool]] = {
    "left of": ("horizontal", True),
    "right of": ("horizontal", False),
    "above": ("vertical", True),
    "below": ("vertical", False),
}

# One colour for each shape, so every colour and every shape is still seen in training, but never these together.
HELD_OUT_PAIRS = frozenset((colour, shape) for i, colour in enumerate(COLOURS) for j, shape in enumerate(SHAPES)
                           if (i + 3 * j) % 8 == 0)  # fmt: skip
# (shape at the left or top, axis, shape at the right or bottom); one in six of all.
HELD_OUT_ARRANGEMENTS = frozenset((a, axis, b) for i, a in enumerate(SHAPES) for j, b in enumerate(SHAPES)
                                  for k, axis in enumerate(AXES[1:]) if (i + 2 * j + 3 * k) % 6 == 0)  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One object: its colour, shape and size by name."""

    colour: str
    shape: str
    size: str


@dataclass(frozen=True)
class Scene:
    """What is in a picture: `things` in reading order (left to right or top to bottom) and where they stand."""

    things: tuple[Thing, ...]
    axis: str
    background: str

    @property
    def held_out(self) -> bool:
        """Whether a combination in it is kept out of the training set."""
        pairs = any((thing.colour, thing.shape) in HELD_OUT_PAIRS for thing in self.things)
        return pairs or (
            len(self.things) == 2 and (self.things[0].shape, self.axis, self.things[1].shape) in HELD_OUT_ARRANGEMENTS
        )


def sample_scene(rng: np.random.Generator, things: int | None = None, held_out: bool | None = None) -> Scene:
    """Draw a scene; `things` fixes the number of objects (else one in 35 %), `held_out` the split (None: any)."""
    while True:
        count = things or (1 if rng.random() < 0.35 else 2)
        objects = tuple(
            Thing(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), str(rng.choice(list(SIZES))))
            for _ in range(count)
        )
        axis = "single" if count == 1 else AXES[1 + int(rng.integers(2))]
        scene = Scene(objects, axis, str(rng.choice(BACKGROUNDS)))
        # Two equal objects have no order, so the caption could not be checked.
        if (count == 1 or objects[0] != objects[1]) and held_out in (None, scene.held_out):
            return scene


def swapped(scene: Scene, rng: np.random.Generator) -> Scene:
    """A near miss of `scene`: places, colours or one attribute exchanged. Hard negatives for contrastive training."""
    if len(scene.things) == 2:
        first, second = scene.things
        kind = int(rng.integers(4))
        if kind == 0:
            return Scene((second, first), scene.axis, scene.background)
        if kind == 1 and first.colour != second.colour:
            exchanged = (
                Thing(second.colour, first.shape, first.size),
                Thing(first.colour, second.shape, second.size),
            )
            return Scene(exchanged, scene.axis, scene.background)
        if kind == 2:
            return Scene(scene.things, AXES[3 - AXES.index(scene.axis)], scene.background)
    index = int(rng.integers(len(scene.things)))
    thing = scene.things[index]
    if rng.random() < 0.5:
        other = Thing(thing.colour, str(rng.choice([s for s in SHAPES if s != thing.shape])), thing.size)
    else:
        other = Thing(thing.colour, thing.shape, "small" if thing.size == "large" else "large")
    things = tuple(other if i == index else t for i, t in enumerate(scene.things))
    return Scene(things, scene.axis, scene.background)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Say `scene` in words, in one of several phrasings (and, for two objects, in either order)."""
    nouns = [f"{thing.size} {thing.colour} {thing.shape}" for thing in scene.things]
    tail = str(rng.choice([" on a {} background", ", {} background", " with a {} background"])).format(scene.background)
    if len(nouns) == 1:
        head = str(rng.choice(["a {}", "a picture of a {}", "there is a {}", "one {}"])).format(nouns[0])
        return head + tail
    options = [words for words, (axis, _) in RELATIONS.items() if axis == scene.axis]
    words = str(rng.choice(options))
    first_named, second_named = nouns if RELATIONS[words][1] else reversed(nouns)
    if words.endswith(" of") and rng.random() < 0.5:
        words = f"to the {words}"
    head = str(rng.choice(["a {} {} a {}", "a picture of a {} {} a {}", "there is a {} {} a {}", "one {} {} one {}"]))
    return head.format(first_named, words, second_named) + tail


def _polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance to closed polygons; x, y [H, W], corners [K, 2] (Quilez, "2D distance functions": sdPolygon)."""
    distance = np.full(x.shape, np.inf, np.float32)
    sign = np.ones(x.shape, np.float32)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, 1, axis=0), strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        up, down, left = y >= ay, y < by, ex * wy > ey * wx
        sign = np.where((up & down & left) | (~up & ~down & ~left), -sign, sign)
    return sign * np.sqrt(distance)


def _regular(points: int, radii: Sequence[float]) -> np.ndarray:
    angles = np.arange(points) * 2 * np.pi / points - np.pi / 2
    lengths = np.resize(np.asarray(radii, np.float32), points)
    return np.stack([np.cos(angles) * lengths, np.sin(angles) * lengths], axis=1)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels to a shape at the origin, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 0.92 * radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74 * radius) - 0.24 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.84 * radius
    if shape == "triangle":
        return _polygon(x, y - 0.2 * radius, _regular(3, [1.2 * radius]))
    if shape == "star":
        return _polygon(x, y, _regular(10, [1.12 * radius, 0.46 * radius]))
    arm, width = 1.0 * radius, 0.32 * radius  # cross
    horizontal = np.maximum(np.abs(x) - arm, np.abs(y) - width)
    return np.minimum(horizontal, np.maximum(np.abs(x) - width, np.abs(y) - arm))


def _background(kind: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A greyish ground [H, W, 3] in 0..255, never as saturated as an object."""
    level = rng.uniform(40, 105) if rng.random() < 0.5 else rng.uniform(165, 225)
    tint = rng.uniform(-10, 10, 3)
    base = np.clip(level + tint, 0, 255).astype(np.float32)
    if kind == "plain":
        pattern = np.zeros_like(x)
    elif kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        pattern = ((x - 31.5) * np.cos(angle) + (y - 31.5) * np.sin(angle)) * (40 / 32)
    elif kind == "striped":
        along = x if rng.random() < 0.5 else y
        pattern = np.where((along + rng.integers(8)) % 16 < 8, 18.0, -18.0)
    elif kind == "checkered":
        pattern = np.where(((x // 8).astype(int) + (y // 8).astype(int) + rng.integers(2)) % 2 == 0, 18.0, -18.0)
    else:
        pattern = 28.0 * (np.hypot(x % 12 - 5.5, y % 12 - 5.5) < 3.2) - 8.0
    return base + pattern[..., None].astype(np.float32)


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw `scene` with small seeded variations of place, size and tone: uint8 [64, 64, 3]."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    image = _background(scene.background, x, y, rng)
    centre = SIZE / 2 - 0.5
    places = {
        "single": [(centre, centre)],
        "horizontal": [(centre - 15.5, centre), (centre + 15.5, centre)],
        "vertical": [(centre, centre - 15.5), (centre, centre + 15.5)],
    }[scene.axis]
    for thing, (cx, cy) in zip(scene.things, places, strict=True):
        reach = 6.0 if scene.axis == "single" else 1.5
        dx, dy = rng.uniform(-reach, reach, 2)
        radius = SIZES[thing.size] * rng.uniform(0.95, 1.05)
        cover = np.clip(0.5 - _distance(thing.shape, x - cx - dx, y - cy - dy, radius), 0, 1)[..., None]
        colour = np.asarray(COLOURS[thing.colour], np.float32) + rng.uniform(-6, 6, 3).astype(np.float32)
        image = image * (1 - cover) + colour * cover
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def dataset(count: int, seed: int, held_out: bool | None = False) -> Iterable[tuple[Scene, str, np.ndarray]]:
    """`count` seeded (scene, caption, image) triples; items 2i and 2i + 1 are near misses of each other."""
    for index in range((count + 1) // 2):
        rng = np.random.default_rng([seed, index])
        scene = sample_scene(rng, held_out=held_out)
        other = swapped(scene, rng)
        while held_out is not None and other.held_out != held_out:
            other = sample_scene(rng, held_out=held_out)
        for item in (scene, other)[: count - 2 * index]:
            yield item, caption(item, rng), render(item, rng)


def held_out_captions(count: int, seed: int = 7) -> list[tuple[Scene, str]]:
    """Seeded captions whose combinations were never trained on; every third scene has one object."""
    pairs = []
    for index in range(count):
        rng = np.random.default_rng([seed, 1, index])
        scene = sample_scene(rng, things=1 if index % 3 == 0 else 2, held_out=True)
        pairs.append((scene, caption(scene, rng)))
    return pairs


def vocabulary() -> list[str]:
    """Every word a caption can contain, sorted."""
    words = {"a", "picture", "of", "there", "is", "one", "on", "with", "background", "to", "the"}
    for group in (COLOURS, SHAPES, SIZES, BACKGROUNDS):
        words.update(group)
    for relation in RELATIONS:
        words.update(relation.split())
    return sorted(words)
