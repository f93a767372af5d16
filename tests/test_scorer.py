"""What `begin` gives a work to judge its pictures by: `shapes` has networks for it, other models have not."""

from pathlib import Path

import pytest

from diffpress import api
from diffpress.compress.cache.deepcache import CachePass
from diffpress.compress.recipe import Recipe
from diffpress.errors import DiffpressError

RECIPE = Recipe(name="any")


def test_shapes_is_scored_as_it_draws_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "SCORED_IMAGES", 3)
    work = api.begin("shapes", RECIPE, steps=4, quiet=True)
    assert work.scorer is not None
    accuracy, clip = work.scorer("accuracy"), work.scorer("clip")
    assert 0 <= accuracy <= 100 and 0 < clip < 100
    assert work.scorer("clip") == clip  # the same prompts and noise
    unet = work.pipeline.unet
    CachePass(interval=2, branch=0).apply(work)
    assert work.scorer("clip") != clip  # under the step program
    assert work.pipeline.unet is unet
    with pytest.raises(DiffpressError, match="'beauty'"):
        work.scorer("beauty")


def test_other_models_have_no_scorer(tiny_pipeline: Path) -> None:
    assert api.begin(str(tiny_pipeline), RECIPE, steps=4, quiet=True).scorer is None
