"""How much of a GPU's memory a bundle's engines take: weights, activations (`liveness`), feature buffers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffpress.engines.targets import Target

GB = 10**9
USABLE = 0.9  # of a card's memory; its display and the driver's context take the rest


@dataclass(frozen=True)
class Need:
    """Bytes that one engine needs at its largest batch; `budget` of its weights stay on the device, None for all."""

    weights: int
    activations: int
    budget: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """What all engines of a target take together, in bytes.

    Weights and activations are sums, since each engine's context holds its own; features are shared.
    """

    target: str
    available: int
    features: int
    engines: Mapping[str, Need]

    @property
    def weights(self) -> int:
        """Of all engines, on the device or streamed."""
        return sum(need.weights for need in self.engines.values())

    @property
    def activations(self) -> int:
        """Of all engines."""
        return sum(need.activations for need in self.engines.values())

    @property
    def total(self) -> int:
        """With all weights on the device."""
        return self.weights + self.activations + self.features

    @property
    def streaming(self) -> bool:
        """Whether some weights have to stay in the host's memory and be streamed."""
        return any(need.budget is not None for need in self.engines.values())

    @property
    def fits(self) -> bool:
        """Whether it runs at all, with its weights streamed where they must be."""
        return self.activations + self.features < self.available

    def to_json(self) -> dict[str, Any]:
        """As the manifest keeps it, in bytes."""
        return {
            "target": self.target,
            "available": self.available,
            "weights": self.weights,
            "activations": self.activations,
            "features": self.features,
            "total": self.total,
            "weight_streaming": self.streaming,
            "fits": self.fits,
            "engines": {name: dict(need.__dict__) for name, need in self.engines.items()},
        }

    def line(self) -> str:
        """For people."""
        sizes = {"weights": self.weights, "activations": self.activations, "features": self.features}
        parts = " + ".join(f"{name} {_megabytes(size)}" for name, size in sizes.items())
        verdict = "fits" if not self.streaming else "fits with its weights streamed from the host's memory"
        if not self.fits:
            verdict = "does not fit even with its weights streamed: build for fewer images at once or a larger card"
        return f"{self.target}: {parts} = {_megabytes(self.total)} of {_megabytes(self.available)}, {verdict}"


def plan(target: Target, needs: Mapping[str, Need], features: int, memory_gb: float | None = None) -> MemoryPlan:
    """What the engines `needs` take on `target`; `memory_gb` is the card's where it is not the target's own.

    Where that is too much, weights are streamed: what remains for them is shared out by their sizes.
    """
    available = int((target.memory_gb if memory_gb is None else memory_gb) * GB * USABLE)
    made = MemoryPlan(target.name, available, features, dict(needs))
    if made.total <= available:
        return made
    left = max(0, available - made.activations - features)
    shared = {
        name: Need(need.weights, need.activations, left * need.weights // max(made.weights, 1))
        for name, need in needs.items()
    }
    return MemoryPlan(target.name, available, features, shared)


def features(shapes: Mapping[str, Sequence[int]], rows: int, doubled: Sequence[str] = ()) -> int:
    """Bytes of the feature buffers between steps, in FP32; `doubled` keep an earlier value besides the last."""
    return sum(4 * rows * math.prod(shape) * (2 if name in doubled else 1) for name, shape in shapes.items())


def _megabytes(size: int) -> str:
    return f"{size / GB:.2f} GB" if size >= GB else f"{size / 1e6:.1f} MB"
