"""Runs a float model as its integer plan would: fake-quantized weights and layer inputs, undone afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffpress.compress.numerics.integer import fake_quant
from diffpress.plan import LayerQuant


@contextmanager
def simulated(denoiser: nn.Module, quantization: Mapping[str, LayerQuant]) -> Iterator[None]:
    """Within the block `denoiser` computes with the plan's rounding; its weights come back as they were."""
    kept: dict[str, Tensor] = {}
    hooks = []

    def rounds(scale: float) -> object:
        return lambda _, inputs: (fake_quant(inputs[0], scale), *inputs[1:])

    try:
        for name, layer in quantization.items():
            module = denoiser.get_submodule(name)
            weight = module.weight
            assert isinstance(weight, Tensor)
            kept[name] = weight.data
            weight.data = fake_quant(weight.data, torch.from_numpy(layer.weight_scale), axis=0)
            hooks.append(module.register_forward_pre_hook(rounds(layer.input_scale)))  # type: ignore[arg-type]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, data in kept.items():
            denoiser.get_submodule(name).weight.data = data
