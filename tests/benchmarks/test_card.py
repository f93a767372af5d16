from typing import Any

import yaml

from diffpress.benchmarks.card import card


def front_matter(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def test_a_hub_can_read_it(full_report: dict[str, Any]) -> None:
    full_report["model"]["hub"] = "owner/name: a"
    found = front_matter(card(full_report))
    assert found["base_model"] == "owner/name: a" and found["base_model_relation"] == "quantized"
    assert found["pipeline_tag"] == "text-to-image" and {"onnx", "int8", "openvino"} <= set(found["tags"])
    del full_report["model"]["hub"], full_report["layers"]
    found = front_matter(card(full_report))
    assert found["base_model"] == "shapes" and "base_model_relation" not in found and "int8" not in found["tags"]


def test_it_says_gains_losses_limits_and_how_to_run(full_report: dict[str, Any]) -> None:
    text = card(full_report)
    assert "9.37× (9.11–9.68)" in text and "| 44.20 (43.10–45.30) | 39.80 |" in text
    assert "`clip >= -0.2% (measured -0.3226%)`" in text and "failed 1 of its 2 gates" in text
    assert "diffpress run balanced 'a <red> & blue star' -o out.png" in text
    assert "18 of 50 steps run the whole denoiser" in text and "the worst one has 31.7 dB" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {5, 6}  # whole tables of four and of five columns


def test_the_barest_report(made_up_report: dict[str, Any]) -> None:
    row = made_up_report["fewer_plain_steps"]
    made_up_report["fewer_plain_steps"] = {**dict.fromkeys(row), "trials": [], "schedule": None}
    made_up_report |= {"same_precision": None, "passes": [], "faults": ["compressed, image 1: constant"]}
    made_up_report["program"] = {"marks": "####", "steps": ["full"] * 4}
    made_up_report["size_bytes"]["denoiser_reference"] = None
    for name in ("clip_score", "attribute_accuracy", "frechet"):
        made_up_report["quality"][name] = {"reference": None, "compressed": None}
    text = card(made_up_report)
    assert "None" not in text and "nan" not in text and "plain steps |" not in text
    assert "No pass changed the model." in text and "Broken image: compressed, image 1: constant." in text


def test_words_from_outside_are_no_markdown(made_up_report: dict[str, Any]) -> None:
    made_up_report["passes"] = [{"name": "quantize", "summary": "a | b\n# [c](http://d) <img>"}]
    assert "a \\| b \\# \\[c\\](http://d) \\<img\\>" in card(made_up_report)
