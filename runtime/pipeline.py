"""The pipeline: prompts and seeds in, pictures out, from a bundle and one inference library."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import numpy as np

from diffpress import bundle as bundles
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, REUSE, Sampling, StepProgram
from diffpress.runtime import package, sampler
from diffpress.runtime.backends import Session
from diffpress.runtime.image import to_pixels
from diffpress.runtime.noise import randn
from diffpress.runtime.opening import choose_opening
from diffpress.runtime.program import Denoiser, open_denoiser
from diffpress.runtime.tokenizer import Tokenizer

TEXT_ENCODER, VAE_DECODER = "text_encoder", "vae_decoder"

# (index of the call, sample after it [N, C, h, w]); with EVODiff the probe of the next call, but for the last.
OnStep = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class Images:
    """What a pipeline made. `problem` names NaN or constant images in one line and is None when there are none."""

    pixels: np.ndarray  # uint8 [N, H, W, 3]
    latents: list[np.ndarray]  # the sample [N, C, h, w] after each step, when asked for; see `OnStep`
    stage_ms: dict[str, float]  # text, denoise, decode
    step_ms: list[float]
    problem: str | None = None


@dataclass(frozen=True)
class Pipeline:
    """A bundle, opened on one backend. Make it with `load`, call it with prompts."""

    bundle: Bundle
    backend: str
    precision: str
    sampling: Sampling
    tokenizer: Tokenizer
    text_encoder: Session
    denoiser: Denoiser
    vae_decoder: Session
    note: str | None = None  # why it runs on another backend than it was asked to, in one line

    @classmethod
    def load(
        cls,
        source: str | Path | Bundle,
        backend: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        sampling: Sampling | None = None,
        fallback: bool = False,
    ) -> Pipeline:
        """Open a bundle or a package; a path is verified file by file, a `Bundle` is taken as it is.

        "auto" is an engine for this GPU, else CUDA, else what the bundle's bench found fastest, where that runs here;
        `fallback` runs graphs where engines do not fit, see `choose_opening`. `sampling` replaces the bundle's
        schedule, which only a bundle whose graphs are not bound to theirs allows. Raises `DiffpressError`.
        """
        bundle = source if isinstance(source, Bundle) else package.opened(source, backend, fallback=fallback)
        try:
            schedule, program = _schedule(bundle, sampling)
            known = bundle.manifest["graphs"]
            graphs = {name: str(known[name]) for name in dict.fromkeys(program.steps) if name in known}
            tokenizer = Tokenizer.load(bundle.file("tokenizer"), bundle.manifest["text"]["tokens"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DiffpressError(
                f"{bundle.file(bundles.MANIFEST)} is not as diffpress wrote it ({error!r}): compress again"
            ) from error
        names = (*dict.fromkeys(program.steps), TEXT_ENCODER, VAE_DECODER)
        opening = choose_opening(bundle, names, backend, precision, threads, fallback)
        return cls(
            bundle,
            opening.backend,
            opening.precision,
            schedule,
            tokenizer,
            # Always fp32: it runs once per image, and its error would be in every step.
            opening.component(TEXT_ENCODER, "fp32"),
            open_denoiser(program, opening.graphs(graphs), opening.open),
            opening.component(VAE_DECODER),
            opening.note,
        )

    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative_prompt: str = "",
        guidance_scale: float | None = None,
        on_step: OnStep | None = None,
        keep_latents: bool = False,
        start: int = 0,
        latents: np.ndarray | None = None,
    ) -> Images:
        """Make one picture for each prompt and seed, as diffusers would with a CPU generator per image.

        `guidance_scale` None takes the schedule's; 1 or less runs the conditional half alone. Sampling begins at call
        `start` of the schedule with `latents` [N, C, h, w], a sample of that call's level; None, which only call 0
        takes, is the noise of the seeds, which are not used otherwise. Times leave out what happens once per batch size
        (compilation). Raises `DiffpressError` for arguments that make no sense.
        """
        scale = self.sampling.guidance_scale if guidance_scale is None else guidance_scale
        _check_arguments(prompts, seeds, negative_prompt, scale)
        guided, count = scale > 1, len(prompts)
        shape = (1, *(self.bundle.manifest["latent"][name] for name in ("channels", "height", "width")))
        _check_latents(latents, (count, *shape[1:]), start)
        sampling, denoiser = self.sampling.starting(start), self.denoiser.starting(start)
        self.text_encoder.prepare(count + guided)
        denoiser.prepare(count, guided)
        self.vae_decoder.prepare(1)

        started = perf_counter()
        hidden = self._encode(prompts, negative_prompt if guided else None)
        encoded = perf_counter()
        if latents is None:
            latents = np.concatenate([randn(seed, shape) for seed in seeds])
            latents = latents * np.float32(self.sampling.init_noise_sigma)
        kept, ticks = [], [perf_counter()]
        denoise = denoiser.start(hidden, sampling.timesteps)
        samples = sampler.sample(sampling, guide(denoise, scale, denoiser.program), latents)
        for index, latents in enumerate(samples, start):
            ticks.append(perf_counter())
            if keep_latents:
                kept.append(latents)
            if on_step is not None:
                on_step(index, latents)
        denoised = perf_counter()
        decoded = self._decode(latents)
        pixels = to_pixels(decoded)
        ended = perf_counter()

        stages = {"text": encoded - started, "denoise": denoised - encoded, "decode": ended - denoised}
        return Images(
            pixels,
            kept,
            {name: seconds * 1e3 for name, seconds in stages.items()},
            [(after - before) * 1e3 for before, after in pairwise(ticks)],
            find_problem(latents, decoded, pixels),
        )

    def _encode(self, prompts: Sequence[str], negative_prompt: str | None) -> np.ndarray:
        """Text features [N, T, D], or [2 N, T, D] with the negative prompt's rows first."""
        negative = [] if negative_prompt is None else [negative_prompt]
        ids = self.tokenizer.encode([*negative, *prompts])
        hidden = self.text_encoder.run({"input_ids": ids})["last_hidden_state"]
        if negative_prompt is None:
            return hidden
        return np.concatenate([np.repeat(hidden[:1], len(prompts), axis=0), hidden[1:]])

    def _decode(self, latents: np.ndarray) -> np.ndarray:
        """Floats [N, 3, H, W]; one image at a time, which costs nothing on a CPU and needs the memory of one."""
        latent = self.bundle.manifest["latent"]
        scaled = latents / np.float32(latent["scaling_factor"]) + np.float32(latent.get("shift_factor") or 0.0)
        rows = [scaled[index : index + 1] for index in range(len(scaled))]
        return np.concatenate([self.vae_decoder.run({"latent_sample": row})["sample"] for row in rows])


def guide(denoise: sampler.Denoise, scale: float, program: StepProgram) -> sampler.Denoise:
    """Classifier-free guidance (Ho and Salimans 2022) as diffusers writes it: u + scale (c - u), rows of u first.

    Where the program computes c alone, that is the output (guidance within an interval, Kynkäänniemi et al. 2024), or
    the last difference d stands for c - u: c + (scale - 1) d. What it returns is for one batch.
    """
    if scale <= 1:
        return denoise
    difference = np.zeros(0, np.float32)

    def guided(index: int, sample: np.ndarray, timestep: float) -> np.ndarray:
        nonlocal difference
        how = program.guided(index)
        if how != FULL:
            conditional = denoise(index, sample, timestep)
            return conditional + np.float32(scale - 1) * difference if how == REUSE else conditional
        output = denoise(index, np.concatenate([sample, sample]), timestep)
        unconditional, conditional = output[: len(sample)], output[len(sample) :]
        difference = conditional - unconditional
        return unconditional + np.float32(scale) * difference

    return guided


def find_problem(latents: np.ndarray, decoded: np.ndarray, pixels: np.ndarray) -> str | None:
    """One line that names every image whose values are not finite or whose pixels are all the same."""
    found = []
    for index in range(len(pixels)):
        if not np.isfinite(latents[index]).all():
            found.append(f"image {index}: the denoiser produced NaN or infinite values")
        elif not np.isfinite(decoded[index]).all():
            found.append(f"image {index}: the decoder produced NaN or infinite values")
        elif (pixels[index] == pixels[index][0, 0]).all():
            found.append(f"image {index}: every pixel has the same colour")
    return "; ".join(found) or None


def _schedule(bundle: Bundle, override: Sampling | None) -> tuple[Sampling, StepProgram]:
    """The sampling and the step program to run; a plain bundle runs any schedule, a bound one only its own."""
    program = StepProgram.from_json(bundle.manifest["program"])
    sampling = Sampling.from_json(bundle.manifest["sampling"])
    if override is not None and override != sampling:
        if set(program.steps) != {FULL} or program.guidance:
            raise DiffpressError("this bundle's step program is bound to its schedule: it cannot take another one")
        if _has_temporal_table(bundle):
            raise DiffpressError("this bundle's temporal table is bound to its schedule: it cannot take another one")
        sampling = override
        program = replace(program, steps=(FULL,) * len(sampling.timesteps))
    sampler.check(sampling)
    if len(program.steps) != len(sampling.timesteps):
        rows, calls = len(program.steps), len(sampling.timesteps)
        raise DiffpressError(f"the step program has {rows} rows, the schedule {calls} calls: compress again")
    return sampling, program


def _has_temporal_table(bundle: Bundle) -> bool:
    file = bundle.file("plan/plan.json")
    if not file.is_file():
        return any(entry.get("name") == "temporal-table" for entry in bundle.manifest.get("passes", ()))
    return json.loads(file.read_text("utf-8")).get("temporal") is not None


def _check_arguments(prompts: Sequence[str], seeds: Sequence[int], negative_prompt: str, scale: float) -> None:
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in [*prompts, negative_prompt]):
        raise DiffpressError("prompts must be a list of texts and negative_prompt a text")
    if not prompts:
        raise DiffpressError("there is no prompt: give at least one")
    if len(seeds) != len(prompts):
        raise DiffpressError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed for each prompt")
    if not math.isfinite(scale):
        raise DiffpressError(f"guidance_scale is {scale}: give a finite number")


def _check_latents(latents: np.ndarray | None, shape: tuple[int, ...], start: int) -> None:
    if latents is None:
        if start:
            raise DiffpressError(f"sampling that begins at call {start} needs the latents to begin with")
    elif latents.shape != shape or not np.isfinite(latents).all():
        raise DiffpressError(f"latents of {list(latents.shape)} must be finite and of {list(shape)}")
