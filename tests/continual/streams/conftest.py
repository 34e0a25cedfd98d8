"""Small image folders on disk."""

import numpy as np
import pytest
from PIL import Image


def write_image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folders(tmp_path):
    """root/{train,val,test}/{big_cat,dog}/, four, one and two images each."""
    for part, count in (("train", 4), ("val", 1), ("test", 2)):
        for name in ("big_cat", "dog"):
            for number in range(count):
                write_image(tmp_path / part / name / f"{number}.png", number)
    return tmp_path
