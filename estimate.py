"""What a training needs, without its weights: parameters, memory, FLOPs, traffic and time.

    python train.py --preset small --estimate --gpus 4 --gpu 4090
    python train.py --preset sd3 --estimate --gpus 8 --memory 80 --batch_size 4

The step's own modules run once on tensors that have shapes and no values (torch's FakeTensorMode),
so FLOPs and activations follow the code. Time is FLOPs over an assumed share of the GPU's peak;
`--gpu this` measures peak and shares on this machine. Batches are pairs of a picture and its
caption; source pictures of edits lengthen the image branch and are not counted.
"""
import argparse
import os
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from config import TrainConfig, parse_arguments
from losses import contrastive_loss, flow_matching_loss, intrinsic_loss
from model import MMDiT
from muon import Muon
from run_folder import encode_in_chunks, load_models
from teacher import QwenVision, QwenVisionConfig, nearest_size
from text_encoder import T5Encoder, T5Tokenizer
from train import Corrupted, Objective, make_optimizers, owners_of
from vae import VAE


# ---------------------------------------------------------------- machines

# Shares of the peak that the parts of a step reach: assumed. Convolutions wait for memory.
ASSUMED = {"MM-DiT": 0.4, "T5": 0.5, "autoencoder": 0.2, "teacher": 0.4}


class Machine(NamedTuple):
    """A GPU, or a CPU that stands for one."""
    name: str
    tflops: float                           # peak of dense bfloat16 products
    memory: float                           # GB
    bandwidth: float                        # GB/s of its memory
    link: float                             # GB/s between GPUs, in each direction
    shares: dict[str, float] = ASSUMED


# From the makers' data sheets; links are NVLink's, or what PCI Express 4 leaves.
MACHINES = {m.name: m for m in (
    Machine("H200", 989, 141, 4800, 450), Machine("H100", 989, 80, 3350, 450),
    Machine("A100", 312, 80, 2039, 300), Machine("L40S", 362, 48, 864, 20),
    Machine("5090", 209, 32, 1792, 20), Machine("4090", 165, 24, 1008, 20),
    Machine("3090", 71, 24, 936, 20), Machine("A10", 125, 24, 600, 20))}


# ---------------------------------------------------------------- counting

def _attention(q, k, v, *others, out_val=None, **named) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(gradient, q, k, v, *others, out_val=None, **named) -> int:
    return sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)


FLOPS = flop_registry | {                   # torch does not count attention on a CPU
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward}


class Meter(TorchDispatchMode):
    """Count floating-point operations, and the bytes of tensors allocated under this mode.

    flops: as torch's FlopCounterMode, whose hooks would keep recomputed tensors alive. peak: the
    most bytes at one time.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.bytes = self.peak = 0
        self.known: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs))
                 if isinstance(x, Tensor)}
        result = func(*args, **kwargs)
        if formula := FLOPS.get(func._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=result)
        for x in tree_leaves(result):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in given or key in self.known:               # a view, or changed in place
                continue
            self.known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._free, key, size)
        return result


class Cost(NamedTuple):
    """Floating-point operations, and the most bytes that were allocated at one time."""
    flops: int
    bytes: int


def cost_of(function: Callable) -> Cost:
    with Meter() as meter:
        function()
    return Cost(meter.flops, meter.peak)


def filled(module: nn.Module, dtype: torch.dtype = torch.float32,
           device: str | torch.device = "cpu") -> nn.Module:
    """Give a module of the meta device random weights; within FakeTensorMode without values."""
    shapes = {name: x.shape for name, x in module.state_dict(keep_vars=True).items()}
    tensors = {name: 0.02 * torch.randn(shape, dtype=dtype, device=device)
               for name, shape in shapes.items()}
    module.load_state_dict(tensors, assign=True)
    return module


def count_of(module: nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module else 0


# ---------------------------------------------------------------- the parts of a step

class Modules(NamedTuple):
    """The modules of a training, on the meta device."""
    model: MMDiT
    text_encoder: T5Encoder
    vae: VAE
    teacher: QwenVision | None              # if it runs in every step
    vocabulary: int = 152_064               # rows of the teacher's text embedding


def modules_of(config: TrainConfig) -> Modules:
    """The modules that the configured checkpoints hold, else those of the configured sizes."""
    meta = torch.device("meta")
    with meta:
        vae, text_encoder = VAE(config.vae), T5Encoder(config.text_encoder)
        teacher = QwenVision(QwenVisionConfig())
    if config.vae_path:
        vae = VAE.from_pretrained(config.vae_path, device=meta)
    if config.t5_path:
        text_encoder = T5Encoder.from_pretrained(config.t5_path, device=meta)
    runs = config.teacher_online != "false" and not (config.cache_latents or config.teacher_steps)
    if not config.intrinsic_weight or not runs:
        teacher = None
    elif config.teacher_path:
        teacher = QwenVision.from_pretrained(config.teacher_path, device=meta)
    vocabulary = config.model.vocab_size
    if config.tokenizer_path:
        vocabulary = T5Tokenizer(config.tokenizer_path).vocab_size
    model, _ = load_models(config, vocabulary, None, meta, False, text_encoder.config.dim)
    return Modules(model, text_encoder, vae, teacher)


def pairs(config: TrainConfig, m: Modules, device: str | torch.device = "cpu") -> Corrupted:
    """A micro batch for both branches, as `train.corrupt` returns it."""
    c, s, b = m.model.config, config.sampling, config.batch_size
    side, length = s.image_size // m.vae.downscale, s.text_length
    dtype = torch.bfloat16 if config.autocast else torch.float32
    x, noise, noisy = torch.randn(3, b, c.latent_channels, side, side, device=device)
    text = torch.randn(b, length, c.text_dim, dtype=dtype, device=device)           # (B, L, D)
    tokens = torch.zeros(b, length, dtype=torch.int64, device=device)               # (B, L)
    mask, t = tokens == 0, torch.ones(b, device=device)
    features = None
    if config.intrinsic_weight:
        features = tuple(torch.randn(2, b, c.align_dims[1], device=device))         # (B, d) each
    return Corrupted(
        x, (), noise, t, noisy, text, tokens, mask, mask, t, text, features, text, text)


def transformer_step(config: TrainConfig, m: Modules,
                     device: str | torch.device = "cpu") -> Callable[[], None]:
    """Forward and backward of a micro batch, with gradients of an earlier one in memory."""
    model, c = filled(m.model, device=device), pairs(config, m, device)
    model.gradient_checkpointing = config.gradient_checkpointing
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    objective = Objective(model, config)

    def step() -> None:
        with torch.autocast(c.latents.device.type, torch.bfloat16, enabled=config.autocast):
            image, text = objective.branches(c)
            hidden = image.image_hidden, text.text_hidden
            if config.cross_unseen:
                hidden = objective.unseen_streams(c)
            # at all positions, as on a GPU
            logits = text.logits.flatten(0, 1)[:, :-1].float()              # (B L, vocab - 1)
            loss = F.cross_entropy(logits, c.tokens.flatten())
            loss = loss + flow_matching_loss(image.velocity, c.noise, c.latents)
            if config.cross_weight:
                loss = loss + contrastive_loss(*hidden, gather=False)
            if c.features:
                loss = loss + intrinsic_loss(
                    image.image_mid, c.features[0], text.text_mid, c.features[1])
        loss.backward()

    return step


def text_step(config: TrainConfig, m: Modules,
              device: str | torch.device = "cpu") -> Callable[[], None]:
    """T5 of the prompts and of the masked texts of a micro batch."""
    c, length = m.text_encoder.config, config.sampling.text_length
    rows = config.batch_size * (4 if config.cross_unseen else 2)
    dtype = torch.bfloat16 if config.autocast else torch.float32
    encoder = filled(m.text_encoder, dtype, device)
    x = torch.randn(rows, length, c.dim, dtype=dtype, device=device)                # (2 B, L, D)
    bias = torch.randn(1, c.num_heads, length, length, dtype=dtype, device=device)

    @torch.no_grad()
    def step() -> None:
        hidden = x
        for block in encoder.blocks:
            hidden = block(hidden, bias)                                            # (2 B, L, D)

    return step


def vae_step(config: TrainConfig, m: Modules,
             device: str | torch.device = "cpu") -> Callable[[], None]:
    """Encoding the pictures of a micro batch."""
    size, vae = config.sampling.image_size, filled(m.vae, device=device)
    images = torch.randn(config.batch_size, 3, size, size, device=device)

    @torch.no_grad()
    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=config.autocast):
            encode_in_chunks(vae, images, sample=True)

    return step


STEPS = {"MM-DiT": transformer_step, "T5": text_step, "autoencoder": vae_step}


def costs_of(config: TrainConfig, m: Modules) -> dict[str, Cost]:
    """The cost of each part of a micro batch. The modules lose their values."""
    costs = {}
    for name, step in STEPS.items():
        if name != "autoencoder" or not config.cache_latents:
            with FakeTensorMode():
                costs[name] = cost_of(step(config, m))
    if m.teacher:
        costs["teacher"] = Cost(teacher_flops(config, m), 0)
    return costs


def teacher_flops(config: TrainConfig, m: Modules) -> int:
    """Matrix products of the teacher for the pictures of a micro batch; attention is little."""
    c, size = m.teacher.config, config.sampling.image_size
    height, width = nearest_size(size, size, c.patch_size * c.spatial_merge_size)
    patches = height * width // c.patch_size ** 2
    merger = count_of(m.teacher.merger)
    blocks = count_of(m.teacher) - merger
    merged = patches // c.spatial_merge_size ** 2
    return 2 * config.batch_size * (patches * blocks + merged * merger)


# ---------------------------------------------------------------- the estimate

CONTEXT = 1.5e9                             # bytes of CUDA itself, and of fragments: assumed


class Estimate(NamedTuple):
    """All that a training needs; bytes are those of the first GPU, which has the averages."""
    parameters: dict[str, int]
    memory: dict[str, float]                # bytes
    flops: dict[str, float]                 # of a step, all GPUs together
    reduced: float                          # bytes that every GPU gives to a step's all-reduce
    compute: float                          # seconds of a step in products,
    update: float                           # in clipping, optimizer and averages,
    traffic: float                          # and between GPUs

    @property
    def total(self) -> float:
        """Bytes on the first GPU."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        return self.compute + self.update + self.traffic


def optimizer_bytes(model: MMDiT, config: TrainConfig, gpus: int) -> int:
    """State of the rank that has most: two moments of each parameter, Muon's matrices have one."""
    parameters = list(model.parameters())
    owners = owners_of([p.numel() for p in parameters], gpus)
    moments = {p: 1 if isinstance(optimizer, Muon) else 2
               for optimizer in make_optimizers(model, config)
               for group in optimizer.param_groups for p in group["params"]}
    loads = [0] * gpus
    for p, owner in zip(parameters, owners):
        loads[owner] += 4 * moments[p] * p.numel()
    return max(loads)


def estimate(config: TrainConfig, gpus: int, machine: Machine) -> Estimate:
    m = modules_of(config)
    trained = count_of(m.model)
    table = m.model.pos_embed.numel()
    half = 2 if config.autocast else 4
    parameters = {
        "MM-DiT": trained, "T5": count_of(m.text_encoder), "autoencoder": count_of(m.vae)}
    if m.teacher:
        embedding = m.vocabulary * m.teacher.config.out_hidden_size
        parameters["teacher"] = count_of(m.teacher) + embedding

    costs = costs_of(config, m)
    micro_batches = gpus * config.accumulation
    flops = {name: micro_batches * cost.flops for name, cost in costs.items()}

    memory = {
        "weights": 4 * (trained + table),
        "gradients": 4 * trained,
        "optimizer": optimizer_bytes(m.model, config, gpus),
        "averages": 4 * (trained + table),
        "T5": half * parameters["T5"],
        "autoencoder": 4 * parameters["autoencoder"],
        "teacher": half * parameters.get("teacher", 0),
        "activations": max(cost.bytes for cost in costs.values()),
        "CUDA": CONTEXT if machine.name != "this CPU" else 0}
    # bytes that move for each parameter: clipping and clearing, AdamW, averages
    moved = trained * (16 + 28 / gpus + 12)
    others = (gpus - 1) / gpus
    traffic = (2 * others + others) * 4 * trained               # all-reduce; new weights sent
    products = sum(count / machine.shares[name] for name, count in flops.items())
    return Estimate(
        parameters, {name: size for name, size in memory.items() if size}, flops,
        reduced=4 * trained if gpus > 1 else 0,
        compute=products / gpus / (machine.tflops * 1e12),
        update=moved / (machine.bandwidth * 1e9),
        traffic=traffic / (machine.link * 1e9))


def smaller(config: TrainConfig) -> list[TrainConfig]:
    """Configurations of the same training that need less memory, the fastest first."""
    options = []
    for checkpointing in sorted({config.gradient_checkpointing, True}):
        batch, accumulation = config.batch_size, config.accumulation
        while True:
            options.append(replace(config, batch_size=batch, accumulation=accumulation,
                                   gradient_checkpointing=checkpointing))
            if batch % 2:
                break
            batch, accumulation = batch // 2, 2 * accumulation
    return options[1:]                                          # the first one is `config`


def advice(config: TrainConfig, gpus: int, machine: Machine) -> str:
    """The first change that makes the training fit."""
    for option in smaller(config):
        if estimate(option, gpus, machine).total <= machine.memory * 1e9:
            changes = [f"--{name} {str(getattr(option, name)).lower()}"
                       for name in ("batch_size", "accumulation", "gradient_checkpointing")
                       if getattr(option, name) != getattr(config, name)]
            return f"it fits with {' '.join(changes)}"
    return ("it fits with no batch: take more GPUs, which divide the optimizer's state, a smaller "
            "T5 or model, or a GPU with more memory")


# ---------------------------------------------------------------- this machine

def seconds_of(function: Callable, device: torch.device, rounds: int = 3) -> float:
    """The median duration of function(), after one call that is not counted."""
    times = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def with_blocks(config: TrainConfig, m: Modules, count: int) -> TrainConfig:
    """The same training with `count` blocks in the transformer and in T5."""
    return replace(
        config, init="", t5_path="", tokenizer_path="", align_depth=1,
        model=replace(m.model.config, depth=count),
        text_encoder=replace(m.text_encoder.config, depth=count))


def this_machine(config: TrainConfig) -> Machine:
    """Measure the device that train.py would use here: peak, memory, and the share of each part.

    The parts are timed with one block and with three, which gives the time of all blocks, in turns
    with a product of large matrices.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(2, n, n, device=device).bfloat16()
    source, copy = torch.zeros(2, 2 ** 26, device=device)                   # 256 MB each
    moved = 4 * len(source) * (2 if device.type == "cuda" else 3)   # a CPU reads what it will write
    bandwidth = moved / seconds_of(lambda: copy.copy_(source), device) / 1e9
    m = modules_of(config)
    depths = {"MM-DiT": m.model.config.depth, "T5": m.text_encoder.config.depth, "autoencoder": 1}
    shares, peaks = dict(ASSUMED), []
    for name, cost in costs_of(config, modules_of(config)).items():
        if name not in STEPS:
            continue
        seconds, counts = [], (1, 3) if depths[name] > 1 else (1,)
        for count in counts:
            fewer = with_blocks(config, m, count)
            step = STEPS[name](fewer, modules_of(fewer), device)
            product = seconds_of(lambda: a @ b, device)
            seconds.append(seconds_of(step, device))
            product = (product + seconds_of(lambda: a @ b, device)) / 2
            peaks.append(2 * n ** 3 / product)
        block = max(0.0, (seconds[-1] - seconds[0]) / 2)
        whole = seconds[0] + (depths[name] - 1) * block
        shares[name] = cost.flops / whole / statistics.mean(peaks[-len(counts):])
    peak = statistics.median(peaks) / 1e12
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Machine(f"this {properties.name}", peak, properties.total_memory / 1e9, bandwidth,
                       20, shares)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Machine("this CPU", peak, memory, bandwidth, bandwidth, shares)


# ---------------------------------------------------------------- the table

def lines_of(config: TrainConfig, gpus: int, machine: Machine) -> list[str]:
    e, size = estimate(config, gpus, machine), config.sampling.image_size
    examples = gpus * config.accumulation * config.batch_size
    total = sum(e.flops.values())
    lines = [f"{gpus} x {machine.name}: a step of {examples} pairs of {size} x {size} pixels and "
             f"{config.sampling.text_length} tokens,",
             f"{config.batch_size} x {config.accumulation} micro batches on each", "", "parameters"]
    lines += [f"  {name:14}{count / 1e6:10.1f} M" for name, count in e.parameters.items()]
    lines += ["", "memory of the first GPU"]
    lines += [f"  {name:14}{size / 1e9:10.2f} GB" for name, size in e.memory.items()]
    fits = e.total <= machine.memory * 1e9
    verdict = "fits" if fits else "does not fit; " + advice(config, gpus, machine)
    lines += [f"  {'together':14}{e.total / 1e9:10.2f} GB of {machine.memory:.0f}: {verdict}", "",
              "a step"]
    lines += [f"  {name:14}{count / 1e12:10.1f} TFLOP  {count / total:4.0%}"
              for name, count in e.flops.items()]
    if gpus > 1:
        lines.append(f"  {'all-reduced':14}{e.reduced / 1e9:10.2f} GB, and as much sent again as "
                     "new weights")
    shares = ", ".join(f"{name} {machine.shares[name]:.0%}" for name in e.flops)
    rest = f"products {e.compute:.2f}, weights {e.update:.2f}, between GPUs {e.traffic:.2f}"
    lines += [f"  {'time':14}{e.seconds:10.2f} s ({rest})", "",
              f"{config.steps} steps: {config.steps * e.seconds / 3600:.1f} hours, "
              f"{config.steps * examples / 1e6:.1f} million pairs", "",
              f"{'Measured' if machine.name.startswith('this') else 'Assumed'}: {shares} of "
              f"{machine.tflops:.1f} TFLOP/s, "
              f"{machine.bandwidth:.0f} GB/s of memory, {machine.link:.0f} GB/s between GPUs; "
              "reading and preparing of pictures not counted."]
    if not config.t5_path:
        lines.append(f"T5 is {e.parameters['T5'] / 1e6:.0f} M as in the preset; --t5_path names "
                     "another.")
    return lines


def main(argv: Sequence[str]) -> None:
    p = argparse.ArgumentParser(prog="train.py --estimate", allow_abbrev=False, add_help=False)
    p.add_argument("--estimate", action="store_true")
    p.add_argument("--gpus", type=int, default=1)
    p.add_argument("--memory", type=float)
    p.add_argument("--gpu", default="H100")
    a, rest = p.parse_known_args(argv)
    known = {name.lower(): machine for name, machine in MACHINES.items()}
    if a.gpu.lower() not in (*known, "this"):
        p.error(f"--gpu {a.gpu}: expected {', '.join(MACHINES)} or this")
    if a.gpus < 1 or (a.memory is not None and not a.memory > 0):
        p.error(f"--gpus {a.gpus}, --memory {a.memory}: expected numbers above 0")
    config = parse_arguments(rest, __doc__, for_run=False)
    machine = this_machine(config) if a.gpu.lower() == "this" else known[a.gpu.lower()]
    machine = machine._replace(memory=a.memory or machine.memory)
    print("\n".join(lines_of(config, a.gpus, machine)))
