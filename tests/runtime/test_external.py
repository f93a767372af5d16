"""Names of weight files, read from bytes; onnx wrote the files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffpress import bundle
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError
from diffpress.runtime import external


def tensor(name: str, location: str | None) -> onnx.TensorProto:
    made = numpy_helper.from_array(np.arange(300, dtype=np.float32), name)
    if location is not None:
        made.ClearField("raw_data")
        made.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "1200")):
            made.external_data.add(key=key, value=value)
    return made


def nested() -> onnx.ModelProto:
    """Weights outside, in a branch of an If, in a node's attribute and in a sparse tensor."""
    branch = helper.make_graph([], "branch", [], [], [tensor("in_branch", "branch.bin")])
    nodes = [
        helper.make_node("If", ["c"], [], then_branch=branch, else_branch=branch),
        helper.make_node("Constant", [], ["v"], value=tensor("constant", "constant.bin")),
    ]
    graph = helper.make_graph(nodes, "g", [], [], [tensor("inline", None), tensor("w", "model.onnx_data")])
    sparse = graph.sparse_initializer.add()
    sparse.values.CopyFrom(tensor("sparse", "ünïcode.bin"))
    return helper.make_model(graph)


def test_every_place_where_weights_can_be(tmp_path: Path) -> None:
    file = tmp_path / "g.onnx"
    file.write_bytes(nested().SerializeToString())
    assert external.locations(file) == ["branch.bin", "constant.bin", "model.onnx_data", "ünïcode.bin"]


@pytest.mark.parametrize("content", [b"", b"junk that is no graph", b"\xff" * 40, nested().SerializeToString()[:-30]])
def test_what_is_no_graph_is_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "g.onnx"
    file.write_bytes(content)
    with pytest.raises(DiffpressError, match=r"g\.onnx is not a readable ONNX graph") as caught:
        external.locations(file)
    assert "\n" not in str(caught.value)


def test_a_graph_and_its_weights(handmade: Bundle) -> None:
    assert external.parts(handmade, "unet/model.onnx") == ["unet/model.onnx", "unet/model.onnx_data"]
    assert external.parts(handmade, "vae_decoder/model.onnx")[0] == "vae_decoder/model.onnx"
    for name in handmade.manifest["files"]:
        if name.endswith(".onnx"):
            values = ir.load(handmade.file(name)).graph.initializers.values()
            wanted = {v.const_value.location for v in values if isinstance(v.const_value, ir.ExternalTensor)}
            assert set(external.locations(handmade.file(name))) == wanted
    with pytest.raises(DiffpressError, match=r"does not list the file unet/none\.onnx"):
        external.parts(handmade, "unet/none.onnx")


@pytest.mark.parametrize("location", ["../../secret", "/etc/passwd", "..\\secret", "C:secret", "a/../../b"])
def test_weights_outside_the_bundle_are_refused(handmade: Bundle, location: str) -> None:
    graph = helper.make_graph([], "g", [], [], [tensor("w", location)])
    handmade.file("unet/model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    changed = bundle.update(handmade)
    listed: dict[str, Any] = {**changed.manifest, "files": {**changed.manifest["files"], "secret": "0"}}
    (changed.path / bundle.MANIFEST).write_text(json.dumps(listed))
    with pytest.raises(DiffpressError, match="lie outside the bundle: do not use it"):
        external.parts(bundle.read(changed.path), "unet/model.onnx")


def test_weights_that_are_not_listed_are_refused(handmade: Bundle) -> None:
    files = {
        name: digest for name, digest in handmade.manifest["files"].items() if not name.endswith("model.onnx_data")
    }
    (handmade.path / bundle.MANIFEST).write_text(json.dumps({**handmade.manifest, "files": files}))
    with pytest.raises(DiffpressError, match=r"does not list unet/model\.onnx_data, which unet/model\.onnx needs"):
        external.parts(bundle.read(handmade.path), "unet/model.onnx")
