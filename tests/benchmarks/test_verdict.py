from typing import Any

import pytest

from diffpress.benchmarks import verdict


def test_headline_and_quality(made_up_report: dict[str, Any]) -> None:
    found = verdict.verdict(made_up_report)
    assert found.headline == "7.0× faster than diffusers, denoiser at 25% of its size"
    assert found.quality == (
        "Pictures are close to the reference (PSNR 30.0 dB). "
        "They show 98.5% of the colours and shapes asked for, 0.5 points fewer than the reference."
    )


def test_a_shorter_schedule_is_not_sold_as_compression(made_up_report: dict[str, Any]) -> None:
    made_up_report["per_step"]["latent_rel_l2"]["compressed"] = None
    made_up_report["speedup"]["vs_eager_same_schedule"] = 3.0
    assert verdict.verdict(made_up_report).headline.startswith("7.0× faster than diffusers (3.0× at equal steps), ")


@pytest.mark.parametrize(
    ("psnr", "accuracy", "expected"),
    [
        (26.0, 0.985, "worse"),
        (33.0, 0.985, "better"),
        (30.2, 0.983, "equal"),
        (33.0, 0.95, "mixed"),
        (30.2, 0.95, "worse"),
        (30.0, 0.999, "better"),
        (33.0, None, "better"),
    ],
)
def test_fewer_plain_steps(made_up_report: dict[str, Any], psnr: float, accuracy: float | None, expected: str) -> None:
    made_up_report["fewer_plain_steps"] |= {"psnr_db": psnr, "attribute_accuracy": accuracy}
    found = verdict.verdict(made_up_report)
    assert found.rival == expected
    assert "15 plain DPM-Solver++ Karras steps" in found.rival_text


def test_no_plain_step_is_as_fast(made_up_report: dict[str, Any]) -> None:
    made_up_report["fewer_plain_steps"]["steps"] = None
    assert verdict.verdict(made_up_report).rival == "none"


def test_broken_images_come_first(made_up_report: dict[str, Any]) -> None:
    made_up_report["faults"] = ["compressed, image 3: constant", "compressed, image 4: constant"]
    found = verdict.verdict(made_up_report)
    assert found.headline.endswith("but images are broken")
    assert "compressed, image 3: constant and 1 more" in found.quality


def test_an_unjudged_model_says_nothing_of_content(made_up_report: dict[str, Any]) -> None:
    made_up_report["quality"]["attribute_accuracy"] = {"reference": None, "compressed": None}
    assert verdict.verdict(made_up_report).quality == "Pictures are close to the reference (PSNR 30.0 dB)."
    made_up_report["size_bytes"]["denoiser_reference"] = None
    assert "unknown size" in verdict.verdict(made_up_report).headline


def test_table_is_aligned(made_up_report: dict[str, Any]) -> None:
    lines = verdict.table(made_up_report).splitlines()
    assert len(lines) == 5
    assert lines[3].split() == ["compressed", "100", "ms", "7.0x", "5.0", "MB", "180.0", "MB", "30.0", "dB", "98.5%"]
    assert lines[4].startswith("15 plain DPM-Solver++ Karras steps")
    assert len({line.index(" ms") for line in lines[1:]}) == 1
    made_up_report["fewer_plain_steps"]["steps"] = None
    assert len(verdict.table(made_up_report).splitlines()) == 4


@pytest.mark.parametrize(
    ("count", "text"), [(None, "–"), (12, "12 B"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (3e9, "3.0 GB")]
)
def test_size(count: float | None, text: str) -> None:
    assert verdict.size(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.123, "0.123 ms"), (12.34, "12.3 ms"), (671.2, "671 ms"), (23_400, "23.4 s")],
)
def test_milliseconds(value: float | None, text: str) -> None:
    assert verdict.milliseconds(value) == text


def test_notes_are_short_and_leave_out_what_is_not_known(made_up_report: dict[str, Any]) -> None:
    assert verdict.notes(made_up_report) == [
        "speedup over diffusers: 6.80 to 7.20 (95 % interval)",
        "images per second: 10 at batch 1",
        "cold start: 1200 ms, diffusers 9000 ms",
        "denoising runs at 25% of what this machine's arithmetic and memory allow",
        "lpips: not measured, give --lpips-weights",
    ]
    made_up_report["speedup_interval"]["vs_eager"] = None
    made_up_report["throughput"] = []
    made_up_report["roofline"]["images"] = []
    made_up_report["metrics"] = {}
    assert verdict.notes(made_up_report) == ["cold start: 1200 ms, diffusers 9000 ms"]
