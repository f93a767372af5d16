"""Recipes: what is read, and what is refused with one line that names the key."""

from dataclasses import asdict
from pathlib import Path

import pytest

from diffpress.compress import recipe
from diffpress.compress.cache.deepcache import CachePass
from diffpress.errors import DiffpressError


def test_every_shipped_recipe_loads_and_says_what_was_measured() -> None:
    assert set(recipe.presets()) == {"fp32", "int8", "cache", "cachequant", "balanced", "fast", "max"}
    for name, file in recipe.presets().items():
        loaded = recipe.load(name)
        assert loaded.name == name
        assert loaded.description
        assert file.read_text().startswith("# On `shapes`"), f"{name} does not state its measured result"


def test_fields_reach_the_pass(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("steps: 20\npasses:\n  - cache: {interval: 4, branch: 1}\n")
    loaded = recipe.load(str(file))
    assert loaded.name == "mine"
    assert loaded.steps == 20
    assert loaded.built() == [("cache", CachePass(interval=4, branch=1))]
    assert recipe.as_json(loaded)["passes"] == [{"cache": asdict(CachePass(interval=4, branch=1))}]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("passes:\n  - cache: {intervall: 4}\n", "unknown key 'intervall'"),
        ("passes:\n  - cache: {interval: 1}\n", "'interval'"),
        ("passes:\n  - cache: {interval: many}\n", "'interval'"),
        ("passes:\n  - quantize: {format: int3}\n", "'format'"),
        ("passes:\n  - magcache: {threshold: -1}\n", "'threshold'"),
        ("passes:\n  - magcache: {retain: 1}\n", "'retain'"),
        ("passes:\n  - freeze: {rule: taylor}\n", "'rule'"),
        ("passes:\n  - freeze: {max_consecutive: 0}\n", "'max_consecutive'"),
        ("passes:\n  - tgate: {gate: 0}\n", "'gate'"),
        ("passes:\n  - tgate: {guidance: both}\n", "'guidance'"),
        ("passes:\n  - squeeze\n", "no pass 'squeeze'"),
        ("passes:\n  - {cache: {}, quantize: {}}\n", "one 'name: fields' entry"),
        ("stepps: 4\n", "unknown key 'stepps'"),
        ("gates: [speedup => 3]\n", "gate 'speedup => 3' is not understood.*metrics: speedup"),
        ("gates: [beauty > 3]\n", "nothing measures 'beauty'"),
        ("gates: [psnr >= 1%]\n", "psnr is not measured in '%'"),
        ("gates: speedup >= 3\n", "'gates'"),
        ("steps: 0\n", "'steps'"),
        ("passes: 5\n", "'passes'"),
        ("- a\n", "must be a mapping"),
        ("passes: [\n", "not readable YAML"),
        ("", "must be a mapping"),
    ],
)
def test_bad_recipes_are_refused_by_name(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(DiffpressError, match=told) as caught:
        recipe.load(str(file))
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(DiffpressError, match="balanced"):
        recipe.load("tiny")
