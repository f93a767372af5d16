"""diffusers' pipeline on a GPU, eager or compiled, uncached or under a step program; as a candidate for timing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffpress.benchmarks.gpu_rows import COMPILED, FLOAT, Model, Row
from diffpress.calibration.model import load_pipeline
from diffpress.compress.cache.execute import variant_graph
from diffpress.plan import FULL, Plan, StepProgram
from diffpress.runtime.noise import randn
from diffpress.runtime.pipeline import Images, find_problem


class Stepped(nn.Module):
    """Stands in for a U-Net and runs a step program by counting its calls, without waiting for the device.

    `CachedDenoiser` finds its step by the timestep's value and checks what it is given; this one is only for timing.
    """

    def __init__(self, unet: Any, plan: Plan, compile_graph: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.unet, self.program = unet, plan.program
        names = dict.fromkeys(plan.program.steps)
        made = {name: variant_graph(unet, plan.program, name, plan.corrections) for name in names}
        self.graphs: Mapping[str, Callable[..., tuple[Tensor, ...]]] = {
            name: compile_graph(graph) if compile_graph else graph for name, graph in made.items()
        }
        self._copies = compile_graph is not None  # a CUDA graph writes its outputs to the same place each time
        self.features: dict[str, Tensor] = {}
        self.made = 0

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

    def call(self, index: int, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The output of one step; what it writes is kept for the next ones."""
        name = self.program.steps[index]
        variant = self.program.variants[name]
        reads = (self.features[read] for read in variant.reads)
        output, *written = self.graphs[name](sample, timestep, text, *reads)
        for feature, value in zip(variant.writes, written, strict=True):
            self.features[feature] = value.clone() if self._copies else value
        return output

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True, **_: Any
    ) -> tuple[Tensor]:
        index = self.made % len(self.program.steps)
        self.made += 1
        return (self.call(index, sample, timestep.reshape(1).float(), encoder_hidden_states),)


@dataclass(frozen=True)
class Torch:
    """A diffusers pipeline bound to a schedule, on a device, in a type."""

    pipeline: Any
    model: Model
    place: str
    dtype: torch.dtype
    program: StepProgram | None = None

    @classmethod
    def load(cls, source: str, model: Model, row: Row, place: str, plan: Plan | None, mode: str) -> Torch:
        """Open a model as `row` says; `plan` has the step program of a cached row, `mode` is torch.compile's.

        A compiled one has its networks in channels_last, as diffusers advises.
        """
        pipeline = load_pipeline(source)
        dtype = torch.float32 if row.recipe == FLOAT else torch.float16
        pipeline.to(place, dtype)
        compiling = _compiler(mode) if row.runner == COMPILED else None
        if compiling is not None:
            for part in (pipeline.unet, pipeline.vae):
                part.to(memory_format=torch.channels_last)
            pipeline.vae.decode = compiling(pipeline.vae.decode)
        program = None if plan is None else plan.program
        if plan is not None:
            pipeline.unet = Stepped(pipeline.unet, plan, compiling)
        elif compiling is not None:
            pipeline.unet = compiling(pipeline.unet)
        return cls(pipeline, model, place, dtype, program)

    @torch.no_grad()
    def __call__(self, prompts: list[str], seeds: list[int], *, keep_latents: bool = False) -> Images:
        """Draw an image for each prompt, from the noise that the runtime draws for its seed, in float32."""
        unet, kept = self.pipeline.unet, []
        if isinstance(unet, Stepped):
            unet.made = 0

        def on_step(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            kept.append(tensors["latents"])
            return tensors

        side = self.model.side // self.pipeline.vae_scale_factor
        noise = np.concatenate([randn(seed, (1, unet.config.in_channels, side, side)) for seed in seeds])
        drawn = self.pipeline(
            list(prompts),
            num_inference_steps=self.model.steps,
            guidance_scale=self.model.guidance,
            height=self.model.side,
            width=self.model.side,
            latents=torch.from_numpy(noise).to(self.place, self.dtype),
            output_type="np",
            **({"callback_on_step_end": on_step} if keep_latents else {}),
        ).images
        latents = [kept[-1].float().numpy(force=True)] if kept else []
        finite = np.nan_to_num(drawn, nan=0.0)
        pixels = (finite * 255).round().astype(np.uint8)
        problem = find_problem(latents[-1] if latents else drawn, drawn, pixels)
        return Images(pixels, latents, {}, [], problem)

    def calls(self) -> dict[str, Callable[[int], object]]:
        """By variant, one call of the denoiser with both halves of guidance; inputs lie on the device."""
        unet = self.pipeline.unet
        generator = torch.Generator().manual_seed(0)
        tokens, width = self.pipeline.tokenizer.model_max_length, unet.config.cross_attention_dim
        side = self.model.side // self.pipeline.vae_scale_factor
        sample = torch.randn(2, unet.config.in_channels, side, side, generator=generator).to(self.place, self.dtype)
        text = torch.randn(2, tokens, width, generator=generator).to(self.place, self.dtype)
        time = torch.full((1,), 500.0, device=self.place)
        whole = torch.tensor(500, device=self.place)  # as a scheduler has it: another type would be compiled anew

        @torch.no_grad()
        def run(index: int) -> object:
            if isinstance(unet, Stepped):
                return unet.call(index, sample, time, text)
            return unet(sample, whole, encoder_hidden_states=text, return_dict=False)

        steps = self.program.steps if self.program else (FULL,)
        first = {name: steps.index(name) for name in dict.fromkeys(steps)}
        for index in first.values():  # what a variant reads has been written by then
            run(index)
        return {name: lambda _, index=index: run(index) for name, index in first.items()}  # type: ignore[misc]


def _compiler(mode: str) -> Callable[[Any], Any]:
    return lambda part: torch.compile(part, mode=mode, fullgraph=False)
