"""ONNX Runtime's GPU sessions: their options, and that arrays of the device are bound, on a device that is the host."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.errors import DiffpressError
from diffpress.runtime import backends, onnx_runtime
from diffpress.runtime.backends import check
from diffpress.runtime.cuda import Gpu
from diffpress.runtime.onnx_runtime import OnnxRuntimeOnGpu, provider_options
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.session import Allocating, DeviceArray

GPU = Gpu("GeForce RTX 4090", "sm89", 24 << 30, False)
ALL = ["TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


class OnHost(OnnxRuntimeOnGpu):
    """The GPU's session where the GPU's memory is the host's."""

    _device = "cpu"

    def __init__(self, file: Path, backend: str, precision: str, threads: int | None) -> None:
        super().__init__(file, "onnxruntime", precision, threads)
        self.seen: list[dict[str, Any]] = []

    def run(self, feeds: Any, into: Any = None) -> dict[str, np.ndarray]:
        self.seen.append({**feeds, **(into or {})})
        return super().run(feeds, into)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, and a build of the library that has every provider."""
    monkeypatch.setattr(backends.cuda, "gpu", lambda: GPU)
    monkeypatch.setattr(onnx_runtime.library(), "get_available_providers", lambda: ALL)


@pytest.mark.usefixtures("with_gpu")
@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_features_and_text_stay_on_the_device(
    make: Callable[..., Path], scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make()
    wanted = Pipeline.load(path, "onnxruntime", threads=1)(["a red circle"], [3], guidance_scale=scale)
    monkeypatch.setitem(backends._OPEN, "onnxruntime-cuda", OnHost)
    pipeline = Pipeline.load(path, threads=1)
    assert (pipeline.backend, pipeline.precision) == ("onnxruntime-cuda", "fp32")
    for _ in range(2):
        np.testing.assert_array_equal(pipeline(["a red circle"], [3], guidance_scale=scale).pixels, wanted.pixels)
    for name, session in pipeline.denoiser.sessions.items():
        assert isinstance(session, OnHost) and isinstance(session, Allocating)
        for arrays in session.seen:
            there = {key for key, value in arrays.items() if isinstance(value, DeviceArray)}
            assert there == {"feature_0", *(["encoder_hidden_states"] if name == "full" else [])}


def test_arrays_of_the_host_are_bound_anew(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Binding copies them to a GPU: what was changed in place since would not be seen."""
    session = OnHost(make() / "unet/model.onnx", "onnxruntime-cuda", "fp32", 1)
    feature = session.empty((1, 5, 4, 4), np.dtype("float32"))
    feeds = {
        "sample": np.ones((1, 4, 4, 4), np.float32),
        "timestep": np.zeros(1, np.float32),
        "encoder_hidden_states": np.ones((1, 24, 6), np.float32),
    }
    first = session.run(feeds, {"feature_0": feature})["out_sample"]
    bound: list[str] = []
    bind = session._binding.bind_cpu_input
    monkeypatch.setattr(session._binding, "bind_cpu_input", lambda name, value: (bound.append(name), bind(name, value)))
    feeds["sample"] *= 2
    assert (session.run(feeds, {"feature_0": feature})["out_sample"] != first).any()
    assert bound == list(feeds)


@pytest.mark.usefixtures("with_gpu")
def test_providers_and_their_options(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFPRESS_CACHE", str(tmp_path / "cache"))
    file = make() / "unet/model.onnx"
    found = dict(provider_options("onnxruntime-cuda", "fp32", file))
    assert list(found) == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert found["CUDAExecutionProvider"]["use_tf32"] == "0"
    assert dict(provider_options("onnxruntime-cuda", "tf32", file))["CUDAExecutionProvider"]["use_tf32"] == "1"
    found = dict(provider_options("onnxruntime-tensorrt", "fp32", file))
    assert list(found) == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert found["TensorrtExecutionProvider"]["trt_int8_enable"] == "0"
    assert found["TensorrtExecutionProvider"]["trt_engine_cache_path"].startswith(str(tmp_path / "cache"))
    quantized = tmp_path / "q.onnx"
    quantized.write_bytes(b"..DequantizeLinear..")
    assert provider_options("onnxruntime-tensorrt", "fp32", quantized)[0][1]["trt_int8_enable"] == "1"
    assert provider_options("onnxruntime-tensorrt-rtx", "fp32", file)[0][0] == "NvTensorRTRTXExecutionProvider"


@pytest.mark.usefixtures("with_gpu")
def test_with_a_gpu_cuda_comes_first() -> None:
    pairs = backends.available()
    assert pairs[:2] == [("onnxruntime-cuda", "fp32"), ("onnxruntime-cuda", "tf32")]
    assert not {"onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"} & {name for name, _ in pairs}
    for name in ("onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"):
        check(name, "fp32")


def test_a_provider_or_gpu_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.cuda, "gpu", lambda: None)
    with pytest.raises(DiffpressError, match=r"has no CUDAExecutionProvider, .*pip install onnxruntime-gpu"):
        check("onnxruntime-cuda", "fp32")
    monkeypatch.setattr(onnx_runtime.library(), "get_available_providers", lambda: ALL)
    with pytest.raises(DiffpressError, match="onnxruntime-cuda needs an NVIDIA GPU and its driver"):
        check("onnxruntime-cuda", "fp32")
    for backend, precision in (("onnxruntime-cuda", "bf16"), ("openvino-gpu", "bf16"), ("openvino", "tf32")):
        with pytest.raises(DiffpressError, match=f"not {precision}"):
            check(backend, precision)
    with pytest.raises(DiffpressError, match="tensorrt runs engines, not graphs"):
        check("tensorrt", "fp32")
