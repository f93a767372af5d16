"""Events, memory, energy and ceilings, with a driver and an NVML that are made up."""

import ctypes
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from diffpress.benchmarks import gpu_ceilings, gpu_device
from diffpress.benchmarks.gpu_device import Device, Nvml
from diffpress.benchmarks.latency import wall_clock
from diffpress.errors import DiffpressError
from diffpress.runtime import cuda

GB = 1 << 30


class Driver:
    """The driver's library: events tick a clock that only work moves."""

    def __init__(self) -> None:
        self.now, self.used, self.said = 0.0, GB, list[str]()
        self.stamps: dict[int, float] = {}
        for name in gpu_device._CALLS:
            setattr(self, name, self._function(name))

    def _function(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.said.append(name)
            return int(getattr(self, f"do_{name}", lambda *_: 0)(*arguments) or 0)

        return call

    def do_cuDriverGetVersion(self, version: Any) -> None:
        version._obj.value = 12080

    def do_cuDeviceGetPCIBusId(self, text: Any, size: int, device: int) -> None:
        text.value = b"0000:65:00.0"

    def do_cuMemGetInfo_v2(self, free: Any, total: Any) -> None:
        free._obj.value, total._obj.value = 24 * GB - self.used, 24 * GB

    def do_cuEventCreate(self, event: Any, flags: int) -> None:
        event._obj.value = 0x7F00_0000_0000 + len(self.stamps)
        self.stamps[event._obj.value] = -1.0

    def do_cuEventRecord(self, event: int, stream: object) -> int:
        self.stamps[event] = self.now
        return 0 if stream is None else 1  # the legacy default stream

    def do_cuEventElapsedTime(self, elapsed: Any, start: int, end: int) -> None:
        elapsed._obj.value = self.stamps[end] - self.stamps[start]


class Memory:
    """The runtime's device, as far as it is asked for here."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.activated = driver, 0

    def activate(self) -> None:
        self.activated += 1

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return SimpleNamespace(address=4096)

    def copy(self, target: int, source: int, size: int) -> None:
        self.driver.now += size / 1e9  # 1 TB a second in each direction, in ms


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def device(driver: Driver) -> Device:
    return Device(driver, Memory(driver))  # type: ignore[arg-type]


def test_time_is_between_events_around_finished_work(driver: Driver, device: Device) -> None:
    def work() -> None:
        driver.said.append("work")
        driver.now += 2.5

    assert device.time(work) == pytest.approx(2.5)
    driver.said.clear()
    assert device.time(work) == pytest.approx(2.5)  # the events are used again
    assert driver.said == [
        "cuCtxSynchronize", "cuEventRecord", "work", "cuCtxSynchronize", "cuEventRecord", "cuEventSynchronize",
        "cuEventElapsedTime",
    ]  # fmt: skip


def test_an_error_of_the_driver_names_the_call(driver: Driver, device: Device) -> None:
    driver.do_cuCtxSynchronize = lambda: 700  # type: ignore[attr-defined]  # an illegal address
    with pytest.raises(DiffpressError, match="error 700 from cuCtxSynchronize"):
        device.time(lambda: None)


def test_the_peak_is_what_was_used_in_between(driver: Driver, device: Device) -> None:
    with device.watched() as peak:
        driver.used = 5 * GB
        while peak.bytes < 4 * GB:  # the other thread looks
            pass
        driver.used = 2 * GB
    assert peak.bytes == 4 * GB


def test_bandwidth_counts_reading_and_writing(device: Device) -> None:
    assert device.copied_bytes_per_s(GB) == pytest.approx(2e12)


def test_without_a_gpu_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "gpu", lambda: None)
    with pytest.raises(DiffpressError, match="no NVIDIA GPU found"):
        Device()


def nvml(joules: Any = lambda: 0.0) -> ModuleType:
    made = ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def refuse(*_: object) -> None:
        raise NVMLError("Not Supported")

    handles = {b"0000:65:00.0": "handle"}
    made.__dict__.update(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByPciBusId=lambda bus: handles[bus],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: int(joules() * 1000),
        nvmlSystemGetDriverVersion=lambda: b"580.1",
        nvmlDeviceGetPowerManagementLimit=lambda handle: 450_000,
        nvmlDeviceGetMaxClockInfo=refuse,
    )
    return made


def test_energy_of_a_call(driver: Driver) -> None:
    seconds = [0.0]

    def call() -> None:
        seconds[0] += 0.5

    made = Nvml(nvml(lambda: 1000 + 200 * seconds[0]), "handle")
    found = gpu_device.metered(made, call, 3.0, lambda: None, lambda: seconds[0])
    assert found == {"energy_j": pytest.approx(100), "power_w": pytest.approx(200), "energy_reason": None}
    once = gpu_device.metered(made, call, 0.0, lambda: None, lambda: seconds[0])
    assert once["energy_j"] == pytest.approx(100)


def test_energy_is_null_with_a_reason_without_nvml(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = device.energy(lambda: None, 1)
    assert found["energy_j"] is None and "pip install nvidia-ml-py" in found["energy_reason"]
    broken = nvml()
    broken.nvmlDeviceGetTotalEnergyConsumption = broken.nvmlDeviceGetMaxClockInfo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert "Not Supported" in device.energy(lambda: None, 1)["energy_reason"]


def test_the_description_says_what_is_known(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "gpu", lambda: cuda.Gpu("Fake RTX 4090", "sm89", 24 * GB, False))
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    found = device.describe()
    assert found["name"] == "Fake RTX 4090" and found["cuda"] == "12.8" and found["driver"] == "580.1"
    assert found["power_limit_w"] == 450 and "clock_sm_mhz" not in found  # which it does not say
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "not installed" in device.describe()["nvml"]


def test_the_driver_version_is_read_from_the_kernel_module(tmp_path: Path) -> None:
    (tmp_path / "version").write_text("580.159.04\n")
    assert gpu_device.driver_version(tmp_path / "version") == "580.159.04"
    assert gpu_device.driver_version(tmp_path / "absent") is None


def test_signatures_take_handles_of_more_than_32_bits() -> None:
    for arguments in gpu_device._CALLS.values():
        assert ctypes.c_uint64 not in arguments  # events and streams are pointers


class Cpu(Device):
    def __init__(self) -> None: ...

    def time(self, call: Any) -> float:
        return wall_clock(call)

    def copied_bytes_per_s(self, size: int, rounds: int = 10) -> float:
        return float(size)


def test_ceilings_are_numbers_or_reasons() -> None:
    found = gpu_ceilings.measure(Cpu(), 8 * GB, size=64, rounds=2, place="cpu")
    peaks, reasons = found["operations_per_s"], found["reasons"]
    assert set(peaks) == {"fp32", "tf32", "fp16", "bf16", "int8", "fp8"}
    assert peaks["fp32"] > 0 and found["bytes_per_s"] == GB
    for kind, peak in peaks.items():
        assert (peak is None) == (kind in reasons), kind
        assert peak is None or peak > 0
    assert not any("\n" in reason for reason in reasons.values())


def test_operands_of_a_place_that_is_not_there_are_reasons() -> None:
    if cuda.gpu() is not None:
        pytest.skip("there is a GPU here")
    found = gpu_ceilings.measure(Cpu(), 8 * GB, size=64, rounds=1)
    assert set(found["operations_per_s"].values()) == {None} and len(found["reasons"]) == 6
