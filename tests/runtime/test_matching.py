"""Engines that fit a machine, and one line for each way in which they do not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress import bundle
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError
from diffpress.runtime import backends, matching, opening
from diffpress.runtime.cuda import Gpu
from diffpress.runtime.matching import Machine, Mismatch
from diffpress.runtime.pipeline import Pipeline

NAMES = ("full", "cached", "text_encoder", "vae_decoder")
ADA = Gpu("GeForce RTX 4090", "sm89", 24 << 30, False)
Add = Callable[..., Bundle]


@pytest.fixture
def built(make: Callable[..., Path], add_engines: Add) -> Bundle:
    return add_engines(bundle.load(make()))


def machine(gpu: Gpu = ADA, **versions: str) -> Machine:
    return Machine(gpu, {name.replace("_", "-"): version for name, version in versions.items()})


def test_engines_of_this_gpu_and_library_are_chosen(built: Bundle, add_engines: Add) -> None:
    both = add_engines(built, target="sm86")
    chosen = matching.fitting(both, NAMES, machine(tensorrt="10.9.0.34"))
    assert list(chosen) == list(NAMES) and {engine.target for engine in chosen.values()} == {"sm89"}
    assert chosen["full"].path == "engines/sm89/full.engine" and chosen["full"].library == "tensorrt"
    rtx = add_engines(built, library="tensorrt-rtx", version="1.7.1.116")
    found = matching.fitting(rtx, NAMES, machine(tensorrt="10.9.0.34", tensorrt_rtx="1.7.1.116"))
    assert {engine.library for engine in found.values()} == {"tensorrt-rtx"}


@pytest.mark.parametrize(
    ("here", "library", "message"),
    [
        (None, None, "an engine needs an NVIDIA GPU and its driver, and there is none here"),
        (
            machine(),
            None,
            r"built with tensorrt 10\.9\.0\.34, which is not installed: pip install tensorrt==10\.9\.0\.34",
        ),
        (
            machine(tensorrt="10.9.0.35"),
            None,
            r"built with tensorrt 10\.9\.0\.34, 10\.9\.0\.35 is installed, .* own version only: pip install tensorrt==",
        ),
        (
            machine(Gpu("GeForce RTX 3060", "sm86", 12 << 30, False), tensorrt="10.9.0.34"),
            None,
            r"has engines for sm89, this GPU is a GeForce RTX 3060 \(sm86\): diffpress build .*bundle --target sm86",
        ),
        (machine(tensorrt_rtx="1.7.1"), "tensorrt-rtx", "has no sm89 engines of tensorrt-rtx: use --backend auto"),
    ],
)
def test_a_mismatch_is_one_line_that_says_what_to_do(
    built: Bundle, here: Machine | None, library: str | None, message: str
) -> None:
    with pytest.raises(Mismatch, match=message) as caught:
        matching.fitting(built, NAMES, here, library)
    assert "\n" not in str(caught.value)


def changed_sidecar(built: Bundle, **changes: Any) -> Bundle:
    file = built.file("engines/sm89/full.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return bundle.update(built)


def test_engines_that_do_not_belong_to_the_bundle_are_refused(built: Bundle) -> None:
    here = machine(tensorrt="10.9.0.34")
    with pytest.raises(Mismatch, match="no sm89 engine of vae_encoder: diffpress build"):
        matching.fitting(built, (*NAMES, "vae_encoder"), here)
    with pytest.raises(Mismatch, match=r"full\.engine was built from another graph than the bundle's"):
        matching.fitting(changed_sidecar(built, sha256={"unet/model.onnx": "0" * 64}), NAMES, here)
    with pytest.raises(Mismatch, match=r"full\.engine has \d+ bytes instead of 7"):
        matching.fitting(
            changed_sidecar(built, sha256={"unet/model.onnx": built.manifest["files"]["unet/model.onnx"]}, bytes=7),
            NAMES,
            here,
        )
    for changes in ({"versions": {}}, {"versions": {"other": "1"}}, {"sha256": []}, {"bytes": "many"}):
        with pytest.raises(DiffpressError, match="engines are not as diffpress wrote them"):
            matching.fitting(changed_sidecar(built, **{"versions": {"tensorrt": "1"}, **changes}), NAMES, here)
    built.file("engines/sm89/full.json").unlink()
    with pytest.raises(DiffpressError, match=r"does not list engines/sm89/full\.engine and its sidecar"):
        matching.listed(bundle.update(built))


@pytest.mark.parametrize("path", ["../full.engine", "/etc/passwd", "engines/../../full.engine"])
def test_an_engine_outside_the_bundle_is_refused(built: Bundle, path: str) -> None:
    entries = [{**entry, "path": path} for entry in built.manifest["engines"]]
    outside = {path: "0" * 64, path.removesuffix(".engine") + ".json": "0" * 64}
    document = {**built.manifest, "engines": entries, "files": built.manifest["files"] | outside}
    (built.path / bundle.MANIFEST).write_text(json.dumps(document))
    with pytest.raises(DiffpressError, match="points outside the bundle"):
        matching.listed(bundle.read(built.path))
    with pytest.raises(DiffpressError, match="points outside the bundle"):
        Pipeline.load(built.path)


def test_a_link_out_of_the_bundle_is_refused(built: Bundle, tmp_path: Path) -> None:
    file = built.file("engines/sm89/full.engine")
    (tmp_path / "elsewhere").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DiffpressError, match=r"full\.engine points outside the bundle"):
        Pipeline.load(built.path)
    with pytest.raises(DiffpressError, match=r"full\.engine points outside the bundle"):
        built.file("engines/sm89/full.engine")


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_engine_is_refused(built: Bundle, plug_in: Callable[..., Any], damage: str) -> None:
    plug_in()
    file = built.file("engines/sm89/full.engine")
    content = file.read_bytes()
    file.write_bytes(content[:-100] if damage == "truncated" else content[:-1] + b"x")
    with pytest.raises(DiffpressError, match=r"full\.engine has changed; compress again or restore"):
        Pipeline.load(built.path)
    message = r"full\.engine has \d+ bytes instead" if damage == "truncated" else "full.engine has changed since"
    with pytest.raises(DiffpressError, match=message):  # an opened bundle is believed, its engines are not
        Pipeline.load(built)


def same(images: Any, path: Path) -> None:
    wanted = Pipeline.load(bundle.read(path), "onnxruntime", threads=1)(["a red circle"], [1])
    assert np.abs(images.pixels.astype(int) - wanted.pixels).max() <= 1


def test_another_gpu_or_version_is_refused_and_graphs_run_when_asked(
    built: Bundle, plug_in: Callable[..., Any]
) -> None:
    first = backends.available()[0]
    plug_in(tensorrt="10.9.0.35")
    with pytest.raises(Mismatch, match=r"10\.9\.0\.35 is installed"):
        Pipeline.load(built.path)
    for backend in ("auto", "tensorrt"):
        pipeline = Pipeline.load(built.path, backend, fallback=True)
        assert pipeline.backend == "onnxruntime" and "10.9.0.35 is installed" in str(pipeline.note)
        same(pipeline(["a red circle"], [1]), built.path)
    plug_in((8, 6))
    with pytest.raises(Mismatch, match=r"Fake RTX 4090 \(sm86\)"):
        Pipeline.load(built.path, "tensorrt")
    assert Pipeline.load(built.path, "openvino").backend == "openvino"  # graphs that were asked for
    plug_in(other="1")  # no library for its engines: nobody meant to use them
    assert (Pipeline.load(built.path).backend, Pipeline.load(built.path).note) == (first[0], None)


def test_without_a_gpu_engines_are_left_alone(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching.cuda, "gpu", lambda: None)
    assert Pipeline.load(built.path).backend == backends.available()[0][0]
    with pytest.raises(Mismatch, match="--backend tensorrt needs an NVIDIA GPU and its driver"):
        Pipeline.load(built.path, "tensorrt")
    assert Pipeline.load(built.path, "tensorrt", fallback=True).backend == "onnxruntime"
    with pytest.raises(DiffpressError, match=r"onnxruntime-cuda needs|has no CUDAExecutionProvider"):
        Pipeline.load(built.path, "onnxruntime-cuda")
    with pytest.raises(DiffpressError, match="OpenVINO sees no Intel GPU"):
        Pipeline.load(built.path, "openvino-gpu")


def test_a_precision_is_the_engine_s_own(built: Bundle, plug_in: Callable[..., Any]) -> None:
    plug_in()
    with pytest.raises(DiffpressError, match="the precision that they were built with: leave out --precision"):
        Pipeline.load(built.path, "tensorrt", "fp32")
    assert Pipeline.load(built.path, precision="fp32").backend != "tensorrt"  # graphs, which can be as asked


@pytest.mark.parametrize(
    ("asked", "preferred", "chosen"),
    [
        (("auto", "auto"), None, ("onnxruntime-cuda", "fp32")),
        (("auto", "auto"), ("openvino", "bf16"), ("onnxruntime-cuda", "fp32")),
        (("auto", "auto"), ("onnxruntime-cuda", "tf32"), ("onnxruntime-cuda", "tf32")),
        (("auto", "bf16"), None, ("openvino", "bf16")),
        (("openvino", "auto"), ("openvino", "bf16"), ("openvino", "bf16")),
        (("onnxruntime-tensorrt", "auto"), None, ("onnxruntime-tensorrt", "fp32")),
    ],
)
def test_a_gpu_comes_before_the_processor(
    asked: tuple[str, str], preferred: tuple[str, str] | None, chosen: tuple[str, str]
) -> None:
    runnable = [("onnxruntime-cuda", "fp32"), ("onnxruntime-cuda", "tf32"), ("openvino", "fp32"), ("openvino", "bf16")]
    default = preferred and {"name": preferred[0], "precision": preferred[1]}
    assert opening.choose(*asked, default, runnable) == chosen
