"""Measurements in processes of their own, whose memory is their own, and what they told, kept for the next run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffpress
from diffpress.errors import DiffpressError
from diffpress.paths import write_json


def environment(**more: str) -> dict[str, str]:
    """The environment for a process that finds the diffpress which runs here, with the variables `more`."""
    source = str(Path(diffpress.__file__).parents[1])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path} | more


def kept(file: Path, module: str, task: Mapping[str, Any], what: str, **more: str) -> dict[str, Any]:
    """What `python -m MODULE --task TASK` tells, an object of JSON in its last line, or what `file` keeps of it.

    The file is whole or not there. `more` are variables of the environment. Raises `DiffpressError` where the process
    of `what` ends badly.
    """
    if not file.is_file():
        command = [sys.executable, "-m", module, "--task", json.dumps(task)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment(**more))
        if done.returncode:
            raise DiffpressError(f"{what} ended with {done.returncode}; the same command goes on from it")
        found = json.loads(done.stdout.splitlines()[-1])
        write_json(file, found, indent=1)
    return dict(json.loads(file.read_text("utf-8")))
