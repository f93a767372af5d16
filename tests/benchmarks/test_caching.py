"""The caching benchmark: its rows are recipes, rivals are as fast, and what is told follows from the numbers."""

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from diffpress import bundle
from diffpress.benchmarks import (
    caching,
    caching_peers,
    caching_rows,
    caching_speed,
    caching_tables,
    plain,
    recipe_rows,
    scores,
)
from diffpress.benchmarks.candidates import Drawn, Reference, draw
from diffpress.benchmarks.networks import Networks
from diffpress.benchmarks.recipe_rows import Row
from diffpress.calibration import model as models
from diffpress.compress.recipe import PASSES
from diffpress.errors import DiffpressError
from diffpress.plan import Plan, StepProgram

ERRORS = [f"{key}{end}" for key in ("latent_rel_l2", "latent_rel_l2_converged") for end in ("", "_median")]


def test_every_row_is_a_recipe_whose_passes_are_known() -> None:
    rows = caching_rows.table("bf16")
    known = {
        name: row
        for name, row in rows.items()
        if all((entry if isinstance(entry, str) else next(iter(entry))) in PASSES for entry in row.passes)
    }
    caching_rows.check(known)
    assert {"fp32", "bf16", "fp32, 20 steps", "bf16, 20 steps", *caching_rows.QUICK} <= known.keys()
    assert {peer.ours for peer in caching_peers.PEERS.values() if peer.ours} <= known.keys()
    assert "bf16" not in caching_rows.table("fp32")
    assert len({row.group for row in rows.values()}) == 5
    names = {name.split(",")[0] for name in rows} | {name.split(",")[0] for name in caching_peers.PEERS}
    assert len(names) <= 25  # marks of the plot


def test_a_row_that_nobody_can_measure_is_an_error_not_a_gap() -> None:
    rows = {"good": Row("x", ({"cache": {"interval": 2}},)), "bad": Row("x", ({"no-such-pass": {}},))}
    with pytest.raises(DiffpressError, match=r"1 rows cannot be measured:\nbad: .*no-such-pass"):
        caching_rows.check(rows)


def test_rows_are_compared_with_the_same_schedule_without_a_cache() -> None:
    rows = caching_rows.table("bf16")
    found = {name: caching_rows.full_of(name, row) for name, row in rows.items()}
    assert found["bf16"] == found["DeepCache, interval 3"] == found["INT8"] == "fp32"
    assert found["bf16, 20 steps"] == found["fp32, 20 steps"] == found["DeepCache, interval 2, 20 steps"]
    for name, row in rows.items():
        assert row.passes[: len(rows[found[name]].passes)] == rows[found[name]].passes


def test_only_and_quick_keep_what_is_compared_with() -> None:
    rows = caching_rows.table("fp32")
    assert list(caching_rows.selected(rows, True, ["interval 3"])) == [
        "fp32",
        "fp32, 20 steps",
        "DeepCache, interval 3",
    ]


def _row(name: str, group: str, error: float, speed: float, **fields: Any) -> dict[str, Any]:
    """A row as `caching` writes it: every error is `error`, `speed` is against the uncached bundle."""
    made: dict[str, Any] = {"name": name, "group": group, "full": "fp32", "peer": False, "problem": None, "steps": 50}
    made |= dict.fromkeys([*ERRORS, "latent_rel_l2_full", "latent_rel_l2_full_median"], error)
    made |= {"bytes": 2e7, "psnr_db": 30.0, "ssim": 0.9, "clip_score": 30.0, "frechet": 1.0, "seconds": 2.0}
    made |= {"speedup_vs_eager": 3 * speed, "speedup_vs_uncompressed": speed, "speedup_ort": speed}
    made |= {"speedup_torch": speed, "program": "#-", "variants": 2, "attribute_accuracy": 0.9, "rival": None}
    return made | {"beats": None} | fields


def _with_rival(row: dict[str, Any], steps: int, error: float) -> dict[str, Any]:
    schedule = {"steps": steps, "schedule": "DDIM", "schedule_converged": "UniPC", **dict.fromkeys(ERRORS, error)}
    return caching_speed.judged(row | {"rival": {"steps": steps, "latency_ratio": 0.9}}, {steps: schedule})


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A small made-up table, in the file that the tables read."""
    own, short = caching_rows.OWN, caching_rows.SHORT
    rows = [
        _row("fp32", "reference", 0.0, 1.0, speedup_vs_uncompressed=None),
        _row("fp32, 20 steps", "reference", 0.05, 2.0, full="fp32, 20 steps", attribute_accuracy=0.8),
        _with_rival(_row("DeepCache, interval 3", own, 0.10, 2.0), 20, 0.2),
        _with_rival(_row("TaylorSeer, interval 3", own, 0.05, 2.3), 18, 0.2),
        _with_rival(_row("TaylorSeer, interval 5", own, 0.30, 4.0, attribute_accuracy=0.85), 12, 0.2),
        _with_rival(
            _row("MagCache, 0.1, 20 steps", short, 0.10, 1.5, full="fp32, 20 steps", attribute_accuracy=0.79), 12, 0.05
        ),
        _row("INT8 and a cache, interval 5, naive", caching_rows.EIGHT_BITS, 0.4, 3.0),
        _row("INT8 and a cache, interval 5, + schedule", caching_rows.EIGHT_BITS, 0.3, 3.0),
        _row("INT8 and a cache, interval 5, + correction", caching_rows.EIGHT_BITS, 0.2, 1.8, clip_score=29.98),
        _row("plain, 12 steps", caching_tables.PLAIN, 0.05, 4.2, schedule="DDIM", schedule_converged="UniPC"),
        _row("plain, 20 steps", caching_tables.PLAIN, 0.02, 2.2, schedule="DDIM", schedule_converged="UniPC"),
        _row("DeepCache package, interval 3", caching_tables.PEERS, 0.10, 1.9, peer=True, ours_faster=0.95),
        caching_peers.blank("diffusers FirstBlockCache", 50)
        | {"problem": "pop | empty", "rival": None, "beats": None, "speedup_vs_eager": None},
    ]
    document = {
        "machine": {"processor": "x", "cores": 2},
        "backend": "openvino fp32",
        "images": 4,
        "sampling": {"guidance": 2.0, "steps": 50, "scheduler": "DDIMScheduler"},
        "rows": rows,
    }
    (tmp_path / "caching.json").write_text(json.dumps(document))
    monkeypatch.setattr(caching_tables, "RESULTS", tmp_path)
    return rows


def test_claims_follow_from_the_numbers(told: list[dict[str, Any]]) -> None:
    lines = [line.strip("| ").split(" | ") for line in caching_tables.claims().splitlines()[2:]]
    found = {line[0]: line[2:] for line in lines}

    def of(start: str) -> list[list[str]]:
        return [cells for what, cells in found.items() if what.startswith(start)]

    # The fastest of those that lose a point at most, on each side against its own schedule.
    assert of("50 DDIM steps: fastest") == [["2.30x, TaylorSeer, interval 3", "yes"]]
    assert of("20 steps: fastest") == [["1.50x, MagCache, 0.1, 20 steps", "yes"]]
    # Ours of equal error or less, torch against torch, then the bundle; and the same settings.
    torch, bundle, same = of("DeepCache package, interval 3")
    assert torch == ["2.30x : 1.90x, TaylorSeer, interval 3", "yes"]
    assert bundle == ["6.90x : 1.90x, TaylorSeer, interval 3", "yes"] and same == ["0.95x", "**no**"]
    assert of("50 DDIM steps: latencies") == [["2 (as long as 18, 20 plain steps)", "yes"]]
    assert of("20 steps: latencies") == [["0", "**no**"]]
    assert of("INT8 and a cache, interval 5, + correction") == [["5.40x, 0.07%", "yes"]]
    parts = [["0.400 : 0.300 : 0.200", "yes"]] * 2
    assert of("INT8 and a cache, interval 5, naive : + schedule : + correction") == parts


def test_tables_have_a_line_for_every_row_and_the_short_one_for_every_method(told: list[dict[str, Any]]) -> None:
    few, every = caching_tables.caching().splitlines(), caching_tables.caching_all().splitlines()
    short, long = ({line.split(" |")[0].removeprefix("| ") for line in lines} for lines in (few, every))
    assert long >= {row["name"] for row in told}
    # Of TaylorSeer the setting that is fast enough and errs less; no plain rows, and no peer that does not run.
    left_out = {"TaylorSeer, interval 5", "plain, 12 steps", "plain, 20 steps", "diffusers FirstBlockCache"}
    assert {row["name"] for row in told} - short == left_out
    for lines in (few, every):
        width = lines[0].count("|")
        assert all(line.count("|") == width for line in lines if line.startswith("|"))
    assert (
        "| DeepCache, interval 3 | 2.00x | 6.0x | 30.0 | 0.100 (0.100) | 0.100 (0.100) | 20 | 0.200 (0.200) | "
        "0.200 (0.200) | yes : yes |" in few
    )
    assert any("does not run: pop / empty" in line for line in every)


def test_the_plot_has_every_method_and_the_plain_schedules_as_a_line(told: list[dict[str, Any]]) -> None:
    tree = ElementTree.fromstring(caching_tables.plot())
    texts = {node.text for node in tree.iter() if node.tag.endswith("text")}
    methods = {"DeepCache", "TaylorSeer", "MagCache", "INT8 and a cache", "DeepCache package", "plain schedules"}
    assert methods <= texts and "fp32" not in texts
    (line,) = (node for node in tree.iter() if node.tag.endswith("polyline"))
    ends = [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]
    assert len(ends) == 2 and ends[0][0] < ends[1][0] and ends[0][1] > ends[1][1]  # faster and worse: right and up
    titles = [node.text for node in tree.iter() if node.tag.endswith("title")]
    assert "TaylorSeer, 12: 0.3" in titles and len(titles) == 8


def test_a_row_is_judged_by_each_error_of_its_rival() -> None:
    row = _row("x", caching_rows.OWN, 0.1, 2.0)
    assert caching_speed.judged(row, {})["beats"] is None
    found = _with_rival(row, 12, 0.2)
    assert found["beats"] == dict.fromkeys(caching_speed.ERRORS, True)
    assert found["rival"]["latency_ratio"] == 0.9 and found["rival"]["schedule_converged"] == "UniPC"
    assert not any(_with_rival(row, 12, 0.1)["beats"].values())  # equal is not better


def test_a_plain_row_is_as_fast_as_those_it_was_timed_beside() -> None:
    fp32 = _row("fp32", "reference", 0.0, 1.0, bits_w=32, bits_a=32, params=5, backend="openvino fp32")
    rows = [fp32] + [_with_rival(fp32 | {"speedup_vs_eager": speed}, 12, 0.2) for speed in (8.1, 9.0, 9.9)]
    schedule = {"steps": 12, "schedule": "DDIM", "schedule_converged": "UniPC", **dict.fromkeys(ERRORS, 0.2)}
    (made,) = caching_speed.plain_rows(rows, {12: schedule})
    assert made["speedup_vs_eager"] == pytest.approx(9.0 / 0.9) and made["evaluations"] == 12
    assert made["latent_rel_l2"] == 0.2 and made["rival"] is None and made["steps"] == 12


def test_played_images_are_found_by_their_seeds() -> None:
    drawn = Drawn(np.arange(6).reshape(6, 1), np.arange(6.0).reshape(6, 1), np.empty(0))
    again = draw(caching_speed.Played(drawn), ["x"] * 4, [1, 2, 3, 5], batch=3)
    assert again.latents.ravel().tolist() == [1, 2, 3, 5] == again.pixels.ravel().tolist()


@pytest.mark.parametrize(
    ("enable", "reason"),
    [
        (caching_peers.magcache, "no layer of a U-Net"),
        (lambda hooked: caching_peers.taylorseer(hooked, 3, None), "no layer of a U-Net"),
        (caching_peers.first_block, "pop from empty list"),
        (caching_peers.faster_cache, "chunk expects"),
    ],
)
def test_a_hook_that_cannot_run_says_why(tiny: Any, enable: Any, reason: str) -> None:
    entry = caching_peers.measure("x", caching_peers.Peer(enable), *tiny)
    assert reason in entry["problem"] and entry["latent_rel_l2"] is None


@pytest.mark.parametrize(
    "enable",
    [
        lambda hooked: caching_peers.taylorseer(hooked, 3, r".*attn[12]"),
        lambda hooked: caching_peers.attention_broadcast(hooked, 2, 4),
    ],
)
def test_a_hook_that_runs_changes_the_images_and_forgets_the_last_ones(tiny: Any, enable: Any) -> None:
    sampling, chosen, *_ = tiny
    hooked = caching_peers.opened(caching_peers.Peer(enable), sampling)
    first, again = (draw(hooked, chosen.texts, [0, 1], 2).latents for _ in range(2))
    without = draw(Reference(models.load_pipeline("shapes"), sampling), chosen.texts, [0, 1], 2).latents
    assert np.array_equal(first, again) and np.abs(first - without).max() > 1e-6


@pytest.fixture
def as_shapes(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny pipeline stands where `shapes` is opened; nothing judges what it draws."""
    monkeypatch.setattr(models, "folder_of", lambda model: tiny_pipeline)
    monkeypatch.setattr(
        scores.Judging,
        "__init__",
        lambda self, chosen: vars(self).update(_judge=None, networks=Networks(), prompts=chosen, _real=None),
    )


@pytest.fixture
def tiny(as_shapes: None) -> tuple[Any, ...]:
    """Sampling of 6 steps, two prompts, references of noise, and a judge without networks."""
    from diffpress import api
    from diffpress.benchmarks import prompts
    from diffpress.compress.recipe import Recipe

    sampling = api.begin("shapes", Recipe(name="x", steps=6), quiet=True).sampling
    chosen = prompts.Prompts(["a red circle", "a blue square"], "two")
    noise = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    wanted = Drawn(np.zeros((2, 32, 32, 3), np.uint8), noise, np.empty(0))
    return sampling, chosen, (wanted, wanted), scores.Judging(chosen)


@pytest.fixture
def by_hand(as_shapes: None, handmade: bundle.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compressed is the bundle made by hand, on 50 steps, without a cache where the recipe has none."""
    from diffpress import api
    from diffpress.compress.recipe import Recipe, load

    work = api.begin("shapes", Recipe(name="x"), quiet=True)
    cached = handmade.manifest["program"]["variants"]

    def compress(model: str, recipe: str, output: Path, quiet: bool) -> None:
        plain_steps = not load(recipe).passes
        steps = ["full"] * 50 if plain_steps else ["full" if index % 3 == 0 else "cached" for index in range(50)]
        program = {"steps": steps, "variants": {"full": {"reads": [], "writes": []}} if plain_steps else cached}
        shutil.copytree(handmade.path, output)
        plan = Plan.load(output / "plan")
        Plan(work.sampling, StepProgram.from_json(program), plan.quantization).save(output / "plan")
        changed = {"sampling": work.sampling.to_json(), "program": program}
        scheduler = {"class": "DDIMScheduler", "config": dict(work.pipeline.scheduler.config)}
        bundle.write_manifest(output, {**handmade.manifest, **changed, "scheduler": scheduler})

    monkeypatch.setattr(api, "compress", compress)


def test_rows_are_measured_timed_and_given_their_rivals(
    by_hand: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end on tiny graphs: bundles, images, times, rivals, peers; then all of it is read again."""
    rows = {"fp32": caching_rows.table("fp32")["fp32"]}
    rows["DeepCache, interval 3"] = caching_rows.Case(caching_rows.OWN, ({"cache": {"interval": 3}},), quick=True)
    monkeypatch.setattr(caching, "table", lambda precision: rows)
    monkeypatch.setattr(caching.backends, "available", lambda: [("onnxruntime", "fp32")])
    peers = {
        "attention": caching_peers.Peer(lambda hooked: caching_peers.attention_broadcast(hooked, 2, 4), quick=True),
        "first block": caching_peers.Peer(caching_peers.first_block, quick=True),
    }
    monkeypatch.setattr(caching_peers, "PEERS", peers)
    monkeypatch.setattr(caching_speed, "PEERS", peers)
    monkeypatch.setattr(recipe_rows, "CONVERGED", 20)
    monkeypatch.setattr(plain, "RIVALS", {"DDIM": ("ddim", None), plain.TIMED: ("dpm++", None)})
    file = tmp_path / "caching.json"
    arguments = ["--quick", "--work", str(tmp_path / "work"), "--json", str(file)]
    caching.main(arguments)
    document = json.loads(file.read_text())
    found = {row["name"]: row for row in document["rows"]}
    assert {"fp32", "DeepCache, interval 3", "attention", "first block"} <= found.keys()
    assert document["backend"] == "onnxruntime fp32" and {"machine", "versions", "sampling"} <= document.keys()
    fp32, cached = found["fp32"], found["DeepCache, interval 3"]
    assert fp32["latent_rel_l2"] == 0 and fp32["psnr_db"] is None and fp32["speedup_vs_uncompressed"] is None
    assert cached["latent_rel_l2"] == cached["latent_rel_l2_full"] > 0
    assert cached["program"].count("#") == 17 and cached["evaluations"] == 50 and cached["bits_w"] == 8
    assert cached["speedup_vs_eager"] > 1 and cached["speedup_ort"] == cached["speedup_vs_uncompressed"] > 0
    assert cached["speedup_torch"] is None  # of INT8 there is a simulation alone
    assert cached["rival"]["latency_ratio"] <= 1 and set(cached["beats"]) == set(ERRORS)
    schedule = found[f"plain, {cached['rival']['steps']} steps"]
    assert schedule["latent_rel_l2"] == cached["rival"]["latent_rel_l2"] and schedule["speedup_vs_eager"] > 1
    assert found["attention"]["speedup_torch"] > 0 and found["first block"]["problem"]
    monkeypatch.setattr(caching_speed, "alternate", None)
    monkeypatch.setattr(caching.candidates, "draw", None)
    caching.main(arguments)
    assert json.loads(file.read_text())["rows"] == document["rows"]  # read, not measured again
