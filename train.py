"""Training UniAlignment (arXiv 2509.23760, section 3): one loop from a laptop to many GPUs.

    python train.py                 every task of the shapes world, from scratch, on two CPU cores
    python train.py --resume        continue an interrupted run exactly where it was
    python train.py --stage 1       the paper's stages one by one: 1 pairs, 2 all tasks,
    python train.py --stage 2       3 fine-tuning with questions; each starts from the one before
    torchrun --nproc_per_node 8 train.py --preset sd3 --stage 1 --data pairs.jsonl \\
        --init sd3_medium.safetensors --vae_path sd3/vae --t5_path sd3/text_encoder_3 \\
        --tokenizer_path spiece.model --teacher_path Qwen2.5-VL-7B-Instruct
    python train.py --preset sd3 --estimate --gpus 8 --gpu H100     memory, FLOPs and hours

A preset is a `TrainConfig` (config.py); every field of it is an option. Results go to --out:
checkpoint-*/ (model, averaged weights and optimizer as safetensors), metrics.jsonl, and for the
shapes world samples.png, scores.json and report.html.
"""
import contextlib
import ctypes
import math
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from checkpoint import save
from config import Parts, RunFiles, TrainConfig, parse_arguments, parts_of, write_config
from data import Batch, BatchOrder, Tasks, number_of, to_pictures
from losses import (contrastive_loss, flow_matching_loss, intrinsic_loss, masked_token_loss,
                    total_loss)
from model import MMDiT, Output
from muon import Muon
from previews import read_requests, write_samples
from ranks import Ranks, explain, joined_ranks
from run_folder import (Features, Frozen, Metrics, Progress, Skipped, allowed_skips, check_parts,
                        check_resume, describe_shapes, describe_tasks, encode_all, encode_in_chunks,
                        features_folder, load_frozen, load_models, load_optimizers, load_tasks,
                        missing_parts, optimizer_state, save_checkpoint, teacher_features, timed,
                        unused_means)
from teacher import load_teacher
from text_encoder import T5Encoder
from vae import VAE


# ---------------------------------------------------------------- optimization

def learning_rate_scale(step: int, config: TrainConfig) -> float:
    """The factor of each learning rate: linear warm-up, then constant or a linear decay to zero."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return warm * (1 - step / config.steps if config.decay else 1.0)


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW; with muon_lr also Muon, for the matrices of the blocks except modulation.

    modulation_lr: AdamW moves each weight by about its learning rate, and a modulation sums over as
    many weights as the model is wide, so at a high rate a few steps change it by more than one. The
    model then learns to ignore the timestep, or its residual streams grow beyond use. The biases,
    which open the gates, keep the high rate.
    """
    matrices, modulations, others = [], [], []
    for name, parameter in model.named_parameters():
        is_modulation = "modulation.weight" in name or "time_embed" in name
        is_matrix = name.startswith("blocks.") and parameter.ndim == 2 and not is_modulation
        if is_matrix and config.muon_lr:
            matrices.append(parameter)
        elif is_modulation and config.modulation_lr:
            modulations.append(parameter)
        else:
            others.append(parameter)
    groups = [{"params": others}]
    if modulations:
        groups.append({"params": modulations, "lr": config.modulation_lr})
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(
        groups, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay,
        fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, config.muon_lr, every=config.muon_every))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def owners_of(sizes: list[int], world: int) -> list[int]:
    """The rank that owns each parameter: the largest first, each to the rank that has least."""
    owners, loads = [0] * len(sizes), [0] * world
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners


class Parameters:
    """The parameters of a model and their gradients. Each has a rank that updates it, its owner.

    Trick for memory (ZeRO, arXiv 1910.02054): an optimizer makes the state of a parameter in its
    first step with a gradient, so if only the owner has one, the state lies there alone.
    """

    def __init__(self, model: nn.Module, ranks: Ranks):
        self.all, self.ranks = list(model.parameters()), ranks
        owners = owners_of([p.numel() for p in self.all], ranks.world)
        self.owner_of = dict(zip(self.all, owners))
        self.owned = {p for p, owner in self.owner_of.items() if owner == ranks.rank}
        self.trained: set[Tensor] = set()                       # in this step, on all ranks
        if ranks.world > 1:
            for p in self.all:
                p.register_post_accumulate_grad_hook(self.trained.add)

    def clip(self, largest: float) -> Tensor:
        """Scale the gradients to a norm of at most `largest`. Returns what the norm was."""
        if self.ranks.world > 1:
            for p in self.all:
                if p not in self.trained:                       # zeros in DDP's buckets
                    p.grad = None
        return nn.utils.clip_grad_norm_(self.all, largest)

    @torch.no_grad()
    def update(self, optimizers: list[torch.optim.Optimizer], norm: Tensor) -> None:
        """Step the optimizers and forget the gradients, whose norm is given.

        Where that is not finite the weights stay as they are, without a look at it on the CPU.
        """
        gradients = {p: p.grad for p in self.all if p.grad is not None}
        for p in gradients:
            if p not in self.owned:
                p.grad = None
        for optimizer in optimizers:
            optimizer.found_inf = (~norm.isfinite()).float()    # as torch's GradScaler says so
            optimizer.step()
            optimizer.zero_grad()
        if self.ranks.world > 1:
            self.ranks.send([(p, self.owner_of[p]) for p in gradients])
            # They stay in DDP's buckets. New ones would lie beside those till the last micro batch.
            torch._foreach_zero_(list(gradients.values()))
            for p, gradient in gradients.items():
                p.grad = gradient
            self.trained.clear()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float,
                   every: int) -> None:
    """Exponential moving average of the weights: every N steps, with N steps' decay.

    Its memory is shorter at the beginning, so that it forgets the initial weights.
    """
    if step % every:
        return
    decay = min(decay, (1 + step) / (10 + step)) ** every
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


# ---------------------------------------------------------------- corruption

def stratified(n: int, generator: torch.Generator) -> Tensor:
    """Draw n numbers in [0, 1), one in each n-th part, in random order; (n,).

    Each number is uniform, but together they spread evenly. So the noise levels of a batch cover
    the whole range, and its loss varies less from batch to batch.
    """
    part = torch.randperm(n, generator=generator, device=generator.device)
    return (part + torch.rand(n, generator=generator, device=generator.device)) / n


def logit_normal_sigmas(n: int, mean: float, generator: torch.Generator) -> Tensor:
    """Draw n noise levels, logit(sigma) ~ N(mean, 1); (n,) in (0, 1)."""
    uniform = stratified(n, generator).clamp(1e-4, 1 - 1e-4)
    return (mean + torch.special.ndtri(uniform)).sigmoid()      # ndtri: inverse of the normal CDF


def sigma_mean_of(task: str, config: TrainConfig) -> float:
    """The mean of logit(sigma) of a task."""
    return number_of(config.mean_by_task, task, config.sigma_mean)


def noise_seed(config: TrainConfig, step: int, micro: int, rank: int) -> int:
    """The seed of a micro batch's noise: its place alone, so a resumed run needs no saved state."""
    return (((config.seed * 1_000_003 + step) * 1009 + micro) * 4099 + rank) % 2 ** 63


class Corrupted(NamedTuple):
    """A micro batch as both branches see it; None for a branch that the batch does not have."""
    latents: Tensor | None          # (B, C, H, W) clean, x; None: texts without pictures
    references: tuple[Tensor, ...]  # (B, C, H, W) each, clean latents of the source pictures
    # image branch
    noise: Tensor | None            # (B, C, H, W) e
    sigma: Tensor | None            # (B,)
    noisy: Tensor | None            # (B, C, H, W) z
    prompts: Tensor | None          # (B, L, D) from T5, some of them empty
    # text branch
    tokens: Tensor | None           # (B, L) clean ids
    mask: Tensor | None             # (B, L) bool, the positions that are masked
    answer: Tensor | None           # (B, L) bool, the positions that count
    t: Tensor | None                # (B,) masking probability
    masked: Tensor | None           # (B, L, D) from T5
    # alignment
    features: tuple[Tensor, Tensor] | None      # (B, d) each, of the teacher: image, caption
    captions: Tensor | None         # (B, L, D) from T5, unmasked; for cross_unseen
    empty: Tensor | None            # (B, L, D) from T5, the empty text; for cross_unseen

    @property
    def clean(self) -> Tensor:
        """The timestep (B,) of an image without noise."""
        return torch.zeros_like(self.t)


def encode_texts(text_encoder: T5Encoder, texts: dict[str, Tensor]) -> dict[str, Tensor]:
    """T5 of several batches of ids (B, L) by name: in one pass where all have one length."""
    if len({ids.shape for ids in texts.values()}) == 1:
        encoded = text_encoder(torch.cat(list(texts.values())))                     # (k B, L, D)
        return dict(zip(texts, encoded.chunk(len(texts))))                          # (B, L, D)
    return {name: text_encoder(ids) for name, ids in texts.items()}                 # (B, L, D)


@torch.no_grad()
def corrupt(batch: Batch, latents: Tensor | None, text_encoder: T5Encoder, mask_id: int,
            empty: Tensor, generator: torch.Generator, config: TrainConfig) -> Corrupted:
    """Noise the image of the image branch, mask the text of the text branch.

    latents (B, 1 + R, C, H, W) clean, of the image and its R sources, None without pictures; empty
    (1, L) the empty prompt. The image branch sees noisy latents, the sources and the clean prompt;
    the text branch sees clean latents and the masked text.
    """
    x, *references = [None] if latents is None else latents.unbind(1)               # (B, C, H, W)
    b, device = len(batch.tokens if x is None else x), empty.device
    noise = sigma = noisy = mask = t = None
    texts: dict[str, Tensor] = {}
    if batch.prompts is not None:
        sigma = logit_normal_sigmas(b, sigma_mean_of(batch.task, config), generator)    # (B,)
        noise = torch.randn(x.shape, generator=generator, device=device)            # (B, C, H, W)
        s = sigma.view(-1, 1, 1, 1)                                                 # (B, 1, 1, 1)
        noisy = (1 - s) * x + s * noise                         # z = (1 - sigma) x + sigma e
        dropped = torch.rand(b, generator=generator, device=device) < config.prompt_dropout
        no_prompt = empty[:, :batch.prompts.shape[1]]                               # (1, L')
        texts["prompts"] = torch.where(dropped[:, None], no_prompt, batch.prompts)  # (B, L')
    if batch.tokens is not None:
        t = 0.001 + 0.999 * stratified(b, generator)                                # (B,) in (0, 1]
        chance = torch.rand(batch.tokens.shape, generator=generator, device=device)     # (B, L)
        mask = batch.answer & (chance < t[:, None])                                 # (B, L)
        texts["masked"] = torch.where(mask, mask_id, batch.tokens)                  # (B, L)
    if config.cross_unseen and len(texts) == 2:
        texts |= {"captions": batch.tokens, "empty": empty.expand_as(batch.tokens)}     # (B, L)
    encoded = encode_texts(text_encoder, texts)
    return Corrupted(
        x, tuple(references),
        noise, sigma, noisy, encoded.get("prompts"),
        batch.tokens, mask, batch.answer, t, encoded.get("masked"),
        batch.features, encoded.get("captions"), encoded.get("empty"))


# ---------------------------------------------------------------- objective

class Objective(nn.Module):
    """Equations (1) to (5) of a micro batch, whatever its task.

    A module, because DistributedDataParallel expects one forward pass for each backward pass, and
    a batch may need two passes of the model.
    """

    def __init__(self, model: MMDiT, config: TrainConfig):
        super().__init__()
        self.model, self.config = model, config

    def branches(self, c: Corrupted) -> tuple[Output | None, Output | None]:
        """Outputs of the image branch and of the text branch."""
        depth = self.config.align_depth if c.features else None
        if c.noise is not None and c.masked is not None and not c.references:
            return self.branches_in_one_pass(c, depth)
        image_out = text_out = None
        if c.noise is not None:
            image_out = self.model(c.noisy, c.prompts, 1000 * c.sigma, c.references,
                                   align_depth=depth, want=("velocity",))
        if c.masked is not None:
            text_out = self.model(c.latents, c.masked, c.clean, align_depth=depth, want=("logits",))
        return image_out, text_out

    def branches_in_one_pass(self, c: Corrupted, depth: int | None) -> tuple[Output, Output]:
        """Both branches as one batch of 2 B: faster, as no source images lengthen one of them."""
        b = len(c.latents)
        out = self.model(
            torch.cat([c.noisy, c.latents]),                                        # (2 B, C, H, W)
            torch.cat([c.prompts, c.masked]),                                       # (2 B, L, D)
            torch.cat([1000 * c.sigma, c.clean]),                                   # (2 B,)
            align_depth=depth, want={"velocity": slice(0, b), "logits": slice(b, 2 * b)})
        if depth is not None:
            out = out._replace(image_mid=out.image_mid[:b], text_mid=out.text_mid[b:])
        return out, out

    def unseen_streams(self, c: Corrupted) -> tuple[Tensor, Tensor]:
        """Hidden states (B, N, D) and (B, L, D) of streams that have not seen the other side."""
        image_out = self.model(c.latents, c.empty, c.clean, want=("velocity",))
        text_out = self.model(None, c.captions, c.clean, want=("logits",))
        return image_out.image_hidden, text_out.text_hidden

    def forward(self, c: Corrupted) -> dict[str, Tensor]:
        """The losses by name; `loss` is their sum, equation (5)."""
        config, losses = self.config, {}
        image_out, text_out = self.branches(c)
        if image_out:
            losses["flow_matching"] = flow_matching_loss(
                image_out.velocity, c.noise, c.latents, c.sigma if config.released_loss else None)
        if text_out:
            losses["masked_token"] = masked_token_loss(
                text_out.logits, c.tokens, c.mask, c.t, c.answer)
        if image_out and text_out and config.cross_weight:
            hidden = image_out.image_hidden, text_out.text_hidden                   # (B, N | L, D)
            if config.cross_unseen:
                hidden = self.unseen_streams(c)
            losses["contrastive"] = contrastive_loss(*hidden, config.cross_temperature)
        if image_out and text_out and c.features:
            teacher_image, teacher_text = c.features                                # (B, d)
            losses["intrinsic"] = intrinsic_loss(
                image_out.image_mid, teacher_image, text_out.text_mid, teacher_text)
        is_question = image_out is None
        losses["loss"] = total_loss(
            losses.get("flow_matching", 0.0), losses.get("masked_token", 0.0),
            losses.get("contrastive", 0.0), losses.get("intrinsic", 0.0),
            config.answer_weight if is_question else config.text_weight,
            config.cross_weight, config.intrinsic_weight)
        return losses


# ---------------------------------------------------------------- preparation

def keep_freed_memory() -> None:
    """Let malloc keep what the process frees, with the C library of Linux; else nothing happens.

    Trick for speed on a CPU: a step allocates what the one before has freed. If malloc gave it back
    to the system, the first touch of each page would cost a third of a step (experiments/LOG.md).
    """
    trim_threshold, mmap_max = -1, -4                           # numbers from malloc.h
    with contextlib.suppress(OSError, AttributeError):
        malloc = ctypes.CDLL("libc.so.6")
        malloc.mallopt(trim_threshold, -1)                      # never
        malloc.mallopt(mmap_max, 0)                             # no block outside of the heap


def prepare_apart(config: TrainConfig, run: Path) -> None:
    """Make the missing parts in a process of their own, which gives 2 GB back when it ends."""
    if missing_parts(config, run):
        from experiments.parts import prepare
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(prepare, config, run).result()


def align(dataset: Tasks, config: TrainConfig, parts: Parts, width: int, ranks: Ranks) -> None:
    """Cache the teacher's features: each rank computes its shards, then all ranks open all."""
    if len(dataset.aligned):
        files = teacher_features(dataset, parts.teacher, features_folder(config, parts), width,
                                 ranks.device, ranks.rank, ranks.world)
        ranks.wait("features")
        dataset.features = Features(files, dataset.aligned)


def runs_teacher_online(config: TrainConfig, dataset: Tasks) -> bool:
    """Whether the teacher runs in every step: features of many pairs fill disks, not memory."""
    if config.teacher_online == "auto":
        return len(dataset.aligned) > 200_000 and not config.cache_latents
    if config.teacher_online == "true" and config.cache_latents:
        raise ValueError("--teacher_online true needs the pictures of every batch; add "
                         "--cache_latents false")
    return config.teacher_online == "true"


class Reported(Dataset):
    """A dataset that returns the errors of the data: a loader would add its whole traceback."""

    def __init__(self, dataset: Tasks):
        self.dataset = dataset

    def __getitems__(self, indices: list[int]) -> Batch | ValueError | OSError:
        try:
            return self.dataset.__getitems__(indices)
        except (ValueError, OSError) as error:
            return error


def _as_it_is(batch: Batch | ValueError | OSError) -> Batch | ValueError | OSError:
    return batch                            # the dataset returns whole batches


def _ignore_signals(worker: int) -> None:
    """Leave SIGINT and SIGTERM to the main process, which saves first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def load_batches(dataset: Tasks, config: TrainConfig, ranks: Ranks, start: int) -> Iterator[Batch]:
    """The endless batches of this rank, from batch number `start` on.

    Raises ValueError or OSError where the data is at fault, in one line.
    """
    order = BatchOrder(
        dataset.groups, config.batch_size, config.seed, ranks.rank, ranks.world, start)
    loader = DataLoader(Reported(dataset), batch_sampler=order, num_workers=config.workers,
                        collate_fn=_as_it_is, worker_init_fn=_ignore_signals,
                        pin_memory=ranks.device.type == "cuda")
    try:
        for batch in loader:
            if isinstance(batch, (ValueError, OSError)):
                raise batch
            yield batch
    finally:
        if hasattr(signal, "SIGCHLD"):          # torch's handler would raise for the kills
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for process in multiprocessing.active_children():
            process.kill()                  # they ignore SIGTERM, which exit would wait for


@torch.no_grad()
def batch_latents(batch: Batch, vae: VAE, generator: torch.Generator) -> Tensor | None:
    """Latents of the images and their sources: cached means, or drawn; (B, 1 + R, C, h, w).

    None for texts without pictures.
    """
    if batch.images is None:
        return batch.latents
    images = batch.images.flatten(0, 1)                                     # (B (1 + R), 3, H, W)
    latents = encode_in_chunks(vae, images, sample=True, generator=generator)
    return latents.unflatten(0, batch.images.shape[:2])                     # (B, 1 + R, C, h, w)


@torch.no_grad()
def online_features(batch: Batch, teacher: nn.Module) -> tuple[Tensor, Tensor]:
    """The teacher's features of a batch, computed in the step; (B, d) of images, of captions."""
    pictures = to_pictures(batch.images[:, 0])                              # (B, H, W, 3)
    return teacher.image_features(list(pictures)), teacher.text_features(batch.captions)


# ---------------------------------------------------------------- the loop

@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that they do not end the process."""
    signals: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, frame: signals.append(number)) for n in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Step(NamedTuple):
    """What a later look at the gradients of a step needs."""
    number: int
    norm: Tensor                            # of its gradient, on the device
    records: list[str]                      # of this rank


def check_norms(steps: list[Step], ranks: Ranks, run: Path) -> float:
    """Raise ValueError for the first step whose gradient was not finite, on all ranks.

    Returns the norm of the last one. Only before anything is written, since the CPU waits for the
    GPU here.
    """
    norms = torch.stack([step.norm for step in steps]).tolist()     # shared by all ranks
    for step, norm in zip(steps, norms):
        if not math.isfinite(norm):
            shown = ", ".join(sum(ranks.gather(step.records), []))
            raise ValueError(f"step {step.number}: the gradient is not finite ({norm}); lower "
                             f"--lr or --muon_lr, or look at the step's records: {shown}. The "
                             f"last good checkpoint is {RunFiles(run).newest_checkpoint()}")
    return norms[-1]


class Training(NamedTuple):
    """Everything that the loop works with."""
    frozen: Frozen
    dataset: Tasks
    skipped: Skipped
    teacher: nn.Module | None               # if it runs in every step
    model: MMDiT
    average: MMDiT | None                   # of the first rank
    parameters: Parameters
    optimizers: list[torch.optim.Optimizer]
    progress: Progress                      # where the checkpoint was, if there is one
    origin: dict[str, object]               # what a resumed run compares


def set_up(config: TrainConfig, ranks: Ranks, parts: Parts, run: Path) -> Training:
    """Load models and data, from the run's newest checkpoint or for a start. Checks come first."""
    device, files = ranks.device, RunFiles(run)
    checkpoint = files.newest_checkpoint()
    frozen = load_frozen(config, parts, device)
    model, average = load_models(config, frozen.tokenizer.vocab_size, checkpoint, device,
                                 ranks.first, frozen.text_encoder.config.dim)
    check_parts(config, model, frozen)
    if not ranks.first:
        ranks.wait("index")
    unit = frozen.vae.downscale * model.config.patch_size           # pixels per patch
    dataset = load_tasks(config, parts, frozen.tokenizer, unit)     # the first rank builds indexes
    if ranks.first:
        ranks.wait("index")
        shapes = [describe_shapes(dataset)] if dataset.cropped else []
        for line in [describe_tasks(dataset), *unused_means(dataset, config), *shapes,
                     *dataset.records.notes()]:
            tqdm.write(line)
    parameters, optimizers = Parameters(model, ranks), make_optimizers(model, config)
    origin = {"world": ranks.world, "data": dataset.records.digest,
              "global_batch": config.batch_size * config.accumulation * ranks.world}
    progress = Progress()
    if checkpoint:
        note = check_resume(checkpoint, **origin, new_data=config.new_data)
        if note and ranks.first:
            tqdm.write(note)
        progress = load_optimizers(optimizers, checkpoint, parameters.owned)
        if progress.step > config.steps:
            raise ValueError(f"--steps {config.steps}: {checkpoint} has more steps already")
    skipped = Skipped(files.skipped, progress.step,
                      allowed_skips(config.max_skipped, len(dataset.records)), ranks.first,
                      ranks.gather)
    skipped.add(dataset.records.unusable, progress.step)
    skipped.share(progress.step)
    teacher = None
    if config.intrinsic_weight and runs_teacher_online(config, dataset):
        dtype = torch.bfloat16 if device.type == "cuda" and config.autocast else torch.float32
        teacher = load_teacher(parts.teacher, dtype, device)
        if ranks.first:
            tqdm.write(f"the teacher runs in every step, for {len(dataset.aligned)} pairs")
    elif config.intrinsic_weight:
        align(dataset, config, parts, model.config.align_dims[1], ranks)
    if config.cache_latents and dataset.paths and progress.step < config.steps:
        dataset.latents = encode_all(dataset, frozen.vae, device, config.autocast)
    return Training(frozen, dataset, skipped, teacher, model, average, parameters, optimizers,
                    progress, origin)


def train(config: TrainConfig, ranks: Ranks, parts: Parts, run: Path) -> bool:
    """Train to config.steps, from the run's newest checkpoint or from the start.

    Returns False if SIGINT or SIGTERM stopped it; the run is then saved and can be resumed.
    """
    frozen, dataset, skipped, teacher, model, average, parameters, optimizers, progress, origin \
        = set_up(config, ranks, parts, run)
    tokenizer, text_encoder, vae = frozen
    device, files, step = ranks.device, RunFiles(run), progress.step
    objective = Objective(model, config)
    wrapped = objective
    if ranks.world > 1:
        # A task trains one head or both, so some parameters have no gradient in a step. The only
        # buffer is the fixed table of positions, which every rank has from the checkpoint.
        wrapped = DistributedDataParallel(
            objective, find_unused_parameters=True, forward_sync_buffers=False,
            gradient_as_bucket_view=True)
    batches = load_batches(dataset, config, ranks, step * config.accumulation)
    empty = tokenizer([""], length=config.sampling.text_length).to(device)          # (1, L)
    requests = []
    if config.sample_every and ranks.first:
        requests = read_requests(config, parts, dataset)
    metrics = Metrics(files.metrics if ranks.first else None, step, ranks.mean)
    metrics.load_state(progress.metrics, device)

    first_step, steps = step, []
    start = time.time() - progress.seconds
    bar = tqdm(total=config.steps, initial=step, desc="training", unit="step",
               disable=not ranks.first)
    with caught_signals() as signals, contextlib.closing(batches), contextlib.closing(bar):
        while step < config.steps:
            records: list[str] = []
            for micro in range(config.accumulation):
                batch = next(batches)
                skipped.add(batch.skipped, step)
                records += batch.records
                if teacher is not None and batch.captions and batch.prompts is not None:
                    batch = batch._replace(features=online_features(batch, teacher))
                batch = batch.to(device)
                generator = torch.Generator(device)
                generator.manual_seed(noise_seed(config, step, micro, ranks.rank))
                # Gradients of the ranks are averaged once a step, after the last micro batch. Only
                # in the first step after each, which puts them into DDP's buckets from the start.
                waits = first_step < step and micro < config.accumulation - 1 and ranks.world > 1
                with wrapped.no_sync() if waits else contextlib.nullcontext():
                    with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
                        latents = batch_latents(batch, vae, generator)      # (B, 1 + R, C, h, w)
                        corrupted = corrupt(batch, latents, text_encoder, tokenizer.mask_id, empty,
                                            generator, config)
                        losses = wrapped(corrupted)
                    (losses["loss"] / config.accumulation).backward()
                metrics.add(batch.task, losses)

            norm = parameters.clip(config.clip)
            steps.append(Step(step, norm, records))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * learning_rate_scale(step, config)
            parameters.update(optimizers, norm)
            if average is not None:
                update_average(average, model, step, config.ema, config.ema_every)
            step += 1
            bar.update()

            stopping = ranks.any(bool(signals))                 # a signal to one rank stops all
            is_last = step == config.steps
            logs = step % config.log_every == 0 or step in config.keep or is_last
            saves = step % config.save_every == 0 or stopping or is_last
            samples = config.sample_every and step % config.sample_every == 0
            if logs or saves or samples:
                last_norm = check_norms(steps, ranks, run)
                steps.clear()
            if logs:
                count = skipped.share(step)
                extra = {"skipped": count} if count else {}
                line = metrics.write(step, grad_norm=round(last_norm, 4),
                                     seconds=round(time.time() - start, 1), **extra)
                shown = [name for name in ("flow_matching", "masked_token") if name in line]
                bar.set_postfix({name: f"{line[name]:.3f}" for name in shown})
            if step in config.keep and ranks.first:
                save(files.kept(step), average.state_dict(), average.config)
            if saves:
                skipped.share(step)
                unfinished, state = metrics.state(), ranks.unite(optimizer_state(optimizers))
                if ranks.first:
                    save_checkpoint(run, step, time.time() - start, model, average, state,
                                    unfinished, **origin)
            if stopping:
                break
            if samples:
                before = time.time()
                if ranks.first:
                    write_samples(run, step, frozen, average, config, requests)
                ranks.wait(f"samples-{step}")
                start += time.time() - before           # it is no time of training
    return step == config.steps


# ---------------------------------------------------------------- command line

def report(run: Path, parts: Parts, device: torch.device) -> None:
    """Print what came out; a run on the shapes world is scored first."""
    if parts.test:
        from experiments.evaluate import evaluate_run, print_next_steps, print_scores
        print_scores(evaluate_run(run, device))
    print(f"finished: {RunFiles(run).newest_checkpoint()}")
    if parts.test:
        print_next_steps(run)


def main(argv: list[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    if "--estimate" in given:
        from estimate import main as print_estimate             # which imports this file
        return print_estimate(given)
    config = parse_arguments(argv, __doc__)
    run = Path(config.out)
    resume = f"python train.py --resume --out {run}"
    try:
        with joined_ranks() as ranks:
            if ranks.device.type == "cpu":
                keep_freed_memory()
            ranks.wait("arguments")                         # every rank has read run.json
            if ranks.first:
                write_config(config, run)
                prepare_apart(config, run)
            ranks.wait("parts")
            parts = parts_of(config, run)
            with timed(run, "model") if ranks.first else contextlib.nullcontext():
                finished = train(config, ranks, parts, run)
            if ranks.first and finished:
                report(run, parts, ranks.device)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if message := explain(error):
            sys.exit(f"error: {message}")
        raise
    except KeyboardInterrupt:
        sys.exit(f"interrupted; continue with: {resume}")
    if ranks.first and not finished:
        print(f"stopped at a checkpoint; continue with: {resume}")


if __name__ == "__main__":
    main()
