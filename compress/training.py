"""What the passes that learn share: Adam, which goes on where an interrupted run stopped, and what it is given."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffpress.calibration.capture import Call
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError

SAVE_EVERY = 100  # iterations between two states on disk
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of one parameter in torch's Adam


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate; with `decays` it falls to 0 along a cosine."""

    parameters: Mapping[str, Tensor]  # leaves that require gradients; names are unique over all groups
    rate: float
    decays: bool = False


class Runner(nn.Module):
    """The denoiser on a recorded call, as a module whose parameters can be replaced for the time of a call."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.unet, self._run = work.denoiser, work.run

    def forward(self, call: Call) -> Tensor:
        return self._run(call)


def in_turn(iteration: int, count: int, seed: int) -> int:
    """Which of `count` items an iteration takes: every one comes once, at random, before one comes again.

    The order is that of the iteration's number alone, so a run can stop and go on.
    """
    epoch, place = divmod(iteration, count)
    return int(torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))[place])


def state_folder(name: str, settings: object, work: Work, calls: Iterable[Call] = ()) -> Path:
    """Where pass `name` keeps its state: keyed by what `work.scratch` is not, its settings, the plan so far, data."""
    state = hashlib.sha256(repr(settings).encode())
    for path, layer in work.quantization.items():
        state.update(f"{path} ".encode() + layer.contents())
    for call in calls:
        for tensor in (call.sample, *call.features.values()):
            state.update(tensor.cpu().contiguous().numpy().tobytes())
        state.update(repr((call.timestep.tolist(), call.variant, *call.features)).encode())
    return work.scratch / f"{name}-{state.hexdigest()[:16]}"


def state_file(name: str, settings: object, work: Work, calls: Iterable[Call] = ()) -> Path:
    """The same for a pass with one state."""
    return state_folder(name, settings, work, calls).with_suffix(".safetensors")


def save(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors, from any device, to a safetensors file: whole or not there, also when several processes do."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(file)


def descend(
    loss: Callable[[int], Tensor],
    groups: Sequence[Group],
    iterations: int,
    file: Path,
    progress: Callable[[Iterable[Any], str], Iterable[Any]],
    text: str,
) -> None:
    """Lower `loss` of the iteration's number by changing the parameters in place.

    The state goes to `file` every `SAVE_EVERY` iterations and in the end, and is taken from it at the start: where
    `loss` depends on parameters and number alone, a run in pieces ends where a whole one does. Raises `DiffpressError`
    when the loss is not finite.
    """
    named = {name: parameter for group in groups for name, parameter in group.parameters.items()}
    optimizer = torch.optim.Adam([{"params": list(group.parameters.values()), "lr": group.rate} for group in groups])
    start = _restore(file, named, optimizer)
    with torch.enable_grad():
        for iteration in progress(range(start, iterations), text):
            for group, state in zip(groups, optimizer.param_groups, strict=True):
                if group.decays:
                    state["lr"] = group.rate * (1 + math.cos(math.pi * iteration / iterations)) / 2
            optimizer.zero_grad()
            value = loss(iteration)
            if not bool(value.isfinite()):
                raise DiffpressError(f"{text}: the loss is not finite at iteration {iteration}; take a lower rate")
            if value.requires_grad:  # a cached step may run none of the layers that learn
                value.backward(inputs=list(named.values()))
            optimizer.step()
            if (iteration + 1) % SAVE_EVERY == 0 or iteration + 1 == iterations:
                _save(file, named, optimizer, iteration + 1)


def _save(file: Path, named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, done: int) -> None:
    tensors = {f"value/{name}": parameter.detach() for name, parameter in named.items()}
    for name, parameter in named.items():
        state = optimizer.state.get(parameter, {})  # none before its first gradient
        tensors |= {f"{moment}/{name}": state[moment] for moment in _MOMENTS if moment in state}
    save(tensors | {"done": torch.tensor(done)}, file)


def _restore(file: Path, named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """The iterations that are done already."""
    if not file.is_file():
        return 0
    tensors = load_file(file)
    for name, parameter in named.items():
        parameter.data.copy_(tensors[f"value/{name}"])
        if f"step/{name}" in tensors:
            # Adam counts its steps on the CPU, whatever the parameter's device.
            optimizer.state[parameter] = {
                moment: tensors[f"{moment}/{name}"].to("cpu" if moment == "step" else parameter.device)
                for moment in _MOMENTS
            }
    return int(tensors["done"])
