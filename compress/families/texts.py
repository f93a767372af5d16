"""How pipelines make what their denoiser is told: which text encoders they have and what they take of each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from diffpress.calibration.conditions import encode, named
from diffpress.calibration.model import text_parts
from diffpress.compress.families.unet import conditions
from diffpress.plan import Sampling

LAST, POOLED, STATES = "last_hidden_state", "text_embeds", "hidden_states"
CONSTANT = ("time_ids",)  # conditions that are the same for every text


@dataclass(frozen=True)
class TextPart:
    """A text encoder, and which outputs of its graph the denoiser is told: `hidden` as text, `added` by their names."""

    name: str
    tokenizer: str
    hidden: str
    added: tuple[str, ...] = ()


def text_encoders(pipeline: Any) -> list[TextPart]:
    """The pipeline's text encoders; what they say of each token is joined.

    One alone is asked for its last state; of two, both are asked for the state before the last layer, and the second
    for its embedding of the whole text (Podell et al. 2023, SDXL, Section 2.1).
    """
    pairs = text_parts(pipeline)
    if len(pairs) == 1:
        return [TextPart(*pairs[0], LAST)]
    states = [f"{STATES}.{getattr(pipeline, name).config.num_hidden_layers - 1}" for name, _ in pairs]
    added: tuple[tuple[str, ...], ...] = ((), (POOLED,))
    return [TextPart(*pair, state, more) for pair, state, more in zip(pairs, states, added, strict=True)]


def outputs(encoder: Any, part: TextPart) -> tuple[str, ...]:
    """All that ONNX pipelines look for in an encoder's graph: every state, where one in the middle is asked for."""
    layers = encoder.config.num_hidden_layers if part.hidden != LAST else 0
    return (*part.added, LAST, *(f"{STATES}.{index}" for index in range(layers)))


def tokens(pipeline: Any) -> int:
    """Length of an encoded prompt."""
    return int(pipeline.tokenizer.model_max_length)


def constant(pipeline: Any, sampling: Sampling) -> dict[str, Tensor]:
    """The conditions [1, ...] that are the same for every text, as the pipeline has them for the picture's size."""
    if not any(name in CONSTANT for name in conditions(pipeline.unet)):
        return {}
    told = named(encode(pipeline, [""], sampling)[0])
    return {name: told[name] for name in CONSTANT}


def entry(pipeline: Any) -> dict[str, Any]:
    """The manifest's: how the runtime makes the text that the denoiser is told."""
    return {
        "hidden": pipeline.unet.config.cross_attention_dim,
        "tokens": tokens(pipeline),
        "encoders": [{**asdict(part), "added": list(part.added)} for part in text_encoders(pipeline)],
        # Without a negative prompt, zeros stand for it, not what the encoders make of "".
        "zeros": bool(pipeline.config.get("force_zeros_for_empty_prompt", False)),
    }
