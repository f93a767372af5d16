"""Which module of the model a node of an exported graph came from; without torch, since engines are built without."""

from __future__ import annotations

import ast
from collections.abc import Sequence

import onnx_ir as ir


def module_path(node: ir.Node) -> str:
    """The path of the module whose forward made `node`, as the exporter noted it; empty if it did not."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    parts: Sequence[str] = ast.literal_eval(scopes) if scopes else ()
    return parts[-2] if len(parts) > 1 else ""
