"""Environments of peers that cannot stand beside the versions diffpress is tested with: a venv each, made once.

torch stays the build that runs here, by its full version ("2.13.0+cpu"): pip is asked first what it would install, and
where that is another torch, or libraries of CUDA, nothing is installed.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffpress.benchmarks.gpu_launch import LONGEST, Failed

SHARED = ("numpy", "pillow", "pydantic", "tqdm", "safetensors")  # what a worker needs of its own, beside torch
CUDA = re.compile(r"nvidia-(cu|nccl|nvjitlink|nvtx|nvshmem)|cuda-toolkit$|triton$")
DONE = "installed.json"
Run = Callable[[Sequence[str]], str]  # a command's output; raises `Failed`


def run(command: Sequence[str]) -> str:
    """What a command prints; raises `Failed` with its last error."""
    done = subprocess.run(list(command), capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("ERROR")] or lines or ["it said nothing"]
        raise Failed(said[0].removeprefix("ERROR: ")[:LONGEST])
    return done.stdout


def python_of(name: str, requirements: Sequence[str], folder: Path, run: Run = run) -> Path:
    """The interpreter of an environment, made in `folder` / `name` where it is not there; raises `Failed`."""
    place = (folder / name).absolute()
    python = place / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if (place / DONE).exists():
        return python
    shutil.rmtree(place, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(place)])
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    pinned, report = place / "constraints.txt", place / "report.json"
    torch = importlib.metadata.version("torch")
    pinned.write_text(f"torch=={torch}\n", "utf-8")
    wanted = [f"torch=={torch}", *SHARED, *requirements, "-c", str(pinned)]
    run([*pip, "--dry-run", "--report", str(report), *wanted])
    chosen = versions(json.loads(report.read_text("utf-8")))
    check(name, chosen, torch)
    # Exactly what was looked at, which also spares pip to resolve it again.
    run([*pip, "--no-deps", *(f"{package}=={version}" for package, version in chosen.items())])
    (place / DONE).write_text(json.dumps(chosen, indent=1), "utf-8")
    return python


def versions(report: dict[str, Any]) -> dict[str, str]:
    """What pip's installation report would install, version by package."""
    return {entry["metadata"]["name"].lower(): entry["metadata"]["version"] for entry in report["install"]}


def installed(folder: Path) -> dict[str, dict[str, str]]:
    """Versions by package of every environment that was made."""
    files = sorted(folder.glob(f"*/{DONE}"))
    return {file.parent.name: json.loads(file.read_text("utf-8")) for file in files}


def check(name: str, chosen: dict[str, str], torch: str) -> None:
    """Raises `Failed` where pip would bring another torch, or CUDA."""
    if chosen.get("torch") != torch:
        raise Failed(f"{name} would bring torch {chosen.get('torch')} in place of {torch}: not installed")
    if "+cpu" not in torch:
        return
    # Its operators are compiled against one build of torch, and that of PyPI is the one with CUDA.
    vision = chosen.get("torchvision")
    if vision is not None and "+cpu" not in vision:
        raise Failed(
            f"{name} would bring torchvision {vision}, which does not load beside torch {torch}: not installed"
        )
    cuda = sorted(package for package in chosen if CUDA.match(package))
    if cuda:
        raise Failed(f"{name} would bring libraries of CUDA ({', '.join(cuda)[:80]}): not installed")
