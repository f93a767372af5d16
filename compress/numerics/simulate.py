"""Runs a float model as its quantization plan would: rounded weights and layer inputs, undone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.compress.numerics.formats import fake_quant, get
from diffpress.plan import LayerQuant


@dataclass
class Clock:
    """Which row of the sampling schedule the denoiser stands at; told by `watch`."""

    timesteps: Tensor  # [steps]
    row: int = 0

    @classmethod
    def of(cls, timesteps: Sequence[float]) -> Clock:
        """At the first of `timesteps`."""
        return cls(torch.tensor(timesteps, dtype=torch.float64))

    def set(self, timestep: Tensor) -> None:
        """Go to the row nearest to `timestep`: one number, or [N] equal ones."""
        self.row = int((self.timesteps - float(timestep.flatten()[0])).abs().argmin())

    def watch(self, denoiser: Any) -> Any:
        """Follow the timesteps that `denoiser` is called with; remove the returned hook in the end."""
        # Its sinusoids (or the table in their place) see the timestep whichever way the network is run.
        return denoiser.time_proj.register_forward_pre_hook(lambda _, inputs: self.set(inputs[0]))


def rounded_weight(weight: Tensor, layer: LayerQuant) -> Tensor:
    """The weight [out, in, ...] a quantized layer computes with, seen from outside: Q(W / multiplier) * multiplier."""
    factor = _along_input(layer.multiplier, weight, 1)
    scale = torch.from_numpy(layer.weight_scale).to(weight)
    return fake_quant(weight / factor, scale, get(layer.weight_format)) * factor


def rounded_input(x: Tensor, layer: LayerQuant, row: int = 0) -> Tensor:
    """A layer's input as a quantized layer sees it, with the multiplier taken out again; `row` of the schedule.

    Channels are the second axis of an image [N, C, H, W] and the last of tokens [N, T, C].
    """
    if layer.input_scale is None or layer.input_format is None:
        return x
    factor = _along_input(layer.multiplier, x, 1 if x.ndim == 4 else x.ndim - 1)
    scale = float(layer.input_scale[row if len(layer.input_scale) > 1 else 0])
    return fake_quant(x * factor, scale, get(layer.input_format)) / factor


def _along_input(multiplier: Any, x: Tensor, axis: int) -> Tensor | float:
    if multiplier is None:
        return 1.0
    return torch.from_numpy(multiplier).to(x).reshape([-1 if dim == axis else 1 for dim in range(x.ndim)])


@contextmanager
def simulated(
    denoiser: nn.Module, quantization: Mapping[str, LayerQuant], timesteps: Sequence[float] = (0.0,)
) -> Iterator[None]:
    """Within the block `denoiser` computes with the plan's rounding; its weights come back as they were.

    `timesteps` is the sampling schedule that per-step scales belong to.
    """
    kept: dict[str, Tensor] = {}
    clock = Clock.of(timesteps)
    hooks = []

    def rounds(layer: LayerQuant) -> Callable[..., tuple[Any, ...]]:
        return lambda _, inputs: (rounded_input(inputs[0], layer, clock.row), *inputs[1:])

    try:
        if any(layer.input_scale is not None and len(layer.input_scale) > 1 for layer in quantization.values()):
            hooks.append(clock.watch(denoiser))
        for name, layer in quantization.items():
            module = denoiser.get_submodule(name)
            weight = module.weight
            assert isinstance(weight, Tensor)
            kept[name] = weight.data
            weight.data = rounded_weight(weight.data, layer)
            hooks.append(module.register_forward_pre_hook(rounds(layer)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, data in kept.items():
            denoiser.get_submodule(name).weight.data = data
