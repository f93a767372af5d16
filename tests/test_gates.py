"""Gates: what is read, what is refused with one line that says what there is, and what passes."""

import pytest

from diffpress import gates
from diffpress.errors import DiffpressError, GateError
from diffpress.gates import Gate


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("attribute_accuracy >= -1.0pt", Gate("attribute_accuracy", ">=", -1.0, "pt")),
        ("clip >= -0.2%", Gate("clip", ">=", -0.2, "%")),
        ("speedup >= 3", Gate("speedup", ">=", 3.0, "")),
        ("  bytes<.3 x ", Gate("bytes", "<", 0.3, "x")),
        ("latent_error <= 1e-2", Gate("latent_error", "<=", 0.01, "")),
        ("frechet > +5 %", Gate("frechet", ">", 5.0, "%")),
    ],
)
def test_a_gate_is_a_metric_a_limit_and_a_unit(text: str, gate: Gate) -> None:
    assert gates.parse(text) == gate
    assert gates.parse(str(gate)) == gate  # what a report keeps says the same


def test_a_limit_is_kept_to_the_digit() -> None:
    assert str(gates.parse("bytes <= 7012345")) == "bytes <= 7012345"
    assert str(gates.parse("latent_error <= 0.0123456")) == "latent_error <= 0.0123456"


@pytest.mark.parametrize(
    "text",
    ["", "speedup", "speedup 3", "speedup => 3", "speedup = 3", "speedup >= three", "psnr >= 30 dB", "3 <= ssim"],
)
def test_broken_syntax_is_shown_how_it_is_written(text: str) -> None:
    with pytest.raises(DiffpressError, match=r"not understood: write METRIC >= NUMBER.*metrics: speedup, ") as caught:
        gates.parse(text)
    assert not isinstance(caught.value, GateError)  # the user's mistake is no failed gate


def test_an_unknown_metric_is_told_which_there_are() -> None:
    with pytest.raises(DiffpressError, match="nothing measures 'beauty'") as caught:
        gates.parse("beauty >= 1")
    assert all(name in str(caught.value) for name in gates.METRICS)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("psnr >= -1%", "not measured in '%': write a plain number$"),
        ("speedup >= 3pt", "write a plain number or one with x$"),
        ("bytes <= -10pt", "write a plain number or one with % or x$"),
    ],
)
def test_a_unit_that_means_nothing_is_refused(text: str, advice: str) -> None:
    with pytest.raises(DiffpressError, match=advice):
        gates.parse(text)


@pytest.mark.parametrize(
    ("text", "measured", "passed"),
    [
        ("speedup >= 3", 3.0, True),
        ("speedup >= 3", 2.999, False),
        ("speedup > 3", 3.0, False),
        ("speedup > 3", 3.001, True),
        ("psnr_worst < 3", 2.9, True),
        ("psnr_worst < 3", 3.0, False),
        ("latent_error <= 0.1", 0.1, True),
        ("latent_error <= 0.1", 0.11, False),
        ("attribute_accuracy >= -1pt", 100 * (0.98 - 0.99), True),  # -1.0000000000000009
        ("attribute_accuracy > -1pt", 100 * (0.98 - 0.99), False),
        ("attribute_accuracy >= -1pt", 100 * (0.979 - 0.99), False),
    ],
)
def test_a_limit_is_kept_or_not(text: str, measured: float, passed: bool) -> None:
    assert gates.parse(text).passes(measured) is passed


@pytest.mark.parametrize(
    ("value", "limit", "unit", "text"),
    [
        (2.41234, 3.0, "", "measured 2.412"),
        (2.99996, 3.0, "", "measured 2.99996"),  # "3" would not say why it failed
        (-0.5, -0.2, "%", "measured -0.5%"),
        (7012345, 7e6, "", "measured 7012345"),
        (100 * (0.98 - 0.99), -1.0, "pt", "measured -1pt"),
    ],
)
def test_a_number_is_told_from_its_limit(value: float, limit: float, unit: str, text: str) -> None:
    assert gates.measured({"measured": value, "limit": limit, "unit": unit}) == text


def test_a_mark_names_what_failed() -> None:
    entry = {"gate": "speedup >= 3", "measured": 2.4, "limit": 3.0, "unit": "", "passed": False}
    other = {"gate": "ssim >= 0.9", "measured": 0.95, "limit": 0.9, "unit": "", "passed": True}
    assert gates.failures({}) is None
    assert gates.failures({"gates": [other], "failed": False}) is None
    assert gates.failures({"gates": [entry, other], "failed": True}) == "speedup >= 3 (measured 2.4)"
