"""Recordings: every stored pair replays the reference, the first run stores and the second reads."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from diffpress.calibration import capture
from diffpress.calibration.model import digest, load_pipeline, state_digest
from diffpress.calibration.schedule import tabulate
from diffpress.calibration.sets import CalibrationSet
from diffpress.errors import DiffpressError

PROMPTS = ("a red ring", "a star")
UNIFORM = CalibrationSet(PROMPTS, "uniform", 3)


@pytest.fixture
def pipeline(tiny_pipeline: Path) -> Any:
    return load_pipeline(str(tiny_pipeline))


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFPRESS_CACHE", str(tmp_path / "cache"))


def recorded(pipeline: Any, chosen: CalibrationSet = UNIFORM, seed: int = 3, steps: int = 6) -> capture.Recordings:
    sampling = tabulate(pipeline.scheduler, steps, 3.0, 32, 32)
    return capture.record(pipeline, "digest", sampling, chosen, seed, lambda items, _: items)


def reference(pipeline: Any, steps: int = 6, seed: int = 3) -> list[list[tuple[float, torch.Tensor]]]:
    """The timestep and output of every call the pipeline itself makes, for each prompt."""
    seen: list[list[tuple[float, torch.Tensor]]] = []
    hook = pipeline.unet.register_forward_hook(lambda _, args, output: seen[-1].append((float(args[1]), output[0])))
    for index, prompt in enumerate(PROMPTS):
        seen.append([])
        generator = torch.Generator().manual_seed(seed + index)
        pipeline(prompt, num_inference_steps=steps, guidance_scale=3.0, generator=generator, output_type="latent")
    hook.remove()
    return seen


def assert_replays(pipeline: Any, recordings: capture.Recordings, outputs: list[list[Any]]) -> None:
    expected = [outputs[prompt][call] for prompt, calls in enumerate(recordings.calls) for call in calls]
    calls = list(recordings)
    assert len(calls) == len(recordings) == len(expected)
    for call, (timestep, output) in zip(calls, expected, strict=True):
        assert float(call.timestep) == timestep
        assert (call.variant, call.features) == ("full", {})
        with torch.no_grad():
            again = pipeline.unet(call.sample, call.timestep, encoder_hidden_states=call.text).sample
        assert torch.equal(again, output)


def test_every_stored_pair_of_every_set_replays_the_reference(pipeline: Any) -> None:
    outputs = reference(pipeline)
    lengths = {}
    for method in ("uniform", "ndtc", "every-step", "single"):
        recordings = recorded(pipeline, CalibrationSet(PROMPTS, method, 3))
        assert_replays(pipeline, recordings, outputs)
        lengths[method] = len(recordings)
    assert lengths == {"uniform": 6, "ndtc": 6, "every-step": 12, "single": 2}
    assert recorded(pipeline, CalibrationSet(PROMPTS, "every-step")).rows() == set(range(6))


def test_a_scheduler_that_scales_its_input_is_replayed_too(pipeline: Any) -> None:
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="linspace")
    recordings = recorded(pipeline, steps=5)
    assert any(float(call.timestep) % 1 for call in recordings)  # fractions, as this scheduler has
    assert_replays(pipeline, recordings, reference(pipeline, steps=5))


def test_the_second_run_reads_and_what_matters_is_recorded_again(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = recorded(pipeline)
    monkeypatch.setattr(capture, "_run", lambda *_: pytest.fail("recorded again"))
    assert recorded(pipeline) == first
    again = "recorded again"
    with pytest.raises(pytest.fail.Exception, match=again):
        recorded(pipeline, seed=4)
    with pytest.raises(pytest.fail.Exception, match=again):
        recorded(pipeline, CalibrationSet(("a red ring", "a moon"), "uniform", 3))
    with pytest.raises(pytest.fail.Exception, match=again):
        recorded(pipeline, CalibrationSet(PROMPTS, "uniform", 4))
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    with pytest.raises(pytest.fail.Exception, match=again):  # the same timesteps, other steps between them
        recorded(pipeline)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, set_alpha_to_one=False)
    pipeline.unet.conv_out.bias.data[0] += 1  # a pass changed the denoiser
    with pytest.raises(pytest.fail.Exception, match=again):
        recorded(pipeline)


def test_an_interrupted_recording_goes_on(pipeline: Any) -> None:
    whole = list(recorded(pipeline))
    folder = recorded(pipeline).folder
    for file in folder.iterdir():
        file.unlink()
    run, asked = capture._run, []

    def stops(*args: Any) -> Any:
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(args[2])
        return run(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "_run", stops)
        with pytest.raises(KeyboardInterrupt):
            recorded(pipeline)
        assert [file.name for file in folder.iterdir()] == ["0000.safetensors"]
        patch.setattr(capture, "_run", lambda *args: asked.append(args[2]) or run(*args))
        calls = list(recorded(pipeline))
    assert asked == list(PROMPTS)
    assert sorted(file.name for file in folder.iterdir()) == ["0000.safetensors", "0001.safetensors"]
    assert all(torch.equal(a.sample, b.sample) for a, b in zip(calls, whole, strict=True))


def test_calls_keep_their_variant_and_features_and_may_share_memory(tmp_path: Path) -> None:
    shared, text = torch.randn(2, 3, 4, 4).transpose(2, 3), torch.randn(2, 5, 8)
    schedule = torch.tensor([9.0, 8.0])
    calls = [
        capture.Call(shared[:, :2], schedule[:1], text),
        capture.Call(shared, schedule[1:], text, "cached", {"up_0": shared, "up_1": shared[:1]}),
    ]
    capture._write(calls, tmp_path / "0000.safetensors")
    for call, back in zip(calls, capture.Recordings(tmp_path, ((0, 1),)), strict=True):
        assert (back.variant, back.features.keys()) == (call.variant, call.features.keys())
        for name in ("sample", "timestep", "text"):
            assert torch.equal(getattr(back, name), getattr(call, name))
        assert all(torch.equal(back.features[name], call.features[name]) for name in call.features)


def test_another_number_of_calls_than_the_schedule_has_is_refused(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = tabulate(pipeline.scheduler, 6, 3.0, 32, 32)
    pipeline.scheduler.register_to_config(timestep_spacing="trailing")
    whole = pipeline.scheduler.set_timesteps
    monkeypatch.setattr(pipeline.scheduler, "set_timesteps", lambda steps, **fields: whole(steps - 1, **fields))

    def nothing(items: Iterable[Any], _: str) -> Iterable[Any]:
        return items

    with pytest.raises(DiffpressError, match="5 times where the schedule has 6 calls"):
        capture.record(pipeline, "digest", sampling, UNIFORM, 3, nothing)


def test_digest_changes_with_a_weight(tiny_pipeline: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_pipeline, copy)
    assert digest(str(copy)) == digest(str(tiny_pipeline))
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert digest(str(copy)) != digest(str(tiny_pipeline))


def test_state_digest_sees_values_their_order_names_and_types() -> None:
    layer = torch.nn.Linear(3, 2)
    first = state_digest(layer)
    assert state_digest(layer) == first
    seen = {first, state_digest(torch.nn.Sequential(layer))}
    layer.weight.data = layer.weight.data.flip(1)
    seen.add(state_digest(layer))
    layer.weight.data[0, 0] += 1e-6
    seen.add(state_digest(layer))
    seen.add(state_digest(layer.to(torch.bfloat16)))
    assert len(seen) == 5
