"""Packages: what they hold, that they run as the bundle does, and everything that must be refused of one."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffpress import bundle, cli
from diffpress.bundle import MANIFEST, Bundle
from diffpress.engines.build import build
from diffpress.engines.prepared import Graph, Prepared
from diffpress.engines.targets import Target
from diffpress.errors import DiffpressError
from diffpress.export import buildable
from diffpress.runtime import lock, matching, package
from diffpress.runtime.cuda import Gpu
from diffpress.runtime.matching import Machine
from diffpress.runtime.opening import choose_opening
from diffpress.runtime.pack import identity, pack
from diffpress.runtime.package import opened, unpack
from diffpress.runtime.pipeline import Pipeline

ROOT = Path(__file__).parents[2]
Make = Callable[..., Path]
Add = Callable[..., Bundle]
ORIN = Gpu("Orin", "sm87", 8 << 30, True)


@pytest.fixture
def source(make: Make) -> Bundle:
    return bundle.load(make())


@pytest.fixture
def box(source: Bundle, tmp_path: Path) -> Path:
    return pack(source, ["cpu"], tmp_path / "box.tar", progress=False)


def members(file: Path) -> dict[str, bytes]:
    with tarfile.open(file) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def written(file: Path, contents: Mapping[str, bytes], **changes: Mapping[str, Any]) -> Path:
    """An archive of these files; `changes`: of an entry's header, by the file's name with _ for what is no letter."""
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in changes.get("".join(c if c.isalpha() else "_" for c in name), {}).items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(content))
    return file


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "diffusers", "transformers", "tokenizers", "onnx", "onnx_ir", "onnxscript"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
from diffpress.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_package_draws_what_the_bundle_draws_where_torch_cannot_be_imported(
    source: Bundle, box: Path, tmp_path: Path, backend: str
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    shutil.copy(box, target)
    words = ["run", target / "box.tar", "a red circle", "-o", target / "out.png", "--seed", "5", "--backend", backend]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HOME": str(target / "home")}
    command = [sys.executable, "-c", BLOCKED, *map(str, words), "--quiet", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    wanted = Pipeline.load(source, backend, "fp32", threads=1)(["a red circle"], [5])
    with Image.open(target / "out.png") as image:
        np.testing.assert_array_equal(np.asarray(image), wanted.pixels[0])
    assert sorted(path.name for path in target.iterdir()) == [
        ".box.unpacked.lock",
        "box.tar",
        "box.unpacked",
        "out.png",
    ]


def test_it_holds_what_the_target_needs_and_is_the_same_each_time(
    source: Bundle, box: Path, add_engines: Add, tmp_path: Path
) -> None:
    with tarfile.open(box) as archive:
        entries = archive.getmembers()
    names = [entry.name for entry in entries]
    assert names[0] == MANIFEST and names[1:] == sorted(names[1:])
    assert {(entry.mtime, entry.uid, entry.gid, entry.uname, entry.mode) for entry in entries} == {(0, 0, 0, "", 0o644)}
    assert {name for name in names if name.endswith(".onnx")} == {
        "text_encoder/model.onnx",
        "unet/model.onnx",
        "unet/cached.onnx",
        "vae_decoder/model.onnx",
    }
    assert "tokenizer/tokenizer.json" in names and not any(name.startswith(("plan/", "engines/")) for name in names)
    shutil.copytree(source.path, tmp_path / "elsewhere" / "bundle")
    again = pack(bundle.load(tmp_path / "elsewhere/bundle"), ["cpu"], tmp_path / "again.tar", progress=False)
    assert again.read_bytes() == box.read_bytes()

    built = add_engines(add_engines(source), target="sm86")
    one = pack(built, ["sm86"], tmp_path / "one.tar", progress=False)
    held = members(one)
    assert {name for name in held if "engines/" in name} == {
        f"engines/sm86/{name}.{end}"
        for name in ("full", "cached", "text_encoder", "vae_decoder")
        for end in ("engine", "json")
    }
    assert not any(".onnx" in name for name in held)
    assert {entry["target"] for entry in json.loads(held[MANIFEST])["engines"]} == {"sm86"}
    both = members(pack(built, ["sm86", "sm89"], tmp_path / "both.tar", graphs=True, progress=False))
    assert "engines/sm89/full.engine" in both and "unet/model.onnx" in both


def test_engines_of_a_package_run_and_have_nothing_to_fall_back_on(
    source: Bundle, add_engines: Add, plug_in: Callable[..., Any], tmp_path: Path
) -> None:
    built = add_engines(source)
    wanted = Pipeline.load(source, "onnxruntime", threads=1)(["a red circle"], [1])
    file = pack(built, ["sm89"], tmp_path / "box.tar", progress=False)
    plug_in()
    pipeline = Pipeline.load(file)
    assert pipeline.backend == "tensorrt"
    assert np.abs(pipeline(["a red circle"], [1]).pixels.astype(int) - wanted.pixels).max() <= 1
    plug_in((8, 6))
    for fallback in (False, True):
        with pytest.raises(DiffpressError, match="has engines for sm89, this GPU is a Fake RTX 4090"):
            Pipeline.load(file, fallback=fallback)
    with pytest.raises(DiffpressError, match="holds engines for sm89 and no graphs, which onnxruntime runs"):
        Pipeline.load(file, "onnxruntime")
    other = members(
        pack(built, ["sm80", "sm89"], tmp_path / "other.tar", graphs=True, progress=False, prepare=buildable.prepare)
    )
    assert json.loads(other[MANIFEST])["package"]["build"]["targets"] == ["sm80"]
    with_graphs = pack(built, ["sm89"], tmp_path / "graphs.tar", graphs=True, progress=False)
    assert Pipeline.load(with_graphs, fallback=True).backend == "onnxruntime"


def test_the_encoder_of_pictures_goes_along_when_asked(
    source: Bundle, add_engines: Add, plug_in: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(DiffpressError, match="has no vae_encoder, which image-to-image needs"):
        pack(source, ["cpu"], tmp_path / "box.tar", image_to_image=True, progress=False)
    shutil.copytree(source.file("vae_decoder"), source.file("vae_encoder"))
    built = add_engines(bundle.update(source))
    graph = "vae_encoder/model.onnx"
    assert graph not in members(pack(built, ["cpu", "sm89"], tmp_path / "without.tar", progress=False))
    assert graph in members(pack(built, ["cpu"], tmp_path / "cpu.tar", image_to_image=True, progress=False))
    file = pack(built, ["sm89"], tmp_path / "sm89.tar", image_to_image=True, progress=False)
    assert {name for name in members(file) if name.endswith(".onnx")} == {graph}  # no engine was built of it
    plug_in()
    names, encoder = ["full", "cached", "text_encoder", "vae_decoder"], ["vae_encoder"]
    opening = choose_opening(opened(file, progress=False), names, optional=encoder)
    assert opening.backend == "tensorrt" and list(opening.engines) == names
    latent = {"latent_sample": np.zeros((1, 4, 4, 4), np.float32)}
    assert opening.component("vae_encoder", "fp32").run(latent)["sample"].shape == (1, 3, 8, 8)
    whole = add_engines(built, components=("text_encoder", "vae_decoder", "vae_encoder"))
    engine = pack(whole, ["sm89"], tmp_path / "engine.tar", image_to_image=True, progress=False)
    assert not any(name.endswith(".onnx") for name in members(engine))
    assert "engines/sm89/vae_encoder.engine" not in members(pack(whole, ["sm89"], tmp_path / "no.tar", progress=False))
    opening = choose_opening(opened(engine, progress=False), names, optional=encoder)
    assert list(opening.engines) == names + encoder
    assert opening.component("vae_encoder", "fp32").run(latent)["sample"].shape == (1, 3, 8, 8)
    with pytest.raises(DiffpressError, match=r"does not list the file unet/model\.onnx"):
        opening.file("other", "unet/model.onnx")


@pytest.mark.parametrize(
    ("targets", "output", "message"),
    [
        (["sm89"], "box.tar", "has no engines for sm89: run diffpress build .* --target sm89 first"),
        (["sm70"], "box.tar", "there is no target 'sm70'"),
        (["cuda"], "box.tar", "there is no target 'cuda'"),
        ([], "box.tar", "name at least one target"),
        (["cpu"], "box.zip", r"box\.zip must end in \.tar"),
        (["cpu"], "taken.tar", r"taken\.tar exists already"),
        (["cpu"], "nowhere/box.tar", "there is no folder"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    source: Bundle, targets: list[str], output: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "taken.tar").write_text("mine")
    with pytest.raises(DiffpressError, match=message):
        pack(source, targets, tmp_path / output, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "taken.tar"}
    assert (tmp_path / "taken.tar").read_text() == "mine"


def test_engines_of_other_graphs_are_not_packed(source: Bundle, add_engines: Add, tmp_path: Path) -> None:
    built = add_engines(source)
    file = built.file("unet/cached.onnx")
    file.write_bytes(file.read_bytes() + b"\x72\x00")  # an empty name: another file, the same graph
    with pytest.raises(DiffpressError, match=r"cached\.engine was built from another graph"):
        pack(bundle.update(built), ["sm89"], tmp_path / "box.tar", progress=False)
    fewer = [entry for entry in built.manifest["engines"] if entry["component"] != "vae_decoder"]
    with pytest.raises(DiffpressError, match="has no sm89 engine of vae_decoder: run diffpress build"):
        pack(bundle.update(source, engines=fewer), ["sm89"], tmp_path / "box.tar", progress=False)


def test_it_is_unpacked_once_and_again_when_it_is_another(source: Bundle, box: Path) -> None:
    first = opened(box, progress=False)
    assert first.path == box.with_suffix(".unpacked")
    mark = first.path / "unet/model.onnx"
    before = mark.stat().st_mtime_ns
    assert opened(box, progress=False).path == first.path and mark.stat().st_mtime_ns == before
    box.unlink()
    pack(bundle.update(source, measured={"speedup": 3}), ["cpu"], box, progress=False)
    again = opened(box, progress=False)
    assert again.manifest["measured"] == {"speedup": 3} and mark.stat().st_mtime_ns > before
    mark.write_bytes(mark.read_bytes()[:-1] + b"x")
    with pytest.raises(DiffpressError, match=r"unet/model\.onnx has changed"):
        opened(box, progress=False)


def test_what_lies_in_the_way_is_not_removed(box: Path) -> None:
    folder = box.with_suffix(".unpacked")
    folder.mkdir()
    (folder / "mine").write_text("mine")
    with pytest.raises(DiffpressError, match="is not a bundle"):
        opened(box, progress=False)
    assert (folder / "mine").read_text() == "mine"


def test_beside_a_package_that_cannot_be_written_the_cache_is_used(
    box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package.os, "access", lambda path, mode: False)
    monkeypatch.setenv("DIFFPRESS_CACHE", str(tmp_path / "cache"))
    made = opened(box, progress=False)
    assert made.path.is_relative_to(tmp_path / "cache") and not box.with_suffix(".unpacked").exists()


def changed_manifest(held: Mapping[str, bytes], honest: bool = True, **changes: Any) -> dict[str, bytes]:
    """The files with entries of the manifest changed; `honest` with an identity that fits."""
    manifest = json.loads(held[MANIFEST]) | changes
    if honest:
        manifest["package"]["id"] = identity(manifest)
    return {**held, MANIFEST: json.dumps(manifest).encode()}


def with_file(held: Mapping[str, bytes], name: str, content: bytes = b"x") -> dict[str, bytes]:
    """The files and one more, which the manifest lists."""
    manifest = json.loads(held[MANIFEST])
    files = manifest["files"] | {name: hashlib.sha256(content).hexdigest()}
    size = {**manifest["package"], "bytes": manifest["package"]["bytes"] | {name: len(content)}}
    return {**changed_manifest(held, files=files, package=size), name: content}


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: with_file(held, "../outside"), "a link or a path that leads out of it"),
        (lambda held: with_file(held, "/tmp/outside"), "a link or a path that leads out of it"),
        (lambda held: with_file(held, "a/../../outside"), "a link or a path that leads out of it"),
        (lambda held: with_file(held, "..\\outside"), "a link or a path that leads out of it"),
        (lambda held: with_file(held, "C:outside"), "a link or a path that leads out of it"),
        (lambda held: {**held, "more": b"x"}, "holds more, which its manifest does not list"),
        (
            lambda held: {**held, "unet/model.onnx": held["unet/model.onnx"] + b"x"},
            r"model\.onnx has \d+ bytes instead",
        ),
        (lambda held: {**held, "unet/model.onnx": b"x" + held["unet/model.onnx"][1:]}, r"model\.onnx has changed"),
        (
            lambda held: {k: v for k, v in held.items() if k != "unet/model.onnx"},
            r"is truncated, it lacks unet/model\.onnx",
        ),
        (lambda held: changed_manifest(held, honest=False, text={}), r"the manifest of .*box\.tar has changed"),
        (lambda held: {k: held[k] for k in sorted(held, reverse=True)}, "is not a package of diffpress"),
        (lambda held: {**held, MANIFEST: b"{}"}, "is not a package of diffpress"),
        (lambda held: {**held, MANIFEST: b"\xff"}, "is not a package of diffpress"),
        (lambda held: changed_manifest(held, format=2), "has format 2, this diffpress reads 1"),
    ],
)
def test_a_package_that_is_not_as_it_was_made_is_refused(
    box: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]], message: str, tmp_path: Path
) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    written(box, change(members(box)))
    with pytest.raises(DiffpressError, match=message) as caught:
        unpack(box, tmp_path / "made")
    assert "\n" not in str(caught.value)
    with pytest.raises(DiffpressError, match=message):
        opened(box, progress=False)
    assert {path.name for path in tmp_path.iterdir()} - {".box.unpacked.lock"} == before
    assert not (tmp_path.parent / "outside").exists() and not Path("/tmp/outside").exists()


@pytest.mark.parametrize(
    "header", [LINK, LINK | {"type": tarfile.LNKTYPE}, {"type": tarfile.DIRTYPE}, {"type": tarfile.CHRTYPE}]
)
def test_what_is_no_plain_file_is_refused(box: Path, tmp_path: Path, header: Mapping[str, Any]) -> None:
    written(box, members(box), unet_model_onnx=header)
    with pytest.raises(DiffpressError, match=r"holds unet/model\.onnx, a link or a path"):
        unpack(box, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_the_same_entry_twice_is_refused(box: Path, tmp_path: Path) -> None:
    held = members(box)
    with tarfile.open(box, "a") as archive:
        member = tarfile.TarInfo("unet/model.onnx")
        member.size = len(held["unet/model.onnx"])
        archive.addfile(member, io.BytesIO(held["unet/model.onnx"]))
    with pytest.raises(DiffpressError, match=r"holds unet/model\.onnx, which its manifest does not list so"):
        unpack(box, tmp_path / "made")


@pytest.mark.parametrize("where", ["nothing", "the manifest", "a header", "between files", "the last file"])
def test_a_truncated_package_is_refused(box: Path, where: str, tmp_path: Path) -> None:
    with tarfile.open(box) as archive:
        last = archive.getmembers()[-1]
    ends = {"nothing": 0, "the manifest": 600, "a header": last.offset + 100, "between files": last.offset}
    box.write_bytes(box.read_bytes()[: ends.get(where, last.offset_data + last.size // 2)])
    with pytest.raises(DiffpressError, match=r"not a whole package|is truncated|not a package"):
        unpack(box, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_too_little_space_is_said_before_work(box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with pytest.raises(DiffpressError, match=r"needs 0\.0 GB at .*, which has 0\.0 GB free"):
        unpack(box, tmp_path / "made")


# -- engines that are built on the target ---------------------------------------------------------------------------


@pytest.fixture
def orin(source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package for Jetson Orin, on a machine that has such a GPU and a fake TensorRT."""
    here = Machine(ORIN, {"tensorrt": "10.9.0.34"})
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: here))
    return pack(source, ["sm87"], tmp_path / "orin.tar", progress=False, prepare=buildable.prepare)


def counting(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0, error: BaseException | None = None) -> list[str]:
    """Replaces the library's part of a build; returns the names that were built, in order."""
    built: list[str] = []

    def one(
        opened: Bundle, graph: Graph, package: str, chosen: Sequence[Target], plans: Any, staging: Path, bar: Any
    ) -> list[dict[str, Any]]:
        time.sleep(seconds)
        built.append(graph.name)
        if error is not None and len(built) == 3:
            raise error
        (target,), (plan,) = chosen, plans
        assert (plan.target, plan.available) == ("sm87", int(ORIN.memory_bytes * 0.9))
        file = staging / target.name / f"{graph.name}.engine"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(graph.name.encode())
        sidecar = {
            "target": target.name,
            "component": "unet" if graph.denoiser else graph.name,
            "variant": graph.name if graph.denoiser else None,
            "precision": "fp32",
            "bytes": len(graph.name),
            "seconds": 0.1,
            "sha256": dict(graph.digests),
            "versions": {package: "10.9.0.34"},
        }
        file.with_suffix(".json").write_text(json.dumps(sidecar))
        return [{**sidecar, "path": f"engines/{target.name}/{graph.name}.engine"}]

    monkeypatch.setattr("diffpress.engines.build._build_graph", one)
    monkeypatch.setattr("diffpress.engines.library.find", lambda package: ModuleType(package))
    monkeypatch.setattr("diffpress.engines.library.present", lambda: ["sm87"])
    return built


def test_a_package_for_a_target_that_builds_itself_holds_graphs_and_what_is_known_of_them(
    orin: Path, source: Bundle, tmp_path: Path
) -> None:
    held = members(orin)
    manifest = json.loads(held[MANIFEST])
    assert {name for name in held if name.endswith(".onnx")} >= {"unet/model.onnx", "vae_decoder/model.onnx"}
    order = manifest["package"]["build"]
    assert order["targets"] == ["sm87"]
    graphs = Prepared.from_json(order["prepared"]).graphs
    assert [(graph.name, graph.file, graph.batches) for graph in graphs] == [
        ("full", "unet/model.onnx", ((1, 2, 2),)),
        ("cached", "unet/cached.onnx", ((1, 2, 2),)),
        ("text_encoder", "text_encoder/model.onnx", ((1, 2, 2),)),
        ("vae_decoder", "vae_decoder/model.onnx", ((1, 1, 1),)),
    ]
    with pytest.raises(DiffpressError, match="sm87 builds its own engines"):
        pack(source, ["sm87"], tmp_path / "other.tar", progress=False)
    assert not (tmp_path / "other.tar").exists()


def test_the_first_start_builds_and_the_next_does_not(orin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = counting(monkeypatch)
    first = opened(orin, progress=False)
    assert built == ["full", "cached", "text_encoder", "vae_decoder"]
    bundle.load(first.path)
    assert [entry["target"] for entry in first.manifest["engines"]] == ["sm87"] * 4
    assert opened(orin, progress=False).manifest == first.manifest and len(built) == 4
    other = Machine(ORIN, {"tensorrt": "10.9.0.35"})  # the library was replaced: built for it again
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: other))
    opened(orin, progress=False)
    assert len(built) == 8
    assert {path.name for path in orin.parent.iterdir() if path.name.startswith(".orin")} == {".orin.unpacked.lock"}


def test_two_at_once_build_once(orin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, found = counting(monkeypatch, seconds=0.1), []
    threads = [threading.Thread(target=lambda: found.append(opened(orin, progress=False))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 4 and len(found) == 3 and len({str(one.manifest) for one in found}) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DiffpressError("tensorrt cannot build")])
def test_a_build_that_stops_leaves_nothing_and_the_next_start_builds(
    orin: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting(monkeypatch, error=error)
    with pytest.raises(type(error)):
        opened(orin, progress=False)
    folder = orin.with_suffix(".unpacked")
    assert not (folder / "engines").exists() and bundle.load(folder).manifest["engines"] == []
    left = folder.with_name(f".{folder.name}.killed.engines")  # of a process that could not clean up
    left.mkdir()
    built = counting(monkeypatch)
    assert len(opened(orin, progress=False).manifest["engines"]) == len(built) == 4 and not left.exists()


def test_elsewhere_nothing_is_built(orin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = counting(monkeypatch)
    assert Pipeline.load(orin, "onnxruntime", threads=1)(["a red circle"], [1]).problem is None  # its graphs, as asked
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: None))
    with pytest.raises(DiffpressError, match="needs an NVIDIA GPU"):
        Pipeline.load(orin, "tensorrt")
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: Machine(ORIN, {})))
    with pytest.raises(DiffpressError, match=r"builds its engines on its first start, and tensorrt .* not installed"):
        opened(orin, progress=False)
    assert Pipeline.load(orin, fallback=True).backend in {"onnxruntime", "openvino"}
    assert built == []


def test_the_builder_builds_real_engines(source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library that builds without a GPU; its API is that of the one on the target."""
    trt = pytest.importorskip("tensorrt_rtx")
    here = Machine(Gpu("GeForce RTX 4090", "sm89", 24 << 30, False), {"tensorrt-rtx": str(trt.__version__)})
    file = pack(source, ["sm87"], tmp_path / "box.tar", progress=False, prepare=buildable.prepare)
    made = unpack(file, tmp_path / "box")
    prepared = Prepared.from_json(made.manifest["package"]["build"]["prepared"])
    built = build(made, prepared, ["sm89"], progress=False, package="tensorrt-rtx")
    bundle.load(built.path)
    chosen = matching.fitting(built, ["full", "cached", "text_encoder", "vae_decoder"], here)
    assert {engine.precision for engine in chosen.values()} == {"fp32"}
    sidecar = json.loads(built.file("engines/sm89/full.json").read_text())
    assert sidecar["shapes"]["sample"] == {"min": [1, 4, 4, 4], "opt": [2, 4, 4, 4], "max": [2, 4, 4, 4]}
    assert sidecar["shapes"]["timestep"] == {kind: [1] for kind in ("min", "opt", "max")}
    with pytest.raises(DiffpressError, match=r"tensorrt, which is needed to build engines, is not installed"):
        build(made, prepared, ["sm89"], progress=False, package="tensorrt")


def test_a_lock_is_free_when_its_holder_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom diffpress.runtime.lock import locked\n"
        "with locked(Path(sys.argv[1]), 'it sleeps'):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", script, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with (tmp_path / "lock").open("a+b") as stream:
            assert not lock._taken(stream)
        holder.kill()
    with lock.locked(tmp_path / "lock", "it sleeps"):
        pass


# -- the command line -----------------------------------------------------------------------------------------------


def test_pack_and_unpack_on_the_command_line(
    source: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "box.tar"
    assert cli.main(["pack", str(source.path), "--target", "cpu", "-o", str(file)]) == 0
    out = capsys.readouterr().out
    assert f"{file}: " in out and f"diffpress run {file}" in out
    assert cli.main(["unpack", str(file)]) == 0
    assert str(tmp_path / "box") in capsys.readouterr().out
    assert bundle.load(tmp_path / "box").manifest["package"]["targets"] == ["cpu"]
    picture = tmp_path / "out.png"
    for place in (file, tmp_path / "box"):
        assert cli.main(["run", str(place), "a red circle", "-o", str(picture), "--threads", "1", "--quiet"]) == 0
    assert cli.main(["inspect", str(tmp_path / "box")]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pack", "bundle", "--target", "cpu", "-o", "box.zip"], "must end in .tar"),
        (["pack", "none", "--target", "cpu", "-o", "new.tar"], "there is no bundle at none"),
        (["pack", "bundle", "--target", "sm89", "-o", "new.tar"], "has no engines for sm89"),
        (["pack", "bundle", "-o", "new.tar"], "required: --target"),
        (["unpack", "none.tar"], "there is no package at none.tar"),
        (["unpack", "bundle"], "there is no package at bundle"),
        (["unpack", "box.tar", "-o", "bundle"], "bundle exists already"),
        (["unpack", "junk.tar"], "junk.tar is not a"),
        (["run", "junk.tar", "a circle", "-o", "x.png"], "junk.tar is not a"),
        (["inspect", "box.tar"], "box.tar is a package, which only run takes: diffpress unpack box.tar"),
        (["run", "bundle", "a circle", "-o", "x.png", "--backend", "tensorrt"], "needs an NVIDIA GPU"),
        (["run", "bundle", "a circle", "-o", "x.png", "--backend", "openvino-gpu"], "sees no Intel GPU"),
    ],
)
def test_wrong_use_is_one_line(
    box: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(box.parent)
    monkeypatch.setattr(matching.cuda, "gpu", lambda: None)
    Path("junk.tar").write_bytes(b"junk" * 1000)
    before = {str(path) for path in Path(".").rglob("*") if not path.name.endswith(".lock")}
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("diffpress: error: ") and message in err and err.count("\n") == 1
    assert {str(path) for path in Path(".").rglob("*") if not path.name.endswith(".lock")} == before


def test_the_command_line_names_every_backend_and_precision() -> None:
    from diffpress import arguments
    from diffpress.runtime import backends

    assert set(arguments.BACKENDS) == {"auto", *backends.GRAPHS, *backends.ENGINES}
    assert set(arguments.PRECISIONS) == {"auto", *backends.PRECISIONS}
