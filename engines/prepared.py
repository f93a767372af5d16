"""What has to be known of a bundle's graphs to build their engines, as data.

It is found where ONNX can be read (`buildable`), and enough to build with on a target that has nothing but the library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffpress.engines.builder import Batch
from diffpress.engines.memory import Need
from diffpress.errors import DiffpressError


@dataclass(frozen=True)
class Graph:
    """A graph of the bundle, what its engine is called and what its sidecar says about it."""

    name: str  # the denoiser's variant, or the component
    file: str  # relative to the bundle
    denoiser: bool
    batches: tuple[Batch, ...]  # min, opt, max rows of each optimization profile
    precision: str
    types: frozenset[str]  # that it computes with or stores, of `NAMES`
    digests: Mapping[str, str]  # file -> sha256, of the graph and its external data
    need: Need
    sparse: tuple[str, ...]  # nodes with 2:4 weights
    warnings: tuple[str, ...]  # what TensorRT takes without gaining from it


@dataclass(frozen=True)
class Prepared:
    """All graphs of a bundle, and the bytes of its feature buffers."""

    graphs: tuple[Graph, ...]
    features: int

    @property
    def types(self) -> frozenset[str]:
        """What GPUs must have for all of them."""
        return frozenset().union(*(graph.types for graph in self.graphs))

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        rows = [
            {**asdict(graph), "types": sorted(graph.types), "digests": dict(graph.digests)} for graph in self.graphs
        ]
        return {"graphs": rows, "features": self.features}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Prepared:
        """The inverse of `to_json`; raises `DiffpressError` for anything else."""
        try:
            return cls(tuple(_graph(row) for row in data["graphs"]), int(data["features"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DiffpressError(
                f"what engines are built from cannot be read ({error}): pack the bundle again"
            ) from error


def _graph(row: Mapping[str, Any]) -> Graph:
    lists = {name: tuple(row[name]) for name in ("sparse", "warnings")}
    batches = tuple((int(least), int(best), int(most)) for least, best, most in row["batches"])
    return Graph(**{**row, **lists, "batches": batches, "types": frozenset(row["types"]), "need": Need(**row["need"])})
