"""Samples while a model trains: the averaged weights draw and caption a fixed handful of records.

Each sampling is a row of labelled pictures, samples-<step>.png. progress.png has all rows so far,
so that one look shows what the training has learned, and when. On a shapes world each sampling also
scores a few held-out records, as a line of scores.jsonl.
"""
import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from arguments import read_prompts
from checkpoint import note
from config import Parts, RunFiles, TrainConfig, parts_of
from data import Tasks, load_image, load_picture, to_pictures
from jobs import save_picture
from model import MMDiT
from records import Example, read_jsonl
from run_folder import Frozen, append, read_until
from sample import Pipeline

TILE = 128                                          # least side of a picture shown, in pixels
COLUMNS = 10                                        # cases in a row
FEW = 4                                             # records of a task that a sampling scores


# ---------------------------------------------------------------- labelled pictures

class Case(NamedTuple):
    """One example on a sheet.

    pictures: (h, w, 3) uint8, each with the label under it; text: stands under all of them; wrong:
    frames and text are red and it says so, None: not judged.
    """
    pictures: Sequence[tuple[np.ndarray, str]]
    text: str = ""
    wrong: bool | None = None


def join(pictures: Sequence[np.ndarray], axis: int, gap: int = 0) -> np.ndarray:
    """Place pictures (h, w, 3) below each other (axis 0) or side by side (axis 1).

    A white gap follows each picture; white also pads the smaller ones.
    """
    across = 1 - axis
    size = max(picture.shape[across] for picture in pictures)
    padded = []
    for picture in pictures:
        padding = [(0, 0), (0, 0), (0, 0)]
        padding[axis] = (0, gap)
        padding[across] = (0, size - picture.shape[across])
        padded.append(np.pad(picture, padding, constant_values=255))
    return np.concatenate(padded, axis)


def break_lines(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    """Break a text between words into lines of at most `width` pixels."""
    lines = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def text_picture(text: str, width: int, size: int = 12, color: str = "black") -> np.ndarray:
    """Write a text on white, (h, width, 3) uint8; the height follows from the number of lines."""
    font = ImageFont.load_default(size)
    lines = break_lines(text, font, width)
    line_height = size + 4
    picture = Image.new("RGB", (width, line_height * len(lines)), "white")
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        draw.text((0, line_height * i), line, color, font)
    return np.asarray(picture)


def case_picture(case: Case) -> np.ndarray:
    """Draw a case: its pictures, framed at a readable size, with labels and text, (h, w, 3)."""
    tiles, frame = [], "crimson" if case.wrong else "gray"
    for picture, label in case.pictures:
        width = picture.shape[1]
        side = min(max(TILE, width), 2 * TILE)
        method = Image.Resampling.NEAREST if width < side else Image.Resampling.LANCZOS
        resized = Image.fromarray(picture).resize((side, side), method)
        framed = np.asarray(ImageOps.expand(resized, 1, frame))
        tiles.append(join([framed, text_picture(label, side + 2)], 0, gap=4))
    text, color = (f"WRONG {case.text}", "crimson") if case.wrong else (case.text, "black")
    if not tiles:                                               # a text about a text
        return join([text_picture(text, 2 * TILE - 10, color=color)], 1, gap=10)
    row = join(tiles, 1, gap=10)
    return join([row, text_picture(text, row.shape[1] - 10, color=color)], 0)


# ---------------------------------------------------------------- what is sampled

class Request(NamedTuple):
    """A picture to draw, or a text to write about one."""
    prompt: str                         # of a picture to draw; a question; empty: to caption
    sources: tuple[Tensor, ...]         # (3, H, W) each, of an edit; the picture to write about
                                        # or none, where the text is about a text alone
    writes: bool
    before: tuple[tuple[str, str], ...] = ()        # earlier turns of a dialogue


def requests_of(e: Example, size: int, captioned: set[str]) -> list[Request]:
    """What an example asks for: its picture, its text, or both.

    Raises ValueError for a picture that cannot be read.
    """
    requests = []
    if e.prompt is not None:
        sources = tuple(load_image(path, size) for path in e.sources)               # (3, H, W)
        requests.append(Request(e.prompt, sources, writes=False))
    is_captioned = not e.sources and captioned & {"*", e.task}
    if e.caption and (e.question or is_captioned):
        images = tuple(load_image(path, size) for path in e.pictures)               # (3, H, W)
        requests.append(Request(e.question, images, True, e.before))
    return requests


def in_turns(groups: Sequence[Sequence]) -> Iterator:
    """The first element of each group, then the second ones, and so on."""
    for i in range(max(map(len, groups), default=0)):
        yield from (group[i] for group in groups if i < len(group))


def candidates(parts: Parts, dataset: Tasks) -> Iterator[Example]:
    """Records to sample from, the tasks in turn: held-out ones, else the first of the data."""
    tasks = list(dict.fromkeys(group.task for group in dataset.groups))
    if parts.test and parts.test.is_file():
        examples = read_jsonl(parts.test)
        yield from in_turns([[e for e in examples if e.task == task] for task in tasks])
        return
    first = [sorted(int(i) for group in dataset.groups if group.task == task
                    for i in group.indices[:COLUMNS])[:COLUMNS] for task in tasks]
    for i in in_turns(first):
        with contextlib.suppress(ValueError):       # a record that training skips, too
            yield dataset.records[i]


def read_requests(config: TrainConfig, parts: Parts, dataset: Tasks) -> list[Request]:
    """The fixed requests of a run: of --sample_prompts, else of held-out or the first records.

    Raises ValueError that names a file of --sample_prompts which cannot be used.
    """
    size, file, requests = config.sampling.image_size, Path(config.sample_prompts), []
    if not config.sample_prompts:
        for e in candidates(parts, dataset):
            with contextlib.suppress(ValueError):
                requests += requests_of(e, size, dataset.captioned)
            if len(requests) >= COLUMNS:
                break
    elif file.suffix == ".jsonl":
        for e in read_jsonl(file):
            requests += requests_of(e, size, {"*"})
    else:
        requests = [Request(prompt, (), writes=False) for prompt in read_prompts(file)]
    if config.sample_prompts and len(requests) > 2 * COLUMNS:
        note(f"--sample_prompts {file}: holds {len(requests)} samples, the first {2 * COLUMNS} "
             "are drawn")
    requests = requests[:2 * COLUMNS if config.sample_prompts else COLUMNS]
    return sorted(requests, key=lambda r: (r.writes, len(r.sources)))


# ---------------------------------------------------------------- one sampling

def respond(pipeline: Pipeline, requests: Sequence[Request]) -> list[Case]:
    """Draw or write what is asked for; request i has the seed i."""
    cases: dict[int, Case] = {}
    kinds = sorted({(r.writes, len(r.sources)) for r in requests})
    for kind in kinds:
        rows = [i for i, r in enumerate(requests) if (r.writes, len(r.sources)) == kind]
        prompts = [requests[i].prompt for i in rows]
        stacked = zip(*(requests[i].sources for i in rows))
        sources = [torch.stack(images) for images in stacked]                   # (B, 3, H, W)
        shown = [[(picture, "") for picture in to_pictures(images)] for images in sources]
        given = list(zip(*shown)) or [()] * len(rows)               # pictures of each request
        if requests[rows[0]].writes:
            before = [requests[i].before for i in rows]
            if sources:
                texts = pipeline.caption(sources[0], questions=prompts, before=before)
            else:                                               # a text about a text
                texts = pipeline.plan(prompts)
            for i, question, text, pictures in zip(rows, prompts, texts, given):
                start = question if pictures else f"{question}:"
                cases[i] = Case(pictures, f"{start} {text}".strip() or "(no text)")
            continue
        images = pipeline.edit(prompts, sources, rows)                          # (B, 3, H, W)
        for i, prompt, result, pictures in zip(rows, prompts, to_pictures(images), given):
            cases[i] = Case([*pictures, (result, "")], prompt)
    return [cases[i] for i in range(len(requests))]


def append_scores(run: Path, step: int, pipeline: Pipeline, sampling: int) -> None:
    """Score the next few held-out records of each task of a shapes world, into scores.jsonl.

    sampling: its number. Each takes other records, so that several together say more.
    """
    from experiments.evaluate import held_out_examples, score_shapes
    groups: dict[str, list[Example]] = {}
    for e in held_out_examples(run):
        groups.setdefault(e.task, []).append(e)
    chosen = [group[(sampling * FEW + i) % len(group)]
              for group in groups.values() for i in range(min(FEW, len(group)))]
    scores, _ = score_shapes(pipeline, chosen, ceiling=False)
    read_until(RunFiles(run).scored, step - 1, rewrite=True)    # no later ones, from before a kill
    append(RunFiles(run).scored, json.dumps({"step": step} | scores) + "\n")


def write_samples(run: Path, step: int, frozen: Frozen, average: MMDiT, config: TrainConfig,
                  requests: Sequence[Request]) -> None:
    """Sample the averaged weights into samples-<step>.png, and add the row to progress.png.

    On a shapes world, also score a few records.
    """
    files, device = RunFiles(run), average.pos_embed.device
    pipeline = Pipeline(*frozen, average, config.sampling, str(run))
    half = device.type == "cuda" and config.autocast
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        cases = respond(pipeline, requests)
        test = parts_of(config, run).test
        if test and test.is_file():
            append_scores(run, step, pipeline, step // config.sample_every)
    row = join([case_picture(case) for case in cases], 1)                       # (h, w, 3)
    save_picture(join([text_picture(f"step {step}", 2 * TILE, 16), row], 0, gap=4),
                 files.samples_at(step))
    rows = [np.array(load_picture(file)) for file in files.sampled_until(step)]
    save_picture(join(rows, 0, gap=8), files.progress)
