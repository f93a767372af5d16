"""`temporal`: time features that survive quantization (Huang et al. 2024, TFMQ-DM and Temporal Feature Matters).

The temporal information block is the time embedding and every ResBlock's projection of it. Its features depend on the
timestep alone, so all there is to know of them are the schedule's steps: no recorded data is needed. Its inputs have a
scale of their own at every step (finite set calibration), its rounding is learned jointly against the features of all
steps (TIAR), and per ResBlock the quantized projection or a cached table of the feature is kept, whichever is nearer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.func import functional_call

from diffpress.calibration.processes import on_fastest_device
from diffpress.compress import training
from diffpress.compress.families import unet as family
from diffpress.compress.numerics import adaround
from diffpress.compress.numerics.errors import relative_l2
from diffpress.compress.numerics.formats import fake_quant, get
from diffpress.compress.numerics.ranges import weight_scale
from diffpress.compress.numerics.simulate import rounded_weight
from diffpress.compress.temporal import table
from diffpress.compress.work import Work
from diffpress.plan import LayerQuant, TemporalTable

REGULARIZER = 0.01  # weight of AdaRound's regularizer beside a loss summed over channels


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TemporalPass:
    """Quantized time layers: rounded to nearest, reconstructed, or that beside cached tables.

    The paper takes 20000 iterations at rate 0.001; the defaults go as far in a tenth of the steps.
    """

    method: Literal["round-to-nearest", "reconstruct", "select"] = "select"
    weight_format: str = "int8"
    input_format: Annotated[str | None, Field(description="null leaves the inputs of time layers in float")] = "int8"
    table_format: Annotated[
        str | None, Field(description="of a table's entries, with a scale per step (simulated); null for float")
    ] = "int8"
    per_step: Annotated[bool, Field(description="an input scale for every step, or one for all")] = True
    iterations: Annotated[int, Field(ge=1, description="steps that learn the rounding")] = 2000
    rate: Annotated[float, Field(gt=0, description="their learning rate (Adam)")] = 0.01

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` for unknown formats, and where time features are tables or quantized already."""
        for name in (self.weight_format, self.input_format, self.table_format):
            if name is not None:
                get(name)
        table.require_modules(work, "temporal")

    @torch.no_grad()
    def apply(self, work: Work) -> str:
        """Quantize the time layers, learn their rounding and choose; says what was chosen, its error and bytes."""
        unet, schedule = work.denoiser, work.sampling.timesteps
        home = unet.device
        with on_fastest_device(unet):
            timesteps = torch.tensor(schedule, dtype=torch.float32, device=unet.device)
            modules, exact = family.time_layers(unet), table.features(unet, timesteps)
            layers = quantize_time_layers(unet, timesteps, self.weight_format, self.input_format, self.per_step)
            weights = {name: rounded_weight(module.weight.data, layers[name]) for name, module in modules.items()}
            got = quantized_features(unet, timesteps, layers, weights)
            errors = [f"{relative_error(got, exact):.2%} to nearest"]
            if self.method != "round-to-nearest":
                file = training.state_file("temporal", self, work)
                weights = learn_rounding(
                    unet, timesteps, layers, exact, self.iterations, self.rate, file, work.progress
                )  # fmt: skip
                got = quantized_features(unet, timesteps, layers, weights)
                errors.append(f"{relative_error(got, exact):.2%} reconstructed")
                for name, module in modules.items():
                    work.originals.setdefault(f"{name}.weight", module.weight.data.to(home))
                    module.weight.data = weights[name]
            tables: dict[str, Tensor] = {}
            if self.method == "select":
                tables = nearer_tables(
                    exact, got, {name: stored(rows, self.table_format) for name, rows in exact.items()}
                )
                errors.append(f"{relative_error(got | tables, exact):.2%} as chosen")
        before = 4 * sum(parameter.numel() for module in modules.values() for parameter in module.parameters())
        if tables:
            work.temporal = TemporalTable(schedule, {name: rows.cpu().numpy() for name, rows in tables.items()})
            table.install(unet, work.temporal)
        left = family.time_layers(unet)
        work.quantization.update({name: layers[name] for name in left})
        after = sum(_module_bytes(module, layers[name]) for name, module in left.items())
        after += sum(_table_bytes(rows, self.table_format) for rows in tables.values())
        kind = self.weight_format if self.input_format is None else f"{self.weight_format} x {self.input_format}"
        kept = f"{len(exact) - len(tables)} projections in {kind}"
        if self.method == "select":
            kept += f", {len(tables)} tables in {self.table_format or 'float32'}"
        return (
            f"{len(exact)} time features: {kept}; error {', '.join(errors)}; "
            f"{before / 1e3:.1f} kB of float32 weights became {after / 1e3:.1f} kB"
        )


@torch.no_grad()
def quantize_time_layers(
    unet: Any, timesteps: Tensor, weight_format: str, input_format: str | None, per_step: bool = True
) -> dict[str, LayerQuant]:
    """Scales of every time layer by path: of weights per output channel, of inputs per step or one for all.

    Finite set calibration (TFMQ-DM, Section 4.3): an input at a step is one vector, so its range is searched exactly.
    """
    seen: dict[str, Tensor] = {}

    def watcher(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: seen.update({name: inputs[0]})

    modules = family.time_layers(unet)
    hooks = [module.register_forward_pre_hook(watcher(name)) for name, module in modules.items()]
    try:
        table.features(unet, timesteps)
    finally:
        for hook in hooks:
            hook.remove()
    layers = {}
    for name, module in modules.items():
        scale = weight_scale(module.weight, get(weight_format)).cpu().numpy()
        inputs = None
        if input_format is not None:
            # A step is to its scale what an output channel of a weight is to its own.
            rows = seen[name] if per_step else seen[name].reshape(1, -1)
            inputs = weight_scale(rows, get(input_format)).cpu().numpy()
        layers[name] = LayerQuant(scale, inputs, weight_format, input_format)
    return layers


class _Features(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, timesteps: Tensor) -> dict[str, Tensor]:
        return table.features(self.unet, timesteps)


def quantized_features(
    unet: Any, timesteps: Tensor, layers: Mapping[str, LayerQuant], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Every projected feature [steps, C] as quantized `layers` compute it with `weights`, both by module path.

    `timesteps` [steps] is the whole schedule that the input scales belong to. Gradients flow to the weights.
    """

    def rounds(layer: LayerQuant) -> Callable[..., Any]:
        if layer.input_scale is None or layer.input_format is None:
            return lambda _, inputs: None
        scale, format = torch.from_numpy(layer.input_scale).to(timesteps), get(layer.input_format)
        # One number, or a number for each row of the input.
        per_row = scale if len(scale) > 1 else scale[0]
        return lambda _, inputs: (adaround.lsq(inputs[0], per_row, format),)

    hooks = [unet.get_submodule(name).register_forward_pre_hook(rounds(layer)) for name, layer in layers.items()]
    try:
        replaced = {f"unet.{name}.weight": weight for name, weight in weights.items()}
        return functional_call(_Features(unet), replaced, (timesteps,))
    finally:
        for hook in hooks:
            hook.remove()


def learn_rounding(
    unet: Any,
    timesteps: Tensor,
    layers: Mapping[str, LayerQuant],
    exact: Mapping[str, Tensor],
    iterations: int,
    rate: float,
    file: Path,
    progress: Callable[[Iterable[Any], str], Iterable[Any]],
) -> dict[str, Tensor]:
    """Weights [out, in] on their grids, by module path, that bring the features nearest to `exact` (TIAR).

    AdaRound of all time layers at once against the sum over ResBlocks of |emb - emb'|^2, averaged over the steps
    (TFMQ-DM, Section 4.2, equation 11). Inputs are rounded meanwhile, as they will be. `file` keeps the state.
    """
    grids = {name: adaround.cells(unet.get_submodule(name).weight.data, layer) for name, layer in layers.items()}
    places = {name: adaround.initial(grid).requires_grad_() for name, grid in grids.items()}

    def loss(iteration: int) -> Tensor:
        weights = {name: adaround.soft(grid, places[name]) for name, grid in grids.items()}
        got = quantized_features(unet, timesteps, layers, weights)
        distance = torch.stack([(got[name] - rows).square().sum(dim=1).mean() for name, rows in exact.items()]).sum()
        b = adaround.annealed(iteration, iterations)
        if b is None:
            return distance
        return distance + REGULARIZER * torch.stack([adaround.regularizer(a, b) for a in places.values()]).sum()

    training.descend(
        loss, [training.Group(places, rate)], iterations, file, progress, "reconstructing time features"
    )  # fmt: skip
    return {name: adaround.hard(grid, places[name].detach()) for name, grid in grids.items()}


def stored(rows: Tensor, format: str | None) -> Tensor:
    """A table [steps, C] as its entries in `format` hold it, with a scale for every step; None keeps float."""
    if format is None:
        return rows
    return fake_quant(rows, weight_scale(rows, get(format), "mse"), get(format))


def nearer_tables(
    exact: Mapping[str, Tensor], got: Mapping[str, Tensor], tables: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Those of `tables` that are no farther from `exact` than `got` is: disturbance-aware selection, item by item.

    At equal error the table is kept, which spares the work.
    """
    return {
        name: rows
        for name, rows in tables.items()
        if float((rows - exact[name]).square().sum()) <= float((got[name] - exact[name]).square().sum())
    }


def relative_error(got: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """||got - exact|| / ||exact|| over all features and steps."""
    return relative_l2((got[name], rows) for name, rows in exact.items())


def _module_bytes(module: nn.Linear, layer: LayerQuant) -> float:
    """Weights in their format; scales and bias in float32."""
    floats: list[np.ndarray | Tensor | None] = [layer.weight_scale, layer.input_scale, module.bias]
    count = sum(math.prod(part.shape) for part in floats if part is not None)
    return module.weight.numel() * get(layer.weight_format).bits / 8 + 4 * count


def _table_bytes(rows: Tensor, format: str | None) -> float:
    """Entries in their format and a float32 scale for every row."""
    return 4 * rows.numel() if format is None else rows.numel() * get(format).bits / 8 + 4 * len(rows)
