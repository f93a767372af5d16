"""The pipeline: prompts and seeds in, pictures out, from a bundle and one inference library."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import numpy as np

from diffpress import bundle as bundles
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, REUSE, Sampling, StepProgram
from diffpress.runtime import guidance, package, sampler
from diffpress.runtime.backends import Session
from diffpress.runtime.from_image import Begun, Source, prepare
from diffpress.runtime.image import to_pixels
from diffpress.runtime.noise import Generator
from diffpress.runtime.opening import choose_opening
from diffpress.runtime.program import HIDDEN, Denoiser, open_denoiser
from diffpress.runtime.text import Texts
from diffpress.runtime.tokenizer import Tokenizer

VAE_DECODER, VAE_ENCODER = "vae_decoder", "vae_encoder"

# (index of the call, sample after it [N, C, h, w]); with EVODiff the probe of the next call, but for the last.
OnStep = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class Images:
    """What a pipeline made. `problem` names NaN or constant images in one line and is None when there are none."""

    pixels: np.ndarray  # uint8 [N, H, W, 3]
    latents: list[np.ndarray]  # the sample [N, C, h, w] after each step, when asked for; see `OnStep`
    stage_ms: dict[str, float]  # text, image where there is one to begin with, denoise, decode
    step_ms: list[float]
    problem: str | None = None


@dataclass(frozen=True)
class Pipeline:
    """A bundle, opened on one backend. Make it with `load`, call it with prompts."""

    bundle: Bundle
    backend: str
    precision: str
    sampling: Sampling
    texts: Texts
    denoiser: Denoiser
    vae_decoder: Session
    vae_encoder: Callable[[], Session]  # opened when the first picture comes in
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
            names = (*dict.fromkeys(program.steps), *bundles.text_encoders(bundle.manifest), VAE_DECODER)
            opening = choose_opening(bundle, names, backend, precision, threads, fallback, optional=(VAE_ENCODER,))
            texts = Texts.load(
                bundle.manifest,
                lambda name: Tokenizer.load(bundle.file(name), bundle.manifest["text"]["tokens"]),
                # Always fp32: it runs once per image, and its error would be in every step.
                lambda name: opening.component(name, "fp32"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DiffpressError(
                f"{bundle.file(bundles.MANIFEST)} is not as diffpress wrote it ({error!r}): compress again"
            ) from error
        return cls(
            bundle,
            opening.backend,
            opening.precision,
            schedule,
            texts,
            open_denoiser(program, opening.graphs(graphs), opening.open, texts.added),
            opening.component(VAE_DECODER),
            # As the text encoders.
            cache(lambda: opening.component(VAE_ENCODER, "fp32")),
            opening.note,
        )

    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        on_step: OnStep | None = None,
        keep_latents: bool = False,
        start: int = 0,
        latents: np.ndarray | None = None,
        source: Source | None = None,
    ) -> Images:
        """Make one picture for each prompt and seed, as diffusers would with a CPU generator per image.

        Where no negative prompt is given stands what the model was trained with, mostly "". `guidance_scale` None takes
        the schedule's; 1 or less runs the conditional half alone; `caution` says what another one costs. Sampling
        begins at call `start` of the schedule with `latents` [N, C, h, w], a sample of that call's level; None, which
        only call 0 takes, is the noise of the seeds. With a `source` it begins where its strength says, from its image.
        Times leave out what happens once per batch size (compilation). Raises
        `DiffpressError` for arguments that make no sense.
        """
        scale = self.sampling.guidance_scale if guidance_scale is None else guidance_scale
        _check_arguments(prompts, seeds, negative_prompt, scale)
        guidance.check(self.sampling, scale)
        guided, count = scale > 1, len(prompts)
        shape = (1, *(self.bundle.manifest["latent"][name] for name in ("channels", "height", "width")))
        if source is not None:
            if start or latents is not None:
                raise DiffpressError("sampling begins with a picture or with latents at a call: give one of the two")
            start = source.first(self.sampling)
        else:
            _check_latents(latents, (count, *shape[1:]), start)
        generators = [Generator(seed) for seed in seeds]
        sampling, denoiser = self.sampling.starting(start), self.denoiser.starting(start)
        self.texts.prepare(count + guided)
        denoiser.prepare(count, guided)
        self.vae_decoder.prepare(1)
        encoder = None if source is None else prepare(self.vae_encoder)

        started = perf_counter()
        told = self.texts.encode(prompts, negative_prompt, guided)
        encoded = perf_counter()

        def draw() -> np.ndarray:
            return np.concatenate([generator.randn(shape) for generator in generators])

        if source is not None and encoder is not None:
            begun = source.begin(sampling, encoder, self.bundle.manifest["latent"], generators)
        elif latents is None:
            noise = draw()
            begun = Begun(noise * np.float32(self.sampling.init_noise_sigma), noise)
        else:
            # Of a sample in the middle the noise that it began with is not known: none is added again.
            begun = Begun(latents, np.zeros_like(latents) if start else None)
        begins = encoded if source is None else perf_counter()
        latents, kept, ticks = begun.latents, [], [perf_counter()]
        denoise = guide(denoiser.start(told.pop(HIDDEN), sampling.timesteps, told), scale, denoiser.program)
        samples = sampler.sample(sampling, denoise, latents, prior=begun.noise, draw=draw, adjust=begun.adjust)
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

        stages = {"text": encoded - started} | ({} if source is None else {"image": begins - encoded})
        stages |= {"denoise": denoised - begins, "decode": ended - denoised}
        return Images(
            pixels,
            kept,
            {name: seconds * 1e3 for name, seconds in stages.items()},
            [(after - before) * 1e3 for before, after in pairwise(ticks)],
            find_problem(latents, decoded, pixels),
        )

    def caution(self, guidance_scale: float) -> str | None:
        """One line where the bundle was measured at another guidance scale, None where it does not matter."""
        passes = [str(entry.get("name")) for entry in self.bundle.manifest.get("passes", ())]
        return guidance.caution(self.sampling, self.denoiser.program, passes, guidance_scale)

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


def _check_arguments(prompts: Sequence[str], seeds: Sequence[int], negative_prompt: str | None, scale: float) -> None:
    texts = [*prompts, negative_prompt or ""]
    if isinstance(prompts, str) or not all(isinstance(text, str) for text in texts):
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
