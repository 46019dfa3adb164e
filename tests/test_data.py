"""data.py: every record format, pictures of cameras and the web, groups, order of batches."""
import collections
import itertools
import json
import random
import re
import runpy
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (Batch, BatchOrder, Example, Group, Tasks, load_image, parse_weights,
                  prompt_length, read_jsonl, to_pictures)


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


A, B, C = (f"images/{name}.png" for name in "abc")
PAIR = {"image": [A], "conversations": [says("human", " a cat "), says("gpt", "<image>")]}


# ---------------------------------------------------------------- records

def named(record, task):
    return record if task is None else {"task": task} | record


@pytest.mark.parametrize("task", [None, "", "drawings"])
@pytest.mark.parametrize("turns", [
    [says("human", " a cat \n"), says("gpt", "<image>")],
    [" a cat \n", "<image>"]])
def test_text_to_image(folder, turns, task):
    record = named({"image": [A], "conversations": turns}, task)
    assert read_jsonl(write(folder, record)) == [
        Example(task or "text_to_image", folder / A, (), "a cat", "", "a cat")]


@pytest.mark.parametrize("task", [None, "edits"])
@pytest.mark.parametrize("turns", [
    ["a dog", "<image>"],
    [says("human", "a dog"), says("gpt", "<image>")],
    ["a dog"]])
def test_image_to_image(folder, turns, task):
    record = {"image": [A, B], "conversations": turns, "instruction": " make it a dog "}
    kind = task or "image_to_image"
    assert read_jsonl(write(folder, named(record, task))) == [
        Example(kind, folder / B, (folder / A,), "make it a dog", "", "a dog")]


def test_image_to_image_of_several_sources_and_without_a_caption(folder):
    record = {"image": [A, B, C], "conversations": [says("human", "")],
              "instruction": "x", "task": "edges"}
    assert read_jsonl(write(folder, record)) == [
        Example("edges", folder / C, (folder / A, folder / B), "x", "", "")]


@pytest.mark.parametrize("task", [None, "personalisation"])
def test_composition_with_any_number_of_references(folder, task):
    records = [
        {"original_images": [A, B, C], "generated_images": ["images/d.png"],
         "edit_prompt": " all three ", "caption": " three "},
        {"original_images": [C], "generated_images": [A], "edit_prompt": "one"},
        {"original_images": [], "generated_images": [B], "edit_prompt": "none", "caption": "zero"}]
    a, b, c, d = (folder / f"images/{name}.png" for name in "abcd")
    kind = task or "image_to_image"
    assert read_jsonl(write(folder, *(named(record, task) for record in records))) == [
        Example(kind, d, (a, b, c), "all three", "", "three"),
        Example(kind, a, (c,), "one", "", ""),
        Example(task or "text_to_image", b, (), "none", "", "zero")]    # prompt and caption differ


@pytest.mark.parametrize("task", [None, "quiz"])
@pytest.mark.parametrize("plain", [False, True])
def test_questions(folder, plain, task):
    turns = ["<image>\nWhat is it?", "A cat.", "What colour?\n<image>", "Red."]
    if not plain:
        turns = [says(("human", "gpt")[i % 2], text) for i, text in enumerate(turns)]
    record = named({"image": [B], "conversations": turns}, task)
    assert read_jsonl(write(folder, record)) == [
        Example(task or "questions", folder / B, (), None, "What is it?", "A cat."),
        Example(task or "questions", folder / B, (), None, "What colour?", "Red.")]


def test_mixed_file_with_blank_lines_keeps_the_order(folder):
    edit = {"image": [A, B], "conversations": ["b"], "instruction": "i"}
    examples = read_jsonl(write(folder, PAIR, "", edit, "   ", PAIR))
    assert [e.task for e in examples] == ["text_to_image", "image_to_image", "text_to_image"]


def test_absolute_paths(folder, tmp_path_factory):
    elsewhere = write(tmp_path_factory.mktemp("elsewhere"), PAIR | {"image": [str(folder / A)]})
    assert read_jsonl(elsewhere)[0].image == folder / A


@pytest.mark.parametrize("text", ["naïve 猫", "line\u2028separator", "next\x85line"])
def test_captions_of_any_characters(folder, text):
    path = write(folder, PAIR | {"conversations": [text, "<image>"]})
    assert read_jsonl(path)[0].caption == text


@pytest.mark.parametrize("bad, words", [
    ("{'image': 1}", "not valid JSON"),
    ('{"image": ["images/a.png"], ', "not valid JSON"),
    ("[1, 2]", "formats"),
    ("3", "formats"),
    ({"conversations": ["a", "<image>"]}, "the key 'image' is missing"),
    ({"image": [A]}, "the key 'conversations' is missing"),
    ({"image": [A], "conversations": [{"from": "human"}, "<image>"]}, "the key 'value' is missing"),
    ({"original_images": [A], "edit_prompt": "x"}, "the key 'generated_images' is missing"),
    ({"original_images": [A], "generated_images": [B]}, "the key 'edit_prompt' is missing"),
    ({"original_images": [A], "generated_images": [], "edit_prompt": "x"}, "formats"),
    ({"image": ["images/z.png"], "conversations": ["a", "<image>"]}, "no such picture"),
    ({"image": ["images/z.png", A], "conversations": ["a"], "instruction": "x"}, "z.png"),
    ({"original_images": [A, "images/y.png"], "generated_images": [B], "edit_prompt": "x"},
     "y.png"),
    ({"image": [A, B], "conversations": ["a", "<image>"]}, "has 2 pictures and no instruction"),
    ({"image": [], "conversations": ["a", "<image>"]}, "has 0 pictures"),
    ({"image": [A], "conversations": ["a"], "instruction": "x"}, "1 picture(s), expected sources"),
    ({"image": [A], "conversations": ["q", "a", "q"]}, "3 turns"),
    ({"image": [A], "conversations": ["q", "a", "q", ""]}, "4 turns"),
    ({"image": [A], "conversations": []}, "formats"),
    ({"image": [A], "conversations": "a cat"}, "formats"),
    ({"image": [A], "conversations": "abcd"}, "formats"),
    ({"image": [A], "conversations": [None, "<image>"]}, "formats"),
    ({"image": A, "conversations": ["a", "<image>"]}, "formats"),
    (PAIR | {"task": 3}, "'task' is 3, expected a name"),
    (PAIR | {"task": ["edits"]}, "'task' is ['edits'], expected a name"),
])
def test_errors_name_the_line(folder, bad, words):
    path = write(folder, PAIR, "", bad)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read_jsonl(path)
    assert f"{path}, line 3: " in str(error.value)


def test_empty_and_missing_file(folder):
    with pytest.raises(ValueError, match="records.jsonl: no records"):
        read_jsonl(write(folder, "", "  "))
    with pytest.raises(ValueError, match="none.jsonl: no such file"):
        read_jsonl(folder / "none.jsonl")


def test_a_file_that_is_not_text(folder):
    (folder / "records.jsonl").write_bytes(json.dumps(PAIR).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match="records.jsonl"):
        read_jsonl(folder / "records.jsonl")


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


# ---------------------------------------------------------------- tasks

class Letters:
    """A tokenizer for the tests: the code points of a text, "_" at the end and as padding."""

    eos_id = ord("_")

    def __call__(self, texts, length):
        return torch.tensor([[ord(c) for c in text.ljust(length, "_")[:length]] for text in texts])

    def dialogue(self, questions, answers, length):
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
    [count] = {len(dataset.examples[i].sources) for i in group.indices}
    return count


def shape(dataset):
    """{(task, number of sources): (size, weight)} of its groups."""
    return {(group.task, sources_of(dataset, group)): (len(group.indices), group.weight)
            for group in dataset.groups}


def test_groups_are_by_task_and_number_of_sources(records):
    dataset = tasks(records)
    assert len(dataset) == len(records) == 12
    assert dataset.examples == records and dataset.left_out == []
    assert shape(dataset) == {
        ("text_to_image", 0): (4, 1), ("questions", 0): (2, 1), ("edits", 1): (2, 1),
        ("edges", 1): (1, 1),
        ("all", 1): (2, pytest.approx(2 / 3)), ("all", 3): (1, pytest.approx(1 / 3))}
    assert sorted(i for group in dataset.groups for i in group.indices) == list(range(12))
    for group in dataset.groups:
        assert {dataset.examples[i].task for i in group.indices} == {group.task}


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
            expected = [dataset.examples[i].prompt.ljust(length, "_") for i in group.indices]
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
    assert dataset.examples == [e for e in records if e.task != "edges"]
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
        assert (tokens is None) == (group.indices == [4])


@pytest.mark.parametrize("captioned, expected", [
    ("*", {"text_to_image", "edits", "all", "questions"}),
    ("text_to_image", {"text_to_image", "questions"}),
    ("", {"questions"}),
    ("edits, all", {"edits", "all", "questions"}),
    ("edges", {"questions"})])
def test_captioned_tasks_train_the_text_branch(records, captioned, expected):
    dataset = tasks(records, captioned=captioned)
    writing = {e.task for e, writes in zip(dataset.examples, dataset.writes) if writes}
    assert writing == expected
    for group in dataset.groups:
        tokens = dataset.__getitems__(group.indices).tokens
        assert (tokens is not None) == (group.task in expected)
    assert {dataset.examples[i].task for i in dataset.aligned} == expected - {"questions"}


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


def test_batches_with_latents(records, monkeypatch):
    dataset = tasks(records)
    names = [path.stem for path in dataset.paths]
    assert sorted(names) == list("abcde")                       # each picture once
    values = torch.tensor([float(ord(name)) for name in names])
    dataset.latents = values.view(5, 1, 1, 1).expand(5, 16, 2, 2)
    monkeypatch.setattr("data.load_image", lambda *_: pytest.fail("the picture was read again"))
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
    aligned = [dataset.examples[i] for i in dataset.aligned]
    assert [e.image.stem for e in aligned] == ["a", "b", "c", "d", "d", "c", "b"]
    dataset.features = (
        torch.tensor([[float(ord(e.image.stem)), 1] for e in aligned]).half(),
        torch.tensor([[float(len(e.caption)), 2, 3] for e in aligned]).half())
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
    count = len(dataset.aligned)
    dataset.features = torch.zeros(count, 2), torch.zeros(count, 3)
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
        example = dataset.examples[indices[0]]
        assert batch.task == example.task
        assert batch.images.shape == (1, 1 + len(example.sources), 3, 4, 4)
        assert batch.prompts is None or torch.equal(batch.prompts, dataset.prompts[indices].long())
        seen[batch.task] += 1
    assert set(seen.values()) == {5} and len(seen) == 5


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
