"""Exact scores on the shapes world: generated pictures are read back into scenes, texts are compared or parsed.

    python evaluate.py shapes --run runs/tiny       scores.json, report.html and sheets of samples, written into the run's folder

Every task that the run was trained on is scored on the held-out records of its world. What the scorer itself gets wrong on
rendered pictures, and what the autoencoder alone loses, stands beside the scores.
"""
import argparse
import base64
import functools
import html
import io
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import shapes
from checkpoint import read_json, write_atomically
from data import Example, load_image, parse_weights, read_jsonl, to_pictures
from sample import Pipeline
from shapes import Scene


class Drawing(NamedTuple):
    """A generated picture, what it was made from and what it should be; pictures are (64, 64, 3) uint8."""
    prompt: str
    sources: Sequence[np.ndarray]
    result: np.ndarray
    target: np.ndarray


# ---------------------------------------------------------------- scores

def _mean(values: Sequence) -> float | None:
    """The mean; None where there is nothing to take it of."""
    return float(np.mean(values)) if len(values) else None


def by_group(keys: Sequence, values: Sequence[float]) -> dict[str, float]:
    """The mean of the values that have the same key."""
    return {str(key): float(np.mean([v for k, v in zip(keys, values) if k == key])) for key in sorted(set(keys))}


def _read(picture: np.ndarray) -> Scene:
    return shapes.read_picture(picture)[0]


def compare_pictures(scenes: Sequence[Scene], pictures: Sequence[np.ndarray]) -> dict:
    """How well pictures (64, 64, 3) uint8 show the scenes that they should.

    objects: share of the wanted objects that are there with shape, colour, size and place all right; exact: share of pictures
    with all of them, nothing else and the right background; outline_error: mean absolute error (0 to 255) inside the objects'
    cells against a clean drawing of what the picture shows; by attribute: share of the wanted objects whose cell has an object
    with that attribute right.
    """
    read = [shapes.read_picture(picture) for picture in pictures]
    exact = [found.content() == scene.content() for scene, (found, _) in zip(scenes, read)]
    pairs = [(wanted, next((o for o in found.objects if o.cell == wanted.cell), None))
             for scene, (found, _) in zip(scenes, read) for wanted in scene.objects]
    return {"n": len(scenes),
            "objects": _mean([found is not None and found[:4] == wanted[:4] for wanted, found in pairs]),
            "exact": _mean(exact),
            "exact_by_count": by_group([len(scene.objects) for scene in scenes], exact),
            "place": _mean([found is not None for _, found in pairs])} | {
            name: _mean([found is not None and getattr(found, name) == getattr(wanted, name) for wanted, found in pairs])
            for name in ("shape", "color", "size")} | {
            "background": _mean([found.background == scene.background for scene, (found, _) in zip(scenes, read)]),
            "outline_error": _mean([error for _, error in read])}


def compare_prompts(prompts: Sequence[str], pictures: Sequence[np.ndarray]) -> dict:
    """Shares of pictures that satisfy prompts which tell a part; overall: mean of GenEval's six categories, all but negation."""
    kinds = [shapes.prompt_category(prompt) for prompt in prompts]
    shares = by_group(kinds, [shapes.satisfies(_read(picture), prompt) for prompt, picture in zip(prompts, pictures)])
    found = {name: shares[name] for name in shapes.CATEGORIES if name in shares}
    return {"categories": found | {"overall": _mean([share for name, share in found.items() if name != "negation"])},
            "categories_n": {name: kinds.count(name) for name in found} | {"overall": len(kinds) - kinds.count("negation")}}


def compare_captions(scenes: Sequence[Scene], captions: Sequence[str]) -> dict:
    """Share of captions that parse into exactly their scene."""
    parsed = [shapes.parse_caption(text) for text in captions]
    exact = [found is not None and found.content() == scene.content() for scene, found in zip(scenes, parsed)]
    return {"n": len(scenes), "exact": _mean(exact), "exact_by_count": by_group([len(s.objects) for s in scenes], exact),
            "grammatical": _mean([found is not None for found in parsed])}


def compare_answers(examples: Sequence[Example], answers: Sequence[str]) -> dict:
    """Share of answers that are the expected text."""
    exact = [answer == e.caption for e, answer in zip(examples, answers)]
    kinds = [shapes.question_kind(e.question) for e in examples]
    return {"n": len(examples), "exact": _mean(exact), "by_kind": by_group(kinds, exact)}


def _cells(picture: np.ndarray) -> np.ndarray:
    """(64, 64, 3) uint8 -> (9, 1200) float32, a row for each cell."""
    grid = picture[shapes.MARGIN:-shapes.MARGIN, shapes.MARGIN:-shapes.MARGIN].astype(np.float32)     # (60, 60, 3)
    return grid.reshape(3, shapes.CELL, 3, shapes.CELL, 3).swapaxes(1, 2).reshape(9, -1)


def compare_edits(drawings: Sequence[Drawing]) -> dict:
    """exact: the change is right and nothing else has changed; untouched: mean absolute difference (0 to 255) to the source
    in the cells that are the same in source and target.
    """
    exact, differences = [], []
    for d in drawings:
        exact.append(_read(d.result).content() == _read(d.target).content())
        result, source, target = _cells(d.result), _cells(d.sources[0]), _cells(d.target)
        differences += np.abs(result - source).mean(1)[(source == target).all(1)].tolist()
    kinds = [shapes.edit_kind(d.prompt) for d in drawings]
    return {"n": len(drawings), "exact": _mean(exact), "by_kind": by_group(kinds, exact), "untouched": _mean(differences)}


def _brightness(drawings: Sequence[Drawing]) -> tuple[np.ndarray, np.ndarray]:
    """Of results and targets, 0 to 1, (n, 64, 64) each."""
    return tuple(np.stack(pictures).mean(-1) / 255 for pictures in zip(*((d.result, d.target) for d in drawings)))


def compare_edges(drawings: Sequence[Drawing]) -> dict:
    """iou: intersection over union of the pixels brighter than half, mean over the pictures."""
    found, wanted = (values > 0.5 for values in _brightness(drawings))                        # (n, 64, 64)
    return {"n": len(drawings), "iou": _mean((found & wanted).sum((1, 2)) / (found | wanted).sum((1, 2)))}


def compare_depth(drawings: Sequence[Drawing]) -> dict:
    """Mean absolute errors of nearness (0 to 1), over all pixels and over those that are not background."""
    found, wanted = _brightness(drawings)                                                     # (n, 64, 64)
    errors = abs(found - wanted)                                                              # (n, 64, 64)
    return {"n": len(drawings), "error": _mean(errors), "error_on_objects": _mean(errors[wanted > 0])}


def compare_pose(drawings: Sequence[Drawing]) -> dict:
    """exact: share of maps with every arrow's cell and direction right, and no others; arrows: share of arrows with both right;
    keypoint_error: mean distance in pixels of tails and tips, of the arrows that are found in the right cell.
    """
    exact, arrows, distances = [], [], []
    for d in drawings:
        found, wanted = ({o.cell: o for o in shapes.read_pose(picture)} for picture in (d.result, d.target))
        right = [cell in found and found[cell].shape == o.shape for cell, o in wanted.items()]
        exact.append(all(right) and len(found) == len(wanted))
        arrows += right
        for cell in wanted.keys() & found.keys():
            distances += np.linalg.norm(shapes.keypoints(found[cell]) - shapes.keypoints(wanted[cell]), axis=1).tolist()
    return {"n": len(drawings), "exact": _mean(exact), "arrows": _mean(arrows), "keypoint_error": _mean(distances)}


def compare_compositions(drawings: Sequence[Drawing]) -> dict:
    """objects: share of the reference pictures' objects that look right where the text wants them; exact: all of them, no others,
    and the right background.
    """
    counts, right, exact = [len(d.sources) for d in drawings], [], []
    for d, count in zip(drawings, counts):
        found = _read(d.result)
        right.append(shapes.right_objects(d.prompt, [_read(source).objects[0] for source in d.sources], found))
        exact.append(right[-1] == len(found.objects) == count and d.prompt.endswith(f" on a {found.background} background"))
    return {"n": len(drawings), "objects": sum(right) / sum(counts), "exact": _mean(exact),
            "by_references": by_group(counts, exact)}


# ---------------------------------------------------------------- sheets of samples

TILE, COLUMNS, ROWS, SHOWN = 128, 6, 6, 12          # pixels of a picture; pictures in a row; rows and cases of a section


class Case(NamedTuple):
    """One thing that a sheet shows: pictures side by side, each with what stands under it, and what stands under all of them."""
    pictures: Sequence[tuple[np.ndarray, str]]
    text: str = ""
    wrong: bool = False


def _pad(picture: np.ndarray, bottom: int, right: int) -> np.ndarray:
    return np.pad(picture, ((0, bottom), (0, right), (0, 0)), constant_values=255)


def _join(parts: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Pictures (h, w, 3) below each other (axis 0) or side by side (axis 1), white where one is smaller."""
    size = max(part.shape[1 - axis] for part in parts)
    missing = [size - part.shape[1 - axis] for part in parts]
    return np.concatenate([_pad(part, m * axis, m * (1 - axis)) for part, m in zip(parts, missing)], axis)


def _text(text: str, width: int, size: int = 12, color: str = "black") -> np.ndarray:
    """Text broken into lines that fit, on white, (h, width, 3)."""
    font, lines = ImageFont.load_default(size=size), []
    for paragraph in text.splitlines():
        lines.append("")
        for word in paragraph.split():
            if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
    image = Image.new("RGB", (width, (size + 4) * len(lines)), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((0, (size + 4) * i), line, fill=color, font=font)
    return np.asarray(image)


def _case(case: Case) -> np.ndarray:
    """Its pictures, enlarged and framed, with all of its texts."""
    tiles = []
    for picture, text in case.pictures:
        large = np.asarray(Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.NEAREST))
        framed = np.pad(large, ((1, 1), (1, 1), (0, 0)), constant_values=128)
        tiles.append(_pad(_join([_pad(framed, 4, 0), _text(text, TILE + 2)], 0), 0, 10))
    row = _join(tiles, 1)
    return _pad(_join([row, _text(case.text, row.shape[1] - 10, color="crimson" if case.wrong else "black")], 0), 10, 0)


def sheet(sections: Sequence[tuple[str, Sequence[Case]]]) -> Image.Image:
    """Titles, each above its first cases in as many columns as fit."""
    parts = []
    for title, cases in sections:
        columns = max(1, COLUMNS // max(len(case.pictures) for case in cases))
        images = [_case(case) for case in cases[:min(SHOWN, ROWS * columns)]]
        parts.append(_pad(_text(title, COLUMNS * TILE, 16), 6, 0))
        parts += [_join(images[i:i + columns], 1) for i in range(0, len(images), columns)]
    return Image.fromarray(np.pad(_join(parts, 0), ((12, 2), (12, 2), (0, 0)), constant_values=255))


def _about(e: Example, text: str, wrong: bool = False) -> Case:
    """An example's picture with a text."""
    return Case([(np.asarray(Image.open(e.image).convert("RGB")), "")], text, wrong)


def drawing_cases(drawings: Sequence[Drawing]) -> list[Case]:
    """Source pictures, the result and what it should be."""
    return [Case([*((source, f"picture {i + 1}" if len(d.sources) > 1 else "source") for i, source in enumerate(d.sources)),
                  (d.result, "result"), (d.target, "wanted")], d.prompt) for d in drawings]


def turn_cases(turns: Sequence[Sequence[Drawing]]) -> list[Case]:
    """Source pictures, each with the results of its edits one after another."""
    return [Case([(chain[0].sources[0], "source"), *((d.result, d.prompt) for d in chain)]) for chain in zip(*turns)]


def pair_sections(examples: Sequence[Example], drawn: Sequence[np.ndarray],
                  captions: Sequence[str]) -> list[tuple[str, list[Case]]]:
    """Prompts with the pictures drawn of them, and pictures with the captions written of them."""
    full = [(e, picture) for e, picture in zip(examples, drawn) if e.prompt == e.caption][:SHOWN]
    partial = [(e, picture) for e, picture in zip(examples, drawn) if e.prompt != e.caption]
    sections = [("prompt, and the picture drawn", [Case([(d, "")], e.prompt) for e, d in full]),
                ("picture, and the caption written", [_about(e, text) for (e, _), text in zip(full, captions)]),
                ("prompt that tells only a part, and the picture drawn", [Case([(d, "")], e.prompt) for e, d in partial])]
    return [section for section in sections if section[1]]


def question_cases(examples: Sequence[Example], answers: Sequence[str]) -> list[Case]:
    """Pictures with questions and answers; a wrong answer is marked and the right one added."""
    return [_about(e, f"{e.question}\n{a or '(nothing)'}" + f"\nWRONG, expected: {e.caption}" * (a != e.caption), a != e.caption)
            for e, a in zip(examples, answers)]


# ---------------------------------------------------------------- what the model makes of the held-out records

def in_chunks(function: Callable[[slice], Sequence], n: int, size: int, label: str) -> list:
    """function(slice) over 0 .. n, `size` at a time, results joined."""
    return [x for i in tqdm(range(0, n, size), desc=label, unit="batch") for x in function(slice(i, i + size))]


def load_pictures(paths: Sequence[Path], size: int) -> list[np.ndarray]:
    """Pictures (size, size, 3) uint8."""
    return [to_pictures(load_image(path, size)[None])[0] for path in paths]


def to_images(pictures: Sequence[np.ndarray]) -> Tensor:
    """The inverse of `to_pictures`: (n, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1


def reconstruct(pipeline: Pipeline, pictures: Sequence[np.ndarray], chunk: int, label: str) -> list[np.ndarray]:
    """What the autoencoder alone leaves of pictures."""
    def rebuild(part: slice) -> np.ndarray:
        with torch.no_grad():
            return to_pictures(pipeline.vae.decode(pipeline.encode_images(to_images(pictures[part]))))
    return in_chunks(rebuild, len(pictures), chunk, f"autoencoder alone, {label}")


def draw(pipeline: Pipeline, prompts: Sequence[str], sources: Sequence[Sequence[np.ndarray]], seed: int, chunk: int,
         label: str) -> list[np.ndarray]:
    """A picture of each prompt and its source pictures, any number of them; those with equally many are drawn together."""
    drawn: dict[int, np.ndarray] = {}
    for count in sorted(set(map(len, sources))):
        group = [i for i, found in enumerate(sources) if len(found) == count]

        def some(part: slice) -> np.ndarray:
            texts, start = [prompts[i] for i in group[part]], seed + part.start
            images = [to_images(pictures) for pictures in zip(*(sources[i] for i in group[part]))]    # each (b, 3, H, W)
            return to_pictures(pipeline.edit(texts, images, start) if images else pipeline.draw(texts, start))
        drawn |= zip(group, in_chunks(some, len(group), chunk, f"drawing {label}" + f" of {count}" * (count > 1)))
    return [drawn[i] for i in range(len(prompts))]


def draw_examples(pipeline: Pipeline, examples: Sequence[Example], seed: int, chunk: int) -> list[Drawing]:
    """The results of one task's examples beside sources and targets."""
    prompts, size = [e.prompt for e in examples], pipeline.settings.image_size
    sources = [load_pictures(e.sources, size) for e in examples]
    results = draw(pipeline, prompts, sources, seed, chunk, examples[0].task)
    return list(map(Drawing, prompts, sources, results, load_pictures([e.image for e in examples], size)))


def draw_turns(pipeline: Pipeline, pictures: Sequence[np.ndarray], seed: int, chunk: int, turns: int = 3) -> list[list[Drawing]]:
    """Pictures edited by new instructions one after another, each on the last result; one list for each turn."""
    rng, drawings = random.Random(seed), []
    chains = [shapes.random_edits(rng, _read(picture), turns) for picture in pictures]
    for k in range(turns):
        prompts, targets = [texts[k] for texts, _ in chains], [shapes.render(scenes[k]) for _, scenes in chains]
        sources = [[picture] for picture in pictures]
        pictures = draw(pipeline, prompts, sources, seed + k * len(chains), chunk, f"turn {k + 1} of edits")
        drawings.append(list(map(Drawing, prompts, sources, pictures, targets)))
    return drawings


def write_texts(pipeline: Pipeline, examples: Sequence[Example], seed: int, chunk: int, label: str) -> list[str]:
    """What the model says about the examples' pictures: answers, or captions where nothing is asked."""
    def write(part: slice) -> list[str]:
        images = to_images(load_pictures([e.image for e in examples[part]], pipeline.settings.image_size))    # (b, 3, H, W)
        return pipeline.caption(images, seed, questions=[e.question for e in examples[part]])
    return in_chunks(write, len(examples), chunk, f"writing {label}")


def score_pairs(pipeline: Pipeline, examples: Sequence[Example], seed: int = 0, chunk: int = 100,
                ceiling: bool = True) -> tuple[dict, list[np.ndarray], list[str]]:
    """Scores of text-to-image examples, the picture drawn of each, and the captions written of the pictures of full captions.

    A prompt that is not its example's caption tells only a part. Without `ceiling` nothing else is done.
    """
    drawn = draw(pipeline, [e.prompt for e in examples], [()] * len(examples), seed, chunk, "text_to_image")
    full, partial = ([i for i, e in enumerate(examples) if (e.prompt == e.caption) == whole] for whole in (True, False))
    described = [examples[i] for i in full]
    scenes = [shapes.parse_caption(e.caption) for e in described]
    captions = write_texts(pipeline, described, seed, chunk, "captions")
    scores = {"text_to_image": compare_pictures(scenes, [drawn[i] for i in full]), "captions": compare_captions(scenes, captions)}
    if partial:
        scores["text_to_image"] |= compare_prompts([examples[i].prompt for i in partial], [drawn[i] for i in partial])
    if ceiling:
        pictures = load_pictures([e.image for e in described], pipeline.settings.image_size)
        vae = compare_pictures(scenes, reconstruct(pipeline, pictures, chunk, "pictures"))
        scores["ceiling"] = {"scorer": compare_pictures(scenes, pictures)["exact"], "vae": vae["exact"],
                             "vae_outline_error": vae["outline_error"]}
    return scores, drawn, captions


CHAINS = 102                                        # at most, of edits one after another
# the tasks with source pictures: how they are scored, and the figure that is given for the autoencoder alone
DRAWN = {"edits": (compare_edits, ""), "edges": (compare_edges, "iou"), "depth": (compare_depth, "error"),
         "pose": (compare_pose, "exact"), "personalisation": (compare_compositions, "")}


def score_drawn(pipeline: Pipeline, examples: Sequence[Example], seed: int, chunk: int) -> tuple[dict, dict, dict]:
    """Scores, ceiling and samples of the examples of one task with source pictures, as `score_shapes` has them."""
    task, (compare, figure) = examples[0].task, DRAWN[examples[0].task]
    drawings, ceiling = draw_examples(pipeline, examples, seed, chunk), {}
    scores, samples = compare(drawings), {task: [("source, result, and what was wanted", drawing_cases(drawings))]}
    if figure:
        rebuilt = reconstruct(pipeline, [d.target for d in drawings], chunk, task)
        ceiling[f"vae_{task}_{figure}"] = compare([d._replace(result=r) for d, r in zip(drawings, rebuilt)])[figure]
    if task == "edits":
        sources = list(dict.fromkeys(e.sources[0] for e in examples))[:CHAINS]
        turns = draw_turns(pipeline, load_pictures(sources, pipeline.settings.image_size), seed, chunk)
        exact = {str(k + 1): compare_edits(turn)["exact"] for k, turn in enumerate(turns)}
        scores["multi_turn"] = {"n": len(sources), "exact": exact}
        samples["multi_turn"] = [("source, and edits one after another, each of the last result", turn_cases(turns))]
    return scores, ceiling, samples


def score_shapes(pipeline: Pipeline, examples: Sequence[Example], seed: int = 0, chunk: int = 100) -> tuple[dict, dict]:
    """Scores of the held-out examples of any tasks, and samples {name: [(title, cases), ...]}: a sheet for each name."""
    tasks = {task: [e for e in examples if e.task == task] for task in ("text_to_image", *DRAWN, "questions")}
    scores, samples, ceiling = {}, {}, {}
    if pairs := tasks["text_to_image"]:
        scores, drawn, captions = score_pairs(pipeline, pairs, seed, chunk)
        samples["text_to_image"], ceiling = pair_sections(pairs, drawn, captions), scores.pop("ceiling")
    for task in DRAWN:
        if tasks[task]:
            scores[task], limit, shown = score_drawn(pipeline, tasks[task], seed, chunk)
            ceiling, samples = ceiling | limit, samples | shown
    if asked := tasks["questions"]:
        answers = write_texts(pipeline, asked, seed, chunk, "answers")
        scores["questions"] = compare_answers(asked, answers)
        samples["questions"] = [("question, and the answer written", question_cases(asked[:SHOWN], answers))]
    return scores | {"ceiling": ceiling}, samples


# ---------------------------------------------------------------- the report

def curve_svg(title: str, steps: Sequence[float], values: Sequence[float], width: int = 420, height: int = 200) -> str:
    """One curve as inline SVG, values on a logarithmic axis."""
    logs = np.log10(np.maximum(values, 1e-6))
    low, high = logs.min(), max(logs.max(), logs.min() + 1e-3)
    x = 50 + (width - 60) * np.array(steps) / max(steps)
    y = 20 + (height - 45) * (high - logs) / (high - low)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    return (f'<svg width="{width}" height="{height}" font-family="sans-serif" font-size="11">'
            f'<text x="50" y="12">{html.escape(title)}</text>'
            f'<polyline points="{points}" fill="none" stroke="steelblue" stroke-width="1.5"/>'
            f'<text x="2" y="26">{10 ** high:.3g}</text><text x="2" y="{height - 25}">{10 ** low:.3g}</text>'
            f'<text x="{width - 80}" y="{height - 6}">step {max(steps):.0f}</text></svg>')


LOSSES = ("loss", "flow_matching", "masked_token", "contrastive", "intrinsic")


def loss_curves(metrics: Sequence[dict]) -> str:
    """A curve of every loss, over all tasks ("flow_matching") and then of each ("edits.flow_matching"); a line may lack some."""
    names = dict.fromkeys(name for line in metrics for name in line if name.rpartition(".")[2] in LOSSES)
    points = {name: [(line["step"], line[name]) for line in metrics if name in line] for name in names}
    return "".join(curve_svg(name, *zip(*points[name])) for name in sorted(names, key=lambda name: "." in name))


def _figure(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _shares(shares: dict) -> str:
    return ", ".join(f"{name.replace('_', ' ')}: {_figure(value, 3)}" for name, value in shares.items())


def _categories(s: dict) -> str:
    return f"{_figure(s['overall'])}   ({_shares({name: share for name, share in s.items() if name != 'overall'})})"


# where the figures are in the scores, what they are, and how they are told
TABLE: tuple[tuple[str, str, Callable[[dict], str]], ...] = (
    ("text_to_image", "held-out scenes", lambda s: str(s["n"])),
    ("text_to_image", "generated objects all right", lambda s: _figure(s["objects"])),
    ("text_to_image", "  place, shape, colour, size", lambda s: _shares({x: s[x] for x in ("place", "shape", "color", "size")})),
    ("text_to_image", "generated scenes exact", lambda s: f"{_figure(s['exact'])}   (by objects {_shares(s['exact_by_count'])})"),
    ("text_to_image", "  outline error (0 to 255)", lambda s: _figure(s["outline_error"], 2)),
    ("text_to_image.categories", "partial prompts satisfied", _categories),
    ("captions", "captions exact", lambda s: _figure(s["exact"])),
    ("edits", "edits exact", lambda s: f"{_figure(s['exact'])}   ({_shares(s['by_kind'])})"),
    ("edits", "  change where nothing should (0 to 255)", lambda s: _figure(s["untouched"], 2)),
    ("edits.multi_turn", "  exact after turn", lambda s: _shares(s["exact"])),
    ("edges", "edges, intersection over union", lambda s: _figure(s["iou"])),
    ("depth", "depth error (0 to 1)", lambda s: f"{_figure(s['error'])}   (on objects {_figure(s['error_on_objects'])})"),
    ("pose", "pose maps exact", lambda s: f"{_figure(s['exact'])}   (arrows {_figure(s['arrows'])})"),
    ("pose", "  keypoints off by (pixels)", lambda s: _figure(s["keypoint_error"], 2)),
    ("personalisation", "compositions exact", lambda s: f"{_figure(s['exact'])}   (by pictures {_shares(s['by_references'])})"),
    ("personalisation", "  their objects all right", lambda s: _figure(s["objects"])),
    ("questions", "answers exact", lambda s: f"{_figure(s['exact'])}   ({_shares(s['by_kind'])})"),
    ("ceiling", "ceiling", _shares),
    ("seconds", "seconds", lambda s: ", ".join(f"{k} {v:.0f}" for k, v in s.items())))


def table_rows(scores: dict) -> list[tuple[str, str]]:
    """The scores as (what, value) for the screen and the report, without what was not scored."""
    found = {place: functools.reduce(lambda part, name: part.get(name, {}), place.split("."), scores) for place, _, _ in TABLE}
    return [(what, tell(found[place])) for place, what, tell in TABLE if found[place]]


def report_html(scores: dict, metrics: Sequence[dict], sheets: dict[str, Image.Image]) -> str:
    """A self-contained page: scores, loss curves, the sheets of samples."""
    rows = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in table_rows(scores))
    images = ""
    for name, image in sheets.items():
        png = io.BytesIO()
        image.save(png, "PNG", optimize=True)
        images += (f'<h2>Samples: {name.replace("_", " ")}</h2>'
                   f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">')
    return (f'<!doctype html><meta charset="utf-8"><title>UniAlignment on the shapes world</title>'
            f'<body style="font-family:sans-serif">'
            f'<h1>UniAlignment on the shapes world</h1><h2>Scores on held-out scenes</h2><table cellpadding="4">{rows}</table>'
            f'<h2>Training losses</h2>{loss_curves(metrics)}{images}</body>\n')


# ---------------------------------------------------------------- a run

def held_out_examples(run: Path) -> list[Example]:
    """The held-out records of the tasks that a run was trained on. Raises ValueError where its data is not a shapes world."""
    values = read_json((run / "run.json").read_bytes(), str(run / "run.json"))
    world = Path(values.get("data") or run / "data")
    if not (world / "test.jsonl").is_file():
        raise ValueError(f"{world}: not a folder with test.jsonl; only runs on a shapes world (python shapes.py) are scored")
    weights = parse_weights(values.get("weights", "*=1"))
    return [e for e in read_jsonl(world / "test.jsonl") if weights.get(e.task, weights.get("*", 0.0))]


def evaluate_run(run: Path, device: str | torch.device = "cpu") -> dict:
    """Score a shapes run's newest checkpoint on its held-out records; writes scores.json, report.html, samples.png and a
    samples_TASK.png for every other task there.
    """
    start = time.time()
    pipeline = Pipeline.from_run(run, device=device)
    scores, samples = score_shapes(pipeline, held_out_examples(run))
    seconds = json.loads((run / "seconds.json").read_text()) | {"evaluation": round(time.time() - start, 1)}
    scores = {"seconds": {"total": round(sum(seconds.values()), 1)} | seconds} | scores
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    sheets = {name: sheet(sections) for name, sections in samples.items()}
    for name, image in sheets.items():
        file = run / ("samples.png" if name == "text_to_image" else f"samples_{name}.png")
        write_atomically(file, lambda path: image.save(path, "PNG"))
    write_atomically(run / "scores.json", lambda file: file.write_text(json.dumps(scores, indent=2) + "\n"))
    write_atomically(run / "report.html", lambda file: file.write_text(report_html(scores, metrics, sheets)))
    return scores


def print_scores(scores: dict) -> None:
    print("\n".join(f"{what:40} {value}" for what, value in table_rows(scores)))


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
