"""Cutting a U-Net: what is zero leaves without a trace, and as many parameters and operations go as were counted."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffpress.benchmarks.shapes import models
from diffpress.calibration.model import load_pipeline
from diffpress.calibration.schedule import tabulate as tabulate_schedule
from diffpress.compress.families import unet as family
from diffpress.compress.families.unet_graph import feature_shapes, modules
from diffpress.compress.prune.structure import (
    CHANNELS,
    HEADS,
    NEURONS,
    Structure,
    check_order,
    cut,
    flops,
    structures,
    unsupported,
    widths,
)
from diffpress.compress.temporal.table import install, tabulate
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import LayerQuant, TemporalTable

RESNET = "down_blocks.0.resnets.0"
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
SELF, CROSS, FF = f"{BLOCK}.attn1", f"{BLOCK}.attn2", f"{BLOCK}.ff"


@pytest.fixture(scope="module")
def networks(tiny_pipeline: Path, tiny_xl: Path) -> dict[str, Any]:
    """U-Nets of random weights by what is special about them."""
    from diffusers import UNet2DConditionModel

    tiny = load_pipeline(str(tiny_pipeline)).unet
    variants: dict[str, dict[str, Any]] = {
        "sd21": {"use_linear_projection": True, "attention_head_dim": [2, 4, 8], "upcast_attention": True},
        "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
        "only-cross": {"only_cross_attention": True},
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {
            name: UNet2DConditionModel.from_config(dict(tiny.config), **changes).eval().requires_grad_(False)
            for name, changes in variants.items()
        }
    return {"sd15": tiny, "sdxl": load_pipeline(str(tiny_xl)).unet, **made}


@pytest.fixture
def unet(networks: Mapping[str, Any]) -> Any:
    return copy.deepcopy(networks["sd15"])


@torch.no_grad()
def output(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    told = {name: torch.randn(2, *shape, generator=generator) for name, shape in family.conditions(unet, 5).items()}
    text = told.pop("encoder_hidden_states")
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    found: torch.Tensor = unet(sample, torch.tensor([500.0]), text, added_cond_kwargs=told).sample
    return found


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def some(structure: Structure, seed: int = 0) -> list[int]:
    """Half of the parts, here and there."""
    order = torch.randperm(structure.count, generator=torch.Generator().manual_seed(seed))
    return order[: structure.count - structure.count // 2].tolist()


@torch.no_grad()
def silence(unet: Any, structure: Structure, kept: list[int]) -> None:
    """Zero in the reader what the parts that go are multiplied with."""
    gone = [part for part in range(structure.count) if part not in kept]
    flat = unet.get_submodule(structure.reader).weight.view(-1, structure.columns.numel())
    flat[:, structure.columns[gone].flatten()] = 0


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd21", "scale-shift", "only-cross"])
@pytest.mark.parametrize("kind", [HEADS, NEURONS, CHANNELS])
def test_parts_that_nothing_reads_leave_without_a_trace(networks: Mapping[str, Any], name: str, kind: str) -> None:
    whole, narrow = networks[name], copy.deepcopy(networks[name])
    chosen = {path: found for path, found in structures(narrow).items() if found.kind == kind}
    assert chosen
    kept = {path: some(found, index) for index, (path, found) in enumerate(chosen.items())}
    before = sum(parameter.numel() for parameter in narrow.parameters())
    for path, found in chosen.items():
        silence(narrow, found, kept[path])
    wanted = output(narrow)
    assert error(wanted, output(whole)) > 1e-3
    cut(narrow, kept)
    assert error(output(narrow), wanted) < 1e-5
    gone = sum(found.parameters * (found.count - len(kept[path])) for path, found in chosen.items())
    assert sum(parameter.numel() for parameter in narrow.parameters()) == before - gone > 0
    assert widths(narrow) == {path: [len(numbers), chosen[path].size] for path, numbers in kept.items()}


def test_as_many_parameters_leave_as_a_hand_counts(unet: Any) -> None:
    found = structures(unet)
    # 32 channels wide everywhere, 128 of time, 2 heads of 16, 8 norm groups of 4, kernels of 9.
    assert found[SELF].parameters == found[CROSS].parameters == 16 * (3 * 32 + 32)
    assert found[FF].parameters == 2 * (32 + 1) + 32
    assert found[RESNET].parameters == 4 * ((9 * 32 + 1) + (128 + 1) + 2 + 9 * 32)
    before = sum(parameter.numel() for parameter in unet.parameters())
    cut(unet, {SELF: [1], FF: range(100), RESNET: [0, 5, 7]})
    gone = 16 * 128 + 28 * 98 + 5 * 4 * (289 + 129 + 2 + 288)
    assert sum(parameter.numel() for parameter in unet.parameters()) == before - gone
    assert unet.get_submodule(SELF).heads == 1 and unet.get_submodule(CROSS).heads == 2
    resnet = unet.get_submodule(RESNET)
    assert (resnet.norm2.num_groups, resnet.norm2.num_channels, resnet.conv1.out_channels) == (3, 12, 12)
    assert (resnet.conv2.in_channels, resnet.conv2.out_channels, resnet.out_channels) == (12, 32, 32)


def test_every_part_has_its_own_columns_and_all_have_all(networks: Mapping[str, Any]) -> None:
    for unet in networks.values():
        for found in structures(unet).values():
            assert found.columns.shape == (found.count, found.columns.numel() // found.count)
            width = unet.get_submodule(found.reader).weight.flatten(1).shape[1]
            assert found.columns.flatten().sort().values.equal(torch.arange(width))
    resnet = structures(networks["sd15"])[RESNET]
    weight = networks["sd15"].get_submodule(resnet.reader).weight
    assert torch.equal(weight.flatten(1)[:, resnet.columns[3]], weight[:, 12:16].flatten(1))


def test_structures_stand_in_forward_order(networks: Mapping[str, Any]) -> None:
    unet, seen = networks["sd15"], []
    found = structures(unet)
    for path in found:
        reader = unet.get_submodule(found[path].reader)
        reader.register_forward_hook(lambda _, __, ___, path=path: seen.append(path))
    output(unet)
    for path in found:
        unet.get_submodule(found[path].reader)._forward_hooks.clear()
    assert seen == list(found)
    assert {found[path].kind for path in found} == {HEADS, NEURONS, CHANNELS}


def test_widths_are_multiples_where_there_is_room() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        large = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)  # Stable Diffusion 1.5
        small = models.make_unet()
    found, head = structures(large), "down_blocks.{}.attentions.0.transformer_blocks.0.attn1"
    assert found[RESNET].counts == (8, 16, 24, 32) and found[RESNET].size == 10  # 80, 160, 240, 320 channels
    assert found[head.format(0)].counts == (2, 4, 6, 8) and found[head.format(0)].size == 40
    assert found[head.format(2)].counts == tuple(range(1, 9)) and found[head.format(2)].size == 160
    assert found[FF].counts == tuple(range(16, 1281, 16))
    assert structures(large, multiple=64)[FF].counts == tuple(range(64, 1281, 64))
    assert structures(large, multiple=1)[RESNET].counts == tuple(range(1, 33))
    found = structures(small)
    assert [size * 3 for size in found[RESNET].counts] == [12, 24, 36, 48]
    assert [size * 8 for size in found["mid_block.resnets.0"].counts] == list(range(16, 129, 16))
    assert SELF not in found  # one head
    assert found[head.format(1)].counts == (1, 2)
    even = structures(large, norm_groups="even"), structures(small, norm_groups="even")
    assert even[0][RESNET].counts == tuple(range(32, 321, 32)) and even[1][RESNET].counts == (16, 32, 48)
    assert structures(large, 64, "even")[RESNET].counts == (64, 128, 192, 256, 320)
    with pytest.raises(DiffpressError, match="multiples of 0"):
        structures(small, multiple=0)


@pytest.mark.parametrize("name", ["sd15", "scale-shift"])
def test_channels_leave_evenly_out_of_every_norm_group(networks: Mapping[str, Any], name: str) -> None:
    whole, narrow = networks[name], copy.deepcopy(networks[name])
    chosen = {path: found for path, found in structures(narrow, 8, "even").items() if found.kind == CHANNELS}
    assert chosen[RESNET].counts == (8, 16, 24, 32) and chosen[RESNET].blocks == 8
    weight = whole.get_submodule(chosen[RESNET].reader).weight
    assert torch.equal(weight.flatten(1)[:, chosen[RESNET].columns[5]], weight[:, 5].flatten(1))
    # Two of four channels are the others' copies, so that a group without them has the same statistics.
    kept = {path: [part for part in range(found.count) if part % 4 in (0, 3)] for path, found in chosen.items()}
    for path, found in chosen.items():
        silence(narrow, found, kept[path])
        for layer in ("conv1", "norm2", "time_emb_proj"):
            for entry in narrow.get_submodule(f"{path}.{layer}").parameters():
                fours = entry.unflatten(0, (-1, 4))
                fours[:, 1], fours[:, 2] = fours[:, 0], fours[:, 3]
    wanted = output(narrow)
    assert error(wanted, output(whole)) > 1e-3
    cut(narrow, kept, "even")
    assert error(output(narrow), wanted) < 1e-5
    assert widths(narrow)[RESNET] == [8, 2]
    for wrong, message in (([0, 1, 2], "0 channels would be left of one"), (range(31), "3 channels would be left of")):
        with pytest.raises(DiffpressError, match=message):
            cut(copy.deepcopy(whole), {RESNET: wrong}, "even")


def test_what_others_ask_a_network_is_as_before(unet: Any) -> None:
    names = ("up_0", "skip_2", "whole", *modules(unet))
    before = feature_shapes(unet, names, 8, 8), family.concatenations(unet), family.conditions(unet)
    layers = list(family.quantizable(unet)), list(family.attention_layers(unet)), list(family.feed_forward_layers(unet))
    cut(unet, {path: some(found) for path, found in structures(unet).items()})
    assert (feature_shapes(unet, names, 8, 8), family.concatenations(unet), family.conditions(unet)) == before
    assert before[0][RESNET] == (32, 8, 8) and before[0][SELF] == (64, 32)
    after = list(family.quantizable(unet)), list(family.attention_layers(unet)), list(family.feed_forward_layers(unet))
    assert after == layers
    assert family.narrowed(unet) == widths(unet)


def test_a_network_is_cut_twice_as_once(networks: Mapping[str, Any]) -> None:
    once, twice = copy.deepcopy(networks["sd15"]), copy.deepcopy(networks["sd15"])
    cut(once, {FF: [3, 17, 99], RESNET: [6, 2]})
    cut(twice, {FF: [99, 3, 50, 17], RESNET: [2, 4, 6]})
    cut(twice, {FF: [0, 1, 3], RESNET: [0, 2], SELF: [0, 1]})
    assert torch.equal(output(once), output(twice))
    assert widths(once) == widths(twice) == {FF: [3, 1], RESNET: [2, 4]}


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_operations_are_those_that_torch_counts(networks: Mapping[str, Any], name: str) -> None:
    def counted(unet: Any) -> int:
        told = {key: torch.zeros(1, *shape) for key, shape in family.conditions(unet, 5).items()}
        text = told.pop("encoder_hidden_states")
        unet.set_attn_processor(AttnProcessor())  # of plain products, which are counted as they are
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(torch.zeros(1, 4, 8, 8), torch.tensor([1.0]), text, added_cond_kwargs=told)
        return int(counter.get_total_flops())

    from diffusers.models.attention_processor import AttnProcessor

    unet = copy.deepcopy(networks[name])
    found, (each, total), before = structures(unet), flops(unet, 8, 8, 5), counted(unet)
    assert total == before
    kept = {path: some(entry) for path, entry in found.items()}
    cut(unet, kept)
    gone = sum(each[path] * (found[path].count - len(numbers)) for path, numbers in kept.items())
    assert counted(unet) == before - gone
    again, left = flops(unet, 8, 8, 5)
    assert left == before - gone
    assert all(again[path] == each[path] for path in kept)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({SELF: []}, "none of its 2 heads would be left"),
        ({FF: [0, 128]}, "neurons 0 to 127, and no 128"),
        ({FF: [-1]}, "and no -1"),
        ({RESNET: [1, 2, 1]}, "channels 1 is to be kept twice"),
        ({RESNET: [True]}, "and no True"),
        ({RESNET: [0.0]}, "and no 0.0"),
        ({"down_blocks.0.resnets.7": [0]}, "nothing can be cut at 'down_blocks.0.resnets.7'"),
        ({"conv_in": [0]}, "nothing can be cut at 'conv_in'"),
    ],
)
def test_bad_choices_are_refused_and_change_nothing(unet: Any, kept: dict[str, Any], message: str) -> None:
    before = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    with pytest.raises(DiffpressError, match=message) as caught:
        cut(unet, {CROSS: [0], **kept})
    assert "\n" not in str(caught.value)
    assert {name: tensor.shape for name, tensor in unet.state_dict().items()} == before


def test_one_norm_group_stays_one(networks: Mapping[str, Any]) -> None:
    from diffusers import UNet2DConditionModel

    config = {**networks["sd15"].config, "norm_num_groups": 1}
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
    assert RESNET not in structures(unet) and structures(unet, norm_groups="even")[RESNET].count == 32
    cut(unet, {RESNET: range(16)}, "even")
    assert (unet.get_submodule(RESNET).norm2.num_groups, widths(unet)) == (1, {RESNET: [1, 16]})


def test_what_cannot_be_cut_is_named(unet: Any) -> None:
    assert not unsupported(unet)
    unet.get_submodule(SELF).fuse_projections()
    unet.get_submodule(RESNET).norm2 = torch.nn.Identity()
    assert set(unsupported(unet)) == {RESNET, SELF}
    assert SELF not in structures(unet) and RESNET not in structures(unet)
    with pytest.raises(DiffpressError, match=f"nothing can be cut at '{SELF}': its projections"):
        cut(unet, {SELF: [0]})


def test_pruning_comes_before_what_depends_on_widths(unet: Any, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from diffusers import DDIMScheduler

    sampling = tabulate_schedule(DDIMScheduler(clip_sample=False), 3, 3.0, 32, 32)
    pipeline = SimpleNamespace(unet=unet)
    work = Work(pipeline, sampling, 0, lambda _: pytest.fail("asked"), lambda items, _: items, tmp_path)
    check_order(work, "prune-structured")
    work.temporal = TemporalTable((1.0,), {})
    with pytest.raises(DiffpressError, match="put prune-structured before temporal-table"):
        check_order(work, "prune-structured")
    scale = torch.ones(1).numpy()
    work = replace(work, temporal=None, quantization={RESNET: LayerQuant(scale, scale)})
    with pytest.raises(DiffpressError, match="1 layers are quantized already"):
        check_order(work, "prune-structured")
    install(unet, tabulate(unet, sampling.timesteps))
    for act in (lambda: structures(unet), lambda: cut(unet, {RESNET: [0]})):
        with pytest.raises(DiffpressError, match="a table: prune before temporal-table"):
            act()
    assert widths(unet) == {}
