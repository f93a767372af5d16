import itertools
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from diffpress.benchmarks import front
from diffpress.benchmarks.candidates import COMPRESSED, EXPORT, PLAIN, REFERENCE, RESCHEDULED, STRICT, Drawn, draw
from diffpress.benchmarks.plain import Rival, Trial
from diffpress.plan import Sampling


def row(speedup: float, psnr: float | None, name: str = front.TRIAL) -> dict[str, Any]:
    return {"name": name, "speedup": speedup, "psnr_db": psnr, "schedule": "DDIM", "steps": 9}


def test_the_front_is_what_nothing_beats() -> None:
    rows = [row(1, None), row(3, 50), row(2, 49), row(9, 44), row(9, 40), row(9, 44), row(10, 20)]
    assert [front.on_front(one, rows) for one in rows] == [True, True, False, True, False, True, True]
    assert not front.on_front(row(1, 99), rows)  # the reference is equal to itself


def test_every_candidate_is_compared_on_the_same_images(fake_candidate: Callable[..., Any]) -> None:
    def drawn(shift: int, count: int = 5) -> Drawn:
        return draw(fake_candidate(shift=shift), ["x"] * count, range(count), batch=2)

    tried = {("DDIM", 7): drawn(9), ("UniPC", 7): drawn(6), ("UniPC", 8): drawn(5)}
    rival = Rival("UniPC", Sampling("UniPC", 7, 3.0, 64, 64, (), (), 1.0, ()), tried)
    rows = front.rows(
        {"speedup": {"vs_eager": 8.0, "vs_uncompressed_export": 4.0}, "same_precision": {"speedup": 2.0}},
        [Trial(7, 1.0, 0.8), Trial(8, 1.0, 1.25)],
        {REFERENCE: drawn(0, 9), EXPORT: drawn(1, 4), STRICT: drawn(2, 4), COMPRESSED: drawn(3, 9), PLAIN: drawn(6, 9)},
        rival,
    )
    assert [(one["name"], one["steps"]) for one in rows] == [
        (REFERENCE, None), (EXPORT, None), (COMPRESSED, None), (STRICT, None), ("trial", 7), (PLAIN, 7), ("trial", 8),
    ]  # fmt: skip
    assert [one["speedup"] for one in rows] == pytest.approx([1, 2, 8, 4, 10, 10, 6.4])
    assert {one["images"] for one in rows} == {4}  # as many as the shortest set has
    psnr = {one["name"]: one["psnr_db"] for one in rows}
    assert psnr[REFERENCE] is None and psnr[COMPRESSED] == pytest.approx(20 * np.log10(255 / 3))
    assert [one["front"] for one in rows] == [True, True, True, True, False, True, False]


def test_faster_is_to_the_right_and_better_above() -> None:
    rows = [row(1, None, REFERENCE), row(2, 90, EXPORT), row(8, 44, COMPRESSED), row(9, 38, PLAIN), row(9, 30)]
    rows = [one | {"front": front.on_front(one, rows)} for one in rows]
    svg = front.plot(rows, {REFERENCE: "diffusers", EXPORT: "export", COMPRESSED: "compressed", PLAIN: "9 steps"})
    tree = ElementTree.fromstring(svg)
    dots = {str(dot.findtext("title")).partition(":")[0]: dot for dot in tree.iter("circle")}
    places = [(float(dots[name].get("cx", 0)), float(dots[name].get("cy", 0))) for name in ("diffusers", "export")]
    assert places[0][1] == places[1][1] and places[0][0] < places[1][0]  # above 60 dB nobody sees a difference
    assert float(dots["compressed"].get("cx", 0)) < float(dots["9 steps"].get("cx", 0))
    assert float(dots["compressed"].get("cy", 0)) < float(dots["9 steps"].get("cy", 0))
    (path,) = (node.get("d", "") for node in tree.iter("path"))
    corners = [float(value) for value in re.findall(r"H([\d.]+)", path)]
    assert corners == sorted(corners) and len(corners) == sum(one["front"] for one in rows) == 4
    assert "44.0 dB" in svg and "identical" in svg


def test_names_stay_within_the_plot_and_cover_no_other() -> None:
    """As close together as those of the recipe `max` were found."""
    rows = [row(1, None, REFERENCE), row(3.2, 97, EXPORT), row(4.5, 55, STRICT), row(7.5, 38.8, RESCHEDULED)]
    rows += [row(38.8, 33.2, COMPRESSED), row(40.8, 31.2, PLAIN), row(34.7, 34.6), row(40.8, 23), row(40.8, 21.7)]
    named = {REFERENCE: "diffusers", EXPORT: "export FP32", STRICT: "export BF16", RESCHEDULED: "diffusers, 6 steps"}
    named |= {COMPRESSED: "compressed", PLAIN: "5 DPM-Solver++ Karras steps"}
    tree = ElementTree.fromstring(front.plot([one | {"front": True} for one in rows], named))
    boxes = []
    for name in (node for node in tree.iter("text") if node.get("class") == "strong"):
        width, at, base = front.LETTER * len(name.text or ""), float(name.get("x", 0)), float(name.get("y", 0))
        left = at - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[name.get("text-anchor", "start")]
        boxes.append((left, base - 15, left + width, base + 5))
        assert left >= 0 and left + width <= float(tree.get("viewBox", "").split()[2])
    assert len(boxes) == len(named)
    for (l0, t0, r0, b0), (l1, t1, r1, b1) in itertools.combinations(boxes, 2):
        assert r0 <= l1 or r1 <= l0 or b0 <= t1 or b1 <= t0


@pytest.mark.parametrize("rows", [[row(1, None)], [row(1, 100.0), row(1, 61)], [row(1, 5.0), row(300, 4.9)]])
def test_few_or_strange_points_are_drawn(rows: list[dict[str, Any]]) -> None:
    tree = ElementTree.fromstring(front.plot([one | {"front": True} for one in rows], {}))
    box = [float(value) for value in tree.get("viewBox", "").split()]
    for dot in tree.iter("circle"):
        assert 0 < float(dot.get("cx", 0)) < box[2] and 0 < float(dot.get("cy", 0)) < box[3]


@pytest.mark.parametrize("fastest", [8.71, 9.4, 87.0, 104.0, 870.0])
def test_the_last_number_of_the_axis_is_not_cut(fastest: float) -> None:
    """Its line may stand at the plot's very end."""
    svg = front.plot([one | {"front": True} for one in (row(1, None), row(fastest, 44))], {})
    labels = [node for node in ElementTree.fromstring(svg).iter("text") if (node.text or "").endswith("×")]
    ends = [float(node.get("x", 0)) + front.DIGIT * len(node.text or "") / 2 for node in labels]
    assert max(ends) <= front.WIDTH + 0.05 and ends == sorted(ends)
