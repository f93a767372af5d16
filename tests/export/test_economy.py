"""Guidance economy all the way: the shipped graphs draw what torch draws, with half of the rows at some steps."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from diffpress import api, bundle, inspection
from diffpress.benchmarks.candidates import Reference
from diffpress.bundle import Bundle
from diffpress.calibration.model import load_pipeline
from diffpress.calibration.tabulated import playing
from diffpress.compress.cache.execute import executed
from diffpress.export import buildable, engines, parity
from diffpress.plan import FULL, Plan, Sampling, StepProgram, Variant
from diffpress.runtime.pipeline import Pipeline

PROMPTS, SEEDS = ["a red ring", "a blue star"], [3, 4]
SCHEDULE = {"schedule": {"solver": "dpm++", "steps": 4, "spacing": "karras"}}
REUSED = {"guidance": {"every": 2}}
INTERVAL = {"guidance": {"mode": "interval", "budget": 0.5, "prompts": 1}}
CACHE = {"cache": {"interval": 2, "branch": 0}}
PASSES: dict[str, tuple[Any, ...]] = {
    "reuse": (SCHEDULE, REUSED, CACHE),
    "int8": (SCHEDULE, CACHE, INTERVAL, "quantize", "temporal-table"),
}
Make = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def checked() -> Iterator[dict[str, list[int]]]:
    """The batch sizes at which graphs were compared with torch."""
    seen: dict[str, list[int]] = {}
    real = parity.compare

    def compare(file: Path, wanted: parity.Expected) -> Any:
        if file.parent.parent.name.startswith((".reuse", "reuse")):
            seen.setdefault(f"{file.parent.name}/{file.name}", []).append(len(next(iter(wanted.inputs.values()))))
        return real(file, wanted)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parity, "compare", compare)
        yield seen


@pytest.fixture(scope="module")
def made(least_pipeline: Path, checked: dict[str, list[int]], tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = tmp_path_factory.mktemp("economy")

    @cache
    def make(name: str) -> Bundle:
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps({"calibration": {"prompts": 2, "steps": 4}, "passes": PASSES[name]}))
        return api.compress(str(least_pipeline), str(file), folder / name, quiet=True)

    return make


def latents(made: Bundle, backend: str, **options: Any) -> np.ndarray:
    drawn = Pipeline.load(made, backend, "fp32")(PROMPTS, SEEDS, keep_latents=True, **options)
    assert drawn.problem is None
    return drawn.latents[-1]


def test_a_bundle_draws_what_torch_draws_under_its_program(made: Make, least_pipeline: Path) -> None:
    shipped = made("reuse")
    program = StepProgram.from_json(shipped.manifest["program"])
    sampling = Sampling.from_json(shipped.manifest["sampling"])
    assert program.guidance and program == Plan.load(shipped.file("plan")).program
    pipeline = load_pipeline(str(least_pipeline))
    config = shipped.manifest["scheduler"]["config"]
    pipeline.scheduler = playing(DPMSolverMultistepScheduler.from_config(config), sampling)
    with executed(pipeline, program):
        wanted = pipeline(
            PROMPTS,
            num_inference_steps=4,
            guidance_scale=sampling.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            output_type="latent",
        ).images.numpy()
    plain = Reference(pipeline, sampling)(PROMPTS, SEEDS, keep_latents=True).latents[-1]
    assert np.linalg.norm(wanted - plain) > 1e-3 * np.linalg.norm(plain)  # the economy is seen
    for backend in ("onnxruntime", "openvino"):
        got = latents(shipped, backend)
        assert np.linalg.norm(got - wanted) < 1e-4 * np.linalg.norm(wanted), backend


def test_integers_run_with_both_batch_sizes(made: Make) -> None:
    shipped = made("int8")
    assert sorted(shipped.manifest["program"]["guidance"]) == ["conditional", "conditional", "full", "full"]
    first, second = latents(shipped, "onnxruntime"), latents(shipped, "openvino")
    assert np.linalg.norm(first - second) < 0.3 * np.linalg.norm(first)
    assert np.isfinite(latents(shipped, "onnxruntime", guidance_scale=1.0)).all()


def test_the_bundle_says_how_it_is_guided(made: Make) -> None:
    seen = inspection.inspect(made("reuse").path)
    assert seen["program"]["guidance"] == "#-#-" and seen["problems"] == []
    text = inspection.as_text(seen)
    assert re.search(r"^guidance +#-#-$", text, re.MULTILINE) and "75% of the work" in text
    plain = replace(made("reuse"), manifest=json.loads(json.dumps(plain_manifest(made("reuse")))))
    assert "guidance" not in inspection._program(plain)


def plain_manifest(shipped: Bundle) -> dict[str, Any]:
    program = {key: value for key, value in shipped.manifest["program"].items() if key != "guidance"}
    return {**shipped.manifest, "program": program}


def test_graphs_are_checked_at_every_batch_they_run_with(made: Make, checked: dict[str, list[int]]) -> None:
    assert made("reuse").manifest["graphs"].keys() == {"full", "cached"}
    assert checked["unet/model.onnx"] == [2] and sorted(checked["unet/cached.onnx"]) == [1, 2]


VARIANTS = {FULL: Variant(writes=("feature_0",)), "cached": Variant(reads=("feature_0",))}


@pytest.mark.parametrize(
    ("guidance", "full", "cached"),
    [
        ((), (1, 2, 2), (1, 2, 2)),
        (("full", "reuse", "reuse", "full", "full", "full"), (1, 2, 2), (1, 1, 2)),
        (("full", "reuse", "reuse", "full", "reuse", "reuse"), (1, 2, 2), (1, 1, 1)),
        (("full", "full", "conditional", "conditional", "conditional", "conditional"), (1, 2, 2), (1, 1, 2)),
    ],
)
def test_an_engine_takes_the_batches_that_its_variant_runs_with(
    handmade: Bundle, guidance: tuple[str, ...], full: tuple[int, int, int], cached: tuple[int, int, int]
) -> None:
    program = StepProgram((FULL, "cached", "cached") * 2, VARIANTS, guidance)
    bundle.write_manifest(handmade.path, {**handmade.manifest, "program": program.to_json()})
    found = {graph.name: graph.batches[0] for graph in buildable.graphs(bundle.load(handmade.path))}
    assert found == {"full": full, "cached": cached, "text_encoder": (1, 2, 2), "vae_decoder": (1, 1, 1)}


def test_such_an_engine_builds(handmade: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx")
    program = StepProgram((FULL, "cached", "cached") * 2, VARIANTS, ("full", "reuse", "reuse", "full", "full", "reuse"))
    bundle.write_manifest(handmade.path, {**handmade.manifest, "program": program.to_json()})
    built = engines.build(bundle.load(handmade.path), ["sm89"], progress=False)
    sidecar = json.loads(built.file("engines/sm89/cached.json").read_text())
    assert [sidecar["shapes"]["sample"][kind][0] for kind in ("min", "opt", "max")] == [1, 1, 2]
    assert [sidecar["shapes"]["feature_0"][kind][0] for kind in ("min", "opt", "max")] == [1, 1, 2]
