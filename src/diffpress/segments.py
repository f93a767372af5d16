"""A step program as a picture in text: a row per part of the denoiser that it treats apart, a column per step.

Parts are derived from the features that variants read, by their names alone (see `compress.families.unet_graph`), so
that a manifest is enough. Standard library only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from diffpress.plan import EARLIER, Corrections, StepProgram, Variant

COMPUTED, TAKEN, CORRECTED, EXTRAPOLATED, WITHIN = "#", "-", "+", "/", "."
LEGEND = {
    COMPUTED: "computed",
    TAKEN: "taken from an earlier step",
    CORRECTED: "taken and corrected",
    EXTRAPOLATED: "extrapolated from two earlier steps",
    WITHIN: "as the part around it",
}
GUIDANCE_LEGEND = (
    "# both halves; - the conditional one and the last difference; . the conditional one; "
    "= the conditional one, with the mean of the features of both"
)
CALLS_LEGEND = "[=] steps that run together in one call; | a step by itself"
WHOLE = "whole"
FEW_MODULES, MOST_ROWS = 8, 12  # up to which modules have a row each, and modules of one kind a row of their own
_NESTED = re.compile(r"(up|skip)_(\d+)")
_STRENGTH = {mark: index for index, mark in enumerate((TAKEN, CORRECTED, EXTRAPOLATED))}


@dataclass(frozen=True)
class Segment:
    """A part of the denoiser and a mark for each step, those of `LEGEND`."""

    name: str
    marks: str


def segments(program: StepProgram, corrections: Corrections | None = None) -> list[Segment]:
    """The parts that `program` treats apart, the deepest first; one, "all layers", where nothing is ever taken.

    `corrections` tell which features are corrected on their way, and at which steps; without them an extrapolated one
    is known by the earlier value that is read.
    """
    layers, modules = _layers(program), _modules(program)
    if len(layers) == 1:
        other = "everything else" if modules else WHOLE if _reads(program, WHOLE) else "all layers"
        layers = [_Part(other, layers[0].runs, layers[0].features)]
    found = []
    for part in [*modules, *layers]:
        marks = [
            part.runs[name] or _strongest(part.features[name], program.variants[name], index, corrections)
            for index, name in enumerate(program.steps)
        ]
        found.append(Segment(part.name, "".join(marks)))
    return found


def calls_row(program: StepProgram) -> str:
    """A mark per step, those of `CALLS_LEGEND`; empty where every step is a call by itself."""
    counts = [count for _, count in program.runs()]
    if all(count == 1 for count in counts):
        return ""
    return "".join("|" if count == 1 else f"[{'=' * (count - 2)}]" for count in counts)


def described(names: Sequence[str], most: int = 3) -> str:
    """What a variant reads or writes, for people: a long list is only counted."""
    features = list(dict.fromkeys(name.removesuffix(EARLIER) for name in names))
    text = ", ".join(features) if len(features) <= most else f"{len(features)} features"
    earlier = sum(name.endswith(EARLIER) for name in names)
    if not earlier:
        return text
    return f"{text} and the value before" if len(features) == 1 else f"{text} and the values before of {earlier}"


@dataclass(frozen=True)
class _Part:
    """By variant: the mark of a part that is not taken, empty where it is, and the features that then stand for it."""

    name: str
    runs: Mapping[str, str]
    features: Mapping[str, tuple[str, ...]]


def _used(program: StepProgram) -> dict[str, Variant]:
    return {name: program.variants[name] for name in dict.fromkeys(program.steps)}


def _reads(program: StepProgram, feature: str) -> bool:
    return any(feature in variant.features for variant in _used(program).values())


def _nested(variant: Variant) -> tuple[str, ...]:
    """What it reads in place of layers of the network, not of single modules."""
    if WHOLE in variant.features:
        return (WHOLE,)
    return tuple(feature for feature in variant.features if _NESTED.fullmatch(feature))


def _extent(variant: Variant) -> tuple[float, float]:
    """How many layers of the down path run, the input's convolution among them, and how many of the up path's last."""
    if WHOLE in variant.features:
        return 0, 0
    pairs = [match for feature in variant.features if (match := _NESTED.fullmatch(feature))]
    branches = [int(match[2]) for match in pairs if match[1] == "up"]
    if not branches:
        return inf, inf
    needed = set(range(branches[0] + 1)) - {int(match[2]) for match in pairs if match[1] == "skip"}
    return max(needed, default=-1) + 1, branches[0] + 1


def _layers(program: StepProgram) -> list[_Part]:
    """The network's layers in groups that always run together, the deepest first."""
    used = _used(program)
    extents = {name: _extent(variant) for name, variant in used.items()}
    groups: dict[tuple[bool, ...], dict[int, tuple[float, float]]] = {}
    for path in (0, 1):  # down, up
        cuts = sorted({0, inf, *(extent[path] for extent in extents.values())})
        for low, high in pairwise(cuts):
            pattern = tuple(extent[path] >= high for extent in extents.values())
            groups.setdefault(pattern, {})[path] = (low, high)
    ordered = sorted(groups.items(), key=lambda item: -max(high for _, high in item[1].values()))
    return [
        _Part(
            _label(group, len(groups)),
            {name: COMPUTED if runs else "" for name, runs in zip(used, pattern, strict=True)},
            {name: _nested(variant) for name, variant in used.items()},
        )
        for pattern, group in ordered
    ]


def _label(group: Mapping[int, tuple[float, float]], count: int) -> str:
    """A group's name, from the ranges of the down (0) and the up path (1) that it holds."""
    if 1 not in group:
        low, high = group[0]
        if high == 1:
            return "input convolution"
        return f"down layer {low:g}" if high == low + 1 else f"down layers {low:g} to {high - 1:g}"
    low, high = group[1]
    from_input = 0 in group and group[0][0] == 0
    if high == inf:
        return "encoder" if from_input else f"deeper than branch {low - 1:g}"
    if low > 0:
        return f"branch {low:g}" if high == low + 1 else f"branches {low:g} to {high - 1:g}"
    if count > 2:
        return f"up to branch {high - 1:g}"
    return "shallow layers" if from_input else f"decoder, {high:g} layer{'s' if high > 1 else ''}"


def _modules(program: StepProgram) -> list[_Part]:
    """What is ever taken by itself, mostly modules, those of one kind that are treated alike in one part."""
    used = _used(program)
    paths = dict.fromkeys(path for variant in used.values() for path in _single(variant))
    states = {path: {name: _state(path, variant) for name, variant in used.items()} for path in paths}

    def grouped(key_of: Mapping[str, tuple[str, ...]]) -> list[list[str]]:
        found: dict[tuple[str, ...], list[str]] = {}
        for path in paths:
            found.setdefault(key_of[path], []).append(path)
        return list(found.values())

    patterns = {path: tuple(mark for mark, _ in state.values()) for path, state in states.items()}
    groups = grouped({path: (path,) for path in paths})
    if len(groups) > FEW_MODULES:
        groups = grouped({path: (_kind(path), *patterns[path]) for path in paths})
        if len(groups) > MOST_ROWS:
            groups = grouped(patterns)
    return [
        _Part(
            _counted(group),
            {name: mark for name, (mark, _) in states[group[0]].items()},
            {name: tuple(dict.fromkeys(f for path in group for f in states[path][name][1])) for name in used},
        )
        for group in groups
    ]


def _single(variant: Variant) -> list[str]:
    """What it reads by itself: modules, and skips where nothing stands for the layers behind them."""
    nested = {feature for feature in variant.features if _NESTED.fullmatch(feature)}
    if all(feature.startswith("skip_") for feature in nested):
        nested = set()
    return [feature for feature in variant.features if feature != WHOLE and feature not in nested]


def _state(path: str, variant: Variant) -> tuple[str, tuple[str, ...]]:
    """The mark of a module that is not taken, empty where it is, and the features that then stand for it."""
    around = tuple(feature for feature in variant.features if path == feature or path.startswith(f"{feature}."))
    if around:
        return "", around
    down, up = _extent(variant)
    gone = up == 0 or (up < inf and path.startswith("mid_block.")) or (down == 0 and path.startswith("down_blocks."))
    if gone:
        return "", _nested(variant)
    return (COMPUTED if up == inf else WITHIN), ()


def _kind(path: str) -> str:
    last = path.rsplit(".", 1)[-1]
    if last in ("attn1", "attn2", "ff"):
        return last
    if _NESTED.fullmatch(path):
        return "skip"
    return "resnet" if ".resnets." in path else "transformer" if ".attentions." in path else path


def _counted(paths: Sequence[str]) -> str:
    """One module's path, or how many there are of every kind."""
    if len(paths) == 1:
        return paths[0]
    return ", ".join(f"{count} {kind}" for kind, count in Counter(map(_kind, paths)).items())


def _strongest(features: Iterable[str], variant: Variant, index: int, corrections: Corrections | None) -> str:
    marks = [_mark(feature, variant, index, corrections) for feature in features]
    return max(marks, key=lambda mark: _STRENGTH[mark], default=TAKEN)


def _mark(feature: str, variant: Variant, index: int, corrections: Corrections | None) -> str:
    """How a feature is taken at a step: rows of ones and zeros correct nothing."""
    entry = None if corrections is None else corrections.features.get(feature)
    if entry is None:
        return EXTRAPOLATED if feature + EARLIER in variant.reads else TAKEN
    scale, offset = entry.scale[index], entry.offset[index]
    if entry.depth > 1 and bool((scale[1] != 0).any()):
        return EXTRAPOLATED
    return CORRECTED if bool((scale[0] != 1).any() or (offset != 0).any()) else TAKEN
