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
    except ModuleNotFoundError as error:
        if error.name is None:  # raised by the package itself, about something within
            raise _broken(module, error, purpose) from error
        raise DiffpressError(
            f"'{error.name}' is not installed, which is needed to {purpose}: pip install 'diffpress[{extra}]'"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise _broken(module, error, purpose) from error


def _broken(module: str, error: BaseException, purpose: str) -> DiffpressError:
    """What to say of a package that is there and does not import, with the first of the errors that led to it."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    return DiffpressError(f"'{module}' is installed, but cannot be imported, which is needed to {purpose}: {said}")
