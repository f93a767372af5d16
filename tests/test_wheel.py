"""The wheel: one top-level name, everything in it, and a console script that works where nothing else is installed."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
FOLDERS = ("benchmarks", "calibration", "compress", "engines", "export", "runtime")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Runs a command and returns what it printed; a failure shows both of its outputs."""
    # A PYTHONPATH of the caller's would put the tree before the wheel.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sources() -> list[Path]:
    """The project's files, relative to the root: what git tracks or would track. Links stand for themselves."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    return [Path(name) for name in sorted(set(listed) - {""}) if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that no earlier build can put its leftovers into it."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in sources:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, copy)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean_bin(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of an environment that holds the wheel and the base dependencies, nothing else.

    The dependencies are links to the copies installed here, so that the test needs no network; which ones they are is
    read from the wheel, so a base dependency that is used but not declared is missed here as it would be anywhere.
    """
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, symlinks=True)
    paths = sysconfig.get_paths("venv", {"base": str(home), "platbase": str(home)})
    scripts, packages = Path(paths["scripts"]), Path(paths["purelib"])
    run(sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--no-index", "--no-deps", wheel)
    (installed,) = importlib.metadata.distributions(name="diffpress", path=[str(packages)])
    for requirement in installed.requires or []:
        if "extra ==" in requirement:
            continue
        dependency = importlib.metadata.distribution(re.split(r"[^\w.-]", requirement)[0])
        for name in {file.parts[0] for file in dependency.files or []} - {"..", "__pycache__"}:
            (packages / name).symlink_to(Path(str(dependency.locate_file(name))))
    return scripts


def test_one_top_level_name(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert names == {"diffpress", f"diffpress-{VERSION}.dist-info"}


def test_every_module_and_data_file_is_in_the_wheel(wheel: Path, sources: list[Path]) -> None:
    expected = {}
    for path in sources:
        if (ROOT / path).is_symlink():
            continue  # the links themselves: what lies behind them is listed at the root
        if path.parts[0] in FOLDERS:
            expected[Path("diffpress", path).as_posix()] = path
        elif path.is_relative_to("src/diffpress"):
            expected[path.relative_to("src").as_posix()] = path
    with zipfile.ZipFile(wheel) as archive:
        packed = {info.filename: info.file_size for info in archive.infolist() if "dist-info" not in info.filename}
    missing = sorted(expected.keys() - packed.keys())
    assert not missing, "add them to package-data in pyproject.toml, or an __init__.py to their folder"
    assert packed == {name: (ROOT / path).stat().st_size for name, path in expected.items()}


def test_folders_are_links(sources: list[Path]) -> None:
    for folder in FOLDERS:
        link = ROOT / "src/diffpress" / folder
        assert link.is_symlink() and link.readlink() == Path("../..", folder)
    packages = {path.parent for path in sources if path.suffix == ".py" and path.parts[0] in FOLDERS}
    assert not [str(p) for p in packages if not (ROOT / p / "__init__.py").exists()]
    assert not [str(p) for p in sources if p.name == "__init__.py" and p.parts[0] in {"__init__.py", "tests"}]


def test_console_script_works_from_a_clean_environment(clean_bin: Path, tmp_path: Path) -> None:
    assert VERSION in run(clean_bin / "diffpress", "--version", cwd=tmp_path)
    assert "usage" in run(clean_bin / "diffpress", "--help", cwd=tmp_path).lower()


def test_clean_environment_holds_only_the_base(clean_bin: Path, tmp_path: Path) -> None:
    found = "import importlib.util as u; print(*[m for m in ('torch', 'diffusers', 'yaml', 'pip') if u.find_spec(m)])"
    assert run(clean_bin / "python", "-c", found, cwd=tmp_path).split() == []
    where = run(clean_bin / "python", "-c", "import diffpress.runtime as r; print(r.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(clean_bin.parent)
