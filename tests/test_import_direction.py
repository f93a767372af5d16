"""Imports point downward only, and OpenVINO begins in one place: read from the source of every module."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "calibration", "compress", "engines", "export", "runtime")
HEAVY = {"torch", "diffusers", "transformers"}

# What each part may import of diffpress, besides itself and diffpress/__init__. ANY: it stands on top of everything.
ANY = {"diffpress"}
DATA = {"diffpress.plan", "diffpress.bundle", "diffpress.errors", "diffpress.evodiff", "diffpress.paths"}
ALLOWED: dict[str, set[str]] = {
    "diffpress": {"diffpress.dropin", "diffpress.errors"},  # within a function, not when it is imported
    "diffpress.plan": DATA,
    "diffpress.bundle": DATA,
    "diffpress.errors": DATA,
    "diffpress.gates": DATA,
    "diffpress.evodiff": DATA,
    "diffpress.segments": DATA,
    "diffpress.inspection": DATA | {"diffpress.gates", "diffpress.segments"},
    "diffpress.arguments": DATA | {"diffpress.gates"},
    "diffpress.paths": set(),
    "diffpress.engines": DATA,
    "diffpress.runtime": DATA | {"diffpress.engines"},
    "diffpress.calibration": DATA,
    "diffpress.compress": DATA | {"diffpress.calibration", "diffpress.gates"},
    "diffpress.export": DATA | {"diffpress.engines", "diffpress.compress.numerics", "diffpress.compress.families"},
    "diffpress.benchmarks": ANY,
    "diffpress.clock": DATA,
    "diffpress.standins": DATA | {"diffpress.runtime", "diffpress.clock"},
    "diffpress.dropin": DATA | {"diffpress.runtime", "diffpress.calibration", "diffpress.clock", "diffpress.standins"},
    "diffpress.api": ANY,
    "diffpress.cli": ANY,
    "diffpress.__main__": ANY,
}

# What each part may import from outside the standard library; a part that is not named may import anything.
EXTERNAL: dict[str, set[str]] = {
    "diffpress": set(),
    "diffpress.plan": {"numpy"},
    "diffpress.bundle": {"numpy"},
    "diffpress.errors": {"numpy"},
    "diffpress.evodiff": set(),  # numpy's arrays and torch's tensors alike, without either
    "diffpress.segments": set(),
    "diffpress.gates": set(),
    "diffpress.inspection": set(),
    "diffpress.paths": set(),
    # A target builds with these alone.
    "diffpress.engines": {"tqdm", "tensorrt", "tensorrt_rtx"},
    "diffpress.arguments": set(),
    # The base dependencies, the inference libraries and CUDA's own bindings.
    "diffpress.runtime": {"numpy", "PIL", "tqdm", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda"},
}


def modules() -> dict[str, Path]:
    """Maps the name of every module of the package to its file at the root or in src/."""
    files = [*(ROOT / "src/diffpress").glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))]
    found = {}
    for path in files:
        base = ROOT / "src/diffpress" if path.is_relative_to(ROOT / "src") else ROOT
        parts = path.relative_to(base).with_suffix("").parts
        found[".".join(("diffpress", *parts)).removesuffix(".__init__")] = path
    return found


def imports(source: str, module: str, is_package: bool, known: set[str]) -> Iterator[tuple[int, str]]:
    """Yields (line, module) for every import in `source`, those inside functions and under TYPE_CHECKING included."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                if level:
                    base = resolve_name("." * level + (base or ""), package)
                for alias in names:
                    full = f"{base}.{alias.name}"
                    yield node.lineno, full if full in known else str(base)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(target)), *_],
            ):
                yield node.lineno, target


def within(module: str, part: str) -> bool:
    """Says whether `module` is `part` or lies inside it."""
    return module == part or module.startswith(part + ".")


def part_of(module: str) -> str:
    """The part of the package that a module belongs to: its first two names."""
    return ".".join(module.split(".")[:2])


def violations(source: str, module: str, is_package: bool, known: set[str]) -> list[str]:
    """Lists the imports in `source` that the rules above do not allow."""
    part = part_of(module)
    if part not in ALLOWED:
        return [f"{module}: no rule for {part}; say in ALLOWED what it may import"]
    wrong = []
    for line, target in imports(source, module, is_package, known):
        if within(target, "diffpress"):
            itself = {part} - {"diffpress"}  # diffpress/__init__ does not own the modules beside it
            fine = target == "diffpress" or any(within(target, p) for p in ALLOWED[part] | itself)
        elif target.split(".")[0] in sys.stdlib_module_names or part not in EXTERNAL:
            fine = True
        else:
            fine = target.split(".")[0] in EXTERNAL[part]
        if not fine:
            wrong.append(f"{module}:{line} imports {target}")
    return wrong


def test_imports_point_downward() -> None:
    known = modules()
    assert {part_of(m) for m in known} >= {"diffpress", *(f"diffpress.{folder}" for folder in FOLDERS)}
    wrong = [
        violation
        for module, path in sorted(known.items())
        for violation in violations(path.read_text("utf-8"), module, path.name == "__init__.py", set(known))
    ]
    assert not wrong, "\n".join(wrong)


def test_openvino_has_one_core_in_a_process() -> None:
    """Those that end in another order than they began leave a stack for signals that is gone: Ctrl-C would crash."""
    makers = [module for module, path in modules().items() if "Core()" in path.read_text("utf-8")]
    assert makers == ["diffpress.runtime.open_vino"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("diffpress.runtime.sampler", "import torch"),
        ("diffpress.runtime.sampler", "def f():\n    from transformers import CLIPTokenizer"),
        ("diffpress.runtime.sampler", "import importlib\nimportlib.import_module('diffusers.models')"),
        ("diffpress.runtime.sampler", "from diffpress.compress.numerics import quantize"),
        ("diffpress.runtime.sampler", "from diffpress import compress"),
        ("diffpress.runtime.sampler", "from ..compress import numerics"),
        ("diffpress.runtime", "from ..compress import numerics"),
        ("diffpress.runtime", "from .. import compress"),
        ("diffpress.plan", "import yaml"),
        ("diffpress.plan", "from diffpress.runtime import sampler"),
        ("diffpress.calibration.record", "import diffpress.compress.recipe"),
        ("diffpress.compress.recipe", "import diffpress.export"),
        ("diffpress.export.onnx", "from diffpress.compress import recipe"),
        ("diffpress.export.onnx", "from diffpress import calibration"),
        ("diffpress.export.onnx", "from diffpress import cli"),
        ("diffpress.novelty", "import json"),
    ],
)
def test_a_violation_is_caught(module: str, source: str) -> None:
    known = {"diffpress.compress", "diffpress.calibration", "diffpress.cli", "diffpress.compress.recipe"}
    assert violations(source, module, is_package=module.count(".") == 1, known=known)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("diffpress.runtime.sampler", "import json, numpy\nfrom diffpress.plan import Plan\nfrom . import session"),
        ("diffpress.runtime.sampler", "from diffpress import __version__, errors"),
        ("diffpress.runtime", "from .sampler import sample"),
        ("diffpress.export.onnx", "import onnx\nfrom diffpress.compress.families import unet\nfrom .qdq import add"),
        ("diffpress.export.onnx", "from diffpress.compress import numerics"),
        ("diffpress.compress.recipe", "from ..calibration.statistics import Statistics"),
        ("diffpress.cli", "from diffpress import benchmarks, compress"),
    ],
)
def test_a_downward_import_passes(module: str, source: str) -> None:
    known = {"diffpress.compress", "diffpress.compress.numerics", "diffpress.benchmarks", "diffpress.errors"}
    assert not violations(source, module, is_package=module.count(".") == 1, known=known)


def test_runtime_loads_neither_torch_nor_diffusers_nor_transformers() -> None:
    names = sorted(m for m in modules() if part_of(m) in {"diffpress", "diffpress.runtime"} | DATA)
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = {HEAVY} & set(sys.modules)\n"
        "    assert not loaded, f'{name} loads {loaded}'\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
