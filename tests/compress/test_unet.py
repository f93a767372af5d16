"""The U-Net adapter, the temporal table and the cache against the stock forward pass."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffpress.calibration.model import load_pipeline
from diffpress.calibration.schedule import tabulate as tabulate_schedule
from diffpress.compress.cache.deepcache import CachePass, around
from diffpress.compress.cache.program import CACHED
from diffpress.compress.families import unet as family
from diffpress.compress.families.unet_graph import UNetGraph, up
from diffpress.compress.temporal.table import TemporalTablePass, install, tabulate
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, Variant


@pytest.fixture
def unet(tiny_pipeline: Path) -> Any:
    return load_pipeline(str(tiny_pipeline)).unet


@pytest.fixture
def work(tiny_pipeline: Path) -> Work:
    pipeline = load_pipeline(str(tiny_pipeline))
    sampling = tabulate_schedule(pipeline.scheduler, 7, 3.0, 32, 32)
    return Work(pipeline, sampling, 0, lambda _: pytest.fail("not recorded here"), lambda items, _: items, Path())


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    return sample, torch.tensor([500.0]), torch.randn(2, 5, 32, generator=generator)


def test_full_graph_equals_the_stock_forward(unet: Any) -> None:
    sample, timestep, text = inputs()
    with torch.no_grad():
        expected = unet(sample, timestep, text).sample
        (got,) = UNetGraph(unet)(sample, timestep, text)
    assert torch.allclose(got, expected, atol=1e-5)


def test_a_fresh_feature_of_any_branch_changes_nothing(unet: Any) -> None:
    sample, timestep, text = inputs()
    assert family.branches(unet) == 9
    with torch.no_grad():
        expected = unet(sample, timestep, text).sample
        for branch in range(family.branches(unet)):
            full, feature = UNetGraph(unet, writes=(up(branch),))(sample, timestep, text)
            (cached,) = UNetGraph(unet, (up(branch),))(sample, timestep, text, feature)
            assert torch.allclose(full, expected, atol=1e-5)
            assert torch.allclose(cached, expected, atol=1e-5), branch


def test_a_stale_feature_changes_the_output(unet: Any) -> None:
    sample, timestep, text = inputs()
    with torch.no_grad():
        full, feature = UNetGraph(unet, writes=("up_1",))(sample, timestep, text)
        (cached,) = UNetGraph(unet, ("up_1",))(sample, timestep, text, feature + 1)
    assert not torch.allclose(full, cached, atol=1e-3)


def test_temporal_table_equals_the_embedding_and_removes_it(unet: Any) -> None:
    sample, _, text = inputs()
    timesteps = (981.0, 500.5, 1.0)
    with torch.no_grad():
        expected = [unet(sample, torch.tensor([t]), text).sample for t in timesteps]
        install(unet, tabulate(unet, timesteps))
        for t, reference in zip(timesteps, expected, strict=True):
            assert torch.allclose(unet(sample, torch.tensor([t]), text).sample, reference, atol=1e-5)
            assert torch.allclose(UNetGraph(unet)(sample, torch.tensor([t]), text)[0], reference, atol=1e-5)
    assert not any("time_emb" in name for name, _ in unet.named_parameters())


def test_quantizable_layers_leave_out_ends_and_time(unet: Any) -> None:
    names = set(family.quantizable(unet))
    assert "down_blocks.0.resnets.0.conv1" in names
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.to_k" in names
    assert not any("time_emb" in name or name in ("conv_in", "conv_out") for name in names)


def test_cache_pass_plans_and_refuses(work: Work) -> None:
    with pytest.raises(DiffpressError, match="branches 0 to 8"):
        CachePass(branch=9).requires(work)
    CachePass(interval=2, branch=1).requires(work)
    CachePass(interval=2, branch=1).apply(work)
    assert work.program.steps == (FULL, CACHED) * 3 + (FULL,)
    assert work.program.variants == {FULL: Variant(writes=("up_1",)), CACHED: Variant(reads=("up_1",))}
    with pytest.raises(DiffpressError, match="keep one"):
        CachePass().requires(work)


def test_full_steps_stand_closer_around_a_center() -> None:
    assert around(10, 5, 0, 1.0) == (0, 2, 4, 6, 8)
    for steps, count, center, power in [(50, 10, 15, 1.4), (50, 25, 0, 2.0), (20, 7, 19, 1.2), (7, 7, 3, 3.0)]:
        found = around(steps, count, center, power)
        assert len(found) == count and found[0] == 0 and found[-1] < steps
    gaps = np.diff(around(50, 12, 20, 1.6))
    near = int(np.searchsorted(around(50, 12, 20, 1.6), 20))
    assert gaps[near] < gaps[0] and gaps[near] < gaps[-1]


def test_full_steps_may_be_listed(work: Work) -> None:
    CachePass(full=(0, 1, 4)).apply(work)
    assert work.program.marks() == "##--#--"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (CachePass(full=(1, 2)), "cache: step 0 reads feature 'up_0' before any step wrote it"),
        (CachePass(full=(0, 7)), "cache: full step 7 is not one of the schedule's, 0 to 6"),
        (CachePass(center=7), "cache: center 7 is not one of the schedule's steps, 0 to 6"),
    ],
)
def test_full_steps_that_are_not_there_are_refused(work: Work, step: CachePass, message: str) -> None:
    with pytest.raises(DiffpressError, match=message):
        step.requires(work)


def test_temporal_pass_records_the_schedule(work: Work) -> None:
    TemporalTablePass().requires(work)
    summary = TemporalTablePass().apply(work)
    assert work.temporal is not None
    assert work.temporal.timesteps == work.sampling.timesteps
    assert {table.shape[0] for table in work.temporal.tables.values()} == {7}
    assert "left the graph" in summary


def test_other_denoisers_are_refused(unet: Any) -> None:
    with pytest.raises(DiffpressError, match="not supported yet"):
        family.check(torch.nn.Linear(1, 1))
    unet.register_to_config(class_embed_type="timestep")
    with pytest.raises(DiffpressError, match="class_embed_type"):
        family.check(unet)


def test_work_starts_all_full(work: Work) -> None:
    assert work.plan().program.steps == (FULL,) * 7
    assert replace(work.plan()).temporal is None


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"in_channels": 9}, "takes 9 channels and answers with 4 .*'diffpress run --image --mask"),
        ({"time_cond_proj_dim": 16}, "time_cond_proj_dim.* fuse an LCM-LoRA .* solver lcm"),
    ],
)
def test_what_is_refused_says_what_to_take_instead(fields: dict[str, int], told: str, unet: Any) -> None:
    made = type(unet).from_config({**unet.config, **fields})
    with pytest.raises(DiffpressError, match=told) as caught:
        family.check(made)
    assert "\n" not in str(caught.value)
