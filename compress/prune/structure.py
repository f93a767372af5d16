"""The structures of a denoiser that can be cut: what a solver is told of them, and the cut.

A solver sees a matrix and groups of its columns: `reader`'s weight, flattened to [out, columns], and which of the
columns leave together. What a group is (a head, a neuron, a norm group of a ResBlock's channels) and what else leaves
with it is known here and in `calibration.parts`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.calibration import parts as cutting
from diffpress.calibration.parts import CHANNELS, HEADS, NEURONS, NormGroups, Parts
from diffpress.calibration.structure import rebuild, whole, widths
from diffpress.compress.families.unet import conditions, in_forward_order
from diffpress.compress.families.unet_graph import UNetGraph
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError

MULTIPLE = 16  # of widths: INT8 and FP16 tensor cores take blocks of it, vector units of CPUs half
CHOICES = 4  # widths that a module must have to choose from before a smaller multiple has to do

__all__ = [
    "CHANNELS",
    "HEADS",
    "NEURONS",
    "NormGroups",
    "Structure",
    "check_order",
    "cut",
    "flops",
    "rebuild",
    "structures",
    "unsupported",
    "widths",
]


@dataclass(frozen=True, eq=False)
class Structure:
    """The `count` parts of one module, each of `size` heads' columns, neurons or channels.

    `columns` int64 [parts, columns per part] indexes `weight.flatten(1)` of the module `reader`. Parts should leave
    until a number in `counts` is left. They stand in `blocks` runs of one length, and as many of each must stay; where
    there is one, any may. `parameters` leave the denoiser with a part.
    """

    kind: str
    path: str
    count: int
    size: int
    reader: str
    columns: Tensor
    step: int
    parameters: int
    blocks: int = 1

    @property
    def counts(self) -> tuple[int, ...]:
        """How many parts may be left: `step` and its multiples, then all."""
        return (*range(self.step, self.count, self.step), self.count)


def structures(unet: Any, multiple: int = MULTIPLE, norm_groups: NormGroups = "whole") -> dict[str, Structure]:
    """Module path to structure in forward order, of everything with more than one part.

    A structure's widths are multiples of `multiple`. Where that leaves fewer than four widths to choose from, half of
    it counts, and so on: in whole norm groups 48 channels of 16 groups of 3 can be 12, 24, 36 or 48, and 320 of 32
    groups of 10 can be 80, 160, 240 or 320. Evenly out of all groups (see `calibration.parts`) the first can be 16, 32
    or 48, the second 32, 64 to 320. Heads are whole, so a module of two has two widths whatever the multiple.

    Raises `DiffpressError` where an earlier pass left nothing to cut, as a temporal table does.
    """
    if multiple < 1:
        raise DiffpressError(f"widths should be multiples of {multiple}: give a number from 1, such as {MULTIPLE}")
    known = cutting.parts(unet, norm_groups)
    blocked = next((found for found in known.values() if found.blocked), None)
    if blocked is not None:
        raise DiffpressError(f"nothing can be cut at '{blocked.path}': {blocked.blocked}")
    return {
        path: _structure(unet, known[path], multiple) for path in in_forward_order(unet, known) if known[path].count > 1
    }


def unsupported(unet: nn.Module) -> dict[str, str]:
    """Module path to the reason, of attentions, feed-forward networks and ResBlocks that cannot be cut."""
    return cutting.unsupported(unet)


def cut(unet: Any, kept: Mapping[str, Sequence[int]], norm_groups: NormGroups = "whole") -> None:
    """Leave the parts `kept` of the structures named, in place, their weights as they are; others stay whole.

    Raises `DiffpressError`, with nothing changed, for a path that is no structure, and for numbers that are none of its
    parts, stand there twice, leave nothing, or leave unequal norm groups.
    """
    cutting.keep(unet, kept, norm_groups)


def check_order(work: Work, name: str, *, widths_change: bool = True) -> None:
    """Raises `DiffpressError` where an earlier pass decided for weights, or widths, that pass `name` would change.

    And where one made zeros, which compensation would fill.
    """
    if work.sparse:
        raise DiffpressError(
            f"{name}: {len(work.sparse)} layers have zeros already, which it would fill: put {name} before that, or "
            "leave one of them out"
        )
    if widths_change and work.temporal is not None:
        raise DiffpressError(f"{name}: a temporal table has the old widths: put {name} before temporal-table")
    if work.quantization:
        raise DiffpressError(f"{name}: {len(work.quantization)} layers are quantized already: put {name} before that")
    if len(work.program.variants) > 1 or work.corrections is not None:
        raise DiffpressError(f"{name}: the cache was planned on the network as it is: put {name} before it")


@torch.no_grad()
def flops(
    unet: Any, height: int, width: int, tokens: int, norm_groups: NormGroups = "whole"
) -> tuple[dict[str, int], int]:
    """Structure's path to the operations that leave with one part, and those of all layers together.

    Of a call with one row of height x width latents.

    A multiplication and its addition are two, as in `export.flops`; an attention's two products count, too. Nothing is
    computed for it but shapes.
    """
    shadow = whole(unet)
    rebuild(shadow, widths(unet))
    known = cutting.parts(shadow, norm_groups)
    layers = {path: layer for path, layer in shadow.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    positions: dict[str, int] = {}

    def watch(path: str) -> Any:
        layer: Any = shadow.get_submodule(path)
        wide = layer.weight.shape[0]
        return layer.register_forward_hook(lambda _, __, out: positions.update({path: out.numel() // wide}))

    hooks = [watch(path) for path in layers]
    told = [torch.zeros(1, *shape, device="meta") for shape in conditions(shadow, tokens).values()]
    sample = torch.zeros(1, shadow.config.in_channels, height, width, device="meta")
    UNetGraph(shadow)(sample, torch.ones(1, device="meta"), *told)
    for hook in hooks:
        hook.remove()
    total = sum(2 * positions[path] * layers[path].weight.numel() for path in positions)
    for found in known.values():
        if found.kind == HEADS:
            total += _products(found, positions) * found.count
    return {path: _flops(shadow, found, positions) for path, found in known.items()}, total


def _flops(unet: nn.Module, found: Parts, positions: Mapping[str, int]) -> int:
    operations = 2 * positions[found.reader] * _columns(unet, found) * _weight(unet, found.reader).shape[0]
    for path, times in found.writers:
        operations += 2 * positions[path] * times * found.size * _weight(unet, path)[0].numel()
    return operations + (_products(found, positions) if found.kind == HEADS else 0)


def _products(found: Parts, positions: Mapping[str, int]) -> int:
    """Of a head's two products of queries, keys and values."""
    return 4 * positions[f"{found.path}.to_q"] * positions[f"{found.path}.to_k"] * found.size


def _structure(unet: nn.Module, found: Parts, multiple: int) -> Structure:
    each, step = _columns(unet, found), _step(found, multiple)
    columns = torch.arange(found.count * each).unflatten(0, (found.count, each))
    parameters = each * _weight(unet, found.reader).shape[0]
    for path, times in found.writers:
        parameters += times * found.size * _row(unet.get_submodule(path))
    if found.norm is not None:
        parameters += found.size * _row(unet.get_submodule(found.norm))
    return Structure(
        found.kind, found.path, found.count, found.size, found.reader, columns, step, parameters, found.blocks
    )


def _step(found: Parts, multiple: int) -> int:
    """The fewest parts whose width is a multiple of `multiple`, or of the largest of its halves that leaves choices."""
    while multiple > 1:
        step = math.lcm(found.size * found.blocks, multiple) // found.size
        if step == found.blocks or found.count // step >= CHOICES:
            return step
        multiple //= 2
    return found.blocks


def _columns(unet: nn.Module, found: Parts) -> int:
    """Columns of the reader's flattened weight for a part: its inputs, times the positions of a kernel."""
    return found.size * _weight(unet, found.reader)[0, 0].numel()


def _row(module: Any) -> int:
    """Parameters of one output."""
    return sum(
        module.get_parameter(name)[0].numel() for name in ("weight", "bias") if getattr(module, name) is not None
    )


def _weight(unet: nn.Module, path: str) -> Tensor:
    return unet.get_submodule(path).get_parameter("weight")
