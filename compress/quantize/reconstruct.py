"""`reconstruct`: learns the rounding of weights and the scales of layer inputs, unit by unit in forward order.

Li et al. 2023, Q-Diffusion, Section 3.2: a unit (ResBlock, transformer, resampling) is given what the quantized network
before it makes of recorded calls, and learns to answer as the full-precision network does on the same calls; weights
first (AdaRound), then input scales (LSQ). Inputs are rounded while weights are learned, as they will be when deployed.
Time layers stay out of the units by default: they depend on the timestep alone and overfit there (Huang et al. 2024,
TFMQ-DM, Section 4.1).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from diffpress.calibration.capture import Call
from diffpress.calibration.processes import on_fastest_device
from diffpress.compress import training
from diffpress.compress.families import unet as family
from diffpress.compress.names import require_matches
from diffpress.compress.numerics import adaround
from diffpress.compress.numerics.errors import relative_l2
from diffpress.compress.numerics.formats import get
from diffpress.compress.numerics.simulate import replaced, rounded_weight, simulated
from diffpress.compress.quantize.samples import Samples, capture, chosen_calls, hidden_state
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import LayerQuant

REGULARIZER = 0.01  # weight of AdaRound's regularizer beside a loss summed over channels
GROUPS = 4  # more input scales than this are scales by step
ROUNDING_POWER, SCALE_POWER = 2.0, 2.4  # |difference|^p of the two losses, as in Q-Diffusion's code


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ReconstructPass:
    """Block reconstruction of a quantized model.

    The papers take 20000 iterations at rate 0.001 and 5000 at 0.0004; the defaults go as far in a tenth of the steps.
    """

    iterations: Annotated[int, Field(ge=0, description="steps that learn the rounding of a unit's weights")] = 2000
    scale_iterations: Annotated[int, Field(ge=0, description="steps that learn its input scales after that")] = 500
    rate: Annotated[float, Field(gt=0, description="learning rate of the rounding (Adam)")] = 0.01
    scale_rate: Annotated[float, Field(gt=0, description="that of the scales' logarithms, falling to 0")] = 0.004
    batch: Annotated[int, Field(ge=1, description="samples per step; a recorded call holds two")] = 8
    calls: Annotated[int, Field(ge=1, description="recorded calls kept as data; memory grows with it")] = 64
    temporal: Annotated[bool, Field(description="learn quantized time projections with their ResBlocks")] = False
    exclude: Annotated[tuple[str, ...], Field(description="shell patterns of units that stay as they are")] = ()

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` without a quantized layer to refine, or for a pattern that matches no unit."""
        if not work.quantization:
            raise DiffpressError("reconstruct refines a quantized model: put 'quantize' before it in the recipe")
        require_matches("reconstruct: exclude", self.exclude, family.units(work.denoiser), "unit")
        if not self.learned(work):
            raise DiffpressError("reconstruct: no unit that is not excluded has a quantized layer")

    def learned(self, work: Work) -> dict[str, list[str]]:
        """Unit to the quantized layers that are learned in it, both as module paths, in forward order."""
        fixed = set() if self.temporal else set(family.time_layers(work.denoiser))
        layers = [name for name in work.quantization if name not in fixed]
        units = {
            unit: [name for name in layers if _inside(name, unit)]
            for unit in family.units(work.denoiser)
            if not any(fnmatch(unit, pattern) for pattern in self.exclude)
        }
        return {unit: inside for unit, inside in units.items() if inside}

    def apply(self, work: Work) -> str:
        """Learn every unit, or read what an interrupted run has learned; says by how much the units' error fell."""
        units = self.learned(work)
        calls = chosen_calls(work.record(), self.calls, work.seed)
        folder = training.state_folder("reconstruct", self, work, calls)
        state = State(work, {name for inside in units.values() for name in inside})
        done = {unit: load(file) for unit in units if (file := folder / f"{unit}.safetensors").is_file()}
        for result in done.values():
            state.install(result)
        with on_fastest_device(work.denoiser):
            calls = [call.to(work.denoiser.device) for call in calls]
            for unit in work.progress([unit for unit in units if unit not in done], "reconstructing"):
                data = state.capture(unit, calls)
                if data is None:
                    state.waiting.difference_update(units[unit])
                    continue
                # A seed of its own for every unit: what it learns does not depend on where an earlier run stopped.
                seed = work.seed + list(units).index(unit)
                layers = {name: layer for name, layer in work.quantization.items() if _inside(name, unit)}
                done[unit] = optimise(unit, work.denoiser.get_submodule(unit), layers, units[unit], data, self, seed)
                save(done[unit], folder / f"{unit}.safetensors")
                state.install(done[unit])
        return _summary(done, units, self._leftover(work))

    def _leftover(self, work: Work) -> list[str]:
        """Quantized layers that no unit holds."""
        units = list(family.units(work.denoiser))
        return [name for name in work.quantization if not any(_inside(name, unit) for unit in units)]


@dataclasses.dataclass(frozen=True)
class Learned:
    """A reconstructed unit: weights on their grid and input scales by module path, and its relative errors."""

    weights: dict[str, Tensor]
    input_scales: dict[str, np.ndarray]
    before: float  # ||y - y'|| / ||y|| of its output on the data, rounded to nearest
    after: float


class State:
    """The model under way: which layers still wait for their turn."""

    def __init__(self, work: Work, waiting: set[str]) -> None:
        self.work = work
        self.waiting = waiting

    def install(self, learned: Learned) -> None:
        """Make a unit's result that of the model and of the plan."""
        for name, weight in learned.weights.items():
            parameter = self.work.denoiser.get_submodule(name).weight
            self.work.originals.setdefault(f"{name}.weight", parameter.data)
            parameter.data = weight.to(parameter.data)
        for name, scale in learned.input_scales.items():
            layer = self.work.quantization[name]
            self.work.quantization[name] = dataclasses.replace(layer, input_scale=scale)
        self.waiting.difference_update(learned.weights)

    def capture(self, unit: str, calls: Sequence[Call]) -> Samples | None:
        """The data of `unit`; None when no call runs it."""
        return capture(self.work, unit, calls, self.quantized_prefix(), self.full_precision())

    def quantized_prefix(self) -> Any:
        """Within the block, the denoiser as quantized so far: all layers but those that wait."""
        prefix = {name: layer for name, layer in self.work.quantization.items() if name not in self.waiting}
        return simulated(self.work.denoiser, prefix, self.work.sampling.timesteps)

    def full_precision(self) -> AbstractContextManager[None]:
        """Within the block, the denoiser as it was before any pass rounded a weight."""
        present = dict(self.work.denoiser.named_parameters())  # tables may stand in the place of others
        originals = {path: value for path, value in self.work.originals.items() if path in present}
        return replaced(self.work.denoiser, originals)


def optimise(
    name: str,
    unit: nn.Module,
    quantized: Mapping[str, LayerQuant],
    learned: Sequence[str],
    data: Samples,
    settings: ReconstructPass,
    seed: int,
) -> Learned:
    """Learn unit `name` on `data`; `quantized` are the layers in it by full path, of which `learned` may change.

    Needs nothing but its arguments, so units whose data is there can be learned in different processes. Rounding or
    scales that do not lower the error are given up.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = {
        path: _Layer(unit.get_submodule(path[len(name) + 1 :]), layer, f"{path[len(name) + 1 :]}.weight".lstrip("."))
        for path, layer in quantized.items()
    }
    free = [layers[path] for path in learned]
    simulation = _Simulation(unit, list(layers.values()))
    with simulation.hooked():
        errors = [_error(simulation, data, settings.batch)]
        for learn in (_learn_rounding, _learn_scales):
            kept = [(layer.weight, layer.log_factor) for layer in free]
            learn(simulation, free, data, settings, generator)
            errors.append(_error(simulation, data, settings.batch))
            if not errors[-1] < errors[-2]:
                errors[-1] = errors[-2]
                for layer, (weight, log_factor) in zip(free, kept, strict=True):
                    layer.weight, layer.log_factor = weight, log_factor
    weights = {path: layers[path].weight for path in learned}
    scales = {path: scale for path in learned if (scale := layers[path].input_scale()) is not None}
    return Learned(weights, scales, errors[0], errors[-1])


class _Layer:
    """A quantized layer while its unit is learned: the weight and the input scales it computes with now.

    A scale for all steps or for a group of them learns a factor of its own. Where every step has its scale they share
    one factor: of a single step there are too few samples, and what they teach clips the next prompt. The factor is
    kept as a logarithm: the scale stays positive, and one learning rate suits scales of any size.
    """

    def __init__(self, module: nn.Module, quant: LayerQuant, key: str) -> None:
        self.module, self.quant, self.key = module, quant, key
        weight = module.weight
        assert isinstance(weight, Tensor)
        self.original = weight.data
        self.weight = rounded_weight(weight.data, quant)
        self.log_factor: Tensor | None = None
        if quant.input_scale is not None:
            distinct, member = torch.from_numpy(quant.input_scale).to(weight.data).unique(return_inverse=True)
            self.distinct, self.member = distinct, member
            self.log_factor = torch.zeros_like(distinct if len(distinct) <= GROUPS else distinct[:1])

    def scales(self) -> Tensor:
        """The input's scale at every step [1] or [steps]."""
        assert self.log_factor is not None
        return (self.distinct * self.log_factor.exp())[self.member]

    def input_scale(self) -> np.ndarray | None:
        """The same for the plan; None where the input stays in float."""
        return None if self.log_factor is None else self.scales().detach().cpu().numpy().astype(np.float32)

    def rounded(self, x: Tensor, rows: Tensor) -> Tensor:
        """`rounded_input` with gradients, for samples at different steps: x [n, ...], rows [n]."""
        if self.log_factor is None or self.quant.input_format is None:
            return x
        scale = self.scales()[rows.clamp_max(len(self.member) - 1)]
        format = get(self.quant.input_format)
        if self.quant.multiplier is None:
            return adaround.lsq(x, scale, format)
        shape = [1] * x.ndim
        shape[1 if x.ndim == 4 else -1] = -1
        multiplier = torch.from_numpy(self.quant.multiplier).to(x).reshape(shape)
        return adaround.lsq(x * multiplier, scale, format) / multiplier


class _Simulation:
    """A unit that computes with its layers' present weights and scales, and lets gradients through to them."""

    def __init__(self, unit: nn.Module, layers: list[_Layer]) -> None:
        self.unit, self.layers = unit, layers
        self.rows = torch.zeros(0, dtype=torch.long)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within the block the unit's layers round what they are given."""

        def rounds(layer: _Layer) -> Callable[..., tuple[Any, ...]]:
            return lambda _, inputs: (layer.rounded(inputs[0], self.rows), *inputs[1:])

        hooks = [layer.module.register_forward_pre_hook(rounds(layer)) for layer in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self, samples: Samples) -> Tensor:
        self.rows = samples.rows
        weights = {layer.key: layer.weight for layer in self.layers}
        return hidden_state(functional_call(self.unit, weights, samples.args, samples.kwargs))


@torch.enable_grad()
def _learn_rounding(
    simulation: _Simulation, layers: list[_Layer], data: Samples, settings: ReconstructPass, generator: torch.Generator
) -> None:
    if not settings.iterations:
        return
    grids = [adaround.cells(layer.original, layer.quant) for layer in layers]
    alphas = [adaround.initial(grid).requires_grad_() for grid in grids]
    optimizer = torch.optim.Adam(alphas, lr=settings.rate)
    for iteration in range(settings.iterations):
        for layer, grid, alpha in zip(layers, grids, alphas, strict=True):
            layer.weight = adaround.soft(grid, alpha)
        batch = _drawn(data, settings.batch, generator)
        loss = _loss(simulation(batch), batch.targets, ROUNDING_POWER)
        b = adaround.annealed(iteration, settings.iterations)
        if b is not None:
            loss = loss + REGULARIZER * sum(adaround.regularizer(alpha, b) for alpha in alphas)
        optimizer.zero_grad()
        loss.backward(inputs=alphas)
        optimizer.step()
    for layer, grid, alpha in zip(layers, grids, alphas, strict=True):
        layer.weight = adaround.hard(grid, alpha.detach())


@torch.enable_grad()
def _learn_scales(
    simulation: _Simulation, layers: list[_Layer], data: Samples, settings: ReconstructPass, generator: torch.Generator
) -> None:
    layers = [layer for layer in layers if layer.log_factor is not None]
    if not settings.scale_iterations or not layers:
        return
    factors = [layer.log_factor.clone().requires_grad_() for layer in layers if layer.log_factor is not None]
    for layer, factor in zip(layers, factors, strict=True):
        layer.log_factor = factor
    # LSQ's division of the gradient by sqrt(n q) changes nothing under Adam, which divides by its size anyway.
    optimizer = torch.optim.Adam(factors, lr=settings.scale_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.scale_iterations)
    for _ in range(settings.scale_iterations):
        batch = _drawn(data, settings.batch, generator)
        optimizer.zero_grad()
        _loss(simulation(batch), batch.targets, SCALE_POWER).backward(inputs=factors)
        optimizer.step()
        decay.step()
    for layer, factor in zip(layers, factors, strict=True):
        layer.log_factor = factor.detach()


def _drawn(data: Samples, count: int, generator: torch.Generator) -> Samples:
    """`count` samples at random, none twice."""
    index = torch.randperm(len(data.targets), generator=generator)[:count]
    return data.at(index.to(data.targets.device))


def _loss(got: Tensor, wanted: Tensor, power: float) -> Tensor:
    """|difference|^p of [n, C, ...]: summed over channels, averaged over everything else."""
    return (got - wanted).abs().pow(power).sum(dim=1).mean()


@torch.no_grad()
def _error(simulation: _Simulation, data: Samples, batch: int) -> float:
    """||y - y'|| / ||y|| over all samples."""
    parts = (data.at(slice(start, start + batch)) for start in range(0, len(data.targets), batch))
    return relative_l2((simulation(part), part.targets) for part in parts)


def save(learned: Learned, file: Path) -> None:
    """Write a unit's result; the file is whole or it is not there."""
    tensors = {f"weight/{name}": weight for name, weight in learned.weights.items()}
    tensors |= {f"input_scale/{name}": torch.from_numpy(scale) for name, scale in learned.input_scales.items()}
    tensors["errors"] = torch.tensor([learned.before, learned.after], dtype=torch.float64)
    training.save(tensors, file)


def load(file: Path) -> Learned:
    """Read what `save` wrote."""
    tensors = load_file(file)
    before, after = tensors.pop("errors").tolist()
    parts: dict[str, dict[str, Tensor]] = {"weight": {}, "input_scale": {}}
    for key, tensor in tensors.items():
        kind, name = key.split("/", 1)
        parts[kind][name] = tensor
    scales = {name: tensor.numpy() for name, tensor in parts["input_scale"].items()}
    return Learned(parts["weight"], scales, before, after)


def _summary(done: Mapping[str, Learned], units: Mapping[str, Sequence[str]], leftover: Sequence[str]) -> str:
    if not done:
        raise DiffpressError("reconstruct: no recorded call runs a unit that it could learn")
    before, after = (statistics.median(getattr(unit, end) for unit in done.values()) for end in ("before", "after"))
    layers = sum(len(unit.weights) for unit in done.values())
    text = f"{len(done)} units with {layers} layers reconstructed, median error of their outputs "
    text += f"{before:.2%} -> {after:.2%}"
    skipped = [unit for unit in units if unit not in done]
    for names, why in ((skipped, "units that no recorded call runs"), (leftover, "layers outside of units")):
        if names:
            text += (
                f"; left as they were: {len(names)} {why} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            )
    return text


def _inside(layer: str, unit: str) -> bool:
    return f"{layer}.".startswith(f"{unit}.")
