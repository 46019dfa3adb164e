"""What lies on disk for a run: frozen parts, data, cached features, checkpoints, metrics, timings.

Everything is written under a temporary name first, so that a kill at any moment leaves whole files.
"""
import contextlib
import copy
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from buckets import Buckets, Shape, bucket_shapes, read_aspects
from checkpoint import Checkpoint, save, write_atomically
from config import Parts, RunFiles, TrainConfig, parts_of
from data import Tasks, load_image, to_pictures
from model import MMDiT
from records import Example, open_records
from teacher import load_teacher
from text_encoder import T5Encoder, T5Tokenizer
from vae import VAE


# ---------------------------------------------------------------- timings

def read_seconds(run: Path) -> dict[str, float]:
    """Read how long each phase of a run took; empty as long as no phase has ended."""
    file = RunFiles(run).seconds
    return json.loads(file.read_text()) if file.exists() else {}


@contextlib.contextmanager
def timed(run: Path, phase: str) -> Iterator[None]:
    """Add the seconds of a phase to the run's seconds.json."""
    start = time.time()
    yield
    seconds = read_seconds(run)
    seconds[phase] = round(seconds.get(phase, 0.0) + time.time() - start, 1)
    write_atomically(RunFiles(run).seconds, lambda file: file.write_text(json.dumps(seconds)))


# ---------------------------------------------------------------- JSON lines

def append(path: Path, text: str) -> None:
    """Append to a file. Raises OSError that names it, as on a full disk."""
    try:
        with open(path, "a") as file:
            file.write(text)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror})") from error


def read_until(path: Path, step: int, rewrite: bool) -> list[dict]:
    """Read JSON lines without those newer than a step, and without one that a kill cut off.

    rewrite: drop them in the file, too.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    whole = [line for line in lines if line.endswith("}")]
    kept = [line for line in whole if json.loads(line)["step"] <= step]
    if rewrite and len(kept) < len(lines):
        text = "".join(line + "\n" for line in kept)
        write_atomically(path, lambda file: file.write_text(text))
    return [json.loads(line) for line in kept]


# ---------------------------------------------------------------- metrics

class Metrics:
    """metrics.jsonl: one line every `log_every` steps, means over micro batches and ranks.

    path: the file, None on a rank that does not write. mean: averages a tensor over the ranks, and
    is called by all of them. step: drop lines newer than the checkpoint that the run resumes from.
    """

    def __init__(self, path: Path | None, step: int, mean: Callable[[Tensor], Tensor]):
        self.path, self.mean = path, mean
        self.sums: dict[str, Tensor] = {}                       # name -> (2,) sum and count
        if path:
            read_until(path, step, rewrite=True)

    def add(self, task: str, losses: dict[str, Tensor]) -> None:
        """Count every loss twice: over all tasks, and for this task, which all ranks share."""
        for name, value in losses.items():
            entry = torch.stack([value.detach().float(), value.new_ones((), dtype=torch.float32)])
            for key in [name] if name == "loss" else [name, f"{task}.{name}"]:
                self.sums[key] = self.sums[key] + entry if key in self.sums else entry      # (2,)

    def state(self) -> dict[str, Tensor]:
        """The sums of an unfinished line, for a checkpoint. Every rank must call it."""
        return {name: self.mean(entry.clone()) for name, entry in self.sums.items()}

    def load_state(self, state: dict[str, Tensor], device: torch.device) -> None:
        self.sums = {name: entry.to(device) for name, entry in state.items()}

    def write(self, step: int, **extra: float) -> dict[str, float]:
        """Write the line of a step and start the next one. Every rank must call it."""
        sums = self.mean(torch.stack(list(self.sums.values())))                     # (names, 2)
        means = (sums[:, 0] / sums[:, 1]).tolist()
        losses = {name: round(mean, 6) for name, mean in zip(self.sums, means)}
        line = {"step": step} | losses | extra
        self.sums = {}
        if self.path:
            append(self.path, json.dumps(line) + "\n")
        return line


# ---------------------------------------------------------------- skipped records

class Skipped:
    """skipped.jsonl: the records that no rank could use, each once, and a limit to their number.

    step: drop entries newer than the checkpoint that the run resumes from. allowed: the largest
    number; more end the run. gather: collects an object of every rank, and is called by all of
    them. writes: whether this rank writes the file.
    """

    def __init__(self, path: Path, step: int, allowed: int, writes: bool = True,
                 gather: Callable[[dict], list[dict]] = lambda x: [x]):
        self.path, self.allowed, self.writes, self.gather = path, allowed, writes, gather
        self.new: dict[str, str] = {}                           # of this rank, not yet shared
        entries = read_until(path, step, rewrite=writes)
        self.reasons = {entry["record"]: entry["reason"] for entry in entries}

    def add(self, skipped: Iterable[tuple[str, str]], step: int) -> None:
        """Count (record, reason) pairs of this rank. Raises ValueError beyond the limit."""
        self.new |= {record: why for record, why in skipped if record not in self.reasons}
        if len(self.reasons) + len(self.new) > self.allowed:
            self._write(self.new, step)
            self._refuse(self.reasons | self.new)

    def share(self, step: int) -> int:
        """Unite the new pairs of all ranks, list and warn of them. Every rank must call it.

        Returns how many records were skipped so far. Raises ValueError beyond the limit.
        """
        united = {record: why for new in self.gather(self.new) for record, why in new.items()}
        united = {record: why for record, why in united.items() if record not in self.reasons}
        self.reasons |= united
        self.new = {}
        if self.writes:
            self._write(united, step)
            for record, reason in united.items():
                tqdm.write(f"warning: {record} is skipped: {reason}")
        if len(self.reasons) > self.allowed:
            self._refuse(self.reasons)
        return len(self.reasons)

    def _write(self, reasons: dict[str, str], step: int) -> None:
        lines = [json.dumps({"record": record, "reason": reason, "step": step}) + "\n"
                 for record, reason in reasons.items()]
        if lines:
            append(self.path, "".join(lines))

    def _refuse(self, reasons: dict[str, str]) -> None:
        shown = "".join(f"\n  {record}: {why}" for record, why in [*reasons.items()][:10])
        raise ValueError(f"{len(reasons)} records could not be used, --max_skipped allows "
                         f"{self.allowed}; the list is in {self.path}:{shown}")


def allowed_skips(share: float, count: int) -> int:
    """The number of records that may be skipped: a share of all, at least one unless it is 0."""
    return max(1, int(share * count)) if share else 0


# ---------------------------------------------------------------- frozen parts and models

def missing_parts(config: TrainConfig, run: Path) -> list[str]:
    """Name the parts that neither the configuration nor the run's folder has."""
    parts = parts_of(config, run)
    needs_teacher = config.intrinsic_weight and not config.teacher_path
    missing = {
        "world": not config.data and not parts.test.exists(),
        "tokenizer": not config.tokenizer_path and not parts.tokenizer.exists(),
        "text encoder": not config.t5_path and not parts.text_encoder.exists(),
        "vae": not config.vae_path and not parts.vae.exists(),
        "teacher": needs_teacher and not (parts.teacher / "model.safetensors").exists()}
    return [name for name, is_missing in missing.items() if is_missing]


class Frozen(NamedTuple):
    """The models that a training uses and does not change."""
    tokenizer: T5Tokenizer
    text_encoder: T5Encoder
    vae: VAE


def t5_dtype(config: TrainConfig, path: Path, device: torch.device) -> torch.dtype:
    """The type of T5's weights: bfloat16 beside autocast, which would round them in every pass.

    A small T5 on a CPU stays float32, so that its residual stream is not rounded either.
    """
    is_large = T5Encoder.from_pretrained(path, device="meta").config.dim >= 512     # all released
    half = config.autocast and (device.type == "cuda" or is_large)
    return torch.bfloat16 if half else torch.float32


def load_frozen(config: TrainConfig, parts: Parts, device: torch.device) -> Frozen:
    """Load the frozen tokenizer, T5 and VAE."""
    tokenizer = T5Tokenizer(parts.tokenizer, padding_id=config.sampling.padding_id)
    text_encoder = T5Encoder.from_pretrained(
        parts.text_encoder, mask_token=config.mask_token or None,
        dtype=t5_dtype(config, parts.text_encoder, device), device=device)
    vae = VAE.from_pretrained(parts.vae, device=device)
    return Frozen(tokenizer, text_encoder.eval().requires_grad_(False),
                  vae.eval().requires_grad_(False))


def every_nth_block(model: MMDiT, n: int) -> MMDiT:
    """Thin a model out to every n-th of its blocks, evenly spaced from the first to the last."""
    count = max(1, model.config.depth // n)
    kept = torch.linspace(0, model.config.depth - 1, count).round().int().tolist()
    model.blocks = nn.ModuleList(model.blocks[i] for i in kept)
    model.config = replace(model.config, depth=count)
    return model


def load_models(config: TrainConfig, vocab_size: int, resumed: Path | None,
                device: torch.device, first: bool = True,
                text_dim: int = 0) -> tuple[MMDiT, MMDiT | None]:
    """Load the model and its average: from the run's checkpoint, from --init, or fresh.

    vocab_size, text_dim: of the tokenizer and of T5, for a fresh model.
    first: whether this is the first rank. Others get a model without values, which
    DistributedDataParallel sends to them, and no average. So one rank at most has a copy in host
    memory: of fresh weights, as those of a file go straight to the device.
    """
    torch.manual_seed(config.seed)          # SD3 leaves tensors to initialize, too
    place, average = device if first else torch.device("meta"), None
    if resumed:
        model = MMDiT.from_pretrained(resumed / "model.safetensors", device=place)
        if first:
            average = MMDiT.from_pretrained(resumed / "ema.safetensors", device=place)
    elif config.init:
        path = RunFiles(config.init).averaged_weights() or config.init
        has_heads = MMDiT.from_pretrained(path, device="meta").config.align_dims
        fresh_heads = {}
        if config.intrinsic_weight and not has_heads:           # as in SD3
            fresh_heads = {"align_dims": config.model.align_dims,
                           "align_silu": config.model.align_silu}
        model = MMDiT.from_pretrained(path, device=place, **fresh_heads)
        model = every_nth_block(model, config.init_blocks)
    else:
        sizes = replace(config.model, vocab_size=vocab_size,
                        text_dim=config.model.text_dim or text_dim)
        with contextlib.nullcontext() if first else place:
            model = MMDiT(sizes)
    model = model.to(device) if first else model.to_empty(device=device)
    model.gradient_checkpointing = config.gradient_checkpointing
    if first:
        average = (average or copy.deepcopy(model)).requires_grad_(False)
    return model, average


def check_parts(config: TrainConfig, model: MMDiT, frozen: Frozen) -> None:
    """Raise ValueError before the long work if the parts do not fit together."""
    c, size = model.config, config.sampling.image_size
    unit = frozen.vae.downscale * c.patch_size                  # pixels per patch
    if size % unit:
        raise ValueError(f"--sampling.image_size {size}: expected a multiple of {unit} "
                         "(autoencoder and patches)")
    if size // unit > c.position_table:
        raise ValueError(f"--sampling.image_size {size}: the model has positions up to "
                         f"{unit * c.position_table}")
    height, width = bucket_shapes(size, config.max_aspect, unit)[-1]
    if width // unit > c.position_table:
        raise ValueError(f"--max_aspect {config.max_aspect}: the widest shape is {width} x "
                         f"{height}, the model has positions up to {unit * c.position_table}; "
                         "expected a lower --max_aspect or --sampling.image_size")
    for name in ("text_length", "text_only_length"):
        length = getattr(config.sampling, name)
        if c.text_positions and length > c.text_positions:
            raise ValueError(f"--sampling.{name} {length}: the model has positions for "
                             f"{c.text_positions} tokens")
    pairs = {
        "text_dim": (c.text_dim, frozen.text_encoder.config.dim),
        "vocab_size": (c.vocab_size, frozen.tokenizer.vocab_size),
        "latent_channels": (c.latent_channels, frozen.vae.config.latent_channels)}
    for name, (expected, actual) in pairs.items():
        if expected != actual:
            raise ValueError(f"the parts do not fit together: {name} is {expected} in the model "
                             f"and {actual} in the frozen part beside it")
    has_block = c.align_dims and 1 <= config.align_depth <= c.depth
    if config.intrinsic_weight and not has_block:
        raise ValueError(f"--align_depth {config.align_depth}, --model.align_dims {c.align_dims}: "
                         "the intrinsic alignment needs two widths of its heads, and one of the "
                         f"model's blocks 1 to {c.depth}; or --intrinsic_weight 0")


# ---------------------------------------------------------------- data, computed once

def load_tasks(config: TrainConfig, parts: Parts, tokenizer: T5Tokenizer, unit: int = 16) -> Tasks:
    """Open the records of all JSONL files as one dataset, whose index is built if it is missing.

    unit: pixels per patch, of which the sides of pictures that are not square are multiples.
    """
    settings, folder, buckets = config.sampling, Path(config.out), None
    records = open_records(parts.data, tokenizer, settings.text_length, folder,
                           settings.question_template, config.dialogues,
                           settings.text_only_length)
    if config.max_aspect > 1:
        shapes = bucket_shapes(settings.image_size, config.max_aspect, unit)
        buckets = Buckets(shapes, read_aspects(records, folder))
    return Tasks(records, tokenizer, settings.image_size, settings.text_length, config.weights,
                 config.captioned, settings.prompt_multiple, settings.question_template, buckets,
                 settings.text_only_length)


def describe_tasks(dataset: Tasks) -> str:
    """One line with the share of each task in the batches."""
    shares: dict[str, float] = {}
    for group in dataset.groups:
        shares[group.task] = shares.get(group.task, 0) + group.weight
    total = sum(shares.values())
    line = "tasks: " + ", ".join(f"{task} {share / total:.0%}" for task, share in shares.items())
    return line + (f"; not trained: {', '.join(dataset.left_out)}" if dataset.left_out else "")


def unused_means(dataset: Tasks, config: TrainConfig) -> list[str]:
    """A line on tasks that sigma_means names and the data lacks, if there are any."""
    known = {"*", *dataset.left_out, *(group.task for group in dataset.groups)}
    missing = set(config.mean_by_task) - known
    return [f"sigma_means: no records of {', '.join(sorted(missing))}"] if missing else []


def describe_shapes(dataset: Tasks) -> str:
    """One line with the shares of the shapes, and of the pixels that are cropped away."""
    counts: Counter[Shape] = Counter()
    for key, group in zip(dataset.keys, dataset.groups):
        if not key.no_image:
            counts[key.shape] += len(group.indices)
    shares = ", ".join(f"{width} x {height} {count / counts.total():.0%}"
                       for (height, width), count in counts.most_common())
    cropped, as_squares = dataset.cropped
    return (f"shapes: {shares}; {cropped:.1%} of the pixels are cropped, squares would crop "
            f"{as_squares:.1%}")


def load_or_blank(path: Path, shape: Shape, unreadable: dict[Path, str]) -> Tensor:
    """Load an image (3, H, W), contiguous; zeros for one that cannot be read, its reason is noted.

    The loader skips its records later, so cached values of it are never used.
    """
    try:
        return load_image(path, shape).contiguous()
    except ValueError as error:
        unreadable[path] = str(error)
        return torch.zeros(3, *shape)


CHUNK = 4 * 512 * 512                       # pixels that the autoencoder encodes at once


def encode_in_chunks(vae: VAE, images: Tensor, **how) -> Tensor:
    """`VAE.encode`, a few images at a time: its first layers have 128 channels of each pixel."""
    count = max(1, CHUNK // images[0, 0].numel())
    return torch.cat([vae.encode(part, **how).float() for part in images.split(count)])


@torch.no_grad()
def encode_all(dataset: Tasks, vae: VAE, device: torch.device, autocast: bool) -> Tensor:
    """Encode every picture of a dataset to its mean latents, (n, C, h, w) float32 on the CPU.

    All are squares. A picture that cannot be read has its reason in dataset.unreadable.
    """
    latents, square = [], (dataset.image_size, dataset.image_size)
    starts = range(0, len(dataset.paths), 64)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        for start in tqdm(starts, desc="encoding pictures", unit="batch", leave=False):
            images = torch.stack([load_or_blank(path, square, dataset.unreadable)
                                  for path in dataset.paths[start:start + 64]])
            latents.append(encode_in_chunks(vae, images.to(device)).cpu())          # (b, C, h, w)
    return torch.cat(latents)


SHARD = 2048                                # pairs per file of cached teacher features


class Features:
    """Cached teacher features, memory-mapped; indices: the examples in the shards, sorted."""

    def __init__(self, files: Sequence[Path], indices: np.ndarray):
        self.indices = indices
        self.shards = []
        for path in files:
            with safe_open(path, framework="pt") as file:
                self.shards.append((file.get_tensor("image"), file.get_tensor("text")))

    def __call__(self, chosen: list[int]) -> tuple[Tensor, Tensor]:
        """The features of examples, (B, d) float32 of pictures and of captions."""
        rows = [divmod(int(row), SHARD) for row in np.searchsorted(self.indices, chosen)]
        images = [self.shards[shard][0][row] for shard, row in rows]
        texts = [self.shards[shard][1][row] for shard, row in rows]
        return torch.stack(images).float(), torch.stack(texts).float()              # (B, d) each


def _shard_name(examples: list[Example], teacher_path: Path, shapes: list[Shape]) -> str:
    """A file name that changes with the teacher's files, the pictures, their crops and captions."""
    files = [*sorted(teacher_path.glob("*")), *(e.image for e in examples)]
    versions = []
    for file in files:
        state = file.stat() if file.exists() else None          # a missing picture is skipped later
        versions.append((file.name, state and (state.st_size, state.st_mtime_ns)))
    captions = [e.caption for e in examples]
    is_one_square = len(set(shapes)) == 1 and shapes[0][0] == shapes[0][1]
    size = shapes[0][0] if is_one_square else shapes            # as files of squares are named
    digest = hashlib.blake2b(repr((size, versions, captions)).encode(), digest_size=8)
    return f"teacher-{digest.hexdigest()}.safetensors"


def teacher_features(dataset: Tasks, teacher_path: Path, folder: Path, width: int,
                     device: torch.device, rank: int = 0, world: int = 1) -> list[Path]:
    """Compute the teacher's features of this rank's shards of dataset.aligned, where missing.

    Each shard is written as soon as it is done, so an interrupted start goes on. Returns the files
    of all shards, to be opened when every rank is done. Raises ValueError for another width.
    """
    def check(teacher_width: int, path: Path) -> None:
        if teacher_width != width:
            raise ValueError(f"{path}: features of width {teacher_width}, the model's alignment "
                             f"heads have {width}; change --model.align_dims, or "
                             "--intrinsic_weight 0")

    teacher, files = None, []
    starts = range(0, len(dataset.aligned), SHARD)
    for number, start in enumerate(tqdm(starts, desc="teacher", unit="shard", leave=False)):
        indices = dataset.aligned[start:start + SHARD]
        examples = [dataset.records[int(i)] for i in indices]
        shapes = [dataset.shape_of(i) for i in indices]
        path = folder / _shard_name(examples, teacher_path, shapes)
        files.append(path)
        if path.exists():
            check(Checkpoint(path).shape("image")[1], path)
        elif number % world == rank:
            if teacher is None:
                dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
                teacher = load_teacher(teacher_path, dtype, device)
                check(teacher.out_dim, teacher_path)
            images, texts = [], []
            for i in range(0, len(examples), 64):
                chunk = examples[i:i + 64]
                loaded = [load_or_blank(e.image, shape, {}) for e, shape in zip(chunk, shapes[i:])]
                pictures = [to_pictures(image[None])[0] for image in loaded]        # (H, W, 3) each
                images.append(teacher.image_features(pictures).half().cpu())        # (b, d)
                texts.append(teacher.text_features([e.caption for e in chunk]).half().cpu())
            save(path, {"image": torch.cat(images), "text": torch.cat(texts)})      # (n, d) each
    return files


def features_folder(config: TrainConfig, parts: Parts) -> Path:
    """Where teacher features are cached: beside the JSONL, or in the run if that is read-only."""
    beside = parts.data[0].parent
    return beside if os.access(beside, os.W_OK) else Path(config.out)


# ---------------------------------------------------------------- checkpoints

def optimizer_state(optimizers: list) -> dict[str, Tensor]:
    """The state of this rank's parameters, as OPTIMIZER.PARAMETER.NAME."""
    state = {}
    for k, optimizer in enumerate(optimizers):
        for i, entry in optimizer.state_dict()["state"].items():
            state |= {f"{k}.{i}.{name}": value for name, value in entry.items()}
    return state


def save_checkpoint(run: Path, step: int, seconds: float, model: MMDiT, average: MMDiT,
                    state: dict[str, Tensor], metrics: dict[str, Tensor],
                    **origin: object) -> None:
    """Write checkpoint-<step> under a temporary name, rename it, then remove the one before.

    So a kill at any moment leaves one whole checkpoint, and a full disk nothing temporary.
    state: `optimizer_state` of all ranks. origin: what `check_resume` compares.
    """
    files = RunFiles(run)
    target, temporary = files.checkpoint(step), run / ".checkpoint.tmp"
    if target.exists():
        return
    state = state | {f"metrics.{name}": value for name, value in metrics.items()}
    metadata = {"step": step, "seconds": seconds} | origin
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save(temporary / "model.safetensors", model.state_dict(), model.config)
        save(temporary / "ema.safetensors", average.state_dict(), model.config)
        save(temporary / "optimizer.safetensors", state,
             **{name: str(value) for name, value in metadata.items()})
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in files.checkpoints():
        if old != target:
            # some systems refuse while another process reads a file; the next save removes it
            shutil.rmtree(old, ignore_errors=True)


def check_resume(folder: Path, world: int, global_batch: int, data: str,
                 new_data: bool) -> str | None:
    """Compare a checkpoint's origin with the run that resumes it.

    world: number of ranks; global_batch: examples per step over all ranks; data: digest of the
    JSONL files. Returns a note to print if the run goes on otherwise than it would have.
    Raises ValueError for another global batch, and for other data unless new_data.
    """
    before = Checkpoint(folder / "optimizer.safetensors").metadata
    old_world = int(before["world"])
    old_batch = int(before.get("global_batch", global_batch * old_world // world))
    if old_batch != global_batch:
        raise ValueError(f"{folder}: was written by {old_world} ranks, resumed by {world}, which "
                         f"makes the global batch {global_batch}, not {old_batch}; choose ranks, "
                         f"--batch_size and --accumulation whose product is {old_batch}")
    if before.get("data", data) != data and not new_data:
        raise ValueError(f"{folder}: the data has changed since this checkpoint, so the run would "
                         "go on in another order; restore the JSONL files, or add --new_data true "
                         "if the change is meant")
    if before.get("data", data) != data:
        return "the data has changed: the run goes on with the new data, in a new order"
    if old_world != world:
        return (f"resumed by {world} ranks, before {old_world}, with the same global batch of "
                f"{global_batch}: noise and order of the data differ from here on")
    return None


class Progress(NamedTuple):
    """Where a run is."""
    step: int = 0
    seconds: float = 0.0                    # of training so far
    metrics: dict[str, Tensor] = {}         # sums of an unfinished line of metrics.jsonl


def load_optimizers(optimizers: list, folder: Path, owned: set[Tensor] | None = None) -> Progress:
    """Restore the optimizers from a checkpoint and return where it was.

    owned: read the state of these parameters alone; None: of all.
    """
    file = Checkpoint(folder / "optimizer.safetensors")
    parameters = [sum((group["params"] for group in o.param_groups), []) for o in optimizers]
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    metrics = {}
    for name in file.names():
        if name.startswith("metrics."):
            metrics[name.removeprefix("metrics.")] = file.read(name)
        else:
            k, i, key = name.split(".")
            key = "step" if key == "steps" else key             # of Muon, in older checkpoints
            if owned is None or parameters[int(k)][int(i)] in owned:
                states[int(k)].setdefault(int(i), {})[key] = file.read(name)
    for optimizer, state in zip(optimizers, states):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    return Progress(int(file.metadata["step"]), float(file.metadata["seconds"]), metrics)
