"""The processor's ceilings, at sizes that are measured in no time."""

import pytest
import torch

from diffpress.benchmarks import ceilings, machine
from diffpress.benchmarks.ceilings import Ceilings

MOVED = (1 << 16, 1 << 20, 1 << 24)


@pytest.fixture(scope="module")
def measured() -> Ceilings:
    return ceilings.measure({"fp32", "int8", "fp8"}, size=256, moved=MOVED, rounds=2)


def test_what_this_machine_can_do(measured: Ceilings) -> None:
    assert set(measured.operations_per_s) == {"fp32", "int8"}  # no processor multiplies fp8
    cores = machine.machine()["cores"]
    for kind, rate in measured.operations_per_s.items():
        assert 1e8 < rate < cores * 2e13, kind
    rates = list(measured.bytes_per_s.values())
    assert list(measured.bytes_per_s) == list(MOVED) and rates == sorted(rates, reverse=True)
    assert rates[-1] > 1e8 and rates[0] < cores * 2e12
    assert set(measured.as_json()["bytes_per_s"]) == {str(size) for size in MOVED}


def test_threads_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    seen = []
    with ceilings.all_cores():
        seen.append(torch.get_num_threads())
    assert seen == [machine.machine()["cores"]] and torch.get_num_threads() == before


def test_the_bandwidth_is_that_of_the_next_smaller_size() -> None:
    roofs = Ceilings({}, {1000: 9.0, 4000: 5.0, 16_000: 2.0}, "")
    assert [roofs.bandwidth(size) for size in (0, 999, 1000, 4001, 15_999, 10**9)] == [9, 9, 9, 5, 5, 2]


def test_ceilings_of_a_gpu() -> None:
    found = {"operations_per_s": {"fp16": 5e13, "fp8": None}, "bytes_per_s": 3e11, "reasons": {}, "method": "m"}
    roofs = ceilings.of_gpu(found)
    assert roofs.operations_per_s == {"fp16": 5e13}
    assert roofs.bandwidth(1) == roofs.bandwidth(1e12) == 3e11
