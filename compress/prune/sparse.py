"""`prune-unstructured` and `prune-nm`: single weights become zero, and those that stay make up for them.

Optimal Brain Surgeon, column by column, with a timestep-aware Hessian (OBS-Diff, Zhu et al. 2025). Zeros make a file
smaller where it is compressed; only the patterns of N in M input channels make some GPUs faster (2:4, from Ampere on).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Annotated, Any, Literal, Protocol

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffpress.calibration import hessian
from diffpress.calibration.hessian import Hessian, Weighting
from diffpress.calibration.processes import on_fastest_device
from diffpress.compress.families import unet as family
from diffpress.compress.names import phrases, require_matches
from diffpress.compress.prune import packages, structure
from diffpress.compress.prune.allocate import Choice, allocate
from diffpress.compress.prune.methods import Method, collected, prune_nm, prune_unstructured
from diffpress.compress.prune.outputs import Outputs
from diffpress.compress.quantize.samples import chosen_calls
from diffpress.compress.quantize.sensitivity import Numbers
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError

LEVELS = (0.25, 0.5, 0.75)  # shares of a layer's weights at which its effect on the output is measured
FINEST = 20  # steps of 5 % in which shares are spread
MOST = 0.95  # of a layer's weights
JUDGED = 16  # recorded calls that the output's error is measured on
SPAN = 8192  # columns of a Hessian's block: two gigabytes while it is solved; wider layers count in blocks


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PruneUnstructuredPass:
    """Make the share `ratio` of the weights of the chosen linear and convolutional layers zero, wherever they are.

    `allocation` uniform takes the share of every layer, sensitivity spreads it by what that does to the output.
    `exclude` spares layers by shell patterns over their paths, those of the first and last block if it is absent.
    """

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    method: Method = "obs"
    allocation: Literal["uniform", "sensitivity"] = "uniform"
    exclude: tuple[str, ...] | None = None
    weighting: Weighting = "log-decrease"
    packages: Annotated[int, Field(ge=1, description="module packages, each with a run over the recorded calls")] = 4
    memory_gb: Annotated[float, Field(gt=0, description="of Hessians at a time; more packages where it is less")] = 4.0
    damping: Annotated[float, Field(gt=0)] = 0.01
    refine: Annotated[int, Field(ge=0, description="conjugate gradient steps on what stays, after the sweep")] = 10

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` behind quantization, and where patterns match or leave nothing."""
        structure.check_order(work, self.name, widths_change=False)
        if self.allocation == "sensitivity" and self.ratio > MOST:
            raise DiffpressError(
                f"{self.name}: a ratio of {self.ratio:g} cannot be spread, no layer may lose more than {MOST:g}: "
                "lower it, or take allocation: uniform"
            )
        self.chosen(work)

    @property
    def name(self) -> str:
        """As recipes have it."""
        return "prune-unstructured"

    def chosen(self, work: Work) -> dict[str, Any]:
        """The layers that are pruned."""
        return layers(self.name, work, self.exclude)[0]

    def apply(self, work: Work) -> str:
        """Prune in place; says how many weights are zero and what that did to the output."""
        chosen, skipped = layers(self.name, work, self.exclude)
        with on_fastest_device(work.denoiser):
            shares = dict.fromkeys(chosen, self.ratio)
            outputs = Outputs(work, chosen_calls(work.record(), JUDGED, work.seed))
            if self.allocation == "sensitivity":
                shares = self._spread(work, chosen, outputs)

            def solve(name: str, layer: Any, weight: Tensor, seen: Hessian | None) -> Tensor:
                return prune_unstructured(self.method, weight, seen, shares[name], self.damping, self.refine)

            return pruned(self, work, chosen, skipped, outputs, solve)

    def _spread(self, work: Work, chosen: Mapping[str, Any], outputs: Outputs) -> dict[str, float]:
        """The share of each layer that together make `ratio` of all their weights, at the least error."""
        calls = list(work.record())
        known = Numbers(work.scratch / f"{self.name}-sensitivity")
        context = json.dumps([self.method, self.weighting, self.damping, self.refine, packages.digest(work, calls)])
        keys = {(name, level): packages.short(f"{context} {name} {level}") for name in chosen for level in LEVELS}
        missing = {name: layer for name, layer in chosen.items() if any(keys[name, one] not in known for one in LEVELS)}
        for group in packages.split(missing, 1, self.memory_gb, SPAN):
            seen = collected(self.method, work, group, calls, self.weighting, SPAN)
            for name in work.progress(group, "measuring what weights are worth"):
                whole = chosen[name].weight.data
                for level in LEVELS:
                    solved = prune_unstructured(
                        self.method, whole.flatten(1), seen[name], level, self.damping, self.refine
                    )
                    chosen[name].weight.data = solved.reshape(whole.shape)
                    known[keys[name, level]] = outputs.error()
                    chosen[name].weight.data = whole
            del seen
            packages.forget(work)
        choices = {}
        for name, layer in chosen.items():
            grown = packages.growth({round(level * 100): known[keys[name, level]] for level in LEVELS})
            steps = [MOST * index / (FINEST - 1) for index in range(FINEST)]
            choices[name] = [Choice(n, step * layer.weight.numel(), grown(step * 100)) for n, step in enumerate(steps)]
        total = sum(layer.weight.numel() for layer in chosen.values())
        found = allocate(choices, self.ratio * total)
        return {name: choice.saved / chosen[name].weight.numel() for name, choice in found.items()}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PruneNMPass:
    """Leave `n` of every `m` input channels, at each place of a convolution's kernel: 2:4 is what GPUs know.

    `exclude` as in `prune-unstructured`. Layers whose input channels m does not divide, or with fewer than
    `smallest`, which gain nothing, stay as they are.
    """

    n: Annotated[int, Field(ge=1, description="weights that stay in each group")] = 2
    m: Annotated[int, Field(ge=2, description="input channels in a group")] = 4
    method: Method = "obs"
    exclude: tuple[str, ...] | None = None
    smallest: Annotated[int, Field(ge=1, description="input channels of a layer that is worth it")] = 1
    weighting: Weighting = "log-decrease"
    packages: Annotated[int, Field(ge=1, description="module packages, each with a run over the recorded calls")] = 4
    memory_gb: Annotated[float, Field(gt=0, description="of Hessians at a time; more packages where it is less")] = 4.0
    damping: Annotated[float, Field(gt=0)] = 0.01
    refine: Annotated[int, Field(ge=0, description="conjugate gradient steps on what stays, after the sweep")] = 10

    @property
    def name(self) -> str:
        """As recipes have it."""
        return "prune-nm"

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` behind quantization, for patterns that are none, and where no layer fits."""
        structure.check_order(work, self.name, widths_change=False)
        if self.n >= self.m:
            raise DiffpressError(f"{self.name}: {self.n} of every {self.m} is no pattern: n must be below m")
        self.chosen(work)

    def chosen(self, work: Work) -> tuple[dict[str, Any], dict[str, str]]:
        """The layers that are pruned, and why others are not."""
        found, skipped = layers(self.name, work, self.exclude)
        for name, layer in list(found.items()):
            channels = layer.weight.shape[1]
            if channels % self.m:
                skipped[name] = f"input channels are no multiple of {self.m}"
            elif channels < self.smallest:
                skipped[name] = f"fewer than {self.smallest} input channels"
            else:
                continue
            del found[name]
        if not found:
            raise DiffpressError(f"{self.name}: no layer has input channels for groups of {self.m}")
        return found, skipped

    def apply(self, work: Work) -> str:
        """Prune in place; says how many weights are zero and what that did to the output."""
        chosen, skipped = self.chosen(work)

        def solve(name: str, layer: Any, weight: Tensor, seen: Hessian | None) -> Tensor:
            kernel = hessian.kernel_of(layer)
            return prune_nm(self.method, weight, seen, self.m - self.n, self.m, kernel, self.damping, self.refine)

        with on_fastest_device(work.denoiser):
            outputs = Outputs(work, chosen_calls(work.record(), JUDGED, work.seed))
            return pruned(self, work, chosen, skipped, outputs, solve)


class Settings(Protocol):
    """What both passes say of how Hessians are collected."""

    @property
    def name(self) -> str: ...
    @property
    def method(self) -> Method: ...
    @property
    def weighting(self) -> Weighting: ...
    @property
    def packages(self) -> int: ...
    @property
    def memory_gb(self) -> float: ...


Solve = Callable[
    [str, Any, Tensor, Hessian | None], Tensor
]  # path, layer, weight [out, columns], its Hessian -> the weight


def pruned(
    settings: Settings,
    work: Work,
    chosen: Mapping[str, Any],
    skipped: Mapping[str, str],
    outputs: Outputs,
    solve: Solve,
) -> str:
    """Solve layer by layer, package by package, in place; returns what became of the network, in words."""
    calls = list(work.record())
    state = packages.State(work, settings.name, settings, calls)
    for index, group in enumerate(packages.split(chosen, settings.packages, settings.memory_gb, SPAN)):
        done = state.load(index)
        if done is None:
            seen = collected(settings.method, work, group, calls, settings.weighting, SPAN)
            done = {}
            for name in work.progress(group, f"pruning package {index + 1}"):
                layer = chosen[name]
                try:
                    done[name] = solve(name, layer, layer.weight.data.flatten(1), seen[name])
                except DiffpressError as error:
                    raise DiffpressError(f"layer {name} cannot be pruned: {error}") from error
            del seen
            state.save(index, done)
            packages.forget(work)
        for name in group:
            weight = chosen[name].weight
            weight.data = done[name].reshape(weight.shape).to(weight)
            work.sparse.add(name)
    work.originals.clear()
    zeros = sum(int((layer.weight == 0).sum()) for layer in chosen.values())
    total = sum(layer.weight.numel() for layer in chosen.values())
    notes = [f"{zeros / total:.1%} of the weights of {len(chosen)} layers are zero"]
    notes += [f"error of the output on recorded calls {outputs.error():.2%}"]
    notes += [f"left as they are: {'; '.join(phrases(skipped))}"] if skipped else []
    return ", ".join(notes)


def layers(name: str, work: Work, exclude: tuple[str, ...] | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The linear and convolutional layers that `exclude` leaves, by path, and why others are left out."""
    quantizable = family.quantizable(work.denoiser)
    known = {path: quantizable[path] for path in family.in_forward_order(work.denoiser, quantizable)}
    require_matches(f"{name}: exclude", exclude or (), known)
    spared = packages.ends(work.denoiser, known) if exclude is None else exclude
    left = {path: layer for path, layer in known.items() if not any(fnmatch(path, pattern) for pattern in spared)}
    reasons = {path: reason for path, layer in left.items() if (reason := hessian.unsupported(layer))}
    found = {path: layer for path, layer in left.items() if path not in reasons}
    if not found:
        raise DiffpressError(f"{name}: the exclude patterns leave no layer to prune")
    return found, reasons
