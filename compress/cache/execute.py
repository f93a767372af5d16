"""Runs a step program in torch: the denoiser of each step, with features kept between steps.

The counterpart of `runtime.program` for calibration and simulation: what it feeds the layers is what they will see.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.calibration.capture import PLAIN, Call, Execution, Observe
from diffpress.compress.families.unet import UNetGraph
from diffpress.errors import DiffpressError
from diffpress.plan import CONDITIONAL, FULL, StepProgram, Variant


def variant_graph(unet: Any, program: StepProgram, branches: Mapping[str, int], name: str) -> UNetGraph:
    """The graph of variant `name`; `branches` maps a feature's name to its branch in the U-Net.

    Raises `DiffpressError` for a variant that the program lacks, or that a U-Net graph cannot run.
    """
    variant = _variant(program, name)
    if len(variant.reads) > 1 or len(variant.writes) > 1:
        raise DiffpressError(f"variant '{name}' reads or writes several features, of which a U-Net graph carries one")
    unknown = {*variant.reads, *variant.writes} - branches.keys()
    if unknown:
        raise DiffpressError(f"variant '{name}' names feature '{min(unknown)}', which no branch of the denoiser makes")
    reads, writes = (branches[names[0]] if names else None for names in (variant.reads, variant.writes))
    return UNetGraph(unet, reads, writes)


def _variant(program: StepProgram, name: str) -> Variant:
    if name not in program.variants:
        raise DiffpressError(
            f"a call recorded as variant '{name}' does not belong to the step program, whose variants are: "
            f"{', '.join(program.variants)}; record again"
        )
    return program.variants[name]


def replay(unet: Any, program: StepProgram, branches: Mapping[str, int], call: Call) -> Tensor:
    """`out_sample` [2, C, H, W] of the denoiser on a recorded call: the stock forward pass, or the graph that reads.

    [1, C, H, W] of a call of the conditional half alone.
    """
    call = call.to(unet.device)
    text = call.text[-len(call.sample) :]
    reads = _variant(program, call.variant).reads
    if not reads:
        return unet(call.sample, call.timestep, encoder_hidden_states=text, return_dict=False)[0]
    if reads[0] not in call.features:
        raise DiffpressError(f"a call of variant '{call.variant}' was recorded without feature '{reads[0]}'")
    graph = variant_graph(unet, program, branches, call.variant)
    return graph(call.sample, call.timestep, text, call.features[reads[0]])[0]


class CachedDenoiser(nn.Module):
    """Stands in for a pipeline's U-Net and runs the step program, a call per step; features live between calls.

    It is called with both halves of guidance at every step. Where the program computes the conditional half c alone, it
    answers (c - d, c) with the last difference d, or (c, c), so that the pipeline's own u + scale (c - u) is right.

    An image goes from noise to picture, so a timestep above the last one begins the next image; `reset` does it by
    hand, after a run that was broken off at its first step. `observe` is told every call before it runs. Raises
    `DiffpressError` for more calls than the program has steps, and for conditions that a U-Net graph does not take.
    """

    def __init__(
        self, unet: Any, program: StepProgram, branches: Mapping[str, int], observe: Observe | None = None
    ) -> None:
        super().__init__()
        self.unet = unet
        self.program = program
        self._observe: Observe = observe or (lambda index, call: None)
        self._graphs: dict[str, Callable[..., tuple[Tensor, ...]]] = {
            name: variant_graph(unet, program, branches, name) for name in dict.fromkeys(program.steps)
        }
        self.reset()

    def reset(self) -> None:
        """Forget the features and stand before the first step."""
        self._made, self._last = 0, float("inf")
        self._features: dict[str, Tensor] = {}
        self._difference = torch.zeros(())

    @property
    def config(self) -> Any:
        """Of the U-Net, as the three below: what a pipeline asks for."""
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

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        **conditions: Any,
    ) -> Any:
        given = [name for name, value in conditions.items() if value is not None]
        if given:
            raise DiffpressError(f"a step program in torch does not take {', '.join(given)}")
        time = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1)[:1]
        index = self._advance(float(time))
        name = self.program.steps[index]
        variant = self.program.variants[name]
        guided = self.program.guided(index)
        rows = len(sample) if guided == FULL else self._half(len(sample))
        # A step of the conditional half reads what one of both halves may have written.
        features = {read: self._features[read][-rows:] for read in variant.reads}
        self._observe(index, Call(sample[-rows:].clone(), time, encoder_hidden_states, name, features))
        output, *written = self._graphs[name](sample[-rows:], time, encoder_hidden_states[-rows:], *features.values())
        self._features.update(zip(variant.writes, written, strict=True))
        if guided != FULL:
            output = torch.cat([output if guided == CONDITIONAL else output - self._difference, output])
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


@contextmanager
def executed(
    pipeline: Any, program: StepProgram, branches: Mapping[str, int], observe: Observe | None = None
) -> Iterator[CachedDenoiser]:
    """Within the block `pipeline` samples by the step program; its own U-Net comes back after."""
    unet = pipeline.unet
    stand_in = CachedDenoiser(unet, program, branches, observe)
    pipeline.unet = stand_in
    try:
        yield stand_in
    finally:
        pipeline.unet = unet


def execution(program: StepProgram, branches: Mapping[str, int]) -> Execution:
    """How recordings under `program` are made; one that never reads a feature nor leaves a half of guidance out is the
    plain denoiser.
    """
    if not program.guidance and not any(program.variants[name].reads for name in program.steps):
        return PLAIN

    @contextmanager
    def watched(pipeline: Any, observe: Observe) -> Iterator[None]:
        with executed(pipeline, program, branches, observe):
            yield

    return Execution(json.dumps([program.to_json(), dict(branches)], sort_keys=True), watched)
