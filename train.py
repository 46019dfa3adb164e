"""Training UniAlignment (arXiv 2509.23760, section 3): one loop for the tiny model on a laptop and the 2B model on many GPUs.

    python train.py                                     every task of the shapes world, from nothing to a report, on two CPU cores
    python train.py --resume                            continue an interrupted run, exactly where it was
    python train.py --stage 1                           the paper's stages one by one: pairs; all tasks; fine-tuning with questions;
    python train.py --stage 2                           each starts from the run of the one before (another one: --init FOLDER)
    torchrun --nproc_per_node 8 train.py --preset sd3 --stage 1 --data pairs.jsonl --init sd3_medium.safetensors \\
        --vae_path sd3/vae --t5_path sd3/text_encoder_3 --tokenizer_path spiece.model --teacher_path Qwen2.5-VL-7B-Instruct

A preset is a `TrainConfig`; every field of it is a command-line option. Results go to --out: checkpoint-*/ (model, EMA and
optimizer as safetensors), metrics.jsonl, and for the shapes world samples.png, scores.json and report.html.
"""
import argparse
import contextlib
import copy
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import typing
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import shapes
import tiny
from checkpoint import Checkpoint, make_config, read_json, save, write_atomically
from data import Batch, BatchOrder, Example, Tasks, load_image, parse_weights, read_jsonl, to_pictures
from evaluate import evaluate_run, print_scores, read_seconds
from losses import contrastive_loss, flow_matching_loss, intrinsic_loss, masked_token_loss, total_loss
from model import MMDiT, MMDiTConfig, Output
from muon import Muon
from sample import SampleSettings, averaged_weights
from teacher import load_teacher
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
    data: str = _field("", "JSONL files, separated by commas, or the folder of a shapes world; empty: the shapes world is made")
    weights: str = _field("*=1", "shares of the tasks' batches, TASK=NUMBER,...; *: every task that is not named")
    captioned: str = _field("*", "tasks whose captions train the text branch, TASK,...; *: every one; answers always do")
    init: str = _field("", "what to start from: an MM-DiT checkpoint (SD3, UniAlignment or own), or the folder of a run, which then "
                           "brings its frozen parts and its shapes world as well; empty: random weights")
    vae_path: str = _field("", "autoencoder checkpoint; empty: one is trained on shapes")
    t5_path: str = _field("", "T5 encoder checkpoint; empty: a random one, frozen")
    tokenizer_path: str = _field("", "sentencepiece model; empty: one is trained on the texts of the data")
    teacher_path: str = _field("", "folder of Qwen2.5-VL for the intrinsic alignment; empty: a small one is trained on shapes")
    mask_token: str = _field("", "the .pth with the trained mask embedding of the released T5, if any")
    model: MMDiTConfig = MMDiTConfig()
    vae: VAEConfig = field(default_factory=VAEConfig)
    text_encoder: T5Config = field(default_factory=T5Config)
    sampling: SampleSettings = SampleSettings()
    train_scenes: int = _field(0, "size of the shapes world")
    test_scenes: int = _field(0, "held-out scenes, all of which are scored at the end")
    vae_steps: int = _field(0, "training steps of the tiny autoencoder")
    teacher_steps: int = _field(0, "training steps of the tiny teacher")
    steps: int = _field(80_000, "optimizer steps")
    batch_size: int = _field(8, "examples per rank and micro batch; a pair is one sample of both branches")
    accumulation: int = _field(4, "micro batches per step")
    lr: float = _field(3e-5, "of AdamW")
    muon_lr: float = _field(0.0, "of Muon, for the matrices of the blocks; 0: AdamW for everything")
    muon_every: int = _field(1, "Muon moves a matrix in each so-many-th step, then as many times as far")
    weight_decay: float = _field(0.01, "of AdamW")
    beta2: float = _field(0.999, "of AdamW")
    warmup: int = _field(1000, "steps of linear warm-up")
    decay: bool = _field(False, "linear decay to zero at the end, else constant")
    clip: float = _field(2.0, "norm of the mean gradient")
    ema: float = _field(0.9995, "decay of the averaged weights")
    ema_every: int = _field(1, "the averaged weights follow in each so-many-th step, then as far as in so many")
    sigma_mean: float = _field(0.0, "of the logit of sigma, whose spread is 1; more than 0: noisier pictures, of which a prompt says more")
    prompt_dropout: float = _field(0.1, "share of empty prompts in the image branch, for guidance")
    text_weight: float = _field(0.2, "of equation (2) in equation (5)")
    answer_weight: float = _field(0.2, "the same where only an answer counts: one or a few words, but averaged over all positions")
    cross_weight: float = _field(0.05, "of equation (3) in equation (5)")
    cross_temperature: float = _field(0.07, "of equation (3)")
    cross_unseen: bool = _field(False, "equation (3) between streams that have not seen the other side: two more passes, of the picture "
                                       "with an empty text and of the caption without a picture")
    intrinsic_weight: float = _field(0.1, "of equation (4) in equation (5)")
    align_depth: int = _field(8, "block after which equation (4) looks at both streams")
    released_loss: bool = _field(False, "the released form of equation (1): sigma^2 times the paper's")
    autocast: bool = _field(True, "bfloat16 matrix products, float32 weights")
    gradient_checkpointing: bool = _field(False, "recompute blocks in the backward pass: less memory, a quarter slower")
    cache_latents: bool = _field(False, "encode every picture once at the start and keep its mean latents in memory")
    workers: int = _field(4, "processes that load pictures")
    log_every: int = _field(20, "steps per line of metrics.jsonl")
    save_every: int = _field(1000, "steps per checkpoint; the last one is kept")
    keep: tuple[int, ...] = _field((), "steps whose averaged weights are kept for good, as kept-*.safetensors")


_TINY = TrainConfig(                 # both vocabulary sizes become those of the tokenizer that the run trains
    out="runs/tiny",
    weights="text_to_image=5,edits=12.6,edges=1.8,depth=0.3,pose=0.5,personalisation=2,questions=6.5", captioned="text_to_image",
    model=MMDiTConfig(width=128, depth=4, num_heads=4, text_dim=128, position_table=8, qk_norm=True, text_positions=32,
                      number_references=True, exact_gelu=True, align_dims=(256, 128), align_silu=False),
    vae=tiny.VAE_CONFIG,
    text_encoder=T5Config(dim=128, head_dim=32, ff_dim=256, depth=2, num_heads=4),
    sampling=SampleSettings(image_size=64, text_length=32, prompt_multiple=16, steps=20, guidance=2.0, image_guidance=1.5, shift=1.0,
                            text_steps=16),
    train_scenes=30_000, test_scenes=510, vae_steps=tiny.VAE_STEPS, teacher_steps=tiny.TEACHER_STEPS, steps=35_000, batch_size=16,
    accumulation=1, text_weight=0.5, answer_weight=1.0, lr=5e-3, muon_lr=0.025, muon_every=4, beta2=0.95, weight_decay=0.0, warmup=100,
    decay=True, clip=1.0, ema=0.998, ema_every=4, align_depth=2, sigma_mean=1.4, cache_latents=True, workers=0, log_every=50,
    save_every=1000)

PRESETS = {
    "tiny": _TINY,
    "mini": replace(_TINY, out="runs/mini", train_scenes=1200, test_scenes=12, vae_steps=300, teacher_steps=30, steps=300,
                    save_every=100),
    "sd3": replace(TrainConfig(), gradient_checkpointing=True, model=MMDiTConfig(align_dims=(2048, 3584), align_silu=False)),
}


def stage(config: TrainConfig, number: int) -> TrainConfig:
    """The paper's stage 1, 2 or 3 (section 3) of a preset: pairs; all tasks but questions; fine-tuning on everything, which takes
    3/8 of the steps. Each starts from the run of the one before.
    """
    weights = {1: "text_to_image=1", 2: f"{config.weights},questions=0", 3: config.weights}[number]
    steps = config.steps * 3 // 8 if number == 3 else config.steps
    return replace(config, weights=weights, steps=steps, out=f"{config.out}-stage{number}",
                   init=f"{config.out}-stage{number - 1}" if number > 1 else "")


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
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))       # the others wait while the first prepares
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
    """AdamW, and with muon_lr Muon for the 2-D weights of the blocks (momentum made orthogonal)."""
    matrices = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2 and "modulation" not in n]
    matrices = matrices if config.muon_lr else []
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, config.muon_lr, every=config.muon_every))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float, every: int) -> None:
    """Exponential moving average of the weights, in each `every`-th step, with a shorter memory at the beginning."""
    if step % every:
        return
    decay = min(decay, (1 + step) / (10 + step)) ** every
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


class Corrupted(typing.NamedTuple):
    """A micro batch as both branches get it. What belongs to a branch that the batch does not have is None."""
    latents: Tensor                 # (B, C, H, W) clean
    references: tuple[Tensor, ...]  # (B, C, H, W) each, the clean latents of the source pictures
    noise: Tensor | None            # (B, C, H, W) e
    sigma: Tensor | None            # (B,)
    prompts: Tensor | None          # (B, L, D) from T5, some of them empty
    tokens: Tensor | None           # (B, L) what the text branch is to write
    mask: Tensor | None             # (B, L) where it was hidden
    answer: Tensor | None           # (B, L) what of it counts
    t: Tensor | None                # (B,) with which probability it was hidden
    masked: Tensor | None           # (B, L, D) from T5
    features: tuple[Tensor, Tensor] | None      # (B, d) each, the teacher's of picture and caption
    captions: Tensor | None         # (B, L, D) from T5, nothing hidden; for the contrast of streams that have not seen each other
    empty: Tensor | None            # (B, L, D) from T5

    @property
    def clean(self) -> Tensor:
        """The timestep (B,) of a picture without noise."""
        return self.latents.new_zeros(len(self.latents))


@torch.no_grad()
def corrupt(batch: Batch, latents: Tensor, text_encoder: T5Encoder, mask_id: int, empty: Tensor, generator: torch.Generator,
            config: TrainConfig) -> Corrupted:
    """Noise for the image branch, masks for the text branch, and T5 of all texts in one pass.

    latents (B, 1 + R, C, H, W) clean, of the picture and its sources; empty (1, L) the empty prompt. The image branch is to see
    noisy latents, the sources and the clean prompt, the text branch clean latents and the masked text.
    """
    latents, *references = latents.unbind(1)
    b, device, texts = len(latents), latents.device, {}
    noise = sigma = mask = t = None
    if batch.prompts is not None:
        sigma = (config.sigma_mean + torch.special.ndtri(stratified(b, generator).clamp(1e-4, 1 - 1e-4))).sigmoid()    # (B,)
        noise = torch.randn(latents.shape, generator=generator, device=device)                               # (B, C, H, W)
        dropped = torch.rand(b, generator=generator, device=device) < config.prompt_dropout                  # (B,)
        texts["prompts"] = torch.where(dropped[:, None], empty[:, :batch.prompts.shape[1]], batch.prompts)   # (B, L')
    if batch.tokens is not None:
        t = 0.001 + 0.999 * stratified(b, generator)                                                         # (B,) in (0, 1]
        mask = batch.answer & (torch.rand(batch.tokens.shape, generator=generator, device=device) < t[:, None])   # (B, L)
        texts["masked"] = torch.where(mask, mask_id, batch.tokens)                                           # (B, L)
    if config.cross_unseen and len(texts) == 2:
        texts |= {"captions": batch.tokens, "empty": empty.expand_as(batch.tokens)}                          # (B, L)
    if len({ids.shape for ids in texts.values()}) == 1:
        encoded = dict(zip(texts, text_encoder(torch.cat(list(texts.values()))).split(b)))                   # (B, L, D) each
    else:                                                       # a short prompt beside a caption
        encoded = {name: text_encoder(ids) for name, ids in texts.items()}                                   # (B, L' or L, D)
    return Corrupted(latents, tuple(references), noise, sigma, encoded.get("prompts"), batch.tokens, mask, batch.answer, t,
                     encoded.get("masked"), batch.features, encoded.get("captions"), encoded.get("empty"))


class Objective(nn.Module):
    """Equations (1) to (5) of a micro batch, whatever its task. A module, because DistributedDataParallel wants to see one forward
    pass for each backward pass, and the two branches do not always fit into one batch of the model.
    """

    def __init__(self, model: MMDiT, config: TrainConfig):
        super().__init__()
        self.model, self.config = model, config

    def branches(self, c: Corrupted) -> tuple[Output | None, Output | None]:
        """The outputs of the image branch and of the text branch: of one pass, unless source pictures make the former longer."""
        b = len(c.latents)
        depth = self.config.align_depth if c.features else None
        if c.noise is not None:
            noisy = torch.lerp(c.latents, c.noise, c.sigma.view(-1, 1, 1, 1))                 # (B, C, H, W) (1 - sigma) x + sigma e
        if c.noise is not None and c.masked is not None and not c.references:
            out = self.model(torch.cat([noisy, c.latents]), torch.cat([c.prompts, c.masked]), torch.cat([1000 * c.sigma, c.clean]),
                             align_depth=depth, want={"velocity": slice(0, b), "logits": slice(b, 2 * b)})
            return (out if depth is None else out._replace(image_mid=out.image_mid[:b], text_mid=out.text_mid[b:]),) * 2
        drawn = written = None
        if c.noise is not None:
            drawn = self.model(noisy, c.prompts, 1000 * c.sigma, c.references, align_depth=depth, want=("velocity",))
        if c.masked is not None:
            written = self.model(c.latents, c.masked, c.clean, align_depth=depth, want=("logits",))
        return drawn, written

    def forward(self, c: Corrupted) -> dict[str, Tensor]:
        """The losses by name, `loss` being their sum of equation (5)."""
        drawn, written = self.branches(c)
        config, found = self.config, {}
        if drawn:
            found["flow_matching"] = flow_matching_loss(drawn.velocity, c.noise, c.latents, c.sigma if config.released_loss else None)
        if written:
            found["masked_token"] = masked_token_loss(written.logits, c.tokens, c.mask, c.t, c.answer)
        if drawn and written and config.cross_weight:
            image_hidden, text_hidden = drawn.image_hidden, written.text_hidden               # (B, N, D), (B, L, D)
            if config.cross_unseen:
                image_hidden = self.model(c.latents, c.empty, c.clean, want=("velocity",)).image_hidden
                text_hidden = self.model(None, c.captions, c.clean, want=("logits",)).text_hidden
            found["contrastive"] = contrastive_loss(image_hidden, text_hidden, config.cross_temperature)
        if drawn and written and c.features:
            found["intrinsic"] = intrinsic_loss(drawn.image_mid, c.features[0], written.text_mid, c.features[1])
        text_weight = config.text_weight if drawn else config.answer_weight                   # without a prompt it is a question
        found["loss"] = total_loss(*(found.get(name, 0.0) for name in ("flow_matching", "masked_token", "contrastive", "intrinsic")),
                                   text_weight, config.cross_weight, config.intrinsic_weight)
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


# ---------------------------------------------------------------- what is prepared before the training

class Parts(typing.NamedTuple):
    """Where the frozen parts of a run are, and its data."""
    data: tuple[Path, ...]
    test: Path | None               # of a shapes world
    tokenizer: Path
    vae: Path
    text_encoder: Path
    teacher: Path


def parts_of(config: TrainConfig, run: Path) -> Parts:
    """What the configuration names, and in the run's folder what it does not."""
    world = Path(config.data or run / "data")
    is_world = not config.data or world.is_dir()
    data = (world / "train.jsonl",) if is_world else tuple(Path(path) for path in config.data.split(","))
    return Parts(data, world / "test.jsonl" if is_world else None, Path(config.tokenizer_path or run / "tokenizer.model"),
                 Path(config.vae_path or run / "vae.safetensors"), Path(config.t5_path or run / "text_encoder.safetensors"),
                 Path(config.teacher_path or run / "teacher"))


@contextlib.contextmanager
def timed(run: Path, phase: str):
    """Add the seconds of a phase to the run's seconds.json."""
    start = time.time()
    yield
    seconds = read_seconds(run)
    seconds[phase] = round(seconds.get(phase, 0.0) + time.time() - start, 1)
    write_atomically(run / "seconds.json", lambda f: f.write_text(json.dumps(seconds)))


def missing_parts(config: TrainConfig, run: Path) -> list[str]:
    """What the configuration gives no path for and no earlier start of the run has made."""
    parts = parts_of(config, run)
    missing = {"world": not config.data and not parts.test.exists(),
               "tokenizer": not config.tokenizer_path and not parts.tokenizer.exists(),
               "text encoder": not config.t5_path and not parts.text_encoder.exists(),
               "vae": not config.vae_path and not parts.vae.exists(),
               "teacher": config.intrinsic_weight and not config.teacher_path and not (parts.teacher / "model.safetensors").exists()}
    return [name for name, absent in missing.items() if absent]


def prepare(config: TrainConfig, run: Path) -> None:
    """Make the missing parts."""
    parts, missing = parts_of(config, run), missing_parts(config, run)
    if "world" in missing:
        with timed(run, "world"):
            shapes.make_world(run / "data", config.train_scenes, config.test_scenes, config.seed)
    if "tokenizer" in missing:
        with timed(run, "tokenizer"):
            examples = [e for path in parts.data for e in read_jsonl(path)]
            texts = dict.fromkeys(text for e in examples for text in (e.prompt, e.question, e.caption) if text)
            tiny.train_tokenizer(list(texts), parts.tokenizer)
    tokenizer = T5Tokenizer(parts.tokenizer)
    if "text encoder" in missing:
        torch.manual_seed(config.seed)
        t5_config = replace(config.text_encoder, vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id)
        save(parts.text_encoder, T5Encoder(t5_config).state_dict(), t5_config)
    if "vae" in missing:
        with timed(run, "vae"):
            tiny.train_vae(config.vae, config.vae_steps, config.seed, config.autocast, parts.vae)
    if "teacher" in missing:
        with timed(run, "teacher"):
            tiny.train_teacher(config.teacher_steps, config.seed, config.autocast, parts.tokenizer, parts.teacher)


def prepare_apart(config: TrainConfig, run: Path) -> None:
    """`prepare` in a process of its own, whose memory (2 GB more than the training needs) goes back with it."""
    if missing_parts(config, run):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(prepare, config, run).result()


@torch.no_grad()
def encode_all(dataset: Tasks, vae: VAE, device: torch.device, autocast: bool) -> Tensor:
    """Mean latents of every picture of a dataset, (n, C, h, w) float32 on the CPU."""
    chunks = [dataset.paths[i:i + 64] for i in range(0, len(dataset.paths), 64)]
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        return torch.cat([vae.encode(torch.stack([load_image(path, dataset.image_size) for path in chunk]).to(device)).float().cpu()
                          for chunk in tqdm(chunks, desc="encoding pictures", unit="batch", leave=False)])


def teacher_features(examples: list[Example], teacher_path: Path, folder: Path, image_size: int, width: int,
                     device: torch.device) -> tuple[Tensor, Tensor]:
    """The teacher's features (n, width) of the examples' pictures and captions, float16, computed once and kept in `folder`.

    The name of the cache tells the teacher, pictures and captions that it was made of. Raises ValueError for a teacher of
    another width.
    """
    def check(found: int, path: Path) -> None:
        if found != width:
            raise ValueError(f"{path}: features of width {found}, the model's alignment heads have {width}; change "
                             "--model.align_dims, or --intrinsic_weight 0")

    files = [*teacher_path.glob("*"), *(e.image for e in examples)]
    states = [(file.name, file.stat()) for file in files]
    made_of = [f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states] + [e.caption for e in examples]
    cache = folder / f"teacher-{zlib.crc32(repr((image_size, made_of)).encode()):08x}.safetensors"
    if cache.exists():
        file = Checkpoint(cache)
        check(file.shape("image")[1], cache)
        return file.read("image", torch.float16), file.read("text", torch.float16)
    teacher, images, texts = load_teacher(teacher_path, torch.bfloat16 if device.type == "cuda" else torch.float32, device), [], []
    check(teacher.out_dim, teacher_path)
    for i in tqdm(range(0, len(examples), 64), desc="teacher", unit="batch", leave=False):
        chunk = examples[i:i + 64]
        pictures = to_pictures(torch.stack([load_image(e.image, image_size) for e in chunk]))                # (b, H, W, 3)
        images.append(teacher.image_features(list(pictures)).half().cpu())
        texts.append(teacher.text_features([e.caption for e in chunk]).half().cpu())
    features = {"image": torch.cat(images), "text": torch.cat(texts)}                         # (n, d) each
    save(cache, features)
    return features["image"], features["text"]


# ---------------------------------------------------------------- the training loop

class Metrics:
    """metrics.jsonl: one line each `log_every` steps, means over the micro batches and ranks since the last one."""

    def __init__(self, path: Path, step: int, ranks: Ranks):
        self.path, self.ranks, self.sums = path, ranks, {}
        if ranks.first and path.exists():                       # what a resumed run does again goes, and a line that a kill cut off
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            write_atomically(path, lambda file: file.write_text("".join(line + "\n" for line in kept)))

    def add(self, task: str, values: dict[str, Tensor]) -> None:
        """Every loss, over all tasks and for this one; every rank has the same task."""
        for name, value in values.items():
            for key in (name, f"{task}.{name}") if name != "loss" else (name,):
                entry = torch.stack([value.detach().float(), torch.ones_like(value, dtype=torch.float32)])   # (2,) sum and count
                self.sums[key] = self.sums[key] + entry if key in self.sums else entry

    def state(self) -> dict[str, Tensor]:
        """The sums of an unfinished line, for a checkpoint; every rank must call it."""
        return {name: mean_over_ranks(value.clone(), self.ranks) for name, value in self.sums.items()}

    def load_state(self, state: dict[str, Tensor], device: torch.device) -> None:
        self.sums = {name: value.to(device) for name, value in state.items()}

    def write(self, step: int, **extra: float) -> dict[str, float]:
        sums = mean_over_ranks(torch.stack(list(self.sums.values())), self.ranks)             # (names, 2)
        line = {"step": step} | {name: round(mean, 6) for name, mean in zip(self.sums, (sums[:, 0] / sums[:, 1]).tolist())} | extra
        self.sums = {}
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


def load_tasks(config: TrainConfig, parts: Parts, tokenizer: T5Tokenizer, ranks: Ranks) -> Tasks:
    """The data in its tasks, whose shares the first rank prints."""
    dataset = Tasks([e for path in parts.data for e in read_jsonl(path)], tokenizer, config.sampling.image_size,
                    config.sampling.text_length, config.weights, config.captioned, config.sampling.prompt_multiple)
    if ranks.first:
        shares = {}
        for group in dataset.groups:
            shares[group.task] = shares.get(group.task, 0) + group.weight
        tqdm.write("tasks: " + ", ".join(f"{task} {share / sum(shares.values()):.0%}" for task, share in shares.items())
                   + (f"; not trained: {', '.join(dataset.left_out)}" if dataset.left_out else ""))
    return dataset


def align(dataset: Tasks, config: TrainConfig, parts: Parts, width: int, ranks: Ranks) -> None:
    """Give the data the teacher's features. The first rank computes them, the others wait and read its cache."""
    aligned = [dataset.examples[i] for i in dataset.aligned]
    folder = parts.data[0].parent if os.access(parts.data[0].parent, os.W_OK) else Path(config.out)
    for turn in (ranks.first, not ranks.first):
        if turn and aligned:
            dataset.features = teacher_features(aligned, parts.teacher, folder, config.sampling.image_size, width, ranks.device)
        if ranks.world > 1:
            dist.barrier()


def load_models(config: TrainConfig, vocab_size: int, resumed: Path | None, device: torch.device) -> tuple[MMDiT, MMDiT]:
    """The model and its average: from the run's checkpoint, from --init, or fresh."""
    torch.manual_seed(config.seed)                              # an SD3 checkpoint too leaves tensors to be initialised
    if resumed:
        model, average = (MMDiT.from_pretrained(resumed / f"{name}.safetensors") for name in ("model", "ema"))
    elif config.init:
        path = averaged_weights(Path(config.init)) or config.init
        heads = {} if MMDiT.from_pretrained(path, device="meta").config.align_dims or not config.intrinsic_weight else {
            "align_dims": config.model.align_dims, "align_silu": config.model.align_silu}     # SD3 has none: fresh ones
        model = MMDiT.from_pretrained(path, **heads)
        average = copy.deepcopy(model)
    else:
        model = MMDiT(replace(config.model, vocab_size=vocab_size))
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
    if config.intrinsic_weight and not (c.align_dims and 1 <= config.align_depth <= c.depth):
        raise ValueError(f"--align_depth {config.align_depth}, --model.align_dims {c.align_dims}: the intrinsic alignment needs two "
                         f"widths of its heads, and one of the model's blocks 1 to {c.depth}; or --intrinsic_weight 0")


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


def train(config: TrainConfig, ranks: Ranks, parts: Parts, run: Path) -> bool:
    """Train to config.steps from the newest checkpoint of the run, or from the start; False if SIGINT or SIGTERM stopped it."""
    device, resumed = ranks.device, newest_checkpoint(run)
    tokenizer, text_encoder, vae = load_frozen(config, parts, device)
    dataset = load_tasks(config, parts, tokenizer, ranks)
    model, average = load_models(config, tokenizer.vocab_size, resumed, device)
    check_parts(config, model, text_encoder, vae, tokenizer)
    if config.intrinsic_weight:
        align(dataset, config, parts, model.config.align_dims[1], ranks)
    optimizers = make_optimizers(model, config)
    step, seconds, unfinished = load_optimizers(optimizers, resumed, ranks.world) if resumed else (0, 0.0, None)
    if config.cache_latents and step < config.steps:
        dataset.latents = encode_all(dataset, vae, device, config.autocast)
    objective = Objective(model, config)
    wrapped = objective
    if ranks.world > 1:
        wrapped = DistributedDataParallel(objective, find_unused_parameters=True, forward_sync_buffers=False)
    order = BatchOrder(dataset.groups, config.batch_size, config.seed, ranks.rank, ranks.world, step * config.accumulation)
    batches = iter(DataLoader(dataset, batch_sampler=order, num_workers=config.workers, collate_fn=_as_it_is,
                              worker_init_fn=_leave_signals_to_the_main_process))
    empty = tokenizer([""], length=config.sampling.text_length).to(device)                    # (1, L)
    metrics = Metrics(run / "metrics.jsonl", step, ranks)
    if resumed:
        metrics.load_state(unfinished, device)

    start = time.time() - seconds
    bar = tqdm(total=config.steps, initial=step, desc="training", unit="step", disable=not ranks.first)
    with caught_signals() as signals:
        while step < config.steps:
            for micro in range(config.accumulation):
                batch = next(batches).to(device)
                generator = torch.Generator(device).manual_seed(noise_seed(config, step, micro, ranks.rank))
                latents = batch.latents                                                           # (B, 1 + R, C, H, W)
                if latents is None:
                    latents = vae.encode(batch.pictures.flatten(0, 1), sample=True, generator=generator).float()
                    latents = latents.unflatten(0, batch.pictures.shape[:2])
                last = micro == config.accumulation - 1
                with contextlib.nullcontext() if last or ranks.world == 1 else wrapped.no_sync():
                    with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
                        found = wrapped(corrupt(batch, latents, text_encoder, tokenizer.mask_id, empty, generator, config))
                    (found["loss"] / config.accumulation).backward()
                metrics.add(batch.task, found)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            if not norm.isfinite():
                raise SystemExit(f"step {step}: the gradient is not finite ({norm.item()}); lower --lr or --muon_lr. "
                                 f"The last good checkpoint is in {run}")
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * learning_rate_scale(step, config)
                optimizer.step()
                optimizer.zero_grad()
            update_average(average, model, step, config.ema, config.ema_every)
            step += 1
            bar.update()

            if step % config.log_every == 0 or step in (*config.keep, config.steps):
                line = metrics.write(step, grad_norm=round(norm.item(), 4), seconds=round(time.time() - start, 1))
                bar.set_postfix({name: f"{line[name]:.3f}" for name in ("flow_matching", "masked_token") if name in line})
            stopping = mean_over_ranks(torch.tensor(float(len(signals)), device=device), ranks).item() > 0    # one rank's signal stops all
            if step in config.keep and ranks.first:
                save(run / f"kept-{step:08d}.safetensors", average.state_dict(), average.config)
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
    first.add_argument("--stage", type=int, choices=(1, 2, 3))
    known = first.parse_known_args(argv)[0]
    preset = stage(PRESETS[known.preset], known.stage) if known.stage else PRESETS[known.preset]
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                usage="train.py [-h] [--preset NAME] [--stage 1|2|3] [--resume] [--FIELD VALUE ...]")
    p.add_argument("--preset", choices=PRESETS, default="tiny",
                   help="which defaults to start from, tiny if not given; the defaults shown below are those of the chosen one")
    p.add_argument("--stage", type=int, choices=(1, 2, 3),
                   help="one of the paper's stages: pairs; all tasks but questions; fine-tuning on everything. It changes the defaults "
                        "of --weights, --steps, --out and --init (the run of the stage before); none: everything at once")
    p.add_argument("--resume", action="store_true", help="continue the run in --out, with the configuration it was started with")
    _add_fields(p.add_argument_group("fields of the configuration"), TrainConfig, preset)
    values = vars(p.parse_args(argv))
    del values["preset"], values["stage"]
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
        if getattr(config, path) and (given := [v for v in values if v.startswith(group) and not v.startswith("model.align_")]):
            p.error(f"--{given[0]} has no effect beside --{path}: the checkpoint brings its own configuration; remove one of them")
    positive = ("steps", "batch_size", "accumulation", "log_every", "save_every", "lr", "clip", "cross_temperature", "muon_every")
    if wrong := [name for name in positive if not getattr(config, name) > 0]:
        p.error(f"--{wrong[0]} must be positive")
    try:
        parse_weights(config.weights)
        config = inherit(config, values)
    except ValueError as error:
        p.error(str(error))
    for name in ("data", "init", "vae_path", "t5_path", "tokenizer_path", "teacher_path", "mask_token"):
        if missing := [path for path in getattr(config, name).split(",") if path and not Path(path).exists()]:
            p.error(f"--{name} {missing[0]}: no such file or folder")
    makes = {"data": config.train_scenes, "vae_path": config.vae_steps, "t5_path": config.vae_steps, "tokenizer_path": config.vae_steps,
             "teacher_path": config.teacher_steps or not config.intrinsic_weight}
    if needed := [name for name, made_by_the_run in makes.items() if not made_by_the_run and not getattr(config, name)]:
        p.error(f"--{needed[0]} is needed: this preset does not make one ({TrainConfig.__dataclass_fields__[needed[0]].metadata['help']})")
    if not config.data and (config.test_scenes <= 0 or config.sampling.image_size != shapes.SIZE):
        p.error(f"the shapes world needs --test_scenes above 0 and --sampling.image_size {shapes.SIZE}")
    return config


def inherit(config: TrainConfig, given: dict) -> TrainConfig:
    """With the folder of a run as --init: its frozen parts and sizes, and its shapes world if no other data is named.

    given: the options of the command line. Raises ValueError for a run without a checkpoint.
    """
    run = Path(config.init)
    if not config.init or not (run / "run.json").is_file():
        return config
    if averaged_weights(run) is None:
        raise ValueError(f"--init {run}: this run has no checkpoint yet")
    before = read_config(run / "run.json")
    parts = parts_of(before, run)
    found = {"data": parts.data[0].parent if parts.test else "", "vae_path": parts.vae, "t5_path": parts.text_encoder,
             "tokenizer_path": parts.tokenizer, "mask_token": before.mask_token}
    if before.intrinsic_weight:
        found["teacher_path"] = parts.teacher
    if not any(name.startswith("sampling.") for name in given):
        config = replace(config, sampling=before.sampling)
    return replace(config, **{name: str(value) for name, value in found.items() if value and not getattr(config, name)})


def read_config(file: Path) -> TrainConfig:
    """The configuration that a run was started with. Raises ValueError naming the file."""
    values = read_json(file.read_bytes(), str(file))
    for name, hint in typing.get_type_hints(TrainConfig).items():
        if dataclasses.is_dataclass(hint) and name in values:
            values[name] = make_config(hint, values[name], str(file))
    return make_config(TrainConfig, values, str(file))


def write_config(config: TrainConfig, run: Path) -> None:
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run / "run.json", lambda file: file.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n"))


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(argv)
    run, ranks = Path(config.out), start_ranks()
    try:
        mean_over_ranks(torch.zeros(1, device=ranks.device), ranks)     # no rank is still reading its arguments
        if ranks.first:
            write_config(config, run)
            prepare_apart(config, run)
        if ranks.world > 1:
            dist.barrier()
        parts = parts_of(config, run)
        with timed(run, "model") if ranks.first else contextlib.nullcontext():
            finished = train(config, ranks, parts, run)
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
