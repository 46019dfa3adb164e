"""Time and memory of the training step, drawing, captioning, T5 and the autoencoder.

    python -m benchmarks.speed                          `tiny` and `small`: 3 minutes on two cores
    python -m benchmarks.speed --full                   the 2B model as well, on a GPU
    python -m benchmarks.speed --only train,t5 --json speed.json

Weights are random and made in memory. Each case is timed in rounds, after a warm-up, in turns with
a product of large matrices of the same type: the share of the peak is the median of the rounds'
ratios, which a machine that is busy or throttled changes less than a time. A training step is the
whole one: frozen parts, both branches, backward pass, clipping, optimizer and averages.
"""
import argparse
import copy
import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import write_atomically
from config import PRESETS, TrainConfig
from data import Batch
from estimate import cost_of
from model import MMDiT
from ranks import Ranks
from sample import describe, generate
from text_encoder import T5Config, T5Encoder
from train import (Objective, Parameters, batch_latents, corrupt, make_optimizers, update_average)
from vae import VAE, VAEConfig


# ---------------------------------------------------------------- sizes

class Sizes(NamedTuple):
    """A model with its frozen parts, and how much each case does at a time."""
    config: TrainConfig                     # batch_size: of the training step
    t5: T5Config
    vae: VAEConfig
    batch: int                              # pictures drawn or captioned at a time
    steps: int                              # of a picture
    text_steps: int                         # of a caption


def sizes_of(name: str, device: torch.device, quick: bool) -> Sizes:
    """Sizes of a preset, as much work as the device does in seconds; quick: as little as can be."""
    config = PRESETS[name]
    t5, vae, s = config.text_encoder, config.vae, config.sampling
    on_gpu = device.type == "cuda"
    batch = config.batch_size if on_gpu or name == "tiny" else 1
    steps, text_steps = (s.steps, s.text_steps) if on_gpu or name == "tiny" else (4, 4)
    model = config.model
    if name == "tiny":
        model = replace(model, vocab_size=170)                  # of the world's tokenizer
        t5 = replace(t5, vocab_size=170)
    if quick:
        model = replace(model, width=32, depth=2, num_heads=2, vocab_size=170, position_table=8,
                        align_dims=(16, 16))
        t5 = replace(t5, vocab_size=170, dim=32, ff_dim=64, head_dim=16, depth=1, num_heads=2)
        vae = replace(vae, block_channels=(8,) * len(vae.block_channels), norm_groups=1)
        s = replace(s, image_size=64, text_length=16)
        batch, steps, text_steps = 1, 1, 1
    model = replace(model, text_dim=t5.dim)
    config = replace(config, model=model, sampling=s, batch_size=batch, intrinsic_weight=0.0,
                     align_depth=1)
    return Sizes(config, t5, vae, 1 if not on_gpu else 4, steps, text_steps)


def random_weights(build: Callable[[], nn.Module], dtype: torch.dtype,
                   device: torch.device) -> nn.Module:
    """Build a module without memory, then fill it on the device."""
    with torch.device("meta"):
        module = build()
    module = module.to(dtype).to_empty(device=device)
    for tensor in module.state_dict().values():
        tensor.normal_(std=0.02)
    return module


# ---------------------------------------------------------------- cases

class Work(NamedTuple):
    """What is timed, and how much of each unit one call does."""
    function: Callable
    dtype: torch.dtype
    units: dict[str, float]


class Parts(NamedTuple):
    """The modules of a case, with random weights."""
    model: MMDiT
    text_encoder: T5Encoder
    vae: VAE


def parts(s: Sizes, dtypes: tuple[torch.dtype, ...], device: torch.device) -> Parts:
    builds = (partial(MMDiT, s.config.model), partial(T5Encoder, s.t5), partial(VAE, s.vae))
    modules = [random_weights(build, dtype, device) for build, dtype in zip(builds, dtypes)]
    return Parts(*(module.requires_grad_(False) for module in modules))


def random_ids(s: Sizes, count: int, device: torch.device) -> Tensor:
    """Token ids (count, L)."""
    return torch.randint(s.config.model.vocab_size - 1, (count, s.config.sampling.text_length),
                         device=device)


def random_images(s: Sizes, count: int, device: torch.device) -> Tensor:
    size = s.config.sampling.image_size
    return torch.rand(count, 3, size, size, device=device) * 2 - 1                  # (B, 3, H, W)


def training_step(s: Sizes, dtype: torch.dtype, device: torch.device) -> Work:
    """The step of train.py on a batch of pairs; without the teacher, whose features are cached."""
    config, b = s.config, s.config.batch_size
    model, text_encoder, vae = parts(s, (torch.float32, dtype, torch.float32), device)
    average = copy.deepcopy(model)
    model.requires_grad_(True)
    model.gradient_checkpointing = config.gradient_checkpointing
    objective, ranks = Objective(model, config), Ranks(0, 1, device)
    parameters, optimizers = Parameters(model, ranks), make_optimizers(model, config)
    ids, empty = random_ids(s, b, device), random_ids(s, 1, device)
    images = random_images(s, b, device)[:, None]                           # (B, 1, 3, H, W)
    latents = None
    if config.cache_latents:
        side = images.shape[-1] // vae.downscale
        latents = torch.randn(b, 1, vae.config.latent_channels, side, side, device=device)
    batch = Batch("pairs", images, latents, ids, ids, torch.ones_like(ids, dtype=torch.bool), None)
    mask_id, generator = config.model.vocab_size - 1, torch.Generator(device).manual_seed(0)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
            x = batch_latents(batch, vae, generator)                        # (B, 1, C, h, w)
            corrupted = corrupt(batch, x, text_encoder, mask_id, empty, generator, config)
            losses = objective(corrupted)
        losses["loss"].backward()
        norm = parameters.clip(config.clip)
        parameters.update(optimizers, norm)
        update_average(average, model, 0, config.ema, config.ema_every)

    patches = (images.shape[-1] // (vae.downscale * config.model.patch_size)) ** 2
    tokens = 2 * b * (ids.shape[1] + patches)                   # of both branches
    return Work(step, torch.bfloat16, {"steps": 1, "pictures": b, "tokens": tokens})


@torch.no_grad()
def drawing(s: Sizes, dtype: torch.dtype, device: torch.device) -> Work:
    """Prompts to pictures, as `Pipeline.draw`: T5, the guided steps, the decoder."""
    model, text_encoder, vae = parts(s, 3 * (dtype,), device)
    side = s.config.sampling.image_size // vae.downscale
    noise = torch.randn(s.batch, vae.config.latent_channels, side, side, device=device)
    ids = random_ids(s, s.batch + 1, device)

    @torch.no_grad()
    def draw() -> None:
        texts = text_encoder(ids)                                                   # (B + 1, L, D)
        latents = generate(model, noise, texts[:-1], texts[-1:], s.steps,
                           max(2.0, s.config.sampling.guidance))
        vae.decode(latents.to(dtype))

    return Work(draw, dtype, {"pictures": s.batch})


@torch.no_grad()
def captioning(s: Sizes, dtype: torch.dtype, device: torch.device) -> Work:
    """Pictures to captions, as `Pipeline.caption`: the encoder, then T5 and the model in turns."""
    model, text_encoder, vae = parts(s, 3 * (dtype,), device)
    images, mask_id = random_images(s, s.batch, device), s.config.model.vocab_size - 1
    tokens = torch.full_like(random_ids(s, s.batch, device), mask_id)               # (B, L)

    @torch.no_grad()
    def write() -> None:
        latents = vae.encode(images.to(dtype))
        describe(model, text_encoder, latents, tokens, mask_id, s.text_steps, "confidence")

    return Work(write, dtype, {"captions": s.batch, "tokens": tokens.numel()})


def text_encoding(s: Sizes, dtype: torch.dtype, device: torch.device) -> Work:
    encoder = random_weights(partial(T5Encoder, s.t5), dtype, device)
    ids = random_ids(s, 2 * s.batch, device)
    return Work(torch.no_grad()(lambda: encoder(ids)), dtype,
                {"texts": len(ids), "tokens": ids.numel()})


def encoding(s: Sizes, dtype: torch.dtype, device: torch.device) -> Work:
    vae = random_weights(partial(VAE, s.vae), dtype, device)
    images = random_images(s, s.batch, device)
    return Work(torch.no_grad()(lambda: vae.encode(images)), dtype, {"pictures": s.batch})


def decoding(s: Sizes, dtype: torch.dtype, device: torch.device) -> Work:
    vae = random_weights(partial(VAE, s.vae), dtype, device)
    side = s.config.sampling.image_size // vae.downscale
    z = torch.randn(s.batch, s.vae.latent_channels, side, side, device=device)      # (B, C, h, w)
    return Work(torch.no_grad()(lambda: vae.decode(z)), dtype, {"pictures": s.batch})


CASES = {"train": training_step, "draw": drawing, "caption": captioning, "t5": text_encoding,
         "encode": encoding, "decode": decoding}


# ---------------------------------------------------------------- measuring

def _status(key: str) -> int | None:
    """Bytes of VmRSS or VmHWM of this process; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


class Memory:
    """The most memory in use since it was made, beyond what was in use then."""

    def __init__(self, device: torch.device):
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            return
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)                    # what earlier cases left
            Path("/proc/self/clear_refs").write_text("5")       # resets VmHWM
        self.start = _status("VmRSS")

    def peak(self) -> int | None:
        """Bytes; None where the system does not say."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        highest = _status("VmHWM")
        return None if highest is None else max(0, highest - self.start)


def seconds_of(function: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(case: str, name: str, device: torch.device, rounds: int, quick: bool) -> dict:
    """One row: medians of the rounds, the share of the matmul peak, the memory with weights."""
    s = sizes_of(name, device, quick)
    small = device.type == "cpu" and name == "tiny"             # as sample.py and train.py do
    memory = Memory(device)
    work = CASES[case](s, torch.float32 if small else torch.bfloat16, device)
    work.function()                                             # states of optimizers, kernels
    seconds_of(work.function, device)
    peak = memory.peak()
    n = 256 if quick else 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(2, n, n, device=device).to(work.dtype)
    seconds_of(lambda: a @ b, device)
    pairs = []
    for _ in range(rounds):                                     # in turns
        product = seconds_of(lambda: [a @ b for _ in range(3)], device) / 3
        pairs.append((product, seconds_of(work.function, device)))
    flops = cost_of(work.function).flops
    seconds = statistics.median(t for _, t in pairs)
    share = statistics.median(flops / t / (2 * n ** 3 / product) for product, t in pairs)
    size = s.config.sampling
    amount = {"train": f"batch {s.config.batch_size}, ", "draw": f"{s.steps} steps, ",
              "caption": f"{s.text_steps} steps, "}.get(case, "")
    return {"case": case, "size": name, "work": f"{amount}{size.image_size} px, "
            f"{size.text_length} tokens", "dtype": str(work.dtype).removeprefix("torch."),
            "seconds": seconds, "flops": flops, "share_of_matmul": share, "peak_bytes": peak,
            "per_second": {unit: count / seconds for unit, count in work.units.items()}}


# ---------------------------------------------------------------- the table

def table(rows: Sequence[dict]) -> str:
    lines = ["| case | work | type | seconds | per second | share of the matmul peak | memory |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        rates = ", ".join(f"{rate:.3g} {unit}" for unit, rate in row["per_second"].items())
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f} GB"
        lines.append(f"| {row['case']} {row['size']} | {row['work']} | {row['dtype']} | "
                     f"{row['seconds']:.3g} | {rates} | {row['share_of_matmul']:.0%} | {peak} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", metavar="NAMES",
                   help=f"of {', '.join(CASES)}, tiny, small, sd3; separated by commas")
    p.add_argument("--full", action="store_true", help="the 2B model as well; needs a large GPU")
    p.add_argument("--quick", action="store_true", help="narrow models, one round: does it run?")
    p.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    p.add_argument("--device", default="cuda" if cuda else "cpu", help="(default: %(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="a new file for device and rows")
    a = p.parse_args(argv)
    names = ["tiny", "small"] + ["sd3"] * a.full
    only = set(filter(None, a.only.split(",")))
    if unknown := only - {*CASES, *names}:
        p.error(f"--only {sorted(unknown)[0]}: expected some of {', '.join([*CASES, *names])}")
    if a.json and a.json.exists():
        p.error(f"{a.json} exists; nothing is overwritten, choose another name")
    if a.rounds < 1:
        p.error(f"--rounds {a.rounds}: expected at least 1")
    device, rounds = torch.device(a.device), 1 if a.quick else a.rounds
    torch.manual_seed(0)
    sizes = [name for name in names if name in only] or names
    cases = [case for case in CASES if case in only] or list(CASES)
    rows = []
    with tqdm(total=len(sizes) * len(cases), unit="case") as bar:
        for name in sizes:
            for case in cases:
                bar.set_description(f"{case} {name}")
                rows.append(measure(case, name, device, rounds, a.quick))
                bar.update()
    is_cpu = device.type == "cpu"
    result = {"device": f"CPU, {torch.get_num_threads()} threads" if is_cpu else
              torch.cuda.get_device_name(device), "torch": torch.__version__, "rows": rows}
    print(f"{result['device']}, torch {result['torch']}\n\n{table(rows)}")
    if a.json:
        write_atomically(a.json, lambda file: file.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
