"""A bundle as a diffusers pipeline: its networks run on an inference library, everything else is diffusers'.

It stands on top of the package, beside `api`: it needs the runtime, which never imports torch, and torch and diffusers,
which are installed wherever somebody wants a diffusers pipeline. What takes the networks' places is in `standins`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from diffpress.bundle import CONTROLNET, MANIFEST, Bundle
from diffpress.calibration import model
from diffpress.clock import Clock, watch
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, Plan, Sampling
from diffpress.runtime import backends
from diffpress.runtime.backends import Session
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.text import ALONE
from diffpress.standins import PenultimateTextEncoder, TextEncoder, Unet, Vae


def load_pipeline(source: str | Path | Bundle, backend: str = "auto", precision: str = "auto") -> Any:
    """A `StableDiffusionPipeline` whose denoiser, VAE and text encoder run on a backend, as `Pipeline.load` opens it.

    Of SDXL it is a `StableDiffusionXLPipeline`. Its parts go on in `StableDiffusionImg2ImgPipeline.from_pipe` and its
    like. A diffusers folder, whose U-Net may have parts cut out, opens as the ordinary pipeline that it is and runs in
    torch. Raises `DiffpressError` where there is no bundle, or it does not run here. The pipeline raises it for a
    resolution that the graphs do not have and, where the plan is of one schedule, for another scheduler or step count.
    """
    import diffusers
    from diffusers.configuration_utils import FrozenDict
    from transformers import CLIPTextConfig, CLIPTokenizer

    if not isinstance(source, Bundle) and _is_folder(Path(source)):
        if (backend, precision) != ("auto", "auto"):
            raise DiffpressError(f"{source} is a diffusers folder, which runs in torch: compress it for a backend")
        return model.load_pipeline(str(source))
    opened = Pipeline.load(source, backend, precision)
    bundle = opened.bundle

    def open_graph(name: str) -> Session:
        if name not in bundle.manifest["files"]:
            raise DiffpressError(f"{bundle.path} does not list the file {name}: compress again")
        return backends.open_session(bundle.file(name), opened.backend, opened.precision)

    scheduler, clock = _scheduler(bundle, opened.sampling), None
    if _bound(bundle):
        clock = Clock(opened.sampling)
        watch(scheduler, clock)
    graphs = {**bundle.manifest["graphs"], **bundle.manifest.get("dialects", {}).get(opened.backend, {})}
    controlled = None
    if CONTROLNET in graphs:
        controlled = functools.cache(lambda: open_graph(graphs[CONTROLNET]))
    parts = {
        "vae": Vae(FrozenDict(_read(bundle, "vae_decoder")), opened.vae_decoder, opened.vae_encoder),
        "unet": Unet(FrozenDict(_read(bundle, "unet")), opened.denoiser, clock, controlled, opened.texts.added),
        "scheduler": scheduler,
        "feature_extractor": None,
    }
    large = len(opened.texts.encoders) > 1 or opened.texts.added
    kind = PenultimateTextEncoder if large else TextEncoder
    for entry, encoder in zip(bundle.manifest["text"].get("encoders", ALONE), opened.texts.encoders, strict=True):
        config = CLIPTextConfig.from_dict(_read(bundle, entry["name"]))
        parts[entry["name"]] = kind(config, encoder)
        parts[entry["tokenizer"]] = CLIPTokenizer.from_pretrained(
            str(bundle.file(entry["tokenizer"])), local_files_only=True
        )
    if large:
        zeros = opened.texts.zeros
        pipeline = diffusers.StableDiffusionXLPipeline(
            **parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False
        )
    else:
        pipeline = diffusers.StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _is_folder(folder: Path) -> bool:
    """Whether it is a diffusers folder; a bundle has an index, too, even one that lost its manifest."""
    ours = folder / MANIFEST, folder / "unet" / "model.onnx"
    return (folder / "model_index.json").is_file() and not any(file.exists() for file in ours)


def _read(bundle: Bundle, part: str) -> dict[str, Any]:
    """The configuration of a part."""
    try:
        found: dict[str, Any] = json.loads(bundle.file(f"{part}/config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DiffpressError(f"{bundle.path} holds no readable {part}/config.json: compress again") from error
    return found


def _scheduler(bundle: Bundle, sampling: Sampling) -> Any:
    """What draws the bundle's schedule: its own scheduler, or its table where no scheduler makes that by itself."""
    import diffusers

    from diffpress.calibration.tabulated import playing

    entry = bundle.manifest["scheduler"]
    configured = getattr(diffusers, entry["class"]).from_config(dict(entry["config"]))
    return playing(configured, sampling)


def _bound(bundle: Bundle) -> bool:
    """Whether anything in the bundle is right on its own schedule alone."""
    plan = Plan.load(bundle.file("plan"))
    scales = [layer.input_scale for layer in plan.quantization.values()]
    by_step = any(scale is not None and scale.size > 1 for scale in scales)
    return bool(set(plan.program.steps) != {FULL} or plan.program.guidance or plan.temporal is not None or by_step)
