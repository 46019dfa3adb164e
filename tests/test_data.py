"""data.py: every record format, pictures as they come from cameras and the web, and the order of batches."""
import json
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data import Batch, BatchOrder, Example, Pairs, load_image, read_jsonl, to_pictures


@pytest.fixture
def folder(tmp_path):
    """A folder with five small pictures, each of one grey level of its own."""
    (tmp_path / "images").mkdir()
    for i, name in enumerate("abcde"):
        Image.new("RGB", (8, 8), (50 * i,) * 3).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def write(folder, *records):
    path = folder / "records.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records), encoding="utf-8")
    return path


def says(who, value):
    return {"from": who, "value": value}


A, B, C = (f"images/{name}.png" for name in "abc")
PAIR = {"image": [A], "conversations": [says("human", " a cat "), says("gpt", "<image>")]}


# ---------------------------------------------------------------- records

@pytest.mark.parametrize("turns", [[says("human", " a cat \n"), says("gpt", "<image>")], [" a cat \n", "<image>"]])
def test_text_to_image(folder, turns):
    assert read_jsonl(write(folder, {"image": [A], "conversations": turns})) == [
        Example("text_to_image", folder / A, (), "a cat", "a cat")]


@pytest.mark.parametrize("turns", [["a dog", "<image>"], [says("human", "a dog"), says("gpt", "<image>")], ["a dog"]])
def test_image_to_image(folder, turns):
    record = {"image": [A, B], "conversations": turns, "instruction": " make it a dog "}
    assert read_jsonl(write(folder, record)) == [Example("image_to_image", folder / B, (folder / A,), "make it a dog", "a dog")]


def test_composition_with_any_number_of_references(folder):
    record = {"original_images": [A, B, C], "generated_images": ["images/d.png"], "edit_prompt": " all three ", "caption": " three "}
    without = {"original_images": [C], "generated_images": [A], "edit_prompt": "one"}
    assert read_jsonl(write(folder, record, without)) == [
        Example("image_to_image", folder / "images/d.png", (folder / A, folder / B, folder / C), "all three", "three"),
        Example("image_to_image", folder / A, (folder / C,), "one", "")]


@pytest.mark.parametrize("plain", [False, True])
def test_questions(folder, plain):
    texts = ["<image>\nWhat is it?", "A cat.", "What colour?\n<image>", "Red."]
    turns = texts if plain else [says(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)]
    assert read_jsonl(write(folder, {"image": [B], "conversations": turns})) == [
        Example("question", folder / B, (), "What is it?", "A cat."), Example("question", folder / B, (), "What colour?", "Red.")]


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
    ({"original_images": [A, "images/y.png"], "generated_images": [B], "edit_prompt": "x"}, "y.png"),
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


def test_a_file_that_is_no_text(folder):
    (folder / "records.jsonl").write_bytes(json.dumps(PAIR).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match="records.jsonl"):
        read_jsonl(folder / "records.jsonl")


# ---------------------------------------------------------------- pictures

def random_pixels(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def loaded(picture, path, size, **save):
    """What load_image makes of a picture, as (size, size, 3) floats in 0 to 255."""
    picture.save(path, **save)
    image = load_image(path, size)
    assert image.shape == (3, size, size) and image.dtype == torch.float32
    return ((image + 1) * 127.5).permute(1, 2, 0).numpy()


def test_range_and_channels(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0], pixels[1, :, 0], pixels[2] = 255, 255, 51
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = load_image(tmp_path / "x.png", 4)
    assert (image[:, 0] == 1).all() and (image[:, 3] == -1).all() and image[:, 1, 0].tolist() == [1, -1, -1]
    torch.testing.assert_close(image[:, 2], torch.full((3, 4), -0.6))


def test_to_pictures_is_the_way_back(tmp_path):
    pixels = random_pixels(8, 8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = load_image(tmp_path / "x.png", 8)
    assert np.array_equal(to_pictures(image[None])[0], pixels)
    assert to_pictures(torch.tensor([-1.7, 0.0, 1.7]).view(1, 3, 1, 1)).ravel().tolist() == [0, 128, 255]


# what a camera stores so that turning it as its EXIF entry says gives the picture
STORED = {1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: np.rot90(x, 2), 4: lambda x: x[::-1],
          5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, 1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: lambda x: np.rot90(x, -1)}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(tmp_path, orientation):
    pixels, exif = random_pixels(12, 8), Image.Exif()
    exif[0x0112] = orientation
    found = loaded(Image.fromarray(np.ascontiguousarray(STORED[orientation](pixels))), tmp_path / "x.png", 8, exif=exif)
    np.testing.assert_allclose(found, pixels[2:10], atol=1e-3)


def over_white(rgb, alpha):
    return rgb * (alpha / 255) + 255 * (1 - alpha / 255)


def test_alpha_is_laid_on_white(tmp_path):
    rgba, la = random_pixels(6, 6, 4), random_pixels(6, 6, 2)
    np.testing.assert_allclose(loaded(Image.fromarray(rgba, "RGBA"), tmp_path / "rgba.png", 6), over_white(rgba[..., :3], rgba[..., 3:]), atol=1)
    np.testing.assert_allclose(loaded(Image.fromarray(la, "LA"), tmp_path / "la.png", 6),
                               over_white(la[..., :1].repeat(3, -1), la[..., 1:]), atol=1)


def test_transparent_colours_of_palettes_and_of_pictures_without_alpha(tmp_path):
    palette = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    expected = [[[10, 20, 30], [255] * 3], [[70, 80, 90], [10, 20, 30]]]
    np.testing.assert_allclose(loaded(palette, tmp_path / "p.png", 2, transparency=1), expected, atol=1e-3)
    np.testing.assert_allclose(loaded(palette, tmp_path / "p.gif", 2, transparency=1), expected, atol=1e-3)
    half = loaded(palette, tmp_path / "half.png", 2, transparency=bytes([255, 128, 0]))       # an alpha for each colour
    np.testing.assert_allclose(half[0, 1], over_white(np.array([40, 50, 60]), 128), atol=1)
    np.testing.assert_allclose(half[1, 0], [255] * 3, atol=1e-3)
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]], [[4, 5, 6], [1, 2, 3]]], np.uint8))
    np.testing.assert_allclose(loaded(rgb, tmp_path / "rgb.png", 2, transparency=(4, 5, 6))[:, :, 0], [[1, 255], [255, 1]], atol=1e-3)


def test_palette_without_transparency(tmp_path):
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 200, 100, 0])
    np.testing.assert_allclose(loaded(palette, tmp_path / "x.png", 2)[0], [[10, 20, 30], [200, 100, 0]], atol=1e-3)


def test_grayscale(tmp_path):
    grey = random_pixels(6, 6, 1)
    np.testing.assert_allclose(loaded(Image.fromarray(grey), tmp_path / "x.png", 6), grey[..., None].repeat(3, -1), atol=1e-3)
    black_white = Image.fromarray(grey > 100)
    np.testing.assert_allclose(loaded(black_white, tmp_path / "y.png", 6)[..., 0], (grey > 100) * 255, atol=1e-3)


def test_sixteen_bits(tmp_path):
    deep = np.array([[0, 256 * 100], [256 * 200, 65535]], np.uint16)
    np.testing.assert_allclose(loaded(Image.fromarray(deep), tmp_path / "x.png", 2)[..., 0], [[0, 100], [200, 255]], atol=1)


def test_cmyk(tmp_path):
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    red = loaded(cmyk, tmp_path / "x.tif", 4)
    assert red[..., 0].min() > 230 and red[..., 1:].max() < 25


@pytest.mark.parametrize("width, height", [(96, 64), (64, 96), (80, 64), (24, 16), (64, 64)])
def test_short_side_bicubic_then_centre_crop(tmp_path, width, height):
    """Beyond the edges of the crop, where the two orders of cropping and resizing differ, it is as the definition says."""
    low = Image.fromarray(random_pixels(height // 4, width // 4))
    picture, size = low.resize((width, height), Image.Resampling.BILINEAR), 32
    scale = size / min(width, height)
    whole = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - size) // 2, (whole.height - size) // 2
    expected = np.asarray(whole.crop((left, top, left + size, top + size)), float)
    found = loaded(picture, tmp_path / "x.png", size)
    assert np.abs(found - expected)[4:-4, 4:-4].max() <= 2
    beside = np.asarray(whole.crop((left + 1, top, left + 1 + size, top + size)), float)
    assert np.abs(found - beside)[4:-4, 4:-4].max() > 15                                      # one pixel beside the centre is far off


def test_resize_is_bicubic(tmp_path):
    edge = np.zeros((8, 8, 3), np.uint8)
    edge[:, 4:] = 200
    row = loaded(Image.fromarray(edge), tmp_path / "x.png", 32)[16, :, 0]
    assert row.max() > 205                                                                    # overshoots, which bilinear does not


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
    chunks = ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
                                           for name, data in chunks)


@pytest.mark.parametrize("content", [None, b"not a picture", png(b"\0\0\0\1"), png(struct.pack(">IIBBBBB", 2 ** 16, 2 ** 16, 8, 2, 0, 0, 0))],
                         ids=["missing", "text", "short header", "65536 x 65536"])
def test_unreadable_pictures(tmp_path, content):
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_image(path, 32)


# ---------------------------------------------------------------- batches

def take(order, count):
    batches = iter(order)
    return [next(batches) for _ in range(count)]


def test_order_is_deterministic_and_depends_on_the_seed():
    assert take(BatchOrder(20, 3, seed=1), 15) == take(BatchOrder(20, 3, seed=1), 15)
    assert take(BatchOrder(20, 3, seed=1), 6) != take(BatchOrder(20, 3, seed=2), 6)


@pytest.mark.parametrize("start", [0, 1, 5, 6, 7, 13])
def test_start_continues_exactly(start):
    whole = take(BatchOrder(20, 3, seed=1), 30)                                               # six batches an epoch
    assert take(BatchOrder(20, 3, seed=1, start=start), 30 - start) == whole[start:]


def test_every_epoch_is_a_permutation_of_its_own():
    batches = take(BatchOrder(12, 3, seed=4), 12)
    epochs = [sum(batches[i:i + 4], []) for i in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != sorted(epochs[0])


def test_ranks_are_disjoint_and_make_up_the_epoch():
    ranks = [take(BatchOrder(20, 3, seed=2, rank=rank, world=2), 6) for rank in range(2)]     # three batches an epoch
    for epoch in (slice(0, 3), slice(3, 6)):
        seen = [i for rank in ranks for batch in rank[epoch] for i in batch]
        assert len(seen) == len(set(seen)) == 18 and set(seen) <= set(range(20))
    single = take(BatchOrder(20, 6, seed=2), 6)                                               # the same data as one rank of twice the batch
    assert [a + b for a, b in zip(*ranks)] == single


def test_too_small_for_one_batch():
    assert len(take(BatchOrder(8, 4, seed=0, world=2), 1)[0]) == 4
    with pytest.raises(ValueError, match="7 examples are not enough for one batch of 4 on each of 2 ranks"):
        BatchOrder(7, 4, seed=0, world=2)


class Letters:
    """A tokenizer for the tests: the code points of a text."""
    mask_id = 1_000_000

    def __call__(self, texts, length):
        return torch.tensor([[ord(c) for c in text.ljust(length)[:length]] for text in texts])


@pytest.fixture
def pairs(folder):
    records = [{"image": [f"images/{name}.png"], "conversations": [name * 2, "<image>"]} for name in "abcde"]
    question = {"image": [A], "conversations": ["<image>q", "answer"]}
    return Pairs(write(folder, records[0], question, *records[1:]), Letters(), image_size=4, text_length=3)


def test_pairs_with_pictures(pairs):
    assert len(pairs) == 5                                                                    # the question is no pair
    batch = pairs.__getitems__([4, 0, 2])
    assert isinstance(batch, Batch) and batch.latents is None and batch.pictures.shape == (3, 3, 4, 4)
    torch.testing.assert_close((batch.pictures[:, 0, 0, 0] + 1) * 127.5, torch.tensor([200.0, 0, 100]))
    assert ["".join(map(chr, row)) for row in batch.tokens.tolist()] == ["ee ", "aa ", "cc "]


def test_pairs_with_latents(pairs, monkeypatch):
    pairs.latents = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 16, 2, 2)
    monkeypatch.setattr("data.load_image", lambda *_: pytest.fail("the picture was read again"))
    batch = pairs.__getitems__([4, 0, 2])
    assert batch.pictures is None and batch.latents.shape == (3, 16, 2, 2) and batch.latents[:, 0, 0, 0].tolist() == [4, 0, 2]
    assert ["".join(map(chr, row)) for row in batch.tokens.tolist()] == ["ee ", "aa ", "cc "]


def test_pairs_in_a_loader(pairs):
    order = BatchOrder(len(pairs), 2, seed=0)
    loader = torch.utils.data.DataLoader(pairs, batch_sampler=order, collate_fn=lambda batch: batch)
    for batch, indices in zip(loader, take(order, 4)):
        assert torch.equal(batch.tokens, pairs.tokens[indices]) and batch.pictures.shape == (2, 3, 4, 4)


def test_no_pairs(folder):
    with pytest.raises(ValueError, match="no text-to-image records"):
        Pairs(write(folder, {"image": [A], "conversations": ["<image>q", "answer"]}), Letters(), 4, 3)
