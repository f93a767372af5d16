import numpy as np
import onnx_ir as ir
import pytest

from diffpress.bundle import Bundle
from diffpress.export.sparsity import is_two_four, sparse_layers


def halved(weight: np.ndarray, axis: int) -> np.ndarray:
    """The two smaller of each four along `axis` set to zero, one four at a time."""
    moved = np.moveaxis(weight.copy(), axis, -1)
    for index in np.ndindex(moved.shape[:-1]):
        for start in range(0, moved.shape[-1], 4):
            part = moved[index][start : start + 4]
            part[np.argsort(np.abs(part))[:2]] = 0
    return np.moveaxis(moved, -1, axis)


@pytest.mark.parametrize(("shape", "axis"), [((16, 8), 1), ((8, 16), 0), ((6, 8, 3, 3), 1)])
def test_two_of_four_input_channels(shape: tuple[int, ...], axis: int) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    sparse = halved(weight, axis)
    assert is_two_four(sparse, axis) and not is_two_four(weight, axis)
    assert is_two_four(np.zeros_like(weight), axis)  # more zeros do no harm
    dense = sparse.copy()
    np.moveaxis(dense, axis, -1)[-1, ..., -3:] = 1.0  # three in the last four of the last row
    assert not is_two_four(dense, axis)


def test_the_fours_are_aligned_and_whole() -> None:
    assert is_two_four(np.array([[1, 1, 0, 0, 0, 0, 1, 1]]))
    assert not is_two_four(np.array([[0, 1, 1, 1, 0, 0, 0, 0]]))
    assert not is_two_four(np.array([[1, 0, 0, 1, 0, 0]]))  # six channels
    assert not is_two_four(np.zeros((4, 0)))


def test_layers_of_a_graph_in_float_and_in_int8(handmade: Bundle) -> None:
    model = ir.load(handmade.file("unet/model.onnx"))
    assert sparse_layers(model) == []
    for name, axis, node in (("to_q.weight", 0, "to_q_node"), ("conv_out.weight", 1, "out_sample_node")):
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(halved(value.const_value.numpy(), axis), name=name)
        assert node in sparse_layers(model)
    assert len(sparse_layers(model)) == 2
