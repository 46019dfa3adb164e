"""film.py: frames of known pictures and texts, pixel by pixel, and the size of a film."""
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageFont

import film
from film import (GAP, LIMIT, LINE, MASK, NEW, OPEN, TILE, encode_gif, label_picture, load_font,
                  picture_frames, place_boxes, spread, text_frames, write_film, write_title)


def flat(color, height=64, width=64):
    return np.full((height, width, 3), ImageColor.getrgb(color), dtype=np.uint8)


def count(frame, color):
    """Pixels of exactly this colour."""
    return int((np.asarray(frame) == ImageColor.getrgb(color)).all(axis=2).sum())


def columns(frame, color, row):
    """The columns of a row of pixels that have exactly this colour."""
    return np.flatnonzero((np.asarray(frame)[row] == ImageColor.getrgb(color)).all(axis=1))


# ---------------------------------------------------------------- drawing

def test_boxes_break_into_lines():
    boxes = [(5, 30), (5, 40), (5, 25), (5, 70), (5, 200), (5, 10)]
    assert place_boxes(boxes, 105) == [(0, 0), (35, 0), (80, 0), (0, 1), (0, 2), (0, 3)]


def test_a_title_has_four_lines_at_most():
    assert write_title("a circle", 400).size == (400, LINE)
    assert write_title("word " * 30, 400).height > LINE
    long = np.asarray(write_title("word " * 1000, 400))
    assert long.shape == (4 * LINE, 400, 3)
    assert (long != np.asarray(write_title("word " * 1000 + "more", 400))).sum() == 0
    assert write_title("", 400).size == (400, LINE)


@pytest.mark.parametrize("height, width, size", [
    (64, 64, (192, 192)), (32, 32, (224, 224)), (48, 32, (128, 192)), (224, 224, (224, 224)),
    (1024, 1024, (224, 224)), (384, 640, (224, 134))])
def test_pictures_are_shown_in_a_readable_size(height, width, size):
    tile = label_picture(flat("red", height, width), "x")
    assert count(tile, "red") == size[0] * size[1] and tile.height == size[1] + LINE


def test_enlarged_pixels_stay_pixels():
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    shown = np.asarray(label_picture(picture, ""))[:192, :192]
    assert (shown[1::3, 1::3] == picture).all() and (shown[::3, 2::3] == picture).all()


def test_letters_beyond_ascii_have_a_font():
    assert load_font("circle").getname() == ImageFont.load_default(14).getname()
    assert write_title("un café à Zürich, 中", 400).width == 400


# ---------------------------------------------------------------- frames

def test_frames_of_a_picture():
    """The state on the left, the estimate on the right, and a bar as long as sigma."""
    sigmas = [1.0, 0.75, 0.25, 0.0]
    noisy = [flat(color) for color in ("red", "lime", "blue", "yellow")]
    clean = [flat(color) for color in ("cyan", "magenta", "navy", "yellow")]
    frames = list(picture_frames(sigmas, noisy, clean))
    assert len(frames) == 4
    lengths = []
    for frame, state, estimate in zip(frames, noisy, clean):
        assert frame.getpixel((5, 5)) == tuple(state[0, 0])
        assert frame.getpixel((frame.width - 5, 5)) == tuple(estimate[0, 0])
        lengths.append(len(columns(frame, MASK, -4)))
    shares = np.array(lengths) / frames[0].width
    assert np.abs(shares - sigmas).max() < 0.01 and lengths == sorted(lengths, reverse=True)


def test_sigma_stands_below(monkeypatch):
    labels = []
    monkeypatch.setattr(film, "write_share", lambda text, share, width: (
        labels.append(text), Image.new("RGB", (width, 9)))[1])
    list(picture_frames([1.0, 0.5, 0.0], [flat("red")] * 3, [flat("red")] * 3))
    assert labels == ["sigma = 1.000", "sigma = 0.500", "sigma = 0.000"]


ROWS = [[None, None, None, None, None],
        ["▁a", None, None, None, None],
        ["▁a", None, "angle", None, "</s>"],
        ["▁a", "▁tri", "angle", "</s>", "</s>"]]


def test_frames_of_a_text(monkeypatch):
    """Masks are boxes, new tokens highlighted, t the share that is masked."""
    labels, write_share = [], film.write_share
    monkeypatch.setattr(film, "write_share", lambda text, share, width: (
        labels.append((text, share)), write_share(text, share, width))[1])
    frames = list(text_frames(ROWS, flat("red")))
    assert labels == [("t = 1.00 of the tokens masked", 1.0),
                      ("t = 0.80 of the tokens masked, 1 opened", 0.8),
                      ("t = 0.40 of the tokens masked, 2 opened", 0.4),
                      ("t = 0.00 of the tokens masked, 2 opened", 0.0)]
    panels = [frame.crop((192 + GAP, 0, frame.width, 192)) for frame in frames]
    masks = [count(panel, MASK) for panel in panels]
    assert masks == sorted(masks, reverse=True) and masks[-1] == 0 and len({*masks}) == 4
    assert [count(panel, NEW) > 0 for panel in panels] == [False, True, True, True]
    assert [count(panel, OPEN) > 0 for panel in panels] == [False, False, True, True]
    assert all(count(frame, "red") == 192 * 192 for frame in frames)


def test_a_mask_is_as_wide_as_its_token_and_padding_is_narrow():
    closed, *_, opened = text_frames(ROWS, flat("red"))
    boxes = np.split(columns(closed, MASK, 3), np.flatnonzero(
        np.diff(columns(closed, MASK, 3)) > 1) + 1)
    assert len(boxes) == 5
    widths = [len(box) for box in boxes]
    expected = [int(load_font(word).getlength(word)) + 7 for word in ("a", "tri", "angle", "</s>")]
    assert widths == [*expected, 8]
    spaces = [after[0] - before[-1] - 1 for before, after in zip(boxes, boxes[1:])]
    assert spaces[0] > spaces[1]                                # "tri" begins a word, "angle" not
    assert np.isin(columns(opened, NEW, 3), np.concatenate(boxes)).all()


def test_a_question_is_given():
    """Neither a mask nor new, and no part of t. Its </s>, of an earlier turn, ends nothing."""
    rows = [["▁why", "</s>", None, None], ["▁why", "</s>", "▁yes", None],
            ["▁why", "</s>", "▁yes", "▁no"]]
    first, second, third = (np.asarray(frame) for frame in text_frames(rows, flat("red")))
    bars = [len(columns(frame, MASK, -4)) / frame.shape[1] for frame in (first, second, third)]
    assert np.abs(np.array(bars) - [1, 0.5, 0]).max() < 0.01
    start = 192 + GAP
    question = int(load_font("why").getlength("why")) + int(load_font("</s>").getlength("</s>"))
    assert not len(columns(first[:, start:start + question], MASK, 3))
    assert (first[:192, start:start + question] == third[:192, start:start + question]).all()
    expected = int(load_font("no").getlength("no")) + 7
    assert len(columns(third[:, start:], NEW, 3)) == expected   # no narrow box


def test_a_long_text_gets_a_wider_panel():
    row = ["▁somewhere"] * 300
    frame, _ = text_frames([[None] * 300, row], flat("red"))
    assert frame.height < 1.5 * frame.width


# ---------------------------------------------------------------- files

def frames_of(data):
    with Image.open(io.BytesIO(data)) as gif:
        for i in range(gif.n_frames):
            gif.seek(i)
            yield gif.convert("RGB"), gif.info["duration"]


def test_frames_to_show_are_spread():
    assert spread(range(29)) == [0, 4, 8, 12, 16, 20, 24, 28]
    assert spread(range(3)) == [0, 1, 2] and spread(range(1)) == [0]


def test_a_gif_keeps_its_frames_and_the_last_one_stays():
    frames = list(picture_frames([1.0, 0.5, 0.0], [flat(c) for c in ("red", "lime", "blue")],
                                 [flat("gray")] * 3))
    decoded = list(frames_of(encode_gif(frames)))
    assert [pause for _, pause in decoded] == [400, 400, 3000]
    for frame, (shown, _) in zip(frames, decoded):
        assert shown.size == frame.size
        assert np.abs(np.asarray(shown).astype(int) - np.asarray(frame)).max() <= 24


def test_a_gif_of_noise_at_full_size_is_small_enough():
    """No frame is like the one before, so each is stored whole."""
    rng = np.random.default_rng(0)
    sigmas = np.linspace(1, 0, 29)
    noisy, clean = ((rng.integers(0, 256, (1024, 1024, 3), dtype=np.uint8) for _ in sigmas)
                    for _ in range(2))
    data = encode_gif(list(picture_frames(sigmas, noisy, clean)))
    decoded = list(frames_of(data))
    assert len(data) < LIMIT and len(decoded) == 29


def test_fewer_frames_are_the_last_resort():
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (80, 80, 3), dtype=np.uint8))
              for _ in range(8)] + [Image.new("RGB", (80, 80), "red")]
    sizes = {}
    for limit in (10 ** 9, 50_000, 5_000):
        data = encode_gif(frames, limit)
        decoded = list(frames_of(data))
        assert len(data) < limit and decoded[-1][0].getpixel((9, 9))[0] > 230
        sizes[limit] = len(decoded), decoded[0][0].width
    assert sizes[10 ** 9] == (9, 80)
    assert sizes[50_000] == (9, 60)                             # fewer colors were not enough
    assert sizes[5_000] == (3, 40)
    assert encode_gif(frames, 10)                               # a single frame, and no endless try


def test_a_film_and_its_strip(tmp_path):
    sigmas = [1 - i / 20 for i in range(21)]
    frames = list(picture_frames(sigmas, [flat("red")] * 21, [flat("blue")] * 21))
    write_film(tmp_path / "deep" / "x.gif", "a circle", frames)
    with Image.open(tmp_path / "deep" / "x.gif") as gif:
        assert gif.n_frames == 21 and gif.info["loop"] == 0
    with Image.open(tmp_path / "deep" / "x.png") as strip:
        assert strip.width == 4 * frames[0].width + 5 * GAP
        assert strip.height == LINE + 2 * frames[0].height + 4 * GAP
        assert count(strip.convert("RGB"), "red") == 8 * 192 * 192


@pytest.mark.parametrize("taken", ["x.gif", "x.png"])
def test_a_name_that_is_taken_meanwhile(tmp_path, taken):
    (tmp_path / taken).write_text("mine")
    frames = list(picture_frames([1.0, 0.0], [flat("red")] * 2, [flat("red")] * 2))
    with pytest.raises(FileExistsError, match=f"{taken} exists by now"):
        write_film(Path(tmp_path) / "x.gif", "a circle", frames)
    assert (tmp_path / taken).read_text() == "mine"
