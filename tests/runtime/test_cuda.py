"""The driver by ctypes, against one with the prototypes of cuda.h that keeps its memory on the host."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from diffpress.errors import DiffpressError
from diffpress.runtime import cuda

FLOAT = np.dtype("float32")
PlugIn = Callable[..., Any]


@pytest.mark.parametrize(("capability", "target"), [((8, 9), "sm89"), ((8, 7), "sm87"), ((12, 0), "sm120")])
def test_the_gpu_and_its_target(fakes: ModuleType, capability: tuple[int, int], target: str) -> None:
    found = cuda.Driver(fakes.FakeCuda(capability, 24 << 30)).gpu()
    assert found == cuda.Gpu("Fake RTX 4090", target, 24 << 30, integrated=False)


def test_every_function_is_declared_as_in_the_header(fakes: ModuleType) -> None:
    sizes = {
        name: [kind if isinstance(kind, str) else kind.__name__ for kind in kinds]
        for name, kinds in cuda.SIGNATURES.items()
    }
    header = {name: [kind.__name__ for kind in kinds] for name, kinds in fakes.PROTOTYPES.items()}
    header["cuDeviceGetName"][0] = "c_char_p"  # a buffer either way
    assert sizes == header


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    for cached in (cuda.driver, cuda.gpu, cuda.device):
        cached.cache_clear()
    monkeypatch.setattr("ctypes.CDLL", absent)
    assert cuda.gpu() is None
    with pytest.raises(DiffpressError, match="no NVIDIA GPU here, or no driver"):
        cuda.device()
    for cached in (cuda.driver, cuda.gpu, cuda.device):
        cached.cache_clear()


def test_rows_of_an_array_on_the_device_are_views(plug_in: PlugIn) -> None:
    device = plug_in().device
    values = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    array = device.empty((4, 3, 2), FLOAT).fill(values)
    np.testing.assert_array_equal(np.asarray(array), values)
    np.testing.assert_array_equal(np.asarray(array[-2:]), values[-2:])
    np.testing.assert_array_equal(np.asarray(array[1:3][1:]), values[2:3])
    np.testing.assert_array_equal(np.concatenate([array, array[:1]]), np.concatenate([values, values[:1]]))
    array[1:2].fill(np.zeros((1, 3, 2)))  # another type, converted
    assert (np.asarray(array)[1] == 0).all() and array[:1].address == array.address
    assert len(array) == 4 and array[2:].shape == (2, 3, 2)
    with pytest.raises(ValueError, match="follow each other"):
        array[::2]


def test_memory_comes_back_to_the_same_addresses(plug_in: PlugIn) -> None:
    plugged = plug_in()
    first = [plugged.device.empty((5,), FLOAT) for _ in range(2)]
    addresses = {array.address for array in first}
    assert all(address % cuda.ALIGNMENT == 0 for address in addresses)
    del first
    again = [plugged.device.empty((7,), FLOAT) for _ in range(2)]  # the same block of 256
    assert {array.address for array in again} == addresses
    assert plugged.cuda.calls.count("cuMemAlloc_v2") == 2


def test_a_full_gpu_gives_up_what_it_kept_first(plug_in: PlugIn) -> None:
    plugged = plug_in(capacity=4096)
    kept = plugged.device.empty((2048,), np.dtype("uint8"))
    del kept
    large = plugged.device.empty((3072,), np.dtype("uint8"))  # beside the kept one it would not fit
    with pytest.raises(DiffpressError, match=r"CUDA_ERROR_OUT_OF_MEMORY from cuMemAlloc_v2: the GPU's memory is full"):
        plugged.device.empty((2048,), np.dtype("uint8"))
    assert large.shape == (3072,) and plugged.cuda.used() == 3072


def test_what_was_captured_runs_when_it_is_launched(plug_in: PlugIn) -> None:
    plugged = plug_in()
    device = plugged.device
    a, b = device.empty((4,), FLOAT).fill(np.arange(4)), device.empty((4,), FLOAT).fill(np.zeros(4))

    def copy() -> bool:
        device.copy(b.address, a.address, a.nbytes)
        return True

    graph = device.captured(copy)
    assert graph is not None and (np.asarray(b) == 0).all()
    device.launch(graph)
    np.testing.assert_array_equal(np.asarray(b), np.arange(4))
    del graph
    assert plugged.cuda.graphs == {}  # neither the graph nor its executable is left

    assert device.captured(lambda: False) is None  # the library refused
    assert plugged.cuda.capturing is None and plugged.cuda.graphs == {}

    def allocating() -> bool:
        device.empty((1000,), FLOAT)
        return True

    with pytest.raises(DiffpressError):
        device.captured(allocating)
    assert plugged.cuda.capturing is None
    device.synchronize()  # the stream is as before
