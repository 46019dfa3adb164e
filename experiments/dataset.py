"""Write a shapes world to disk: the records of every task in the JSONL formats of real data.

A world is a folder with the records train.jsonl and test.jsonl and their pictures in images/.
The tasks are those of the paper's Method section (data.py explains the formats of the records):

    text_to_image       full captions
    partial             prompts that mention only a part of their picture
    plan                partial prompts to be completed into full captions, without a picture
    edits               one to three instructions about a picture
    edges, depth, pose  perception: draw a map of a picture
    personalisation     compositions of the objects of one to three reference pictures
    questions           questions about a picture, with their answers

Write a small world, with an overview of its pictures in FOLDER/overview.png, and print the first
record of every task:

    python -m experiments.dataset FOLDER
"""
import itertools
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from config import SampleSettings
from experiments.language import (
    CATEGORIES, EDITS, QUESTIONS, caption, random_composition, random_edit, random_edits,
    named_objects, random_prompt, random_question,
)
from experiments.world import (
    ARROWS, SHAPES, Scene, depth_map, edge_map, held_out, pose_map, random_scene, render,
)

# How often training shows each kind, relative to the others: the difficult ones more often.
# The test shows all kinds equally often.
EDIT_WEIGHTS = {
    "recolor": 3, "resize": 3, "move": 3, "remove": 1.5, "add": 1.5, "reshape": 4.5,
    "background": 0.5,
}
QUESTION_WEIGHTS = {
    "count": 5.5, "what": 1, "exists": 4, "where": 1, "color": 3, "background": 0.3,
}
PLAN_WEIGHTS = {name: 1 for name in CATEGORIES} | {"position": 4, "negation": 3}

Pair = tuple[str, Scene]        # the name of a picture in the folder of the world, and its scene


class Split:
    """One split of a world, "train" or "test", while it is written: numbered pictures, records."""

    def __init__(self, folder: Path, name: str, rng: random.Random):
        self.folder, self.name, self.rng = folder, name, rng
        self.is_test = name == "test"
        self.lines: list[str] = []
        self.pictures = 0
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)

    def admits(self, scene: Scene) -> bool:
        """Return whether a scene belongs to this split."""
        return held_out(scene) == self.is_test

    def draw_scene(self, count: int, shapes: Sequence[str] = SHAPES) -> Scene:
        """Draw scenes of `count` objects until one belongs to this split."""
        while True:
            scene = random_scene(self.rng, count, shapes)
            if self.admits(scene):
                return scene

    def draw_text(self, draw: Callable[..., tuple[str, Scene]], argument) -> tuple[str, Scene]:
        """Call draw(rng, argument) -> (text, scene) until the scene belongs to this split."""
        while True:
            text, scene = draw(self.rng, argument)
            if self.admits(scene):
                return text, scene

    def save_picture(self, picture: np.ndarray) -> str:
        """Save a picture under the next number. Returns its name relative to the folder."""
        name = f"images/{self.name}/{self.pictures:06d}.png"
        Image.fromarray(picture).save(self.folder / name, compress_level=1)
        self.pictures += 1
        return name

    def add(self, task: str, record: dict) -> None:
        self.lines.append(json.dumps({"task": task} | record) + "\n")

    def write(self) -> None:
        """Write the records. The file gets its name only when it is complete."""
        temporary = self.folder / f".{self.name}.jsonl.tmp"
        temporary.write_text("".join(self.lines))
        temporary.replace(self.folder / f"{self.name}.jsonl")


# ---------------------------------------------------------------- records

def _conversation(*texts: str) -> list[dict]:
    """A conversation in which human and model speak in turn."""
    speakers = itertools.cycle(("human", "gpt"))
    return [{"from": speaker, "value": text} for speaker, text in zip(speakers, texts)]


def pair_record(picture: str, scene: Scene) -> dict:
    """A text-to-image record: a caption and its picture."""
    return {"image": [picture], "conversations": _conversation(caption(scene), "<image>")}


def plan_record(prompt: str, scene: Scene) -> dict:
    """A partial prompt and a full caption that satisfies it, without a picture.

    The caption has the objects in the prompt's order, which a model learns sooner than that of
    their cells (experiments/LOG.md).
    """
    in_order = scene._replace(objects=named_objects(scene, prompt))
    return {"conversations": _conversation(prompt, caption(in_order))}


def _edit_record(source: str, target: str, instruction: str, target_caption: str) -> dict:
    return {
        "image": [source, target],
        "conversations": _conversation(target_caption),
        "instruction": instruction,
    }


def _composition_record(references: list[str], target: str, prompt: str, scene: Scene) -> dict:
    return {
        "original_images": references,
        "generated_images": [target],
        "edit_prompt": prompt,
        "caption": caption(scene),
    }


# ---------------------------------------------------------------- the records of each task

def write_pairs(split: Split, count: int) -> list[Pair]:
    """Write full captions of scenes with one, two and three objects, and return their pictures.

    The test has them equally often, training in the ratio 1 : 2 : 3, as more objects are harder.
    """
    pairs = []
    for i in range(count):
        if split.is_test:
            number = 1 + i % 3
        else:
            number = split.rng.choices((1, 2, 3), weights=(1, 2, 3))[0]
        scene = split.draw_scene(number)
        picture = split.save_picture(render(scene))
        split.add("text_to_image", pair_record(picture, scene))
        pairs.append((picture, scene))
    return pairs


def write_partial_prompts(split: Split, count: int, pairs: list[Pair]) -> None:
    """Write prompts that mention only a part of their scene.

    A partial prompt differs from the caption of its picture. So its record is a composition
    without reference pictures, which has room for both texts.
    """
    for i in range(count):
        prompt, scene = split.draw_text(random_prompt, CATEGORIES[i % len(CATEGORIES)])
        target = split.save_picture(render(scene))
        split.add("partial", _composition_record([], target, prompt, scene))
        if split.is_test:                   # the same prompts are drawn directly and after a plan
            split.add("plan", plan_record(prompt, scene))


def write_plans(split: Split, count: int, pairs: list[Pair]) -> None:
    """Write partial prompts with a full caption of a scene that satisfies them."""
    state = split.rng.getstate()
    categories = split.rng.choices(list(PLAN_WEIGHTS), PLAN_WEIGHTS.values(), k=count)
    for category in categories:
        prompt, scene = split.draw_text(random_prompt, category)
        split.add("plan", plan_record(prompt, scene))
    split.rng.setstate(state)               # the test records do not depend on the number of plans


def _draw_edit(split: Split, pairs: list[Pair], kind: str) -> tuple[str, str, Scene]:
    """Draw a source picture, an instruction of this kind, and the scene after it.

    The pictures of a small world may not allow the kind. After 200 tries the background changes,
    which is always possible.
    """
    for attempt in itertools.count():
        source, scene = split.rng.choice(pairs)
        edit = random_edit(split.rng, scene, kind if attempt < 200 else "background")
        if edit is not None and split.admits(edit.scene):
            return source, edit.instruction, edit.scene


def _draw_edits(split: Split, pairs: list[Pair], number: int) -> tuple[str, str, Scene]:
    """Draw a source picture, `number` instructions in one text, and the scene after them."""
    while True:
        source, scene = split.rng.choice(pairs)
        instructions, scenes = random_edits(split.rng, scene, number)
        if split.admits(scenes[-1]):
            return source, " and ".join(instructions), scenes[-1]


def write_edits(split: Split, count: int, pairs: list[Pair]) -> None:
    """Write edits of pictures: half of them one edit, the others two or three.

    The sources are the pairs' pictures. In training half of them are results of earlier edits, as
    when pictures are edited in turns.
    """
    results: list[Pair] = []
    for i in range(count):
        sources = pairs
        if results and not split.is_test:
            sources = split.rng.choice((pairs, results))
        number = (1, 2, 1, 3)[i % 4]
        if split.is_test:
            kind = EDITS[i // 2 % len(EDITS)]
        else:
            kind = split.rng.choices(list(EDIT_WEIGHTS), EDIT_WEIGHTS.values())[0]
        if number == 1:
            source, instruction, scene = _draw_edit(split, sources, kind)
        else:
            source, instruction, scene = _draw_edits(split, sources, number)
        target = split.save_picture(render(scene))
        results.append((target, scene))
        split.add("edits", _edit_record(source, target, instruction, caption(scene)))


def _add_map(split: Split, kind: str, source: str, target: np.ndarray) -> None:
    instruction = SampleSettings().perception_prompt.format(kind=kind)
    split.add(kind, _edit_record(source, split.save_picture(target), instruction, ""))


def write_edges(split: Split, count: int, pairs: list[Pair]) -> None:
    for source, scene in itertools.islice(itertools.cycle(pairs), count):
        _add_map(split, "edges", source, edge_map(scene))


def write_depth(split: Split, count: int, pairs: list[Pair]) -> None:
    for source, scene in itertools.islice(itertools.cycle(pairs), count):
        _add_map(split, "depth", source, depth_map(scene))


def write_poses(split: Split, count: int, pairs: list[Pair]) -> None:
    """Write poses of new pictures, because the pairs show no arrows."""
    for i in range(count):
        scene = split.draw_scene(1 + i % 3, ARROWS)
        source = split.save_picture(render(scene))
        _add_map(split, "pose", source, pose_map(scene))


def write_compositions(split: Split, count: int, pairs: list[Pair]) -> None:
    """Write compositions of new reference pictures with one object each."""
    singles = [split.draw_scene(1) for _ in range(1 + count // 3)]
    saved: dict[int, str] = {}              # by index in singles; the others are never chosen
    for i in range(count):
        number = min(1 + i % 3, len(singles))
        chosen = split.rng.sample(range(len(singles)), number)
        objects = [singles[k].objects[0] for k in chosen]
        prompt, scene = split.draw_text(random_composition, objects)
        for k in chosen:
            if k not in saved:
                saved[k] = split.save_picture(render(singles[k]))
        references = [saved[k] for k in chosen]
        target = split.save_picture(render(scene))
        split.add("personalisation", _composition_record(references, target, prompt, scene))


def _draw_question(split: Split, scene: Scene, kind: str) -> tuple[str, str]:
    """Draw a question of this kind, or of another if the scene makes it ambiguous."""
    while True:
        question_and_answer = random_question(split.rng, scene, kind)
        if question_and_answer is not None:
            return question_and_answer
        kind = split.rng.choice(QUESTIONS)


def write_questions(split: Split, count: int, pairs: list[Pair]) -> None:
    """Write questions about the pairs' pictures: two for a picture in training, one in the test.

    The test asks each kind equally often about one, two and three objects.
    """
    for i in range(count):
        picture, scene = pairs[i % len(pairs)]
        if split.is_test:
            shift = i // len(QUESTIONS)     # else one kind would always meet the same number
            kinds = [QUESTIONS[(i + shift) % len(QUESTIONS)]]
        else:
            kinds = split.rng.choices(list(QUESTION_WEIGHTS), QUESTION_WEIGHTS.values(), k=2)
        texts = []
        for kind in kinds:
            texts += _draw_question(split, scene, kind)
        texts[0] = "<image>\n" + texts[0]
        split.add("questions", {"image": [picture], "conversations": _conversation(*texts)})


# ---------------------------------------------------------------- the world

# Records of each kind per full caption. Each function takes (split, number of records, pairs).
SHARES = {
    write_partial_prompts: {"train": 0.8, "test": 0.6},
    write_edits: {"train": 1.3, "test": 0.6},
    write_edges: {"train": 0.3, "test": 0.6},
    write_depth: {"train": 0.15, "test": 0.6},
    write_poses: {"train": 0.15, "test": 0.6},
    write_compositions: {"train": 0.3, "test": 0.6},
    write_questions: {"train": 1.0, "test": 1.0},
    write_plans: {"train": 3.0, "test": 0.0},
}


def make_world(folder: Path, train: int, test: int, seed: int = 0) -> None:
    """Write train.jsonl, test.jsonl and their pictures into a folder.

    `train` and `test` are the numbers of full captions; SHARES gives the other records. Every
    record names its task. All pictures of test records, sources and targets, show `held_out`
    scenes. No picture of a training record shows one.
    """
    rng = random.Random(seed)
    for name, number in (("train", train), ("test", test)):
        split = Split(folder, name, rng)
        pairs = write_pairs(split, number)
        progress = tqdm(SHARES.items(), f"drawing {name} pictures", unit="task", leave=False)
        for write_records, shares in progress:
            write_records(split, round(number * shares[name] + 0.4), pairs)
        split.write()


def write_overview(folder: Path) -> Path:
    """Put the training pictures on one sheet, 16 in a row, without an incomplete last row."""
    files = sorted((folder / "images/train").glob("*.png"))
    pictures = [np.asarray(Image.open(file)) for file in files]
    full_rows = len(pictures) // 16
    rows = [np.concatenate(pictures[16 * i:16 * i + 16], axis=1) for i in range(full_rows)]
    path = folder / "overview.png"
    Image.fromarray(np.concatenate(rows)).save(path)
    return path


def main(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.exit(__doc__)
    folder = Path(arguments[0])
    make_world(folder, train=60, test=12)
    seen = set()
    for line in (folder / "train.jsonl").read_text().splitlines():
        task = json.loads(line)["task"]
        if task not in seen:
            print(line)
        seen.add(task)
    print("wrote", write_overview(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
