"""What another guidance scale than the one a bundle was made for costs: nothing, a word of caution, or a refusal."""

from __future__ import annotations

from collections.abc import Iterable

from diffpress.errors import DiffpressError
from diffpress.plan import Sampling, StepProgram


def caution(sampling: Sampling, program: StepProgram, passes: Iterable[str], scale: float) -> str | None:
    """One line where what `passes` planned was measured at another scale, None where it does not matter.

    Cached steps and corrections run at any scale, at an error that nobody measured there. Graphs that are quantized or
    pruned do not count: what they round hardly moves with the scale.
    """
    planned = sampling.guidance_scale
    made = [
        (any(program.variants[name].reads for name in program.steps), "cached steps"),
        (bool(program.guidance), "steps of one half of guidance"),
        ("correct" in passes, "corrections"),
    ]
    what = [name for there, name in made if there]
    if scale == planned or not what:
        return None
    return (
        f"this bundle's {' and '.join(what)} were made for guidance scale {planned:g}, and nobody measured them at "
        f"{scale:g}: expect a larger error, or compress with guidance_scale: {scale:g}"
    )


def check(sampling: Sampling, scale: float) -> None:
    """Raise `DiffpressError` where the schedule subtracts mean errors of guided outputs, of another scale than this."""
    planned = sampling.guidance_scale
    if sampling.offsets and scale != planned:
        raise DiffpressError(
            f"this bundle subtracts errors that were measured at guidance scale {planned:g}, which are others at "
            f"{scale:g}: leave the scale as it is, or compress with guidance_scale: {scale:g}"
        )
