"""The shapes world: small scenes, their pictures, and the way back from a picture to its scene.

A scene is a plain background and one to three objects in the cells of a 3 x 3 grid. An object has
a shape, a colour, a size and a cell. This file draws random scenes and renders them: as pictures,
and as the edge, depth and pose maps of the perception tasks. It also reads pictures back, so the
images of a trained model can be scored exactly.

The test set consists of scenes that training never shows. A hash of the object set assigns the
split (`held_out`).

    rng = random.Random(0)
    scene = random_scene(rng, count=2)
    picture = render(scene)                 # (64, 64, 3) uint8
    assert read_picture(picture) == (scene, 0.0)
"""
import functools
import itertools
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

# Lengths in pixels: the picture, a cell, the border around the grid, and how far an object may
# lie from the centre of its cell.
SIZE, CELL, MARGIN, JITTER = 64, 20, 2, 1

SHAPES = ("circle", "square", "triangle")
ARROWS = ("up arrow", "right arrow", "down arrow", "left arrow")    # the pose task alone shows them
SIZES = ("small", "large")
# Radii in pixels, (small, large). No two of these shapes look alike when they are blurred.
RADII = {
    "circle": (6.0, 9.0), "square": (6.8, 9.0), "triangle": (6.0, 9.0),
    **dict.fromkeys(ARROWS, (6.5, 9.0)),
}
COLORS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220),
    "yellow": (240, 210, 40), "purple": (150, 60, 190), "orange": (245, 130, 30),
}
DEPTHS = {"small": 128, "large": 255}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (128, 128, 128), "black": (15, 15, 15)}
PLACES = (                                      # the name of each cell
    "top left", "top center", "top right",
    "center left", "center", "center right",
    "bottom left", "bottom center", "bottom right",
)


class Object(NamedTuple):
    """An object of a scene.

    cell: 0 to 8 in raster order.
    shift: displacement (right, down) from the centre of the cell, in pixels. No text mentions it.
    """
    size: str
    color: str
    shape: str
    cell: int
    shift: tuple[int, int] = (0, 0)

    @property
    def look(self) -> tuple[str, str, str]:
        """Size, colour and shape."""
        return self.size, self.color, self.shape

    @property
    def row(self) -> int:
        return self.cell // 3

    @property
    def column(self) -> int:
        return self.cell % 3


class Scene(NamedTuple):
    """Objects in raster order of their cells, and the name of the background."""
    objects: tuple[Object, ...]
    background: str

    def content(self) -> tuple:
        """Everything but the displacements. Two scenes are the same if their contents are equal."""
        return frozenset(_without_shifts(self.objects)), self.background

    def empty_cells(self) -> list[int]:
        taken = {o.cell for o in self.objects}
        return [cell for cell in range(9) if cell not in taken]


def _without_shifts(objects: Iterable[Object]) -> list[tuple]:
    return [(*o.look, o.cell) for o in objects]


def raster_order(objects: Iterable[Object]) -> tuple[Object, ...]:
    """Sort objects by their cells, as a scene has them."""
    return tuple(sorted(objects, key=lambda o: o.cell))


# ---------------------------------------------------------------- random scenes

def random_object(rng: random.Random, cell: int, shapes: Sequence[str] = SHAPES) -> Object:
    """Draw an object for a cell, uniformly."""
    shifts = range(-JITTER, JITTER + 1)
    size, color, shape = rng.choice(SIZES), rng.choice(list(COLORS)), rng.choice(shapes)
    return Object(size, color, shape, cell, (rng.choice(shifts), rng.choice(shifts)))


def random_scene(rng: random.Random, count: int, shapes: Sequence[str] = SHAPES) -> Scene:
    """Draw a scene of `count` objects in different cells, uniformly."""
    cells = sorted(rng.sample(range(9), count))
    objects = tuple(random_object(rng, cell, shapes) for cell in cells)
    return Scene(objects, rng.choice(list(BACKGROUNDS)))


def held_out(scene: Scene) -> bool:
    """Return whether a scene belongs to the test set.

    A hash of the object set assigns the split: one set in ten goes to the test set. Background
    and displacements do not enter the hash. So no training scene has the same objects in the same
    cells as any test scene.
    """
    object_set = repr(sorted(_without_shifts(scene.objects)))
    return zlib.crc32(object_set.encode()) % 10 == 0


# ---------------------------------------------------------------- pictures and maps

def _radius(shape: str, size: str) -> float:
    return RADII[shape][SIZES.index(size)]


@functools.cache
def _distance(shape: str, size: str, shift: tuple[int, int]) -> np.ndarray:
    """Signed distance of each pixel of a cell to an object's outline, (CELL, CELL) float32.

    In pixels, negative inside the object.
    """
    center = (CELL - 1) / 2
    y, x = np.mgrid[:CELL, :CELL].astype(np.float32) - center
    x, y = x - shift[0], y - shift[1]
    r = _radius(shape, size)
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - r
    if shape == "triangle":                     # points up, height 2 r - 1, base 2 r
        height = 2 * r - 1
        base_line = y - (r - 0.5)
        side_line = (height * abs(x) - r * (y + r - 0.5)) / np.hypot(height, r)
        return np.maximum(base_line, side_line)

    quarter_turns = ARROWS.index(shape)
    for _ in range(quarter_turns):              # turn the arrow until it points up
        x, y = y, -x
    head_side = (r * abs(x) - (r - 1) * (y + r)) / np.hypot(r, r - 1)
    head = np.maximum(y, head_side)
    shaft_ends = np.maximum(-y, y - r + 0.5)
    shaft = np.maximum(abs(x) - r / 3, shaft_ends)
    return np.minimum(head, shaft)              # the union of the two


def coverage(shape: str, size: str, shift: tuple[int, int]) -> np.ndarray:
    """Fraction of each pixel of a cell that an object covers, (CELL, CELL) float32 in [0, 1]."""
    return np.clip(0.5 - _distance(shape, size, shift), 0, 1)


def _cell_slices(cell: int) -> tuple[slice, slice]:
    row, column = divmod(cell, 3)
    top, left = MARGIN + CELL * row, MARGIN + CELL * column
    return slice(top, top + CELL), slice(left, left + CELL)


def _canvas(color) -> np.ndarray:
    """An empty canvas of one colour (a number or RGB), (64, 64, 3) float32."""
    return np.full((SIZE, SIZE, 3), color, np.float32)


def _paint(canvas: np.ndarray, cell: int, alpha: np.ndarray, color) -> None:
    """Blend a colour (a number or RGB) into a cell of the canvas, with alpha (CELL, CELL)."""
    pixels = canvas[_cell_slices(cell)]                             # (20, 20, 3), a view
    pixels += alpha[..., None] * (np.float32(color) - pixels)


def _to_uint8(canvas: np.ndarray) -> np.ndarray:
    return canvas.round().astype(np.uint8)


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, (64, 64, 3) uint8, with smooth outlines."""
    canvas = _canvas(BACKGROUNDS[scene.background])
    for o in scene.objects:
        _paint(canvas, o.cell, coverage(o.shape, o.size, o.shift), COLORS[o.color])
    return _to_uint8(canvas)


def edge_map(scene: Scene) -> np.ndarray:
    """White outlines on black, three pixels wide, within the objects, (64, 64, 3) uint8."""
    canvas = _canvas(0)
    for o in scene.objects:
        from_stroke = abs(_distance(o.shape, o.size, o.shift) + 1.25)
        _paint(canvas, o.cell, np.clip(2 - from_stroke, 0, 1), 255)
    return _to_uint8(canvas)


def depth_map(scene: Scene) -> np.ndarray:
    """Nearness, (64, 64, 3) uint8.

    A large object is near (255), a small one further away (128), the background far away (0).
    """
    canvas = _canvas(0)
    for o in scene.objects:
        _paint(canvas, o.cell, coverage(o.shape, o.size, o.shift), DEPTHS[o.size])
    return _to_uint8(canvas)


def keypoints(arrow: Object) -> np.ndarray:
    """Tail and tip of an arrow, (2, 2): each (right, down) in pixels from the cell's corner."""
    directions = ((0, -1), (1, 0), (0, 1), (-1, 0))                 # as in ARROWS
    x, y = directions[ARROWS.index(arrow.shape)]
    reach = _radius(arrow.shape, arrow.size) - 2.0
    return (CELL - 1) / 2 + np.array(arrow.shift) + reach * np.array([(-x, -y), (x, y)])


def pose_map(scene: Scene) -> np.ndarray:
    """A blue line from tail to tip of each arrow with a green disc at the tip, on black.

    (64, 64, 3) uint8. Every object of the scene is an arrow.
    """
    canvas = _canvas(0)
    y, x = np.mgrid[:CELL, :CELL].astype(np.float32)
    for o in scene.objects:
        (tail_x, tail_y), (tip_x, tip_y) = keypoints(o)
        line_x, line_y = tip_x - tail_x, tip_y - tail_y
        projection = (x - tail_x) * line_x + (y - tail_y) * line_y
        along = np.clip(projection / (line_x ** 2 + line_y ** 2), 0, 1)     # 0 at tail, 1 at tip
        from_line = np.hypot(x - tail_x - along * line_x, y - tail_y - along * line_y)
        from_tip = np.hypot(x - tip_x, y - tip_y)
        _paint(canvas, o.cell, np.clip(2 - from_line, 0, 1), (60, 110, 255))
        _paint(canvas, o.cell, np.clip(3.5 - from_tip, 0, 1), (60, 255, 60))
    return _to_uint8(canvas)


# ---------------------------------------------------------------- reading back

# Pictures are read by template matching. A template is the rendered picture of one possible cell:
# an empty one, or one of the objects in one of its displacements. Each cell of a picture shows the
# object of its nearest template. Objects never leave their cells, so the cells are independent.

@functools.cache
def _templates(draw: Callable, shapes: tuple[str, ...], colors: tuple[str, ...], background: str):
    """The K objects that a cell can show (None: empty), and their templates, (K, 20 * 20 * 3)."""
    shifts = list(itertools.product(range(-JITTER, JITTER + 1), repeat=2))
    objects: list[Object | None] = [None]
    for size, color, shape, shift in itertools.product(SIZES, colors, shapes, shifts):
        objects.append(Object(size, color, shape, 0, shift))
    templates = []
    for o in objects:
        scene = Scene(() if o is None else (o,), background)
        templates.append(draw(scene)[_cell_slices(0)].ravel())
    return objects, np.stack(templates).astype(np.float32)          # (K, 1200)


def _match(picture: np.ndarray, objects: list, templates: np.ndarray) -> tuple[list[Object], float]:
    """Find the nearest template of every cell.

    Returns the objects, and the mean absolute error (0 to 255) of the cells with an object.
    """
    cells = [picture[_cell_slices(cell)].ravel() for cell in range(9)]
    cells = np.stack(cells).astype(np.float32)                      # (9, 1200)
    # |t - c|^2 = |t|^2 - 2 c t + |c|^2; the last term is the same for all templates of a cell
    distances = (templates ** 2).sum(1) - 2 * cells @ templates.T   # (9, K)
    matches, errors = [], []
    for cell, nearest in enumerate(distances.argmin(axis=1)):
        if objects[nearest] is not None:
            matches.append(objects[nearest]._replace(cell=cell))
            errors.append(np.abs(cells[cell] - templates[nearest]).mean())
    return matches, float(np.mean(errors)) if errors else 0.0


def _check_picture(picture: np.ndarray) -> None:
    if picture.shape != (SIZE, SIZE, 3):
        raise ValueError(f"picture has shape {picture.shape}, expected ({SIZE}, {SIZE}, 3)")


def _read_background(picture: np.ndarray) -> str:
    """The background whose colour is nearest to the median of the border around the grid."""
    values = picture.astype(np.float32)
    strips = values[:MARGIN], values[-MARGIN:], values[:, :MARGIN], values[:, -MARGIN:]
    border = np.concatenate([strip.reshape(-1, 3) for strip in strips])
    median = np.median(border, axis=0)                              # (3,)
    return min(BACKGROUNDS, key=lambda name: np.abs(median - BACKGROUNDS[name]).sum())


def read_picture(picture: np.ndarray) -> tuple[Scene, float]:
    """Read the scene of a picture (64, 64, 3) uint8 by template matching.

    Returns the scene, and the mean absolute error (0 to 255) in the cells of its objects.
    A rendered picture gives exactly its scene and the error 0. Raises ValueError for another size.
    """
    _check_picture(picture)
    background = _read_background(picture)
    objects, error = _match(picture, *_templates(render, SHAPES, tuple(COLORS), background))
    return Scene(tuple(objects), background), error


def read_pose(picture: np.ndarray) -> list[Object]:
    """Read the arrows of a pose map (64, 64, 3) uint8 by template matching.

    A pose map does not show the colour of an arrow: every arrow gets the first of COLORS.
    """
    _check_picture(picture)
    any_color = tuple(COLORS)[:1]
    arrows, _ = _match(picture, *_templates(pose_map, ARROWS, any_color, "black"))
    return arrows
