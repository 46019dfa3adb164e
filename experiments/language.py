"""The words of the shapes world: captions, partial prompts, edits, compositions and questions.

All texts follow a small grammar. A full caption names everything about a scene but the
displacements of its objects:

    caption     object { " and " object } " on a " background " background"
    object      "a " size " " color " " shape " at the " place

The other texts mention only a part of a scene, or relate one scene to another:

    partial prompt      "two circles", "a red circle left of a blue square on a gray background"
    edit                "move the red circle to the top left", "make the center object large"
    composition         "put the object of picture 1 above the object of picture 2 on a ..."
    question            "how many squares are there?", with its answer "two at the center and ..."

Each kind of text has a function that draws one at random (`random_...`), and one that parses or
judges it: `parse_caption`, `satisfies`, `right_objects`. `prompt_category`, `edit_kind` and
`question_kind` sort texts for the tables of scores.
"""
import itertools
import random
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from experiments.world import (
    BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, Object, Scene, random_object, random_scene,
    raster_order,
)


def _one_of(words: Iterable[str]) -> str:
    """A regular expression group. The longest come first: "center" begins "center left", too."""
    return f"({'|'.join(sorted(words, key=len, reverse=True))})"


def _at(cell: int) -> str:
    return f"at the {PLACES[cell]}"


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _look(o: Object) -> str:
    return " ".join(o.look)


# ---------------------------------------------------------------- captions

def caption(scene: Scene) -> str:
    """Describe a scene in full, for example:

    "a large red circle at the top left and a small blue square at the center on a gray background"
    """
    objects = [f"a {_look(o)} {_at(o.cell)}" for o in scene.objects]
    return f"{' and '.join(objects)} on a {scene.background} background"


_CAPTION = re.compile(f"(.*) on a {_one_of(BACKGROUNDS)} background")
_OBJECT = re.compile(
    f"a {_one_of(SIZES)} {_one_of(COLORS)} {_one_of(SHAPES)} at the {_one_of(PLACES)}")


def parse_caption(text: str) -> Scene | None:
    """Parse a caption into its scene, the objects in any order.

    None if the text does not follow the grammar or puts two objects into one cell.
    """
    whole = _CAPTION.fullmatch(text.strip())
    if whole is None:
        return None
    names, background = whole.groups()
    objects = []
    for name in names.split(" and "):
        match = _OBJECT.fullmatch(name)
        if match is None:
            return None
        size, color, shape, place = match.groups()
        objects.append(Object(size, color, shape, PLACES.index(place)))
    if len({o.cell for o in objects}) < len(objects):
        return None
    return Scene(raster_order(objects), background)


# ---------------------------------------------------------------- partial prompts

NUMBERS = ("no", "one", "two", "three")
RELATIONS = {
    "left of": lambda a, b: a.column < b.column,
    "right of": lambda a, b: a.column > b.column,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}
CATEGORIES = (                          # the six of GenEval, and negation
    "single_object", "two_objects", "counting", "colors", "position", "color_attribution",
    "negation",
)


def fits(o: Object, phrase: str) -> bool:
    """Return whether a noun phrase is true of an object.

    "red circle", "small object", "squares": in singular or plural, with or without an article.
    """
    words = {word.removesuffix("s") for word in phrase.split()} - {"a", "an", "the", "object"}
    return words <= set(o.look)


def _fitting(scene: Scene, phrase: str) -> list[Object]:
    return [o for o in scene.objects if fits(o, phrase)]


def prompt_category(prompt: str) -> str:
    """Sort a partial prompt into one of CATEGORIES."""
    text = prompt.split(" on a ")[0]
    words = text.split()
    if " and no " in text:
        return "negation"
    if words[0] in NUMBERS:
        return "counting"
    if any(f" {relation} " in text for relation in RELATIONS):
        return "position"
    has_color = any(color in words for color in COLORS)
    if " and " in text:
        return "color_attribution" if has_color else "two_objects"
    return "colors" if has_color else "single_object"


def named_objects(scene: Scene, prompt: str) -> tuple[Object, ...]:
    """The objects that a partial prompt names, in its order; none if the scene lacks one of them.

    The prompt's background does not count.
    """
    text, _, _ = prompt.partition(" on a ")
    category = prompt_category(text)
    if category in ("counting", "negation"):                    # "two objects and no circle"
        number, _, rest = text.partition(" ")
        wanted, _, unwanted = rest.partition(" and no ")
        objects = _fitting(scene, wanted)
        has_unwanted = bool(unwanted and _fitting(scene, unwanted))
        is_true = len(objects) == NUMBERS.index(number) and not has_unwanted
        return tuple(objects) if is_true else ()
    if category in ("single_object", "colors"):
        return tuple(_fitting(scene, text)[:1])
    pairs = itertools.permutations(scene.objects, 2)            # "a red circle above a square"
    for relation, holds in RELATIONS.items():
        if f" {relation} " in text:
            first, second = text.split(f" {relation} ")
            pairs = [(a, b) for a, b in pairs if holds(a, b)]
            break
    else:
        first, second = text.split(" and ")
    return next(((a, b) for a, b in pairs if fits(a, first) and fits(b, second)), ())


def satisfies(scene: Scene, prompt: str, strict: bool = True) -> bool:
    """Return whether a scene shows the objects of a partial prompt, and its background.

    strict: no other object may be in the scene. Else as GenEval judges: others may, but not more
    objects of a kind than are to be counted.
    """
    _, _, background = prompt.removesuffix(" background").partition(" on a ")
    if background and background != scene.background:
        return False
    count = len(named_objects(scene, prompt))
    return count > 0 and (not strict or count == len(scene.objects))


def _short_name(o: Object, with_color: bool) -> str:
    return _a(f"{o.color} {o.shape}" if with_color else o.shape)


def _counting_prompt(rng: random.Random) -> tuple[str, Scene]:
    """Give two or three objects the same shape, colour or both: "three red objects"."""
    count = rng.choice((2, 3))
    scene = random_scene(rng, count)
    shape = {"shape": rng.choice(SHAPES)}
    color = {"color": rng.choice(list(COLORS))}
    both = {"shape": rng.choice(SHAPES), "color": rng.choice(list(COLORS))}
    shared = rng.choice([shape, color, both])
    objects = tuple(o._replace(**shared) for o in scene.objects)
    noun = shared.get("shape", "object") + "s"
    if "color" in shared:
        noun = f"{shared['color']} {noun}"
    return f"{NUMBERS[count]} {noun}", scene._replace(objects=objects)


def _negation_prompt(rng: random.Random) -> tuple[str, Scene]:
    """Name the number of objects, and a shape or colour that none of them has."""
    count = rng.choice((1, 2, 3))
    scene = random_scene(rng, count)
    phrases = [*SHAPES, *(f"{color} object" for color in COLORS)]
    absent = rng.choice([phrase for phrase in phrases if not _fitting(scene, phrase)])
    noun = "object" if count == 1 else "objects"
    return f"{NUMBERS[count]} {noun} and no {absent}", scene


def _two_objects_prompt(rng: random.Random, category: str) -> tuple[str, Scene]:
    """Name two objects, joined by "and" or by a relation."""
    while True:
        scene = random_scene(rng, 2)
        a, b = rng.sample(scene.objects, 2)
        joints, with_color = ["and"], category == "color_attribution"
        if category == "position":
            joints = [relation for relation, holds in RELATIONS.items() if holds(a, b)]
            with_color = rng.random() < 0.5
        first, second = _short_name(a, with_color), _short_name(b, with_color)
        if joints and first != second:
            return f"{first} {rng.choice(joints)} {second}", scene


def random_prompt(rng: random.Random, category: str) -> tuple[str, Scene]:
    """Draw a partial prompt of one of CATEGORIES, and a scene that satisfies it.

    Half of the prompts name the background.
    """
    if category == "counting":
        text, scene = _counting_prompt(rng)
    elif category == "negation":
        text, scene = _negation_prompt(rng)
    elif category in ("single_object", "colors"):
        scene = random_scene(rng, 1)
        text = _short_name(scene.objects[0], with_color=category == "colors")
    else:
        text, scene = _two_objects_prompt(rng, category)
    if rng.random() < 0.5:
        text += f" on a {scene.background} background"
    return text, scene


# ---------------------------------------------------------------- edits

# recolor       make the red circle blue
# resize        make the top left object large
# move          move the red circle to the center
# remove        remove the red circle
# add           add a small blue square at the bottom right
# reshape       turn the red circle into a square
# background    make the background gray
EDITS = ("recolor", "resize", "move", "remove", "add", "reshape", "background")


class Edit(NamedTuple):
    """An instruction, the scene after it, and the cells that it touches."""
    instruction: str
    scene: Scene
    touched: set[int]


def _exchange(scene: Scene, old: Object | None, new: Object | None) -> Scene:
    """Replace an object of a scene. Without `old`, add one; without `new`, remove one."""
    objects = [o for o in scene.objects if o != old]
    if new is not None:
        objects.append(new)
    return scene._replace(objects=raster_order(objects))


def _unique_name(rng: random.Random, o: Object, scene: Scene) -> str:
    """Name an object by its place, or by colour and shape if no other object shares them."""
    same = [p for p in scene.objects if (p.color, p.shape) == (o.color, o.shape)]
    if len(same) == 1 and rng.random() < 0.5:
        return f"the {o.color} {o.shape}"
    return f"the {PLACES[o.cell]} object"


def random_edit(
        rng: random.Random, scene: Scene, kind: str, keep: Collection[int] = ()) -> Edit | None:
    """Draw an edit of one of EDITS that leaves the cells in `keep` untouched.

    None if the scene allows no such edit. A scene keeps one to three objects.
    """
    if kind == "background":
        name = rng.choice([name for name in BACKGROUNDS if name != scene.background])
        return Edit(f"make the background {name}", scene._replace(background=name), set())

    free = [cell for cell in scene.empty_cells() if cell not in keep]
    if kind == "add":
        if len(scene.objects) == 3 or not free:
            return None
        new = random_object(rng, rng.choice(free))
        text = f"add a {_look(new)} {_at(new.cell)}"
        return Edit(text, _exchange(scene, None, new), {new.cell})

    movable = [o for o in scene.objects if o.cell not in keep]
    if not movable:
        return None
    if kind == "remove" and len(scene.objects) == 1:
        return None
    if kind == "move" and not free:
        return None
    old = rng.choice(movable)
    name = _unique_name(rng, old, scene)
    if kind == "remove":
        return Edit(f"remove {name}", _exchange(scene, old, None), {old.cell})
    if kind == "move":
        new = old._replace(cell=rng.choice(free))
        text = f"move {name} to the {PLACES[new.cell]}"
        return Edit(text, _exchange(scene, old, new), {old.cell, new.cell})

    if kind == "recolor":
        value = rng.choice([color for color in COLORS if color != old.color])
        text, new = f"make {name} {value}", old._replace(color=value)
    elif kind == "resize":
        value = rng.choice([size for size in SIZES if size != old.size])
        text, new = f"make {name} {value}", old._replace(size=value)
    else:
        value = rng.choice([shape for shape in SHAPES if shape != old.shape])
        text, new = f"turn {name} into a {value}", old._replace(shape=value)
    return Edit(text, _exchange(scene, old, new), {old.cell})


def _edits_in_turn(rng: random.Random, scene: Scene, kinds: list[str]) -> list[Edit] | None:
    """Draw an edit of each kind, one after the other. None if one of them is impossible."""
    edits, touched = [], set()
    for kind in kinds:
        edit = random_edit(rng, scene, kind, touched)
        if edit is None:
            return None
        edits.append(edit)
        scene = edit.scene
        touched |= edit.touched
    return edits


def random_edits(rng: random.Random, scene: Scene, count: int) -> tuple[list[str], list[Scene]]:
    """Draw `count` edits of different kinds, each of cells that no edit before it touches.

    Returns the instructions, and the scene after each.
    """
    while True:
        kinds = rng.sample(EDITS, count) if count > 1 else [rng.choice(EDITS)]
        edits = _edits_in_turn(rng, scene, kinds)
        if edits is not None:
            return [edit.instruction for edit in edits], [edit.scene for edit in edits]


def edit_kind(instruction: str) -> str:
    """Sort an instruction into one of EDITS, or "several" if it joins more than one."""
    if " and " in instruction:
        return "several"
    words = instruction.split()
    if words[0] == "turn":
        return "reshape"
    if words[0] != "make":
        return words[0]                         # move, remove or add
    if words[1:3] == ["the", "background"]:
        return "background"
    return "recolor" if words[-1] in COLORS else "resize"


# ---------------------------------------------------------------- compositions

def _in_relation(rng: random.Random, first: Object, second: Object) -> tuple[str, list[Object]]:
    """Keep the second object where its picture shows it, and put the first one right beside it.

    Many other scenes would also satisfy the text. Trained on all of them, a model would draw
    their average, which satisfies nothing.
    """
    beside = []
    for cell in range(9):
        moved = first._replace(cell=cell)
        if abs(moved.row - second.row) + abs(moved.column - second.column) == 1:
            beside.append(moved)
    first = rng.choice(beside)
    relation = next(name for name, holds in RELATIONS.items() if holds(first, second))
    return f"the object of picture 1 {relation} the object of picture 2", [first, second]


def _at_places(rng: random.Random, references: Sequence[Object]) -> tuple[str, list[Object]]:
    """Put each object into a random cell, and name its place."""
    cells = rng.sample(range(9), len(references))
    objects = [o._replace(cell=cell) for o, cell in zip(references, cells)]
    texts = [f"that of {number} {_at(cell)}" for number, cell in enumerate(cells, start=1)]
    texts[0] = f"the object of picture 1 {_at(cells[0])}"
    return " and ".join(texts), objects


def random_composition(rng: random.Random, references: Sequence[Object]) -> tuple[str, Scene]:
    """Draw a text that places the objects of one to three reference pictures, and its scene.

    The text names the place of each object, or the relation of two of them.
    """
    background = rng.choice(list(BACKGROUNDS))
    if len(references) == 2 and rng.random() < 0.4:
        text, objects = _in_relation(rng, *references)
    else:
        text, objects = _at_places(rng, references)
    return f"put {text} on a {background} background", Scene(raster_order(objects), background)


def _right_in_relation(holds: Callable, references: Sequence[Object], scene: Scene) -> int:
    """Count the right objects of the best pair for which the relation holds."""
    first, second = references
    counts = [0]
    for a, b in itertools.permutations(scene.objects, 2):
        if holds(a, b):
            counts.append((a.look == first.look) + (b.look == second.look))
    return max(counts)


def right_objects(text: str, references: Sequence[Object], scene: Scene) -> int:
    """Count the objects of the reference pictures that a scene shows as a composition asks.

    Such an object has the look of its reference and is where the text puts it.
    """
    for relation, holds in RELATIONS.items():
        if f" {relation} " in text:
            return _right_in_relation(holds, references, scene)
    places = re.findall(f"at the {_one_of(PLACES)}", text)
    looks = {PLACES[o.cell]: o.look for o in scene.objects}
    return sum(looks.get(place) == o.look for place, o in zip(places, references))


# ---------------------------------------------------------------- questions

def _with_places(answer: str, scene: Scene, phrase: str) -> str:
    """Append the places of the objects that fit a phrase: "two at the center and at the top left".

    The places teach the model where to look. The bare answer teaches it much less.
    """
    return answer + " and".join(f" {_at(o.cell)}" for o in _fitting(scene, phrase))


def _ask_count(rng: random.Random, scene: Scene, o: Object) -> tuple[str, str]:
    adjective = rng.choice([o.color, o.size, rng.choice(list(COLORS)), ""])
    noun = rng.choice(["objects", f"{o.shape}s", f"{rng.choice(SHAPES)}s"])
    phrase = f"{adjective} {noun}".strip()
    number = ("zero", "one", "two", "three")[len(_fitting(scene, phrase))]
    return f"how many {phrase} are there?", _with_places(number, scene, phrase)


def _ask_what(rng: random.Random, scene: Scene, o: Object) -> tuple[str, str]:
    """Ask about the object's cell, or one time in five about an empty one."""
    if rng.random() < 0.8:
        cell, answer = o.cell, f"a {_look(o)}"
    else:
        cell, answer = rng.choice(scene.empty_cells()), "nothing"
    return f"what is {_at(cell)}?", answer


def _ask_exists(rng: random.Random, scene: Scene, o: Object) -> tuple[str, str]:
    """Ask about the object, or change it until the answer is no. Yes and no are equally likely."""
    yes = rng.random() < 0.5
    while True:
        phrase = rng.choice([f"{o.color} {o.shape}", _look(o)])
        if yes or not _fitting(scene, phrase):
            answer = _with_places("yes" if yes else "no", scene, phrase)
            return f"is there {_a(phrase)}?", answer
        color = {"color": rng.choice(list(COLORS))}
        shape = {"shape": rng.choice(SHAPES)}
        o = o._replace(**rng.choice([color, shape]))


def _ask_where(rng: random.Random, scene: Scene, o: Object) -> tuple[str, str] | None:
    phrase = rng.choice([f"{o.color} {o.shape}", f"{o.color} object"])
    if len(_fitting(scene, phrase)) > 1:
        return None
    return f"where is the {phrase}?", _at(o.cell)


def _ask_color(rng: random.Random, scene: Scene, o: Object) -> tuple[str, str] | None:
    phrase = rng.choice([o.shape, f"{o.size} {o.shape}"])
    if len(_fitting(scene, phrase)) > 1:
        return None
    return f"what color is the {phrase}?", _with_places(o.color, scene, phrase)


def _ask_background(rng: random.Random, scene: Scene, o: Object) -> tuple[str, str]:
    return "what color is the background?", scene.background


_ASK = {
    "count": _ask_count, "what": _ask_what, "exists": _ask_exists,
    "where": _ask_where, "color": _ask_color, "background": _ask_background,
}
QUESTIONS = tuple(_ASK)


def random_question(rng: random.Random, scene: Scene, kind: str) -> tuple[str, str] | None:
    """Draw a question of one of QUESTIONS about a random object, and its answer.

    "is there a red circle?", "yes at the top left"
    "how many squares are there?", "two at the center and at the bottom left"

    None if the question is ambiguous: more than one object fits "the red circle".
    """
    return _ASK[kind](rng, scene, rng.choice(scene.objects))


def question_kind(question: str) -> str:
    """Sort a question into one of QUESTIONS."""
    words = question.removesuffix("?").split()
    first = {"how": "count", "is": "exists", "where": "where"}
    if words[0] in first:
        return first[words[0]]
    if words[1] == "is":
        return "what"
    return "background" if words[-1] == "background" else "color"
