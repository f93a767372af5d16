import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from diffpress.benchmarks.gates import judge
from diffpress.benchmarks.report import Picture, render
from diffpress.benchmarks.sections import rows_to_table
from diffpress.gates import parse

VOID = {"meta", "img", "br", "line", "circle", "rect", "polyline"}


class Checker(HTMLParser):
    """Raises where tags do not close in order; collects classes, texts and what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


@pytest.fixture
def pictures() -> list[Picture]:
    random = np.random.default_rng(0)
    a, b, c = random.integers(0, 255, (3, 16, 16, 3)).astype(np.uint8)
    return [Picture("a <red> & blue star", 0, "", a, b, c), Picture("a ring", 7, "worst", a, b)]


def test_the_page_is_whole_and_loads_nothing(made_up_report: dict[str, Any], pictures: list[Picture]) -> None:
    page = render(made_up_report, pictures)
    checker = checked(page)
    assert "{{" not in page and "None" not in page and "nan" not in re.sub(r"base64,[^\"]*", "", page)
    assert len(checker.loads) == 7 and all(one.startswith("data:image/png;base64,") for one in checker.loads)
    assert not {"script", "link", "iframe"} & set(checker.tags)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page) and "@import" not in page and "url(" not in page
    assert page.index("7.0× faster") < page.index("<h2>")


def test_what_came_from_outside_is_escaped(made_up_report: dict[str, Any], pictures: list[Picture]) -> None:
    made_up_report["model"]["source"] = "<script>alert(1)</script>"
    page = render(made_up_report, pictures)
    assert "<script>" not in page
    assert "a &lt;red&gt; &amp; blue star" in page and "it &lt;broke&gt;" in page


def test_a_model_without_a_judge(made_up_report: dict[str, Any], pictures: list[Picture]) -> None:
    for name in ("clip_score", "attribute_accuracy", "frechet"):
        made_up_report["quality"][name] = {"reference": None, "compressed": None}
        made_up_report["fewer_plain_steps"][name] = None
    made_up_report["attributes"] = {"reference": None, "compressed": None}
    page = render(made_up_report, pictures)
    checked(page)
    assert "CLIP score" not in page and "Attributes right" not in page


def test_the_barest_report(made_up_report: dict[str, Any], pictures: list[Picture]) -> None:
    """fp32, no passes, no engines, no plain steps, no size of the reference."""
    row = made_up_report["fewer_plain_steps"]
    made_up_report["fewer_plain_steps"] = {**dict.fromkeys(row), "trials": [], "schedule": None}
    made_up_report |= {"same_precision": None, "passes": [], "engines": [], "faults": ["compressed, image 1: constant"]}
    made_up_report["program"] = {"marks": "####", "steps": ["full"] * 4}
    made_up_report["size_bytes"]["denoiser_reference"] = None
    made_up_report["per_step"]["latent_rel_l2"]["compressed"] = [0.0, None, 0.1, 0.1]
    page = render(made_up_report, pictures)
    checked(page)
    assert "Broken images" in page and "plain steps</th>" not in page


def test_another_schedule_is_told_and_not_compared_step_by_step(
    made_up_report: dict[str, Any], pictures: list[Picture]
) -> None:
    made_up_report["reference"] = {**made_up_report["sampling"], "scheduler": "PNDMScheduler", "steps": 50}
    made_up_report["per_step"]["latent_rel_l2"] |= {"compressed": None, "uncompressed_export": [1e-6] * 50}
    page = render(made_up_report, pictures)
    checked(page)
    assert "DDIMScheduler, 4 steps" in page and "against PNDMScheduler, 50 steps" in page
    assert "compared at the end alone" in page and "line compressed" not in page.split("error after each step")[1]


def test_the_step_program_is_a_grid(made_up_report: dict[str, Any], pictures: list[Picture]) -> None:
    page = render(made_up_report, pictures)  # of a report from before there were parts
    checked(page)
    assert page.count('<div class="program">') == 1 and "<span>denoiser</span>" in page
    made_up_report["program"] |= {
        "segments": [{"name": "deep <er>", "marks": "#-+/"}, {"name": "ff", "marks": "##.#"}],
        "together": "|[=]",
        "guidance": "#--.",
    }
    page = render(made_up_report, pictures)
    checked(page)
    grid = page[page.index('aria-label="step program"') : page.index("Time of each step")]
    assert re.findall(r"</?span>([^<]+)</span>", grid)[:4] == ["deep &lt;er&gt;", "ff", "calls", "guidance"]
    rows = [re.findall(r'<i class="([^"]+)"', row) for row in grid.split('<div class="program">')[1:]]
    assert rows[0][:4] == ["full", "reuse", "corrected", "extrapolated"]
    assert rows[1] == ["full", "full", "within", "full"]
    assert rows[2] == ["call", "call on", "call on", "call"]
    assert rows[3][:4] == ["full", "reuse", "reuse", "within"]
    for words in ("step 3: cached, taken and corrected", "extrapolated from two", "joined: steps that run together"):
        assert words in grid


def test_gates_stand_before_the_pictures(made_up_report: dict[str, Any], pictures: list[Picture]) -> None:
    made_up_report |= judge(made_up_report, [parse("speedup >= 10"), parse("ssim >= 0.9")])
    page = render(made_up_report, pictures)
    checked(page)
    assert page.index("7.0× faster") < page.index("1 of 2 gates failed") < page.index("<h2>Pictures")
    assert "measured 0.95" in page


def test_only_the_row_itself_is_bold() -> None:
    table = rows_to_table(["", "ms"], [["uncompressed", "2"], ["compressed", "1"]], own="compressed")
    assert table.count('class="own"') == 1
