"""Recordings: every stored pair replays the reference, the first run stores and the second reads."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from diffpress.calibration import capture
from diffpress.calibration.model import digest, load_pipeline
from diffpress.calibration.schedule import tabulate


@pytest.fixture
def pipeline(tiny_pipeline: Path) -> Any:
    return load_pipeline(str(tiny_pipeline))


def recorded(pipeline: Any, tmp: Path, monkeypatch: pytest.MonkeyPatch, seed: int = 3) -> capture.Recordings:
    monkeypatch.setenv("DIFFPRESS_CACHE", str(tmp))
    sampling = tabulate(pipeline.scheduler, 6, 3.0, 32, 32)
    return capture.record(pipeline, "digest", sampling, ["a red ring", "a star"], 3, seed, lambda items, _: items)


def test_every_stored_pair_replays_the_reference(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings = recorded(pipeline, tmp_path, monkeypatch)
    seen: list[tuple[float, torch.Tensor]] = []
    hook = pipeline.unet.register_forward_hook(
        lambda module, args, output: seen.append(
            (float(args[1]), (output if isinstance(output, tuple) else (output.sample,))[0])
        )
    )
    for index, prompt in enumerate(["a red ring", "a star"]):
        generator = torch.Generator().manual_seed(3 + index)
        pipeline(prompt, num_inference_steps=6, guidance_scale=3.0, generator=generator, output_type="latent")
    hook.remove()
    reference = [seen[i] for i in (0, 2, 5, 6, 8, 11)]  # the stride over each six calls
    calls = list(recordings)
    assert len(calls) == len(recordings) == 6
    for call, (timestep, output) in zip(calls, reference, strict=True):
        assert float(call.timestep) == timestep
        with torch.no_grad():
            again = pipeline.unet(call.sample, call.timestep, encoder_hidden_states=call.text).sample
        assert torch.equal(again, output)


def test_the_second_run_reads_and_another_seed_does_not(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = recorded(pipeline, tmp_path, monkeypatch)
    monkeypatch.setattr(capture, "_record_one", lambda *_: pytest.fail("recorded again"))
    assert recorded(pipeline, tmp_path, monkeypatch).folder == first.folder
    with pytest.raises(pytest.fail.Exception):
        recorded(pipeline, tmp_path, monkeypatch, seed=4)
    assert [p for p in first.folder.parent.iterdir() if p.suffix == ".partial"] == []


@pytest.mark.parametrize(("calls", "count"), [(50, 10), (50, 1), (3, 10), (7, 7)])
def test_uniform_stride(calls: int, count: int) -> None:
    chosen = capture.uniform_stride(calls, count)
    assert len(chosen) == min(calls, count)
    assert chosen[0] == 0
    assert count == 1 or chosen[-1] == calls - 1
    gaps = {b - a for a, b in pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_digest_changes_with_a_weight(tiny_pipeline: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_pipeline, copy)
    assert digest(str(copy)) == digest(str(tiny_pipeline))
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert digest(str(copy)) != digest(str(tiny_pipeline))
