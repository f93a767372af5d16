"""Estimated latency: a roofline, what a layer moves, and which layers cannot pay."""

from typing import Any

import numpy as np
import pytest
from torch import nn

from diffpress.compress.quantize.latency import Target, Traffic, does_not_pay, observe_traffic
from diffpress.compress.work import Work
from diffpress.plan import LayerQuant


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Linear(64, 64), ""),
        (nn.Conv2d(4, 32, 3), "4 inputs and 32 outputs are not both multiples of 16"),
        (nn.Linear(64, 24), "64 inputs and 24 outputs"),
        (nn.Conv2d(32, 32, 3, groups=32), "1 inputs"),
        (nn.Linear(16, 16), "256 parameters are fewer than 1000"),
    ],
)
def test_small_and_odd_layers_do_not_pay(module: Any, why: str) -> None:
    found = does_not_pay(module, min_parameters=1000)
    assert found.startswith(why) if why else not found


def test_latency_is_the_longer_of_computing_and_moving() -> None:
    target = Target(rates={"float": 100.0, "int8": 400.0}, bandwidth=10.0, float_bytes=4)
    scale = np.ones(1, np.float32)
    int8 = LayerQuant(scale, scale)
    heavy = Traffic(multiply_adds=10**9, inputs=1000, outputs=1000)
    assert target.latency_ms(heavy, 4000) == pytest.approx(10.0)
    # A quarter of the arithmetic, and inputs read as float and written as int8 before it.
    assert target.latency_ms(heavy, 1000, int8) == pytest.approx(2.5 + 5000 / 10e9 * 1e3)
    light = Traffic(multiply_adds=1000, inputs=10**6, outputs=1000)
    assert target.latency_ms(light, 4000) == pytest.approx((4 * 10**6 + 8000) / 10e9 * 1e3)
    assert target.latency_ms(light, 1000, int8) > target.latency_ms(light, 4000)  # type: ignore[operator]
    assert target.latency_ms(heavy, 500, LayerQuant(scale, None, "int4", None)) == pytest.approx(10.0)
    assert target.latency_ms(heavy, 500, LayerQuant(scale, scale, "int4", "int8")) is None
    assert target.latency_ms(heavy, 500, LayerQuant(scale, scale, "e4m3", "e4m3")) is None


def test_traffic_is_what_a_recorded_call_computes_and_moves(work: Work) -> None:
    names = {"conv_in": work.denoiser.conv_in, "time_embedding.linear_1": work.denoiser.time_embedding.linear_1}
    seen = observe_traffic(work, names)
    # Two guidance halves of 8x8 latents: 4 channels by a 3x3 kernel to 32; the embedding of the batch's one timestep.
    assert seen["conv_in"] == Traffic(2 * 32 * 64 * 4 * 9, 2 * 4 * 64, 2 * 32 * 64)
    linear = work.denoiser.time_embedding.linear_1
    assert seen["time_embedding.linear_1"].multiply_adds % (linear.in_features * linear.out_features) == 0
    assert not any(module._forward_hooks for module in names.values())
