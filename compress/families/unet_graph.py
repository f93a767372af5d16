"""A part of a U-Net as a graph: what it computes, the features that it takes in place of computing, those it hands out.

Features have names:

    up_B     the hidden state that enters up layer `last - B`: all that is deeper (Ma et al. 2023, DeepCache, Figure 3)
    skip_K   skip K; with `up_LAST` all of them are the encoder (Li et al. 2023, Faster Diffusion, Section 3.2)
    whole    what all layers together add to `conv_in`'s output (the residual of Ma et al. 2025, MagCache)
    a path   what a ResBlock or a transformer adds to its input, what an attention or a feed-forward network returns
             (Chen et al. 2024, Delta-DiT, Section 4.1; InvarDiff)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffpress.calibration.conditions import TEXT, Text, named
from diffpress.compress.families.unet import (
    branches,
    conditions,
    down_layers,
    in_forward_order,
    time_embedding,
    up_layers,
)
from diffpress.compress.numerics.lookup import RowOf
from diffpress.errors import DiffpressError
from diffpress.plan import EARLIER, Corrections

WHOLE = "whole"
_NESTED = re.compile(r"(up|skip)_(\d+)")
_RESNET, _TRANSFORMER = "ResnetBlock2D", "Transformer2DModel"


def up(branch: int) -> str:
    """The feature that holds all that is deeper than `branch`."""
    return f"up_{branch}"


def encoder(unet: Any) -> tuple[str, ...]:
    """The features that stand for the encoder: every skip, and the mid block's output."""
    return (*(f"skip_{index}" for index in range(branches(unet))), up(branches(unet) - 1))


def residual_inputs(unet: Any) -> dict[str, str]:
    """The inputs of a graph for a ControlNet's residuals, in order, and the feature that each has the shape of."""
    *skips, mid = encoder(unet)
    return {f"down_residual_{index}": skip for index, skip in enumerate(skips)} | {"mid_residual": mid}


def modules(unet: Any) -> dict[str, str]:
    """Module path to kind of every part whose work can be kept by itself, in forward order.

    Kinds are "resnet" and "transformer", and within transformers "attn1", "attn2" and "ff".
    """
    found = {}
    for path, module in unet.named_modules():
        name = type(module).__name__
        last = path.rsplit(".", 1)[-1]
        if name == _RESNET and ".resnets." in path:
            found[path] = "resnet"
        elif name == _TRANSFORMER:
            found[path] = "transformer"
        elif last in ("attn1", "attn2", "ff") and ".transformer_blocks." in path:
            found[path] = last
    return {path: found[path] for path in in_forward_order(unet, found)}


def check_features(unet: Any, names: Iterable[str]) -> None:
    """Raise `DiffpressError` for a feature that `unet` does not have."""
    known, count = modules(unet), branches(unet)
    for name in names:
        nested = _NESTED.fullmatch(name)
        if not (name == WHOLE or name in known or (nested and int(nested[2]) < count)):
            raise DiffpressError(
                f"this denoiser has no feature '{name}': there are up_0 to up_{count - 1}, skip_0 to skip_{count - 1}, "
                f"{WHOLE}, and modules such as {next(iter(known))}"
            )


def feature_shapes(
    unet: Any, names: Iterable[str], height: int, width: int, batch: int = 1
) -> dict[str, tuple[int, ...]]:
    """The shape, without the batch, of each feature for latents of height x width; [C, H, W] or [tokens, C].

    Raises `DiffpressError` for a feature whose first axis is not the batch: steps would not get their own rows of it.
    """
    names = tuple(names)
    graph = UNetGraph(unet, writes=names)
    # Shapes alone, without storage: a call of a large network takes minutes on a processor.
    nothing = {name: tensor.to("meta") for name, tensor in (*graph.named_parameters(), *graph.named_buffers())}
    sample = torch.zeros(batch, unet.config.in_channels, height, width, device="meta")
    told = [torch.zeros(batch, *shape, device="meta") for shape in conditions(unet).values()]
    with torch.no_grad():
        _, *features = functional_call(graph, nothing, (sample, torch.ones(1, device="meta"), *told))
    shapes = {name: tuple(feature.shape) for name, feature in zip(names, features, strict=True)}
    for name, shape in shapes.items():
        if shape[:1] != (batch,):
            raise DiffpressError(f"feature '{name}' is {list(shape)} for a batch of {batch}: it has no row per sample")
    return {name: shape[1:] for name, shape in shapes.items()}


class UNetGraph(nn.Module):
    """A U-Net that takes the features `reads` instead of computing them, and hands out the features `writes`.

    Inputs: sample [N, C, H, W], timestep [1] or [N], encoder_hidden_states [N, T, D] and the conditions that the U-Net
    adds, each or all as one (`calibration.conditions`), then the features in the order of `reads`, then, where a
    ControlNet has a say, its residuals: one for each skip and one for the mid block's output (Zhang et al. 2023,
    Section 3.2). Output: (out_sample [N, C, H, W], then the features in the order of `writes`). A feature named in
    `corrections` is corrected by the row of the timestep before it is used. Raises `DiffpressError` for features that
    the U-Net does not have, or that cannot be read together.
    """

    def __init__(
        self,
        unet: Any,
        reads: Sequence[str] = (),
        writes: Sequence[str] = (),
        corrections: Corrections | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.reads, self.writes = tuple(reads), tuple(writes)
        self._down, self._up = down_layers(unet), up_layers(unet)
        names = tuple(dict.fromkeys(name.removesuffix(EARLIER) for name in self.reads))
        check_features(unet, (*names, *self.writes))
        ups = [int(nested[2]) for name in names if (nested := _NESTED.fullmatch(name)) and nested[1] == "up"]
        if len(ups) > 1:
            raise DiffpressError(f"a graph reads one deep feature, not {', '.join(map(up, ups))}")
        last = len(self._up) - 1
        self.deep = up(ups[0]) if ups else None
        self.first = last - ups[0] if ups else 0  # the first up layer that runs
        needed = {f"skip_{index}" for index in range(last - self.first + 1)} - set(names)
        self.encodes = bool(needed) or not ups or WHOLE in names
        # The last skip that is computed decides how far down the graph goes; without a deep feature, all the way.
        self.downs = max((int(name[5:]) for name in needed), default=0) if ups else len(self._down)
        self._paths = {id(module): path for path, module in unet.named_modules()}
        missing = [name for name in self.writes if not self.computes(name)]
        if missing:
            raise DiffpressError(f"a graph that reads {', '.join(names)} does not compute '{missing[0]}'")
        self._corrections = nn.ModuleDict()
        if corrections is not None:
            for name in names:
                if name in corrections.features:
                    entry = corrections.features[name]
                    scale, offset = torch.from_numpy(entry.scale.copy()), torch.from_numpy(entry.offset.copy())
                    self._corrections[_key(name)] = Corrected(corrections.timesteps, scale.float(), offset.float())
            self._corrections.to(unet.device)

    def computes(self, name: str) -> bool:
        """Whether the graph works feature `name` out: not read, nor within or behind what is."""
        if name in self.reads or WHOLE in self.reads:
            return False
        if name == WHOLE:
            return self.encodes
        if nested := _NESTED.fullmatch(name):
            index, last = int(nested[2]), len(self._up) - 1
            if nested[1] == "skip":
                return self.encodes and index <= self.downs
            return last - index > self.first or (last - index == self.first and self.deep is None)
        return self._runs(name)

    def _runs(self, path: str) -> bool:
        if any(path == name or path.startswith(f"{name}.") for name in self.reads):
            return False
        kept = [*self._down[: self.downs if self.encodes else 0], *self._up[self.first :]]
        parts = [part for layer in kept for part in (layer.resnet, layer.attention)]
        parts += [] if self.deep else [self.unet.mid_block]
        inside = [self._paths[id(part)] for part in parts if part is not None]
        return any(path == name or path.startswith(f"{name}.") for name in inside)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Text, *others: Tensor
    ) -> tuple[Tensor, ...]:
        unet = self.unet
        told, features = self._told(encoder_hidden_states, others)
        text = told[TEXT]
        features, residuals = features[: len(self.reads)], features[len(self.reads) :]
        given = self._corrected(dict(zip(self.reads, features, strict=True)), timestep)
        with _modules_as(unet, given, self.writes) as kept:
            # One row serves the whole batch where every sample of a call stands at the same timestep.
            time = time_embedding(unet, timestep, told)
            skips = {int(name[5:]): value for name, value in given.items() if name.startswith("skip_")}
            hidden = torch.empty(0)
            if self.encodes:
                if unet.config.center_input_sample:
                    sample = 2 * sample - 1
                first = hidden = unet.conv_in(sample)
                if WHOLE in given:
                    return self._head(first + given[WHOLE]), *(kept[name] for name in self.writes)
                skips.setdefault(0, hidden)
                for index, layer in enumerate(self._down[: self.downs]):
                    hidden = layer(hidden, time, text)
                    skips.setdefault(index + 1, hidden)
            hidden = given[self.deep] if self.deep else self._mid(hidden, time, text)
            if residuals:
                hidden = hidden + residuals[-1]
                skips = {index: skips[index] + added for index, added in enumerate(residuals[:-1])}
            last = len(self._up) - 1
            kept |= {name: skips[int(name[5:])] for name in self.writes if name.startswith("skip_")}
            for index in range(self.first, last + 1):
                if up(last - index) in self.writes:
                    kept[up(last - index)] = hidden
                hidden = torch.cat([hidden, skips[last - index]], dim=1)
                hidden = self._up[index](hidden, time, text)
            if WHOLE in self.writes:
                kept[WHOLE] = hidden - first
        return self._head(hidden), *(kept[name] for name in self.writes)

    def _told(self, text: Text, others: tuple[Tensor, ...]) -> tuple[Mapping[str, Tensor], tuple[Tensor, ...]]:
        """The conditions by name, and what is left of `others`."""
        if not isinstance(text, Tensor):
            return named(text), others
        names = tuple(conditions(self.unet))
        return dict(zip(names, (text, *others), strict=False)), others[len(names) - 1 :]

    def _corrected(self, given: dict[str, Tensor], timestep: Tensor) -> dict[str, Tensor]:
        """The features by their names, each one tensor."""
        return {
            name: self._corrections[_key(name)](timestep, value, given.get(name + EARLIER))
            if _key(name) in self._corrections
            else value
            for name, value in given.items()
            if not name.endswith(EARLIER)
        }

    def _mid(self, hidden: Tensor, time: Tensor, text: Tensor) -> Tensor:
        block = self.unet.mid_block
        if block is None:
            return hidden
        crossed = getattr(block, "has_cross_attention", False)
        return block(hidden, time, encoder_hidden_states=text) if crossed else block(hidden, time)

    def _head(self, hidden: Tensor) -> Tensor:
        unet = self.unet
        if unet.conv_norm_out is not None:
            hidden = unet.conv_act(unet.conv_norm_out(hidden))
        return unet.conv_out(hidden)


class Corrected(nn.Module):
    """A feature's correction: its value, and the one before, to what stands in for it at the step of the timestep."""

    def __init__(self, timesteps: tuple[float, ...], scale: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.row_of = RowOf(timesteps)
        self.scale: Tensor
        self.offset: Tensor
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    def forward(self, timestep: Tensor, value: Tensor, earlier: Tensor | None) -> Tensor:
        row = self.row_of(timestep)
        shape = (-1, 1, self.scale.shape[2]) if value.ndim == 3 else (-1, self.scale.shape[2], 1, 1)
        scale = self.scale.index_select(0, row)
        found = value * scale[:, 0].reshape(shape) + self.offset.index_select(0, row).reshape(shape)
        if self.scale.shape[1] > 1:
            assert earlier is not None, "a correction of depth 2 needs the earlier value"
            found = found + earlier * scale[:, 1].reshape(shape)
        return found


def _key(name: str) -> str:
    """A module's name may hold no dots."""
    return name.replace(".", "/")


@contextmanager
def _modules_as(unet: Any, given: Mapping[str, Tensor], writes: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block modules of `given` return it in place of their work; yields what those of `writes` did."""
    kept: dict[str, Tensor] = {}
    hooks, replaced = [], []
    for path in _paths_of(given):
        module = unet.get_submodule(path)
        module.forward = _stand_in(module, given[path])
        replaced.append(module)
    for path in _paths_of(writes):
        hooks.append(_keep(unet.get_submodule(path), path, kept))
    try:
        yield kept
    finally:
        for module in replaced:
            del module.forward
        for hook in hooks:
            hook.remove()


def _paths_of(names: Iterable[str]) -> list[str]:
    return [name for name in names if name != WHOLE and not _NESTED.fullmatch(name)]


def _stand_in(module: Any, feature: Tensor) -> Callable[..., Any]:
    """A forward pass of `module` with its kept work."""
    kind = type(module).__name__
    if kind == _RESNET:

        def resnet(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            shortcut = hidden if module.conv_shortcut is None else module.conv_shortcut(hidden)
            return (shortcut + feature) / module.output_scale_factor

        return resnet
    if kind == _TRANSFORMER:
        return lambda hidden, *_, **__: (hidden + feature,)
    return lambda *_, **__: feature


def _keep(module: Any, path: str, kept: dict[str, Tensor]) -> Any:
    """A hook that puts what `module` works out under `path`."""
    kind = type(module).__name__
    if kind == _RESNET:
        return module.conv2.register_forward_hook(lambda _, __, output: kept.update({path: output}))
    if kind == _TRANSFORMER:
        return module.register_forward_hook(lambda _, inputs, output: kept.update({path: output[0] - inputs[0]}))
    return module.register_forward_hook(lambda _, __, output: kept.update({path: output}))
