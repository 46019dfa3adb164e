"""Exact scores on the shapes world: pictures are read back into scenes, texts compared or parsed.

    python -m experiments.evaluate --run runs/tiny

Every task that the run was trained on is scored on the held-out records of its world. Two ceilings
stand beside the scores: those of rendered pictures, which show the errors of the scorer, and those
of pictures that only the autoencoder has changed. The run's folder receives scores.json,
report.html and sheets of samples.
"""
import argparse
import collections
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import write_atomically
from config import RunFiles, parts_of, read_config
from data import (Example, load_image, parse_weights, read_jsonl, to_images, to_pictures,
                  weight_of)
from experiments import language, world
from experiments.report import (SHOWN, Case, sheet, standard_error, table_rows, write_cases,
                                write_report)
from experiments.world import Object, Scene
from film import write_film
from run_folder import read_seconds
from sample import Pipeline, film_frames, watched


class Trial(NamedTuple):
    """A prompt or question with its source pictures, the target, and the result of the model.

    Pictures are (64, 64, 3) uint8. Target and result are both pictures or both texts.
    """
    prompt: str
    sources: Sequence[np.ndarray]
    target: np.ndarray | str
    result: np.ndarray | str | None = None


# ---------------------------------------------------------------- figures of one trial

def scene_of(picture: np.ndarray) -> Scene:
    scene, _ = world.read_picture(picture)
    return scene


def matching_attributes(wanted: Object, shown: Object | None) -> list[bool]:
    """Whether objects share size, colour, shape and cell, in this order; None shares nothing."""
    if shown is None:
        return [False] * 4
    return [wanted.size == shown.size, wanted.color == shown.color, wanted.shape == shown.shape,
            wanted.cell == shown.cell]


def judge_drawing(trial: Trial) -> dict:
    """Compare the scene of a picture with its full prompt.

    objects: which wanted objects are drawn with the right shape, colour, size and place
    place, shape, color, size: which wanted objects are drawn with this attribute right
    exact: all objects are right, there are no others, and the background is right
    outline_error: mean absolute error (0 to 255) to a clean rendering of the scene that the picture
        shows, inside the cells of its objects
    """
    target = language.parse_caption(trial.prompt)
    scene, outline_error = world.read_picture(trial.result)
    shown_in = {shown.cell: shown for shown in scene.objects}
    pairs = [(wanted, shown_in.get(wanted.cell)) for wanted in target.objects]
    matches = np.array([matching_attributes(*pair) for pair in pairs])          # (objects, 4)
    size, color, shape, place = matches.T                                       # (objects,) each
    return {
        "objects": matches.all(axis=1),
        "exact": scene.content() == target.content(),
        "exact_by_count": len(target.objects),
        "place": place,
        "shape": shape,
        "color": color,
        "size": size,
        "background": scene.background == target.background,
        "outline_error": outline_error,
    }


def judge_caption(trial: Trial) -> dict:
    """Compare the scenes of two captions.

    grammatical: the caption parses; exact: into exactly the target's scene
    """
    target = language.parse_caption(trial.target)
    scene = language.parse_caption(trial.result)
    grammatical = scene is not None
    return {
        "exact": grammatical and scene.content() == target.content(),
        "exact_by_count": len(target.objects),
        "grammatical": grammatical,
    }


def judge_answer(trial: Trial) -> dict:
    """Compare two answers. without_places: ignore the places that some answers end with."""
    short_target = trial.target.split(" at the ")[0]
    short_result = trial.result.split(" at the ")[0]
    return {
        "exact": trial.result == trial.target,
        "without_places": short_result == short_target,
        "by_kind": language.question_kind(trial.prompt),
    }


def split_cells(picture: np.ndarray) -> np.ndarray:
    """Cut a picture (64, 64, 3) into its cells, (9, 1200) float32."""
    inside = slice(world.MARGIN, -world.MARGIN)
    grid = picture[inside, inside].astype(np.float32)                           # (60, 60, 3)
    cells = grid.reshape(3, world.CELL, 3, world.CELL, 3).swapaxes(1, 2)        # (3, 3, 20, 20, 3)
    return cells.reshape(9, -1)


def judge_edit(trial: Trial) -> dict:
    """Compare the scene of an edited picture with the target's.

    exact: the change is right and nothing else has changed
    untouched: mean absolute difference (0 to 255) to the source, in each cell that the edit leaves
    """
    source, target, result = map(split_cells, (trial.sources[0], trial.target, trial.result))
    untouched = (source == target).all(axis=1)                                  # (9,)
    differences = np.abs(result - source).mean(axis=1)                          # (9,)
    return {
        "exact": scene_of(trial.result).content() == scene_of(trial.target).content(),
        "by_kind": language.edit_kind(trial.prompt),
        "untouched": differences[untouched],
    }


def judge_edges(trial: Trial) -> dict:
    """Compare two edge maps. iou: intersection over union of the pixels brighter than half."""
    target = trial.target.mean(axis=-1) > 127.5                                 # (64, 64)
    result = trial.result.mean(axis=-1) > 127.5                                 # (64, 64)
    return {"iou": (result & target).sum() / (result | target).sum()}


def judge_depth(trial: Trial) -> dict:
    """Compare two depth maps: absolute error of nearness (0 to 1), everywhere and on objects."""
    difference = trial.result.mean(axis=-1) - trial.target.mean(axis=-1)        # (64, 64)
    errors = np.abs(difference) / 255
    on_objects = trial.target.any(axis=-1)                                      # (64, 64)
    return {"error": errors.ravel(), "error_on_objects": errors[on_objects]}


def judge_pose(trial: Trial) -> dict:
    """Compare the arrows of two pose maps.

    arrows: which arrows have cell and direction right; exact: all have, and there are no others
    keypoint_error: distance in pixels of tails and tips, for arrows drawn in the right cell
    """
    target = {arrow.cell: arrow for arrow in world.read_pose(trial.target)}
    result = {arrow.cell: arrow for arrow in world.read_pose(trial.result)}
    right = [cell in result and result[cell].shape == arrow.shape for cell, arrow in target.items()]
    offsets = [
        world.keypoints(result[cell]) - world.keypoints(target[cell])           # (2, 2)
        for cell in target.keys() & result.keys()]
    return {
        "exact": all(right) and len(result) == len(target),
        "arrows": right,
        "keypoint_error": np.linalg.norm(np.reshape(offsets, (-1, 2)), axis=1),
    }


def judge_composition(trial: Trial) -> dict:
    """Compare a composition with its reference pictures and its text.

    objects: how many references' objects look right in the right place, as that many true values
    exact: all of them, there are no other objects, and the background is right
    """
    references = [scene_of(source).objects[0] for source in trial.sources]
    scene = scene_of(trial.result)
    right = language.right_objects(trial.prompt, references, scene)
    right_background = trial.prompt.endswith(f" on a {scene.background} background")
    return {
        "objects": np.arange(len(references)) < right,
        "exact": right == len(scene.objects) == len(references) and right_background,
        "by_references": len(references),
    }


def is_wrong(judge: Callable[[Trial], dict], trial: Trial) -> bool | None:
    """Whether a result is not exact; None if its judge does not say."""
    exact = judge(trial).get("exact")
    return None if exact is None else not exact


# ---------------------------------------------------------------- means over many trials

def mean(values: Sequence) -> float | None:
    return float(np.mean(values)) if len(values) else None


def by_group(keys: Sequence, values: Sequence[float]) -> dict[str, float]:
    """Average the values of each key; the keys come out sorted."""
    groups = {}
    for key, value in zip(keys, values):
        groups.setdefault(key, []).append(value)
    return {str(key): mean(groups[key]) for key in sorted(groups)}


def score(judge: Callable[[Trial], dict], trials: Sequence[Trial]) -> dict:
    """Average each figure of a judge over all of its values.

    A name with "by_" holds the group of a trial: its score is the share of "exact" in each group.
    """
    judgements = [judge(trial) for trial in trials]
    scores = {"n": len(judgements)}
    for name in judgements[0]:
        values = [figures[name] for figures in judgements]
        if "by_" in name:
            scores[name] = by_group(values, [figures["exact"] for figures in judgements])
        else:
            scores[name] = mean(np.hstack(values))
    return scores


def score_prompts(trials: Sequence[Trial]) -> dict:
    """Share of partial prompts that their pictures satisfy, in each category and overall.

    The categories are GenEval's and negation; "overall" is the mean of GenEval's. "strict": no
    other object may be there; "geneval": others may, as GenEval judges.
    """
    categories = [language.prompt_category(trial.prompt) for trial in trials]
    scenes = [scene_of(trial.result) for trial in trials]
    scores = {}
    for rule in ("strict", "geneval"):
        satisfied = [language.satisfies(scene, trial.prompt, strict=rule == "strict")
                     for scene, trial in zip(scenes, trials)]
        share_of = by_group(categories, satisfied)
        scores[rule] = {name: share_of[name] for name in language.CATEGORIES if name in share_of}
        geneval = [share for name, share in scores[rule].items() if name != "negation"]
        scores[rule]["overall"] = mean(geneval)
    return scores


def count_prompts(prompts: Sequence[str]) -> dict[str, int]:
    """The number of partial prompts of each category; "overall" leaves negation out."""
    counts = collections.Counter(map(language.prompt_category, prompts))
    named = {name: counts[name] for name in language.CATEGORIES if counts[name]}
    return named | {"overall": len(prompts) - counts["negation"]}


# ---------------------------------------------------------------- results for the held-out records

def load(example: Example, size: int) -> Trial:
    """Load the pictures of an example, (size, size, 3) uint8, as a trial without a result."""
    if example.image is None:
        return Trial(example.question, [], example.caption)
    paths = (*example.sources, example.image)
    *sources, picture = [to_pictures(load_image(path, size)[None])[0] for path in paths]
    if example.prompt is None:
        return Trial(example.question, [picture], example.caption)
    return Trial(example.prompt, sources, picture)


def fill(trials: Sequence[Trial], respond_to: Callable[[list[Trial], int], Sequence],
         chunk: int, label: str) -> list[Trial]:
    """Fill in the results in batches of at most `chunk` trials.

    A batch has trials with equally many sources. respond_to(batch, start) returns their results;
    start counts the trials before the batch that have as many sources.
    """
    results = {}
    for count in sorted({len(trial.sources) for trial in trials}):
        group = [i for i, trial in enumerate(trials) if len(trial.sources) == count]
        starts = range(0, len(group), chunk)
        for start in tqdm(starts, desc=label, unit="batch", disable=len(starts) == 1):
            indices = group[start:start + chunk]
            batch = [trials[i] for i in indices]
            results.update(zip(indices, respond_to(batch, start)))
    return [trial._replace(result=results[i]) for i, trial in enumerate(trials)]


def respond(pipeline: Pipeline, trials: Sequence[Trial], seed: int, chunk: int,
            label: str) -> list[Trial]:
    """Fill in the results of the model: texts about the source where the target is a text.

    A text without a source is a plan of its prompt.
    """
    def respond_to(batch: list[Trial], start: int) -> Sequence:
        prompts = [trial.prompt for trial in batch]
        sources = zip(*(trial.sources for trial in batch))      # all first sources, all second, ...
        images = [to_images(pictures) for pictures in sources]                  # (b, 3, H, W) each
        if not isinstance(batch[0].target, str):
            return to_pictures(pipeline.edit(prompts, images, seed + start))
        if not images:
            return pipeline.plan(prompts, seed + start)
        return pipeline.caption(images[0], seed, questions=prompts)
    return fill(trials, respond_to, chunk, label)


@torch.no_grad()
def reconstruct(pipeline: Pipeline, trials: Sequence[Trial], chunk: int) -> list[Trial]:
    """Fill in the targets as the autoencoder alone reproduces them."""
    def respond_to(batch: list[Trial], start: int) -> np.ndarray:
        images = to_images([trial.target for trial in batch])                   # (b, 3, H, W)
        return to_pictures(pipeline.vae.decode(pipeline.encode_images(images)))
    return fill(trials, respond_to, chunk, "autoencoder alone")


# ---------------------------------------------------------------- scores and samples of each task

TASKS = {
    "edits": judge_edit,
    "edges": judge_edges,
    "depth": judge_depth,
    "pose": judge_pose,
    "personalisation": judge_composition,
    "questions": judge_answer,
}
CEILINGS = {"edges": "iou", "depth": "error", "pose": "exact"}  # figure given for the autoencoder
TURNS = 3                                                       # edits one after another
CHAINS = 306                                                    # most pictures edited in turns
SDE_STEPS = 50                                                  # of partial prompts, see LOG.md


def score_ceiling(pipeline: Pipeline, trials: Sequence[Trial], chunk: int) -> dict:
    """Score the target pictures themselves, and as the autoencoder alone reproduces them."""
    perfect = [trial._replace(result=trial.target) for trial in trials]
    autoencoder = score(judge_drawing, reconstruct(pipeline, trials, chunk))
    return {
        "scorer": score(judge_drawing, perfect)["exact"],
        "vae": autoencoder["exact"],
        "vae_outline_error": autoencoder["outline_error"],
    }


def score_pairs(pipeline: Pipeline, examples: Sequence[Example], seed: int = 0, chunk: int = 100,
                ceiling: bool = True) -> tuple[dict, dict]:
    """Score text-to-image examples, and captions of their pictures.

    ceiling=False leaves out the ceilings. Returns scores and samples as `score_shapes`.
    """
    trials = [load(example, pipeline.settings.image_size) for example in examples]
    drawn = respond(pipeline, trials, seed, chunk, "text_to_image")
    to_describe = [Trial("", [trial.target], trial.prompt) for trial in drawn]
    described = respond(pipeline, to_describe, seed, chunk, "captions")

    scores = {
        "text_to_image": score(judge_drawing, drawn),
        "captions": score(judge_caption, described),
    }
    if ceiling:
        scores["ceiling"] = score_ceiling(pipeline, drawn, chunk)

    samples = [
        ("prompt, and the picture drawn",
         [Case([(t.result, t.prompt)], "", is_wrong(judge_drawing, t)) for t in drawn[:SHOWN]]),
        ("picture, and the caption written",
         [Case([(t.sources[0], t.result)], "", is_wrong(judge_caption, t))
          for t in described[:SHOWN]]),
    ]
    return scores, {"text_to_image": samples}


def show_partial(trial: Trial, label: str) -> Case:
    """Show a picture of a partial prompt; wrong unless it is strictly satisfied."""
    wrong = not language.satisfies(scene_of(trial.result), trial.prompt)
    return Case([(trial.result, label)], "", wrong)


def score_partial(pipeline: Pipeline, examples: Sequence[Example], seed: int, chunk: int,
                  ceiling: bool) -> tuple[dict, dict]:
    """Score partial prompts: of "partial" drawn as they are, of "plan" planned and then drawn.

    Those drawn as they are come twice: with the run's sampling, and with new noise in every step.
    Returns scores and samples as `score_shapes`.
    """
    size = pipeline.settings.image_size
    to_draw = [load(e, size) for e in examples if e.task == "partial"]
    to_plan = [load(e, size) for e in examples if e.task == "plan"]
    prompts = [trial.prompt for trial in to_draw or to_plan]
    scores, sections = {"n": len(prompts), "categories_n": count_prompts(prompts)}, []
    if to_draw:
        direct = respond(pipeline, to_draw, seed, chunk, "partial")
        scores["direct"] = score_prompts(direct)
        settings = pipeline.settings
        pipeline.settings = replace(settings, solver="sde", steps=SDE_STEPS)
        scores["stochastic"] = score_prompts(respond(pipeline, to_draw, seed, chunk, "sde"))
        pipeline.settings = settings
        sections.append(("prompt that leaves most open, drawn as it is",
                         [show_partial(trial, trial.prompt) for trial in direct[:SHOWN]]))
    if to_plan:
        plans = [trial.result for trial in respond(pipeline, to_plan, seed, chunk, "plans")]
        empty = np.zeros((size, size, 3), np.uint8)             # no picture is wanted, but any
        drawn = respond(pipeline, [Trial(text, [], empty) for text in plans], seed, chunk,
                        "planned")
        planned = [t._replace(prompt=p.prompt) for t, p in zip(drawn, to_plan)]
        parsed = [language.parse_caption(text) is not None for text in plans]
        scores["planned"] = score_prompts(planned) | {
            "different": len(set(plans)) / len(plans), "parsed": mean(parsed)}
        sections.append(("the same after a plan, the model's own caption of it",
                         [show_partial(trial, f"{trial.prompt}: {text}")
                          for trial, text in zip(planned[:SHOWN], plans)]))
    return {"partial": scores}, {"partial": sections}


def pictures_to_edit(examples: Sequence[Example], size: int) -> list[np.ndarray]:
    """Load the sources of edits, then the pictures of full captions: CHAINS at most, each once."""
    sources = [e.sources[0] for e in examples if e.task == "edits"]
    pairs = [e.image for e in examples if e.task == "text_to_image"]
    paths = list(dict.fromkeys([*sources, *pairs]))[:CHAINS]
    return [to_pictures(load_image(path, size)[None])[0] for path in paths]


def score_turns(pipeline: Pipeline, pictures: Sequence[np.ndarray], seed: int,
                chunk: int) -> tuple[dict, list[Case]]:
    """Edit pictures in turns, each time the last result by a new instruction; score every turn.

    exact, standard_error: for each turn; the latter of a share of n independent chains.
    """
    rng = random.Random(seed)
    chains = [language.random_edits(rng, scene_of(picture), TURNS) for picture in pictures]
    exact = {}
    latest, edited = list(pictures), []
    rows = [[(picture, "source")] for picture in pictures]
    for turn in range(TURNS):
        trials = [
            Trial(texts[turn], [picture], world.render(scenes[turn]))
            for picture, (texts, scenes) in zip(latest, chains)]
        label = f"turn {turn + 1} of edits"
        edited = respond(pipeline, trials, seed + turn * len(trials), chunk, label)
        exact[str(turn + 1)] = score(judge_edit, edited)["exact"]
        latest = [trial.result for trial in edited]
        for row, trial in zip(rows, edited):
            row.append((trial.result, trial.prompt))
    errors = {turn: standard_error(share, len(pictures)) for turn, share in exact.items()}
    cases = [Case(row, "", is_wrong(judge_edit, trial))
             for row, trial in zip(rows[:SHOWN], edited)]
    return {"n": len(pictures), "exact": exact, "standard_error": errors}, cases


def show(trial: Trial, wrong: bool | None = None) -> Case:
    """Show sources, result and target; for a question, the answer, and the right one if wrong."""
    if isinstance(trial.result, str):
        text = trial.result or "(nothing)"
        if wrong:
            text += f" (expected: {trial.target})"
        return Case([(trial.sources[0], trial.prompt)], text, wrong)
    sources = [(picture, f"picture {i}") for i, picture in enumerate(trial.sources, start=1)]
    return Case([*sources, (trial.result, "result"), (trial.target, "wanted")], trial.prompt, wrong)


def score_task(pipeline: Pipeline, examples: Sequence[Example], seed: int, chunk: int,
               ceiling: bool) -> tuple[dict, dict]:
    """Score examples of one of TASKS. Returns scores and samples as `score_shapes`."""
    task = examples[0].task
    judge = TASKS[task]
    trials = [load(example, pipeline.settings.image_size) for example in examples]
    trials = respond(pipeline, trials, seed, chunk, task)
    scores = {task: score(judge, trials)}
    cases = [show(trial, is_wrong(judge, trial)) for trial in trials[:SHOWN]]
    samples = {task: [(task, cases)]}
    if ceiling and task in CEILINGS:
        figure = CEILINGS[task]
        autoencoder = score(judge, reconstruct(pipeline, trials, chunk))
        scores["ceiling"] = {f"vae_{task}_{figure}": autoencoder[figure]}
    return scores, samples


def score_shapes(pipeline: Pipeline, examples: Sequence[Example], seed: int = 0,
                 chunk: int = 100, ceiling: bool = True) -> tuple[dict, dict]:
    """Score held-out examples of any tasks.

    ceiling: also what the autoencoder alone would reach. Returns the scores, and samples
    {name: [(title, first cases), ...]}, one sheet for each name.
    """
    scores, samples, ceilings = {}, {}, {}
    scorers = {"text_to_image": score_pairs, "partial": score_partial}
    for task in (*scorers, *TASKS):
        tasks = ("partial", "plan") if task == "partial" else (task,)
        chosen = [example for example in examples if example.task in tasks]
        if not chosen:
            continue
        score_examples = scorers.get(task, score_task)
        task_scores, task_samples = score_examples(pipeline, chosen, seed, chunk, ceiling)
        ceilings |= task_scores.pop("ceiling", {})
        scores |= task_scores
        samples |= task_samples
        if task == "edits":
            pictures = pictures_to_edit(examples, pipeline.settings.image_size)
            scores[task]["multi_turn"], cases = score_turns(pipeline, pictures, seed, chunk)
            samples["multi_turn"] = [("edits one after another, each of the last result", cases)]
    return scores | {"ceiling": ceilings}, samples


# ---------------------------------------------------------------- a run

def held_out_examples(run: Path) -> list[Example]:
    """Read the held-out records of the tasks that a run was trained on.

    Raises ValueError where the data of the run is not a shapes world.
    """
    files = RunFiles(run)
    config = read_config(files.config)
    test = parts_of(config, run).test
    if test is None or not test.is_file():
        raise ValueError(f"{config.data or files.world}: not a folder with test.jsonl; only runs "
                         "on a shapes world (python -m experiments.dataset) are scored")
    weights = parse_weights(config.weights)
    return [example for example in read_jsonl(test) if weight_of(weights, example.task)]


def make_films(pipeline: Pipeline, run: Path, prompt: str) -> None:
    """Film how the model draws a prompt and describes the result: film-image.gif, film-text.gif."""
    states = watched(pipeline)
    image = pipeline.draw([prompt])                                             # (1, 3, H, W)
    films = {"image": (prompt, list(film_frames(pipeline, states, [])))}
    states = watched(pipeline)
    [text] = pipeline.caption(image)
    films["text"] = text, list(film_frames(pipeline, states, to_pictures(image)))
    pipeline.watch = None
    for name, (title, frames) in films.items():
        write_film(RunFiles(run).film(name), title, frames, overwrite=True)


def evaluate_run(run: Path, device: str | torch.device = "cpu") -> dict:
    """Score the newest checkpoint of a run; write scores.json, sheets of samples, report.html."""
    start = time.time()
    files = RunFiles(run)
    seconds = read_seconds(run)
    pipeline = Pipeline.from_run(run, device=device)
    examples = held_out_examples(run)
    scores, samples = score_shapes(pipeline, examples)

    seconds["evaluation"] = round(time.time() - start, 1)
    total = round(sum(seconds.values()), 1)
    scores = {"seconds": {"total": total} | seconds} | scores
    text = json.dumps(scores, indent=2) + "\n"
    write_atomically(files.scores, lambda file: file.write_text(text))
    for name, sections in samples.items():
        picture = sheet(sections)
        file = files.samples("" if name == "text_to_image" else name)
        write_atomically(file, lambda path: picture.save(path, "PNG", optimize=True))
    write_cases(run, samples)
    if "text_to_image" in samples:
        captions = [e.caption for e in examples if e.task == "text_to_image"]
        make_films(pipeline, run, captions[-1])                 # the last one has three objects
    write_report(run)
    return scores


def print_scores(scores: dict) -> None:
    for title, value in table_rows(scores):
        print(f"{title:46} {value}")


def print_next_steps(run: Path) -> None:
    """Print where the report of a run is, and two commands to try."""
    files = RunFiles(run)
    prompt = ("a large red circle at the top left and a small blue square at the center "
              "on a gray background")
    world_folder = parts_of(read_config(files.config), run).data[0].parent
    picture = world_folder / "images" / "test" / "000002.png"
    print(f"\nthe report: {files.report}    the samples: {files.samples()}    try next:")
    print(f'  python sample.py --run {run} "{prompt}"')
    print(f"  python sample.py --run {run} --describe {picture}")


# ---------------------------------------------------------------- command line

def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        prog="python -m experiments.evaluate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, default=Path("runs/tiny"),
                   help="folder of a training run (default: %(default)s)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="device of the models (default: %(default)s)")
    arguments = p.parse_args(argv)
    try:
        print_scores(evaluate_run(arguments.run, arguments.device))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
