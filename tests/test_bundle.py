import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from diffpress import bundle
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError

MANIFEST = {"graphs": {"full": "unet/model.onnx"}, "sampling": {}, "program": {}, "latent": {}}


@pytest.fixture
def small(tmp_path: Path) -> Bundle:
    with bundle.create(tmp_path / "b") as folder:
        (folder / "unet").mkdir()
        (folder / "unet/model.onnx").write_bytes(b"graph")
        (folder / "unet/model.onnx_data").write_bytes(b"weights")
        bundle.write_manifest(folder, MANIFEST)
    return bundle.load(tmp_path / "b")


def edit(opened: Bundle, **changes: Any) -> None:
    """Change the manifest by hand."""
    (opened.path / bundle.MANIFEST).write_text(json.dumps({**opened.manifest, **changes}))


def test_a_bundle_is_what_was_written(small: Bundle) -> None:
    assert sorted(small.manifest["files"]) == ["unet/model.onnx", "unet/model.onnx_data"]
    assert small.graph().read_bytes() == b"graph"
    assert bundle.problems(small) == []
    assert [path.name for path in small.path.parent.iterdir()] == ["b"]
    assert os.stat(small.path).st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), DiffpressError("no")])
def test_what_was_half_written_vanishes(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), bundle.create(tmp_path / "deep" / "b") as folder:
        (folder / "file").write_bytes(b"half")
        raise error
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DiffpressError, match="nothing was left there: No space left"), bundle.create(tmp_path / "b"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder", "appears"])
def test_what_exists_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "b"
    if kind == "file":
        target.write_text("mine")
    if kind == "folder":
        target.mkdir()
    with pytest.raises(DiffpressError, match="exists already"), bundle.create(target) as folder:
        assert kind == "appears"
        (folder / "file").write_bytes(b"ours")
        target.mkdir()
        (target / "mine").write_text("mine")
    assert target.read_text() == "mine" if kind == "file" else {p.name for p in target.iterdir()} <= {"mine"}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: (b.path / "unet/model.onnx_data").write_bytes(b"weighty"), r"unet/model.onnx_data has changed"),
        (lambda b: (b.path / "unet/model.onnx_data").unlink(), r"unet/model.onnx_data is missing"),
        (lambda b: edit(b, files={"../secret": "0"}), r"\.\./secret points outside the bundle"),
        (lambda b: edit(b, files={"/etc/passwd": "0"}), r"/etc/passwd points outside the bundle"),
    ],
)
def test_a_damaged_bundle_is_refused_and_still_read(small: Bundle, damage: Any, message: str) -> None:
    damage(small)
    with pytest.raises(DiffpressError, match=message):
        bundle.load(small.path)
    assert len(bundle.problems(bundle.read(small.path))) == 1


def test_a_link_that_leaves_the_bundle_is_refused(small: Bundle, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"graph")
    (small.path / "unet/model.onnx").unlink()
    (small.path / "unet/model.onnx").symlink_to(tmp_path / "elsewhere")
    assert bundle.problems(bundle.read(small.path)) == ["unet/model.onnx points outside the bundle"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a bundle"),
        (b"", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[1, 2]", "cannot be read"),
        (b"{}", "cannot be read"),
        (b'{"format": 99}', "has format 99, this diffpress reads format 1"),
        (b'{"format": 1}', "compress again"),
    ],
)
def test_a_broken_manifest_is_one_clear_error(small: Bundle, content: bytes | None, message: str) -> None:
    file = small.path / bundle.MANIFEST
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(DiffpressError, match=message) as caught:
        bundle.read(small.path)
    assert "\n" not in str(caught.value)


def test_no_bundle_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DiffpressError, match="there is no bundle at"):
        bundle.load(tmp_path / "nothing")


def test_an_update_takes_in_new_files_and_keeps_the_rest(small: Bundle) -> None:
    (small.path / "report").mkdir()
    (small.path / "report/report.json").write_text("{}")
    updated = bundle.update(small, measured={"speedup": 2})
    assert updated.manifest["measured"] == {"speedup": 2} and updated.manifest["graphs"] == MANIFEST["graphs"]
    assert "report/report.json" in bundle.load(small.path).manifest["files"]


def test_an_update_that_fails_leaves_the_manifest(small: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        bundle.update(small, measured={})
    monkeypatch.undo()
    assert bundle.load(small.path).manifest == small.manifest
