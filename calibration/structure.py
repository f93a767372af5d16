"""What was cut out of a U-Net, as data: a record beside its weights, from which the narrower network is made again.

`unet/diffpress_structure.json` is {"format": 1, "parts": {module path: [how many parts are left, their size]}}, only of
what was cut; parts are heads, neurons, and the norm groups of a ResBlock's channels. The configuration stays that of
the whole network, so a reader that does not know the record refuses the weights' shapes rather than draw something
else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffpress import bundle
from diffpress.calibration.parts import keep, parts
from diffpress.errors import DiffpressError

RECORD = "diffpress_structure.json"
FORMAT = 1
CLASS = "UNet2DConditionModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # where diffusers cut a large file in several


def whole(unet: Any) -> Any:
    """The network that `unet`'s configuration says, without storage for its weights."""
    with torch.device("meta"):
        return type(unet).from_config(unet.config)


def widths(unet: Any) -> dict[str, list[int]]:
    """Module path to [how many parts are left, their size], of what was cut; nothing for a whole U-Net."""
    before = {path: [found.count, found.size] for path, found in parts(whole(unet)).items()}
    now = {path: [found.count, found.size] for path, found in parts(unet).items()}
    return {path: left for path, left in now.items() if path in before and left != before[path]}


def rebuild(unet: nn.Module, record: Mapping[str, Sequence[int]]) -> None:
    """Give a whole U-Net the shapes that `record` says, in place; its weights are for a state dict to bring.

    Raises `DiffpressError`, with nothing changed, for a record that is of another network.
    """
    known = parts(unet)
    for path, (count, size) in record.items():
        if path not in known:
            raise DiffpressError(f"the record of what was cut names '{path}', where this U-Net has nothing to cut")
        most, wide, least = known[path].count, known[path].size, 1 if known[path].norm else known[path].size
        if not (1 <= count <= most and least <= size <= wide):
            raise DiffpressError(
                f"the record of what was cut leaves {count} parts of {size} to '{path}', which has {most} of {wide}"
            )
    keep(unet, {path: range(count) for path, (count, _) in record.items()})
    even = {path: found for path, found in parts(unet, "even").items() if path in record and found.even}
    length = {path: found.count // found.blocks for path, found in even.items()}
    chosen = {
        path: [number for number in range(found.count) if number % length[path] < record[path][1]]
        for path, found in even.items()
    }
    keep(unet, chosen, "even")


def save(pipeline: Any, folder: str | Path) -> Path:
    """Write a pipeline whose U-Net may be cut as a diffusers folder, whole or not at all; returns the folder.

    Raises `DiffpressError` where something is there already, and for a U-Net or a scheduler that diffusers could not
    read again, as some passes leave them (a temporal table, a schedule of its own).
    """
    record, unet, target = widths(pipeline.unet), whole(pipeline.unet), Path(folder)
    rebuild(unet, record)
    if _misfit(unet, pipeline.unet.state_dict()):
        raise DiffpressError("this U-Net has modules that no diffusers folder can hold: save before temporal-table")
    scheduler = type(pipeline.scheduler)
    if not scheduler.__module__.startswith("diffusers."):
        raise DiffpressError(
            f"{scheduler.__name__} plays a table here, which no diffusers folder can hold: save before"
        )
    with bundle.create(target) as partial:
        pipeline.save_pretrained(str(partial), safe_serialization=True)
        if record:
            document = {"format": FORMAT, "parts": record}
            (partial / "unet" / RECORD).write_text(json.dumps(document, indent=1), "utf-8")
    return target


def load(folder: Path) -> Any:
    """The U-Net of a folder with a record, in the type of its weights, on the CPU.

    Raises `DiffpressError` for a record that is damaged, or fits neither configuration nor weights.
    """
    import diffusers

    record = read(folder / RECORD)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if config.get("_class_name") != CLASS:
        raise DiffpressError(f"{folder} is of {config.get('_class_name')}, and {RECORD} is of a {CLASS}")
    with torch.device("meta"):
        unet: Any = diffusers.UNet2DConditionModel.from_config(config)
    rebuild(unet, record)
    tensors = _weights(folder)
    if misfit := _misfit(unet, tensors):
        raise DiffpressError(f"{folder / RECORD} does not fit the weights beside it ({misfit}): save the model again")
    unet.load_state_dict(tensors, assign=True)
    return unet.eval()


def read(file: Path) -> dict[str, list[int]]:
    """The record of a file, as `widths` gives it; raises `DiffpressError` for a damaged one."""
    try:
        document = json.loads(file.read_text("utf-8"))
        version, found = document["format"], document["parts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DiffpressError(f"{file} cannot be read ({reason}): save the model again") from error
    if version != FORMAT:
        raise DiffpressError(
            f"{file} has format {version!r}, this diffpress reads format {FORMAT}: save the model again"
        )
    if not isinstance(found, dict) or not all(map(_is_pair, found.values())):
        raise DiffpressError(f"{file} does not say how many parts are left of each module: save the model again")
    return found


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)


def _weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    files = [WEIGHTS]
    if (folder / INDEX).is_file():
        files = sorted(set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in files:
        if not bundle.is_relative(name) or not (folder / name).is_file():
            raise DiffpressError(f"{folder} has no weights {name}: a folder with {RECORD} holds safetensors")
        tensors |= load_file(folder / name)
    return tensors


def _misfit(unet: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """What does not fit, in words; empty where everything does."""
    wanted = {name: list(tensor.shape) for name, tensor in unet.state_dict().items()}
    for name in [*wanted, *tensors]:
        shape = list(tensors[name].shape) if name in tensors else None
        if shape != wanted.get(name):
            return f"{name} is {shape or 'missing'}, not {wanted.get(name) or 'there'}"
    return ""
