"""Profiles of the handmade bundle's graphs by both libraries."""

from pathlib import Path

import numpy as np
import pytest

from diffpress.benchmarks import profiles
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError
from diffpress.runtime.session import Feeds


@pytest.fixture
def feeds() -> Feeds:
    random = np.random.default_rng(0)
    return {
        "sample": random.normal(size=(2, 4, 8, 8)).astype(np.float32),
        "timestep": np.array([951.0], np.float32),
        "encoder_hidden_states": random.normal(size=(2, 8, 32)).astype(np.float32),
    }


@pytest.mark.parametrize(("backend", "convolution"), [("onnxruntime", "Conv"), ("openvino", "Convolution")])
def test_operators_and_their_times(handmade: Bundle, feeds: Feeds, backend: str, convolution: str) -> None:
    pytest.importorskip(backend)
    found = profiles.profile(handmade.graph(), backend, "fp32", feeds, runs=3)
    assert found and all(one.seconds > 0 for one in found)
    assert [one.seconds for one in found] == sorted((one.seconds for one in found), reverse=True)
    assert any(convolution in one.op for one in found)
    assert len({(one.name, one.op) for one in found}) == len(found)
    assert sum(one.seconds for one in found) < 1


def test_a_backend_that_does_not_say(handmade: Bundle, feeds: Feeds) -> None:
    assert profiles.profile(handmade.graph(), "onnxruntime-tensorrt", "fp32", feeds) is None


def test_a_refusal_is_ours(tmp_path: Path, feeds: Feeds) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"nonsense")
    with pytest.raises(DiffpressError, match=r"cannot open .*broken"):
        profiles.profile(tmp_path / "broken.onnx", "onnxruntime", "fp32", feeds)
