"""torch modules to ONNX graphs (`torch.onnx.export`, dynamo), in a form that runtimes fuse."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn

from diffpress.errors import DiffpressError

OPSET = 20


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
            program = torch.onnx.export(
                module,
                tuple(spec.inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(spec.inputs),
                output_names=list(spec.outputs),
                dynamic_shapes=dynamic,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[0]
            raise DiffpressError(f"{type(module).__name__} could not be exported to ONNX: {reason}") from error
    assert program is not None
    model = program.model
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and not isinstance(value.shape[0], int):
            value.shape = ir.Shape(["batch", *value.shape[1:]])
    return model


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
