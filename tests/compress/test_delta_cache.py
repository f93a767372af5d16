"""Residuals of rear and front blocks: which steps reuse which, and the loop written out here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from diffpress.calibration.model import load_pipeline
from diffpress.calibration.schedule import tabulate
from diffpress.compress.cache.delta import DeltaCachePass
from diffpress.compress.cache.execute import executed
from diffpress.compress.families.unet_graph import modules
from diffpress.compress.run import run
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, StepProgram

STEPS = 7


@pytest.fixture(scope="module")
def loaded(tiny_pipeline: Path) -> Any:
    return load_pipeline(str(tiny_pipeline))


@pytest.fixture
def work(loaded: Any, tmp_path: Path) -> Work:
    sampling = tabulate(loaded.scheduler, STEPS, 3.0, 32, 32)
    return Work(loaded, sampling, 0, lambda _: [], lambda items, _: items, tmp_path)  # type: ignore[arg-type,return-value]


def blocks(work: Work) -> list[str]:
    return [name for name, kind in modules(work.denoiser).items() if kind in ("resnet", "transformer")]


def applied(work: Work, **fields: Any) -> str:
    work.program = StepProgram((FULL,) * len(work.sampling.timesteps))
    return run([("delta-cache", DeltaCachePass(**fields))], work)[0].summary


def test_rear_blocks_are_reused_early_and_front_blocks_late(work: Work) -> None:
    summary = applied(work, interval=2, switch=3, blocks=4)
    program, names = work.program, blocks(work)
    assert program.steps == (FULL, "cached", FULL, FULL, "cached_2", FULL, "cached_2")  # the switch is full
    assert program.variants["cached"].reads == tuple(sorted(names[-4:]))
    assert program.variants["cached_2"].reads == tuple(sorted(names[:4]))
    assert set(program.variants[FULL].writes) == {*names[:4], *names[-4:]}
    assert summary.startswith(f"4 of 7 steps run in full, the others reuse what 4 of {len(names)} blocks add")


@pytest.mark.parametrize(
    ("fields", "marks"),
    [
        ({"switch": 0.0}, "#22#22#"),
        ({"switch": 1.0}, "#11#11#"),
        ({"switch": 7}, "#11#11#"),
        ({"switch": 1}, "##22#22"),
        ({"switch": 0.5}, "#11##22"),  # the step nearest to 3.5, which is even
        ({"interval": 7, "switch": 0}, "#222222"),
        ({"interval": 99, "switch": 2}, "#1#2222"),
    ],
)
def test_every_step_has_its_place(work: Work, fields: dict[str, Any], marks: str) -> None:
    applied(work, **fields)
    rear = blocks(work)[-1]
    seen = ["#" if not (reads := work.program.variants[name].reads) else "1" if rear in reads else "2"
            for name in work.program.steps]  # fmt: skip
    assert "".join(seen) == marks and len(work.program.variants) <= 3


def test_a_share_of_all_blocks_is_reused(work: Work) -> None:
    count = len(blocks(work))
    for fields, wanted in (({}, round(count / 2)), ({"share": 0.25}, round(count / 4)), ({"share": 1e-6}, 1)):
        applied(work, switch=2, **fields)
        assert {len(variant.reads) for variant in work.program.variants.values() if variant.reads} == {wanted}
    applied(work, switch=2, share=1.0)  # front and rear are the same then
    assert work.program.variants.keys() == {FULL, "cached"}


@torch.no_grad()
def by_hand(work: Work, plan: list[tuple[str, ...]]) -> Tensor:
    """Written out with the model's own blocks, whose results are replaced: the latent [1, 4, 8, 8]."""
    unet, scheduler = work.denoiser, work.pipeline.scheduler
    positive, negative = work.pipeline.encode_prompt("a star", "cpu", 1, True)
    text = torch.cat([negative, positive])
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    scheduler.set_timesteps(STEPS)
    kept: dict[str, Tensor] = {}
    for index, timestep in enumerate(scheduler.timesteps):

        def handle(module: Any, inputs: Any, output: Any, *, name: str, reused: bool) -> Any:
            plain = inputs[0]
            if type(module).__name__ == "ResnetBlock2D" and module.conv_shortcut is not None:
                plain = module.conv_shortcut(plain)
            value = output if isinstance(output, Tensor) else output[0]
            if reused:
                value = plain + kept[name]
            else:
                kept[name] = value - plain
            return value if isinstance(output, Tensor) else (value,)

        hooks = [
            unet.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name, reused=name in plan[index]: handle(
                    module, inputs, output, name=name, reused=reused
                )
            )
            for name in blocks(work)
        ]
        output = unet(torch.cat([latent, latent]), timestep, text).sample
        for hook in hooks:
            hook.remove()
        without, given = output.chunk(2)
        latent = scheduler.step(without + 3.0 * (given - without), timestep, latent, return_dict=False)[0]
    return latent


def image(work: Work) -> Tensor:
    fields = {"guidance_scale": 3.0, "output_type": "latent", "generator": torch.Generator().manual_seed(3)}
    return work.pipeline("a star", num_inference_steps=STEPS, **fields).images


def test_an_image_is_the_one_made_by_hand(work: Work) -> None:
    applied(work, interval=3, switch=4, share=0.4)
    names = tuple(blocks(work))
    count = round(0.4 * len(names))
    rear, front = names[-count:], names[:count]
    with executed(work.pipeline, work.program):
        got = image(work)
    assert torch.allclose(got, by_hand(work, [(), rear, rear, (), (), front, front]), atol=1e-4)
    assert torch.allclose(image(work), by_hand(work, [()] * STEPS), atol=1e-4)
    assert not torch.allclose(got, image(work), atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"share": 0.5, "blocks": 3}, "keep one"),
        ({"switch": 1.5}, "switch 1.5 is no fraction"),
        ({"switch": 8}, "switch 8 is not a step of the schedule, which has 7"),
        ({"blocks": 99}, "99 blocks are more than this denoiser has"),
    ],
)
def test_bad_plans_are_refused(work: Work, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(DiffpressError, match=f"delta-cache: .*{told}"):
        DeltaCachePass(**fields).requires(work)


def test_nothing_to_reuse_and_a_second_cache_are_refused(work: Work) -> None:
    applied(work)
    with pytest.raises(DiffpressError, match="an earlier pass planned a cache"):
        DeltaCachePass().requires(work)
    work.program = StepProgram((FULL,) * STEPS)
    work.sampling = tabulate(work.pipeline.scheduler, 1, 3.0, 32, 32)
    with pytest.raises(DiffpressError, match="all of 1 steps are full"):
        DeltaCachePass().requires(work)


def test_a_whole_number_is_a_step_and_a_decimal_a_fraction() -> None:
    made = TypeAdapter(DeltaCachePass)
    assert isinstance(made.validate_python({"switch": 1}).switch, int)
    assert isinstance(made.validate_python({"switch": 1.0}).switch, float)
    with pytest.raises(ValidationError):
        made.validate_python({"switch": -1})
