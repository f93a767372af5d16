"""Engines of variants with several features, with earlier values, and with steps that run together."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from diffpress import bundle
from diffpress.bundle import Bundle
from diffpress.compress.families.unet_graph import encoder, modules
from diffpress.export import buildable, engines, graphs, store
from diffpress.export.ship import denoiser_specs, file_of
from diffpress.plan import EARLIER, FULL, REUSE, Correction, Corrections, Plan, Sampling, StepProgram, Variant

STEPS = (FULL, FULL, "modules", "decoder", "decoder", "decoder", FULL, "decoder")


@pytest.fixture(scope="module")
def cached(_handmade: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The handmade bundle with a small U-Net in three variants: whole, without two modules, and the decoder."""
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("cached") / "bundle"
    shutil.copytree(_handmade, folder)
    shutil.rmtree(folder / "unet")
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(16,),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    ).requires_grad_(False)
    kinds = modules(unet)
    resnet, attention = (next(path for path in kinds if kinds[path] == kind) for kind in ("resnet", "attn2"))
    manifest = json.loads((folder / bundle.MANIFEST).read_text())
    timesteps = tuple(float(1000 - 100 * index) for index in range(len(STEPS)))
    entry = Correction(np.ones((len(STEPS), 2, 1), np.float32), np.zeros((len(STEPS), 1), np.float32))
    variants = {
        FULL: Variant(writes=(*encoder(unet), resnet, attention)),
        "modules": Variant((resnet, attention, attention + EARLIER)),
        "decoder": Variant(encoder(unet), together=2),
    }
    sampling = Sampling.from_json({**manifest["sampling"], "timesteps": timesteps})
    plan = Plan(sampling, StepProgram(STEPS, variants), corrections=Corrections(timesteps, {attention: entry}))
    with graphs.plain_attention(unet):
        specs = denoiser_specs(unet, plan, (4, 8, 8), (8, 32))
        models = {file_of(name): graphs.to_onnx(spec) for name, spec in specs.items()}
    for model in models.values():
        graphs.finish(model)
    store.save(models, folder / "unet")
    del manifest["files"]
    listed = {name: f"unet/{file_of(name)}" for name in specs}
    bundle.write_manifest(folder, manifest | {"graphs": listed, "program": plan.program.to_json()})
    return bundle.load(folder)


def test_every_variant_builds_with_the_batches_it_runs_with(cached: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx")
    built = engines.build(cached, ["sm89"], progress=False)
    variants = StepProgram.from_json(built.manifest["program"]).variants
    entries = [entry for entry in built.manifest["engines"] if entry["component"] == "unet"]
    assert {entry["variant"] for entry in entries} == variants.keys()
    shapes = {}
    for entry in entries:
        assert built.file(entry["path"]).stat().st_size == entry["bytes"] > 1000
        shapes[entry["variant"]] = json.loads(built.file(entry["path"]).with_suffix(".json").read_text())["shapes"]
    for name, variant in variants.items():
        assert {*variant.reads} <= shapes[name].keys()
    assert shapes["modules"]["timestep"] == {"min": [1], "opt": [1], "max": [1]}
    assert shapes["decoder"]["timestep"] == {"min": [1], "opt": [2], "max": [4]}  # two calls of one step, one of two
    assert [shapes["decoder"]["skip_0"][kind][0] for kind in ("min", "opt", "max")] == [1, 2, 4]
    (earlier,) = (read for read in variants["modules"].reads if read.endswith(EARLIER))
    assert shapes["modules"][earlier] == shapes["modules"][earlier.removesuffix(EARLIER)]


@pytest.mark.parametrize(
    ("together", "guidance", "wanted"),
    [
        (1, (), (1, 2, 2)),
        (2, (), (1, 2, 4)),
        (3, (), (1, 6, 6)),
        (2, (FULL, *[REUSE] * 7), (1, 1, 2)),
        (3, (FULL, FULL, FULL, REUSE, REUSE, FULL, FULL, FULL), (1, 2, 2)),
    ],
)
def test_an_engine_takes_all_steps_that_run_together(
    together: int, guidance: tuple[str, ...], wanted: tuple[int, int, int]
) -> None:
    variants = {FULL: Variant(writes=("up_0",)), "decoder": Variant(("up_0",), together=together)}
    steps = [name if name in variants else FULL for name in STEPS]
    assert buildable.batch(StepProgram(tuple(steps), variants, guidance), "decoder") == wanted
