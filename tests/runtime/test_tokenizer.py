import json
import random
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from diffpress.benchmarks.shapes import models, scenes
from diffpress.errors import DiffpressError
from diffpress.runtime.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "a red circle",
    "  A   Large\tBLUE\nsquare, left of the small green star!  ",
    "it's they're we've I'm you'll he'd don't 'tis rock'n'roll ''s '' ' 'S",
    "12 345 6789 3.14 1e-5 ½ ² ٣ Ⅷ x2y",
    "café cafe\u0301 naïve ﬁ ＡＢＣ İstanbul ΣΑΣ ǅ ẞ K ſ's 's\u0301",
    "日本語 中文 한국어 हिन्दी ไทย עברית العربية 😀👩‍👩‍👧 🇩🇪",
    "a\x1cb\x1fc\x85d\u00a0e\u2003f\u2028g\u3000h\u200bi\ufeffj\x00k\u180el\u1680m",
    "<|startoftext|> in <|endoftext|>words<|ENDOFTEXT|> <|startoftext |> <|nothing|> <||>",
    "!!! !? a! hello! #$%&'()*+,-./:;<=>?@[\\]^_`{|}~ --- _a_ a_b -1",
    "antidisestablishmentarianism " * 20,
    "x" * 500,
    "red " * 100,
    "circlecircle redred bluesquare largesmall",
]


def mixed(count: int) -> list[str]:
    """Strings of parts that rarely meet, and captions."""
    random.seed(0)
    kinds = [
        "red",
        "Circle",
        "'s",
        "'ll",
        "'",
        "!",
        "<|endoftext|>",
        " ",
        "\t",
        "7",
        "é",
        "e\u0301",
        "ß",
        "語",
        "😀",
        "²",
        "Σ",
    ]
    kinds += [
        "\u2009",
        "\x1d",
        "\u0130",
        "ing",
        "of",
        "-",
        "<|",
        "|>",
        "startoftext",
        "\u0345",
        "\U0001d400",
        "\u1e9b\u0323",
    ]
    texts = ["".join(random.choices(kinds, k=random.randint(1, 12))) for _ in range(count)]
    return texts + [caption for _, caption in scenes.held_out_captions(20)]


def expected(tokenizer: CLIPTokenizer, texts: list[str], length: int) -> np.ndarray:
    ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True).input_ids
    return np.array(ids, np.int64)


def agree(ours: Tokenizer, theirs: CLIPTokenizer, texts: list[str], length: int) -> None:
    rows, wanted = ours.encode(texts), expected(theirs, texts, length)
    assert rows.dtype == np.int64
    wrong = [(text, a.tolist(), b.tolist()) for text, a, b in zip(texts, rows, wanted, strict=True) if (a != b).any()]
    assert not wrong, wrong[:3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    models.make_tokenizer(path)
    return path


def test_equal_to_transformers(folder: Path) -> None:
    agree(Tokenizer.load(folder), CLIPTokenizer.from_pretrained(folder), TEXTS + mixed(400), models.TOKENS)


def test_equal_to_transformers_when_nothing_is_cut(folder: Path) -> None:
    agree(Tokenizer.load(folder, 700), CLIPTokenizer.from_pretrained(folder), TEXTS + mixed(400), 700)


def old_layout(folder: Path, target: Path, pad: str, normalized: bool) -> Path:
    """The files of Stable Diffusion's first releases: no tokenizer.json, special tokens as dictionaries."""
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    (target / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (target / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    flags = {"lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
    special = {
        f"{role}_token": {"content": f"<|{text}|>", **flags}
        for role, text in (("bos", "startoftext"), ("eos", "endoftext"), ("unk", "endoftext"))
    }
    (target / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": pad}))
    (target / "tokenizer_config.json").write_text(
        json.dumps(
            {"model_max_length": 24, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "pad_token": pad}
        )
    )
    return target


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
@pytest.mark.parametrize("normalized", [True, False])
def test_equal_to_transformers_without_tokenizer_json(folder: Path, tmp_path: Path, pad: str, normalized: bool) -> None:
    path = old_layout(folder, tmp_path, pad, normalized)
    theirs = CLIPTokenizer.from_pretrained(path)
    ours = Tokenizer.load(path)
    assert ours.pad == theirs.pad_token_id
    agree(ours, theirs, TEXTS + mixed(200), 24)


def test_what_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffpressError, match="no readable CLIP tokenizer"):
        Tokenizer.load(tmp_path)
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    document["model"]["type"] = "Unigram"
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(DiffpressError, match="not a CLIP tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DiffpressError, match="no readable CLIP tokenizer"):
        Tokenizer.load(tmp_path)
