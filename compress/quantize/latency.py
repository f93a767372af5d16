"""What a layer costs to run: arithmetic and traffic, latency estimated for a measured machine, and what cannot pay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from diffpress.compress.numerics.formats import get
from diffpress.compress.work import Work
from diffpress.plan import LayerQuant

FLOAT = "float"
TILE = 16  # int8 matrix products work on tiles of this many channels


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One call of a layer, both guidance halves: its multiply-adds, and numbers it reads and writes."""

    multiply_adds: int
    inputs: int
    outputs: int


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Target:
    """What a machine was measured to do, for estimates of latency; without a target there are none.

    `rates` are 10^9 multiply-adds a second, of "float" and of formats that multiply ("int8", "e4m3"). `bandwidth` is
    10^9 bytes a second, `float_bytes` what a float number takes there.
    """

    rates: dict[str, Annotated[float, Field(gt=0)]]
    bandwidth: Annotated[float, Field(gt=0)]
    float_bytes: Literal[2, 4] = 2

    def latency_ms(self, call: Traffic, weight_bytes: int, quant: LayerQuant | None = None) -> float | None:
        """One call of a layer; None where the target has no rate, and for formats that only simulate.

        A roofline (Williams et al. 2009): the longer of its arithmetic and of moving weights, inputs and outputs once.
        Assumed are inputs rounded in a pass of their own, float outputs, and weights in few bits that are decoded on
        the way and multiplied in float where inputs are float.
        """
        arithmetic, rounding = FLOAT, 0.0
        input_bytes: float = call.inputs * self.float_bytes
        if quant is not None and quant.input_format is not None:
            if quant.input_format != quant.weight_format or not get(quant.input_format).deploys:
                return None
            arithmetic, rounding = quant.input_format, input_bytes
            input_bytes = call.inputs * get(arithmetic).bits / 8
            rounding += input_bytes
        if arithmetic not in self.rates:
            return None
        moving = (weight_bytes + input_bytes + call.outputs * self.float_bytes) / self.bandwidth
        return 1e-6 * (max(call.multiply_adds / self.rates[arithmetic], moving) + rounding / self.bandwidth)


@torch.no_grad()
def observe_traffic(work: Work, layers: Mapping[str, nn.Module]) -> dict[str, Traffic]:
    """What every layer that a recorded call runs computes and moves in it."""
    seen: dict[str, Traffic] = {}

    def watch(name: str) -> Callable[..., None]:
        def note(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            each = module.weight[0].numel()  # multiply-adds of one number of the output
            seen[name] = Traffic(output.numel() * each, inputs[0].numel(), output.numel())

        return note

    hooks = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    try:
        for call in work.record():
            work.run(call)
            if len(seen) == len(layers):
                break
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def does_not_pay(module: nn.Conv2d | nn.Linear, min_parameters: int = 0) -> str:
    """Why a layer of this size gains nothing from few bits, or nothing."""
    outputs, inputs = module.weight.shape[:2]
    if outputs % TILE or inputs % TILE:
        return f"{inputs} inputs and {outputs} outputs are not both multiples of {TILE}"
    if module.weight.numel() < min_parameters:
        return f"{module.weight.numel()} parameters are fewer than {min_parameters}"
    return ""
