"""What is measured on a GPU: models, recipes, what runs them, and why something cannot run on a machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffpress.api import SHAPES_GUIDANCE
from diffpress.errors import DiffpressError
from diffpress.runtime import backends, tensor_rt

REFERENCE, PLAIN, CACHED, EIGHT = "reference", "uncompressed", "cached", "8-bit"
PRUNED, TOGETHER = "pruned", "together"
FP8_FROM = 89  # compute capability times ten: Ada Lovelace and Hopper are the first with products of E4M3
EAGER, COMPILED = "diffusers", "diffusers compiled"
LIBRARIES = ("onnxruntime-cuda", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class Model:
    """A pipeline to measure, and how it samples and is calibrated. Every row of it has the same schedule and seeds."""

    name: str
    steps: int
    guidance: float
    side: int  # of an image, in pixels
    calibration: Mapping[str, Any]
    rounds: int  # of single images


# Of `sd15` the architecture is Stable Diffusion 1.5's and the weights are random: its times are real, its images not.
MODELS = {
    "shapes": Model("shapes", 50, SHAPES_GUIDANCE, 32, {"prompts": 16, "steps": 10}, 40),
    "sd15": Model("sd15", 20, 7.5, 512, {"prompts": 4, "steps": 5}, 20),
}

_CACHE: Mapping[str, Any] = {"cache": {"interval": 3, "branch": 0}}
_INT8: Mapping[str, Any] = {"quantize": {"format": "int8"}}
_FP8: Mapping[str, Any] = {"quantize": {"format": "fp8"}}
_CUT: Mapping[str, Any] = {
    "prune-structured": {"ratio": 0.2, "allocation": "uniform", "budget": "balanced", "norm_groups": "even"}
}
_TWO_OF_FOUR: Mapping[str, Any] = {"prune-nm": {"refine": 0}}
# What is compressed, by the name of its rows, with their group and passes. What is not quantized is in half precision.
RECIPES: Mapping[str, tuple[str, tuple[Mapping[str, Any], ...]]] = {
    "fp16": (PLAIN, ()),
    "fp16, cached": (CACHED, (_CACHE,)),
    "int8": (EIGHT, (_INT8,)),
    "fp8": (EIGHT, (_FP8,)),
    "fp16, 20 % pruned": (PRUNED, (_CUT,)),
    "fp16, 2:4": (PRUNED, (_TWO_OF_FOUR,)),
    "int8, 2:4": (TOGETHER, (_TWO_OF_FOUR, _INT8)),
    "int8, cached": (TOGETHER, (_INT8, _CACHE)),
    "fp8, cached": (TOGETHER, (_FP8, _CACHE)),
    "int8, 20 % pruned, cached": (TOGETHER, (_CUT, _INT8, _CACHE)),
}
FLOAT = "fp32"
QUICK = ("fp16", "int8, cached")


@dataclass(frozen=True)
class Row:
    """One thing that is timed: a recipe, and what runs it."""

    runner: str
    recipe: str

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.runner}: {self.recipe}"

    @property
    def group(self) -> str:
        """What is compressed."""
        return REFERENCE if self.recipe == FLOAT else RECIPES[self.recipe][0]

    @property
    def in_torch(self) -> bool:
        """Whether diffusers' pipeline runs it."""
        return self.runner in (EAGER, COMPILED)

    @property
    def plain(self) -> Row:
        """The uncompressed row of the same runner."""
        return Row(self.runner, "fp16")


BASELINE = Row(EAGER, "fp16")  # what every row is timed beside
WHOLE = Row(EAGER, FLOAT)  # what images are compared with


def rows(quick: bool = False) -> list[Row]:
    """Every row, the reference and the baseline first; torch simulates 8 bits, which says nothing about time."""
    torch = ["fp16", "fp16, cached"]
    found = [WHOLE, *(Row(runner, recipe) for runner in (EAGER, COMPILED) for recipe in torch)]
    found += [Row(library, recipe) for library in LIBRARIES for recipe in RECIPES]
    if quick:
        found = [row for row in found if row.recipe in (*QUICK, FLOAT) and row.runner != COMPILED]
    return found


def document(model: Model, recipe: str) -> dict[str, Any]:
    """The recipe as a file would have it."""
    return {
        "name": recipe,
        "steps": model.steps,
        "guidance_scale": model.guidance,
        "calibration": dict(model.calibration),
        "passes": list(RECIPES[recipe][1]),
    }


def obstacle(row: Row, target: str, torch: str | None) -> str | None:
    """Why a row cannot run on a GPU of `target` ("sm89") with what is installed, in one line; None where it may.

    `torch` is where torch runs: "cuda", "cpu", or None where it is not installed.
    """
    if "fp8" in row.recipe and int(target.removeprefix("sm")) < FP8_FROM:
        return f"{target} has no FP8 arithmetic: sm{FP8_FROM} is the first that has"
    if row.in_torch:
        return _torch_obstacle(row, torch)
    try:
        if row.runner in backends.ENGINES:
            tensor_rt.library(row.runner)
        else:
            backends.check(row.runner, "fp32")
    except DiffpressError as error:
        return str(error)
    return None


def _torch_obstacle(row: Row, torch: str | None) -> str | None:
    if torch is None or importlib.util.find_spec("diffusers") is None:
        return "torch and diffusers are not both installed: pip install 'diffpress[compress]'"
    if torch != "cuda" and row.recipe != FLOAT:  # the reference may take its time on the CPU
        return "the installed torch does not see this GPU: install a build of it for CUDA"
    if row.runner == COMPILED and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton on a GPU: pip install triton"
    return None


def torch_place() -> str | None:
    """Where torch runs here: "cuda", "cpu", or None where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def by_runner(chosen: Sequence[Row], fits: Callable[[Row], bool]) -> dict[str, list[Row]]:
    """The rows that can be timed, by what runs them: these are timed together."""
    found: dict[str, list[Row]] = {}
    for row in chosen:
        if fits(row):
            found.setdefault(row.runner, []).append(row)
    return found
