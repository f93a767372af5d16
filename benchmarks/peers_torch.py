"""Contenders that diffusers' pipeline draws in torch: eager, compiled, or with its U-Net patched by a peer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffpress.benchmarks.peers_worker import Facts, Task
from diffpress.errors import require

PROMPTS, STEPS = 16, 10  # that peers are calibrated with: as much as recipes are
WARM = 2  # steps of the image that a compiler sees first


class Diffusers:
    """A diffusers pipeline, or one that is called like it."""

    def __init__(self, task: Task, pipeline: Any, dtype: torch.dtype = torch.float32, **facts: Any) -> None:
        self.pipeline, self.facts = pipeline, {"bits_w": 32, "bits_a": 32, "deploys": True, "seconds": 0.0, **facts}
        self._task, self._dtype, self._steps = task, dtype, 0

    def follow(self, schedule: str) -> Facts:
        """As `Contender`; the scheduler is the one that the task names."""
        import diffusers

        entry = self._task.schedules[schedule]
        made, self._steps = entry["scheduler"], int(entry["steps"])
        self.pipeline.scheduler = getattr(diffusers, made["class"]).from_config(dict(made["config"]))
        self.pipeline.scheduler.set_timesteps(self._steps)
        return {**self.facts, "steps": self._steps, "timesteps": [float(t) for t in self.pipeline.scheduler.timesteps]}

    @torch.no_grad()
    def draw(self, texts: Sequence[str], seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """As `Contender`; the noise is that of a float32 pipeline with a generator for each image."""
        kept: list[Tensor] = []

        def on_step(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            kept[:] = [tensors["latents"]]
            return tensors

        shape = (1, *self._task.latent)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        images = self.pipeline(
            list(texts),
            num_inference_steps=self._steps,
            guidance_scale=self._task.guidance,
            height=self._task.side,
            width=self._task.side,
            latents=torch.cat(noise).to(self._dtype),
            output_type="np",
            callback_on_step_end=on_step,
        ).images
        latents = torch.as_tensor(kept[0]).float().numpy(force=True)
        return (np.nan_to_num(images) * 255).round().astype(np.uint8), latents

    def begin(self, text: np.ndarray, timesteps: Sequence[float]) -> Callable[[int, np.ndarray], np.ndarray]:
        """As `Contender`."""
        hidden, at = torch.from_numpy(text).to(self._dtype), torch.tensor(timesteps)
        if bool((at == at.round()).all()):
            at = at.long()  # as schedulers have them, and compilers and caches expect them

        @torch.no_grad()
        def call(index: int, sample: np.ndarray) -> np.ndarray:
            given = torch.from_numpy(sample).to(self._dtype)
            output = self.pipeline.unet(given, at[index], encoder_hidden_states=hidden, return_dict=False)[0]
            found: np.ndarray = output[-1:].float().numpy(force=True)
            return found

        return call

    def warm(self) -> float:
        """Seconds of a first small image, or call: what a compiler takes, for the sizes that are timed."""
        self.follow(next(iter(self._task.schedules)))
        start = time.perf_counter()
        if self._task.single:
            rows = np.zeros((2, *self._task.latent), np.float32)
            text = np.zeros((2, *self._task.text), np.float32)
            self.begin(text, self.pipeline.scheduler.timesteps.tolist())(0, rows)
        else:
            self._steps = WARM
            self.draw(self._task.texts[:1], [0])
        return time.perf_counter() - start

    def recorded(self) -> Iterator[dict[str, Tensor]]:
        """Inputs of calls of the U-Net, both halves of guidance of an image at a time, for a peer's calibration.

        Of `PROMPTS` images in `STEPS` steps of the pipeline's own scheduler; random ones for single calls.
        """
        if self._task.single:
            generator = torch.Generator().manual_seed(1)
            for timestep in torch.linspace(981, 21, 4):
                yield {
                    "sample": torch.randn(2, *self._task.latent, generator=generator),
                    "timestep": timestep.reshape(1),
                    "encoder_hidden_states": torch.randn(2, *self._task.text, generator=generator),
                }
            return
        texts = list(self._task.texts[:PROMPTS])
        seen: list[dict[str, Tensor]] = []

        def listen(_: Any, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            sample, hidden, count = inputs[0], named["encoder_hidden_states"], len(texts)
            for index in range(count):
                pair = slice(index, None, count)  # the unconditional half comes first
                at = torch.as_tensor(inputs[1], dtype=torch.float32).reshape(1)
                seen.append({"sample": sample[pair], "timestep": at, "encoder_hidden_states": hidden[pair]})

        self.follow(next(iter(self._task.schedules)))
        self._steps = STEPS
        hook = self.pipeline.unet.register_forward_pre_hook(listen, with_kwargs=True)
        try:
            self.draw(texts, [1_000_003 + index for index in range(len(texts))])
        finally:
            hook.remove()
        yield from seen


class Network(nn.Module):
    """Stands in a pipeline for its U-Net: `run` maps sample, timestep [1] and text, as float32, to the output."""

    def __init__(self, config: Any, run: Callable[[dict[str, Tensor]], Tensor]) -> None:
        super().__init__()
        self.config, self._run = config, run

    @property
    def dtype(self) -> torch.dtype:
        """What a pipeline asks for."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """As `dtype`."""
        return torch.device("cpu")

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        at = torch.as_tensor(timestep, dtype=torch.float32).reshape(1)
        return (self._run({"sample": sample, "timestep": at, "encoder_hidden_states": encoder_hidden_states}),)


class Plain(nn.Module):
    """A U-Net with tensors in and a tensor out, as exporters want it."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        output: Tensor = self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return output


def opened(task: Task) -> Diffusers:
    """diffusers' own pipeline under the task's options."""
    from diffpress.calibration.model import load_pipeline

    options = task.options
    dtype, compiled = getattr(torch, options.get("dtype", "float32")), bool(options.get("compile"))
    bits = torch.finfo(dtype).bits
    pipeline = load_pipeline(task.source)
    made = Diffusers(
        task,
        pipeline.to(dtype),
        dtype,
        backend=f"torch {'compiled' if compiled else 'eager'} {'fp32' if bits == 32 else 'bf16'}",
        bits_w=bits,
        bits_a=bits,
        params=sum(parameter.numel() for parameter in pipeline.unet.parameters()),
        bytes=stored(pipeline.unet),
    )
    if options.get("channels_last"):
        for part in (pipeline.unet, pipeline.vae):
            part.to(memory_format=torch.channels_last)
    start = time.perf_counter()
    for name, patch in PATCHES.items():
        if name in options:
            made.facts |= patch(made, options[name])
    made.facts["seconds"] = time.perf_counter() - start
    if compiled:
        compile_networks(made)
    return made


def compile_networks(made: Diffusers) -> None:
    """torch.compile for U-Net and decoder; all images are drawn one by one then, as they are timed."""
    pipeline = made.pipeline
    pipeline.unet = torch.compile(pipeline.unet)
    pipeline.vae.decode = torch.compile(pipeline.vae.decode)
    made.facts |= {"batch": 1}
    made.facts["seconds"] += made.warm()


def deepcache(made: Diffusers, interval: int) -> Facts:
    """The DeepCache package at branch 0 (Ma et al. 2023)."""
    helper = require("DeepCache", "peers", "run DeepCache").DeepCacheSDHelper(pipe=made.pipeline)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    return {"period": interval}


def tome(made: Diffusers, ratio: float) -> Facts:
    """Token merging (Bolya and Hoffman 2023), by the package tomesd."""
    require("tomesd", "peers", "run ToMe").apply_patch(made.pipeline, ratio=ratio)
    return {}


def torchao(made: Diffusers, _: bool) -> Facts:
    """torchao's INT8 of linear layers, whose inputs are quantized at run time."""
    library = require("torchao.quantization", "peers", "run torchao's INT8")
    unet = made.pipeline.unet
    count = sum(module.weight.numel() for module in unet.modules() if isinstance(module, nn.Linear))
    library.quantize_(unet, library.Int8DynamicActivationInt8WeightConfig())
    share = count / made.facts["params"]
    note = f"linear layers alone, {share:.0%} of the parameters"
    return {"bits_w": 8, "bits_a": 8, "bytes": stored(unet), "note": note}


def exported(made: Diffusers, _: bool) -> Facts:
    """torchao's INT8 of an exported program (PT2E) with the quantizer for x86, calibrated; its kernels are oneDNN's."""
    pt2e = require("torchao.quantization.pt2e.quantize_pt2e", "peers", "run torchao's INT8")
    x86 = require("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", "peers", "run torchao's INT8")
    import torch._inductor.config as inductor

    inductor.freezing = True  # weights are constants, which its kernels want packed
    unet, calls = made.pipeline.unet, list(made.recorded())
    with torch.no_grad():
        program = torch.export.export(Plain(unet), tuple(calls[0].values())).module()
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = pt2e.prepare_pt2e(program, quantizer)
        for call in calls:
            prepared(*call.values())
        converted = pt2e.convert_pt2e(prepared)
        quantized: Any = torch.compile(converted)
    made.pipeline.unet = Network(unet.config, lambda feeds: quantized(*feeds.values()))
    made.pipeline.vae.decode = torch.compile(made.pipeline.vae.decode)
    made.warm()
    return {"bits_w": 8, "bits_a": 8, "bytes": stored(converted), "batch": 1, "backend": "torch compiled fp32"}


def modelopt(made: Diffusers, config: str) -> Facts:
    """A configuration of nvidia-modelopt, calibrated. In torch its integers are rounded floats: it saves no time."""
    library = require("modelopt.torch.quantization", "modelopt", "run nvidia-modelopt")
    calls = list(made.recorded())

    @torch.no_grad()
    def calibrate(unet: Any) -> None:
        for call in calls:
            unet(**call)

    library.quantize(made.pipeline.unet, getattr(library, config), calibrate)
    return {"bits_w": 8, "bits_a": 8, "deploys": False, "note": "rounding simulated in float"}


PATCHES: Mapping[str, Callable[[Diffusers, Any], Facts]] = {
    "deepcache": deepcache,
    "tome": tome,
    "torchao": torchao,
    "pt2e": exported,
    "modelopt": modelopt,
}


def smashed(task: Task) -> Diffusers:
    """diffusers' pipeline as pruna changes it; the options are its algorithms with their settings."""
    from diffpress.calibration.model import load_pipeline

    pruna = require("pruna", "peers", "run pruna")
    pipeline = load_pipeline(task.source)
    parameters, size = sum(parameter.numel() for parameter in pipeline.unet.parameters()), stored(pipeline.unet)
    start = time.perf_counter()
    smash = pruna.SmashConfig(dict(task.options), device="cpu")
    found = pruna.smash(model=pipeline, smash_config=smash).model  # the pipeline in its wrapper
    made = Diffusers(task, found, params=parameters, bytes=size, backend="torch by pruna")
    made.facts |= {"batch": 1, "period": task.options.get("deepcache", {}).get("interval", 1)}
    made.facts["seconds"] = time.perf_counter() - start + made.warm()
    return made


def stored(unet: nn.Module) -> int:
    """Bytes of a network's tensors as they are held; of quantized ones those of their integers and scales."""
    return sum(_bytes(tensor) for tensor in unet.state_dict().values() if isinstance(tensor, Tensor))


def _bytes(tensor: Tensor) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    parts, _ = tensor.__tensor_flatten__()
    return sum(_bytes(getattr(tensor, part)) for part in parts)
