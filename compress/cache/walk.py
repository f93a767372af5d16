"""Features as they change from step to step: calibration prompts walk through the schedule, nothing is kept of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffpress.calibration.conditions import Text
from diffpress.calibration.processes import on_fastest_device
from diffpress.compress.cache.execute import CachedDenoiser
from diffpress.compress.families.unet import branches
from diffpress.compress.families.unet_graph import WHOLE, up
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.schedule.stepping import first_calls, start
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, StepProgram, Variant

Inputs = tuple[Tensor, float, Text]  # sample [halves N, C, h, w], timestep, text [halves N, T, D]
Observe = Callable[[int, Inputs, Mapping[str, Tensor]], object]
TINY = 1e-12  # in place of a denominator of zero


def cached_feature(work: Work, branch: int | None, name: str) -> str:
    """What cached steps read: what all layers add, or all that is deeper than `branch`.

    Raises `DiffpressError`, which names the pass, where the denoiser has no such branch.
    """
    if branch is None:
        return WHOLE
    count = branches(work.denoiser)
    if branch >= count:
        raise DiffpressError(f"{name}: branch {branch} does not exist, this denoiser has branches 0 to {count - 1}")
    return up(branch)


@torch.no_grad()
def walk(
    work: Work,
    features: Sequence[str],
    prompts: int,
    observe: Observe,
    text: str,
) -> None:
    """Show `observe` the index, the inputs and `features`, by name, of every call in full.

    A few prompts walk at a time, from call 0 to the last, then the next ones.

    Prompts are the first recorded ones, from the noise they were recorded with; quantization and guidance are as
    planned so far. A feature has its rows twice, the unconditional half first, or once where guidance leaves that out.
    """
    unet, sampling = work.denoiser, work.sampling
    calls = first_calls(work.recorded(), prompts)
    steps = (FULL,) * len(sampling.timesteps)
    program = StepProgram(steps, {FULL: Variant(writes=tuple(features))}, work.program.guidance)
    with on_fastest_device(unet), simulated(unet, work.quantization, sampling.timesteps):
        walks = start(sampling, calls, work.seed, unet.device)
        stand_in = CachedDenoiser(unet, program)
        for number, index in work.progress([(n, i) for n in range(len(walks)) for i in range(len(steps))], text):
            if index == 0:
                stand_in.reset()
            output = walks[number].output(stand_in)
            observe(index, walks[number].inputs(), stand_in.features)
            walks[number].advance(output)


def common_rows(value: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Both for the rows that both have: the conditional half, where one has no other."""
    rows = min(len(value), len(before))
    return value[-rows:], before[-rows:]


def relative_l1(value: Tensor, before: Tensor) -> Tensor:
    """mean |value - before| / mean |before| of each row [N]."""
    value, before = common_rows(value, before)
    change = (value - before).flatten(1).abs().double().mean(dim=1)
    return change / before.flatten(1).abs().double().mean(dim=1).clamp_min(TINY)


def may_read(guidance: Sequence[str], writer: int, reader: int) -> bool:
    """Whether a step may read what an earlier one wrote: not where it computes both halves and that one had one."""
    return not guidance or guidance[reader] != FULL or guidance[writer] == FULL
