"""Writes ONNX graphs of one component with their weights in a single external-data file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

DATA = "model.onnx_data"
INLINE = 256  # bytes; smaller tensors stay in the graph, where parsers read shapes and scales
ALIGNMENT = 4096  # so that a runtime can map the file


def save(models: Mapping[str, ir.Model], folder: Path) -> None:
    """Write each model as `folder/<name>`; a tensor that several hold is stored once in `folder/model.onnx_data`.

    One tensor is in memory at a time, where they are lazy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[tuple[str, str], tuple[int, int]] = {}
    # By the tensor itself, which is held so that no other gets its number: what graphs share is made once.
    known: dict[int, tuple[ir.TensorProtocol, tuple[int, int]]] = {}
    end = 0
    with (folder / DATA).open("wb") as stream:
        for model in models.values():
            for name, value in model.graph.initializers.items():
                tensor = value.const_value
                if tensor is None or tensor.nbytes <= INLINE:
                    continue
                if id(tensor) not in known:
                    data = tensor.tobytes()
                    key = (tensor.dtype.name, hashlib.sha256(data).hexdigest())
                    if key not in places:
                        # Small tensors are packed tighter: a page for each would be a tenth of a small model.
                        step = ALIGNMENT if len(data) >= 1 << 16 else 64
                        end += -end % step
                        stream.seek(end)
                        stream.write(data)
                        places[key] = (end, len(data))
                        end += len(data)
                    known[id(tensor)] = tensor, places[key]
                offset, length = known[id(tensor)][1]
                value.const_value = ir.ExternalTensor(
                    DATA, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name, base_dir=folder
                )
    for name, model in models.items():
        ir.save(model, folder / name)
