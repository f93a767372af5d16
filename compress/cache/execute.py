"""Runs a step program in torch: the denoiser of each step, with features kept between steps.

The counterpart of `runtime.program` for calibration and simulation: what it feeds the layers is what they will see.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.calibration import conditions
from diffpress.calibration.capture import PLAIN, Call, Execution, Observe
from diffpress.calibration.conditions import Text
from diffpress.compress.families.unet_graph import UNetGraph
from diffpress.errors import DiffpressError
from diffpress.plan import EARLIER, FULL, MEAN, REUSE, Corrections, StepProgram, Variant


def variant_graph(unet: Any, program: StepProgram, name: str, corrections: Corrections | None = None) -> UNetGraph:
    """The graph of variant `name`; raises `DiffpressError` where the program lacks it, or no U-Net can run it."""
    variant = _variant(program, name)
    return UNetGraph(unet, variant.reads, variant.writes, corrections)


def _variant(program: StepProgram, name: str) -> Variant:
    if name not in program.variants:
        raise DiffpressError(
            f"a call recorded as variant '{name}' does not belong to the step program, whose variants are: "
            f"{', '.join(program.variants)}; record again"
        )
    return program.variants[name]


def replay(unet: Any, program: StepProgram, corrections: Corrections | None, call: Call) -> Tensor:
    """`out_sample` [2, C, H, W] of the denoiser on a recorded call: the stock forward pass, or the graph that reads.

    [1, C, H, W] of a call of the conditional half alone.
    """
    call = call.to(unet.device)
    text = call.text[-len(call.sample) :]
    reads = _variant(program, call.variant).reads
    if not reads:
        return unet(call.sample, call.timestep, **conditions.arguments(text), return_dict=False)[0]
    missing = [read for read in reads if read not in call.features]
    if missing:
        raise DiffpressError(f"a call of variant '{call.variant}' was recorded without feature '{missing[0]}'")
    graph = variant_graph(unet, program, call.variant, corrections)
    return graph(call.sample, call.timestep, text, *(call.features[read] for read in reads))[0]


class CachedDenoiser(nn.Module):
    """Stands in for a pipeline's U-Net and runs the step program, a call per step; features live between calls.

    It is called with both halves of guidance at every step. Where the program computes the conditional half c alone, it
    answers (c - d, c) with the last difference d, or (c, c), so that the pipeline's own u + scale (c - u) is right.

    An image goes from noise to picture, so a timestep above the last one begins the next image; `reset` does it by
    hand, after a run that was broken off at its first step. `observe` is told every call before it runs. Raises
    `DiffpressError` for more calls than the program has steps, and for conditions that a U-Net graph does not take.
    """

    def __init__(
        self,
        unet: Any,
        program: StepProgram,
        corrections: Corrections | None = None,
        observe: Observe | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.program = program
        self._observe: Observe = observe or (lambda index, call: None)
        self.correct(corrections)
        self.reset()

    def correct(self, corrections: Corrections | None) -> None:
        """Go on with other corrections of the features that are read; those kept stay."""
        self._graphs: dict[str, Callable[..., tuple[Tensor, ...]]] = {
            name: variant_graph(self.unet, self.program, name, corrections)
            for name in dict.fromkeys(self.program.steps)
        }

    @property
    def features(self) -> Mapping[str, Tensor]:
        """What is kept for later steps, by the names they read it by; the conditional half is the last of the rows."""
        return self._features

    def reset(self) -> None:
        """Forget the features and stand before the first step."""
        self._made, self._last = 0, float("inf")
        self._features: dict[str, Tensor] = {}
        self._difference = torch.zeros(())

    @property
    def config(self) -> Any:
        """Of the U-Net, as those below: what a pipeline asks for."""
        return self.unet.config

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def in_channels(self) -> int:
        return self.unet.config.in_channels

    @property
    def add_embedding(self) -> Any:
        return self.unet.add_embedding

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Text,
        return_dict: bool = True,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        **others: Any,
    ) -> Any:
        text = encoder_hidden_states
        if added_cond_kwargs:
            text = conditions.told({conditions.TEXT: text, "added_cond_kwargs": added_cond_kwargs})
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise DiffpressError(f"a step program in torch does not take {', '.join(given)}")
        time = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1)[:1]
        index = self._advance(float(time))
        name = self.program.steps[index]
        variant = self.program.variants[name]
        guided = self.program.guided(index)
        rows = len(sample) if guided == FULL else self._half(len(sample))
        features = {read: _half_of(self._features[read], rows, guided) for read in variant.reads}
        self._observe(index, Call(sample[-rows:].clone(), time, text, name, features))
        output, *written = self._graphs[name](sample[-rows:], time, text[-rows:], *features.values())
        for feature, value in zip(variant.writes, written, strict=True):
            if feature in self._features:
                self._features[feature + EARLIER] = self._features[feature]
            self._features[feature] = value
        if guided != FULL:
            output = torch.cat([output - self._difference if guided == REUSE else output, output])
        elif self.program.guidance:
            half = self._half(rows)
            self._difference = output[half:] - output[:half]
        if not return_dict:
            return (output,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=output)

    def _half(self, rows: int) -> int:
        if rows % 2:
            raise DiffpressError("the step program economizes guidance, but the pipeline samples without it")
        return rows // 2

    def _advance(self, timestep: float) -> int:
        """The index of the call at `timestep`, counted."""
        steps = len(self.program.steps)
        # A schedule of one step repeats its timestep in every image.
        if timestep > self._last or (self._made == steps and timestep == self._last):
            self.reset()
        if self._made == steps:
            raise DiffpressError(f"the pipeline calls its denoiser more often than the step program's {steps} steps")
        self._made, self._last = self._made + 1, timestep
        return self._made - 1


def _half_of(feature: Tensor, rows: int, guided: str) -> Tensor:
    """What a step of so many rows reads of a feature, which a step of both halves may have written."""
    if guided == MEAN and len(feature) == 2 * rows:
        return feature.unflatten(0, (2, rows)).mean(dim=0)
    return feature[-rows:]


@contextmanager
def executed(
    pipeline: Any, program: StepProgram, corrections: Corrections | None = None, observe: Observe | None = None
) -> Iterator[CachedDenoiser]:
    """Within the block `pipeline` samples by the step program; its own U-Net comes back after."""
    unet = pipeline.unet
    stand_in = CachedDenoiser(unet, program, corrections, observe)
    pipeline.unet = stand_in
    try:
        yield stand_in
    finally:
        pipeline.unet = unet


def execution(program: StepProgram, corrections: Corrections | None = None) -> Execution:
    """How recordings under `program` are made; one that never reads a feature nor leaves a half of guidance out is the
    plain denoiser.
    """
    if not program.guidance and not any(program.variants[name].reads for name in program.steps):
        return PLAIN

    @contextmanager
    def watched(pipeline: Any, observe: Observe) -> Iterator[None]:
        with executed(pipeline, program, corrections, observe):
            yield

    key = hashlib.sha256(json.dumps(program.to_json(), sort_keys=True).encode())
    for name, entry in ({} if corrections is None else corrections.features).items():
        key.update(name.encode() + entry.scale.tobytes() + entry.offset.tobytes())
    return Execution(key.hexdigest(), watched, program.steps)
