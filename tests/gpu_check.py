"""Check and measure the project on a GPU, in at most eight minutes.

    python tests/gpu_check.py                   print a table, then its rows as JSON
    python tests/gpu_check.py --json new.json   write the JSON to a file as well
    python tests/gpu_check.py --tiny            shrink every section for a CPU

  references   outputs of tests/golden, in float32 and in bfloat16
  steps        one training step of every task on the CPU and on the device, with the same noise
  training     the mini preset by train.py: stopped by SIGTERM, resumed, finished
  sampling     sample.py on that run: draw, describe, ask, edit
  full size    the 2B model with random weights: speed, memory, share of the matmul peak

An exception becomes a row, the next section runs, and the exit status is 1. All files are in a
temporary folder.
"""
import argparse
import copy
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import PRESETS, RunFiles, TrainConfig, parts_of
from experiments.parts import prepare
from losses import contrastive_loss, flow_matching_loss, intrinsic_loss, masked_token_loss
from model import MMDiT
from run_folder import load_frozen, load_models, load_tasks
from sample import describe, generate
from teacher import QwenVision
from text_encoder import T5Config, T5Encoder
from train import Corrupted, Objective, Ranks, align, batch_latents, corrupt, make_optimizers
from vae import VAE

CPU = torch.device("cpu")
TOLERANCE = 1e-4                # of float32 between devices


class Sizes(NamedTuple):
    """How much work each section does."""
    training: str               # options of train.py beside the mini preset
    config: TrainConfig         # of the 2B model
    t5: T5Config
    side: int = 64              # of the latents: 512 pixels
    text_length: int = 256
    steps: int = 28             # of an image
    text_steps: int = 32        # of a caption
    matmul: int = 8192          # rows and columns
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    repeats: int = 3


FULL = Sizes("--log_every 10", PRESETS["sd3"], T5Config())
NARROW = replace(
    PRESETS["sd3"].model, width=64, depth=2, num_heads=2, text_dim=64, vocab_size=200,
    position_table=8, align_dims=(32, 48))
TINY = Sizes(
    "--train_scenes 120 --test_scenes 6 --vae_steps 2 --teacher_steps 2 --steps 24 --log_every 1 "
    "--model.width 32 --model.depth 2 --model.num_heads 2 --model.text_dim 32 --batch_size 4 "
    "--vae.block_channels 16 --text_encoder.dim 32 --sampling.steps 2 --sampling.text_steps 2",
    replace(PRESETS["sd3"], model=NARROW, align_depth=1),
    T5Config(vocab_size=256, dim=64, head_dim=32, ff_dim=128, depth=2, num_heads=2),
    side=8, text_length=16, steps=2, text_steps=2, matmul=256, batches=(1, 2), repeats=2)


# ---------------------------------------------------------------- the table

class Report:
    """The rows of the table, and the time that is left."""

    def __init__(self, minutes: float):
        self.rows: list[dict] = []
        self.section = ""
        self.start = time.monotonic()
        self.deadline = self.start + 60 * minutes

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def add(self, case: str, figure: float | None = None, unit: str = "", note: str = "") -> None:
        if figure is not None and not math.isfinite(figure):
            figure, note = None, f"error: {figure}"
        self.rows.append({
            "section": self.section, "case": case, "figure": figure, "unit": unit, "note": note})

    def attempt(self, case: str, function: Callable, *args) -> bool:
        """Call function(*args); an exception becomes a row. Returns whether there was none.

        In the section "full size" an exhausted memory is a result, not an error.
        """
        seconds = time.monotonic() - self.start
        print(f"{seconds:4.0f} s  {self.section}: {case}", file=sys.stderr)
        if self.left() < 0:
            self.add(case, note="skipped: no time left")
            return False
        try:
            function(*args)
            return True
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            note = f"error: {type(error).__name__}: {line:.200}"
            if self.section == "full size" and is_out_of_memory(error):
                note = "out of memory"
        self.add(case, note=note)
        gc.collect()                        # the exception kept tensors alive
        torch.cuda.empty_cache()
        return False

    def failed(self) -> bool:
        return any(row["note"].startswith("error") for row in self.rows)

    def table(self) -> str:
        lines = [("section", "case", "figure", "unit", "")]
        for row in self.rows:
            figure = "-" if row["figure"] is None else f"{row['figure']:.4g}"
            lines.append((row["section"], row["case"], figure, row["unit"], row["note"]))
        return "\n".join(f"{section:10} {case:45} {figure:>9} {unit:14} {note}".rstrip()
                         for section, case, figure, unit, note in lines)


def is_out_of_memory(error: Exception) -> bool:
    texts = ("out of memory", "ALLOC_FAILED")       # cuBLAS and cuDNN raise errors of their own
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


# ---------------------------------------------------------------- reference outputs

Pairs = list[tuple[Tensor, Tensor]]     # outputs on the device, and those of the reference


class References(NamedTuple):
    """The outputs of each component, computed in a folder, on a device, in a type."""
    folder: Path
    device: torch.device
    dtype: torch.dtype

    def read(self, name: str, kind=None, **fields) -> tuple:
        """A model with the weights of a reference, its inputs, its outputs."""
        parts = {"weights": {}, "in": {}, "out": {}}
        # Importing conftest.py, which has such a reader, would hide the GPU.
        for full_name, x in load_file(ROOT / "tests/golden" / f"{name}.safetensors").items():
            part, own_name = full_name.split("/", 1)
            if part == "in":            # timesteps and probabilities, (B,), stay float32
                cast = x.is_floating_point() and x.ndim > 1
                x = x.to(self.device, self.dtype if cast else x.dtype)
            parts[part][own_name] = x
        model, file = None, self.folder / f"{name}.safetensors"
        if kind:
            save_file(parts["weights"], file)
            model = kind.from_pretrained(file, dtype=self.dtype, device=self.device, **fields)
        return model, parts["in"], parts["out"]

    def mmdit(self, name: str) -> Pairs:
        model, x, expected = self.read(name, MMDiT, num_heads=2)
        sources = {"img_gen": [], "img_edit": ["edit"],
                   "img_compose": ["compose_0", "compose_1", "compose_2"]}
        if "velocity" in expected:              # SD3
            out = model(x["latents"], x["text"], x["timestep"], want=("velocity",))
            return [(out.velocity, expected["velocity"])]
        out = {task: model(x["latents"], x["text"], x["timestep"], [x[n] for n in names],
                           align_depth=2) for task, names in sources.items()}
        out["text_only"] = model(None, x["text"], 0 * x["timestep"], want=("logits",))
        split = [name.split("/") for name in expected]
        return [(getattr(out[task], name), expected[f"{task}/{name}"]) for task, name in split]

    def vae(self, name: str, part: str) -> Pairs:
        model, x, expected = self.read(name, VAE, norm_groups=4)
        if part == "encode":
            return list(zip(model.moments(x["image"]), (expected["mean"], expected["logvar"])))
        return [(model.decode(x["normalized_latents"]), expected["decoded"])]

    def t5(self) -> Pairs:
        model, x, expected = self.read("t5_encoder", T5Encoder)
        return [(model(x["ids"]), expected["embeddings"])]

    def qwen(self) -> Pairs:
        model, x, expected = self.read("qwen25vl_vision", QwenVision, num_heads=2, window_size=56,
                                       full_attention_blocks=(1, 3))
        return [(model(x["patches"], x["grid_thw"]), expected["features"])]

    def losses(self) -> Pairs:
        _, x, expected = self.read("losses")
        flow = x["velocity"], x["noise"], x["latents"]
        masked = x["logits"], x["x0"], x["mask"], x["t"]
        hidden = x["image_hidden"], x["text_hidden"]
        mids = x["image_mid"], x["teacher_image"], x["text_mid"], x["teacher_text"]
        out = {
            "flow_matching": flow_matching_loss(*flow),
            "flow_matching_x0_form": flow_matching_loss(*flow, x["sigma"]),
            "masked_token_loss": masked_token_loss(*masked),
            "masked_token_loss_answer_only": masked_token_loss(*masked, x["answer"]),
            "contrastive_symmetric": contrastive_loss(*hidden),
            "contrastive_image_to_text": contrastive_loss(*hidden, symmetric=False),
            "intrinsic_paper": intrinsic_loss(*mids),
            "intrinsic_released": intrinsic_loss(*mids, released=True)}
        return [(out[name], expected[name]) for name in expected]

    def trajectory(self) -> Pairs:
        model, _, _ = self.read("unialignment_mmdit", MMDiT, num_heads=2)
        _, x, expected = self.read("sampling")
        latents = generate(model, x["noise"], x["text"], x["negative_text"], steps=8, guidance=7.0)
        return [(latents, expected["latents"])]

    def components(self) -> dict[str, Callable[[], Pairs]]:
        return {
            "SD3 MM-DiT, single file": partial(self.mmdit, "sd3_mmdit_single_file"),
            "SD3 MM-DiT, diffusers": partial(self.mmdit, "sd3_mmdit_diffusers"),
            "UniAlignment MM-DiT": partial(self.mmdit, "unialignment_mmdit"),
            "VAE encode, single file": partial(self.vae, "vae_single_file", "encode"),
            "VAE decode, single file": partial(self.vae, "vae_single_file", "decode"),
            "VAE encode, diffusers": partial(self.vae, "vae_diffusers", "encode"),
            "VAE decode, diffusers": partial(self.vae, "vae_diffusers", "decode"),
            "T5": self.t5, "Qwen vision": self.qwen, "losses": self.losses,
            "8 guided steps": self.trajectory}


def check_products(report: Report, device: torch.device) -> None:
    """Compare float32 products to float64: an error of 1e-6 versus 5e-4 with TF32."""
    a, b, kernels = torch.randn(1, 64, 32, 32), torch.randn(32, 32), torch.randn(64, 64, 3, 3)
    for name, product, x, y in (("matmul", torch.matmul, a, b), ("conv", F.conv2d, a, kernels)):
        exact = product(x.double(), y.double())
        error = (product(x.to(device), y.to(device)).cpu() - exact).abs().max() / exact.abs().max()
        note = "" if error < 2e-5 else "error: not float32; is TF32 on?"
        report.add(f"{name}, float32", error.item(), "relative error", note)


@torch.no_grad()
def compare(report: Report, case: str, compute: Callable[[], Pairs], tolerance: float) -> None:
    """Add the largest absolute error over all outputs of a component."""
    pairs = [(a.float().cpu(), b) for a, b in compute()]
    error = max((a - b).abs().max().item() for a, b in pairs)
    note = f"outputs up to {max(b.abs().max().item() for _, b in pairs):.2g}"
    if error > tolerance:
        note = f"error: above {tolerance}"
    report.add(case, error, "absolute error", note)


def references(report: Report, device: torch.device, folder: Path) -> None:
    report.attempt("TF32", check_products, report, device)
    for dtype, tolerance in ((torch.float32, TOLERANCE), (torch.bfloat16, math.inf)):
        for name, compute in References(folder, device, dtype).components().items():
            case = f"{name}, {str(dtype).removeprefix('torch.')}"
            report.attempt(case, compare, report, case, compute, tolerance)


# ---------------------------------------------------------------- a training step of every task

def moved(x, device: torch.device):
    """Move every tensor of a batch, which nests tuples."""
    if isinstance(x, tuple):
        parts = [moved(part, device) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x.to(device) if isinstance(x, Tensor) else x


def one_step(model: MMDiT, corrupted: Corrupted, config: TrainConfig) -> dict[str, float]:
    """Losses before an optimizer step, the norm of the gradient, and the loss after it."""
    objective = Objective(model, config)
    values = objective(corrupted)
    values["loss"].backward()
    values["gradient norm"] = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for optimizer in make_optimizers(model, config):
        optimizer.step()
    with torch.no_grad():
        values["loss after"] = objective(corrupted)["loss"]
    return {name: value.item() for name, value in values.items()}


def compare_steps(report: Report, device: torch.device, folder: Path) -> None:
    config = replace(PRESETS["mini"], out=str(folder), autocast=False, train_scenes=120,
                     test_scenes=6, vae_steps=4, teacher_steps=1)
    prepare(config, folder)
    parts = parts_of(config, folder)
    frozen = load_frozen(config, parts, CPU)
    tokenizer = frozen.tokenizer
    dataset = load_tasks(config, parts, tokenizer)
    align(dataset, config, parts, config.model.align_dims[1], Ranks(0, 1, CPU))
    empty = tokenizer([""], length=config.sampling.text_length)     # (1, L)
    model, _ = load_models(config, tokenizer.vocab_size, None, CPU)
    for parameter in model.parameters():    # a fresh model hides most of its blocks behind zeros
        nn.init.normal_(parameter, std=0.05)

    for group in {group.task: group for group in dataset.groups}.values():
        batch = dataset.__getitems__(group.indices[:config.batch_size])
        generator = torch.Generator().manual_seed(0)
        latents = batch_latents(batch, frozen.vae, generator)       # (B, 1 + R, C, h, w)
        corrupted = corrupt(batch, latents, frozen.text_encoder, tokenizer.mask_id, empty,
                            generator, config)
        here = one_step(copy.deepcopy(model), corrupted, config)
        there = one_step(copy.deepcopy(model).to(device), moved(corrupted, device), config)
        for name, value in here.items():
            difference = abs(value - there[name])
            note = f"cpu {value:.6f}, {device.type} {there[name]:.6f}"
            # Muon multiplies in bfloat16, whose rounding differs between devices.
            if name != "loss after" and difference > TOLERANCE * max(1, abs(value)):
                note = f"error: {note}"
            report.add(f"{group.task}: {name}", difference, "difference", note)


# ---------------------------------------------------------------- the command lines

def run_script(arguments: list, log: Path, device: torch.device, seconds: float,
               stop_at: Path | None = None) -> float:
    """Run a script of the project; return how long it took.

    seconds: the limit. stop_at: send SIGTERM as soon as this file exists. Raises RuntimeError for
    an exit status other than 0, subprocess.TimeoutExpired at the limit.
    """
    start, (script, *options) = time.monotonic(), map(str, arguments)
    environment = dict(os.environ)
    if device.type == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, ROOT / script, *options], cwd=log.parent, env=environment,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while stop_at and process.poll() is None and time.monotonic() < start + seconds:
            if stop_at.exists():
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.02)
        status = process.wait(max(1.0, start + seconds - time.monotonic()))
    except BaseException:                   # the limit, or Ctrl-C
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if status:
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        raise RuntimeError(f"exit status {status}: {''.join(lines[-1:])}")
    return time.monotonic() - start


def train_and_resume(report: Report, options: str, device: torch.device, run: Path) -> None:
    """Stop the mini preset after its first line of metrics, resume and finish it."""
    files, limit = RunFiles(run), 0.3 * report.left()
    command = ["train.py", "--preset", "mini", "--out", run, *options.split()]
    seconds = run_script(command, run.with_suffix(".log"), device, limit, stop_at=files.metrics)
    report.add("train.py until SIGTERM, with parts", seconds, "s")
    stopped = int(files.newest_checkpoint().name.removeprefix("checkpoint-"))
    report.add("steps in its checkpoint", stopped, "steps")
    command = ["train.py", "--resume", "--out", run]
    seconds = run_script(command, run.with_suffix(".log"), device, limit)
    report.add("train.py --resume, with scores", seconds, "s")

    config = json.loads(files.config.read_text())
    every, last = config["log_every"], config["steps"]
    lines = [json.loads(line) for line in files.metrics.read_text().splitlines()]
    complete = [line["step"] for line in lines] == list(range(every, last + 1, every))
    note = "" if complete and stopped < last else "error: lines of metrics.jsonl are missing"
    report.add("steps reached", lines[-1]["step"], "steps", note)
    seconds = lines[-1]["seconds"] - lines[0]["seconds"]
    report.add("seconds per step", seconds / (last - every), "s")


def sample_commands(report: Report, device: torch.device, run: Path) -> None:
    picture = min((RunFiles(run).world / "images/test").glob("*.png"))
    tasks = {
        "draw": ["a large red circle at the center on a gray background", "--out", run / "1.png"],
        "describe": ["--describe", picture],
        "ask": ["--image", picture, "--ask", "what color is the circle?"],
        "edit": ["--image", picture, "--edit", "make the red circle blue", "--out", run / "2.png"]}

    def sample(task: str, options: list) -> None:
        command = ["sample.py", *options, "--run", run, "--device", device]
        seconds = run_script(command, run / f"{task}.log", device, report.left())
        report.add(task, seconds, "s", "exit status 0")

    for task, options in tasks.items():
        report.attempt(task, sample, task, options)


# ---------------------------------------------------------------- full size

def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(function: Callable, device: torch.device, repeats: int) -> float:
    """The median duration of function(), after one call that is not counted."""
    times = []
    for _ in range(1 + repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak_memory(device: torch.device) -> float | None:
    """GiB at most allocated since the last call, weights included; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 2 ** 30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def count_flops(function: Callable) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def random_weights(build: Callable, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Build a module without memory, then fill it on the device."""
    with torch.device("meta"):
        module = build()
    module = module.to(dtype).to_empty(device=device)
    for tensor in module.state_dict().values():
        tensor.normal_(std=0.02)
    return module


def random_batch(sizes: Sizes, b: int, device: torch.device, text_dtype: torch.dtype) -> Corrupted:
    """Pairs for both branches, in the form that `corrupt` returns."""
    c, length, randn = sizes.config.model, sizes.text_length, partial(torch.randn, device=device)
    x, noise, noisy = randn(3, b, c.latent_channels, sizes.side, sizes.side)    # (B, C, H, W)
    prompts, masked = randn(2, b, length, c.text_dim, dtype=text_dtype)         # (B, L, D)
    tokens = torch.randint(c.vocab_size - 1, (b, length), device=device)        # (B, L)
    mask = torch.rand(b, length, device=device) < 0.5                           # (B, L)
    sigma, t = torch.full((2, b), 0.5, device=device)                           # (B,)
    features = tuple(randn(2, b, c.align_dims[1]))                              # (B, d) each
    return Corrupted(x, (), noise, sigma, noisy, prompts, tokens, mask, torch.ones_like(mask), t,
                     masked, features, captions=None, empty=None)


class Bench:
    """Timings of the 2B model, each with its share of the device's matmul peak."""

    def __init__(self, report: Report, sizes: Sizes, device: torch.device):
        self.report, self.sizes, self.device = report, sizes, device
        self.peak = math.nan                # FLOP/s

    def run(self) -> None:
        # small memory first; training last, which takes all the time that is left
        for function in (self.matmul, self.draw, self.write, self.train):
            self.report.attempt(function.__name__, function)

    def add(self, case: str, seconds: float, flops: float) -> None:
        self.report.add(case, seconds, "s")
        self.report.add(f"{case}: share of peak", 100 * flops / seconds / self.peak, "%")

    def model(self, dtype: torch.dtype, device: torch.device) -> MMDiT:
        return random_weights(lambda: MMDiT(self.sizes.config.model), dtype, device)

    def matmul(self) -> None:
        n = self.sizes.matmul
        a, b = torch.randn(2, n, n, device=self.device, dtype=torch.bfloat16)
        seconds = median_seconds(lambda: [a @ b for _ in range(10)], self.device, 5) / 10
        self.peak = 2 * n ** 3 / seconds
        self.report.add(f"matmul {n}^3, bfloat16", self.peak / 1e12, "TFLOP/s")

    def draw(self) -> None:
        s, x = self.sizes, random_batch(self.sizes, 1, self.device, torch.bfloat16)
        draw = partial(generate, self.model(torch.bfloat16, self.device), x.noise, x.prompts,
                       torch.zeros_like(x.prompts), steps=s.steps, guidance=7.0)
        flops = count_flops(draw)
        seconds = median_seconds(draw, self.device, s.repeats)
        self.add(f"{s.steps} guided steps, {8 * s.side} px", seconds, flops)

    def write(self) -> None:
        s, x = self.sizes, random_batch(self.sizes, 1, self.device, torch.bfloat16)
        mask_id = s.config.model.vocab_size - 1
        case = f"caption, {s.text_length} tokens, {s.text_steps} steps"
        model = self.model(torch.bfloat16, self.device)
        try:
            encoder = random_weights(lambda: T5Encoder(s.t5), torch.bfloat16, self.device)
        except torch.OutOfMemoryError:
            encoder, case = lambda ids: x.masked, f"{case}, without T5 (too large)"
        write = partial(describe, model, encoder, x.latents.bfloat16(),
                        torch.full_like(x.tokens, mask_id), mask_id, s.text_steps)
        flops = count_flops(write)
        self.add(case, median_seconds(write, self.device, s.repeats), flops)

    def training_flops(self) -> int:
        """FLOPs of forward and backward per image, without those that checkpointing repeats."""
        meta = torch.device("meta")
        objective = Objective(self.model(torch.float32, meta), self.sizes.config)

        def both_passes() -> None:
            image, text = objective.branches(random_batch(self.sizes, 1, meta, torch.float32))
            outputs = image.velocity, image.image_mid, text.logits, text.text_mid
            sum(x.sum() for x in outputs).backward()

        return count_flops(both_passes)

    def train(self) -> None:
        """Double the batch until memory, or this variant's share of the time, runs out."""
        flops, model = self.training_flops(), self.model(torch.float32, self.device)
        optimizers = make_optimizers(model, self.sizes.config)
        inductor = self.device.type == "cuda"
        variants = ["plain", "checkpointing", "compiled"]
        for i, variant in enumerate(variants):
            model.gradient_checkpointing = variant == "checkpointing"
            seconds = 0.0                   # of the batch before
            if variant == "compiled":
                for block in model.blocks:  # aot_eager needs no compiler of C++
                    block.compile(backend="inductor" if inductor else "aot_eager")
                seconds = 30.0 if inductor else 0.0     # compiling takes about as long
            end = time.monotonic() + self.report.left() / (len(variants) - i)
            for batch in self.sizes.batches:
                case, start = f"{variant}, batch {batch}", time.monotonic()
                if start + 2 * seconds > end:
                    self.report.add(case, note="skipped: no time left")
                    break
                fits = self.report.attempt(
                    case, self.time_steps, case, model, optimizers, batch, batch * flops)
                if not fits:
                    break
                seconds = time.monotonic() - start

    def time_steps(self, case: str, model: MMDiT, optimizers: list, batch: int,
                   flops: int) -> None:
        config, device, memory = self.sizes.config, self.device, {}
        objective = Objective(model, config)
        corrupted = random_batch(self.sizes, batch, device, torch.bfloat16)
        model.zero_grad()                   # of a batch that did not fit

        def step() -> None:
            peak_memory(device)             # forget the peak of the step before
            with torch.autocast(device.type, torch.bfloat16):
                loss = objective(corrupted)["loss"]
            memory["forward"] = peak_memory(device)
            loss.backward()
            memory["backward"] = peak_memory(device)
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            memory["optimizer"] = peak_memory(device)

        seconds = median_seconds(step, device, self.sizes.repeats)
        self.add(case, seconds, flops)
        self.report.add(f"{case}: speed", batch / seconds, "images/s")
        for phase, peak in memory.items():
            self.report.add(f"{case}: memory of {phase}", peak, "GiB")


# ---------------------------------------------------------------- command line

def main() -> None:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tiny", action="store_true", help="narrow models and few steps, for a CPU")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu",
                   help="(default: %(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="a new file for device and rows")
    p.add_argument("--minutes", type=float, default=8.0,
                   help="skip the cases that do not fit (default: %(default)s)")
    a = p.parse_args()
    if a.json and a.json.exists():
        p.error(f"{a.json} exists; nothing is overwritten, choose another name")
    if (a.device == "cuda" and not cuda) or (a.device == "cpu" and not a.tiny):
        p.error("this needs a GPU, and there is none; --tiny runs on a CPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    if a.device == "cpu":
        torch.set_num_threads(1)            # faster for small models

    device, sizes, report = torch.device(a.device), TINY if a.tiny else FULL, Report(a.minutes)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        sections = {
            "references": partial(references, report, device, folder),
            "steps": partial(compare_steps, report, device, folder / "steps"),
            "training": partial(train_and_resume, report, sizes.training, device, folder / "run"),
            "sampling": partial(sample_commands, report, device, folder / "run"),
            "full size": Bench(report, sizes, device).run}
        for report.section, function in sections.items():
            report.attempt("all", function)

    result = {
        "device": torch.cuda.get_device_name() if a.device == "cuda" else "CPU",
        "torch": torch.__version__,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - report.start, 1),
        "rows": report.rows}
    print(report.table(), "\n\n", json.dumps(result), sep="")
    if a.json:
        a.json.write_text(json.dumps(result) + "\n")
    sys.exit(report.failed())


if __name__ == "__main__":
    main()
