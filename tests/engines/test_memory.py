import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from diffpress.bundle import Bundle
from diffpress.engines import memory
from diffpress.engines.memory import GB, Need
from diffpress.engines.targets import Target
from diffpress.export import buildable, liveness

CARD = Target("sm89", (), 1.0)  # 0.9 GB of it usable


def parsed(text: str, **arrays: np.ndarray) -> ir.Model:
    """A graph in ONNX's own text form, with constants."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return ir.from_proto(proto)


def test_a_chain_holds_two_tensors_at_a_time() -> None:
    model = parsed("g (float[batch, 100] x) => (float[batch, 100] d) { a = Exp(x) b = Exp(a) c = Exp(b) d = Exp(c) }")
    one = 3 * 400  # the input, which the caller keeps, what is read and what is written
    assert liveness.peak(model, 1) == one and liveness.peak(model, 8) == 8 * one


def test_a_skip_is_alive_until_it_is_read() -> None:
    text = "g (float[1, 100] x) => (float[1, 100] d) { a = Exp(x) b = Exp(a) c = Exp(b) d = Add(c, a) }"
    assert liveness.peak(parsed(text), 1) == 4 * 400  # x, a, and two of b, c, d


def test_views_decoded_weights_and_folded_constants_take_nothing() -> None:
    text = """g (float[batch, 4, 25] x) => (float[batch, 10] y) {
        flat = Reshape(x, shape)
        again = Identity(flat)
        weight = DequantizeLinear(stored, scale)
        double = Add(scale, scale)
        y = MatMul(again, weight)
    }"""
    arrays = {"shape": np.array([-1, 100]), "stored": np.ones((100, 10), np.int8), "scale": np.array(0.1, np.float32)}
    found = liveness.need(parsed(text, **arrays), 2)
    assert found == Need(weights=2 * 8 + 1000 + 4, activations=2 * (400 + 40))


def test_rounded_inputs_are_held_in_their_eight_bits() -> None:
    text = """g (float[1, 1000] x) => (float[1, 1000] y) {
        q = QuantizeLinear(x, scale, zero)
        d = DequantizeLinear(q, scale, zero)
        e = Exp(d)
        y = Neg(e)
    }"""
    arrays = {"scale": np.array(0.1, np.float32), "zero": np.array(0, np.int8)}
    assert liveness.peak(parsed(text, **arrays), 1) == 4000 + 8000  # x, e and y; while q lives it is x, q and e: less


def test_the_batch_reaches_what_the_exporter_left_unnamed() -> None:
    text = """g (float[batch, 4, 10] x) => (float[batch, 40] y) {
        s = Shape(x)
        n = Gather(s, zero)
        rows = Unsqueeze(n, axis)
        shape = Concat <axis: int = 0> (rows, width)
        e = Exp(x)
        f = Reshape(e, shape)
        y = Neg(f)
    }"""
    arrays = {"zero": np.array(0), "axis": np.array([0]), "width": np.array([40])}
    small = 24 + 8 + 8 + 16  # integers of the shape, some of which live on
    assert 3 * 3 * 160 <= liveness.peak(parsed(text, **arrays), 3) <= 3 * 3 * 160 + small


def test_features_are_kept_once_or_with_their_earlier_value() -> None:
    shapes = {"up_0": [32, 8, 8], "skip": [4, 2]}
    assert memory.features(shapes, 2) == 2 * 4 * (2048 + 8)
    assert memory.features(shapes, 2, ["skip"]) == 2 * 4 * (2048 + 16)


def test_what_fits_is_not_streamed() -> None:
    needs = {"full": Need(int(0.4 * GB), int(0.1 * GB)), "vae_decoder": Need(int(0.1 * GB), int(0.2 * GB))}
    plan = memory.plan(CARD, needs, int(0.05 * GB))
    assert plan.fits and not plan.streaming and plan.total == int(0.85 * GB)
    assert plan.line() == (
        "sm89: weights 500.0 MB + activations 300.0 MB + features 50.0 MB = 850.0 MB of 900.0 MB, fits"
    )


def test_weights_are_streamed_where_they_are_too_many() -> None:
    needs = {"full": Need(3 * GB, int(0.2 * GB)), "vae_decoder": Need(1 * GB, int(0.2 * GB))}
    plan = memory.plan(CARD, needs, int(0.1 * GB))
    assert plan.fits and plan.streaming and "streamed" in plan.line()
    budgets = {name: need.budget for name, need in plan.engines.items()}
    assert budgets == {"full": 300_000_000, "vae_decoder": 100_000_000}  # 0.4 GB are left, three to one
    assert not memory.plan(CARD, needs, 0, memory_gb=8).streaming
    written = plan.to_json()
    assert written["weight_streaming"] and written["engines"]["full"]["budget"] == 300_000_000
    json.dumps(written)


def test_activations_alone_may_be_too_many() -> None:
    plan = memory.plan(CARD, {"full": Need(GB, GB)}, 0)
    assert not plan.fits and plan.to_json()["fits"] is False and "does not fit" in plan.line()


def test_a_bundle_is_planned_for_its_largest_batch(handmade: Bundle, tmp_path: Path) -> None:
    one, four = (buildable.graphs(handmade, images) for images in ((1,), (1, 4)))
    needs = [{graph.name: graph.need for graph in graphs} for graphs in (one, four)]
    assert needs[0]["full"].weights == needs[1]["full"].weights
    assert needs[1]["full"].activations == pytest.approx(4 * needs[0]["full"].activations, rel=0.01)
    assert needs[0]["vae_decoder"] == needs[1]["vae_decoder"]  # images are decoded one at a time
    assert buildable.feature_bytes(handmade, one) == 2 * 4 * 32 * 64 == buildable.feature_bytes(handmade, four) // 4
    weights = sum(
        value.const_value.nbytes
        for value in ir.load(handmade.file("unet/model.onnx")).graph.initializers.values()
        if value.const_value is not None
    )
    assert needs[0]["full"].weights == weights
