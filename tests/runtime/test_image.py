from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffpress.errors import DiffpressError
from diffpress.runtime.image import save_png, to_pixels


def test_floats_become_bytes_as_in_diffusers() -> None:
    decoded = np.array([-2, -1, -0.5, 0, 0.5, 1, 2, np.nan, np.inf], np.float32).reshape(1, 1, 3, 3).repeat(3, axis=1)
    pixels = to_pixels(decoded)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1, 3, 3, 3)
    assert pixels[0, :, :, 1].ravel().tolist() == [0, 0, 64, 128, 191, 255, 255, 0, 255]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    save_png(tmp_path / "new/picture.out", pixels)
    with Image.open(tmp_path / "new/picture.out") as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), pixels)
    (tmp_path / "file").touch()
    with pytest.raises(DiffpressError, match="could not be written"):
        save_png(tmp_path / "file/picture.png", pixels)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DiffpressError, match="could not be written"):
        save_png(tmp_path / "folder", pixels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "new"]
