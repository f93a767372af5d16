import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffpress.errors import DiffpressError
from diffpress.runtime import backends
from diffpress.runtime.backends import open_session

ROOT = Path(__file__).parents[2]
PAIRS = backends.available()


def save(file: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], **constants: np.ndarray) -> Path:
    def info(name: str, shape: list[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        nodes,
        "g",
        [info(*port) for port in inputs],
        [info(*port) for port in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)
    return file


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Two outputs that are one tensor, a graph output that another node reads, and an input that nothing reads."""
    nodes = [
        helper.make_node("Relu", ["x"], ["inner"]),
        helper.make_node("Identity", ["inner"], ["same"]),
        helper.make_node("Identity", ["inner"], ["again"]),
        helper.make_node("Add", ["same", "y"], ["sum"]),
    ]
    ports = [("x", ["N", 3]), ("y", [1]), ("unused", ["N", 2])]
    outputs = [("sum", ["N", 3]), ("same", ["N", 3]), ("again", ["N", 3])]
    return save(tmp_path / "graph.onnx", nodes, ports, outputs)


@pytest.mark.parametrize(("backend", "precision"), PAIRS)
def test_names_shapes_and_values(graph: Path, backend: str, precision: str) -> None:
    session = open_session(graph, backend, precision, threads=1)
    assert {name: port.shape for name, port in session.inputs.items()} == {
        "x": (None, 3),
        "y": (1,),
        "unused": (None, 2),
    }
    assert list(session.outputs) == ["sum", "same", "again"]
    assert {port.dtype for port in (*session.inputs.values(), *session.outputs.values())} == {np.dtype("float32")}
    kept = []
    for batch in (1, 4, 1):
        x = np.linspace(-2, 2, 3 * batch, dtype=np.float32).reshape(batch, 3)
        feeds = {"x": np.asfortranarray(x), "y": np.ones(1, np.float32), "unused": np.zeros((batch, 2), np.float32)}
        kept.append((x, session.run(feeds)))
    for x, results in kept:  # what a run returned is not touched by later runs
        np.testing.assert_allclose(results["again"], x.clip(0), rtol=1e-2)
        np.testing.assert_allclose(results["same"], x.clip(0), rtol=1e-2)
        np.testing.assert_allclose(results["sum"], x.clip(0) + 1, rtol=1e-2)


@pytest.mark.parametrize(("backend", "precision"), PAIRS)
def test_an_output_can_be_the_next_input(graph: Path, backend: str, precision: str) -> None:
    session = open_session(graph, backend, precision)
    x, y, unused = np.full((1, 3), 2, np.float32), np.ones(1, np.float32), np.zeros((1, 2), np.float32)
    for _ in range(5):
        x = session.run({"x": x, "y": y, "unused": unused})["sum"]
    np.testing.assert_array_equal(x, np.full((1, 3), 7))


@pytest.mark.parametrize(("backend", "precision"), PAIRS)
def test_the_row_of_a_timestep_is_found_in_every_precision(tmp_path: Path, backend: str, precision: str) -> None:
    """981 and 982 are one number in bf16: matching a timestep against a table must not be done in it."""
    timesteps = np.arange(1, 1000, 3, dtype=np.float32)
    table = np.random.default_rng(0).standard_normal((len(timesteps), 16)).astype(np.float32)
    nodes = [
        helper.make_node("Sub", ["timestep", "timesteps"], ["difference"]),
        helper.make_node("Abs", ["difference"], ["distance"]),
        helper.make_node("ArgMin", ["distance"], ["row"], axis=0, keepdims=1),
        # An integer all the way: OpenVINO rounds a row that travels as a float, right only up to 256 in bf16.
        helper.make_node("Gather", ["table", "row"], ["time"], axis=0),
        helper.make_node("MatMul", ["sample", "weight"], ["product"]),
        helper.make_node("Add", ["product", "time"], ["out"]),
        helper.make_node("MatMul", ["out", "weight"], ["out_sample"]),
    ]
    weight = np.eye(16, dtype=np.float32)
    ports = [("sample", ["N", 16]), ("timestep", [1])]
    file = save(
        tmp_path / "g.onnx", nodes, ports, [("out_sample", ["N", 16])], timesteps=timesteps, table=table, weight=weight
    )
    session = open_session(file, backend, precision)
    for row, timestep in enumerate(timesteps):
        feeds = {"sample": np.zeros((2, 16), np.float32), "timestep": np.array([timestep], np.float32)}
        np.testing.assert_allclose(session.run(feeds)["out_sample"][1], table[row], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("backend", "precision"), PAIRS)
def test_the_precision_is_the_one_asked_for(tmp_path: Path, backend: str, precision: str) -> None:
    random = np.random.default_rng(0)
    x, weight = (random.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    file = save(tmp_path / "g.onnx", [node], [("x", ["N", 64])], [("y", ["N", 64])], weight=weight)
    exact = x.astype(np.float64) @ weight
    error = np.linalg.norm(open_session(file, backend, precision).run({"x": x})["y"] - exact) / np.linalg.norm(exact)
    assert error < 1e-6 if precision == "fp32" else 1e-4 < error < 1e-2


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_what_cannot_be_opened_or_run_is_one_line(graph: Path, tmp_path: Path, backend: str) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"junk")
    with pytest.raises(DiffpressError, match=r"cannot open .*bad\.onnx") as caught:
        open_session(bad, backend)
    assert "\n" not in str(caught.value)
    with pytest.raises(DiffpressError, match="no graph"):
        open_session(tmp_path / "absent.onnx", backend)
    feeds = {"x": np.zeros((1, 4), np.float32), "y": np.ones(1, np.float32), "unused": np.zeros((1, 2), np.float32)}
    with pytest.raises(DiffpressError, match=r"cannot run .*graph\.onnx") as caught:
        open_session(graph, backend).run(feeds)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["openvino", "onnxruntime"])
def test_a_missing_library_is_named(missing: str) -> None:
    script = (
        "import sys\n"
        f"sys.modules['{missing}'] = None\n"
        "from diffpress.errors import DiffpressError\n"
        "from diffpress.runtime import backends\n"
        f"assert '{missing}' not in dict(backends.available())\n"
        f"try:\n    backends.check('{missing}', 'fp32')\n"
        "except DiffpressError as error:\n"
        f"    assert \"pip install 'diffpress[cpu]'\" in str(error)\n"
        "else:\n    raise AssertionError\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("backend", "precision"), PAIRS)
def test_outputs_are_written_where_they_are_wanted(graph: Path, backend: str, precision: str) -> None:
    session = open_session(graph, backend, precision, threads=1)

    def run(value: float, rows: int = 2, **into: np.ndarray) -> dict[str, np.ndarray]:
        x, unused = np.full((rows, 3), value, np.float32), np.zeros((rows, 2), np.float32)
        return session.run({"x": x, "y": np.ones(1, np.float32), "unused": unused}, into)

    first, second, room = (np.zeros((2, 3), np.float32) for _ in range(3))
    results = run(2, same=first)
    assert results["same"] is first and list(results) == list(session.outputs)
    assert (first == 2).all() and (results["again"] == 2).all() and (results["sum"] == 3).all()
    assert not any(np.shares_memory(first, results[name]) for name in ("sum", "again"))
    run(5, same=second, sum=room)
    assert (first == 2).all() and (second == 5).all() and (room == 6).all()
    assert (results["again"] == 2).all() and (results["sum"] == 3).all()  # of the first run
    last = run(7)
    assert (first == 2).all() and (second == 5).all() and (room == 6).all() and (last["same"] == 7).all()
    run(9, rows=1, same=room[:1])
    assert (room == [[9] * 3, [6] * 3]).all()
    run(4, same=first)
    run(8, same=second)
    run(3, sum=room)  # `same` is wanted nowhere now
    assert (first == 4).all() and (second == 8).all() and (room == 4).all()
    run(6, same=second)
    assert (first == 4).all() and (second == 6).all() and (room == 4).all()
    fed = session.run({"x": room[-1:], "y": np.ones(1, np.float32), "unused": np.zeros((1, 2), np.float32)})
    assert (fed["sum"] == 5).all()


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_what_cannot_be_written_into_is_refused(graph: Path, backend: str) -> None:
    session = open_session(graph, backend)
    x = np.zeros((2, 3), np.float32)
    feeds = {"x": x, "y": np.ones(1, np.float32), "unused": np.zeros((2, 2), np.float32)}
    fixed = x.copy()
    fixed.flags.writeable = False
    wrong = [x.astype(np.float64), np.zeros((2, 4), np.float32), np.zeros((3, 2), np.float32).T, fixed, x[0]]
    for array in wrong:
        with pytest.raises(
            DiffpressError, match=r"'same' .*give a contiguous, writeable float32 array of \[batch, 3\]"
        ):
            session.run(feeds, {"same": array})
    with pytest.raises(DiffpressError, match="no output 'other'"):
        session.run(feeds, {"other": x.copy()})
    with pytest.raises(DiffpressError, match=r"cannot run .*graph\.onnx") as caught:
        session.run(feeds, {"same": np.zeros((5, 3), np.float32)})
    assert "\n" not in str(caught.value)
    with pytest.raises(DiffpressError, match=r"cannot run .*graph\.onnx"):
        session.run(feeds | {"x": np.zeros((2, 4), np.float32)}, {"same": x.copy()})
    session.run(feeds, {"same": x.copy()})
    if backend == "onnxruntime":  # what an earlier run was fed does not stand in
        with pytest.raises(DiffpressError, match=r"cannot run .*graph\.onnx"):
            session.run({"x": x, "unused": feeds["unused"]}, {"same": x.copy()})
    assert (session.run(feeds)["sum"] == 1).all()  # and nothing of this stays
