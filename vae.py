"""The image autoencoder of Stable Diffusion 3: images to 16 channels at 1/8 of the size, and back.

Architecture of Rombach et al. 2022 (2112.10752) with the 16 latent channels of Esser et al. 2024
(2403.03206): a convolutional encoder, which predicts a Gaussian per latent pixel, and a mirrored
decoder. Reads the released weights in all their layouts.

Run alone to reconstruct a picture and print the PSNR:
    python vae.py CHECKPOINT PICTURE [RECONSTRUCTION.png]
"""
import itertools
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from checkpoint import Checkpoint, Source, concatenate, load, make_config, note, option
from data import load_picture


@dataclass
class VAEConfig:
    """Sizes of the autoencoder. The defaults are those of Stable Diffusion 3."""
    latent_channels: int = option(16, "channels of the latents")
    block_channels: tuple[int, ...] = option(
        (128, 256, 512, 512), "channels of each level; the size halves between levels")
    layers_per_block: int = option(
        2, "residual blocks per level of the encoder; the decoder has one more")
    norm_groups: int = option(32, "groups of every group normalisation")
    scale: float = option(1.5305, "factor of the latents: (z - shift) * scale")
    shift: float = option(0.0609, "offset of the latents: (z - shift) * scale")
    mid_attention: bool = option(True, "self-attention on the smallest feature map")
    stem: int = option(
        1, "side of the pixel squares that the encoder first folds into channels")

    def __post_init__(self):
        sizes = (self.latent_channels, self.layers_per_block, self.norm_groups, self.stem,
                 *self.block_channels)
        if min(sizes) < 1 or not self.block_channels or self.scale == 0:
            raise ValueError("sizes must be positive, scale not zero and block_channels not empty, "
                             f"got {self}")
        if any(width % self.norm_groups for width in self.block_channels):
            raise ValueError(
                f"norm_groups = {self.norm_groups} does not divide all of "
                f"block_channels = {self.block_channels}; the shapes of a checkpoint do not show "
                "the number of groups: pass norm_groups=...")


# ---------------------------------------------------------------- parts

class ResBlock(nn.Module):
    """Two normalised 3 x 3 convolutions beside a shortcut."""

    def __init__(self, width_in: int, width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        # A fresh block is its shortcut alone, which trains faster.
        nn.init.zeros_(self.conv2.weight)
        self.shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:                      # (B, C_in, H, W)
        h = self.conv1(F.silu(self.norm1(x)))                    # (B, C, H, W)
        h = self.conv2(F.silu(self.norm2(h)))                    # (B, C, H, W)
        return self.shortcut(x) + h                              # (B, C, H, W)


class Attention(nn.Module):
    """Self-attention with one head over all pixels of the smallest feature map."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:                      # (B, C, H, W)
        h = self.norm(x).flatten(2).transpose(1, 2)              # (B, H*W, C)
        qkv = self.qkv(h).unsqueeze(1)                           # (B, 1, H*W, 3*C)
        q, k, v = qkv.chunk(3, dim=-1)                           # (B, 1, H*W, C) each
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)   # (B, H*W, C)
        return x + self.out(h).transpose(1, 2).reshape(x.shape)  # (B, C, H, W)


class Downsample(nn.Conv2d):
    """Halve height and width."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:                      # (B, C, H, W)
        # The released weights expect padding at the right and at the bottom only.
        return super().forward(F.pad(x, (0, 1, 0, 1)))           # (B, C, H/2, W/2)


class Upsample(nn.Conv2d):
    """Double height and width."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:                      # (B, C, H, W)
        x = F.interpolate(x, scale_factor=2)                     # (B, C, 2H, 2W)
        return super().forward(x)                                # (B, C, 2H, 2W)


class Level(nn.Module):
    """Residual blocks at one resolution, then `resample` to the next."""

    def __init__(self, width_in: int, width: int, layers: int, groups: int, resample: nn.Module):
        super().__init__()
        widths_in = [width_in] + [width] * (layers - 1)
        self.blocks = nn.Sequential(*(ResBlock(w, width, groups) for w in widths_in))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:                      # (B, C_in, H, W)
        return self.resample(self.blocks(x))                     # (B, C, H', W')


def levels(widths: tuple[int, ...], layers: int, groups: int,
           resample: type[nn.Module]) -> nn.Sequential:
    """One level per width, with `resample` between levels and nothing after the last."""
    stack = []
    for i, width in enumerate(widths):
        width_in = widths[max(i - 1, 0)]
        between = nn.Identity() if i == len(widths) - 1 else resample(width)
        stack.append(Level(width_in, width, layers, groups, between))
    return nn.Sequential(*stack)


def middle(width: int, config: VAEConfig) -> nn.Sequential:
    groups = config.norm_groups
    return nn.Sequential(OrderedDict(
        first=ResBlock(width, width, groups),
        attention=Attention(width, groups) if config.mid_attention else nn.Identity(),
        last=ResBlock(width, width, groups)))


class Encoder(nn.Module):
    """Images to the moments of the latents."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_channels, config.norm_groups
        self.stem = nn.PixelUnshuffle(config.stem)
        self.conv_in = nn.Conv2d(3 * config.stem ** 2, widths[0], 3, padding=1)
        self.levels = levels(widths, config.layers_per_block, groups, Downsample)
        self.mid = middle(widths[-1], config)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:                 # (B, 3, H, W)
        x = self.stem(images)                                    # (B, 3*stem^2, H/stem, W/stem)
        x = self.conv_in(x)                                      # (B, C_first, H/stem, W/stem)
        x = self.mid(self.levels(x))                             # (B, C_last, H/down, W/down)
        return self.conv_out(F.silu(self.norm_out(x)))           # (B, 2*C_latent, H/down, W/down)


class Decoder(nn.Module):
    """Latents to images: the encoder backwards. Level 0 has the smallest feature map."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_channels[::-1], config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], config)
        self.levels = levels(widths, config.layers_per_block + 1, groups, Upsample)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3 * config.stem ** 2, 3, padding=1)
        self.unstem = nn.PixelShuffle(config.stem)

    def forward(self, z: Tensor) -> Tensor:                      # (B, C_latent, h, w)
        x = self.mid(self.conv_in(z))                            # (B, C_last, h, w)
        x = self.levels(x)                                       # (B, C_first, H/stem, W/stem)
        x = self.conv_out(F.silu(self.norm_out(x)))              # (B, 3*stem^2, H/stem, W/stem)
        return self.unstem(x)                                    # (B, 3, H, W)


# ---------------------------------------------------------------- pictures too large for one pass

MEMORY = 4 << 30                            # bytes of activations that one pass may take
STRIP = 1 << 23                             # values of a feature map that are computed at a time


def _silu_norm(norm: nn.GroupNorm, x: Tensor) -> Callable[[Tensor], Tensor]:
    """F.silu(norm(x)) as a function of a strip of x (1, C, H, W), with the statistics of all."""
    groups = x.reshape(norm.num_groups, -1)                      # (G, C/G*H*W)
    parts, count = groups.split(STRIP // norm.num_groups, dim=1), groups.shape[1]
    mean = sum(part.sum(dim=1, dtype=torch.float64) for part in parts) / count      # (G,)
    mean = mean.float()[:, None]                                                    # (G, 1)
    squares = sum((part.float() - mean).square().sum(dim=1) for part in parts)      # (G,)
    factor = (squares / count + norm.eps).rsqrt()[:, None]                          # (G, 1)
    weight, bias = (p.float().view(norm.num_groups, -1) for p in (norm.weight, norm.bias))
    scale = (factor * weight).view(1, -1, 1, 1)                                     # (1, C, 1, 1)
    shift = (bias - mean * factor * weight).view(1, -1, 1, 1)                       # (1, C, 1, 1)
    return lambda strip: F.silu((strip.float() * scale + shift).to(strip.dtype))


def _rows(height: int, x: Tensor) -> Iterator[tuple[int, int]]:
    """First row and end of strips that divide a map of this height, of about STRIP values of x."""
    rows = max(1, STRIP * height // x.numel())
    return ((top, min(top + rows, height)) for top in range(0, height, rows))


def _convolve(conv: nn.Conv2d, x: Tensor, before: Callable[[Tensor], Tensor],
              zoom: int = 1) -> Tensor:
    """A 3 x 3 convolution of before(x), which is `zoom` times as large as x, in strips."""
    height, width = zoom * x.shape[2], zoom * x.shape[3]
    out = x.new_empty(len(x), conv.out_channels, height, width)
    for top, end in _rows(height, x):
        first, last = max(top - 1, 0), min(end + 1, height)      # with the rows beside the strip
        start, stop = first // zoom, math.ceil(last / zoom)      # the same in x
        strip = before(x[:, :, start:stop])
        strip = strip[:, :, first - zoom * start:last - zoom * start]
        strip = F.pad(strip, (1, 1, int(top == 0), int(end == height)))
        out[:, :, top:end] = F.conv2d(strip, conv.weight, conv.bias)
    return out                                                   # (1, C_out, height, width)


def _one_in_strips(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer to one large picture: `in_strips` explains."""
    if isinstance(module, ResBlock):
        h = _convolve(module.conv1, x, _silu_norm(module.norm1, x))
        h = _convolve(module.conv2, h, _silu_norm(module.norm2, h))
        for top, end in _rows(x.shape[2], x):
            h[:, :, top:end] += module.shortcut(x[:, :, top:end])
        return h
    if isinstance(module, Upsample):
        return _convolve(module, x, lambda strip: F.interpolate(strip, scale_factor=2), zoom=2)
    if isinstance(module, Downsample):
        height = x.shape[2] // 2
        strips = [F.pad(x[:, :, 2 * top:2 * end + 1], (0, 1, 0, int(end == height)))
                  for top, end in _rows(height, x)]
        return torch.cat([nn.Conv2d.forward(module, strip) for strip in strips], dim=2)
    return module(x)


def in_strips(levels: Iterable[Level], x: Tensor) -> Tensor:
    """Apply levels to one picture (1, C, H, W) in strips of rows, with a third of the memory.

    The convolutions see the rows beside their strip and the group norms have the statistics of the
    whole picture, so the result is that of the whole but for rounding. Tiles that are computed on
    their own and blended have other statistics, which shows as other colours (experiments/LOG.md).
    """
    for level in levels:
        for layer in (*level.blocks, level.resample):
            x = _one_in_strips(layer, x)
    return x


# ---------------------------------------------------------------- names in the released files

# Own part of a name (a regular expression) -> the same part in the file. The order counts.
DIFFUSERS = {
    r"^encoder\.levels\.(\d+)\.resample": r"encoder.down_blocks.\1.downsamplers.0.conv",
    r"^decoder\.levels\.(\d+)\.resample": r"decoder.up_blocks.\1.upsamplers.0.conv",
    r"^encoder\.levels": "encoder.down_blocks",
    r"^decoder\.levels": "decoder.up_blocks",
    r"\.blocks": ".resnets",
    r"\.mid\.first": ".mid_block.resnets.0",
    r"\.mid\.last": ".mid_block.resnets.1",
    r"\.mid\.attention\.norm": ".mid_block.attentions.0.group_norm",
    r"\.mid\.attention": ".mid_block.attentions.0",
    r"\.out\.": ".to_out.0.",
    r"\.shortcut": ".conv_shortcut",
    r"\.norm_out": ".conv_norm_out",
}
SINGLE_FILE = {
    r"^encoder\.levels\.(\d+)\.resample": r"encoder.down.\1.downsample.conv",
    r"^decoder\.levels\.(\d+)\.resample": r"decoder.up.\1.upsample.conv",
    r"^encoder\.levels": "encoder.down",
    r"^decoder\.levels": "decoder.up",
    r"\.blocks": ".block",
    r"\.mid\.first": ".mid.block_1",
    r"\.mid\.last": ".mid.block_2",
    r"\.mid\.attention": ".mid.attn_1",
    r"\.out\.": ".proj_out.",
    r"\.shortcut": ".nin_shortcut",
}
# Fields of the diffusers config.json -> own fields.
DIFFUSERS_CONFIG = {
    "latent_channels": "latent_channels",
    "block_out_channels": "block_channels",
    "layers_per_block": "layers_per_block",
    "norm_num_groups": "norm_groups",
    "scaling_factor": "scale",
    "shift_factor": "shift",
    "mid_block_add_attention": "mid_attention",
}
FIRST_CONV = "encoder.levels.0.blocks.0.conv1.weight"            # only in the project's own layout
FLUX = {"scale": 0.3611, "shift": 0.1159}                        # its autoencoder has SD3's tensors


def _as_linear(*parts: Tensor) -> Tensor:
    """Join matrices, 1 x 1 convolutions or biases into one matrix or bias."""
    return concatenate(*(part.reshape(part.shape[:2]) for part in parts))


def source_of(name: str, checkpoint: Checkpoint) -> Source:
    """The origin of the tensor with this own name in a checkpoint of any layout."""
    if FIRST_CONV in checkpoint:
        return Source((name,))
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in checkpoint:
        renames, qkv = DIFFUSERS, ("to_q", "to_k", "to_v")
    elif "encoder.down.0.block.0.conv1.weight" in checkpoint:
        renames, qkv = SINGLE_FILE, ("q", "k", "v")
        # This layout numbers the decoder's levels by resolution, so its first one comes last.
        last = checkpoint.count("decoder.up.{}.") - 1
        name = re.sub(r"(?<=^decoder\.levels\.)\d+", lambda match: str(last - int(match[0])), name)
    else:
        raise checkpoint.unlike(
            "an autoencoder",
            "not an SD3 autoencoder in a known layout; expected encoder.down_blocks.*, "
            "first_stage_model.encoder.down.* or encoder.levels.*")
    as_linear = re.search(r"attention\.(qkv|out)\.", name)
    for own, theirs in renames.items():
        name = re.sub(own, theirs, name)
    if not as_linear:
        return Source((name,))
    parts = [name.replace("qkv", part) for part in qkv] if ".qkv." in name else [name]
    return Source(tuple(parts), _as_linear)


def fields_of(checkpoint: Checkpoint) -> dict:
    """Fields of VAEConfig: from the shapes, overruled by the checkpoint's own configuration."""
    def file_name(name: str) -> str:
        return source_of(name, checkpoint).names[0]

    def count(pattern: str) -> int:
        return next(i for i in itertools.count() if file_name(pattern.format(i)) not in checkpoint)

    first_conv = "encoder.levels.{}.blocks.0.conv1.weight"
    convs = [file_name(first_conv.format(level)) for level in range(count(first_conv))]
    fields = {
        "block_channels": tuple(checkpoint.shape(conv)[0] for conv in convs),
        "latent_channels": checkpoint.shape("decoder.conv_in.weight")[1],
        "layers_per_block": count("encoder.levels.0.blocks.{}.conv1.weight"),
        "mid_attention": file_name("encoder.mid.attention.norm.weight") in checkpoint,
        "stem": math.isqrt(checkpoint.shape("encoder.conv_in.weight")[1] // 3),
    }
    given = checkpoint.config
    if FIRST_CONV not in checkpoint:
        if fields["latent_channels"] == 4:
            raise ValueError(f"{checkpoint.path}: this is the autoencoder of Stable Diffusion 1, 2 "
                             "or XL, with 4 latent channels: expected that of Stable Diffusion 3, "
                             "with 16")
        given = {own: given[theirs] for theirs, own in DIFFUSERS_CONFIG.items() if theirs in given}
        if "scale" in given:
            given = {"shift": 0.0} | given                       # diffusers: none unless it is said
    return fields | given


def constants(whole: Checkpoint, fields: dict) -> dict:
    """The constants that neither shapes nor a configuration show: from the transformer beside.

    whole: the checkpoint, an autoencoder alone or together with a transformer
    Says which ones are guessed, if there is no transformer either.
    """
    missing = {"scale", "shift", "norm_groups"} - fields.keys()
    if whole.matches(r"\bdouble_blocks\."):
        return {name: value for name, value in FLUX.items() if name in missing}
    if missing and not whole.matches(r"\bjoint_blocks\."):
        default = VAEConfig()
        guesses = ", ".join(f"{name} {getattr(default, name)}" for name in sorted(missing))
        note(f"{whole.path}: a guess, as the file does not say: {guesses}, those of Stable "
             "Diffusion 3; the autoencoder of Flux looks the same and needs "
             f"scale={FLUX['scale']}, shift={FLUX['shift']}, or its folder with config.json")
    return {}


# ---------------------------------------------------------------- the model

def _check(name: str, tensor: Tensor, channels: int, multiple: int) -> None:
    if tensor.ndim != 4 or tensor.shape[1] != channels or not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor (B, {channels}, H, W), "
                         f"got {tensor.dtype} {tuple(tensor.shape)}")
    if any(side < multiple or side % multiple for side in tensor.shape[2:]):
        raise ValueError(f"height and width of {name} must be multiples of {multiple}, "
                         f"got {tuple(tensor.shape[2:])}")


class VAE(nn.Module):
    """Encoder and decoder. All methods compute in the dtype of the weights and keep gradients.

    Shapes: images (B, 3, H, W), latents (B, C, h, w) with H = h * downscale and W = w * downscale.

    Without gradients, a batch whose activations would take more than `memory` bytes is computed in
    chunks, and a picture that alone takes more in strips (`in_strips`). Both change the result by
    rounding alone, as every other size of a batch does.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def downscale(self) -> int:
        """Pixels per latent pixel, along one side."""
        return self.config.stem * 2 ** (len(self.config.block_channels) - 1)

    def _within(self, memory: float, part: Encoder | Decoder, x: Tensor, size: tuple[int, int],
                striped: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a part to x in chunks, or `striped` to each picture, so that `memory` is kept.

        size: (h, w) of the latents
        """
        if torch.is_grad_enabled():                              # which keep all activations anyway
            return part(x)
        # Measured: at the peak up to six of the largest feature maps are in memory.
        channels = self.config.block_channels[:1 if part is self.encoder else 2]
        pixels = (self.downscale // self.config.stem) ** 2 * math.prod(size)
        pictures = memory / (6 * max(channels) * pixels * x.element_size())
        if pictures < 1:
            return torch.cat([striped(picture) for picture in x.split(1)])
        return torch.cat([part(chunk) for chunk in x.split(int(min(pictures, len(x))))])

    def moments(self, images: Tensor, memory: float = MEMORY) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior, each (B, C, h, w), not normalised.

        images: (B, 3, H, W) in [-1, 1].
        Raises ValueError for another shape or dtype, or if H or W is no multiple of `downscale`.
        """
        def striped(image: Tensor) -> Tensor:                    # (1, 3, H, W)
            e = self.encoder
            x = _convolve(e.conv_in, e.stem(image), nn.Identity())
            x = e.mid(in_strips(e.levels, x))                  # (1, C_last, h, w)
            return e.conv_out(F.silu(e.norm_out(x)))             # (1, 2*C, h, w)

        _check("images", images, 3, self.downscale)
        images = images.to(self.encoder.conv_in.weight.dtype)
        size = images.shape[2] // self.downscale, images.shape[3] // self.downscale
        moments = self._within(memory, self.encoder, images, size, striped)
        mean, logvar = moments.chunk(2, dim=1)                   # (B, C, h, w) each
        return mean, logvar.clamp(-30, 20)

    def encode(self, images: Tensor, sample: bool = False,
               generator: torch.Generator | None = None, memory: float = MEMORY) -> Tensor:
        """Normalised latents (z - shift) * scale of about unit variance, (B, C, h, w).

        images: as for `moments`
        sample: False: z is the mean of the posterior; True: z is drawn from it by `generator`
        """
        z, logvar = self.moments(images, memory)                 # (B, C, h, w) each
        if sample:
            device = generator.device if generator else z.device
            noise = torch.randn(z.shape, generator=generator, device=device)
            z = z + (0.5 * logvar).exp() * noise.to(z)
        return (z - self.config.shift) * self.config.scale

    def decode(self, latents: Tensor, memory: float = MEMORY) -> Tensor:
        """Images (B, 3, H, W), nominally in [-1, 1]. No clamp: losses need the overshoot.

        latents: (B, C, h, w) as `encode` returns them.
        Raises ValueError for another shape or dtype.
        """
        def striped(z: Tensor) -> Tensor:                        # (1, C, h, w)
            d = self.decoder
            x = in_strips(d.levels, d.mid(d.conv_in(z)))       # (1, C_first, H/stem, W/stem)
            x = _convolve(d.conv_out, x, _silu_norm(d.norm_out, x))
            return d.unstem(x)                                   # (1, 3, H, W)

        _check("latents", latents, self.config.latent_channels, 1)
        latents = latents.to(self.decoder.conv_in.weight.dtype)
        z = latents / self.config.scale + self.config.shift      # (B, C, h, w)
        return self._within(memory, self.decoder, z, z.shape[2:], striped)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32,
                        device: str | torch.device = "cpu", **overrides) -> "VAE":
        """Load an autoencoder.

        path:      a diffusers folder, the repository around it, an SD3 single file or a file that
                   this project wrote
        overrides: fields of VAEConfig; a file without a configuration needs scale and shift unless
                   they are SD3's, and norm_groups unless it has 32 groups
        Raises ValueError naming the file and the tensors or fields that do not fit.
        """
        whole = Checkpoint(path, subfolders=("vae",))
        checkpoint = whole.under("first_stage_model.", "vae.")
        fields = fields_of(checkpoint) | overrides
        fields |= constants(whole, fields)
        config = make_config(VAEConfig, fields, str(checkpoint.path))
        with torch.device("meta"):
            vae = cls(config)
        sources = {name: source_of(name, checkpoint) for name in vae.state_dict()}
        return load(vae, checkpoint, sources, dtype=dtype, device=device)


def reconstruct(checkpoint: str, file: str, out: str | None = None) -> None:
    """Encode and decode a picture, cropped to whole latent pixels; print the PSNR, write `out`."""
    vae = VAE.from_pretrained(checkpoint)
    picture = np.array(load_picture(file))                       # (H, W, 3)
    height, width = (side - side % vae.downscale for side in picture.shape[:2])
    picture = torch.from_numpy(picture[:height, :width])
    images = picture.permute(2, 0, 1)[None] / 127.5 - 1          # (1, 3, H, W)
    with torch.no_grad():
        result = vae.decode(vae.encode(images)).clamp(-1, 1)     # (1, 3, H, W)
    psnr = 10 * math.log10(4 / F.mse_loss(result, images).item())
    print(f"{width} x {height} pixels, PSNR {psnr:.2f} dB")
    if out:
        pixels = (result[0].permute(1, 2, 0) + 1) * 127.5        # (H, W, 3)
        Image.fromarray(pixels.round().byte().numpy()).save(out)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    try:
        reconstruct(*sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
