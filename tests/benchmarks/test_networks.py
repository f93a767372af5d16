from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffpress.benchmarks import lpips, networks, quality, scores
from diffpress.benchmarks.candidates import Drawn, draw
from diffpress.benchmarks.networks import Networks
from diffpress.benchmarks.prompts import Prompts
from diffpress.errors import DiffpressError

TEXTS = ["a", "b", "c", "d", "e", "f"]


@pytest.fixture
def sets(fake_candidate: Callable[..., Any]) -> dict[str, Drawn]:
    candidates = {"reference": fake_candidate(), "off": fake_candidate(shift=30)}
    return {name: draw(one, TEXTS, range(6), batch=4, keep=2) for name, one in candidates.items()}


@pytest.fixture
def given() -> Networks:
    """Networks that see the mean colour; the CLIP's score is that of the first channel."""

    def features(pixels: np.ndarray) -> np.ndarray:
        return pixels.mean(axis=(1, 2), dtype=np.float64)

    return Networks(
        lpips=SimpleNamespace(distances=lambda a, b: np.abs(features(a) - features(b)).mean(axis=1)),  # type: ignore[arg-type]
        clip=SimpleNamespace(scores=lambda pixels, texts: features(pixels)[:, 0] + len(texts)),  # type: ignore[arg-type]
        inception=SimpleNamespace(features=features),  # type: ignore[arg-type]
        paths={"lpips": Path("at/alex.pth"), "clip_score": Path("at/clip"), "frechet": Path("at/inception.pt")},
    )


def test_nothing_is_given() -> None:
    found = Networks.load(environment={})
    assert found == Networks() and found.options() == {}
    judging = scores.Judging(Prompts(TEXTS, "nowhere"), found)
    notes = judging.metrics()
    assert {name: entry["by"] for name, entry in notes.items()} == dict.fromkeys(networks.SOURCES)
    assert "--lpips-weights (or DIFFPRESS_LPIPS_WEIGHTS)" in str(notes["lpips"]["note"])
    assert "CLIP's folder" in str(notes["clip_score"]["note"]) and notes["frechet"]["to"] is None


def test_paths_come_from_options_before_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "alex.pth"
    state = {f"features.{name}": value for name, value in lpips.backbone("alex").state_dict().items()}
    heads = {
        f"lin{index}.model.1.weight": torch.ones(1, width, 1, 1) for index, width in enumerate(lpips.CHANNELS["alex"])
    }
    torch.save(state | heads, file)
    environment = {"DIFFPRESS_LPIPS_WEIGHTS": str(file)}
    found = Networks.load(environment=environment)
    assert found.lpips is not None and found.clip is None and found.options() == {"--lpips-weights": file}
    with pytest.raises(DiffpressError, match=r"--lpips-weights: there is no file .*absent"):
        Networks.load(lpips_weights=tmp_path / "absent", environment=environment)
    with pytest.raises(DiffpressError, match=r"DIFFPRESS_CLIP_MODEL: there is no folder .*alex\.pth"):
        Networks.load(environment={"DIFFPRESS_CLIP_MODEL": str(file)})


def test_images_are_judged_by_what_is_given(sets: dict[str, Drawn], given: Networks) -> None:
    reference, off = sets["reference"].pixels, sets["off"].pixels
    judging = scores.Judging(Prompts(TEXTS, "nowhere"), given, reference)
    content, rows = judging.judge(off)
    assert rows["clip_score"] == pytest.approx(off[..., 0].mean(axis=(1, 2)) + 6)
    assert content.clip_score == pytest.approx(rows["clip_score"].mean()) and content.attribute_accuracy is None
    means = [pixels.mean(axis=(1, 2)) for pixels in (off, reference)]
    assert content.frechet == pytest.approx(quality.frechet(*means))
    assert judging.judge(reference)[0].frechet is None  # it is what the others are compared with
    assert judging.lpips(off, reference) == pytest.approx(np.full(6, 30))
    notes = judging.metrics()
    assert [entry["by"] for entry in notes.values()] == ["alex.pth", "clip", "inception.pt"]
    assert notes["frechet"]["to"] == "the reference's images"
    assert all(entry["note"] is None for entry in notes.values())


def test_a_network_that_fails_is_left_out_and_the_rest_goes_on(sets: dict[str, Drawn], given: Networks) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("kernel size can't be greater than input\nat aten/conv")

    given.lpips = SimpleNamespace(distances=fail)  # type: ignore[assignment]
    given.clip = SimpleNamespace(scores=fail)  # type: ignore[assignment]
    judging = scores.Judging(Prompts(TEXTS, "nowhere"), given, sets["reference"].pixels)
    content, rows = judging.judge(sets["off"].pixels)
    assert judging.lpips(sets["off"].pixels, sets["reference"].pixels) is None
    assert content.clip_score is None and rows == {} and content.frechet is not None
    note = judging.metrics()["lpips"]["note"]
    assert note == "not measured, at/alex.pth failed: kernel size can't be greater than input"
