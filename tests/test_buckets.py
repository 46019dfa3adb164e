"""buckets.py: shapes of pictures, aspects from records and headers, the file that keeps them."""
import json
import math
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

import buckets
from buckets import (aspects_of, bucket_shapes, cropped_share, nearest_shapes, picture_aspect,
                     read_aspects, recorded_aspect)
from conftest import TESTS
from records import open_records
from text_encoder import T5Tokenizer

TOKENIZER = T5Tokenizer(TESTS / "golden" / "t5_spiece.model")
WIDE = math.log(2)                          # of a picture twice as wide as high


# ---------------------------------------------------------------- shapes

def test_shapes_of_512_pixels():
    assert bucket_shapes(512, 2) == [
        (704, 384), (640, 384), (576, 448), (512, 512), (448, 576), (384, 640), (384, 704)]
    assert bucket_shapes(512, 1.2) == bucket_shapes(512) == [(512, 512)]
    assert (256, 1024) in bucket_shapes(512, 4) and (256, 1024) not in bucket_shapes(512, 3.99)


@pytest.mark.parametrize("size, unit", [(512, 16), (1024, 16), (64, 8), (64, 16), (528, 16),
                                        (48, 16), (16, 16), (32, 32)])
@pytest.mark.parametrize("most", [1.0, 1.5, 2.0, 4.0, 1000.0])
def test_rules_of_shapes(size, unit, most):
    shapes = bucket_shapes(size, most, unit)
    assert (size, size) in shapes and len(set(shapes)) == len(shapes)
    assert sorted(shapes) == sorted((width, height) for height, width in shapes)
    aspects = [width / height for height, width in shapes]
    assert aspects == sorted(aspects) and max(aspects) <= most
    for height, width in shapes:
        assert height % unit == width % unit == 0 and min(height, width) > 0
        assert height * width <= 1.05 * size ** 2
    for height, width in shapes[len(shapes) // 2:]:             # no wide one could be higher
        step = max(unit, round(size / 8 / unit) * unit)
        assert (height + step) * width > 1.05 * size ** 2 or height == width


def test_the_nearest_shape():
    shapes = bucket_shapes(512, 2)
    own = aspects_of(shapes)
    assert nearest_shapes(shapes, own).tolist() == list(range(7))
    aspects = np.random.default_rng(0).normal(0, 0.7, 500).astype(np.float32)
    nearest = np.abs(aspects[:, None] - own).argmin(axis=1)
    assert np.array_equal(nearest_shapes(shapes, aspects), nearest)
    assert nearest_shapes([(8, 8)], aspects).max() == 0


def test_the_share_of_cropped_pixels():
    """600 x 300 in a square keeps its half; in 384 x 704 it keeps 550 columns of 600."""
    aspects = aspects_of([(300, 600), (512, 512)])
    assert cropped_share([(512, 512)], aspects) == pytest.approx((1 / 2 + 0) / 2)
    kept_columns = 300 * 704 / 384
    expected = (1 - kept_columns / 600) / 2
    assert cropped_share(bucket_shapes(512, 2), aspects) == pytest.approx(expected, abs=1e-6)
    portrait = aspects_of([(1000, 250)])                        # 640 x 384 of 4 : 1
    assert cropped_share([(640, 384)], portrait) == pytest.approx(1 - 250 * 640 / 384 / 1000)


# ---------------------------------------------------------------- aspects of pictures

def test_aspects_of_pictures(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (20, 10)).save(path)
    assert picture_aspect(path) == pytest.approx(WIDE)
    Image.new("RGB", (10, 20)).save(path)
    assert picture_aspect(str(path)) == pytest.approx(-WIDE)
    path.write_bytes(path.read_bytes()[:20])
    assert picture_aspect(path) == picture_aspect(tmp_path / "missing.png") == 0


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_that_lie_on_their_side(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (20, 10)).save(tmp_path / name, exif=exif)
    expected = WIDE if orientation <= 4 else -WIDE
    assert picture_aspect(tmp_path / name) == pytest.approx(expected)


def test_broken_exif_keeps_the_shape(tmp_path):
    for junk in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 40):
        Image.new("RGB", (20, 10)).save(tmp_path / "x.png", exif=junk)
        assert picture_aspect(tmp_path / "x.png") == pytest.approx(WIDE)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp"])
def test_only_headers_are_read(tmp_path, name, monkeypatch):
    Image.new("RGB", (20, 10)).save(tmp_path / name)
    for owner in ("PIL.Image.Image.load", "PIL.ImageFile.ImageFile.load"):
        monkeypatch.setattr(owner, lambda *_: pytest.fail("pixels were decoded"))
    assert picture_aspect(tmp_path / name) == pytest.approx(WIDE)


@pytest.mark.parametrize("sizes, ratio", [
    ({"image": ["a"], "img_w": [200], "img_h": [100]}, 2),
    ({"image": ["a", "b"], "img_w": [10, 200], "img_h": [10, 100]}, 2),     # the target is last
    ({"image": "a", "width": 200, "height": 100}, 2),
    ({"image": ["a"], "img_w": [200], "height": 100}, None),
    ({"image": ["a", "b"], "width": 200, "height": 100}, None),             # of which picture?
    ({"image": ["a"], "img_w": [], "img_h": []}, None),
    ({"image": ["a"], "img_w": [0], "img_h": [100]}, None),
    ({"image": ["a"], "img_w": [math.nan], "img_h": [100]}, None),
    ({"image": ["a"], "img_w": [math.inf], "img_h": [100]}, None),
    ({"image": ["a"], "img_w": ["200"], "img_h": [100], "width": 100, "height": 100}, 1),
    ({"image": ["a"], "img_w": None}, None),
    ({"original_images": [], "generated_images": ["a"]}, None)])
def test_sizes_in_records(sizes, ratio):
    assert recorded_aspect(sizes) == (None if ratio is None else pytest.approx(math.log(ratio)))


# ---------------------------------------------------------------- the file of aspects

@pytest.fixture
def folder(tmp_path):
    """A folder with pictures whose names are width and height."""
    for width, height in ((20, 10), (10, 20), (10, 10)):
        Image.new("RGB", (width, height)).save(tmp_path / f"{width}x{height}.png")
    return tmp_path


def pair(name, **more):
    return {"image": [f"{name}.png"], "conversations": ["a cat", "<image>"]} | more


def write(folder, *records, name="records.jsonl"):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path = folder / name
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


QUIZ = {"image": "10x20.png", "conversations": ["q", "a", "q", "b"]}


def aspects_in(*paths, length=16, **options):
    folder = paths[0].parent / "run"
    return read_aspects(open_records(paths, TOKENIZER, length, folder, **options), folder)


def test_every_example_has_an_aspect(folder):
    """Blank lines and records that cannot be used shift nothing; the target has the shape."""
    edit = {"image": ["10x20.png", "20x10.png"], "instruction": "i", "conversations": [""]}
    both = {"original_images": ["20x10.png"], "generated_images": ["10x20.png"],
            "edit_prompt": "p"}
    first = write(folder, "\ufeff" + json.dumps(pair("20x10")), "", pair("10x10"),
                  pair("10x20", conversations=["", "<image>"]), QUIZ, edit, pair("missing"),
                  pair("10x10", img_w=[400], img_h=[100]), name="first.jsonl")
    second = write(folder, "", both, name="second.jsonl")
    aspects = aspects_in(first, second)
    expected = [WIDE, 0, -WIDE, -WIDE, WIDE, 0, math.log(4), -WIDE]
    assert aspects.dtype == np.float32 and aspects.tolist() == pytest.approx(expected)
    assert (folder / "first.jsonl.aspects").stat().st_size == 8 * 4 + 32
    run = folder / "run"
    chosen = open_records([first, second], TOKENIZER, 16, run).select([7, 0, 2])
    assert read_aspects(chosen, run).tolist() == pytest.approx([-WIDE, WIDE, -WIDE])


def test_pictures_are_measured_once(folder, monkeypatch):
    """Neither options of the texts nor another time of the file measure them again."""
    path = write(folder, pair("20x10"), QUIZ)
    assert aspects_in(path).tolist() == pytest.approx([WIDE, -WIDE, -WIDE])
    path.touch()
    with monkeypatch.context() as patch:
        patch.setattr(buckets, "picture_aspect", lambda *_: pytest.fail("measured again"))
        assert aspects_in(path, length=12).tolist() == pytest.approx([WIDE, -WIDE, -WIDE])
        assert aspects_in(path, dialogues=True).tolist() == pytest.approx([WIDE, -WIDE])
    write(folder, pair("10x20"), QUIZ)
    assert aspects_in(path)[0] == pytest.approx(-WIDE)


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 100, None])
def test_a_broken_file_is_written_again(folder, content):
    path = write(folder, pair("20x10"), QUIZ)
    expected = aspects_in(path).tolist()
    file = folder / "records.jsonl.aspects"
    file.write_bytes(file.read_bytes()[:-1] if content is None else content)
    assert aspects_in(path).tolist() == expected


def test_a_folder_that_cannot_be_written(folder, monkeypatch):
    path = write(folder, pair("20x10"))
    written = buckets.write_atomically

    def write_elsewhere(target, write):
        if target.parent == folder:
            raise PermissionError(13, "Permission denied", str(target))
        written(target, write)

    monkeypatch.setattr(buckets, "write_atomically", write_elsewhere)
    assert aspects_in(path).tolist() == pytest.approx([WIDE])
    [file] = (folder / "run").iterdir()
    assert file.name.startswith("records.jsonl.") and file.suffix == ".aspects"
    monkeypatch.setattr(buckets, "picture_aspect", lambda *_: pytest.fail("measured again"))
    assert aspects_in(path).tolist() == pytest.approx([WIDE])


def test_run_alone(monkeypatch, capsys):
    for arguments, words in ((["512", "1.3"], None), (["512", "x"], "error: "), ([], "Buckets")):
        monkeypatch.setattr(sys, "argv", ["buckets.py", *arguments])
        if words is None:
            runpy.run_path(buckets.__file__, run_name="__main__")
            continue
        with pytest.raises(SystemExit, match=words):
            runpy.run_path(buckets.__file__, run_name="__main__")
    assert capsys.readouterr().out == "448 x 576\n512 x 512\n576 x 448\n"
