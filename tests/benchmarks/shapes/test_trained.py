"""The committed weights: small, safe, loadable by stock classes, and able to draw what they are asked for."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffpress import bundle as bundles
from diffpress.api import SHAPES_GUIDANCE, compress
from diffpress.benchmarks import quality
from diffpress.benchmarks.shapes import PIPELINE, scenes
from diffpress.benchmarks.shapes.evaluate import generate
from diffpress.benchmarks.shapes.judge import Judge, confirmed, shares
from diffpress.benchmarks.shapes.networks import open_networks
from diffpress.bundle import Bundle
from diffpress.runtime.pipeline import Pipeline

WEIGHTS = PIPELINE.parent
Pairs = list[tuple[scenes.Scene, str]]


def test_weights_are_small_and_safe() -> None:
    files = [file for file in WEIGHTS.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt", ".md"}
    assert max(file.stat().st_size for file in files) <= 20e6
    assert sum(file.stat().st_size for file in files) <= 30e6


def one_object(count: int) -> Pairs:
    return [pair for pair in scenes.held_out_captions(3 * count) if len(pair[0].things) == 1][:count]


def assert_drawn(judge: Judge, images: np.ndarray, pairs: Pairs) -> None:
    """Far above chance (a fifth or less); how far exactly, benchmarks/shapes/README.md counts on hundreds of images."""
    right = shares(confirmed(judge.read(images), [scene for scene, _ in pairs]))
    assert right["colour"] is not None
    assert right["shape"] is not None
    assert right["colour"] >= 0.9
    assert right["shape"] >= 0.8


@pytest.fixture(scope="module")
def judge() -> Judge:
    networks = open_networks(WEIGHTS)
    return Judge(networks.reader, networks.clip, networks.tokenizer)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compress("shapes", "balanced", tmp_path_factory.mktemp("shapes") / "balanced", quiet=True)


def test_stock_classes_load_it_and_draw_held_out_captions(judge: Judge) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE, safety_checker=None)
    assert pipeline.unet.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float32
    pipeline.set_progress_bar_config(disable=True)
    pairs = one_object(24)
    images = generate(pipeline, [words for _, words in pairs], steps=20, guidance=SHAPES_GUIDANCE, batch=24, seed=0)
    assert_drawn(judge, images, pairs)


def test_balanced_is_small_and_draws_what_it_is_asked_for(bundle: Bundle, judge: Judge) -> None:
    sizes = bundle.manifest["sizes"]
    assert sizes["denoiser_compressed"] <= 0.30 * sizes["denoiser_reference"]
    pairs = one_object(24)
    images = Pipeline.load(bundle)([words for _, words in pairs], list(range(24)))
    assert images.problem is None
    assert_drawn(judge, images.pixels, pairs)


def test_both_runtimes_draw_the_same_pictures(bundle: Bundle) -> None:
    words = [caption for _, caption in scenes.held_out_captions(4)]
    first, second = (
        Pipeline.load(bundle, backend=name, precision="fp32")(words, [0, 1, 2, 3]).pixels
        for name in ("onnxruntime", "openvino")
    )
    assert quality.psnr(first, second).mean() > 30


def test_engines_of_balanced_build_for_three_generations(bundle: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed here")
    from diffpress.export import engines

    built = engines.build(bundle, ["sm86", "sm89", "sm120"], progress=False)
    found = {(entry["target"], Path(entry["path"]).stem) for entry in built.manifest["engines"]}
    graphs = ("full", "cached", "text_encoder", "vae_decoder", "vae_encoder")
    assert found == {(target, graph) for target in ("sm86", "sm89", "sm120") for graph in graphs}
    assert bundles.problems(built) == []
