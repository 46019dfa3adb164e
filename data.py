"""Datasets in JSON lines, as the released code reads them: formats, pictures, batches, their order.

Tasks are defined by the data; adding one needs no code. What is trained with an example depends on
what it has: a prompt to draw, source pictures, a caption, a question. A batch has one task, one
number of source pictures and one shape of images; tasks alternate by their weights.

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
A question without the key "image" is about the text alone, such as a prompt to be completed into a
full caption.
A composition without original images is text to image with a prompt that differs from the caption.
Questions of a record are examples of their own, or with --dialogues turns of one dialogue.
One picture may be a string in place of a list, as LLaVA writes it. A turn may be the text alone;
human and gpt take turns, human first. A record may name its task ({"task": "edits", ...}), to be
weighted and reported apart. records.py parses them.

Two words, in all files: an image is a float tensor (3, H, W) in [-1, 1]; a picture is an array
(H, W, 3) of uint8, or the file that holds it.

Run alone to check a file and count its tasks:   python data.py FILE.jsonl
"""
import collections
import functools
import io
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from buckets import Buckets, Shape, cropped_share, nearest_shapes, orientation_of
from records import (Example, Kind, Records, examine, find_file, kind_of, length_for,
                     open_records, read_jsonl)
from text_encoder import T5Tokenizer, asked


# ---------------------------------------------------------------- pictures and images

# tags of TIFF
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0                                              # a value of _PHOTOMETRIC
# EXIF orientation -> the transposition that shows the picture upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Scale a grey picture of 16 or 32 bits or of floats to 8 bits; others are returned as given.

    Raises ValueError if its range is unknown.
    """
    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture).astype(np.float64)                                 # (H, W)
    low, high = values.min(), values.max()
    tags = getattr(picture, "tag_v2", {})                       # of a TIFF
    [bits] = tags.get(_BITS_PER_SAMPLE, (16,))
    white = {"F": 1.0, "I": 2 ** 16 - 1}.get(picture.mode, 2 ** bits - 1)
    if not 0 <= low <= high <= white:
        raise ValueError(f"the values are {low:g} to {high:g}, expected 0 to {white:g}")
    if bits == 32 and picture.mode == "I" and high < 256:
        raise ValueError(f"the values are {low:g} to {high:g} of 32 bits: 8 bits or 16 bits?")
    shares = values / white
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        shares = 1 - shares
    grey = Image.fromarray((shares * 255).round().astype(np.uint8))
    key = picture.info.get("transparency")                      # the grey value that is invisible
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert opaque colours to RGB, by the colour profile if it is whole and fits the colours."""
    if picture.mode not in ("L", "CMYK", "LAB"):
        picture = picture.convert("RGB")
    try:
        if picture.mode == "LAB":
            source = ImageCms.createProfile("LAB")
        elif profile:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if source.profile.xcolor_space == "RGB " and picture.mode == "L":
                picture = picture.convert("RGB")
        else:
            return picture.convert("RGB")
        return ImageCms.profileToProfile(
            picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):                      # as if it had none
        return picture.convert("RGB")


def _opaque_srgb(file: Image.Image) -> Image.Image:
    """The RGB picture of a file, on white, as it is stored."""
    picture = _eight_bits(file)
    profile = file.info.get("icc_profile")
    if not picture.has_transparency_data:
        return _to_srgb(picture, profile)
    grey = picture.mode == "LA"
    picture = picture.convert("RGBA")
    alpha = picture.getchannel("A")
    colors = _to_srgb(picture.convert("L" if grey else "RGB"), profile)
    return Image.composite(colors, Image.new("RGB", picture.size, "white"), alpha)


def load_picture(path: str | Path) -> Image.Image:
    """Load a picture in sRGB, upright, on white: mode RGB, in its own size.

    A colour profile is converted to sRGB; a broken one is ignored, as is broken EXIF. Grey of more
    than 8 bits is scaled where its range is known: 16 bits, floats in [0, 1].
    Raises ValueError that names the file, if it cannot be read or its range is unknown.
    """
    try:
        with Image.open(find_file(path)) as file:
            file.load()
            picture, orientation = _opaque_srgb(file), orientation_of(file)
    except Exception as error:              # Pillow raises almost every kind for a broken file
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as a picture ({reason})") from error
    upright = _UPRIGHT.get(orientation)
    return picture if upright is None else picture.transpose(upright)


def load_cropped(path: str | Path, shape: Shape) -> np.ndarray:
    """Load a picture (`load_picture`) as an array (height, width, 3) of uint8.

    Resizes it so that it covers the shape (bicubic) and crops the centre. Raises ValueError that
    names the file, if it cannot be read.
    """
    picture, (height, width) = load_picture(path), shape
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    return np.array(picture)                                                        # (H, W, 3)


def load_image(path: str | Path, size: int | Shape) -> Tensor:
    """Load a picture (`load_cropped`) as an image (3, H, W) float32 in [-1, 1].

    size: (height, width), or the side of a square.
    """
    shape = (size, size) if isinstance(size, int) else size
    return to_images([load_cropped(path, shape)])[0]


def to_pictures(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) -> pictures (B, H, W, 3) uint8; values outside of [-1, 1] are clamped."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()             # (B, 3, H, W)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()                                 # (B, H, W, 3)


def to_images(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures (H, W, 3) uint8 -> images (n, 3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(pictures))                                   # (n, H, W, 3)
    return (pixels.float() / 127.5 - 1).permute(0, 3, 1, 2)                         # (n, 3, H, W)


def _contiguous_images(pictures: Sequence[np.ndarray]) -> Tensor:
    """`to_images`, contiguous and with one copy: more would bloat the heap of a loader process."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)               # (n, 3, H, W)
    return pixels.float(memory_format=torch.contiguous_format).div_(127.5).sub_(1)


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


def parse_numbers(text: str, name: str) -> dict[str, float]:
    """"edits=2,pose=-0.5,*=1" -> number by task; `*` is every other task. Raises ValueError."""
    numbers = {}
    try:
        for part in text.split(","):
            task, _, value = part.partition("=")
            numbers[task.strip()] = float(value)
    except ValueError:
        numbers = {}
    if not numbers or "" in numbers or not all(map(math.isfinite, numbers.values())):
        raise ValueError(f"{name} {text!r}, expected TASK=NUMBER,... with * for every other task, "
                         "for instance questions=2,*=1")
    return numbers


def number_of(numbers: dict[str, float], task: str, default: float) -> float:
    """The number of a task in what `parse_numbers` returns."""
    return numbers.get(task, numbers.get("*", default))


def parse_weights(text: str) -> dict[str, float]:
    """The weight of each task, `parse_numbers` of at least 0. Raises ValueError."""
    weights = parse_numbers(text, "weights")
    if min(weights.values()) < 0 or not any(weights.values()):
        raise ValueError(f"weights {text!r}, expected TASK=NUMBER,... of at least 0, and not all 0")
    return weights


def weight_of(weights: dict[str, float], task: str) -> float:
    """The weight of a task in what `parse_weights` returns; 0: not trained."""
    return number_of(weights, task, 0.0)


# ---------------------------------------------------------------- batches

_ATTEMPTS = 100                     # records tried in place of one that cannot be used

class Batch(NamedTuple):
    """Examples of one task with equally many (R) source pictures, and what is trained with them."""
    task: str
    images: Tensor | None           # (B, 1 + R, 3, H, W), the sources after the image itself
    latents: Tensor | None          # (B, 1 + R, C, h, w) normalized, in place of images if cached;
                                    # None both: texts without pictures
    prompts: Tensor | None          # (B, L) ids; None: no image branch
    tokens: Tensor | None           # (B, L) ids of question and answer; None: no text branch
    answer: Tensor | None           # (B, L) bool, the positions of the answer
    features: tuple[Tensor, Tensor] | None      # (B, d) each, of the teacher: image, caption
    captions: tuple[str, ...] = ()  # (B) targets of the text branch; (): no text branch
    records: tuple[str, ...] = ()   # (B) where each example is from: file and line
    skipped: tuple[tuple[str, str], ...] = ()   # (file and line, reason) of replaced examples

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        def apply(x):
            if isinstance(x, tuple):
                return tuple(apply(part) for part in x)
            return change(x) if isinstance(x, Tensor) else x
        return Batch(*(apply(x) for x in self))

    def to(self, device: torch.device) -> "Batch":
        """Move to a device; from pinned memory, the caller does not wait for it."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Copy to pinned memory, from which a GPU reads by itself. The loader calls it."""
        return self._map(Tensor.pin_memory)


class BatchKey(NamedTuple):
    """Examples with equal keys can share a batch; keys sort the groups."""
    task: str
    sources: int
    no_prompt: bool
    no_image: bool
    writes: bool                    # trains the text branch
    length: int                     # of the prompts
    shape: Shape                    # of the images, in pixels


class Group(NamedTuple):
    """Examples that share batches."""
    task: str
    indices: Sequence[int]          # an array, if there are many
    weight: float                   # share of the batches, relative to the other groups'


def _columns(examples: list[Example], tokenizer: T5Tokenizer, length: int,
             text_only_length: int, template: str) -> tuple[list[Kind], np.ndarray, np.ndarray]:
    """`Records.columns` of a plain list. Raises ValueError for a text that cannot be trained."""
    kinds: dict[Kind, int] = {}
    codes, tokens = [], []
    for e in examples:
        longest = length_for(e.image is None, length, text_only_length)
        texts = examine(e, tokenizer, longest, template)
        if texts.problem:
            raise ValueError(texts.problem)
        codes.append(kinds.setdefault(kind_of(e), len(kinds)))
        tokens.append(texts.tokens)
    return list(kinds), np.array(codes, np.int32), np.array(tokens, np.int32)


class Tasks(Dataset):
    """Examples of any tasks, in groups that share batches (`BatchKey`).

    records: `Records`, or a list of examples. Those of weight 0 are left out; indices count the
    others, which `records` then holds.
    weights: of the tasks' batches; the groups of a task share its weight by their sizes.
    captioned: tasks whose captions train the text branch besides questions (`*`: all).
    template, text_only_length: those with which the records were opened.
    buckets: crop the picture of a record and its sources to the shape nearest to the picture's;
    `cropped` is then the share of pixels that this loses, and that squares would lose. None: all
    images are squares of image_size.
    latents: set it (a row for each of `paths`) to have latents returned in place of images, so that
    each picture is encoded only once; `unreadable` then names pictures that have none.
    features: set it to a function that returns the teacher's features of aligned examples, (B, d)
    of images and of captions.
    Raises ValueError for unknown tasks and, in a list, for texts that cannot be trained.
    """

    def __init__(self, records: Records | list[Example], tokenizer: T5Tokenizer, image_size: int,
                 text_length: int, weights: str = "*=1", captioned: str = "*",
                 prompt_multiple: int = 0, template: str = "{question}",
                 buckets: Buckets | None = None, text_only_length: int = 0):
        self.tokenizer, self.image_size, self.template = tokenizer, image_size, template
        self.text_length, self.prompt_multiple = text_length, prompt_multiple
        self.text_only_length = text_only_length
        if isinstance(records, Records):
            kinds, codes, tokens = records.columns()
        else:
            kinds, codes, tokens = _columns(
                records, tokenizer, text_length, text_only_length, template)
        used = np.bincount(codes, minlength=len(kinds)) > 0
        tasks = {kind.task for kind, is_used in zip(kinds, used) if is_used}
        task_weights = parse_weights(weights)
        self.captioned = {name.strip() for name in captioned.split(",")} - {""}
        named = {name for name, weight in task_weights.items() if weight} | self.captioned
        if unknown := sorted(named - {"*"} - tasks):
            raise ValueError(f"no records of the task {unknown[0]!r}, which --weights or "
                             f"--captioned names; the data has {', '.join(sorted(tasks))}")
        self.left_out = sorted(task for task in tasks if not weight_of(task_weights, task))
        if len(self.left_out) == len(tasks):
            raise ValueError(f"no examples are left: the data has {', '.join(sorted(tasks))}, "
                             f"the weights are {weights}")
        if self.left_out:
            is_kept = np.array([kind.task not in self.left_out for kind in kinds])
            kept = np.flatnonzero(is_kept[codes]).astype(np.int32)
            codes, tokens = codes[kept], tokens[kept]
            if buckets:
                buckets = buckets._replace(aspects=buckets.aspects[kept])
            if isinstance(records, Records):
                records = records.select(kept)
            else:
                records = [records[i] for i in kept]
        self.records = records
        squares = Buckets([(image_size, image_size)], buckets.aspects if buckets else np.zeros(1))
        has_image = np.array([not kind.no_image for kind in kinds])[codes]          # (n,)
        self.cropped = buckets and tuple(
            cropped_share(b.shapes, b.aspects[has_image]) for b in (buckets, squares))
        self.keys, self.groups, self.group_of = self._group(
            kinds, codes, tokens, buckets or squares, task_weights)
        self.latents: Tensor | None = None
        self.unreadable: dict[Path, str] = {}
        self.features: Callable[[list[int]], tuple[Tensor, Tensor]] | None = None

    def _key(self, kind: Kind, tokens: int, shape: Shape) -> BatchKey:
        is_captioned = "*" in self.captioned or kind.task in self.captioned
        writes = kind.has_caption and (kind.no_prompt or is_captioned)
        length = prompt_length(tokens, kind.sources, self.text_length, self.prompt_multiple)
        return BatchKey(
            kind.task, kind.sources, kind.no_prompt, kind.no_image, writes, length, shape)

    def _group(self, kinds: list[Kind], codes: np.ndarray, tokens: np.ndarray, buckets: Buckets,
               weights: dict[str, float]) -> tuple[list[BatchKey], list[Group], np.ndarray]:
        """The sorted keys, the group of each, and the number of the group of each example."""
        sides = len(kinds), self.text_length + 1, len(buckets.shapes)
        # (n,) kind, tokens and shape as one number
        triples = codes * np.int32(sides[1]) + tokens
        triples = triples * np.int32(sides[2]) + nearest_shapes(*buckets)
        present = np.flatnonzero(np.bincount(triples)).tolist()
        key_of = {}
        for triple in present:
            kind, count, shape = map(int, np.unravel_index(triple, sides))
            key_of[triple] = self._key(kinds[kind], count, buckets.shapes[shape])
        keys = sorted(set(key_of.values()))
        numbers = np.zeros(max(present) + 1, np.min_scalar_type(len(keys)))
        for triple, key in key_of.items():
            numbers[triple] = keys.index(key)
        group_of = numbers[triples]                                                 # (n,)
        sizes = np.bincount(group_of)                                               # (groups,)
        by_group = np.argsort(group_of, kind="stable").astype(np.int32)             # (n,)
        members = np.split(by_group, np.cumsum(sizes)[:-1])
        task_sizes: collections.Counter[str] = collections.Counter()
        for key, indices in zip(keys, members):
            task_sizes[key.task] += len(indices)
        groups = []
        for key, indices in zip(keys, members):
            weight = weight_of(weights, key.task) * len(indices) / task_sizes[key.task]
            groups.append(Group(key.task, indices, weight))
        return keys, groups, group_of

    @functools.cached_property
    def aligned(self) -> np.ndarray:
        """The examples with a prompt and a caption to write, sorted."""
        is_aligned = np.array([key.writes and not key.no_prompt for key in self.keys])
        return np.flatnonzero(is_aligned[self.group_of]).astype(np.int32)

    @functools.cached_property
    def paths(self) -> list[Path]:
        """Every picture once. All records are read for it."""
        return list(dict.fromkeys(path for e in self.records for path in e.pictures))

    @functools.cached_property
    def _row_of(self) -> dict[Path, int]:
        return {path: row for row, path in enumerate(self.paths)}

    def __len__(self) -> int:
        return len(self.records)

    def origin(self, i: int) -> str:
        """Where example i is from: its file and line, or its place in the list."""
        return self.records.origin(i) if isinstance(self.records, Records) else f"example {i}"

    def shape_of(self, i: int) -> Shape:
        """The shape of the images of example i."""
        return self.keys[self.group_of[i]].shape

    def _pictures(self, e: Example, shape: Shape) -> list[np.ndarray] | list[Tensor]:
        """Pictures (H, W, 3), 1 + R of them, or latents (C, h, w) if they are cached."""
        paths = e.pictures
        if self.latents is None:
            return [load_cropped(path, shape) for path in paths]
        for path in paths:
            if path in self.unreadable:
                raise ValueError(self.unreadable[path])
        return [self.latents[self._row_of[path]] for path in paths]

    def _candidates(self, i: int) -> Iterator[int]:
        """Example i, then others of its group, in an order that depends on i alone."""
        yield i
        indices = self.groups[self.group_of[i]].indices
        count = min(len(indices), _ATTEMPTS)
        chosen = np.random.default_rng(i).choice(len(indices), count, replace=False)
        yield from (int(indices[k]) for k in chosen if indices[k] != i)

    def _load(self, i: int, skipped: list[tuple[str, str]]) -> tuple[int, Example, list]:
        """Load example i, or another one of its group if it cannot be used.

        Returns the example's index, itself and its pictures; adds (origin, reason) to `skipped`.
        """
        reasons = []
        for candidate in self._candidates(i):
            try:
                e = self.records[candidate]
                pictures = self._pictures(e, self.shape_of(i))
            except ValueError as error:
                reasons.append((self.origin(candidate), str(error)))
                continue
            skipped += reasons
            return candidate, e, pictures
        shown = "; ".join(f"{origin}: {reason}" for origin, reason in reasons[:3])
        task = self.groups[self.group_of[i]].task
        raise ValueError(f"none of {len(reasons)} records of the task {task} can be used: {shown}")

    def __getitems__(self, indices: list[int]) -> Batch:
        """The batch of examples of one group."""
        skipped: list[tuple[str, str]] = []
        loaded = [self._load(i, skipped) for i in indices]
        indices = [i for i, _, _ in loaded]
        examples = [e for _, e, _ in loaded]
        pictures = [picture for _, _, pictures in loaded for picture in pictures]
        key = self.keys[self.group_of[indices[0]]]
        shape = len(indices), 1 + key.sources
        images = latents = prompts = tokens = answer = features = None
        if pictures and self.latents is not None:
            latents = torch.stack(pictures).unflatten(0, shape)             # (B, 1 + R, C, h, w)
        elif pictures:
            images = _contiguous_images(pictures).unflatten(0, shape)       # (B, 1 + R, 3, H, W)
        captions: tuple[str, ...] = ()
        if not key.no_prompt:
            prompts = self.tokenizer([e.prompt for e in examples], self.text_length)
            prompts = prompts[:, :key.length]                                       # (B, L)
        if key.writes:
            captions = tuple(e.caption for e in examples)
            before = [[(asked(q, self.template), a) for q, a in e.before] for e in examples]
            length = length_for(key.no_image, self.text_length, self.text_only_length)
            questions = [asked(e.question, self.template) for e in examples]
            tokens, answer = self.tokenizer.dialogue(questions, captions, length, before)
            # tokens and answer are (B, L)
        if self.features is not None and key.writes and not key.no_prompt:
            features = self.features(indices)                                       # (B, d) each
        origins = tuple(self.origin(i) for i in indices)
        return Batch(key.task, images, latents, prompts, tokens, answer, features, captions,
                     origins, tuple(skipped))


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

    def _permutation(self, g: int, epoch: int, copies: int) -> Tensor:
        """The order of group g in an epoch: `copies` permutations, one after another."""
        seed = (self.seed * 1_000_003 + epoch) * 1009 + g
        generator = torch.Generator().manual_seed(seed % 2 ** 63)
        size = len(self.groups[g].indices)
        orders = [torch.randperm(size, generator=generator) for _ in range(copies)]
        return orders[0] if copies == 1 else torch.cat(orders)

    def __iter__(self) -> Iterator[list[int]]:
        total = sum(group.weight for group in self.groups)
        used = [0] * len(self.groups)                           # batches so far, by group
        current: dict[int, tuple[int, Tensor]] = {}             # group -> its epoch and order
        global_batch = self.batch * self.world

        def behind(g: int, position: int) -> float:
            return self.groups[g].weight / total * (position + 1) - used[g]

        for position in itertools.count():
            g = max(range(len(used)), key=lambda g: behind(g, position))
            if position >= self.start:
                indices = self.groups[g].indices
                copies = math.ceil(global_batch / len(indices))
                epoch, place = divmod(used[g], copies * len(indices) // global_batch)
                if g not in current or current[g][0] != epoch:
                    current.pop(g, None)                        # two orders would take memory
                    current[g] = epoch, self._permutation(g, epoch, copies)
                first = (place * self.world + self.rank) * self.batch
                chosen = current[g][1][first:first + self.batch].tolist()
                yield [int(indices[k]) for k in chosen]
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
