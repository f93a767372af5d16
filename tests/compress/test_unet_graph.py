"""Parts of a U-Net as graphs: every feature, fresh, changes nothing; what a graph says that it computes, it does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffpress.calibration.model import load_pipeline
from diffpress.compress.families.unet import branches
from diffpress.compress.families.unet_graph import (
    WHOLE,
    Corrected,
    UNetGraph,
    encoder,
    feature_shapes,
    modules,
    up,
)
from diffpress.errors import DiffpressError
from diffpress.plan import Correction, Corrections

TIMESTEPS = (900.0, 500.0, 100.0)


@pytest.fixture(scope="module")
def unet(tiny_pipeline: Path) -> Any:
    return load_pipeline(str(tiny_pipeline)).unet


@pytest.fixture(scope="module")
def call() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([500.0]),
        torch.randn(2, 5, 32, generator=generator),
    )


@pytest.fixture(scope="module")
def features(unet: Any, call: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    names = (*encoder(unet), *map(up, range(branches(unet) - 1)), WHOLE, *modules(unet))
    with torch.no_grad():
        _, *values = UNetGraph(unet, writes=names)(*call)
    return dict(zip(names, values, strict=True))


def taken(unet: Any) -> dict[str, tuple[str, ...]]:
    kinds = modules(unet)
    of = {kind: tuple(name for name, found in kinds.items() if found == kind) for kind in set(kinds.values())}
    return {
        "the encoder": encoder(unet),
        "all at once": (WHOLE,),
        "a skip": ("skip_2",),
        "every module": tuple(kinds),
        "layers": of["resnet"] + of["transformer"],
        "text": of["attn2"],
        "within transformers": of["attn1"] + of["ff"],
    }


@pytest.mark.parametrize(
    "name", ["the encoder", "all at once", "a skip", "every module", "layers", "text", "within transformers"]
)
def test_fresh_features_change_nothing(
    unet: Any, call: tuple[Tensor, Tensor, Tensor], features: dict[str, Tensor], name: str
) -> None:
    reads = taken(unet)[name]
    graph = UNetGraph(unet, reads)
    computed = tuple(feature for feature in features if graph.computes(feature))
    with torch.no_grad():
        expected = unet(*call).sample
        got, *rest = UNetGraph(unet, reads, computed)(*call, *(features[read] for read in reads))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        for feature, value in zip(computed, rest, strict=True):
            torch.testing.assert_close(value, features[feature], atol=1e-5, rtol=1e-4)
        stale = [features[read].roll(1, -1) for read in reads]
        assert not torch.allclose(UNetGraph(unet, reads)(*call, *stale)[0], expected, atol=1e-3)


def test_what_is_behind_a_feature_is_not_computed(unet: Any) -> None:
    shallow = UNetGraph(unet, ("up_1",))
    assert [name for name in modules(unet) if shallow.computes(name) and modules(unet)[name] == "resnet"] == [
        "down_blocks.0.resnets.0",
        "up_blocks.2.resnets.1",
        "up_blocks.2.resnets.2",
    ]
    assert shallow.computes("up_0") and not shallow.computes("up_1") and not shallow.computes("up_2")
    assert shallow.computes("skip_1") and not shallow.computes("skip_2")
    transformer = next(name for name, kind in modules(unet).items() if kind == "transformer")
    assert not UNetGraph(unet, (transformer,)).computes(f"{transformer}.transformer_blocks.0.attn1")
    with pytest.raises(DiffpressError, match="reads up_1 does not compute 'up_3'"):
        UNetGraph(unet, ("up_1",), ("up_3",))


def test_modules_stand_in_the_order_of_the_forward_pass(unet: Any, call: tuple[Tensor, Tensor, Tensor]) -> None:
    ran: list[str] = []
    kinds = modules(unet)
    hooks = [
        unet.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name in kinds
    ]
    with torch.no_grad():
        unet(*call)
    for hook in hooks:
        hook.remove()
    assert ran == list(kinds)


def test_nothing_of_a_graph_stays_in_the_model(
    unet: Any, call: tuple[Tensor, Tensor, Tensor], features: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        before = unet(*call).sample
        names = tuple(modules(unet))
        UNetGraph(unet, names)(*call, *(torch.zeros_like(features[name]) for name in names))
        assert torch.equal(unet(*call).sample, before)


def test_shapes_of_features(unet: Any, features: dict[str, Tensor]) -> None:
    shapes = feature_shapes(unet, features, 8, 8)
    assert shapes == {name: tuple(value.shape[1:]) for name, value in features.items()}


def test_features_that_do_not_exist_are_refused(unet: Any) -> None:
    for name in ("up_9", "skip_12", "mid_block.resnets.7", ""):
        with pytest.raises(DiffpressError, match=f"no feature '{name}'"):
            UNetGraph(unet, (name,))


def test_a_correction_is_that_of_its_step() -> None:
    generator = torch.Generator().manual_seed(1)
    value, earlier = torch.randn(2, 2, 3, 4, 4, generator=generator)
    scale, offset = torch.randn(3, 2, 3, generator=generator), torch.randn(3, 3, generator=generator)
    corrected = Corrected(TIMESTEPS, scale, offset)
    expected = torch.stack(
        [scale[1, 0, c] * value[:, c] + scale[1, 1, c] * earlier[:, c] + offset[1, c] for c in range(3)], dim=1
    )
    torch.testing.assert_close(corrected(torch.tensor([500.0]), value, earlier), expected)
    both = corrected(torch.tensor([900.0, 500.0]), value, earlier)  # a timestep for each row
    torch.testing.assert_close(both[1], expected[1])
    assert not torch.allclose(both[0], expected[0])
    tokens = value.flatten(2).transpose(1, 2)  # [N, tokens, C]
    got = corrected(torch.tensor([500.0]), tokens, earlier.flatten(2).transpose(1, 2))
    torch.testing.assert_close(got.transpose(1, 2).reshape(value.shape), expected)


def test_one_and_zero_correct_nothing(
    unet: Any, call: tuple[Tensor, Tensor, Tensor], features: dict[str, Tensor]
) -> None:
    same = Correction(np.array([[[1.0], [0.0]]] * 3, np.float32), np.zeros((3, 1), np.float32))
    graph = UNetGraph(unet, ("up_0", "up_0@1"), (), Corrections(TIMESTEPS, {"up_0": same}))
    with torch.no_grad():
        (got,) = graph(*call, features["up_0"], torch.full_like(features["up_0"], 7.0))
        (plain,) = UNetGraph(unet, ("up_0",))(*call, features["up_0"])
    assert torch.equal(got, plain)
