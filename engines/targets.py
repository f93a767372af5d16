"""What each generation of NVIDIA GPUs can do, and which generations a user means. Standard library only.

Sources of the table:
  compute capabilities       https://developer.nvidia.com/cuda-gpus
  types                      support matrices of TensorRT and of TensorRT for RTX, "Hardware and Precision": bf16 from
                             Ampere, fp8 from Ada and Hopper (not Orin), fp4 from Blackwell; "Working with Quantized
                             Types": fp8 needs 8.9, fp4 needs 10.0. int4 weights: TensorRT for RTX 1.7 refuses them
                             below 8.0 (built here), as its matrix says.
  int8 on Turing             whole products of int8 build here; weights alone do not gain (the matrix: no int8 WoQ GEMM)
  2:4 sparsity               Ampere and newer: NVIDIA A100 whitepaper, "Structured sparsity"; Mishra et al. 2021
                             (arXiv 2104.08378). Turing's tensor cores have none.
  memory                     data sheets; of a generation that of its smaller cards, since an engine is for them as well
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from diffpress.errors import DiffpressError

ALL = "all"  # every target that the library builds for and that has the types
_TURING = frozenset({"fp32", "fp16", "int8"})
_AMPERE = _TURING | {"bf16", "int4"}
_ADA = _AMPERE | {"fp8"}
_BLACKWELL = _ADA | {"fp4"}


@dataclass(frozen=True)
class Generation:
    """GPUs of one compute capability: `types` that they compute with or decode, and what engines can count on."""

    architecture: str
    types: frozenset[str]
    sparse: bool  # 2:4 weights are multiplied twice as fast
    memory_gb: float  # of its smaller cards
    series: str  # for people


GENERATIONS: dict[str, Generation] = {
    "sm75": Generation("Turing", _TURING, False, 8, "GeForce RTX 20, T4"),
    "sm80": Generation("Ampere", _AMPERE, True, 24, "A100, A30"),
    "sm86": Generation("Ampere", _AMPERE, True, 8, "GeForce RTX 30, RTX A2000 to A6000, A10"),
    "sm87": Generation("Ampere", _AMPERE, True, 8, "Jetson Orin"),
    "sm89": Generation("Ada Lovelace", _ADA, True, 8, "GeForce RTX 40, L4, L40"),
    "sm90": Generation("Hopper", _ADA, True, 80, "H100, H200"),
    "sm100": Generation("Blackwell", _BLACKWELL, True, 180, "B200, GB200"),
    "sm103": Generation("Blackwell", _BLACKWELL, True, 268, "B300, GB300"),
    "sm110": Generation("Blackwell", _BLACKWELL, True, 128, "Jetson Thor"),
    "sm120": Generation("Blackwell", _BLACKWELL, True, 8, "GeForce RTX 50, RTX PRO Blackwell"),
    "sm121": Generation("Blackwell", _BLACKWELL, True, 128, "DGX Spark"),
}

# Generation to its GPUs and their memory in GB; of one with several sizes the smallest.
_CARDS: dict[str, dict[str, int]] = {
    "sm75": {"t4": 16, "titan-rtx": 24, "rtx-2060": 6, "rtx-2070": 8, "rtx-2080": 8, "rtx-2080-ti": 11}
    | {"quadro-rtx-4000": 8, "quadro-rtx-5000": 16, "quadro-rtx-6000": 24, "quadro-rtx-8000": 48},
    "sm80": {"a100": 40, "a30": 24},
    "sm86": {"rtx-3050": 6, "rtx-3060": 8, "rtx-3060-ti": 8, "rtx-3070": 8, "rtx-3070-ti": 8, "rtx-3080": 10}
    | {"rtx-3080-ti": 12, "rtx-3090": 24, "rtx-3090-ti": 24, "rtx-a2000": 6, "rtx-a4000": 16, "rtx-a5000": 24}
    | {"rtx-a6000": 48, "a2": 16, "a10": 24, "a16": 16, "a40": 48},
    "sm87": {"jetson-orin": 8, "jetson-orin-nano": 4, "jetson-orin-nx": 8, "jetson-agx-orin": 32},
    "sm89": {"rtx-4050": 6, "rtx-4060": 8, "rtx-4060-ti": 8, "rtx-4070": 12, "rtx-4070-super": 12, "rtx-4070-ti": 12}
    | {"rtx-4070-ti-super": 16, "rtx-4080": 16, "rtx-4080-super": 16, "rtx-4090": 24, "rtx-4000-ada": 20}
    | {"rtx-5000-ada": 32, "rtx-6000-ada": 48, "l4": 24, "l40": 48, "l40s": 48},
    "sm90": {"h100": 80, "h200": 141, "gh200": 96},
    "sm100": {"b200": 180, "gb200": 186},
    "sm103": {"b300": 268, "gb300": 278},
    "sm110": {"jetson-thor": 128},
    "sm120": {"rtx-5050": 8, "rtx-5060": 8, "rtx-5060-ti": 8, "rtx-5070": 12, "rtx-5070-ti": 16, "rtx-5080": 16}
    | {"rtx-5090": 32, "rtx-pro-4000": 24, "rtx-pro-5000": 48, "rtx-pro-6000": 96},
    "sm121": {"dgx-spark": 128, "gb10": 128},
}
GPUS: dict[str, tuple[str, float]] = {
    name: (target, memory) for target, cards in _CARDS.items() for name, memory in cards.items()
}

# What to compress with where a type is missing, the nearer in size first; every generation has the last.
_INSTEAD = {"fp4": ("fp8", "int4", "int8"), "fp8": ("int8",), "int4": ("int8",), "bf16": ("fp16",)}
_FORMATS = ("fp4", "fp8", "int4", "bf16")  # that some generation lacks


@dataclass(frozen=True)
class Target:
    """A generation to build for; `gpus` of it were asked for by name, on `memory_gb` the engines may count."""

    name: str  # "sm89"
    gpus: tuple[str, ...]
    memory_gb: float


def generation(name: str) -> str:
    """The target ("sm89") of a compute capability or the name of a GPU; raises `DiffpressError` for an unknown one."""
    word = _plain(name)
    if word in GENERATIONS:
        return word
    if word in GPUS:
        return GPUS[word][0]
    raise DiffpressError(
        f"there is no target '{name}': give a compute capability ({', '.join(GENERATIONS)}) or a GPU by name, such as "
        "rtx-4090, jetson-orin, dgx-spark"
    )


def select(
    asked: Sequence[str], buildable: Sequence[str], library: str, types: Collection[str] = (), what: str = "the bundle"
) -> list[Target]:
    """What to build for: `asked` as compute capabilities, names of GPUs or "all", in this order, each target once.

    `buildable` are the targets of the installed `library`. "all" leaves out those that lack one of `types`; a target
    that was named must have them. Raises `DiffpressError` that says what to do instead, before any work.
    """
    named = [word for word in asked if _plain(word) != ALL]
    chosen = dict.fromkeys(_buildable(word, buildable, library) for word in named)
    check_types(types, list(chosen), what)
    if len(named) < len(asked):
        fitting = [target for target in buildable if not missing(types, target)]
        if not fitting:
            raise DiffpressError(f"{library} builds for no target that has {_words(types)}; {_choice(buildable)}")
        chosen |= dict.fromkeys(fitting)
    if not chosen:
        raise DiffpressError(f"{library} cannot build for an empty list of targets; {_choice(buildable)}")
    return [_target(name, named) for name in chosen]


def missing(types: Collection[str], target: str) -> list[str]:
    """Those of `types` that the GPUs of a target lack; a target that the table does not know has all."""
    known = GENERATIONS.get(target)
    return [] if known is None else [kind for kind in _FORMATS if kind in types and kind not in known.types]


def check_types(types: Collection[str], targets: Sequence[str], what: str) -> None:
    """Raise `DiffpressError` when a target lacks one of `types` ("fp8", "int4", ...), which `what` needs."""
    for target in targets:
        for kind in missing(types, target):
            least = next(name for name, entry in GENERATIONS.items() if kind in entry.types)
            known = GENERATIONS[target].types
            instead = next(other for other in _INSTEAD[kind] if other in known)
            raise DiffpressError(
                f"{what} needs {kind}, which {target} does not have: build for {least} or newer, or compress with "
                f"format {instead}"
            )


def as_json(target: Target) -> dict[str, object]:
    """What a sidecar says about the GPUs of a target."""
    known = GENERATIONS.get(target.name)
    return {
        "target": target.name,
        "compute_capability": f"{target.name[2:-1]}.{target.name[-1]}",
        "architecture": known and known.architecture,
        "series": known and known.series,
        "gpus": list(target.gpus) or [name for name, (other, _) in GPUS.items() if other == target.name],
    }


def _buildable(word: str, buildable: Sequence[str], library: str) -> str:
    name = _plain(word)
    target = GPUS[name][0] if name in GPUS else name
    if target in buildable:
        return target
    known = GENERATIONS.get(target)
    if known is None:
        hint = ", or GPUs by name such as rtx-4090 and dgx-spark"
    else:
        hint = (
            f". Engines for {target} ({known.series}) are built on the machine itself, with the full TensorRT: "
            f"'diffpress pack BUNDLE --target {target}' makes a file that carries the graphs and builds them on first "
            "start"
        )
    raise DiffpressError(f"{library} cannot build for target '{word}'; {_choice(buildable)}{hint}")


def _target(name: str, asked: Sequence[str]) -> Target:
    gpus = tuple(dict.fromkeys(word for word in map(_plain, asked) if word in GPUS and GPUS[word][0] == name))
    sizes = [GPUS[gpu][1] for gpu in gpus]
    if name in map(_plain, asked) or not gpus:  # any card of the generation
        sizes.append(GENERATIONS[name].memory_gb if name in GENERATIONS else 8)
    return Target(name, gpus, min(sizes))


def _choice(buildable: Sequence[str]) -> str:
    return "supported: " + (", ".join(buildable) or "none, because it builds for this machine's GPU and there is none")


def _words(types: Collection[str]) -> str:
    return " and ".join(kind for kind in _FORMATS if kind in types)


def _plain(name: str) -> str:
    """A name as the tables have it: "NVIDIA GeForce RTX 4090" is rtx-4090."""
    word = re.sub(r"[\s_-]+", "-", name.strip().lower())
    word = re.sub(r"^nvidia-", "", word)
    return re.sub(r"^(geforce-)?rtx-?(?=\d)", "rtx-", word)
