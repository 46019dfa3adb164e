"""Training UniAlignment (arXiv 2509.23760, section 3): one loop for the tiny model on a laptop and the 2B model on many GPUs.

    python train.py                                     the shapes world from nothing to a report, on two CPU cores
    python train.py --resume                            continue an interrupted run, exactly where it was
    torchrun --nproc_per_node 8 train.py --preset sd3 --data pairs.jsonl --init sd3_medium.safetensors \\
        --vae_path sd3/vae --t5_path sd3/text_encoder_3 --tokenizer_path spiece.model

A preset is a `TrainConfig`; every field of it is a command-line option. Results go to --out: checkpoint-*/ (model, EMA and
optimizer as safetensors), metrics.jsonl, and for the shapes world samples.png, scores.json and report.html.
"""
import argparse
import contextlib
import copy
import dataclasses
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentencepiece import SentencePieceTrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import shapes
from checkpoint import Checkpoint, make_config, read_json, save, write_atomically
from data import BatchOrder, Pairs, read_jsonl
from evaluate import evaluate_run, print_scores
from losses import contrastive_loss, flow_matching_loss, masked_token_loss, total_loss
from model import MMDiT, MMDiTConfig
from sample import SampleSettings
from text_encoder import T5Config, T5Encoder, T5Tokenizer
from vae import VAE, VAEConfig


# ---------------------------------------------------------------- presets

def _field(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """Everything about a run. The defaults are the paper's; a preset changes what differs."""
    out: str = _field("runs/sd3", "folder of the run")
    seed: int = _field(0, "of data, noise and initial weights")
    data: str = _field("", "JSONL of text-image pairs; empty: the shapes world is made")
    init: str = _field("", "MM-DiT checkpoint to start from (SD3, UniAlignment or own); empty: random weights")
    vae_path: str = _field("", "autoencoder checkpoint; empty: one is trained on shapes")
    t5_path: str = _field("", "T5 encoder checkpoint; empty: a random one, frozen")
    tokenizer_path: str = _field("", "sentencepiece model; empty: one is trained on the captions")
    mask_token: str = _field("", "the .pth with the trained mask embedding of the released T5, if any")
    model: MMDiTConfig = MMDiTConfig()
    vae: VAEConfig = field(default_factory=VAEConfig)
    text_encoder: T5Config = field(default_factory=T5Config)
    sampling: SampleSettings = SampleSettings()
    train_scenes: int = _field(0, "size of the shapes world")
    test_scenes: int = _field(0, "held-out scenes, all of which are scored at the end")
    vae_steps: int = _field(0, "training steps of the tiny autoencoder")
    steps: int = _field(80_000, "optimizer steps")
    batch_size: int = _field(8, "pairs per rank and micro batch; each is one sample of both branches")
    accumulation: int = _field(4, "micro batches per step")
    lr: float = _field(3e-5, "of AdamW")
    muon_lr: float = _field(0.0, "of Muon, for the matrices of the blocks; 0: AdamW for everything")
    weight_decay: float = _field(0.01, "of AdamW")
    beta2: float = _field(0.999, "of AdamW")
    warmup: int = _field(1000, "steps of linear warm-up")
    decay: bool = _field(False, "linear decay to zero at the end, else constant")
    clip: float = _field(2.0, "norm of the mean gradient")
    ema: float = _field(0.9995, "decay of the averaged weights")
    prompt_dropout: float = _field(0.1, "share of empty prompts in the image branch, for guidance")
    text_weight: float = _field(0.2, "of equation (2) in equation (5)")
    cross_weight: float = _field(0.05, "of equation (3) in equation (5)")
    released_loss: bool = _field(False, "the released form of equation (1): sigma^2 times the paper's")
    autocast: bool = _field(True, "bfloat16 matrix products, float32 weights")
    gradient_checkpointing: bool = _field(False, "recompute blocks in the backward pass: less memory, a quarter slower")
    cache_latents: bool = _field(False, "encode every picture once at the start and keep its mean latents in memory")
    workers: int = _field(4, "processes that load pictures")
    log_every: int = _field(20, "steps per line of metrics.jsonl")
    save_every: int = _field(1000, "steps per checkpoint; the last one is kept")


_TINY = TrainConfig(                 # both vocabulary sizes become those of the tokenizer that the run trains
    out="runs/tiny",
    model=MMDiTConfig(width=128, depth=4, num_heads=4, text_dim=128, position_table=8, qk_norm=True, text_positions=32),
    vae=VAEConfig(block_channels=(32, 32), layers_per_block=1, norm_groups=1, mid_attention=False, stem=4),
    text_encoder=T5Config(dim=128, head_dim=32, ff_dim=256, depth=2, num_heads=4),
    sampling=SampleSettings(image_size=64, text_length=32, steps=20, guidance=2.0, shift=1.0, text_steps=16),
    train_scenes=30_000, test_scenes=510, vae_steps=4200, steps=7600, batch_size=16, accumulation=1,
    lr=5e-3, muon_lr=0.025, beta2=0.95, weight_decay=0.0, warmup=100, decay=True, clip=1.0, ema=0.998,
    cache_latents=True, workers=0, log_every=50, save_every=1000)

PRESETS = {
    "tiny": _TINY,
    "mini": replace(_TINY, out="runs/mini", train_scenes=1200, test_scenes=12, vae_steps=300, steps=300, save_every=100),
    "sd3": replace(TrainConfig(), gradient_checkpointing=True),
}


# ---------------------------------------------------------------- ranks

class Ranks(typing.NamedTuple):
    """This process among those of torchrun."""
    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def start_ranks() -> Ranks:
    """Join torchrun's processes if there are any: NCCL on GPUs, gloo on CPUs."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return Ranks(0, 1, torch.device("cuda" if cuda else "cpu"))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def mean_over_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    if ranks.world > 1:
        dist.all_reduce(x)
    return x / ranks.world


# ---------------------------------------------------------------- optimisation

def learning_rate_scale(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then constant or a linear decay to zero; a factor of each optimizer's learning rate."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return warm * (1 - step / config.steps if config.decay else 1.0)


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and with muon_lr Muon for the 2-D weights of the blocks (momentum made orthogonal, arXiv 2502.16982)."""
    matrices = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2 and "modulation" not in n]
    matrices = matrices if config.muon_lr else []
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=0.0, momentum=0.95, nesterov=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Exponential moving average of the weights, with a shorter memory at the beginning."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


# ---------------------------------------------------------------- the losses of one batch

def stratified(n: int, generator: torch.Generator) -> Tensor:
    """n numbers in [0, 1), one in each n-th, in random order: uniform one by one, evenly spread together; (n,)."""
    device = generator.device
    place = torch.randperm(n, generator=generator, device=device)
    return (place + torch.rand(n, generator=generator, device=device)) / n


def noise_seed(config: TrainConfig, step: int, micro: int, rank: int) -> int:
    """The seed of a micro batch's noise: a function of its place alone, so a resumed run needs no saved generator."""
    return (((config.seed * 1_000_003 + step) * 1009 + micro) * 4099 + rank) % 2 ** 63


def dual_losses(model: nn.Module, text_encoder: T5Encoder, latents: Tensor, tokens: Tensor, mask_id: int, empty: Tensor,
                generator: torch.Generator, config: TrainConfig) -> dict[str, Tensor]:
    """Equations (1), (2), (3) and (5) of a batch of pairs, both branches in one forward pass.

    latents (B, C, H, W) clean; tokens (B, L) captions; empty (1, L) the empty prompt. The image branch sees noisy latents and the
    clean caption, the text branch clean latents and the masked caption.
    """
    b, device = len(latents), latents.device
    sigma = torch.special.ndtri(stratified(b, generator).clamp(1e-4, 1 - 1e-4)).sigmoid()     # (B,) logit-normal(0, 1)
    noise = torch.randn(latents.shape, generator=generator, device=device)                    # (B, C, H, W)
    noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))                               # (B, C, H, W) (1 - sigma) x + sigma e
    dropped = torch.rand(b, generator=generator, device=device) < config.prompt_dropout       # (B,)
    prompts = torch.where(dropped[:, None], empty, tokens)                                    # (B, L)

    t = 0.001 + 0.999 * stratified(b, generator)                                              # (B,) in (0, 1]
    mask = torch.rand(tokens.shape, generator=generator, device=device) < t[:, None]          # (B, L)
    masked = torch.where(mask, mask_id, tokens)                                               # (B, L)

    with torch.no_grad():
        text = text_encoder(torch.cat([prompts, masked]))                                     # (2B, L, D)
    out = model(torch.cat([noisy, latents]), text, torch.cat([1000 * sigma, torch.zeros_like(sigma)]),
                want={"velocity": slice(0, b), "logits": slice(b, 2 * b)})
    found = {"flow_matching": flow_matching_loss(out.velocity, noise, latents, sigma if config.released_loss else None),
             "masked_token": masked_token_loss(out.logits, tokens, mask, t)}
    if config.cross_weight:
        found["contrastive"] = contrastive_loss(out.image_hidden, out.text_hidden)
    found["loss"] = total_loss(found["flow_matching"], found["masked_token"], found.get("contrastive", 0.0),
                               text_weight=config.text_weight, cross_weight=config.cross_weight)
    return found


# ---------------------------------------------------------------- checkpoints

def newest_checkpoint(run: Path) -> Path | None:
    """The last whole checkpoint of a run; folders get their name only when they are complete."""
    return max(run.glob("checkpoint-*"), default=None)


def save_checkpoint(run: Path, step: int, seconds: float, model: MMDiT, average: MMDiT, optimizers: list,
                    metrics: dict[str, Tensor], world: int) -> None:
    """Write checkpoint-<step> under a temporary name, rename it, then remove the one before: a kill leaves one that is whole."""
    target, temporary = run / f"checkpoint-{step:08d}", run / ".checkpoint.tmp"
    if target.exists():
        return
    shutil.rmtree(temporary, ignore_errors=True)
    config = model.config
    save(temporary / "model.safetensors", model.state_dict(), config)
    save(temporary / "ema.safetensors", average.state_dict(), config)
    state = {f"{k}.{i}.{name}": value for k, optimizer in enumerate(optimizers)
             for i, entry in optimizer.state_dict()["state"].items() for name, value in entry.items()}
    state |= {f"metrics.{name}": value for name, value in metrics.items()}
    save(temporary / "optimizer.safetensors", state, step=str(step), seconds=str(seconds), world=str(world))
    os.rename(temporary, target)
    for old in run.glob("checkpoint-*"):
        if old != target:
            shutil.rmtree(old)


def load_optimizers(optimizers: list, folder: Path, world: int) -> tuple[int, float, dict[str, Tensor]]:
    """Restore the optimizers; returns the step, the seconds of training so far and the state of the metrics.

    Raises ValueError if the run had another number of ranks: its batches would be others.
    """
    file = Checkpoint(folder / "optimizer.safetensors")
    if file.metadata["world"] != str(world):
        raise ValueError(f"{folder}: was written by {file.metadata['world']} ranks, resumed by {world}; start as many as before")
    for k, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name in file.names():
            if name.startswith(f"{k}."):
                _, i, key = name.split(".")
                state.setdefault(int(i), {})[key] = file.read(name)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    metrics = {name.removeprefix("metrics."): file.read(name) for name in file.names() if name.startswith("metrics.")}
    return int(file.metadata["step"]), float(file.metadata["seconds"]), metrics


# ---------------------------------------------------------------- what a run without released weights makes for itself

def train_tokenizer(captions: list[str], path: Path) -> None:
    """A sentencepiece model of whole words with T5's special ids, on the captions of the world."""
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(captions), model_writer=model, vocab_size=1000, hard_vocab_limit=False,
                               model_type="word", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    write_atomically(path, lambda file: file.write_bytes(model.getvalue()))


def train_vae(config: TrainConfig, path: Path) -> None:
    """The tiny autoencoder: squared error and a little KL, on crowded pictures (one to nine objects), which teach most per step.

    Its latents are then scaled to unit variance, which SD3's constants do for SD3's latents.
    """
    rng, generator = random.Random(config.seed), torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)
    drawn = (shapes.random_scene(rng, rng.randint(1, 9)) for _ in itertools.count())
    scenes = list(itertools.islice((scene for scene in drawn if not shapes.held_out(scene)), 4096))
    pictures = torch.from_numpy(np.stack([shapes.render(s) for s in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
    vae = VAE(replace(config.vae, scale=1.0, shift=0.0))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in tqdm(range(config.vae_steps), desc="autoencoder", unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * min(1, (step + 1) / 50) * (1 - step / config.vae_steps)
        x = pictures[torch.randint(len(pictures), (16,), generator=generator)]                # (16, 3, H, W)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.autocast):
            mean, logvar = (part.float() for part in vae.moments(x))                          # (16, C, h, w) each
            z = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator)      # (16, C, h, w)
            y = vae.decode(z).float()                                                         # (16, 3, H, W)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = F.mse_loss(y, x) + 1e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        mean = torch.cat([vae.moments(chunk)[0] for chunk in pictures[:512].split(64)])       # (512, C, h, w)
    vae.config = replace(config.vae, scale=1 / mean.std().item(), shift=mean.mean().item())
    save(path, vae.state_dict(), vae.config)


class Parts(typing.NamedTuple):
    """Where the frozen parts of a run are, and its data."""
    data: Path
    test: Path | None
    tokenizer: Path
    vae: Path
    text_encoder: Path


@contextlib.contextmanager
def timed(run: Path, phase: str):
    """Add the seconds of a phase to the run's seconds.json."""
    start, file = time.time(), run / "seconds.json"
    yield
    seconds = json.loads(file.read_text()) if file.exists() else {}
    seconds[phase] = round(seconds.get(phase, 0.0) + time.time() - start, 1)
    write_atomically(file, lambda f: f.write_text(json.dumps(seconds)))


def prepare(config: TrainConfig, run: Path) -> Parts:
    """Make whatever the configuration gives no path for; what an interrupted run has already made is kept."""
    world = run / "data"
    parts = Parts(Path(config.data or world / "train.jsonl"), None if config.data else world / "test.jsonl",
                  Path(config.tokenizer_path or run / "tokenizer.model"), Path(config.vae_path or run / "vae.safetensors"),
                  Path(config.t5_path or run / "text_encoder.safetensors"))
    if not config.data and not parts.test.exists():
        with timed(run, "world"):
            shapes.make_world(world, config.train_scenes, config.test_scenes, config.seed)
    if not config.tokenizer_path and not parts.tokenizer.exists():
        with timed(run, "tokenizer"):
            train_tokenizer([e.caption for e in read_jsonl(parts.data)[:5000]], parts.tokenizer)
    tokenizer = T5Tokenizer(parts.tokenizer)
    if not config.t5_path and not parts.text_encoder.exists():
        torch.manual_seed(config.seed)
        t5_config = replace(config.text_encoder, vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id)
        save(parts.text_encoder, T5Encoder(t5_config).state_dict(), t5_config)
    if not config.vae_path and not parts.vae.exists():
        with timed(run, "vae"):
            train_vae(config, parts.vae)
    return parts


@torch.no_grad()
def encode_all(dataset: Pairs, vae: VAE, device: torch.device) -> Tensor:
    """Mean latents of every picture of a dataset, (n, C, h, w) float32 on the CPU."""
    chunks = torch.arange(len(dataset)).split(64)
    return torch.cat([vae.encode(torch.stack([dataset.picture(i) for i in chunk.tolist()]).to(device)).float().cpu()
                      for chunk in tqdm(chunks, desc="encoding pictures", unit="batch", leave=False)])


# ---------------------------------------------------------------- the training loop

class Metrics:
    """metrics.jsonl: one line each `log_every` steps, means over the micro batches and ranks since the last one."""

    def __init__(self, path: Path, step: int, ranks: Ranks):
        self.path, self.ranks, self.sums, self.count = path, ranks, {}, 0
        if ranks.first and path.exists():                       # what a resumed run does again goes, and a line that a kill cut off
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            write_atomically(path, lambda file: file.write_text("".join(line + "\n" for line in kept)))

    def add(self, values: dict[str, Tensor]) -> None:
        self.count += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()

    def state(self) -> dict[str, Tensor]:
        """The sums of an unfinished line, for a checkpoint; every rank must call it."""
        return {name: mean_over_ranks(value.clone(), self.ranks) for name, value in self.sums.items()} | {
            "count": torch.tensor(self.count)}

    def load_state(self, state: dict[str, Tensor], device: torch.device) -> None:
        self.count = int(state.pop("count"))
        self.sums = {name: value.to(device) for name, value in state.items()}

    def write(self, step: int, **extra: float) -> dict[str, float]:
        means = mean_over_ranks(torch.stack(list(self.sums.values())) / self.count, self.ranks).tolist()
        line = {"step": step} | {name: round(value, 6) for name, value in zip(self.sums, means)} | extra
        self.sums, self.count = {}, 0
        if self.ranks.first:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        return line


def load_frozen(config: TrainConfig, parts: Parts, device: torch.device) -> tuple[T5Tokenizer, T5Encoder, VAE]:
    """What is used and not trained. On a GPU T5 is kept in bfloat16 (it overflows in float16)."""
    tokenizer = T5Tokenizer(parts.tokenizer, padding_id=config.sampling.padding_id)
    dtype = torch.bfloat16 if device.type == "cuda" and config.autocast else torch.float32
    text_encoder = T5Encoder.from_pretrained(parts.text_encoder, mask_token=config.mask_token or None, dtype=dtype, device=device)
    vae = VAE.from_pretrained(parts.vae, device=device)
    return tokenizer, text_encoder.eval().requires_grad_(False), vae.eval().requires_grad_(False)


def load_models(config: TrainConfig, vocab_size: int, resumed: Path | None, device: torch.device) -> tuple[MMDiT, MMDiT]:
    """The model and its average: from the run's checkpoint, from --init, or fresh."""
    torch.manual_seed(config.seed)                              # an SD3 checkpoint too leaves tensors to be initialised
    if resumed:
        model, average = (MMDiT.from_pretrained(resumed / f"{name}.safetensors") for name in ("model", "ema"))
    else:
        model = MMDiT.from_pretrained(config.init) if config.init else MMDiT(replace(config.model, vocab_size=vocab_size))
        average = copy.deepcopy(model)
    model.gradient_checkpointing = config.gradient_checkpointing
    return model.to(device), average.to(device).requires_grad_(False)


def check_parts(config: TrainConfig, model: MMDiT, text_encoder: T5Encoder, vae: VAE, tokenizer: T5Tokenizer) -> None:
    """Raise ValueError before the long work if the parts do not fit together."""
    c, pixels = model.config, vae.downscale * model.config.patch_size
    if config.sampling.image_size % pixels:
        raise ValueError(f"--sampling.image_size {config.sampling.image_size}: expected a multiple of {pixels} (autoencoder and patches)")
    if config.sampling.image_size // pixels > c.position_table:
        raise ValueError(f"--sampling.image_size {config.sampling.image_size}: the model has positions up to {pixels * c.position_table}")
    if c.text_positions and config.sampling.text_length > c.text_positions:
        raise ValueError(f"--sampling.text_length {config.sampling.text_length}: the model has positions for {c.text_positions} tokens")
    for what, wanted, found in (("text_dim", c.text_dim, text_encoder.config.dim), ("vocab_size", c.vocab_size, tokenizer.vocab_size),
                                ("latent_channels", c.latent_channels, vae.config.latent_channels)):
        if wanted != found:
            raise ValueError(f"the parts do not fit together: {what} is {wanted} in the model and {found} in the frozen part beside it")


def _as_it_is(batch):
    return batch                                                # the dataset returns whole batches


def _leave_signals_to_the_main_process(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def caught_signals():
    """A list to which SIGINT and SIGTERM add themselves instead of ending the process."""
    signals = []
    before = {n: signal.signal(n, lambda number, frame: signals.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(config: TrainConfig, ranks: Ranks, parts: Parts, run: Path, signals: list) -> bool:
    """Train to config.steps from the newest checkpoint of the run, or from the start; a signal in `signals` stops it: False."""
    device, resumed = ranks.device, newest_checkpoint(run)
    tokenizer, text_encoder, vae = load_frozen(config, parts, device)
    dataset = Pairs(parts.data, tokenizer, config.sampling.image_size, config.sampling.text_length)
    model, average = load_models(config, tokenizer.vocab_size, resumed, device)
    check_parts(config, model, text_encoder, vae, tokenizer)
    optimizers = make_optimizers(model, config)
    step, seconds, unfinished = load_optimizers(optimizers, resumed, ranks.world) if resumed else (0, 0.0, None)
    if config.cache_latents and step < config.steps:
        dataset.latents = encode_all(dataset, vae, device)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True, forward_sync_buffers=False) if ranks.world > 1 else model
    order = BatchOrder(len(dataset), config.batch_size, config.seed, ranks.rank, ranks.world, step * config.accumulation)
    batches = iter(DataLoader(dataset, batch_sampler=order, num_workers=config.workers, collate_fn=_as_it_is,
                              worker_init_fn=_leave_signals_to_the_main_process))
    empty = tokenizer([""], length=config.sampling.text_length).to(device)                    # (1, L)
    metrics = Metrics(run / "metrics.jsonl", step, ranks)
    if resumed:
        metrics.load_state(unfinished, device)

    start = time.time() - seconds
    bar = tqdm(total=config.steps, initial=step, desc="training", unit="step", disable=not ranks.first)
    while step < config.steps:
        for micro in range(config.accumulation):
            batch = next(batches)
            generator = torch.Generator(device).manual_seed(noise_seed(config, step, micro, ranks.rank))
            tokens = batch.tokens.to(device)
            if batch.latents is not None:
                latents = batch.latents.to(device)
            else:
                latents = vae.encode(batch.pictures.to(device), sample=True, generator=generator).float()
            last = micro == config.accumulation - 1
            with contextlib.nullcontext() if last or ranks.world == 1 else wrapped.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
                    found = dual_losses(wrapped, text_encoder, latents, tokens, tokenizer.mask_id, empty, generator, config)
                (found["loss"] / config.accumulation).backward()
            metrics.add(found)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        if not norm.isfinite():
            raise SystemExit(f"step {step}: the gradient is not finite ({norm.item()}); lower --lr or --muon_lr. "
                             f"The last good checkpoint is in {run}")
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * learning_rate_scale(step, config)
            optimizer.step()
            optimizer.zero_grad()
        update_average(average, model, step, config.ema)
        step += 1
        bar.update()

        if step % config.log_every == 0 or step == config.steps:
            line = metrics.write(step, grad_norm=round(norm.item(), 4), seconds=round(time.time() - start, 1))
            bar.set_postfix({name: f"{line[name]:.3f}" for name in ("flow_matching", "masked_token")})
        stopping = mean_over_ranks(torch.tensor(float(len(signals)), device=device), ranks).item() > 0    # one rank's signal stops all
        if stopping or step % config.save_every == 0 or step == config.steps:
            unfinished = metrics.state()
            if ranks.first:
                save_checkpoint(run, step, time.time() - start, model, average, optimizers, unfinished, ranks.world)
        if stopping:
            break
    bar.close()
    return step == config.steps


# ---------------------------------------------------------------- command line

def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected true or false")
    return text.lower() == "true"


def _parse_integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _add_fields(parser: argparse._ArgumentGroup, kind, default, prefix: str = "") -> None:
    """An option for every field of a dataclass; nested ones as --outer.inner."""
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        value, hint = getattr(default, f.name), hints[f.name]
        if dataclasses.is_dataclass(hint):
            _add_fields(parser, hint, value, f"{prefix}{f.name}.")
        else:
            parse, shown = {bool: (_parse_bool, "true|false"), tuple[int, ...]: (_parse_integers, "N,N"),
                            str: (str, "TEXT")}.get(hint, (hint, "N"))
            note = f"{f.metadata.get('help', '')} (default: {value!r})".strip().replace("%", "%%")
            parser.add_argument(f"--{prefix}{f.name}", type=parse, metavar=shown, default=argparse.SUPPRESS, help=note)


def _override(default, values: dict[str, object], prefix: str = ""):
    """The dataclass with the fields changed that the command line names."""
    changes = {}
    for f in dataclasses.fields(default):
        value = getattr(default, f.name)
        if dataclasses.is_dataclass(value):
            changes[f.name] = _override(value, values, f"{prefix}{f.name}.")
        elif prefix + f.name in values:
            changes[f.name] = values[prefix + f.name]
    return replace(default, **changes)


def parse_arguments(argv: list[str] | None = None) -> TrainConfig:
    """A preset with what the command line changes, or with --resume the run's. The preset is read first: --help shows its defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="tiny")
    preset = PRESETS[first.parse_known_args(argv)[0].preset]
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                usage="train.py [-h] [--preset NAME] [--resume] [--FIELD VALUE ...]")
    p.add_argument("--preset", choices=PRESETS, default="tiny",
                   help="which defaults to start from, tiny if not given; the defaults shown below are those of the chosen one")
    p.add_argument("--resume", action="store_true", help="continue the run in --out, with the configuration it was started with")
    _add_fields(p.add_argument_group("fields of the configuration"), TrainConfig, preset)
    values = vars(p.parse_args(argv))
    values.pop("preset")
    resume = values.pop("resume")
    try:
        config = _override(preset, values)
    except ValueError as error:
        p.error(str(error))
    file = Path(config.out) / "run.json"
    if resume:
        if not file.is_file():
            p.error(f"--resume: {config.out} holds no run (no run.json); start one without --resume")
        if set(values) - {"out"}:
            p.error(f"--resume takes the configuration from {file}; remove --{', --'.join(sorted(set(values) - {'out'}))}")
        try:
            return replace(read_config(file), out=config.out)   # the folder may have moved
        except ValueError as error:
            p.error(str(error))
    if file.exists() and (newest_checkpoint(file.parent) or (file.parent / "data").exists()):
        p.error(f"{config.out} already holds a run; continue it with --resume, choose another --out, or remove the folder")
    for path, group in (("init", "model."), ("vae_path", "vae."), ("t5_path", "text_encoder.")):
        if getattr(config, path) and (given := [v for v in values if v.startswith(group)]):
            p.error(f"--{given[0]} has no effect beside --{path}: the checkpoint brings its own configuration; remove one of them")
    positive = ("steps", "batch_size", "accumulation", "log_every", "save_every", "lr", "clip")
    if wrong := [name for name in positive if not getattr(config, name) > 0]:
        p.error(f"--{wrong[0]} must be positive")
    for name in ("data", "init", "vae_path", "t5_path", "tokenizer_path", "mask_token"):
        if (path := getattr(config, name)) and not Path(path).exists():
            p.error(f"--{name} {path}: no such file or folder")
    for name in ("data", "vae_path", "t5_path", "tokenizer_path"):
        made_by_the_run = config.train_scenes if name == "data" else config.vae_steps
        if not made_by_the_run and not getattr(config, name):
            p.error(f"--{name} is needed: this preset does not make one ({TrainConfig.__dataclass_fields__[name].metadata['help']})")
    if not config.data and (config.test_scenes <= 0 or config.sampling.image_size != shapes.SIZE):
        p.error(f"the shapes world needs --test_scenes above 0 and --sampling.image_size {shapes.SIZE}")
    return config


def read_config(file: Path) -> TrainConfig:
    """The configuration that a run was started with. Raises ValueError naming the file."""
    values = read_json(file.read_bytes(), str(file))
    for name, hint in typing.get_type_hints(TrainConfig).items():
        if dataclasses.is_dataclass(hint) and name in values:
            values[name] = make_config(hint, values[name], str(file))
    return make_config(TrainConfig, values, str(file))


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(argv)
    run, ranks = Path(config.out), start_ranks()
    try:
        mean_over_ranks(torch.zeros(1, device=ranks.device), ranks)     # no rank is still reading its arguments
        if ranks.first:
            run.mkdir(parents=True, exist_ok=True)
            write_atomically(run / "run.json", lambda file: file.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n"))
            prepare(config, run)
        if ranks.world > 1:
            dist.barrier()
        parts = prepare(config, run)
        with timed(run, "model") if ranks.first else contextlib.nullcontext(), caught_signals() as signals:
            finished = train(config, ranks, parts, run, signals)
        if ranks.first and finished and parts.test:
            print_scores(evaluate_run(run, ranks.device))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted; continue with: python train.py --resume --out {run}")
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.barrier()                                      # nobody leaves while another still talks to it
            dist.destroy_process_group()
    if not ranks.first:
        return
    if not finished:
        print(f"stopped at a checkpoint; continue with: python train.py --resume --out {run}")
        return
    print(f"finished: {newest_checkpoint(run)}")
    if parts.test:
        prompt = "a large red circle at the top left and a small blue square at the center on a gray background"
        print(f"\nthe report: {run}/report.html    the samples: {run}/samples.png    try next:\n"
              f'  python sample.py --run {run} "{prompt}"\n'
              f"  python sample.py --run {run} --describe {run}/data/images/test/000002.png")


if __name__ == "__main__":
    main()
