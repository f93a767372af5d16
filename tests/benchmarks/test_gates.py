import math
from typing import Any

import pytest

from diffpress.benchmarks import gates
from diffpress.errors import DiffpressError, GateError
from diffpress.gates import METRICS, parse

# What some reports have and the made-up one has not.
OPTIONAL = {"lpips", "cold_start_ms", "latent_error_median"}


@pytest.mark.parametrize(
    ("text", "measured"),
    [
        ("speedup >= 3", 7.0),
        ("speedup >= 3x", 7.0),
        ("speedup_vs_uncompressed >= 2", 2.5),
        ("p50_ms <= 120", 100.0),
        ("p50_ms <= 0.2x", 1 / 7),
        ("p99_ms <= -80%", 100 * (120 - 840) / 840),
        ("bytes <= 5000000", 5_000_000),
        ("bytes <= 0.3x", 0.25),
        ("bytes <= -70%", -75.0),
        ("peak_rss_bytes <= 0.5x", 0.36),
        ("psnr >= 28", 30.0),
        ("ssim >= 0.9", 0.95),
        ("latent_error <= 0.2", 0.1),
        ("clip >= -0.2%", 100 * (30.9 - 31) / 31),
        ("clip >= -0.2pt", -0.1),
        ("frechet <= 1.05x", 1.02),
        ("attribute_accuracy >= -1.0pt", -0.5),
        ("attribute_accuracy >= 0.98", 0.985),
        ("attribute_accuracy >= -1%", 100 * (0.985 - 0.99) / 0.99),
        ("faults <= 0", 0),
    ],
)
def test_a_number_is_measured_in_the_unit_of_its_gate(
    made_up_report: dict[str, Any], text: str, measured: float
) -> None:
    assert parse(text).measure(made_up_report) == pytest.approx(measured)


def test_every_metric_stands_in_a_report(made_up_report: dict[str, Any]) -> None:
    chosen = {name: parse(f"{name} > 0") for name in METRICS}
    missing = {name for name, gate in chosen.items() if gate.measure(made_up_report) is None}
    assert missing == OPTIONAL
    made_up_report["quality"] |= {"lpips": 0.02, "latent_rel_l2_median": 0.05}
    made_up_report["cold_start_ms"] = {"compressed": 900.0, "reference_eager": 1800.0}
    assert [chosen[name].measure(made_up_report) for name in sorted(OPTIONAL)] == [900.0, 0.05, 0.02]
    assert parse("cold_start_ms <= 0.6x").measure(made_up_report) == 0.5


def test_all_gates_are_judged_and_the_failed_named(made_up_report: dict[str, Any]) -> None:
    chosen = [parse(text) for text in ("speedup >= 10", "clip >= -0.2%", "ssim >= 0.9")]
    made_up_report |= gates.judge(made_up_report, chosen)
    assert made_up_report["passed"] is False
    first, second, third = made_up_report["gates"]
    assert first == {"gate": "speedup >= 10", "measured": 7.0, "limit": 10.0, "unit": "", "passed": False}
    assert (second["measured"], second["passed"]) == (pytest.approx(-0.32258), False)
    assert third["passed"] is True
    with pytest.raises(GateError) as caught:
        gates.check(made_up_report)
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        "balanced failed 2 of 3 gates: speedup >= 10 (measured 7); clip >= -0.2% (measured -0.3226%); it is kept, and "
        "marked as failed"
    )
    assert gates.lines(made_up_report) == [
        "FAILED  speedup >= 10  measured 7",
        "FAILED  clip >= -0.2%  measured -0.3226%",
        "passed  ssim >= 0.9    measured 0.95",
    ]


def test_passing_every_gate_raises_nothing(made_up_report: dict[str, Any]) -> None:
    made_up_report |= gates.judge(made_up_report, [parse("speedup >= 7"), parse("attribute_accuracy >= -0.5pt")])
    assert made_up_report["passed"] is True
    gates.check(made_up_report)
    assert gates.judge(made_up_report, []) == {"gates": [], "passed": True}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("attribute_accuracy >= -1pt", "not measured: only the captions of 'shapes'"),
        ("clip >= -0.2%", "not measured: no CLIP model"),
        ("lpips <= 0.1", "not measured: no weights of LPIPS"),
        ("bytes <= 0.3x", "not measured: the size of its model"),
        ("cold_start_ms <= 0.5x", "not measured: the report does not have it"),
    ],
)
def test_what_was_not_measured_fails_and_says_why(made_up_report: dict[str, Any], text: str, told: str) -> None:
    for name in ("clip_score", "attribute_accuracy"):
        made_up_report["quality"][name] = {"reference": None, "compressed": None}
    made_up_report["size_bytes"]["denoiser_reference"] = None
    made_up_report |= gates.judge(made_up_report, [parse(text)])
    (entry,) = made_up_report["gates"]
    assert entry["measured"] is None and entry["passed"] is False
    assert entry["problem"].startswith(told)
    with pytest.raises(GateError, match=told):
        gates.check(made_up_report)


@pytest.mark.parametrize("text", ["latent_error <= 0.1", "latent_error > 0.1", "frechet <= 2x"])
def test_a_number_that_is_none_fails_either_way(made_up_report: dict[str, Any], text: str) -> None:
    made_up_report["quality"]["latent_rel_l2"] = math.nan
    made_up_report["quality"]["frechet"] = {"reference": 0.0, "compressed": 1.0}
    (entry,) = gates.judge(made_up_report, [parse(text)])["gates"]
    assert (entry["measured"], entry["passed"], entry["problem"]) == (None, False, "not a finite number")


def test_the_recipes_gates_come_first_and_none_twice() -> None:
    manifest = {"recipe": {"name": "mine", "gates": ["speedup >= 3", "ssim >= 0.9"]}}
    found = gates.gathered(manifest, ["clip >= -1%", "speedup>=3.0"])
    assert [str(gate) for gate in found] == ["speedup >= 3", "ssim >= 0.9", "clip >= -1%"]
    assert gates.gathered({}) == gates.gathered({"recipe": {"name": "old"}}) == []
    with pytest.raises(DiffpressError, match="nothing measures 'grace'"):
        gates.gathered(manifest, ["grace > 0"])


def test_the_page_shows_gates_where_there_are_some(made_up_report: dict[str, Any]) -> None:
    assert gates.section(made_up_report) == ""  # a report from before there were gates
    made_up_report |= gates.judge(made_up_report, [])
    assert gates.section(made_up_report) == ""
    made_up_report |= gates.judge(made_up_report, [parse("speedup >= 7"), parse("ssim >= 0.9")])
    assert "Every gate passed" in gates.section(made_up_report) and "failed" not in gates.section(made_up_report)
    made_up_report |= gates.judge(made_up_report, [parse("speedup >= 8"), parse("ssim >= 0.9")])
    drawn = gates.section(made_up_report)
    assert 'class="gates failed"' in drawn and "1 of 2 gates failed" in drawn
    assert "<th>speedup &gt;= 8</th><td>measured 7</td><td><b>failed</b></td>" in drawn
