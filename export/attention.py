"""Attention as ONNX Runtime's own operator: MultiHeadAttention, whose CPU kernel goes over the keys in blocks.

The plain form that export traces (`graphs.PlainAttention`) is two products and a softmax over [N, heads, T, T'], and
that matrix is written to memory and read back several times. The operator computes the same with a running maximum
and sum and keeps a block of it (Dao et al. 2022, FlashAttention).
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

CONTRIB = "com.microsoft"
SPLIT = (0, 2, 1, 3)  # [N, T, heads, d] to [N, heads, T, d]
KEYS = (0, 2, 3, 1)  # to [N, heads, d, T]


def fuse_attention(model: ir.Model) -> int:
    """Replace every attention of the plain form in `model`; how many there were."""
    done = 0
    for node in list(model.graph):
        if node.op_type == "Softmax" and _fused(model.graph, node):
            done += 1
    if done:
        common.RemoveUnusedNodesPass()(model)
        model.graph.opset_imports.setdefault(CONTRIB, 1)
    return done


def _fused(graph: ir.Graph, softmax: ir.Node) -> bool:
    logits, product = made_by(softmax.inputs[0], "MatMul"), _only_user(softmax, "MatMul")
    if logits is None or product is None or product.inputs[0] is not softmax.outputs[0]:
        return False
    turned = _only_user(product, "Transpose")
    joined = _only_user(turned, "Reshape") if turned is not None and permutation(turned) == SPLIT else None
    query, scale = _without_scale(logits.inputs[0])
    parts = [_unsplit(query, SPLIT), _unsplit(logits.inputs[1], KEYS), _unsplit(product.inputs[1], SPLIT)]
    if joined is None or scale is None or any(part is None for part in parts):
        return False
    heads = {part[1] for part in parts if part is not None}
    axis = softmax.attributes.get("axis")
    if len(heads) != 1 or (axis is not None and axis.as_int() not in (-1, 3)):
        return False
    fused = ir.node(
        "MultiHeadAttention",
        inputs=[part[0] for part in parts if part is not None],
        attributes={"num_heads": heads.pop(), "scale": scale},
        domain=CONTRIB,
        name=f"{softmax.name}_attention",
    )
    fused.outputs[0].name = f"{softmax.name}_attention_out"
    fused.outputs[0].shape, fused.outputs[0].type = joined.outputs[0].shape, joined.outputs[0].type
    graph.insert_before(joined, fused)
    ir.convenience.replace_all_uses_with(joined.outputs[0], fused.outputs[0])
    return True


def _unsplit(value: ir.Value | None, order: tuple[int, ...]) -> tuple[ir.Value, int] | None:
    """[N, T, heads d] and heads of what was split into heads and transposed to `order`."""
    turned = made_by(value, "Transpose")
    split = made_by(turned.inputs[0], "Reshape") if turned is not None and permutation(turned) == order else None
    if split is None or split.inputs[0] is None:
        return None
    shape, source = split.outputs[0].shape, split.inputs[0]
    if shape is None or len(shape) != 4 or not isinstance(shape[2], int) or len(source.shape or ()) != 3:
        return None
    return source, shape[2]


def _without_scale(value: ir.Value | None) -> tuple[ir.Value | None, float | None]:
    """The queries before they are multiplied by a constant, and the constant."""
    node = made_by(value, "Mul")
    if node is None:
        return value, 1.0
    first, second = node.inputs
    source, factor = (second, first) if first is not None and first.const_value is not None else (first, second)
    if factor is None or factor.const_value is None or factor.const_value.size != 1:
        return None, None
    return source, float(factor.const_value.numpy().item())


def made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node of the standard operator `op` that gives `value`; None where another does."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op and not node.domain else None


def _only_user(node: ir.Node, op: str) -> ir.Node | None:
    output = node.outputs[0]
    users = list(output.uses())
    if len(users) != 1 or output.is_graph_output() or users[0].node.op_type != op:
        return None
    return users[0].node


def permutation(node: ir.Node) -> tuple[int, ...]:
    """Of a Transpose."""
    attribute = node.attributes.get("perm")
    return () if attribute is None else tuple(attribute.as_ints())
