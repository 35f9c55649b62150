"""What ``load_image`` makes of every kind of image: what a viewer shows, or a refusal by name."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms, features
from support.stored import gif, png, tiff

from hubpath_fast.data import DataError, decode, load_image

RED, GREEN, BLUE, WHITE = (200, 0, 0), (0, 200, 0), (0, 0, 200), (255, 255, 255)
LEVELS = np.array([[0, 9000, 60000, 65535]], np.uint16)
AVIF = ["avif"] if features.check("avif") else []  # since Pillow 11.3
SCALED = [0, 35, 233, 255]  # divided by 257 and rounded


def row(path):
    """The colours of the first row; one number for a grey."""
    pixels = np.asarray(load_image(path))[0].tolist()
    return [r if r == g == b else (r, g, b) for r, g, b in pixels]


def saved(path, image, **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def of(mode, *pixels):
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


def palette_image(*indices):
    image = of("P", *indices)
    image.putpalette([*RED, *GREEN, *BLUE])
    return image


# Modes of 8 bits -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "ending", "expected"),
    [
        (of("1", 0, 255), "png", [0, 255]),
        (of("L", 0, 7, 255), "png", [0, 7, 255]),
        (of("RGB", RED, WHITE), "png", [RED, 255]),
        (palette_image(2, 0, 1), "png", [BLUE, RED, GREEN]),
        (palette_image(2, 0, 1), "gif", [BLUE, RED, GREEN]),
        (palette_image(2, 0, 1), "bmp", [BLUE, RED, GREEN]),
        (of("RGBX", (1, 2, 3, 0), (4, 5, 6, 9)), "tif", [(1, 2, 3), (4, 5, 6)]),
        # (255 - ink) * (255 - black) / 255
        (of("CMYK", (0, 255, 128, 0), (0, 255, 128, 51)), "tif", [(255, 0, 127), (204, 0, 102)]),
    ],
    ids=lambda value: getattr(value, "mode", None) or str(value),
)
def test_modes_of_8_bits(tmp_path, image, ending, expected):
    assert row(saved(tmp_path / f"image.{ending}", image)) == expected


def test_luma_and_chroma(tmp_path):
    """By JPEG's formula, each part of which Pillow rounds."""
    stored = [(255, 128, 128), (81, 90, 239), (150, 200, 60)]
    pixels = np.asarray(load_image(saved(tmp_path / "ycc.tif", of("YCbCr", *stored))))[0]
    for (y, blue, red), found in zip(stored, pixels.astype(int), strict=True):
        blue, red = blue - 128, red - 128
        seen = (y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue)
        assert np.abs(found - np.clip(seen, 0, 255)).max() < 2


def test_ink_in_a_jpeg_is_not_inverted(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 128, 51))
    pixels = np.asarray(load_image(saved(tmp_path / "ink.jpg", image, quality=100)))
    assert np.abs(pixels.astype(int) - (204, 0, 102)).max() <= 2


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 128, 255), (90, 90, 90), (10, 200, 60)])
def test_lab_is_the_colour_that_it_was_made_of(tmp_path, colour):
    lab = Image.new("RGB", (2, 1), colour).convert("LAB")
    lightness, a, b = (band.getpixel((0, 0)) for band in lab.split())
    if colour == (255, 0, 0):  # 54.3, 80.8 and 69.9, as L * 255 / 100 and both others + 128
        assert (lightness, a, b) == (138, 209, 198)
    pixels = np.asarray(load_image(saved(tmp_path / "lab.tif", lab))).astype(int)
    assert np.abs(pixels - colour).max() <= 15  # a and b in whole steps: strong colours are coarse
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    seen = ImageCms.profileToProfile(Image.open(tmp_path / "lab.tif"), *profiles, outputMode="RGB")
    assert np.array_equal(pixels, np.asarray(seen))


def test_no_file_holds_hsv_and_it_is_converted_all_the_same(tmp_path):
    image = Image.new("RGB", (1, 1), RED).convert("HSV")
    for ending in ("png", "tif", "bmp", "jpg"):
        with pytest.raises(OSError, match="cannot write mode HSV"):
            image.save(tmp_path / f"image.{ending}")
    assert decode._rgb(image).getpixel((0, 0)) == RED


# Transparency, on white: colour * a / 255 + 255 - a ----------------------------------------------


@pytest.mark.parametrize(
    ("image", "ending", "expected"),
    [
        (of("RGBA", (9, 8, 7, 0), (*RED, 255), (*RED, 51)), "png", [255, RED, (244, 204, 204)]),
        (of("RGBA", (*GREEN, 255), (*RED, 255)), "png", [GREEN, RED]),
        (of("RGBA", (9, 8, 7, 0), (*RED, 255), (*RED, 51)), "tif", [255, RED, (244, 204, 204)]),
        (of("RGBA", (9, 8, 7, 0), (*RED, 255)), "webp", [255, RED]),
        (of("LA", (9, 0), (40, 255), (40, 51)), "png", [255, 40, 212]),
        (of("LA", (9, 0), (40, 255), (40, 51)), "tif", [255, 40, 212]),
    ],
    ids=lambda value: getattr(value, "mode", None) or str(value),
)
def test_alpha_is_laid_on_white(tmp_path, image, ending, expected):
    options = {"lossless": True, "exact": True} if ending == "webp" else {}
    assert row(saved(tmp_path / f"image.{ending}", image, **options)) == expected


@pytest.mark.parametrize(
    ("transparency", "expected"),
    [
        (1, [RED, 255, BLUE]),
        (bytes([0, 51]), [255, (204, 244, 204), BLUE]),
        (bytes([255, 255, 0]), [RED, GREEN, 255]),
    ],
)
def test_a_palette_with_transparent_colours(tmp_path, transparency, expected):
    path = saved(tmp_path / "p.png", palette_image(0, 1, 2), transparency=transparency)
    with warnings.catch_warnings(record=True) as seen:
        assert row(path) == expected
    assert seen == []


def test_alpha_beside_a_palette_and_alpha_that_was_multiplied_in(tmp_path):
    """PA and La: palette indices, or grey levels times alpha, each with alpha."""
    assert row(tiff(tmp_path / "la.tif", 2, bytes([40, 51, 9, 0]), 8, extra=2)) == [212, 255]
    assert row(tiff(tmp_path / "La.tif", 2, bytes([8, 51, 0, 0]), 8, extra=1)) == [212, 255]
    image = palette_image(0, 1).convert("PA")
    image.putalpha(of("L", 255, 0))
    assert [decode._rgb(image).getpixel((x, 0)) for x in (0, 1)] == [RED, WHITE]


@pytest.mark.parametrize(
    ("depth", "colour", "stored", "key", "expected"),
    [
        (1, 0, bytes([0b01000000]), [1], [0, 255, 0, 0]),
        (1, 0, bytes([0b01000000]), [0], [255, 255, 255, 255]),
        (2, 0, bytes([0b00011011]), [1], [0, 255, 170, 255]),
        (4, 0, bytes([0x08, 0x4F]), [8], [0, 255, 68, 255]),
        (8, 0, bytes([6, 7, 8, 9]), [7], [6, 255, 8, 9]),
        (16, 0, struct.pack(">4H", 9000, 9001, 60000, 0), [9000], [255, 35, 233, 0]),
        (8, 2, bytes([1, 2, 3, 1, 2, 4, 0, 0, 0, 9, 9, 9]), [1, 2, 3], [255, (1, 2, 4), 0, 9]),
        (16, 2, struct.pack(">12H", 9000, 60000, 0, *[2570] * 9), [9000, 60000, 0],
         [255, 10, 10, 10]),
    ],
)  # fmt: skip
def test_a_transparent_colour_of_every_depth(tmp_path, depth, colour, stored, key, expected):
    key = (b"tRNS", struct.pack(f">{len(key)}H", *key))
    assert row(png(tmp_path / "key.png", 4, depth, colour, stored, key)) == expected


# More than 8 bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "tif", "pgm", "jp2"])
def test_grey_of_16_bits(tmp_path, ending):
    assert row(saved(tmp_path / f"deep.{ending}", np.repeat(LEVELS, 16, axis=0))) == SCALED


@pytest.mark.parametrize(("mode", "order"), [("I;16", "<"), ("I;16B", ">"), ("I;16L", "<")])
def test_byte_orders_of_16_bits(tmp_path, mode, order):
    image = Image.frombytes(mode, (4, 1), LEVELS.astype(f"{order}u2").tobytes())
    assert row(saved(tmp_path / "deep.tif", image)) == SCALED
    assert row(tiff(tmp_path / "raw.tif", 4, LEVELS.astype(f"{order}u2").tobytes(), 16,
                    order=order)) == SCALED  # fmt: skip


def test_a_dark_image_stays_darker_than_a_bright_one(tmp_path):
    """Each is of a single level: scaled by its own range both would be the same."""
    for level, expected in ((0, 0), (200, 1), (9000, 35), (60000, 233)):
        assert row(saved(tmp_path / "one.png", np.full((1, 2), level, np.uint16))) == [expected] * 2


def test_every_level_of_16_bits_is_rounded(tmp_path):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    grey = np.asarray(load_image(saved(tmp_path / "all.png", levels)))
    assert np.array_equal(grey[..., 0], np.rint(levels / 257).astype(np.uint8))


def test_depths_below_16_bits_are_scaled_by_their_own_white(tmp_path):
    values = [0, 576, 3740, 4095]  # 35.9, 232.9
    expected = [0, 36, 233, 255]
    (tmp_path / "raw.pgm").write_bytes(b"P5 4 1 4095\n" + np.array(values, ">u2").tobytes())
    (tmp_path / "text.pgm").write_bytes(b"P2 4 1 4095\n0 576 3740 4095\n")
    packed = int("".join(f"{value:03x}" for value in values), 16).to_bytes(6, "big")
    tiff(tmp_path / "12.tif", 4, packed, 12)
    for name in ("raw.pgm", "text.pgm", "12.tif"):
        assert row(tmp_path / name) == expected


def test_zero_is_white_in_some_tiffs_whatever_their_depth(tmp_path):
    for bits, dtype in ((8, np.uint8), (16, np.uint16)):
        white = 2**bits - 1
        stored = np.array([0, white // 5, white], dtype).tobytes()
        assert row(tiff(tmp_path / f"{bits}.tif", 3, stored, bits, photometric=0)) == [255, 204, 0]
    stored = np.array([0, 0.2, 1], np.float32).tobytes()
    assert row(tiff(tmp_path / "f.tif", 3, stored, 32, 0, sample_format=3)) == [255, 204, 0]


def test_colours_of_16_bits(tmp_path):
    """Pillow keeps the upper byte, at most one level from the rounded value (35.02 and 233.46)."""
    colours = struct.pack(">6H", 9000, 60000, 0, 65535, 257, 128)
    assert row(png(tmp_path / "rgb.png", 2, 16, 2, colours)) == [(35, 234, 0), (255, 1, 0)]
    half = struct.pack(">8H", 9000, 0, 0, 65535, 9000, 0, 0, 0)
    assert row(png(tmp_path / "rgba.png", 2, 16, 6, half)) == [(35, 0, 0), 255]
    grey = struct.pack(">4H", 9000, 65535, 9000, 0)
    assert row(png(tmp_path / "la.png", 2, 16, 4, grey)) == [35, 255]


def test_floats_from_0_to_1(tmp_path):
    values = np.array([[0, 0.25, 0.5, 0.51, 1]], np.float32)  # 63.75, 127.5, 130.05
    for ending in ("tif", "pfm"):
        assert row(saved(tmp_path / f"float.{ending}", values)) == [0, 64, 128, 130, 255]


INTEGERS = np.array([[0, 200, 9000, 60000]])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: saved(p, INTEGERS.astype(np.int32)), "mode I, signed integers, here from 0 to"),
        (lambda p: saved(p, INTEGERS.astype(np.int32) - 5), "from -5 to 59995"),
        (lambda p: tiff(p, 4, INTEGERS.astype(np.uint32).tobytes(), 32), "integers of 32 bits"),
        (lambda p: tiff(p, 4, LEVELS.tobytes(), 16, 1, 2), "mode I, signed integers, .* -5536"),
        (lambda p: tiff(p, 4, bytes(4), 8, 1, 2), "mode L, signed integers"),
        (lambda p: saved(p, np.array([[0, 255]], np.float32)), "mode F, .* from 0 to 255: only"),
        (lambda p: saved(p, np.array([[-0.5, 0.5]], np.float32)), "from -0.5 to 0.5"),
        (lambda p: saved(p, np.array([[0, np.nan]], np.float32)), "floating point with NaN"),
        (lambda p: saved(p, np.array([[0, np.inf]], np.float32)), "from 0 to inf"),
        (lambda p: tiff(p, 4, bytes(8), 16, 1, 3), "a TIFF with pixels that Pillow does not read"),
    ],
)
def test_where_nothing_says_what_is_white_it_is_refused(tmp_path, make, said):
    path = make(tmp_path / "deep.tif")
    with pytest.raises(DataError, match=rf"^cannot read the image .*deep\.tif \(.*{said}") as error:
        load_image(path)
    assert "save it with 8 or 16 bits a pixel" in str(error.value)
    # Found without decoding the rest of the set, and said in the same words.
    assert [f"cannot read the image {problem}" for problem in decode.broken_images([path])] == [
        str(error.value)
    ]


# Orientation ---------------------------------------------------------------------------------


def turned(orientation, pixels):
    """What is seen, from the words of the standard: where row 0 and column 0 lie."""
    row0, column0 = {
        1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left",
        5: "left top", 6: "right top", 7: "right bottom", 8: "left bottom",
    }[orientation].split()  # fmt: skip
    if row0 in ("left", "right"):
        pixels = pixels.transpose(1, 0, 2)
    if "bottom" in (row0, column0):
        pixels = pixels[::-1]
    if "right" in (row0, column0):
        pixels = pixels[:, ::-1]
    return pixels


@pytest.mark.parametrize("ending", ["png", "webp", "tif", "jpg", *AVIF])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, orientation, ending):
    pixels = np.zeros((16, 32, 3), np.uint8)  # blocks of 16, which JPEG keeps apart
    pixels[:, :16], pixels[:8] = (40, 40, 200), (200, 40, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if ending == "webp" else {"quality": 95}
    path = saved(tmp_path / f"turned.{ending}", pixels, exif=exif, **options)
    image = load_image(path)
    seen = turned(orientation, pixels).astype(int)
    error = np.abs(np.asarray(image) - seen)
    assert error.mean() <= (8 if ending in ("jpg", "avif") else 0)
    assert image.getexif().get(0x0112, 1) == 1  # nobody turns it once more


def test_deep_and_transparent_images_are_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for image, expected in (
        (Image.fromarray(LEVELS), SCALED),
        (of("LA", (0, 255), (9, 0), (70, 255)), [0, 255, 70]),
    ):
        pixels = np.asarray(load_image(saved(tmp_path / "turned.png", image, exif=exif)))
        assert pixels[:, 0, 0].tolist() == expected


def test_damaged_exif_does_not_spoil_an_image(tmp_path):
    """Cut short, of another kind, and empty; without a word on the console."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0132] = 3, "a camera" * 9, "2026:01:01 00:00:00"
    whole, pixels = exif.tobytes(), np.full((8, 8, 3), 90, np.uint8)
    damaged = [whole[:20], whole[:-40], whole[:10], b"Exif\0\0garbage", b"Exif\0\0", b"\xff" * 30,
               whole.replace(b"\x12\x01\x03\0", b"\x12\x01\x0c\0")]  # fmt: skip
    for data in damaged:
        for ending in ("jpg", "png", "webp"):
            path = saved(tmp_path / f"image.{ending}", pixels, exif=data)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                assert np.abs(np.asarray(load_image(path)).astype(int) - 90).max() <= 1
                assert decode.broken_images([path]) == []
            assert seen == []


# Several images in a file --------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_the_first_image_of_several(tmp_path, ending):
    frames = [Image.new("RGBA", (4, 4), (*colour, 255)) for colour in (RED, GREEN, BLUE)]
    frames[0].paste((0, 0, 0, 0), (0, 0, 1, 4))
    options = {"lossless": True} if ending == "webp" else {}
    path = saved(
        tmp_path / f"several.{ending}",
        frames[0],
        save_all=True,
        append_images=frames[1:],
        **options,
    )
    assert row(path) == [255, RED, RED, RED]


def test_an_apng_with_a_still_image_shows_that(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)]
    path = saved(tmp_path / "a.png", frames[0], save_all=True, append_images=frames[1:],
                 default_image=True)  # fmt: skip
    assert row(path) == [RED] * 4


@pytest.mark.parametrize("transparent", [None, 3])
def test_what_a_first_frame_does_not_cover_is_background(tmp_path, transparent):
    palette = [(9, 9, 9), RED, GREEN, BLUE]
    path = gif(tmp_path / "part.gif", (4, 2), (1, 0, 2, 2), 2, palette, transparent)
    assert row(path) == [255, GREEN, GREEN, 255]
    whole = gif(tmp_path / "whole.gif", (4, 2), (0, 0, 4, 2), 2, palette, transparent)
    assert row(whole) == [GREEN] * 4


# Files that are no image ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>", "no image file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC, which Pillow does not read; convert it"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, data, said):
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"photo\.jpg \(.*{said}"):
        load_image(path)
    assert said in decode.broken_images([path])[0]


def test_a_link_to_nothing_is_named_with_its_end(tmp_path):
    link = tmp_path / "a.png"
    link.symlink_to("gone/b.png")
    with pytest.raises(DataError) as error:
        load_image(link)
    assert str(error.value) == (
        f"cannot read the image {link} (a link to gone/b.png, which is not there)"
    )
    missing = tmp_path / "c.png"
    with pytest.raises(DataError) as error:
        load_image(missing)
    assert str(error.value) == f"cannot read the image {missing} (No such file or directory)"


def test_an_icon_whose_head_promises_alpha(tmp_path):
    """Pillow says RGBA of it until it is decoded."""
    assert row(saved(tmp_path / "a.icns", Image.new("RGB", (32, 32), RED)))[:1] == [RED]


def test_an_image_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    path = saved(tmp_path / "huge.png", Image.new("L", (40, 40)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(DataError, match=r"huge\.png \(.*1600 pixels.* Make it smaller"):
        load_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # more than it, but not twice: a warning
    with warnings.catch_warnings(record=True) as seen:
        assert load_image(path).size == (40, 40)
    assert seen == []


def test_memory_that_does_not_suffice_is_said(monkeypatch, tmp_path):
    def full(*_):
        raise MemoryError

    path = saved(tmp_path / "image.png", Image.new("L", (4, 4)))
    monkeypatch.setattr(Image.Image, "convert", full)
    with pytest.raises(DataError, match=r"image\.png \(not enough memory to decode it\)"):
        load_image(path)


def test_a_jpeg_that_was_cut_short(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "JPEG")
    path = tmp_path / "cut.jpg"
    path.write_bytes(buffer.getvalue()[:-400])
    with pytest.raises(DataError, match=r"cut\.jpg \(image file is truncated"):
        load_image(path)
