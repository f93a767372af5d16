"""Exports that are kept: read where all that they depend on is the same, and made anew where anything differs."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from diffpress.export import graphs, kept
from diffpress.export.graphs import GraphSpec


class Scaled(nn.Module):
    """A layer whose output is scaled by numbers that are kept in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.factor, self.mode, self.around = 2.0, "plain", SimpleNamespace(power=1)
        self.row, self.column = np.ones(3, np.float32), torch.ones(3)
        self.register_buffer("loose", torch.ones(3), persistent=False)

    def forward(self, sample: Tensor) -> Tensor:
        return self.layer(sample) * self.factor * self.column * self.loose


def spec_of(module: nn.Module, rows: int = 2, **more: Any) -> GraphSpec:
    return GraphSpec(module, {"sample": torch.zeros(rows, 3)}, ("out",), **more)


def scaled() -> Scaled:
    torch.manual_seed(0)
    return Scaled()


def test_what_is_the_same_is_exported_once(tmp_path: Path) -> None:
    first = kept.once(spec_of(scaled()), tmp_path)

    def never(spec: GraphSpec) -> ir.Model:
        raise AssertionError("exported again")

    again = kept.once(spec_of(scaled()), tmp_path, never)
    assert ir.to_proto(again).SerializeToString() == ir.to_proto(first).SerializeToString()
    assert [node.metadata_props for node in again.graph] == [node.metadata_props for node in first.graph]
    with pytest.raises(AssertionError, match="exported again"):
        kept.once(spec_of(scaled()), tmp_path, never, largest=1)


def _weight(module: Any) -> None:
    module.layer.weight.data[0, 0] += 1e-6


@pytest.mark.parametrize(
    "change",
    [
        _weight,
        lambda module: module.loose.fill_(3),
        lambda module: module.column.fill_(3),
        lambda module: module.row.fill(3),
        lambda module: setattr(module, "factor", 3.0),
        lambda module: setattr(module, "mode", "other"),
        lambda module: setattr(module.around, "power", 2),
        lambda module: setattr(module, "layer", nn.Sequential(module.layer)),
    ],
)
def test_whatever_changes_has_another_key(change: Callable[[Any], object]) -> None:
    module = scaled()
    before = kept.key_of(spec_of(module))
    change(module)
    assert before is not None and kept.key_of(spec_of(module)) not in (before, None)


def test_inputs_and_outputs_are_in_the_key() -> None:
    module = scaled()
    renamed = GraphSpec(module, {"other": torch.zeros(2, 3)}, ("out",))
    keys = [
        kept.key_of(one) for one in (spec_of(module), spec_of(module, 3), spec_of(module, fixed=("sample",)), renamed)
    ]
    assert None not in keys and len(set(keys)) == 4


def test_a_network_that_something_was_hung_into_is_exported_each_time(tmp_path: Path) -> None:
    module = scaled()
    module.layer.register_forward_hook(lambda *_: None)
    assert kept.key_of(spec_of(module)) is None
    counted: list[GraphSpec] = []
    for _ in range(2):
        kept.once(spec_of(module), tmp_path, lambda spec: counted.append(spec) or graphs.to_onnx(spec))  # type: ignore[func-returns-value]
    assert len(counted) == 2 and not list(tmp_path.iterdir())
    instance: Any = scaled()
    instance.forward = instance.forward
    assert kept.key_of(spec_of(instance)) is None
