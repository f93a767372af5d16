"""Layers by their names: patterns that must match one, and lists of names in a message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch

from diffpress.errors import DiffpressError

NAMED = 6  # names in a message for one reason; all are in the table


def require_matches(field: str, patterns: Iterable[str], names: Iterable[str], kind: str = "layer") -> None:
    """Raises `DiffpressError` for the first shell pattern of `field` ("quantize: exclude") that matches no name."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise DiffpressError(f"{field} pattern '{pattern}' matches no {kind}, such as '{names[0]}'")


def by_reason(left: Mapping[str, str]) -> list[tuple[str, int, str]]:
    """For each reason in `left` (name to reason): the reason, how many names have it, and the first few in words."""
    groups: dict[str, list[str]] = {}
    for name, why in left.items():
        groups.setdefault(why, []).append(name)
    said = []
    for why, names in groups.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        said.append((why, len(names), f"{', '.join(names[:NAMED])}{more}"))
    return said


def phrases(left: Mapping[str, str]) -> list[str]:
    """The same with a phrase for each reason: "a, b and 3 more (no recorded call runs them)"."""
    return [f"{names} ({why})" for why, _, names in by_reason(left)]
