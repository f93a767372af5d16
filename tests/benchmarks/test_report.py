import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from diffpress.benchmarks.card import card
from diffpress.benchmarks.gates import judge
from diffpress.benchmarks.markup import between, figures, rows_to_table
from diffpress.benchmarks.pictures import DIFFERENCE_GAIN
from diffpress.benchmarks.report import Picture, render
from diffpress.gates import parse

VOID = {"meta", "img", "br", "input", "line", "circle", "rect", "polyline", "path"}


class Checker(HTMLParser):
    """Raises where tags do not close in order; collects classes, texts and what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []  # not those of plots, whose axes have numbers of their own
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

    def handle_data(self, data: str) -> None:
        if not {"svg", "style", "script", "title"} & set(self.open):
            self.words.append(data)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def test_the_page_is_whole_and_loads_nothing(made_up_report: dict[str, Any], pictures: list[Picture]) -> None:
    page = render(made_up_report, pictures)
    checker = checked(page)
    assert "{{" not in page and "None" not in page and "nan" not in re.sub(r"base64,[^\"]*", "", page)
    assert len(checker.loads) == 7 and all(one.startswith("data:image/png;base64,") for one in checker.loads)
    assert not {"link", "iframe"} & set(checker.tags) and checker.tags.count("script") == 1
    assert not re.search(r"https?:|@import|url\(|fetch|XMLHttp", re.sub(r"base64,[^\"]*", "", page))
    assert "default-src 'none'" in page  # and the browser would refuse it, too
    assert page.index("7.0× faster") < page.index("<h2>")


def test_what_came_from_outside_is_escaped(made_up_report: dict[str, Any], pictures: list[Picture]) -> None:
    made_up_report["model"]["source"] = "<script>alert(1)</script>"
    page = render(made_up_report, pictures)
    assert "<script>alert" not in page
    assert "a &lt;red&gt; &amp; blue star" in page and "it &lt;broke&gt;" in page


def test_a_model_without_a_judge(made_up_report: dict[str, Any], pictures: list[Picture]) -> None:
    for name in ("clip_score", "attribute_accuracy", "frechet"):
        made_up_report["quality"][name] = {"reference": None, "compressed": None}
        made_up_report["fewer_plain_steps"][name] = None
    made_up_report["attributes"] = {"reference": None, "compressed": None}
    made_up_report["metrics"] = {"clip_score": {"by": None, "note": None}}
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
    assert ">0.95<" in page


def test_only_the_row_itself_is_bold() -> None:
    table = rows_to_table(["", "ms"], [["uncompressed", "2"], ["compressed", "1"]], own="compressed")
    assert table.count('class="own"') == 1


def altered(value: Any, random: np.random.Generator) -> Any:
    """The same document with other numbers, each by a factor of its own, and other digits in its words."""
    if isinstance(value, dict):
        return {name: altered(entry, random) for name, entry in value.items()}
    if isinstance(value, list):
        return [altered(entry, random) for entry in value]
    if isinstance(value, str):
        return re.sub(r"\d", lambda digit: str((int(digit[0]) + 3) % 10), value)
    if isinstance(value, bool) or value is None:
        return value
    return type(value)(value * random.uniform(1.5, 2.5)) + (3 if isinstance(value, int) else 0)


def numbers(words: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", words)


@pytest.mark.parametrize("kind", ["page", "card"])
def test_every_number_is_one_of_the_report(kind: str, full_report: dict[str, Any], pictures: list[Picture]) -> None:
    """What stays as it was when all numbers of the report change does not come from it: nothing but a few constants."""
    full_report["pictures"] = full_report["pictures"][:2]

    def shown(report: dict[str, Any]) -> list[str]:
        if kind == "card":
            return numbers(card(report))
        return numbers(" ".join(checked(render(report, pictures)).words))

    other = altered(full_report, np.random.default_rng(1))
    for name in ("marks", "steps", "segments"):  # a program of as many steps
        other["program"][name] = full_report["program"][name]
    before, after = shown(full_report), shown(other)
    assert len(before) == len(after) > (60 if kind == "card" else 300)
    stayed = {one for one, two in zip(before, after, strict=True) if one == two}
    counted = {"1", "2", "25", "27", "18", "32", "50"}  # gates, pictures, layers by format and in all, steps by kind
    constant = {"32", "2", "95"}  # FP32, L2, 95 % intervals
    # How much differences are enlarged, p90 and p99, a ceiling's int8; in the card sm89 and images[0].
    constant |= {str(DIFFERENCE_GAIN), "90", "99", "8"} if kind == "page" else {"89", "0"}
    assert stayed <= counted | constant, stayed


def test_sections_without_their_keys_are_not_there(
    full_report: dict[str, Any], made_up_report: dict[str, Any], pictures: list[Picture]
) -> None:
    optional = {
        "gates": "gates failed",
        "candidates": "Quality against speed",
        "throughput": "Throughput</h3>",
        "cold_start_ms": "Cold start</h3>",
        "roofline": "How far from the machine",
        "layers": "What each layer became",
        "recipe_in_full": "The recipe in full",
        "speedup_interval": "9.11",
        "quality_interval": "0.9921",
    }
    page = render(full_report, pictures)
    assert [name for name, words in optional.items() if words not in page] == []
    for name, words in optional.items():
        bare = render({key: value for key, value in full_report.items() if key != name}, pictures)
        checked(bare)
        assert words not in bare, name


def test_a_roofline_says_why_a_graph_has_no_numbers(full_report: dict[str, Any], pictures: list[Picture]) -> None:
    page = render(full_report, pictures)
    assert "32 calls of batch 2: it &lt;broke&gt;" in page and "fp32 151, int8 603 billion" in page
    assert "Operators of full" in page and page.count("Operators of") == 1  # those of the chosen backend alone


def test_the_waterfall_is_whole(full_report: dict[str, Any], pictures: list[Picture]) -> None:
    """Every component begins where the last one ended, and the last one ends at the end."""
    page = render(full_report, pictures)
    falls = page.split('<div class="fall">')[1:]
    assert len(falls) == 3
    for fall in falls:
        found = re.findall(r"margin-left:([\d.]+)%;width:([\d.]+)%", fall.split("</figure>")[0])
        ends = [float(left) + float(width) for left, width in found]
        assert [float(left) for left, _ in found[1:]] == pytest.approx(ends[:-1], abs=0.02)
        assert ends[-1] == pytest.approx(100, abs=0.02)
    assert "18 full steps" in falls[2] and "32 cached steps" in falls[2] and "50 steps" in falls[0]
    full_report["program"]["guidance"] = "#" + "-" * 49
    page = render(full_report, pictures)
    assert "1 full (both halves) step<" in page and "32 cached (half, difference kept) steps" in page


def test_pictures_beyond_the_first_open_on_demand(made_up_report: dict[str, Any], pictures: list[Picture]) -> None:
    first, worst = made_up_report["pictures"]
    made_up_report["pictures"] = [first] * 8 + [worst] * 4
    many = [Picture(index, pictures[0].reference, pictures[0].compressed) for index in range(12)]
    page = render(made_up_report, many)
    checked(page)
    seen, rest = page.split("<summary>6 more pictures</summary>")
    assert seen.count('class="pair"') == rest.count('class="pair"') == 6
    assert seen.count("worst, seed 7") == rest.count("worst, seed 7") == 2
    assert "The first 8 prompts, not chosen, and the 4 of all 20 that differ most" in seen


def test_numbers_as_people_read_them() -> None:
    assert [figures(value) for value in (None, 0.76, 1.0, 10.84, 151.0, 12345.6)] == [
        "–", "0.760", "1.00", "10.8", "151", "12346",
    ]  # fmt: skip
    assert between(None, 1) == between([None, 1.0], 1) == ""
    assert between([0.981, 0.9966], 1, 100, "%") == "98.1–99.7%"
