import base64
import io

import numpy as np
import pytest
from PIL import Image

from diffpress.benchmarks.pictures import Labelled, data_uri, difference, grid


def test_difference_is_amplified_and_clipped() -> None:
    a, b = np.full((2, 2, 3), 100, np.uint8), np.full((2, 2, 3), 103, np.uint8)
    assert (difference(a, b) == 12).all() and (difference(b, a) == 12).all()
    assert (difference(a, np.full((2, 2, 3), 255, np.uint8)) == 255).all()


@pytest.mark.parametrize(("side", "kind"), [(64, "png"), (300, "jpeg")])
def test_data_uri_holds_the_picture(side: int, kind: str) -> None:
    pixels = np.full((side, side, 3), 90, np.uint8)
    head, _, body = data_uri(pixels).partition(",")
    assert head == f"data:image/{kind};base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(body)))), pixels)


def test_grid_has_room_for_every_picture_and_its_words() -> None:
    items = [
        Labelled(np.full((8, 8, 3), 40, np.uint8), "some words", True),
        Labelled(np.full((8, 8, 3), 80, np.uint8), "some words " * 2, False),
        Labelled(np.full((8, 8, 3), 120, np.uint8), "some words " * 3),
    ]
    sheet = grid(items, columns=2, side=64)
    assert sheet.size[0] == 2 * 64 + 3 * 14 and sheet.size[1] > 2 * (64 + 17)
    pixels = np.asarray(sheet)
    assert (pixels[14 + 32, 14 + 32] == 40).all()
    edge = pixels[14 + 32, 14 - 2]
    assert edge[1] > edge[0]  # green: the first is good
