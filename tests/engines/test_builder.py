"""What needs a GPU, or the full TensorRT, with stand-ins for the library's classes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffpress.engines import builder, library
from diffpress.engines.builder import Options, TimingCache
from diffpress.engines.progress import Progress, monitor

TRT = SimpleNamespace(
    __name__="tensorrt",
    __version__="11.0",
    IProgressMonitor=type("IProgressMonitor", (), {"__init__": lambda self: None}),
    ILogger=type("ILogger", (), {"__init__": lambda self: None, "Severity": SimpleNamespace(ERROR=1)}),
    BuilderFlag=SimpleNamespace(SPARSE_WEIGHTS="sparse"),
    LayerInformationFormat=SimpleNamespace(JSON="json"),
)


class Config:
    """A builder's configuration that remembers."""

    def __init__(self) -> None:
        self.flags: list[str] = []
        self.given: bytes | None = None
        self.cache: Any = None

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def create_timing_cache(self, data: bytes) -> Any:
        if data == b"cut off":
            return None
        self.given = data
        return SimpleNamespace(serialize=lambda: data + b"+measured")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.cache


def test_the_timing_cache_of_the_full_library_is_kept_between_builds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DIFFPRESS_CACHE", str(tmp_path))
    for expected in (b"", b"+measured"):
        config, cache = Config(), TimingCache(TRT, "sm87")
        cache.attach(config)
        assert config.given == expected
        cache.keep(config)
    file = tmp_path / "timing" / "tensorrt-11.0-sm87.cache"
    assert file.read_bytes() == b"+measured+measured" and list(file.parent.iterdir()) == [file]
    file.write_bytes(b"cut off")
    config = Config()
    TimingCache(TRT, "sm87").attach(config)
    assert config.given == b""
    assert TimingCache(SimpleNamespace(__name__="tensorrt_rtx", __version__="1.7"), "sm89").file is None


def test_flags_that_the_library_lacks_are_left_out() -> None:
    config = Config()
    assert builder.set_flags(TRT, config, Options(sparse=True, streaming=True)) == ("SPARSE_WEIGHTS",)
    assert config.flags == ["sparse"]


def test_kernels_that_skip_zeros_are_counted_by_their_names() -> None:
    said = [
        {"Name": "a", "TacticName": "sm80_xmma_fprop_sparse_conv_interleaved_i8i8_i8i32_f32_nhwc"},
        {"Name": "sparse by name alone", "TacticName": "sm80_xmma_gemm_f16f16"},
        {"Name": "b", "TacticName": "0x0000000000000000"},
        "as a plain name",
    ]
    assert builder.sparse_kernels(said) == 1 and builder.sparse_kernels([]) == 0


@pytest.mark.parametrize(
    ("answer", "layers", "reason"),
    [
        (json.dumps({"Layers": [{"Name": "conv"}]}), [{"Name": "conv"}], None),
        ("not JSON", None, "the inspector's answer is not JSON"),
    ],
)
def test_the_inspector_is_asked_where_a_gpu_allows_it(
    answer: str, layers: list[Any] | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "present", lambda: ["sm89"])
    inspector = SimpleNamespace(get_engine_information=lambda kind: answer)
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: engine if data == b"engine" else None)
    trt = SimpleNamespace(**vars(TRT), Runtime=lambda logger: runtime)
    found, why = builder.layers(trt, b"engine", "sm89")
    assert found == layers and (why or "").startswith(reason or "")
    assert builder.layers(trt, b"damaged", "sm89") == (None, "the builder gave no reason")
    assert builder.layers(trt, b"engine", "sm120") == (
        None,
        "reading an engine back needs the GPU it was built for (sm120)",
    )


def test_figures_are_read_from_what_the_builder_logs() -> None:
    logger = library.logger(TRT)
    for message in ("Total Activation Memory: 8454144 bytes", "Total Weights Memory: 12 bytes", "Total: 3 bytes"):
        logger.log(3, message)
    logger.log(1, "it broke")
    assert logger.figures == {"activations": 8454144, "weights": 12} and logger.errors == ["it broke"]


def test_phases_within_phases_are_one_growing_fraction() -> None:
    ticks: list[float] = []
    watching = monitor(TRT, ticks.append)
    watching.phase_start("root", None, 2)
    watching.phase_start("first", "root", 2)
    assert watching.step_complete("first", 0)
    watching.step_complete("first", 1)
    watching.phase_finish("first")
    watching.step_complete("root", 0)
    watching.phase_start("second", "root", 4)
    watching.phase_start("deep", "second", 2)
    watching.step_complete("deep", 0)
    watching.step_complete("nobody", 0)
    watching.phase_finish("deep")
    watching.step_complete("second", 3)
    assert ticks == [0.25, 0.5, 0.5, 0.5 + 0.5 * 0.25 * 0.5, 1.0]
    watching.stopped = True
    assert not watching.step_complete("root", 1)


def test_progress_counts_engines_by_their_weights(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(400, shown=True) as progress:
        progress.start("full for sm89")
        progress.tick(300, 0.5)
        assert progress.bar.n == 150
        progress.tick(300, 0.25)  # a phase that ends early does not take it back
        assert progress.bar.n == 150
        progress.finish(300)
        progress.tick(100, 2.0)
        assert progress.bar.n == 400
    shown = capsys.readouterr().err
    assert "full for sm89" in shown and "left" in shown and "100%" in shown
