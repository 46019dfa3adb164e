"""Datasets in JSON lines, as the released code reads them: one parser for every format, one dataset, one order of batches.

Four kinds of records (image paths are relative to the JSONL's folder, or absolute):
  text to image   {"image": ["a.png"], "conversations": [{"from": "human", "value": CAPTION}, {"from": "gpt", "value": "<image>"}]}
  image to image  {"image": ["source.png", "target.png"], "conversations": [CAPTION OF THE TARGET, ...], "instruction": "..."}
  composition     {"original_images": [...], "generated_images": ["target.png"], "edit_prompt": "...", "caption": "..."}
  questions       {"image": ["a.png"], "conversations": [{"from": "human", "value": "<image>\\nQUESTION"},
                                                         {"from": "gpt", "value": ANSWER}, ...]}

Run alone to check a file and count its tasks:   python data.py FILE.jsonl
"""
import collections
import json
import sys
from collections.abc import Iterator
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
    task: str                       # "text_to_image", "image_to_image" or "question"
    image: Path                     # the picture to generate, or the one that the text is about
    sources: tuple[Path, ...]       # source pictures of editing and composition
    prompt: str                     # what the image branch is given: a caption or an instruction; the question of a question
    caption: str                    # what the text branch learns to say about `image`; the answer of a question


# ---------------------------------------------------------------- records

def _texts(turns) -> list[str]:
    """The texts of a conversation, whose turns are strings or {"from": ..., "value": ...}."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"'conversations' is {turns!r:.60}, expected a list of turns")
    return [(turn["value"] if isinstance(turn, dict) else turn).replace("<image>", "").strip() for turn in turns]


def parse_record(record: dict, folder: Path) -> list[Example]:
    """The examples of one record; a question record has one for each question. Raises KeyError or ValueError for an unknown form."""
    if "original_images" in record:
        sources = tuple(folder / name for name in record["original_images"])
        target = folder / record["generated_images"][0]
        return [Example("image_to_image", target, sources, record["edit_prompt"].strip(), record.get("caption", "").strip())]
    images, turns = [folder / name for name in record["image"]], _texts(record["conversations"])
    if "instruction" in record:
        if len(images) < 2:
            raise ValueError(f"has an instruction and {len(images)} picture(s), expected sources and then the target")
        return [Example("image_to_image", images[-1], tuple(images[:-1]), record["instruction"].strip(), turns[0])]
    if len(images) != 1:
        raise ValueError(f"has {len(images)} pictures and no instruction, expected one picture")
    if len(turns) == 2 and not turns[1]:
        return [Example("text_to_image", images[0], (), turns[0], turns[0])]
    if len(turns) % 2 or not all(turns):
        raise ValueError(f"has {len(turns)} turns, some perhaps empty; expected questions and answers in pairs")
    return [Example("question", images[0], (), q, a) for q, a in zip(turns[::2], turns[1::2])]


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


# ---------------------------------------------------------------- batches

class Batch(NamedTuple):
    """Either `pictures` or, where they were encoded beforehand, `latents`."""
    pictures: Tensor | None         # (B, 3, H, W) in [-1, 1]
    latents: Tensor | None          # (B, C, h, w) normalised
    tokens: Tensor                  # (B, L) the caption's ids


class Pairs(Dataset):
    """Pictures and captions. Set `latents` (n, C, h, w) to have them returned in place of the pictures: each is encoded only once."""

    def __init__(self, path: str | Path, tokenizer: T5Tokenizer, image_size: int, text_length: int):
        self.examples = [e for e in read_jsonl(path) if e.task == "text_to_image"]
        if not self.examples:
            raise ValueError(f"{path}: holds no text-to-image records")
        self.tokens = tokenizer([e.caption for e in self.examples], length=text_length)       # (n, L)
        if (found := (self.tokens == tokenizer.mask_id).any(dim=1).nonzero()).numel():
            text = self.examples[found[0].item()].caption
            raise ValueError(f"{path}: the caption {text!r:.80} holds the mask token <extra_id_0>; remove it")
        self.image_size = image_size
        self.latents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def picture(self, i: int) -> Tensor:
        return load_image(self.examples[i].image, self.image_size)

    def __getitems__(self, indices: list[int]) -> Batch:
        if self.latents is not None:
            return Batch(None, self.latents[indices], self.tokens[indices])
        return Batch(torch.stack([self.picture(i) for i in indices]), None, self.tokens[indices])


class BatchOrder(Sampler[list[int]]):
    """Endless batches of indices for one rank, a pure function of (seed, position): a resumed run continues with the same data.

    Every epoch is a new permutation; ranks take consecutive slices of it. `start` is the number of micro batches already used.
    """

    def __init__(self, length: int, batch: int, seed: int, rank: int = 0, world: int = 1, start: int = 0):
        if length < batch * world:
            raise ValueError(f"{length} examples are not enough for one batch of {batch} on each of {world} ranks")
        self.length, self.batch, self.seed, self.rank, self.world, self.start = length, batch, seed, rank, world, start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.length // (self.batch * self.world)
        position, epoch, order = self.start, None, None
        while True:
            if position // per_epoch != epoch:
                epoch = position // per_epoch
                order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)).tolist()
            first = ((position % per_epoch) * self.world + self.rank) * self.batch
            yield order[first:first + self.batch]
            position += 1


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        tasks = collections.Counter(e.task for e in read_jsonl(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"error: {error}")
    for task, number in tasks.items():
        print(f"{task:16} {number}")
