"""What is said where an optional package cannot be used."""

import sys
from pathlib import Path

import pytest

from diffpress.errors import DiffpressError, require

BROKEN = {
    "raises": "raise ImportError('needs\\nmore')",
    "names": "from pathlib import absent",
    "loads": "raise OSError('lib.so: cannot open shared object file')",
    "wraps": "try:\n    raise RuntimeError('operator nms does not exist')\n"
    "except RuntimeError as error:\n    raise ModuleNotFoundError('set the verbosity') from error",
}  # fmt: skip
SAID = {
    "raises": "needs",
    "names": r"cannot import name 'absent' from 'pathlib' \(.*\)",
    "loads": "lib.so: cannot open shared object file",
    "wraps": "operator nms does not exist",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_package_that_does_not_import_is_not_called_absent(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{name}_package.py").write_text(BROKEN[name])
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        DiffpressError, match=f"'{name}_package' is installed, but cannot be imported.* run it: {SAID[name]}$"
    ):
        require(f"{name}_package", "cpu", "run it")
    assert f"{name}_package" not in sys.modules


def test_an_absent_package_is_named_with_what_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "present_package.py").write_text("import absent_package")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("absent_package", "present_package"):
        with pytest.raises(
            DiffpressError, match=r"'absent_package' is not installed.*: pip install 'diffpress\[cpu\]'$"
        ):
            require(module, "cpu", "run it")
