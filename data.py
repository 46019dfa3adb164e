"""Datasets in JSON lines, as the released code reads them: one parser, one dataset, one order.

Tasks are defined by the data; adding one needs no code. What is trained with an example depends on
what it has: a prompt to draw, source pictures, a caption, a question. A batch has one task and one
number of source pictures; tasks alternate by their weights.

Four kinds of records, with image paths relative to the JSONL's folder, or absolute:
  text to image   {"image": ["a.png"], "conversations": [{"from": "human", "value": CAPTION},
                                                         {"from": "gpt", "value": "<image>"}]}
  image to image  {"image": ["source.png", "target.png"], "instruction": "...",
                   "conversations": [CAPTION OF THE TARGET, ...]}
  composition     {"original_images": [...], "generated_images": ["target.png"],
                   "edit_prompt": "...", "caption": "..."}
  questions       {"image": ["a.png"], "conversations": [
                      {"from": "human", "value": "<image>\\nQUESTION"},
                      {"from": "gpt", "value": ANSWER}, ...]}
A composition without original images is text to image with a prompt that differs from the caption.
A record may name its task ({"task": "edits", ...}), to be weighted and reported apart.

Two words, in all files: an image is a float tensor (3, H, W) in [-1, 1]; a picture is an array
(H, W, 3) of uint8, or the file that holds it.

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
    task: str                       # the record's name, or text_to_image, image_to_image, questions
    image: Path                     # the picture to generate, or the one that the text is about
    sources: tuple[Path, ...]       # source pictures of editing and composition
    prompt: str | None              # input of the image branch; None: no image is generated
    question: str                   # asked of the text branch; empty: to describe the picture
    caption: str                    # target of the text branch; empty: no text is generated


# ---------------------------------------------------------------- records

def _turn_texts(turns) -> list[str]:
    """The texts of a conversation; a turn is a string or {"from": ..., "value": ...}."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"'conversations' is {turns!r:.60}, expected a list of turns")
    texts = [turn["value"] if isinstance(turn, dict) else turn for turn in turns]
    return [text.replace("<image>", "").strip() for text in texts]


def parse_record(record: dict, folder: Path) -> list[Example]:
    """The examples of a record, one for each question. Raises KeyError or ValueError otherwise."""
    task = record.get("task")
    if not isinstance(task, str | None):
        raise ValueError(f"'task' is {task!r:.60}, expected a name")
    if "original_images" in record:
        sources = tuple(folder / name for name in record["original_images"])
        target = folder / record["generated_images"][0]
        kind = "image_to_image" if sources else "text_to_image"
        caption = record.get("caption", "").strip()
        return [Example(task or kind, target, sources, record["edit_prompt"].strip(), "", caption)]

    pictures = [folder / name for name in record["image"]]
    texts = _turn_texts(record["conversations"])
    if "instruction" in record:
        if len(pictures) < 2:
            raise ValueError(f"has an instruction and {len(pictures)} picture(s), expected sources "
                             "and then the target")
        *sources, target = pictures
        instruction = record["instruction"].strip()
        return [Example(
            task or "image_to_image", target, tuple(sources), instruction, "", texts[0])]

    if len(pictures) != 1:
        raise ValueError(f"has {len(pictures)} pictures and no instruction, expected one picture")
    [picture] = pictures
    if len(texts) == 2 and not texts[1]:                        # the answer is "<image>"
        return [Example(task or "text_to_image", picture, (), texts[0], "", texts[0])]
    if len(texts) % 2 or not all(texts):
        raise ValueError(f"has {len(texts)} turns, some perhaps empty; expected questions and "
                         "answers in pairs")
    pairs = zip(texts[::2], texts[1::2])
    return [Example(task or "questions", picture, (), None, q, a) for q, a in pairs]


def read_jsonl(path: str | Path) -> list[Example]:
    """Read every example of a JSONL file.

    Raises ValueError that names the line, if it is not JSON, has no known form or names a picture
    that does not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a JSONL file (formats: data.py)")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    examples: list[Example] = []
    exists: dict[Path, bool] = {}                               # each picture is looked up once
    for number, line in enumerate(text.split("\n"), start=1):   # captions may hold other separators
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            parsed = parse_record(json.loads(line), path.parent)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from error
        except KeyError as error:
            raise ValueError(f"{where}: the key {error} is missing; formats: data.py") from error
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{where}: {error}; formats: data.py") from error
        for picture in {p for e in parsed for p in (e.image, *e.sources)}:
            if not exists.setdefault(picture, picture.is_file()):
                raise ValueError(f"{where}: no such picture: {picture}")
        examples += parsed
    if not examples:
        raise ValueError(f"{path}: no records; expected one JSON object per line")
    return examples


# ---------------------------------------------------------------- pictures and images

def load_image(path: str | Path, size: int) -> Tensor:
    """Load a picture as an image (3, size, size) float32 in [-1, 1].

    Honours the EXIF orientation, lays alpha on white, resizes the short side to `size` (bicubic)
    and crops the centre. Raises ValueError that names the file, if it cannot be read.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):        # 16 bits of grey: convert() cuts, so scale here
                values = np.asarray(picture).astype(np.int64)
                picture = Image.fromarray((values >> 8).astype(np.uint8))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            picture = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as a picture ({error})") from error
    if picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)                   # (3, S, S)
    return pixels.float() / 127.5 - 1


def to_pictures(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) -> pictures (B, H, W, 3) uint8; values outside of [-1, 1] are clamped."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()             # (B, 3, H, W)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()                                 # (B, H, W, 3)


def to_images(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures (H, W, 3) uint8 -> images (n, 3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(pictures))                                   # (n, H, W, 3)
    return (pixels.float() / 127.5 - 1).permute(0, 3, 1, 2)                         # (n, 3, H, W)


# ---------------------------------------------------------------- lengths and weights

def text_lengths(ids: Tensor, eos_id: int) -> list[int]:
    """The number of tokens in each row of padded ids (n, L), its first </s> included."""
    return ((ids == eos_id).int().argmax(dim=1) + 1).tolist()


def prompt_length(tokens: int, sources: int, longest: int, multiple: int) -> int:
    """The length to which a prompt is padded: `longest`, or a multiple of `multiple`.

    Only a prompt about source pictures is padded to a multiple, unless that is 0: instructions are
    short, and their padding would be a tenth of the work. Raises ValueError if multiple < 0.
    """
    if multiple < 0:
        raise ValueError(f"prompt_multiple = {multiple}, expected 0 or more")
    if not sources or not multiple:
        return longest
    return min(longest, math.ceil(tokens / multiple) * multiple)


def parse_weights(text: str) -> dict[str, float]:
    """"edits=2,pose=0.5,*=1" -> weight by task; `*` is every other task. Raises ValueError."""
    weights = {}
    try:
        for part in text.split(","):
            name, _, value = part.partition("=")
            weights[name.strip()] = float(value)
    except ValueError:
        weights = {}
    in_range = all(0 <= weight < math.inf for weight in weights.values())
    if "" in weights or not any(weights.values()) or not in_range:
        raise ValueError(f"weights {text!r}, expected TASK=NUMBER,... with * for every other task, "
                         "for instance questions=2,*=1")
    return weights


def weight_of(weights: dict[str, float], task: str) -> float:
    """The weight of a task in what `parse_weights` returns; 0: not trained."""
    return weights.get(task, weights.get("*", 0.0))


# ---------------------------------------------------------------- batches

class Batch(NamedTuple):
    """Examples of one task with equally many (R) source pictures, and what is trained with them."""
    task: str
    images: Tensor | None           # (B, 1 + R, 3, H, W), the sources after the image itself
    latents: Tensor | None          # (B, 1 + R, C, h, w) normalized, in place of images if cached
    prompts: Tensor | None          # (B, L) ids; None: no image branch
    tokens: Tensor | None           # (B, L) ids of question and answer; None: no text branch
    answer: Tensor | None           # (B, L) bool, the positions of the answer
    features: tuple[Tensor, Tensor] | None      # (B, d) each, of the teacher: image, caption

    def to(self, device: torch.device) -> "Batch":
        def move(x):
            if isinstance(x, tuple):
                return tuple(move(part) for part in x)
            return x.to(device) if isinstance(x, Tensor) else x
        return Batch(*(move(x) for x in self))


class Group(NamedTuple):
    """Examples that share batches."""
    task: str
    indices: list[int]
    weight: float                   # share of the batches, relative to the other groups'


class BatchKey(NamedTuple):
    """Examples with equal keys can share a batch; keys sort the groups."""
    task: str
    sources: int
    no_prompt: bool
    writes: bool
    length: int


class Tasks(Dataset):
    """Examples of any tasks, in groups that share batches (`BatchKey`).

    weights: of the tasks' batches; the groups of a task share its weight by their sizes.
    captioned: tasks whose captions train the text branch besides questions (`*`: all).
    Set `latents` (a row for each of `paths`) to have them returned in place of images, so that each
    picture is encoded only once. Set `features` to the teacher's, a row for each of `aligned`.
    Raises ValueError for unknown tasks and for texts that hold the mask token.
    """

    def __init__(self, examples: list[Example], tokenizer: T5Tokenizer, image_size: int,
                 text_length: int, weights: str = "*=1", captioned: str = "*",
                 prompt_multiple: int = 0):
        tasks = {e.task for e in examples}
        task_weights = parse_weights(weights)
        captioned_tasks = {name.strip() for name in captioned.split(",")} - {""}
        named = {name for name, weight in task_weights.items() if weight} | captioned_tasks
        if unknown := sorted(named - {"*"} - tasks):
            raise ValueError(f"no records of the task {unknown[0]!r}, which --weights or "
                             f"--captioned names; the data has {', '.join(sorted(tasks))}")
        self.left_out = sorted(task for task in tasks if not weight_of(task_weights, task))
        self.examples = [e for e in examples if e.task not in self.left_out]
        if not self.examples:
            raise ValueError(f"no examples are left: the data has {', '.join(sorted(tasks))}, "
                             f"the weights are {weights}")
        for e in self.examples:
            if "<extra_id_0>" in f"{e.prompt} {e.question} {e.caption}":
                raise ValueError(f"the text of {e.image} holds the mask token <extra_id_0>; "
                                 "remove it")

        def writes(e: Example) -> bool:
            is_captioned = "*" in captioned_tasks or e.task in captioned_tasks
            return bool(e.caption) and (e.prompt is None or is_captioned)

        self.writes = [writes(e) for e in self.examples]
        prompts = [e.prompt or "" for e in self.examples]
        self.prompts = tokenizer(prompts, length=text_length).int()                 # (n, L)
        counts = text_lengths(self.prompts, tokenizer.eos_id)
        self.lengths = [prompt_length(count, len(e.sources), text_length, prompt_multiple)
                        for count, e in zip(counts, self.examples)]
        questions = [e.question for e in self.examples]
        answers = [e.caption for e in self.examples]
        tokens, self.answer = tokenizer.dialogue(questions, answers, text_length)   # (n, L) each
        self.tokens = tokens.int()
        self.groups = self._group(task_weights)

        paths = dict.fromkeys(path for e in self.examples for path in (e.image, *e.sources))
        self.paths = list(paths)                                # each picture once
        row = {path: i for i, path in enumerate(self.paths)}
        self.path_rows = [[row[path] for path in (e.image, *e.sources)] for e in self.examples]
        self.aligned = [i for i, e in enumerate(self.examples)
                        if e.prompt is not None and self.writes[i]]
        self.feature_rows = {i: row for row, i in enumerate(self.aligned)}
        self.image_size = image_size
        self.latents: Tensor | None = None
        self.features: tuple[Tensor, Tensor] | None = None

    def _group(self, task_weights: dict[str, float]) -> list[Group]:
        members: dict[BatchKey, list[int]] = {}
        for i, e in enumerate(self.examples):
            key = BatchKey(
                e.task, len(e.sources), e.prompt is None, self.writes[i], self.lengths[i])
            members.setdefault(key, []).append(i)
        sizes = collections.Counter(e.task for e in self.examples)
        groups = []
        for key, indices in sorted(members.items()):
            weight = weight_of(task_weights, key.task) * len(indices) / sizes[key.task]
            groups.append(Group(key.task, indices, weight))
        return groups

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, indices: list[int]) -> Batch:
        first = indices[0]                                      # stands for all: one group
        rows = torch.tensor([self.path_rows[i] for i in indices])                   # (B, 1 + R)
        images = latents = prompts = tokens = answer = features = None
        if self.latents is not None:
            latents = self.latents[rows]                                    # (B, 1 + R, C, h, w)
        else:
            paths = [self.paths[row] for row in rows.flatten().tolist()]
            images = torch.stack([load_image(path, self.image_size) for path in paths])
            images = images.unflatten(0, rows.shape)                        # (B, 1 + R, 3, H, W)
        if self.examples[first].prompt is not None:
            prompts = self.prompts[indices, :self.lengths[first]].long()                # (B, L)
        if self.writes[first]:
            tokens, answer = self.tokens[indices].long(), self.answer[indices]          # (B, L)
        if self.features is not None and first in self.feature_rows:
            chosen = [self.feature_rows[i] for i in indices]
            image_features, text_features = self.features
            features = image_features[chosen].float(), text_features[chosen].float()    # (B, d)
        return Batch(
            self.examples[first].task, images, latents, prompts, tokens, answer, features)


class BatchOrder(Sampler[list[int]]):
    """Endless batches of indices for one rank, a pure function of (seed, position).

    So a resumed run continues with the same data. Every batch is of one group, the same one on all
    ranks: the group that is furthest behind its share, so that tasks alternate evenly. An epoch of
    a group is a new permutation of it; ranks take consecutive slices. A group smaller than one
    batch of all ranks repeats in it, each time permuted anew. start: batches already used.
    """

    def __init__(self, groups: list[Group], batch: int, seed: int, rank: int = 0, world: int = 1,
                 start: int = 0):
        self.groups, self.batch, self.seed = groups, batch, seed
        self.rank, self.world, self.start = rank, world, start

    def _permutation(self, g: int, epoch: int, copies: int) -> list[int]:
        """The order of group g in an epoch: `copies` permutations, one after another."""
        indices = self.groups[g].indices
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 1009 + g)
        orders = [torch.randperm(len(indices), generator=generator) for _ in range(copies)]
        return [indices[i] for i in torch.cat(orders).tolist()]

    def __iter__(self) -> Iterator[list[int]]:
        total = sum(group.weight for group in self.groups)
        used = [0] * len(self.groups)                           # batches so far, by group
        current: dict[int, tuple[int, list[int]]] = {}          # group -> its epoch and order
        global_batch = self.batch * self.world

        def behind(g: int, position: int) -> float:
            return self.groups[g].weight / total * (position + 1) - used[g]

        for position in itertools.count():
            g = max(range(len(used)), key=lambda g: behind(g, position))
            if position >= self.start:
                size = len(self.groups[g].indices)
                copies = math.ceil(global_batch / size)
                epoch, place = divmod(used[g], copies * size // global_batch)
                if g not in current or current[g][0] != epoch:
                    current[g] = epoch, self._permutation(g, epoch, copies)
                first = (place * self.world + self.rank) * self.batch
                yield current[g][1][first:first + self.batch]
            used[g] += 1


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        counts = collections.Counter(e.task for e in read_jsonl(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"error: {error}")
    for task, count in counts.items():
        print(f"{task:16} {count}")
