"""Hessians of all layers in one pass over recorded calls, shared between processes and kept on disk between runs."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffpress.calibration.capture import Call
from diffpress.calibration.hessian import Hessian, unsupported
from diffpress.calibration.processes import make_missing
from diffpress.calibration.statistics import Progress, Run, replay, require_all
from diffpress.errors import DiffpressError


def same_inputs(run: Run, layers: Mapping[str, nn.Module], call: Call) -> dict[str, str]:
    """The first of the layers that is given the very same input and reads it alike, by path; found by one call.

    A layer that nothing shares with, or that the call does not reach, is its own. The queries, keys and values of
    self-attention share a Hessian this way, as do the keys and values of all cross-attention.
    """
    first: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], str]] = {}
    leaders = {name: name for name in layers}

    def take(name: str, x: Tensor, _: Call) -> None:
        layer: Any = layers[name]
        reading = (
            (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode)
            if isinstance(layer, nn.Conv2d)
            else ()
        )
        # The version tells a tensor from itself after a change in place. Weak, since a network's activations do not
        # all fit at once; a freed tensor's number may be another's, so the reference is asked too.
        key = (id(x), x._version, *reading)
        if key in first and first[key][0]() is x:
            leaders[name] = first[key][1]
        else:
            first[key] = (weakref.ref(x), name)

    replay(run, layers, [call], take)
    return leaders


def collect_in_parts(
    run: Run,
    layers: Mapping[str, nn.Module],
    parts: Sequence[Iterable[Call]],
    folder: Path,
    progress: Progress,
    weight_of: Callable[[Call], float] = lambda call: 1.0,
    leaders: Mapping[str, str] | None = None,
    span: int | None = None,
    rows: int | None = None,
    seed: int = 0,
) -> dict[str, Hessian]:
    """The Hessian of every layer's input over recorded calls, by module path; `parts` are kept in `folder` once whole.

    An interrupted run goes on with the parts it lacks; the processes of `accelerate launch` share them out, and each
    gets the merged result, which is the same for as many parts, whoever made them. A part takes the disk space of
    all its Hessians: the caller removes `folder` when they are used, and names it after all that they depend on.

    `weight_of` gives a call's alpha: `alphas(...)[row_of(timesteps)(call)]`. Layers with the same of `leaders` share
    one Hessian (`same_inputs`). Raises `DiffpressError` for a layer that has none, for inputs that are not finite and
    for layers that no call reaches.
    """
    paths = [folder / f"{index:04}" for index in range(len(parts))]

    def make(index: int) -> None:
        calls = progress(parts[index], f"Hessians, part {index + 1} of {len(parts)}")
        save(_collect(run, layers, calls, weight_of, leaders, span, rows, seed + index), paths[index])

    make_missing(range(len(parts)), lambda index: not paths[index].exists(), make, lambda items, _: items, "Hessians")
    found: dict[str, Hessian] = {}
    for path in paths:
        load(layers, path, span, into=found)
    _require_seen(found)
    return found


def _collect(
    run: Run,
    layers: Mapping[str, nn.Module],
    calls: Iterable[Call],
    weight_of: Callable[[Call], float],
    leaders: Mapping[str, str] | None,
    span: int | None,
    rows: int | None,
    seed: int,
) -> dict[str, Hessian]:
    first: dict[str, str] = {}  # of the layers with one leader, which need not be among them
    owners = {name: first.setdefault((leaders or {}).get(name, name), name) for name in layers}
    hessians: dict[str, Hessian] = {}
    for name in first.values():
        reason = unsupported(layers[name])
        if reason:
            raise DiffpressError(f"layer {name} has no Hessian, since {reason}: exclude it")
        hessians[name] = Hessian(layers[name], span, rows, seed)
    watched = {name: layers[name] for name in hessians}
    replay(run, watched, calls, lambda name, x, call: hessians[name].update(x, weight_of(call)))
    return {name: hessians[owner] for name, owner in owners.items()}


def _require_seen(hessians: Mapping[str, Hessian]) -> None:
    require_all(
        {name: hessian.layer for name, hessian in hessians.items()},
        {name for name, hessian in hessians.items() if hessian.blocks},
    )


def save(hessians: Mapping[str, Hessian], folder: Path) -> None:
    """Write Hessians into a folder, one file for each that differs; the folder is whole or not there."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    owners: dict[int, str] = {}
    entries = {name: owners.setdefault(id(hessian), name) for name, hessian in hessians.items()}
    for name in set(entries.values()):
        hessian = hessians[name]
        blocks = {str(index): block.cpu() for index, block in enumerate(hessian.blocks)}
        save_file(blocks, partial / f"{name}.safetensors", {"weight": repr(hessian.weight)})
    (partial / "layers.json").write_text(json.dumps(entries))
    try:
        partial.replace(folder)
    except OSError:
        if not folder.exists():  # else another process was faster, with the same
            raise
        shutil.rmtree(partial)


def load(
    layers: Mapping[str, nn.Module], folder: Path, span: int | None = None, into: dict[str, Hessian] | None = None
) -> dict[str, Hessian]:
    """The Hessians that `save` wrote, of these layers; merged with those already in `into`, which it changes.

    Holds one file's Hessian besides the result. Raises `DiffpressError` where the folder holds others.
    """
    entries = json.loads((folder / "layers.json").read_text())
    found = {} if into is None else into
    if set(entries) != set(layers) or (found and set(found) != set(layers)):
        raise DiffpressError(f"{folder} holds Hessians of other layers: remove it")
    for owner in dict.fromkeys(entries.values()):
        read = Hessian(layers[owner], span)
        with safe_open(folder / f"{owner}.safetensors", framework="pt") as file:
            read.weight = float(file.metadata()["weight"])
            read.blocks = [file.get_tensor(str(index)) for index in range(len(file.keys()))]
        if read.blocks and [len(block) for block in read.blocks] != read.widths:
            raise DiffpressError(f"{folder} holds Hessians of other shapes: remove it")
        members = [name for name in entries if entries[name] == owner]
        if members[0] not in found:
            found |= dict.fromkeys(members, read)
        else:
            found[members[0]].merge(read)
    return found
