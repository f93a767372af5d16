"""U-Nets with Stable Diffusion's topology (`UNet2DConditionModel`): their layers in order; graphs are in `unet_graph`.

The down and up paths are read as two flat lists of layers. Skip 0 is `conv_in`'s output, down layer u makes skip u + 1,
and up layer k consumes skip `len(up) - 1 - k`. A cache at branch b keeps the hidden state that enters up layer
`len(up) - 1 - b`; a step that reads it needs `conv_in`, the first b down layers and the last b + 1 up layers
(Ma et al. 2023, DeepCache, Figure 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.calibration import structure
from diffpress.calibration.conditions import TEXT, Text, named
from diffpress.errors import DiffpressError

# Conditions that this adapter does not pass on; a model that has one is refused by name.
_UNSUPPORTED = ("class_embed_type", "encoder_hid_dim", "time_cond_proj_dim", "timestep_post_act")
SIZES = 6  # numbers of a picture's size that are added to the time: original size, crop and target size


@dataclass(frozen=True)
class Layer:
    """One step of the down or up path; `resample` comes after resnet and attention, or alone on the way down."""

    resnet: nn.Module | None
    attention: nn.Module | None
    resample: nn.Module | None

    def __call__(self, hidden: Tensor, time: Tensor, text: Tensor) -> Tensor:
        if self.resnet is not None:
            hidden = self.resnet(hidden, time)
        if self.attention is not None:
            hidden = self.attention(hidden, encoder_hidden_states=text, return_dict=False)[0]
        return hidden if self.resample is None else self.resample(hidden)


def check(denoiser: Any) -> None:
    """Raise `DiffpressError` unless `denoiser` is a U-Net that this adapter runs exactly."""
    name = type(denoiser).__name__
    if name != "UNet2DConditionModel":
        raise DiffpressError(f"denoiser {name} is not supported yet: diffpress compresses UNet2DConditionModel")
    set_fields = [field for field in _UNSUPPORTED if getattr(denoiser.config, field, None) is not None]
    if "time_cond_proj_dim" in set_fields:
        raise DiffpressError(
            "a U-Net that takes the guidance scale as an input (time_cond_proj_dim, as distilled LCMs have it) is not "
            "supported yet: fuse an LCM-LoRA into the ordinary model and take the schedule pass with solver lcm"
        )
    if getattr(denoiser.config, "addition_embed_type", None) not in (None, "text_time"):
        set_fields.append(f"addition_embed_type {denoiser.config.addition_embed_type}")
    if set_fields:
        raise DiffpressError(f"a U-Net with {', '.join(set_fields)} is not supported yet")
    takes, gives = denoiser.config.in_channels, denoiser.config.out_channels
    if takes != gives:
        raise DiffpressError(
            f"a U-Net that takes {takes} channels and answers with {gives} (made for inpainting, depth or editing) "
            "is not supported yet: take the ordinary model, which inpaints with 'diffpress run --image --mask'"
        )
    for block in [*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks]:
        if not hasattr(block, "resnets"):
            raise DiffpressError(f"a U-Net with {type(block).__name__} is not supported yet")


def conditions(unet: Any, tokens: int = 1) -> dict[str, tuple[int, ...]]:
    """The inputs beside sample and timestep in their order, and the shape of each without the batch.

    The text comes first; what follows is added to the time embedding, as `time_embedding` does it.
    """
    found: dict[str, tuple[int, ...]] = {TEXT: (tokens, unet.config.cross_attention_dim)}
    if getattr(unet.config, "addition_embed_type", None) == "text_time":
        pooled = unet.add_embedding.linear_1.in_features - SIZES * unet.config.addition_time_embed_dim
        found |= {"text_embeds": (pooled,), "time_ids": (SIZES,)}
    return found


def latent_size(unet: Any) -> tuple[int, int]:
    """Height and width of the latents that a U-Net is made for."""
    size = unet.config.sample_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _pairs(block: Any) -> list[tuple[nn.Module, nn.Module | None]]:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return list(zip(block.resnets, attentions, strict=True))


def down_layers(unet: Any) -> list[Layer]:
    """The down path in order, a layer per skip that it makes."""
    layers = []
    for block in unet.down_blocks:
        layers += [Layer(resnet, attention, None) for resnet, attention in _pairs(block)]
        layers += [Layer(None, None, resample) for resample in block.downsamplers or []]
    return layers


def up_layers(unet: Any) -> list[Layer]:
    """The up path in order, a layer per skip that it consumes."""
    layers = []
    for block in unet.up_blocks:
        pairs = _pairs(block)
        for index, (resnet, attention) in enumerate(pairs):
            resample = block.upsamplers[0] if block.upsamplers and index == len(pairs) - 1 else None
            layers.append(Layer(resnet, attention, resample))
    return layers


def branches(unet: Any) -> int:
    """How many cache branches there are; branch b keeps b + 1 up layers. The last one would cache the mid block."""
    return len(up_layers(unet))


def entrance(unet: Any, sample: Tensor, timesteps: Tensor, text: Text) -> tuple[Tensor, Tensor]:
    """What caches that decide at run time look at: (modulated, residual), both [N, C, H, W], of the first layer.

    `modulated` is what its ResBlock makes of the normalised input and the time embedding, as its second convolution
    takes it; `residual` is what the layer adds to `conv_in`'s output.
    """
    layer = down_layers(unet)[0]
    resnet: Any = layer.resnet
    modulated: list[Tensor] = []
    hidden = unet.conv_in(2 * sample - 1 if unet.config.center_input_sample else sample)
    hook = resnet.conv2.register_forward_pre_hook(lambda _, inputs: modulated.append(inputs[0]))
    try:
        given = named(text)
        output = layer(hidden, time_embedding(unet, timesteps, given), given[TEXT])
    finally:
        hook.remove()
    return modulated[0], output - hidden


def quantizable(unet: Any) -> dict[str, nn.Conv2d | nn.Linear]:
    """Module path to Conv2d or Linear, without first and last convolution and time modules (small, sensitive)."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        and name not in ("conv_in", "conv_out")
        and not name.startswith(("time_embedding", "add_embedding"))
        and not name.endswith("time_emb_proj")
    }


def unhandled(unet: Any) -> list[str]:
    """Module paths of layers with a weight matrix that nothing here quantizes, with their class."""
    return [
        f"{name} ({type(module).__name__})"
        for name, module in unet.named_modules()
        if not isinstance(module, nn.Conv2d | nn.Linear)
        and isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.ndim > 1
    ]


def units(unet: Any) -> dict[str, nn.Module]:
    """Module path to the parts that are reconstructed one after the other, in forward order.

    ResBlocks, transformers, and the resampling convolutions between them (Li et al. 2023, Q-Diffusion, Section 3.2).
    """
    mid = unet.mid_block
    ordered: list[nn.Module | None] = []
    for layer in down_layers(unet):
        ordered += [layer.resnet, layer.attention, layer.resample]
    if mid is not None:
        attentions = list(getattr(mid, "attentions", None) or [])
        ordered.append(mid.resnets[0])
        for index, resnet in enumerate(mid.resnets[1:]):
            ordered += [attentions[index] if index < len(attentions) else None, resnet]
    for layer in up_layers(unet):
        ordered += [layer.resnet, layer.attention, layer.resample]
    paths = {id(module): name for name, module in unet.named_modules()}
    return {paths[id(module)]: module for module in ordered if module is not None}


def in_forward_order(unet: Any, paths: Iterable[str]) -> list[str]:
    """Module paths in the order of the units in which they lie, and as they were within one; others come last."""
    order = list(units(unet))

    def place(path: str) -> int:
        return next((index for index, unit in enumerate(order) if f"{path}.".startswith(f"{unit}.")), len(order))

    return sorted(paths, key=place)


def narrowed(unet: Any) -> dict[str, list[int]]:
    """Module path to [how many parts are left, their size], of what was cut; nothing for a whole U-Net."""
    return structure.widths(unet)


def attention_layers(unet: Any) -> dict[str, nn.Linear]:
    """Module path to the query, key, value and output projections of every attention."""
    ends = (".to_q", ".to_k", ".to_v", ".to_out.0")
    return {
        name: module for name, module in unet.named_modules() if name.endswith(ends) and isinstance(module, nn.Linear)
    }


def feed_forward_layers(unet: Any) -> dict[str, nn.Linear]:
    """Module path to the linear layers of every feed-forward network."""
    return {
        name: module for name, module in unet.named_modules() if ".ff.net." in name and isinstance(module, nn.Linear)
    }


def concatenations(unet: Any) -> dict[str, int]:
    """Module path to each convolution that reads [hidden, skip] joined, and how many channels of it are hidden."""
    paths = {id(module): name for name, module in unet.named_modules()}
    skips = _skip_channels(unet)
    result = {}
    for layer in up_layers(unet):
        skip = skips.pop()
        resnet: Any = layer.resnet
        for module in (resnet.conv1, resnet.conv_shortcut):
            if module is not None:
                result[paths[id(module)]] = module.in_channels - skip
    return result


def _skip_channels(unet: Any) -> list[int]:
    """Channels of every skip, in the order they are made."""
    channels = [unet.conv_in.out_channels]
    for layer in down_layers(unet):
        # A resampling keeps what came before it unless it is a convolution of another width.
        module: Any = layer.resnet if layer.resnet is not None else getattr(layer.resample, "conv", None)
        channels.append(getattr(module, "out_channels", channels[-1]))
    return channels


def time_layers(unet: Any) -> dict[str, nn.Linear]:
    """Module path to the linear layers that depend on the timestep alone: the embedding's, and every projection of it.

    The "temporal information block" of Huang et al. 2024 (TFMQ-DM, Section 4.1). Empty once a table replaces it. Where
    conditions are added to the embedding, what projects the sum depends on them, too, and the embedding alone counts.
    """
    own = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("time_embedding.")
    }
    return own if mixes_conditions(unet) else own | projections(unet)


def mixes_conditions(unet: Any) -> bool:
    """Whether conditions are added to the time embedding, so that ResBlocks project more than time."""
    return len(conditions(unet)) > 1


def projections(unet: Any) -> dict[str, nn.Linear]:
    """Module path to every ResBlock's own projection of the time embedding that no table replaces."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(".time_emb_proj")
    }


def time_projections(unet: Any) -> dict[str, Any]:
    """Module path to every ResBlock that projects the time embedding and adds it."""
    return {
        name: module
        for name, module in unet.named_modules()
        if getattr(module, "time_emb_proj", None) is not None and module.time_embedding_norm == "default"
    }


def time_embedding(unet: Any, timesteps: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
    """The embedding [N, D] of timesteps [N], before the ResBlocks' own projections.

    `given` are the denoiser's other inputs by name; those that it adds to the embedding are added.
    """
    projected = unet.time_proj(timesteps)
    if projected.is_floating_point():
        projected = projected.to(unet.conv_in.weight.dtype)
    embedded = unet.time_embedding(projected)
    if given is not None and mixes_conditions(unet):
        pooled, sizes = given["text_embeds"], given["time_ids"]
        sinusoids = unet.add_time_proj(sizes.flatten()).unflatten(0, sizes.shape).flatten(1)
        embedded = embedded + unet.add_embedding(torch.cat([pooled, sinusoids.to(pooled.dtype)], dim=-1))
    return embedded if unet.time_embed_act is None else unet.time_embed_act(embedded)
