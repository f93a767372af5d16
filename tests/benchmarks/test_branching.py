import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffpress import bundle as bundles
from diffpress.benchmarks import branching
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError
from diffpress.export import store
from diffpress.plan import FULL
from diffpress.runtime import backends
from diffpress.runtime.backends import open_session


def graph(cached: bool) -> onnx.ModelProto:
    """out = conv(tanh(conv(sample))); the cached one takes the tanh. Two weights have one name and other values."""
    node, map_ = helper.make_node, ["batch", 4, 3, 3]
    feature = helper.make_tensor_value_info("up_0", TensorProto.FLOAT, ["batch", 8, 3, 3])
    first = [node("Conv", ["sample", "w"], ["x"], name="c"), node("Tanh", ["x"], ["up_0"], name="t")]
    last = [
        node("Conv", ["up_0", "shared"], ["y"], name="c2"),
        node("Mul", ["y", "own"], ["z"], name="m"),
        node("Add", ["z", "sample"], ["out_sample"], name="a"),
    ]
    random = np.random.default_rng(0)
    weights = {"w": random.standard_normal((8, 4, 1, 1)), "shared": random.standard_normal((4, 8, 1, 1))}
    constants = {name: value.astype(np.float32) for name, value in weights.items() if not (cached and name == "w")}
    constants["own"] = np.array(2 if cached else 3, np.float32)
    sample = helper.make_tensor_value_info("sample", TensorProto.FLOAT, map_)
    output = helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, map_)
    made = helper.make_graph(
        last if cached else [*first, *last],
        "g",
        [sample, feature] if cached else [sample],
        [output] if cached else [output, feature],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("backend", sorted({name for name, _ in backends.available()}))
def test_the_branches_compute_what_the_graphs_compute(tmp_path: Path, backend: str) -> None:
    protos = graph(cached=False), graph(cached=True)
    one = branching.branched(*protos)
    onnx.checker.check_model(one, full_check=True)
    assert sorted(tuple(tensor.dims) for tensor in one.graph.initializer) == [(), (), (4, 8, 1, 1), (8, 4, 1, 1)]
    sessions = []
    for name, proto in zip(("full", "cached", "one"), (*protos, one), strict=True):
        onnx.save(proto, tmp_path / f"{name}.onnx")
        sessions.append(open_session(tmp_path / f"{name}.onnx", backend, threads=1))
    full, cached, single = sessions
    random = np.random.default_rng(1)
    for rows in (2, 1):
        x, kept = (random.standard_normal((rows, size, 3, 3)).astype(np.float32) for size in (4, 8))
        for choice, wanted in ((True, full.run({"sample": x})), (False, cached.run({"sample": x, "up_0": kept}))):
            got = single.run({"sample": x, "up_0_kept": kept, "full": np.array(choice)})
            np.testing.assert_allclose(got["out_sample"], wanted["out_sample"], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(got["up_0"], wanted.get("up_0", kept), rtol=1e-5, atol=1e-5)


def test_a_feature_that_is_not_handed_out_is_refused() -> None:
    full = graph(cached=False)
    del full.graph.output[1]
    with pytest.raises(DiffpressError, match="does not hand out 'up_0'"):
        branching.branched(full, graph(cached=True))


def test_kinds_are_measured_and_weighed_side_by_side(handmade: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    protos = [onnx.load(handmade.graph(name)) for name in (FULL, "cached")]
    folder = tmp_path / "one"
    for kind in ("one", "plain"):
        (tmp_path / kind).mkdir()
        for part in ("text_encoder", "vae_decoder"):
            shutil.copytree(handmade.path / part, tmp_path / kind / part)
    entries = {key: value for key, value in handmade.manifest.items() if key != "files"}
    store.save({"model.onnx": ir.from_proto(branching.branched(protos[0], protos[1]))}, folder / "unet")
    store.save({"model.onnx": ir.from_proto(protos[0])}, tmp_path / "plain" / "unet")
    made = {branching.TWO: handmade}
    for name, kind in ((branching.ONE, "one"), (branching.PLAIN, "plain")):
        bundles.write_manifest(tmp_path / kind, {**entries, "graphs": {FULL: "unet/model.onnx"}})
        made[name] = bundles.load(tmp_path / kind)
    rows = branching.measure(made, 2)
    assert [row["name"] for row in rows] == [branching.TWO, branching.ONE] * (len(rows) // 2)
    for row in rows:
        assert row["full_ms"] > 0 and row["cached_ms"] > 0 and row["file_bytes"] > 0
        assert row["peak_rss_bytes"] > 10_000_000
        assert row["name"] != branching.TWO or row["full_vs_two"] == row["cached_vs_two"] == 1
    weighed = {row["name"]: row for row in branching.weigh(made, "sm89")}
    assert weighed[branching.TWO]["engine_bytes_by_variant"].keys() == {FULL, "cached"}
    assert weighed[branching.PLAIN]["engine_bytes_vs_uncached"] == 1
    # What the README tells: weights that both branches share stand outside of them, where none may be INT8.
    assert "Quantized constant" in weighed[branching.ONE]["refused"]
    json.dumps([*rows, *weighed.values()])
