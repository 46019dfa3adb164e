"""Films of the two diffusions: a picture as it leaves the noise, a text as its masks open.

`sample.py --film film.gif` keeps the state of every step. Here states become frames, and frames a
GIF, with a strip of a few frames beside it, film.png.
"""
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from checkpoint import write_atomically

TILE, PANEL, GAP = 224, 264, 12         # pixels: a picture at most, a text, and between them
LINE = 24                               # height of a line of text
MASK, NEW, OPEN, INK, GRAY = "#b4bfce", "#ffd23f", "#eef1f5", "#1d2430", "#6b7585"


# ---------------------------------------------------------------- drawing

def load_font(text: str, size: int = 14) -> ImageFont.FreeTypeFont:
    """A font that has the letters of a text; Pillow's own one has those of ASCII alone."""
    for name in () if text.isascii() else ("DejaVuSans.ttf", "Arial.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:                                         # not on this machine
            continue
    return ImageFont.load_default(size)


def join(pictures: Sequence[Image.Image], axis: int) -> Image.Image:
    """Place pictures below each other (axis 0) or side by side (axis 1), on white."""
    along, across = 1 - axis, axis                              # PIL's sizes are (width, height)
    size = [0, 0]
    size[along] = sum(p.size[along] for p in pictures) + GAP * (len(pictures) - 1)
    size[across] = max(p.size[across] for p in pictures)
    joined, place = Image.new("RGB", size, "white"), [0, 0]
    for picture in pictures:
        joined.paste(picture, tuple(place))
        place[along] += picture.size[along] + GAP
    return joined


def place_boxes(boxes: Sequence[tuple[int, int]], width: int) -> list[tuple[int, int]]:
    """Place boxes (space before, own width) into lines of `width` pixels; (x, line) of each."""
    places, end, line = [], 0, 0
    for space, own in boxes:
        if end and end + space + own > width:
            end, line = 0, line + 1
        places.append((end + space if end else 0, line))
        end = places[-1][0] + own
    return places


def write_title(text: str, width: int) -> Image.Image:
    """Write a text in four lines at most."""
    words, font = text.split() or ["(no text)"], load_font(text, 16)
    places = place_boxes([(5, int(font.getlength(word)) + 1) for word in words], width)
    count = sum(line < 4 for _, line in places)
    if count < len(words):
        words[count - 1] = "..."
    picture = Image.new("RGB", (width, LINE * (places[count - 1][1] + 1)), "white")
    for word, (x, line) in zip(words[:count], places):
        ImageDraw.Draw(picture).text((x, LINE * line + 17), word, INK, font, "ls")
    return picture


def write_share(text: str, share: float, width: int) -> Image.Image:
    """Write a text above a bar that is filled by a share."""
    picture = Image.new("RGB", (width, LINE + 8), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((0, 17), text, INK, load_font(text), "ls")
    draw.rounded_rectangle((0, LINE, width - 1, LINE + 7), 3, OPEN)
    if share:
        draw.rounded_rectangle((0, LINE, max(7, share * (width - 1)), LINE + 7), 3, MASK)
    return picture


def label_picture(picture: np.ndarray, label: str) -> Image.Image:
    """Show a picture (h, w, 3) uint8 in a readable size, with a label below."""
    side = max(picture.shape)
    scale = TILE // side if side <= TILE else TILE / side       # whole: all pixels stay alike
    width, height = (max(1, round(scale * n)) for n in (picture.shape[1], picture.shape[0]))
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    font = load_font(label)
    tile = Image.new("RGB", (max(width, int(font.getlength(label)) + 1), height + LINE), "white")
    tile.paste(Image.fromarray(picture).resize((width, height), method))
    ImageDraw.Draw(tile).text((0, height + 18), label, GRAY, font, "ls")
    return tile


# ---------------------------------------------------------------- frames

def picture_frames(sigmas: Iterable[float], noisy: Iterable[np.ndarray],
                   clean: Iterable[np.ndarray], sources: Sequence[np.ndarray] = ()
                   ) -> Iterator[Image.Image]:
    """Frames of the flow: the noisy state beside the clean estimate, sigma below.

    Pictures are (h, w, 3) uint8; sources: those that are edited, shown in every frame.
    """
    given = [label_picture(source, "source") for source in sources]
    for sigma, state, estimate in zip(sigmas, noisy, clean):
        row = join([*given, label_picture(state, "noisy state x"),
                    label_picture(estimate, "clean estimate x - sigma v")], 1)
        yield join([row, write_share(f"sigma = {sigma:.3f}", sigma, row.width)], 0)


def text_frames(rows: Sequence[Sequence[str | None]], picture: np.ndarray
                ) -> Iterator[Image.Image]:
    """Frames of the masked diffusion: the text beside its picture (h, w, 3), t below.

    rows: the pieces of sentencepiece at each step, None for a mask. A mask is drawn as wide as the
    piece that takes its place, so nothing moves; the padding after the text as narrow boxes.
    """
    first, final = rows[0], rows[-1]
    given = [piece is not None for piece in first]              # of a question
    ends = [i for i, piece in enumerate(final) if piece == "</s>" and not given[i]]
    words = [piece.lstrip("\u2581") for piece in final]         # this sign begins a word
    words = [word if not ends or i <= ends[0] else "" for i, word in enumerate(words)]
    fonts = [load_font(word) for word in words]
    boxes = [(6 if piece.startswith("\u2581") else 2, max(8, int(font.getlength(word)) + 7))
             for piece, word, font in zip(final, words, fonts)]
    area = LINE * sum(space + own for space, own in boxes)
    width = max(PANEL, int((1.5 * area) ** 0.5))                # a long text gets a wider panel
    places = place_boxes(boxes, width)
    tile = label_picture(picture, "picture")
    for before, row in zip([first, *rows], rows):
        panel = Image.new("RGB", (width, LINE * (places[-1][1] + 1)), "white")
        draw = ImageDraw.Draw(panel)
        for i, ((x, line), (_, own)) in enumerate(zip(places, boxes)):
            color = MASK if row[i] is None else NEW if before[i] is None else OPEN
            shape = x, LINE * line, x + own - 1, LINE * line + LINE - 5
            draw.rounded_rectangle(shape, 3, None if given[i] else color)
            if row[i] is not None:
                ink = GRAY if given[i] else INK
                draw.text((x + 3, LINE * line + 15), words[i], ink, fonts[i], "ls")
        t = row.count(None) / first.count(None)
        opened = before.count(None) - row.count(None)
        text = f"t = {t:.2f} of the tokens masked" + f", {opened} opened" * (opened > 0)
        body = join([tile, panel], 1)
        yield join([body, write_share(text, t, body.width)], 0)


# ---------------------------------------------------------------- files

LIMIT = 2_000_000                       # bytes of a GIF


def spread(frames: Sequence[Image.Image], count: int = 8) -> list[Image.Image]:
    """At most `count` frames, evenly, with the first and the last."""
    count = min(count, len(frames))
    return [frames[i * (len(frames) - 1) // max(1, count - 1)] for i in range(count)]


def encode_gif(frames: Sequence[Image.Image], limit: int = LIMIT) -> bytes:
    """A GIF below `limit` bytes: with fewer colors, then smaller, then with fewer frames.

    All frames share a palette, so that what stands still is stored once: it is transparent later,
    the 256th color. The last frame stays three seconds.
    """
    for colors, scale in ((255, 1), (64, 1), (64, 0.75), (64, 0.5)):
        scaled = [f.resize([int(scale * side) for side in f.size], Image.Resampling.LANCZOS)
                  for f in frames]
        few = join(spread(scaled), 0)
        few = few.resize([side // 2 for side in few.size], Image.Resampling.NEAREST)    # faster
        palette = few.quantize(colors, Image.Quantize.MAXCOVERAGE, kmeans=1)
        first, *others = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in scaled]
        file, pause = io.BytesIO(), min(400, max(40, 6000 // len(frames)))      # milliseconds
        first.save(file, "GIF", save_all=True, append_images=others, loop=0,
                   duration=[pause] * len(others) + [3000])
        if file.tell() < limit or not others:
            return file.getvalue()
    return encode_gif(frames[::-2][::-1], limit)                # every other one, and the last


def write_film(path: Path, title: str, frames: Sequence[Image.Image],
               overwrite: bool = False) -> None:
    """Write frames under a title as a GIF, and a few of them as a PNG of the same name.

    Without `overwrite`, raises FileExistsError for a name that was taken since the start.
    """
    def finish(rows: Sequence[Image.Image]) -> Image.Image:
        return ImageOps.expand(join([write_title(title, rows[0].width), *rows], 0), GAP, "white")

    few = spread(frames)
    strip = finish([join(few[i:i + 4], 1) for i in range(0, len(few), 4)])
    data = encode_gif([finish([frame]) for frame in frames])
    files = path, path.with_suffix(".png")
    if taken := [file for file in files if file.exists() and not overwrite]:
        raise FileExistsError(f"{taken[0]} exists by now; nothing is overwritten")
    write_atomically(files[0], lambda file: file.write_bytes(data))
    write_atomically(files[1], lambda file: strip.save(file, "PNG"))
