"""Graphs in half precision: what GPUs multiply fast. Inputs and outputs stay float32, features between graphs do not.

What is computed from the timestep alone stays in float32 as well, up to the first product: sines of large angles, and
the row of the schedule, have no value in half precision (diffusers does the same). Scales of Q/DQ become half too,
since the type of a scale is that of what is dequantized with it.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from diffpress import bundle as bundles
from diffpress.bundle import Bundle, denoiser_bytes
from diffpress.errors import DiffpressError
from diffpress.export import store
from diffpress.export.flops import PRODUCTS

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
EXACT = ("timestep", "time_ids")  # inputs whose embedding needs more than 11 bits
KEPT = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "out_sample", "latent_sample")
FLOAT_ONLY = {"Resize": (1, 2)}  # inputs that the operator takes in float32 alone
LARGEST = float(np.finfo(np.float16).max)
COMPONENTS = ("vae_decoder", "vae_encoder")  # beside the denoiser; text encoders run once per image and stay
LEFT_OUT = ("engines/", "report/")  # of a bundle: made from the graphs that change


def to_half(model: ir.Model, keep: Collection[str] = KEPT, exact: Collection[str] = EXACT) -> None:
    """Rewrite `model` in float16, in place. Inputs and outputs named in `keep` stay float32, other floats become half.

    Weights are converted when they are saved, one at a time. Raises `DiffpressError` for a graph whose types cannot be
    inferred.
    """
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    graph = model.graph
    rewriting = _Rewriting(graph, _exact_nodes(graph, exact))
    for value in graph.inputs:
        if value.dtype == FLOAT and value.name not in keep:
            value.type = ir.TensorType(HALF)  # not its dtype: a copy of a graph shares the types of its values
    for node in list(graph):
        if node not in rewriting.exact:
            rewriting.convert(node)
    for index, value in enumerate(graph.outputs):
        if value.dtype == HALF and value.name in keep:
            name = value.name
            cast = ir.node("Cast", [value], {"to": FLOAT}, name=f"{name}_to_float")
            value.name = f"{name}_half"
            made = cast.outputs[0]
            made.name, made.shape, made.type = name, value.shape, ir.TensorType(FLOAT)
            graph.append(cast)
            graph.outputs[index] = cast.outputs[0]
    rewriting.tidy()


def _exact_nodes(graph: ir.Graph, names: Collection[str]) -> set[ir.Node]:
    """Nodes that depend on the inputs `names` and on no other float, before the first product."""
    values = {value for value in graph.inputs if value.name in names}
    nodes: set[ir.Node] = set()
    for node in graph:
        if node.op_type in (*PRODUCTS, "QuantizeLinear", "DequantizeLinear"):
            continue
        given = [value for value in node.inputs if value is not None and value.const_value is None]
        floats = [value for value in given if value.dtype == FLOAT]
        if any(value in values for value in given) and all(value in values for value in floats):
            nodes.add(node)
            values |= set(node.outputs)
    return nodes


class _Rewriting:
    """A graph on its way to half precision, and the half values of what stays float."""

    def __init__(self, graph: ir.Graph, exact: set[ir.Node]) -> None:
        self.graph, self.exact = graph, exact
        self._halves: dict[ir.Value, ir.Value] = {}

    def convert(self, node: ir.Node) -> None:
        """Make a node take and give half precision in place of float."""
        for index, value in enumerate(node.inputs):
            if value is None or index in FLOAT_ONLY.get(node.op_type, ()):
                continue
            if value.dtype is None:
                raise DiffpressError(f"node '{node.name}': the type of '{value.name}' is not known: export it again")
            if value.dtype == FLOAT:
                node.replace_input_with(index, self._half(value))
        if node.op_type == "Cast" and node.attributes.get_int("to") == FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", HALF)
        for name in ("value", "value_float", "value_floats"):
            if name in node.attributes and node.op_type in ("Constant", "ConstantOfShape"):
                self._constant(node, name)
        for output in node.outputs:
            if output.dtype == FLOAT:
                output.type = ir.TensorType(HALF)

    def _constant(self, node: ir.Node, name: str) -> None:
        attribute: Any = node.attributes[name]
        array = attribute.value.numpy() if name == "value" else np.asarray(attribute.value, np.float32)
        if array.dtype == np.float32:
            del node.attributes[name]
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(_rounded(array)))

    def _half(self, value: ir.Value) -> ir.Value:
        if value not in self._halves:
            if value.const_value is not None and value.is_initializer():
                self._halves[value] = self._stored(value)
            else:
                cast = ir.node("Cast", [value], {"to": HALF}, name=f"{value.name}_to_half")
                made = cast.outputs[0]
                made.name, made.shape, made.type = f"{value.name}_in_half", value.shape, ir.TensorType(HALF)
                producer = value.producer()
                if producer is None:
                    self.graph.insert_before(self.graph[0], cast)
                else:
                    self.graph.insert_after(producer, cast)
                self._halves[value] = made
        return self._halves[value]

    def _stored(self, value: ir.Value) -> ir.Value:
        stored = value.const_value
        assert stored is not None
        name = f"{value.name}_in_half"
        shape = ir.Shape(stored.shape.numpy())
        tensor = ir.LazyTensor(lambda: ir.tensor(_rounded(stored.numpy())), dtype=HALF, shape=shape, name=name)
        made = ir.Value(name=name, shape=shape, type=ir.TensorType(HALF), const_value=tensor)
        self.graph.register_initializer(made)
        return made

    def tidy(self) -> None:
        """Drop float weights that nobody takes any more; the half ones get their names."""
        for value, made in self._halves.items():
            if value.is_initializer() and not value.uses() and not value.is_graph_output():
                name = value.name
                assert name is not None
                del self.graph.initializers[name]
                made.name = name


def _rounded(array: np.ndarray) -> np.ndarray:
    """In half precision; what is finite stays so."""
    return np.where(np.isfinite(array), np.clip(array, -LARGEST, LARGEST), array).astype(np.float16)


def halve(bundle: Bundle, output: Path) -> Bundle:
    """Write `bundle` to `output` with its denoiser and VAE in half precision; text encoders stay as they are.

    Engines, reports and dialects of other backends are left out. Raises `DiffpressError` and leaves nothing where
    something is wrong.
    """
    groups: dict[str, list[str]] = {}
    for file in bundle.manifest["graphs"].values():
        groups.setdefault(str(Path(file).parent), []).append(Path(file).name)
    for name in COMPONENTS:
        if f"{name}/model.onnx" in bundle.manifest["files"]:
            groups[name] = ["model.onnx"]
    with bundles.create(output) as folder:
        for name in bundle.manifest["files"]:
            if name.startswith(LEFT_OUT) or (".onnx" in name and str(Path(name).parent) in groups):
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.file(name), folder / name)
        for place, files in groups.items():
            models = {file: ir.load(bundle.file(f"{place}/{file}")) for file in files}
            for model in models.values():
                to_half(model)
            store.save(models, folder / place)
        manifest = {key: value for key, value in bundle.manifest.items() if key not in ("engines", "package")}
        parity = bundle.manifest.get("parity", {})
        manifest |= {
            "precision": "fp16",
            "dialects": {},
            "parity": {file: entry for file, entry in parity.items() if str(Path(file).parent) not in groups},
            "sizes": {**bundle.manifest.get("sizes", {}), "denoiser_compressed": denoiser_bytes(folder)},
        }
        bundles.write_manifest(folder, manifest)
    return bundles.read(output)
