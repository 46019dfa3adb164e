"""Instructions and questions of the shapes world, independently of experiments/language.py."""
import re

from experiments.world import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES

PLACE = "|".join(sorted(PLACES, key=len, reverse=True))
_SIZE, _COLOR, _SHAPE = "|".join(SIZES), "|".join(COLORS), "|".join(SHAPES)
_NAME = f"(?:the (?P<place>{PLACE}) object|the (?P<color>{_COLOR}) (?P<shape>{_SHAPE}))"
_INSTRUCTIONS = {
    "background": f"make the background (?P<new>{'|'.join(BACKGROUNDS)})",
    "recolor": f"make {_NAME} (?P<new>{_COLOR})",
    "resize": f"make {_NAME} (?P<new>{_SIZE})",
    "reshape": f"turn {_NAME} into a (?P<new>{_SHAPE})",
    "move": f"move {_NAME} to the (?P<new>{PLACE})",
    "remove": f"remove {_NAME}",
    "add": f"add a (?P<size>{_SIZE}) (?P<color>{_COLOR}) (?P<shape>{_SHAPE}) "
           f"at the (?P<new>{PLACE})",
}


def follow(instruction, scene):
    """Follow an instruction: its kind, {cell: (size, colour, shape)} and the background after it.

    Fails unless the instruction names one object and changes something.
    """
    matches = {kind: re.fullmatch(pattern, instruction) for kind, pattern in _INSTRUCTIONS.items()}
    (kind, words), = [(kind, match.groupdict()) for kind, match in matches.items() if match]
    new = words.get("new")
    looks, background = {o.cell: o[:3] for o in scene.objects}, scene.background
    if kind == "background":
        assert new != background
        return kind, looks, new
    if kind == "add":
        cell = PLACES.index(new)
        assert cell not in looks
        return kind, looks | {cell: (words["size"], words["color"], words["shape"])}, background

    if words["place"]:
        named = [cell for cell in looks if PLACES[cell] == words["place"]]
    else:
        named = [cell for cell, o in looks.items() if o[1:] == (words["color"], words["shape"])]
    assert len(named) == 1, instruction                 # the name fits no other object
    cell, = named
    before = (size, color, shape) = looks.pop(cell)
    if kind == "remove":
        return kind, looks, background
    if kind == "move":
        assert PLACES.index(new) not in looks and PLACES.index(new) != cell
        return kind, looks | {PLACES.index(new): before}, background
    after = {
        "resize": (new, color, shape), "recolor": (size, new, shape), "reshape": (size, color, new),
    }[kind]
    assert after != before
    return kind, looks | {cell: after}, background


def answer(question, scene):
    """Answer a question about a scene."""
    def matching(words):
        return [o for o in scene.objects if set(words) - {"object"} <= set(o[:3])]

    def with_places(word, objects):
        return word + " and".join(f" at the {PLACES[o.cell]}" for o in objects)

    if m := re.fullmatch(r"how many (.*)s are there\?", question):
        objects = matching(m[1].split())
        return with_places(("zero", "one", "two", "three")[len(objects)], objects)
    if m := re.fullmatch(r"what is at the (.*)\?", question):
        for o in scene.objects:
            if o.cell == PLACES.index(m[1]):
                return f"a {o.size} {o.color} {o.shape}"
        return "nothing"
    if m := re.fullmatch(r"is there an? (.*)\?", question):
        objects = matching(m[1].split())
        return with_places("yes" if objects else "no", objects)
    if question == "what color is the background?":
        return scene.background
    words = question.removesuffix("?").split()
    o, = matching(words[words.index("the") + 1:])       # there is just one
    if words[:2] == ["where", "is"]:
        return f"at the {PLACES[o.cell]}"
    assert words[:2] == ["what", "color"]
    return with_places(o.color, [o])
