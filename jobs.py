"""Jobs: pictures to draw into named files, where what is already there is not drawn again.

A list of jobs is cut into fixed batches. A batch is drawn whole if one of its files is missing, and
only the missing files are written. So a run that was interrupted, or divided among ranks, writes
the same bytes as one that was not.
"""
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from checkpoint import read_json, write_atomically
from data import load_image, load_picture, to_images, to_pictures
from embeddings import Texts
from records import find_file, origin_of, read_lines


class Job(NamedTuple):
    """A picture to draw."""
    path: Path                          # the PNG file to write
    prompt: str
    sources: tuple[Path, ...] = ()      # pictures to edit or compose
    seed: int = 0
    guidance: float | None = None       # None: that of the model


# ---------------------------------------------------------------- files

def save_picture(picture: np.ndarray, path: Path, **metadata) -> None:
    """Write a picture (H, W, 3) uint8 as PNG, with prompt and settings in its text chunks."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    image = Image.fromarray(picture)
    write_atomically(path, lambda file: image.save(file, format="PNG", pnginfo=info))


def readable(path: Path) -> bool:
    """Whether a file is a whole picture."""
    try:
        load_picture(path)
    except ValueError:
        return False
    return True


def _metadata(path: Path) -> dict:
    """What `save_picture` wrote into a picture; empty for another program's picture."""
    with Image.open(find_file(path)) as file:
        texts = {key: file.info[key] for key in ("prompt", "settings") if key in file.info}
    return texts if len(texts) == 2 else {}


def load_source(path: Path, size: tuple[int, int], squash: bool = False) -> Tensor:
    """Load a source picture as an image (3, H, W). size: (H, W), cropped, or squashed to it."""
    if not squash:
        return load_image(path, size)
    picture = load_picture(path).resize(size[::-1], Image.Resampling.BICUBIC)
    return to_images([np.array(picture)])[0]                                        # (3, H, W)


# ---------------------------------------------------------------- drawing

def _settings(pipeline, job: Job, steps: int | None) -> dict:
    """What a picture is drawn with, besides its prompt and sources."""
    s = pipeline.settings
    used = {"seed": job.seed, "steps": steps or s.steps, "shift": s.shift,
            "guidance": s.guidance if job.guidance is None else job.guidance}
    if job.sources:
        used["image_guidance"] = s.image_guidance
    if s.negative_prompt:
        used["negative"] = s.negative_prompt
    if s.solver != "euler":
        used["solver"] = s.solver
    if s.guidance_interval != (0, 1):
        used["guidance_interval"] = s.guidance_interval
    return used


def _is_drawn(job: Job, used: dict) -> bool:
    """Whether a job's picture is there.

    Raises ValueError for a picture that was drawn from another prompt or with other settings.
    """
    if not readable(job.path):
        return False
    if not (before := _metadata(job.path)):
        return True                             # made by another program, for this name
    settings = json.loads(before["settings"])
    settings.pop("model", None)
    if (before["prompt"], settings) != (job.prompt, json.loads(json.dumps(used))):
        changed = {key for key in {*settings, *used} if settings.get(key) != used.get(key)}
        what = "another prompt" if before["prompt"] != job.prompt else f"other {min(changed)}"
        raise ValueError(f"{job.path}: was drawn with {what}; choose another --out, or remove it")
    return True


def _batches(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Neighbouring jobs that can be drawn together, at most `size` of them."""
    batches = []
    for _, group in itertools.groupby(jobs, key=lambda job: (len(job.sources), job.guidance)):
        alike = list(group)
        batches += [alike[i:i + size] for i in range(0, len(alike), size)]
    return batches


def _load_sources(jobs: list[Job], size: tuple[int, int], squash: bool,
                  unreadable: dict[str, bool]) -> tuple[list[Job], list[Tensor]]:
    """The jobs whose sources can be read, and their sources, each (B, 3, H, W)."""
    usable, rows = [], []
    for job in jobs:
        try:
            rows.append([load_source(path, size, squash) for path in job.sources])
            usable.append(job)
        except ValueError as error:
            unreadable[str(error)] = True
    return usable, [torch.stack(images) for images in zip(*rows)]


def _encode(pipeline, jobs: Sequence[Job]) -> Texts:
    return pipeline.encode_prompts([job.prompt for job in jobs], None, len(jobs[0].sources))


ENCODED = 512       # prompts that are encoded before the first is drawn; 2 MB each at full size


def draw_missing(pipeline, jobs: Sequence[Job], batch: int = 8, rank: int = 0, world: int = 1,
                 steps: int | None = None, size: tuple[int, int] | None = None,
                 squash: bool = False, progress: bool = True,
                 rename: Callable[[Path], Path] | None = None) -> Iterator[Job]:
    """Draw the jobs whose files are missing or no whole pictures; yield each when it is written.

    Hundreds of prompts are encoded before the first picture, so that T5 and the transformer need
    not be in memory together.

    pipeline: a `sample.Pipeline`. batch: pictures at a time. rank, world: batch k belongs to rank
    k % world. size: (H, W) in pixels; None: the model's. Sources keep their shape by a centre crop,
    unless squash. rename: a new name for a picture whose file has appeared meanwhile; None: that
    file stays, and the picture is not written.
    Raises ValueError for pictures that were drawn otherwise before, for values that are no numbers,
    and, after all other jobs are done, for sources that cannot be read.
    """
    size = size or (pipeline.settings.image_size, pipeline.settings.image_size)
    unreadable: dict[str, bool] = {}                            # messages, each once
    wanted = [i for i, job in enumerate(jobs)
              if not _is_drawn(job, _settings(pipeline, job, steps))]
    missing = {jobs[i].path for i in wanted}
    renamed: dict[Path, Path] = {}
    mine = [b for b in _batches(jobs, batch)[rank::world] if any(j.path in missing for j in b)]
    ahead = max(1, ENCODED // batch)
    bar = tqdm(total=sum(len(b) for b in mine), desc="pictures", unit="picture",
               disable=not progress or len(mine) < 2)
    with bar:
        for number, group in enumerate(mine):
            if number % ahead == 0:
                encoded = deque(_encode(pipeline, alike) for alike in mine[number:number + ahead])
                if number + ahead >= len(mine):
                    pipeline.release("text_encoder")            # was needed for the last time
            texts = encoded.popleft()
            text_of = {job.path: text for job, text in zip(group, texts.prompts)}
            group = [job._replace(sources=tuple(renamed.get(f, f) for f in job.sources))
                     for job in group]
            group, sources = _load_sources(group, size, squash, unreadable)
            if not group:
                continue
            texts = texts._replace(prompts=[text_of[job.path] for job in group])
            images = pipeline.edit(
                [job.prompt for job in group], sources, [job.seed for job in group], steps,
                group[0].guidance, progress, size, texts=texts)                     # (B, 3, H, W)
            if not images.isfinite().all():
                raise ValueError(f"{pipeline.name}: draws values that are no numbers; the weights "
                                 "are damaged or the guidance is too high")
            for job, picture in zip(group, to_pictures(images)):
                if job.path in missing and rename and job.path.exists():
                    renamed[job.path] = rename(job.path)
                    job = job._replace(path=renamed[job.path])
                elif job.path not in missing or readable(job.path):
                    continue
                used = _settings(pipeline, job, steps) | {"model": pipeline.name}
                save_picture(picture, job.path, prompt=job.prompt, settings=used)
                yield job
            bar.update(len(group))
    if unreadable:
        raise ValueError("; ".join(unreadable))


# ---------------------------------------------------------------- lists of edits

def _texts(value, name: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not (isinstance(texts, list) and texts and all(isinstance(t, str) and t for t in texts)):
        raise ValueError(f"'{name}' is {value!r:.60}, expected a text")
    return texts


def _edit(record: dict, folder: Path, out: Path, number: int) -> Job:
    known = ("image", "instruction", "seed", "name")
    if unknown := sorted(set(record) - set(known)):
        raise ValueError(f"unknown key '{unknown[0]}', expected {', '.join(known)}")
    sources = tuple(find_file(folder / name) for name in _texts(record.get("image"), "image"))
    if absent := [str(path) for path in sources if not path.is_file()]:
        raise ValueError(f"no such picture: {absent[0]}")
    [instruction] = _texts(record.get("instruction"), "instruction")
    seed = record.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"'seed' is {seed!r:.60}, expected an integer")
    [name] = _texts(record.get("name", f"{number:04d}.png"), "name")
    if Path(name).name != name or not name.lower().endswith(".png"):
        raise ValueError(f"'name' is {name!r:.60}, expected the name of a .png file")
    return Job(out / name, instruction, sources, seed)


def read_edits(path: Path, out: Path, seed: int = 0) -> list[Job]:
    """Read jobs from JSON lines: {"image": FILE or [FILES], "instruction": TEXT, ...}.

    Each line may have a "seed", which is added to `seed`, and the "name" of its picture in the
    folder `out`, by default the line's number. Image paths are relative to the file's folder.
    Raises ValueError that names the line.
    """
    jobs: dict[Path, Job] = {}
    for line in read_lines(path):
        where = origin_of(path, line.number)
        record = read_json(line.content, where)
        try:
            job = _edit(record, path.parent, out, line.number)
            if job.path in jobs:
                raise ValueError(f"another line has the name {job.path.name} already")
            if any(job.path.absolute() == source.absolute() for source in job.sources):
                raise ValueError(f"{job.path} is the picture to edit; choose another name or --out")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        jobs[job.path] = job._replace(seed=job.seed + seed)
    return list(jobs.values())
