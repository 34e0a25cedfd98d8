import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.package_data import handwritten_digits, package_file


def test_handwritten_digits_are_those_that_scikit_learn_loads() -> None:
    drawings, digits = handwritten_digits()
    loaded = load_digits()
    assert np.array_equal(drawings, loaded.images)
    assert np.array_equal(digits, loaded.target)


def test_scenes_are_drawn_without_importing_the_packages_of_their_pictures() -> None:
    code = (
        "import sys; from vlm_prune.benchmarks.tasks import TASKS\n"
        "for index in range(8): TASKS['exist'].sample(index, 0, 'test'); TASKS['ocr'].sample(index, 0, 'test')\n"
        "assert not {'sklearn', 'skimage', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_picture_is_named() -> None:
    with pytest.raises(InputError, match=r"sklearn with its file datasets/none\.csv is needed"):
        package_file("sklearn", "datasets/none.csv")
    with pytest.raises(InputError, match="no_such_package"):
        package_file("no_such_package", "x")
