"""What is measured against what: the diffusers reference, dressed as a runtime pipeline, and drawing in batches."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from diffpress.errors import DiffpressError
from diffpress.paths import whole
from diffpress.plan import Sampling

if TYPE_CHECKING:
    from diffpress.calibration.lora import Lora

# What stands in a report, under these names.
REFERENCE, EXPORT, COMPRESSED = "reference_eager", "uncompressed_export", "compressed"
STRICT = "uncompressed_export_same_precision"  # timed where the compressed bundle runs in another precision than fp32
PLAIN = "fewer_plain_steps"
RESCHEDULED = "reference_eager_same_schedule"  # timed where the compressed bundle has another schedule than its model


class Candidate(Protocol):
    """Draws images: `runtime.pipeline.Pipeline`, or something that looks like it."""

    def __call__(self, prompts: list[str], seeds: list[int], *, keep_latents: bool = False) -> Any:
        """Returns `runtime.pipeline.Images`."""


@dataclass(frozen=True)
class Reference:
    """A diffusers pipeline in FP32, eager, bound to a sampling schedule."""

    pipeline: Any
    sampling: Sampling

    @classmethod
    def load(cls, model: str, sampling: Sampling, scheduler: Mapping[str, Any], loras: Sequence[Lora] = ()) -> Self:
        """Open `model`; `scheduler` is the manifest's entry {class, config}, whatever the folder itself prefers.

        `loras` are fused, as they are in what it is compared with. A schedule that this scheduler does not make by
        itself (explicit timesteps or sigmas) is played from its table.
        """
        import diffusers

        from diffpress.calibration.model import load_pipeline
        from diffpress.calibration.tabulated import playing

        pipeline = load_pipeline(model, loras)
        configured = getattr(diffusers, scheduler["class"]).from_config(dict(scheduler["config"]))
        pipeline.scheduler = playing(configured, sampling)
        return cls(pipeline, sampling)

    def on(self, sampling: Sampling) -> Reference:
        """The same networks, bound to another schedule."""
        from diffpress.calibration.tabulated import playing

        pipeline = copy.copy(self.pipeline)
        pipeline.scheduler = playing(self.pipeline.scheduler, sampling)
        return Reference(pipeline, sampling)

    def __call__(self, prompts: list[str], seeds: list[int], *, keep_latents: bool = False) -> Any:
        """Draw one image for each prompt; stages and steps are timed from outside, by what the pipeline calls back."""
        import torch

        from diffpress.runtime.pipeline import Images

        latents: list[np.ndarray] = []
        marks: list[float] = []  # the first denoiser call begins, then each step ends
        on_gpu = self.pipeline.unet.device.type == "cuda"

        def now() -> float:
            if on_gpu:
                torch.cuda.synchronize()  # or the launches alone would be timed
            return time.perf_counter()

        def on_step(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            marks.append(now())
            if keep_latents:
                latents.append(tensors["latents"].numpy(force=True).copy())
            return tensors

        def on_denoiser(*_: Any) -> None:
            if not marks:
                marks.append(now())

        hook = self.pipeline.unet.register_forward_pre_hook(on_denoiser)
        start = now()
        try:
            drawn = self.pipeline(
                list(prompts),
                num_inference_steps=self.sampling.steps,
                guidance_scale=self.sampling.guidance_scale,
                height=self.sampling.height,
                width=self.sampling.width,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="np",
                callback_on_step_end=on_step,
            )
        finally:
            hook.remove()
        end = now()
        return Images(
            pixels=(drawn.images * 255).round().astype(np.uint8),
            latents=latents,
            stage_ms={
                "text": (marks[0] - start) * 1000,
                "denoise": (marks[-1] - marks[0]) * 1000,
                "decode": (end - marks[-1]) * 1000,
            },
            step_ms=[float(step) for step in np.diff(marks) * 1000],
        )


def own_schedule(manifest: Mapping[str, Any]) -> tuple[Sampling, Mapping[str, Any]]:
    """The schedule of the model that a bundle was made from, and its scheduler {class, config}.

    That is what a reference runs; a bundle from before there was a choice has the same schedule as its model.
    """
    entry = manifest.get("reference", manifest)
    return Sampling.from_json(entry["sampling"]), entry["scheduler"]


def loras_of(manifest: Mapping[str, Any]) -> tuple[Lora, ...]:
    """The LoRAs that were fused before compression, from where the recipe found them.

    Raises `DiffpressError` where one is no longer there, or another one is.
    """
    entries = manifest.get("model", {}).get("lora")
    if not entries:
        return ()
    from diffpress.calibration.lora import Lora, described

    loras = tuple(Lora(**entry) for entry in manifest["recipe"]["lora"])
    if described(loras) != entries:
        files = ", ".join(str(lora.file) for lora in loras)
        raise DiffpressError(f"the LoRA of this bundle is not the one that lies at {files}: put it back to compare")
    return loras


@dataclass(frozen=True)
class Drawn:
    """Images uint8 [N, H, W, 3], final latents [N, C, h, w], and all latents of the first K [steps, K, C, h, w]."""

    pixels: np.ndarray
    latents: np.ndarray
    trajectory: np.ndarray


def draw(
    candidate: Candidate,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch: int,
    keep: int = 0,
    on_batch: Callable[[int], object] = lambda _: None,
) -> Drawn:
    """Draw every prompt with its seed, `batch` at a time; all latents are kept of the first `keep` images."""
    pixels, final, steps = [], [], []
    for start in range(0, len(prompts), batch):
        some = slice(start, start + batch)
        images = candidate(list(prompts[some]), list(seeds[some]), keep_latents=True)
        pixels.append(images.pixels)
        final.append(images.latents[-1])
        if start < keep:
            steps.append(np.stack([latent[: keep - start] for latent in images.latents]))
        on_batch(len(images.pixels))
    trajectory = np.concatenate(steps, axis=1) if steps else np.empty((0, 0, *final[0].shape[1:]), np.float32)
    return Drawn(np.concatenate(pixels), np.concatenate(final), trajectory)


def store(file: Path, drawn: Drawn) -> None:
    """Keep what was drawn in a file, whole or not at all, for `stored`."""
    whole(file, lambda part: np.savez(part, **asdict(drawn)))


def stored(file: Path) -> Drawn | None:
    """What an earlier run drew; None where there is no file."""
    if not file.exists():
        return None
    with np.load(file) as arrays:
        return Drawn(**{field.name: arrays[field.name] for field in fields(Drawn)})


def batch_size(latent: Mapping[str, Any]) -> int:
    """How many images fit comfortably together: 16 of 16x16 latents, one of 64x64."""
    size = int(latent["channels"]) * int(latent["height"]) * int(latent["width"])
    return max(1, min(16, 16 * 1024 // size))
