from pathlib import Path

import pytest

from diffpress.benchmarks import prompts
from diffpress.errors import DiffpressError


def test_shapes_draws_held_out_captions() -> None:
    chosen = prompts.choose(5, shapes=True)
    assert len(chosen.texts) == 5 and chosen.scenes is not None
    assert all(scene.held_out for scene in chosen.scenes)


def test_other_models_draw_a_varied_list() -> None:
    chosen = prompts.choose(30, shapes=False)
    assert chosen.scenes is None and len(chosen.texts) == 30
    assert chosen.texts[len(prompts.VARIED)] == chosen.texts[0]


def test_a_file_of_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\n\n  a cat \n")
    for count in (None, 2):
        chosen = prompts.choose(count, shapes=True, file=file)
        assert chosen.texts == ["a dog", "a cat"] and chosen.scenes is None and chosen.source == str(file)
    assert prompts.choose(1, shapes=True, file=file).texts == ["a dog"]
    with pytest.raises(DiffpressError, match=r"prompts\.txt holds 2 prompts, 3 images are asked for"):
        prompts.choose(3, shapes=False, file=file)
    assert len(prompts.choose(None, shapes=False).texts) == prompts.IMAGES


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DiffpressError, match="holds no prompts"):
        prompts.choose(1, shapes=False, file=tmp_path / "empty.txt")
    with pytest.raises(DiffpressError, match="cannot be read"):
        prompts.choose(1, shapes=False, file=tmp_path / "absent.txt")
