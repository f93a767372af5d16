"""What only a GPU can show: `python -m pytest -m gpu`. Each library that is not installed skips its own tests."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress import api
from diffpress.benchmarks import gpu_bundles, gpu_launch, quality
from diffpress.benchmarks.gpu_device import Device
from diffpress.benchmarks.gpu_rows import BASELINE, Model, Row
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError
from diffpress.export import half
from diffpress.plan import Plan
from diffpress.runtime import backends, cuda, matching, tensor_rt
from diffpress.runtime.backends import open_session
from diffpress.runtime.matching import Machine
from diffpress.runtime.pipeline import Images, Pipeline
from diffpress.runtime.session import DeviceArray, Session

PROMPTS, SEEDS = ["a large red circle", "a small blue square"], [3, 4]
STEPS = 6
TINY = Model("shapes", STEPS, 2.0, 32, {}, 3)


@pytest.fixture(params=["onnxruntime-cuda", "tensorrt", "tensorrt-rtx"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that this machine's GPU can run."""
    name: str = request.param
    try:
        if name in backends.ENGINES:
            tensor_rt.library(name)
        else:
            backends.check(name, "fp32")
    except DiffpressError as error:
        pytest.skip(str(error))
    return name


@pytest.fixture(scope="module")
def bundles(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Bundle]:
    """The tiny pipeline cached, in float and in half precision; and in INT8 beside half precision."""
    folder = tmp_path_factory.mktemp("on-gpu")
    found = {}
    cache: list[dict[str, Any]] = [{"cache": {"interval": 3, "branch": 1}}]
    for name, passes in {"float": cache, "int8": [{"quantize": {"format": "int8"}}, *cache]}.items():
        recipe = folder / f"{name}.yaml"
        recipe.write_text(json.dumps({"steps": STEPS, "guidance_scale": 2.0, "passes": passes}))
        found[name] = api.compress(str(tiny_pipeline), str(recipe), folder / name, quiet=True)
    found["half"] = half.halve(found["float"], folder / "half")
    found["int8, half"] = half.halve(found["int8"], folder / "int8-half")
    return found


@pytest.fixture(scope="module")
def images_on_cpu(bundles: Mapping[str, Bundle]) -> Images:
    return _drawn(Pipeline.load(bundles["float"], "onnxruntime"))


def _drawn(pipeline: Pipeline) -> Images:
    return pipeline(PROMPTS, SEEDS, keep_latents=True)


def _ready(bundle: Bundle, backend: str, work: Path) -> Bundle:
    """The bundle, with engines for this GPU where the backend runs engines."""
    if backend not in backends.ENGINES:
        return bundle
    machine = Machine.here()
    assert machine is not None
    (work / "bundles" / "shapes").mkdir(parents=True)
    (work / "bundles" / "shapes" / "fp16").symlink_to(bundle.path)
    return gpu_bundles.opened(work, "shapes", Row(backend, "fp16"))


@pytest.mark.parametrize(("kind", "worst"), [("float", 0.01), ("half", 0.03), ("int8, half", 0.2)])
def test_images_are_those_of_onnx_runtime_on_the_cpu(
    backend: str, kind: str, worst: float, bundles: Mapping[str, Bundle], images_on_cpu: Images, tmp_path: Path
) -> None:
    try:
        ready = _ready(bundles[kind], backend, tmp_path)
    except DiffpressError as error:
        if "sm" in str(error) and backend == "tensorrt-rtx":
            pytest.skip(str(error))  # it builds for GeForce and RTX PRO alone
        raise
    got = _drawn(Pipeline.load(ready, backend))
    assert got.problem is None
    error = quality.relative_l2(got.latents[-1], images_on_cpu.latents[-1])
    assert error.max() < worst
    if kind == "float":
        assert quality.psnr(got.pixels, images_on_cpu.pixels).min() > 35


def _sessions(ready: Bundle, backend: str) -> dict[str, Session]:
    """By variant, opened alone."""
    if backend not in backends.ENGINES:
        return {name: open_session(ready.graph(name), backend) for name in ready.manifest["graphs"]}
    return {
        engine.name: matching.open_engine(ready, engine)
        for engine in matching.listed(ready)
        if engine.name in ready.manifest["graphs"]
    }


def _feeds(session: Session, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    shapes = {name: tuple(2 if size is None else size for size in port.shape) for name, port in session.inputs.items()}
    feeds = {name: random.normal(size=shape).astype(session.inputs[name].dtype) for name, shape in shapes.items()}
    return feeds | {"timestep": np.full(shapes["timestep"], 500, session.inputs["timestep"].dtype)}


def test_cached_features_stay_on_the_device(backend: str, bundles: Mapping[str, Bundle], tmp_path: Path) -> None:
    ready = _ready(bundles["float"], backend, tmp_path)
    program = Plan.load(ready.path / "plan").program
    name, reader = next((name, variant) for name, variant in program.variants.items() if variant.reads)
    (feature,) = reader.reads
    sessions = _sessions(ready, backend)
    full, cached = sessions["full"], sessions[name]
    on_cpu = {variant: open_session(ready.graph(variant), "onnxruntime") for variant in ("full", name)}
    feeds = _feeds(full)
    port = full.outputs[feature]
    place = full.empty((2, *(int(size or 0) for size in port.shape[1:])), port.dtype)  # type: ignore[attr-defined]
    assert isinstance(place, DeviceArray)
    made = full.run(feeds, {feature: place})
    assert made[feature] is place
    wanted = on_cpu["full"].run(feeds)
    assert _apart(np.asarray(place), wanted[feature]) < 0.01
    given = {key: value for key, value in feeds.items() if key in cached.inputs}
    from_device = cached.run({**given, feature: place})["out_sample"]
    from_host = cached.run({**given, feature: np.asarray(place)})["out_sample"]
    np.testing.assert_array_equal(from_device, from_host)
    assert _apart(from_device, on_cpu[name].run({**given, feature: wanted[feature]})["out_sample"]) < 0.01


def test_captured_graphs_are_as_plain_execution(backend: str, bundles: Mapping[str, Bundle], tmp_path: Path) -> None:
    if backend not in backends.ENGINES:
        pytest.skip("ONNX Runtime's CUDA provider is run without CUDA graphs")
    ready = _ready(bundles["float"], backend, tmp_path)
    plain, captured = (_sessions(ready, backend)["full"] for _ in range(2))
    plain._capturable = False  # type: ignore[attr-defined]
    for seed in range(4):  # plain, captured, then launched with other values at the same addresses
        feeds = _feeds(plain, seed)
        one, other = plain.run(feeds), captured.run(feeds)
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-6)
    if backend == "tensorrt":  # the other library captures by itself and does not say so
        assert any(context.graphs for context in captured._contexts.values())  # type: ignore[attr-defined]


def _apart(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float32) - wanted) / np.linalg.norm(wanted))


# -- the benchmark's instruments ---------------------------------------------------------------------------------------


def test_events_and_memory_of_the_driver() -> None:
    device = Device()
    assert 0 <= device.time(lambda: None) < 100
    speed = device.copied_bytes_per_s(256 << 20)
    assert 1e10 < speed < 5e13
    with device.watched() as peak:
        kept = device.activate().allocate(512 << 20)
        device.time(lambda: None)
    assert peak.bytes >= (512 << 20) * 0.99
    del kept


def test_ceilings_of_this_gpu(tmp_path: Path) -> None:
    found = cuda.gpu()
    assert found is not None
    job = {"do": "ceilings", "memory_bytes": found.memory_bytes, "sizes": {"size": 2048, "rounds": 3}}
    ceilings = gpu_launch.launched(job, tmp_path / "ceilings.log")
    assert ceilings["bytes_per_s"] > 1e10
    for kind, peak in ceilings["operations_per_s"].items():
        assert peak is None or peak > 1e10, kind
        assert (peak is None) == (kind in ceilings["reasons"])


def _torch_on_gpu() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("the installed torch does not see this GPU")
    return torch


def test_half_precision_in_torch_draws_what_the_cpu_draws(tiny_pipeline: Path, images_on_cpu: Images) -> None:
    _torch_on_gpu()
    from diffpress.benchmarks.gpu_torch import Torch

    whole = Torch.load(str(tiny_pipeline), TINY, Row("diffusers", "fp32"), "cpu", None, "default")
    wanted = whole(PROMPTS, SEEDS, keep_latents=True)
    got = Torch.load(str(tiny_pipeline), TINY, BASELINE, "cuda", None, "default")(PROMPTS, SEEDS, keep_latents=True)
    assert quality.relative_l2(got.latents[-1], wanted.latents[-1]).max() < 0.02
    assert got.problem is None


def test_a_step_program_in_torch_is_that_of_the_bundle(
    tiny_pipeline: Path, bundles: Mapping[str, Bundle], images_on_cpu: Images
) -> None:
    torch = _torch_on_gpu()
    from diffpress.benchmarks.gpu_torch import Torch

    plan = Plan.load(bundles["float"].path / "plan")
    row = Row("diffusers", "fp16, cached")
    cached = Torch.load(str(tiny_pipeline), TINY, row, "cuda", plan, "default")
    got = cached(PROMPTS, SEEDS, keep_latents=True)
    assert quality.relative_l2(got.latents[-1], images_on_cpu.latents[-1]).max() < 0.03
    assert len(cached.calls()) == 2
    if importlib.util.find_spec("triton") is None:
        pytest.skip("torch.compile needs triton")
    row = Row("diffusers compiled", "fp16, cached")
    compiled = Torch.load(str(tiny_pipeline), TINY, row, "cuda", plan, "reduce-overhead")
    for _ in range(3):  # traced, captured, launched
        again = compiled(PROMPTS, SEEDS, keep_latents=True)
        assert quality.relative_l2(again.latents[-1], got.latents[-1]).max() < 0.02
    torch.compiler.reset()
