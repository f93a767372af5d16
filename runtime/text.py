"""Prompts to what the denoiser is told: one or more text encoders, each with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffpress.errors import DiffpressError
from diffpress.runtime.backends import Session
from diffpress.runtime.program import HIDDEN
from diffpress.runtime.tokenizer import Tokenizer

ALONE = ({"name": "text_encoder", "tokenizer": "tokenizer", "hidden": "last_hidden_state", "added": []},)


@dataclass(frozen=True)
class TextEncoder:
    """One encoder: its output `hidden` [N, T, D] is text, those of `added` [N, ...] are conditions of their names."""

    tokenizer: Tokenizer
    session: Session
    hidden: str
    added: tuple[str, ...] = ()


@dataclass(frozen=True)
class Texts:
    """All encoders of a bundle, and the `constant` conditions [...] that every text comes with.

    `zeros` says that zeros stand for a negative prompt that is not given, as some models were trained; it is "" to the
    others.
    """

    encoders: tuple[TextEncoder, ...]
    constant: Mapping[str, np.ndarray]
    zeros: bool = False

    @classmethod
    def load(
        cls, manifest: Mapping[str, Any], tokenizer: Callable[[str], Tokenizer], graph: Callable[[str], Session]
    ) -> Texts:
        """As the manifest of a bundle says; `tokenizer` and `graph` open the parts of a name."""
        text = manifest["text"]
        encoders = [
            TextEncoder(tokenizer(part["tokenizer"]), graph(part["name"]), part["hidden"], tuple(part["added"]))
            for part in text.get("encoders", ALONE)
        ]
        for encoder in encoders:
            missing = {encoder.hidden, *encoder.added} - encoder.session.outputs.keys()
            if missing:
                raise DiffpressError(f"a text encoder's graph has no output '{missing.pop()}': compress again")
        constant = {name: np.array(value, np.float32) for name, value in manifest.get("conditions", {}).items()}
        return cls(tuple(encoders), constant, bool(text.get("zeros", False)))

    @property
    def added(self) -> tuple[str, ...]:
        """The conditions beside the text."""
        return (*(name for encoder in self.encoders for name in encoder.added), *self.constant)

    def prepare(self, batch: int) -> None:
        """Make the encoders ready for so many texts."""
        for encoder in self.encoders:
            encoder.session.prepare(batch)

    def encode(self, prompts: Sequence[str], negative: str | None, guided: bool) -> dict[str, np.ndarray]:
        """The denoiser's conditions by input, [N, ...]; [2 N, ...] if `guided`, the negative prompt's rows first."""
        zeros = guided and negative is None and self.zeros
        first = [negative or ""] if guided and not zeros else []
        found: dict[str, list[np.ndarray]] = {}
        for encoder in self.encoders:
            made = encoder.session.run({"input_ids": encoder.tokenizer.encode([*first, *prompts])})
            for source, name in ((encoder.hidden, HIDDEN), *((name, name) for name in encoder.added)):
                found.setdefault(name, []).append(made[source])
        told = {name: np.concatenate(parts, axis=-1) for name, parts in found.items()}
        count = len(prompts)
        if zeros:
            told = {name: np.concatenate([np.zeros_like(rows), rows]) for name, rows in told.items()}
        elif guided:
            told = {name: np.concatenate([np.repeat(rows[:1], count, axis=0), rows[1:]]) for name, rows in told.items()}
        rows = len(told[HIDDEN])
        return told | {name: np.repeat(value[None], rows, axis=0) for name, value in self.constant.items()}
