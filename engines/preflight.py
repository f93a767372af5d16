"""What the installed library builds for, and whether it can do so for what was asked."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from diffpress.engines import library, targets
from diffpress.engines.targets import Target


def supported_targets() -> list[str]:
    """The targets the installed library can build for; raises `DiffpressError` when none is installed."""
    return list(library.capabilities(library.find()))


def check_targets(
    asked: Sequence[str], types: Collection[str] = (), what: str = "the bundle", package: str | None = None
) -> list[Target]:
    """What `asked` means here: targets that the library builds for and that have `types`, which `what` needs.

    The library is that of `package` ("tensorrt"), the installed one if absent. Raises `DiffpressError` that says what
    to do instead.
    """
    trt = library.find(package)
    return targets.select(asked, list(library.capabilities(trt)), library.package(trt), types, what)
