"""The table of quantization: its rows are recipes, and its seconds are those of a row alone."""

import pytest

from diffpress.benchmarks.quantization import Row, alone, bits, table
from diffpress.benchmarks.tables import PEERS, TOLD


def test_every_row_is_a_recipe_and_what_the_readme_tells_is_a_row() -> None:
    rows = table()
    for name, row in rows.items():
        assert len(row.recipe(name).built()) == len(row.passes)
    assert set(rows) >= {*TOLD, *PEERS, *PEERS.values()}
    assert sum(row.quick for row in rows.values()) == 6


def test_a_row_alone_pays_for_what_another_row_learned() -> None:
    quantize, learn, more = ({"quantize": {"format": "int8"}}, "reconstruct", "finetune")
    rows = {
        "first": Row("x", (quantize, learn)),
        "second": Row("x", (quantize, learn, more)),
        "other prompts": Row("x", (quantize, learn), {"prompts": 2}),
    }
    measured = {"first": [1.0, 100.0], "second": [2.0, 0.5, 7.0], "other prompts": [3.0, 50.0]}
    entries = [{"name": name, "pass_seconds": seconds} for name, seconds in measured.items()]
    found = {entry["name"]: alone(entry, rows, entries) for entry in entries}
    assert found == pytest.approx({"first": 102.0, "second": 109.0, "other prompts": 53.0})


def test_bits_of_a_model_in_float() -> None:
    assert bits({}) == (32, 32)
