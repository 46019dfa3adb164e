"""Every option with its help, the presets, the command line of train.py, and the files of a run.

A preset is a `TrainConfig`, and every field of it is an option of train.py. run.json keeps the
configuration of a run, `RunFiles` names the files in its folder, `parts_of` its parts and data.

Run alone to see a preset as JSON:   python config.py [PRESET]
"""
import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import sys
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path

from checkpoint import (Checkpoint, check_ranges, make_config, note, option, read_json,
                        write_atomically)
from data import parse_numbers, parse_weights
from model import MMDiTConfig, kind_of_checkpoint
from text_encoder import T5Config, spiece_in
from vae import VAEConfig


# ---------------------------------------------------------------- options

ORDERS = ("confidence", "left", "ancestral")                    # of revealing the tokens of a text
SOLVERS = ("euler", "ab2", "sde")                               # of the flow that draws an image


@dataclass(frozen=True)
class SampleSettings:
    """The conventions of a checkpoint: sizes it is trained for, prompts, and how it is sampled."""
    image_size: int = option(512, "side of an image, in pixels", least=1)
    text_length: int = option(
        256, "tokens of a prompt, or of a question with its answer", least=2)
    prompt_multiple: int = option(
        0, "pad prompts about source pictures to a multiple of this many tokens; 0: to text_length",
        least=0)
    padding_id: int = option(
        1, "token that pads a text: 1 (</s>) for dual checkpoints, 0 for plain SD3",
        least=0, most=1)
    steps: int = option(28, "steps per image", least=1)
    guidance: float = option(
        7.0, "weight of the prompt; 1: none, and half the work", least=0, below=math.inf)
    image_guidance: float = option(
        1.0, "weight of the source pictures; 1: none, and less work", least=0, below=math.inf)
    shift: float = option(
        3.0, "shift of the noise levels: above 1, more steps at high noise",
        above=0, below=math.inf)
    text_steps: int = option(64, "steps per text", least=1)
    perception_prompt: str = option(
        "draw the {kind} of the picture", "instruction for a map; {kind} is edges, depth or pose")
    question_template: str = option(
        "{question}", "what the model reads of a question, in training and in sampling")
    answer_length: int = option(
        0, "tokens of a question with its answer in sampling; 0: text_length", least=0)
    negative_prompt: str = option(
        "", "what pictures are led away from, in place of the empty prompt")
    order: str = option(
        "", "which tokens of a text come first: confidence, left or ancestral; empty: confidence "
        "for captions, left for answers")
    temperature: float = option(
        0.0, "of the text; 0: the most probable token, 1: drawn from the model's distribution",
        least=0, below=math.inf)
    block: int = option(
        0, "tokens of a block of text: the left block is filled in first; 0: one block", least=0)
    end_last: bool = option(
        False, "by confidence, reveal the end of a text after all its words")
    solver: str = option(
        "euler", "of the flow: euler, as released; ab2, of second order at no more passes, so that "
        "fewer steps do; or sde, which draws half of the noise anew in every step, for prompts "
        "that leave much open, with five times the steps")
    guidance_interval: tuple[float, float] = option(
        (0.0, 1.0), "lowest and highest sigma with guidance; the steps outside are half the work")
    text_only_length: int = option(
        0, "tokens of a text without a picture, its question included; 0: as text_length",
        least=0)

    def __post_init__(self):
        if self.order not in ("", *ORDERS):
            raise ValueError(f"sampling.order {self.order}: expected {', '.join(ORDERS)} or "
                             "nothing")
        if self.solver not in SOLVERS:
            raise ValueError(f"sampling.solver {self.solver}: expected {', '.join(SOLVERS)}")
        interval = self.guidance_interval
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"sampling.guidance_interval {interval}: expected two numbers from 0 "
                             "to 1, the lower one first")
        if "{question}" not in self.question_template:
            raise ValueError(f"sampling.question_template {self.question_template!r}: expected "
                             "{question} in it, the place of the question")


# How users of the released weights sample them; sample.py takes these where a checkpoint has no
# run.json. SD3 stands for plain SD3 medium, DUAL for Dual-Diffusion and UniAlignment.
SD3 = SampleSettings(padding_id=0)
DUAL = SampleSettings(
    steps=50, text_steps=32, order="ancestral", temperature=1.0, answer_length=128,
    question_template="Q: {question} A: ",
    perception_prompt="Provide a detailed {kind} map of the entire scene.",
    negative_prompt="low quality, low resolution, blurry, deformed, oversaturated, "
                    "undersaturated, out of frame")


@dataclass(frozen=True)
class TrainConfig:
    """Everything about a run. The defaults are the paper's; a preset changes what differs."""
    out: str = option("runs/sd3", "folder of the run")
    seed: int = option(0, "seed of data order, noise and initial weights")
    # data and frozen parts
    data: str = option(
        "", "JSONL files, separated by commas, or the folder of a shapes world; empty: make one")
    weights: str = option(
        "*=1", "share of each task in the batches, TASK=NUMBER,...; * is every task not named")
    captioned: str = option(
        "*", "tasks whose captions train the text branch, TASK,...; *: all; answers always do")
    dialogues: bool = option(
        False, "all questions of a record as one text, each answer after its question; false: one "
        "text for each question")
    max_aspect: float = option(
        1.0, "crop pictures to the nearest of several shapes of equal area, up to this width : "
        "height or height : width; 1: to squares", least=1, below=math.inf)
    init: str = option(
        "", "start from this MM-DiT checkpoint (SD3, UniAlignment or own), or from the folder of a "
        "run, which also brings its frozen parts and its shapes world; empty: random weights")
    init_blocks: int = option(
        1, "take every N-th block of --init alone, from the first to the last; 1: all", least=1)
    vae_path: str = option("", "autoencoder checkpoint; empty: train one on shapes")
    t5_path: str = option("", "T5 encoder checkpoint; empty: a random one, frozen")
    tokenizer_path: str = option("", "sentencepiece model; empty: train one on the data's texts")
    teacher_path: str = option(
        "", "folder of Qwen2.5-VL for the intrinsic alignment; empty: train a small one on shapes")
    mask_token: str = option("", ".pth file with the trained mask embedding of the released T5")
    model: MMDiTConfig = MMDiTConfig()
    vae: VAEConfig = field(default_factory=VAEConfig)
    text_encoder: T5Config = field(default_factory=T5Config)
    sampling: SampleSettings = SampleSettings()
    train_scenes: int = option(0, "training scenes of the shapes world", least=0)
    test_scenes: int = option(0, "held-out scenes, all scored at the end", least=0)
    vae_steps: int = option(0, "training steps of the tiny autoencoder", least=0)
    teacher_steps: int = option(0, "training steps of the small teacher", least=0)
    # optimization
    steps: int = option(80_000, "optimizer steps", least=1)
    batch_size: int = option(
        8, "examples per rank and micro batch; each pair serves both branches", least=1)
    accumulation: int = option(4, "micro batches per step", least=1)
    lr: float = option(3e-5, "learning rate of AdamW", above=0, below=math.inf)
    modulation_lr: float = option(
        0.0, "AdamW's learning rate for the timestep's embedding and the weights, not biases, of "
        "the modulations; 0: that of --lr",
        least=0, below=math.inf)
    muon_lr: float = option(
        0.0, "learning rate of Muon for the blocks' matrices; 0: AdamW for all",
        least=0, below=math.inf)
    muon_every: int = option(
        1, "update matrices every N steps, with N times the step size", least=1)
    weight_decay: float = option(0.01, "weight decay of AdamW", least=0, below=math.inf)
    beta2: float = option(0.999, "second beta of AdamW", least=0, below=1)
    warmup: int = option(1000, "steps of linear warm-up", least=0)
    decay: bool = option(False, "linear decay to zero at the end; false: constant")
    clip: float = option(2.0, "largest norm of the mean gradient", above=0)
    ema: float = option(0.9995, "decay of the averaged weights, per step", least=0, below=1)
    ema_every: int = option(
        1, "update the averaged weights every N steps, with N steps' decay", least=1)
    # objective
    sigma_mean: float = option(
        0.0, "mean of logit(sigma), whose deviation is 1; above 0: noisier images",
        above=-math.inf, below=math.inf)
    sigma_means: str = option(
        "", "other means of single tasks, as TASK=NUMBER,...; a prompt that leaves much open "
        "decides less of a noisy image, so lower means suit it")
    prompt_dropout: float = option(
        0.1, "share of empty prompts in the image branch, for guidance", least=0, most=1)
    text_weight: float = option(
        0.2, "weight of equation (2) in equation (5)", least=0, below=math.inf)
    answer_weight: float = option(
        0.2, "the same for questions, whose few answer tokens are averaged over all positions",
        least=0, below=math.inf)
    cross_weight: float = option(
        0.05, "weight of equation (3) in equation (5)", least=0, below=math.inf)
    cross_temperature: float = option(0.07, "temperature of equation (3)", above=0)
    cross_unseen: bool = option(
        False, "contrast streams that have not seen the other side, in two more passes: the image "
        "with an empty text, the caption without an image")
    intrinsic_weight: float = option(
        0.1, "weight of equation (4) in equation (5)", least=0, below=math.inf)
    align_depth: int = option(
        8, "block after which equation (4) reads both streams, from 1", least=1)
    released_loss: bool = option(False, "released form of equation (1): sigma^2 times the paper's")
    # machine
    autocast: bool = option(True, "bfloat16 matrix products with float32 weights")
    gradient_checkpointing: bool = option(
        False, "recompute blocks in the backward pass: less memory, a quarter slower")
    cache_latents: bool = option(
        False, "encode every picture once at the start and keep the mean latents in memory")
    workers: int = option(4, "processes that load pictures", least=0)
    max_skipped: float = option(
        0.01, "end the run when more than this share of the records could not be used (one always "
        "may); 0: at the first one", least=0, most=1)
    teacher_online: str = option(
        "auto", "true: run the teacher in every step; false: compute its features once and cache "
        "them; auto: true above 200000 pairs")
    log_every: int = option(20, "steps per line of metrics.jsonl", least=1)
    save_every: int = option(1000, "steps per checkpoint; only the newest is kept", least=1)
    sample_every: int = option(
        1000, "steps between two samplings of the averaged weights, into samples-*.png and "
        "progress.png; 0: none. Their time is not in the seconds of metrics.jsonl", least=0)
    sample_prompts: str = option(
        "", "what to sample: JSONL records as of --data (prompts, edits, pictures to caption or "
        "ask about), or any other file with one prompt a line; empty: held-out records of the "
        "shapes world, else the first records of the data")
    new_data: bool = option(False, "with --resume: go on though the data has changed")
    keep: tuple[int, ...] = option(
        (), "steps whose averaged weights are kept for good, as kept-*.safetensors")

    @property
    def mean_by_task(self) -> dict[str, float]:
        """The means that sigma_means names. Raises ValueError."""
        return parse_numbers(self.sigma_means, "sigma_means") if self.sigma_means else {}


# ---------------------------------------------------------------- presets

TINY = TrainConfig(
    out="runs/tiny",
    weights="text_to_image=4.5,partial=3,plan=2.3,edits=14,edges=2.2,depth=0.3,pose=2.3,"
            "personalisation=2.4,questions=7",
    captioned="text_to_image",
    model=MMDiTConfig(                      # vocab_size becomes that of the tokenizer trained here
        width=128, depth=4, num_heads=4, text_dim=128, position_table=8, text_positions=48,
        qk_norm=True, exact_gelu=True, number_references=True,
        align_dims=(256, 128), align_silu=False),
    vae=VAEConfig(
        block_channels=(48, 48), layers_per_block=1, norm_groups=1, mid_attention=False, stem=4),
    text_encoder=T5Config(dim=128, head_dim=32, ff_dim=256, depth=2, num_heads=4),
    sampling=SampleSettings(
        image_size=64, text_length=32, text_only_length=48, prompt_multiple=16,
        steps=10, guidance=2.0, image_guidance=1.5, guidance_interval=(0.2, 1.0), shift=1.0,
        text_steps=16),
    train_scenes=30_000, test_scenes=510, vae_steps=5000, teacher_steps=400,
    steps=45_000, batch_size=16, accumulation=1,
    lr=5e-3, modulation_lr=1.5e-4, muon_lr=0.025, muon_every=4, weight_decay=0.0, beta2=0.95,
    warmup=100, decay=True, clip=1.0, ema=0.998, ema_every=4,
    sigma_mean=1.4, sigma_means="partial=0.2", text_weight=0.5, answer_weight=1.0, align_depth=2,
    cache_latents=True, workers=0, log_every=50, sample_every=2000)

PRESETS = {
    "tiny": TINY,
    "mini": replace(
        TINY, out="runs/mini", train_scenes=1200, test_scenes=12, vae_steps=300, teacher_steps=30,
        steps=300, save_every=100, sample_every=100),
    "sd3": TrainConfig(
        gradient_checkpointing=True, sampling=DUAL,
        model=MMDiTConfig(align_dims=(2048, 3584), align_silu=False)),
    # for one to eight cards of 24 GB: 256 pixels, a global batch of 256
    "small": TrainConfig(
        out="runs/small", sampling=replace(DUAL, image_size=256, text_length=128),
        model=MMDiTConfig(                  # text_dim becomes that of --t5_path
            width=768, depth=12, num_heads=12, text_dim=0, position_table=64, text_positions=128,
            align_dims=(2048, 3584), align_silu=False, qk_norm=True, number_references=True),
        text_encoder=T5Config(dim=768, ff_dim=2048, depth=12, num_heads=12),    # for --estimate
        batch_size=16, accumulation=16, lr=1e-4, align_depth=4, steps=100_000),
}


def stage(config: TrainConfig, number: int) -> TrainConfig:
    """Narrow a preset to stage 1, 2 or 3 of the paper (section 3).

    (1) pairs; (2) all tasks but questions; (3) fine-tuning on everything, in 3/8 of the steps.
    Each stage starts from the run of the one before.
    """
    weights = {1: "text_to_image=1", 2: f"{config.weights},questions=0", 3: config.weights}[number]
    return replace(
        config, weights=weights,
        steps=config.steps * 3 // 8 if number == 3 else config.steps,
        out=f"{config.out}-stage{number}",
        init=f"{config.out}-stage{number - 1}" if number > 1 else "")


# ---------------------------------------------------------------- the folder of a run

class RunFiles:
    """The map of a run's folder: which file is where."""

    def __init__(self, folder: str | Path):
        self.folder = run = Path(folder)
        self.config = run / "run.json"                          # the run's TrainConfig
        self.metrics = run / "metrics.jsonl"                    # losses
        self.skipped = run / "skipped.jsonl"                    # records that could not be used
        self.seconds = run / "seconds.json"                     # duration of each phase
        self.world = run / "data"                               # train.jsonl, test.jsonl, images/
        self.tokenizer = run / "tokenizer.model"
        self.text_encoder = run / "text_encoder.safetensors"
        self.vae = run / "vae.safetensors"
        self.teacher = run / "teacher"
        self.scores = run / "scores.json"                       # of the shapes world
        self.scored = run / "scores.jsonl"                      # of a few records, at each sampling
        self.cases = run / "samples.json"                       # of the sheets, for the report
        self.report = run / "report.html"
        self.progress = run / "progress.png"                    # all samplings of the training

    def checkpoint(self, step: int) -> Path:
        """The folder of a checkpoint: model, ema and optimizer as safetensors."""
        return self.folder / f"checkpoint-{step:08d}"

    def checkpoints(self) -> list[Path]:
        """All whole checkpoints, oldest first: checkpoint- and a number. All else is the user's.

        A folder gets such a name only when it is complete.
        """
        folders = self.folder.glob("checkpoint-*")
        ours = [f for f in folders if re.fullmatch("checkpoint-[0-9]+", f.name) and f.is_dir()]
        return sorted(ours, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))

    def newest_checkpoint(self) -> Path | None:
        return (self.checkpoints() or [None])[-1]

    def averaged_weights(self) -> Path | None:
        """The averaged weights of the newest checkpoint, which are those to sample from."""
        files = [folder / "ema.safetensors" for folder in self.checkpoints()]
        return ([file for file in files if file.is_file()] or [None])[-1]

    def kept(self, step: int) -> Path:
        """Averaged weights that `keep` names."""
        return self.folder / f"kept-{step:08d}.safetensors"

    def samples(self, name: str = "") -> Path:
        """A sheet of samples: samples.png, or samples_NAME.png."""
        return self.folder / (f"samples_{name}.png" if name else "samples.png")

    def all_samples(self) -> list[Path]:
        """The sheets of the finished model."""
        return sorted([*self.folder.glob("samples.png"), *self.folder.glob("samples_*.png")])

    def film(self, name: str) -> Path:
        """A film of one of the diffusions, "image" or "text"."""
        return self.folder / f"film-{name}.gif"

    def films(self) -> list[Path]:
        """The films of the two diffusions: film-NAME.gif."""
        return sorted(self.folder.glob("film-*.gif"))

    def samples_at(self, step: int) -> Path:
        """What the averaged weights of a step drew and wrote, one row."""
        return self.folder / f"samples-{step:08d}.png"

    def sampled_until(self, step: int) -> list[Path]:
        """The samples of all steps up to this one, oldest first."""
        files = self.folder.glob("samples-*.png")
        numbers = sorted(int(f.stem[8:]) for f in files if re.fullmatch("[0-9]{8,}", f.stem[8:]))
        return [self.samples_at(number) for number in numbers if number <= step]


def run_of(weights: Path) -> Path | None:
    """The folder of the run that wrote these weights; None for a file that no run wrote."""
    if weights.name.startswith("kept-"):
        run = weights.absolute().parent
    elif weights.absolute().parent.name.startswith("checkpoint-"):
        run = weights.absolute().parent.parent
    else:
        return None
    return run if RunFiles(run).config.is_file() else None


class Parts(typing.NamedTuple):
    """Where the data and the frozen parts of a run are."""
    data: tuple[Path, ...]          # JSONL files
    test: Path | None               # held-out records of a shapes world
    tokenizer: Path
    vae: Path
    text_encoder: Path
    teacher: Path


def parts_of(config: TrainConfig, run: Path) -> Parts:
    """Configured paths, with defaults inside the run folder."""
    files = RunFiles(run)
    world = Path(config.data or files.world)
    is_world = not config.data or world.is_dir()
    data = [world / "train.jsonl"] if is_world else map(Path, config.data.split(","))
    return Parts(
        data=tuple(data),
        test=world / "test.jsonl" if is_world else None,
        tokenizer=Path(config.tokenizer_path or files.tokenizer),
        vae=Path(config.vae_path or files.vae),
        text_encoder=Path(config.t5_path or files.text_encoder),
        teacher=Path(config.teacher_path or files.teacher))


class Release(typing.NamedTuple):
    """Where the parts of released weights are; None: not found."""
    vae: Path | None
    text_encoder: Path | None
    tokenizer: Path | None
    mask_token: Path | None


def find_release(model: Path, text_encoder: Path | None = None) -> Release:
    """Find the parts that belong to a released transformer.

    model: the folder of a released pipeline, the transformer's folder in it, or a single file,
    which may hold the autoencoder and T5. What it does not hold is looked for beside it, the
    tokenizer also beside `text_encoder`, where that is named.
    """
    model = model.absolute()
    around = (model, *itertools.islice(model.parents, 2 if model.is_file() else 1))

    def first(names: typing.Iterable[str], prefix: str) -> Path | None:
        if model.is_file() and Checkpoint(model).matches(f"^{prefix}"):
            return model
        found = (folder / name for folder in around for name in names)
        return next((path for path in found if path.is_dir()), None)

    # SD3's own text_encoder is a CLIP tower, its third one is T5
    if text_encoder is None:
        text_encoder = first(("text_encoder_3", "text_encoder"), r"text_encoders\.t5xxl\.")
    beside = (*around, text_encoder, text_encoder.parent) if text_encoder else around
    tokenizers = (spiece for folder in beside if (spiece := spiece_in(folder)))
    # in the released code's checkpoint folder, which holds the folder of the pipeline
    vectors = (f for folder in (*beside, model.parent.parent)
               for f in sorted(folder.glob("mask_token_emb*.pth")))
    return Release(first(("vae",), r"first_stage_model\."), text_encoder,
                   next(tokenizers, None), next(vectors, None))


# fields that hold paths, `data` perhaps several
PATHS = ("data", "init", "vae_path", "t5_path", "tokenizer_path", "teacher_path", "mask_token",
         "sample_prompts")


def _map_paths(config: TrainConfig, change: typing.Callable[[str], str]) -> TrainConfig:
    """Apply `change` to every path of a configuration."""
    values = {name: getattr(config, name).split(",") for name in PATHS}
    changed = {name: ",".join(change(path) if path else "" for path in paths)
               for name, paths in values.items()}
    return replace(config, **changed)


def write_config(config: TrainConfig, run: Path) -> None:
    """Write the run.json of a run, whose folder is made.

    Paths are absolute, `out` too. So the run can be used from any folder, and `read_config` finds
    parts that were moved together with the run.
    """
    values = dataclasses.asdict(_map_paths(config, os.path.abspath))
    values |= {"out": os.path.abspath(run), "new_data": False}          # said anew each time
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(RunFiles(run).config, lambda file: file.write_text(text))


def read_config(file: Path) -> TrainConfig:
    """Read a run.json. Raises ValueError that names the file and the field."""
    values = read_json(file.read_bytes(), str(file))
    if "sampling" not in values:
        raise ValueError(f"{file}: no 'sampling' in it; expected the run.json that train.py writes")
    for name, hint in typing.get_type_hints(TrainConfig).items():
        if dataclasses.is_dataclass(hint) and name in values:
            values[name] = make_config(hint, values[name], str(file))
    config = make_config(TrainConfig, values, str(file))

    def find(path: str) -> str:
        if Path(path).exists() or not os.path.isabs(config.out):        # relative: an older run
            return path
        moved = file.parent / os.path.relpath(path, config.out)     # the same way from the run
        return os.path.abspath(moved) if moved.exists() else path

    return _map_paths(config, find)


# ---------------------------------------------------------------- command line

def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected true or false")
    return text.lower() == "true"


def _parse_integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _parse_pair(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, expected two numbers: 0.2,0.9") from error
    return low, high


# type of a field -> how its text is parsed, and the placeholder in the help
_PARSERS = {
    bool: (_parse_bool, "true|false"), tuple[int, ...]: (_parse_integers, "N,N"),
    tuple[float, float]: (_parse_pair, "N,N"),
    int: (int, "N"), float: (float, "N"), str: (str, "TEXT"),
}


def _add_fields(parser: argparse._ArgumentGroup, kind, default, prefix: str = "") -> None:
    """Add an option for every field of a dataclass; nested fields become --outer.inner."""
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        value, hint = getattr(default, f.name), hints[f.name]
        if dataclasses.is_dataclass(hint):
            _add_fields(parser, hint, value, f"{prefix}{f.name}.")
            continue
        parse, placeholder = _PARSERS[hint]
        text = f"{f.metadata.get('help', '')} (default: {value!r})".strip().replace("%", "%%")
        parser.add_argument(f"--{prefix}{f.name}", type=parse, metavar=placeholder,
                            default=argparse.SUPPRESS, help=text)


def _override(default, values: dict[str, object], prefix: str = ""):
    """Replace the fields of a dataclass that the command line names."""
    changes = {}
    for f in dataclasses.fields(default):
        value = getattr(default, f.name)
        if dataclasses.is_dataclass(value):
            changes[f.name] = _override(value, values, f"{prefix}{f.name}.")
        elif prefix + f.name in values:
            changes[f.name] = values[prefix + f.name]
    return replace(default, **changes)


# options that may change when a run is resumed
RESUMABLE = ("steps", "batch_size", "accumulation", "workers", "max_skipped", "sample_every",
             "sample_prompts", "new_data")


MASK_TOKEN_ADVICE = (
    "no mask_token_emb.00-of-01.pth beside it; the released weights were trained with this vector "
    "and write poor texts without it; name it with ")


def _inherit_release(config: TrainConfig) -> TrainConfig:
    """Take frozen parts that lie beside the released weights that --init names."""
    found = find_release(Path(config.init), Path(config.t5_path) if config.t5_path else None)
    paths = {"vae_path": found.vae, "t5_path": found.text_encoder,
             "tokenizer_path": found.tokenizer}
    if kind_of_checkpoint(config.init) == "dual":
        paths["mask_token"] = found.mask_token
        if not (config.mask_token or found.mask_token):
            note(f"{config.init}: {MASK_TOKEN_ADVICE}--mask_token")
    new = {name: str(path) for name, path in paths.items() if path and not getattr(config, name)}
    for name, path in new.items():
        note(f"--{name} {path}, beside --init")
    return replace(config, **new)


def _inherit(config: TrainConfig, given: typing.Collection[str]) -> TrainConfig:
    """Take frozen parts, sizes and shapes world from the run that --init names.

    Of released weights, take the parts beside them. given: names of the options on the command
    line, which win. Raises ValueError for a run without a checkpoint.
    """
    before = RunFiles(config.init)
    if not config.init or not Path(config.init).exists():
        return config
    if not before.config.is_file():
        return _inherit_release(config)
    if before.averaged_weights() is None:
        raise ValueError(f"--init {config.init}: this run has no checkpoint yet")
    settings = read_config(before.config)
    parts = parts_of(settings, before.folder)
    paths = {"vae_path": parts.vae, "t5_path": parts.text_encoder,
             "tokenizer_path": parts.tokenizer, "mask_token": settings.mask_token}
    if parts.test:
        paths["data"] = parts.data[0].parent
    if settings.intrinsic_weight:
        paths["teacher_path"] = parts.teacher
    missing = {name: str(path) for name, path in paths.items() if not getattr(config, name)}
    if not any(name.startswith("sampling.") for name in given):
        config = replace(config, sampling=settings.sampling)
    return replace(config, **missing)


def _resume(config: TrainConfig, given: typing.Collection[str]) -> TrainConfig:
    """Read the configuration of the run in --out, with the few options that may change.

    Raises ValueError without a run, and for an option that would make it another run.
    """
    file = RunFiles(config.out).config
    if not file.is_file():
        raise ValueError(f"--resume: {config.out} holds no run (no run.json); "
                         "start one without --resume")
    if others := sorted(set(given) - {"out", *RESUMABLE}):
        raise ValueError(f"--resume takes the configuration from {file}; "
                         f"remove --{', --'.join(others)}; only --{', --'.join(RESUMABLE)} may "
                         "change")
    changes = {name: getattr(config, name) for name in RESUMABLE if name in given}
    return replace(read_config(file), out=config.out, **changes)        # the folder may have moved


def _check_effect(config: TrainConfig, given: typing.Collection[str]) -> None:
    """Raise ValueError for an option that has no effect beside another."""
    for path, group in (("init", "model."), ("vae_path", "vae."), ("t5_path", "text_encoder.")):
        # --init may lack alignment heads, whose widths are then free
        sizes = [n for n in given if n.startswith(group) and not n.startswith("model.align_")]
        if getattr(config, path) and sizes:
            raise ValueError(f"--{sizes[0]} has no effect beside --{path}: the checkpoint brings "
                             "its own configuration; remove one of them")
    needs = {                               # option -> whether it has an effect, and the reason
        "muon_every": (config.muon_lr, "--muon_lr 0: AdamW trains everything"),
        "init_blocks": (config.init, "random weights; --init is missing"),
        "cross_temperature": (config.cross_weight, "--cross_weight 0"),
        "cross_unseen": (config.cross_weight, "--cross_weight 0"),
        "align_depth": (config.intrinsic_weight, "--intrinsic_weight 0"),
        "teacher_online": (config.intrinsic_weight, "--intrinsic_weight 0"),
        "mask_token": (config.t5_path or config.init, "a random T5; name one with --t5_path"),
        "sample_prompts": (config.sample_every, "--sample_every 0"),
        "new_data": (False, "a new run; --resume is missing"),
        "model.vocab_size": (config.init, "the tokenizer, which specifies it"),
        "text_encoder.vocab_size": (False, "the tokenizer, which specifies it"),
        "text_encoder.mask_id": (False, "the tokenizer, which specifies it")}
    for name, (has_effect, reason) in needs.items():
        if name in given and not has_effect:
            raise ValueError(f"--{name} has no effect beside {reason}; remove it")


def _check_values(config: TrainConfig) -> None:
    """Raise ValueError for a value outside of its range."""
    check_ranges(config)
    parse_weights(config.weights)
    config.mean_by_task                                         # parses sigma_means
    if config.teacher_online not in ("auto", "true", "false"):
        raise ValueError(f"--teacher_online {config.teacher_online}: expected auto, true or false")
    if config.max_aspect > 1 and config.cache_latents:
        raise ValueError(f"--max_aspect {config.max_aspect}: latents are cached of squares alone; "
                         "add --cache_latents false")
    if wrong := [step for step in config.keep if step < 1]:
        raise ValueError(f"--keep {wrong[0]}: expected steps from 1")


def _check_sources(config: TrainConfig) -> None:
    """Raise ValueError for a path that is not there, and for one that is needed and not given."""
    for name in PATHS:
        for path in filter(None, getattr(config, name).split(",")):
            if not Path(path).exists():
                raise ValueError(f"--{name} {path}: no such file or folder")
    run_makes = {
        "data": config.train_scenes, "vae_path": config.vae_steps, "t5_path": config.vae_steps,
        "tokenizer_path": config.vae_steps,
        "teacher_path": config.teacher_steps or not config.intrinsic_weight}
    for name, made_by_run in run_makes.items():
        if not made_by_run and not getattr(config, name):
            text = TrainConfig.__dataclass_fields__[name].metadata["help"]
            raise ValueError(f"--{name} is needed: this preset does not make one ({text})")
    size = TINY.sampling.image_size                             # of every shapes world
    wrong_size = config.sampling.image_size != size
    if not config.data and (config.test_scenes <= 0 or wrong_size):
        raise ValueError("the shapes world needs --test_scenes above 0 and "
                         f"--sampling.image_size {size}")


def _check_folder(out: str) -> None:
    """Raise ValueError where --out holds a run, or files of the user that a run would overwrite."""
    files = RunFiles(out)
    if files.config.exists() and (files.newest_checkpoint() or files.world.exists()):
        raise ValueError(f"{out} already holds a run; continue it with --resume, choose another "
                         "--out, or remove the folder")
    ours = [path for path in vars(files).values() if path != files.folder] + files.checkpoints()
    taken = [path for path in ours if path.exists()]
    if taken and not files.config.exists():
        raise ValueError(f"{taken[0]} exists, but {out} holds no run (no run.json), which would "
                         "use or overwrite it; choose another --out")


def parse_arguments(argv: list[str] | None = None, description: str = "",
                    for_run: bool = True) -> TrainConfig:
    """Read the command line: a preset with changes, or with --resume the configuration of the run.

    for_run: False for an estimate, which needs neither data nor a free folder.
    Ends the process with status 2 and one line for anything that is wrong.
    """
    choice = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    choice.add_argument("--preset", choices=PRESETS, default="tiny")
    choice.add_argument("--stage", type=int, choices=(1, 2, 3))
    chosen = choice.parse_known_args(argv)[0]       # read first, as --help shows its defaults
    preset = PRESETS[chosen.preset]
    if chosen.stage:
        preset = stage(preset, chosen.stage)

    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="train.py [-h] [--preset NAME] [--stage 1|2|3] [--resume] [--FIELD VALUE ...]",
        allow_abbrev=False)
    p.add_argument("--preset", choices=PRESETS, default="tiny",
                   help="where the defaults come from (default: tiny); --help shows those of the "
                        "preset that is named beside it")
    p.add_argument("--stage", type=int, choices=(1, 2, 3),
                   help="one stage of the paper: 1 pairs, 2 all tasks but questions, 3 fine-tuning "
                        "on everything. Changes the defaults of --weights, --steps, --out and "
                        "--init (the run of the stage before). Without it: everything at once")
    p.add_argument("--resume", action="store_true",
                   help="continue the run in --out with its own configuration; beside it --steps "
                        "trains longer, and --batch_size and --accumulation keep the global batch "
                        "on another number of ranks")
    _add_fields(p.add_argument_group("fields of the configuration"), TrainConfig, preset)
    values = vars(p.parse_args(argv))
    resume = values.pop("resume")
    given = {name: value for name, value in values.items() if name not in ("preset", "stage")}
    try:
        config = _override(preset, given)
        config = replace(config, seed=config.seed % 2 ** 63)   # any integer is a seed
        if resume:
            config = _resume(config, given)
            _check_values(config)
            return config
        _check_values(config)
        if for_run:
            _check_folder(config.out)
        _check_effect(config, given)
        config = _inherit(config, given)
        if for_run:
            _check_sources(config)
    except ValueError as error:
        p.error(str(error))
    return config


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    if name not in PRESETS:
        sys.exit(__doc__)
    print(json.dumps(dataclasses.asdict(PRESETS[name]), indent=2))
