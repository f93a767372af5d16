"""Distances along a path, against by-hand numbers and against all features held at once; what reading one saves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffpress.calibration.capture import Call
from diffpress.calibration.model import load_pipeline
from diffpress.calibration.schedule import tabulate
from diffpress.compress.cache import measure
from diffpress.compress.cache.measure import NONE, Distances, last_steps, measured, savings, watch_full_steps
from diffpress.compress.families.unet_graph import WHOLE, modules
from diffpress.compress.quantize.sensitivity import final_latents
from diffpress.compress.schedule.stepping import first_calls
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError


@pytest.fixture
def work(tiny_pipeline: Path, tmp_path: Path) -> Work:
    pipeline = load_pipeline(str(tiny_pipeline))
    pipeline.unet.requires_grad_(False)
    sampling = tabulate(pipeline.scheduler, 4, 3.0, 32, 32)
    generator = torch.Generator().manual_seed(1)
    calls = [
        Call(torch.zeros(2, 4, 8, 8), torch.tensor(sampling.timesteps[:1]), torch.randn(2, 5, 32, generator=generator))
        for _ in range(3)
    ]
    return Work(pipeline, sampling, 0, lambda _: calls, lambda items, _: items, tmp_path)  # type: ignore[arg-type,return-value]


def test_last_steps_are_those_before() -> None:
    assert last_steps(4, 2).tolist() == [[NONE, NONE], [0, NONE], [1, 0], [2, 1]]


def test_distances_of_a_line_and_what_is_held_of_it() -> None:
    # X_i = i on 2 x 3 numbers: |X_i - X_a|_1 = 6 (i - a).
    found = Distances({"line": last_steps(6, 2), "anchored": np.array([[NONE], [0], [0], [0], [3], [NONE]])})
    held = []
    for step in range(6):
        value = torch.full((2, 3), float(step))
        found(step, {"line": value, "anchored": value})
        held.append(found.held)
    np.testing.assert_array_equal(found.distances["line"][2:], [[6.0, 12.0]] * 4)
    np.testing.assert_array_equal(found.distances["line"][:2], [[np.nan, np.nan], [6.0, np.nan]])
    np.testing.assert_array_equal(found.distances["anchored"][:, 0], [np.nan, 6, 12, 18, 6, np.nan])
    np.testing.assert_array_equal(found.sizes["line"], [0, 6, 12, 18, 24, 30])
    # Two steps of the line, of the other one anchor at a time; nothing after the last comparison.
    assert held == [2, 3, 3, 3, 2, 0]


@torch.no_grad()
def watched(work: Work, calls: list[Call], prompt: int, names: tuple[str, ...]) -> list[dict[str, torch.Tensor]]:
    seen: list[dict[str, torch.Tensor]] = []
    watch_full_steps(work, calls, prompt, names, lambda step, values: seen.append({**values}))
    return seen


def test_features_are_those_of_the_sampler(work: Work) -> None:
    module = next(iter(modules(work.denoiser)))
    changes = measured(work, dict.fromkeys((WHOLE, module), last_steps(4, 2)), 2, "")
    calls = first_calls(work.recorded())
    for prompt in range(2):
        seen = watched(work, calls, prompt, (WHOLE, module))
        for name in (WHOLE, module):
            assert seen[0][name].shape[0] == 2  # both halves of guidance
            np.testing.assert_allclose(changes.sizes[name][prompt], [float(v[name].abs().sum()) for v in seen], 1e-5)
            lagged = float((seen[3][name] - seen[1][name]).abs().sum())
            assert changes.distances[name][prompt, 3, 1] == pytest.approx(lagged, rel=1e-5)
    assert not np.allclose(changes.sizes[WHOLE][0], changes.sizes[WHOLE][1], rtol=1e-3)


def test_the_path_is_that_of_the_pipeline(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    real = measure.Trajectory.advance

    def advance(walk: Any, output: torch.Tensor) -> None:
        real(walk, output)
        ends.append(walk.sample)

    calls = first_calls(work.recorded())
    monkeypatch.setattr(measure.Trajectory, "advance", advance)
    with torch.no_grad():
        watch_full_steps(work, calls, 1, (WHOLE,), lambda *_: None)
    monkeypatch.undo()
    torch.testing.assert_close(ends[-1][0], final_latents(work, calls)[1], rtol=1e-4, atol=1e-4)


def test_what_was_measured_is_found_again(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    anchors = {WHOLE: last_steps(4, 1)}
    first = measured(work, anchors, 1, "")
    ran: list[int] = []

    def counted(*arguments: Any) -> None:
        ran.append(arguments[2])
        watch_full_steps(*arguments)

    monkeypatch.setattr(measure, "watch_full_steps", counted)
    again = measured(work, anchors, 2, "")
    assert ran == [1]  # the second prompt alone
    np.testing.assert_array_equal(first.distances[WHOLE], again.distances[WHOLE][:1])
    work.denoiser.conv_in.weight.data *= 2
    other = measured(work, anchors, 1, "")
    assert ran == [1, 0] and not np.array_equal(other.sizes[WHOLE], first.sizes[WHOLE])


def test_values_that_are_not_finite_are_refused(work: Work) -> None:
    work.denoiser.conv_in.bias.data[0] = float("nan")
    with pytest.raises(DiffpressError, match="not finite"):
        measured(work, {WHOLE: last_steps(4, 1)}, 1, "")


def test_what_reading_a_feature_saves(work: Work) -> None:
    unet = work.denoiser
    kinds = modules(unet)
    found, whole = savings(work, [*kinds, WHOLE, "up_0"])
    ends = 2 * 9 * 64 * (4 * 32 + 32 * 4)  # conv_in and conv_out at 8 x 8
    time = 2 * (32 * 128 + 128 * 128)
    assert found[WHOLE] == pytest.approx(whole - ends - time)
    block = "down_blocks.2.resnets.0"  # 32 to 64 channels at 2 x 2, with a shortcut that stays
    assert found[block] == pytest.approx(2 * 9 * 4 * (32 * 64 + 64 * 64) + 2 * 128 * 64)
    attention = next(name for name, kind in kinds.items() if kind == "attn1")
    tokens, channels = 64, 32
    assert found[attention] == pytest.approx(2 * (4 * tokens * channels**2 + 2 * tokens**2 * channels))
    assert 0 < found[attention] < found[attention.split(".transformer_blocks")[0]]
    assert found[block] < found["up_0"] < found[WHOLE] < whole
