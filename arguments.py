"""The command line of sample.py: its options, and every mistake that shows without the model."""
import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from config import ORDERS, SOLVERS, SampleSettings
from embeddings import Embeddings
from jobs import Job, read_edits
from records import find_file

EXAMPLES = """examples:
  python sample.py "a small green triangle at the center on a black background" --seed 3 \\
      --out triangle.png
  python sample.py "two objects and no square" --plan    completes the prompt first, then draws it
  python sample.py --prompts prompts.txt --out pictures/    one prompt a line
  python sample.py --edits edits.jsonl --out results/       one edit a line; again: what is missing
  python sample.py --describe a.png b.png --order ancestral --temperature 1
  python sample.py --image a.png --ask "is there a cat?" --ask "what color is it?" --dialogue
  python sample.py "a red circle" --film film.gif           how the picture leaves the noise
  python sample.py --describe a.png --film film.gif         how the text leaves its masks
released weights, in their own conventions (steps, prompts, order of a text):
  python sample.py "a cat" --model UniAlignment
  python sample.py --image cat.jpg --depth --model UniAlignment --width 640 --height 448
  python sample.py "a cat" --model UniAlignment/transformer --vae sd3/vae \\
      --t5 sd3/text_encoder_3 --tokenizer spiece.model
  python sample.py "a cat" --model sd3_medium_incl_clips_t5xxlfp8.safetensors \\
      --tokenizer spiece.model
plain SD3 runs without its CLIP towers, so its pictures differ from SD3's own.
"""

EDITS = """{"image": "a.png", "instruction": "make the circle blue"}, and if wanted a "seed" and the
"name" of the result. "image" may be a list; paths are relative to the file."""


def picture_names(out: Path, count: int) -> list[Path]:
    """Name `count` pictures: x.png, or x-1.png, x-2.png, ...; in a folder the next free numbers."""
    if out.suffix.lower() == ".png" and not out.is_dir():
        numbered = [out.with_stem(f"{out.stem}-{i + 1}") for i in range(count)]
        return [out] if count == 1 else numbered
    used = [int(f.stem) for f in out.glob("*.png") if f.stem.isdecimal()]
    return [out / f"{max(used, default=0) + 1 + i:04d}.png" for i in range(count)]


def _help(name: str) -> str:
    """The help of a field of SampleSettings."""
    [text] = [f.metadata["help"] for f in dataclasses.fields(SampleSettings) if f.name == name]
    return f"{text} (default: that of the model)"


def add_model_options(p: argparse.ArgumentParser) -> None:
    """Add the options that `load_pipeline` reads."""
    p.add_argument("--run", type=Path, help="folder of a training run (default: runs/tiny)")
    released = p.add_argument_group(
        "released weights, in place of --run; a part without a name is looked for in --model and "
        "beside it")
    released.add_argument("--model", type=Path, help="folder of a released pipeline, or the MM-DiT "
                          "alone: a file or folder, any layout")
    released.add_argument("--vae", type=Path, help="autoencoder")
    released.add_argument("--t5", type=Path, help="T5 v1.1 XXL encoder")
    released.add_argument("--tokenizer", type=Path, help="T5's spiece.model")
    released.add_argument("--mask-token", type=Path, help=".pth of the trained mask embedding")
    released.add_argument("--padding-id", type=int, choices=(0, 1),
                          help="(default: 1 for dual checkpoints, 0 for plain SD3)")
    released.add_argument("--image-size", type=int, help="pixels (default: 512)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"),
                   help="of all weights (default: float32 on CPU, bfloat16 on GPU and where the "
                        "weights of --model would not fit into the memory)")
    p.add_argument("--t5-dtype", choices=("float32", "bfloat16", "float8"),
                   help="of T5 alone; float8 keeps its matrices in fp8, in half of bfloat16's "
                        "memory (default: as --dtype)")
    p.add_argument("--embeddings", type=Path, metavar="FILE",
                   help="draw from embeddings that --save-embeddings wrote, without T5 and its "
                        "tokenizer: the texts to draw or to edit with, or all of the file's")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="(default: %(default)s)")


# options of sample.py that change a setting of the model
SETTINGS = ("guidance", "image_guidance", "guidance_interval", "solver", "negative_prompt", "order",
            "temperature", "block", "end_last")


def add_flow_options(p: argparse.ArgumentParser) -> None:
    """Add the options of the flow that draws, which `change_settings` reads."""
    p.add_argument("--solver", choices=SOLVERS, help=_help("solver"))
    p.add_argument("--guidance-interval", nargs=2, type=float, metavar=("LOW", "HIGH"),
                   help=_help("guidance_interval"))


def _add_settings(p: argparse.ArgumentParser) -> None:
    """Add the options that change how a model is sampled."""
    p.add_argument("--steps", type=int, help="steps per image, or steps per text")
    p.add_argument("--guidance", type=float, help=_help("guidance"))
    p.add_argument("--image-guidance", type=float, help=_help("image_guidance"))
    add_flow_options(p)
    p.add_argument("--negative", dest="negative_prompt", metavar="PROMPT",
                   help=_help("negative_prompt"))
    p.add_argument("--width", type=int, help="of pictures, in pixels (default: the model's)")
    p.add_argument("--height", type=int, help="the same; multiples of 16 for SD3 and UniAlignment")
    p.add_argument("--order", choices=ORDERS, help=_help("order"))
    p.add_argument("--temperature", type=float, help=_help("temperature"))
    p.add_argument("--block", type=int, metavar="TOKENS", help=_help("block"))
    p.add_argument("--end-last", action="store_true", default=None, help=_help("end_last"))


def _parser(description: str) -> argparse.ArgumentParser:
    """The options of sample.py; description stands above them in --help."""
    p = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="sample.py [-h] [PROMPT ...] [--OPTION VALUE ...]",
                                description=description, epilog=EXAMPLES, allow_abbrev=False)
    p.add_argument("prompt", nargs="*", help="texts to draw, one picture each")
    task = p.add_mutually_exclusive_group()
    task.add_argument("--prompts", type=Path, metavar="FILE", help="text file, one prompt a line")
    task.add_argument("--describe", nargs="+", type=Path, default=[], metavar="PICTURE",
                      help="caption these pictures")
    task.add_argument("--ask", action="append", default=[], metavar="QUESTION",
                      help="answer this question about --image; repeatable")
    task.add_argument("--edit", action="append", default=[], metavar="INSTRUCTION",
                      help="edit or compose the pictures of --image; given again, it edits the "
                           "last result")
    task.add_argument("--edits", type=Path, metavar="FILE",
                      help=f"JSON lines, one edit each: {EDITS} Started again, it draws what is "
                           "missing in --out")
    for kind in ("edges", "depth", "pose"):
        task.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind,
                          help=f"draw the {kind} of --image")
    p.add_argument("--plan", action="store_true", default=None,
                   help="complete each text to draw to a full caption first, by the model itself; "
                        "for models that are trained on plans (README.md), and prompts that leave "
                        "much open")
    p.add_argument("--image", nargs="+", action="extend", type=Path, default=[], metavar="PICTURE",
                   help="source of --ask, --edit, --edges, --depth and --pose")
    p.add_argument("--dialogue", action="store_true", default=None,
                   help="each question of --ask follows the questions and answers before it")
    p.add_argument("--out", type=Path,
                   help="a .png file (several turns: x-1.png, x-2.png, ...), or a folder that gets "
                        "numbered files (default: pictures)")
    p.add_argument("--film", type=Path, metavar="GIF",
                   help="a film of the one picture or text, a frame a step: below 2 MB, and a "
                        "strip of some frames as .png")
    p.add_argument("--save-embeddings", type=Path, metavar="FILE",
                   help="only encode the texts to draw or to edit with, for --embeddings on "
                        "another machine; needs T5 and its tokenizer alone (--t5, --tokenizer; "
                        "without --model, --padding-id 0 is for plain SD3)")
    p.add_argument("--seed", type=int, default=0,
                   help="any integer; the same seed gives the same result (default: %(default)s)")
    _add_settings(p)
    add_model_options(p)
    return p


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises ValueError and OSError."""
    try:
        text = find_file(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    if "\0" in text:                                            # UTF-16 without its mark
        raise ValueError(f"{path}: holds zero bytes, so it is no UTF-8 text; save it as UTF-8")
    text = text.replace("\ufeff", "")       # byte order marks, also within files put together
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: holds no prompt; expected one a line")
    return prompts


def _check_task(p: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    """Stop where the texts and pictures do not make one task."""
    takes_image = bool(a.ask or a.edit or a.kind)
    if bool(a.prompt) == (bool(a.describe or a.edits) or takes_image):
        p.error("give texts to draw, or one of --describe, --ask, --edit, --edits, --edges, "
                "--depth, --pose; see --help for examples")
    if bool(a.image) != takes_image:
        p.error("--ask, --edit, --edges, --depth and --pose need --image, and nothing else takes "
                "it")
    if len(a.image) > 1 and (a.ask or a.kind):
        p.error(f"--{a.kind or 'ask'} looks at one picture, found {len(a.image)} after --image")
    pictures = a.describe + a.image
    if missing := [str(path) for path in pictures if not find_file(path).is_file()]:
        p.error(f"no such picture: {', '.join(missing)}")
    for text in a.prompt + a.ask + a.edit:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            p.error(f"the text {text!r} is not UTF-8; type it in a UTF-8 terminal, or put it "
                    "into a file for --prompts")


def _check_effect(p: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    """Stop where an option has no effect beside the others."""
    writes = bool(a.describe or a.ask)
    takes_t5 = a.model or a.save_embeddings and not a.run
    rules = (       # whether the options have an effect, where they do, the options
        (a.model, "with --model, as a run in --run has its own", ("vae", "image_size")),
        (takes_t5, "with --model, as a run in --run has its own",
         ("t5", "tokenizer", "mask_token", "padding_id")),
        (not a.embeddings, "without --embeddings, which stand for T5",
         ("t5", "tokenizer", "mask_token", "padding_id", "t5_dtype", "save_embeddings")),
        (not a.save_embeddings, "without --save-embeddings, which draws nothing",
         ("vae", "out", "film", "steps", "guidance", "image_guidance", "width", "height")),
        (not a.model, "without --model", ("run",)),
        (not writes, "where pictures are drawn",
          ("out", "guidance", "negative_prompt", "guidance_interval", "solver", "embeddings",
           "save_embeddings")),
        ((a.image or a.edits) and not writes, "where pictures are edited", ("image_guidance",)),
        (a.ask, "on --ask", ("dialogue",)),
        (a.prompt and not (a.embeddings or a.save_embeddings),
         "on texts to draw, and without embeddings in files", ("plan",)),
        (not a.edits, "on one picture or text, not on a file of edits", ("film",)),
        (a.order == "confidence", "with --order confidence", ("block", "end_last")),
        (writes, "on --describe and --ask", ("order", "temperature")))
    for has_effect, where, names in rules:
        given = [name for name in names if getattr(a, name) is not None]
        if given and not has_effect:
            option = given[0].removesuffix("_prompt").replace("_", "-")
            p.error(f"--{option} has an effect only {where}; remove it")


def _check_device(p: argparse.ArgumentParser, name: str) -> None:
    """Stop where a device does not exist, or does not compute."""
    try:
        torch.ones(1, device=name).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        p.error(f"--device {name}: not available ({str(error).splitlines()[0]:.100})")


def _check_writable(folder: Path) -> None:
    """Raise OSError where no file can be written in a folder, which need not exist."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    finally:
        for created in missing:             # a run that fails later leaves no empty folder
            with contextlib.suppress(OSError):
                created.rmdir()


def _check_out(p: argparse.ArgumentParser, a: argparse.Namespace, count: int) -> list[Path]:
    """Names for `count` pictures. Stop where they cannot be written, or would overwrite others."""
    try:
        if a.out.suffix and not a.out.is_dir():
            if a.out.suffix.lower() != ".png":
                p.error(f"{a.out}: pictures are written as .png; name a .png file or a folder")
            if len(a.prompt) > 1:
                p.error(f"--out {a.out} is one picture for {len(a.prompt)} prompts; name a folder")
        names = picture_names(a.out, count)
        if existing := [path for path in names if path.exists()]:
            p.error(f"{existing[0]} exists; nothing is overwritten, choose another name")
        _check_writable(names[0].parent)
    except OSError as error:
        p.error(f"--out {a.out}: cannot be written ({error})")
    return names


def _check_film(p: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    """Stop where --film has no single subject, or cannot be written, or would overwrite a file."""
    if a.film.suffix.lower() != ".gif":
        p.error(f"--film {a.film}: films are written as .gif; name a .gif file")
    subjects, files = a.names or a.describe or a.ask, (a.film, a.film.with_suffix(".png"))
    if len(subjects) != 1:
        p.error(f"--film shows one picture or text, found {len(subjects)}; give one of them")
    try:
        for file in files:
            if file.exists() or file.resolve() in (name.resolve() for name in a.names):
                taken = "exists" if file.exists() else "is the picture to draw"
                p.error(f"--film {a.film} writes {files[0].name} and {files[1].name}: {file} "
                        f"{taken}; nothing is overwritten, choose another name")
        _check_writable(a.film.parent)
    except OSError as error:
        p.error(f"--film {a.film}: cannot be written ({error})")


def _read_files(p: argparse.ArgumentParser, a: argparse.Namespace, out: Path) -> list[Job]:
    """Add the lines of --prompts to the prompts, and return the jobs of --edits."""
    try:
        if a.edits:
            if out.suffix:
                p.error(f"--out {out}: --edits needs a folder")
            jobs = read_edits(a.edits, out, a.seed)
            _check_writable(out)
            return jobs
        a.prompt += read_prompts(a.prompts) if a.prompts else []
        if a.embeddings and not (a.prompt or a.edit or a.kind or a.describe or a.ask):
            a.prompt += Embeddings(a.embeddings).prompts()
        if a.save_embeddings and a.save_embeddings.exists():
            p.error(f"{a.save_embeddings} exists; nothing is overwritten, choose another name")
    except OSError as error:
        p.error(f"{error.filename or a.prompts}: {error.strerror.lower()}")
    except ValueError as error:
        p.error(str(error))
    return []


def read_arguments(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """Read the command line; every mistake that shows without the model stops here."""
    p = _parser(description)
    a = p.parse_args(argv)
    out = a.out or Path("pictures")
    a.jobs = _read_files(p, a, out)
    _check_task(p, a)
    _check_effect(p, a)
    _check_device(p, a.device)
    a.out = out
    count = len(a.prompt or a.edit or [a.kind])
    draws_new = not (a.describe or a.ask or a.edits or a.save_embeddings)
    a.names = _check_out(p, a, count) if draws_new else []
    if a.film:
        _check_film(p, a)
    return a


def check_numbers(a: argparse.Namespace) -> None:
    """Raise ValueError for a number out of its range, as NaN and infinity are."""
    smallest = {"steps": 1, "image_size": 1, "width": 1, "height": 1, "guidance": 0,
                "image_guidance": 0, "temperature": 0, "block": 0}
    for name, least in smallest.items():
        value = getattr(a, name)
        if value is not None and not least <= value <= 1_000_000:
            raise ValueError(f"--{name.replace('_', '-')} = {value}: expected a number from "
                             f"{least} to 1000000")
