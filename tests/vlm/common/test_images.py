"""A truncated image is refused, whatever other packages told Pillow."""

import pytest
from PIL import Image, ImageFile

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.images import open_image


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_image_is_refused(lenient, suffix, tmp_path, monkeypatch):
    path = tmp_path / f"cut.{suffix}"
    Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-1500])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    with pytest.raises(InputError, match="cannot read image .*cut"):
        open_image(path)
    assert lenient is ImageFile.LOAD_TRUNCATED_IMAGES
