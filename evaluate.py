"""Exact scores on the shapes world: generated pictures are read back into scenes, texts are compared or parsed.

    python evaluate.py shapes --run runs/tiny       scores.json, report.html and sheets of samples, written into the run's folder

Every task that the run was trained on is scored on the held-out records of its world. What the scorer itself gets wrong on
rendered pictures, and what the autoencoder alone loses, stands beside the scores.
"""
import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import shapes
from checkpoint import read_json, write_atomically
from data import Example, load_image, parse_weights, read_jsonl, to_images, to_pictures
from report import Case, sheet, table_rows, write_report
from sample import Pipeline


class Output(NamedTuple):
    """What is made of a prompt or question and any pictures (64, 64, 3) uint8, and what is wanted: a picture or a text."""
    prompt: str
    sources: Sequence[np.ndarray]
    wanted: np.ndarray | str
    made: np.ndarray | str | None = None


# ---------------------------------------------------------------- scores: figures of one output, and their means

def judge_drawing(o: Output) -> dict:
    """objects: which wanted objects are there with shape, colour, size and place all right (by attribute: with that one right);
    exact: all of them are, nothing else and the right background; outline_error: mean absolute error (0 to 255) inside the
    objects' cells against a clean drawing of what the picture shows.
    """
    scene, (found, error) = shapes.parse_caption(o.prompt), shapes.read_picture(o.made)
    cells = {shown.cell: shown for shown in found.objects}
    right = np.array([[a == b for a, b in zip(wanted[:4], cells.get(wanted.cell, [None] * 4))] for wanted in scene.objects])
    size, color, shape, place = right.T                                                       # (objects,) each
    return {"objects": right.all(1), "exact": found.content() == scene.content(), "exact_by_count": len(scene.objects),
            "place": place, "shape": shape, "color": color, "size": size, "background": found.background == scene.background,
            "outline_error": error}


def judge_caption(o: Output) -> dict:
    """exact: it parses into exactly the scene; grammatical: it parses."""
    wanted, found = shapes.parse_caption(o.wanted), shapes.parse_caption(o.made)
    exact = found is not None and found.content() == wanted.content()
    return {"exact": exact, "exact_by_count": len(wanted.objects), "grammatical": found is not None}


def judge_answer(o: Output) -> dict:
    """exact: it is the expected text; without_places: as far as the places that some answers end with."""
    short, wanted = (text.split(" at the ")[0] for text in (o.made, o.wanted))
    return {"exact": o.made == o.wanted, "without_places": short == wanted, "by_kind": shapes.question_kind(o.prompt)}


def _read(picture: np.ndarray) -> shapes.Scene:
    return shapes.read_picture(picture)[0]


def _cells(picture: np.ndarray) -> np.ndarray:
    """(64, 64, 3) uint8 -> (9, 1200) float32, a row for each cell."""
    grid = picture[shapes.MARGIN:-shapes.MARGIN, shapes.MARGIN:-shapes.MARGIN].astype(np.float32)     # (60, 60, 3)
    return grid.reshape(3, shapes.CELL, 3, shapes.CELL, 3).swapaxes(1, 2).reshape(9, -1)


def judge_edit(o: Output) -> dict:
    """exact: the change is right and nothing else has changed; untouched: mean absolute difference (0 to 255) to the source
    in each of the cells that are the same in source and target.
    """
    made, source, wanted = map(_cells, (o.made, o.sources[0], o.wanted))
    return {"exact": _read(o.made).content() == _read(o.wanted).content(), "by_kind": shapes.edit_kind(o.prompt),
            "untouched": np.abs(made - source).mean(1)[(source == wanted).all(1)]}


def judge_edges(o: Output) -> dict:
    """iou: intersection over union of the pixels brighter than half."""
    made, wanted = (picture.mean(-1) > 127.5 for picture in (o.made, o.wanted))               # (64, 64)
    return {"iou": (made & wanted).sum() / (made | wanted).sum()}


def judge_depth(o: Output) -> dict:
    """Absolute errors of nearness (0 to 1), of all pixels and of those that are not background."""
    errors = abs(o.made.mean(-1) - o.wanted.mean(-1)) / 255                                   # (64, 64)
    return {"error": errors.ravel(), "error_on_objects": errors[o.wanted.any(-1)]}


def judge_pose(o: Output) -> dict:
    """exact: every arrow's cell and direction is right, and there are no others; arrows: which have both right; keypoint_error:
    distances in pixels of tails and tips, of the arrows that are found in the right cell.
    """
    made, wanted = ({arrow.cell: arrow for arrow in shapes.read_pose(picture)} for picture in (o.made, o.wanted))
    right = [cell in made and made[cell].shape == arrow.shape for cell, arrow in wanted.items()]
    offsets = [shapes.keypoints(made[c]) - shapes.keypoints(wanted[c]) for c in wanted.keys() & made.keys()]    # (2, 2) each
    return {"exact": all(right) and len(made) == len(wanted), "arrows": right,
            "keypoint_error": np.linalg.norm(np.reshape(offsets, (-1, 2)), axis=1)}


def judge_composition(o: Output) -> dict:
    """objects: which of the reference pictures' objects look right where the text wants them (the right ones first); exact: all
    of them, no others, and the right background.
    """
    made, count = _read(o.made), len(o.sources)
    right = shapes.right_objects(o.prompt, [_read(source).objects[0] for source in o.sources], made)
    exact = right == len(made.objects) == count and o.prompt.endswith(f" on a {made.background} background")
    return {"objects": np.arange(count) < right, "exact": exact, "by_references": count}


def _mean(values: Sequence) -> float | None:
    """The mean; None where there is nothing to take it of."""
    return float(np.mean(values)) if len(values) else None


def by_group(keys: Sequence, values: Sequence[float]) -> dict[str, float]:
    """The mean of the values that have the same key."""
    return {str(key): _mean([v for k, v in zip(keys, values) if k == key]) for key in sorted(set(keys))}


def score(judge: Callable[[Output], dict], outputs: Sequence[Output]) -> dict:
    """The mean of every figure, over all of its values; where "by_" is in the name, the share that is exact of each kind."""
    judged = [judge(o) for o in outputs]
    columns = {name: [figures[name] for figures in judged] for name in judged[0]}
    return {"n": len(judged)} | {name: by_group(values, columns["exact"]) if "by_" in name else _mean(np.hstack(values))
                                 for name, values in columns.items()}


def score_prompts(outputs: Sequence[Output]) -> dict:
    """Shares of pictures that satisfy prompts which tell a part; overall: mean of GenEval's six categories, all but negation."""
    kinds = [shapes.prompt_category(o.prompt) for o in outputs]
    found = by_group(kinds, [shapes.satisfies(_read(o.made), o.prompt) for o in outputs])
    shares = {name: found[name] for name in shapes.CATEGORIES if name in found}
    return {"categories": shares | {"overall": _mean([share for name, share in shares.items() if name != "negation"])},
            "categories_n": {name: kinds.count(name) for name in shares} | {"overall": len(kinds) - kinds.count("negation")}}


# ---------------------------------------------------------------- what is made of the held-out records

def load(e: Example, size: int) -> Output:
    """An example with its pictures, (size, size, 3), of which nothing is made yet."""
    *sources, picture = (to_pictures(load_image(path, size)[None])[0] for path in (*e.sources, e.image))
    return Output(e.question, [picture], e.caption) if e.prompt is None else Output(e.prompt, sources, picture)


def make(outputs: Sequence[Output], function: Callable[[list[Output], int], Sequence], chunk: int, label: str) -> list[Output]:
    """The outputs with what function(some of them, number of the first) makes; those with equally many sources come together."""
    made = {}
    for count in sorted({len(o.sources) for o in outputs}):
        group = [i for i, o in enumerate(outputs) if len(o.sources) == count]
        for start in tqdm(range(0, len(group), chunk), desc=label, unit="batch"):
            part = group[start:start + chunk]
            made |= zip(part, function([outputs[i] for i in part], start))
    return [o._replace(made=made[i]) for i, o in enumerate(outputs)]


def respond(pipeline: Pipeline, outputs: Sequence[Output], seed: int, chunk: int, label: str) -> list[Output]:
    """The outputs with what the model makes: pictures, or texts about the source picture where a text is wanted."""
    def some(part: list[Output], start: int) -> Sequence:
        prompts, images = [o.prompt for o in part], [to_images(p) for p in zip(*(o.sources for o in part))]   # each (b, 3, H, W)
        if isinstance(part[0].wanted, str):
            return pipeline.caption(images[0], seed, questions=prompts)
        return to_pictures(pipeline.edit(prompts, images, seed + start))
    return make(outputs, some, chunk, label)


@torch.no_grad()
def reconstruct(pipeline: Pipeline, outputs: Sequence[Output], chunk: int) -> list[Output]:
    """The outputs with what the autoencoder alone makes of the pictures that are wanted."""
    def some(part: list[Output], _: int) -> np.ndarray:
        return to_pictures(pipeline.vae.decode(pipeline.encode_images(to_images([o.wanted for o in part]))))
    return make(outputs, some, chunk, "autoencoder alone")


# ---------------------------------------------------------------- scores and samples of each task

# how a task is judged, and the figure of it that is given for the autoencoder alone
TASKS = {"edits": (judge_edit, ""), "edges": (judge_edges, "iou"), "depth": (judge_depth, "error"), "pose": (judge_pose, "exact"),
         "personalisation": (judge_composition, ""), "questions": (judge_answer, "")}
TURNS, CHAINS = 3, 102                              # edits one after another, and how many such chains at most


def score_pairs(pipeline: Pipeline, examples: Sequence[Example], seed: int = 0, chunk: int = 100,
                ceiling: bool = True) -> tuple[dict, dict]:
    """Scores and samples, as `score_shapes` has them, of text-to-image examples and of captions of their pictures, but of those
    whose prompt is not the caption and tells only a part. Without `ceiling` nothing else is done.
    """
    drawn = respond(pipeline, [load(e, pipeline.settings.image_size) for e in examples], seed, chunk, "text_to_image")
    full, partial = ([o for o, e in zip(drawn, examples) if (e.prompt == e.caption) == whole] for whole in (True, False))
    captions = respond(pipeline, [Output("", [o.wanted], o.prompt) for o in full], seed, chunk, "captions")
    scores = {"text_to_image": score(judge_drawing, full), "captions": score(judge_caption, captions)}
    if partial:
        scores["text_to_image"] |= score_prompts(partial)
    if ceiling:
        vae = score(judge_drawing, reconstruct(pipeline, full, chunk))
        scores["ceiling"] = {"scorer": score(judge_drawing, [o._replace(made=o.wanted) for o in full])["exact"],
                             "vae": vae["exact"], "vae_outline_error": vae["outline_error"]}
    return scores, {"text_to_image": [
        ("prompt, and the picture drawn", [Case([(o.made, o.prompt)]) for o in full]),
        ("picture, and the caption written", [Case([(o.sources[0], o.made)]) for o in captions]),
        ("prompt that tells only a part, and the picture drawn", [Case([(o.made, o.prompt)]) for o in partial])]}


def score_turns(pipeline: Pipeline, pictures: Sequence[np.ndarray], seed: int, chunk: int) -> tuple[dict, list[Case]]:
    """Scores and samples of pictures edited by new instructions one after another, each on the last result."""
    rng, exact, rows = random.Random(seed), {}, [[(picture, "source")] for picture in pictures]
    chains = [shapes.random_edits(rng, _read(picture), TURNS) for picture in pictures]
    for k in range(TURNS):
        asked = [Output(texts[k], [row[-1][0]], shapes.render(scenes[k])) for row, (texts, scenes) in zip(rows, chains)]
        edited = respond(pipeline, asked, seed + k * len(rows), chunk, f"turn {k + 1} of edits")
        exact[str(k + 1)] = score(judge_edit, edited)["exact"]
        rows = [[*row, (o.made, o.prompt)] for row, o in zip(rows, edited)]
    return {"n": len(rows), "exact": exact}, list(map(Case, rows))


def show(o: Output) -> Case:
    """Sources, result and what was wanted; of a question the answer, with the right one where it is wrong."""
    if isinstance(o.made, str):
        wrong = o.made != o.wanted
        return Case([(o.sources[0], o.prompt)], (o.made or "(nothing)") + f" (WRONG, expected: {o.wanted})" * wrong, wrong)
    sources = [(picture, f"picture {i}") for i, picture in enumerate(o.sources, 1)]
    return Case([*sources, (o.made, "result"), (o.wanted, "wanted")], o.prompt)


def score_task(pipeline: Pipeline, examples: Sequence[Example], seed: int, chunk: int) -> tuple[dict, dict]:
    """Scores and samples, as `score_shapes` has them, of the examples of one of TASKS."""
    task, (judge, figure) = examples[0].task, TASKS[examples[0].task]
    outputs = respond(pipeline, [load(e, pipeline.settings.image_size) for e in examples], seed, chunk, task)
    scores, samples = {task: score(judge, outputs)}, {task: [(task, list(map(show, outputs)))]}
    if figure:
        scores["ceiling"] = {f"vae_{task}_{figure}": score(judge, reconstruct(pipeline, outputs, chunk))[figure]}
    if task == "edits":
        first = {e.sources[0]: o.sources[0] for e, o in zip(examples, outputs)}
        scores[task]["multi_turn"], cases = score_turns(pipeline, list(first.values())[:CHAINS], seed, chunk)
        samples["multi_turn"] = [("edits one after another, each of the last result", cases)]
    return scores, samples


def score_shapes(pipeline: Pipeline, examples: Sequence[Example], seed: int = 0, chunk: int = 100) -> tuple[dict, dict]:
    """Scores of the held-out examples of any tasks, and samples {name: [(title, cases), ...]}: a sheet for each name."""
    scores, samples, ceiling = {}, {}, {}
    for task in ("text_to_image", *TASKS):
        if found := [e for e in examples if e.task == task]:
            part, shown = (score_task if task in TASKS else score_pairs)(pipeline, found, seed, chunk)
            ceiling |= part.pop("ceiling", {})
            scores, samples = scores | part, samples | shown
    return scores | {"ceiling": ceiling}, samples


# ---------------------------------------------------------------- a run

def held_out_examples(run: Path) -> list[Example]:
    """The held-out records of the tasks that a run was trained on. Raises ValueError where its data is not a shapes world."""
    values = read_json((run / "run.json").read_bytes(), str(run / "run.json"))
    world = Path(values.get("data") or run / "data")
    if not (world / "test.jsonl").is_file():
        raise ValueError(f"{world}: not a folder with test.jsonl; only runs on a shapes world (python shapes.py) are scored")
    weights = parse_weights(values.get("weights", "*=1"))
    return [e for e in read_jsonl(world / "test.jsonl") if weights.get(e.task, weights.get("*", 0.0))]


def read_seconds(run: Path) -> dict[str, float]:
    """How long each phase of a run took; empty where none has ended yet, as while a run with the parts of another is training."""
    file = run / "seconds.json"
    return json.loads(file.read_text()) if file.exists() else {}


def evaluate_run(run: Path, device: str | torch.device = "cpu") -> dict:
    """Score a shapes run's newest checkpoint; writes scores.json, samples.png and other tasks' samples_TASK.png, report.html."""
    start, seconds = time.time(), read_seconds(run)
    pipeline = Pipeline.from_run(run, device=device)
    scores, samples = score_shapes(pipeline, held_out_examples(run))
    seconds |= {"evaluation": round(time.time() - start, 1)}
    scores = {"seconds": {"total": round(sum(seconds.values()), 1)} | seconds} | scores
    write_atomically(run / "scores.json", lambda file: file.write_text(json.dumps(scores, indent=2) + "\n"))
    for name, sections in samples.items():
        image, file = sheet(sections), run / ("samples.png" if name == "text_to_image" else f"samples_{name}.png")
        write_atomically(file, lambda path: image.save(path, "PNG", optimize=True))
    write_report(run)
    return scores


def print_scores(scores: dict) -> None:
    print("\n".join(f"{what:46} {value}" for what, value in table_rows(scores)))


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("shapes",), help="what to evaluate")
    p.add_argument("--run", type=Path, default=Path("runs/tiny"), help="folder of a training run (default: %(default)s)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    a = p.parse_args(argv)
    try:
        print_scores(evaluate_run(a.run, a.device))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
