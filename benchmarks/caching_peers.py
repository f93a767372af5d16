"""Peers of the caching table, all in torch: the DeepCache package, and diffusers' own cache hooks on a U-Net.

A hook that cannot run on a U-Net, or names no layer of one, has a row with its reason and no numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffpress.benchmarks import caching_tables, candidates, prompts, scores
from diffpress.benchmarks.candidates import Drawn, Reference
from diffpress.benchmarks.recipe_rows import BATCH, compared, file_name
from diffpress.calibration.model import load_pipeline
from diffpress.errors import DiffpressError
from diffpress.paths import write_json
from diffpress.plan import Sampling

BACKEND = "torch eager fp32"
# What a library raises that was not made for U-Nets, beside what it says itself.
FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError)


@dataclass
class Hooked:
    """A pipeline with a peer's hooks in it; `around` is entered for every call. Looks like a runtime pipeline."""

    reference: Reference
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    timestep: int = field(default=0, init=False)  # of the call that is under way

    def __post_init__(self) -> None:
        def listen(_: Any, inputs: tuple[Any, ...]) -> None:
            self.timestep = int(inputs[1])

        self.reference.pipeline.unet.register_forward_pre_hook(listen)

    def __call__(self, prompts: list[str], seeds: list[int], *, keep_latents: bool = False) -> Any:
        with self.around():
            return self.reference(prompts, seeds, keep_latents=keep_latents)


def deepcache(hooked: Hooked, interval: int) -> None:
    """The DeepCache package at branch 0 (Ma et al. 2023)."""
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError as error:
        raise DiffpressError("not installed: pip install 'diffpress[peers]'") from error
    helper = DeepCacheSDHelper(pipe=hooked.reference.pipeline)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()


def attention_broadcast(hooked: Hooked, spatial: int, cross: int) -> None:
    """diffusers' PyramidAttentionBroadcast (Zhao et al. 2024): attention kept for so many steps, t in 100..800."""
    from diffusers import hooks

    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=spatial,
        cross_attention_block_skip_range=cross,
        current_timestep_callback=lambda: hooked.timestep,
    )
    hooks.apply_pyramid_attention_broadcast(hooked.reference.pipeline.unet, config)


def taylorseer(hooked: Hooked, interval: int, layers: str | None) -> None:
    """diffusers' TaylorSeer of order 1 on the layers whose paths match, or on those that it knows by itself."""
    import torch
    from diffusers import hooks

    config = hooks.TaylorSeerCacheConfig(
        cache_interval=interval,
        cache_identifiers=None if layers is None else [layers],
        taylor_factors_dtype=torch.float32,
    )
    hooks.apply_taylorseer_cache(hooked.reference.pipeline.unet, config)


def faster_cache(hooked: Hooked) -> None:
    """diffusers' FasterCache (Lv et al. 2024)."""
    from diffusers import hooks

    config = hooks.FasterCacheConfig(current_timestep_callback=lambda: hooked.timestep, tensor_format="BCHW")
    hooks.apply_faster_cache(hooked.reference.pipeline.unet, config)


def first_block(hooked: Hooked) -> None:
    """diffusers' FirstBlockCache."""
    from diffusers import hooks

    hooks.apply_first_block_cache(hooked.reference.pipeline.unet, hooks.FirstBlockCacheConfig(threshold=0.2))


def magcache(hooked: Hooked) -> None:
    """diffusers' MagCache, ratios all one: nothing is calibrated where it finds no blocks."""
    from diffusers import hooks

    steps = hooked.reference.sampling.steps
    config = hooks.MagCacheConfig(mag_ratios=[1.0] * steps, num_inference_steps=steps)
    hooks.apply_mag_cache(hooked.reference.pipeline.unet, config)


def seacache(hooked: Hooked) -> None:
    """diffusers' SeaCache."""
    from diffusers import hooks

    hooks.apply_sea_cache(hooked.reference.pipeline.unet, hooks.SeaCacheConfig())


@dataclass(frozen=True)
class Peer:
    """How a peer is switched on, and the row of ours with the same settings, if there is one."""

    enable: Callable[[Hooked], None]
    ours: str | None = None
    quick: bool = False


PEERS: dict[str, Peer] = {
    "DeepCache package, interval 2": Peer(lambda pipeline: deepcache(pipeline, 2), "DeepCache, interval 2"),
    "DeepCache package, interval 3": Peer(lambda pipeline: deepcache(pipeline, 3), "DeepCache, interval 3", True),
    "DeepCache package, interval 5": Peer(lambda pipeline: deepcache(pipeline, 5), "DeepCache, interval 5"),
    "diffusers PyramidAttentionBroadcast, 2 and 4": Peer(
        lambda pipeline: attention_broadcast(pipeline, 2, 4), quick=True
    ),
    "diffusers PyramidAttentionBroadcast, 4 and 8": Peer(lambda pipeline: attention_broadcast(pipeline, 4, 8)),
    "diffusers TaylorSeer": Peer(lambda pipeline: taylorseer(pipeline, 3, None)),
    "diffusers TaylorSeer, interval 3, attention named": Peer(
        lambda pipeline: taylorseer(pipeline, 3, r".*attn[12]"), quick=True
    ),
    "diffusers TaylorSeer, interval 3, all modules named": Peer(
        lambda pipeline: taylorseer(pipeline, 3, r".*(attn[12]|ff|resnets\.\d+)")
    ),
    "diffusers FasterCache": Peer(faster_cache),
    "diffusers FirstBlockCache": Peer(first_block, quick=True),
    "diffusers MagCache": Peer(magcache),
    "diffusers SeaCache": Peer(seacache),
}


def opened(peer: Peer, sampling: Sampling) -> Hooked:
    """A pipeline of its own with the peer switched on; raises `DiffpressError` where that does nothing."""
    hooked = Hooked(Reference(load_pipeline("shapes"), sampling))
    before = list(hooked.reference.pipeline.unet.named_modules())
    peer.enable(hooked)
    registries = [module._diffusers_hook for _, module in before if hasattr(module, "_diffusers_hook")]
    if any(registry.hooks for registry in registries):
        hooked.around = lambda: _fresh(hooked.reference.pipeline.unet)
    elif all("forward" not in vars(module) for _, module in before):
        raise DiffpressError("it finds no layer of a U-Net that it knows")
    return hooked


@contextmanager
def _fresh(unet: Any) -> Iterator[None]:
    """diffusers' hooks without what they kept of another image, within a cache context as its transformers set it."""
    from diffusers.hooks import HookRegistry
    from diffusers.models.cache_utils import CacheMixin

    HookRegistry.check_if_exists_or_initialize(unet).reset_stateful_hooks(recurse=True)
    with CacheMixin.cache_context(unet, "both halves"):
        yield


def measured(
    folder: Path,
    quick: bool,
    sampling: Sampling,
    chosen: prompts.Prompts,
    wanted: tuple[Drawn, Drawn],
    judging: scores.Judging,
) -> list[dict[str, Any]]:
    """A row for each peer on the pipeline's own steps, from `folder` where it is there."""
    entries = []
    for name, peer in PEERS.items():
        if quick and not peer.quick:
            continue
        file = folder / f"{file_name(name)}.json"
        if not file.exists():
            write_json(file, measure(name, peer, sampling, chosen, wanted, judging))
        entries.append(json.loads(file.read_text("utf-8")))
    return entries


def measure(
    name: str,
    peer: Peer,
    sampling: Sampling,
    chosen: prompts.Prompts,
    wanted: tuple[Drawn, Drawn],
    judging: scores.Judging,
) -> dict[str, Any]:
    """The peer's row: quality where it runs, else why it does not."""
    found: dict[str, Any] = {}
    params, problem = None, None
    try:
        hooked = opened(peer, sampling)
        params = sum(parameter.numel() for parameter in hooked.reference.pipeline.unet.parameters())
        drawn = candidates.draw(hooked, chosen.texts, list(range(len(chosen.texts))), BATCH)
        found = compared(drawn, wanted, judging)
    except (DiffpressError, *FAILURES) as error:
        problem = (str(error).splitlines() or [type(error).__name__])[0]
    own = {
        key.replace("l2", "l2_full"): value
        for key, value in found.items()
        if key in ("latent_rel_l2", "latent_rel_l2_median")
    }
    return {**blank(name, sampling.steps), **found, **own, "params": params, "problem": problem} | (
        {"bytes": 4 * params, "bits_w": 32, "bits_a": 32} if params else {}
    )


def blank(name: str, steps: int) -> dict[str, Any]:
    """A peer's row before anything is known."""
    keys = ("latent_rel_l2", "latent_rel_l2_converged", "latent_rel_l2_full")
    numbers = [f"{key}{end}" for key in keys for end in ("", "_median")]
    numbers += ["psnr_db", "ssim", "clip_score", "frechet", "attribute_accuracy", "bits_w", "bits_a", "bytes", "params"]
    named: Mapping[str, Any] = {
        "name": name,
        "group": caching_tables.PEERS,
        "full": "fp32",
        "peer": True,
        "backend": BACKEND,
    }
    return {**named, "steps": steps, **dict.fromkeys(numbers), "seconds": None, "deploys": False}
