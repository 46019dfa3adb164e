"""The shapes world: a procedural data set small enough to train on a laptop, in which every answer can be checked exactly.

A scene is a plain background and one to three objects in the cells of a 3 x 3 grid; an object has a shape, a colour, a size
and a cell. This file draws scenes, describes them in a small grammar, and reads pictures and captions back into scenes
(render and match; parse), which is how the trained model is scored. `make_world` writes it all to disk in the JSONL format
that real data has.

Run alone to write a world and look at it:   python shapes.py FOLDER
"""
import functools
import itertools
import json
import random
import re
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

SIZE, CELL, MARGIN, JITTER = 64, 20, 2, 1           # pixels: picture, cell, border around the grid, displacement within a cell
SHAPES = ("circle", "square", "triangle")
RADII = {"small": 6.5, "large": 9.0}                # pixels; with 5.5 and 8.5 small squares and circles blur into each other
COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220),
          "yellow": (240, 210, 40), "purple": (150, 60, 190), "orange": (245, 130, 30)}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (128, 128, 128), "black": (15, 15, 15)}
PLACES = ("top left", "top center", "top right", "center left", "center", "center right",
          "bottom left", "bottom center", "bottom right")     # one per cell, in raster order


class Object(NamedTuple):
    """One object; `cell` is 0 to 8 in raster order, `shift` its displacement (right, down) in pixels, which no caption tells."""
    size: str
    color: str
    shape: str
    cell: int
    shift: tuple[int, int] = (0, 0)


class Scene(NamedTuple):
    """Objects in raster order of their cells, and the name of the background."""
    objects: tuple[Object, ...]
    background: str

    def content(self) -> tuple:
        """What counts when two scenes are compared: everything but the displacements."""
        return frozenset(o[:4] for o in self.objects), self.background


# ---------------------------------------------------------------- scenes

def random_scene(rng: random.Random, count: int) -> Scene:
    """A scene of `count` objects in different cells, everything else uniform."""
    cells = sorted(rng.sample(range(9), count))
    shift = range(-JITTER, JITTER + 1)
    objects = tuple(Object(rng.choice(list(RADII)), rng.choice(list(COLORS)), rng.choice(SHAPES), cell,
                           (rng.choice(shift), rng.choice(shift))) for cell in cells)
    return Scene(objects, rng.choice(list(BACKGROUNDS)))


def held_out(scene: Scene) -> bool:
    """Whether a scene belongs to the test set: a tenth of all *sets of objects*, chosen by a checksum of the set.

    Background and displacements do not enter, so no training scene has the same objects as any test scene.
    """
    return zlib.crc32(repr(sorted(o[:4] for o in scene.objects)).encode()) % 10 == 0


# ---------------------------------------------------------------- pictures

@functools.cache
def coverage(shape: str, size: str, shift: tuple[int, int]) -> np.ndarray:
    """How much of each pixel of a cell the object covers, (CELL, CELL) float32 in [0, 1], with smooth outlines."""
    middle = (CELL - 1) / 2
    y, x = np.mgrid[:CELL, :CELL].astype(np.float32) - middle
    x, y, r = x - shift[0], y - shift[1], RADII[size]
    if shape == "circle":
        distance = np.hypot(x, y) - r
    elif shape == "square":
        distance = np.maximum(abs(x), abs(y)) - (r - 0.5)
    else:                                           # an upright triangle of height 2 r - 1 and base 2 r
        slope = np.hypot(2 * r - 1, r)
        distance = np.maximum(y - (r - 0.5), ((2 * r - 1) * abs(x) - r * (y + r - 0.5)) / slope)
    return np.clip(0.5 - distance, 0, 1)


def _cell_slices(cell: int) -> tuple[slice, slice]:
    row, column = divmod(cell, 3)
    top, left = MARGIN + CELL * row, MARGIN + CELL * column
    return slice(top, top + CELL), slice(left, left + CELL)


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, (64, 64, 3) uint8."""
    picture = np.empty((SIZE, SIZE, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for o in scene.objects:
        alpha = coverage(o.shape, o.size, o.shift)[..., None]                                 # (20, 20, 1)
        where = _cell_slices(o.cell)
        picture[where] += alpha * (np.float32(COLORS[o.color]) - picture[where])              # (20, 20, 3)
    return picture.round().astype(np.uint8)


@functools.cache
def _templates(background: str) -> tuple[list[Object | None], np.ndarray]:
    """Everything a cell can show on a background: the objects (None: empty) and their pixels, (K, 20 * 20 * 3)."""
    shifts = list(itertools.product(range(-JITTER, JITTER + 1), repeat=2))
    objects = [None] + [Object(size, color, shape, 0, shift)
                        for size, color, shape, shift in itertools.product(RADII, COLORS, SHAPES, shifts)]
    pixels = [render(Scene((o,) if o else (), background))[_cell_slices(0)] for o in objects]
    return objects, np.stack(pixels).reshape(len(objects), -1).astype(np.float32)             # (K, 1200)


def read_picture(picture: np.ndarray) -> tuple[Scene, float]:
    """The scene that a picture shows, by rendering and matching, and the mean absolute error (0 to 255) in its objects' cells.

    picture (64, 64, 3) uint8. Every cell is compared with every object there can be, in every displacement; the background is
    the one that the border around the grid is nearest to. Exact on rendered pictures (tests/test_shapes.py).
    """
    if picture.shape != (SIZE, SIZE, 3):
        raise ValueError(f"picture has shape {picture.shape}, expected ({SIZE}, {SIZE}, 3)")
    values = picture.astype(np.float32)
    border = np.concatenate([values[:MARGIN].reshape(-1, 3), values[-MARGIN:].reshape(-1, 3),
                             values[:, :MARGIN].reshape(-1, 3), values[:, -MARGIN:].reshape(-1, 3)])
    background = min(BACKGROUNDS, key=lambda name: np.abs(np.median(border, axis=0) - BACKGROUNDS[name]).sum())
    objects, templates = _templates(background)
    cells = np.stack([values[_cell_slices(cell)].ravel() for cell in range(9)])               # (9, 1200)
    errors = (templates ** 2).sum(1) - 2 * cells @ templates.T                                # (9, K) squared, but for a constant
    best = errors.argmin(axis=1)                                                              # (9,)
    found = [(cell, k) for cell, k in enumerate(best) if objects[k] is not None]
    error = float(np.mean([np.abs(cells[cell] - templates[k]).mean() for cell, k in found])) if found else 0.0
    return Scene(tuple(objects[k]._replace(cell=cell) for cell, k in found), background), error


# ---------------------------------------------------------------- captions

def caption(scene: Scene) -> str:
    """"a large red circle at the top left and a small blue square at the center on a gray background"."""
    objects = (f"a {o.size} {o.color} {o.shape} at the {PLACES[o.cell]}" for o in scene.objects)
    return f"{' and '.join(objects)} on a {scene.background} background"


_OBJECT = re.compile(f"a ({'|'.join(RADII)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) at the ({'|'.join(PLACES)})")
_BACKGROUND = re.compile(f"(.*) on a ({'|'.join(BACKGROUNDS)}) background")


def parse_caption(text: str) -> Scene | None:
    """The scene that a caption tells, None if it does not follow the grammar or puts two objects into one cell."""
    whole = _BACKGROUND.fullmatch(text.strip())
    parts = [_OBJECT.fullmatch(part) for part in whole[1].split(" and ")] if whole else [None]
    if not all(parts) or len({part[4] for part in parts}) < len(parts):
        return None
    objects = (Object(part[1], part[2], part[3], PLACES.index(part[4])) for part in parts)
    return Scene(tuple(sorted(objects, key=lambda o: o.cell)), whole[2])


# ---------------------------------------------------------------- files

def pair_record(image: str, scene: Scene) -> dict:
    """A text-to-image record: a caption and its picture."""
    return {"image": [image], "conversations": [{"from": "human", "value": caption(scene)}, {"from": "gpt", "value": "<image>"}]}


def make_world(folder: Path, train: int, test: int, seed: int = 0, max_objects: int = 3) -> None:
    """Write FOLDER/train.jsonl and FOLDER/test.jsonl with their pictures in FOLDER/images.

    Test scenes are `held_out`, no training scene is. Test scenes have 1, 2 and 3 objects equally often, training scenes
    in the ratio 1 : 2 : 3, because there is so much more to learn of the crowded ones.
    """
    rng = random.Random(seed)
    counts = range(1, max_objects + 1)
    for split, number, weights in (("train", train, counts), ("test", test, [1] * max_objects)):
        images = folder / "images" / split
        images.mkdir(parents=True, exist_ok=True)
        records = []
        for i in tqdm(range(number), desc=f"drawing {split} scenes", unit="scene", leave=False):
            count = counts[i % max_objects] if split == "test" else rng.choices(counts, weights)[0]
            scene = random_scene(rng, count)
            while held_out(scene) != (split == "test"):
                scene = random_scene(rng, count)
            Image.fromarray(render(scene)).save(images / f"{i:06d}.png", compress_level=1)
            records.append(json.dumps(pair_record(f"images/{split}/{i:06d}.png", scene)) + "\n")
        temporary = folder / f".{split}.jsonl.tmp"              # under its name only when it is complete
        temporary.write_text("".join(records))
        temporary.replace(folder / f"{split}.jsonl")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    make_world(Path(sys.argv[1]), train=60, test=12)
    sheet = [np.concatenate([np.asarray(Image.open(f)) for f in sorted(Path(sys.argv[1], "images/train").glob("*.png"))[i:i + 10]], 1)
             for i in range(0, 60, 10)]
    Image.fromarray(np.concatenate(sheet)).save(Path(sys.argv[1], "overview.png"))
    print((Path(sys.argv[1], "train.jsonl")).read_text().splitlines()[0], "\nwrote", Path(sys.argv[1], "overview.png"))
