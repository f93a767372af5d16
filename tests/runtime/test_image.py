from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffpress.errors import DiffpressError
from diffpress.runtime.image import open_picture, save_png, to_floats, to_mask, to_pixels


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


def test_pictures_become_what_diffusers_makes_of_them(tmp_path: Path) -> None:
    from diffusers.image_processor import VaeImageProcessor

    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (37, 50, 3)).astype(np.uint8))
    wanted = VaeImageProcessor(vae_scale_factor=8).preprocess(picture, height=32, width=64).numpy()
    np.testing.assert_array_equal(to_floats([picture], 32, 64), wanted)
    options = {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}
    binary = VaeImageProcessor(vae_scale_factor=8, **options).preprocess(picture, height=32, width=64)
    small = torch.nn.functional.interpolate(binary, size=(4, 8)).numpy()
    np.testing.assert_array_equal(to_mask([picture], 32, 64, 4, 8), small)
    assert 0 < small.mean() < 1


def test_a_picture_is_read_upright_and_without_transparency(tmp_path: Path) -> None:
    wide = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 6)).convert("RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter, as telephones write
    wide.save(tmp_path / "phone.png", exif=exif)
    opened = open_picture(tmp_path / "phone.png")
    assert opened.mode == "RGB" and opened.size == (2, 6)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffpressError, match="there is no image at"):
        open_picture(tmp_path / "none.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("cut.png", "text.png"):
        with pytest.raises(DiffpressError, match="is not an image that can be read") as caught:
            open_picture(tmp_path / name)
        assert "\n" not in str(caught.value)
