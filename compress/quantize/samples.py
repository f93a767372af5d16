"""What a unit of the denoiser is given and what it should answer, over recorded calls: the data of reconstruction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.calibration.capture import Call, Recordings
from diffpress.compress.numerics.simulate import Clock
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError


@dataclasses.dataclass(frozen=True)
class Samples:
    """What a unit was called with on n samples, and what it should answer. Tensors have the sample as first axis."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: Tensor  # [n], of the sampling schedule
    targets: Tensor  # [n, C, H, W]

    def at(self, index: Tensor | slice) -> Samples:
        """Those samples alone."""

        def pick(value: Tensor) -> Tensor:
            return value[index] if value.ndim else value

        return Samples(_mapped(self.args, pick), _mapped(self.kwargs, pick), self.rows[index], self.targets[index])


def chosen_calls(recordings: Recordings, count: int, seed: int) -> list[Call]:
    """`count` of the recorded calls, drawn at random, in recorded order."""
    drawn = torch.randperm(len(recordings), generator=torch.Generator().manual_seed(seed))[:count]
    kept = set(drawn.tolist())
    return [call for index, call in enumerate(recordings) if index in kept]


@torch.no_grad()
def capture(
    work: Work,
    name: str,
    calls: Sequence[Call],
    prefix: AbstractContextManager[None],
    exact: AbstractContextManager[None],
) -> Samples | None:
    """The inputs of unit `name` from the quantized network before it, and its full-precision outputs.

    Within `prefix` the denoiser computes as quantized so far, within `exact` in full precision. Calls that do not run
    the unit (a cached step), or take a part of it from an earlier one, are left out; None when all are. Raises
    `DiffpressError` for values that are not finite.
    """
    unit = work.denoiser.get_submodule(name)
    # Where a feature stands in for the unit, or for a module in it, its answer is not its own.
    taken = {
        key
        for key, variant in work.program.variants.items()
        if any(f"{path}.".startswith(f"{name}.") or f"{name}.".startswith(f"{path}.") for path in variant.features)
    }
    calls = [call for call in calls if call.variant not in taken]
    with prefix:
        inputs = _until(work, calls, lambda keep: unit.register_forward_pre_hook(keep, with_kwargs=True))
    with exact:
        outputs = _until(work, calls, lambda keep: unit.register_forward_hook(keep))
    clock = Clock.of(work.sampling.timesteps)
    rows, counts, given, targets = [], [], [], []
    for call, entry, output in zip(calls, inputs, outputs, strict=True):
        if entry is None:
            continue
        target = hidden_state(output[-1])
        clock.set(call.timestep)
        rows += [clock.row] * len(target)
        counts.append(len(target))
        given.append(entry)
        targets.append(target)
    if not targets:
        return None
    args, kwargs = _joined(given, counts)
    samples = Samples(args, kwargs, torch.tensor(rows, device=targets[0].device), torch.cat(targets))
    if not bool(samples.targets.isfinite().all()):
        raise DiffpressError(f"reconstruct: unit {name} answers recorded calls with values that are not finite")
    return samples


def _until(work: Work, calls: Iterable[Call], attach: Callable[[Callable[..., None]], Any]) -> list[Any]:
    """What the hook that `attach` sets was shown on each call, which ends there; None where it was not reached."""
    seen: list[Any] = []

    def keep(_: nn.Module, *shown: Any) -> None:
        seen[-1] = shown
        raise _Reached

    hook = attach(keep)
    try:
        for call in calls:
            seen.append(None)
            with suppress(_Reached):
                work.run(call)
    finally:
        hook.remove()
    return seen


class _Reached(Exception):
    """The unit was reached: the rest of the network need not run."""


def hidden_state(output: Any) -> Tensor:
    """The hidden state of a unit's output: itself, or the first of a tuple or of a diffusers output."""
    return output if isinstance(output, Tensor) else output[0]


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in its tuples, lists and dicts changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_mapped(part, change) for part in value)
    return value


def _joined(parts: Sequence[Any], counts: Sequence[int]) -> Any:
    """Arguments of several calls as those of one, call i holding counts[i] samples.

    A time feature may be one row for all samples of a call: it is repeated. What is no tensor comes from the first.
    """
    first = parts[0]
    if isinstance(first, Tensor) and first.ndim:
        return torch.cat([part.expand(n, *part.shape[1:]) for part, n in zip(parts, counts, strict=True)])
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts], counts) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(_joined(column, counts) for column in zip(*parts, strict=True))
    return first
