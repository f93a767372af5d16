"""Environments of peers, with a pip that is made up: what is pinned, what is refused, what is made once."""

import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from diffpress.benchmarks import peers_venv
from diffpress.benchmarks.gpu_launch import Failed

TORCH = importlib.metadata.version("torch")


class Pip:
    """Runs nothing; its dry run would install what it was given."""

    def __init__(self, chosen: dict[str, str]) -> None:
        self.chosen, self.commands = chosen, list[list[str]]()

    def __call__(self, command: Sequence[str]) -> str:
        self.commands.append(list(command))
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
        if "--report" in command:
            entries = [{"metadata": {"name": name, "version": version}} for name, version in self.chosen.items()]
            Path(command[command.index("--report") + 1]).write_text(json.dumps({"install": entries}))
        return ""


def test_an_environment_is_made_once_of_what_was_looked_at(tmp_path: Path) -> None:
    pip = Pip({"torch": TORCH, "Peer": "1.2"})
    python = peers_venv.python_of("peer", ("peer>=1",), tmp_path, pip)
    made, looked, installed = pip.commands
    assert made[1:3] == ["-m", "venv"] and python.is_relative_to(tmp_path / "peer")
    assert "--dry-run" in looked and "peer>=1" in looked and f"torch=={TORCH}" in looked
    assert (tmp_path / "peer" / "constraints.txt").read_text() == f"torch=={TORCH}\n"
    assert "--no-deps" in installed and installed[-2:] == [f"torch=={TORCH}", "peer==1.2"]
    assert peers_venv.python_of("peer", ("peer>=1",), tmp_path, pip) == python and len(pip.commands) == 3
    assert peers_venv.installed(tmp_path) == {"peer": {"torch": TORCH, "peer": "1.2"}}


def test_another_torch_is_not_installed(tmp_path: Path) -> None:
    pip = Pip({"torch": "1.0+cu999"})
    with pytest.raises(Failed, match=r"would bring torch 1\.0\+cu999 in place of"):
        peers_venv.python_of("peer", ("peer",), tmp_path, pip)
    assert len(pip.commands) == 2 and peers_venv.installed(tmp_path) == {}


def test_libraries_of_cuda_are_not_installed_beside_a_torch_for_cpus() -> None:
    torch = "2.13.0+cpu"
    for package in ("nvidia-cublas-cu12", "nvidia-nccl-cu13", "triton", "cuda-toolkit"):
        with pytest.raises(Failed, match=package):
            peers_venv.check("peer", {"torch": torch, package: "1"}, torch)
    peers_venv.check("peer", {"torch": torch, "nvidia-ml-py": "1", "nvidia-modelopt": "1"}, torch)


def test_a_command_that_fails_says_its_first_error() -> None:
    script = (
        "import sys; sys.stderr.write('WARNING: noise\\nERROR: No matching distribution\\nERROR: more\\n'); sys.exit(1)"
    )
    with pytest.raises(Failed, match=r"^No matching distribution$"):
        peers_venv.run([sys.executable, "-c", script])
    assert peers_venv.run([sys.executable, "-c", "print('fine')"]).strip() == "fine"


def test_only_a_torchvision_that_fits_torch_is_taken() -> None:
    cpu = "2.13.0+cpu"
    with pytest.raises(Failed, match=r"torchvision 0\.28\.0, which does not load beside torch 2\.13\.0\+cpu"):
        peers_venv.check("peer", {"torch": cpu, "torchvision": "0.28.0"}, cpu)
    peers_venv.check("peer", {"torch": cpu, "torchvision": "0.28.0+cpu"}, cpu)
    peers_venv.check("peer", {"torch": "2.13.0", "torchvision": "0.28.0"}, "2.13.0")
