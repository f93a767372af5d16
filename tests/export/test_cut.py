"""A U-Net with parts cut out ships as any other: graphs, quantization and a cache, the runtime and the drop-in."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import diffpress
from diffpress import api
from diffpress.bundle import Bundle
from diffpress.calibration.model import load_pipeline
from diffpress.calibration.structure import save
from diffpress.compress.numerics.saliency import plain_nm
from diffpress.compress.prune.structure import CHANNELS, cut, structures
from diffpress.export import flops
from diffpress.export.sparsity import sparse_layers
from diffpress.runtime.pipeline import Pipeline

STEPS = 6
PROMPTS, SEEDS = ["a red ring", "a blue star"], (1, 2)
BOTH = """
calibration: {prompts: 2, steps: 3}
passes:
  - quantize: {format: int8, range: max}
  - temporal-table
  - cache: {interval: 2, branch: 1}
"""


def zeroed(unet: Any) -> list[Any]:
    """Layers that are 2:4: those of the middle whose input channels come in fours, without tables in their place."""
    layers = [
        layer
        for name, layer in unet.mid_block.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and "time_emb" not in name
    ]
    return [layer for layer in layers if layer.weight.shape[1] % 4 == 0]


@pytest.fixture(scope="module")
def model(least_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = load_pipeline(str(least_pipeline))
    # Every second structure, so that layers of one kind have several widths.
    chosen = list(structures(pipeline.unet).values())[::2]
    cut(pipeline.unet, {found.path: range(found.count // 4, found.count) for found in chosen})
    cut(pipeline.unet, {found.path: [0] for found in chosen if found.count == 2})
    others = list(structures(pipeline.unet, norm_groups="even").values())[1::2]
    even = {found.path: range(0, found.count, 2) for found in others if found.kind == CHANNELS}
    assert even
    cut(pipeline.unet, even, "even")
    for layer in zeroed(pipeline.unet):
        weight = layer.weight.data.flatten(1)
        kernel = weight.shape[1] // layer.weight.shape[1]
        layer.weight.data = plain_nm(weight, None, 2, 4, "magnitude", kernel).reshape(layer.weight.shape)
    return save(pipeline, tmp_path_factory.mktemp("cut") / "narrow")


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return api.compress(str(model), "fp32", tmp_path_factory.mktemp("plain") / "bundle", steps=STEPS, quiet=True)


def drawn(pipeline: Any) -> np.ndarray:
    found: np.ndarray = pipeline(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
    ).images.numpy()
    return found


@pytest.fixture(scope="module")
def wanted(model: Path) -> np.ndarray:
    return drawn(load_pipeline(str(model)))


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def test_a_narrow_model_draws_as_in_diffusers(plain: Bundle, wanted: np.ndarray) -> None:
    for backend in ("onnxruntime", "openvino"):
        got = Pipeline.load(plain, backend, "fp32")(PROMPTS, SEEDS, guidance_scale=7.5, keep_latents=True)
        assert error(got.latents[-1], wanted) < 1e-4
    assert error(drawn(diffpress.load_pipeline(plain.path, "onnxruntime", "fp32")), wanted) < 1e-4


def test_the_bundle_says_what_was_cut_and_is_as_small(plain: Bundle, model: Path, least_pipeline: Path) -> None:
    record = json.loads((model / "unet" / "diffpress_structure.json").read_text())["parts"]
    assert plain.manifest["structure"] == record
    before = sum(parameter.numel() for parameter in load_pipeline(str(least_pipeline)).unet.parameters())
    unet = load_pipeline(str(model)).unet
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    assert plain.manifest["model"]["parameters"] == parameters
    assert parameters < 0.9 * before
    assert plain.manifest["sizes"]["denoiser_compressed"] < 4.3 * parameters  # with the graph itself
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())
        unet(torch.zeros(1, 4, 8, 8), torch.tensor([1.0]), torch.zeros(1, plain.manifest["text"]["tokens"], 32))
    assert flops.count(plain.graph(), batch=1).operations == counter.get_total_flops()


def test_int8_table_and_cache_work_on_what_is_left(
    model: Path, plain: Bundle, tmp_path: Path, wanted: np.ndarray
) -> None:
    (tmp_path / "recipe.yaml").write_text(BOTH)
    made = api.compress(str(model), str(tmp_path / "recipe.yaml"), tmp_path / "bundle", steps=STEPS, quiet=True)
    assert set(made.manifest["program"]["steps"]) == {"full", "cached"}
    for entry in made.manifest["parity"].values():
        assert entry["max_rel_l2"] <= entry["tolerance"]
    first, second = (
        Pipeline.load(made, backend, "fp32")(PROMPTS, SEEDS, guidance_scale=7.5, keep_latents=True)
        for backend in ("onnxruntime", "openvino")
    )
    assert first.problem is None
    expected = len(zeroed(load_pipeline(str(model)).unet))
    assert expected > 5
    for bundle in (plain, made):  # zeros stay in 8 bits
        assert len(sparse_layers(ir.load(bundle.file("unet/model.onnx")))) == expected
    assert error(first.latents[-1], second.latents[-1]) < 0.3  # random weights amplify integers' rounding
    assert error(first.latents[-1], wanted) < 0.5
