"""Channels that leave evenly out of every norm group change what the others are divided by; here it is put right.

Without them a group has another mean and deviation, by sample. What stays of a channel is an affine function of what it
was before with factors that vary little, so one scale and one offset for each channel, fitted by least squares on
calibration calls, take most of the difference away. They go into the norm's own weight and bias and cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpress.calibration.parts import checked
from diffpress.compress.prune.structure import cut


class _Moments:
    """Sums over samples and positions of what a channel was, what it is without the others, and their products."""

    def __init__(self, norm: nn.GroupNorm, kept: Tensor) -> None:
        self.norm, self.kept = norm, kept
        self.sums = torch.zeros(5, len(kept), dtype=torch.float64, device=norm.weight.device)

    def take(self, inputs: Tensor, output: Tensor) -> None:
        """An input [N, C, h, w] of the whole norm, and its output."""
        norm, index = self.norm, self.kept
        now = F.group_norm(inputs[:, index], norm.num_groups, norm.weight[index], norm.bias[index], norm.eps)
        was, now = (tensor.transpose(0, 1).flatten(1).double() for tensor in (output[:, index], now))
        ones = torch.full_like(now[:, 0], now.shape[1])
        self.sums += torch.stack([ones, now.sum(1), was.sum(1), (now * now).sum(1), (now * was).sum(1)])

    def fitted(self) -> tuple[Tensor, Tensor]:
        """Scale and offset [kept] that take what is nearest to what was; 1 where a channel never varies."""
        count, now, was, square, product = self.sums
        now, was = now / count, was / count
        spread = square / count - now * now
        still = spread <= 1e-12 * (square / count)
        scale = torch.where(still, 1.0, (product / count - now * was) / torch.where(still, 1.0, spread))
        return scale, was - scale * now


@torch.no_grad()
def cut_evenly(unet: Any, kept: Mapping[str, Sequence[int]], forward: Callable[[], object]) -> None:
    """`cut` with norm groups "even", and then every norm's weight and bias refitted on the calls that `forward` makes.

    `forward` runs `unet` as it is before the cut; sums of a few numbers per channel are kept, whatever it runs. Raises
    `DiffpressError` as `cut` does.
    """
    moments: dict[str, _Moments] = {}
    for path, found in checked(unet, kept, "even").items():
        if found.norm is not None and len(kept[path]) < found.count:
            norm: Any = unet.get_submodule(found.norm)
            moments[found.norm] = _Moments(norm, torch.tensor(sorted(kept[path]), device=norm.weight.device))
    hooks = [
        each.norm.register_forward_hook(lambda _, inputs, output, each=each: each.take(inputs[0], output))
        for each in moments.values()
    ]
    try:
        if moments:
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    fitted = {path: found.fitted() for path, found in moments.items()}
    cut(unet, kept, "even")
    for path, (scale, offset) in fitted.items():
        norm = unet.get_submodule(path)
        norm.weight.copy_(norm.weight * scale)
        norm.bias.copy_(norm.bias * scale + offset)
