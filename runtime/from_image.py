"""Image-to-image and inpainting: where sampling begins from a picture, and what of the picture is kept.

As diffusers' StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline (for a denoiser of four channels) do
both, down to the order in which noise is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from diffpress.errors import DiffpressError
from diffpress.plan import Sampling
from diffpress.runtime.backends import Session
from diffpress.runtime.image import to_floats, to_mask
from diffpress.runtime.noise import Generator
from diffpress.runtime.sampler import Adjust

Picture = Image.Image | Sequence[Image.Image]
STRENGTH, INPAINT_STRENGTH = 0.8, 1.0  # diffusers' defaults
SMALLEST, LARGEST = -30.0, 20.0  # that a logarithm of a variance counts as


@dataclass(frozen=True)
class Source:
    """What a picture is made from: another one, how much of it goes, and where it is painted anew."""

    image: Picture  # one for all, or one for each prompt
    strength: float | None = None  # above 0 and at most 1, which leaves least of it; the usual one if None
    mask: Picture | None = None  # white where it is painted anew; elsewhere the image stays

    def first(self, sampling: Sampling) -> int:
        """The call of the whole schedule that sampling begins at: of 20 steps at strength 0.6 the last 12 are made.

        Raises `DiffpressError` for a strength out of range and one so small that no step is left.
        """
        strength = self._strength
        if not (math.isfinite(strength) and 0 < strength <= 1):
            raise DiffpressError(f"strength is {strength:g}: give a number above 0 and at most 1")
        made = min(int(sampling.steps * strength), sampling.steps)
        if not made:
            least = math.ceil(100 / sampling.steps) / 100
            raise DiffpressError(f"strength {strength:g} of {sampling.steps} steps makes none: give at least {least:g}")
        if not sampling.levels:
            raise DiffpressError("this bundle is from before its schedule held noise levels: compress again")
        return (sampling.steps - made) * sampling.order

    @property
    def _strength(self) -> float:
        usual = STRENGTH if self.mask is None else INPAINT_STRENGTH
        return usual if self.strength is None else self.strength

    def begin(
        self, sampling: Sampling, encoder: Session, latent: Mapping[str, Any], generators: Sequence[Generator]
    ) -> Begun:
        """Encode the image and noise it for the first call of `sampling`, which is the part that is made.

        `latent` is the manifest's entry; each image draws from its own generator.
        """
        count, size = len(generators), (sampling.height, sampling.width)
        shape = (1, *(int(latent[name]) for name in ("channels", "height", "width")))
        clean = _encoded(encoder, to_floats(_pictures(self.image, count, "image"), *size), latent, generators, shape)
        noise = np.concatenate([generator.randn(shape) for generator in generators])
        begins = _noised(clean, noise, sampling.levels[0])
        if self.mask is None:
            return Begun(begins, noise)
        for generator in generators:
            generator.randn(shape)  # diffusers encodes the masked image, too, which only a wider denoiser looks at
        if self._strength == 1:
            begins = noise * np.float32(sampling.init_noise_sigma)
        mask = to_mask(_pictures(self.mask, count, "mask"), *size, *shape[2:])
        return Begun(begins, noise, _keeping(clean, noise, mask, sampling))


@dataclass(frozen=True)
class Begun:
    """Latents [N, C, h, w] to begin with, the noise in them, and what each step's sample is replaced by."""

    latents: np.ndarray
    noise: np.ndarray | None = None  # of unit variance; None where it is not known
    adjust: Adjust | None = None


def _keeping(clean: np.ndarray, noise: np.ndarray, mask: np.ndarray, sampling: Sampling) -> Adjust:
    """Outside of the mask [N or 1, 1, h, w] the sample after a call is the image, noised for the next one."""

    def keep(index: int, sample: np.ndarray) -> np.ndarray:
        last = index + 1 == len(sampling.timesteps)
        image = clean if last else _noised(clean, noise, sampling.levels[index + 1])
        return (1 - mask) * image + mask * sample

    return keep


def _noised(clean: np.ndarray, noise: np.ndarray, level: tuple[float, float]) -> np.ndarray:
    alpha, sigma = (np.float32(value) for value in level)
    return np.asarray(alpha * clean + sigma * noise)


def _encoded(
    encoder: Session,
    pictures: np.ndarray,
    latent: Mapping[str, Any],
    generators: Sequence[Generator],
    shape: tuple[int, ...],
) -> np.ndarray:
    """Latents [N, C, h, w], drawn from what the encoder says of pictures [N or 1, 3, H, W], scaled."""
    rows = []
    parameters = [encoder.run({"sample": picture[None]})["latent_parameters"] for picture in pictures]
    if parameters[0].shape != (1, 2 * shape[1], *shape[2:]):
        raise DiffpressError(f"the VAE encoder gives {list(parameters[0].shape)} for {list(shape)}: compress again")
    for index, generator in enumerate(generators):
        mean, variance = np.split(parameters[index % len(parameters)], 2, axis=1)
        deviation = np.exp(np.float32(0.5) * np.clip(variance, SMALLEST, LARGEST))
        rows.append(mean + deviation * generator.randn(shape))
    drawn = np.concatenate(rows)
    return (drawn - np.float32(latent.get("shift_factor") or 0.0)) * np.float32(latent["scaling_factor"])


def _pictures(given: Picture, count: int, what: str) -> list[Image.Image]:
    pictures = [given] if isinstance(given, Image.Image) else list(given)
    if not all(isinstance(picture, Image.Image) for picture in pictures):
        raise DiffpressError(f"{what} must be a PIL image, or one for each prompt")
    if len(pictures) not in (1, count):
        raise DiffpressError(f"{count} prompts but {len(pictures)} of {what}: give one for all or one for each")
    return pictures


def prepare(encoder: Callable[[], Session]) -> Session:
    """The VAE encoder, ready for one picture."""
    session = encoder()
    session.prepare(1)
    return session
