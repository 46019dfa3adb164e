"""shapes.py: pictures, maps and texts are read back exactly, every instruction does what it says, the test set is kept apart."""
import collections
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import shapes
from data import read_jsonl
from shapes import ARROWS, BACKGROUNDS, CATEGORIES, COLORS, EDITS, PLACES, QUESTIONS, RADII, SHAPES, SIZES, Object, Scene, caption, depth_map, \
    edge_map, edit_kind, held_out, keypoints, make_world, parse_caption, pose_map, prompt_category, question_kind, random_composition, \
    random_edit, random_edits, random_prompt, random_question, random_scene, random_training_picture, read_picture, read_pose, render, \
    right_objects, satisfies


def scenes(number, seed=0):
    rng = random.Random(seed)
    return [random_scene(rng, 1 + i % 3) for i in range(number)]


# ---------------------------------------------------------------- pictures

def test_five_hundred_pictures_are_read_back_exactly():
    drawn = scenes(500)
    assert {s.background for s in drawn} == set(BACKGROUNDS) and {len(s.objects) for s in drawn} == {1, 2, 3}
    assert {o.shift for s in drawn for o in s.objects} == {(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)}
    for scene in drawn:
        found, error = read_picture(render(scene))
        assert found == scene and error == 0


def test_every_object_is_told_from_every_other():
    for i, (size, color, shape) in enumerate((s, c, f) for s in SIZES for c in COLORS for f in SHAPES):
        for background in BACKGROUNDS:
            scene = Scene((Object(size, color, shape, i % 9, (i % 3 - 1, i // 3 % 3 - 1)),), background)
            assert read_picture(render(scene))[0] == scene


def test_empty_and_full_scenes():
    for background in BACKGROUNDS:
        assert read_picture(render(Scene((), background))) == (Scene((), background), 0.0)
    full = random_scene(random.Random(0), 9)
    assert [o.cell for o in full.objects] == list(range(9)) and read_picture(render(full))[0] == full


def test_noise_of_a_few_grey_levels():
    generator = np.random.default_rng(0)
    for scene in scenes(100, seed=1):
        noisy = np.clip(render(scene) + generator.normal(0, 6, (64, 64, 3)), 0, 255).round().astype(np.uint8)
        found, error = read_picture(noisy)
        assert found == scene and 3 < error < 7                                               # the mean of |noise| is 0.8 x 6


def test_error_is_that_of_the_objects_cells():
    scene = Scene((Object("large", "red", "circle", 4),), "gray")
    picture = render(scene)
    picture[:20, :20] += 5                                                                    # an empty cell: does not count
    picture[22:42, 22:42] += 10                                                               # the object's cell
    found, error = read_picture(picture)
    assert found == scene and error == 10


def test_pictures_of_another_size():
    with pytest.raises(ValueError, match="64"):
        read_picture(np.zeros((64, 32, 3), np.uint8))


def test_render_draws_what_the_scene_says():
    picture = render(Scene((Object("small", "blue", "square", 2), Object("large", "yellow", "circle", 6)), "black"))
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert tuple(picture[12, 52]) == COLORS["blue"] and tuple(picture[52, 12]) == COLORS["yellow"]    # centres of top right, bottom left
    assert tuple(picture[32, 32]) == tuple(picture[0, 0]) == BACKGROUNDS["black"]
    assert (picture[52, :, 0] > 127).sum() == 18 and (picture[12, :, 2] > 118).sum() == 14    # as wide as they are, less outlines


def test_shift_moves_right_and_down():
    still, moved = (render(Scene((Object("small", "red", "triangle", 4, shift),), "white")).astype(int) for shift in ((0, 0), (1, -1)))
    assert np.array_equal(moved[22:41, 23:42], still[23:42, 22:41])


def test_content_ignores_displacements_only():
    scene = Scene((Object("small", "red", "circle", 1, (1, 0)), Object("large", "red", "circle", 5)), "gray")
    moved = Scene((scene.objects[0]._replace(shift=(0, -1)), scene.objects[1]), "gray")
    assert moved.content() == scene.content() == Scene(scene.objects[::-1], "gray").content()
    first = scene.objects[0]
    others = [scene._replace(background="black"), scene._replace(objects=(first,))]
    others += [scene._replace(objects=(first._replace(**change), scene.objects[1]))
               for change in ({"size": "large"}, {"color": "blue"}, {"shape": "square"}, {"cell": 2})]
    assert all(other.content() != scene.content() for other in others)


# ---------------------------------------------------------------- maps

def test_poses_are_read_back_exactly():
    rng = random.Random(10)
    drawn = [random_scene(rng, 1 + i % 3, ARROWS) for i in range(200)] + [random_scene(rng, 9, ARROWS)]
    assert {o.shape for s in drawn for o in s.objects} == set(ARROWS)
    for scene in drawn:
        expected = [o._replace(color="red") for o in scene.objects]                           # a pose map does not tell the colour
        assert read_pose(pose_map(scene)) == expected
    assert read_pose(pose_map(Scene((), "gray"))) == []


@pytest.mark.parametrize("arrow, way", list(zip(ARROWS, ((0, -1), (1, 0), (0, 1), (-1, 0)))))
def test_arrows_point_where_their_name_says(arrow, way):
    """The wide half of the picture and the green end of the pose map are on the side that the name tells."""
    for size, shift in itertools.product(SIZES, ((0, 0), (1, -1), (-1, 0))):
        o = Object(size, "yellow", arrow, 4, shift)
        tail, tip = keypoints(o)
        assert np.array_equal(np.sign(tip - tail), way) and np.allclose((tip + tail) / 2, 9.5 + np.array(shift))
        y, x = np.mgrid[:20, :20] - 9.5
        ahead = (x - shift[0]) * way[0] + (y - shift[1]) * way[1]                             # (20, 20) pixels before the middle
        covered = shapes.coverage(arrow, size, shift)
        widths = {side: covered[ahead == side].sum() for side in (-4.5, -1.5, 1.5, 4.5)}      # across, at these distances
        assert widths[1.5] > 1.5 * widths[-1.5] and widths[1.5] > 1.5 * widths[4.5] > 0
        assert np.isclose(widths[-1.5], widths[-4.5], atol=0.01)
        cell = pose_map(Scene((o,), "black"))[22:42, 22:42].astype(int)                       # (20, 20, 3)
        (tail_x, tail_y), (tip_x, tip_y) = tail.round().astype(int), tip.round().astype(int)
        assert tuple(cell[tip_y, tip_x]) == (60, 255, 60) and tuple(cell[tail_y, tail_x]) == (60, 110, 255)
        picture = render(Scene((o,), "black"))[22:42, 22:42]
        assert tuple(picture[tip_y, tip_x]) == tuple(picture[tail_y, tail_x]) == COLORS["yellow"]


def test_arrows_are_turns_of_one_another():
    for size in SIZES:
        up, right, down, left = (shapes.coverage(arrow, size, (0, 0)) for arrow in ARROWS)
        for turns, other in ((1, right), (2, down), (3, left)):
            assert np.allclose(np.rot90(up, -turns), other, atol=1e-5) and not np.allclose(up, other, atol=0.5)


def test_depth_of_a_known_scene():
    scene = Scene((Object("small", "blue", "square", 2), Object("large", "yellow", "circle", 6)), "white")
    depth = depth_map(scene)
    assert depth.shape == (64, 64, 3) and depth.dtype == np.uint8 and (depth == depth[..., :1]).all()
    assert depth[12, 52, 0] == 128 and depth[52, 12, 0] == 255 and depth[32, 32, 0] == depth[0, 0, 0] == 0
    inside = np.abs(render(scene).astype(int) - BACKGROUNDS["white"]).sum(2) > 0
    assert np.array_equal(depth[..., 0] > 0, inside)                                          # nearness exactly where an object is drawn
    repainted = Scene(tuple(o._replace(color="red") for o in scene.objects), "black")
    assert np.array_equal(depth_map(repainted), depth)                                        # colours do not enter


def test_edges_of_a_known_scene():
    scene = Scene((Object("small", "blue", "square", 2), Object("large", "yellow", "circle", 6)), "white")
    edges = edge_map(scene)
    assert edges.shape == (64, 64, 3) and edges.dtype == np.uint8 and (edges == edges[..., :1]).all()
    for x, y in ((52, 12), (12, 52), (32, 32), (0, 0)):
        assert edges[y, x, 0] == 0                                                            # neither inside nor far outside
    on = edges[..., 0] > 127
    assert not on[(render(scene) == BACKGROUNDS["white"]).all(2)].any()                       # an outline is within its object
    for y, x, r in ((11.5, 51.5, 6.0), (51.5, 11.5, 9.0)):                                    # half the square's side, the circle's radius
        for line, middle in ((on[round(y)], x), (on[:, round(x)], y)):
            places = np.flatnonzero(line)
            near = places[abs(places - middle) < 10.5]
            assert (near < middle).sum() == (near > middle).sum() == 3                        # two strokes, three pixels wide
            assert (r - 3 <= abs(near - middle)).all() and (abs(near - middle) <= r + 0.5).all()
    repainted = Scene(tuple(o._replace(color="red") for o in scene.objects), "black")
    assert np.array_equal(edge_map(repainted), edges)


def test_edges_tell_shape_size_and_place():
    drawn = {}
    for size, shape, cell in itertools.product(SIZES, SHAPES, (0, 4)):
        drawn[edge_map(Scene((Object(size, "red", shape, cell),), "gray")).tobytes()] = size, shape, cell
    assert len(drawn) == 12


def test_pose_of_another_size():
    with pytest.raises(ValueError, match="64"):
        read_pose(np.zeros((32, 64, 3), np.uint8))


# ---------------------------------------------------------------- captions

def test_captions_are_parsed_back():
    texts = set()
    for scene in scenes(1000, seed=2):
        found = parse_caption(caption(scene))
        assert found.content() == scene.content() and [o.cell for o in found.objects] == [o.cell for o in scene.objects]
        texts.add(caption(scene))
    assert len(texts) > 950


def test_caption_of_an_example():
    scene = Scene((Object("large", "red", "circle", 0, (1, 1)), Object("small", "blue", "square", 4)), "gray")
    text = "a large red circle at the top left and a small blue square at the center on a gray background"
    assert caption(scene) == text and parse_caption(f" {text}\n").content() == scene.content()
    turned = "a small blue square at the center and a large red circle at the top left on a gray background"
    assert parse_caption(turned) == parse_caption(text)                                       # in whichever order it is told


@pytest.mark.parametrize("text", [
    "", "on a gray background", " on a gray background", "a large red circle at the top left",
    "a large red circle on a gray background",
    "a large red circle at the top left on a pink background",
    "a red circle at the top left on a gray background",
    "a large pink circle at the top left on a gray background",
    "a large red star at the top left on a gray background",
    "a large red circle at the left top on a gray background",
    "a large red circle at the top left and on a gray background",
    "a large red circle at the top left, a small red circle at the center on a gray background",
    "a large red circle at the top left on a gray background.",
    "a large red circle at the top left on a gray background on a gray background",
    "A large red circle at the top left on a gray background",
    "a large  red circle at the top left on a gray background",
    "the large red circle at the top left on a gray background",
    "a large red circle at the center and a small blue square at the center on a gray background",
    "a large red circle at the center and a large red circle at the center on a gray background",
])
def test_ungrammatical_captions(text):
    assert parse_caption(text) is None


def test_every_place_has_its_name():
    rows, columns = ("top", "center", "bottom"), ("left", "center", "right")
    for cell, place in enumerate(PLACES):
        expected = f"{rows[cell // 3]} {columns[cell % 3]}"
        assert place == ("center" if cell == 4 else expected)


# ---------------------------------------------------------------- the test set

def test_held_out_is_a_tenth_of_the_sets_of_objects():
    for count in (1, 2, 3):
        rng = random.Random(count)
        drawn = [random_scene(rng, count) for _ in range(4000)]
        assert 0.07 < np.mean([held_out(s) for s in drawn]) < 0.13


def test_held_out_depends_on_the_objects_alone():
    for scene in scenes(200, seed=3):
        moved = tuple(o._replace(shift=(0, 0)) for o in reversed(scene.objects))
        assert {held_out(Scene(objects, background)) for objects in (scene.objects, moved) for background in BACKGROUNDS} == {held_out(scene)}
    one = [Scene((Object(size, color, shape, cell),), "gray") for size in SIZES for color in COLORS for shape in SHAPES for cell in range(9)]
    assert 0.05 < np.mean([held_out(s) for s in one]) < 0.15


# ---------------------------------------------------------------- prompts that tell only a part

def objects_of(*texts):
    """"large red circle 0" -> an object of that size, colour and shape in that cell."""
    return tuple(Object(*words[:3], int(words[3])) for words in (text.split() for text in texts))


@pytest.mark.parametrize("category", CATEGORIES)
def test_prompts_are_true_of_their_scenes(category):
    rng, prompts, backgrounds = random.Random(20), set(), 0
    for _ in range(300):
        prompt, scene = random_prompt(rng, category)
        assert prompt_category(prompt) == category and satisfies(scene, prompt), prompt
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", prompt)
        assert len({o.cell for o in scene.objects}) == len(scene.objects) in (1, 2, 3)
        assert scene.objects == tuple(sorted(scene.objects, key=lambda o: o.cell))
        told = prompt.endswith(" background")
        assert not told or prompt.endswith(f" on a {scene.background} background")
        assert satisfies(scene._replace(background="white" if scene.background != "white" else "black"), prompt) != told
        prompts.add(prompt)
        backgrounds += told
    assert len(prompts) > 5 and 110 < backgrounds < 190


@pytest.mark.parametrize("category", CATEGORIES)
def test_prompts_are_false_with_an_object_more_or_less(category):
    rng = random.Random(21)
    for _ in range(100):
        prompt, scene = random_prompt(rng, category)
        more = next(cell for cell in range(9) if all(o.cell != cell for o in scene.objects))
        assert not satisfies(scene._replace(objects=scene.objects + (scene.objects[0]._replace(cell=more),)), prompt), prompt
        assert not satisfies(scene._replace(objects=scene.objects[1:]), prompt), prompt


@pytest.mark.parametrize("prompt, true, false", [
    ("a circle", ["small red circle 3"], ["small red square 3", "small red circle 3, large red circle 4", ""]),
    ("a red circle", ["large red circle 8"], ["large blue circle 8", "large red square 8"]),
    ("an orange circle", ["large orange circle 8"], ["large blue circle 8", "large orange square 8"]),
    ("an orange circle above an orange square", ["small orange circle 2, small orange square 3"],
     ["small orange square 2, small orange circle 3", "small orange circle 2, small red square 3"]),
    ("a circle and a square", ["small red circle 1, small red square 0", "small red square 0, small red circle 1"],
     ["small red circle 0, small red circle 1", "small red square 0, small red square 1", "small red square 0",
      "small red circle 0, small red square 1, small red triangle 2", "small red circle 0, small red triangle 1"]),
    ("a red circle and a blue square", ["small red circle 1, small blue square 0"],
     ["small blue circle 1, small red square 0", "small red square 1, small blue circle 0", "small red circle 1, small red square 0"]),
    ("a circle left of a square", ["small red circle 0, small red square 4", "small red circle 6, small red square 1"],
     ["small red square 0, small red circle 4", "small red circle 1, small red square 4", "small red circle 0, small red triangle 4"]),
    ("a circle right of a square", ["small red square 0, small red circle 4"], ["small red circle 0, small red square 4",
                                                                               "small red square 1, small red circle 4"]),
    ("a circle above a square", ["small red circle 2, small red square 3"], ["small red circle 3, small red square 5",
                                                                             "small red square 2, small red circle 3"]),
    ("a red circle below a blue circle", ["small blue circle 0, small red circle 3"],
     ["small red circle 0, small blue circle 3", "small blue circle 0, small red circle 1", "small green circle 0, small red circle 3"]),
    ("two circles", ["small red circle 0, large blue circle 1"], ["small red circle 0", "small red circle 0, small red square 1",
                                                                   "small red circle 0, small red circle 1, small red circle 2"]),
    ("three red objects", ["small red circle 0, small red square 1, large red circle 2"],
     ["small red circle 0, small red square 1, large blue circle 2", "small red circle 0, small red square 1"]),
    ("two green triangles", ["small green triangle 0, large green triangle 1"], ["small green triangle 0, large red triangle 1",
                                                                                "small green triangle 0, large green circle 1"]),
    ("one object and no circle", ["small red square 0"], ["small red circle 0", "small red square 0, small red square 1"]),
    ("two objects and no red object", ["small blue circle 0, small green circle 1"],
     ["small blue circle 0, small red circle 1", "small blue circle 0", "small blue circle 0, small blue circle 1, small blue circle 2"]),
])
def test_satisfies_tells_near_misses(prompt, true, false):
    for background in ("", " on a gray background"):
        for texts, expected in [(t, True) for t in true] + [(t, False) for t in false]:
            scene = Scene(objects_of(*filter(None, texts.split(", "))), "gray")
            assert satisfies(scene, prompt + background) == expected, texts
            assert satisfies(scene, f"{prompt} on a black background") is False


# ---------------------------------------------------------------- edits

PLACE = "|".join(sorted(PLACES, key=len, reverse=True))
OBJECT_NAME = f"(?:the (?P<place>{PLACE}) object|the (?P<color>{'|'.join(COLORS)}) (?P<shape>{'|'.join(SHAPES)}))"
INSTRUCTIONS = {
    "background": f"make the background (?P<new>{'|'.join(BACKGROUNDS)})", "recolor": f"make {OBJECT_NAME} (?P<new>{'|'.join(COLORS)})",
    "resize": f"make {OBJECT_NAME} (?P<new>{'|'.join(SIZES)})", "reshape": f"turn {OBJECT_NAME} into a (?P<new>{'|'.join(SHAPES)})",
    "move": f"move {OBJECT_NAME} to the (?P<new>{PLACE})", "remove": f"remove {OBJECT_NAME}",
    "add": f"add a (?P<size>{'|'.join(SIZES)}) (?P<color>{'|'.join(COLORS)}) (?P<shape>{'|'.join(SHAPES)}) at the (?P<new>{PLACE})"}


def follow(instruction, scene):
    """What an instruction asks for, independently of how it was made: its kind, {cell: (size, colour, shape)} and the background."""
    (kind, told), = [(kind, m.groupdict()) for kind, pattern in INSTRUCTIONS.items() if (m := re.fullmatch(pattern, instruction))]
    looks, background = {o.cell: o[:3] for o in scene.objects}, scene.background
    if kind == "background":
        assert told["new"] != background
        return kind, looks, told["new"]
    if kind == "add":
        assert PLACES.index(told["new"]) not in looks
        return kind, looks | {PLACES.index(told["new"]): (told["size"], told["color"], told["shape"])}, background
    named = [c for c, o in looks.items() if (PLACES[c] == told["place"] if told["place"] else o[1:] == (told["color"], told["shape"]))]
    assert len(named) == 1, instruction                                                       # the name tells it from all others
    size, color, shape = looks.pop(cell := named[0])
    before = size, color, shape, cell
    if kind == "move":
        cell = PLACES.index(told["new"])
        assert cell not in looks
    size, color, shape = {"resize": (told.get("new"), color, shape), "recolor": (size, told.get("new"), shape),
                          "reshape": (size, color, told.get("new"))}.get(kind, (size, color, shape))
    assert kind == "remove" or (size, color, shape, cell) != before                           # it changes something
    return kind, looks | ({cell: (size, color, shape)} if kind != "remove" else {}), background


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_does_what_its_instruction_says(kind):
    rng, done, by_look = random.Random(30), 0, 0
    for i in range(400):
        scene = random_scene(rng, 1 + i % 3)
        edit = random_edit(rng, scene, kind)
        if edit is None:
            assert (kind, len(scene.objects)) in (("remove", 1), ("add", 3))
            continue
        text, after, touched = edit
        assert edit_kind(text) == kind and 1 <= len(after.objects) <= 3
        assert follow(text, scene) == (kind, {o.cell: o[:3] for o in after.objects}, after.background), text
        assert list(after.objects) == sorted(after.objects, key=lambda o: o.cell)
        changed = set(scene.objects) ^ set(after.objects)                                     # what stays keeps its displacement, too
        assert {o.cell for o in changed} == touched and len(changed) == {"background": 0, "add": 1, "remove": 1}.get(kind, 2)
        if kind not in ("background", "add", "remove"):
            assert len({o.shift for o in changed}) == 1
        done, by_look = done + 1, by_look + (" object" not in text)
    assert done > 200
    assert by_look == done if kind in ("background", "add") else 0.2 < by_look / done < 0.6   # objects are named in both ways


@pytest.mark.parametrize("kind", EDITS)
def test_cells_that_must_not_be_touched(kind):
    rng, found = random.Random(31), 0
    for i in range(200):
        scene, keep = random_scene(rng, 1 + i % 3), set(rng.sample(range(9), rng.randint(1, 8)))
        if edit := random_edit(rng, scene, kind, keep):
            assert not edit[2] & keep
            found += 1
    assert found > 20
    assert kind == "background" or random_edit(rng, random_scene(rng, 2), kind, range(9)) is None


@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_edits_touch_different_things(count):
    rng, seen = random.Random(32), collections.Counter()
    for i in range(300):
        scene = random_scene(rng, 1 + i % 3)
        texts, after = random_edits(rng, scene, count)
        assert len(texts) == len(after) == count and edit_kind(" and ".join(texts)) == ("several" if count > 1 else edit_kind(texts[0]))
        steps, touched = [scene, *after], []
        for text, one, two in zip(texts, steps, steps[1:]):
            assert follow(text, one)[1:] == ({o.cell: o[:3] for o in two.objects}, two.background) and 1 <= len(two.objects) <= 3
            touched += {o.cell for o in set(one.objects) ^ set(two.objects)}
        kinds = [edit_kind(text) for text in texts]
        assert len(set(touched)) == len(touched) and len(set(kinds)) == count                 # never a cell or a kind twice
        seen.update(kinds)
    assert set(seen) == set(EDITS)


# ---------------------------------------------------------------- compositions

def test_compositions_have_their_references_where_the_text_says():
    rng, relations = random.Random(40), collections.Counter()
    for i in range(600):
        references = [random_scene(rng, 1).objects[0] for _ in range(1 + i % 3)]
        text, scene = random_composition(rng, references)
        assert sorted(o[:3] for o in scene.objects) == sorted(r[:3] for r in references)
        assert right_objects(text, references, scene) == 1 + i % 3
        assert len({o.cell for o in scene.objects}) == 1 + i % 3 and text.endswith(f" on a {scene.background} background")
        joint = re.fullmatch("put the object of picture 1 (.+) the object of picture 2 on a .*", text)
        relations[joint[1] if joint else len(references)] += 1
        if joint:
            one, two = ([o for o in scene.objects if o[:3] == r[:3]] for r in references)
            assert references[1] in two                                     # it stays, and the other comes right next to it
            assert any(abs(a.cell // 3 - references[1].cell // 3) + abs(a.cell % 3 - references[1].cell % 3) == 1 for a in one)
        else:
            looks = {PLACES[o.cell]: o[:3] for o in scene.objects}
            places = re.findall(f"at the ({PLACE})", text)
            assert [looks[place] for place in places] == [r[:3] for r in references]
            assert re.findall("[123]", text) == ["1", "2", "3"][:len(references)]
    assert set(relations) == {1, 2, 3, "left of", "right of", "above", "below"} and relations[2] > 60


RED, BLUE, GREEN = objects_of("large red circle 0", "small blue square 0", "small green circle 0")


def put(**cells):
    """A scene with these of RED, BLUE, GREEN and others in these cells."""
    named = {"red": RED, "blue": BLUE, "green": GREEN, "other": objects_of("small purple triangle 0")[0]}
    return Scene(tuple(sorted((named[name]._replace(cell=cell) for name, cell in cells.items()), key=lambda o: o.cell)), "gray")


@pytest.mark.parametrize("found, number", [
    (put(red=0, blue=4, green=5), 3), (put(red=0, blue=4), 2), (put(red=0, blue=4, green=8), 2), (put(blue=0, red=4, green=5), 1),
    (put(red=1, blue=3, green=4), 0), (put(red=0, blue=4, green=5, other=8), 3), (put(red=0), 1), (put(other=0), 0), (Scene((), "gray"), 0)])
def test_objects_at_their_places_are_counted(found, number):
    text = "put the object of picture 1 at the top left and that of 2 at the center and that of 3 at the center right on a gray background"
    assert right_objects(text, [RED, BLUE, GREEN], found) == number
    moved = found._replace(objects=tuple(o._replace(shift=(1, -1)) for o in found.objects), background="black")
    assert right_objects(text, [RED, BLUE, GREEN], moved) == number                           # neither displacement nor background counts


@pytest.mark.parametrize("change", [{"size": "small"}, {"color": "orange"}, {"shape": "square"}])
def test_an_object_counts_only_if_all_of_it_is_right(change):
    text = "put the object of picture 1 at the top left and that of 2 at the center on a gray background"
    wrong = Scene((RED._replace(**change), BLUE._replace(cell=4)), "gray")
    assert right_objects(text, [RED, BLUE], wrong) == 1
    assert right_objects("put the object of picture 1 above the object of picture 2 on a gray background", [RED, BLUE], wrong) == 1


@pytest.mark.parametrize("relation, found, number", [
    ("left of", put(red=0, blue=4), 2), ("left of", put(red=6, blue=1), 2), ("left of", put(blue=0, red=4), 0),
    ("left of", put(red=1, blue=4), 0),                                                       # in one column
    ("left of", put(red=0, other=4), 1), ("left of", put(other=0, blue=4), 1), ("left of", put(blue=0, other=4), 0),
    ("left of", put(red=0), 0),
    ("left of", put(red=0, blue=4, other=8), 2), ("right of", put(blue=0, red=4), 2), ("right of", put(red=0, blue=4), 0),
    ("above", put(red=2, blue=3), 2), ("above", put(red=0, blue=2), 0), ("below", put(blue=2, red=3), 2), ("below", put(red=2, blue=3), 0)])
def test_objects_in_a_relation_are_counted(relation, found, number):
    text = f"put the object of picture 1 {relation} the object of picture 2 on a gray background"
    assert right_objects(text, [RED, BLUE], found) == number


# ---------------------------------------------------------------- questions

def answer(question, scene):
    """The answer by brute force over the scene, independently of how the question was made."""
    def matching(words):
        return [o for o in scene.objects if all(word in o[:3] for word in words if word != "object")]

    def told(word, found):
        return word + " and".join(f" at the {PLACES[o.cell]}" for o in found)

    words = question.removesuffix("?").split()
    if m := re.fullmatch(r"how many (.*)s are there\?", question):
        found = matching(m[1].split())
        return told(("zero", "one", "two", "three")[len(found)], found)
    if m := re.fullmatch(r"what is at the (.*)\?", question):
        there = [f"a {o.size} {o.color} {o.shape}" for o in scene.objects if o.cell == PLACES.index(m[1])]
        return there[0] if there else "nothing"
    if m := re.fullmatch(r"is there an? (.*)\?", question):
        found = matching(m[1].split())
        return told("yes" if found else "no", found)
    if question == "what color is the background?":
        return scene.background
    found, = matching(words[words.index("the") + 1:])                                         # there is just one
    return {"where is": f"at the {PLACES[found.cell]}", "what color": told(found.color, [found])}[" ".join(words[:2])]


def test_answers_tell_where_what_they_are_about_is():
    scene = Scene((Object("small", "red", "circle", 1), Object("large", "blue", "square", 3), Object("large", "red", "circle", 8)), "gray")
    asked = {random_question(random.Random(i), scene, kind) for i in range(500) for kind in ("count", "exists", "where", "color")} - {None}
    assert asked >= {("how many red objects are there?", "two at the top center and at the bottom right"),
                     ("how many triangles are there?", "zero"), ("is there a red circle?", "yes at the top center and at the bottom right"),
                     ("is there a large red circle?", "yes at the bottom right"), ("is there a blue circle?", "no"),
                     ("where is the blue object?", "at the center left"), ("what color is the square?", "blue at the center left")}
    assert not any(question.startswith("where is the red") for question, _ in asked)          # which of them?


@pytest.mark.parametrize("kind", QUESTIONS)
def test_answers_are_right_and_spread(kind):
    rng, answers, asked, refused = random.Random(50), collections.Counter(), set(), 0
    for i in range(1200):
        scene = random_scene(rng, 1 + i % 3)
        if (pair := random_question(rng, scene, kind)) is None:
            assert kind in ("where", "color") and len(scene.objects) > 1
            refused += 1
            continue
        question, told = pair
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", question)
        assert question_kind(question) == kind and answer(question, scene) == told, (question, scene)
        answers[told if kind == "where" else told.split(" at the ")[0]] += 1
        asked.add(question)
    share = {a: n / sum(answers.values()) for a, n in answers.items()}
    assert refused < 400
    if kind == "exists":
        assert set(share) == {"yes", "no"} and 0.45 < share["yes"] < 0.55 and len(asked) > 50
    elif kind == "count":
        assert set(share) == {"zero", "one", "two", "three"} and max(share.values()) < 0.6 and min(share.values()) > 0.02
    elif kind == "what":
        assert len(share) == 1 + 36 and 0.1 < share.pop("nothing") < 0.3 and max(share.values()) < 0.06 and len(asked) == 9
    else:
        values = {"where": {f"at the {place}" for place in PLACES}, "color": set(COLORS), "background": set(BACKGROUNDS)}[kind]
        assert set(share) == values and max(share.values()) < 1.5 / len(values)


def test_yes_and_no_cannot_be_told_from_the_question():
    """Neither from how many words it has."""
    rng, found = random.Random(51), collections.defaultdict(list)
    for i in range(3000):
        question, told = random_question(rng, random_scene(rng, 1 + i % 3), "exists")
        found[len(question.split())].append(told.startswith("yes"))
    assert len(found) == 2 and all(0.44 < np.mean(told) < 0.56 for told in found.values())


# ---------------------------------------------------------------- files

TRAIN, TEST = 240, 30


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, train=TRAIN, test=TEST, seed=5)
    return folder


@pytest.fixture(scope="module")
def examples(world):
    return {split: read_jsonl(world / f"{split}.jsonl") for split in ("train", "test")}


def records(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def pixels(path):
    return np.asarray(Image.open(path))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_pair(example):
    return example.task == "text_to_image" and example.prompt == example.caption


def test_numbers_of_records(world):
    """As the shares say; partial prompts count as text to image, a training record has two questions."""
    expected = {"train": {"text_to_image": 240 + 96, "edits": 312, "edges": 72, "depth": 36, "pose": 36,
                          "personalisation": 72, "questions": 240},
                "test": {"text_to_image": 30 + 18, "edits": 18, "edges": 18, "depth": 18, "pose": 18,
                         "personalisation": 18, "questions": 30}}
    for split in expected:
        found = records(world, split)
        assert collections.Counter(r["task"] for r in found) == expected[split]
        turns = {len(r["conversations"]) for r in found if r["task"] == "questions"}
        assert turns == ({4} if split == "train" else {2})


def test_what_the_records_of_a_task_have(examples):
    for split, found in examples.items():
        sources = collections.defaultdict(set)
        for e in found:
            sources[e.task].add(len(e.sources))
            assert (e.prompt is None) == bool(e.question) == (e.task == "questions")
            assert (e.caption == "") == (e.task in ("edges", "depth", "pose"))
        assert sources == {"text_to_image": {0}, "questions": {0}, "edits": {1}, "edges": {1}, "depth": {1}, "pose": {1},
                           "personalisation": {1, 2, 3}}
        pictures = {path for e in found for path in (e.image, *e.sources)}
        assert all(path.is_file() and pixels(path).shape == (64, 64, 3) for path in pictures)
        assert pictures == set(next(iter(pictures)).parent.glob("*"))                         # and no picture is left over


def test_full_captions(examples):
    sets = {}
    for split, number in (("train", TRAIN), ("test", TEST)):
        told = [parse_caption(e.caption) for e in examples[split] if is_pair(e)]
        assert len(told) == number
        sets[split] = {s.content()[0] for s in told}
        counts = [sum(len(s.objects) == n for s in told) for n in (1, 2, 3)]
        assert counts == [10, 10, 10] if split == "test" else counts[0] < counts[1] < counts[2]
    assert not sets["train"] & sets["test"]


def test_captions_tell_their_pictures(examples):
    for e in (e for split in examples.values() for e in split if e.caption and e.task != "questions"):
        scene, error = read_picture(pixels(e.image))
        assert error == 0 and e.caption == caption(scene)


def test_partial_prompts_are_true_of_their_pictures(examples):
    for split, found in examples.items():
        partial = [e for e in found if e.task == "text_to_image" and not is_pair(e)]
        assert {prompt_category(e.prompt) for e in partial} == set(CATEGORIES)
        assert all(satisfies(read_picture(pixels(e.image))[0], e.prompt) for e in partial)


def test_edit_records(examples):
    for split, found in examples.items():
        edits = [e for e in found if e.task == "edits"]
        kinds = collections.Counter(edit_kind(e.prompt) for e in edits)
        single = [kinds[kind] for kind in EDITS]
        several = len(edits) // 2
        assert kinds["several"] in (several, several + 1) and min(single) > 0
        assert split == "train" or max(single) - min(single) <= 3
        assert {1 + e.prompt.count(" and ") for e in edits} == {1, 2, 3}
        for e in edits:
            scene, target = (read_picture(pixels(path))[0] for path in (e.sources[0], e.image))
            for text in e.prompt.split(" and "):
                _, looks, background = follow(text, scene)
                scene = Scene(tuple(Object(*look, cell) for cell, look in sorted(looks.items())), background)
            assert scene.content() == target.content(), e.prompt


def test_map_records(examples):
    for e in (e for split in examples.values() for e in split if e.task in ("edges", "depth", "pose")):
        assert e.prompt == f"draw the {e.task} of the picture"
        source, target = pixels(e.sources[0]), pixels(e.image)
        if e.task != "pose":
            assert np.array_equal(target, {"edges": edge_map, "depth": depth_map}[e.task](read_picture(source)[0]))
            continue
        arrows = read_pose(target)                                                            # the colour: that of the middle of the arrow
        middles = [source[12 + 20 * (o.cell // 3) + o.shift[1], 12 + 20 * (o.cell % 3) + o.shift[0]] for o in arrows]
        colors = [next(name for name, value in COLORS.items() if tuple(m) == value) for m in middles]
        background = next(name for name, value in BACKGROUNDS.items() if tuple(source[0, 0]) == value)
        scene = Scene(tuple(o._replace(color=color) for o, color in zip(arrows, colors)), background)
        assert np.array_equal(render(scene), source) and held_out(scene) == ("test" in e.image.parts)


def test_composition_records(examples):
    for split, found in examples.items():
        for e in (e for e in found if e.task == "personalisation"):
            references = [read_picture(pixels(path))[0].objects for path in e.sources]
            assert all(len(objects) == 1 for objects in references) and len(set(e.sources)) == len(e.sources)
            scene = read_picture(pixels(e.image))[0]
            assert right_objects(e.prompt, [objects[0] for objects in references], scene) == len(scene.objects) == len(e.sources)
            assert e.prompt.endswith(f" on a {scene.background} background")


def test_question_records(examples):
    for split, found in examples.items():
        asked = [e for e in found if e.task == "questions"]
        assert {question_kind(e.question) for e in asked} == set(QUESTIONS)
        assert all(answer(e.question, read_picture(pixels(e.image))[0]) == e.caption for e in asked)
        numbers = {(question_kind(e.question), len(read_picture(pixels(e.image))[0].objects)) for e in asked}
        assert split == "train" or numbers >= set(itertools.product(("count", "what", "exists", "background"), (1, 2, 3)))


def test_no_scene_of_the_other_split(examples):
    """Of targets and of sources, in every task; what the pose task shows is looked at above."""
    for split, found in examples.items():
        shown = {e.image for e in found if e.task not in ("edges", "depth", "pose")}
        shown |= {path for e in found if e.task != "pose" for path in e.sources}
        assert len(shown) > (TRAIN if split == "train" else TEST) * 1.5
        assert all(held_out(read_picture(pixels(path))[0]) == (split == "test") for path in shown)
        for e in found:                                                                       # and no picture is shared
            assert all(split in path.parts for path in (e.image, *e.sources))


def test_texts_fit_the_text_length(examples):
    """31 words and the end, in the 32 tokens of the tiny preset; a question stands before its answer."""
    texts = [text for found in examples.values() for e in found for text in (e.prompt or "", f"{e.question} {e.caption}")]
    rng = random.Random(60)
    for i in range(500):
        texts += [" and ".join(random_edits(rng, random_scene(rng, 1 + i % 3), 3)[0]),
                  random_composition(rng, [random_scene(rng, 1).objects[0] for _ in range(3)])[0]]
    assert max(len(text.split()) for text in texts) <= 31


def test_the_same_seed_makes_the_same_files(world, tmp_path):
    make_world(tmp_path / "again", train=TRAIN, test=TEST, seed=5)
    assert contents(tmp_path / "again") == contents(world)
    make_world(tmp_path / "other", train=12, test=6, seed=6)
    assert (tmp_path / "other" / "train.jsonl").read_text().splitlines()[:12] != (world / "train.jsonl").read_text().splitlines()[:12]


@pytest.mark.parametrize("train, test", [(1, 1), (7, 3)])
def test_small_worlds(tmp_path, train, test):
    make_world(tmp_path, train=train, test=test)
    for split in ("train", "test"):
        found = {e.task for e in read_jsonl(tmp_path / f"{split}.jsonl")}
        assert found >= {"text_to_image", "edits", "edges", "personalisation", "questions"}


def test_pictures_for_an_autoencoder_show_no_held_out_scene(monkeypatch):
    """And crowded scenes, and every kind of picture that the tasks have."""
    drawn = []
    for name in ("render", "edge_map", "depth_map", "pose_map"):
        real = getattr(shapes, name)
        monkeypatch.setattr(shapes, name, lambda scene, name=name, real=real: drawn.append((name, scene)) or real(scene))
    rng = random.Random(70)
    pictures = [random_training_picture(rng) for _ in range(800)]
    assert len(drawn) == 800 and all(p.shape == (64, 64, 3) and p.dtype == np.uint8 for p in pictures)
    assert not any(held_out(scene) for _, scene in drawn)                                     # by chance it would be a tenth
    assert {len(scene.objects) for _, scene in drawn} == set(range(1, 10))
    kinds = collections.Counter((name, scene.objects[0].shape in ARROWS) for name, scene in drawn)
    assert set(kinds) == {("render", False), ("render", True), ("edge_map", False), ("depth_map", False), ("pose_map", True)}
    assert 0.55 < kinds["render", False] / 800 < 0.75 and min(kinds.values()) > 30
    for (name, scene), picture in zip(drawn, pictures):
        if (name, scene.objects[0].shape in ARROWS) == ("render", False):
            assert read_picture(picture)[0] == scene


def run_alone(*arguments):
    path = Path(shapes.__file__)
    return subprocess.run([sys.executable, path, *map(str, arguments)], capture_output=True, text=True, cwd=path.parent)


def test_run_alone(tmp_path):
    found = run_alone(tmp_path / "world")
    assert found.returncode == 0, found.stderr
    for task in ("text_to_image", "edits", "edges", "depth", "pose", "personalisation", "questions"):
        assert f'"task": "{task}"' in found.stdout
    assert Image.open(tmp_path / "world" / "overview.png").width == 16 * 64
    assert read_jsonl(tmp_path / "world" / "train.jsonl") and read_jsonl(tmp_path / "world" / "test.jsonl")
    helped = run_alone("--help")
    assert helped.returncode == 1 and "python shapes.py FOLDER" in helped.stderr


def test_coverage_is_between_nothing_and_everything():
    for size in SIZES:
        area = [shapes.coverage(shape, size, (0, 0)) for shape in SHAPES]
        assert all(a.min() == 0 and a.max() == 1 for a in area)
        circle, square, triangle = (a.sum() for a in area)
        a, b, c = (RADII[shape][SIZES.index(size)] for shape in SHAPES)
        assert abs(circle / (np.pi * a ** 2) - 1) < 0.05 and abs(square / (2 * b) ** 2 - 1) < 0.05 and abs(triangle / (c * (2 * c - 1)) - 1) < 0.1
