"""A bundle small enough to make by hand, and the same arithmetic in numpy."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffpress import bundle
from diffpress.benchmarks.shapes.models import make_tokenizer
from diffpress.errors import DiffpressError
from diffpress.plan import Plan, Sampling, StepProgram, Variant
from diffpress.runtime import cuda, tensor_rt

TOKENS, WIDTH, CHANNELS, SIZE = 24, 6, 5, 4  # SIZE: of a latent; a picture is twice as wide
FEATURE = "feature_0"
VARIANTS = {"full": Variant(writes=(FEATURE,)), "cached": Variant(reads=(FEATURE,))}
Make = Callable[..., Path]


def schedule(calls: int, guidance_scale: float = 3.0) -> Sampling:
    """A schedule that scales its input and looks one output back."""
    timesteps = tuple(float(1000 - 100 * index) for index in range(calls))
    later = (("sample", 0, 0.9), ("output", 0, -0.3), ("output", 1, 0.1))
    terms = ((("sample", 0, 0.9), ("output", 0, -0.2)), *(later for _ in range(calls - 1)))
    return Sampling("toy", calls, guidance_scale, 2 * SIZE, 2 * SIZE, timesteps, (0.5,) * calls, 1.5, terms)


@dataclass(frozen=True)
class Toy:
    """The arithmetic of the toy's graphs in numpy, from the same weights."""

    weights: Mapping[str, np.ndarray]

    def text(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self.weights["table"][ids])

    def feature(self, x: np.ndarray, timestep: float, hidden: np.ndarray) -> np.ndarray:
        words = hidden.mean(1) @ self.weights["project"]
        return np.asarray(
            np.tanh(conv(x, self.weights["enter"]) + words[:, :, None, None] + np.float32(timestep / 1e3))
        )

    def output(self, x: np.ndarray, feature: np.ndarray) -> np.ndarray:
        return conv(x, self.weights["skip"]) + conv(feature, self.weights["leave"])

    def decode(self, latents: np.ndarray) -> np.ndarray:
        wide = latents.repeat(2, axis=2).repeat(2, axis=3)
        return np.asarray(np.tanh(conv(wide, self.weights["paint"])))


def conv(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """A 1x1 convolution: [N, C, h, w] and [O, C, 1, 1] to [N, O, h, w]."""
    return np.einsum("nchw,oc->nohw", x, kernel[:, :, 0, 0])


@pytest.fixture(scope="session")
def toy() -> Toy:
    random = np.random.default_rng(0)
    shapes = {
        "table": (632, WIDTH),
        "project": (WIDTH, CHANNELS),
        "enter": (CHANNELS, 4, 1, 1),
        "skip": (4, 4, 1, 1),
        "leave": (4, CHANNELS, 1, 1),
        "paint": (3, 4, 1, 1),
    }
    return Toy({name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})


def save(
    file: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Mapping[str, Sequence[int | str]],
    constants: Mapping[str, np.ndarray],
) -> None:
    """Write a graph; its floats are float32 but for `input_ids`."""

    def info(name: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
        kind = TensorProto.INT64 if name == "input_ids" else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        nodes,
        "toy",
        [info(name, shape) for name, shape in inputs.items()],
        [info(name, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, file)


def write_graphs(folder: Path, toy: Toy, timestep_shape: Sequence[int | str]) -> None:
    """The four graphs of a bundle: text encoder, the denoiser twice, VAE decoder."""
    node, latent = helper.make_node, ["N", 4, SIZE, SIZE]
    weights = {name: toy.weights[name] for name in toy.weights}
    save(
        folder / "text_encoder/model.onnx",
        [node("Gather", ["table", "input_ids"], ["last_hidden_state"])],
        {"input_ids": ["N", TOKENS]},
        {"last_hidden_state": ["N", TOKENS, WIDTH]},
        {"table": weights["table"]},
    )
    leave = [
        node("Conv", ["sample", "skip"], ["skipped"]),
        node("Conv", [FEATURE, "leave"], ["left"]),
        node("Add", ["skipped", "left"], ["out_sample"]),
    ]
    enter = [
        node("ReduceMean", ["encoder_hidden_states", "one"], ["mean"], keepdims=0),
        node("MatMul", ["mean", "project"], ["words"]),
        node("Unsqueeze", ["words", "last"], ["spread"]),
        node("Conv", ["sample", "enter"], ["entered"]),
        node("Add", ["entered", "spread"], ["told"]),
        node("Mul", ["timestep", "milli"], ["time"]),
        node("Reshape", ["time", "column"], ["when"]),
        node("Add", ["told", "when"], ["timed"]),
        node("Tanh", ["timed"], [FEATURE]),
    ]
    constants = {
        "one": np.array([1], np.int64),
        "last": np.array([2, 3], np.int64),
        "column": np.array([-1, 1, 1, 1], np.int64),
        "milli": np.array(1e-3, np.float32),
    }
    output, feature = {"out_sample": latent}, {FEATURE: ["N", CHANNELS, SIZE, SIZE]}
    text = {"encoder_hidden_states": ["N", TOKENS, WIDTH]}
    save(
        folder / "unet/model.onnx",
        enter + leave,
        {"sample": latent, "timestep": timestep_shape, **text},
        output | feature,
        constants | {name: weights[name] for name in ("enter", "project", "skip", "leave")},
    )
    save(
        folder / "unet/cached.onnx",
        leave,
        {"sample": latent, **feature},
        output,
        {name: weights[name] for name in ("skip", "leave")},
    )
    save(
        folder / "vae_decoder/model.onnx",
        [
            node("Resize", ["latent_sample", "", "scales"], ["wide"], mode="nearest", nearest_mode="floor",
                 coordinate_transformation_mode="asymmetric"),
            node("Conv", ["wide", "paint"], ["painted"]),
            node("Tanh", ["painted"], ["sample"]),
        ],
        {"latent_sample": latent},
        {"sample": ["N", 3, 2 * SIZE, 2 * SIZE]},
        {"paint": weights["paint"], "scales": np.array([1, 1, 2, 2], np.float32)},
    )  # fmt: skip


@pytest.fixture
def make(tmp_path: Path, toy: Toy) -> Make:
    """Writes a bundle with these steps; `changes` go into the manifest."""

    def make(
        steps: Sequence[str] = ("full", "cached", "cached", "full", "cached"),
        timestep_shape: Sequence[int | str] = (1,),
        **changes: object,
    ) -> Path:
        path = tmp_path / "bundle"
        program, sampling = StepProgram(tuple(steps), VARIANTS), schedule(len(steps))
        with bundle.create(path) as folder:
            write_graphs(folder, toy, timestep_shape)
            make_tokenizer(folder / "tokenizer")
            Plan(sampling, program).save(folder / "plan")
            manifest = {
                "sampling": sampling.to_json(),
                "program": program.to_json(),
                "graphs": {"full": "unet/model.onnx", "cached": "unet/cached.onnx"},
                "features": {FEATURE: [CHANNELS, SIZE, SIZE]},
                "latent": {"channels": 4, "height": SIZE, "width": SIZE, "scaling_factor": 0.5, "shift_factor": 0.25},
                "text": {"hidden": WIDTH, "tokens": TOKENS},
            }
            bundle.write_manifest(folder, manifest | changes)
        return path

    return make


@pytest.fixture(scope="session")
def fakes() -> ModuleType:
    """`fakes.py` beside this file; tests are no package, so it is loaded by its path."""
    spec = importlib.util.spec_from_file_location("fakes", Path(__file__).with_name("fakes.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Gpu:
    """A GPU that is not there, and the libraries that are installed for it."""

    cuda: Any  # FakeCuda
    device: Any
    libraries: dict[str, Any]  # backend -> FakeTensorRt


@pytest.fixture
def plug_in(fakes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Gpu]:
    """Makes the runtime see a GPU of a compute capability, and TensorRT's libraries of these versions."""

    def plug_in(capability: tuple[int, int] = (8, 9), capacity: int = 1 << 30, **versions: str) -> Gpu:
        library = fakes.FakeCuda(capability, capacity)
        driver = cuda.Driver(library)
        device = cuda.Device(driver)
        names = {name.replace("_", "-"): version for name, version in (versions or {"tensorrt": "10.9.0.34"}).items()}
        found = {name: fakes.FakeTensorRt(library, name, version) for name, version in names.items()}

        def module(backend: str) -> Any:
            if backend not in found:
                raise DiffpressError(f"'{backend}' is not installed")
            return found[backend]

        monkeypatch.setattr(cuda, "gpu", driver.gpu)
        monkeypatch.setattr(cuda, "device", lambda: device)
        monkeypatch.setattr(tensor_rt, "library", module)
        return Gpu(library, device, found)

    return plug_in


@pytest.fixture
def add_engines(fakes: ModuleType) -> Callable[..., bundle.Bundle]:
    """Adds engines for `target` to a bundle, as `export` lists them; the fake libraries run them."""

    def add_engines(
        opened: bundle.Bundle,
        target: str = "sm89",
        library: str = "tensorrt",
        version: str = "10.9.0.34",
        most: int = 2,
        components: Sequence[str] = ("text_encoder", "vae_decoder"),
    ) -> bundle.Bundle:
        graphs = {
            **opened.manifest["graphs"],
            **{name: f"{name}/model.onnx" for name in components},
        }
        entries = [entry for entry in opened.manifest.get("engines", []) if entry["target"] != target]
        for name, file in graphs.items():
            model = onnx.load(opened.file(file))  # with its external data
            rows = 1 if file not in opened.manifest["graphs"].values() else most
            shapes = {
                port.name: [
                    [size.dim_value or rows_ for size in port.type.tensor_type.shape.dim] for rows_ in (1, rows, rows)
                ]
                for port in model.graph.input
            }
            variant = name if name in opened.manifest["graphs"] else None
            path = opened.path / f"engines/{target}/{name}.engine"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(fakes.engine_bytes(model.SerializeToString(), [shapes]))
            sidecar = {
                "target": target,
                "component": "unet" if variant else name,
                "variant": variant,
                "precision": "fp32",
                "shapes": {key: dict(zip(("min", "opt", "max"), value, strict=True)) for key, value in shapes.items()},
                "graph": file,
                "sha256": {file: opened.manifest["files"][file]},
                "bytes": path.stat().st_size,
                "seconds": 1.0,
                "versions": {library: version, "diffpress": "0.1.0"},
            }
            path.with_suffix(".json").write_text(json.dumps(sidecar))
            keys = ("target", "component", "variant", "precision", "bytes", "seconds")
            listed = {key: sidecar[key] for key in keys}
            entries.append({**listed, "path": f"engines/{target}/{name}.engine"})
        return bundle.update(opened, engines=entries)

    return add_engines
