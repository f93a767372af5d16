"""CLIP's tokenizer without transformers: byte-level BPE (Radford et al. 2021; BPE: Sennrich et al. 2016).

Equal to transformers 5's CLIPTokenizer: special tokens are cut out, the text is normalised (NFC, white space,
lower case), split into words, written in an alphabet of printable bytes, and merged pair by pair.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from diffpress.errors import DiffpressError

END_OF_WORD = "</w>"
ROLES = {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>", "unk": "<|endoftext|>"}
# `\s` of the original is Unicode's White_Space; Python's own `\s` also has the four separators \x1c-\x1f.
WHITE_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
# The original asks for \p{L} and \p{N}, which `re` lacks; it runs on the word's outline (see `_outline`) instead.
WORDS = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[A-Za-z]+|[0-9]|[^ A-Za-z0-9]+")
# The byte-level step splits once more; of what WORDS finds, this only touches the two marks written in capitals.
PIECES = re.compile(r"[A-Za-z]+|[^A-Za-z]+")


@dataclass(frozen=True)
class Special:
    """A token that is cut out of the text before anything else; unless `normalized`, exactly as it is written."""

    content: str
    id: int
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary, merges in order of rank, and how a row of ids is completed: begin, words, end, padding."""

    vocabulary: Mapping[str, int]
    ranks: Mapping[tuple[str, str], int]
    specials: tuple[Special, ...]
    begin: int
    end: int
    pad: int
    unknown: int
    length: int

    @classmethod
    def load(cls, folder: str | Path, length: int | None = None) -> Tokenizer:
        """Read transformers' files: tokenizer.json, or vocab.json and merges.txt, beside tokenizer_config.json.

        `length` is the number of ids per row; None takes the configuration's. Raises `DiffpressError` when a file is
        missing or broken, or when it is another kind of tokenizer.
        """
        path = Path(folder)
        try:
            return _load(path, length)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DiffpressError(f"{path} holds no readable CLIP tokenizer: {error!r}") from error

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Ids int64 [N, T] of the texts, cut and padded to the tokenizer's length."""
        rows = np.full((len(texts), self.length), self.pad, np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.begin, *self._ids(text, self.length - 2), self.end]
            row[: len(ids)] = ids
        return rows

    def _ids(self, text: str, limit: int) -> list[int]:
        ids: list[int] = []
        for part in _cut(text, [special for special in self.specials if not special.normalized]):
            pieces = [part] if isinstance(part, int) else self._pieces(part)
            for piece in pieces:
                ids += [piece] if isinstance(piece, int) else self._word(piece)
                if len(ids) >= limit:
                    return ids[:limit]
        return ids

    def _pieces(self, text: str) -> Iterator[str | int]:
        for part in _cut(normalize(text), [special for special in self.specials if special.normalized]):
            yield from [part] if isinstance(part, int) else split(part)

    def _word(self, word: str) -> list[int]:
        letters = [_byte_letters()[byte] for byte in word.encode("utf-8")]
        letters[-1] += END_OF_WORD
        known = [letter if letter in self.vocabulary else "" for letter in letters]
        return [self.vocabulary.get(piece, self.unknown) for piece in merge(known, self.ranks)]


def normalize(text: str) -> str:
    """NFC, runs of white space to one space, lower case (letter by letter: a final sigma is like any other)."""
    spaced = WHITE_SPACE.sub(" ", unicodedata.normalize("NFC", text))
    return spaced.lower() if spaced.isascii() else "".join(letter.lower() for letter in spaced)


def split(text: str) -> Iterator[str]:
    """Words of a normalised text: contractions, runs of letters, single digits, runs of anything else."""
    outline = text if text.isascii() else "".join(_outline(letter) for letter in text)
    for match in WORDS.finditer(outline):
        word = text[match.start() : match.end()]
        yield from PIECES.findall(word) if word.startswith("<|") and word.endswith("|>") else [word]


def merge(pieces: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Join neighbours, always the pair of lowest rank, everywhere it stands, until no pair has a rank."""
    while len(pieces) > 1:
        pairs = set(pairwise(pieces))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined, index = [], 0
        while index < len(pieces):
            found = tuple(pieces[index : index + 2]) == best
            joined.append("".join(best) if found else pieces[index])
            index += 2 if found else 1
        pieces = joined
    return pieces


def _outline(letter: str) -> str:
    """An ASCII character of the same kind, for a regular expression that only knows ASCII."""
    if letter.isascii():
        return letter
    if WHITE_SPACE.match(letter):
        return " "
    return {"L": "a", "N": "0"}.get(unicodedata.category(letter)[0], "!")


def _cut(text: str, specials: Sequence[Special]) -> Iterator[str | int]:
    """The text between special tokens, and their ids."""
    if not specials:
        yield text
        return
    ordered = sorted(specials, key=lambda special: -len(special.content))  # the longest wins
    forms = [r"\s*" * s.lstrip + re.escape(s.content) + r"\s*" * s.rstrip for s in ordered]
    place = 0
    for match in re.finditer("|".join(f"({form})" for form in forms), text):
        yield text[place : match.start()]
        yield ordered[(match.lastindex or 1) - 1].id
        place = match.end()
    yield text[place:]


@cache
def _byte_letters() -> tuple[str, ...]:
    """A printable character for each byte, GPT-2's choice: itself where that is printable, else from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return tuple(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def _load(folder: Path, length: int | None) -> Tokenizer:
    config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    whole = folder / "tokenizer.json"
    if whole.is_file():
        document = _read_json(whole)
        model, added = document["model"], document["added_tokens"]
        if model["type"] != "BPE" or model["end_of_word_suffix"] != END_OF_WORD:
            raise DiffpressError(f"{whole} is not a CLIP tokenizer, which is the kind that is supported")
        vocabulary, merges = model["vocab"], model["merges"]
    else:
        vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        added = [{"id": int(id), **entry} for id, entry in config.get("added_tokens_decoder", {}).items()]
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in merges)
    ranks = {(first, second): rank for rank, (first, second) in enumerate(pairs)}
    flags = ("content", "id", "normalized", "lstrip", "rstrip")
    specials = {entry["content"]: Special(**{name: entry[name] for name in flags}) for entry in added}
    entries = [config.get(f"{role}_token") or default for role, default in ROLES.items()]
    contents = [entry["content"] if isinstance(entry, dict) else entry for entry in entries]
    # As in transformers: a token that two roles share is matched exactly as soon as one of them is given as text.
    exact = {content for content, entry in zip(contents, entries, strict=True) if not _is_normalized(entry)}
    for content in contents:
        if content not in specials:
            specials[content] = Special(content, vocabulary[content], content not in exact)
    size = config["model_max_length"] if length is None else length
    if not 2 < size <= 65536:
        raise ValueError(f"rows of {size} tokens")
    begin, end, pad, unknown = (specials[content].id for content in contents)
    return Tokenizer(vocabulary, ranks, tuple(specials.values()), begin, end, pad, unknown, int(size))


def _is_normalized(entry: str | dict[str, Any]) -> bool:
    return isinstance(entry, dict) and bool(entry.get("normalized"))
