"""The report's page as a browser shows it: nothing overflows, nothing is empty, everything can be read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffpress.benchmarks import browser
from diffpress.benchmarks.report import Picture, render
from diffpress.errors import DiffpressError

pytestmark = pytest.mark.skipif(browser.find() is None, reason=f"no browser here: install {browser.NAMES[0]}")


@pytest.fixture
def full_page(full_report: dict[str, Any]) -> str:
    """Everything that a report may show, long words and many pictures too."""
    first, worst = full_report["pictures"]
    first["prompt"] = "a " + "very" * 30 + " long word and a large yellow triangle to the left of a small purple ring"
    full_report["pictures"] = [first] * 8 + [worst] * 4
    full_report["model"]["source"] = "a-model-with-a-rather-long-name-that-has-no-spaces-at-all-v1.5"
    full_report["reproduce"].append("diffpress " + "x" * 120)
    full_report["faults"] = ["compressed, image 3: constant"]
    random = np.random.default_rng(0)
    a, b, c = random.integers(0, 255, (3, 64, 64, 3)).astype(np.uint8)
    return render(full_report, [Picture(index, a, b, c if index else None) for index in range(12)])


@pytest.fixture
def bare_page(made_up_report: dict[str, Any], pictures: list[Picture]) -> str:
    """As little as a report can have."""
    row = made_up_report["fewer_plain_steps"]
    made_up_report["fewer_plain_steps"] = {**dict.fromkeys(row), "trials": [], "schedule": None}
    made_up_report |= {
        "same_precision": None,
        "passes": [],
        "engines": [],
        "backends_tried": [made_up_report["backends_tried"][0]],
    }
    made_up_report["program"] = {"marks": "####", "steps": ["full"] * 4}
    made_up_report["size_bytes"]["denoiser_reference"] = None
    made_up_report["per_step"]["latent_rel_l2"] = {"compressed": [0.0] * 4}
    for name in ("clip_score", "attribute_accuracy", "frechet"):
        made_up_report["quality"][name] = {"reference": None, "compressed": None}
    made_up_report["attributes"] = {"reference": None, "compressed": None}
    return render(made_up_report, pictures)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("page", ["full_page", "bare_page"])
def test_nothing_overflows_is_empty_or_too_pale(
    page: str, width: int, dark: bool, request: pytest.FixtureRequest
) -> None:
    text = request.getfixturevalue(page)
    seen = browser.look(text, width, dark)
    assert seen["faults"] == []
    assert seen["width"] == width and seen["dark"] is dark
    assert seen["sliders"] == text.count('class="slider"') > 0
    assert seen["scrolled"] == [] or width == 360  # where there is room no table needs to be scrolled
    assert [one for one in seen["scrolled"] if "<pre" not in one] == []


def test_without_script_the_pictures_stand_side_by_side(full_page: str) -> None:
    seen = browser.look(full_page, 360, script=False)
    assert seen["faults"] == [] and seen["sliders"] == 0 and seen["hidden"] == []


HARMS = {
    "<div style='width:2000px'>wide</div>": "the page is 2",
    "<div class='a' style='width:50px;overflow:hidden;white-space:pre'>longer than it</div>": 'cut off: <div class="a"',
    "<div class='b' style='height:9px;overflow:hidden'>words<br>and more</div>": 'text is cut: <div class="b"',
    "<section class='c'><h2>A heading</h2><p class='note'>and nothing</p></section>": 'empty: <section class="c"',
    "<section><div class='plots'><div class='d'></div></div>words</section>": 'empty: <div class="d"',
    "<table class='e'><tbody></tbody></table>": 'no rows: <table class="e"',
    "<img src='data:image/png;base64,AAAA' alt='a broken one'>": "not a picture: a broken one",
    "<svg class='f' viewBox='0 0 480 99' style='width:0'></svg>": 'no size: <svg class="f"',
    "<svg viewBox='0 0 480 99'><text class='g' x='460' y='40'>outside</text></svg>": 'text is cut: <text class="g"',
    "<svg viewBox='0 0 480 99'><text y='40'>one</text><text y='42'>two</text></svg>": "'one' stands on 'two'",
    "<p class='h' style='color:#bbb;background:#fff'>pale</p>": 'contrast 1.92: <p class="h"',
    "<p class='i' style='font-size:6px'>small</p>": 'letters of 6.0 px: <p class="i"',
    "<p class='j' style='visibility:hidden'>words</p>": 'not shown: <p class="j"',
}


def test_the_probe_finds_what_is_wrong(bare_page: str) -> None:
    faults = browser.look(bare_page.replace("</main>", "".join(HARMS) + "</main>"), 1280)["faults"]
    assert [fault for fault in HARMS.values() if not any(fault in one for one in faults)] == []


def test_pictures_of_the_page(bare_page: str, tmp_path: Path) -> None:
    browser.screenshot(bare_page, tmp_path / "page.png", 360, dark=True, height=700)
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert pixels.shape == (700, 360, 3)
    assert (pixels[2, 2] == (0x13, 0x15, 0x18)).all() and pixels.std() > 10  # the dark paper, and something on it


def test_no_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "find", lambda: None)
    with pytest.raises(DiffpressError, match="install one of chromium"):
        browser.look("<p>x</p>", 360)
