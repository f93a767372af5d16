import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffpress.benchmarks import saved
from diffpress.benchmarks.candidates import draw
from diffpress.errors import DiffpressError


def test_images_and_prompts_for_a_second_look(fake_candidate: Callable[..., Any], tmp_path: Path) -> None:
    texts = ["a red star", "two words, “quoted”", "c"]
    drawn = {
        "reference_eager": draw(fake_candidate(), texts, range(3), batch=2),
        "uncompressed_export": draw(fake_candidate(shift=1), texts[:2], range(2), batch=2),
    }
    rows = {"psnr_db": np.array([30.0, 31.5, np.nan])}
    saved.check(tmp_path / "new")
    saved.save(tmp_path / "new", drawn, texts, rows)
    lines = [json.loads(line) for line in (tmp_path / "new" / saved.INDEX).read_text("utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == texts and [line["seed"] for line in lines] == [0, 1, 2]
    assert [line["psnr_db"] for line in lines] == [30.0, 31.5, None]
    assert [len(line["files"]) for line in lines] == [2, 2, 1]
    for line in lines:
        for name, file in line["files"].items():
            pixels = np.asarray(Image.open(tmp_path / "new" / file))
            assert np.array_equal(pixels, drawn[name].pixels[line["index"]])
    with pytest.raises(DiffpressError, match=r"new exists and is not an empty folder"):
        saved.check(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(DiffpressError, match="not an empty folder"):
        saved.check(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    saved.check(tmp_path / "empty")
