"""Pictures that installed packages ship, read without importing these packages."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm_prune.vlm.common.errors import InputError


def package_file(package: str, name: str) -> Path:
    """Returns the path of a file inside an installed package, which is not imported.

    Args:
        package: its top-level name, `sklearn`.
        name: path inside it, with slashes.

    Raises:
        InputError: if the package is not installed or has no such file.
    """
    spec = find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or ()
    for folder in folders:
        if (path := Path(folder, name)).is_file():
            return path
    raise InputError(
        f"{package} with its file {name} is needed: pip install --force-reinstall vlm-prune"
    )


def photograph(name: str) -> Image.Image:
    """Returns one of the photographs of scikit-learn and scikit-image, in RGB."""
    if name in ("china.jpg", "flower.jpg"):
        path = package_file("sklearn", f"datasets/images/{name}")
    else:
        path = package_file("skimage", f"data/{name}")
    with Image.open(path) as picture:
        return picture.convert("RGB")


@cache
def handwritten_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Returns scikit-learn's drawings (1797, 8, 8), values 0 to 16, and their digits (1797,)."""
    rows = np.loadtxt(package_file("sklearn", "datasets/data/digits.csv.gz"), delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)
