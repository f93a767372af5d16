"""The U-Net adapter, the temporal table and the cache against the stock forward pass."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffpress.calibration.model import load_pipeline
from diffpress.calibration.schedule import tabulate as tabulate_schedule
from diffpress.compress.cache.deepcache import CACHED, CachePass, interval_program
from diffpress.compress.families import unet as family
from diffpress.compress.temporal.table import TemporalTablePass, install, tabulate
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL


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
        (got,) = family.UNetGraph(unet)(sample, timestep, text)
    assert torch.allclose(got, expected, atol=1e-5)


def test_a_fresh_feature_of_any_branch_changes_nothing(unet: Any) -> None:
    sample, timestep, text = inputs()
    assert family.branches(unet) == 9
    with torch.no_grad():
        expected = unet(sample, timestep, text).sample
        for branch in range(family.branches(unet)):
            full, feature = family.UNetGraph(unet, writes=branch)(sample, timestep, text)
            (cached,) = family.UNetGraph(unet, reads=branch)(sample, timestep, text, feature)
            assert torch.allclose(full, expected, atol=1e-5)
            assert torch.allclose(cached, expected, atol=1e-5), branch
            assert family.feature_shape(unet, branch, 8, 8) == tuple(feature.shape[1:])


def test_a_stale_feature_changes_the_output(unet: Any) -> None:
    sample, timestep, text = inputs()
    with torch.no_grad():
        full, feature = family.UNetGraph(unet, writes=1)(sample, timestep, text)
        (cached,) = family.UNetGraph(unet, reads=1)(sample, timestep, text, feature + 1)
    assert not torch.allclose(full, cached, atol=1e-3)


def test_temporal_table_equals_the_embedding_and_removes_it(unet: Any) -> None:
    sample, _, text = inputs()
    timesteps = (981.0, 500.5, 1.0)
    with torch.no_grad():
        expected = [unet(sample, torch.tensor([t]), text).sample for t in timesteps]
        install(unet, tabulate(unet, timesteps))
        for t, reference in zip(timesteps, expected, strict=True):
            assert torch.allclose(unet(sample, torch.tensor([t]), text).sample, reference, atol=1e-5)
            assert torch.allclose(family.UNetGraph(unet)(sample, torch.tensor([t]), text)[0], reference, atol=1e-5)
    assert not any("time_emb" in name for name, _ in unet.named_parameters())


def test_quantizable_layers_leave_out_ends_and_time(unet: Any) -> None:
    names = set(family.quantizable(unet))
    assert "down_blocks.0.resnets.0.conv1" in names
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.to_k" in names
    assert not any("time_emb" in name or name in ("conv_in", "conv_out") for name in names)


@pytest.mark.parametrize(("steps", "interval"), [(50, 3), (7, 3), (5, 5), (4, 9), (1, 2)])
def test_interval_program_is_full_first_and_every_interval(steps: int, interval: int) -> None:
    program = interval_program(steps, interval, "f")
    assert len(program.steps) == steps
    assert [index for index, name in enumerate(program.steps) if name == FULL] == list(range(0, steps, interval))


def test_cache_pass_plans_and_refuses(work: Work) -> None:
    with pytest.raises(DiffpressError, match="branches 0 to 8"):
        CachePass(branch=9).requires(work)
    CachePass(interval=2, branch=1).requires(work)
    CachePass(interval=2, branch=1).apply(work)
    assert work.program.steps == (FULL, CACHED) * 3 + (FULL,)
    assert work.features == {"up_1": 1}
    with pytest.raises(DiffpressError, match="keep one"):
        CachePass().requires(work)


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
