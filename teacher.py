"""The frozen teacher of the intrinsic alignment loss, needed in training only: Qwen2.5-VL.

Equation (4) of UniAlignment (arXiv 2509.23760) aligns the middle of both streams with Qwen2.5-VL's
(arXiv 2502.13923) embeddings of the target image and of its caption. This file holds the parts of
Qwen2.5-VL that compute them: the conversion of pictures to patches, the vision encoder, the
byte-level BPE tokenizer and the language model's *input* embeddings. The language model itself is
never run. `load_teacher` also finds the small teacher of experiments/small_teacher.py.

Run alone to print both embeddings of a pair:   python teacher.py FOLDER PICTURE "CAPTION"
"""
import functools
import itertools
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
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from checkpoint import Checkpoint, Source, load, make_config, read_json
from data import load_picture

# ---------------------------------------------------------------- pictures -> patches

# CLIP's mean and standard deviation of RGB values in [0, 1]
PIXEL_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
PIXEL_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
MIN_PIXELS, MAX_PIXELS = 56 * 56, 1280 * 28 * 28                 # 4 to 1280 merged tokens
Picture = Image.Image | np.ndarray                               # an array: (H, W, 3) uint8


def nearest_size(height: int, width: int, cell: int) -> tuple[int, int]:
    """Round (height, width) to multiples of `cell`.

    A size whose area leaves MIN_PIXELS ... MAX_PIXELS is scaled to that limit first. Raises
    ValueError for a picture more than 200 times as long as wide, as Qwen2.5-VL does.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"a picture of {height} x {width} pixels, expected one side to be at most "
                         "200 times the other")
    rounded = round(height / cell) * cell, round(width / cell) * cell
    if math.prod(rounded) > MAX_PIXELS:
        area, snap = MAX_PIXELS, math.floor
    elif math.prod(rounded) < MIN_PIXELS:
        area, snap = MIN_PIXELS, math.ceil
    else:
        return rounded
    scale = math.sqrt(area / (height * width))
    rows, columns = snap(height * scale / cell), snap(width * scale / cell)
    return max(1, rows) * cell, max(1, columns) * cell


def rgb(picture: Picture) -> np.ndarray:
    """The pixels of a picture, (H, W, 3) uint8. Raises ValueError for any other array."""
    pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"a picture of shape {pixels.shape} and type {pixels.dtype}, expected "
                         "(height, width, 3) and uint8")
    return pixels


def picture_patches(picture: Picture, patch: int, merge: int,
                    frames: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Patches (h * w, 3 * frames * patch * patch) of one picture and its grid (1, h, w).

    The order of the patches is that of `preprocess`.
    """
    pixels = rgb(picture)
    size = nearest_size(*pixels.shape[:2], cell=patch * merge)
    if size != pixels.shape[:2]:
        resized = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
        pixels = np.asarray(resized)
    h, w = size[0] // patch, size[1] // patch
    x = (torch.tensor(pixels) / 255 - PIXEL_MEAN) / PIXEL_STD      # (H, W, 3)
    x = x.view(h // merge, merge, patch, w // merge, merge, patch, 3)
    x = x.permute(0, 3, 1, 4, 6, 2, 5).flatten(0, 3)               # (h * w, 3, patch, patch)
    x = x[:, :, None].expand(-1, -1, frames, -1, -1).flatten(1)    # (h * w, 3 * frames * patch^2)
    return x, (1, h, w)


def preprocess(pictures: Sequence[Picture], patch: int = 14, merge: int = 2,
               frames: int = 2) -> tuple[Tensor, Tensor]:
    """The input of the vision encoder: patches (N, 3 * frames * patch * patch), grid_thw (B, 3).

    The patches of all pictures follow each other. Each run of merge * merge patches becomes one
    merged token; the patches of a token and the tokens of a picture are both in raster order.

    pictures: PIL pictures or uint8 arrays (height, width, 3), of any sizes. Sides that are not
              multiples of patch * merge are resized to the nearest multiple (bicubic). A picture is
              repeated `frames` times, since the encoder was made for video.
    Raises ValueError for anything else. Source: Qwen2.5-VL's image processor.
    """
    if isinstance(pictures, Image.Image) or len(pictures) == 0:
        raise ValueError("preprocess takes a sequence of at least one picture")
    pairs = [picture_patches(picture, patch, merge, frames) for picture in pictures]
    patches, grids = zip(*pairs)
    return torch.cat(patches), torch.tensor(grids)


# ---------------------------------------------------------------- groups of tokens and positions

def patch_positions(grid_thw: Tensor, merge: int) -> Tensor:
    """Frame, row and column (N, 3) of every patch, in the order of `preprocess`.

    Frames are numbered consecutively over all pictures, so that no two share a number.
    """
    positions, first = [], 0
    for t, h, w in grid_thw.tolist():
        frames = torch.arange(first, first + t)
        p = torch.cartesian_prod(frames, torch.arange(h), torch.arange(w))        # (t * h * w, 3)
        p = p.view(t, h // merge, merge, w // merge, merge, 3).transpose(2, 3)
        positions.append(p.flatten(0, 4))                                         # (t * h * w, 3)
        first += t
    return torch.cat(positions)


class Groups(NamedTuple):
    """N tokens in G groups, each group padded to the size L of the largest.

    Attention inside of groups costs G * L^2 rather than N^2. Qwen2.5-VL sorts its tokens by window
    and restores the order at the end; here they keep their order, since attention ignores it.
    """
    members: Tensor                 # (G, L) index of the token in each place, -1 for padding
    mask: Tensor                    # (G, 1, 1, L) False for padding
    place: Tensor                   # (N,) place of each token in the flattened (G * L)

    @classmethod
    def of(cls, labels: Tensor, device: torch.device) -> "Groups":
        """Group tokens with equal labels. labels: (N,) or (N, n), a number or a row per token."""
        dim = 0 if labels.ndim > 1 else None      # comparing rows is a hundred times as slow
        _, group, sizes = labels.unique(dim=dim, return_inverse=True, return_counts=True)
        by_group = group.argsort(stable=True).split(sizes.tolist())
        members = pad_sequence(by_group, batch_first=True, padding_value=-1)      # (G, L)
        taken = members >= 0                                                      # (G, L)
        place = torch.empty_like(group)                                           # (N,)
        place[members[taken]] = taken.flatten().nonzero()[:, 0]
        return cls(members.to(device), taken[:, None, None].to(device), place.to(device))


def rotary_angles(positions: Tensor, head_dim: int) -> Tensor:
    """Rotary angles (N, head_dim / 2) of positions (N, 2): first of the row, then of the column."""
    exponents = torch.arange(0, head_dim, 4, device=positions.device) / head_dim
    frequencies = 10000 ** -exponents                                        # (head_dim / 4,)
    return (positions[:, :, None] * frequencies).flatten(1)                  # (N, head_dim / 2)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of x (N, heads, head_dim) by angles (N, head_dim / 2).

    In float32, since bfloat16 cannot resolve large angles.
    """
    a, b = x.float().chunk(2, dim=-1)                                     # (N, heads, head_dim / 2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]               # (N, 1, head_dim / 2)
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)   # (N, heads, head_dim)
    return rotated.to(x.dtype)


# ---------------------------------------------------------------- the vision encoder

@dataclass(frozen=True)
class QwenVisionConfig:
    """Sizes of Qwen2.5-VL's vision encoder, by default those of the 7B model.

    Raises ValueError for sizes that do not fit each other.
    """
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
            raise ValueError(f"num_heads = {self.num_heads}, expected to cut hidden_size = "
                             f"{self.hidden_size} into multiples of 4; without config.json the "
                             "number of heads is unknown: give num_heads")
        token_size = self.patch_size * self.spatial_merge_size
        if self.window_size < 1 or self.window_size % token_size:
            raise ValueError(f"window_size = {self.window_size} pixels, expected a multiple of a "
                             f"merged token's {token_size}")
        if not all(0 <= i < self.depth for i in self.full_attention_blocks):
            raise ValueError(f"full_attention_blocks = {self.full_attention_blocks}, expected "
                             f"numbers from 0 to {self.depth - 1}")


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, angles: Tensor, groups: Groups) -> Tensor:
        qkv = self.qkv(x).unflatten(1, (3, self.heads, -1))
        q, k, v = qkv.unbind(1)                                           # (N, heads, head_dim)
        q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (y[groups.members] for y in (q, k, v))                  # (G, L, heads, head_dim)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))                  # (G, heads, L, head_dim)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=groups.mask)
        x = x.transpose(1, 2).flatten(0, 1)[groups.place].flatten(1)      # (N, D)
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
    """A pre-norm transformer block.

    config: anything with hidden_size, num_heads and intermediate_size.
    """

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.attn = Attention(config.hidden_size, config.num_heads)
        self.norm2 = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, angles: Tensor, groups: Groups) -> Tensor:
        x = x + self.attn(self.norm1(x), angles, groups)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Concatenate merge * merge patches and map them to the width of the language model."""

    def __init__(self, dim: int, merge: int, out_dim: int):
        super().__init__()
        self.cell = merge * merge
        self.ln_q = nn.RMSNorm(dim, eps=1e-6)
        wide = dim * self.cell
        self.mlp = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_q(x).view(-1, self.cell * x.shape[1])                # (M, cell * D)
        return self.mlp(x)                                               # (M, out_dim)


def vision_config(checkpoint: Checkpoint, overrides: dict) -> QwenVisionConfig:
    """The sizes from the tensors' shapes, overridden by config.json, overridden by `overrides`.

    config.json uses Qwen's names; keys that no field has are ignored.
    """
    patch_weight = checkpoint.shape("patch_embed.proj.weight")
    if len(patch_weight) != 5:
        raise ValueError(f"{checkpoint.path}: patch_embed.proj.weight {patch_weight}, expected "
                         "(hidden, channels, frames, patch, patch)")
    hidden, channels, frames, patch, _ = patch_weight
    merged = checkpoint.shape("merger.mlp.0.weight")[0]
    values = dict(
        depth=checkpoint.count("blocks.{}."),
        hidden_size=hidden, in_channels=channels, temporal_patch_size=frames, patch_size=patch,
        intermediate_size=checkpoint.shape("blocks.0.mlp.gate_proj.weight")[0],
        spatial_merge_size=math.isqrt(merged // hidden),
        out_hidden_size=checkpoint.shape("merger.mlp.2.weight")[0])
    known = {field.name for field in fields(QwenVisionConfig)}
    renamed = {"in_chans": "in_channels", "fullatt_block_indexes": "full_attention_blocks"}
    for key, value in checkpoint.config.get("vision_config", checkpoint.config).items():
        name = renamed.get(key, key)
        if name in known:
            values[name] = value
    return make_config(QwenVisionConfig, values | overrides, str(checkpoint.path))


class QwenVision(nn.Module):
    """Qwen2.5-VL's vision encoder: patches -> blocks -> merged tokens.

    Attention is confined to windows, but for the blocks in `full_attention_blocks`.
    """

    def __init__(self, config: QwenVisionConfig):
        super().__init__()
        self.config = config
        pixels = config.temporal_patch_size * config.patch_size ** 2
        self.patch_width = config.in_channels * pixels
        self.patch_embed = nn.Linear(self.patch_width, config.hidden_size, bias=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.merger = PatchMerger(config.hidden_size, config.spatial_merge_size,
                                  config.out_hidden_size)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32,
                        device: str | torch.device = "cpu", **overrides) -> "QwenVision":
        """Load the frozen encoder from Qwen2.5-VL's folder or from one .safetensors file.

        Of the folder's shards only those with `visual.*` are opened.
        overrides: fields of QwenVisionConfig. Shapes do not determine num_heads, window_size and
                   full_attention_blocks: without config.json and overrides they are those of 7B.
        Raises ValueError naming the file and every tensor that is missing, superfluous or of the
        wrong shape.
        """
        prefixes = "visual.", "model.visual."                # the latter since transformers 4.52
        checkpoint = Checkpoint(path, wanted=prefixes).under(*prefixes)
        with torch.device("meta"):
            model = cls(vision_config(checkpoint, overrides))
        sources = {name: Source((name,)) for name in model.state_dict()}
        # Patches do not overlap, so that the file's convolution is a matrix product.
        sources["patch_embed.weight"] = Source(("patch_embed.proj.weight",),
                                               lambda kernel: kernel.flatten(1))
        load(model, checkpoint, sources, dtype=dtype, device=device)
        return model.eval().requires_grad_(False)

    def forward(self, patches: Tensor, grid_thw: Tensor) -> Tensor:
        """Merged tokens (N / merge^2, out_hidden_size) of all pictures, one after the other.

        Pictures do not attend to each other, nor do frames.

        patches:  (N, channels * frames * patch * patch), from `preprocess`
        grid_thw: (B, 3) frames, rows and columns of patches
        Raises ValueError when the two do not fit each other or the model.
        """
        merge = self.config.spatial_merge_size
        if patches.ndim != 2 or patches.shape[1] != self.patch_width:
            raise ValueError(f"patches {tuple(patches.shape)}, expected (N, {self.patch_width})")
        triples = grid_thw.ndim == 2 and grid_thw.shape[1] == 3
        if not triples or (grid_thw < 1).any() or (grid_thw[:, 1:] % merge).any():
            raise ValueError(f"grid_thw {grid_thw.tolist()}, expected (frames, rows, columns), the "
                             f"latter multiples of {merge}")
        count = grid_thw.prod(dim=1).sum()
        if count != len(patches):
            raise ValueError(f"patches {tuple(patches.shape)}, expected {count} of them for "
                             f"grid_thw {grid_thw.tolist()}")

        device = patches.device
        window = self.config.window_size // self.config.patch_size              # in patches
        head_dim = self.config.hidden_size // self.config.num_heads
        positions = patch_positions(grid_thw, merge)                            # (N, 3)
        in_frame = Groups.of(positions[:, 0], device)
        in_window = Groups.of(positions // torch.tensor([1, window, window]), device)
        angles = rotary_angles(positions[:, 1:].to(device), head_dim)           # (N, head_dim / 2)

        x = self.patch_embed(patches.to(self.patch_embed.weight.dtype))         # (N, D)
        for i, block in enumerate(self.blocks):
            groups = in_frame if i in self.config.full_attention_blocks else in_window
            x = block(x, angles, groups)
        return self.merger(x)                                                   # (N / merge^2, out)


# ---------------------------------------------------------------- captions -> token ids

@functools.cache
def characters(category: str) -> str:
    r"""All characters of a Unicode category, as ranges for a regular expression's [...].

    Python's `re` has no \p{L}. category: "L" for letters, "N" for numbers.
    """
    every = range(sys.maxunicode + 1)
    codes = [code for code in every if unicodedata.category(chr(code)).startswith(category)]
    ranges = []
    # Consecutive codes are those with one difference between code and index.
    for _, pairs in itertools.groupby(enumerate(codes), lambda pair: pair[1] - pair[0]):
        run = [code for _, code in pairs]
        ranges.append(rf"\U{run[0]:08x}-\U{run[-1]:08x}")
    return "".join(ranges)


@functools.cache
def word_pattern() -> re.Pattern:
    """The pattern of Qwen2's words: pieces of a text that no merge crosses."""
    letter, number = characters("L"), characters("N")
    # Unicode's white space; \s of `re` includes \x1c-\x1f as well.
    space = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    words = (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)",                 # contractions
        rf"[^\r\n{letter}{number}]?[{letter}]+",        # letters, with a sign or space before them
        rf"[{number}]",                                 # single digits
        rf" ?[^{space}{letter}{number}]+[\r\n]*",       # signs, with a space before them
        rf"[{space}]*[\r\n]+",                          # ends of lines
        rf"[{space}]+(?![^{space}])",                   # white space, less one before a word
        rf"[{space}]+")
    return re.compile("|".join(words))


def byte_symbols() -> list[str]:
    """The visible character by which vocab.json writes each byte, as GPT-2 does.

    A visible byte is its own character; the others take the characters from 256 on.
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


class QwenTokenizer:
    """Qwen2's byte-level BPE, in which every text has tokens.

    Chat markers such as <|im_end|> are plain text here, since captions have none.

    folder: holds vocab.json and merges.txt.
    Raises ValueError, naming file and line, if one is missing or malformed.
    """

    def __init__(self, folder: str | Path):
        vocab_file, merges_file = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        for file in (vocab_file, merges_file):
            if not file.is_file():
                raise ValueError(f"{file}: no such file; the tokenizer is vocab.json and "
                                 "merges.txt of Qwen2.5-VL")
        self.ids = read_json(vocab_file.read_bytes(), str(vocab_file))
        try:
            merges = merges_file.read_text("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{merges_file}: not UTF-8 ({error}); download it again") from error
        self.symbols = byte_symbols()
        for byte, symbol in enumerate(self.symbols):
            if symbol not in self.ids:
                raise ValueError(f"{vocab_file}: no token for byte {byte}, expected one for each "
                                 "of the 256")
        self.ranks = {}
        for number, line in enumerate(merges, start=1):
            if not line or number == 1 and line.startswith("#version"):
                continue
            pair = tuple(line.split(" "))
            if len(pair) != 2 or "".join(pair) not in self.ids:
                raise ValueError(f"{merges_file}, line {number}: {line!r}, expected two pieces "
                                 "whose concatenation is in vocab.json")
            self.ranks[pair] = len(self.ranks)
        self.word_ids = functools.lru_cache(maxsize=2 ** 16)(self.merge)      # words recur

    def merge(self, word: str) -> list[int]:
        """The ids of one word: join its bytes, each time the pair that is first in merges.txt."""
        pieces = [self.symbols[byte] for byte in word.encode("utf-8")]
        while len(pieces) > 1:
            ranks = [self.ranks.get(pair, math.inf) for pair in itertools.pairwise(pieces)]
            best = min(ranks)
            if best == math.inf:
                break
            i = ranks.index(best)
            pieces[i:i + 2] = ["".join(pieces[i:i + 2])]
        return [self.ids[piece] for piece in pieces]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without begin or end tokens. Source: Qwen2's tokenizer."""
        words = word_pattern().findall(unicodedata.normalize("NFC", text))
        return [token for word in words for token in self.word_ids(word)]


# ---------------------------------------------------------------- Qwen2.5-VL as the teacher

EMBEDDING = "model.embed_tokens.weight"


class QwenTeacher(nn.Module):
    """Qwen2.5-VL's features of pictures and captions, the targets of equation (4).

    embedding: (vocabulary, out_dim), the language model's input embeddings
    """

    def __init__(self, vision: QwenVision, tokenizer: QwenTokenizer, embedding: Tensor):
        super().__init__()
        self.vision = vision
        self.tokenizer = tokenizer
        self.embedding = nn.Parameter(embedding, requires_grad=False)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32,
                        device: str | torch.device = "cpu", **overrides) -> "QwenTeacher":
        """Load the frozen teacher from the released folder.

        The folder holds config.json, vocab.json, merges.txt, the index and the shards with
        `visual.*` and the input embeddings. overrides: as in QwenVision.
        Raises ValueError naming the file for anything missing or of the wrong shape.
        """
        vision = QwenVision.from_pretrained(folder, dtype, device, **overrides)
        tokenizer = QwenTokenizer(folder)
        later = "model.language_model."                          # since transformers 4.52
        checkpoint = Checkpoint(folder, wanted=(EMBEDDING, f"{later}embed_tokens."))
        checkpoint = checkpoint.under(later, "model.")
        shape = checkpoint.shape("embed_tokens.weight")
        rows, width = max(tokenizer.ids.values()) + 1, vision.config.out_hidden_size
        if len(shape) != 2 or shape[0] < rows or shape[1] != width:
            raise ValueError(f"{checkpoint.path}: {EMBEDDING} {shape}, expected at least "
                             f"{rows} rows (the ids of vocab.json) "
                             f"of width {width} (the vision encoder's)")
        return cls(vision, tokenizer, checkpoint.read("embed_tokens.weight", dtype, device))

    @property
    def out_dim(self) -> int:
        return self.embedding.shape[1]

    @torch.no_grad()
    def image_features(self, pictures: Sequence[Picture]) -> Tensor:
        """Mean merged token of each picture, (B, out_dim) float32. pictures: see `preprocess`."""
        config = self.vision.config
        patches, grid_thw = preprocess(pictures, config.patch_size, config.spatial_merge_size,
                                       config.temporal_patch_size)
        tokens = self.vision(patches.to(self.embedding.device), grid_thw)        # (M, out_dim)
        lengths = grid_thw.prod(dim=1) // config.spatial_merge_size ** 2         # (B,)
        by_picture = tokens.split(lengths.tolist())
        return torch.stack([part.float().mean(dim=0) for part in by_picture])    # (B, out_dim)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Mean input embedding of each text's tokens, without padding, (B, out_dim) float32.

        Raises ValueError for an empty text, which has no tokens to average.
        """
        if isinstance(texts, str) or len(texts) == 0 or "" in texts:
            raise ValueError(f"texts = {texts!r}, expected a sequence of texts, none of them empty")
        features = []
        for text in texts:
            ids = torch.tensor(self.tokenizer.encode(text), device=self.embedding.device)
            tokens = F.embedding(ids, self.embedding)                            # (L, out_dim)
            features.append(tokens.float().mean(dim=0))
        return torch.stack(features)                                             # (B, out_dim)


def load_teacher(path: str | Path, dtype: torch.dtype = torch.float32,
                 device: str | torch.device = "cpu") -> nn.Module:
    """Load the teacher in a folder: the small one has a tokenizer.model, Qwen2.5-VL a vocab.json.

    Both have `out_dim`, `tokenizer`, `image_features(pictures)` and `text_features(texts)`.
    Raises ValueError for any other folder.
    """
    folder = Path(path)
    if (folder / "tokenizer.model").is_file():
        from experiments.small_teacher import ContrastiveTeacher   # it imports this file
        return ContrastiveTeacher.from_pretrained(folder, dtype, device)
    if (folder / "vocab.json").is_file():
        return QwenTeacher.from_pretrained(folder, dtype, device)
    raise ValueError(f"{path}: expected a teacher's folder, with tokenizer.model (the small "
                     "teacher) or vocab.json (Qwen2.5-VL)")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        teacher = load_teacher(sys.argv[1])
        print("tokens", teacher.tokenizer.encode(sys.argv[3]))
        print("image", teacher.image_features([load_picture(sys.argv[2])]))
        print("text", teacher.text_features([sys.argv[3]]))
    except ValueError as error:
        sys.exit(f"error: {error}")
