"""The MM-DiT of UniAlignment (arXiv 2509.23760, section 3; architecture of SD3, arXiv 2403.03206): one transformer, two diffusions.

An image stream (latent patches) and a text stream (T5 embeddings) have their own weights and meet in joint attention.
The image stream's output is a velocity (flow matching, equation 1), the text stream's output is logits over the vocabulary
(masked diffusion, equation 2). Source pictures of editing tasks are just more image tokens. Loads SD3 and UniAlignment
checkpoints; an SD3 checkpoint becomes a dual model whose velocity is exactly SD3's.

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

from checkpoint import Checkpoint, Source, load, make_config, option


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes and options of the MM-DiT. The defaults are those of the released 2B model."""
    latent_channels: int = option(16, "channels of the latents")
    patch_size: int = option(2, "side of a patch, in latent pixels")
    width: int = option(1536, "width D of both streams")
    depth: int = option(24, "joint blocks")
    num_heads: int = option(24, "attention heads")
    text_dim: int = option(4096, "width of the T5 encoder")
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
                 self.text_dim, self.vocab_size, self.position_table, self.null_tokens,
                 *self.align_dims)
        if min(sizes) < 1 or self.text_positions < 0 or len(self.align_dims) not in (0, 2):
            raise ValueError("sizes must be positive and align_dims empty or (hidden, teacher), "
                             f"got {self}")
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of num_heads {self.num_heads} "
                             "and of 4; the shapes of a checkpoint do not specify num_heads: give "
                             "num_heads=...")


class Output(NamedTuple):
    """What a forward pass returns; None for what was not asked for or cannot be (an image output of a text-only pass)."""
    velocity: Tensor | None         # (B, C, H, W)
    logits: Tensor | None           # (B, L, vocab)
    image_hidden: Tensor | None     # (B, N, D)  what the image head reads: the noisy picture's tokens after the last norm
    text_hidden: Tensor | None      # (B, L, D)  what the text head reads
    image_mid: Tensor | None        # (B, d)     through the alignment head, after block `align_depth`
    text_mid: Tensor | None         # (B, d)


Part = slice | tuple[slice, slice] | None       # an index of (B, N, D): rows of the batch, perhaps some of their tokens, or nothing


class Modulation(NamedTuple):
    """adaLN-Zero: what the timestep does to one sub-layer, each (B, 1, D)."""
    shift: Tensor
    scale: Tensor
    gate: Tensor


# ---------------------------------------------------------------- functions

def timestep_embedding(timestep: Tensor, dim: int = 256, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of the timestep (B,) in [0, 1000] at dim/2 frequencies -> (B, dim) float32."""
    frequencies = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=timestep.device) / (dim // 2))   # (dim/2,)
    angles = timestep.float()[:, None] * frequencies                                                               # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)                                                          # (B, dim)


def sincos_positions(side: int, dim: int, spacing: float = 1.0) -> Tensor:
    """The fixed table of 2-D positions, (1, side * side, dim): columns in the first half, rows in the second, sines then cosines."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))                           # (dim/4,)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * spacing * frequencies                              # (side, dim/4)
    one = torch.cat([angles.sin(), angles.cos()], dim=1).float()                                                   # (side, dim/2)
    grid = torch.cat([one[None].expand(side, -1, -1), one[:, None].expand(-1, side, -1)], dim=2)                   # (side, side, dim)
    return grid.reshape(1, side * side, dim)


def patchify(latents: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, H/p * W/p, C * p * p)."""
    b, c, h, w = latents.shape
    x = latents.reshape(b, c, h // p, p, w // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // p) * (w // p), c * p * p)


def unpatchify(tokens: Tensor, p: int, h: int, w: int) -> Tensor:
    """(B, h * w, p * p * C) -> (B, C, h * p, w * p). The head's channels are ordered (row, column, channel), as in SD3."""
    b, _, pixels = tokens.shape
    x = tokens.reshape(b, h, w, p, p, pixels // (p * p))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h * p, w * p)


def modulate(x: Tensor, m: Modulation) -> Tensor:
    """Layer norm without weights of its own, then the timestep's scale and shift; (B, N, D)."""
    return torch.addcmul(m.shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + m.scale)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over (B, heads, N, head_dim).

    Written out for short sequences that need a gradient on CPU: there the backward of bfloat16 `scaled_dot_product_attention`
    is slower (forward and backward 4.4 times at 48 tokens, 1.9 at 128, even at 256, half the time at 512). Everywhere else
    the fused kernel wins and needs no (N, N) memory.
    """
    if q.is_cuda or not torch.is_grad_enabled() or q.shape[2] > 192:
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)                                  # (B, heads, N, N)
    return scores.softmax(dim=-1).to(v.dtype) @ v                                             # (B, heads, N, head_dim)


# ---------------------------------------------------------------- modules

class Stream(nn.Module):
    """One modality's half of a joint block: its own weights for everything but the softmax."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        d = config.width
        self.num_heads, self.approximate = config.num_heads, "none" if config.exact_gelu else "tanh"
        self.modulation = nn.Linear(d, 6 * d)
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)
        self.fc1 = nn.Linear(d, 4 * d)
        self.fc2 = nn.Linear(4 * d, d)

    def modulations(self, condition: Tensor) -> tuple[Modulation, Modulation]:
        """What the timestep (B, D) does to attention and to the MLP."""
        parts = self.modulation(condition)[:, None].chunk(6, dim=-1)                          # 6 x (B, 1, D)
        return Modulation(*parts[:3]), Modulation(*parts[3:])

    def queries_keys_values(self, x: Tensor, m: Modulation) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(modulate(x, m)).unflatten(-1, (3, self.num_heads, -1))                 # (B, N, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                                  # 3 x (B, heads, N, head_dim)
        return q, k, v

    def update(self, x: Tensor, attended: Tensor, attention_m: Modulation, mlp_m: Modulation, wanted: Part) -> Tensor | None:
        """Residual steps of attention and MLP for the wanted part of x and attended (B, N, D)."""
        if wanted is None:
            return None
        x, attended = x[wanted], attended[wanted]                                             # (b, n, D)
        attention_m, mlp_m = (Modulation(*(part[wanted] for part in m)) for m in (attention_m, mlp_m))    # (b, 1, D)
        x = torch.addcmul(x, attention_m.gate, self.proj(attended))                           # (B, N, D)
        hidden = F.gelu(self.fc1(modulate(x, mlp_m)), approximate=self.approximate)           # (B, N, 4 D)
        return torch.addcmul(x, mlp_m.gate, self.fc2(hidden))                                 # (B, N, D)


class JointBlock(nn.Module):
    """SD3's MM-DiT block: two streams, one attention over the tokens of both."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.image = Stream(config)
        self.text = Stream(config)
        head_dim = config.width // config.num_heads
        self.q_norm = nn.LayerNorm(head_dim, eps=1e-6, bias=False) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-6, bias=False) if config.qk_norm else nn.Identity()

    def forward(self, image: Tensor, text: Tensor, condition: Tensor, image_part: Part = slice(None),
                text_part: Part = slice(None)) -> tuple[Tensor | None, Tensor | None]:
        """image (B, N, D), text (B, L, D), condition (B, D) -> the two streams, updated.

        The part of each stream that is wanted, None for nothing: after the last block the heads read only some rows of the batch,
        and nothing reads the tokens of source pictures.
        """
        image_attention, image_mlp = self.image.modulations(condition)
        text_attention, text_mlp = self.text.modulations(condition)
        pairs = zip(self.image.queries_keys_values(image, image_attention), self.text.queries_keys_values(text, text_attention))
        q, k, v = (torch.cat(pair, dim=2) for pair in pairs)                                  # (B, heads, N + L, head_dim)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        attended = attention(q, k, v).transpose(1, 2).flatten(2)                              # (B, N + L, D)
        n = image.shape[1]
        image = self.image.update(image, attended[:, :n], image_attention, image_mlp, image_part)     # (b, n, D)
        text = self.text.update(text, attended[:, n:], text_attention, text_mlp, text_part)           # (b, l, D)
        return image, text


class AlignmentHead(nn.Module):
    """Mean over tokens, then two layers to the teacher's width (equation 4)."""

    def __init__(self, width: int, hidden: int, out: int, final_silu: bool):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)
        self.final_silu = final_silu

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.fc2(F.silu(self.fc1(tokens.mean(dim=1))))                                    # (B, N, D) -> (B, out)
        return F.silu(x) if self.final_silu else x


class MMDiT(nn.Module):
    """The dual-diffusion transformer. `gradient_checkpointing = True` recomputes each block in the backward pass to save memory."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = c = config
        self.gradient_checkpointing = False
        self.patch_embed = nn.Linear(c.latent_channels * c.patch_size ** 2, c.width)
        self.register_buffer("pos_embed", torch.empty(1, c.position_table ** 2, c.width))
        self.text_embed = nn.Linear(c.text_dim, c.width)
        self.text_pos_embed = nn.Parameter(torch.empty(1, c.text_positions, c.width)) if c.text_positions else None
        self.number_scale = nn.Parameter(torch.empty(c.width)) if c.number_references else None
        self.time_embed = nn.Sequential(nn.Linear(256, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.null_image = nn.Parameter(torch.empty(1, c.null_tokens, c.width))
        self.blocks = nn.ModuleList(JointBlock(c) for _ in range(c.depth))
        self.image_modulation = nn.Linear(c.width, 2 * c.width)     # (shift, scale)
        self.image_head = nn.Linear(c.width, c.patch_size ** 2 * c.latent_channels)
        self.text_head = nn.Linear(c.width, c.vocab_size)
        self.image_align = AlignmentHead(c.width, *c.align_dims, c.align_silu) if c.align_dims else None
        self.text_align = AlignmentHead(c.width, *c.align_dims, c.align_silu) if c.align_dims else None
        if not self.pos_embed.is_meta:
            for name, tensor in self.state_dict().items():
                self.initialise(name, tensor)

    @torch.no_grad()
    def initialise(self, name: str, tensor: Tensor) -> None:
        """Fill one tensor of a fresh model: adaLN and heads start at zero, so every block starts as the identity."""
        if name == "pos_embed":
            tensor.copy_(sincos_positions(self.config.position_table, self.config.width, 64 / self.config.position_table))    # SD3's span
        elif name in ("text_pos_embed", "null_image"):
            nn.init.normal_(tensor, std=0.02)
        elif "_norm." in name:
            nn.init.ones_(tensor)
        elif name.endswith("bias") or "modulation" in name or name in ("image_head.weight", "text_head.weight", "number_scale"):
            nn.init.zeros_(tensor)
        else:
            nn.init.xavier_uniform_(tensor)

    @classmethod
    def from_pretrained(cls, path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **overrides) -> "MMDiT":
        """A model from any layout of an MM-DiT checkpoint: SD3 (single file or diffusers folder), UniAlignment or dual diffusion
        (folder), or this project's own. The configuration comes from config.json or the metadata, else from the shapes;
        `overrides` sets what neither tells (num_heads of a bare file whose heads are not 64 wide).

        Raises ValueError that names the file and the tensors, if one is missing, superfluous or of the wrong shape.
        """
        file = Checkpoint(path, subfolders=("transformer",)).under("model.diffusion_model.")
        config, sources = _read_layout(file, overrides)
        with torch.device("meta"):
            model = cls(config)
        sd3 = "blocks.0.image.qkv.weight" not in file and "null_image_embd" not in file
        heads = "align_dims" in overrides and all("_align." in name for name in model.state_dict().keys() - sources.keys())
        fresh = model.initialise if sd3 or heads else None      # alignment heads that are asked for and not there start fresh, too
        return load(model, file, sources, fresh, dtype, device)

    def _check(self, latents, text, timestep, references, align_depth, want) -> None:
        c = self.config
        if text.ndim != 3 or text.shape[2] != c.text_dim:
            raise ValueError(f"text has shape {tuple(text.shape)}, expected (B, L, {c.text_dim})")
        if c.text_positions and text.shape[1] > c.text_positions:
            raise ValueError(f"text has {text.shape[1]} tokens, this model has positions for {c.text_positions}")
        for name, x in [("latents", latents)] * (latents is not None) + [(f"references[{i}]", r) for i, r in enumerate(references)]:
            if x.ndim != 4 or x.shape[:2] != (text.shape[0], c.latent_channels):
                raise ValueError(f"{name} has shape {tuple(x.shape)}, expected ({text.shape[0]}, {c.latent_channels}, H, W)")
            if x.shape[2] % c.patch_size or x.shape[3] % c.patch_size or max(x.shape[2:]) > c.patch_size * c.position_table:
                raise ValueError(f"{name} is {x.shape[2]} x {x.shape[3]}, expected multiples of {c.patch_size} up to "
                                 f"{c.patch_size * c.position_table} (the table of positions)")
        if latents is None and (references or "velocity" in want):
            raise ValueError("a text-only pass (latents=None) has no references and no velocity; ask for want=('logits',)")
        if timestep.shape != text.shape[:1]:
            raise ValueError(f"timestep has shape {tuple(timestep.shape)}, expected ({text.shape[0]},)")
        if align_depth is not None and not (c.align_dims and 1 <= align_depth <= c.depth):
            raise ValueError(f"align_depth={align_depth}, expected 1 to {c.depth} in a model that has alignment heads (align_dims)")
        if unknown := set(want) - {"velocity", "logits"}:
            raise ValueError(f"want has {sorted(unknown)}, expected 'velocity' and 'logits'")

    def _embed_image(self, latents: Tensor) -> Tensor:
        """Patches with their positions: the table's centre, cropped to the picture; (B, C, H, W) -> (B, N, D)."""
        p, side = self.config.patch_size, self.config.position_table
        h, w = latents.shape[2] // p, latents.shape[3] // p
        top, left = (side - h) // 2, (side - w) // 2
        table = self.pos_embed.unflatten(1, (side, side))[:, top:top + h, left:left + w]      # (1, h, w, D)
        return self.patch_embed(patchify(latents, p)) + table.flatten(1, 2)                   # (B, N, D)

    def forward(self, latents: Tensor | None, text: Tensor, timestep: Tensor, references: Sequence[Tensor] = (),
                align_depth: int | None = None, want: Sequence[str] | Mapping[str, slice] = ("velocity", "logits")) -> Output:
        """One pass of both streams.

        latents (B, C, H, W) noisy (image branch) or clean (text branch), None: text only; text (B, L, text_dim) from T5;
        timestep (B,) in [0, 1000], 0 for a clean picture; references: clean latents (B, C, H', W'), any number;
        align_depth: 1-based block after which the mids are taken; want: the heads to compute, or {head: rows of the batch},
        so that a batch which mixes both branches computes each head, with the hidden states that it reads, for its rows only.
        Raises ValueError on wrong shapes.
        """
        self._check(latents, text, timestep, references, align_depth, want)
        rows = want if isinstance(want, Mapping) else dict.fromkeys(want, slice(None))
        condition = F.silu(self.time_embed(timestep_embedding(timestep).to(self.pos_embed.dtype)))      # (B, D)
        text = self.text_embed(text).to(self.pos_embed.dtype)     # both streams in full precision under autocast       (B, L, D)
        if self.text_pos_embed is not None:
            text = text + self.text_pos_embed[:, :text.shape[1]]                              # (B, L, D)
        if latents is None:
            image = self.null_image.expand(len(text), -1, -1)                                 # (B, null, D)
            n = image.shape[1]
        else:
            pictures = [self._embed_image(x) for x in (latents, *references)]                 # each (B, N, D)
            if self.number_scale is not None:                   # a scale, not a matrix: Adam's first steps would make that swamp the pictures
                codes = timestep_embedding(torch.arange(len(pictures), device=text.device), self.config.width, max_period=100)
                pictures[1:] = [x + self.number_scale * code.to(x.dtype) for x, code in zip(pictures[1:], codes[1:])]
            image, n = torch.cat(pictures, dim=1), pictures[0].shape[1]                       # (B, N + N', D)

        read = (rows["velocity"], slice(n)) if "velocity" in rows else None, rows.get("logits")    # what the heads read of each stream
        image_mid = text_mid = None
        for depth, block in enumerate(self.blocks, start=1):
            wanted = read if depth == len(self.blocks) and depth != align_depth else ()
            if self.gradient_checkpointing and torch.is_grad_enabled():
                image, text = recompute(block, image, text, condition, *wanted, use_reentrant=False)
            else:
                image, text = block(image, text, condition, *wanted)                          # (B, N + N', D), (B, L, D)
            if depth == align_depth:
                image_mid, text_mid = self.image_align(image[:, :n]), self.text_align(text)   # (B, d), (B, d)

        velocity = logits = image_hidden = text_hidden = None
        if "logits" in rows:
            text = text if wanted else text[read[1]]                                          # (b, L, D)
            text_hidden = F.layer_norm(text, text.shape[-1:], eps=1e-6)                       # (b, L, D)
            logits = self.text_head(text_hidden)                                              # (b, L, vocab)
        if "velocity" in rows:
            r, p, (h, w) = rows["velocity"], self.config.patch_size, latents.shape[2:]
            image = image if wanted else image[read[0]]                                       # (b, N, D)
            shift, scale = self.image_modulation(condition[r])[:, None].chunk(2, dim=-1)      # (b, 1, D) each
            image_hidden = modulate(image, Modulation(shift, scale, None))                    # (b, N, D)
            velocity = unpatchify(self.image_head(image_hidden), p, h // p, w // p)           # (b, C, H, W)
        return Output(velocity, logits, image_hidden, text_hidden, image_mid, text_mid)


# ---------------------------------------------------------------- released layouts

# own name below a block's stream -> name in the file, for both layouts
_SINGLE_FILE = {"modulation": "adaLN_modulation.1", "qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_DIFFUSERS_IMAGE = {"modulation": ("norm1.linear",), "qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "proj": ("attn.to_out.0",),
                    "fc1": ("ff.net.0.proj",), "fc2": ("ff.net.2",)}
_DIFFUSERS_TEXT = {"modulation": ("norm1_context.linear",), "qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                   "proj": ("attn.to_add_out",), "fc1": ("ff_context.net.0.proj",), "fc2": ("ff_context.net.2",)}


def _swap_halves(x: Tensor) -> Tensor:
    """(scale, shift) of the diffusers layout -> (shift, scale)."""
    scale, shift = x.chunk(2)
    return torch.cat([shift, scale])


def _extend_last_text_modulation(shift_scale: Tensor) -> Tensor:
    """SD3's last text stream only serves the attention: (shift, scale) -> six parts with gates of zero, so it is the identity."""
    return torch.cat([shift_scale, shift_scale.new_zeros(2 * len(shift_scale), *shift_scale.shape[1:])])


def _fold_pooled_text(time_bias: Tensor, hidden_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SD3 adds an MLP of the pooled text vector to the timestep's; for an all-zero vector that is a constant."""
    return time_bias + weight @ F.silu(hidden_bias) + bias


def _exact_positions(table: Tensor) -> Tensor:
    """The fixed table at full precision, where the file holds it rounded to half; any other table stays as it is in the file."""
    if table.is_meta:
        return table
    side, dim = math.isqrt(table.shape[1]), table.shape[2]
    step = torch.atan2(table[0, 1, 0], table[0, 1, dim // 4]).item()    # the second column's angle at frequency 1
    exact = sincos_positions(side, dim, round(side * step) / side).to(table)
    return exact if torch.allclose(exact, table, rtol=0, atol=1e-3) else table


def _linear(own: str, *names: str, combine=None) -> dict[str, Source]:
    """Sources of a linear layer's weight and bias."""
    return {f"{own}.{part}": Source(tuple(f"{n}.{part}" for n in names), *([combine] if combine else []))
            for part in ("weight", "bias")}


def _read_layout(file: Checkpoint, overrides: Mapping) -> tuple[MMDiTConfig, dict[str, Source]]:
    """The configuration and the source of every tensor, for whichever layout the file has."""
    if "blocks.0.image.qkv.weight" in file:
        config = make_config(MMDiTConfig, file.config | dict(overrides), str(file.path))
        return config, {name: Source((name,)) for name in file.names()}
    if "joint_blocks.0.x_block.attn.qkv.weight" in file:
        single, blocks, patch, text, positions = True, "joint_blocks.{}.", "x_embedder.proj", "context_embedder", "pos_embed"
        time, pooled = [f"t_embedder.mlp.{i}" for i in (0, 2)], [f"y_embedder.mlp.{i}" for i in (0, 2)]
        modulation, head = "final_layer.adaLN_modulation.1", "final_layer.linear"
    elif "transformer_blocks.0.attn.to_q.weight" in file:
        dual = "image_proj_out.weight" in file
        single, blocks, patch, text = False, "transformer_blocks.{}.", "pos_embed.proj", "context_embedder"
        positions = "pos_embed.pos_embed"
        time = [f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)]
        pooled = [f"time_text_embed.text_embedder.linear_{i}" for i in (1, 2)]
        modulation, head = ("image_norm_out.linear", "image_proj_out") if dual else ("norm_out.linear", "proj_out")
    else:
        raise ValueError(f"{file.path}: holds no MM-DiT in a known layout (SD3 single file, SD3 or UniAlignment diffusers folder, "
                         f"own); its first tensors are {', '.join(file.names()[:4])}")

    width, channels, patch_size, _ = file.shape(f"{patch}.weight")
    fields = {"width": width, "latent_channels": channels, "patch_size": patch_size, "depth": file.count(blocks),
              "num_heads": max(1, width // 64), "text_dim": file.shape(f"{text}.weight")[1],
              "position_table": math.isqrt(file.shape(positions)[1])}
    if "text_proj_out.weight" in file:
        fields |= {"vocab_size": file.shape("text_proj_out.weight")[0], "null_tokens": file.shape("null_image_embd")[1]}
    if "siglip_adapter_img.fc.0.weight" in file:
        fields["align_dims"] = tuple(file.shape(f"siglip_adapter_img.fc.{i}.weight")[0] for i in (0, 2))
    named = {"num_layers": "depth", "num_attention_heads": "num_heads", "in_channels": "latent_channels", "patch_size": "patch_size",
             "joint_attention_dim": "text_dim", "caption_projection_dim": "width", "pos_embed_max_size": "position_table"}
    fields |= {own: file.config[name] for name, own in named.items() if name in file.config} | dict(overrides)
    config = make_config(MMDiTConfig, fields, str(file.path))

    sources = {"pos_embed": Source((positions,), _exact_positions), "patch_embed.bias": Source((f"{patch}.bias",)),
               "patch_embed.weight": Source((f"{patch}.weight",), lambda w: w.flatten(1))}
    sources |= _linear("text_embed", text) | _linear("time_embed.0", time[0]) | _linear("time_embed.2", time[1])
    sources |= _linear("image_modulation", modulation, combine=None if single else _swap_halves) | _linear("image_head", head)
    for i in range(config.depth):
        for part in _SINGLE_FILE:
            for stream, block, names in (("image", "x_block", _DIFFUSERS_IMAGE), ("text", "context_block", _DIFFUSERS_TEXT)):
                found = [f"{block}.{_SINGLE_FILE[part]}"] if single else names[part]
                sources |= _linear(f"blocks.{i}.{stream}.{part}", *(blocks.format(i) + name for name in found))
    if f"{pooled[0]}.weight" in file:                                # SD3: see the module docstring
        last = f"blocks.{config.depth - 1}.text."
        for part in ("proj", "fc1", "fc2"):
            for name in _linear(last + part, ""):
                del sources[name]
        extend = _extend_last_text_modulation
        sources |= _linear(last + "modulation", sources[last + "modulation.weight"].names[0].removesuffix(".weight"),
                           combine=extend if single else lambda x: extend(_swap_halves(x)))
        sources["time_embed.2.bias"] = Source((f"{time[1]}.bias", f"{pooled[0]}.bias", f"{pooled[1]}.weight", f"{pooled[1]}.bias"),
                                              _fold_pooled_text)
    else:
        sources |= {"null_image": Source(("null_image_embd",))} | _linear("text_head", "text_proj_out")
        if config.align_dims and "siglip_adapter_img.fc.0.weight" in file:
            for own, name in (("image_align", "siglip_adapter_img"), ("text_align", "siglip_adapter_text")):
                sources |= _linear(f"{own}.fc1", f"{name}.fc.0") | _linear(f"{own}.fc2", f"{name}.fc.2")
    return config, sources


if __name__ == "__main__":
    small = MMDiTConfig(width=128, depth=4, num_heads=4, text_dim=128, vocab_size=150, position_table=8, qk_norm=True)
    try:
        mmdit = MMDiT.from_pretrained(sys.argv[1], device="meta") if len(sys.argv) > 1 else MMDiT(small)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(mmdit.config)
    print(f"{sum(p.numel() for p in mmdit.parameters()) / 1e6:.1f} M parameters")
    side, device = 8 * mmdit.config.patch_size, mmdit.pos_embed.device
    result = mmdit(torch.zeros(2, mmdit.config.latent_channels, side, side, device=device),
                   torch.zeros(2, 32, mmdit.config.text_dim, device=device), torch.zeros(2, device=device))
    print({name: tuple(x.shape) for name, x in result._asdict().items() if x is not None})
