"""What is known of a compressed denoiser before it is exported: enough to give up a hopeless trial.

The speed is predicted from its operations, as if it got as much out of each as the best finished trial of its kind; the
error is that of the network in torch, with rounding simulated, on the first images that finished trials were judged by.
A trial is hopeless where a finished one is clearly better in both. Export, compilation, drawing and timing are saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffpress.benchmarks import candidates, quality
from diffpress.benchmarks.candidates import Reference
from diffpress.benchmarks.search.ground import Ground
from diffpress.calibration.processes import on_fastest_device
from diffpress.compress.cache.execute import execution
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.work import Work
from diffpress.export import ship
from diffpress.export.deploy import deployable
from diffpress.plan import FULL

IMAGES = 4
FASTER, NEARER = 0.15, 0.25  # by how much a finished trial has to be better for it to be clear


class Hopeless(Exception):
    """A finished trial is clearly better; the message says which and by how much."""


@torch.no_grad()
def operations(work: Work) -> float:
    """Of all calls for one image, multiplications and additions apart."""
    specs = ship.denoiser_specs(work.denoiser, work.plan(), *ship.sizes(work.pipeline, work.sampling))
    both: dict[str, int] = {}
    for name, spec in specs.items():
        # The fused kernels of CPUs are not known to the counter.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            spec.module(*spec.inputs.values())
        both[name] = counter.get_total_flops()
    return sum(
        both[name] * (1.0 if work.program.guided(i) == FULL else 0.5) for i, name in enumerate(work.program.steps)
    )


def predicted(ops: float, precision: str, quantized: bool, rivals: Sequence[Mapping[str, Any]]) -> float | None:
    """The speedup of so many operations at the best rate of finished trials of the same arithmetic; None without one.

    It is too good for few operations, whose text encoder and decoder take a larger share.
    """
    alike = [rival for rival in rivals if (rival["precision"], rival["quantized"]) == (precision, quantized)]
    return max((rival["speedup"] * rival["operations"] / ops for rival in alike), default=None)


def errors(work: Work, ground: Ground, count: int = IMAGES) -> list[float]:
    """Latent errors of the first images that trials are judged by, drawn in torch as the plan will round."""
    rounded = {name: deployable(layer) for name, layer in work.quantization.items()}
    sampling = work.sampling
    with (
        on_fastest_device(work.pipeline),
        simulated(work.denoiser, rounded, sampling.timesteps),
        execution(work.program, work.corrections).watched(work.pipeline, lambda index, call: None),
    ):
        reference = Reference(work.pipeline, sampling)
        drawn = candidates.draw(reference, ground.prompts.texts[:count], ground.seeds[:count], count)
    found = quality.relative_l2(drawn.latents, ground.reference.latents[: len(drawn.latents)])
    return [float(error) for error in found]


def give_up(
    work: Work, ground: Ground, ops: float, precision: str, rivals: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What was found out, nothing where no finished trial is faster; raises `Hopeless`.

    `rivals` are finished trials: {name, speedup, operations, precision, quantized, errors}, the last by image.
    """
    speedup = predicted(ops, precision, bool(work.quantization), rivals)
    faster = [rival for rival in rivals if speedup is not None and rival["speedup"] >= (1 + FASTER) * speedup]
    if speedup is None or not faster:
        return {}
    found = errors(work, ground)
    error = fmean(found)
    for rival in faster:
        theirs = fmean(rival["errors"][: len(found)])
        if not error < (1 + NEARER) * theirs:  # NaN is hopeless, too
            raise Hopeless(
                f"about {speedup:.1f}x at an error of {error:.3g} on {len(found)} images, where '{rival['name']}' has "
                f"{rival['speedup']:.1f}x at {theirs:.3g}"
            )
    return {"speedup": speedup, "error": error}
