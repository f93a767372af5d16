"""What a denoiser is told beside the sample and the timestep: text, and what its family adds to it.

Most are told a text alone, which is then a plain tensor [N, T, D]. Where there is more, all of it is `Conditions`,
which is cut, moved and joined as the tensor would be; so that what only hands the text on need not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffpress.errors import DiffpressError
from diffpress.plan import Sampling

TEXT = "encoder_hidden_states"  # the denoiser's input of that name


@dataclass(frozen=True)
class Conditions:
    """Text [N, T, D] and added conditions [N, ...] by the names of the denoiser's inputs, a row per sample each."""

    text: Tensor
    added: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.text)

    def __iter__(self) -> Iterator[Tensor]:
        yield self.text
        yield from self.added.values()

    def __getitem__(self, rows: slice | Tensor) -> Conditions:
        return Conditions(self.text[rows], {name: value[rows] for name, value in self.added.items()})

    def to(self, place: Any) -> Conditions:
        """The same on another device, or in another type."""
        return Conditions(self.text.to(place), {name: value.to(place) for name, value in self.added.items()})


Text = Tensor | Conditions


def tensors(text: Text) -> tuple[Tensor, ...]:
    """The text, then what is added, in the order of the denoiser's inputs."""
    return (text,) if isinstance(text, Tensor) else tuple(text)


def named(text: Text) -> dict[str, Tensor]:
    """The same by the names of the denoiser's inputs."""
    return {TEXT: text} if isinstance(text, Tensor) else {TEXT: text.text, **text.added}


def of(named: Mapping[str, Tensor]) -> Text:
    """The inverse of `named`."""
    added = {name: value for name, value in named.items() if name != TEXT}
    return Conditions(named[TEXT], added) if added else named[TEXT]


def equal(a: Text, b: Text) -> bool:
    """Whether both say the same."""
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def cat(texts: Sequence[Text]) -> Text:
    """One after the other, as torch.cat does it."""
    return _joined([named(text) for text in texts], lambda parts: torch.cat(parts))


def interleaved(texts: Sequence[Text]) -> Text:
    """The rows [halves N] of N texts of `halves` rows each: the first rows of all of them, then the second rows."""
    return _joined([named(text) for text in texts], lambda parts: torch.stack(parts, dim=1).flatten(0, 1))


def _joined(parts: Sequence[Mapping[str, Tensor]], join: Any) -> Text:
    return of({name: join([part[name] for part in parts]) for name in parts[0]})


def contents(text: Text) -> bytes:
    """Every byte of it, for digests."""
    return b"".join(tensor.cpu().contiguous().numpy().tobytes() for tensor in tensors(text))


def told(kwargs: Mapping[str, Any]) -> Text:
    """What diffusers tells a U-Net in the keyword arguments of a call."""
    return of({TEXT: kwargs[TEXT], **(kwargs.get("added_cond_kwargs") or {})})


def arguments(text: Text) -> dict[str, Any]:
    """The keyword arguments with which diffusers tells a U-Net the same; the inverse of `told`."""
    if isinstance(text, Tensor):
        return {TEXT: text}
    return {TEXT: text.text, "added_cond_kwargs": dict(text.added)}


class _Told(Exception):
    """The denoiser was told what it is told: the pipeline need not run."""


@torch.no_grad()
def encode(pipeline: Any, prompts: Sequence[str], sampling: Sampling) -> tuple[Text, Text]:
    """What `pipeline` tells its denoiser for N prompts: (conditional, unconditional), of N rows each.

    Asked of the pipeline itself, which is stopped at its first call: every class adds conditions of its own.
    """
    kept: list[Text] = []

    def watch(_: Any, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(told(kwargs))
        raise _Told

    hook = pipeline.unet.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        pipeline(
            list(prompts),
            num_inference_steps=sampling.steps,
            guidance_scale=2.0,  # any that asks for both halves
            height=sampling.height,
            width=sampling.width,
            generator=torch.Generator(),
            output_type="latent",
        )
    except _Told:
        pass
    finally:
        hook.remove()
    if not kept or len(kept[0]) != 2 * len(prompts):
        raise DiffpressError(f"{type(pipeline).__name__} does not tell its denoiser both halves of guidance")
    count = len(prompts)
    return kept[0][count:], kept[0][:count]
