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


def rounded_weights(denoiser: nn.Module, quantization: Mapping[str, LayerQuant]) -> dict[str, Tensor]:
    """`rounded_weight` of every layer, by the path of the parameter."""
    paths = {f"{name}.weight": layer for name, layer in quantization.items()}
    return {path: rounded_weight(denoiser.get_parameter(path).data, layer) for path, layer in paths.items()}


@contextmanager
def replaced(network: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block parameters of `network`, by path, have other values; theirs come back as they were."""
    parameters = {path: network.get_parameter(path) for path in values}
    kept = {path: parameter.data for path, parameter in parameters.items()}
    try:
        for path, parameter in parameters.items():
            parameter.data = values[path].to(parameter.data)
        yield
    finally:
        for path, parameter in parameters.items():
            parameter.data = kept[path]


def round_in_place(denoiser: nn.Module, quantization: Mapping[str, LayerQuant]) -> None:
    """Give the float weights of the layers up for `rounded_weight`, which saves the memory of a copy."""
    for name, layer in quantization.items():
        weight = denoiser.get_parameter(f"{name}.weight")
        weight.data.copy_(rounded_weight(weight.data, layer))


@contextmanager
def simulated(
    denoiser: nn.Module,
    quantization: Mapping[str, LayerQuant],
    timesteps: Sequence[float] = (0.0,),
    keep: bool = True,
) -> Iterator[None]:
    """Within the block `denoiser` computes with the plan's rounding; its weights come back as they were.

    `timesteps` is the sampling schedule that per-step scales belong to. Without `keep` the float weights are given up.
    """
    clock = Clock.of(timesteps)
    hooks = []

    def rounds(layer: LayerQuant) -> Callable[..., tuple[Any, ...]]:
        return lambda _, inputs: (rounded_input(inputs[0], layer, clock.row), *inputs[1:])

    try:
        if any(layer.input_scale is not None and len(layer.input_scale) > 1 for layer in quantization.values()):
            hooks.append(clock.watch(denoiser))
        for name, layer in quantization.items():
            hooks.append(denoiser.get_submodule(name).register_forward_pre_hook(rounds(layer)))
        if keep:
            with replaced(denoiser, rounded_weights(denoiser, quantization)):
                yield
        else:
            round_in_place(denoiser, quantization)
            yield
    finally:
        for hook in hooks:
            hook.remove()
