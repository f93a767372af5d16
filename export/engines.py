"""TensorRT engines of a bundle's graphs, one per component and target, built without a GPU where the library can.

Before anything is built every target is checked for the types that the graphs need, every graph for what TensorRT
cannot take, and the memory of all engines together is planned.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffpress.bundle import Bundle, load
from diffpress.engines import build as prepared_build
from diffpress.engines.build import Report
from diffpress.engines.preflight import check_targets


def build(
    bundle: Bundle,
    asked: Sequence[str],
    progress: bool = True,
    *,
    images: Sequence[int] = (1,),
    resolution: tuple[int, int] | None = None,
    package: str | None = None,
    memory_gb: float | None = None,
    report: Report | None = None,
) -> Bundle:
    """Build engines for `asked` ("sm89", "rtx-4090", "all") into engines/<target>/; returns the bundle that lists them.

    `images` are the numbers of images at once, an optimization profile each; `resolution` (height, width) must be the
    graphs' own. Everything else is as in `diffpress.engines.build.build`, which this calls with what it finds of the
    bundle's graphs. Raises `DiffpressError` before any work for an unknown target, for a type that one lacks and for a
    graph that TensorRT cannot take; and for one that the library refuses, naming the node.
    """
    check_targets(asked, package=package)
    from diffpress.export import buildable  # reads ONNX

    buildable.check_images(images)
    bundle = load(bundle.path)  # its digests go into the sidecars, so they must be true
    buildable.check_resolution(bundle, resolution)
    prepared = buildable.prepare(bundle, images)
    return prepared_build.build(bundle, prepared, asked, progress, package=package, memory_gb=memory_gb, report=report)
