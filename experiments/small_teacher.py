"""A small contrastive teacher, which stands in for Qwen2.5-VL in the shapes world.

Like CLIP (arXiv 2103.00020) it maps a picture and its caption to similar vectors, and other pairs
to different ones. `experiments.parts` trains it from scratch in about a minute. Its text side uses
the transformer blocks of Qwen2.5-VL's vision encoder (teacher.py).
"""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from checkpoint import Checkpoint, Source, load, make_config
from data import to_images
from teacher import Block, Groups, Picture, rgb, rotary_angles

PADDING = 0                                      # id of <pad> in T5's sentencepiece models


@dataclass(frozen=True)
class ContrastiveTeacherConfig:
    """Sizes of the small teacher. Raises ValueError for sizes that do not fit each other."""
    vocab_size: int
    image_size: int = 64                         # side of a picture, in pixels
    channels: int = 64                           # of the first convolution; the next ones double it
    depth: int = 1                               # blocks of the text side
    hidden_size: int = 128                       # this and the next two: the sizes of a `Block`
    intermediate_size: int = 256
    num_heads: int = 4
    out_dim: int = 128

    def __post_init__(self):
        if self.num_heads < 1 or self.hidden_size % (4 * self.num_heads):
            raise ValueError(f"num_heads = {self.num_heads}, expected to cut hidden_size = "
                             f"{self.hidden_size} into multiples of 4")
        if self.image_size < 16 or self.image_size % 16:
            raise ValueError(f"image_size = {self.image_size}, expected a multiple of 16")


class ContrastiveTeacher(nn.Module):
    """Features of pictures and of captions, similar for those that belong together.

    Pictures: convolutions, then one matrix over all places, which keeps the place of each object.
    Texts: the mean token after a block of attention, which relates each word to its object.
    """

    def __init__(self, config: ContrastiveTeacherConfig, tokenizer: SentencePieceProcessor):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        c, places = config.channels, (config.image_size // 16) ** 2
        self.image = nn.Sequential(
            nn.PixelUnshuffle(4),                                             # (B, 48, S/4, S/4)
            nn.Conv2d(48, c, 3, padding=1), nn.SiLU(),                        # (B, c, S/4, S/4)
            nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), nn.SiLU(),           # (B, 2 c, S/8, S/8)
            nn.Conv2d(2 * c, 2 * c, 3, stride=2, padding=1), nn.SiLU(),       # (B, 2 c, S/16, S/16)
            nn.Flatten(), nn.Linear(2 * c * places, config.out_dim))          # (B, out_dim)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.text = nn.Linear(config.hidden_size, config.out_dim)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32,
                        device: str | torch.device = "cpu") -> "ContrastiveTeacher":
        """Load the frozen teacher from a folder with model.safetensors and tokenizer.model.

        Raises ValueError naming the file for anything missing or of the wrong shape.
        """
        checkpoint = Checkpoint(folder)
        config = make_config(ContrastiveTeacherConfig, checkpoint.config, str(checkpoint.path))
        file = Path(folder) / "tokenizer.model"
        try:
            tokenizer = SentencePieceProcessor(model_proto=file.read_bytes())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{file}: not a sentencepiece model ({error})") from error
        pieces, padding = tokenizer.get_piece_size(), tokenizer.pad_id()
        if pieces != config.vocab_size or padding != PADDING:
            raise ValueError(f"{file}: {pieces} pieces, <pad> is {padding}; expected "
                             f"{config.vocab_size} and {PADDING}")
        with torch.device("meta"):
            model = cls(config, tokenizer)
        sources = {name: Source((name,)) for name in model.state_dict()}
        load(model, checkpoint, sources, dtype=dtype, device=device)
        return model.eval().requires_grad_(False)

    @property
    def out_dim(self) -> int:
        return self.config.out_dim

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """Ids (B, L), padded to the longest text. Raises ValueError for an empty text."""
        rows = [] if isinstance(texts, str) else self.tokenizer.encode(list(texts))
        if not rows or not all(rows):
            raise ValueError(f"texts = {texts!r}, expected a sequence of texts, none of them empty")
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True,
                            padding_value=PADDING)                            # (B, L)

    def encode_texts(self, ids: Tensor) -> Tensor:
        """Features (B, out_dim) of ids (B, L). Padding is removed before any computation."""
        kept = ids != PADDING                                                 # (B, L)
        text, position = kept.nonzero(as_tuple=True)                          # (N,) each
        groups = Groups.of(text, ids.device)
        head_dim = self.config.hidden_size // self.config.num_heads
        angles = rotary_angles(position[:, None].expand(-1, 2), head_dim)     # (N, head_dim / 2)
        x = self.embedding(ids[kept])                                         # (N, D)
        for block in self.blocks:
            x = block(x, angles, groups)
        total = x.new_zeros(len(ids), x.shape[1]).index_add(0, text, x)       # (B, D)
        mean = total / kept.sum(dim=1, keepdim=True)                          # (B, D)
        return self.text(mean)                                                # (B, out_dim)

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, out_dim) of images (B, 3, S, S) in [-1, 1], and of captions' ids (B, L)."""
        # For short sequences on a CPU, the fused attention's backward pass takes twice as long.
        with sdpa_kernel(SDPBackend.MATH):
            return self.image(images), self.encode_texts(ids)

    @torch.no_grad()
    def image_features(self, pictures: Sequence[Picture]) -> Tensor:
        """Features (B, out_dim) float32 of PIL pictures or uint8 arrays (S, S, 3).

        Raises ValueError for other sizes.
        """
        pixels = [rgb(picture) for picture in pictures]
        size = self.config.image_size
        shapes = {picture.shape for picture in pixels}
        if shapes != {(size, size, 3)}:
            raise ValueError(f"pictures of shapes {sorted(shapes)}, expected at least one, each "
                             f"({size}, {size}, 3)")
        weight = self.embedding.weight
        images = to_images(pixels).to(weight.device, weight.dtype)            # (B, 3, S, S)
        return self.image(images).float()                                     # (B, out_dim)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Features (B, out_dim) float32 of texts. Raises ValueError for an empty text."""
        ids = self.token_ids(texts).to(self.embedding.weight.device)          # (B, L)
        return self.encode_texts(ids).float()
