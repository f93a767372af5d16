"""What the passes that learn share."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffpress.compress import training
from diffpress.compress.training import in_turn, save


def test_every_item_comes_once_before_one_comes_again() -> None:
    orders = [[in_turn(7 * epoch + place, 7, 3) for place in range(7)] for epoch in range(4)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert orders[0] == [in_turn(place, 7, 3) for place in range(7)] != [in_turn(place, 7, 4) for place in range(7)]


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, wide = tmp_path / "folder" / "state.safetensors", torch.arange(6.0).reshape(2, 3)
    save({"a": wide.t(), "b": torch.tensor(2)}, file)
    found = load_file(file)
    assert torch.equal(found["a"], wide.t()) and int(found["b"]) == 2
    assert [path.name for path in file.parent.iterdir()] == [file.name]

    def half(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(training, "save_file", half)
    with pytest.raises(OSError, match="no space left"):
        save({"a": wide + 1}, file)
    assert torch.equal(load_file(file)["a"], wide.t())
