"""What several tests need: a tiny random pipeline, and a tiny bundle made by hand, both small enough to copy."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper

from diffpress import bundle
from diffpress.bundle import Bundle
from diffpress.export import store
from diffpress.plan import FULL, LayerQuant, Plan, Sampling, StepProgram, Variant

CHANNELS, SIDE, TOKENS, HIDDEN = 32, 8, 8, 32


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Recordings of tests do not land in the user's cache, nor come from it: all processes share one of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFPRESS_CACHE", str(_shared(tmp_path_factory) / "cache"))
        yield


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run alone, the same in every process of it."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(autouse=True)
def _the_same_numbers_every_time() -> None:
    """A test that draws its inputs without a seed of its own fails always or never."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _networks_are_exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The few pipelines here are in dozens of bundles, and each export takes seconds: all processes share a folder.

    The first export of each network is real; others with the same structure, weights, inputs and outputs get its graph.
    """
    from diffpress.export import graphs, kept

    folder = _shared(tmp_path_factory) / "exported"
    export = graphs.to_onnx
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "to_onnx", lambda spec: kept.once(spec, folder, export, largest=8e6))
        yield


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock StableDiffusionPipeline of random weights: 32x32 pixels, latents of 8x8. Copy it before a change."""
    return _pipeline(tmp_path_factory.mktemp("tiny"), levels=3, layers=2)


@pytest.fixture(scope="session")
def pndm_pipeline(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny one with PNDM, Stable Diffusion 1.5's own scheduler, which visits a timestep twice."""
    from diffusers import PNDMScheduler

    folder = tmp_path_factory.mktemp("pndm") / "pipeline"
    shutil.copytree(tiny_pipeline, folder)
    PNDMScheduler(skip_prk_steps=True, steps_offset=1).save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "PNDMScheduler"))
    return folder


@pytest.fixture(scope="session")
def least_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of 16x16 pixels that has a layer of each kind, for tests in which processes of their own export it."""
    return _pipeline(tmp_path_factory.mktemp("least"), levels=2, layers=1)


def _pipeline(folder: Path, levels: int, layers: int) -> Path:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from diffpress.benchmarks.shapes import models

    (folder / "tokenizer").mkdir()
    tokenizer = models.make_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=models.TOKENS,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            down_block_types=(*["CrossAttnDownBlock2D"] * (levels - 1), "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * (levels - 1)),
            block_out_channels=(*[32] * (levels - 1), 64),
            layers_per_block=layers,
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=(*[16] * (levels - 1), 32),
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=8 * 2 ** (levels - 1),
        )
        text_encoder = CLIPTextModel(text)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**models.SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock StableDiffusionXLPipeline of random weights: two text encoders, 32x32 pixels. Copy it before a change."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from diffpress.benchmarks.shapes import models

    folder = tmp_path_factory.mktemp("tiny-xl") / "pipeline"
    words = tmp_path_factory.mktemp("tokenizer")
    tokenizer = models.make_tokenizer(words)
    # As in SDXL, the second one pads with another token than it ends with.
    second = CLIPTokenizer.from_pretrained(words, pad_token="!")
    texts = {
        name: CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=models.TOKENS,
            projection_dim=24,
            hidden_act=act,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for name, width, layers, act in (("first", 16, 2, "quick_gelu"), ("second", 16, 3, "gelu"))
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = UNet2DConditionModel(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 32, 64),
            transformer_layers_per_block=(1, 1, 2),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=(1, 2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=32,
            scaling_factor=0.13025,
        )
        text_encoder = CLIPTextModel(texts["first"])
        text_encoder_2 = CLIPTextModelWithProjection(texts["second"])
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Gives the file of a recipe as it is shipped, but for how long it learns and from how much."""
    from diffpress.compress.recipe import presets

    folder = tmp_path_factory.mktemp("brief")

    def write(recipe: str) -> str:
        file, shipped = folder / f"{recipe}.yaml", presets()[recipe].read_text("utf-8")
        document = yaml.safe_load(re.sub("iterations: [0-9]+", "iterations: 4", shipped))
        file.write_text(json.dumps({**document, "calibration": {"prompts": 2, "steps": 4}}))
        return str(file)

    return write


@pytest.fixture(scope="session")
def tiny_balanced(tiny_pipeline: Path, brief: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny pipeline, compressed with `balanced` for six steps. Copy it before a change."""
    from diffpress import api

    folder = tmp_path_factory.mktemp("balanced") / "bundle"
    return api.compress(str(tiny_pipeline), brief("balanced"), folder, steps=6, quiet=True)


@pytest.fixture(scope="session")
def _handmade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("handmade") / "bundle"
    with bundle.create(folder) as partial:
        _write(partial)
    return folder


@pytest.fixture
def handmade(_handmade: Path, tmp_path: Path) -> Bundle:
    """A bundle that runs and builds, of a few kilobytes: INT8 graphs, two variants, one external-data file each."""
    shutil.copytree(_handmade, tmp_path / "bundle")
    return bundle.load(tmp_path / "bundle")


def _write(folder: Path) -> None:
    store.save({"model.onnx": _denoiser(cached=False), "cached.onnx": _denoiser(cached=True)}, folder / "unet")
    store.save({"model.onnx": _text_encoder()}, folder / "text_encoder")
    store.save({"model.onnx": _vae_decoder()}, folder / "vae_decoder")
    _write_tokenizer(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    steps = 6
    sampling = Sampling(
        scheduler="DDIMScheduler",
        steps=steps,
        guidance_scale=3.0,
        height=SIDE * 4,
        width=SIDE * 4,
        timesteps=tuple(float(t) for t in range(951, 0, -160)),
        input_scale=(1.0,) * steps,
        init_noise_sigma=1.0,
        terms=((("sample", 0, 0.9), ("output", 0, -0.1)),) * steps,
    )
    variants = {FULL: Variant(writes=("feature_0",)), "cached": Variant(reads=("feature_0",))}
    program = StepProgram((FULL, "cached", "cached") * 2, variants)

    def layer() -> LayerQuant:
        return LayerQuant(np.full(CHANNELS, 0.01, np.float32), np.array([0.02], np.float32))

    layers = {"conv_in": layer(), "to_q": layer()}
    Plan(sampling, program, layers).save(folder / "plan")
    bundle.write_manifest(
        folder,
        {
            "diffpress": "0.1.0",
            "created": "2026-01-01T00:00:00+00:00",
            "versions": {"onnx": onnx.__version__},
            "model": {"source": "by hand", "class": "StableDiffusionPipeline", "digest": "0", "parameters": 12345},
            "recipe": {"name": "balanced", "passes": []},
            "seed": 0,
            "passes": [
                {"name": "quantize", "summary": "2 layers to int8", "seconds": 1.25},
                {"name": "cache", "summary": "4 of 6 steps reuse features", "seconds": 0.5},
            ],
            "sampling": sampling.to_json(),
            "scheduler": {"class": "DDIMScheduler", "config": {}},
            "program": program.to_json(),
            "graphs": {FULL: "unet/model.onnx", "cached": "unet/cached.onnx"},
            "features": {"feature_0": [CHANNELS, SIDE, SIDE]},
            "latent": {"channels": 4, "height": SIDE, "width": SIDE, "scaling_factor": 0.18215, "shift_factor": 0.0},
            "text": {"hidden": HIDDEN, "tokens": TOKENS},
            "parity": {"unet/model.onnx": {"max_rel_l2": 1e-6, "tolerance": 1e-3}},
            "sizes": {"denoiser_reference": 40000, "denoiser_compressed": 11000},
        },
    )


def _write_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer over single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS}
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **marks, "unk_token": "<|endoftext|>"}))


def _denoiser(cached: bool) -> ir.Model:
    """A convolution and a matrix product with int8 weights per output channel; the cached variant skips the first."""
    feature = ("feature_0", ["batch", CHANNELS, SIDE, SIDE])
    inputs = [("sample", ["batch", 4, SIDE, SIDE]), ("timestep", [1]), ("encoder_hidden_states", _text_shape())]
    outputs = [("out_sample", ["batch", 4, SIDE, SIDE])]
    quantize, dequantize = ("QuantizeLinear", {}), ("DequantizeLinear", {})
    first = [
        (*quantize, ["sample", "sample_scale", "zero"], "sample_q"),
        (*dequantize, ["sample_q", "sample_scale", "zero"], "sample_dq"),
        ("DequantizeLinear", {"axis": 0}, ["conv_in.weight", "conv_in.scale"], "conv_in_dq"),
        ("Conv", {"pads": [1] * 4}, ["sample_dq", "conv_in_dq", "bias"], "conv_in"),
        ("Mul", {}, ["timestep", "thousandth"], "time"),
        ("Add", {}, ["conv_in", "time"], "feature_0"),
    ]
    second = [
        ("ReduceMean", {"keepdims": 0}, ["encoder_hidden_states", "one"], "context"),
        ("Reshape", {}, ["context", "as_channels"], "context_map"),
        ("Add", {}, ["feature_0", "context_map"], "mixed"),
        ("Reshape", {}, ["mixed", "as_rows"], "rows"),
        ("Transpose", {"perm": [0, 2, 1]}, ["rows"], "columns"),
        (*quantize, ["columns", "columns_scale", "zero"], "columns_q"),
        (*dequantize, ["columns_q", "columns_scale", "zero"], "columns_dq"),
        ("DequantizeLinear", {"axis": 1}, ["to_q.weight", "to_q.scale"], "to_q_dq"),
        ("MatMul", {}, ["columns_dq", "to_q_dq"], "to_q"),
        ("Transpose", {"perm": [0, 2, 1]}, ["to_q"], "rows_out"),
        ("Reshape", {}, ["rows_out", "as_map"], "map"),
        ("Conv", {}, ["map", "conv_out.weight"], "out_sample"),
    ]
    random = np.random.default_rng(0)
    constants = {
        "conv_in.weight": random.integers(-127, 128, (CHANNELS, 4, 3, 3)).astype(np.int8),
        "conv_in.scale": random.uniform(0.001, 0.002, CHANNELS).astype(np.float32),
        "to_q.weight": random.integers(-127, 128, (CHANNELS, CHANNELS)).astype(np.int8),
        "to_q.scale": random.uniform(0.001, 0.002, CHANNELS).astype(np.float32),
        "conv_out.weight": random.normal(0, 0.1, (4, CHANNELS, 1, 1)).astype(np.float32),
        "bias": np.zeros(CHANNELS, np.float32),
        "sample_scale": np.float32(0.03),
        "columns_scale": np.float32(0.05),
        "zero": np.int8(0),
        "thousandth": np.float32(0.001),
        "one": np.array([1], np.int64),
        "as_channels": np.array([-1, CHANNELS, 1, 1], np.int64),
        "as_rows": np.array([0, CHANNELS, SIDE * SIDE], np.int64),
        "as_map": np.array([0, CHANNELS, SIDE, SIDE], np.int64),
    }
    if cached:
        # A graph takes `sample` and `timestep` even where it needs neither, as exported ones do.
        touch = [("Mul", {}, ["sample", "timestep"], "touched"), ("Mul", {}, ["touched", "nothing"], "untouched")]
        second[-1] = ("Conv", {}, ["map", "conv_out.weight"], "drawn")
        nodes = [*second, *touch, ("Add", {}, ["drawn", "untouched"], "out_sample")]
        return _model(nodes, [*inputs, feature], outputs, {**constants, "nothing": np.float32(0)})
    return _model([*first, *second], inputs, [*outputs, feature], constants)


def _text_encoder() -> ir.Model:
    table = np.random.default_rng(1).normal(size=(54, HIDDEN)).astype(np.float32)
    nodes = [("Gather", {"axis": 0}, ["table", "input_ids"], "last_hidden_state")]
    ids = [("input_ids", ["batch", TOKENS])]
    return _model(nodes, ids, [("last_hidden_state", _text_shape())], {"table": table}, TensorProto.INT64)


def _vae_decoder() -> ir.Model:
    kernel = np.random.default_rng(2).normal(0, 0.3, (4, 3, 4, 4)).astype(np.float32)
    nodes = [
        ("ConvTranspose", {"strides": [4, 4]}, ["latent_sample", "kernel"], "raw"),
        ("Tanh", {}, ["raw"], "sample"),
    ]
    latent = [("latent_sample", ["batch", 4, SIDE, SIDE])]
    return _model(nodes, latent, [("sample", ["batch", 3, SIDE * 4, SIDE * 4])], {"kernel": kernel})


def _text_shape() -> list[str | int]:
    return ["batch", TOKENS, HIDDEN]


def _model(
    nodes: Sequence[tuple[str, dict, list[str], str]],
    inputs: Sequence[tuple[str, list]],
    outputs: Sequence[tuple[str, list]],
    constants: dict[str, np.ndarray | np.generic],
    kind: int = TensorProto.FLOAT,
) -> ir.Model:
    used = {name for _, _, names, _ in nodes for name in names}
    graph = helper.make_graph(
        [helper.make_node(op, names, [out], name=f"{out}_node", **fields) for op, fields, names, out in nodes],
        "handmade",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)
