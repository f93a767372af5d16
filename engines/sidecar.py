"""What is written beside an engine, so that whoever loads it knows whether it fits: GPU, library, shapes, graph."""

from __future__ import annotations

import contextlib
import importlib.metadata
from types import ModuleType
from typing import Any

import diffpress
from diffpress.engines import library, targets
from diffpress.engines.builder import Built, envelope
from diffpress.engines.memory import Need
from diffpress.engines.prepared import Graph
from diffpress.engines.targets import Target

FORMAT = 1  # of the sidecar; a reader refuses a newer one
LISTED = ("target", "component", "variant", "precision", "bytes", "seconds")  # what the manifest repeats


def sidecar(
    trt: ModuleType, graph: Graph, target: Target, built: Built, size: int, seconds: float, need: Need
) -> dict[str, Any]:
    """Everything about an engine of `size` bytes that took `seconds`, ready for JSON.

    `profiles` are the optimization profiles in the engine's order, `shapes` what they take together. `sha256` are the
    digests of the graph and of its external data. `memory` are bytes: as planned, and as the builder counts them, which
    is null where it does not say. `sparse` counts layers with 2:4 weights and the kernels chosen that skip their zeros,
    null where no GPU let the inspector look. `layers` is the file of its answer, or null for `layers_reason`.
    """
    return {
        "format": FORMAT,
        **targets.as_json(target),
        "component": "unet" if graph.denoiser else graph.name,
        "variant": graph.name if graph.denoiser else None,
        "precision": graph.precision.replace("fp32", "fp16+fp32") if built.halved else graph.precision,
        "types": sorted(graph.types | ({"fp16"} if built.halved else set())),
        "shapes": envelope(built.profiles),
        "profiles": list(built.profiles),
        "graph": graph.file,
        "sha256": dict(graph.digests),
        "bytes": size,
        "seconds": round(seconds, 3),
        "library": {"name": library.package(trt), "version": str(trt.__version__)},
        "versions": versions(trt),
        "flags": list(built.flags),
        "sparse": {"layers": len(graph.sparse), "enabled": "SPARSE_WEIGHTS" in built.flags, "kernels": None},
        "weight_streaming": {"enabled": "WEIGHT_STREAMING" in built.flags, "budget_bytes": need.budget},
        "memory": {
            "weights": need.weights,
            "activations": need.activations,
            "builder_weights": built.figures.get("weights"),
            "builder_activations": built.figures.get("activations"),
        },
        "warnings": list(graph.warnings),
        "layers": None,
        "layers_reason": None,
    }


def entry(written: dict[str, Any], path: str) -> dict[str, Any]:
    """What the bundle's manifest lists of an engine."""
    return {**{key: written[key] for key in LISTED}, "path": path}


def versions(trt: ModuleType) -> dict[str, str]:
    """Of what made the engine; onnx only where it is installed, which a target that builds for itself need not."""
    found = {library.package(trt): str(trt.__version__), "diffpress": diffpress.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["onnx"] = importlib.metadata.version("onnx")
    return found
