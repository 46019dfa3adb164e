"""Datasets in JSON lines, as the released code reads them: one parser for every format, one dataset, one order of batches.

A task is a record, not a branch in the code: what an example has (a prompt to draw, source pictures, a caption, a question)
decides what is trained with it. A batch is of one task and one number of source pictures; tasks alternate by their weights (section 4).

Four kinds of records (image paths are relative to the JSONL's folder, or absolute):
  text to image   {"image": ["a.png"], "conversations": [{"from": "human", "value": CAPTION}, {"from": "gpt", "value": "<image>"}]}
  image to image  {"image": ["source.png", "target.png"], "conversations": [CAPTION OF THE TARGET, ...], "instruction": "..."}
  composition     {"original_images": [...], "generated_images": ["target.png"], "edit_prompt": "...", "caption": "..."}
  questions       {"image": ["a.png"], "conversations": [{"from": "human", "value": "<image>\\nQUESTION"},
                                                         {"from": "gpt", "value": ANSWER}, ...]}
A composition without original images is text to image with a prompt that is not the caption. A record may name its task
({"task": "edits", ...}), to be weighted and reported apart; else its task is one of the above.

Run alone to check a file and count its tasks:   python data.py FILE.jsonl
"""
import collections
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from text_encoder import T5Tokenizer


class Example(NamedTuple):
    """One training example, whatever its format was."""
    task: str                       # as the record names it, else "text_to_image", "image_to_image" or "questions"
    image: Path                     # the picture to generate, or the one that the text is about
    sources: tuple[Path, ...]       # source pictures of editing and composition
    prompt: str | None              # what the image branch is given: a caption or an instruction; None: nothing is drawn
    question: str                   # what the text branch is asked; empty: to describe the picture
    caption: str                    # what the text branch learns to say about `image`; empty: nothing


# ---------------------------------------------------------------- records

def _texts(turns) -> list[str]:
    """The texts of a conversation, whose turns are strings or {"from": ..., "value": ...}."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"'conversations' is {turns!r:.60}, expected a list of turns")
    return [(turn["value"] if isinstance(turn, dict) else turn).replace("<image>", "").strip() for turn in turns]


def parse_record(record: dict, folder: Path) -> list[Example]:
    """The examples of one record; a question record has one for each question. Raises KeyError or ValueError for an unknown form."""
    task = record.get("task")
    if not isinstance(task, str | None):
        raise ValueError(f"'task' is {task!r:.60}, expected a name")
    if "original_images" in record:
        sources = tuple(folder / name for name in record["original_images"])
        target, kind = folder / record["generated_images"][0], "image_to_image" if sources else "text_to_image"
        return [Example(task or kind, target, sources, record["edit_prompt"].strip(), "", record.get("caption", "").strip())]
    images, turns = [folder / name for name in record["image"]], _texts(record["conversations"])
    if "instruction" in record:
        if len(images) < 2:
            raise ValueError(f"has an instruction and {len(images)} picture(s), expected sources and then the target")
        return [Example(task or "image_to_image", images[-1], tuple(images[:-1]), record["instruction"].strip(), "", turns[0])]
    if len(images) != 1:
        raise ValueError(f"has {len(images)} pictures and no instruction, expected one picture")
    if len(turns) == 2 and not turns[1]:
        return [Example(task or "text_to_image", images[0], (), turns[0], "", turns[0])]
    if len(turns) % 2 or not all(turns):
        raise ValueError(f"has {len(turns)} turns, some perhaps empty; expected questions and answers in pairs")
    return [Example(task or "questions", images[0], (), None, q, a) for q, a in zip(turns[::2], turns[1::2])]


def read_jsonl(path: str | Path) -> list[Example]:
    """Every example of a JSONL file.

    Raises ValueError that names the line, if one is not JSON, has no known form or names a missing picture.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a JSONL file (data.py tells the formats)")
    examples, known = [], {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")       # not splitlines: captions may hold other line separators
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = parse_record(json.loads(line), path.parent)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
        except KeyError as error:
            raise ValueError(f"{path}, line {number}: the key {error} is missing; see the formats in data.py") from error
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}, line {number}: {error}; see the formats in data.py") from error
        for picture in {p for e in found for p in (e.image, *e.sources)}:
            if not known.setdefault(picture, picture.is_file()):
                raise ValueError(f"{path}, line {number}: no such picture: {picture}")
        examples += found
    if not examples:
        raise ValueError(f"{path}: no records; expected one JSON object per line")
    return examples


# ---------------------------------------------------------------- pictures

def load_image(path: str | Path, size: int) -> Tensor:
    """A picture as (3, size, size) float32 in [-1, 1].

    EXIF orientation is honoured, alpha laid on white, the short side resized to `size` (bicubic), the centre cropped.
    Raises ValueError that names the file, if it cannot be read.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):                    # 16 bits of grey, which convert() would cut off instead of scale
                picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).astype(np.uint8))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:    # what Pillow raises for broken files
        raise ValueError(f"{path}: cannot be read as a picture ({error})") from error
    if picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1           # (3, size, size)


def to_pictures(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, what is outside the range being cut off."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_images(pictures: Sequence[np.ndarray]) -> Tensor:
    """The inverse of `to_pictures`: (n, 3, H, W) float32 in [-1, 1] of pictures (H, W, 3) uint8."""
    return (torch.from_numpy(np.stack(pictures)).float() / 127.5 - 1).permute(0, 3, 1, 2)


# ---------------------------------------------------------------- batches

class Batch(NamedTuple):
    """Examples of one task with equally many (R) source pictures, and what is trained with them."""
    task: str
    pictures: Tensor | None         # (B, 1 + R, 3, H, W) in [-1, 1], the sources after the picture itself
    latents: Tensor | None          # (B, 1 + R, C, h, w) normalised, where they were encoded beforehand
    prompts: Tensor | None          # (B, L) ids; None: nothing is drawn
    tokens: Tensor | None           # (B, L) ids of question and answer; None: nothing is written
    answer: Tensor | None           # (B, L) bool, the positions of the answer
    features: tuple[Tensor, Tensor] | None      # the teacher's of picture and caption, (B, d) each

    def to(self, device: torch.device) -> "Batch":
        def move(x):
            return x.to(device) if isinstance(x, Tensor) else tuple(map(move, x)) if isinstance(x, tuple) else x
        return Batch(*(move(x) for x in self))


def text_lengths(ids: Tensor, eos_id: int) -> list[int]:
    """How many tokens each row of padded ids (n, L) has, its first </s> included."""
    return ((ids == eos_id).int().argmax(dim=1) + 1).tolist()


def prompt_length(tokens: int, sources: int, longest: int, multiple: int) -> int:
    """To how many tokens a prompt of `tokens` is padded: one about source pictures to a multiple of `multiple`, any other (and any
    with multiple 0) to `longest`. Instructions are short, and their padding is a tenth of the work on them.
    Raises ValueError for a negative multiple.
    """
    if multiple < 0:
        raise ValueError(f"prompt_multiple = {multiple}, expected 0 or more")
    return min(longest, -(-tokens // multiple) * multiple) if sources and multiple else longest


class Group(NamedTuple):
    """Examples that share batches."""
    task: str
    indices: list[int]
    weight: float                   # of its batches among those of all groups


def parse_weights(text: str) -> dict[str, float]:
    """"edits=2,pose=0.5,*=1" -> weights by task, `*` being every other one. Raises ValueError for anything else."""
    try:
        weights = {name.strip(): float(value) for name, _, value in (part.partition("=") for part in text.split(","))}
    except ValueError:
        weights = {}
    if "" in weights or not any(weights.values()) or not all(0 <= weight < math.inf for weight in weights.values()):
        raise ValueError(f"weights {text!r}, expected TASK=NUMBER,... with * for every other task, for instance questions=2,*=1")
    return weights


class Tasks(Dataset):
    """Examples of any tasks, in groups by task, number of source pictures and length of the prompt (see `prompt_length`).

    weights: of the tasks' batches; a task's groups share its weight by their sizes. captioned: the tasks whose captions train the
    text branch, besides questions (`*`: every task). Set `latents` (one for each of `paths`) to have them returned in place of
    pictures, so that each picture is encoded only once; `features`: the teacher's of picture and text, a row for each of `aligned`.
    Raises ValueError for unknown tasks and for texts that hold the mask token.
    """

    def __init__(self, examples: list[Example], tokenizer: T5Tokenizer, image_size: int, text_length: int, weights: str = "*=1",
                 captioned: str = "*", prompt_multiple: int = 0):
        given, tasks = parse_weights(weights), {e.task for e in examples}
        written = {name.strip() for name in captioned.split(",")} - {""}
        if unknown := sorted({*(name for name in given if given[name]), *written} - {"*"} - tasks):
            raise ValueError(f"no records of the task {unknown[0]!r}, which --weights or --captioned names; the data has "
                             f"{', '.join(sorted(tasks))}")
        weight = {task: given.get(task, given.get("*", 0.0)) for task in tasks}
        self.left_out = sorted(task for task in tasks if not weight[task])
        self.examples = [e for e in examples if weight[e.task]]
        if not self.examples:
            raise ValueError(f"no examples are left: the data has {', '.join(sorted(tasks))}, the weights are {weights}")
        self.writes = [bool(e.caption) and (e.prompt is None or "*" in written or e.task in written)
                       for e in self.examples]
        for e in self.examples:
            if "<extra_id_0>" in f"{e.prompt} {e.question} {e.caption}":
                raise ValueError(f"the text of {e.image} holds the mask token <extra_id_0>; remove it")
        self.prompts = tokenizer([e.prompt or "" for e in self.examples], length=text_length).int()                  # (n, L)
        self.lengths = [prompt_length(tokens, len(e.sources), text_length, prompt_multiple)
                        for tokens, e in zip(text_lengths(self.prompts, tokenizer.eos_id), self.examples)]
        sizes = collections.Counter(e.task for e in self.examples)
        members: dict[tuple, list[int]] = {}
        for i, e in enumerate(self.examples):
            members.setdefault((e.task, len(e.sources), e.prompt is None, self.writes[i], self.lengths[i]), []).append(i)
        self.groups = [Group(key[0], found, weight[key[0]] * len(found) / sizes[key[0]]) for key, found in sorted(members.items())]

        self.paths = list(dict.fromkeys(path for e in self.examples for path in (e.image, *e.sources)))
        place = {path: i for i, path in enumerate(self.paths)}
        self.places = [[place[path] for path in (e.image, *e.sources)] for e in self.examples]
        tokens, self.answer = tokenizer.dialogue(*zip(*((e.question, e.caption) for e in self.examples)), text_length)
        self.tokens = tokens.int()                                                                                   # (n, L)
        self.aligned = [i for i, e in enumerate(self.examples) if e.prompt is not None and self.writes[i]]
        self.row = {i: row for row, i in enumerate(self.aligned)}
        self.image_size = image_size
        self.latents: Tensor | None = None
        self.features: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, indices: list[int]) -> Batch:
        places, first = torch.tensor([self.places[i] for i in indices]), indices[0]           # (B, 1 + R)
        pictures = latents = prompts = tokens = answer = features = None
        if self.latents is not None:
            latents = self.latents[places]                                                    # (B, 1 + R, C, h, w)
        else:
            loaded = [load_image(self.paths[place], self.image_size) for place in places.flatten().tolist()]
            pictures = torch.stack(loaded).unflatten(0, places.shape)                         # (B, 1 + R, 3, H, W)
        if self.examples[first].prompt is not None:
            prompts = self.prompts[indices, :self.lengths[first]].long()
        if self.writes[first]:
            tokens, answer = self.tokens[indices].long(), self.answer[indices]
        if self.features is not None and first in self.row:
            rows = [self.row[i] for i in indices]
            features = self.features[0][rows].float(), self.features[1][rows].float()
        return Batch(self.examples[first].task, pictures, latents, prompts, tokens, answer, features)


class BatchOrder(Sampler[list[int]]):
    """Endless batches of indices for one rank, a pure function of (seed, position): a resumed run continues with the same data.

    Every batch is of one group, the same one on all ranks: the one that is furthest behind its share, so the tasks alternate evenly.
    Every epoch of a group is a new permutation (of a group too small for one batch of all ranks: as many as fill it); ranks take
    consecutive slices of it. `start` is the number of batches already used.
    """

    def __init__(self, groups: list[Group], batch: int, seed: int, rank: int = 0, world: int = 1, start: int = 0):
        self.groups, self.batch, self.seed, self.rank, self.world, self.start = groups, batch, seed, rank, world, start

    def __iter__(self) -> Iterator[list[int]]:
        total, orders = sum(group.weight for group in self.groups), {}
        used = [0] * len(self.groups)
        for position in itertools.count():
            g = max(range(len(used)), key=lambda g: self.groups[g].weight / total * (position + 1) - used[g])
            if position >= self.start:
                indices = self.groups[g].indices
                copies = -(-self.batch * self.world // len(indices))
                epoch, place = divmod(used[g], copies * len(indices) // (self.batch * self.world))
                if orders.get(g, (None,))[0] != epoch:
                    generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 1009 + g)
                    permutations = [torch.randperm(len(indices), generator=generator) for _ in range(copies)]
                    orders[g] = epoch, torch.cat(permutations).tolist()
                first = (place * self.world + self.rank) * self.batch
                yield [indices[i] for i in orders[g][1][first:first + self.batch]]
            used[g] += 1


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        tasks = collections.Counter(e.task for e in read_jsonl(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"error: {error}")
    for task, number in tasks.items():
        print(f"{task:16} {number}")
