import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from diffpress.benchmarks.search import objective, page, plot, report
from diffpress.gates import parse


class Text(HTMLParser):
    """The words of a page, and its open tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "line", "path", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_document_has_the_front_the_choice_and_who_beats_what_came_first(a_report: dict[str, Any]) -> None:
    front = {entry["name"] for entry in a_report["finalists"] if entry["front"]}
    assert front == {"quantize int8, temporal-table, fp32", "schedule <unipc> 8, fp32"}
    assert a_report["chosen"] == "b"
    assert [entry["within"] for entry in a_report["finalists"]] == [False, True, False]
    assert a_report["first"] == [{"name": "cache", "key": "a", "beaten_by": "b"}]


def test_a_lower_mean_alone_beats_nothing(a_report: dict[str, Any]) -> None:
    finalists = a_report["finalists"]
    finalists[1]["quality"]["latent_rel_l2_median"] = 0.06
    found = report._beaten(finalists, {"a": "cache"}, objective.LOSSES["latent_error"])
    assert found == [{"name": "cache", "key": "a", "beaten_by": None}]
    for entry in finalists:
        entry["loss"] = objective.LOSSES["ssim_loss"].of(entry)  # which has no other number
    assert report._beaten(finalists, {"a": "cache"}, objective.LOSSES["ssim_loss"])[0]["beaten_by"] == "b"
    finalists[1]["loss"] = finalists[0]["loss"] * 0.995 + 1e-6
    finalists[1]["quality"]["ssim"] = 1 - finalists[1]["loss"]
    assert report._beaten(finalists, {"a": "cache"}, objective.LOSSES["ssim_loss"])[0]["beaten_by"] is None


def test_the_page_holds_every_number_and_nothing_from_elsewhere(a_report: dict[str, Any]) -> None:
    html = page.render(a_report)
    read = Text(html)
    text = " ".join(read.words)
    assert not read.open and "{{" not in html
    assert not re.findall(r"https?://|src=|<script", html)
    for words in (
        "7.0× faster than diffusers, latent error 0.02",
        "Limits: speedup >= 6.5, psnr >= 21.",
        "4 trials: 3 measured, 1 refused by a pass",
        "schedule <unipc> 8, fp32",
        "12.00×",
        "cache: <no>",
        "recipe: 'correct' has to be the last pass (1)",
        "format: int8",
    ):
        assert words in text, words
    assert "its bundle" not in text


def test_the_page_says_how_the_bundle_measures(a_report: dict[str, Any], measured: Any) -> None:
    made = measured(6.4, 0.03) | {"loss": 0.03, "missed": "speedup >= 6.5 (reached 6.4)"}
    text = " ".join(Text(page.render(a_report | {"bundle": made})).words)
    assert "6.4× faster than diffusers, latent error 0.03" in text
    assert "its bundle, measured again, 6.40x, latent_error 0.03. It misses speedup >= 6.5 (reached 6.4)." in text


def test_the_page_of_a_search_that_found_nothing(a_report: dict[str, Any]) -> None:
    text = " ".join(Text(page.render(a_report | {"chosen": None})).words)
    assert "No recipe within the limits" in text and "format: int8" not in text


def test_a_point_lies_where_its_numbers_are(a_report: dict[str, Any]) -> None:
    svg = ElementTree.fromstring(plot.plot(a_report))
    dots = {node[0].text: node for node in svg.iter("circle")}
    big = [node for node in svg.iter("circle") if node.get("class") != "tried"]
    assert len(big) == 3 and len(list(svg.iter("circle"))) == 6
    assert {node.get("class") for node in big} == {"first", "chosen", "found"}

    def at(words: str) -> tuple[float, float]:
        (node,) = (node for name, node in dots.items() if name and words in name)
        return float(node.get("cx", 0)), float(node.get("cy", 0))

    cache, int8, few = at("cache: 6.00"), at("quantize int8"), at("unipc")
    assert cache[0] < int8[0] < few[0]  # faster to the right
    assert few[1] < cache[1] < int8[1]  # loss upwards
    (front,) = (node.get("d", "") for node in svg.iter("path"))
    assert f"{int8[1]:.1f}H{int8[0]:.1f}V{few[1]:.1f}H{few[0]:.1f}" in front
    assert [node.get("class") for node in svg.iter("line")].count("limit") == 1


@pytest.mark.parametrize("name", objective.LOSSES)
def test_every_loss_can_be_drawn(name: str, a_report: dict[str, Any]) -> None:
    """Losses may be 0 or negative: PSNR, or what gained attributes."""
    for index, entry in enumerate(a_report["finalists"]):
        entry["loss"] = objective.LOSSES[name].of(entry) - index * (name == "attribute_loss") * 30
    svg = ElementTree.fromstring(plot.plot(a_report | {"minimise": name}))
    for node in svg.iter("circle"):
        if node.get("class") != "tried":
            assert 0 <= float(node.get("cx", -1)) <= plot.WIDTH and 0 <= float(node.get("cy", -1)) <= plot.HEIGHT


def test_one_finalist_can_be_drawn(a_report: dict[str, Any]) -> None:
    report = a_report | {"finalists": a_report["finalists"][:1], "trials": [], "first": [], "chosen": "a"}
    ElementTree.fromstring(plot.plot(report))


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ([], "export only, bf16"),
        (["temporal-table"], "temporal-table, bf16"),
        ([{"cachequant": {"interval": 5, "correct": False}}], "cachequant 5 no correct, bf16"),
        ([{"cache-budget": {"speedup": 1.50}}, {"cache": None}], "cache-budget 1.5, cache, bf16"),
    ],
)
def test_recipes_have_short_names(passes: list[Any], words: str) -> None:
    assert report.described({"passes": passes}, "bf16") == words


def test_what_is_said_where_nothing_keeps_the_limits(a_report: dict[str, Any]) -> None:
    said = report.nothing(a_report, [parse("speedup >= 50"), parse("latent_error <= 0.01")])
    assert "no recipe of 4 trials keeps the limits; the nearest, quantize int8, temporal-table, fp32 (7.00x" in said
    assert "misses speedup >= 50 (reached 7), latent_error <= 0.01 (reached 0.02)" in said


def test_the_lines_and_the_command(a_report: dict[str, Any], measured: Any, tmp_path: Any) -> None:
    lines = list(report.lines(a_report | {"bundle": measured(6.9, 0.021) | {"loss": 0.021}}))
    assert lines[0] == "4 trials, 3 of them measured to the end"
    timed = a_report | {"bundle": measured(6.9, 0.021) | {"loss": 0.021}, "run": {"trials": 3, "seconds": 150.0}}
    assert next(report.lines(timed)) == "4 trials, 3 of them measured to the end; 3 in 2 minutes"
    assert lines[2].endswith("6.90x, latent_error 0.021")
    assert lines[3].startswith("  cache (6.00x, latent_error 0.05): beaten by quantize int8")
    options = {"budget": (parse("speedup >= 6"), parse("bytes <= 0.3x")), "trials": 5, "ray": None}
    said = report.command("shapes", "my space.yaml", tmp_path, options)
    assert said == (
        "diffpress search shapes --space 'my space.yaml' --budget 'speedup >= 6' --budget 'bytes <= 0.3x' --trials 5 "
        f"--output {tmp_path}"
    )
