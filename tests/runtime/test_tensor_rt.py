"""TensorRT sessions on a fake library whose engines are ONNX graphs and whose device is memory of the host."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffpress import bundle
from diffpress.errors import DiffpressError
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.session import Allocating
from diffpress.runtime.tensor_rt import TensorRt

FLOAT = np.dtype("float32")
WIDTH = 7  # a row of 28 bytes: rows after the first are not aligned
Opened = Callable[..., TensorRt]


def graph() -> bytes:
    """y = 2 x + step and kept = x + feature, row by row."""
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["double"]),
        helper.make_node("Add", ["double", "step"], ["y"]),
        helper.make_node("Add", ["x", "feature"], ["kept"]),
    ]

    def port(name: str, shape: list[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    rows: list[Any] = ["N", WIDTH]
    made = helper.make_graph(
        nodes,
        "g",
        [port("x", rows), port("feature", rows), port("step", [1])],
        [port("y", rows), port("kept", rows)],
        [numpy_helper.from_array(np.float32(2), "two")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


def profile(least: int, best: int, most: int) -> dict[str, list[list[int]]]:
    rows = [[size, WIDTH] for size in (least, best, most)]
    return {"x": rows, "feature": rows, "step": [[1]] * 3}


@pytest.fixture
def opened(fakes: ModuleType, tmp_path: Path) -> Opened:
    def opened(
        plugged: Any, *profiles: dict[str, Any], backend: str = "tensorrt", host_code: bool = False, **options: Any
    ) -> TensorRt:
        file = tmp_path / "g.engine"
        file.write_bytes(fakes.engine_bytes(graph(), list(profiles) or [profile(1, 2, 4)], host_code))
        return TensorRt(file, backend, plugged.device, **options)

    return opened


def feeds(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    x, feature = (random.standard_normal((rows, WIDTH)).astype(np.float32) for _ in range(2))
    return {"x": x, "feature": feature, "step": np.array([0.5], np.float32)}


def check(results: dict[str, Any], fed: dict[str, Any]) -> None:
    fed = {name: np.asarray(value) for name, value in fed.items()}
    np.testing.assert_allclose(results["y"], 2 * fed["x"] + fed["step"], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(results["kept"]), fed["x"] + fed["feature"], rtol=1e-6)


def test_ports_and_values(plug_in: Callable[..., Any], opened: Opened) -> None:
    session = opened(plug_in())
    assert {name: port.shape for name, port in session.inputs.items()} == {
        "x": (None, WIDTH),
        "feature": (None, WIDTH),
        "step": (1,),
    }
    assert list(session.outputs) == ["y", "kept"] and session.outputs["y"].dtype == FLOAT
    assert isinstance(session, Allocating)
    kept = []
    for seed, rows in enumerate((1, 3, 1, 4, 3)):
        fed = feeds(rows, seed) | {"x": np.asfortranarray(feeds(rows, seed)["x"].astype(np.float64))}
        kept.append((session.run(fed), fed))
    for results, fed in kept:  # what a run returned is not touched by later runs
        check(results, fed)


@pytest.mark.parametrize("rows", [1, 4, 5, 9])
def test_a_batch_above_the_profile_runs_in_parts(plug_in: Callable[..., Any], opened: Opened, rows: int) -> None:
    plugged = plug_in()
    session, fed = opened(plugged), feeds(rows)
    into = {"kept": session.empty((rows, WIDTH), FLOAT)}
    results = session.run(fed, into)
    assert results["kept"] is into["kept"] and results["y"].shape == (rows, WIDTH)
    check(results, fed)
    contexts = {rows % 4, min(rows, 4)} - {0}
    assert len(plugged.libraries["tensorrt"].contexts) == len(contexts)


def test_the_profile_that_was_made_for_a_batch_is_taken(plug_in: Callable[..., Any], opened: Opened) -> None:
    plugged = plug_in()
    session = opened(plugged, profile(1, 1, 8), profile(2, 4, 4), profile(4, 8, 16))
    for rows in (1, 3, 4, 8, 16):
        check(session.run(feeds(rows)), feeds(rows))
    assert [context.profile for context in plugged.libraries["tensorrt"].contexts] == [0, 1, 1, 2, 2]
    few = opened(plugged, profile(2, 2, 4))
    with pytest.raises(DiffpressError, match=r"g.engine takes 2 to 4 rows, not 1: build it with another profile"):
        few.run(feeds(1))


def test_arrays_on_the_device_are_bound_where_they_are(plug_in: Callable[..., Any], opened: Opened) -> None:
    plugged = plug_in()
    session = opened(plugged)
    fed, buffers = feeds(2), [session.empty((4, WIDTH), FLOAT) for _ in range(2)]
    value: Any = buffers[0][:2].fill(fed["feature"])
    session.prepare(2)
    plugged.cuda.calls.clear()
    wanted = fed["feature"]
    for step in range(6):  # a feature that every call reads and writes; two buffers take turns
        target = buffers[1 - step % 2][:2]
        results = session.run({**fed, "feature": value}, {"kept": target})
        value, wanted = target, wanted + fed["x"]
        np.testing.assert_allclose(results["y"], 2 * fed["x"] + 0.5, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(value), wanted, rtol=1e-5)
    calls = plugged.cuda.calls
    assert calls.count("cuMemcpyDtoDAsync_v2") == 0 and calls.count("cuMemAlloc_v2") == 0
    assert calls.count("cuMemcpyDtoHAsync_v2") == 6 + 1  # y of each call; the last feature, for this test
    assert calls.count("cuMemcpyHtoDAsync_v2") == 6 * 2  # x and step
    context = plugged.libraries["tensorrt"].contexts[0]
    assert {context.addresses["feature"], context.addresses["kept"]} == {buffer.address for buffer in buffers}


def test_rows_that_are_not_aligned_go_through_memory_that_is(plug_in: Callable[..., Any], opened: Opened) -> None:
    plugged = plug_in()
    session, fed = opened(plugged), feeds(2)
    source = session.empty((4, WIDTH), FLOAT).fill(np.concatenate([feeds(2, 1)["feature"], fed["feature"]]))
    whole = session.empty((4, WIDTH), FLOAT).fill(np.full((4, WIDTH), 9))
    for _ in range(3):  # plainly, captured, launched
        results = session.run({**fed, "feature": source[-2:]}, {"kept": whole[1:3]})
    check(results, fed)
    assert (np.asarray(whole)[[0, 3]] == 9).all()  # nothing beside it was written


def test_the_same_addresses_become_a_graph(plug_in: Callable[..., Any], opened: Opened) -> None:
    plugged = plug_in()
    session = opened(plugged)
    session.prepare(2)  # ran once
    launches = []
    for seed in range(4):
        check(session.run(feeds(2, seed)), feeds(2, seed))
        launches.append(plugged.cuda.calls.count("cuGraphLaunch"))
    assert launches == [1, 2, 3, 4]
    assert plugged.cuda.calls.count("cuStreamBeginCapture_v2") == 1
    place = session.empty((2, WIDTH), FLOAT)
    for seed in range(3):  # another address: plainly, then a graph of its own
        check(session.run(feeds(2, seed), {"kept": place}), feeds(2, seed))
    assert plugged.cuda.calls.count("cuGraphLaunch") == 4 + 2
    assert plugged.cuda.calls.count("cuStreamBeginCapture_v2") == 2
    check(session.run(feeds(3)), feeds(3))  # another batch, another context
    check(session.run(feeds(2)), feeds(2))
    assert plugged.cuda.calls.count("cuStreamBeginCapture_v2") == 3


def test_graphs_that_are_not_used_any_more_are_destroyed(plug_in: Callable[..., Any], opened: Opened) -> None:
    plugged = plug_in()
    session = opened(plugged)
    for _ in range(12):
        place = session.empty((2, WIDTH), np.dtype(FLOAT))
        plugged.device._free.clear()  # no address comes twice
        for _ in range(2):
            check(session.run(feeds(2), {"kept": place}), feeds(2))
    assert len(plugged.cuda.graphs) == 8


def test_an_engine_that_cannot_be_captured_runs_without(plug_in: Callable[..., Any], opened: Opened) -> None:
    plugged = plug_in()
    session = opened(plugged, host_code=True)
    for seed in range(4):
        check(session.run(feeds(2, seed)), feeds(2, seed))
    assert plugged.cuda.calls.count("cuStreamBeginCapture_v2") == 1
    assert plugged.cuda.calls.count("cuGraphLaunch") == 0


@pytest.mark.parametrize(("size", "captures"), [(400, 1), (600, 0)])
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_weights_that_are_streamed_are_not_captured(
    plug_in: Callable[..., Any],
    opened: Opened,
    fakes: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    size: int,
    captures: int,
) -> None:
    plugged = plug_in(**{backend.replace("-", "_"): "1"})
    monkeypatch.setattr(fakes.FakeEngine, "streamable_weights_size", size)
    session = opened(plugged, backend=backend)
    for _ in range(3):
        check(session.run(feeds(2)), feeds(2))
    wanted = captures if backend == "tensorrt" else 0  # the other captures by itself
    assert plugged.cuda.calls.count("cuStreamBeginCapture_v2") == wanted


def test_engines_share_working_memory_that_may_move(
    plug_in: Callable[..., Any], opened: Opened, fakes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugged = plug_in()
    first = opened(plugged)
    for _ in range(3):
        check(first.run(feeds(2)), feeds(2))
    monkeypatch.setattr(fakes.FakeEngine, "device_memory_size_v2", 100_000)
    second = opened(plugged)
    check(second.run(feeds(2)), feeds(2))
    launched = plugged.cuda.calls.count("cuGraphLaunch")
    check(first.run(feeds(2)), feeds(2))
    assert plugged.cuda.calls.count("cuGraphLaunch") == launched  # its graph used memory that is not there any more
    for _ in range(2):
        check(first.run(feeds(2)), feeds(2))
    assert len(plugged.cuda.graphs) == 2
    sizes = sorted(len(block) for block in plugged.cuda.memory.values())
    assert sizes[-1] == -(-100_000 // 256) * 256 and 1024 not in sizes


def test_rtx_captures_by_itself_and_keeps_its_kernels(
    plug_in: Callable[..., Any], opened: Opened, tmp_path: Path
) -> None:
    plugged = plug_in(tensorrt_rtx="1.7.1.116")
    file = tmp_path / "kernels" / "g.cache"
    session = opened(plugged, backend="tensorrt-rtx", cache=file)
    for _ in range(3):
        check(session.run(feeds(2)), feeds(2))
    assert plugged.cuda.calls.count("cuStreamBeginCapture_v2") == 0
    first = file.read_bytes()
    assert first and [path.name for path in file.parent.iterdir()] == ["g.cache"]
    again = opened(plugged, backend="tensorrt-rtx", cache=file)
    again.prepare(3)
    assert file.read_bytes().startswith(first) and len(file.read_bytes()) > len(first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((2, WIDTH + 1), np.float32)}, "cannot run on inputs of the shapes"),
        ({"x": np.zeros((3, WIDTH), np.float32)}, "cannot run on inputs of the shapes"),
        (
            {"x": np.zeros((0, WIDTH), np.float32), "feature": np.zeros((0, WIDTH))},
            "cannot run on inputs of the shapes",
        ),
        ({"step": np.zeros((), np.float32)}, "cannot run on inputs of the shapes"),
    ],
)
def test_wrong_feeds_are_one_line(
    plug_in: Callable[..., Any], opened: Opened, changes: dict[str, np.ndarray], message: str
) -> None:
    session = opened(plug_in())
    with pytest.raises(DiffpressError, match=message):
        session.run(feeds(2) | changes)
    with pytest.raises(DiffpressError, match="cannot run without input 'feature'"):
        session.run({"x": feeds(2)["x"], "step": feeds(2)["step"]})
    for wrong in (np.zeros((2, 3), np.float32), np.zeros((2, WIDTH)), session.empty((2, WIDTH), np.dtype("float64"))):
        with pytest.raises(DiffpressError, match=r"output .kept. of .* cannot be written"):
            session.run(feeds(2), {"kept": wrong})
    with pytest.raises(DiffpressError, match=r"output 'kept' is \[2, 7\], not \[3, 7\]"):
        session.run(feeds(2), {"kept": session.empty((3, WIDTH), FLOAT)})
    check(session.run(feeds(2)), feeds(2))


def test_an_engine_that_is_not_whole_is_refused(plug_in: Callable[..., Any], opened: Opened, tmp_path: Path) -> None:
    plugged = plug_in()
    session = opened(plugged)
    file = tmp_path / "g.engine"
    digest = bundle.sha256(file)
    TensorRt(file, "tensorrt", plugged.device, digest)
    content = file.read_bytes()
    for broken in (content[:-5], b"junk", content[:-1] + b"x"):
        file.write_bytes(broken)
        with pytest.raises(DiffpressError, match=r"g.engine has changed since it was built: build it again"):
            TensorRt(file, "tensorrt", plugged.device, digest)
    file.write_bytes(b"junk")
    with pytest.raises(
        DiffpressError, match=r"tensorrt cannot load .*g.engine: .*Error Code 1: Serialization magic tag"
    ):
        TensorRt(file, "tensorrt", plugged.device)
    file.write_bytes(b"")
    with pytest.raises(DiffpressError, match="cannot be read"):
        TensorRt(file, "tensorrt", plugged.device)
    check(session.run(feeds(1)), feeds(1))


PROMPTS = ["a red circle", "a large blue star left of a small green square"]


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_a_step_program_runs_on_engines(
    make: Callable[..., Path],
    plug_in: Callable[..., Any],
    add_engines: Callable[..., bundle.Bundle],
    backend: str,
    scale: float,
) -> None:
    path = make()
    wanted = Pipeline.load(path, "onnxruntime", threads=1)(PROMPTS, [3, 4], guidance_scale=scale, keep_latents=True)
    add_engines(bundle.load(path), library=backend)
    plugged = plug_in(**{backend.replace("-", "_"): "10.9.0.34"})
    pipeline = Pipeline.load(path)
    assert (pipeline.backend, pipeline.precision, pipeline.note) == (backend, "fp32", None)
    for _ in range(2):  # the second image's features come to the same addresses
        images = pipeline(PROMPTS, [3, 4], guidance_scale=scale, keep_latents=True)
        for ours, theirs in zip(images.latents, wanted.latents, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert np.abs(images.pixels.astype(int) - wanted.pixels).max() <= 1
    plugged.cuda.calls.clear()
    pipeline(PROMPTS, [3, 4], guidance_scale=scale)
    down = 5 * (2 if scale > 1 else 1)  # the output of each step, in parts of two rows
    words = 3 if scale > 1 else 2  # and of the text encoder and the decoder a row at a time
    assert plugged.cuda.calls.count("cuMemcpyDtoHAsync_v2") == down + words + 2
    assert plugged.cuda.calls.count("cuMemAlloc_v2") == 0


@pytest.mark.gpu
def test_a_real_engine_on_a_real_gpu(tmp_path: Path) -> None:
    """Built here for this GPU by the library, run by the session: values as in numpy."""
    from diffpress.engines import library
    from diffpress.runtime import cuda, tensor_rt

    backend = next((name for name in tensor_rt.MODULES if tensor_rt.version(name)), None)
    if cuda.gpu() is None or backend is None:
        pytest.skip("needs an NVIDIA GPU with tensorrt or tensorrt-rtx")
    trt: Any = tensor_rt.library(backend)
    logger = library.logger(trt)
    builder = trt.Builder(logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(graph()), logger.errors
    config, shapes = builder.create_builder_config(), builder.create_optimization_profile()
    for name, three in profile(1, 2, 4).items():
        shapes.set_shape(name, *three)
    config.add_optimization_profile(shapes)
    file = tmp_path / "g.engine"
    file.write_bytes(bytes(builder.build_serialized_network(network, config)))
    session = TensorRt(file, backend, cuda.device(), bundle.sha256(file), tmp_path / "g.cache")
    for seed, rows in enumerate((1, 2, 2, 2, 5)):
        place = session.empty((rows, WIDTH), FLOAT)
        fed: dict[str, Any] = feeds(rows, seed)
        fed["feature"] = session.empty((rows, WIDTH), FLOAT).fill(fed["feature"])
        check(session.run(fed, {"kept": place}), fed)
