"""Writes a compressed pipeline as a bundle: graphs, configurations, plan, manifest, laid out as ONNX pipelines are."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

import diffpress
from diffpress.bundle import CONTROLNET, DIALECT, denoiser_bytes
from diffpress.compress.families import texts
from diffpress.compress.families.unet import conditions, latent_size, narrowed
from diffpress.compress.families.unet_graph import UNetGraph, feature_shapes, residual_inputs
from diffpress.compress.numerics.simulate import simulated
from diffpress.export import components, dialect, graphs, layers, lint, parity, qdq, store
from diffpress.export.deploy import deployable, settled
from diffpress.export.graphs import GraphSpec
from diffpress.export.parity import Expected
from diffpress.plan import EARLIER, FULL, LayerQuant, Plan, Sampling

LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "numpy")
CLASS = ("_class_name", "_diffusers_version")  # what diffusers opens a configuration with
DEFAULTS = ("_use_default_values",)  # names of what a scheduler's file did not say
LARGE = 512 * 512  # pixels above which one picture is enough for a comparison: a VAE takes gigabytes for each
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def denoiser_specs(
    denoiser: Any,
    plan: Plan,
    latent: tuple[int, int, int],
    text: tuple[int, int],
    constant: Mapping[str, Tensor] | None = None,
) -> dict[str, GraphSpec]:
    """A graph per variant of the step program, with example inputs for a batch of two (both guidance halves).

    `text` is [T, D]; `constant` [1, ...] are the conditions that are the same for every text.
    """
    generator = torch.Generator().manual_seed(0)
    # A timestep of the schedule: a temporal table knows no other.
    timestep = torch.tensor([plan.sampling.timesteps[len(plan.sampling.timesteps) // 2]])
    base = {
        "sample": torch.randn(2, *latent, generator=generator),
        "timestep": timestep,
        **{name: torch.randn(2, *shape, generator=generator) for name, shape in conditions(denoiser, text[0]).items()},
        **{name: value.expand(2, *value.shape[1:]).contiguous() for name, value in (constant or {}).items()},
    }
    specs, shapes = {}, shapes_of(denoiser, plan, latent)
    for name, variant in plan.program.variants.items():
        module = UNetGraph(denoiser, variant.reads, variant.writes, plan.corrections)
        inputs, fixed = dict(base), () if variant.together > 1 else ("timestep",)
        for read in variant.reads:
            inputs[read] = torch.randn(2, *shapes[read.removesuffix(EARLIER)], generator=generator)
        if variant.together > 1:
            inputs["timestep"] = timestep.repeat(2)  # steps that run together have each their own
        specs[name] = GraphSpec(module, inputs, ("out_sample", *variant.writes), fixed)
    return specs


def controlnet_spec(denoiser: Any, full: GraphSpec) -> GraphSpec:
    """The graph of all layers, `full`, with inputs for a ControlNet's residuals and none of its features."""
    generator, names = torch.Generator().manual_seed(1), residual_inputs(denoiser)
    shapes = feature_shapes(denoiser, tuple(names.values()), *full.inputs["sample"].shape[2:])
    added = {name: torch.randn(2, *shapes[feature], generator=generator) for name, feature in names.items()}
    return GraphSpec(UNetGraph(denoiser), {**full.inputs, **added}, ("out_sample",))


def shapes_of(denoiser: Any, plan: Plan, latent: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every feature of the step program, without the batch."""
    names = dict.fromkeys(name for variant in plan.program.variants.values() for name in variant.writes)
    return feature_shapes(denoiser, names, *latent[1:])


def file_of(variant: str) -> str:
    """The graph file of a variant; the full one has the name that ONNX pipelines look for."""
    return "model.onnx" if variant == FULL else f"{variant}.onnx"


def dialect_file_of(variant: str) -> str:
    """The same graph in ONNX Runtime's dialect, which reads the same data file; `runtime.backends` knows the ending."""
    return f"{Path(file_of(variant)).stem}{DIALECT}"


@torch.no_grad()
def network(pipeline: Any, folder: Path) -> Path:
    """The denoiser as it is, as one graph that takes a timestep for each row; returns the file.

    What ships has one timestep for all rows and may know no other than its schedule's. This one is for searches.
    """
    file, denoiser = folder / file_of(FULL), pipeline.unet
    if not file.exists():
        inputs = {
            "sample": torch.zeros(2, denoiser.config.in_channels, *latent_size(denoiser)),
            "timestep": torch.tensor([1.0, 2.0]),
            **{name: torch.zeros(2, *shape) for name, shape in conditions(denoiser, texts.tokens(pipeline)).items()},
        }
        with graphs.plain_attention(denoiser):
            model = graphs.to_onnx(GraphSpec(UNetGraph(denoiser), inputs, ("out_sample",), fixed=()))
        graphs.finish(model)
        partial = folder.with_name(f"{folder.name}.partial")
        store.save({file.name: model}, partial)
        partial.replace(folder)
    return file


@torch.no_grad()
def variants(
    pipeline: Any,
    plan: Plan,
    folder: Path,
    progress: Progress,
    dialects: bool = False,
    export: Callable[[GraphSpec], ir.Model] | None = None,
) -> dict[str, Path]:
    """Every variant of the denoiser as it would ship, in `folder`, and nothing else; their files.

    With `dialects` those of ONNX Runtime's lie beside them. `export` serves in place of `graphs.to_onnx`.
    """
    denoiser = pipeline.unet
    shipped = {name: deployable(layer) for name, layer in plan.quantization.items()}
    with graphs.plain_attention(denoiser), settled(denoiser, plan.quantization):
        specs = denoiser_specs(denoiser, plan, *sizes(pipeline, plan.sampling))
        models = _models(specs, shipped, plan.sampling, progress, export=export)
        store.save({**models, **(_dialects(models, specs) if dialects else {})}, folder)
    return {name: folder / file_of(name) for name in specs}


@torch.no_grad()
def ship(
    pipeline: Any,
    plan: Plan,
    folder: Path,
    entries: Mapping[str, Any],
    progress: Progress,
    sensitivity: Sequence[Mapping[str, Any]] = (),
    controlnet: bool = False,
    keep: bool = True,
) -> dict[str, Any]:
    """Export everything into `folder`; returns the manifest (`entries` are its parts that the caller knows).

    `sensitivity` are rows by layer that `plan/layers.json` takes in; with `controlnet` there is one more graph. Without
    `keep` weights are given up once they are in a graph, so that there never are two copies of them in memory; the
    pipeline is of no use then.
    """
    sampling = plan.sampling
    denoiser, vae = pipeline.unet, pipeline.vae
    latent, text, constant = sizes(pipeline, sampling)
    checks: dict[str, Any] = {}
    refused: dict[str, list[lint.Finding]] = {}  # by graph, what TensorRT cannot take or does not fuse
    shipped = {name: deployable(layer) for name, layer in plan.quantization.items()}
    expected: dict[str, list[Expected]] = {}
    with settled(denoiser, plan.quantization, keep):
        with graphs.plain_attention(denoiser):
            specs = denoiser_specs(denoiser, plan, latent, text, constant)
            if controlnet:
                specs[CONTROLNET] = controlnet_spec(denoiser, specs[FULL])
            models = _models(specs, shipped, sampling, progress, refused)
        dialects = _dialects(models, specs)
        store.save({**models, **dialects}, folder / "unet")
        written = {*models, *dialects}
        del models, dialects  # their weights are in the file, and large
        with simulated(
            denoiser, shipped, sampling.timesteps, keep
        ):  # attention without its matrix, which is large, too
            for name, spec in progress(specs.items(), "computing what graphs have to give"):
                batches = sorted({2, *plan.program.halves(name)})  # of one image
                expected[name] = [_expected(spec, size) for size in batches]
    narrow = narrowed(denoiser)
    table = layers.rows(denoiser, plan.quantization, sensitivity)
    if not keep:
        denoiser.to("meta")  # shapes alone: the graphs are compared in the memory that this frees
    for name, wanted in progress(expected.items(), "checking the denoiser"):
        for file in (file_of(name), dialect_file_of(name)):
            if file in written:
                checks[f"unet/{file}"] = _worst([parity.compare(folder / "unet" / file, one) for one in wanted])
    encoders = [part.name for part in texts.text_encoders(pipeline)]
    features = {name: list(value.shape[1:]) for (one, *_) in expected.values() for name, value in one.outputs.items()}
    del features["out_sample"]
    for name, spec in progress(
        components.specs(pipeline, sampling.height, sampling.width).items(), "exporting the rest"
    ):
        model = graphs.to_onnx(spec)
        refused[f"{name}/model.onnx"] = lint.findings(model)
        graphs.finish(model)
        store.save({"model.onnx": model}, folder / name)
        del model
        inputs = _cut(spec, 2 if sampling.height * sampling.width <= LARGE else 1)
        checks[f"{name}/model.onnx"] = parity.check(folder / name / "model.onnx", spec.module, inputs, spec.outputs)
        if not keep and name in encoders:
            getattr(pipeline, name).to("meta")
    _write_configs(pipeline, sampling.scheduler, folder)
    plan.save(folder / "plan")
    (folder / "plan" / "layers.json").write_text(json.dumps(table, indent=1))
    return {
        "diffpress": diffpress.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES if _installed(name)},
        **schedule(sampling, pipeline.scheduler),
        "program": plan.program.to_json(),
        "graphs": {name: f"unet/{file_of(name)}" for name in specs},
        # By backend, what it opens instead where it is listed.
        "dialects": {
            "onnxruntime": {name: f"unet/{dialect_file_of(name)}" for name in specs if dialect_file_of(name) in written}
        },
        "features": features,
        "latent": {
            "channels": latent[0],
            "height": latent[1],
            "width": latent[2],
            "scaling_factor": vae.config.scaling_factor,
            "shift_factor": vae.config.get("shift_factor") or 0.0,
        },
        "text": texts.entry(pipeline),
        "conditions": {name: value[0].tolist() for name, value in constant.items()},
        **({"structure": narrow} if narrow else {}),  # unet/config.json is that of the whole network
        "parity": checks,
        "lint": {graph: [finding.to_json() for finding in found] for graph, found in refused.items() if found},
        **entries,
        "sizes": {**entries.get("sizes", {}), "denoiser_compressed": denoiser_bytes(folder)},
    }


def sizes(pipeline: Any, sampling: Sampling) -> tuple[tuple[int, int, int], tuple[int, int], dict[str, Tensor]]:
    """Of the latent [C, h, w] and of the text [T, D]; and the conditions [1, ...] that are the same for every text."""
    denoiser, down = pipeline.unet, components.downscale(pipeline.vae)
    latent = (denoiser.config.in_channels, sampling.height // down, sampling.width // down)
    size = texts.tokens(pipeline), denoiser.config.cross_attention_dim
    return latent, size, texts.constant(pipeline, sampling)


def _models(
    specs: Mapping[str, GraphSpec],
    shipped: Mapping[str, LayerQuant],
    sampling: Sampling,
    progress: Progress,
    refused: dict[str, list[lint.Finding]] | None = None,
    export: Callable[[GraphSpec], ir.Model] | None = None,
) -> dict[str, ir.Model]:
    """The graphs of the variants by file, quantized; `refused` takes what TensorRT would say of each."""
    models = {}
    for name, spec in progress(specs.items(), "exporting the denoiser"):
        models[file_of(name)] = (export or graphs.to_onnx)(spec)
    packed: qdq.Packed = {}
    for file, model in models.items():
        qdq.insert(model, shipped, sampling.timesteps, packed=packed)
        if refused is not None:
            refused[f"unet/{file}"] = lint.findings(model)  # while nodes know the module they came from
        graphs.finish(model)
    return models


def _dialects(models: Mapping[str, ir.Model], variants: Iterable[str]) -> dict[str, ir.Model]:
    """The graphs of variants in ONNX Runtime's dialect by file, those that have one."""
    rewritten = {dialect_file_of(name): dialect.onnxruntime(models[file_of(name)]) for name in variants}
    return {file: model for file, model in rewritten.items() if model is not None}


def schedule(sampling: Sampling, scheduler: Any) -> dict[str, Any]:
    """The manifest's entries for a schedule: its table, and the class and configuration of its scheduler."""
    # What the model's file leaves open is for each class to fill in as it likes, so keep what that was.
    config = _plain(scheduler.config, DEFAULTS)
    return {"sampling": sampling.to_json(), "scheduler": {"class": sampling.scheduler, "config": config}}


def _cut(spec: GraphSpec, size: int) -> dict[str, Tensor]:
    """The graph's example inputs, a batch of `size` of them."""
    return {name: value if name in spec.fixed else value[:size] for name, value in spec.inputs.items()}


def _expected(spec: GraphSpec, size: int) -> Expected:
    return parity.expected(spec.module, _cut(spec, size), spec.outputs)


def _worst(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the entries of a graph's checks the one nearest to its tolerance."""
    return dict(max(found, key=lambda entry: entry["max_rel_l2"] / entry["tolerance"]))


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _plain(config: Mapping[str, Any], private: tuple[str, ...] = ()) -> dict[str, Any]:
    """As JSON holds it, without private entries (where a model was loaded from, for one) but those named."""
    kept = {key: value for key, value in config.items() if not key.startswith("_") or key in private}
    return json.loads(json.dumps(kept, default=str))


def _write_configs(pipeline: Any, scheduler: str, folder: Path) -> None:
    """The configurations of all parts; `scheduler` is the class that reads its own, also where a table plays it."""
    encoders = texts.text_encoders(pipeline)
    modules: dict[str, nn.Module] = {
        "unet": pipeline.unet,
        "vae_decoder": pipeline.vae,
        "vae_encoder": pipeline.vae,
        **{part.name: getattr(pipeline, part.name) for part in encoders},
    }
    for name, module in modules.items():
        config: Any = module.config
        (folder / name / "config.json").write_text(
            json.dumps(_plain(config.to_dict() if hasattr(config, "to_dict") else config, CLASS), indent=1)
        )
    for part in encoders:
        getattr(pipeline, part.tokenizer).save_pretrained(folder / part.tokenizer)
        shutil.rmtree(folder / part.tokenizer / ".cache", ignore_errors=True)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    # The classes that optimum writes, so that its pipelines find their parts.
    index = {
        "_class_name": type(pipeline).__name__,
        "_diffusers_version": importlib.metadata.version("diffusers"),
        "scheduler": ["diffusers", scheduler],
        **{part.name: ["diffusers", "OnnxRuntimeModel"] for part in encoders},
        **{part.tokenizer: ["transformers", "CLIPTokenizer"] for part in encoders},
        "unet": ["diffusers", "OnnxRuntimeModel"],
        "vae_decoder": ["diffusers", "OnnxRuntimeModel"],
        "vae_encoder": ["diffusers", "OnnxRuntimeModel"],
        "feature_extractor": [None, None],
        **{name: pipeline.config[name] for name in ("force_zeros_for_empty_prompt",) if name in pipeline.config},
        **({"safety_checker": [None, None]} if "safety_checker" in pipeline.config else {}),
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
