import re
from xml.etree import ElementTree

import pytest

from diffpress.benchmarks import plots


@pytest.mark.parametrize(
    ("top", "ticks"),
    [(10, [0, 2.5, 5, 7.5, 10]), (13.2, [0, 5, 10, 15]), (0.9, [0, 0.25, 0.5, 0.75, 1.0]), (0, [0, 1])],
)
def test_ticks_are_round(top: float, ticks: list[float]) -> None:
    assert plots.nice_ticks(top) == pytest.approx(ticks)


def test_log_ticks_enclose() -> None:
    assert plots.log_ticks(3e-4, 0.02) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert plots.log_ticks(1e-3, 1e-2) == pytest.approx([1e-3, 1e-2])


def points(svg: str, name: str) -> list[tuple[float, float]]:
    (line,) = (node for node in ElementTree.fromstring(svg).iter("polyline") if name in node.get("class", ""))
    return [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]  # type: ignore[misc]


def test_errors_rise_on_a_logarithmic_scale() -> None:
    svg = plots.error_lines({"compressed": [1e-3, 1e-2, 1e-1]}, "#-#", "errors")
    heights = [y for _, y in points(svg, "compressed")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2) and heights[0] > heights[1]
    assert svg.count("open") == 1


def test_zero_and_missing_errors_do_not_break_the_plot() -> None:
    assert plots.error_lines({"compressed": [0.0, 0.0]}, "##", "errors") == ""
    ElementTree.fromstring(plots.error_lines({"compressed": [0.0, 1e-3, None]}, "###", "errors"))
    ElementTree.fromstring(plots.error_lines({"compressed": [1e-3]}, "#", "errors"))


def test_a_column_for_each_step() -> None:
    svg = plots.step_columns([2.0, 1.0, 1.0], "#--", {"reference_eager": [4.0, 5.0, 4.0]}, "steps")
    boxes = list(ElementTree.fromstring(svg).iter("rect"))
    assert [box.get("class") for box in boxes] == ["full", "reuse", "reuse"]
    full, reuse = (float(box.get("height", 0)) for box in boxes[:2])
    assert full == pytest.approx(2 * reuse, abs=0.2)
    assert plots.step_columns([], "", {}, "steps") == ""


def test_no_two_series_of_a_scatter_look_alike() -> None:
    dots = {f"method {number}": [(1.0 + number, 0.1)] for number in range(25)}
    svg = plots.scatter(dots, ("line", [(1.0, 0.01), (10.0, 0.2)]), "speed", "error")
    marks = [node for node in ElementTree.fromstring(svg).iter() if any("title" in child.tag for child in node)]
    # A path is drawn around its first point: what follows is its shape.
    looks = {(node.get("fill") or node.get("stroke"), re.sub("^M[^lh]*", "", node.get("d", ""))) for node in marks}
    assert len(looks) == 25 and "method 24, 25: 0.1" in svg
    with pytest.raises(ValueError, match="26 series"):
        plots.scatter({**dots, "more": [(1.0, 0.1)]}, ("line", [(1.0, 0.1)]), "speed", "error")
