"""How far features move from step to step, measured along whole images that the denoiser draws in full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffpress.calibration.conditions import Text
from diffpress.calibration.processes import on_fastest_device
from diffpress.compress.families.unet_graph import UNetGraph
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.schedule.stepping import Trajectory, first_calls, start
from diffpress.compress.work import Work

PLACES = 4096  # of a feature that are looked at; all steps of a large model's would not fit into memory
TINY = 1e-12


@torch.no_grad()
def movements(work: Work, features: Sequence[str], prompts: int) -> np.ndarray:
    """[calls, calls]: entry j, i is |F_i - F_j| / |F_i|, what step i would be off by with the features of step j.

    The mean over features, the first `prompts` of calibration and both halves of guidance, with the quantization
    decided so far. Of each feature the norms are over `PLACES` places chosen at random, the same at every step.
    """
    texts = first_calls(work.recorded(), prompts)
    with (
        on_fastest_device(work.denoiser),
        simulated(work.denoiser, work.quantization, work.sampling.timesteps),
    ):
        walks = start(work.sampling, texts, work.seed, work.denoiser.device)
        parts = [_along(work, walk, features) for walk in work.progress(walks, "measuring features")]
    rows = np.array([len(walk.sample) for walk in walks], np.float64)
    return np.average(np.stack(parts), axis=0, weights=rows)


def _along(work: Work, walk: Trajectory, features: Sequence[str]) -> np.ndarray:
    """The same of one batch of images."""
    graph = UNetGraph(work.denoiser, writes=features)
    seen: list[list[Tensor]] = [[] for _ in features]

    def denoiser(sample: Tensor, timestep: float, text: Text, return_dict: bool) -> tuple[Tensor]:
        output, *values = graph(sample, torch.tensor([timestep], device=sample.device), text)
        for kept, value in zip(seen, values, strict=True):
            rows = value.flatten(1)
            kept.append(rows[:, _places(rows.shape[1])].cpu())
        return (output,)

    for _ in work.sampling.timesteps:
        walk.advance(walk.output(denoiser))
    return np.mean([_relative(torch.stack(kept)) for kept in seen], axis=0)


def _places(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:PLACES]


def _relative(values: Tensor) -> np.ndarray:
    """|v_i - v_j| / |v_i| [steps, steps] of values [steps, N, places], the mean over N."""
    norms = values.norm(dim=2).clamp_min(TINY)
    found: Any = torch.stack([((values - one).norm(dim=2) / norms).mean(dim=1) for one in values])
    return np.asarray(found.double())
