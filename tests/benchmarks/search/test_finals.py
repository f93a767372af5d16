"""Who goes to the finals."""

from collections.abc import Callable
from typing import Any

from diffpress.benchmarks.search import finals
from diffpress.benchmarks.search.choices import Choice
from diffpress.benchmarks.search.objective import LOSSES
from diffpress.gates import parse

Measured = Callable[..., dict[str, Any]]
LOSS = LOSSES["latent_error"]


def test_of_another_limit_those_within_it_have_a_front_of_their_own(measured: Measured) -> None:
    small = {"size_bytes": {"denoiser_reference": 1000, "denoiser_compressed": 250}}
    records = [
        measured(9.0, 0.01, key="large and best of all"),
        measured(5.0, 0.30, key="small", **small),
        measured(5.0, 0.08, key="small and better", **small),
    ]
    chosen = finals.select(records, [], LOSS, [parse("bytes <= 0.3x")])
    assert "small and better" in [record["key"] for record in chosen]


def test_one_that_keeps_the_limits_with_room_to_spare_is_there(measured: Measured) -> None:
    close = [measured(6.0 + 0.01 * index, 0.1 + 0.001 * index, key=str(index)) for index in range(20)]
    far = measured(7.0, 0.3, key="far")
    chosen = finals.select([*close, far], [], LOSS, [parse("speedup >= 6")])
    assert far in chosen and len(chosen) <= finals.MOST + 2


def test_a_number_is_named_as_its_choice_is_written() -> None:
    assert Choice((2, 3)).parameter(2.0) == "2"
    assert Choice((2,)).parameter(2.0) is None
