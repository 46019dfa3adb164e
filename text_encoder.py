"""The frozen text side: the T5 tokenizer and the encoder of T5 v1.1.

T5: Raffel et al. 2020 (1910.10683); version 1.1 has gated feed-forward layers (Shazeer 2020,
2002.05202). Stable Diffusion 3 and UniAlignment use the encoder of the XXL model. UniAlignment uses
the sentinel <extra_id_0> as the mask token of captions.

Run alone to print the token ids of a text:
    python text_encoder.py SPIECE.MODEL "a photo of a cat"
"""
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

from checkpoint import Checkpoint, Source, identify, load, make_config, option


# ---------------------------------------------------------------- tokenizer

# Below a tokenizer's folder, the repositories of SD3, Flux and others, or a run.
SPIECE = ("spiece.model", "tokenizer_3/spiece.model", "tokenizer_2/spiece.model",
          "tokenizer/spiece.model", "tokenizer.model")


def spiece_in(folder: Path) -> Path | None:
    """The sentencepiece model in a folder, if there is one."""
    return next((folder / name for name in SPIECE if (folder / name).is_file()), None)


def find_spiece(path: Path) -> Path:
    """The sentencepiece model at a path or in a folder. Raises ValueError if there is none."""
    if not path.exists():
        raise ValueError(f"{path}: no such file; expected T5's sentencepiece model (spiece.model)")
    if not path.is_dir():
        return path
    if found := spiece_in(path):
        return found
    fast = " but tokenizer.json, another format which is not read" \
        if (path / "tokenizer.json").is_file() else ""
    raise ValueError(f"{path}: this folder has no spiece.model{fast}; expected T5's sentencepiece "
                     "model, from the same repository or google/t5-v1_1-xxl")


def asked(question: str, template: str = "{question}") -> str:
    """Put a question into the template of a checkpoint; the empty one, of a caption, stays empty.

    template: a text with {question} in it; the released models read "Q: {question} A: ".
    """
    return template.replace("{question}", question) if question else ""


class T5Tokenizer:
    """Text to token ids and back.

    The sentinels <extra_id_N> follow the sentencepiece model's own ids, in descending order.

    path:       the sentencepiece model (spiece.model), or the folder around it
    padding_id: pads short texts; 1 (</s>) for dual checkpoints, which were trained so, 0 for SD3
    Raises ValueError for a file that is missing, is no sentencepiece model or has other ids than
    0, 1, 2 for <pad>, </s>, <unk>.
    """
    pad_id, eos_id, unk_id = 0, 1, 2

    def __init__(self, path: str | Path, sentinels: int = 100, padding_id: int = 1):
        path = find_spiece(Path(path))
        self.pieces = SentencePieceProcessor()
        try:
            self.pieces.LoadFromSerializedProto(path.read_bytes())
            special = self.pieces.pad_id(), self.pieces.eos_id(), self.pieces.unk_id()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
        except RuntimeError as error:
            raise ValueError(f"{path}: not a sentencepiece model but {identify(path) or error}; "
                             "expected T5's spiece.model") from error
        if special != (self.pad_id, self.eos_id, self.unk_id):
            raise ValueError(
                f"{path}: <pad>, </s> and <unk> have the ids {special}, expected (0, 1, 2)")
        if sentinels < 1:
            raise ValueError(f"sentinels = {sentinels}: the first one is the mask token, "
                             "expected at least 1")
        self.sentinels, self.padding_id = sentinels, padding_id

    @property
    def vocab_size(self) -> int:
        """Pieces and sentinels: 32100 in the public model, whose embedding has 32128 rows."""
        return self.pieces.get_piece_size() + self.sentinels

    @property
    def mask_id(self) -> int:
        """The id of <extra_id_0>, which stands for a hidden token."""
        return self.vocab_size - 1

    def piece(self, i: int) -> str:
        """The text of one id; "\u2581" in front begins a word."""
        pieces = self.pieces.get_piece_size()
        return self.pieces.id_to_piece(i) if i < pieces else f"<extra_id_{self.mask_id - i}>"

    def encode(self, text: str) -> list[int]:
        """Ids of one text, unpadded, ending with </s>. A literal <extra_id_N> is sentinel N."""
        if not isinstance(text, str):
            raise ValueError(f"expected a text, got {type(text).__name__} {text!r:.80}")
        ids, start = [], 0
        for match in re.finditer(r"<extra_id_(0|[1-9][0-9]*)>", text):
            number = int(match[1])
            if number < self.sentinels:
                ids += self.pieces.encode(text[start:match.start()])
                ids.append(self.mask_id - number)
                start = match.end()
        return ids + self.pieces.encode(text[start:]) + [self.eos_id]

    def _fit(self, ids: list[int], length: int) -> list[int]:
        """Exactly `length` ids: a long text is cut and ends with </s>, a short one is padded."""
        if len(ids) > length:
            ids = ids[:length - 1] + [self.eos_id]
        return ids + [self.padding_id] * (length - len(ids))

    def __call__(self, texts: Sequence[str], length: int = 256) -> Tensor:
        """Ids (B, length), int64. A long text is cut and ends with </s>; a short one is padded."""
        if isinstance(texts, str) or length < 1:
            raise ValueError("expected a list of texts and a length of at least 1, "
                             f"got {texts!r:.80} and {length}")
        rows = [self._fit(self.encode(text), length) for text in texts]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, length)         # (B, length)

    def dialogue(self, questions: Sequence[str], answers: Sequence[str] | None = None,
                 length: int = 256, before: Sequence[Sequence[tuple[str, str]]] | None = None
                 ) -> tuple[Tensor, Tensor]:
        """Token ids of questions, each without its </s> and followed by its answer.

        Returns ids (B, length), int64, and answer (B, length), bool: true for the answers and from
        the end of the last question on, because padding is predicted as well. A caption is the
        answer to the empty question. A long text is cut and ends with </s>.
        answers: None puts the mask token at every position of the answer, the sampler's start.
        before: the earlier turns of each dialogue, pairs of question and answer. Without `answers`
        these earlier answers are given: false in `answer`.
        Raises ValueError where the first answer to predict would have fewer than two positions.
        """
        before = [()] * len(questions) if before is None else before
        counts = {len(texts) for texts in (questions, answers, before) if texts is not None}
        if isinstance(questions, str) or isinstance(answers, str) or len(counts) > 1:
            raise ValueError("expected a list of questions, as many answers and as many dialogues "
                             f"before them, got {questions!r:.80}, {answers!r:.80} and "
                             f"{before!r:.80}")
        rows, is_answer = [], []
        for earlier, *last in zip(before, questions, answers or [""] * len(questions)):
            turns = [*earlier, last]
            row: list[int] = []
            flags: list[bool] = []                               # whether an id is predicted
            for number, (question, text) in enumerate(turns, start=1):
                question_ids, answer_ids = self.encode(question)[:-1], self.encode(text)
                is_predicted = answers is not None or number == len(turns)
                row += question_ids + answer_ids
                flags += [False] * len(question_ids) + [is_predicted] * len(answer_ids)
            start = flags.index(True)
            if length - start < 2:
                is_first = answers is not None or len(turns) == 1
                subject = f"question {turns[0][0]!r:.80}" if is_first else \
                    f"dialogue up to the question {last[0]!r:.80}"
                raise ValueError(
                    f"the {subject} has {start} tokens: too little room for an answer, expected at "
                    f"most {length - 2} of the length {length}")
            rows.append(self._fit(row, length))
            is_answer.append((flags + [True] * length)[:length])
        ids = torch.tensor(rows, dtype=torch.int64).reshape(-1, length)          # (B, length)
        answer = torch.tensor(is_answer, dtype=torch.bool).reshape(-1, length)   # (B, length)
        if answers is None:
            ids = ids.masked_fill(answer, self.mask_id)
        return ids, answer

    def decode(self, ids: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Texts of ids (B, L): each row up to its first </s>, without padding and sentinels."""
        rows = ids.tolist() if isinstance(ids, Tensor) else ids
        texts = []
        for row in rows:
            if not (isinstance(row, Sequence) and all(isinstance(i, int) and i >= 0 for i in row)):
                raise ValueError("expected rows of ids, (B, L), none of them negative")
            if self.eos_id in row:
                row = row[:row.index(self.eos_id)]
            pieces = [i for i in row if self.pad_id < i < self.pieces.get_piece_size()]
            texts.append(self.pieces.decode(pieces))
        return texts


# ---------------------------------------------------------------- encoder

@dataclass
class T5Config:
    """Sizes of the encoder. The defaults are those of T5 v1.1 XXL."""
    vocab_size: int = option(32128, "rows of the embedding")
    dim: int = option(4096, "width of the residual stream")
    head_dim: int = option(64, "channels of an attention head")
    ff_dim: int = option(10240, "hidden width of the feed-forward layers")
    depth: int = option(24, "number of blocks")
    num_heads: int = option(64, "attention heads per block")
    buckets: int = option(32, "buckets of relative positions, half of them for each direction")
    max_distance: int = option(128, "distances from here on share the last bucket")
    norm_eps: float = option(1e-6, "epsilon of the RMS norms")
    mask_id: int = option(32099, "row of the embedding that a learned mask token replaces")

    def __post_init__(self):
        sizes = (self.vocab_size, self.dim, self.head_dim, self.ff_dim, self.depth, self.num_heads)
        if min(sizes) < 1:
            raise ValueError(f"sizes must be positive, got {self}")
        if self.buckets < 4 or self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise ValueError("buckets must be a multiple of 4 and max_distance above buckets / 4, "
                             f"got {self}")


def relative_buckets(length: int, buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """The bucket of every pair (query, key), (L, L): one per near distance, then ever wider ones.

    buckets, max_distance: as in T5Config. Keys after the query have the upper half of the buckets.
    """
    position = torch.arange(length, device=device)               # (L,)
    offset = position[None, :] - position[:, None]               # (L, L)
    distance = offset.abs()
    half, exact = buckets // 2, buckets // 4
    growth = torch.log(distance.float() / exact) / math.log(max_distance / exact)
    far = exact + (growth * (half - exact)).long()               # (L, L)
    bucket = torch.where(distance < exact, distance, far.clamp(max=half - 1))
    return bucket + half * (offset > 0)                          # (L, L)


class RMSNorm(nn.Module):
    """Division by the root mean square over the last dimension, then a learned scale."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        # In float32: T5's residual stream grows large, and bfloat16's 8 bits lose a sum of
        # thousands of squares.
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return normed.to(x.dtype) * self.weight


class Float8Linear(nn.Module):
    """A matrix that stays in fp8 (e4m3), with a factor for each row, and is upcast as it is used.

    Saves half of bfloat16's memory, not time.
    """

    def __init__(self, columns: int, rows: int):
        super().__init__()
        weight = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", torch.empty(rows))

    def forward(self, x: Tensor) -> Tensor:                      # (B, L, columns)
        h = F.linear(x, self.weight.to(x.dtype))                 # (B, L, rows)
        return (h * self.scale).to(x.dtype)                      # (B, L, rows)


def keep_in_float8(encoder: nn.Module) -> None:
    """Replace every matrix of an encoder without weights; embedding, bias and norms stay."""
    for module in list(encoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Float8Linear(child.in_features, child.out_features))


class Attention(nn.Module):
    """Multi-head self-attention with a bias per head and relative position."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.heads, inner = config.num_heads, config.num_heads * config.head_dim
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:        # (B, L, D), (1, heads, L, L)
        B, L, _ = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.heads, -1)          # (B, L, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                     # (B, heads, L, head_dim) each
        # No 1/sqrt(head_dim): T5's initial queries contain it. The kernel computes the softmax in
        # float32 for every dtype.
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        h = h.transpose(1, 2).flatten(2)                         # (B, L, heads*head_dim)
        return self.out(h)                                       # (B, L, D)


class FeedForward(nn.Module):
    """Gated: one half of the hidden layer, through a GELU, scales the other half."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.gate_value = nn.Linear(config.dim, 2 * config.ff_dim, bias=False)
        self.out = nn.Linear(config.ff_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:                      # (B, L, D)
        gate, value = self.gate_value(x).chunk(2, dim=-1)        # (B, L, ff_dim) each
        h = F.gelu(gate, approximate="tanh") * value             # (B, L, ff_dim)
        return self.out(h)                                       # (B, L, D)


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each with a norm before and a residual around it."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.norm1 = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:        # (B, L, D), (1, heads, L, L)
        x = x + self.attention(self.norm1(x), bias)              # (B, L, D)
        return x + self.feed_forward(self.norm2(x))              # (B, L, D)


# ---------------------------------------------------------------- names in the released files

# Fields of the config.json beside the released encoder -> own fields.
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "d_model": "dim",
    "d_kv": "head_dim",
    "d_ff": "ff_dim",
    "num_layers": "depth",
    "num_heads": "num_heads",
    "relative_attention_num_buckets": "buckets",
    "relative_attention_max_distance": "max_distance",
    "layer_norm_epsilon": "norm_eps",
}


def released_sources(checkpoint: Checkpoint) -> dict[str, Source]:
    """Own name -> its origin in a released T5 encoder."""
    # Both names mean the same matrix; a file holds one of them or both.
    names = ("shared.weight", "encoder.embed_tokens.weight")
    embeddings = tuple(name for name in names if name in checkpoint)
    depth = checkpoint.count("encoder.block.{}.")
    if not embeddings or not depth:
        raise checkpoint.unlike(
            "a T5 text encoder (it is in the SD3 file whose name has t5xxl, or in one of its own)",
            "no T5 encoder in it; expected shared.weight and encoder.block.*, perhaps under "
            "text_encoders.t5xxl.transformer.")

    def same(matrix: Tensor, *copies: Tensor) -> Tensor:
        for copy in copies:
            if copy.shape != matrix.shape or not (copy.is_meta or torch.equal(copy, matrix)):
                raise ValueError(f"{checkpoint.path}: {' and '.join(embeddings)} differ, though "
                                 "both mean T5's embedding: remove the wrong one, or download the "
                                 "file again")
        return matrix

    # One name needs no comparison, so the matrix is read straight to its place.
    embedding = Source(embeddings, same) if len(embeddings) > 1 else Source(embeddings)
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    sources = {
        "embedding.weight": embedding,
        "relative_bias.weight": Source((bias,)),
        "norm_out.weight": Source(("encoder.final_layer_norm.weight",)),
    }
    for i in range(depth):
        first, second = f"encoder.block.{i}.layer.0.", f"encoder.block.{i}.layer.1."
        qkv = tuple(f"{first}SelfAttention.{part}.weight" for part in "qkv")
        gate_value = tuple(f"{second}DenseReluDense.wi_{j}.weight" for j in (0, 1))
        sources |= {
            f"blocks.{i}.norm1.weight": Source((first + "layer_norm.weight",)),
            f"blocks.{i}.attention.qkv.weight": Source(qkv),
            f"blocks.{i}.attention.out.weight": Source((first + "SelfAttention.o.weight",)),
            f"blocks.{i}.norm2.weight": Source((second + "layer_norm.weight",)),
            f"blocks.{i}.feed_forward.gate_value.weight": Source(gate_value),
            f"blocks.{i}.feed_forward.out.weight": Source((second + "DenseReluDense.wo.weight",)),
        }
    return sources


def fields_of(checkpoint: Checkpoint, sources: dict[str, Source]) -> dict:
    """Fields of T5Config that the shapes of a checkpoint show."""
    def shape(name: str) -> tuple[int, ...]:
        return checkpoint.shape(sources[name].names[0] if name in sources else name)

    vocab_size, dim = shape("embedding.weight")
    if vocab_size > 200_000:
        raise ValueError(f"{checkpoint.path}: this is a multilingual T5 (mT5 or UMT5), whose "
                         f"embedding has {vocab_size} rows: expected T5 v1.1, with 32128")
    buckets, num_heads = shape("relative_bias.weight")
    return {
        "vocab_size": vocab_size,
        "dim": dim,
        "buckets": buckets,
        "num_heads": num_heads,
        "head_dim": shape("blocks.0.attention.out.weight")[1] // num_heads,
        "ff_dim": shape("blocks.0.feed_forward.out.weight")[1],
        "depth": sum(name.endswith(".norm1.weight") for name in sources),
    }


def read_mask_token(path: str | Path, dim: int) -> Tensor:
    """Read the vector (dim,) of a .pth file that holds only it, bare or in a dictionary."""
    try:
        vector = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot read a mask token from it ({error.strerror})") from error
    except Exception as error:                                   # whatever a broken pickle raises
        kind = identify(path)
        reason = str(error).partition("\n")[0] if "pickle" in kind else kind or "unknown content"
        raise ValueError(f"{path}: cannot read a mask token from it ({reason}); expected a .pth "
                         "file that holds one vector and no program") from error
    if isinstance(vector, dict) and len(vector) == 1:
        vector = next(iter(vector.values()))
    if not isinstance(vector, Tensor) or vector.shape != (dim,):
        content = type(vector).__name__
        if isinstance(vector, Tensor):
            content = f"shape {tuple(vector.shape)}"
        raise ValueError(f"{path}: expected a mask token of shape ({dim},), found {content}")
    return vector


# ---------------------------------------------------------------- the model

class T5Encoder(nn.Module):
    """Token ids to contextual embeddings.

    Attention includes padding: SD3 and UniAlignment were trained so.
    A new encoder has T5's own random initialisation. Its outputs have unit scale and distinguish
    tokens, so that a small model can be trained on a frozen random encoder.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.relative_bias = nn.Embedding(config.buckets, config.num_heads)     # for all blocks
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm_out = RMSNorm(config.dim, config.norm_eps)

        inner = config.num_heads * config.head_dim
        nn.init.normal_(self.relative_bias.weight, std=config.dim ** -0.5)
        for block in self.blocks:
            q, kv = block.attention.qkv.weight.detach().split((inner, 2 * inner))
            # The queries contain the 1/sqrt(head_dim) of attention.
            nn.init.normal_(q, std=(config.dim * config.head_dim) ** -0.5)
            nn.init.normal_(kv, std=config.dim ** -0.5)
            nn.init.normal_(block.attention.out.weight, std=inner ** -0.5)
            nn.init.normal_(block.feed_forward.gate_value.weight, std=config.dim ** -0.5)
            nn.init.normal_(block.feed_forward.out.weight, std=config.ff_dim ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (B, L, dim) of ids (B, L), in the dtype of the weights.

        Raises ValueError unless ids are integers in [0, vocab_size) (the range on a CPU alone), and
        for float16 weights, which overflow in the XXL model.
        """
        if self.embedding.weight.dtype == torch.float16:
            raise ValueError("T5 overflows in float16; expected bfloat16 or float32 weights")
        if ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64) or not ids.numel():
            raise ValueError(f"expected integer ids (B, L), got {ids.dtype} {tuple(ids.shape)}")
        # On a GPU it would wait for all work before, in every call; there the look-up itself fails.
        if ids.is_cpu and (ids.min() < 0 or ids.max() >= self.config.vocab_size):
            raise ValueError(f"ids from {ids.min()} to {ids.max()}, "
                             f"expected 0 to {self.config.vocab_size - 1}")
        x = self.embedding(ids)                                  # (B, L, D)
        c = self.config
        buckets = relative_buckets(ids.shape[1], c.buckets, c.max_distance, ids.device)  # (L, L)
        bias = self.relative_bias(buckets).permute(2, 0, 1)      # (heads, L, L)
        bias = bias.unsqueeze(0).contiguous()                    # (1, heads, L, L)
        for block in self.blocks:
            x = block(x, bias)                                   # (B, L, D)
        return self.norm_out(x)                                  # (B, L, D)

    @classmethod
    def from_pretrained(cls, path: str | Path, mask_token: str | Path | None = None,
                        dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
                        float8: bool = False, **overrides) -> "T5Encoder":
        """Load an encoder.

        path:       a folder with shards, the repository around it, a file of the encoder alone, an
                    SD3 single file or a file that this project wrote
        mask_token: a .pth file with a vector (dim,), bfloat16 in the release; it replaces row
                    `config.mask_id` of the embedding
        dtype:      of the weights in memory, float32 or bfloat16; the file may hold float16 or fp8
        float8:     keep the matrices in fp8 (e4m3), those of an fp8 file as they are stored;
                    `dtype` is that of the computation
        overrides:  fields of T5Config
        Raises ValueError naming the file and the tensors or fields that do not fit.
        """
        if dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(f"T5 in {dtype}: expected torch.bfloat16 or torch.float32 "
                             "(float16 overflows)")
        checkpoint = Checkpoint(path, subfolders=("text_encoder_3", "text_encoder"))
        checkpoint = checkpoint.under("text_encoders.t5xxl.transformer.")
        given = checkpoint.config
        if "embedding.weight" in checkpoint:                     # the project's own layout
            sources = {name: Source((name,)) for name in checkpoint.names()}
        else:
            sources = released_sources(checkpoint)
            activation = given.get("feed_forward_proj", "gated-gelu")
            if activation != "gated-gelu":
                raise ValueError(f"{checkpoint.path}: feed_forward_proj = {activation!r}, "
                                 "expected 'gated-gelu' (T5 v1.1)")
            given = {own: given[theirs] for theirs, own in HF_CONFIG.items() if theirs in given}
        fields = fields_of(checkpoint, sources) | given | overrides
        config = make_config(T5Config, fields, str(checkpoint.path))
        with torch.device("meta"):
            encoder = cls(config)
            if float8:
                keep_in_float8(encoder)
        # A whole T5 has a decoder as well.
        is_whole = "decoder.final_layer_norm.weight" in checkpoint
        load(encoder, checkpoint, sources, dtype=dtype, device=device,
             ignored=("decoder.",) if is_whole else ())
        if mask_token is not None:
            if config.mask_id >= config.vocab_size:
                raise ValueError(f"{checkpoint.path}: mask_id = {config.mask_id}, "
                                 f"but the embedding has {config.vocab_size} rows")
            vector = read_mask_token(mask_token, config.dim)     # (dim,)
            encoder.embedding.weight.data[config.mask_id] = vector.to(encoder.embedding.weight)
        return encoder


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(T5Tokenizer(sys.argv[1]).encode(sys.argv[2]))
    except ValueError as error:
        sys.exit(f"error: {error}")
