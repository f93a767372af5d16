"""`finetune`: selective finetuning of a quantized model (Wang et al. 2024, QuEST).

Everything is frozen but what quantization hurts most: the ResBlocks' time projections, weights and biases, which learn
to answer as in full precision (time-aware alignment, TLA), then attention or feed-forward weights and the input scales
of all layers (CMA). The objective of both parts together is L_TLA + L_CMA + 2 L_output, of one alone L_part + L_output.
L_TLA and L_CMA average the mean squared error over the trained layers' outputs: the paper writes a sum, but its code
adds L_output once for every layer, which balances as an average does. No images are needed: recorded calls are answered
by the full-precision model, too, and that is the target.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import mse_loss

from diffpress.calibration.capture import Call
from diffpress.calibration.processes import on_fastest_device
from diffpress.compress import training
from diffpress.compress.families import unet as family
from diffpress.compress.numerics import adaround
from diffpress.compress.numerics.errors import relative_l2
from diffpress.compress.numerics.formats import get
from diffpress.compress.numerics.simulate import Clock, rounded_weight
from diffpress.compress.quantize.samples import chosen_calls
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import LayerQuant

JUDGED = 32  # recorded calls that the error before and after is measured on, at most


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FinetunePass:
    """Finetune at most `share` of a quantized model's parameters on recorded calls.

    `layers` says whose weights are trained after the time projections' (TLA): nobody's (`time`), those of feed-forward
    networks, of attention, or both (CMA, with the input scales of all layers). Time projections come first, then the
    others in forward order, up to the first that does not fit.
    """

    layers: Literal["time", "feed-forward", "attention", "both"] = "feed-forward"
    share: Annotated[float, Field(gt=0, le=0.07, description="of the parameters that may be trained")] = 0.07
    iterations: Annotated[int, Field(ge=1, description="steps, a recorded call each")] = 2000
    weight_rate: Annotated[float, Field(gt=0, description="learning rate of weights and biases (Adam)")] = 1e-5
    scale_rate: Annotated[float, Field(gt=0, description="that of the input scales' logarithms")] = 1e-4
    calls: Annotated[int, Field(ge=1, description="recorded calls kept as data; memory grows with it")] = 256

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` without a quantized layer, or where nothing that it trains is there."""
        if not work.quantization:
            raise DiffpressError("finetune refines a quantized model: put 'quantize' before it in the recipe")
        if self.layers == "time" and not time_projections(work.denoiser):
            raise DiffpressError("finetune: layers: time finds no time projection, a table stands in their place")
        self.selection(work)

    def selection(self, work: Work) -> Selection:
        """What is trained; raises `DiffpressError` where `share` does not even allow for the input scales."""
        unet = work.denoiser
        time, rest = time_projections(unet), self._rest(work)
        own = {**family.time_layers(unet), **family.projections(unet)}
        scales = {name: layer.input_scale for name, layer in work.quantization.items() if layer.input_scale is not None}
        scaled = {name: scale for name, scale in scales.items() if name in own or self.layers != "time"}
        total = sum(parameter.numel() for parameter in unet.parameters())
        spent = sum(len(np.unique(scale)) for scale in scaled.values())
        if spent > self.share * total:
            raise DiffpressError(f"finetune: {spent} input scales are more than {self.share:.0%} of {total} parameters")
        kept: list[str] = []
        for name in [*time, *rest]:
            module = unet.get_submodule(name)
            size = module.weight.numel() + (module.bias.numel() if name in time and module.bias is not None else 0)
            if spent + size > self.share * total:
                break
            kept.append(name)
            spent += size
        if not kept and not scaled:
            raise DiffpressError(f"finetune: {self.share:.1%} of the parameters does not hold one layer")
        parts = [name for name in time if name in kept], [name for name in rest if name in kept]
        return Selection(*parts, list(scaled), left_out=len(time) + len(rest) - len(kept), share=spent / total)

    def _rest(self, work: Work) -> list[str]:
        """The quantized attention and feed-forward layers that `layers` asks for, in forward order."""
        unet = work.denoiser
        asked: set[str] = set()
        if self.layers in ("feed-forward", "both"):
            asked.update(family.feed_forward_layers(unet))
        if self.layers in ("attention", "both"):
            asked.update(family.attention_layers(unet))
        inside = [name for unit in family.units(unet) for name in work.quantization if name.startswith(f"{unit}.")]
        return [name for name in inside if name in asked]

    def apply(self, work: Work) -> str:
        """Train, or go on where an interrupted run stopped; says what was trained and what became of the output."""
        unet, selection = work.denoiser, self.selection(work)
        data = chosen_calls(work.record(), self.calls, work.seed)
        # At random: a stride would meet the same few steps of every prompt again and again.
        judged = random.Random(work.seed).sample(data, min(JUDGED, len(data)))
        file = training.state_file("finetune", self, work, data)

        def loss(iteration: int) -> Tensor:
            call = data[training.in_turn(iteration, len(data), work.seed)]
            return objective(student, selection, call, 1 if self.layers == "time" else 2)

        with on_fastest_device(unet):
            student = Student(work, selection)
            rates = ((student.weights(), self.weight_rate), (student.scales(), self.scale_rate))
            groups = [training.Group(parameters, rate) for parameters, rate in rates if parameters]
            with student.attached():
                before = student.error(judged)
                training.descend(loss, groups, self.iterations, file, work.progress, "finetuning")
                after = student.error(judged)
        change = f"error of the output on recorded calls {before:.2%} -> {after:.2%}"
        if not after < before:
            return f"nothing: {change}, so the model stays as it was; try lower rates"
        student.install(data)
        left_out = f", {selection.left_out} more do not fit in {self.share:.0%}" if selection.left_out else ""
        skipped = "" if time_projections(unet) else "; no time projections: a table stands in their place"
        kind = {"both": "attention and feed-forward"}.get(self.layers, self.layers)
        others = "" if self.layers == "time" else f", {len(selection.rest)} {kind} layers"
        return (
            f"{selection.share:.1%} of the parameters trained: {len(selection.time)} time projections{others}"
            f"{left_out}, input scales of {len(selection.scaled)} layers; {change}{skipped}"
        )


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which layers learn, by module path: weights and biases of `time`, weights of `rest`, input scales of `scaled`.

    `left_out` counts the layers that did not fit; `share` is what was chosen, of all parameters.
    """

    time: list[str]
    rest: list[str]
    scaled: list[str]
    left_out: int
    share: float


def time_projections(unet: Any) -> list[str]:
    """The ResBlocks' time projections that are still in the graph, as module paths."""
    return list(family.projections(unet))


def objective(student: Student, selection: Selection, call: Call, parts: int) -> Tensor:
    """L_TLA + L_CMA + parts * L_output on one call; layers that it does not run (a cached step) do not count."""
    wanted, target = student.full_precision(call)
    got, output = student(call)
    total = parts * mse_loss(output, target)
    for part in (selection.time, selection.rest):
        errors = [mse_loss(got[name], wanted[name]) for name in part if name in got]
        if errors:
            total = total + torch.stack(errors).mean()
    return total


class InputScales:
    """A layer's input scales while they learn: a factor for each distinct one, so that groups of steps stay groups.

    The factor is kept as a logarithm: scales stay positive, and one learning rate suits formats of any unit.
    """

    def __init__(self, layer: LayerQuant, like: Tensor) -> None:
        self.layer = layer
        scales = torch.from_numpy(layer.input_scale).to(like)
        self.distinct, self.member = scales.unique(return_inverse=True)
        self.log_factor = torch.zeros_like(self.distinct)
        self.multiplier = None if layer.multiplier is None else torch.from_numpy(layer.multiplier).to(like)

    def rounded(self, x: Tensor, row: int) -> Tensor:
        """`simulate.rounded_input` with gradients to x and to the scale."""
        assert self.layer.input_format is not None
        place = self.member[row if len(self.member) > 1 else 0]
        scale, format = self.distinct[place] * self.log_factor[place].exp(), get(self.layer.input_format)
        if self.multiplier is None:
            return adaround.lsq(x, scale, format)
        multiplier = self.multiplier.reshape((1, -1, 1, 1) if x.ndim == 4 else (-1,))
        return adaround.lsq(x * multiplier, scale, format) / multiplier

    def learned(self, rows: Sequence[int]) -> np.ndarray:
        """The scales [1] or [steps] in the end; steps that none of the visited `rows` speaks for follow neighbours."""
        change = self.log_factor.detach()[self.member].cpu().numpy()
        if len(change) > 1:
            member = self.member.cpu().numpy()
            seen = np.isin(member, member[list(rows)])
            steps = np.arange(len(change))
            change = np.where(seen, change, np.interp(steps, steps[seen], change[seen]))
        assert self.layer.input_scale is not None
        return (self.layer.input_scale * np.exp(change)).astype(np.float32)


class Student:
    """The quantized denoiser while it is trained. Nothing of the model or the plan changes before `install`."""

    def __init__(self, work: Work, selection: Selection) -> None:
        self.work, self.selection = work, selection
        self.clock = Clock.of(work.sampling.timesteps)
        self._runner = training.Runner(work)
        present = dict(work.denoiser.named_parameters())  # tables may stand in the place of others
        self._originals = {path: value.to(present[path]) for path, value in work.originals.items() if path in present}
        self.values: dict[str, Tensor] = {}  # parameters by path: what learns, and frozen weights as they are rounded
        self.inputs: dict[str, InputScales] = {}
        trained = (*selection.time, *selection.rest)
        for name, layer in work.quantization.items():
            weight = work.denoiser.get_submodule(name).weight.data
            if name not in trained:
                self.values[f"{name}.weight"] = rounded_weight(weight, layer)
            if layer.input_scale is not None:
                self.inputs[name] = InputScales(layer, weight)
        for name in trained:
            self.values[f"{name}.weight"] = self._start(name).requires_grad_()
        # Of pruned layers: what was made zero stays zero.
        self._stays = {
            f"{name}.weight": work.denoiser.get_submodule(name).weight != 0 for name in trained if name in work.sparse
        }
        for name in selection.time:
            bias = work.denoiser.get_submodule(name).bias
            if bias is not None:
                self.values[f"{name}.bias"] = bias.detach().clone().requires_grad_()
        for name in selection.scaled:
            self.inputs[name].log_factor.requires_grad_()
        self._seen: dict[str, Tensor] = {}
        self._rounding = False

    def _start(self, name: str) -> Tensor:
        """The weight from which `name` learns, which rounds to its present value.

        After learned rounding every weight would lie in the middle of its cell, half a step from any change. It starts
        as far from its two neighbours as its full-precision value lies between two integers: as in QuEST's code,
        whose weights round to floor(W / s) + h with the h learned before.
        """
        weight = self.work.denoiser.get_submodule(name).weight.data
        layer, original = self.work.quantization.get(name), self._originals.get(f"{name}.weight")
        if layer is None or original is None:
            return weight.clone()
        grid = adaround.cells(original, layer)
        start = weight + (grid.fraction - 0.5) * grid.step * grid.scale * grid.multiplier
        return torch.where(rounded_weight(start, layer) == weight, start, weight)

    def weights(self) -> dict[str, Tensor]:
        """The weights and biases that learn, by parameter path."""
        return {path: value for path, value in self.values.items() if value.requires_grad}

    def scales(self) -> dict[str, Tensor]:
        """The logarithms of the input scales' factors that learn, by a path of their own."""
        return {f"{name}.input_scale": self.inputs[name].log_factor for name in self.selection.scaled}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block layers show their outputs, and round their inputs while the student answers."""
        unet = self.work.denoiser

        def rounds(name: str) -> Callable[..., Any]:
            scales = self.inputs[name]
            return lambda _, inputs: (
                (scales.rounded(inputs[0], self.clock.row), *inputs[1:]) if self._rounding else None
            )

        def shows(name: str) -> Callable[..., None]:
            return lambda _, __, output: self._seen.update({name: output})

        hooks = [self.clock.watch(unet)]
        hooks += [unet.get_submodule(name).register_forward_pre_hook(rounds(name)) for name in self.inputs]
        for name in (*self.selection.time, *self.selection.rest):
            hooks.append(unet.get_submodule(name).register_forward_hook(shows(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self, call: Call) -> tuple[dict[str, Tensor], Tensor]:
        """The outputs of the trained layers that the call runs, and of the network, with gradients."""
        return self._answer(call, {path: self._rounded(path, value) for path, value in self.values.items()}, True)

    @torch.no_grad()
    def full_precision(self, call: Call) -> tuple[dict[str, Tensor], Tensor]:
        """The same of the network before any pass rounded a weight."""
        return self._answer(call, self._originals, False)

    def _answer(self, call: Call, values: Mapping[str, Tensor], rounding: bool) -> tuple[dict[str, Tensor], Tensor]:
        self._seen, self._rounding = {}, rounding
        output = functional_call(self._runner, {f"unet.{path}": value for path, value in values.items()}, (call,))
        return self._seen, output

    def _rounded(self, path: str, value: Tensor) -> Tensor:
        """A weight that learns as it stands on its grid, straight-through; other values as they are."""
        name, _, kind = path.rpartition(".")
        layer = self.work.quantization.get(name)
        if path in self._stays:
            value = value * self._stays[path]
        if kind != "weight" or layer is None or not value.requires_grad:
            return value
        scale, format = torch.from_numpy(layer.weight_scale).to(value), get(layer.weight_format)
        if layer.multiplier is None:
            return adaround.lsq(value, scale, format)
        multiplier = torch.from_numpy(layer.multiplier).to(value).reshape(1, -1, *[1] * (value.ndim - 2))
        return adaround.lsq(value / multiplier, scale, format) * multiplier

    @torch.no_grad()
    def error(self, calls: Sequence[Call]) -> float:
        """||output - target|| / ||target|| over `calls`."""
        return relative_l2((self(call)[1].double(), self.full_precision(call)[1].double()) for call in calls)

    def install(self, calls: Sequence[Call]) -> None:
        """Put what was learned on `calls` into the model, weights exactly on their grid, and into the plan."""
        unet, quantization = self.work.denoiser, self.work.quantization
        for path, value in self.weights().items():
            name, _, kind = path.rpartition(".")
            parameter = unet.get_parameter(path)
            self.work.originals.setdefault(path, parameter.data)
            layer = quantization.get(name)
            value = value * self._stays[path] if path in self._stays else value
            learned = value.detach() if kind == "bias" or layer is None else rounded_weight(value.detach(), layer)
            parameter.data = learned.to(parameter.data)
        rows = []
        for call in calls:
            self.clock.set(call.timestep)
            rows.append(self.clock.row)
        for name in self.selection.scaled:
            quantization[name] = dataclasses.replace(quantization[name], input_scale=self.inputs[name].learned(rows))
