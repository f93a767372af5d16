"""Streaming statistics of layer inputs: their memory does not grow with how many calls they have seen.

Channels are the second axis of an image [N, C, H, W] and the last of tokens [N, T, C]. `run` executes the denoiser on a
recorded call, such as `Work.run`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from diffpress.calibration.capture import Call
from diffpress.calibration.reservoir import Reservoir
from diffpress.errors import DiffpressError

BINS = 4096
SAMPLE_BYTES = 4 << 20  # of inputs kept of each layer by `sample_inputs`; its float32 items, at least one
CROP = 6  # rows and columns of a convolution's output that one sampled crop gives
_EXACT = 1 << 24  # up to here float32, which histc counts in, holds every whole number

Run = Callable[[Call], Any]
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


class AbsHistogram:
    """Counts of |x| over BINS equal bins of [0, limit); the limit is a power of two and doubles when it must.

    So bins of any two histograms nest, and merging is exact. `amax` is 0 for inputs that were always zero; `lowest` and
    `highest` are with sign.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.limit = 0.0
        self.lowest, self.highest = math.inf, -math.inf

    @property
    def amax(self) -> float:
        """The largest |x|; 0 before anything was seen."""
        return max(self.highest, -self.lowest, 0.0)

    @property
    def total(self) -> int:
        """How many numbers were seen."""
        return int(self.counts.sum())

    @property
    def constant(self) -> bool:
        """Whether every number seen was the same."""
        return self.total > 0 and self.lowest == self.highest

    def update(self, values: Tensor) -> None:
        """Take in a tensor of any shape, all finite."""
        flat = values.detach().float().flatten()
        lowest, highest = (float(end) for end in torch.aminmax(flat))
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)
        amax = max(abs(lowest), abs(highest))
        if amax == 0.0:
            self.counts[0] += flat.numel()
            return
        self._widen(math.ldexp(1.0, math.frexp(amax)[1]))
        for part in flat.abs().split(_EXACT):
            self.counts += torch.histc(part, BINS, 0, self.limit).double().cpu()

    def merge(self, other: AbsHistogram) -> None:
        """Take in all that `other` has seen; the same as seeing it here."""
        counts, limit = other.counts, other.limit
        self._widen(limit)
        self.lowest, self.highest = min(self.lowest, other.lowest), max(self.highest, other.highest)
        while 0.0 < limit < self.limit:
            counts, limit = _doubled(counts), limit * 2
        self.counts = self.counts + counts

    def centres(self) -> Tensor:
        """The middle of each bin [BINS]."""
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self.limit / BINS)

    def _widen(self, limit: float) -> None:
        if self.limit == 0.0:  # nothing yet, or zeros, which are in the first bin of any limit
            self.limit = limit
        while self.limit < limit:
            self.counts, self.limit = _doubled(self.counts), self.limit * 2


def _doubled(counts: Tensor) -> Tensor:
    """Counts [BINS] over twice the range: neighbours merge in pairs."""
    return torch.cat([counts.reshape(-1, 2).sum(dim=1), counts.new_zeros(BINS // 2)])


class ChannelRanges:
    """Per input channel [C], over everything seen: `largest` max |x| and `mean` mean |x|."""

    def __init__(self) -> None:
        self.largest = torch.zeros(1)
        self._sum = torch.zeros(1, dtype=torch.float64)
        self._count = 0

    def update(self, x: Tensor) -> None:
        """Take in a layer's input [N, C, H, W] or [..., C]."""
        magnitudes = x.detach().abs().float().movedim(channel_axis(x), -1).flatten(0, -2)
        self.largest = torch.maximum(self.largest, magnitudes.amax(dim=0).cpu())
        self._sum = self._sum + magnitudes.sum(dim=0, dtype=torch.float64).cpu()
        self._count += len(magnitudes)

    @property
    def mean(self) -> Tensor:
        """Mean |x| [C]."""
        return (self._sum / max(1, self._count)).float()


def channel_axis(x: Tensor) -> int:
    """Where the channels of a layer's input are."""
    return 1 if x.ndim == 4 else x.ndim - 1


def row_of(timesteps: Sequence[float]) -> Callable[[Call], int]:
    """A function from a call to its row in the schedule: the nearest timestep, the first of equal ones."""
    schedule = torch.tensor(timesteps, dtype=torch.float64)
    return lambda call: int((schedule - float(call.timestep.flatten()[0])).abs().argmin())


def observe_inputs(
    run: Run,
    layers: Mapping[str, nn.Module],
    calls: Iterable[Call],
    progress: Progress,
    group_of: Callable[[Call], int] = lambda call: 0,
    groups: int = 1,
    multipliers: Mapping[str, Tensor] | None = None,
) -> dict[str, list[AbsHistogram]]:
    """Histograms of every layer's input over recorded calls, one per group of steps, by module path.

    `group_of` gives the group of a call; `multipliers` [in] scale the channels of a layer's input before it is counted.
    A layer that no call reached has empty histograms: `unreached` names those. Raises `DiffpressError` with the layer
    and the timestep for inputs that are not finite. Each histogram takes 32 KiB.
    """
    factors = multipliers or {}
    histograms = {name: [AbsHistogram() for _ in range(groups)] for name in layers}

    def take(name: str, x: Tensor, call: Call) -> None:
        if name in factors:
            axis = channel_axis(x)
            x = x * factors[name].to(x).reshape([-1 if dim == axis else 1 for dim in range(x.ndim)])
        histograms[name][group_of(call)].update(x)

    replay(run, layers, progress(calls, "observing activations"), take)
    return histograms


def unreached(observed: Mapping[str, Sequence[AbsHistogram]]) -> list[str]:
    """The layers of `observe_inputs` that no call reached."""
    return [name for name, histograms in observed.items() if not any(histogram.total for histogram in histograms)]


def observe_channels(
    run: Run, layers: Mapping[str, nn.Module], calls: Iterable[Call], progress: Progress
) -> dict[str, ChannelRanges]:
    """The ranges of every layer's input channels over recorded calls, by module path.

    Raises `DiffpressError` for inputs that are not finite and for layers that no call reaches.
    """
    ranges = {name: ChannelRanges() for name in layers}
    seen = replay(run, layers, progress(calls, "observing channels"), lambda name, x, _: ranges[name].update(x))
    require_all(layers, seen)
    return ranges


def sample_inputs(
    run: Run,
    layers: Mapping[str, nn.Module],
    calls: Iterable[Call],
    progress: Progress,
    count: int = 512,
    seed: int = 0,
    limit: int = SAMPLE_BYTES,
) -> dict[str, Tensor]:
    """A uniform sample of every layer's actual inputs over recorded calls, at most `count` and `limit` bytes a layer.

    Linear layers have rows [N, in]. Convolutions have crops [N, in, h, w] of their padded input, so that a convolution
    without padding gives outputs of the layer exactly: CROP x CROP of them, or all where the image is smaller. Raises
    `DiffpressError` for inputs that are not finite and for layers that no call reaches.
    """
    reservoirs: dict[str, Reservoir] = {}

    def take(name: str, x: Tensor, _: Call) -> None:
        items, pick = _crops(layers[name], x) if isinstance(layers[name], nn.Conv2d) else _rows(x)
        if name not in reservoirs:
            size = 4 * pick(torch.zeros(1, dtype=torch.long)).numel()
            reservoirs[name] = Reservoir(max(1, min(count, limit // size)), seed)
        reservoirs[name].offer(items, lambda indices: pick(indices).float().cpu())

    require_all(layers, replay(run, layers, progress(calls, "sampling activations"), take))
    return {name: reservoirs[name].items for name in layers}


def _rows(x: Tensor) -> tuple[int, Callable[[Tensor], Tensor]]:
    """How many rows x [..., in] has, and a function that picks some by their indices."""
    rows = x.reshape(-1, x.shape[-1])
    return len(rows), lambda indices: rows[indices.to(x.device)]


def _crops(layer: Any, x: Tensor) -> tuple[int, Callable[[Tensor], Tensor]]:
    """How many crops the input x [N, in, H, W] of a convolution has, and a function that picks some by their indices.

    A crop starts where a window of the convolution does.
    """
    image = padded(layer, x)
    sides, places = [], []
    for axis in (0, 1):
        kernel = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        outputs = (image.shape[2 + axis] - kernel) // layer.stride[axis] + 1
        size = min(CROP, outputs)
        sides.append((size - 1) * layer.stride[axis] + kernel)
        places.append(outputs - size + 1)

    def pick(indices: Tensor) -> Tensor:
        crops = []
        for index in indices.tolist():
            place, column = divmod(index, places[1])
            picture, row = divmod(place, places[0])
            top, left = row * layer.stride[0], column * layer.stride[1]
            crops.append(image[picture, :, top : top + sides[0], left : left + sides[1]])
        return torch.stack(crops) if crops else image.new_empty(0, image.shape[1], *sides)

    return len(image) * places[0] * places[1], pick


def padded(layer: Any, x: Tensor) -> Tensor:
    """The input x [N, in, H, W] of a convolution with its padding."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    # torch's own reading of `padding`, which may be a word, in the order that `pad` wants.
    return pad(x, layer._reversed_padding_repeated_twice, mode=mode)


@torch.no_grad()
def replay(
    run: Run, layers: Mapping[str, nn.Module], calls: Iterable[Call], take: Callable[[str, Tensor, Call], None]
) -> set[str]:
    """Run every call and hand each layer's input to `take(name, input, call)`; the layers that were reached."""
    reached: set[str] = set()
    current: list[Call] = []

    def watcher(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def watch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not bool(inputs[0].isfinite().all()):
                timestep = float(current[-1].timestep.flatten()[0])
                raise DiffpressError(
                    f"layer {name} gets an input that is not finite (NaN or infinite) at timestep {timestep:g}: "
                    "the model overflows by itself there, take another checkpoint or scheduler"
                )
            reached.add(name)
            take(name, inputs[0], current[-1])

        return watch

    hooks = [module.register_forward_pre_hook(watcher(name)) for name, module in layers.items()]
    try:
        for call in calls:
            current[:] = [call]
            run(call)
    finally:
        for hook in hooks:
            hook.remove()
    return reached


def require_all(layers: Mapping[str, nn.Module], reached: set[str]) -> None:
    """Raises `DiffpressError` for layers that no call has reached."""
    missing = [name for name in layers if name not in reached]
    if missing:
        raise DiffpressError(
            f"no recorded call reaches {len(missing)} layers, such as {missing[0]}: exclude them, or record more steps"
        )
