"""The frozen encoders that the intrinsic alignment looks up to, needed in training only: Qwen2.5-VL, and a small one.

Equation (4) of UniAlignment (arXiv 2509.23760) pulls the middle of both streams towards what Qwen2.5-VL (arXiv 2502.13923) makes
of the target image and of its caption. Here are the parts of Qwen2.5-VL which that takes: from pictures to patches, the vision
encoder, the byte-level BPE tokenizer and the language model's *input* embeddings. The language model itself is never run.
The small one is for the shapes world: trained from nothing to tell pairs of a picture and a caption apart, in about a minute.

Run alone to see the two embeddings of a pair:   python teacher.py FOLDER PICTURE "CAPTION"
"""
import functools
import itertools
import json
import math
import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from checkpoint import Checkpoint, Source, load, make_config

# ---------------------------------------------------------------- pictures -> patches

PIXEL_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])   # CLIP's statistics of natural pictures, in [0, 1]
PIXEL_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
MIN_PIXELS, MAX_PIXELS = 56 * 56, 1280 * 28 * 28                 # 4 to 1280 merged tokens
Picture = Image.Image | np.ndarray                               # an array: uint8, (height, width, 3)


def nearest_size(height: int, width: int, cell: int) -> tuple[int, int]:
    """(height, width) rounded to multiples of `cell`, scaled first where the area would leave MIN_PIXELS ... MAX_PIXELS.

    Raises ValueError for a picture more than 200 times as long as wide, as Qwen2.5-VL does.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"a picture of {height} x {width} pixels: one side may be at most 200 times the other")
    rounded = round(height / cell) * cell, round(width / cell) * cell
    if math.prod(rounded) > MAX_PIXELS:
        scale, snap = math.sqrt(MAX_PIXELS / (height * width)), math.floor
    elif math.prod(rounded) < MIN_PIXELS:
        scale, snap = math.sqrt(MIN_PIXELS / (height * width)), math.ceil
    else:
        return rounded
    return max(cell, snap(height * scale / cell) * cell), max(cell, snap(width * scale / cell) * cell)


def rgb(image: Picture) -> np.ndarray:
    """The pixels of a picture, (height, width, 3) uint8. Raises ValueError for an array that is none."""
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"a picture of shape {pixels.shape} and type {pixels.dtype}, expected (height, width, 3) and uint8")
    return pixels


def image_patches(image: Picture, patch: int, merge: int, frames: int) -> tuple[Tensor, tuple[int, int, int]]:
    """One picture as (h * w, 3 * frames * patch * patch) rows, with its grid (1, h, w); see `preprocess`."""
    pixels = rgb(image)
    size = nearest_size(*pixels.shape[:2], cell=patch * merge)
    if size != pixels.shape[:2]:
        pixels = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))
    h, w = size[0] // patch, size[1] // patch
    x = (torch.tensor(pixels) / 255 - PIXEL_MEAN) / PIXEL_STD            # (H, W, 3)
    x = x.view(h // merge, merge, patch, w // merge, merge, patch, 3)
    x = x.permute(0, 3, 1, 4, 6, 2, 5).flatten(0, 3)                     # (h * w, 3, patch, patch): a merge group is contiguous
    x = x[:, :, None].expand(-1, -1, frames, -1, -1).flatten(1)          # (h * w, 3 * frames * patch * patch)
    return x, (1, h, w)


def preprocess(images: Sequence[Picture], patch: int = 14, merge: int = 2, frames: int = 2) -> tuple[Tensor, Tensor]:
    """What the vision encoder reads: patches (N, 3 * frames * patch * patch) of all pictures in a row, and grid_thw (B, 3).

    images: PIL pictures or uint8 arrays (height, width, 3), of any sizes. Sides that are not multiples of patch * merge are
            resized to the nearest ones (bicubic). A still picture is shown `frames` times, since the encoder was made for video.
    Each run of merge * merge patches is one merged token: row by row inside of it, and the merged tokens row by row.
    Raises ValueError for anything else. Source: Qwen2.5-VL's image processor.
    """
    if isinstance(images, Image.Image) or len(images) == 0:
        raise ValueError("preprocess takes a sequence of at least one picture")
    patches, grids = zip(*(image_patches(image, patch, merge, frames) for image in images))
    return torch.cat(patches), torch.tensor(grids)


# ---------------------------------------------------------------- who attends to whom

def patch_positions(grid_thw: Tensor, merge: int) -> Tensor:
    """(N, 3) frame, row and column of every patch, in the order of `preprocess`; frames are numbered through all pictures."""
    positions, seen = [], 0
    for t, h, w in grid_thw.tolist():
        p = torch.cartesian_prod(torch.arange(seen, seen + t), torch.arange(h), torch.arange(w))   # (t * h * w, 3)
        p = p.view(t, h // merge, merge, w // merge, merge, 3).transpose(2, 3)                     # merge * merge cells together
        positions.append(p.flatten(0, 4))                                                          # (t * h * w, 3)
        seen += t
    return torch.cat(positions)


class Groups(NamedTuple):
    """Tokens by group, G groups padded to the longest (L): attention in a batch of groups costs G * L^2, not N^2.

    Qwen2.5-VL sorts its tokens by window for this and back at the end. Attention does not mind the order, so here they stay put.
    """
    members: Tensor                                              # (G, L) which token sits here, -1: nobody
    mask: Tensor                                                 # (G, 1, 1, L) True where somebody does
    seat: Tensor                                                 # (N,) where in the flattened (G * L) a token sits

    @classmethod
    def of(cls, labels: Tensor, device: torch.device) -> "Groups":
        """labels: (N,) or (N, n), one number or row for each token; tokens with equal ones form a group."""
        rows = 0 if labels.ndim > 1 else None                    # rows are compared a hundred times as slowly as numbers
        group, sizes = labels.unique(dim=rows, return_inverse=True, return_counts=True)[1:]                 # (N,), (G,)
        members = pad_sequence(group.argsort(stable=True).split(sizes.tolist()), batch_first=True, padding_value=-1)
        taken = members >= 0                                                                                # (G, L)
        seat = torch.empty_like(group)
        seat[members[taken]] = taken.flatten().nonzero()[:, 0]
        return cls(members.to(device), taken[:, None, None].to(device), seat.to(device))


def rotary_angles(positions: Tensor, head_dim: int) -> Tensor:
    """(N, head_dim / 2) angles: the first half turns with the row, the second with the column. positions: (N, 2)."""
    frequencies = 10000 ** -(torch.arange(0, head_dim, 4, device=positions.device) / head_dim)      # (head_dim / 4,)
    return (positions[:, :, None] * frequencies).flatten(1)                                         # (N, head_dim / 2)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (i, i + head_dim / 2) of x (N, heads, head_dim) by the angles, in float32: bfloat16 blurs far positions."""
    a, b = x.float().chunk(2, dim=-1)                                                 # (N, heads, head_dim / 2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]                           # (N, 1, head_dim / 2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)      # (N, heads, head_dim)


# ---------------------------------------------------------------- the vision encoder

@dataclass(frozen=True)
class QwenVisionConfig:
    """Sizes of Qwen2.5-VL's vision encoder (the defaults: 7B). Raises ValueError for sizes that do not fit each other."""
    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112                                       # pixels
    full_attention_blocks: tuple[int, ...] = (7, 15, 23, 31)
    out_hidden_size: int = 3584

    def __post_init__(self):
        if self.num_heads < 1 or self.hidden_size % (4 * self.num_heads):
            raise ValueError(f"num_heads = {self.num_heads}, expected to cut hidden_size = {self.hidden_size} into multiples "
                             "of 4; a checkpoint without config.json does not tell the heads: give num_heads")
        if self.window_size < 1 or self.window_size % (self.patch_size * self.spatial_merge_size):
            raise ValueError(f"window_size = {self.window_size} pixels, expected a multiple of a merged token's "
                             f"{self.patch_size * self.spatial_merge_size}")
        if not all(0 <= i < self.depth for i in self.full_attention_blocks):
            raise ValueError(f"full_attention_blocks = {self.full_attention_blocks}, expected numbers from 0 to {self.depth - 1}")


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, angles: Tensor, groups: Groups) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)                     # (N, heads, head_dim)
        q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (y[groups.members].transpose(1, 2) for y in (q, k, v))                      # (G, heads, L, head_dim)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=groups.mask)
        x = x.transpose(1, 2).flatten(0, 1)[groups.seat].flatten(1)                           # (N, D)
        return self.proj(x)


class GatedMLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden)
        self.up_proj = nn.Linear(dim, hidden)
        self.down_proj = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: QwenVisionConfig):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.attn = Attention(config.hidden_size, config.num_heads)
        self.norm2 = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, angles: Tensor, groups: Groups) -> Tensor:
        x = x + self.attn(self.norm1(x), angles, groups)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Concatenate the merge * merge patches of a cell and map them to the width of the language model."""

    def __init__(self, dim: int, merge: int, out_dim: int):
        super().__init__()
        self.cell = merge * merge
        self.ln_q = nn.RMSNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim * self.cell, dim * self.cell), nn.GELU(), nn.Linear(dim * self.cell, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_q(x).view(-1, self.cell * x.shape[1])                # (M, cell * D)
        return self.mlp(x)                                               # (M, out_dim)


def vision_config(checkpoint: Checkpoint, overrides: dict) -> QwenVisionConfig:
    """Sizes from the shapes, then from config.json (Qwen's names, other keys are of no use here), then from `overrides`."""
    patch_weight = checkpoint.shape("patch_embed.proj.weight")
    if len(patch_weight) != 5:
        raise ValueError(f"{checkpoint.path}: patch_embed.proj.weight {patch_weight}, expected "
                         "(hidden, channels, frames, patch, patch)")
    hidden, channels, frames, patch, _ = patch_weight
    values = dict(
        depth=checkpoint.count("blocks.{}."),
        hidden_size=hidden, in_channels=channels, temporal_patch_size=frames, patch_size=patch,
        intermediate_size=checkpoint.shape("blocks.0.mlp.gate_proj.weight")[0],
        spatial_merge_size=math.isqrt(checkpoint.shape("merger.mlp.0.weight")[0] // hidden),
        out_hidden_size=checkpoint.shape("merger.mlp.2.weight")[0])
    renamed = {"in_chans": "in_channels", "fullatt_block_indexes": "full_attention_blocks"}
    for key, value in checkpoint.config.get("vision_config", checkpoint.config).items():
        name = renamed.get(key, key)
        if name in {field.name for field in fields(QwenVisionConfig)}:
            values[name] = value
    return make_config(QwenVisionConfig, values | overrides, str(checkpoint.path))


class QwenVision(nn.Module):
    """Qwen2.5-VL's vision encoder: patches -> blocks with window attention, full attention in a few -> merged tokens."""

    def __init__(self, config: QwenVisionConfig):
        super().__init__()
        self.config = config
        self.patch_width = config.in_channels * config.temporal_patch_size * config.patch_size ** 2
        self.patch_embed = nn.Linear(self.patch_width, config.hidden_size, bias=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.merger = PatchMerger(config.hidden_size, config.spatial_merge_size, config.out_hidden_size)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
                        **overrides) -> "QwenVision":
        """The frozen encoder from Qwen2.5-VL's folder (only shards with `visual.*` are opened) or from one .safetensors file.

        overrides: fields of QwenVisionConfig; without config.json, what the shapes do not tell (num_heads, window_size,
                   full_attention_blocks) is as in 7B.
        Raises ValueError naming the file and every tensor that is missing, superfluous or wrongly shaped.
        """
        checkpoint = Checkpoint(path, wanted=("visual.",)).under("visual.")
        with torch.device("meta"):
            model = cls(vision_config(checkpoint, overrides))
        sources = {name: Source((name,)) for name in model.state_dict()}
        # Patches do not overlap: the convolution of the file is a matrix product.
        sources["patch_embed.weight"] = Source(("patch_embed.proj.weight",), lambda kernel: kernel.flatten(1))
        return load(model, checkpoint, sources, dtype=dtype, device=device).eval().requires_grad_(False)

    def forward(self, patches: Tensor, grid_thw: Tensor) -> Tensor:
        """Merged tokens (N / merge^2, out_hidden_size) of all pictures in a row; no picture sees another, nor a frame another.

        patches: (N, channels * frames * patch * patch), from `preprocess`; grid_thw: (B, 3) frames, rows, columns of patches.
        Raises ValueError when the two do not fit each other or the model.
        """
        merge = self.config.spatial_merge_size
        if patches.ndim != 2 or patches.shape[1] != self.patch_width:
            raise ValueError(f"patches {tuple(patches.shape)}, expected (N, {self.patch_width})")
        if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or (grid_thw < 1).any() or (grid_thw[:, 1:] % merge).any():
            raise ValueError(f"grid_thw {grid_thw.tolist()}, expected (frames, rows, columns), the latter multiples of {merge}")
        if grid_thw.prod(dim=1).sum() != len(patches):
            raise ValueError(f"patches {tuple(patches.shape)}, expected {grid_thw.prod(dim=1).sum()} of them for grid_thw "
                             f"{grid_thw.tolist()}")

        device, window = patches.device, self.config.window_size // self.config.patch_size
        positions = patch_positions(grid_thw, merge)                                          # (N, 3)
        in_frame = Groups.of(positions[:, 0], device)
        in_window = Groups.of(positions // torch.tensor([1, window, window]), device)
        angles = rotary_angles(positions[:, 1:].to(device), self.config.hidden_size // self.config.num_heads)

        x = self.patch_embed(patches.to(self.patch_embed.weight.dtype))                       # (N, D)
        for i, block in enumerate(self.blocks):
            x = block(x, angles, in_frame if i in self.config.full_attention_blocks else in_window)
        return self.merger(x)                                                                 # (N / merge^2, out_hidden_size)


# ---------------------------------------------------------------- captions -> token ids

@functools.cache
def characters(category: str) -> str:
    r"""All characters of a Unicode category ("L": letters, "N": numbers), to stand inside a [...]: `re` knows no \p{L}."""
    codes = (code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith(category))
    runs = (list(run) for _, run in itertools.groupby(enumerate(codes), lambda pair: pair[1] - pair[0]))
    return "".join(rf"\U{run[0][1]:08x}-\U{run[-1][1]:08x}" for run in runs)


@functools.cache
def word_pattern() -> re.Pattern:
    """Qwen2's split of a text into words, which no merge crosses: contractions, letters, single digits, signs, white space."""
    letter, number = characters("L"), characters("N")
    space = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"   # not \s: `re` counts \x1c-\x1f as well
    return re.compile(rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n{letter}{number}]?[{letter}]+|[{number}]"
                      rf"| ?[^{space}{letter}{number}]+[\r\n]*|[{space}]*[\r\n]+|[{space}]+(?![^{space}])|[{space}]+")


def byte_symbols() -> list[str]:
    """The visible character that stands for each byte in vocab.json: its own, or one from 256 on where it has none (GPT-2)."""
    visible, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, itertools.count(256)
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


class QwenTokenizer:
    """Byte-level BPE: nothing is unknown. Chat markers such as <|im_end|> are plain text here, since captions have none.

    folder: holds vocab.json and merges.txt. Raises ValueError, naming file and line, for what is missing or does not fit.
    """

    def __init__(self, folder: str | Path):
        vocab_file, merges_file = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        for file in (vocab_file, merges_file):
            if not file.is_file():
                raise ValueError(f"{file}: no such file; the tokenizer is vocab.json and merges.txt of Qwen2.5-VL")
        try:
            self.ids = json.loads(vocab_file.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{vocab_file}: not valid JSON ({error})") from error
        self.symbols = byte_symbols()
        if absent := [byte for byte, symbol in enumerate(self.symbols) if symbol not in self.ids]:
            raise ValueError(f"{vocab_file}: no token for byte {absent[0]}, expected one for each of the 256")
        self.ranks = {}
        for number, line in enumerate(merges_file.read_text("utf-8").split("\n"), start=1):
            if not line or number == 1 and line.startswith("#version"):
                continue
            pair = tuple(line.split(" "))
            if len(pair) != 2 or "".join(pair) not in self.ids:
                raise ValueError(f"{merges_file}, line {number}: {line!r}, expected two pieces that together are in vocab.json")
            self.ranks[pair] = len(self.ranks)
        self.word_ids = functools.lru_cache(maxsize=2 ** 16)(self.merge)      # captions repeat their words

    def merge(self, word: str) -> list[int]:
        """Ids of one word: its bytes, the pair that comes first in merges.txt joined again and again."""
        pieces = [self.symbols[byte] for byte in word.encode("utf-8")]
        while len(pieces) > 1:
            rank, i = min((self.ranks.get(pair, math.inf), i) for i, pair in enumerate(itertools.pairwise(pieces)))
            if rank == math.inf:
                break
            pieces[i:i + 2] = ["".join(pieces[i:i + 2])]
        return [self.ids[piece] for piece in pieces]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, nothing added at its ends; the empty text has none. Source: Qwen2's tokenizer."""
        words = word_pattern().findall(unicodedata.normalize("NFC", text))
        return [token for word in words for token in self.word_ids(word)]


# ---------------------------------------------------------------- Qwen2.5-VL as the teacher

EMBEDDING = "model.embed_tokens.weight"


class QwenTeacher(nn.Module):
    """Equation (4)'s targets. embedding: (vocabulary, out_dim), the language model's input embeddings."""

    def __init__(self, vision: QwenVision, tokenizer: QwenTokenizer, embedding: Tensor):
        super().__init__()
        self.vision = vision
        self.tokenizer = tokenizer
        self.embedding = nn.Parameter(embedding, requires_grad=False)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
                        **overrides) -> "QwenTeacher":
        """The released folder: config.json, vocab.json, merges.txt, the index and the shards that hold what is used here.

        Raises ValueError naming the file for anything missing or of the wrong shape.
        """
        vision = QwenVision.from_pretrained(folder, dtype, device, **overrides)
        tokenizer = QwenTokenizer(folder)
        checkpoint = Checkpoint(folder, wanted=(EMBEDDING,))
        shape, rows, width = checkpoint.shape(EMBEDDING), max(tokenizer.ids.values()) + 1, vision.config.out_hidden_size
        if len(shape) != 2 or shape[0] < rows or shape[1] != width:
            raise ValueError(f"{checkpoint.path}: {EMBEDDING} {shape}, expected at least {rows} rows (the ids of vocab.json) "
                             f"of width {width} (the vision encoder's)")
        return cls(vision, tokenizer, checkpoint.read(EMBEDDING, dtype, device))

    @property
    def out_dim(self) -> int:
        return self.embedding.shape[1]

    @torch.no_grad()
    def image_features(self, images: Sequence[Picture]) -> Tensor:
        """(B, out_dim) float32: the mean over each picture's merged tokens. images: as in `preprocess`."""
        config = self.vision.config
        patches, grid_thw = preprocess(images, config.patch_size, config.spatial_merge_size, config.temporal_patch_size)
        tokens = self.vision(patches.to(self.embedding.device), grid_thw)                     # (N / merge^2, out_dim)
        lengths = grid_thw.prod(dim=1) // config.spatial_merge_size ** 2
        return torch.stack([part.float().mean(dim=0) for part in tokens.split(lengths.tolist())])  # (B, out_dim)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(B, out_dim) float32: the mean input embedding of each text's tokens, no padding among them.

        Raises ValueError for an empty text: it has no tokens, hence no direction to align with.
        """
        if isinstance(texts, str) or len(texts) == 0 or "" in texts:
            raise ValueError(f"texts = {texts!r}, expected a sequence of texts, none of them empty")
        ids = [torch.tensor(self.tokenizer.encode(text), device=self.embedding.device) for text in texts]
        return torch.stack([F.embedding(one, self.embedding).float().mean(dim=0) for one in ids])               # (B, out_dim)


# ---------------------------------------------------------------- a small teacher, trained on pairs

PADDING = 0                                                      # the id of <pad> in a sentencepiece model of T5's kind


@dataclass(frozen=True)
class ContrastiveTeacherConfig:
    """Sizes of the small teacher. Raises ValueError for sizes that do not fit each other."""
    vocab_size: int
    image_size: int = 64                                         # pixels, both sides
    channels: int = 64                                           # of the first convolution; the others have twice as many
    depth: int = 1                                               # blocks of the text side: these names are those of `Block`
    hidden_size: int = 128
    intermediate_size: int = 256
    num_heads: int = 4
    out_dim: int = 128

    def __post_init__(self):
        if self.num_heads < 1 or self.hidden_size % (4 * self.num_heads):
            raise ValueError(f"num_heads = {self.num_heads}, expected to cut hidden_size = {self.hidden_size} into fours")
        if self.image_size < 16 or self.image_size % 16:
            raise ValueError(f"image_size = {self.image_size}, expected a multiple of 16")


class ContrastiveTeacher(nn.Module):
    """What the tiny preset has for Qwen2.5-VL: a picture and its caption, and no other's, are mapped to one direction.

    Pictures: convolutions, then one matrix over all places, so that a feature can tell where something is. Texts: the mean
    over the tokens after a block of attention, which tells a word which object it is about.
    """

    def __init__(self, config: ContrastiveTeacherConfig, tokenizer: SentencePieceProcessor):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        c, places = config.channels, (config.image_size // 16) ** 2
        self.image = nn.Sequential(
            nn.PixelUnshuffle(4), nn.Conv2d(48, c, 3, padding=1), nn.SiLU(),                  # (B, c, S / 4, S / 4)
            nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), nn.SiLU(),                           # (B, 2 c, S / 8, S / 8)
            nn.Conv2d(2 * c, 2 * c, 3, stride=2, padding=1), nn.SiLU(),                       # (B, 2 c, S / 16, S / 16)
            nn.Flatten(), nn.Linear(2 * c * places, config.out_dim))                          # (B, out_dim)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.text = nn.Linear(config.hidden_size, config.out_dim)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32,
                        device: str | torch.device = "cpu") -> "ContrastiveTeacher":
        """The frozen teacher from a folder with model.safetensors and tokenizer.model.

        Raises ValueError naming the file for anything missing or of the wrong shape.
        """
        checkpoint, file = Checkpoint(folder), Path(folder) / "tokenizer.model"
        config = make_config(ContrastiveTeacherConfig, checkpoint.config, str(checkpoint.path))
        try:
            tokenizer = SentencePieceProcessor(model_proto=file.read_bytes())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{file}: not a sentencepiece model ({error})") from error
        if (found := (tokenizer.get_piece_size(), tokenizer.pad_id())) != (config.vocab_size, PADDING):
            raise ValueError(f"{file}: {found[0]} pieces, <pad> is {found[1]}; expected {config.vocab_size} and {PADDING}")
        with torch.device("meta"):
            model = cls(config, tokenizer)
        sources = {name: Source((name,)) for name in model.state_dict()}
        return load(model, checkpoint, sources, dtype=dtype, device=device).eval().requires_grad_(False)

    @property
    def out_dim(self) -> int:
        return self.config.out_dim

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """(B, L) ids, padded to the longest text. Raises ValueError for an empty text."""
        rows = [] if isinstance(texts, str) else self.tokenizer.encode(list(texts))
        if not rows or not all(rows):
            raise ValueError(f"texts = {texts!r}, expected a sequence of texts, none of them empty")
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PADDING)     # (B, L)

    def encode_texts(self, ids: Tensor) -> Tensor:
        """(B, out_dim) of ids (B, L). Padding is left out before anything is computed."""
        kept = ids != PADDING                                                                 # (B, L)
        text, place = kept.nonzero(as_tuple=True)                                             # (N,) which text, where in it
        groups = Groups.of(text, ids.device)
        angles = rotary_angles(place[:, None].expand(-1, 2), self.config.hidden_size // self.config.num_heads)
        x = self.embedding(ids[kept])                                                         # (N, D)
        for block in self.blocks:
            x = block(x, angles, groups)
        total = x.new_zeros(len(ids), x.shape[1]).index_add(0, text, x)                       # (B, D)
        return self.text(total / kept.sum(dim=1, keepdim=True))                               # (B, out_dim)

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, out_dim) of images (B, 3, S, S) in [-1, 1] and of their captions' ids (B, L)."""
        with sdpa_kernel(SDPBackend.MATH):                       # on CPU twice as fast as the fused backward of short sequences
            return self.image(images), self.encode_texts(ids)

    @torch.no_grad()
    def image_features(self, images: Sequence[Picture]) -> Tensor:
        """(B, out_dim) float32. images: PIL pictures or uint8 arrays (S, S, 3). Raises ValueError for other sizes."""
        pixels, size = [rgb(image) for image in images], self.config.image_size
        if (found := {p.shape for p in pixels}) != {(size, size, 3)}:
            raise ValueError(f"pictures of shapes {sorted(found)}, expected at least one, each ({size}, {size}, 3)")
        x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(self.embedding.weight.device)       # (B, 3, S, S)
        return self.image((x / 127.5 - 1).to(self.embedding.weight.dtype)).float()                      # (B, out_dim)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(B, out_dim) float32. Raises ValueError for an empty text."""
        return self.encode_texts(self.token_ids(texts).to(self.embedding.weight.device)).float()


def load_teacher(path: str | Path, dtype: torch.dtype = torch.float32,
                 device: str | torch.device = "cpu") -> QwenTeacher | ContrastiveTeacher:
    """The teacher in a folder: the small one has a tokenizer.model, Qwen2.5-VL a vocab.json. Raises ValueError for others."""
    for file, kind in (("tokenizer.model", ContrastiveTeacher), ("vocab.json", QwenTeacher)):
        if (Path(path) / file).is_file():
            return kind.from_pretrained(path, dtype, device)
    raise ValueError(f"{path}: expected a teacher's folder, with tokenizer.model (the small one) or vocab.json (Qwen2.5-VL)")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    teacher = load_teacher(sys.argv[1])
    print("tokens", teacher.tokenizer.encode(sys.argv[3]))
    print("image", teacher.image_features([Image.open(sys.argv[2])]))
    print("text", teacher.text_features([sys.argv[3]]))
