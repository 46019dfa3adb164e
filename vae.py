"""The image autoencoder of Stable Diffusion 3: a picture becomes 16 channels at 1/8 of its size, and back.

Architecture of Rombach et al. 2022 (2112.10752) with the 16 latent channels of Esser et al. 2024 (2403.03206): a convolutional
encoder that predicts a Gaussian per latent pixel and a mirrored decoder. Reads the released weights in all their layouts.

Run alone to reconstruct a picture and print the PSNR:   python vae.py CHECKPOINT PICTURE [RECONSTRUCTION.png]
"""
import itertools
import math
import re
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from checkpoint import Checkpoint, Source, load, make_config


@dataclass
class VAEConfig:
    latent_channels: int = 16
    block_channels: tuple[int, ...] = (128, 256, 512, 512)       # one level each; the picture is halved between levels
    layers_per_block: int = 2                                    # residual blocks per encoder level; the decoder has one more
    norm_groups: int = 32
    scale: float = 1.5305                                        # latents leave encode() as (z - shift) * scale
    shift: float = 0.0609
    mid_attention: bool = True
    stem: int = 1                                                # s x s pixels become channels first; the released weights have 1

    def __post_init__(self):
        sizes = (self.latent_channels, self.layers_per_block, self.norm_groups, self.stem, *self.block_channels)
        if min(sizes) < 1 or not self.block_channels or self.scale == 0:
            raise ValueError(f"sizes must be positive, scale not zero and block_channels not empty, got {self}")
        if any(width % self.norm_groups for width in self.block_channels):
            raise ValueError(f"norm_groups = {self.norm_groups} does not divide all of block_channels = {self.block_channels}; "
                             "the shapes of a checkpoint do not tell it: give norm_groups=...")


# ---------------------------------------------------------------- parts

class ResBlock(nn.Module):
    def __init__(self, width_in: int, width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)                        # a fresh block starts as the identity, which trains faster
        self.shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:                      # (B, C_in, H, W)
        h = self.conv1(F.silu(self.norm1(x)))                    # (B, C, H, W)
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h                              # (B, C, H, W)


class Attention(nn.Module):
    """One head over all pixels of the smallest feature map."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:                      # (B, C, H, W)
        h = self.norm(x).flatten(2).transpose(1, 2)              # (B, H*W, C)
        q, k, v = self.qkv(h).unsqueeze(1).chunk(3, dim=-1)      # (B, 1, H*W, C) each
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)   # (B, H*W, C)
        return x + self.out(h).transpose(1, 2).reshape(x.shape)  # (B, C, H, W)


class Downsample(nn.Conv2d):
    def __init__(self, width: int):
        super().__init__(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:                      # (B, C, H, W)
        # The released weights were trained with padding at the right and at the bottom only.
        return super().forward(F.pad(x, (0, 1, 0, 1)))           # (B, C, H/2, W/2)


class Upsample(nn.Conv2d):
    def __init__(self, width: int):
        super().__init__(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:                      # (B, C, H, W)
        return super().forward(F.interpolate(x, scale_factor=2))  # (B, C, 2H, 2W)


class Level(nn.Module):
    """Residual blocks at one resolution, then the way to the next resolution (nothing after the last level)."""

    def __init__(self, width_in: int, width: int, layers: int, groups: int, resample: nn.Module):
        super().__init__()
        self.blocks = nn.Sequential(*(ResBlock(width_in if i == 0 else width, width, groups) for i in range(layers)))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(self.blocks(x))


def middle(width: int, config: VAEConfig) -> nn.Sequential:
    return nn.Sequential(OrderedDict(
        first=ResBlock(width, width, config.norm_groups),
        attention=Attention(width, config.norm_groups) if config.mid_attention else nn.Identity(),
        last=ResBlock(width, width, config.norm_groups)))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, last = config.block_channels, len(config.block_channels) - 1
        self.stem = nn.PixelUnshuffle(config.stem)
        self.conv_in = nn.Conv2d(3 * config.stem ** 2, widths[0], 3, padding=1)
        self.levels = nn.Sequential(*(
            Level(widths[max(i - 1, 0)], width, config.layers_per_block, config.norm_groups,
                  Downsample(width) if i < last else nn.Identity())
            for i, width in enumerate(widths)))
        self.mid = middle(widths[-1], config)
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:                 # (B, 3, H, W)
        x = self.conv_in(self.stem(images))                      # (B, C_first, H/stem, W/stem)
        x = self.mid(self.levels(x))                             # (B, C_last, H/downscale, W/downscale)
        return self.conv_out(F.silu(self.norm_out(x)))           # (B, 2*latent_channels, H/downscale, W/downscale)


class Decoder(nn.Module):
    """The encoder backwards: levels are numbered from the smallest feature map up."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, last = config.block_channels[::-1], len(config.block_channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], config)
        self.levels = nn.Sequential(*(
            Level(widths[max(i - 1, 0)], width, config.layers_per_block + 1, config.norm_groups,
                  Upsample(width) if i < last else nn.Identity())
            for i, width in enumerate(widths)))
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3 * config.stem ** 2, 3, padding=1)
        self.unstem = nn.PixelShuffle(config.stem)

    def forward(self, z: Tensor) -> Tensor:                      # (B, latent_channels, h, w)
        x = self.levels(self.mid(self.conv_in(z)))               # (B, C_first, h*downscale/stem, w*downscale/stem)
        x = self.conv_out(F.silu(self.norm_out(x)))              # (B, 3*stem^2, h*downscale/stem, w*downscale/stem)
        return self.unstem(x)                                    # (B, 3, h*downscale, w*downscale)


# ---------------------------------------------------------------- names in the released files

# Own part of a name (a regular expression) -> the same part in the file, replaced in this order.
DIFFUSERS = {
    r"^encoder\.levels\.(\d+)\.resample": r"encoder.down_blocks.\1.downsamplers.0.conv",
    r"^decoder\.levels\.(\d+)\.resample": r"decoder.up_blocks.\1.upsamplers.0.conv",
    r"^encoder\.levels": "encoder.down_blocks", r"^decoder\.levels": "decoder.up_blocks",
    r"\.blocks": ".resnets", r"\.mid\.first": ".mid_block.resnets.0", r"\.mid\.last": ".mid_block.resnets.1",
    r"\.mid\.attention\.norm": ".mid_block.attentions.0.group_norm", r"\.mid\.attention": ".mid_block.attentions.0",
    r"\.out\.": ".to_out.0.", r"\.shortcut": ".conv_shortcut", r"\.norm_out": ".conv_norm_out",
}
SINGLE_FILE = {
    r"^encoder\.levels\.(\d+)\.resample": r"encoder.down.\1.downsample.conv",
    r"^decoder\.levels\.(\d+)\.resample": r"decoder.up.\1.upsample.conv",
    r"^encoder\.levels": "encoder.down", r"^decoder\.levels": "decoder.up",
    r"\.blocks": ".block", r"\.mid\.first": ".mid.block_1", r"\.mid\.last": ".mid.block_2",
    r"\.mid\.attention": ".mid.attn_1", r"\.out\.": ".proj_out.", r"\.shortcut": ".nin_shortcut",
}
# Fields of the diffusers config.json -> own fields.
DIFFUSERS_CONFIG = {"latent_channels": "latent_channels", "block_out_channels": "block_channels",
                    "layers_per_block": "layers_per_block", "norm_num_groups": "norm_groups",
                    "scaling_factor": "scale", "shift_factor": "shift", "mid_block_add_attention": "mid_attention"}


def _as_linear(*parts: Tensor) -> Tensor:
    """Matrices, 1 x 1 convolutions or biases as one matrix or bias."""
    return torch.cat([part.reshape(part.shape[:2]) for part in parts])


def source_of(name: str, checkpoint: Checkpoint) -> Source:
    """Where the tensor with this own name stands in `checkpoint`, whatever its layout."""
    if "encoder.levels.0.blocks.0.conv1.weight" in checkpoint:
        return Source((name,))
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in checkpoint:
        renames, qkv = DIFFUSERS, ("to_q", "to_k", "to_v")
    elif "encoder.down.0.block.0.conv1.weight" in checkpoint:
        renames, qkv = SINGLE_FILE, ("q", "k", "v")
        # This layout numbers the decoder's levels by resolution, so its first one comes last.
        last = checkpoint.count("decoder.up.{}.") - 1
        name = re.sub(r"(?<=^decoder\.levels\.)\d+", lambda match: str(last - int(match[0])), name)
    else:
        raise ValueError(f"{checkpoint.path}: not an SD3 autoencoder in a known layout; expected encoder.down_blocks.*, "
                         f"first_stage_model.encoder.down.* or encoder.levels.*, found {', '.join(checkpoint.names()[:4])}")
    as_linear = re.search(r"attention\.(qkv|out)\.", name)
    for own, theirs in renames.items():
        name = re.sub(own, theirs, name)
    if not as_linear:
        return Source((name,))
    parts = [name.replace("qkv", part) for part in qkv] if ".qkv." in name else [name]
    return Source(tuple(parts), _as_linear)


def fields_of(checkpoint: Checkpoint) -> dict:
    """Configuration of a checkpoint: what its shapes tell, overruled by the configuration that comes with it."""
    def file_name(name: str) -> str:
        return source_of(name, checkpoint).names[0]

    def count(pattern: str) -> int:
        return next(i for i in itertools.count() if file_name(pattern.format(i)) not in checkpoint)

    fields = {
        "block_channels": tuple(checkpoint.shape(file_name(f"encoder.levels.{i}.blocks.0.conv1.weight"))[0]
                                for i in range(count("encoder.levels.{}.blocks.0.conv1.weight"))),
        "latent_channels": checkpoint.shape("decoder.conv_in.weight")[1],
        "layers_per_block": count("encoder.levels.0.blocks.{}.conv1.weight"),
        "mid_attention": file_name("encoder.mid.attention.norm.weight") in checkpoint,
        "stem": math.isqrt(checkpoint.shape("encoder.conv_in.weight")[1] // 3),
    }
    if "encoder.levels.0.blocks.0.conv1.weight" in checkpoint:   # the project's own layout, with the fields of VAEConfig
        return fields | checkpoint.config
    return fields | {own: checkpoint.config[theirs] for theirs, own in DIFFUSERS_CONFIG.items() if theirs in checkpoint.config}


# ---------------------------------------------------------------- the model

def _check(tensor: Tensor, channels: int, multiple: int, what: str) -> None:
    if tensor.ndim != 4 or tensor.shape[1] != channels or not tensor.is_floating_point():
        raise ValueError(f"{what} must be a floating-point tensor (B, {channels}, H, W), "
                         f"got {tensor.dtype} {tuple(tensor.shape)}")
    if min(tensor.shape[2:]) < multiple or any(side % multiple for side in tensor.shape[2:]):
        raise ValueError(f"height and width of {what} must be multiples of {multiple}, got {tuple(tensor.shape[2:])}")


class VAE(nn.Module):
    """Encoder and decoder. All methods compute in the dtype of the weights and keep gradients."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def downscale(self) -> int:
        """Pixels per latent pixel, along one side."""
        return self.config.stem * 2 ** (len(self.config.block_channels) - 1)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior, each (B, latent_channels, H/downscale, W/downscale), not normalised.

        images: (B, 3, H, W) in [-1, 1], H and W multiples of `downscale`; anything else is a ValueError.
        """
        _check(images, 3, self.downscale, "images")
        mean, logvar = self.encoder(images.to(self.encoder.conv_in.weight.dtype)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)                       # (B, latent_channels, H/downscale, W/downscale) each

    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Normalised latents (z - shift) * scale, (B, latent_channels, H/downscale, W/downscale), of about unit variance.

        images: as for `moments`. z is the posterior's mean, or with sample=True a draw from it by `generator`.
        """
        z, logvar = self.moments(images)
        if sample:
            noise = torch.randn(z.shape, generator=generator, device=generator.device if generator else z.device)
            z = z + (0.5 * logvar).exp() * noise.to(z)
        return (z - self.config.shift) * self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, h*downscale, w*downscale), nominally in [-1, 1] but not clamped: losses need the overshoot.

        latents: (B, latent_channels, h, w) as `encode` returns them; anything else is a ValueError.
        """
        _check(latents, self.config.latent_channels, 1, "latents")
        return self.decoder(latents.to(self.decoder.conv_in.weight.dtype) / self.config.scale + self.config.shift)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
                        **overrides) -> "VAE":
        """The autoencoder in a diffusers folder (or the repository around it), an SD3 single file or this project's own file.

        overrides: fields of VAEConfig; norm_groups is needed for a single file whose groups are not 32.
        Raises ValueError naming the file and what does not fit in it.
        """
        checkpoint = Checkpoint(path, subfolders=("vae",)).under("first_stage_model.")
        config = make_config(VAEConfig, fields_of(checkpoint) | overrides, str(checkpoint.path))
        with torch.device("meta"):
            vae = cls(config)
        return load(vae, checkpoint, {name: source_of(name, checkpoint) for name in vae.state_dict()}, dtype=dtype, device=device)


def reconstruct(checkpoint: str, picture: str, out: str | None = None) -> None:
    """Encode and decode a picture (cropped to whole latent pixels), print the PSNR, write the result to `out`."""
    vae = VAE.from_pretrained(checkpoint)
    pixels = torch.from_numpy(np.array(Image.open(picture).convert("RGB"))).permute(2, 0, 1)            # (3, H, W)
    height, width = (side - side % vae.downscale for side in pixels.shape[1:])
    images = pixels[None, :, :height, :width] / 127.5 - 1                                               # (1, 3, H, W)
    with torch.no_grad():
        result = vae.decode(vae.encode(images)).clamp(-1, 1)                                            # (1, 3, H, W)
    print(f"{width} x {height} pixels, PSNR {10 * math.log10(4 / F.mse_loss(result, images).item()):.2f} dB")
    if out:
        Image.fromarray(((result[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()).save(out)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    reconstruct(*sys.argv[1:])
