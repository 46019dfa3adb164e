"""dataset.py: the records are true of their pictures, and the splits share no objects."""
import collections
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from brute_force import answer, follow
from data import read_jsonl
from experiments import dataset
from experiments.dataset import make_world
from experiments.language import (
    CATEGORIES, EDITS, QUESTIONS, caption, edit_kind, parse_caption, prompt_category, question_kind,
    random_composition, random_edits, right_objects, satisfies,
)
from experiments.world import (
    BACKGROUNDS, COLORS, Object, Scene, depth_map, edge_map, held_out, random_scene, read_picture,
    read_pose, render,
)

TRAIN, TEST = 240, 30
MAPS = ("edges", "depth", "pose")


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


def of_task(examples, *tasks):
    """The examples of some tasks, of both splits."""
    return [e for split in examples.values() for e in split if e.task in tasks]


def pixels(path):
    return np.asarray(Image.open(path))


def read_scene(path):
    return read_picture(pixels(path))[0]


def contents(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def is_pair(example):
    return example.task == "text_to_image" and example.prompt == example.caption


def test_numbers_of_records(world):
    """The shares hold: a training record has two questions, each partial test prompt a plan."""
    expected = {
        "train": {"text_to_image": 240, "partial": 192, "plan": 720,
                  "edits": 312, "edges": 72, "depth": 36, "pose": 36,
                  "personalisation": 72, "questions": 240},
        "test": {"text_to_image": 30, "partial": 18, "plan": 18,
                 "edits": 18, "edges": 18, "depth": 18, "pose": 18,
                 "personalisation": 18, "questions": 30},
    }
    for split in expected:
        lines = records(world, split)
        assert collections.Counter(r["task"] for r in lines) == expected[split]
        turns = {len(r["conversations"]) for r in lines if r["task"] == "questions"}
        assert turns == ({4} if split == "train" else {2})


def test_fields_of_the_records_of_a_task(examples):
    for split in examples.values():
        sources = collections.defaultdict(set)
        for e in split:
            sources[e.task].add(len(e.sources))
            assert (e.prompt is None) == bool(e.question) == (e.task in ("questions", "plan"))
            assert (e.image is None) == (e.task == "plan")
            assert (e.caption == "") == (e.task in MAPS)
        assert sources == {
            "text_to_image": {0}, "partial": {0}, "plan": {0}, "questions": {0},
            "edits": {1}, "edges": {1}, "depth": {1},
            "pose": {1}, "personalisation": {1, 2, 3},
        }
        pictures = {path for e in split for path in e.pictures}
        assert all(path.is_file() and pixels(path).shape == (64, 64, 3) for path in pictures)
        in_folder = set(next(iter(pictures)).parent.glob("*"))
        assert pictures == in_folder                                        # none is left over


def test_full_captions(examples):
    sets = {}
    for split, number in (("train", TRAIN), ("test", TEST)):
        scenes = [parse_caption(e.caption) for e in examples[split] if is_pair(e)]
        assert len(scenes) == number
        sets[split] = {s.content()[0] for s in scenes}
        counts = [sum(len(s.objects) == n for s in scenes) for n in (1, 2, 3)]
        assert counts == [10, 10, 10] if split == "test" else counts[0] < counts[1] < counts[2]
    assert not sets["train"] & sets["test"]


def test_captions_describe_their_pictures(examples):
    for e in itertools.chain(*examples.values()):
        if e.caption and e.task not in ("questions", "plan"):
            scene, error = read_picture(pixels(e.image))
            assert error == 0 and e.caption == caption(scene)


def test_partial_prompts_are_true_of_their_pictures(examples):
    for split in examples.values():
        partial = [e for e in split if e.task == "partial"]
        assert {prompt_category(e.prompt) for e in partial} == set(CATEGORIES)
        assert all(satisfies(read_scene(e.image), e.prompt) for e in partial)


def test_plans(examples):
    prompts = {}
    for name, split in examples.items():
        plans = [e for e in split if e.task == "plan"]
        scenes = [parse_caption(e.caption) for e in plans]
        assert all(satisfies(scene, e.question) for scene, e in zip(scenes, plans))
        assert all(held_out(scene) == (name == "test") for scene in scenes)
        prompts[name] = [e.question for e in plans]
    assert prompts["test"] == [e.prompt for e in examples["test"] if e.task == "partial"]
    categories = collections.Counter(map(prompt_category, prompts["train"]))
    assert set(categories) == set(CATEGORIES)
    assert categories["position"] > 2 * categories["counting"]


def test_edit_records(examples):
    for split in examples:
        edits = [e for e in examples[split] if e.task == "edits"]
        kinds = collections.Counter(edit_kind(e.prompt) for e in edits)
        single = [kinds[kind] for kind in EDITS]
        several = len(edits) // 2
        assert kinds["several"] in (several, several + 1) and min(single) > 0
        assert split == "train" or max(single) - min(single) <= 3
        assert {1 + e.prompt.count(" and ") for e in edits} == {1, 2, 3}
        for e in edits:
            scene, target = read_scene(e.sources[0]), read_scene(e.image)
            for text in e.prompt.split(" and "):
                _, looks, background = follow(text, scene)
                objects = tuple(Object(*look, cell) for cell, look in sorted(looks.items()))
                scene = Scene(objects, background)
            assert scene.content() == target.content(), e.prompt


def test_half_of_the_training_edits_edit_results_of_edits(examples):
    """And none of the test."""
    for split, share in (("train", 0.5), ("test", 0.0)):
        edits = [e for e in examples[split] if e.task == "edits"]
        results, edited = set(), 0
        for e in edits:
            edited += e.sources[0] in results
            results.add(e.image)
        assert edited / len(edits) == pytest.approx(share, abs=0.12 if share else 0)


def name_of(color, colors):
    return next(name for name, value in colors.items() if tuple(color) == value)


def test_map_records(examples):
    for e in of_task(examples, *MAPS):
        assert e.prompt == f"draw the {e.task} of the picture"
        source, target = pixels(e.sources[0]), pixels(e.image)
        if e.task != "pose":
            draw = {"edges": edge_map, "depth": depth_map}[e.task]
            assert np.array_equal(target, draw(read_picture(source)[0]))
            continue
        objects = []
        for o in read_pose(target):
            x, y = 12 + 20 * (o.cell % 3) + o.shift[0], 12 + 20 * (o.cell // 3) + o.shift[1]
            objects.append(o._replace(color=name_of(source[y, x], COLORS)))     # its middle
        scene = Scene(tuple(objects), name_of(source[0, 0], BACKGROUNDS))
        assert np.array_equal(render(scene), source)
        assert held_out(scene) == ("test" in e.image.parts)


def test_composition_records(examples):
    for e in of_task(examples, "personalisation"):
        references = [read_scene(path).objects for path in e.sources]
        assert all(len(objects) == 1 for objects in references)
        assert len(set(e.sources)) == len(e.sources)
        scene = read_scene(e.image)
        right = right_objects(e.prompt, [objects[0] for objects in references], scene)
        assert right == len(scene.objects) == len(e.sources)
        assert e.prompt.endswith(f" on a {scene.background} background")


def test_question_records(examples):
    for split in examples:
        asked = [e for e in examples[split] if e.task == "questions"]
        assert {question_kind(e.question) for e in asked} == set(QUESTIONS)
        assert all(answer(e.question, read_scene(e.image)) == e.caption for e in asked)
        numbers = {(question_kind(e.question), len(read_scene(e.image).objects)) for e in asked}
        expected = itertools.product(("count", "what", "exists", "background"), (1, 2, 3))
        assert split == "train" or numbers >= set(expected)


def test_no_scene_of_the_other_split(examples):
    """Of targets and of sources, in every task; `test_map_records` looks at the pose task."""
    for split in examples:
        shown = {e.image for e in examples[split] if e.image and e.task not in MAPS}
        shown |= {path for e in examples[split] if e.task != "pose" for path in e.sources}
        assert len(shown) > (TRAIN if split == "train" else TEST) * 1.5
        assert all(held_out(read_scene(path)) == (split == "test") for path in shown)
        for e in examples[split]:                                           # no picture is shared
            assert all(split in path.parts for path in e.pictures)


def test_texts_fit_the_text_length(examples):
    """The tiny preset has 32 tokens: 31 words and the end. An answer follows its question.

    Texts without a picture have 48.
    """
    texts, plans = [], []
    for e in itertools.chain(*examples.values()):
        (plans if e.task == "plan" else texts).append(f"{e.question} {e.caption}")
        texts.append(e.prompt or "")
    assert 31 < max(len(text.split()) for text in plans) <= 47
    rng = random.Random(60)
    for i in range(500):
        instructions, _ = random_edits(rng, random_scene(rng, 1 + i % 3), 3)
        references = [random_scene(rng, 1).objects[0] for _ in range(3)]
        texts += [" and ".join(instructions), random_composition(rng, references)[0]]
    assert max(len(text.split()) for text in texts) <= 31


def test_the_same_seed_makes_the_same_files(world, tmp_path):
    make_world(tmp_path / "again", train=TRAIN, test=TEST, seed=5)
    assert contents(tmp_path / "again") == contents(world)
    make_world(tmp_path / "other", train=12, test=6, seed=6)
    assert records(tmp_path / "other", "train")[:12] != records(world, "train")[:12]


@pytest.mark.parametrize("train, test", [(1, 1), (7, 3)])
def test_small_worlds(tmp_path, train, test):
    make_world(tmp_path, train=train, test=test)
    for split in ("train", "test"):
        tasks = {e.task for e in read_jsonl(tmp_path / f"{split}.jsonl")}
        assert tasks >= {"text_to_image", "edits", "edges", "personalisation", "questions"}


def run_alone(*arguments):
    command = [sys.executable, "-m", "experiments.dataset", *map(str, arguments)]
    top = Path(dataset.__file__).parents[1]
    return subprocess.run(command, capture_output=True, text=True, cwd=top)


def test_run_alone(tmp_path):
    folder = tmp_path / "world"
    process = run_alone(folder)
    assert process.returncode == 0, process.stderr
    for task in ("text_to_image", "partial", "plan", "edits", *MAPS, "personalisation",
                 "questions"):
        assert f'"task": "{task}"' in process.stdout
    assert Image.open(folder / "overview.png").width == 16 * 64
    assert read_jsonl(folder / "train.jsonl") and read_jsonl(folder / "test.jsonl")
    usage = run_alone("--help")
    assert usage.returncode == 1 and "python -m experiments.dataset FOLDER" in usage.stderr
