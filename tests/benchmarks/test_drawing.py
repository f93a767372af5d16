"""Drawing is cut off and goes on; what it depends on decides what is drawn again."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress import bundle as bundles
from diffpress.benchmarks import candidates, drawing
from diffpress.benchmarks.drawing import Wanted
from diffpress.bundle import Bundle

TEXTS = [f"prompt {index}" for index in range(7)]
WANTED = [Wanted("reference", TEXTS, 3, 4, "r"), Wanted("compressed", TEXTS[:5], 3, 0, ["c", 1])]


@pytest.fixture
def opened(fake_candidate: Callable[..., Any]) -> Callable[[str], Any]:
    made = {"reference": fake_candidate(), "compressed": fake_candidate(shift=9)}
    return lambda name: made[name]


def quietly(items: Iterable[Any], _: str) -> Iterable[Any]:
    return items


def test_what_is_drawn_in_parts_is_what_is_drawn_at_once(opened: Callable[[str], Any], tmp_path: Path) -> None:
    drawing.draw_all(WANTED, opened, tmp_path, quietly)
    found = drawing.read_all(WANTED, tmp_path)
    whole = candidates.draw(opened("reference"), TEXTS, range(7), batch=7, keep=4)
    for field in ("pixels", "latents", "trajectory"):
        assert np.array_equal(getattr(found["reference"], field), getattr(whole, field)), field
    assert len(found["compressed"].pixels) == 5 and found["compressed"].trajectory.shape[1] == 0


def test_an_interrupted_drawing_goes_on(opened: Callable[[str], Any], tmp_path: Path) -> None:
    seeds: list[int] = []

    def cut_off(name: str) -> Any:
        def draw(prompts: list[str], own: list[int], *, keep_latents: bool = False) -> Any:
            if len(seeds) >= 6:
                raise KeyboardInterrupt
            seeds.extend(own)
            return opened(name)(prompts, own, keep_latents=keep_latents)

        return draw

    with pytest.raises(KeyboardInterrupt):
        drawing.draw_all(WANTED, cut_off, tmp_path, quietly)
    assert seeds == [0, 1, 2, 3, 4, 5]
    kept = sorted(tmp_path.rglob("*.npz"))
    assert [path.name for path in kept] == ["000000.npz", "000003.npz"]
    asked: list[str] = []

    def noted(name: str) -> Any:
        asked.append(name)
        return opened(name)

    drawing.draw_all(WANTED, noted, tmp_path, quietly)
    assert asked == ["reference", "compressed", "compressed"]  # a batch of the one is left, and all of the other
    whole = candidates.draw(opened("reference"), TEXTS, range(7), batch=7, keep=4)
    assert np.array_equal(drawing.read_all(WANTED, tmp_path)["reference"].pixels, whole.pixels)
    asked.clear()
    drawing.draw_all(WANTED, noted, tmp_path, quietly)
    assert asked == []


def test_other_images_have_other_folders() -> None:
    one = WANTED[0]
    others = [replace(one, texts=TEXTS[:6]), replace(one, batch=2), replace(one, keep=0), replace(one, key="s")]
    assert len({entry.folder for entry in (one, replace(one, texts=list(TEXTS)), *others)}) == 5


def test_another_bundle_has_another_folder(handmade: Bundle) -> None:
    first = drawing.folder_of(handmade, TEXTS)
    assert drawing.folder_of(handmade, TEXTS[:6]) != first
    (handmade.path / "report").mkdir()
    (handmade.path / "report" / "report.json").write_text("{}")
    assert drawing.folder_of(bundles.update(handmade, measured={}), TEXTS) == first
    handmade.file("tokenizer/merges.txt").write_text("changed")
    assert drawing.folder_of(bundles.update(handmade), TEXTS) != first
