"""Streaming statistics of activations: a histogram per layer, whose memory does not grow with what it has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.calibration.capture import Call

BINS = 4096


class AbsHistogram:
    """Counts of |x| over BINS equal bins of [0, limit]; the limit doubles when a larger value comes."""

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.limit = 0.0
        self.amax = 0.0

    def update(self, values: Tensor) -> None:
        """Take in a tensor of any shape."""
        magnitudes = values.detach().abs().float()
        amax = float(magnitudes.max())
        if amax == 0.0:
            self.counts[0] += magnitudes.numel()
            return
        self.amax = max(self.amax, amax)
        if self.limit == 0.0:
            self.limit = amax
        while self.limit < amax:
            # Neighbours merge in pairs, so nothing already counted moves out of its place.
            merged = self.counts.reshape(-1, 2).sum(dim=1)
            self.counts = torch.cat([merged, torch.zeros(BINS // 2, dtype=torch.float64)])
            self.limit *= 2
        self.counts += torch.histc(magnitudes, BINS, 0, self.limit).double()

    def centres(self) -> Tensor:
        """The middle of each bin [BINS]."""
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self.limit / BINS)


@torch.no_grad()
def observe_inputs(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    calls: Iterable[Call],
    progress: Callable[[Iterable[Any], str], Iterable[Any]],
) -> dict[str, AbsHistogram]:
    """Replay recorded calls through the denoiser; the histogram of every layer's input by module path."""
    histograms = {name: AbsHistogram() for name in layers}

    def watcher(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: histograms[name].update(inputs[0])

    hooks = [module.register_forward_pre_hook(watcher(name)) for name, module in layers.items()]
    try:
        for call in progress(calls, "observing activations"):
            denoiser(call.sample, call.timestep, encoder_hidden_states=call.text)
    finally:
        for hook in hooks:
            hook.remove()
    return histograms
