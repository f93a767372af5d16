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
    except (ImportError, OSError, RuntimeError) as error:
        # Without a name it was raised by the package itself, about something within.
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            said = f"'{error.name}' is not installed, which is needed to {purpose}: pip install 'diffpress[{extra}]'"
        else:
            why = f"which is needed to {purpose}: {_first(error)}"
            said = f"'{module}' is installed, but cannot be imported, {why}"
        raise DiffpressError(said) from error


def _first(error: BaseException) -> str:
    """The first line of the first of the errors that led to one."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return next(iter(str(error).splitlines()), "") or type(error).__name__
