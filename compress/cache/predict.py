"""What a cached step would cost in error, before any plan is tried.

One full run of the calibration prompts gives the second moments of a deep feature F between all pairs of steps. From
these follows, for any step n and any full steps i < j < n, the residual of the best per-channel prediction of F_n from
(F_j, F_i, 1), as a step would read it after its correction. What such a residual does to the final latents is measured
at a few steps by putting the neighbour's feature in its place and sampling to the end.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffpress.calibration.capture import Call
from diffpress.calibration.conditions import Text
from diffpress.compress.families.unet_graph import UNetGraph, up
from diffpress.compress.schedule.stepping import Trajectory, seeded
from diffpress.compress.work import Work

MEMORY = 1 << 29  # bytes of features held at once
RIDGE = 1e-6  # toward taking the last value as it is


@dataclass(frozen=True)
class Observed:
    """A feature over T steps: `moments` [T, T, C] are sums of products, `sums` [T, C] of values, of all prompts.

    `count` is how many values each sum has. `weights` [T] turn a relative error of the feature at a step into that of
    the final latents.
    """

    moments: np.ndarray
    sums: np.ndarray
    count: int
    weights: np.ndarray

    def residual(self, step: int, sources: Sequence[int]) -> float:
        """|F - F^| / |F| at `step` for the least-squares F^ from the features of steps `sources`, the last one first.

        Per channel, with an offset: the norm of what a correction of that depth leaves.
        """
        columns = list(sources)
        size = len(columns) + 1
        normal = np.empty((self.sums.shape[1], size, size))
        wanted = np.empty((self.sums.shape[1], size))
        for row, a in enumerate(columns):
            for column, b in enumerate(columns):
                normal[:, row, column] = self.moments[a, b]
            normal[:, row, -1] = normal[:, -1, row] = self.sums[a]
            wanted[:, row] = self.moments[a, step]
        normal[:, -1, -1] = self.count
        wanted[:, -1] = self.sums[step]
        prior = np.eye(size)[0]
        diagonal = RIDGE * np.maximum(np.einsum("cii->ci", normal), 1e-12)
        ridged = normal + diagonal[:, :, None] * np.eye(size)
        found = np.linalg.solve(ridged, (wanted + diagonal * prior)[..., None])[..., 0]
        left = self.moments[step, step] - 2 * (found * wanted).sum(1) + np.einsum("ci,cij,cj->c", found, normal, found)
        return float(np.sqrt(max(left.sum(), 0.0) / max(self.moments[step, step].sum(), 1e-12)))

    def stale(self, step: int, source: int) -> float:
        """|F_source - F_step| / |F_step|."""
        left = self.moments[step, step] - 2 * self.moments[step, source] + self.moments[source, source]
        return float(np.sqrt(max(left.sum(), 0.0) / max(self.moments[step, step].sum(), 1e-12)))


def observe(work: Work, calls: Sequence[Call], branch: int, probes: int) -> Observed:
    """Run the prompts of `calls` in full and measure the feature of `branch`; `probes` steps tell what errors do.

    The network is `work.denoiser` as it is: quantization has to be simulated around the call.
    """
    steps = len(work.sampling.timesteps)
    full = UNetGraph(work.denoiser, (), (up(branch),))
    moments: np.ndarray | None = None
    sums = np.zeros(0)
    count, errors = 0, []
    at = [int(step) for step in np.unique(np.linspace(1, steps - 1, min(probes, steps - 1)).round())]
    noise = seeded(calls, work.seed).to(work.denoiser.device)
    size = max(1, MEMORY // (steps * 2 * _bytes(full, calls[0], work)))
    chunks = [range(start, min(start + size, len(calls))) for start in range(0, len(calls), size)]
    for chunk in work.progress(chunks, f"observing the feature of branch {branch}"):
        walk = Trajectory(work.sampling, [calls[index].text for index in chunk], noise[chunk.start : chunk.stop])
        features, kept = [], {}
        for step in range(steps):
            if step in at:
                kept[step] = copy.deepcopy(walk)
            watched = _Watched(full)
            walk.advance(walk.output(watched))
            features.append(watched.feature)
        # [T, C, values]
        values = torch.stack([feature.transpose(0, 1).flatten(1) for feature in features]).double()
        products = torch.einsum("tcv,scv->tsc", values, values).cpu().numpy()
        moments = products if moments is None else moments + products
        sums = values.sum(2).cpu().numpy() + (sums if sums.size else 0)
        count += values.shape[2]
        errors.append([_probe(walk.sample, kept[step], features, step, branch, work) for step in at])
    assert moments is not None
    observed = Observed(moments, sums, count, np.ones(steps))
    found = np.log(np.maximum(np.mean(errors, axis=0), 1e-12))
    ratio = found - np.log([max(observed.stale(step, step - 1), 1e-9) for step in at])
    return Observed(moments, sums, count, np.exp(np.interp(np.arange(steps), at, ratio)))


class _Watched:
    """A graph that writes one feature, as a denoiser; keeps the feature."""

    def __init__(self, graph: UNetGraph) -> None:
        self.graph = graph
        self.feature = torch.zeros(0)

    def __call__(self, sample: Tensor, timestep: float, text: Text, return_dict: bool = False) -> tuple[Tensor]:
        output, self.feature = self.graph(sample, torch.tensor([timestep], device=sample.device), text)
        return (output,)


def _probe(end: Tensor, walk: Trajectory, features: Sequence[Tensor], step: int, branch: int, work: Work) -> float:
    """The relative change of the final latents `end` when `step` takes the feature of the step before it."""
    cached = UNetGraph(work.denoiser, (up(branch),))

    def stale(sample: Tensor, timestep: float, text: Text, return_dict: bool = False) -> tuple[Tensor, ...]:
        return cached(sample, torch.tensor([timestep], device=sample.device), text, features[step - 1])

    walk.advance(walk.output(stale))
    for _ in range(step + 1, len(work.sampling.timesteps)):
        walk.advance(walk.output(work.denoiser))
    # The geometric mean: a picture that tips over to another one says nothing about the rest.
    change = (walk.sample - end).flatten(1).norm(dim=1) / end.flatten(1).norm(dim=1)
    return float(change.clamp_min(1e-9).log().mean().exp())


def _bytes(graph: UNetGraph, call: Call, work: Work) -> int:
    """Of the feature of one row, in the precision of the sums."""
    call = call.to(work.denoiser.device)
    _, feature = graph(call.sample[-1:], call.timestep, call.text[-1:])
    return feature.numel() * 8
