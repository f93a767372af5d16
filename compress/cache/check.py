"""Whether a step program can run on its denoiser: asked when it is made, so that nothing fails when it runs."""

from __future__ import annotations

from typing import Any

from diffpress.compress.families.unet_graph import UNetGraph, check_features, feature_shapes
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import EARLIER, Corrections, StepProgram, listed

BATCHES = (2, 3)  # a feature has a row for every sample of either, and is otherwise the same


def check_program(work: Work) -> None:
    """Raise `DiffpressError` unless the work's step program belongs to its schedule and runs on its denoiser.

    Refused are another number of steps, features that the denoiser does not have, cannot take together or shapes by
    the batch, steps that run together but look at their sample, and corrections of another schedule or width.
    """
    program, corrections, timesteps = work.program, work.corrections, work.sampling.timesteps
    if len(program.steps) != len(timesteps):
        raise DiffpressError(f"the plan has {len(program.steps)} steps, the schedule {len(timesteps)} calls")
    if corrections is not None and tuple(corrections.timesteps) != tuple(timesteps):
        raise DiffpressError(
            f"the corrections of timesteps {listed(corrections.timesteps)} are not of the schedule's "
            f"{listed(timesteps)}"
        )
    if not any(variant.reads or variant.writes for variant in program.variants.values()):
        return
    _check_graphs(work.denoiser, program, corrections)
    corrected = {} if corrections is None else corrections.features
    check_features(work.denoiser, corrected)
    shapes = _shapes(work.denoiser, program)
    for name in corrected.keys() & shapes.keys():
        entry = corrected[name]
        channels = shapes[name][0] if len(shapes[name]) == 3 else shapes[name][-1]
        if entry.offset.shape[1] not in (1, channels):
            raise DiffpressError(
                f"the correction of feature '{name}' has {entry.offset.shape[1]} channels, the feature {channels}"
            )


def _check_graphs(unet: Any, program: StepProgram, corrections: Corrections | None) -> None:
    deep = {} if corrections is None else {name: entry.depth > 1 for name, entry in corrections.features.items()}
    for name, variant in program.variants.items():
        graph = UNetGraph(unet, variant.reads, variant.writes, corrections)
        if variant.together > 1 and graph.encodes:
            raise DiffpressError(f"steps of variant '{name}' look at their samples: they cannot run together")
        for feature in variant.features:
            if deep.get(feature, False) != (feature + EARLIER in variant.reads):
                raise DiffpressError(
                    f"variant '{name}' and the correction of '{feature}' disagree about its value before the last"
                )


def _shapes(unet: Any, program: StepProgram) -> dict[str, tuple[int, ...]]:
    """The shape of every feature that is written, without the batch, for small latents."""
    names = tuple(dict.fromkeys(name for variant in program.variants.values() for name in variant.writes))
    # Small, but with more than one pixel where the network is deepest.
    side = 2 ** len(unet.down_blocks)
    first, second = (feature_shapes(unet, names, side, side, batch) for batch in BATCHES)
    for name in names:
        if first[name] != second[name]:
            raise DiffpressError(
                f"the shape of feature '{name}' depends on the batch: {list(first[name])} for {BATCHES[0]} samples, "
                f"{list(second[name])} for {BATCHES[1]}"
            )
    return first
