"""torch modules to ONNX graphs (`torch.onnx.export`, dynamo), in a form that runtimes fuse."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules import common as rules
from torch import Tensor, nn

from diffpress.errors import DiffpressError
from diffpress.export import translations

OPSET = 20
# Those of `optimize_ir` that what the exporter writes can match.
RULES = (
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.mul_by_1_rule,
    rules.div_by_1_rule,
    rules.dropout_zero_rule,
    rules.dropout_inference_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.flatten_to_reshape_rule,
    rules.reshape_reshape_rule,
    rules.materialize_reshape_shape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.normalize_pad_format_conv_rule,
    rules.fuse_pad_into_conv_rule,
)


@dataclass(frozen=True)
class GraphSpec:
    """A graph to export: a module, example inputs, and which of them (and the outputs) carry a batch in front."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    fixed: tuple[str, ...] = ("timestep",)  # inputs without a batch dimension


class PlainAttention:
    """An attention processor of two products and a softmax, with the scale as a constant.

    diffusers' default traces to a scale computed from shapes at run time, which no runtime's attention fusion matches.
    Covers attention over [N, T, D] without masks, which is all a Stable Diffusion U-Net has.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = attn.heads

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)

        query, key, value = split(attn.to_q(hidden_states)), split(attn.to_k(context)), split(attn.to_v(context))
        weights = torch.softmax((query * attn.scale) @ key.transpose(-1, -2), dim=-1)
        joined = (weights @ value).transpose(1, 2).flatten(2)
        return attn.to_out[0](joined) / attn.rescale_output_factor


@contextlib.contextmanager
def plain_attention(denoiser: Any) -> Iterator[None]:
    """Within the block `denoiser` computes attention with `PlainAttention`; its own processors come back after."""
    kept = dict(denoiser.attn_processors)
    denoiser.set_attn_processor(PlainAttention())
    try:
        yield
    finally:
        denoiser.set_attn_processor(kept)


def to_onnx(spec: GraphSpec) -> ir.Model:
    """Export and simplify. Nodes keep the module path they came from in their metadata until `finish`."""
    batch = torch.export.Dim.DYNAMIC
    dynamic: tuple[Any, ...] = tuple(None if name in spec.fixed else {0: batch} for name in spec.inputs)
    module = spec.module.eval()
    named = [entry.kind is not entry.VAR_POSITIONAL for entry in inspect.signature(module.forward).parameters.values()]
    rest = dynamic[named.index(False) :] if False in named else ()
    if rest:  # the exporter wants those of `*features` as one
        dynamic = (*dynamic[: -len(rest)], rest)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")
        try:
            program = _translated(spec, module, dynamic)
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[0]
            raise DiffpressError(f"{type(module).__name__} could not be exported to ONNX: {reason}") from error
        assert program is not None
        model = program.model
        del program
        _simplify(model)
    _turn_weights(model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and not isinstance(value.shape[0], int):
            value.shape = ir.Shape(["batch", *value.shape[1:]])
    return model


def _translated(spec: GraphSpec, module: nn.Module, dynamic: tuple[Any, ...]) -> Any:
    """torch's ONNX program of a network, translated as it was traced; where torch cannot, after taking it apart."""
    inputs = tuple(spec.inputs.values())

    def translate(program: Any, **more: Any) -> Any:
        return torch.onnx.export(
            program,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(spec.inputs),
            output_names=list(spec.outputs),
            dynamic_shapes=dynamic,
            verbose=False,
            optimize=False,  # it is below, without copies of weights
            **more,
        )

    try:
        traced = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
        return translate(translations.as_it_is(traced), custom_translation_table=translations.TABLE)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError, ValueError):
        return translate(module)


def _simplify(model: ir.Model) -> None:
    """What `onnxscript.optimizer.optimize_ir` does, without its search for slices that make a split.

    That takes time with the square of the nodes, several times as long as all the rest, and finds nothing here.
    """
    common.InlinePass()(model)
    for _ in range(2):
        fold_constants_ir(
            model,
            onnx_shape_inference=True,
            should_fold=lambda node: False if _turned_weight(node) is not None else None,
        )
        rewrite(model, RULES)
    for tidy in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        tidy(model)


def _turned_weight(node: ir.Node) -> ir.TensorProtocol | None:
    """The matrix that `node` transposes, which is one of the graph's weights."""
    source = node.inputs[0] if node.op_type == "Transpose" and not node.domain else None
    tensor = None if source is None or source.producer() is not None else source.const_value
    return tensor if tensor is not None and len(tensor.shape) == 2 else None


def _turn_weights(model: ir.Model) -> None:
    """Replace transposed weights by constants that are made when they are read: all at once are another network."""
    for node in list(model.graph):
        tensor, turned = _turned_weight(node), node.outputs[0]
        if tensor is None or turned.is_graph_output():
            continue
        rows, columns = tensor.shape.numpy()
        value = ir.Value(
            name=f"{node.inputs[0].name}_turned",  # type: ignore[union-attr]
            shape=ir.Shape((columns, rows)),
            type=ir.TensorType(tensor.dtype),
        )
        value.const_value = ir.LazyTensor(partial(_turned, tensor), tensor.dtype, ir.Shape((columns, rows)))
        if value.name not in model.graph.initializers:
            model.graph.register_initializer(value)
        ir.convenience.replace_all_uses_with(turned, model.graph.initializers[str(value.name)])
    common.RemoveUnusedNodesPass()(model)


def _turned(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype)


def finish(model: ir.Model) -> None:
    """Share repeated work and drop the exporter's notes, which weigh more than the graph."""
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    for value in _values(model):
        value.metadata_props.clear()
    model.producer_name, model.producer_version = "diffpress", ""
    model.metadata_props.clear()


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """The exporter logs every optional operator that is not installed."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
