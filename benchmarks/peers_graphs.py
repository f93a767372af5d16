"""Contenders whose networks are graphs: ONNX Runtime, OpenVINO and optimum-onnx, in diffusers' pipeline.

The graphs are what torch's exporter makes of the networks, none of ours: they are made once for all who run them.
Libraries are used as their manuals say, with no options but the precision.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffpress.benchmarks.peers_torch import Diffusers, Network, Plain, modelopt, stored
from diffpress.benchmarks.peers_worker import Task
from diffpress.errors import require
from diffpress.runtime import open_vino

UNET, TEXT, DECODER = "unet", "text_encoder", "vae_decoder"
MADE = "made.json"  # beside what was made, and how long that took
Feeds = Mapping[str, np.ndarray]


class Graph(Protocol):
    """An open graph: inputs by name to its only output."""

    def __call__(self, feeds: Feeds) -> np.ndarray: ...


class OnnxRuntime:
    """A file in ONNX Runtime."""

    def __init__(self, file: Path) -> None:
        library = require("onnxruntime", "cpu", "run ONNX Runtime")
        self._session = library.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def __call__(self, feeds: Feeds) -> np.ndarray:
        output: np.ndarray = self._session.run(None, dict(feeds))[0]
        return output


class OpenVino:
    """A file in OpenVINO, compiled for each shape that comes: static ones are faster."""

    def __init__(self, file: Path, precision: str) -> None:
        self._file = file
        self._options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        self._compiled: dict[tuple[tuple[int, ...], ...], Any] = {}

    def __call__(self, feeds: Feeds) -> np.ndarray:
        shapes = tuple(value.shape for value in feeds.values())
        if shapes not in self._compiled:
            model = open_vino.core().read_model(self._file)
            model.reshape({name: list(value.shape) for name, value in feeds.items()})
            self._compiled[shapes] = open_vino.core().compile_model(model, "CPU", self._options)
        output: np.ndarray = self._compiled[shapes](dict(feeds))[0]
        return output


class TextEncoder(nn.Module):
    """A CLIP text model with a tensor out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        output: Tensor = self.model(input_ids, return_dict=False)[0]
        return output


class Decoder(nn.Module):
    """A VAE's decoder with a tensor out."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        output: Tensor = self.vae.decode(latent_sample, return_dict=False)[0]
        return output


def once(folder: Path, make: Callable[[Path], None]) -> float:
    """Make `folder` by filling an empty one, where it is not there; the seconds that took when it was made."""
    if not (folder / MADE).exists():
        shutil.rmtree(folder, ignore_errors=True)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        start = time.perf_counter()
        make(partial)
        (partial / MADE).write_text(json.dumps({"seconds": time.perf_counter() - start}))
        partial.rename(folder)
    return float(json.loads((folder / MADE).read_text("utf-8"))["seconds"])


def export(module: nn.Module, feeds: Mapping[str, Tensor], file: Path, fixed: Sequence[str] = ()) -> None:
    """Write a network as torch's exporter does by default, with an open batch in front of all inputs but `fixed`."""
    batch = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            tuple(feeds.values()),
            str(file),
            input_names=list(feeds),
            dynamic_shapes=tuple(None if name in fixed else {0: batch} for name in feeds),
            dynamo=True,
            verbose=False,
        )


def networks(task: Task, pipeline: Any, folder: Path) -> None:
    """Write the three networks of a pipeline; for single calls the U-Net alone."""
    rows = {
        "sample": torch.randn(2, *task.latent),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(2, *task.text),
    }
    export(Plain(pipeline.unet), rows, folder / f"{UNET}.onnx", fixed=("timestep",))
    if not task.single:
        ids = torch.ones(2, task.text[0], dtype=torch.int64)
        export(TextEncoder(pipeline.text_encoder), {"input_ids": ids}, folder / f"{TEXT}.onnx")
        export(Decoder(pipeline.vae), {"latent_sample": torch.randn(2, *task.latent)}, folder / f"{DECODER}.onnx")


def opened(task: Task) -> Diffusers:
    """diffusers' pipeline with graphs in place of its networks."""
    from diffpress.calibration.model import load_pipeline

    pipeline = load_pipeline(task.source)
    parameters = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    whole = task.place / "onnx"
    seconds = once(whole, lambda folder: networks(task, pipeline, folder))
    precision = str(task.options.get("precision", "f32"))
    library = "openvino" if task.make == "openvino" else "onnxruntime"

    def open_graph(file: Path) -> Graph:
        return OpenVino(file, precision) if library == "openvino" else OnnxRuntime(file)

    unet, bits, facts = whole / f"{UNET}.onnx", 16 if precision == "bf16" else 32, {}
    if task.options.get("nncf"):
        seconds += once(task.place / "nncf", lambda folder: quantize(task, pipeline, unet, folder))
        unet, bits = task.place / "nncf" / f"{UNET}.xml", 8
    if task.make == "modelopt-onnx":
        config = str(task.options["config"])
        seconds = once(task.place / "modelopt", lambda folder: simulated(task, pipeline, config, folder))
        unet, bits = task.place / "modelopt" / f"{UNET}.onnx", 8
        facts = {"note": "weights in the file stay float32"}
    size = sum(file.stat().st_size for file in unet.parent.glob(f"{UNET}.*") if file.suffix != ".json")
    made = Diffusers(
        task,
        with_graphs(task, pipeline, open_graph, unet, whole),
        backend=f"{library} {'bf16' if precision == 'bf16' else 'fp32'}",
        bits_w=bits,
        bits_a=bits,
        params=parameters,
        bytes=size,
        seconds=seconds,
    )
    made.facts |= facts
    return made


def with_graphs(task: Task, pipeline: Any, open_graph: Callable[[Path], Graph], unet: Path, whole: Path) -> Any:
    """The pipeline with open graphs in place of its networks; for single calls of the U-Net alone."""
    run = open_graph(unet)

    def denoise(feeds: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(run({name: value.numpy() for name, value in feeds.items()}).copy())

    pipeline.unet = Network(pipeline.unet.config, denoise)
    if task.single:
        return pipeline
    encode, decode = open_graph(whole / f"{TEXT}.onnx"), open_graph(whole / f"{DECODER}.onnx")

    def encoded(input_ids: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.from_numpy(encode({"input_ids": input_ids.numpy()}).copy()),)

    def decoded(latents: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.from_numpy(decode({"latent_sample": latents.numpy()}).copy()),)

    pipeline.text_encoder.forward, pipeline.vae.decode = encoded, decoded
    return pipeline


def quantize(task: Task, pipeline: Any, file: Path, folder: Path) -> None:
    """NNCF's post-training INT8 of the U-Net, its settings those for transformers as for diffusion in its examples."""
    nncf, openvino = require("nncf", "peers", "run NNCF"), open_vino.library()
    calls = [{name: value.numpy() for name, value in call.items()} for call in Diffusers(task, pipeline).recorded()]
    model = open_vino.core().read_model(file)
    found = nncf.quantize(model, nncf.Dataset(calls), subset_size=len(calls), model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(found, folder / f"{UNET}.xml", compress_to_fp16=False)


def simulated(task: Task, pipeline: Any, config: str, folder: Path) -> None:
    """The U-Net as nvidia-modelopt quantizes it, by torch's older exporter: the one that knows its quantizers."""
    modelopt(Diffusers(task, pipeline, params=stored(pipeline.unet)), config)
    rows = (torch.randn(2, *task.latent), torch.tensor([500.0]), torch.randn(2, *task.text))
    names = ["sample", "timestep", "encoder_hidden_states"]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Plain(pipeline.unet),
            rows,
            str(folder / f"{UNET}.onnx"),
            input_names=names,
            dynamic_axes={name: {0: "batch"} for name in names if name != "timestep"},
            opset_version=19,
            dynamo=False,
        )


def with_optimum(task: Task) -> Diffusers:
    """optimum-onnx's own pipeline of a diffusers folder, which it exports itself."""
    from diffpress.calibration.model import folder_of

    library = require("optimum.onnxruntime", "peers", "run optimum-onnx")
    folder, source, given = task.place / "optimum", task.place / "optimum-source", folder_of(task.source)
    assert given is not None  # the models of a run are folders
    once(source, lambda place: for_older_transformers(given, place))

    def make(place: Path) -> None:
        library.ORTStableDiffusionPipeline.from_pretrained(str(source), export=True).save_pretrained(place)

    seconds = once(folder, make)
    pipeline = library.ORTStableDiffusionPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    size = sum(file.stat().st_size for file in (folder / UNET).iterdir())
    return Diffusers(task, pipeline, backend="onnxruntime fp32", bytes=size, params=None, seconds=seconds)


def for_older_transformers(source: Path, place: Path) -> None:
    """Copy a diffusers folder as transformers wrote it before version 5, which reads nothing else.

    It is silent about the names of weights: a text encoder with none that it knows is left at random.
    """
    shutil.copytree(source, place, dirs_exist_ok=True)
    tokenizer, text = place / "tokenizer", place / "text_encoder/model.safetensors"
    if not (tokenizer / "vocab.json").exists():
        found = json.loads((tokenizer / "tokenizer.json").read_text("utf-8"))
        special = {entry["content"]: entry["id"] for entry in found["added_tokens"]}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in found["model"]["merges"]]
        (tokenizer / "vocab.json").write_text(json.dumps(found["model"]["vocab"] | special), "utf-8")
        (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    weights = load_file(text)
    if not any(name.startswith("text_model.") for name in weights):
        save_file({f"text_model.{name}": value for name, value in weights.items()}, text, {"format": "pt"})
