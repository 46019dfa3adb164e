"""shapes.py: pictures and captions are read back exactly, and the test set is kept apart."""
import json
import random

import numpy as np
import pytest
from PIL import Image

import shapes
from data import read_jsonl
from shapes import BACKGROUNDS, COLORS, PLACES, RADII, SHAPES, Object, Scene, caption, held_out, make_world, parse_caption, random_scene, \
    read_picture, render


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
    for i, (size, color, shape) in enumerate((s, c, f) for s in RADII for c in COLORS for f in SHAPES):
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
    assert (picture[52, :, 0] > 127).sum() == 18 and (picture[12, :, 2] > 117).sum() == 12    # as wide as twice the radius, less outlines


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
    one = [Scene((Object(size, color, shape, cell),), "gray") for size in RADII for color in COLORS for shape in SHAPES for cell in range(9)]
    assert 0.05 < np.mean([held_out(s) for s in one]) < 0.15


# ---------------------------------------------------------------- files

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, train=240, test=30, seed=5)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_test_objects_in_training(world):
    sets = {}
    for split, number in (("train", 240), ("test", 30)):
        told = [parse_caption(e.caption) for e in read_jsonl(world / f"{split}.jsonl")]
        assert len(told) == number and all(held_out(s) == (split == "test") for s in told)
        sets[split] = {s.content()[0] for s in told}
        counts = [sum(len(s.objects) == n for s in told) for n in (1, 2, 3)]
        assert counts == [10, 10, 10] if split == "test" else counts[0] < counts[1] < counts[2]
    assert not sets["train"] & sets["test"]


def test_pictures_are_those_of_their_captions(world):
    for split in ("train", "test"):
        for example in read_jsonl(world / f"{split}.jsonl"):
            picture = np.asarray(Image.open(example.image))
            scene, error = read_picture(picture)
            assert example.task == "text_to_image" and example.prompt == example.caption == caption(scene)
            assert error == 0 and np.array_equal(render(scene), picture)
    assert len(list((world / "images").rglob("*.png"))) == 270


def test_the_same_seed_makes_the_same_files(world, tmp_path):
    make_world(tmp_path / "again", train=240, test=30, seed=5)
    assert contents(tmp_path / "again") == contents(world)
    make_world(tmp_path / "other", train=240, test=30, seed=6)
    assert (tmp_path / "other" / "train.jsonl").read_text() != (world / "train.jsonl").read_text()


def test_fewer_objects(tmp_path):
    make_world(tmp_path, train=20, test=5, max_objects=1)
    records = [json.loads(line) for split in ("train", "test") for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
    assert len(records) == 25 and not any(" and " in r["conversations"][0]["value"] for r in records)


def test_coverage_is_between_nothing_and_everything():
    for size in RADII:
        area = [shapes.coverage(shape, size, (0, 0)) for shape in SHAPES]
        assert all(a.min() == 0 and a.max() == 1 for a in area)
        circle, square, triangle = (a.sum() for a in area)
        r = RADII[size]
        assert abs(circle / (np.pi * r ** 2) - 1) < 0.05 and abs(square / (2 * r) ** 2 - 1) < 0.2 and abs(triangle / (r * (2 * r - 1)) - 1) < 0.1
