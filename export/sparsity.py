"""2:4 sparsity: of any four consecutive input channels at least two weights are zero (Mishra et al. 2021).

Tensor cores from Ampere on skip those zeros (arXiv 2104.08378, section 3.1); TensorRT looks for the pattern where its
builder is told to, along the input channels of convolutions [K, C, R, S] and the inner dimension of products.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

FIRST = 4  # rows looked at before all others, so that dense weights are not read whole
PRODUCTS = ("Conv", "MatMul", "Gemm")


def is_two_four(weight: np.ndarray, axis: int = 1) -> bool:
    """Whether `weight`, with input channels along `axis`, is 2:4; channels that are no multiple of 4 are not."""
    moved = np.moveaxis(weight, axis, -1)
    if moved.shape[-1] % 4 or not moved.size:
        return False
    for start, end in ((0, FIRST), (FIRST, len(moved))):
        fours = moved[start:end].reshape(-1, 4)
        if ((fours != 0).sum(-1) > 2).any():
            return False
    return True


def sparse_layers(model: ir.Model) -> list[str]:
    """Names of the products of `model` whose constant weights are 2:4, in float or behind a DequantizeLinear."""
    found: list[str] = []
    seen: dict[int, bool] = {}
    for node in model.graph.all_nodes():
        if node.op_type not in PRODUCTS or node.domain or len(node.inputs) < 2:
            continue
        stored = _stored(node.inputs[1])
        if stored is None or stored.const_value is None:
            continue
        rank = len(stored.const_value.shape)
        if rank < 2 or stored.const_value.size == 0:
            continue
        if id(stored) not in seen:
            inner = node.op_type == "MatMul" or (node.op_type == "Gemm" and not node.attributes.get_int("transB", 0))
            seen[id(stored)] = is_two_four(stored.const_value.numpy(), rank - 2 if inner else 1)
        if seen[id(stored)]:
            found.append(node.name or str(node.outputs[0].name))
    return found


def _stored(value: ir.Value | None) -> ir.Value | None:
    """The initializer behind a weight. Blocks, which come with a Reshape, have no sparse kernels."""
    while value is not None and value.const_value is None:
        node = value.producer()
        if node is None or node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
            return None
        value = node.inputs[0]
    return value
