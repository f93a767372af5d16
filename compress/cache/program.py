"""From what every step takes to the step program: variants, and what each has to hand out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from diffpress.compress.families.unet_graph import UNetGraph
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import EARLIER, FULL, Corrections, StepProgram, Variant

CACHED = "cached"
MOST_VARIANTS = 4  # graphs of a denoiser; each is compiled, and built into an engine, by itself


def program_of(
    unet: Any,
    reads: Sequence[Iterable[str]],
    guidance: tuple[str, ...] = (),
    corrections: Corrections | None = None,
    together: int = 1,
) -> StepProgram:
    """The step program whose step i takes the features reads[i] and computes everything else.

    A feature is handed out by the variants that compute it, if a step reads what they hand out before it is written
    again; where its correction has depth 2, steps read its earlier value too. Up to `together` consecutive steps run as
    one batch where their variant neither looks at the sample nor hands out a feature.

    Variants are "full", "cached" and, where steps take different sets, "cached_2" and so on. Raises `DiffpressError`
    when a step reads what no step before it computed, when a feature does not exist, and for more than `MOST_VARIANTS`.
    """
    sets = [tuple(sorted(set(names))) for names in reads]
    distinct = list(dict.fromkeys(names for names in sets if names))
    if len(distinct) >= MOST_VARIANTS:
        raise DiffpressError(f"{len(distinct) + 1} graph variants are more than {MOST_VARIANTS}: group the steps")
    names = {(): FULL} | {
        taken: CACHED if index == 0 else f"{CACHED}_{index + 1}" for index, taken in enumerate(distinct)
    }
    wanted = tuple(dict.fromkeys(name for taken in distinct for name in taken))
    graphs = {taken: UNetGraph(unet, taken) for taken in names}
    made = {taken: tuple(name for name in wanted if graph.computes(name)) for taken, graph in graphs.items()}
    used = _used(sets, made, {name for name in wanted if _depth(name, corrections) > 1})
    writes = {taken: tuple(feature for feature in made[taken] if (taken, feature) in used) for taken in names}
    variants = {
        name: Variant(
            tuple(read for feature in taken for read in (feature, feature + EARLIER)[: _depth(feature, corrections)]),
            writes[taken],
            1 if graphs[taken].encodes or writes[taken] else together,
        )
        for taken, name in names.items()
    }
    return StepProgram(tuple(names[taken] for taken in sets), variants, guidance)


def _depth(feature: str, corrections: Corrections | None) -> int:
    entry = None if corrections is None else corrections.features.get(feature)
    return 1 if entry is None else entry.depth


def _used(
    sets: Sequence[tuple[str, ...]], made: dict[tuple[str, ...], tuple[str, ...]], deep: set[str]
) -> set[tuple[tuple[str, ...], str]]:
    """(variant, feature) of every write that some step reads."""
    found = set()
    for feature in {name for taken in sets for name in taken}:
        writers: list[tuple[str, ...]] = []  # of the last value, and of the one before
        for taken in sets:
            if feature in taken:
                found |= {(writer, feature) for writer in writers[: 2 if feature in deep else 1]}
            elif feature in made[taken]:
                writers = [taken, *writers[:1]]
    return found


def require_no_cache(work: Work, name: str) -> None:
    """Raises `DiffpressError` where an earlier pass planned a cache already."""
    if any(variant.reads for variant in work.program.variants.values()):
        raise DiffpressError(f"{name}: an earlier pass planned a cache already; keep one of the two")
