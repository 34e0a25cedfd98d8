"""Pictures of every kind open as people see them, and what is no sound picture is refused."""

import io
import os
import struct

import numpy as np
import pytest
from PIL import Image, ImageFile, TiffImagePlugin

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.images import open_image


def pixels(source):
    image = open_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def stored(image, suffix, **options):
    file = io.BytesIO()
    image.save(file, suffix, **options)
    file.seek(0)
    return file


RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
EIGHT = np.arange(256, dtype=np.uint8).reshape(16, 16)


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


@pytest.mark.parametrize("suffix", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_a_ramp_of_16_bits_is_a_ramp_of_8(suffix):
    options = {"irreversible": False} if suffix == "JPEG2000" else {}
    opened = pixels(stored(Image.fromarray(RAMP), suffix, **options))
    assert np.array_equal(opened, np.stack([EIGHT] * 3, -1))


def test_every_16_bit_value_is_rounded_to_the_nearest():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    wanted = np.rint(values / 257).astype(np.uint8)
    assert np.array_equal(pixels(Image.fromarray(values))[..., 0], wanted)
    assert np.array_equal(pixels(Image.fromarray(values.astype(np.int32)))[..., 1], wanted)


def test_a_dark_16_bit_picture_stays_dark():
    dark = (RAMP // 257).astype(np.uint16)
    for suffix in ("PNG", "TIFF", "PPM"):
        assert pixels(stored(Image.fromarray(dark), suffix)).max() == 1


def test_integers_of_32_bits_that_are_8_bit_values_stay_what_they_are():
    assert np.array_equal(
        pixels(stored(Image.fromarray(EIGHT.astype(np.int32)), "TIFF"))[..., 2], EIGHT
    )


@pytest.mark.parametrize("most", [1, 255])
def test_floating_point_from_0_to_1_or_to_255(most):
    values = (EIGHT / np.float32(255) * most).astype(np.float32)
    assert np.array_equal(pixels(stored(Image.fromarray(values), "TIFF"))[..., 0], EIGHT)


@pytest.mark.parametrize(
    "values", [[-1.0, 2.0], [0.0, 3000.0], [0.0, np.nan], [0.0, np.inf]], ids=str
)
def test_values_without_a_meaning_are_refused(values):
    with pytest.raises(InputError, match="values from .* scale them"):
        open_image(stored(Image.fromarray(np.array([values], np.float32)), "TIFF"))


def test_integers_beyond_16_bits_are_refused():
    with pytest.raises(InputError, match="values from 0 to 70000"):
        open_image(Image.fromarray(np.array([[0, 70000]], np.int32)))


def test_a_tiff_whose_white_is_zero():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    file = stored(Image.fromarray(RAMP), "TIFF", tiffinfo=tags)
    with Image.open(file) as image:
        assert image.mode == "I;16" and image.tag_v2[262] == 0
    # Pillow inverts when it writes, where it does
    raw = np.asarray(Image.open(file))
    assert np.array_equal(pixels(file)[..., 0], np.rint((65535 - raw.astype(int)) / 257))


UPRIGHT = np.zeros((2, 3, 3), np.uint8)
UPRIGHT[0, 0] = 200, 10, 10
UPRIGHT[1, 2] = 10, 10, 200
# how the camera stored the upright picture, for every orientation
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_pictures_are_turned_as_exif_says(orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = np.repeat(np.repeat(UPRIGHT, 16, 0), 16, 1)  # JPEG's blocks keep their colors apart
    options = {"lossless": True} if suffix == "WEBP" else {"quality": 95, "subsampling": 0}
    picture = Image.fromarray(np.ascontiguousarray(STORED[orientation](large)))
    file = stored(picture, suffix, exif=exif, **options)
    once = open_image(file)
    assert np.abs(np.asarray(once).astype(int) - large).max() <= 3
    assert np.array_equal(pixels(once), once)  # and are not turned again


def test_broken_exif_does_not_break_a_picture():
    broken = b"Exif\0\0II*\0" + struct.pack("<I", 4_000_000_000)
    file = stored(Image.fromarray(UPRIGHT), "PNG", exif=broken)
    assert np.array_equal(pixels(file), UPRIGHT)


def test_transparency_is_white():
    rgba = np.zeros((1, 4, 4), np.uint8)
    rgba[0, :, 3] = 0, 255, 0, 128
    rgba[0, 2, 0] = 255  # the color below does not show
    wanted = [255, 0, 255, 127]
    for suffix in ("PNG", "TIFF"):
        opened = pixels(stored(Image.fromarray(rgba), suffix))
        assert np.abs(opened[0].astype(int) - np.array(wanted)[:, None]).max() <= 1
    gray = Image.fromarray(rgba[..., [1, 3]], "LA")
    assert np.abs(pixels(stored(gray, "PNG"))[0, :, 0].astype(int) - wanted).max() <= 1


def test_a_transparent_color_is_white_in_every_mode_that_has_one():
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for suffix in ("PNG", "GIF"):
        opened = pixels(stored(palette, suffix, transparency=1))
        assert opened.tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
    gray = Image.fromarray(np.array([[0, 7, 9]], np.uint8))
    assert pixels(stored(gray, "PNG", transparency=7))[0, :, 0].tolist() == [0, 255, 9]
    color = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    opened = pixels(stored(color, "PNG", transparency=(4, 5, 6)))
    assert opened.tolist() == [[[1, 2, 3], [255, 255, 255]]]
    deep = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    deep.info["transparency"] = 257
    assert pixels(deep)[0, :, 0].tolist() == [0, 255, 255]


def test_cmyk_and_its_inverted_jpeg():
    ink = np.zeros((16, 64, 4), np.uint8)
    for place in range(3):
        ink[:, 16 * place : 16 * place + 16, place] = 255
    ink[:, 48:, 3] = 255
    wanted = [[0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]
    for suffix in ("TIFF", "JPEG"):  # Adobe's, which Pillow writes, is stored inverted
        file = stored(
            Image.fromarray(ink, "CMYK"), suffix, **({"quality": 95} if suffix == "JPEG" else {})
        )
        middle = pixels(file)[8, 8::16].astype(int)
        assert np.abs(middle - wanted).max() <= 6


def test_palettes_one_bit_and_other_color_spaces():
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    assert pixels(stored(bits, "PNG"))[..., 0].tolist() == [[0, 255], [255, 0]]
    color = Image.fromarray(np.repeat(np.repeat(UPRIGHT, 16, 0), 16, 1))
    assert np.array_equal(pixels(stored(color.quantize(8), "PNG"))[8, 8], UPRIGHT[0, 0])
    for mode in ("YCbCr", "HSV", "LAB"):
        assert np.abs(pixels(color.convert(mode)).astype(int) - np.asarray(color)).max() <= 12


@pytest.mark.parametrize("suffix", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_shows_its_first_frame(suffix):
    frames = [Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 250, 0))]
    options = {"lossless": True} if suffix == "WEBP" else {}
    file = stored(frames[0], suffix, save_all=True, append_images=frames[1:], **options)
    with Image.open(file) as image:
        assert image.n_frames == 2
    assert pixels(file)[0, 0].tolist() == [250, 0, 0]


def test_arrays_open_and_others_are_named():
    color = np.dstack([EIGHT] * 3)
    assert np.array_equal(pixels(color), color) and np.array_equal(pixels(EIGHT), color)
    wrong = [np.zeros((4, 4, 3)), np.zeros((3, 4, 5), np.uint8), np.zeros(4, np.uint8)]
    for array in wrong:
        with pytest.raises(InputError, match=r"give \(height, width, 3\) of uint8"):
            open_image(array)
    for other in (None, 3, [1], b"x"):
        with pytest.raises(InputError, match="an image is a file"):
            open_image(other)


def test_a_pipe_and_a_folder_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(InputError, match="no regular file"):
            open_image(path)


def test_what_the_caller_holds_is_not_changed():
    exif = Image.Exif()
    exif[0x0112] = 6
    given = Image.open(stored(Image.fromarray(UPRIGHT), "PNG", exif=exif))
    open_image(given)
    assert given.size == (3, 2) and given.getexif()[0x0112] == 6
