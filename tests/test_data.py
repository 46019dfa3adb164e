"""data.py: pictures of cameras and the web, groups, batches, their order."""
import collections
import itertools
import json
import random
import re
import runpy
import struct
import subprocess
import sys
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, TiffImagePlugin
from torch.utils.data._utils.pin_memory import pin_memory

import data
from buckets import Buckets, aspects_of, bucket_shapes
from conftest import TESTS
from data import (Batch, BatchOrder, Example, Group, Tasks, load_cropped, load_image, load_picture,
                  open_records, parse_numbers, parse_weights, prompt_length, read_jsonl,
                  to_pictures)
from text_encoder import T5Tokenizer


@pytest.fixture
def folder(tmp_path):
    """A folder with five small pictures, each of one grey level of its own."""
    (tmp_path / "images").mkdir()
    for i, name in enumerate("abcde"):
        Image.new("RGB", (8, 8), (50 * i,) * 3).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def write(folder, *records):
    """Write records.jsonl; a record is an object or a raw line."""
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path = folder / "records.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def says(who, value):
    return {"from": who, "value": value}


A = "images/a.png"
PAIR = {"image": [A], "conversations": [says("human", " a cat "), says("gpt", "<image>")]}


# ---------------------------------------------------------------- pictures and images

def random_pixels(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def loaded(picture, path, size, **save):
    """Save a PIL picture, load it by load_image, and scale it to 0 to 255; (size, size, 3)."""
    picture.save(path, **save)
    image = load_image(path, size)
    assert image.shape == (3, size, size) and image.dtype == torch.float32
    return ((image + 1) * 127.5).permute(1, 2, 0).numpy()


def close(actual, expected, atol=1e-3):
    np.testing.assert_allclose(actual, expected, atol=atol)


def test_range_and_channels(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0], pixels[1, :, 0], pixels[2] = 255, 255, 51
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = load_image(tmp_path / "x.png", 4)
    assert (image[:, 0] == 1).all() and (image[:, 3] == -1).all()
    assert image[:, 1, 0].tolist() == [1, -1, -1]
    torch.testing.assert_close(image[:, 2], torch.full((3, 4), -0.6))


def test_to_pictures_is_the_way_back(tmp_path):
    pixels = random_pixels(8, 8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = load_image(tmp_path / "x.png", 8)
    assert np.array_equal(to_pictures(image[None])[0], pixels)
    clamped = to_pictures(torch.tensor([-1.7, 0.0, 1.7]).view(1, 3, 1, 1))
    assert clamped.ravel().tolist() == [0, 128, 255]


# EXIF orientation -> how a camera stores the pixels, so that this orientation restores the picture
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: np.rot90(x, 2),
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1)}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(tmp_path, orientation):
    pixels, exif = random_pixels(12, 8), Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](pixels)))
    close(loaded(stored, tmp_path / "x.png", 8, exif=exif), pixels[2:10])


def over_white(rgb, alpha):
    return rgb * (alpha / 255) + 255 * (1 - alpha / 255)


def test_alpha_is_laid_on_white(tmp_path):
    rgba, la = random_pixels(6, 6, 4), random_pixels(6, 6, 2)
    color = loaded(Image.fromarray(rgba, "RGBA"), tmp_path / "rgba.png", 6)
    close(color, over_white(rgba[..., :3], rgba[..., 3:]), atol=1)
    grey = loaded(Image.fromarray(la, "LA"), tmp_path / "la.png", 6)
    close(grey, over_white(la[..., :1].repeat(3, -1), la[..., 1:]), atol=1)


def test_transparent_colours_of_palettes_and_of_pictures_without_alpha(tmp_path):
    palette = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    expected = [[[10, 20, 30], [255] * 3], [[70, 80, 90], [10, 20, 30]]]
    close(loaded(palette, tmp_path / "p.png", 2, transparency=1), expected)
    close(loaded(palette, tmp_path / "p.gif", 2, transparency=1), expected)
    alphas = bytes([255, 128, 0])                               # one for each colour
    half = loaded(palette, tmp_path / "half.png", 2, transparency=alphas)
    close(half[0, 1], over_white(np.array([40, 50, 60]), 128), atol=1)
    close(half[1, 0], [255] * 3)
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]], [[4, 5, 6], [1, 2, 3]]], np.uint8))
    red = loaded(rgb, tmp_path / "rgb.png", 2, transparency=(4, 5, 6))[:, :, 0]
    close(red, [[1, 255], [255, 1]])


def test_palette_without_transparency(tmp_path):
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 200, 100, 0])
    close(loaded(palette, tmp_path / "x.png", 2)[0], [[10, 20, 30], [200, 100, 0]])


def test_grayscale(tmp_path):
    grey = random_pixels(6, 6, 1)
    close(loaded(Image.fromarray(grey), tmp_path / "x.png", 6), grey[..., None].repeat(3, -1))
    black_white = Image.fromarray(grey > 100)
    close(loaded(black_white, tmp_path / "y.png", 6)[..., 0], (grey > 100) * 255)


def test_sixteen_bits(tmp_path):
    deep = Image.fromarray(np.array([[0, 256 * 100], [256 * 200, 65535]], np.uint16))
    close(loaded(deep, tmp_path / "x.png", 2)[..., 0], [[0, 100], [200, 255]], atol=1)


def test_cmyk(tmp_path):
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    red = loaded(cmyk, tmp_path / "x.tif", 4)
    assert red[..., 0].min() > 230 and red[..., 1:].max() < 25


@pytest.mark.parametrize("width, height", [(96, 64), (64, 96), (80, 64), (24, 16), (64, 64)])
def test_short_side_bicubic_then_centre_crop(tmp_path, width, height):
    """Resized, then cropped. The other order differs at the edges only, which are left out."""
    low = Image.fromarray(random_pixels(height // 4, width // 4))
    picture, size = low.resize((width, height), Image.Resampling.BILINEAR), 32
    scale = size / min(width, height)
    whole_size = round(width * scale), round(height * scale)
    whole = picture.resize(whole_size, Image.Resampling.BICUBIC)
    left, top = (whole.width - size) // 2, (whole.height - size) // 2

    def crop(left):
        return np.asarray(whole.crop((left, top, left + size, top + size)), float)

    pixels = loaded(picture, tmp_path / "x.png", size)
    assert np.abs(pixels - crop(left))[4:-4, 4:-4].max() <= 2
    # a crop one pixel beside the centre is far off
    assert np.abs(pixels - crop(left + 1))[4:-4, 4:-4].max() > 15


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (16, 16), (40, 8)])
@pytest.mark.parametrize("size", [(48, 32), (24, 16), (33, 70)])
def test_pictures_cover_their_shape(tmp_path, size, shape):
    """Whatever the shape, the centre is kept whole along one side."""
    (width, height), (h, w) = size, shape
    picture = Image.fromarray(random_pixels(height, width))
    picture.save(tmp_path / "x.png")
    pixels = load_cropped(tmp_path / "x.png", shape)
    assert pixels.shape == (*shape, 3) and pixels.dtype == np.uint8
    scale = max(w / width, h / height)
    kept_width, kept_height = w / scale, h / scale
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    box = left, top, left + kept_width, top + kept_height
    expected = picture.resize((w, h), Image.Resampling.BICUBIC, box=box)
    close(pixels.astype(int), np.asarray(expected).astype(int), atol=1)
    image = load_image(tmp_path / "x.png", shape)
    assert image.shape == (3, *shape) and np.array_equal(to_pictures(image[None])[0], pixels)


def test_resize_is_bicubic(tmp_path):
    edge = np.zeros((8, 8, 3), np.uint8)
    edge[:, 4:] = 200
    row = loaded(Image.fromarray(edge), tmp_path / "x.png", 32)[16, :, 0]
    assert row.max() > 205                                      # bilinear does not overshoot


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.gif", "x.webp"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
def test_truncated_pictures(tmp_path, name, share):
    path = tmp_path / name
    Image.fromarray(random_pixels(64, 64)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(share * len(whole))])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: cannot be read as a picture"):
        load_image(path, 32)


def png(header):
    """A PNG file with this header and no pixels."""
    content = b"\x89PNG\r\n\x1a\n"
    for name, chunk in ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(name + chunk))
        content += struct.pack(">I", len(chunk)) + name + chunk + checksum
    return content


@pytest.mark.parametrize("content", [
    None, b"not a picture", png(b"\0\0\0\1"),
    png(struct.pack(">IIBBBBB", 2 ** 16, 2 ** 16, 8, 2, 0, 0, 0)),
], ids=["missing", "text", "short header", "65536 x 65536"])
def test_unreadable_pictures(tmp_path, content):
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_image(path, 32)


# ---------------------------------------------------------------- pixels mean what they say

def profile(space, curve=1.0, columns="rgb"):
    """A colour profile of sRGB's primaries, or of grey, with one gamma.

    columns: the primaries in another order make a profile that exchanges colours.
    """
    def number(x):
        return struct.pack(">i", round(x * 2 ** 16))

    primaries = {"r": (0.4360, 0.2225, 0.0139), "g": (0.3851, 0.7169, 0.0971),
                 "b": (0.1431, 0.0606, 0.7141)}

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    gamma = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(curve * 256), 0)
    tags = {b"wtpt": xyz((0.9642, 1.0, 0.8249)), b"desc": b"desc" + b"\0" * 8 + b"\0" * 84}
    if space == b"GRAY":
        tags[b"kTRC"] = gamma
    else:
        for name, column in zip("rgb", columns):
            tags[f"{name}XYZ".encode()] = xyz(primaries[column])
            tags[f"{name}TRC".encode()] = gamma
    return icc(space, b"XYZ ", tags)


def icc(space, connection, tags):
    """The bytes of a profile (version 2) with these tags."""
    table, content, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(content), len(value))
        content += value
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(
        ">I4sI4s4s4s12s4s28s", start + len(content), b"lcms", 0x02400000, kind, space, connection,
        b"\x07\xe8" + b"\0\1" * 5, b"acsp", b"\0" * 28)
    white = b"".join(struct.pack(">i", round(x * 2 ** 16)) for x in (0.9642, 1.0, 0.8249))
    return header + white + b"\0" * (128 - len(header) - len(white)) + table + content


def ink_profile():
    """A CMYK profile in which any ink is black."""
    grid = b"".join(b"\xff\x80\x80" if corner == 0 else b"\0\x80\x80" for corner in range(16))
    line = bytes(range(256))
    table = (b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + b"".join(
        struct.pack(">i", 2 ** 16 * (k % 4 == 0)) for k in range(9)) + 4 * line + grid + 3 * line)
    return icc(b"CMYK", b"Lab ", {
        b"A2B0": table, b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061),
        b"desc": b"desc" + b"\0" * 92})


LINEAR_128 = 188                            # half of the light, in sRGB


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.tif"])
def test_colour_profiles(tmp_path, name):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    path = tmp_path / name
    exchanged = loaded(red, path, 8, icc_profile=profile(b"RGB ", 2.2, "grb"), quality=100)
    close(exchanged[4, 4], [0, 255, 0], atol=3)
    grey = Image.new("RGB", (8, 8), (128,) * 3)
    close(loaded(grey, path, 8, icc_profile=profile(b"RGB "), quality=100), LINEAR_128, atol=2)


def test_the_profile_of_srgb_changes_nothing(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = random_pixels(16, 16)
    close(loaded(Image.fromarray(pixels), tmp_path / "x.png", 16, icc_profile=srgb), pixels, atol=1)


@pytest.mark.parametrize("space", [b"GRAY", b"RGB "])
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif"])
def test_colour_profiles_of_grey(tmp_path, name, space):
    """A grey picture may have a profile of colours, too."""
    grey = Image.new("L", (8, 8), 128)
    close(loaded(grey, tmp_path / name, 8, icc_profile=profile(space)), LINEAR_128, atol=2)


def test_colour_profiles_with_alpha_palettes_and_sixteen_bits(tmp_path):
    exchanged = profile(b"RGB ", 2.2, "grb")
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    pixel = loaded(half, tmp_path / "rgba.png", 2, icc_profile=exchanged)[0, 0]
    close(pixel, over_white(np.array([0, 255, 0]), 128), atol=2)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0])
    close(loaded(palette, tmp_path / "p.png", 2, icc_profile=exchanged)[0, 0], [0, 255, 0], atol=2)
    light = profile(b"GRAY")
    deep = Image.fromarray(np.full((2, 2), 128 * 257, np.uint16))
    close(loaded(deep, tmp_path / "16.png", 2, icc_profile=light), LINEAR_128, atol=2)
    la = Image.new("LA", (2, 2), (128, 255))
    close(loaded(la, tmp_path / "la.png", 2, icc_profile=light), LINEAR_128, atol=2)


def test_colour_profiles_of_inks(tmp_path):
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for name in ("x.tif", "x.jpg"):
        black = loaded(red, tmp_path / name, 8, icc_profile=ink_profile())
        assert black.max() < 10
        paper = Image.new("CMYK", (8, 8), 0)
        assert loaded(paper, tmp_path / name, 8, icc_profile=ink_profile()).min() > 245


@pytest.mark.parametrize("broken", [
    b"nonsense", profile(b"RGB ")[:200], profile(b"GRAY"), ink_profile(), profile(b"RGB ")[:128],
    b"\0" * 300], ids=["text", "cut off", "of grey", "of inks", "no tags", "zeros"])
def test_profiles_that_are_broken_or_of_other_colours_are_ignored(tmp_path, broken):
    pixels = random_pixels(8, 8)
    close(loaded(Image.fromarray(pixels), tmp_path / "x.png", 8, icc_profile=broken), pixels)


def test_lab(tmp_path):
    lab = Image.merge("LAB", [Image.new("L", (4, 4), value) for value in (138, 128, 128)])
    assert np.ptp(loaded(lab, tmp_path / "x.tif", 4)) < 3       # grey
    close(loaded(lab, tmp_path / "x.tif", 4), 129, atol=4)      # of L* = 54


def test_sixteen_bits_are_rounded(tmp_path):
    values = np.array([[0, 128], [129, 65535 - 128]], np.uint16)
    for name in ("x.png", "x.tif", "x.jp2", "x.pgm"):
        options = {"irreversible": False} if name == "x.jp2" else {}
        pixels = loaded(Image.fromarray(values), tmp_path / name, 2, **options)[..., 0]
        close(pixels, [[0, 0], [1, 255]])


def test_transparent_grey_of_sixteen_bits(tmp_path):
    values = np.array([[0, 500], [501, 65535]], np.uint16)
    pixels = loaded(Image.fromarray(values), tmp_path / "x.png", 2, transparency=501)[..., 0]
    close(pixels, [[0, 2], [255, 255]])


def tiff(values, bits, kind, photometric=1):
    """A TIFF of one row. kind: 1 unsigned, 2 signed, 3 float; values: its bytes."""
    width = len(values) * 8 // bits
    tags = [(256, 4, width), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
            (273, 4, 8), (277, 3, 1), (278, 4, 1), (279, 4, len(values)), (339, 3, kind)]
    entries = b"".join(struct.pack("<HHII", tag, code, 1, value) for tag, code, value in tags)
    end = struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"
    return b"II*\0" + struct.pack("<I", 8 + len(values)) + values + end


def pixels_of(path, content):
    path.write_bytes(content)
    return np.asarray(load_picture(path))[0, :, 0].tolist()


@pytest.mark.parametrize("values, bits, kind, photometric, expected", [
    (np.array([0, 0.5, 1], "<f4"), 32, 3, 1, [0, 128, 255]),
    (np.array([0, 0.5, 1], "<f4"), 32, 3, 0, [255, 128, 0]),
    (np.array([0, 25700, 65535], "<i4"), 32, 1, 1, [0, 100, 255]),
    (np.array([0, 25700, 65535], "<i4"), 32, 2, 1, [0, 100, 255]),
    (np.array([0, 25700, 32767], "<i2"), 16, 2, 1, [0, 100, 127]),
    (np.array([0, 25700, 65535], "<u2"), 16, 1, 1, [0, 100, 255]),
    (np.array([0, 25700, 65535], "<u2"), 16, 1, 0, [255, 155, 0]),
    (bytes([0x00, 0x08, 0x00, 0xff, 0xf0, 0x00]), 12, 1, 1, [0, 128, 255, 0]),
    (np.array([0, 100, 255], "u1"), 8, 1, 0, [255, 155, 0])])
def test_tiffs_of_known_range(tmp_path, values, bits, kind, photometric, expected):
    content = values if isinstance(values, bytes) else values.tobytes()
    pixels = pixels_of(tmp_path / "x.tif", tiff(content, bits, kind, photometric))
    close(pixels, expected, atol=1 if bits == 12 else 0.1)


@pytest.mark.parametrize("values, kind, words", [
    (np.array([0, 0.5, 255], "<f4"), 3, "the values are 0 to 255, expected 0 to 1"),
    (np.array([-0.1, 0.5, 1], "<f4"), 3, "the values are -0.1 to 1, expected 0 to 1"),
    (np.array([0, np.nan, 1], "<f4"), 3, "the values are nan to nan"),
    (np.array([0, np.inf, 1], "<f4"), 3, "the values are 0 to inf"),
    (np.array([0, 65536], "<i4"), 2, "the values are 0 to 65536, expected 0 to 65535"),
    (np.array([-1, 3000], "<i4"), 2, "the values are -1 to 3000, expected 0 to 65535"),
    (np.array([0, 2 ** 32 - 1], "<u4"), 1, "expected 0 to 65535"),
    (np.array([0, 255], "<i4"), 2, "the values are 0 to 255 of 32 bits: 8 bits or 16 bits?")])
def test_tiffs_of_unknown_range(tmp_path, values, kind, words):
    path = tmp_path / "x.tif"
    path.write_bytes(tiff(values.tobytes(), 32, kind))
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        load_image(path, 4)
    assert str(error.value).startswith(f"{path}: cannot be read as a picture (the values are")


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif"])
def test_broken_exif_turns_no_picture_away(tmp_path, name, orientation):
    """Phones write fractions such as 0/0 and -2/0, which Pillow cannot write again."""
    pixels, exif = np.zeros((8, 12, 3), np.uint8), Image.Exif()
    pixels[:, 6:] = 255
    exif[0x0112] = orientation
    exif.get_ifd(0x8769)[0x829a] = TiffImagePlugin.IFDRational(0, 0)        # exposure time
    exif.get_ifd(0x8769)[0x9204] = TiffImagePlugin.IFDRational(1234, 77)    # exposure bias
    path = tmp_path / name
    Image.fromarray(pixels).save(path, exif=exif.tobytes(), quality=100)
    if name in ("x.jpg", "x.webp"):                             # without a checksum
        content, bias = path.read_bytes(), struct.pack(">ii", 1234, 77)
        assert bias in content
        path.write_bytes(content.replace(bias, struct.pack(">ii", -2, 0)))
    shown = np.asarray(load_picture(path)).astype(int)
    assert shown.shape == ((8, 12, 3) if orientation == 1 else (12, 8, 3))
    assert shown[0, 0, 0] < 10 and shown[-1, -1, 0] > 245


def test_exif_that_is_no_exif(tmp_path):
    pixels = random_pixels(8, 8)
    for junk in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 40):
        close(loaded(Image.fromarray(pixels), tmp_path / "x.png", 8, exif=junk), pixels)


@pytest.mark.parametrize("error", [
    ZeroDivisionError("division by zero"), struct.error("short"), KeyError(3), IndexError("x"),
    TypeError("x"), EOFError(), MemoryError(), OverflowError("x"), AttributeError("x"),
    zlib.error("x"), RuntimeError("x"), NotImplementedError()],
    ids=lambda error: type(error).__name__)
def test_whatever_pillow_raises(tmp_path, monkeypatch, error):
    path = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(path)

    def fail(*_):
        raise error

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    reason = str(error) or type(error).__name__
    words = f"{path}: cannot be read as a picture ({reason})"
    with pytest.raises(ValueError, match=re.escape(words)):
        load_image(path, 8)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.gif", "x.webp", "x.tif", "x.bmp", "x.ppm"])
def test_damaged_pictures_are_read_or_refused(tmp_path, name):
    path, rng = tmp_path / name, np.random.default_rng(0)
    Image.fromarray(random_pixels(24, 24)).save(path)
    whole = path.read_bytes()
    for _ in range(30):
        content = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 400), 3):
            content[place] = rng.integers(0, 256)
        path.write_bytes(content)
        try:
            assert load_image(path, 16).shape == (3, 16, 16)
        except ValueError as error:
            assert str(error).startswith(f"{path}: cannot be read as a picture (")


@pytest.mark.parametrize("written, stored", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_the_other_form_of_unicode(tmp_path, written, stored):
    Image.new("RGB", (4, 4), "white").save(tmp_path / unicodedata.normalize(stored, "café.png"))
    assert (load_image(tmp_path / unicodedata.normalize(written, "café.png"), 4) == 1).all()


# ---------------------------------------------------------------- the order of batches

def take(order, count):
    return list(itertools.islice(order, count))


def one(count):
    """A single group of all of `count` examples."""
    return [Group("only", list(range(count)), 1.0)]


def groups_of(*weights, size=12):
    """Groups of `size` examples each, with these weights; examples are numbered through."""
    return [Group(f"task {g}", list(range(g * size, (g + 1) * size)), weight)
            for g, weight in enumerate(weights)]


MIXED = groups_of(3.0, 1.0, 0.5, 0.5)


def test_order_is_deterministic_and_depends_on_the_seed():
    for groups in (one(20), MIXED):
        first = take(BatchOrder(groups, 3, seed=1), 15)
        assert first == take(BatchOrder(groups, 3, seed=1), 15)
        assert first[:6] != take(BatchOrder(groups, 3, seed=2), 6)


@pytest.mark.parametrize("start", [0, 1, 5, 6, 7, 13, 40])
def test_start_continues_exactly(start):
    for groups in (one(20), MIXED):         # epochs of six batches, and of various lengths
        whole = take(BatchOrder(groups, 3, seed=1), 60)
        assert take(BatchOrder(groups, 3, seed=1, start=start), 60 - start) == whole[start:]


def test_every_epoch_is_a_permutation_of_its_own():
    batches = take(BatchOrder(one(12), 3, seed=4), 12)
    epochs = [sum(batches[i:i + 4], []) for i in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != sorted(epochs[0])


def test_every_epoch_of_every_group_is_a_permutation():
    batches = take(BatchOrder(MIXED, 3, seed=4), 200)
    orders = set()
    for group in MIXED:
        own = [batch for batch in batches if batch[0] in group.indices]
        assert all(set(batch) <= set(group.indices) for batch in own) and len(own) >= 12
        for i in range(0, len(own) - 3, 4):
            epoch = sum(own[i:i + 4], [])
            assert sorted(epoch) == group.indices
            orders.add(tuple(x - group.indices[0] for x in epoch))
    assert len(orders) > 45                 # groups of one size do not share orders


def test_ranks_are_disjoint_and_make_up_the_epoch():
    """An epoch has three batches on each rank."""
    ranks = [take(BatchOrder(one(20), 3, seed=2, rank=rank, world=2), 6) for rank in range(2)]
    for epoch in (slice(0, 3), slice(3, 6)):
        seen = [i for rank in ranks for batch in rank[epoch] for i in batch]
        assert len(seen) == len(set(seen)) == 18 and set(seen) <= set(range(20))
    twice_the_batch = take(BatchOrder(one(20), 6, seed=2), 6)
    assert [a + b for a, b in zip(*ranks)] == twice_the_batch


def test_ranks_have_the_same_group_and_other_examples():
    ranks = [take(BatchOrder(MIXED, 2, seed=2, rank=rank, world=3), 80) for rank in range(3)]
    for batches in zip(*ranks):
        seen = sum(batches, [])
        assert len(set(seen)) == 6 and len({i // 12 for i in seen}) == 1    # 12 examples a group


def behind(groups, batches):
    """How far each group is behind its share of the first n batches, (batches, groups)."""
    weights = np.array([group.weight for group in groups])
    group_of = {i: g for g, group in enumerate(groups) for i in group.indices}
    which = np.array([group_of[batch[0]] for batch in batches])
    used = (which[:, None] == np.arange(len(groups))).cumsum(0)
    return np.arange(1, len(batches) + 1)[:, None] * weights / weights.sum() - used


@pytest.mark.parametrize("weights", [
    (1,), (1, 1), (3, 1, 0.5, 0.5), (6, 5, 2.5, 1, 1, 0.8, 0.8, 0.9, 2.5), (100, 1),
    (1, 1, 1, 1, 1, 1, 1)])
def test_shares_follow_the_weights_at_any_time(weights):
    """A group is less than a batch ahead of its share, and at most 1.2 batches behind it."""
    groups = groups_of(*weights, size=2)
    batches = take(BatchOrder(groups, 2, seed=0), 500)
    gaps = behind(groups, batches)
    assert gaps.min() > -1 and gaps.max() < 1.2
    early = batches[:round(2.5 * sum(weights) / min(weights))]      # no group waits for long
    assert {batch[0] // 2 for batch in early} == set(range(len(groups)))


def test_shares_follow_any_weights():
    rng = random.Random(0)
    for _ in range(40):
        weights = [rng.random() ** 3 + 1e-3 for _ in range(rng.randint(2, 10))]
        groups = groups_of(*weights, size=1)
        gaps = behind(groups, take(BatchOrder(groups, 1, seed=0), 300))
        assert gaps.min() > -1 and gaps.max() < 1.2


def test_order_does_not_depend_on_the_scale_of_the_weights():
    large, small = groups_of(3, 1, 2), groups_of(0.75, 0.25, 0.5)
    assert take(BatchOrder(large, 3, seed=0), 50) == take(BatchOrder(small, 3, seed=0), 50)


def test_a_group_too_small_for_one_batch_is_repeated():
    """No task is dropped for its size: all of its examples come, each about equally often."""
    groups = [*groups_of(1, size=40), Group("few", [100, 101, 102], 1.0)]
    batches = [batch for rank in (0, 1)
               for batch in take(BatchOrder(groups, 4, seed=0, rank=rank, world=2), 60)]
    few = [batch for batch in batches if batch[0] >= 100]
    assert len(few) == 60 and all(len(batch) == 4 for batch in few)
    counts = [sum(batch.count(i) for batch in few) for i in (100, 101, 102)]
    assert sum(counts) == 240 and max(counts) - min(counts) <= 40


# ---------------------------------------------------------------- weights

@pytest.mark.parametrize("text, weights", [
    ("*=1", {"*": 1}),
    ("edits=2,pose=0.5,*=1", {"edits": 2, "pose": 0.5, "*": 1}),
    (" a = 3 , b=0", {"a": 3, "b": 0}),
    ("a b=1e-3", {"a b": 0.001})])
def test_weights(text, weights):
    assert parse_weights(text) == weights


@pytest.mark.parametrize("text", [
    "", "edits", "edits=", "=1", "edits=two", "edits=1,", "edits=1;pose=2", "edits=0", "a=0,b=0",
    "a=1,b=-1", "a=nan", "a=1,b=nan", "a=inf", "a=1=2"])
def test_texts_that_are_no_weights(text):
    with pytest.raises(ValueError, match=re.escape(f"weights {text!r}, expected TASK=NUMBER")):
        parse_weights(text)


def test_numbers_of_tasks_may_be_negative():
    assert parse_numbers("a=-1,*=0", "means") == {"a": -1, "*": 0}
    with pytest.raises(ValueError, match="means 'a', expected TASK=NUMBER"):
        parse_numbers("a", "means")


# ---------------------------------------------------------------- tasks

class Letters:
    """A tokenizer for the tests: the code points of a text, "_" at the end and as padding."""

    eos_id, unk_id = ord("_"), ord("?")

    def encode(self, text):
        return [*map(ord, text), self.eos_id]

    def __call__(self, texts, length):
        return torch.tensor([[ord(c) for c in text.ljust(length, "_")[:length]] for text in texts])

    def dialogue(self, questions, answers, length, before):
        assert not any(before)
        starts = torch.tensor([len(q) for q in questions])
        ids = self([q + a for q, a in zip(questions, answers)], length)
        return ids, torch.arange(length) >= starts[:, None]


def letters(ids):
    return ["".join(map(chr, row)) for row in ids.tolist()]


@pytest.fixture
def records(folder):
    """Twelve examples of every kind.

    Three pairs, a prompt that differs from its caption, two edits, a map, three compositions and
    two questions.
    """
    def path(name):
        return f"images/{name}.png"

    def edit(source, target):
        return {"task": "edits", "image": [path(source), path(target)],
                "conversations": [target * 2], "instruction": f"{source}>{target}"}

    def composition(sources, target):
        return {"task": "all", "original_images": [path(source) for source in sources],
                "generated_images": [path(target)], "edit_prompt": sources, "caption": target}

    pairs = [{"image": [path(name)], "conversations": [name * 2, "<image>"]} for name in "abc"]
    partial = {"original_images": [], "generated_images": [path("d")],
               "edit_prompt": "p", "caption": "dd"}
    edges = {"task": "edges", "image": [path("a"), path("e")],
             "conversations": [""], "instruction": "draw"}
    questions = {"image": [path("e")], "conversations": ["<image>q", "one", "qq", "two"]}
    return read_jsonl(write(
        folder, pairs[0], questions, *pairs[1:], partial, edit("a", "b"), edit("c", "e"), edges,
        composition("abc", "d"), composition("b", "c"), composition("c", "b")))


def tasks(records, **options):
    return Tasks(records, Letters(), image_size=4, text_length=6, **options)


def sources_of(dataset, group):
    """The number of source pictures, which all examples of a group share."""
    [count] = {len(dataset.records[i].sources) for i in group.indices}
    return count


def shape(dataset):
    """{(task, number of sources): (size, weight)} of its groups."""
    return {(group.task, sources_of(dataset, group)): (len(group.indices), group.weight)
            for group in dataset.groups}


def test_groups_are_by_task_and_number_of_sources(records):
    dataset = tasks(records)
    assert len(dataset) == len(records) == 12
    assert dataset.records == records and dataset.left_out == []
    assert shape(dataset) == {
        ("text_to_image", 0): (4, 1), ("questions", 0): (2, 1), ("edits", 1): (2, 1),
        ("edges", 1): (1, 1),
        ("all", 1): (2, pytest.approx(2 / 3)), ("all", 3): (1, pytest.approx(1 / 3))}
    assert sorted(i for group in dataset.groups for i in group.indices) == list(range(12))
    for group in dataset.groups:
        assert {dataset.records[i].task for i in group.indices} == {group.task}


@pytest.mark.parametrize("tokens, sources, longest, multiple, expected", [
    (1, 1, 32, 16, 16),
    (16, 1, 32, 16, 16),
    (17, 2, 32, 16, 32),
    (40, 1, 32, 16, 32),
    (16, 0, 32, 16, 32),
    (3, 1, 32, 0, 32),
    (3, 1, 10, 16, 10)])
def test_length_of_a_prompt(tokens, sources, longest, multiple, expected):
    assert prompt_length(tokens, sources, longest, multiple) == expected


def test_impossible_multiple():
    with pytest.raises(ValueError, match="prompt_multiple = -3"):
        prompt_length(4, 1, 32, -3)


def test_prompts_about_pictures_are_padded_little(records):
    """Instructions of two lengths are two groups, which share their task's weight.

    Prompts without source pictures and texts to write keep their full length.
    """
    short = records[6]._replace(prompt="x")
    dataset = tasks([*records, short], prompt_multiple=2, captioned="text_to_image,all",
                    weights="edits=3,*=1")
    sizes = collections.Counter()           # by task, sources, length of the prompts and weight
    for group in dataset.groups:
        batch = dataset.__getitems__(group.indices)
        if batch.prompts is not None:
            length = batch.prompts.shape[1]
            expected = [dataset.records[i].prompt.ljust(length, "_") for i in group.indices]
            assert letters(batch.prompts) == expected
            key = group.task, sources_of(dataset, group), length, round(group.weight, 4)
            sizes[key] += len(group.indices)
        if batch.tokens is not None:
            assert batch.tokens.shape[1] == 6
    assert sizes == {
        ("text_to_image", 0, 6, 1): 4, ("edits", 1, 4, 2): 2, ("edits", 1, 2, 1): 1,
        ("edges", 1, 6, 1): 1, ("all", 1, 2, 0.6667): 2, ("all", 3, 4, 0.3333): 1}


def test_groups_have_the_weights_of_their_tasks(records):
    dataset = tasks(records, weights="all=3,edits=0.5,edges=0,*=2")
    assert shape(dataset) == {
        ("text_to_image", 0): (4, 2), ("questions", 0): (2, 2), ("edits", 1): (2, 0.5),
        ("all", 1): (2, 2), ("all", 3): (1, 1)}
    assert dataset.left_out == ["edges"] and len(dataset) == 11
    assert dataset.records == [e for e in records if e.task != "edges"]
    only = tasks(records, weights="questions=1")
    assert shape(only) == {("questions", 0): (2, 1)}
    assert only.left_out == ["all", "edges", "edits", "text_to_image"]
    assert [path.name for path in only.paths] == ["e.png"]      # other pictures are not read


def test_a_task_of_pictures_with_and_without_captions(records):
    """Examples of a task that have no caption are a group of their own."""
    bare = records[0]._replace(caption="")
    dataset = tasks([*records, bare], weights="text_to_image=5")
    sizes = sorted((len(group.indices), group.weight) for group in dataset.groups)
    assert sizes == [(1, 1), (4, 4)]
    for group in dataset.groups:
        tokens = dataset.__getitems__(group.indices).tokens
        assert (tokens is None) == (list(group.indices) == [4])


@pytest.mark.parametrize("captioned, expected", [
    ("*", {"text_to_image", "edits", "all", "questions"}),
    ("text_to_image", {"text_to_image", "questions"}),
    ("", {"questions"}),
    ("edits, all", {"edits", "all", "questions"}),
    ("edges", {"questions"})])
def test_captioned_tasks_train_the_text_branch(records, captioned, expected):
    dataset = tasks(records, captioned=captioned)
    assert {key.task for key in dataset.keys if key.writes} == expected
    for group in dataset.groups:
        tokens = dataset.__getitems__(group.indices).tokens
        assert (tokens is not None) == (group.task in expected)
    assert {dataset.records[i].task for i in dataset.aligned} == expected - {"questions"}


@pytest.mark.parametrize("options", [
    {"weights": "edit=1,*=1"}, {"captioned": "edit"}, {"captioned": "edits,edit"}])
def test_unknown_tasks(records, options):
    with pytest.raises(ValueError, match="no records of the task 'edit', .* the data has all, "
                                         "edges, edits, questions, text_to_image"):
        tasks(records, **options)


def test_nothing_left(records):
    some = [e for e in records if e.task in ("text_to_image", "edges")]
    with pytest.raises(ValueError, match="no examples are left.*text_to_image.*edges=0"):
        tasks(some, weights="text_to_image=0,*=1,edges=0")


@pytest.mark.parametrize("field", ["prompt", "question", "caption"])
def test_the_mask_token_in_a_text(records, field):
    bad = records[1]._replace(**{field: "x <extra_id_0> y"})
    with pytest.raises(ValueError, match="e.png holds the mask token <extra_id_0>"):
        tasks([bad, *records])


def level(images):
    """The grey levels, which distinguish the pictures of the fixture."""
    return ((images[..., 0, 0, 0] + 1) * 127.5).round().int().tolist()


def of(dataset, task, sources):
    """The indices of the first group of a task with this number of source pictures."""
    return next(group.indices for group in dataset.groups
                if group.task == task and sources_of(dataset, group) == sources)


def test_batches_with_images(records):
    dataset = tasks(records)
    batch = dataset.__getitems__(of(dataset, "text_to_image", 0)[::-1])
    assert isinstance(batch, Batch) and batch.task == "text_to_image"
    assert batch.latents is batch.features is None
    assert batch.images.shape == (4, 1, 3, 4, 4)
    assert level(batch.images) == [[150], [100], [50], [0]]
    assert letters(batch.prompts) == ["p_____", "cc____", "bb____", "aa____"]
    assert batch.prompts.dtype == torch.int64
    assert letters(batch.tokens) == ["dd____", "cc____", "bb____", "aa____"]
    assert batch.answer.all() and batch.answer.shape == (4, 6)

    batch = dataset.__getitems__(of(dataset, "edits", 1))
    assert batch.images.shape == (2, 2, 3, 4, 4)
    assert level(batch.images) == [[50, 0], [200, 100]]         # the source after the image
    assert letters(batch.prompts) == ["a>b___", "c>e___"]
    assert letters(batch.tokens) == ["bb____", "ee____"]

    batch = dataset.__getitems__(of(dataset, "all", 3))
    assert batch.images.shape == (1, 4, 3, 4, 4)
    assert level(batch.images) == [[150, 0, 50, 100]]           # the sources in their order
    assert letters(batch.prompts) == ["abc___"] and letters(batch.tokens) == ["d_____"]

    batch = dataset.__getitems__(of(dataset, "edges", 1))
    assert batch.tokens is batch.answer is None
    assert letters(batch.prompts) == ["draw__"] and level(batch.images) == [[200, 0]]


def test_batches_of_questions(records):
    dataset = tasks(records)
    batch = dataset.__getitems__(of(dataset, "questions", 0))
    assert batch.task == "questions" and batch.prompts is None
    assert level(batch.images) == [[200], [200]]
    assert letters(batch.tokens) == ["qone__", "qqtwo_"] and batch.tokens.dtype == torch.int64
    # everything except the question
    assert batch.answer.tolist() == [[False] + [True] * 5, [False] * 2 + [True] * 4]


@pytest.mark.parametrize("is_cached", [False, True])
def test_batches_of_texts_without_pictures(folder, is_cached):
    """They share no batch with questions about pictures, and have a length of their own."""
    lines = [{"conversations": ["p", "plan", "pp", "plans"]},
             {"image": ["images/e.png"], "conversations": ["q", "one"]}]
    records = read_jsonl(write(folder, *lines))
    dataset = tasks(records, text_only_length=8)
    assert len(dataset.groups) == 2 and [path.stem for path in dataset.paths] == ["e"]
    if is_cached:
        dataset.latents = torch.zeros(1, 16, 2, 2)
    batch = dataset.__getitems__([0, 1])
    assert batch.images is None and batch.latents is None and batch.prompts is None
    assert letters(batch.tokens) == ["pplan___", "ppplans_"]
    assert batch.answer.tolist() == [[False] + [True] * 7, [False] * 2 + [True] * 6]
    assert batch.captions == ("plan", "plans") and batch.task == "questions"
    with_picture = dataset.__getitems__([2])
    assert letters(with_picture.tokens) == ["qone__"]
    assert (with_picture.latents if is_cached else with_picture.images) is not None


def test_batches_with_latents(records, monkeypatch):
    dataset = tasks(records)
    names = [path.stem for path in dataset.paths]
    assert sorted(names) == list("abcde")                       # each picture once
    values = torch.tensor([float(ord(name)) for name in names])
    dataset.latents = values.view(5, 1, 1, 1).expand(5, 16, 2, 2)
    monkeypatch.setattr("data.load_picture", lambda *_: pytest.fail("the picture was read again"))
    for task, sources, expected in (
            ("edits", 1, ["ba", "ec"]), ("all", 3, ["dabc"]), ("questions", 0, ["e", "e"])):
        batch = dataset.__getitems__(of(dataset, task, sources))
        assert batch.images is None
        assert batch.latents.shape == (len(expected), len(expected[0]), 16, 2, 2)
        assert letters(batch.latents[..., 0, 0, 0].int()) == expected
    assert letters(batch.tokens) == ["qone__", "qqtwo_"]


def test_batches_with_features(records):
    """Features go to examples with a prompt and a caption, in the order of the examples."""
    dataset = tasks(records, captioned="text_to_image,all")
    aligned = [dataset.records[i] for i in dataset.aligned]
    assert [e.image.stem for e in aligned] == ["a", "b", "c", "d", "d", "c", "b"]
    images = torch.tensor([[float(ord(e.image.stem)), 1] for e in aligned])
    texts = torch.tensor([[float(len(e.caption)), 2, 3] for e in aligned])

    def features(indices):
        rows = np.searchsorted(dataset.aligned, indices)
        return images[rows], texts[rows]

    dataset.features = features
    image, text = dataset.__getitems__(of(dataset, "all", 1)).features
    assert image.shape == (2, 2) and text.shape == (2, 3)
    assert image.dtype == text.dtype == torch.float32
    assert image.tolist() == [[ord("c"), 1], [ord("b"), 1]]
    assert text.tolist() == [[1, 2, 3], [1, 2, 3]]
    image, text = dataset.__getitems__(of(dataset, "text_to_image", 0)[1:3]).features
    assert image[:, 0].tolist() == [ord("b"), ord("c")] and text[:, 0].tolist() == [2, 2]
    for group in (("edits", 1), ("edges", 1), ("questions", 0)):
        assert dataset.__getitems__(of(dataset, *group)).features is None


def test_batch_to_a_device_moves_every_tensor(records):
    dataset = tasks(records)
    dataset.features = lambda indices: (torch.zeros(len(indices), 2), torch.zeros(len(indices), 3))
    batch = dataset.__getitems__(of(dataset, "edits", 1)).to(torch.device("meta"))
    assert batch.task == "edits" and batch.latents is None and isinstance(batch, Batch)
    tensors = batch.images, batch.prompts, batch.tokens, batch.answer, *batch.features
    assert all(x.is_meta for x in tensors)


def test_tasks_in_a_loader(records):
    """Without weights all tasks have equally many batches."""
    dataset = tasks(records)
    order = BatchOrder(dataset.groups, 1, seed=0)
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=order, collate_fn=lambda batch: batch)
    seen = collections.Counter()
    for batch, indices in zip(loader, take(order, 25)):
        example = dataset.records[indices[0]]
        assert batch.task == example.task
        assert batch.images.shape == (1, 1 + len(example.sources), 3, 4, 4)
        if batch.prompts is not None:
            assert letters(batch.prompts) == [example.prompt.ljust(6, "_")]
        seen[batch.task] += 1
    assert set(seen.values()) == {5} and len(seen) == 5


# ---------------------------------------------------------------- shapes of images

WIDE, TALL = (16, 64), (64, 16)             # height and width, of the shapes for 32 pixels

@pytest.fixture
def shaped(folder):
    """Examples of landscapes, portraits and squares, with the aspects of their pictures."""
    sizes = {"a": (64, 16), "b": (16, 64), "c": (20, 20), "d": (128, 32), "e": (32, 32)}
    for i, (name, size) in enumerate(sizes.items()):
        Image.new("RGB", size, (50 * i,) * 3).save(folder / "images" / f"{name}.png")

    def example(task, image, *sources):
        return Example(task, folder / f"images/{image}.png",
                       tuple(folder / f"images/{name}.png" for name in sources), "p", "", "x")

    examples = [*(example("draw", name) for name in "abcde"),
                example("edit", "a", "b", "c"), example("edit", "b", "a", "e")]
    aspects = aspects_of([sizes[e.image.stem][::-1] for e in examples])
    return examples, Buckets(bucket_shapes(32, 4, unit=16), aspects)


def test_a_batch_has_the_shape_of_its_pictures(shaped):
    """Sources are cropped to the shape of what is drawn."""
    examples, buckets = shaped
    assert buckets.shapes == [TALL, (48, 16), (32, 32), (16, 48), WIDE]
    dataset = Tasks(examples, Letters(), 32, 6, buckets=buckets)
    members = {(key.task, key.shape): group.indices.tolist()
               for key, group in zip(dataset.keys, dataset.groups)}
    assert members == {("draw", WIDE): [0, 3], ("draw", TALL): [1], ("draw", (32, 32)): [2, 4],
                       ("edit", WIDE): [5], ("edit", TALL): [6]}
    for key, group in zip(dataset.keys, dataset.groups):
        batch = dataset.__getitems__(group.indices.tolist())
        assert batch.images.shape == (len(group.indices), 1 + key.sources, 3, *key.shape)
        assert {dataset.shape_of(i) for i in group.indices} == {key.shape}
    assert level(batch.images) == [[50, 0, 200]]
    weights = collections.Counter()
    for group in dataset.groups:
        weights[group.task] += group.weight
    assert weights == {"draw": pytest.approx(1), "edit": pytest.approx(1)}


def test_the_share_that_is_cropped(shaped):
    """By hand: all shapes fit; squares keep a quarter of 4 : 1, in five of seven pictures."""
    examples, buckets = shaped
    whole = Tasks(examples, Letters(), 32, 6, buckets=buckets)
    assert whole.cropped == pytest.approx((0, 0.75 * 5 / 7))
    edits = Tasks(examples, Letters(), 32, 6, buckets=buckets, weights="edit=1")
    assert edits.cropped == pytest.approx((0, 0.75)) and edits.shape_of(1) == TALL
    assert Tasks(examples, Letters(), 32, 6).cropped is None


def test_ranks_take_the_same_shape(shaped):
    examples, buckets = shaped
    dataset = Tasks(examples * 3, Letters(), 32, 6,
                    buckets=buckets._replace(aspects=np.tile(buckets.aspects, 3)))
    ranks = [take(BatchOrder(dataset.groups, 2, 0, rank, 2), 30) for rank in (0, 1)]
    for batches in zip(*ranks):
        assert len({dataset.shape_of(i) for batch in batches for i in batch}) == 1


def test_a_replacement_has_the_same_shape(shaped):
    examples, buckets = shaped
    examples[0].image.write_bytes(b"")
    dataset = Tasks(examples[:5], Letters(), 32, 6,
                    buckets=buckets._replace(aspects=buckets.aspects[:5]))
    batch = dataset.__getitems__([0, 3])
    assert batch.records == ("example 3", "example 3") and batch.images.shape[-2:] == WIDE


def test_one_shape_changes_nothing(shaped):
    examples, buckets = shaped
    plain = Tasks(examples, Letters(), 32, 6)
    same_shape = Tasks(examples, Letters(), 32, 6,
                       buckets=buckets._replace(shapes=bucket_shapes(32)))
    assert plain.keys == same_shape.keys
    for group, other in zip(plain.groups, same_shape.groups):
        assert (group.task, group.weight) == (other.task, other.weight)
        assert group.indices.tolist() == other.indices.tolist()
        assert torch.equal(plain.__getitems__(group.indices).images,
                           same_shape.__getitems__(group.indices).images)


# ---------------------------------------------------------------- records that cannot be used

TOKENIZER = T5Tokenizer(TESTS / "golden" / "t5_spiece.model")


def pair(name):
    return {"image": [f"images/{name}.png"], "conversations": [name * 2, "<image>"]}


def opened(folder, *lines, **options):
    """Tasks on an index of these lines."""
    found = open_records([write(folder, *lines)], TOKENIZER, 16, folder)
    return Tasks(found, TOKENIZER, image_size=4, text_length=16, **options)


def same(a, b):
    """Whether two batches are equal, except in the names of their records."""
    return a.task == b.task and all(
        x is y is None or torch.equal(x, y) for x, y in zip(a[1:6], b[1:6])) and (
        a.captions == b.captions)


@pytest.mark.parametrize("options", [
    {}, {"weights": "edits=3,edges=0,*=1", "captioned": "all", "prompt_multiple": 2}])
def test_an_index_gives_the_batches_of_a_list(folder, records, options):
    path = folder / "records.jsonl"
    plain = Tasks(read_jsonl(path), TOKENIZER, 4, 16, **options)
    lazy = Tasks(open_records([path], TOKENIZER, 16, folder), TOKENIZER, 4, 16, **options)
    assert lazy.left_out == plain.left_out and list(lazy.records) == plain.records
    assert [(g.task, g.weight, list(g.indices)) for g in lazy.groups] == [
        (g.task, g.weight, list(g.indices)) for g in plain.groups]
    assert lazy.aligned.tolist() == plain.aligned.tolist() and lazy.paths == plain.paths
    orders = [take(BatchOrder(dataset.groups, 2, seed=3), 40) for dataset in (plain, lazy)]
    assert orders[0] == orders[1]
    for indices in orders[0]:
        batch = lazy.__getitems__(indices)
        assert same(batch, plain.__getitems__(indices)) and not batch.skipped
        assert batch.records == tuple(lazy.records.origin(i) for i in indices)


def test_questions_in_a_template(folder):
    """A question has it, a caption does not; the index and a list give the same batches."""
    template = "Q: {question} A: "
    path = write(folder, pair("b"), {"image": A, "conversations": ["who is it?", "a", "q", "b"]})
    plain = Tasks(read_jsonl(path), TOKENIZER, 4, 16, template=template)
    lazy = Tasks(open_records([path], TOKENIZER, 16, folder, template), TOKENIZER, 4, 16,
                 template=template)
    for dataset in (plain, lazy):
        batch = dataset.__getitems__([1, 2])
        expected = TOKENIZER.dialogue(["Q: who is it? A: ", "Q: q A: "], ["a", "b"], 16)
        assert all(map(torch.equal, (batch.tokens, batch.answer), expected))
        assert torch.equal(dataset.__getitems__([0]).tokens, TOKENIZER(["bb"], 16))
    with pytest.raises(ValueError, match="'Q: who is it. A: ' has .* too little room"):
        Tasks(read_jsonl(path), TOKENIZER, 4, 8, template=template)


def test_a_batch_of_dialogues(folder):
    """Token by token: questions are given, answers with their ends and the padding are not."""
    turns = ["who is it?", "a cat", "what color?", "black", "q", "yes"]
    path = write(folder, {"image": A, "conversations": turns},
                 {"image": A, "conversations": turns[:2]})
    talks = open_records([path], TOKENIZER, 40, folder, "ask {question}", dialogues=True)
    batch = Tasks(talks, TOKENIZER, 4, 40, template="ask {question}").__getitems__([0, 1])
    for row, count in ((0, 6), (1, 2)):
        ids, answer = [], []
        for i, text in enumerate(turns[:count]):
            part = TOKENIZER.encode(text) if i % 2 else TOKENIZER.encode(f"ask {text}")[:-1]
            ids += part
            answer += [bool(i % 2)] * len(part)
        assert batch.tokens[row].tolist() == ids + [1] * (40 - len(ids))
        assert batch.answer[row].tolist() == answer + [True] * (40 - len(ids))
    assert batch.captions == ("yes", "a cat") and batch.prompts is None


def test_captions_of_a_batch(records):
    dataset = tasks(records, captioned="text_to_image")
    assert dataset.__getitems__(of(dataset, "text_to_image", 0)[:2]).captions == ("aa", "bb")
    assert dataset.__getitems__(of(dataset, "questions", 0)).captions == ("one", "two")
    assert dataset.__getitems__(of(dataset, "edits", 1)).captions == ()


def test_another_record_takes_the_place_of_an_unusable_one(folder):
    (folder / "images" / "b.png").write_bytes(b"not a picture")
    (folder / "images" / "e.png").unlink()
    dataset = opened(folder, *[pair(name) for name in "abcde"],
                     {"image": A, "conversations": ["q", "a"]})
    path = folder / "records.jsonl"
    batch = dataset.__getitems__([1, 0, 4])
    used = [int(record.rpartition(" ")[2]) for record in batch.records]
    assert used[1] == 1 and set(used) <= {1, 3, 4}
    assert level(batch.images) == [[50 * (line - 1)] for line in used]
    assert list(batch.captions) == ["abcde"[line - 1] * 2 for line in used]
    reasons = dict(batch.skipped)
    assert set(reasons) == {f"{path}, line 2", f"{path}, line 5"}
    assert "b.png: cannot be read as a picture" in reasons[f"{path}, line 2"]
    assert "e.png: cannot be read as a picture" in reasons[f"{path}, line 5"]
    assert same(batch, dataset.__getitems__([1, 0, 4]))         # as a resumed run takes it
    again = Tasks(open_records([path], TOKENIZER, 16, folder), TOKENIZER, 4, 16)
    assert again.__getitems__([1, 0, 4]).records == batch.records
    assert dataset.__getitems__([0, 2]).skipped == ()


def test_replacements_differ_from_record_to_record(folder):
    (folder / "images" / "e.png").unlink()
    dataset = opened(folder, *[pair("e")] * 40, *[pair(name) for name in "abcd"] * 10)
    used = collections.Counter(dataset.__getitems__(list(range(40))).records)
    assert len(used) > 15


def test_a_group_without_any_usable_record(folder):
    for name in "de":
        (folder / "images" / f"{name}.png").unlink()
    dataset = opened(folder, pair("a"), {"image": "images/d.png", "conversations": ["q", "a"]},
                     {"image": "images/e.png", "conversations": ["q", "a"]})
    words = "none of 2 records of the task questions can be used: .*line 2: .*line 3: .*e.png"
    with pytest.raises(ValueError, match=words):
        dataset.__getitems__(of(dataset, "questions", 0))
    dataset.__getitems__(of(dataset, "text_to_image", 0))


def test_unreadable_pictures_among_cached_latents(folder):
    dataset = opened(folder, *[pair(name) for name in "abcde"])
    dataset.latents = torch.arange(5.0).view(5, 1, 1, 1)
    dataset.unreadable = {folder / "images/b.png": "b.png is broken"}
    batch = dataset.__getitems__([1, 2])
    assert batch.skipped == ((f"{folder / 'records.jsonl'}, line 2", "b.png is broken"),)
    assert batch.latents.flatten().tolist()[0] != 1 and batch.latents.flatten().tolist()[1] == 2


def test_features_are_those_of_the_replacement(folder):
    (folder / "images" / "b.png").unlink()
    dataset = opened(folder, *[pair(name) for name in "abcde"])
    dataset.features = lambda indices: (torch.tensor(indices), torch.tensor(indices))
    batch = dataset.__getitems__([1, 3])
    lines = [int(record.rpartition(" ")[2]) for record in batch.records]
    assert batch.features[0].tolist() == [line - 1 for line in lines] and lines[0] != 2


def test_an_index_in_loader_processes(folder):
    (folder / "images" / "b.png").unlink()
    dataset = opened(folder, *[pair(name) for name in "abcde"])
    order = BatchOrder(dataset.groups, 2, seed=0)
    for context in ("fork", "spawn"):
        loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=order, collate_fn=list, num_workers=2,
            multiprocessing_context=context)
        for batch, indices in zip(loader, take(order, 6)):
            assert same(Batch(*batch), dataset.__getitems__(indices))


def test_the_loader_pins_whole_batches(folder, monkeypatch):
    """Tuples in it stay tuples, which torch's own way would turn into lists."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())
    batch = Batch("any", torch.zeros(1), None, None, torch.ones(1), None,
                  (torch.zeros(2), torch.ones(2)), ("a caption",))
    copy = pin_memory(batch)
    assert type(copy) is Batch and copy.captions == batch.captions and len(pinned) == 4
    assert type(copy.features) is tuple and torch.equal(copy.features[1], torch.ones(2))


def test_batches_keep_their_strings_on_a_device(folder):
    (folder / "images" / "b.png").unlink()
    batch = opened(folder, *[pair(name) for name in "abcde"]).__getitems__([0, 1])
    moved = batch.to(torch.device("meta"))
    assert moved[7:] == batch[7:] and moved.skipped and moved.images.is_meta


def test_any_integer_is_a_seed():
    for seed in (-1, 2 ** 63, 2 ** 64 + 5):
        assert len(take(BatchOrder(one(9), 3, seed=seed), 3)) == 3


# ---------------------------------------------------------------- run alone

def test_run_alone(folder, monkeypatch, capsys):
    question = {"image": [A], "conversations": ["q", "a", "q", "b"], "task": "quiz"}
    file = write(folder, PAIR, question, PAIR)
    done = subprocess.run([sys.executable, data.__file__, file], capture_output=True, text=True)
    counts = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and counts == [["text_to_image", "2"], ["quiz", "2"]]
    for argument, words in (
            (write(folder, PAIR, "{"), "error: .*records.jsonl, line 2: not valid JSON"),
            ("--help", "Run alone to check")):
        monkeypatch.setattr(sys, "argv", ["data.py", str(argument)])
        with pytest.raises(SystemExit, match=words):
            runpy.run_path(data.__file__, run_name="__main__")
    assert capsys.readouterr().out == ""
