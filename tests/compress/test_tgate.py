"""T-GATE in torch against a sampling loop written out here, with attention that keeps what it said."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpress.calibration import capture
from diffpress.calibration.capture import Execution, Recordings
from diffpress.calibration.model import load_pipeline
from diffpress.calibration.schedule import tabulate
from diffpress.calibration.sets import CalibrationSet
from diffpress.compress.cache.execute import executed
from diffpress.compress.cache.program import CACHED
from diffpress.compress.cache.tgate import TGatePass
from diffpress.compress.families.unet_graph import modules
from diffpress.compress.schedule.guidance import GuidancePass
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import CONDITIONAL, FULL, MEAN, REUSE, StepProgram

STEPS, GATE, SCALE, PROMPT = 5, 2, 3.0, "a red ring"


@pytest.fixture(scope="module")
def loaded(tiny_pipeline: Path) -> Any:
    return load_pipeline(str(tiny_pipeline))


@pytest.fixture
def work(loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setenv("DIFFPRESS_CACHE", str(tmp_path / "cache"))
    sampling = tabulate(loaded.scheduler, STEPS, SCALE, 32, 32)

    def recorder(how: Execution) -> Recordings:
        return capture.record(
            loaded, "digest", sampling, CalibrationSet((PROMPT,), "every-step"), 3, lambda items, _: items, how
        )

    return Work(loaded, sampling, 3, recorder, lambda items, _: items, tmp_path / "scratch")


def crossed(unet: Any) -> list[str]:
    return [name for name in dict(unet.named_modules()) if name.endswith(".attn2")]


@contextmanager
def frozen(unet: Any, kept: dict[str, Tensor] | None) -> Iterator[dict[str, Tensor]]:
    """Cross-attentions say what is in `kept`; if None, what they say is noted and given back."""
    noted: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def note(_: Any, __: Any, output: Tensor) -> Tensor | None:
            noted[name] = output
            return None if kept is None else kept[name]

        return unet.get_submodule(name).register_forward_hook(note)

    hooks = [hook(name) for name in crossed(unet)]
    try:
        yield noted
    finally:
        for entry in hooks:
            entry.remove()


@torch.no_grad()
def by_hand(pipeline: Any, guidance: str) -> tuple[Tensor, list[Tensor]]:
    """The latent [1, 4, 8, 8] and the output of every step; after the gate the text is nonsense."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    positive, negative = pipeline.encode_prompt(PROMPT, "cpu", 1, True)
    text, outputs = torch.cat([negative, positive]), []
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    scheduler.set_timesteps(STEPS)
    kept: dict[str, Tensor] | None = None
    noted: dict[str, Tensor] = {}
    for index, timestep in enumerate(scheduler.timesteps):
        if index == GATE:
            kept = noted
            if guidance == "mean":
                kept = {name: value.mean(dim=0, keepdim=True) for name, value in noted.items()}
        with frozen(unet, kept) as noted:
            if kept is not None and guidance == "mean":
                output = unet(x, timestep, torch.full_like(positive, 7.0)).sample
            else:
                shown = text if kept is None else torch.full_like(text, 7.0)
                u, c = unet(torch.cat([x, x]), timestep, shown).sample.chunk(2)
                output = u + SCALE * (c - u)
        outputs.append(output)
        x = scheduler.step(output, timestep, x, return_dict=False)[0]
    return x, outputs


def image(pipeline: Any) -> Tensor:
    fields = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "latent"}
    return pipeline(PROMPT, generator=torch.Generator().manual_seed(3), **fields).images


@pytest.mark.parametrize("guidance", ["mean", "keep"])
def test_an_image_is_the_one_made_by_hand(work: Work, guidance: Any) -> None:
    plain = image(work.pipeline)
    step = TGatePass(gate=GATE, guidance=guidance)
    step.requires(work)
    summary = step.apply(work)
    expected, _ = by_hand(work.pipeline, guidance)
    with executed(work.pipeline, work.program):
        image(work.pipeline)
        got = image(work.pipeline)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, plain, atol=1e-3)
    what = "without guidance" if guidance == "mean" else "with guidance as it was"
    assert summary == f"{len(crossed(work.denoiser))} cross-attentions are frozen from step 2 of 5 on, {what}"


def test_recorded_calls_are_those_of_the_frozen_trajectory(work: Work) -> None:
    TGatePass(gate=GATE).apply(work)
    _, outputs = by_hand(work.pipeline, "mean")
    calls = list(work.record())
    assert [len(call.sample) for call in calls] == [2, 2, 1, 1, 1]
    with torch.no_grad():
        for call, expected in zip(calls[GATE:], outputs[GATE:], strict=True):
            assert call.features.keys() == set(crossed(work.denoiser))
            assert {len(feature) for feature in call.features.values()} == {1}
            torch.testing.assert_close(work.run(call), expected, rtol=1e-4, atol=1e-4)


def test_the_program_reads_every_cross_attention_and_nothing_else(work: Work) -> None:
    TGatePass(gate=GATE).apply(work)
    program = work.program
    assert program.steps == (FULL,) * 2 + (CACHED,) * 3 and program.guidance == (FULL,) * 2 + (MEAN,) * 3
    assert set(program.variants[CACHED].reads) == set(crossed(work.denoiser)) == set(program.variants[FULL].writes)
    assert program.variants[CACHED].writes == ()
    assert program.evaluations() == 3.5 and program.guidance_marks() == "##==="


def test_the_gate_is_in_the_middle_where_none_is_given(work: Work) -> None:
    TGatePass().apply(work)
    assert work.program.marks() == "##---"


def test_a_schedule_without_guidance_keeps_its_one_half(work: Work) -> None:
    work.sampling = replace(work.sampling, guidance_scale=1.0)
    TGatePass(gate=GATE).apply(work)
    assert work.program.guidance == () and work.program.marks() == "##---"


def test_economy_before_the_gate_stays(work: Work) -> None:
    work.program = StepProgram((FULL,) * STEPS, guidance=(FULL, REUSE, FULL, REUSE, REUSE))
    with pytest.raises(
        DiffpressError, match=r"tgate: step 2 takes the mean of both halves .* nothing that was written"
    ):
        TGatePass(gate=2).requires(work)
    with pytest.raises(DiffpressError, match="tgate: step 2 computes both halves of guidance, but step 1 wrote"):
        TGatePass(gate=2, guidance="keep").requires(work)
    step = TGatePass(gate=3)
    step.requires(work)
    step.apply(work)
    assert work.program.guidance_marks() == "#-#=="
    with pytest.raises(DiffpressError, match="an earlier pass planned guidance already"):
        GuidancePass().requires(work)
    with pytest.raises(DiffpressError, match="tgate: an earlier pass planned a cache already"):
        step.requires(work)


def test_economy_that_leaves_guidance_out_is_no_mean(work: Work) -> None:
    work.program = StepProgram((FULL,) * STEPS, guidance=(FULL, FULL, CONDITIONAL, CONDITIONAL, CONDITIONAL))
    step = TGatePass(gate=3, guidance="keep")
    step.requires(work)
    step.apply(work)
    assert work.program.guidance_marks() == "##..." and work.program.marks() == "###--"


def test_gates_that_freeze_nothing_are_refused(work: Work) -> None:
    with pytest.raises(DiffpressError, match="tgate: gate 5 is behind the last of 5 steps, 0 to 4"):
        TGatePass(gate=5).requires(work)


def test_a_denoiser_without_cross_attention_is_refused(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = {name: kind for name, kind in modules(work.denoiser).items() if kind != "attn2"}
    monkeypatch.setattr("diffpress.compress.cache.tgate.modules", lambda _: rest)
    with pytest.raises(DiffpressError, match="tgate: this denoiser has no cross-attention that could be frozen"):
        TGatePass(gate=2).requires(work)
