"""The MM-DiT of UniAlignment (arXiv 2509.23760, section 3): one transformer, two diffusions.

Architecture of SD3 (arXiv 2403.03206). An image stream (latent patches) and a text stream (T5
embeddings) have their own weights and meet in joint attention. The image stream's output is a
velocity (flow matching, equation 1), the text stream's output is logits over the vocabulary (masked
diffusion, equation 2). Source images of editing are further image tokens. Loads SD3 and
UniAlignment checkpoints; an SD3 checkpoint becomes a dual model whose velocity is exactly SD3's.

Run alone to count parameters and see the shapes:   python model.py [CHECKPOINT]
"""
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from checkpoint import Checkpoint, Source, concatenate, load, make_config, note, option


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes and options of the MM-DiT. The defaults are those of the released 2B model."""
    latent_channels: int = option(16, "channels of the latents")
    patch_size: int = option(2, "side of a patch, in latent pixels")
    width: int = option(1536, "width D of both streams")
    depth: int = option(24, "joint blocks")
    num_heads: int = option(24, "attention heads")
    text_dim: int = option(4096, "width of the T5 encoder; 0: that of the one the run has")
    vocab_size: int = option(32100, "T5's 32000 pieces and 100 sentinels")
    position_table: int = option(192, "side of the table of 2-D positions, in patches")
    null_tokens: int = option(8, "learned image tokens of a text-only pass")
    align_dims: tuple[int, ...] = option((), "hidden and output width of the alignment heads, H,D; "
                                             "empty: no heads")
    align_silu: bool = option(True, "end the alignment heads in a SiLU, as the released ones do")
    # options that no released weights have
    qk_norm: bool = option(False, "layer norm on queries and keys (arXiv 2302.05442)")
    text_positions: int = option(0, "length of a learned position embedding of the text; 0: none")
    exact_gelu: bool = option(False, "GELU by the error function versus tanh: the same within "
                                     "0.0005, four times as fast on CPU")
    number_references: bool = option(False, "number the source images; else they are a set, and "
                                            "'picture 2' has no meaning")

    def __post_init__(self):
        sizes = (self.latent_channels, self.patch_size, self.width, self.depth, self.num_heads,
                 self.vocab_size, self.position_table, self.null_tokens, *self.align_dims)
        may_be_zero = self.text_dim, self.text_positions
        if min(sizes) < 1 or min(may_be_zero) < 0 or len(self.align_dims) not in (0, 2):
            raise ValueError("sizes must be positive and align_dims empty or (hidden, teacher), "
                             f"got {self}")
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of num_heads {self.num_heads} "
                             "and of 4; the shapes of a checkpoint do not specify num_heads: give "
                             "num_heads=...")


class Output(NamedTuple):
    """The result of a forward pass; None for what `want` leaves out or a text-only pass lacks."""
    velocity: Tensor | None         # (B, C, H, W)
    logits: Tensor | None           # (B, L, vocab)
    image_hidden: Tensor | None     # (B, N, D)  input of the image head, without source images
    text_hidden: Tensor | None      # (B, L, D)  input of the text head
    image_mid: Tensor | None        # (B, d)     of the alignment head, after block `align_depth`
    text_mid: Tensor | None         # (B, d)


HEADS = {"velocity": "image", "logits": "text"}                 # and the streams that they read


class Modulation(NamedTuple):
    """adaLN-Zero: the timestep's effect on one sub-layer, each (B, 1, D)."""
    shift: Tensor
    scale: Tensor
    gate: Tensor


# ---------------------------------------------------------------- functions

def timestep_embedding(timestep: Tensor, dim: int = 256, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of the timestep (B,) in [0, 1000] -> (B, dim) float32."""
    half = dim // 2
    steps = torch.arange(half, device=timestep.device)                              # (dim / 2,)
    frequencies = torch.exp(-math.log(max_period) * steps / half)                   # (dim / 2,)
    angles = timestep.float()[:, None] * frequencies                                # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)                           # (B, dim)


def sincos_positions(side: int, dim: int, spacing: float = 1.0) -> Tensor:
    """The fixed table of 2-D positions, (1, side * side, dim), on the CPU.

    Columns in the first half of the channels, rows in the second; sines, then cosines.
    """
    # Apple's GPUs have no float64.
    exact = {"dtype": torch.float64, "device": "cpu"}
    quarter = dim // 4
    exponents = torch.arange(quarter, **exact) / quarter                            # (dim / 4,)
    frequencies = 10000.0 ** -exponents                                             # (dim / 4,)
    places = torch.arange(side, **exact)[:, None] * spacing                         # (side, 1)
    angles = places * frequencies                                                   # (side, dim/4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1).float()                   # (side, dim/2)
    columns = line[None].expand(side, -1, -1)                                # (side, side, dim/2)
    rows = line[:, None].expand(-1, side, -1)                                # (side, side, dim/2)
    return torch.cat([columns, rows], dim=2).reshape(1, side * side, dim)


def patchify(latents: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, H/p * W/p, C * p * p)."""
    b, c, h, w = latents.shape
    x = latents.reshape(b, c, h // p, p, w // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // p) * (w // p), c * p * p)


def unpatchify(tokens: Tensor, p: int, h: int, w: int) -> Tensor:
    """(B, h * w, p * p * C) -> (B, C, h * p, w * p).

    The channels of a token are ordered (row, column, channel), as in SD3's head.
    """
    b, _, pixels = tokens.shape
    x = tokens.reshape(b, h, w, p, p, pixels // (p * p))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h * p, w * p)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights of its own, then the timestep's scale and shift; (B, N, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over (B, heads, N, d), d the width of a head.

    Trick for speed: written out for short sequences that need a gradient on CPU. There the backward
    of bfloat16 `scaled_dot_product_attention` is slower (forward and backward take 4.4 times as
    long at 48 tokens, 1.9 at 128, the same at 256, half at 512). Everywhere else the fused kernel
    is faster, and it needs no (N, N) memory.
    """
    if q.is_cuda or not torch.is_grad_enabled() or q.shape[2] > 192:
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)                # (B, heads, N, N)
    return scores.softmax(dim=-1).to(v.dtype) @ v                           # (B, heads, N, d)


# ---------------------------------------------------------------- modules

class Stream(nn.Module):
    """One modality's half of a joint block: its own weights for everything but the softmax."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        d = config.width
        self.num_heads = config.num_heads
        self.gelu = nn.GELU("none" if config.exact_gelu else "tanh")
        self.modulation = nn.Linear(d, 6 * d)
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)
        self.fc1 = nn.Linear(d, 4 * d)
        self.fc2 = nn.Linear(4 * d, d)

    def modulations(self, condition: Tensor) -> tuple[Modulation, Modulation]:
        """Modulate attention and MLP by the timestep's condition (B, D).

        Trick for speed and memory: a third of all weights are here, for B rows only. Autocast would
        copy them to bfloat16, and autograd would keep the copy.
        """
        device = "cpu" if condition.is_meta else condition.device.type      # meta: shapes alone
        with torch.autocast(device, enabled=False):
            parts = self.modulation(condition.to(self.modulation.weight.dtype))     # (B, 6 D)
        parts = parts.to(condition.dtype)[:, None].chunk(6, dim=-1)         # 6 x (B, 1, D)
        return Modulation(*parts[:3]), Modulation(*parts[3:])

    def queries_keys_values(self, x: Tensor, m: Modulation) -> tuple[Tensor, Tensor, Tensor]:
        """Project x (B, N, D) to three tensors (B, heads, N, d)."""
        qkv = self.qkv(modulate(x, m.shift, m.scale))                       # (B, N, 3 D)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))                    # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, heads, N, d)
        return q, k, v

    def update(self, x: Tensor, attended: Tensor, attn: Modulation, mlp: Modulation) -> Tensor:
        """Residual steps of attention and MLP for x and attended, (B, N, D) each."""
        x = x + attn.gate * self.proj(attended)                             # (B, N, D)
        hidden = self.gelu(self.fc1(modulate(x, mlp.shift, mlp.scale)))     # (B, N, 4 D)
        return x + mlp.gate * self.fc2(hidden)                              # (B, N, D)


class JointBlock(nn.Module):
    """SD3's MM-DiT block: two streams, one attention over the tokens of both."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.image = Stream(config)
        self.text = Stream(config)

        def norm() -> nn.Module:
            head_dim = config.width // config.num_heads
            return nn.LayerNorm(head_dim, eps=1e-6, bias=False) if config.qk_norm else nn.Identity()

        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, image: Tensor, text: Tensor, condition: Tensor,
                update: Sequence[str] = ("image", "text")) -> tuple[Tensor, Tensor]:
        """image (B, N, D), text (B, L, D), condition (B, D) -> the two streams, updated.

        A stream that `update` leaves out serves the attention alone, and comes back as it was.
        """
        image_attn, image_mlp = self.image.modulations(condition)
        text_attn, text_mlp = self.text.modulations(condition)
        image_qkv = self.image.queries_keys_values(image, image_attn)       # (B, heads, N, d)
        text_qkv = self.text.queries_keys_values(text, text_attn)           # (B, heads, L, d)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(image_qkv, text_qkv))
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)       # (B, heads, N + L, d)
        attended = attention(q, k, v).transpose(1, 2).flatten(2)            # (B, N + L, D)
        n = image.shape[1]
        if "image" in update:
            image = self.image.update(image, attended[:, :n], image_attn, image_mlp)    # (B, N, D)
        if "text" in update:
            text = self.text.update(text, attended[:, n:], text_attn, text_mlp)     # (B, L, D)
        return image, text


class AlignmentHead(nn.Module):
    """Mean over tokens, then two layers to the teacher's width (equation 4)."""

    def __init__(self, width: int, hidden: int, out: int, final_silu: bool):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)
        self.final_silu = final_silu

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.mean(dim=1)                                              # (B, D)
        x = self.fc2(F.silu(self.fc1(x)))                                   # (B, out)
        return F.silu(x) if self.final_silu else x


class MMDiT(nn.Module):
    """The dual-diffusion transformer.

    Set `gradient_checkpointing` to recompute blocks in the backward pass, which saves memory.
    """

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        if not config.text_dim:
            raise ValueError("text_dim 0 stands for the width of a run's T5: a model needs it")
        self.config = c = config
        self.gradient_checkpointing = False
        # inputs
        self.patch_embed = nn.Linear(c.latent_channels * c.patch_size ** 2, c.width)
        self.register_buffer("pos_embed", torch.empty(1, c.position_table ** 2, c.width))
        self.text_embed = nn.Linear(c.text_dim, c.width)
        self.text_pos_embed = self.number_scale = None
        if c.text_positions:
            self.text_pos_embed = nn.Parameter(torch.empty(1, c.text_positions, c.width))
        if c.number_references:
            self.number_scale = nn.Parameter(torch.empty(c.width))
        self.time_embed = nn.Sequential(
            nn.Linear(256, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.null_image = nn.Parameter(torch.empty(1, c.null_tokens, c.width))
        # both streams
        self.blocks = nn.ModuleList(JointBlock(c) for _ in range(c.depth))
        # outputs
        self.image_modulation = nn.Linear(c.width, 2 * c.width)             # shift, scale
        self.image_head = nn.Linear(c.width, c.patch_size ** 2 * c.latent_channels)
        self.text_head = nn.Linear(c.width, c.vocab_size)
        self.image_align = self.text_align = None
        if c.align_dims:
            self.image_align = AlignmentHead(c.width, *c.align_dims, c.align_silu)
            self.text_align = AlignmentHead(c.width, *c.align_dims, c.align_silu)
        if not self.pos_embed.is_meta:
            for name, tensor in self.state_dict().items():
                self.initialise(name, tensor)

    @torch.no_grad()
    def initialise(self, name: str, tensor: Tensor) -> None:
        """Fill one tensor of a fresh model.

        Modulation and heads start at zero (adaLN-Zero), so every block starts as the identity.
        """
        zeros = ("image_head.weight", "text_head.weight", "number_scale")
        if name == "pos_embed":
            side = self.config.position_table
            spacing = 64 / side                                 # SD3's table spans 64 units
            tensor.copy_(sincos_positions(side, self.config.width, spacing))
        elif name in ("text_pos_embed", "null_image"):
            nn.init.normal_(tensor, std=0.02)
        elif "_norm." in name:
            nn.init.ones_(tensor)
        elif name.endswith("bias") or "modulation" in name or name in zeros:
            nn.init.zeros_(tensor)
        else:
            nn.init.xavier_uniform_(tensor)

    @classmethod
    def from_pretrained(cls, path, dtype: torch.dtype = torch.float32,
                        device: str | torch.device = "cpu", **overrides) -> "MMDiT":
        """Load any layout of an MM-DiT checkpoint.

        path: SD3 (single file or diffusers folder), UniAlignment or dual diffusion (folder), or
        this project's own file. The configuration comes from config.json or the metadata, else
        from the shapes; `overrides` sets fields that neither specifies (num_heads of a bare file
        whose heads are not 64 wide). Alignment heads that `overrides` asks for and the file lacks
        start fresh. Raises ValueError that names the file and each tensor that is missing,
        superfluous or of the wrong shape.
        """
        file = _open(path)
        config, sources = _read_layout(file, overrides)
        with torch.device("meta"):
            model = cls(config)
        missing = model.state_dict().keys() - sources.keys()
        fresh_heads = "align_dims" in overrides and all("_align." in name for name in missing)
        is_sd3 = kind_of_checkpoint(path) == "sd3"
        initialise = model.initialise if is_sd3 or fresh_heads else None
        return load(model, file, sources, initialise, dtype, device)

    def _check(self, latents, text, timestep, references, align_depth, want) -> None:
        """Raise ValueError for inputs that the configuration does not allow."""
        c, batch = self.config, text.shape[0]
        if text.ndim != 3 or text.shape[2] != c.text_dim:
            raise ValueError(f"text has shape {tuple(text.shape)}, expected (B, L, {c.text_dim})")
        if c.text_positions and text.shape[1] > c.text_positions:
            raise ValueError(f"text has {text.shape[1]} tokens, this model has positions for "
                             f"{c.text_positions}")
        named = {f"references[{i}]": x for i, x in enumerate(references)}
        if latents is not None:
            named = {"latents": latents} | named
        largest = c.patch_size * c.position_table
        for name, x in named.items():
            if x.ndim != 4 or x.shape[:2] != (batch, c.latent_channels):
                raise ValueError(f"{name} has shape {tuple(x.shape)}, expected "
                                 f"({batch}, {c.latent_channels}, H, W)")
            if any(side % c.patch_size or side > largest for side in x.shape[2:]):
                raise ValueError(f"{name} is {x.shape[2]} x {x.shape[3]}, expected multiples of "
                                 f"{c.patch_size} up to {largest} (the table of positions)")
        if latents is None and (references or "velocity" in want):
            raise ValueError("a text-only pass (latents=None) has no references and no velocity; "
                             "ask for want=('logits',)")
        if timestep.shape != text.shape[:1]:
            raise ValueError(f"timestep has shape {tuple(timestep.shape)}, expected ({batch},)")
        if align_depth is not None and not (c.align_dims and 1 <= align_depth <= c.depth):
            raise ValueError(f"align_depth={align_depth}, expected 1 to {c.depth} in a model that "
                             "has alignment heads (align_dims)")
        if unknown := set(want) - set(HEADS):
            raise ValueError(f"want has {sorted(unknown)}, expected 'velocity' and 'logits'")

    def _embed_image(self, latents: Tensor) -> Tensor:
        """Embed patches and add their positions, (B, C, H, W) -> (B, N, D).

        The positions are the centre of the table, cropped to the image.
        """
        p, side = self.config.patch_size, self.config.position_table
        h, w = latents.shape[2] // p, latents.shape[3] // p
        top, left = (side - h) // 2, (side - w) // 2
        table = self.pos_embed.unflatten(1, (side, side))                   # (1, side, side, D)
        crop = table[:, top:top + h, left:left + w].flatten(1, 2)           # (1, N, D)
        return self.patch_embed(patchify(latents, p)) + crop                # (B, N, D)

    def _embed_reference(self, latents: Tensor, number: int) -> Tensor:
        """Embed source image `number` (from 1), (B, C, H, W) -> (B, N', D).

        Its number is a fixed code times a learned scale. With a learned matrix in place of the
        scale, Adam's first steps make the number drown the image (experiments/LOG.md).
        """
        x = self._embed_image(latents)                                      # (B, N', D)
        if self.number_scale is None:
            return x
        number = torch.full((1,), number, device=latents.device)    # a list would be copied there
        code = timestep_embedding(number, self.config.width, max_period=100)        # (1, D)
        return x + self.number_scale * code.to(x.dtype)

    def _embed_text(self, text: Tensor) -> Tensor:
        """Project T5's output, (B, L, text_dim) -> (B, L, D), in the dtype of the weights."""
        text = self.text_embed(text).to(self.pos_embed.dtype)               # undo autocast's type
        if self.text_pos_embed is None:
            return text
        return text + self.text_pos_embed[:, :text.shape[1]]

    def forward(self, latents: Tensor | None, text: Tensor, timestep: Tensor,
                references: Sequence[Tensor] = (), align_depth: int | None = None,
                want: Sequence[str] | Mapping[str, slice | Tensor] = ("velocity", "logits"),
                ) -> Output:
        """Run both streams.

        latents (B, C, H, W): noisy in the image branch, clean in the text branch, None for text
        only; text (B, L, text_dim) from T5; timestep (B,) in [0, 1000], 0 for a clean image;
        references: clean latents (B, C, H', W') of source images, any number; align_depth: block,
        from 1, after which the mids are taken; want: the heads to compute, or {head: rows}, so that
        a batch of both branches computes each head for its own rows only. Rows of the logits may be
        a mask (B, L) of N tokens: their hidden states are (N, D), their logits (N, vocab).
        Raises ValueError on wrong shapes.
        """
        self._check(latents, text, timestep, references, align_depth, want)
        rows = want if isinstance(want, Mapping) else dict.fromkeys(want, slice(None))
        time = timestep_embedding(timestep).to(self.pos_embed.dtype)        # (B, 256)
        condition = F.silu(self.time_embed(time))                           # (B, D)
        text = self._embed_text(text)                                       # (B, L, D)
        if latents is None:
            image = self.null_image.expand(len(text), -1, -1)               # (B, null, D)
        else:
            image = self._embed_image(latents)                              # (B, N, D)
        n = image.shape[1]
        sources = [self._embed_reference(x, i) for i, x in enumerate(references, start=1)]
        image = torch.cat([image, *sources], dim=1)                         # (B, N + N', D)

        image_mid = text_mid = None
        for depth, block in enumerate(self.blocks, start=1):
            update = ["image", "text"]
            if depth == len(self.blocks) and depth != align_depth:      # only what the heads read
                update = [stream for head, stream in HEADS.items() if head in rows]
            inputs = image, text, condition, update
            if self.gradient_checkpointing and torch.is_grad_enabled():
                image, text = recompute(block, *inputs, use_reentrant=False)
            else:
                image, text = block(*inputs)                            # (B, N + N', D), (B, L, D)
            if depth == align_depth:
                image_mid = self.image_align(image[:, :n])                  # (B, d)
                text_mid = self.text_align(text)                            # (B, d)

        velocity = logits = image_hidden = text_hidden = None
        if "velocity" in rows:
            p, (h, w) = self.config.patch_size, latents.shape[2:]
            image, condition = image[rows["velocity"], :n], condition[rows["velocity"]]
            shift, scale = self.image_modulation(condition)[:, None].chunk(2, dim=-1)   # (b, 1, D)
            image_hidden = modulate(image, shift, scale)                    # (b, N, D)
            velocity = unpatchify(self.image_head(image_hidden), p, h // p, w // p)  # (b, C, H, W)
        if "logits" in rows:
            text = text[rows["logits"]]                                     # (b, L, D)
            text_hidden = F.layer_norm(text, text.shape[-1:], eps=1e-6)     # (b, L, D)
            logits = self.text_head(text_hidden)                            # (b, L, vocab)
        return Output(velocity, logits, image_hidden, text_hidden, image_mid, text_mid)


# ---------------------------------------------------------------- released layouts

# own name below a block's stream -> names in the file
_SINGLE_FILE = {
    "modulation": ("adaLN_modulation.1",), "qkv": ("attn.qkv",), "proj": ("attn.proj",),
    "fc1": ("mlp.fc1",), "fc2": ("mlp.fc2",)}
_DIFFUSERS_IMAGE = {
    "modulation": ("norm1.linear",), "qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "proj": ("attn.to_out.0",), "fc1": ("ff.net.0.proj",), "fc2": ("ff.net.2",)}
_DIFFUSERS_TEXT = {
    "modulation": ("norm1_context.linear",),
    "qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "proj": ("attn.to_add_out",), "fc1": ("ff_context.net.0.proj",), "fc2": ("ff_context.net.2",)}
# field of the diffusers config.json -> own field
_DIFFUSERS_CONFIG = {
    "num_layers": "depth", "num_attention_heads": "num_heads", "in_channels": "latent_channels",
    "patch_size": "patch_size", "joint_attention_dim": "text_dim",
    "caption_projection_dim": "width", "pos_embed_max_size": "position_table"}


def _open(path) -> Checkpoint:
    return Checkpoint(path, subfolders=("transformer",)).under("model.diffusion_model.")


def kind_of_checkpoint(path) -> str:
    """"sd3": plain SD3, which draws and does not write; "dual": a released dual model; "own"."""
    file = _open(path)
    if "blocks.0.image.qkv.weight" in file:
        return "own"
    return "dual" if "null_image_embd" in file else "sd3"


class _Layout(NamedTuple):
    """The names of one released layout."""
    blocks: str                             # prefix of block {}
    streams: dict[str, tuple[str, dict]]    # own stream -> prefix below a block, names of its parts
    patch: str
    text: str
    positions: str
    time: tuple[str, str]                   # MLP of the timestep
    pooled: tuple[str, str]                 # MLP of the pooled text, in SD3 only
    modulation: str                         # before the image head
    head: str
    scale_first: bool                       # the last modulations are (scale, shift)


_SD3_SINGLE_FILE = _Layout(
    blocks="joint_blocks.{}.",
    streams={"image": ("x_block.", _SINGLE_FILE), "text": ("context_block.", _SINGLE_FILE)},
    patch="x_embedder.proj", text="context_embedder", positions="pos_embed",
    time=("t_embedder.mlp.0", "t_embedder.mlp.2"), pooled=("y_embedder.mlp.0", "y_embedder.mlp.2"),
    modulation="final_layer.adaLN_modulation.1", head="final_layer.linear", scale_first=False)
_SD3_DIFFUSERS = _Layout(
    blocks="transformer_blocks.{}.",
    streams={"image": ("", _DIFFUSERS_IMAGE), "text": ("", _DIFFUSERS_TEXT)},
    patch="pos_embed.proj", text="context_embedder", positions="pos_embed.pos_embed",
    time=("time_text_embed.timestep_embedder.linear_1",
          "time_text_embed.timestep_embedder.linear_2"),
    pooled=("time_text_embed.text_embedder.linear_1", "time_text_embed.text_embedder.linear_2"),
    modulation="norm_out.linear", head="proj_out", scale_first=True)
_UNIALIGNMENT = _SD3_DIFFUSERS._replace(modulation="image_norm_out.linear", head="image_proj_out")


def _swap_halves(x: Tensor) -> Tensor:
    """(scale, shift) of the diffusers layout -> (shift, scale)."""
    scale, shift = x.chunk(2)
    return concatenate(shift, scale)


def _extend_last_text_modulation(shift_scale: Tensor) -> Tensor:
    """SD3's (shift, scale) of the last text stream -> six parts with gates of zero.

    That stream only serves the attention in SD3. With gates of zero it is the identity.
    """
    gates_and_mlp = shift_scale.new_zeros(2 * len(shift_scale), *shift_scale.shape[1:])
    return concatenate(shift_scale, gates_and_mlp)


def _fold_pooled_text(time_bias: Tensor, hidden_bias: Tensor, weight: Tensor,
                      bias: Tensor) -> Tensor:
    """Add SD3's MLP of an all-zero pooled text, a constant, to the timestep's last bias."""
    if weight.is_meta:      # shapes alone: silu there imports torch's compiler, for a second
        if not weight.shape == bias.shape + hidden_bias.shape == time_bias.shape + bias.shape:
            raise ValueError("the pooled text's MLP does not fit the timestep's")
        return time_bias
    return time_bias + weight @ F.silu(hidden_bias) + bias


def _exact_positions(table: Tensor) -> Tensor:
    """The fixed table at full precision, if the file holds it rounded; else the file's own."""
    if table.is_meta:
        return table
    side, dim = math.isqrt(table.shape[1]), table.shape[2]
    sine, cosine = table[0, 1, 0], table[0, 1, dim // 4]        # second column, frequency 1
    spacing = torch.atan2(sine, cosine).item()
    exact = sincos_positions(side, dim, round(side * spacing) / side).to(table)
    # A difference of NaN is no exact table; torch.allclose takes seven times as long.
    return exact if (exact - table).abs_().amax() <= 1e-3 else table


def _linear(own: str, *names: str, combine=None) -> dict[str, Source]:
    """Sources of a linear layer's weight and bias."""
    sources = {}
    for part in ("weight", "bias"):
        stacked = tuple(f"{name}.{part}" for name in names)
        sources[f"{own}.{part}"] = Source(stacked, combine) if combine else Source(stacked)
    return sources


def _read_layout(file: Checkpoint, overrides: Mapping) -> tuple[MMDiTConfig, dict[str, Source]]:
    """The configuration and the source of every tensor, for the layout that the file has."""
    if "blocks.0.image.qkv.weight" in file:
        config = make_config(MMDiTConfig, file.config | dict(overrides), str(file.path))
        return config, {name: Source((name,)) for name in file.names()}
    if "joint_blocks.0.x_block.attn.qkv.weight" in file:
        layout = _SD3_SINGLE_FILE
    elif "image_proj_out.weight" in file and "transformer_blocks.0.attn.to_q.weight" in file:
        layout = _UNIALIGNMENT
    elif "transformer_blocks.0.attn.to_q.weight" in file:
        layout = _SD3_DIFFUSERS
    else:
        raise file.unlike("an MM-DiT", "holds no MM-DiT in a known layout (SD3 single file, SD3 or "
                          "UniAlignment diffusers folder, own)")
    fields = _fields(file, layout)
    # SD3 has one head for each block.
    is_guess = "num_attention_heads" not in file.config and fields["num_heads"] != fields["depth"]
    if is_guess and "num_heads" not in overrides:
        note(f"{file.path}: a guess, as the file does not say: num_heads {fields['num_heads']}, "
             "heads of 64 channels; num_heads=... sets another number")
    config = make_config(MMDiTConfig, fields | dict(overrides), str(file.path))
    sources = _shared_sources(layout, config.depth)
    if f"{layout.pooled[0]}.weight" in file:
        _adapt_sd3(sources, layout, config.depth)
        return config, sources
    sources |= {"null_image": Source(("null_image_embd",))} | _linear("text_head", "text_proj_out")
    if config.align_dims and "siglip_adapter_img.fc.0.weight" in file:
        for own, name in (("image", "siglip_adapter_img"), ("text", "siglip_adapter_text")):
            sources |= _linear(f"{own}_align.fc1", f"{name}.fc.0")
            sources |= _linear(f"{own}_align.fc2", f"{name}.fc.2")
    return config, sources


def _fields(file: Checkpoint, layout: _Layout) -> dict:
    """Fields of the configuration from the shapes, then from config.json."""
    width, channels, patch_size, _ = file.shape(f"{layout.patch}.weight")
    fields = {
        "width": width, "latent_channels": channels, "patch_size": patch_size,
        "depth": file.count(layout.blocks), "num_heads": max(1, width // 64),
        "text_dim": file.shape(f"{layout.text}.weight")[1],
        "position_table": math.isqrt(file.shape(layout.positions)[1])}
    if "text_proj_out.weight" in file:
        fields["vocab_size"] = file.shape("text_proj_out.weight")[0]
        fields["null_tokens"] = file.shape("null_image_embd")[1]
    if "siglip_adapter_img.fc.0.weight" in file:
        layers = [file.shape(f"siglip_adapter_img.fc.{i}.weight") for i in (0, 2)]
        fields["align_dims"] = tuple(shape[0] for shape in layers)
    for name, own in _DIFFUSERS_CONFIG.items():
        if name in file.config:
            fields[own] = file.config[name]
    head = f"{layout.head}.weight"
    out_channels = file.shape(head)[0] // patch_size ** 2 if head in file else channels
    if channels > out_channels:
        raise ValueError(f"{file.path}: this is a variant for inpainting or editing, which takes "
                         f"{channels} channels and gives {out_channels}: expected as many")
    return fields


def _shared_sources(layout: _Layout, depth: int) -> dict[str, Source]:
    """Sources of the tensors that SD3 and the dual model have in common."""
    swap = _swap_halves if layout.scale_first else None
    sources = {
        "pos_embed": Source((layout.positions,), _exact_positions),
        "patch_embed.weight": Source((f"{layout.patch}.weight",), lambda w: w.flatten(1)),
        "patch_embed.bias": Source((f"{layout.patch}.bias",))}
    sources |= _linear("text_embed", layout.text)
    sources |= _linear("time_embed.0", layout.time[0])
    sources |= _linear("time_embed.2", layout.time[1])
    sources |= _linear("image_modulation", layout.modulation, combine=swap)
    sources |= _linear("image_head", layout.head)
    for i in range(depth):
        for stream, (prefix, parts) in layout.streams.items():
            for part, names in parts.items():
                full = [layout.blocks.format(i) + prefix + name for name in names]
                sources |= _linear(f"blocks.{i}.{stream}.{part}", *full)
    return sources


def _adapt_sd3(sources: dict[str, Source], layout: _Layout, depth: int) -> None:
    """Replace the sources in which SD3 differs from the dual model.

    SD3's last block has no text output, and its timestep MLP takes a pooled text, all zero here.
    """
    last = f"blocks.{depth - 1}.text."
    for part in ("proj", "fc1", "fc2"):
        for name in _linear(last + part):
            del sources[name]                               # initialised as those of a fresh model

    def extend(shift_scale: Tensor) -> Tensor:
        if layout.scale_first:
            shift_scale = _swap_halves(shift_scale)
        return _extend_last_text_modulation(shift_scale)

    for part in ("weight", "bias"):
        name = f"{last}modulation.{part}"
        sources[name] = Source(sources[name].names, extend)
    first, second = layout.pooled
    sources["time_embed.2.bias"] = Source(
        (f"{layout.time[1]}.bias", f"{first}.bias", f"{second}.weight", f"{second}.bias"),
        _fold_pooled_text)


if __name__ == "__main__":
    small = MMDiTConfig(width=128, depth=4, num_heads=4, text_dim=128, vocab_size=150,
                        position_table=8, qk_norm=True)
    try:
        model = MMDiT(small)
        if len(sys.argv) > 1:
            model = MMDiT.from_pretrained(sys.argv[1], device="meta")
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(model.config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    c, device = model.config, model.pos_embed.device
    side = 8 * c.patch_size
    latents = torch.zeros(2, c.latent_channels, side, side, device=device)
    text = torch.zeros(2, 32, c.text_dim, device=device)
    out = model(latents, text, torch.zeros(2, device=device))
    print({name: tuple(x.shape) for name, x in out._asdict().items() if x is not None})
