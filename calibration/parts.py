"""The parts of a U-Net that can leave it whole, and how they leave: attention heads, neurons, ResBlock channels.

A part is made by rows of some layers (writers) and read by columns of one (the reader), and nothing else sees it. So
without it writers and reader are narrower, and what stands around them keeps its width (Fang et al. 2023, DepGraph,
Section 3: such layers are one group).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffpress.errors import DiffpressError

HEADS, NEURONS, CHANNELS = "heads", "neurons", "channels"
NormGroups = Literal["whole", "even"]


@dataclass(frozen=True)
class Parts:
    """The `count` parts of the module at `path`, each of `size` rows of every writer and inputs of the reader.

    `kind` is "heads" of an attention, "neurons" of a feed-forward network (size 1) or "channels" between the two
    convolutions of a ResBlock, where a norm stands that needs groups of one size. There are two ways to keep that:

    whole  a part is a whole norm group. Channels that stay keep their mean and variance, so they stay exactly as they
           were. Widths are multiples of a group's channels, often an odd number: 3, 6, 10.
    even   a part is a channel, and as many leave every norm group. Widths are multiples of the number of groups, 16 or
           32, as hardware wants them, but channels that stay are normalised without the others, by other numbers.

    Parts stand in `blocks` runs of one length, and as many of each must stay; where there is one, any may.
    """

    kind: str
    path: str
    count: int
    size: int
    reader: str
    writers: tuple[tuple[str, int], ...]  # path, and how often it has the parts: twice where a half gates the other
    norm: str | None = None
    blocked: str = ""  # why nothing can be cut here as the U-Net is now
    blocks: int = 1
    even: bool = False


def parts(unet: nn.Module, norm_groups: NormGroups = "whole") -> dict[str, Parts]:
    """Module path to its parts, of every module that has some."""
    found = {path: found for path, found in _scan(unet).items() if isinstance(found, Parts)}
    return found if norm_groups == "whole" else {path: _evenly(one) for path, one in found.items()}


def _evenly(found: Parts) -> Parts:
    if found.norm is None:
        return found
    return replace(found, count=found.count * found.size, size=1, blocks=found.count, even=True)


def unsupported(unet: nn.Module) -> dict[str, str]:
    """Module path to the reason, of attentions, feed-forward networks and ResBlocks that cannot be cut."""
    return {path: found for path, found in _scan(unet).items() if isinstance(found, str)}


def checked(unet: nn.Module, kept: Mapping[str, Sequence[int]], norm_groups: NormGroups = "whole") -> dict[str, Parts]:
    """The parts of the modules that `kept` names; raises `DiffpressError` as `keep` does."""
    known = parts(unet, norm_groups)
    for path, numbers in kept.items():
        if path not in known:
            reason = unsupported(unet).get(path)
            raise DiffpressError(f"nothing can be cut at '{path}'" + (f": {reason}" if reason else ""))
        if known[path].blocked:
            raise DiffpressError(f"nothing can be cut at '{path}': {known[path].blocked}")
        _check(known[path], numbers)
    return {path: known[path] for path in kept}


@torch.no_grad()
def keep(unet: nn.Module, kept: Mapping[str, Sequence[int]], norm_groups: NormGroups = "whole") -> None:
    """Leave of the modules named the parts `kept`, in place; all others stay whole.

    Raises `DiffpressError`, with nothing changed, for a module without parts, and for numbers that are none of its
    parts, stand there twice, leave nothing, or leave unequal norm groups.
    """
    for path, given in checked(unet, kept, norm_groups).items():
        if len(kept[path]) < given.count:
            _cut(unet, given, sorted(kept[path]))


def _check(given: Parts, numbers: Sequence[int]) -> None:
    if not numbers:
        raise DiffpressError(f"{given.path}: none of its {given.count} {given.kind} would be left, keep one at least")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < given.count:
            raise DiffpressError(f"{given.path} has {given.kind} 0 to {given.count - 1}, and no {number}")
    if len(set(numbers)) < len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise DiffpressError(f"{given.path}: {given.kind} {twice} is to be kept twice")
    length = given.count // given.blocks
    left = Counter(number // length for number in numbers)
    if given.blocks > 1 and (len(left) < given.blocks or len(set(left.values())) > 1):
        most, fewest = max(left.values()), min(left[block] for block in range(given.blocks))
        raise DiffpressError(
            f"{given.path}: {fewest} {given.kind} would be left of one norm group and {most} of another, keep as many "
            f"of each of its {given.blocks}"
        )


def _cut(unet: nn.Module, given: Parts, numbers: list[int]) -> None:
    reader: Any = unet.get_submodule(given.reader)
    device, width = reader.weight.device, given.count * given.size
    index = torch.arange(width, device=device).unflatten(0, (given.count, given.size))
    index = index[torch.tensor(numbers, device=device)].flatten()
    for path, times in given.writers:
        _keep_rows(unet.get_submodule(path), torch.cat([index + width * half for half in range(times)]))
    if given.norm is not None:
        norm: Any = unet.get_submodule(given.norm)
        norm.num_groups = given.blocks if given.even else len(numbers)
        _keep_rows(norm, index)
    reader.weight = _taken(reader.weight, 1, index)
    _name_width(reader, "in", len(index))
    if given.kind == HEADS:
        # What diffusers' processors divide the width by; the scale is that of a head's width, which stays.
        attention: Any = unet.get_submodule(given.path)
        attention.heads = attention.sliceable_head_dim = len(numbers)
        attention.inner_dim = attention.inner_kv_dim = len(index)


def _keep_rows(module: Any, index: Tensor) -> None:
    for name in ("weight", "bias"):
        if getattr(module, name) is not None:
            setattr(module, name, _taken(getattr(module, name), 0, index))
    _name_width(module, "out", len(index))


def _name_width(module: Any, side: str, width: int) -> None:
    """Modules also keep their widths as attributes, each class under its own name."""
    for name in (f"{side}_features", f"{side}_channels", *(("num_channels",) if side == "out" else ())):
        if hasattr(module, name):
            setattr(module, name, width)


def _taken(parameter: Tensor, axis: int, index: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(axis, index), requires_grad=parameter.requires_grad)


def _scan(unet: nn.Module) -> dict[str, Parts | str]:
    """The parts of every module of a class that has them, or the reason why it has none."""
    found = {}
    for path, module in unet.named_modules():
        read = _CLASSES.get(type(module).__name__)
        if read is not None:
            found[path] = read(path, module)
    return found


def _attention(path: str, module: Any) -> Parts | str:
    if module.added_kv_proj_dim is not None or module.to_k is None or module.to_out is None:
        return "an attention with projections added for a second stream is not supported yet"
    if module.norm_q is not None or module.norm_k is not None:
        return "an attention that normalises queries and keys is not supported yet"
    if module.fused_projections or not _plain(module.to_q, module.to_k, module.to_v, module.to_out[0]):
        return "its projections are not four linear layers of their own (fused or wrapped)"
    width = module.to_q.out_features
    if not width == module.to_k.out_features == module.to_v.out_features == module.to_out[0].in_features:
        return "an attention whose keys and values have fewer heads is not supported yet"
    writers = tuple((f"{path}.{name}", 1) for name in ("to_q", "to_k", "to_v"))
    return Parts(HEADS, path, module.heads, width // module.heads, f"{path}.to_out.0", writers)


def _feed_forward(path: str, module: Any) -> Parts | str:
    first, second = getattr(module.net[0], "proj", None), module.net[2] if len(module.net) > 2 else None
    if not _plain(first, second):
        return "a feed-forward network that is not two linear layers is not supported yet"
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    times, rest = divmod(first.out_features, second.in_features)
    if rest or times not in (1, 2):
        return f"its first layer gives {first.out_features} values and its second takes {second.in_features}"
    writers = ((f"{path}.net.0.proj", times),)
    return Parts(NEURONS, path, second.in_features, 1, f"{path}.net.2", writers)


def _resnet(path: str, module: Any) -> Parts | str:
    first, second, norm, time = module.conv1, module.conv2, module.norm2, module.time_emb_proj
    if not (isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d) and first.groups == second.groups == 1):
        return "its convolutions are grouped or wrapped"
    if not isinstance(norm, nn.GroupNorm):
        return f"a ResBlock with {type(norm).__name__} between its convolutions is not supported yet"
    writers, blocked = [(f"{path}.conv1", 1)], ""
    if isinstance(time, nn.Linear):
        writers.append((f"{path}.time_emb_proj", time.out_features // first.out_channels))
    elif time is not None:
        blocked = "its projection of the time is a table: prune before temporal-table"
    size = norm.num_channels // norm.num_groups
    return Parts(CHANNELS, path, norm.num_groups, size, f"{path}.conv2", tuple(writers), f"{path}.norm2", blocked)


def _plain(*layers: Any) -> bool:
    return all(isinstance(layer, nn.Linear) for layer in layers)


_CLASSES: Mapping[str, Callable[[str, Any], Parts | str]] = {
    "Attention": _attention,
    "FeedForward": _feed_forward,
    "ResnetBlock2D": _resnet,
}
