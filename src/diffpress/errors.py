"""Errors a user can act on. The command line prints their message as one line and exits with `exit_code`."""

from __future__ import annotations

import importlib
from types import ModuleType


class DiffpressError(Exception):
    """Something the user can mend; the message says what happened and what to do, in one line."""

    exit_code = 2


class GateError(DiffpressError):
    """A bundle misses what a gate asks of it; nothing went wrong with the command."""

    exit_code = 3


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or say which extra brings it: `require("openvino", "cpu", "run on OpenVINO")`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise DiffpressError(
            f"'{missing}' is not installed, which is needed to {purpose}: pip install 'diffpress[{extra}]'"
        ) from error
