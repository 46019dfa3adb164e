"""language.py: texts are parsed back, and every prompt, instruction and answer is true."""
import collections
import random
import re

import numpy as np
import pytest

from brute_force import PLACE, answer, follow
from experiments.language import (
    CATEGORIES, EDITS, QUESTIONS, caption, edit_kind, parse_caption, prompt_category, question_kind,
    random_composition, random_edit, random_edits, random_prompt, random_question, right_objects,
    satisfies,
)
from experiments.world import BACKGROUNDS, COLORS, PLACES, Object, Scene, random_scene, raster_order

WRONG_ARTICLE = r"\ba [aeiou]|\ban [^aeiou]"


def looks_by_cell(scene):
    return {o.cell: o[:3] for o in scene.objects}


# ---------------------------------------------------------------- captions

def test_captions_are_parsed_back():
    rng, texts = random.Random(2), set()
    for i in range(1000):
        scene = random_scene(rng, 1 + i % 3)
        parsed = parse_caption(caption(scene))
        assert parsed.content() == scene.content()
        assert [o.cell for o in parsed.objects] == [o.cell for o in scene.objects]
        texts.add(caption(scene))
    assert len(texts) > 950


def test_caption_of_an_example():
    circle, square = "a large red circle at the top left", "a small blue square at the center"
    objects = Object("large", "red", "circle", 0, (1, 1)), Object("small", "blue", "square", 4)
    scene = Scene(objects, "gray")
    text = f"{circle} and {square} on a gray background"
    assert caption(scene) == text and parse_caption(f" {text}\n").content() == scene.content()
    turned = f"{square} and {circle} on a gray background"
    assert parse_caption(turned) == parse_caption(text)             # the order does not matter


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


# ---------------------------------------------------------------- partial prompts

def objects_of(text):
    """Parse "large red circle 0, small blue square 4": objects in the cells 0 and 4."""
    objects = []
    for name in filter(None, text.split(", ")):
        *look, cell = name.split()
        objects.append(Object(*look, int(cell)))
    return tuple(objects)


@pytest.mark.parametrize("category", CATEGORIES)
def test_prompts_are_true_of_their_scenes(category):
    rng, prompts, backgrounds = random.Random(20), set(), 0
    for _ in range(300):
        prompt, scene = random_prompt(rng, category)
        assert prompt_category(prompt) == category and satisfies(scene, prompt), prompt
        assert not re.search(WRONG_ARTICLE, prompt)
        assert len({o.cell for o in scene.objects}) == len(scene.objects) in (1, 2, 3)
        assert scene.objects == tuple(sorted(scene.objects, key=lambda o: o.cell))
        names_background = prompt.endswith(" background")
        assert not names_background or prompt.endswith(f" on a {scene.background} background")
        other = scene._replace(background="white" if scene.background != "white" else "black")
        assert satisfies(other, prompt) != names_background
        prompts.add(prompt)
        backgrounds += names_background
    assert len(prompts) > 5 and 110 < backgrounds < 190


@pytest.mark.parametrize("category", CATEGORIES)
def test_prompts_are_false_with_an_object_more_or_less(category):
    rng = random.Random(21)
    for _ in range(100):
        prompt, scene = random_prompt(rng, category)
        empty = next(cell for cell in range(9) if all(o.cell != cell for o in scene.objects))
        more = scene.objects + (scene.objects[0]._replace(cell=empty),)
        assert not satisfies(scene._replace(objects=more), prompt), prompt
        assert not satisfies(scene._replace(objects=scene.objects[1:]), prompt), prompt


@pytest.mark.parametrize("prompt, true, false", [
    ("a circle",
     ["small red circle 3"],
     ["small red square 3", "small red circle 3, large red circle 4", ""]),
    ("a red circle",
     ["large red circle 8"],
     ["large blue circle 8", "large red square 8"]),
    ("an orange circle",
     ["large orange circle 8"],
     ["large blue circle 8", "large orange square 8"]),
    ("an orange circle above an orange square",
     ["small orange circle 2, small orange square 3"],
     ["small orange square 2, small orange circle 3", "small orange circle 2, small red square 3"]),
    ("a circle and a square",
     ["small red circle 1, small red square 0", "small red square 0, small red circle 1"],
     ["small red circle 0, small red circle 1", "small red square 0, small red square 1",
      "small red square 0", "small red circle 0, small red square 1, small red triangle 2",
      "small red circle 0, small red triangle 1"]),
    ("a red circle and a blue square",
     ["small red circle 1, small blue square 0"],
     ["small blue circle 1, small red square 0", "small red square 1, small blue circle 0",
      "small red circle 1, small red square 0"]),
    ("a circle left of a square",
     ["small red circle 0, small red square 4", "small red circle 6, small red square 1"],
     ["small red square 0, small red circle 4", "small red circle 1, small red square 4",
      "small red circle 0, small red triangle 4"]),
    ("a circle right of a square",
     ["small red square 0, small red circle 4"],
     ["small red circle 0, small red square 4", "small red square 1, small red circle 4"]),
    ("a circle above a square",
     ["small red circle 2, small red square 3"],
     ["small red circle 3, small red square 5", "small red square 2, small red circle 3"]),
    ("a red circle below a blue circle",
     ["small blue circle 0, small red circle 3"],
     ["small red circle 0, small blue circle 3", "small blue circle 0, small red circle 1",
      "small green circle 0, small red circle 3"]),
    ("two circles",
     ["small red circle 0, large blue circle 1"],
     ["small red circle 0", "small red circle 0, small red square 1",
      "small red circle 0, small red circle 1, small red circle 2"]),
    ("three red objects",
     ["small red circle 0, small red square 1, large red circle 2"],
     ["small red circle 0, small red square 1, large blue circle 2",
      "small red circle 0, small red square 1"]),
    ("two green triangles",
     ["small green triangle 0, large green triangle 1"],
     ["small green triangle 0, large red triangle 1",
      "small green triangle 0, large green circle 1"]),
    ("one object and no circle",
     ["small red square 0"],
     ["small red circle 0", "small red square 0, small red square 1"]),
    ("two objects and no red object",
     ["small blue circle 0, small green circle 1"],
     ["small blue circle 0, small red circle 1", "small blue circle 0",
      "small blue circle 0, small blue circle 1, small blue circle 2"]),
])
def test_near_misses_do_not_satisfy_a_prompt(prompt, true, false):
    for background in ("", " on a gray background"):
        for text in true + false:
            scene = Scene(objects_of(text), "gray")
            assert satisfies(scene, prompt + background) == (text in true), text
            assert satisfies(scene, f"{prompt} on a black background") is False


# ---------------------------------------------------------------- edits

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
        assert follow(text, scene) == (kind, looks_by_cell(after), after.background), text
        assert list(after.objects) == sorted(after.objects, key=lambda o: o.cell)
        changed = set(scene.objects) ^ set(after.objects)       # the others keep their displacement
        assert {o.cell for o in changed} == touched
        assert len(changed) == {"background": 0, "add": 1, "remove": 1}.get(kind, 2)
        if kind not in ("background", "add", "remove"):
            assert len({o.shift for o in changed}) == 1
        done, by_look = done + 1, by_look + (" object" not in text)
    assert done > 200
    if kind in ("background", "add"):
        assert by_look == done
    else:
        assert 0.2 < by_look / done < 0.6                       # objects are named in both ways


@pytest.mark.parametrize("kind", EDITS)
def test_cells_that_must_not_be_touched(kind):
    rng, edits = random.Random(31), 0
    for i in range(200):
        scene = random_scene(rng, 1 + i % 3)
        keep = set(rng.sample(range(9), rng.randint(1, 8)))
        edit = random_edit(rng, scene, kind, keep)
        if edit:
            assert not edit.touched & keep
            edits += 1
    assert edits > 20
    assert kind == "background" or random_edit(rng, random_scene(rng, 2), kind, range(9)) is None


@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_edits_touch_different_things(count):
    rng, seen = random.Random(32), collections.Counter()
    for i in range(300):
        scene = random_scene(rng, 1 + i % 3)
        texts, after = random_edits(rng, scene, count)
        assert len(texts) == len(after) == count
        assert edit_kind(" and ".join(texts)) == ("several" if count > 1 else edit_kind(texts[0]))
        steps, touched = [scene, *after], []
        for text, one, two in zip(texts, steps, steps[1:]):
            assert follow(text, one)[1:] == (looks_by_cell(two), two.background)
            assert 1 <= len(two.objects) <= 3
            touched += {o.cell for o in set(one.objects) ^ set(two.objects)}
        kinds = [edit_kind(text) for text in texts]
        assert len(set(touched)) == len(touched)                # never a cell twice
        assert len(set(kinds)) == count                         # never a kind twice
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
        assert len({o.cell for o in scene.objects}) == 1 + i % 3
        assert text.endswith(f" on a {scene.background} background")
        joint = re.match("put the object of picture 1 (.+) the object of picture 2 on a ", text)
        relations[joint[1] if joint else len(references)] += 1
        if joint:
            one, two = ([o for o in scene.objects if o[:3] == r[:3]] for r in references)
            still = references[1]
            assert still in two                                 # the other comes right next to it
            assert any(abs(a.cell // 3 - still.cell // 3) + abs(a.cell % 3 - still.cell % 3) == 1
                       for a in one)
        else:
            looks = {PLACES[o.cell]: o[:3] for o in scene.objects}
            places = re.findall(f"at the ({PLACE})", text)
            assert [looks[place] for place in places] == [r[:3] for r in references]
            assert re.findall("[123]", text) == ["1", "2", "3"][:len(references)]
    assert set(relations) == {1, 2, 3, "left of", "right of", "above", "below"}
    assert relations[2] > 60


RED, BLUE, GREEN = objects_of("large red circle 0, small blue square 0, small green circle 0")
OTHER, = objects_of("small purple triangle 0")
PLACED = ("put the object of picture 1 at the top left and that of 2 at the center "
          "and that of 3 at the center right on a gray background")


def put(**cells):
    """A scene with these of RED, BLUE, GREEN and OTHER in these cells."""
    named = {"red": RED, "blue": BLUE, "green": GREEN, "other": OTHER}
    objects = [named[name]._replace(cell=cell) for name, cell in cells.items()]
    return Scene(raster_order(objects), "gray")


@pytest.mark.parametrize("scene, number", [
    (put(red=0, blue=4, green=5), 3), (put(red=0, blue=4), 2), (put(red=0, blue=4, green=8), 2),
    (put(blue=0, red=4, green=5), 1), (put(red=1, blue=3, green=4), 0),
    (put(red=0, blue=4, green=5, other=8), 3), (put(red=0), 1), (put(other=0), 0),
    (Scene((), "gray"), 0),
])
def test_objects_at_their_places_are_counted(scene, number):
    assert right_objects(PLACED, [RED, BLUE, GREEN], scene) == number
    # neither displacement nor background counts
    moved = Scene(tuple(o._replace(shift=(1, -1)) for o in scene.objects), "black")
    assert right_objects(PLACED, [RED, BLUE, GREEN], moved) == number


@pytest.mark.parametrize("change", [{"size": "small"}, {"color": "orange"}, {"shape": "square"}])
def test_an_object_counts_only_if_all_of_it_is_right(change):
    wrong = Scene((RED._replace(**change), BLUE._replace(cell=4)), "gray")
    for text in (
            "put the object of picture 1 at the top left and that of 2 at the center",
            "put the object of picture 1 above the object of picture 2"):
        assert right_objects(f"{text} on a gray background", [RED, BLUE], wrong) == 1


@pytest.mark.parametrize("relation, scene, number", [
    ("left of", put(red=0, blue=4), 2), ("left of", put(red=6, blue=1), 2),
    ("left of", put(blue=0, red=4), 0),
    ("left of", put(red=1, blue=4), 0),                         # in one column
    ("left of", put(red=0, other=4), 1), ("left of", put(other=0, blue=4), 1),
    ("left of", put(blue=0, other=4), 0), ("left of", put(red=0), 0),
    ("left of", put(red=0, blue=4, other=8), 2),
    ("right of", put(blue=0, red=4), 2), ("right of", put(red=0, blue=4), 0),
    ("above", put(red=2, blue=3), 2), ("above", put(red=0, blue=2), 0),
    ("below", put(blue=2, red=3), 2), ("below", put(red=2, blue=3), 0),
])
def test_objects_in_a_relation_are_counted(relation, scene, number):
    text = f"put the object of picture 1 {relation} the object of picture 2 on a gray background"
    assert right_objects(text, [RED, BLUE], scene) == number


# ---------------------------------------------------------------- questions

def test_answers_name_the_places_of_their_objects():
    objects = objects_of("small red circle 1, large blue square 3, large red circle 8")
    scene = Scene(objects, "gray")
    asked = set()
    for i in range(500):
        for kind in ("count", "exists", "where", "color"):
            asked.add(random_question(random.Random(i), scene, kind))
    asked.discard(None)
    assert asked >= {
        ("how many red objects are there?", "two at the top center and at the bottom right"),
        ("how many triangles are there?", "zero"),
        ("is there a red circle?", "yes at the top center and at the bottom right"),
        ("is there a large red circle?", "yes at the bottom right"),
        ("is there a blue circle?", "no"),
        ("where is the blue object?", "at the center left"),
        ("what color is the square?", "blue at the center left"),
    }
    # there are two red objects
    assert not any(question.startswith("where is the red") for question, _ in asked)


@pytest.mark.parametrize("kind", QUESTIONS)
def test_answers_are_right_and_spread(kind):
    rng, answers, asked, refused = random.Random(50), collections.Counter(), set(), 0
    for i in range(1200):
        scene = random_scene(rng, 1 + i % 3)
        pair = random_question(rng, scene, kind)
        if pair is None:
            assert kind in ("where", "color") and len(scene.objects) > 1
            refused += 1
            continue
        question, text = pair
        assert not re.search(WRONG_ARTICLE, question)
        assert question_kind(question) == kind
        assert answer(question, scene) == text, (question, scene)
        answers[text if kind == "where" else text.split(" at the ")[0]] += 1
        asked.add(question)
    share = {text: n / sum(answers.values()) for text, n in answers.items()}
    assert refused < 400
    if kind == "exists":
        assert set(share) == {"yes", "no"} and 0.45 < share["yes"] < 0.55 and len(asked) > 50
    elif kind == "count":
        assert set(share) == {"zero", "one", "two", "three"}
        assert max(share.values()) < 0.6 and min(share.values()) > 0.02
    elif kind == "what":
        assert len(share) == 1 + 36 and 0.1 < share.pop("nothing") < 0.3
        assert max(share.values()) < 0.06 and len(asked) == 9
    else:
        values = {
            "where": {f"at the {place}" for place in PLACES},
            "color": set(COLORS),
            "background": set(BACKGROUNDS),
        }[kind]
        assert set(share) == values and max(share.values()) < 1.5 / len(values)


def test_the_question_does_not_give_away_yes_or_no():
    """The number of its words does not, either."""
    rng, answers = random.Random(51), collections.defaultdict(list)
    for i in range(3000):
        question, text = random_question(rng, random_scene(rng, 1 + i % 3), "exists")
        answers[len(question.split())].append(text.startswith("yes"))
    assert len(answers) == 2
    assert all(0.44 < np.mean(yes) < 0.56 for yes in answers.values())
