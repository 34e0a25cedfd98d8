"""Index maths of prompts with images."""

import pytest
import torch

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.layout import (
    alike,
    image_columns,
    image_ordinals,
    image_rows,
    image_runs,
    repeated,
)  # fmt: skip

IS_IMAGE = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)


def test_images_of_different_sizes_are_found():
    ordinal = image_ordinals(IS_IMAGE, [2, 1, 4])
    assert ordinal.tolist() == [[-1, 0, 0, -1, 1], [-1] * 5, [2, 2, 2, 2, -1]]
    assert image_rows(ordinal, 3).tolist() == [0, 0, 2]
    assert [c.tolist() for c in image_columns(ordinal, [2, 1, 4])] == [[1, 2], [4], [0, 1, 2, 3]]
    assert image_runs(IS_IMAGE) == [(0, 1, 2), (0, 4, 1), (2, 0, 4)]


@pytest.mark.parametrize("counts", [[2, 1], [3, 4, 0], [8]])
def test_placeholders_must_fit_the_images(counts):
    with pytest.raises(
        InputError, match=r"7 image placeholders do not fit .* give the processor text and images"
    ):
        image_ordinals(IS_IMAGE, counts)


def test_rows_repeat_with_all_their_images():
    assert repeated([2, 1, 4], IS_IMAGE) == [0, 1, 2]
    beams = IS_IMAGE.repeat_interleave(2, 0)
    assert repeated([2, 1, 4], beams) == [0, 1, 0, 1, 2, 2]
    assert repeated([2, 1, 4], torch.zeros_like(beams)) == []


def test_like_keys_are_grouped_in_order():
    assert alike([9, 4, 9]) == [[0, 2], [1]]
