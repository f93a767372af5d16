"""Module packages: the layers of a network in a few groups, one after the other, so that few Hessians live at once.

OBS-Diff (Zhu et al. 2025, Section 3.3): each package has a run over the recorded calls, on the network as it is pruned
so far, so that what later layers are given is what they will be given.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from diffpress.calibration import processes
from diffpress.calibration.capture import Call
from diffpress.calibration.hessian import Hessian, Weighting, alphas, bytes_of
from diffpress.calibration.hessian_run import collect_in_parts, same_inputs
from diffpress.calibration.model import state_digest
from diffpress.calibration.statistics import row_of
from diffpress.compress import training
from diffpress.compress.families import unet as family
from diffpress.compress.work import Work

PARTS = 8  # of the recorded calls: what an interrupted run goes on with, and processes share
STEEPEST = 6.0  # exponent of an error's growth that is believed
ROWS = 4096  # tokens of a call that a layer's Hessian takes at most, drawn at random: a 64x64 map of one image


def split(layers: Mapping[str, nn.Module], packages: int, memory_gb: float, span: int | None = None) -> list[list[str]]:
    """Module paths in order, in at least so many groups of at most `memory_gb` each, fewer where there are fewer paths.

    A layer that is larger alone is a group of its own. Solving for one layer takes a few times its Hessian besides.
    """
    names, limit = list(layers), memory_gb * 1e9
    groups: list[list[str]] = []
    for index in range(packages):
        part = names[len(names) * index // packages : len(names) * (index + 1) // packages]
        used = math.inf
        for name in part:
            size = bytes_of(layers[name], span)
            if used + size > limit:
                groups.append([])
                used = 0
            groups[-1].append(name)
            used += size
    return groups


def collect(
    work: Work,
    names: Sequence[str],
    calls: Sequence[Call],
    weighting: Weighting,
    span: int | None = None,
) -> dict[str, Hessian]:
    """The timestep-aware Hessians of layers over recorded calls, on the denoiser as it is now, by module path."""
    layers = {name: work.denoiser.get_submodule(name) for name in dict.fromkeys(names)}
    weights, row = alphas(weighting, len(work.sampling.timesteps)), row_of(work.sampling.timesteps)
    parts = [calls[index::PARTS] for index in range(min(PARTS, len(calls)))]
    key = hashlib.sha256(
        json.dumps([digest(work, calls), list(layers), weighting, span, ROWS, PARTS, work.seed]).encode()
    )
    folder = work.scratch / f"hessians-{key.hexdigest()[:16]}"
    leaders = same_inputs(work.run, layers, calls[0])
    return collect_in_parts(
        work.run,
        layers,
        parts,
        folder,
        work.progress,
        lambda call: weights[row(call)],
        leaders,
        span,
        ROWS,
        work.seed,
    )


def forget(work: Work) -> None:
    """Remove the Hessians that were kept for an interrupted run; for when they are used."""
    processes.wait()  # until all processes have read them
    if processes.is_main():
        for folder in work.scratch.glob("hessians-*"):
            shutil.rmtree(folder, ignore_errors=True)


def digest(work: Work, calls: Sequence[Call]) -> str:
    """Identifies the denoiser's weights as they are now and the calls that are replayed."""
    return f"{state_digest(work.denoiser)} {training.state_folder('calls', '', work, calls).name}"


def ends(unet: Any, paths: Sequence[str] | Mapping[str, object]) -> tuple[str, ...]:
    """Those of `paths` that lie in the first or the last unit of the network, or in no unit."""
    units = list(family.units(unet))
    inner = [unit for unit in units[1:-1] if not _same_block(unit, units[0]) and not _same_block(unit, units[-1])]
    return tuple(path for path in paths if not any(f"{path}.".startswith(f"{unit}.") for unit in inner))


def _same_block(a: str, b: str) -> bool:
    """Whether two units are a ResBlock and the transformer behind it."""
    return a.split(".")[:2] == b.split(".")[:2] and a.rsplit(".", 1)[-1] == b.rsplit(".", 1)[-1]


class State:
    """What a pass has solved, a file for each package: an interrupted run goes on with the next one."""

    def __init__(self, work: Work, name: str, settings: object, calls: Sequence[Call]) -> None:
        key = hashlib.sha256(digest(work, calls).encode()).hexdigest()[:16]
        self.folder: Path = training.state_folder(name, (settings, key), work)

    def load(self, index: int) -> dict[str, Tensor] | None:
        """The tensors of a package, or None where it is not solved yet."""
        file = self._file(index)
        return load_file(file) if file.is_file() else None

    def save(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a package, whole or not at all."""
        training.save(tensors, self._file(index))

    def _file(self, index: int) -> Path:
        return self.folder / f"package-{index:03}.safetensors"


def short(text: str) -> str:
    """A name for what `text` says."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def growth(errors: Mapping[int, float]) -> Callable[[float], float]:
    """The squared error as a power of what goes, through the first and last that were measured (amount -> error).

    Measurements that are not finite do not count.
    """
    points = sorted((amount, max(error, 1e-12) ** 2) for amount, error in errors.items() if math.isfinite(error))
    if not points:  # whatever goes, the network overflows
        return lambda amount: math.inf if amount else 0.0
    (few, less), (many, more) = points[0], points[-1]
    power = 2.0 if few == many else math.log(max(more / less, 1.0)) / math.log(many / few)
    power = min(max(power, 1.0), STEEPEST)
    return lambda amount: more * (amount / many) ** power
