"""Buckets: shapes of training pictures, so that a picture that is not square loses few pixels.

A batch has one shape (height, width), all shapes have about the same area, and a picture is cropped
to the nearest one. Near is meant by aspect, the logarithm of width / height: 0 for a square, of
opposite sign for a portrait and its landscape. Aspects are measured once, from the records or the
headers of the pictures, and stay in a file beside the JSONL file: 4 bytes for each line.

Run alone to see the shapes for a side and a largest aspect:   python buckets.py 512 2
"""
import itertools
import json
import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from checkpoint import write_atomically
from records import Line, Part, Records, Unusable, build_beside, find_file, parse_line, read_lines

Shape = tuple[int, int]                                         # height, width


# ---------------------------------------------------------------- shapes

_LARGEST_AREA = 1.05                                            # of the square's

def bucket_shapes(size: int, max_aspect: float = 1.0, unit: int = 16) -> list[Shape]:
    """The shapes (height, width) with about the area of a square of side `size`, narrow ones first.

    max_aspect: the largest width : height and height : width; 1: the square alone. unit: pixels
    that a side is a multiple of. Sides differ by an eighth of `size`, rounded to the unit.
    """
    step = max(1, round(size / 8 / unit)) * unit
    wide: list[Shape] = []
    for width in itertools.count(size + step, step):
        too_high = size - _LARGEST_AREA * size ** 2 / width
        height = size - math.ceil(too_high / step) * step
        if height <= 0 or width > max_aspect * height:
            break
        wide.append((height, width))
    tall = [(width, height) for height, width in reversed(wide)]
    return [*tall, (size, size), *wide]


def aspects_of(shapes: Sequence[Shape]) -> np.ndarray:
    """The aspect of each shape, (shapes,)."""
    return np.array([math.log(width / height) for height, width in shapes], np.float32)


def nearest_shapes(shapes: Sequence[Shape], aspects: np.ndarray) -> np.ndarray:
    """The number of the nearest shape for each of n aspects, (n,); shapes as in `bucket_shapes`."""
    own = aspects_of(shapes)
    return np.searchsorted((own[1:] + own[:-1]) / 2, aspects).astype(np.int32)


def cropped_share(shapes: Sequence[Shape], aspects: np.ndarray) -> float:
    """The share of a picture's pixels that lie outside of its shape, a mean over n pictures."""
    own = aspects_of(shapes)[nearest_shapes(shapes, aspects)]                       # (n,)
    return float(np.mean(1 - np.exp(-np.abs(aspects - own))))


class Buckets(NamedTuple):
    """The shapes of `bucket_shapes`, and the aspect of the picture of each of n examples."""
    shapes: list[Shape]
    aspects: np.ndarray             # (n,)


# ---------------------------------------------------------------- aspects of pictures

_ORIENTATION = 274                                              # tag of EXIF
_SIDEWAYS = (5, 6, 7, 8)                                        # its values that exchange the sides


def orientation_of(file: Image.Image) -> int | None:
    """The EXIF orientation of a picture; None without one or where EXIF is broken."""
    try:
        # The method of PNG pictures would decode the pixels.
        return Image.Image.getexif(file).get(_ORIENTATION)
    except Exception:                       # Pillow raises almost every kind; the pixels are whole
        return None


def picture_aspect(path: str | Path) -> float:
    """The aspect of a picture that is shown upright, from its header; 0 if it cannot be read."""
    try:
        with Image.open(find_file(path)) as file:
            aspect = math.log(file.width / file.height)
            is_sideways = file.format != "TIFF" and orientation_of(file) in _SIDEWAYS
            return -aspect if is_sideways else aspect           # Pillow turns TIFF pictures itself
    except Exception:                       # as above; the loader skips its records and says why
        return 0.0


def recorded_aspect(record: dict) -> float | None:
    """The aspect of a record's target by its img_w and img_h, or width and height; None without.

    Lists have a number for each picture of "image", the last of which is the target.
    """
    names = record.get("image")
    count = len(names) if isinstance(names, list) else 1
    for keys in (("img_w", "img_h"), ("width", "height")):
        sides = [record.get(key) for key in keys]
        sides = [side if isinstance(side, list) else [side] for side in sides]
        if all(len(side) == count and isinstance(side[-1], (int, float))
               and 0 < side[-1] < math.inf for side in sides):
            return math.log(sides[0][-1] / sides[1][-1])
    return None


def _line_aspect(line: Line, path: Path) -> float:
    """The aspect of the picture that all examples of a line share, their sources left out."""
    try:
        examples = parse_line(line.content, path, line.number)
    except Unusable:
        return 0.0
    if examples[0].image is None:
        return 0.0
    aspect = recorded_aspect(json.loads(line.content.decode("utf-8-sig")))
    return picture_aspect(examples[0].image) if aspect is None else aspect


# ---------------------------------------------------------------- the file of aspects

_DIGEST_SIZE = 32                                               # bytes of SHA-256


def _build_aspects(path: Path, digest: bytes, target: Path) -> None:
    """Write the aspects of a JSONL file, float32 by line (0 for a blank one), then its digest."""
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file, ThreadPoolExecutor(16) as pool, tqdm(
                total=path.stat().st_size, desc=f"measuring pictures of {path.name}", unit="B",
                unit_scale=True, leave=False, delay=1) as bar:
            all_lines, count = read_lines(path), 0
            while lines := list(itertools.islice(all_lines, 4096)):
                aspects = np.zeros(lines[-1].number - count, "<f4")
                places = [line.number - count - 1 for line in lines]
                aspects[places] = list(pool.map(lambda line: _line_aspect(line, path), lines))
                file.write(aspects.tobytes())
                count = lines[-1].number
                bar.update(lines[-1].offset + len(lines[-1].content) - bar.n)
            file.write(digest)

    write_atomically(target, write)


def _has_digest(file: Path, digest: bytes) -> bool:
    """Whether a file of aspects is whole and belongs to the JSONL file of this digest."""
    try:
        with open(file, "rb") as stream:
            size = stream.seek(-_DIGEST_SIZE, os.SEEK_END)
            return size % 4 == 0 and stream.read() == digest
    except OSError:
        return False


def _open_aspects(part: Part, folder: Path) -> np.ndarray:
    """The aspects of a JSONL file by line, memory-mapped; (lines,)."""
    digest = bytes.fromhex(part.header["digest"])
    file = build_beside(part.path, "aspects", folder,
                        lambda target: _build_aspects(part.path, digest, target),
                        lambda place: _has_digest(place, digest))
    return np.memmap(file, "<f4", "r", shape=(file.stat().st_size - _DIGEST_SIZE) // 4)


def read_aspects(records: Records, folder: Path) -> np.ndarray:
    """The aspect of each example's picture, (n,) float32; measured if no file has them.

    folder: takes the file where the folder of the JSONL file is read-only.
    """
    parts = [_open_aspects(part, folder)[rows["line"] - 1]
             for part, rows in zip(records.parts, records.rows)]
    aspects = np.concatenate(parts)                                                 # (n,)
    return aspects if records.chosen is None else aspects[records.chosen]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        for height, width in bucket_shapes(int(sys.argv[1]), float(sys.argv[2])):
            print(f"{width} x {height}")
    except ValueError as error:
        sys.exit(f"error: {error}")
