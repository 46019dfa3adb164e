"""The shapes world: a procedural data set small enough to train on a laptop, in which every answer can be checked exactly.

A scene is a plain background and one to three objects in the cells of a 3 x 3 grid; an object has a shape, a colour, a size
and a cell. This file draws scenes, describes them in a small grammar, and reads pictures and captions back into scenes
(render and match; parse), which is how the trained model is scored. From a scene come the records of every task of the paper
(section 4): prompts that tell everything or only a part, edits, edge, depth and pose maps, compositions of reference pictures,
questions. `make_world` writes it all to disk in the JSONL formats that real data has (data.py).

Run alone to write a world and look at it:   python shapes.py FOLDER
"""
import functools
import itertools
import json
import random
import re
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

SIZE, CELL, MARGIN, JITTER = 64, 20, 2, 1           # pixels: picture, cell, border around the grid, displacement within a cell
SHAPES = ("circle", "square", "triangle")
ARROWS = ("up arrow", "right arrow", "down arrow", "left arrow")        # what has a pose; only in pictures of the pose task
SIZES = ("small", "large")
RADII = {"circle": (6.0, 9.0), "square": (6.8, 9.0), "triangle": (6.0, 9.0),     # pixels, small and large; chosen so that no two of
         **dict.fromkeys(ARROWS, (6.5, 9.0))}                                    # these look alike when they are blurred (docs/choices.md)
COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220),
          "yellow": (240, 210, 40), "purple": (150, 60, 190), "orange": (245, 130, 30)}
DEPTHS = {"small": 128, "large": 255}
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

def _random_object(rng: random.Random, cell: int, shapes: Sequence[str] = SHAPES) -> Object:
    shift = range(-JITTER, JITTER + 1)
    return Object(rng.choice(SIZES), rng.choice(list(COLORS)), rng.choice(shapes), cell,
                  (rng.choice(shift), rng.choice(shift)))


def random_scene(rng: random.Random, count: int, shapes: Sequence[str] = SHAPES) -> Scene:
    """A scene of `count` objects in different cells, everything else uniform."""
    cells = sorted(rng.sample(range(9), count))
    objects = tuple(_random_object(rng, cell, shapes) for cell in cells)
    return Scene(objects, rng.choice(list(BACKGROUNDS)))


def held_out(scene: Scene) -> bool:
    """Whether a scene belongs to the test set: a tenth of all *sets of objects*, chosen by a checksum of the set.

    Background and displacements do not enter, so no training scene has the same objects as any test scene.
    """
    return zlib.crc32(repr(sorted(o[:4] for o in scene.objects)).encode()) % 10 == 0


# ---------------------------------------------------------------- pictures

def _radius(shape: str, size: str) -> float:
    return RADII[shape][SIZES.index(size)]


@functools.cache
def _distance(shape: str, size: str, shift: tuple[int, int]) -> np.ndarray:
    """Signed distance in pixels to an object's outline, negative inside of it, (CELL, CELL) float32."""
    middle = (CELL - 1) / 2
    y, x = np.mgrid[:CELL, :CELL].astype(np.float32) - middle
    x, y, r = x - shift[0], y - shift[1], _radius(shape, size)
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - r
    if shape == "triangle":                         # upright, of height 2 r - 1 and base 2 r
        slope = np.hypot(2 * r - 1, r)
        return np.maximum(y - (r - 0.5), ((2 * r - 1) * abs(x) - r * (y + r - 0.5)) / slope)
    for _ in range(ARROWS.index(shape)):            # turn it by quarters until it points up
        x, y = y, -x
    head = np.maximum(y, (r * abs(x) - (r - 1) * (y + r)) / np.hypot(r, r - 1))
    return np.minimum(head, np.maximum(abs(x) - r / 3, np.maximum(-y, y - r + 0.5)))


def coverage(shape: str, size: str, shift: tuple[int, int]) -> np.ndarray:
    """How much of each pixel of a cell the object covers, (CELL, CELL) float32 in [0, 1], with smooth outlines."""
    return np.clip(0.5 - _distance(shape, size, shift), 0, 1)


def _cell_slices(cell: int) -> tuple[slice, slice]:
    row, column = divmod(cell, 3)
    top, left = MARGIN + CELL * row, MARGIN + CELL * column
    return slice(top, top + CELL), slice(left, left + CELL)


def _paint(objects: Sequence[Object], background, layers: Callable[[Object], Sequence[tuple[np.ndarray, object]]]) -> np.ndarray:
    """Lay (alpha, colour) layers of each object over a background, (64, 64, 3) uint8."""
    picture = np.empty((SIZE, SIZE, 3), np.float32)
    picture[:] = background
    for o in objects:
        where = _cell_slices(o.cell)
        for alpha, color in layers(o):
            picture[where] += alpha[..., None] * (np.float32(color) - picture[where])         # (20, 20, 3)
    return picture.round().astype(np.uint8)


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, (64, 64, 3) uint8."""
    return _paint(scene.objects, BACKGROUNDS[scene.background], lambda o: [(coverage(o.shape, o.size, o.shift), COLORS[o.color])])


def edge_map(scene: Scene) -> np.ndarray:
    """White outlines on black, three pixels wide, within the objects, (64, 64, 3) uint8."""
    return _paint(scene.objects, 0, lambda o: [(np.clip(2 - abs(_distance(o.shape, o.size, o.shift) + 1.25), 0, 1), 255)])


def depth_map(scene: Scene) -> np.ndarray:
    """Nearness, (64, 64, 3) uint8: a large object is near (255), a small one further (128), the background far away (0)."""
    return _paint(scene.objects, 0, lambda o: [(coverage(o.shape, o.size, o.shift), DEPTHS[o.size])])


def keypoints(arrow: Object) -> np.ndarray:
    """Tail and tip of an arrow, (2, 2) pixels (right, down) from the corner of its cell."""
    reach, turns = _radius(arrow.shape, arrow.size) - 2.0, ARROWS.index(arrow.shape)
    x, y = ((0, -1), (1, 0), (0, 1), (-1, 0))[turns]
    return (CELL - 1) / 2 + np.array(arrow.shift) + reach * np.array([(-x, -y), (x, y)])


def pose_map(scene: Scene) -> np.ndarray:
    """A line from tail to tip of each arrow in blue, the tip a green disc, on black, (64, 64, 3) uint8."""
    def layers(o: Object):
        y, x = np.mgrid[:CELL, :CELL].astype(np.float32)
        tail, tip = keypoints(o)
        along = np.clip(((x - tail[0]) * (tip - tail)[0] + (y - tail[1]) * (tip - tail)[1]) / ((tip - tail) ** 2).sum(), 0, 1)
        line = np.hypot(x - tail[0] - along * (tip - tail)[0], y - tail[1] - along * (tip - tail)[1])
        return [(np.clip(2 - line, 0, 1), (60, 110, 255)), (np.clip(3.5 - np.hypot(x - tip[0], y - tip[1]), 0, 1), (60, 255, 60))]
    return _paint(scene.objects, 0, layers)


@functools.cache
def _templates(draw: Callable[[Scene], np.ndarray], shapes: tuple[str, ...], colors: tuple[str, ...], background: str):
    """Everything a cell can show on a background: the objects (None: empty) and their pixels, (K, 20 * 20 * 3)."""
    shifts = list(itertools.product(range(-JITTER, JITTER + 1), repeat=2))
    objects = [None] + [Object(size, color, shape, 0, shift)
                        for size, color, shape, shift in itertools.product(SIZES, colors, shapes, shifts)]
    pixels = [draw(Scene((o,) if o else (), background))[_cell_slices(0)] for o in objects]
    return objects, np.stack(pixels).reshape(len(objects), -1).astype(np.float32)             # (K, 1200)


def _match(picture: np.ndarray, objects: list, templates: np.ndarray) -> tuple[list[Object], float]:
    """The nearest template of every cell, and the mean absolute error (0 to 255) in the cells that are not empty."""
    cells = np.stack([picture[_cell_slices(cell)].ravel() for cell in range(9)]).astype(np.float32)      # (9, 1200)
    errors = (templates ** 2).sum(1) - 2 * cells @ templates.T                                # (9, K) squared, but for a constant
    found = [(cell, k) for cell, k in enumerate(errors.argmin(axis=1)) if objects[k] is not None]
    error = float(np.mean([np.abs(cells[cell] - templates[k]).mean() for cell, k in found])) if found else 0.0
    return [objects[k]._replace(cell=cell) for cell, k in found], error


def _check_picture(picture: np.ndarray) -> None:
    if picture.shape != (SIZE, SIZE, 3):
        raise ValueError(f"picture has shape {picture.shape}, expected ({SIZE}, {SIZE}, 3)")


def read_picture(picture: np.ndarray) -> tuple[Scene, float]:
    """The scene that a picture shows, by rendering and matching, and the mean absolute error (0 to 255) in its objects' cells.

    picture (64, 64, 3) uint8. Every cell is compared with every object there can be, in every displacement; the background is
    the one that the border around the grid is nearest to. Exact on rendered pictures (tests/test_shapes.py).
    """
    _check_picture(picture)
    values = picture.astype(np.float32)
    border = np.concatenate([values[:MARGIN].reshape(-1, 3), values[-MARGIN:].reshape(-1, 3),
                             values[:, :MARGIN].reshape(-1, 3), values[:, -MARGIN:].reshape(-1, 3)])
    background = min(BACKGROUNDS, key=lambda name: np.abs(np.median(border, axis=0) - BACKGROUNDS[name]).sum())
    objects, error = _match(picture, *_templates(render, SHAPES, tuple(COLORS), background))
    return Scene(tuple(objects), background), error


def read_pose(picture: np.ndarray) -> list[Object]:
    """The arrows that a pose map (64, 64, 3) uint8 shows; their colour cannot be told and is the first one."""
    _check_picture(picture)
    return _match(picture, *_templates(pose_map, ARROWS, tuple(COLORS)[:1], "black"))[0]


# ---------------------------------------------------------------- captions

def caption(scene: Scene) -> str:
    """"a large red circle at the top left and a small blue square at the center on a gray background"."""
    objects = (f"a {o.size} {o.color} {o.shape} at the {PLACES[o.cell]}" for o in scene.objects)
    return f"{' and '.join(objects)} on a {scene.background} background"


_OBJECT = re.compile(f"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) at the ({'|'.join(PLACES)})")
_BACKGROUND = re.compile(f"(.*) on a ({'|'.join(BACKGROUNDS)}) background")


def parse_caption(text: str) -> Scene | None:
    """The scene that a caption tells, None if it does not follow the grammar or puts two objects into one cell."""
    whole = _BACKGROUND.fullmatch(text.strip())
    parts = [_OBJECT.fullmatch(part) for part in whole[1].split(" and ")] if whole else [None]
    if not all(parts) or len({part[4] for part in parts}) < len(parts):
        return None
    objects = (Object(part[1], part[2], part[3], PLACES.index(part[4])) for part in parts)
    return Scene(tuple(sorted(objects, key=lambda o: o.cell)), whole[2])


# ---------------------------------------------------------------- prompts that tell only a part

NUMBERS = ("no", "one", "two", "three")
RELATIONS = {"left of": lambda a, b: a.cell % 3 < b.cell % 3, "right of": lambda a, b: a.cell % 3 > b.cell % 3,
             "above": lambda a, b: a.cell // 3 < b.cell // 3, "below": lambda a, b: a.cell // 3 > b.cell // 3}
CATEGORIES = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution",    # GenEval's
              "negation")


def fits(o: Object, phrase: str) -> bool:
    """Whether a noun phrase is true of an object: "red circle", "small object", "squares" (in any number, with any article)."""
    words = {word.removesuffix("s") for word in phrase.split()} - {"a", "an", "the", "object"}
    return words <= {o.size, o.color, o.shape}


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def prompt_category(prompt: str) -> str:
    """Which of CATEGORIES a partial prompt belongs to."""
    text = prompt.split(" on a ")[0]
    if " and no " in text:
        return "negation"
    if text.split()[0] in NUMBERS:
        return "counting"
    colors = any(color in text.split() for color in COLORS)
    if any(f" {relation} " in text for relation in RELATIONS):
        return "position"
    if " and " in text:
        return "color_attribution" if colors else "two_objects"
    return "colors" if colors else "single_object"


def satisfies(scene: Scene, prompt: str) -> bool:
    """Whether a scene is what a partial prompt asks for, and shows no other objects."""
    text, _, background = prompt.removesuffix(" background").partition(" on a ")
    if background and background != scene.background:
        return False
    objects, category = scene.objects, prompt_category(prompt)
    if category in ("counting", "negation"):
        number, _, rest = text.partition(" ")
        wanted, _, without = rest.partition(" and no ")
        return len(objects) == NUMBERS.index(number) and all(fits(o, wanted) for o in objects) and not any(
            without and fits(o, without) for o in objects)
    if category in ("single_object", "colors"):
        return len(objects) == 1 and fits(objects[0], text)
    joint = next((relation for relation in RELATIONS if f" {relation} " in text), "and")
    first, second = text.split(f" {joint} ")
    holds = RELATIONS.get(joint, lambda a, b: True)
    return len(objects) == 2 and any(fits(a, first) and fits(b, second) and holds(a, b) for a, b in (objects, objects[::-1]))


def random_prompt(rng: random.Random, category: str) -> tuple[str, Scene]:
    """A prompt of one of CATEGORIES, which tells a part of a scene, and the scene; half of the prompts name the background."""
    if category == "counting":
        count = rng.choice((2, 3))
        scene = random_scene(rng, count)
        part = rng.choice([{"shape": rng.choice(SHAPES)}, {"color": rng.choice(list(COLORS))},
                           {"shape": rng.choice(SHAPES), "color": rng.choice(list(COLORS))}])
        scene = scene._replace(objects=tuple(o._replace(**part) for o in scene.objects))
        text = " ".join(filter(None, (NUMBERS[count], part.get("color"), part.get("shape", "object") + "s")))
    elif category == "negation":
        count = rng.choice((1, 2, 3))
        scene = random_scene(rng, count)
        absent = [x for x in (*SHAPES, *(f"{color} object" for color in COLORS)) if not any(fits(o, x) for o in scene.objects)]
        text = f"{NUMBERS[count]} object{'s' * (count > 1)} and no {rng.choice(absent)}"
    elif category in ("single_object", "colors"):
        scene = random_scene(rng, 1)
        text = _a(f"{scene.objects[0].color + ' ' if category == 'colors' else ''}{scene.objects[0].shape}")
    else:
        while True:
            scene = random_scene(rng, 2)
            a, b = rng.sample(scene.objects, 2)
            joints = [name for name, holds in RELATIONS.items() if holds(a, b)] if category == "position" else ["and"]
            colors = category == "color_attribution" or category == "position" and rng.random() < 0.5
            names = [_a(f"{o.color + ' ' if colors else ''}{o.shape}") for o in (a, b)]
            if joints and names[0] != names[1]:
                text = f" {rng.choice(joints)} ".join(names)
                break
    return text + (f" on a {scene.background} background" if rng.random() < 0.5 else ""), scene


# ---------------------------------------------------------------- edits

EDITS = ("recolor", "resize", "move", "remove", "add", "reshape", "background")
_EDITED = (3, 3, 3, 1.5, 1.5, 4.5, 0.5)             # how often in training: what is hard to do more often


def _with(scene: Scene, old: Object | None, new: Object | None) -> Scene:
    """The scene with one object taken out, put in, or exchanged."""
    objects = [o for o in scene.objects if o != old] + [new] * (new is not None)
    return scene._replace(objects=tuple(sorted(objects, key=lambda o: o.cell)))


def _name(rng: random.Random, o: Object, scene: Scene) -> str:
    """One of the names that tell an object from the others: by its place, or by colour and shape if they do."""
    alone = sum((p.color, p.shape) == (o.color, o.shape) for p in scene.objects) == 1
    return f"the {o.color} {o.shape}" if alone and rng.random() < 0.5 else f"the {PLACES[o.cell]} object"


def random_edit(rng: random.Random, scene: Scene, kind: str, keep: Sequence[int] = ()) -> tuple[str, Scene, set[int]] | None:
    """An instruction, the scene after it and the cells that it touches; None if the scene has nothing to do it to.

    kind is one of EDITS; cells in `keep` are not touched. Scenes keep one to three objects, as the captions' grammar has them.
    """
    if kind == "background":
        name = rng.choice([name for name in BACKGROUNDS if name != scene.background])
        return f"make the background {name}", scene._replace(background=name), set()
    empty = [cell for cell in range(9) if cell not in keep and all(o.cell != cell for o in scene.objects)]
    if kind == "add":
        if len(scene.objects) == 3 or not empty:
            return None
        o = _random_object(rng, rng.choice(empty))
        return f"add a {o.size} {o.color} {o.shape} at the {PLACES[o.cell]}", _with(scene, None, o), {o.cell}
    there = [o for o in scene.objects if o.cell not in keep]
    if not there or kind == "remove" and len(scene.objects) == 1 or kind == "move" and not empty:
        return None
    o = rng.choice(there)
    name = _name(rng, o, scene)
    if kind == "remove":
        return f"remove {name}", _with(scene, o, None), {o.cell}
    if kind == "move":
        cell = rng.choice(empty)
        return f"move {name} to the {PLACES[cell]}", _with(scene, o, o._replace(cell=cell)), {o.cell, cell}
    field, values = {"recolor": ("color", COLORS), "resize": ("size", SIZES), "reshape": ("shape", SHAPES)}[kind]
    value = rng.choice([v for v in values if v != getattr(o, field)])
    text = f"turn {name} into a {value}" if kind == "reshape" else f"make {name} {value}"
    return text, _with(scene, o, o._replace(**{field: value})), {o.cell}


def random_edits(rng: random.Random, scene: Scene, count: int) -> tuple[list[str], list[Scene]]:
    """`count` instructions one after another, each on something that none before has touched, and the scene after each."""
    while True:
        texts, scenes, touched = [], [scene], set()
        for kind in rng.sample(EDITS, count) if count > 1 else [rng.choice(EDITS)]:
            if (edit := random_edit(rng, scenes[-1], kind, touched)) is None:
                break
            texts.append(edit[0])
            scenes.append(edit[1])
            touched |= edit[2]
        else:
            return texts, scenes[1:]


def edit_kind(instruction: str) -> str:
    """Which of EDITS an instruction asks for; "several" for more than one."""
    if " and " in instruction:
        return "several"
    verb = instruction.split()[0]
    if verb == "make":
        last = instruction.split()[-1]
        return "background" if "the background" in instruction else "recolor" if last in COLORS else "resize"
    return "reshape" if verb == "turn" else verb


# ---------------------------------------------------------------- compositions of reference pictures

def random_composition(rng: random.Random, references: Sequence[Object]) -> tuple[str, Scene]:
    """A text that places the objects of one to three reference pictures, and the scene that it asks for.

    It tells the place of each, or for two that one is beside the other: then that of picture 2 stays where it is in its picture and
    that of picture 1 comes right next to it. Else many scenes would be right, and their average, which a model draws, none of them.
    """
    background = rng.choice(list(BACKGROUNDS))
    if len(references) == 2 and rng.random() < 0.4:
        there = references[1].cell
        beside = [c for c in range(9) if abs(c // 3 - there // 3) + abs(c % 3 - there % 3) == 1]
        objects = [references[0]._replace(cell=rng.choice(beside)), references[1]]
        relation = next(name for name, holds in RELATIONS.items() if holds(*objects))
        text = f"the object of picture 1 {relation} the object of picture 2"
    else:
        objects = [r._replace(cell=cell) for r, cell in zip(references, rng.sample(range(9), len(references)))]
        text = " and ".join(f"{'that of' if i else 'the object of picture'} {i + 1} at the {PLACES[o.cell]}"
                            for i, o in enumerate(objects))
    return f"put {text} on a {background} background", Scene(tuple(sorted(objects, key=lambda o: o.cell)), background)


def right_objects(text: str, references: Sequence[Object], found: Scene) -> int:
    """How many of the reference pictures' objects a composition has as the text asks: as they look, where they belong."""
    def looks(a: Object, b: Object) -> bool:
        return a[:3] == b[:3]

    for relation, holds in RELATIONS.items():
        if f" {relation} " in text:
            pairs = [(a, b) for a, b in itertools.permutations(found.objects, 2) if holds(a, b)]
            return max([looks(a, references[0]) + looks(b, references[1]) for a, b in pairs], default=0)
    places = re.findall(f"at the ({'|'.join(sorted(PLACES, key=len, reverse=True))})", text)
    return sum(any(looks(o, r) and PLACES[o.cell] == place for o in found.objects) for r, place in zip(references, places))


# ---------------------------------------------------------------- questions

QUESTIONS = ("count", "what", "exists", "where", "color", "background")
_ASKED = (5.5, 1, 4, 1, 3, 0.3)                     # how often in training: what is hard to answer more often


def _placed(answer: str, phrase: str, scene: Scene) -> str:
    """The answer with the places of the objects that it is about: one word alone would hardly teach where to look."""
    return answer + " and".join(f" at the {PLACES[o.cell]}" for o in scene.objects if fits(o, phrase))


def random_question(rng: random.Random, scene: Scene, kind: str) -> tuple[str, str] | None:
    """A question of one of QUESTIONS and its answer; None if it cannot be asked of the scene. Yes and no are equally frequent.

    "is there a red circle?", "yes at the top left"; "how many squares are there?", "two at the center and at the bottom left".
    """
    o = rng.choice(scene.objects)
    if kind == "count":
        some = rng.choice([o.color, o.size, rng.choice(list(COLORS)), ""])
        noun = rng.choice(["objects", f"{o.shape}s", f"{rng.choice(SHAPES)}s"])
        phrase = f"{some} {noun}".strip()
        number = ("zero", *NUMBERS[1:])[sum(fits(p, phrase) for p in scene.objects)]
        return f"how many {phrase} are there?", _placed(number, phrase, scene)
    if kind == "what":
        cell = o.cell if rng.random() < 0.8 else rng.choice([c for c in range(9) if all(p.cell != c for p in scene.objects)])
        there = [p for p in scene.objects if p.cell == cell]
        return f"what is at the {PLACES[cell]}?", f"a {there[0].size} {there[0].color} {there[0].shape}" if there else "nothing"
    if kind == "exists":
        yes = rng.random() < 0.5
        while True:
            phrase = rng.choice([f"{o.color} {o.shape}", f"{o.size} {o.color} {o.shape}"])
            if yes or not any(fits(p, phrase) for p in scene.objects):
                return f"is there {_a(phrase)}?", _placed("yes" if yes else "no", phrase, scene)
            o = o._replace(**rng.choice([{"color": rng.choice(list(COLORS))}, {"shape": rng.choice(SHAPES)}]))
    if kind == "background":
        return "what color is the background?", scene.background
    phrase = rng.choice([f"{o.color} {o.shape}", f"{o.color} object"] if kind == "where" else [o.shape, f"{o.size} {o.shape}"])
    if sum(fits(p, phrase) for p in scene.objects) > 1:
        return None
    if kind == "where":
        return f"where is the {phrase}?", f"at the {PLACES[o.cell]}"
    return f"what color is the {phrase}?", _placed(o.color, phrase, scene)


def question_kind(question: str) -> str:
    """Which of QUESTIONS a question is."""
    words = question.removesuffix("?").split()
    first = {"how": "count", "is": "exists", "where": "where"}.get(words[0])
    return first or ("what" if words[1] == "is" else "background" if words[-1] == "background" else "color")


# ---------------------------------------------------------------- files

def _turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def pair_record(image: str, scene: Scene) -> dict:
    """A text-to-image record: a caption and its picture."""
    return {"image": [image], "conversations": _turns(caption(scene), "<image>")}


class _Split:
    """One split of a world while it is written: its pictures, each under the next number, and its records."""

    def __init__(self, folder: Path, split: str, rng: random.Random):
        self.folder, self.split, self.rng, self.records, self.pictures = folder, split, rng, [], 0
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)

    def picture(self, pixels: np.ndarray) -> str:
        name = f"images/{self.split}/{self.pictures:06d}.png"
        Image.fromarray(pixels).save(self.folder / name, compress_level=1)
        self.pictures += 1
        return name

    def belongs(self, *scenes: Scene) -> bool:
        return all(held_out(scene) == (self.split == "test") for scene in scenes)

    def add(self, task: str, record: dict) -> None:
        self.records.append(json.dumps({"task": task} | record) + "\n")

    def draw(self, make: Callable[[], tuple]) -> tuple:
        """What `make` returns, repeated until its scenes belong to this split; the scenes are those in its last entry."""
        while not self.belongs(*(made := make())[-1]):
            pass
        return made

    def scene(self, make: Callable[[], Scene]) -> Scene:
        """What `make` returns, repeated until it belongs to this split."""
        return self.draw(lambda: ([make()],))[0][0]

    def write(self) -> None:
        temporary = self.folder / f".{self.split}.jsonl.tmp"    # under its name only when it is complete
        temporary.write_text("".join(self.records))
        temporary.replace(self.folder / f"{self.split}.jsonl")


def _pairs(s: _Split, n: int) -> list[tuple[str, Scene]]:
    """Full captions: 1, 2 and 3 objects equally often in the test, in the ratio 1 : 2 : 3 in training (there is more to learn)."""
    made = []
    for i in range(n):
        count = 1 + i % 3 if s.split == "test" else s.rng.choices((1, 2, 3), (1, 2, 3))[0]
        scene = s.scene(lambda: random_scene(s.rng, count))
        made.append((s.picture(render(scene)), scene))
        s.add("text_to_image", pair_record(made[-1][0], scene))
    return made


def _partial_prompts(s: _Split, n: int, pairs: list) -> None:
    """Text to image with prompts that tell a part: compositions of no reference pictures, since the caption is another text."""
    for i in range(n):
        category = CATEGORIES[i % len(CATEGORIES)]
        prompt, [scene] = s.draw(lambda: ((made := random_prompt(s.rng, category))[0], [made[1]]))
        s.add("text_to_image", {"original_images": [], "generated_images": [s.picture(render(scene))], "edit_prompt": prompt,
                                "caption": caption(scene)})


def _edits(s: _Split, n: int, pairs: list) -> None:
    """Half of them one edit, in the test of each kind equally often, the others two or three."""
    for i in range(n):
        count = (1, 2, 1, 3)[i % 4]
        kind = EDITS[i // 2 % len(EDITS)] if s.split == "test" else s.rng.choices(EDITS, _EDITED)[0]
        kinds = itertools.chain([kind] * 200, itertools.repeat("background"))

        def make() -> tuple:
            while True:
                name, source = s.rng.choice(pairs)
                if count > 1:
                    texts, scenes = random_edits(s.rng, source, count)
                    return name, " and ".join(texts), scenes[-1:]
                if edit := random_edit(s.rng, source, next(kinds)):      # in a small world, a kind may be impossible
                    return name, edit[0], [edit[1]]
        name, text, [scene] = s.draw(make)
        s.add("edits", {"image": [name, s.picture(render(scene))], "conversations": _turns(caption(scene)), "instruction": text})


def _maps(s: _Split, n: int, pairs: list, task: str) -> None:
    """Edges and depth of the pairs' pictures, and the pose of pictures of arrows."""
    for i in range(n):
        name, scene = pairs[i % len(pairs)]
        if task == "pose":
            scene = s.scene(lambda: random_scene(s.rng, 1 + i % 3, ARROWS))
            name = s.picture(render(scene))
        target = s.picture({"edges": edge_map, "depth": depth_map, "pose": pose_map}[task](scene))
        s.add(task, {"image": [name, target], "conversations": _turns(""), "instruction": f"draw the {task} of the picture"})


def _compositions(s: _Split, n: int, pairs: list) -> None:
    singles = [s.scene(lambda: random_scene(s.rng, 1)) for _ in range(1 + n // 3)]
    picture = functools.cache(lambda k: s.picture(render(singles[k])))      # only of those that some composition chooses
    for i in range(n):
        chosen = s.rng.sample(range(len(singles)), min(1 + i % 3, len(singles)))
        text, [scene] = s.draw(lambda: ((made := random_composition(s.rng, [singles[k].objects[0] for k in chosen]))[0], [made[1]]))
        s.add("personalisation", {"original_images": [picture(k) for k in chosen], "generated_images": [s.picture(render(scene))],
                                  "edit_prompt": text, "caption": caption(scene)})


def _questions(s: _Split, n: int, pairs: list) -> None:
    """In the test one question a picture, each kind equally often about one, two and three objects; in training two."""
    for i in range(n):
        name, scene = pairs[i % len(pairs)]
        asked: tuple[str, ...] = ()
        turn = (i + i // len(QUESTIONS)) % len(QUESTIONS)
        for kind in [QUESTIONS[turn]] if s.split == "test" else s.rng.choices(QUESTIONS, _ASKED, k=2):
            while (pair := random_question(s.rng, scene, kind)) is None:
                kind = s.rng.choice(QUESTIONS)
            asked += (f"<image>\n{pair[0]}" if not asked else pair[0], pair[1])
        s.add("questions", {"image": [name], "conversations": _turns(*asked)})


def random_training_picture(rng: random.Random) -> np.ndarray:
    """What an autoencoder should see: crowded pictures and the maps of the perception tasks, none of a held-out scene."""
    draw, shapes = rng.choices([(render, SHAPES), (edge_map, SHAPES), (depth_map, SHAPES), (render, ARROWS), (pose_map, ARROWS)],
                               (0.65, 0.17, 0.06, 0.06, 0.06))[0]
    while held_out(scene := random_scene(rng, rng.randint(1, 9), shapes)):
        pass
    return draw(scene)


# records of each kind for every full caption: in training, in the test
_SHARES = {_partial_prompts: (0.4, 0.6), _edits: (1.3, 0.6), functools.partial(_maps, task="edges"): (0.3, 0.6),
           functools.partial(_maps, task="depth"): (0.15, 0.6), functools.partial(_maps, task="pose"): (0.15, 0.6),
           _compositions: (0.3, 0.6), _questions: (1.0, 1.0)}


def make_world(folder: Path, train: int, test: int, seed: int = 0) -> None:
    """Write FOLDER/train.jsonl and FOLDER/test.jsonl with their pictures in FOLDER/images: `train` and `test` full captions, and
    the other tasks in proportion. Each record names its task.

    Every picture that is drawn of a test record shows a `held_out` scene, none of a training record does; the same holds for
    source pictures.
    """
    rng = random.Random(seed)
    for k, (split, number) in enumerate((("train", train), ("test", test))):
        s = _Split(folder, split, rng)
        pairs = _pairs(s, number)
        for make, shares in tqdm(_SHARES.items(), desc=f"drawing {split} pictures", unit="task", leave=False):
            make(s, round(number * shares[k] + 0.4), pairs)
        s.write()


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    make_world(Path(sys.argv[1]), train=60, test=12)
    files = sorted(Path(sys.argv[1], "images/train").glob("*.png"))
    sheet = [np.concatenate([np.asarray(Image.open(f)) for f in files[i:i + 16]], 1) for i in range(0, len(files) - 15, 16)]
    Image.fromarray(np.concatenate(sheet)).save(Path(sys.argv[1], "overview.png"))
    for task, records in itertools.groupby(Path(sys.argv[1], "train.jsonl").read_text().splitlines(), lambda line: line[:20]):
        print(next(records))
    print("wrote", Path(sys.argv[1], "overview.png"))
