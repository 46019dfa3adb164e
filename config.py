"""Every option with its help, the presets, the command line of train.py, and the files of a run.

A preset is a `TrainConfig`, and every field of it is an option of train.py. run.json keeps the
configuration of a run, `RunFiles` names the files in its folder, `parts_of` its parts and data.

Run alone to see a preset as JSON:   python config.py [PRESET]
"""
import argparse
import dataclasses
import json
import sys
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path

from checkpoint import make_config, option, read_json, write_atomically
from data import parse_weights
from model import MMDiTConfig
from text_encoder import T5Config
from vae import VAEConfig


# ---------------------------------------------------------------- options

@dataclass(frozen=True)
class SampleSettings:
    """Sizes a model is trained for, and how it is sampled; the defaults fit the released model."""
    image_size: int = option(512, "side of an image, in pixels")
    text_length: int = option(256, "tokens of a prompt, or of a question with its answer")
    prompt_multiple: int = option(
        0, "pad prompts about source pictures to a multiple of this many tokens; 0: to text_length")
    padding_id: int = option(
        1, "token that pads a text: 1 (</s>) for dual checkpoints, 0 for plain SD3")
    steps: int = option(28, "Euler steps per image")
    guidance: float = option(7.0, "weight of the prompt; 1: none, and half the work")
    image_guidance: float = option(1.0, "weight of the source pictures; 1: none, and less work")
    shift: float = option(3.0, "shift of the noise levels: above 1, more steps at high noise")
    text_steps: int = option(64, "steps per text")
    perception_prompt: str = option(
        "draw the {kind} of the picture", "instruction for a map; {kind} is edges, depth or pose")


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
    init: str = option(
        "", "start from this MM-DiT checkpoint (SD3, UniAlignment or own), or from the folder of a "
        "run, which also brings its frozen parts and its shapes world; empty: random weights")
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
    train_scenes: int = option(0, "training scenes of the shapes world")
    test_scenes: int = option(0, "held-out scenes, all scored at the end")
    vae_steps: int = option(0, "training steps of the tiny autoencoder")
    teacher_steps: int = option(0, "training steps of the small teacher")
    # optimization
    steps: int = option(80_000, "optimizer steps")
    batch_size: int = option(8, "examples per rank and micro batch; each pair serves both branches")
    accumulation: int = option(4, "micro batches per step")
    lr: float = option(3e-5, "learning rate of AdamW")
    muon_lr: float = option(0.0, "learning rate of Muon for the blocks' matrices; 0: AdamW for all")
    muon_every: int = option(1, "update matrices every N steps, with N times the step size")
    weight_decay: float = option(0.01, "weight decay of AdamW")
    beta2: float = option(0.999, "second beta of AdamW")
    warmup: int = option(1000, "steps of linear warm-up")
    decay: bool = option(False, "linear decay to zero at the end; false: constant")
    clip: float = option(2.0, "largest norm of the mean gradient")
    ema: float = option(0.9995, "decay of the averaged weights, per step")
    ema_every: int = option(1, "update the averaged weights every N steps, with N steps' decay")
    # objective
    sigma_mean: float = option(
        0.0, "mean of logit(sigma), whose deviation is 1; above 0: noisier images")
    prompt_dropout: float = option(0.1, "share of empty prompts in the image branch, for guidance")
    text_weight: float = option(0.2, "weight of equation (2) in equation (5)")
    answer_weight: float = option(
        0.2, "the same for questions, whose few answer tokens are averaged over all positions")
    cross_weight: float = option(0.05, "weight of equation (3) in equation (5)")
    cross_temperature: float = option(0.07, "temperature of equation (3)")
    cross_unseen: bool = option(
        False, "contrast streams that have not seen the other side, in two more passes: the image "
        "with an empty text, the caption without an image")
    intrinsic_weight: float = option(0.1, "weight of equation (4) in equation (5)")
    align_depth: int = option(8, "block after which equation (4) reads both streams, from 1")
    released_loss: bool = option(False, "released form of equation (1): sigma^2 times the paper's")
    # machine
    autocast: bool = option(True, "bfloat16 matrix products with float32 weights")
    gradient_checkpointing: bool = option(
        False, "recompute blocks in the backward pass: less memory, a quarter slower")
    cache_latents: bool = option(
        False, "encode every picture once at the start and keep the mean latents in memory")
    workers: int = option(4, "processes that load pictures")
    log_every: int = option(20, "steps per line of metrics.jsonl")
    save_every: int = option(1000, "steps per checkpoint; only the newest is kept")
    keep: tuple[int, ...] = option(
        (), "steps whose averaged weights are kept for good, as kept-*.safetensors")


# ---------------------------------------------------------------- presets

TINY = TrainConfig(
    out="runs/tiny",
    weights="text_to_image=5,edits=12.6,edges=1.8,depth=0.3,pose=0.5,personalisation=2,"
            "questions=6.5",
    captioned="text_to_image",
    model=MMDiTConfig(                      # vocab_size becomes that of the tokenizer trained here
        width=128, depth=4, num_heads=4, text_dim=128, position_table=8, text_positions=32,
        qk_norm=True, exact_gelu=True, number_references=True,
        align_dims=(256, 128), align_silu=False),
    vae=VAEConfig(
        block_channels=(48, 48), layers_per_block=1, norm_groups=1, mid_attention=False, stem=4),
    text_encoder=T5Config(dim=128, head_dim=32, ff_dim=256, depth=2, num_heads=4),
    sampling=SampleSettings(
        image_size=64, text_length=32, prompt_multiple=16,
        steps=20, guidance=2.0, image_guidance=1.5, shift=1.0, text_steps=16),
    train_scenes=30_000, test_scenes=510, vae_steps=5000, teacher_steps=400,
    steps=35_000, batch_size=16, accumulation=1,
    lr=5e-3, muon_lr=0.025, muon_every=4, weight_decay=0.0, beta2=0.95,
    warmup=100, decay=True, clip=1.0, ema=0.998, ema_every=4,
    sigma_mean=1.4, text_weight=0.5, answer_weight=1.0, align_depth=2,
    cache_latents=True, workers=0, log_every=50)

PRESETS = {
    "tiny": TINY,
    "mini": replace(
        TINY, out="runs/mini", train_scenes=1200, test_scenes=12, vae_steps=300, teacher_steps=30,
        steps=300, save_every=100),
    "sd3": TrainConfig(
        gradient_checkpointing=True,
        model=MMDiTConfig(align_dims=(2048, 3584), align_silu=False)),
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
        self.seconds = run / "seconds.json"                     # duration of each phase
        self.world = run / "data"                               # train.jsonl, test.jsonl, images/
        self.tokenizer = run / "tokenizer.model"
        self.text_encoder = run / "text_encoder.safetensors"
        self.vae = run / "vae.safetensors"
        self.teacher = run / "teacher"
        self.scores = run / "scores.json"                       # of the shapes world
        self.report = run / "report.html"

    def checkpoint(self, step: int) -> Path:
        """The folder of a checkpoint: model, ema and optimizer as safetensors."""
        return self.folder / f"checkpoint-{step:08d}"

    def checkpoints(self) -> list[Path]:
        """All whole checkpoints, oldest first; a folder gets its name only when it is complete."""
        return sorted(self.folder.glob("checkpoint-*"))

    def newest_checkpoint(self) -> Path | None:
        return max(self.checkpoints(), default=None)

    def averaged_weights(self) -> Path | None:
        """The averaged weights of the newest checkpoint, which are those to sample from."""
        return max(self.folder.glob("checkpoint-*/ema.safetensors"), default=None)

    def kept(self, step: int) -> Path:
        """Averaged weights that `keep` names."""
        return self.folder / f"kept-{step:08d}.safetensors"

    def samples(self, name: str = "") -> Path:
        """A sheet of samples: samples.png, or samples_NAME.png."""
        return self.folder / (f"samples_{name}.png" if name else "samples.png")

    def all_samples(self) -> list[Path]:
        return sorted(self.folder.glob("samples*.png"))


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


def read_config(file: Path) -> TrainConfig:
    """Read a run.json. Raises ValueError that names the file and the field."""
    values = read_json(file.read_bytes(), str(file))
    if "sampling" not in values:
        raise ValueError(f"{file}: no 'sampling' in it; expected the run.json that train.py writes")
    for name, hint in typing.get_type_hints(TrainConfig).items():
        if dataclasses.is_dataclass(hint) and name in values:
            values[name] = make_config(hint, values[name], str(file))
    return make_config(TrainConfig, values, str(file))


def write_config(config: TrainConfig, run: Path) -> None:
    """Write the run.json of a run, whose folder is made."""
    text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    write_atomically(RunFiles(run).config, lambda file: file.write_text(text))


# ---------------------------------------------------------------- command line

def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected true or false")
    return text.lower() == "true"


def _parse_integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


# type of a field -> how its text is parsed, and the placeholder in the help
_PARSERS = {
    bool: (_parse_bool, "true|false"), tuple[int, ...]: (_parse_integers, "N,N"),
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


def _inherit(config: TrainConfig, given: typing.Collection[str]) -> TrainConfig:
    """Take frozen parts, sizes and shapes world from the run that --init names.

    given: names of the options on the command line, which win. Raises ValueError for a run without
    a checkpoint.
    """
    before = RunFiles(config.init)
    if not config.init or not before.config.is_file():
        return config
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
    """Read the configuration of the run in --out. Raises ValueError without a run."""
    file = RunFiles(config.out).config
    if not file.is_file():
        raise ValueError(f"--resume: {config.out} holds no run (no run.json); "
                         "start one without --resume")
    if others := sorted(set(given) - {"out"}):
        raise ValueError(f"--resume takes the configuration from {file}; "
                         f"remove --{', --'.join(others)}")
    return replace(read_config(file), out=config.out)           # the folder may have moved


def _check_numbers(config: TrainConfig) -> None:
    for name in ("steps", "batch_size", "accumulation", "log_every", "save_every", "lr", "clip",
                 "cross_temperature", "muon_every"):
        if not getattr(config, name) > 0:                       # NaN is not above 0 either
            raise ValueError(f"--{name} must be positive")


def _check_effect(config: TrainConfig, given: typing.Collection[str]) -> None:
    """Raise ValueError for a size that the checkpoint beside it specifies already."""
    for path, group in (("init", "model."), ("vae_path", "vae."), ("t5_path", "text_encoder.")):
        # --init may lack alignment heads, whose widths are then free
        sizes = [n for n in given if n.startswith(group) and not n.startswith("model.align_")]
        if getattr(config, path) and sizes:
            raise ValueError(f"--{sizes[0]} has no effect beside --{path}: the checkpoint brings "
                             "its own configuration; remove one of them")


def _check_sources(config: TrainConfig) -> None:
    """Raise ValueError for a path that is not there, and for one that is needed and not given."""
    paths = ("data", "init", "vae_path", "t5_path", "tokenizer_path", "teacher_path", "mask_token")
    for name in paths:
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
    """Raise ValueError where --out holds a run with a checkpoint or data, which would be lost."""
    files = RunFiles(out)
    if files.config.exists() and (files.newest_checkpoint() or files.world.exists()):
        raise ValueError(f"{out} already holds a run; continue it with --resume, choose another "
                         "--out, or remove the folder")


def parse_arguments(argv: list[str] | None = None, description: str = "") -> TrainConfig:
    """Read the command line: a preset with changes, or with --resume the configuration of the run.

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
                   help="continue the run in --out with its own configuration")
    _add_fields(p.add_argument_group("fields of the configuration"), TrainConfig, preset)
    values = vars(p.parse_args(argv))
    resume = values.pop("resume")
    given = {name: value for name, value in values.items() if name not in ("preset", "stage")}
    try:
        config = _override(preset, given)
        if resume:
            return _resume(config, given)
        _check_folder(config.out)
        _check_effect(config, given)
        _check_numbers(config)
        parse_weights(config.weights)
        config = _inherit(config, given)
        _check_sources(config)
    except ValueError as error:
        p.error(str(error))
    return config


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    if name not in PRESETS:
        sys.exit(__doc__)
    print(json.dumps(dataclasses.asdict(PRESETS[name]), indent=2))
