"""The frozen text side: the T5 tokenizer and the encoder of T5 v1.1.

T5: Raffel et al. 2020 (1910.10683); version 1.1 has gated feed-forward layers (Shazeer 2020, 2002.05202). Stable Diffusion 3 and
UniAlignment take the encoder of the XXL model. Its sentinel <extra_id_0> serves UniAlignment as the mask token of captions.

Run alone to print the token ids of a text:   python text_encoder.py SPIECE.MODEL "a photo of a cat"
"""
import math
import pickle
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

from checkpoint import Checkpoint, Source, load, make_config


# ---------------------------------------------------------------- tokenizer

class T5Tokenizer:
    """Text to token ids and back: a sentencepiece model, and above its pieces the sentinels <extra_id_N> in descending order.

    path:       the sentencepiece model (spiece.model)
    padding_id: fills up a batch; 1 for dual checkpoints, which were trained with </s> as padding, 0 for plain SD3
    Raises ValueError for a file that is missing, is no sentencepiece model or numbers <pad>, </s>, <unk> other than 0, 1, 2.
    """
    pad_id, eos_id, unk_id = 0, 1, 2

    def __init__(self, path: str | Path, sentinels: int = 100, padding_id: int = 1):
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; expected T5's sentencepiece model (spiece.model)")
        self.pieces = SentencePieceProcessor()
        try:
            self.pieces.LoadFromSerializedProto(Path(path).read_bytes())
            special = self.pieces.pad_id(), self.pieces.eos_id(), self.pieces.unk_id()
        except RuntimeError as error:
            raise ValueError(f"{path}: not a sentencepiece model ({error}); expected T5's spiece.model") from error
        if special != (self.pad_id, self.eos_id, self.unk_id):
            raise ValueError(f"{path}: <pad>, </s> and <unk> have the ids {special}, expected (0, 1, 2)")
        if sentinels < 1:
            raise ValueError(f"sentinels = {sentinels}: the first one is the mask token, expected at least 1")
        self.sentinels, self.padding_id = sentinels, padding_id

    @property
    def vocab_size(self) -> int:
        """Pieces and sentinels; 32100 for the public model, whose embedding is padded to 32128 rows."""
        return self.pieces.get_piece_size() + self.sentinels

    @property
    def mask_id(self) -> int:
        """<extra_id_0>, the token that stands for a hidden one."""
        return self.vocab_size - 1

    def encode(self, text: str) -> list[int]:
        """Ids of one text, not padded, ending with </s>. A literal <extra_id_N> is the sentinel N."""
        if not isinstance(text, str):
            raise ValueError(f"expected a text, got {type(text).__name__} {text!r:.80}")
        ids, start = [], 0
        for sentinel in re.finditer(r"<extra_id_(0|[1-9][0-9]*)>", text):
            if int(sentinel[1]) < self.sentinels:
                ids += self.pieces.encode(text[start:sentinel.start()]) + [self.mask_id - int(sentinel[1])]
                start = sentinel.end()
        return ids + self.pieces.encode(text[start:]) + [self.eos_id]

    def _fit(self, ids: list[int], length: int) -> list[int]:
        """Exactly `length` ids: long ones are cut and end with </s> again, short ones are filled with the padding id."""
        ids = ids if len(ids) <= length else ids[:length - 1] + [self.eos_id]
        return ids + [self.padding_id] * (length - len(ids))

    def __call__(self, texts: Sequence[str], length: int = 256) -> Tensor:
        """Ids (B, length), int64. A long text is cut, its last id is still </s>; a short one is filled with the padding id."""
        if isinstance(texts, str) or length < 1:
            raise ValueError(f"expected a list of texts and a length of at least 1, got {texts!r:.80} and {length}")
        rows = [self._fit(self.encode(text), length) for text in texts]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, length)                     # (B, length)

    def dialogue(self, questions: Sequence[str], answers: Sequence[str] | None = None,
                 length: int = 256) -> tuple[Tensor, Tensor]:
        """Questions without their </s>, each followed by its answer: ids (B, length) int64, and answer (B, length) bool.

        `answer` is true from the first position after the question to the end: padding is predicted as well. A caption is the
        answer to the empty question. answers: None puts the mask token wherever `answer` is true, what the sampler starts from.
        Raises ValueError for a question that leaves fewer than two positions.
        """
        if isinstance(questions, str) or isinstance(answers, str) or (answers is not None and len(answers) != len(questions)):
            raise ValueError(f"expected a list of questions and as many answers, got {questions!r:.80} and {answers!r:.80}")
        asked = [self.encode(question)[:-1] for question in questions]
        for question, ids in zip(questions, asked):
            if length - len(ids) < 2:
                raise ValueError(f"the question {question!r:.80} has {len(ids)} tokens: too little room for an answer, "
                                 f"expected at most {length - 2} of the length {length}")
        rows = [self._fit(ids + self.encode(text), length) for ids, text in zip(asked, answers or [""] * len(asked))]
        ids = torch.tensor(rows, dtype=torch.int64).reshape(-1, length)                      # (B, length)
        starts = torch.tensor([len(ids) for ids in asked], dtype=torch.int64)                # (B,)
        answer = torch.arange(length) >= starts[:, None]                                     # (B, length)
        return (ids.masked_fill(answer, self.mask_id) if answers is None else ids), answer

    def decode(self, ids: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Texts of ids (B, L): each row up to its first </s>, without padding and sentinels."""
        rows = ids.tolist() if isinstance(ids, Tensor) else ids
        if not all(isinstance(row, Sequence) and all(isinstance(i, int) and i >= 0 for i in row) for row in rows):
            raise ValueError("expected rows of ids, (B, L), none of them negative")
        rows = [row[:row.index(self.eos_id)] if self.eos_id in row else row for row in rows]
        return [self.pieces.decode([i for i in row if self.pad_id < i < self.pieces.get_piece_size()]) for row in rows]


# ---------------------------------------------------------------- encoder

@dataclass
class T5Config:
    """The defaults are those of the XXL model."""
    vocab_size: int = 32128
    dim: int = 4096
    head_dim: int = 64
    ff_dim: int = 10240
    depth: int = 24
    num_heads: int = 64
    buckets: int = 32                                            # of relative positions, half of them for each direction
    max_distance: int = 128                                      # everything farther away shares the last bucket
    norm_eps: float = 1e-6
    mask_id: int = 32099                                         # the row that a mask token replaces

    def __post_init__(self):
        if min(self.vocab_size, self.dim, self.head_dim, self.ff_dim, self.depth, self.num_heads) < 1:
            raise ValueError(f"sizes must be positive, got {self}")
        if self.buckets < 4 or self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise ValueError(f"buckets must be a multiple of 4 and max_distance above buckets / 4, got {self}")


def relative_buckets(length: int, buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """The bucket (length, length) of every pair (query, key): one per near distance, then ever wider ones."""
    position = torch.arange(length, device=device)
    offset = position[None, :] - position[:, None]               # (L, L)
    distance, half, exact = offset.abs(), buckets // 2, buckets // 4
    far = exact + (torch.log(distance.float() / exact) / math.log(max_distance / exact) * (half - exact)).long()
    return torch.where(distance < exact, distance, far.clamp(max=half - 1)) + half * (offset > 0)   # (L, L)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        # T5's residual stream grows large, and a sum of thousands of squares is lost in bfloat16's 8 bits.
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.heads, inner = config.num_heads, config.num_heads * config.head_dim
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:        # (B, L, D), (1, heads, L, L)
        B, L, _ = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)           # (B, heads, L, head_dim) each
        # No 1/sqrt(head_dim): T5 has it in its initialisation. The kernel keeps the softmax in float32 whatever the dtype.
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)               # (B, heads, L, head_dim)
        return self.out(h.transpose(1, 2).flatten(2))            # (B, L, D)


class FeedForward(nn.Module):
    """Gated: one half of the hidden layer decides through a GELU how much of the other half passes."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.gate_value = nn.Linear(config.dim, 2 * config.ff_dim, bias=False)
        self.out = nn.Linear(config.ff_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:                      # (B, L, D)
        gate, value = self.gate_value(x).chunk(2, dim=-1)        # (B, L, ff_dim) each
        return self.out(F.gelu(gate, approximate="tanh") * value)                            # (B, L, D)


class Block(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.norm1 = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:        # (B, L, D), (1, heads, L, L)
        x = x + self.attention(self.norm1(x), bias)
        return x + self.feed_forward(self.norm2(x))              # (B, L, D)


# ---------------------------------------------------------------- names in the released files

# Fields of the config.json beside the released encoder -> own fields.
HF_CONFIG = {"vocab_size": "vocab_size", "d_model": "dim", "d_kv": "head_dim", "d_ff": "ff_dim", "num_layers": "depth",
             "num_heads": "num_heads", "relative_attention_num_buckets": "buckets",
             "relative_attention_max_distance": "max_distance", "layer_norm_epsilon": "norm_eps"}


def released_sources(checkpoint: Checkpoint) -> dict[str, Source]:
    """Own name -> where it stands in a released T5 encoder."""
    # Both names mean the same matrix; a file holds one of them or both.
    embeddings = tuple(n for n in ("shared.weight", "encoder.embed_tokens.weight") if n in checkpoint)
    depth = checkpoint.count("encoder.block.{}.")
    if not embeddings or not depth:
        raise ValueError(f"{checkpoint.path}: no T5 encoder in it; expected shared.weight and encoder.block.*, "
                         f"perhaps under text_encoders.t5xxl.transformer., found {', '.join(checkpoint.names()[:4])}")
    sources = {"embedding.weight": Source(embeddings, lambda matrix, *repeated: matrix),
               "relative_bias.weight": Source(("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",)),
               "norm_out.weight": Source(("encoder.final_layer_norm.weight",))}
    for i in range(depth):
        first, second = f"encoder.block.{i}.layer.0.", f"encoder.block.{i}.layer.1."
        sources |= {
            f"blocks.{i}.norm1.weight": Source((first + "layer_norm.weight",)),
            f"blocks.{i}.attention.qkv.weight": Source(tuple(f"{first}SelfAttention.{part}.weight" for part in "qkv")),
            f"blocks.{i}.attention.out.weight": Source((first + "SelfAttention.o.weight",)),
            f"blocks.{i}.norm2.weight": Source((second + "layer_norm.weight",)),
            f"blocks.{i}.feed_forward.gate_value.weight": Source(tuple(f"{second}DenseReluDense.wi_{j}.weight" for j in (0, 1))),
            f"blocks.{i}.feed_forward.out.weight": Source((second + "DenseReluDense.wo.weight",)),
        }
    return sources


def fields_of(checkpoint: Checkpoint, sources: dict[str, Source]) -> dict:
    """What the shapes of a checkpoint tell about its configuration."""
    def shape(name: str) -> tuple[int, ...]:
        return checkpoint.shape(sources[name].names[0] if name in sources else name)

    (vocab_size, dim), (buckets, num_heads) = shape("embedding.weight"), shape("relative_bias.weight")
    return {"vocab_size": vocab_size, "dim": dim, "buckets": buckets, "num_heads": num_heads,
            "head_dim": shape("blocks.0.attention.out.weight")[1] // num_heads,
            "ff_dim": shape("blocks.0.feed_forward.out.weight")[1],
            "depth": sum(name.endswith(".norm1.weight") for name in sources)}


def read_mask_token(path: str | Path, dim: int) -> Tensor:
    """The vector (dim,) in a .pth file that holds just it, or a dictionary of just it."""
    try:
        vector = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: cannot read a mask token from it ({error})") from error
    if isinstance(vector, dict) and len(vector) == 1:
        vector = next(iter(vector.values()))
    if not isinstance(vector, Tensor) or vector.shape != (dim,):
        found = f"shape {tuple(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(f"{path}: expected a mask token of shape ({dim},), found {found}")
    return vector


# ---------------------------------------------------------------- the model

class T5Encoder(nn.Module):
    """Token ids to embeddings in context. Padding is attended to like any token: SD3 and UniAlignment were trained so.

    A new one has T5's own random initialisation: its outputs are of unit scale and tell tokens apart, so that a small model
    can be trained on a frozen random encoder.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.relative_bias = nn.Embedding(config.buckets, config.num_heads)                  # one for all blocks
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm_out = RMSNorm(config.dim, config.norm_eps)

        inner = config.num_heads * config.head_dim
        nn.init.normal_(self.relative_bias.weight, std=config.dim ** -0.5)
        for block in self.blocks:
            q, kv = block.attention.qkv.weight.detach().split((inner, 2 * inner))
            nn.init.normal_(q, std=(config.dim * config.head_dim) ** -0.5)                   # the 1/sqrt(head_dim) of attention
            nn.init.normal_(kv, std=config.dim ** -0.5)
            nn.init.normal_(block.attention.out.weight, std=inner ** -0.5)
            nn.init.normal_(block.feed_forward.gate_value.weight, std=config.dim ** -0.5)
            nn.init.normal_(block.feed_forward.out.weight, std=config.ff_dim ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (B, L, dim) of ids (B, L), integers in [0, vocab_size); anything else is a ValueError.

        Runs in the dtype of the weights, bfloat16 or float32: float16 overflows in the XXL model and is refused.
        """
        if self.embedding.weight.dtype == torch.float16:
            raise ValueError("T5 overflows in float16; expected bfloat16 or float32 weights")
        if ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64) or not ids.numel():
            raise ValueError(f"expected integer ids (B, L), got {ids.dtype} {tuple(ids.shape)}")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(f"ids from {ids.min()} to {ids.max()}, expected 0 to {self.config.vocab_size - 1}")
        x = self.embedding(ids)                                  # (B, L, D)
        buckets = relative_buckets(ids.shape[1], self.config.buckets, self.config.max_distance, ids.device)  # (L, L)
        bias = self.relative_bias(buckets).permute(2, 0, 1).unsqueeze(0).contiguous()        # (1, heads, L, L)
        for block in self.blocks:
            x = block(x, bias)
        return self.norm_out(x)                                  # (B, L, D)

    @classmethod
    def from_pretrained(cls, path: str | Path, mask_token: str | Path | None = None, dtype: torch.dtype = torch.float32,
                        device: str | torch.device = "cpu", **overrides) -> "T5Encoder":
        """The encoder in a folder with shards (or the repository around it), a file of its own, an SD3 single file or
        this project's own file.

        mask_token: a .pth file with a vector (dim,), bfloat16 in the release; it replaces row `config.mask_id` of the embedding.
        dtype:      of the weights in memory, float32 or bfloat16; the file may hold float16 or fp8.
        overrides:  fields of T5Config.
        Raises ValueError naming the file and what does not fit in it.
        """
        if dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(f"T5 in {dtype}: expected torch.bfloat16 or torch.float32 (it overflows in float16)")
        checkpoint = Checkpoint(path, subfolders=("text_encoder_3",)).under("text_encoders.t5xxl.transformer.")
        given = checkpoint.config
        if "embedding.weight" in checkpoint:                     # the project's own layout, with the fields of T5Config
            sources = {name: Source((name,)) for name in checkpoint.names()}
        else:
            sources = released_sources(checkpoint)
            if (activation := given.get("feed_forward_proj", "gated-gelu")) != "gated-gelu":
                raise ValueError(f"{checkpoint.path}: feed_forward_proj = {activation!r}, expected 'gated-gelu' (T5 v1.1)")
            given = {own: given[theirs] for theirs, own in HF_CONFIG.items() if theirs in given}
        config = make_config(T5Config, fields_of(checkpoint, sources) | given | overrides, str(checkpoint.path))
        with torch.device("meta"):
            encoder = cls(config)
        load(encoder, checkpoint, sources, dtype=dtype, device=device)
        if mask_token is not None:
            if config.mask_id >= config.vocab_size:
                raise ValueError(f"{checkpoint.path}: mask_id = {config.mask_id}, but the embedding has {config.vocab_size} rows")
            vector = read_mask_token(mask_token, config.dim)
            encoder.embedding.weight.data[config.mask_id] = vector.to(encoder.embedding.weight)
        return encoder


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(T5Tokenizer(sys.argv[1]).encode(sys.argv[2]))
