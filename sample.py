"""Sampling: images by flow matching, text by masked diffusion (arXiv 2509.23760, section 3).

  draw prompts
    python sample.py "a large red circle at the top left on a gray background"
  caption pictures
    python sample.py --describe picture.png
  answer questions
    python sample.py --image picture.png --ask "what color is the circle?"
  edit a picture; the second --edit edits the result of the first
    python sample.py --image picture.png --edit "make the red circle blue"
    python sample.py --image a.png --edit "make the circle blue" --edit "remove the square"
  compose pictures
    python sample.py --image a.png b.png --edit "put the object of picture 1 left of the \\
        object of picture 2 on a black background"
  draw the edges, the depth or the pose of a picture
    python sample.py --image picture.png --edges
    python sample.py --image picture.png --depth
    python sample.py --image picture.png --pose
  all options, and released weights
    python sample.py --help

One loop integrates every image, one loop fills in every text. A task is the inputs it gives them.
"""
import argparse
import contextlib
import dataclasses
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from checkpoint import check_ranges, write_atomically
from config import RunFiles, SampleSettings, parts_of, read_config
from data import load_image, prompt_length, text_lengths, to_pictures
from model import MMDiT
from records import find_file
from text_encoder import T5Encoder, T5Tokenizer
from vae import VAE


# ---------------------------------------------------------------- images: the flow

def flow_sigmas(steps: int, shift: float = 3.0) -> Tensor:
    """The noise levels of `steps` Euler steps, (steps + 1,) float32 from 1 to 0.

    Follows the public SD3 scheduler, which applies the shift s -> shift s / (1 + (shift - 1) s)
    twice: to the ends of the range (1 and 1/1000), then to the even steps between them. So the
    last step is a short one.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"steps = {steps}, shift = {shift}; expected at least one step and a "
                         "positive shift")

    def shifted(s: Tensor) -> Tensor:
        return shift * s / (1 + (shift - 1) * s)

    first, last = shifted(torch.tensor([1.0, 1e-3], dtype=torch.float64)).tolist()
    sigmas = shifted(torch.linspace(first, last, steps, dtype=torch.float64))       # (steps,)
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()                         # (steps + 1,)


@torch.no_grad()
def generate(model: MMDiT, noise: Tensor, text: Tensor, empty_text: Tensor, steps: int = 28,
             guidance: float = 7.0, shift: float = 3.0, references: Sequence[Tensor] = (),
             image_guidance: float = 1.0, progress: bool = False) -> Tensor:
    """Integrate dx = v dsigma from noise to latents by Euler steps; (B, C, H, W) float32.

    noise (B, C, H, W); text (B, L, D) of the prompts and empty_text (B or 1, L, D) of the empty
    prompt, both from T5; references: clean latents (B, C, H', W') of source pictures.

    Classifier-free guidance with weight g for the prompt and h for the references (InstructPix2Pix,
    arXiv 2211.09800, equation 3):  v = v_alone + h (v_empty - v_alone) + g (v_text - v_empty).
    v_text sees prompt and references, v_empty the references, v_alone neither.
    """
    x = noise.float()
    image_guided = bool(references) and image_guidance != 1     # h = 1 needs no v_alone
    guided = guidance != 1 or image_guided                      # g = h = 1 leaves v_text alone
    references = [r.to(text.dtype) for r in references]
    if guided:
        empty_text = empty_text.expand_as(text)                                     # (B, L, D)
        text = torch.cat([empty_text, text])                                        # (2 B, L, D)
        references = [torch.cat([r, r]) for r in references]                # each (2 B, C, H', W')
    sigmas = flow_sigmas(steps, shift).to(x.device)
    intervals = list(zip(sigmas[:-1], sigmas[1:]))
    for sigma, next_sigma in tqdm(intervals, desc="drawing", unit="step", disable=not progress):
        latents = torch.cat([x, x]) if guided else x                                # (2 B, C, H, W)
        timestep = (1000 * sigma).expand(len(latents))                              # (2 B,)
        v = model(latents.to(text.dtype), text, timestep, references,
                  want=("velocity",)).velocity.float()                              # (2 B, C, H, W)
        if guided:
            v_empty, v_text = v.chunk(2)                                            # (B, C, H, W)
            v = v_empty + guidance * (v_text - v_empty)                             # (B, C, H, W)
        if image_guided:
            v_alone = model(x.to(text.dtype), empty_text, timestep[:len(x)],
                            want=("velocity",)).velocity.float()                    # (B, C, H, W)
            v = v + (image_guidance - 1) * (v_empty - v_alone)                      # (B, C, H, W)
        x = x + (next_sigma - sigma) * v                                            # (B, C, H, W)
    return x


# ---------------------------------------------------------------- text: the masked diffusion

ORDERS = ("confidence", "left", "ancestral")


def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU for one without float64: Apple's GPUs, many of Intel's."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).log()
    except (TypeError, RuntimeError):
        return torch.device("cpu")
    return device


def draw_tokens(logits: Tensor, temperature: float,
                generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Draw a token for every position; returns tokens and their probabilities, (B, L) each.

    The mask token, the last class, is never drawn. Gumbel noise is in float64: in float32 its tail
    is cut off, which lowers the temperature unseen (arXiv 2409.02908). Results and generator are on
    the `float64_device` of the logits.
    """
    logits = logits[..., :-1].to(float64_device(logits.device)).double()    # (B, L, vocab - 1)
    scores = logits
    if temperature > 0:
        uniform = torch.rand(
            logits.shape, dtype=torch.float64, device=logits.device, generator=generator)
        gumbel = -(-uniform.clamp_min(1e-300).log()).log()                  # (B, L, vocab - 1)
        scores = logits / temperature + gumbel                              # (B, L, vocab - 1)
    tokens = scores.argmax(dim=-1)                                          # (B, L)
    probabilities = logits.softmax(dim=-1)                                  # (B, L, vocab - 1)
    return tokens, probabilities.gather(-1, tokens[..., None])[..., 0]      # (B, L), (B, L)


@torch.no_grad()
def describe(model: MMDiT, text_encoder: Callable[[Tensor], Tensor], latents: Tensor | None,
             tokens: Tensor, mask_id: int, steps: int = 16, order: str | None = "confidence",
             temperature: float = 0.0, generator: torch.Generator | None = None,
             progress: bool = False) -> Tensor:
    """Fill in the masked tokens of a text about clean images; ids (B, L).

    latents (B, C, H, W), or None for text alone. tokens (B, L): `mask_id` where text is wanted; all
    others, such as a question, stay. temperature: 0 takes the most probable token, 1 draws from the
    model's distribution.

    order: "confidence" reveals the most probable tokens first, equally many in each step; "left"
    the leftmost ones. "ancestral" is the released sampler, the reversed diffusion: t goes from 1 to
    1e-5, and a step from t to s reveals each masked token with probability (t - s) / t. None takes
    "left" for rows that hold a question, "confidence" for the others.

    generator: on the `float64_device` of the tokens, where all but the model runs.
    """
    if order not in (None, *ORDERS) or steps < 1 or temperature < 0:
        raise ValueError(f"order = {order!r}, steps = {steps}, temperature = {temperature}; "
                         f"expected one of {ORDERS}, at least one step and a temperature of at "
                         "least 0")
    model_device, device = tokens.device, float64_device(tokens.device)
    tokens = tokens.to(device, copy=True)
    timestep = torch.zeros(len(tokens), device=model_device)                # the images are clean
    times = torch.linspace(1, 1e-5, steps + 1, dtype=torch.float64).tolist()
    wanted = (tokens == mask_id).sum(dim=1)                                 # (B,)
    has_question = wanted < tokens.shape[1]                                 # (B,)
    from_left = has_question if order is None else torch.full_like(has_question, order == "left")
    logits = None
    for i in tqdm(range(steps + 1), desc="writing", unit="step", disable=not progress):
        last = i == steps                                       # one argmax fills in the rest
        masked = tokens == mask_id                                          # (B, L)
        if not masked.any():
            break
        if logits is None:                                      # else the last prediction holds
            text = text_encoder(tokens.to(model_device))                    # (B, L, D)
            logits = model(latents, text, timestep, want=("logits",)).logits    # (B, L, vocab)
        drawn, probability = draw_tokens(logits, 0 if last else temperature, generator)
        if last:
            reveal = masked
        elif order == "ancestral":
            t, s = times[i], times[i + 1]
            chance = torch.rand(
                tokens.shape, dtype=torch.float64, device=device, generator=generator)
            reveal = masked & (chance < (t - s) / t)                        # (B, L)
        else:
            done = wanted - masked.sum(dim=1)                               # (B,)
            quota = wanted * (i + 1) // steps - done                        # (B,) to reveal now
            left_rank = masked.cumsum(dim=1) - 1                            # (B, L)
            best_first = probability.masked_fill(~masked, -1).argsort(dim=1, descending=True)
            confidence_rank = best_first.argsort(dim=1)                     # (B, L)
            rank = torch.where(from_left[:, None], left_rank, confidence_rank)
            reveal = masked & (rank < quota[:, None])                       # (B, L)
        if reveal.any():
            tokens, logits = torch.where(reveal, drawn, tokens), None       # (B, L)
    return tokens.to(model_device)


# ---------------------------------------------------------------- the pipeline

def seeded(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator of random numbers; any integer is a seed."""
    return torch.Generator(device).manual_seed(seed % 2 ** 63)


@dataclass
class Pipeline:
    """Tokenizer, text encoder, autoencoder and transformer: from texts to images and back."""
    tokenizer: T5Tokenizer
    text_encoder: T5Encoder
    vae: VAE
    model: MMDiT
    settings: SampleSettings

    @classmethod
    def from_parts(cls, model: Path, vae: Path, t5: Path, tokenizer: Path, mask_token: Path | None,
                   settings: SampleSettings, dtype: torch.dtype = torch.float32,
                   device: str | torch.device = "cpu") -> "Pipeline":
        """Load the four parts, each in any layout.

        Raises ValueError where one cannot be read, or where images of this size cannot be drawn.
        """
        check_ranges(settings, "sampling.")
        tokens = T5Tokenizer(tokenizer, padding_id=settings.padding_id)
        autoencoder = VAE.from_pretrained(vae, dtype=dtype, device=device).eval()
        mmdit = MMDiT.from_pretrained(model, dtype=dtype, device=device).eval()
        unit = autoencoder.downscale * mmdit.config.patch_size              # pixels per patch
        largest = unit * mmdit.config.position_table
        if settings.image_size % unit or settings.image_size > largest:
            raise ValueError(f"image size {settings.image_size}: expected a multiple of {unit}, "
                             f"at most {largest}")
        text_encoder = T5Encoder.from_pretrained(
            t5, mask_token=mask_token, dtype=dtype, device=device).eval()
        return cls(tokens, text_encoder, autoencoder, mmdit, settings)

    @classmethod
    def from_run(cls, run: str | Path, dtype: torch.dtype = torch.float32,
                 device: str | torch.device = "cpu") -> "Pipeline":
        """Load the averaged weights of a run's newest checkpoint, and its frozen parts.

        Raises ValueError where something is missing.
        """
        files = RunFiles(run)
        averaged = files.averaged_weights()
        if not averaged or not files.config.is_file():
            raise ValueError(f"{run}: holds no trained model; train one with python train.py, or "
                             "name the parts of a released one (--model, --vae, --t5, --tokenizer)")
        config = read_config(files.config)
        parts = parts_of(config, files.folder)
        mask_token = Path(config.mask_token) if config.mask_token else None
        return cls.from_parts(averaged, parts.vae, parts.text_encoder, parts.tokenizer, mask_token,
                              config.sampling, dtype, device)

    @property
    def device(self) -> torch.device:
        return self.model.pos_embed.device

    def encode_text(self, ids: Tensor) -> Tensor:
        """T5 of ids (B, L) -> (B, L, D)."""
        return self.text_encoder(ids.to(self.device)).to(self.model.pos_embed.dtype)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> clean latents (B, C, h, w)."""
        return self.vae.encode(images.to(self.device)).to(self.model.pos_embed.dtype)

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seed: int = 0, steps: int | None = None,
             guidance: float | None = None, references: Sequence[Tensor] = (),
             progress: bool = False) -> Tensor:
        """Draw images (B, 3, H, W) in [-1, 1]. Image i depends on its prompt and seed + i alone."""
        s = self.settings
        steps = s.steps if steps is None else steps
        guidance = s.guidance if guidance is None else guidance
        side = s.image_size // self.vae.downscale
        shape = self.model.config.latent_channels, side, side
        noise = torch.stack([torch.randn(shape, generator=seeded(seed + i))
                             for i in range(len(prompts))])                         # (B, C, h, w)

        ids = self.tokenizer([*prompts, ""], length=s.text_length)                  # (B + 1, L)
        counts = text_lengths(ids[:-1], self.tokenizer.eos_id)
        lengths = [prompt_length(count, len(references), s.text_length, s.prompt_multiple)
                   for count in counts]
        latents = torch.empty_like(noise, device=self.device)                       # (B, C, h, w)
        for length in sorted(set(lengths)):         # a single one, unless there are references
            rows = [i for i, own_length in enumerate(lengths) if own_length == length]
            texts = self.encode_text(ids[[*rows, -1], :length])                     # (b + 1, l, D)
            latents[rows] = generate(
                self.model, noise[rows].to(self.device), texts[:-1], texts[-1:], steps, guidance,
                s.shift, [r[rows] for r in references], s.image_guidance, progress)
        images = self.vae.decode(latents.to(self.model.pos_embed.dtype))            # (B, 3, H, W)
        return images.float().clamp(-1, 1)

    def edit(self, prompts: Sequence[str], sources: Sequence[Tensor], seed: int = 0,
             steps: int | None = None, guidance: float | None = None,
             progress: bool = False) -> Tensor:
        """Draw images (B, 3, H, W) from any number of sources, each (B, 3, H', W') in [-1, 1]."""
        references = [self.encode_images(images) for images in sources]
        return self.draw(prompts, seed, steps, guidance, references, progress)

    def caption(self, images: Tensor, seed: int = 0, steps: int | None = None,
                order: str | None = None, temperature: float = 0.0, progress: bool = False,
                questions: Sequence[str] | None = None) -> list[str]:
        """Write captions of images (B, 3, H, W) in [-1, 1], or answers to one question about each.

        order: as in `describe`; None writes captions by confidence and answers from the left. By
        confidence the end of an answer comes first and fixes its length, which decides between "no"
        and "yes at the center" before the model has looked (experiments/LOG.md).
        """
        s = self.settings
        if questions is None:
            questions = [""] * len(images)
        tokens, answer = self.tokenizer.dialogue(questions, length=s.text_length)   # (B, L) each
        generator = seeded(seed, float64_device(self.device))
        ids = describe(
            self.model, self.encode_text, self.encode_images(images), tokens.to(self.device),
            self.tokenizer.mask_id, s.text_steps if steps is None else steps, order, temperature,
            generator, progress)                                                    # (B, L)
        rows = [row[mask].tolist() for row, mask in zip(ids.cpu(), answer)]
        return self.tokenizer.decode(rows)

    def warnings(self, prompt: str) -> list[str]:
        """Name the parts of a prompt that the model cannot see: unknown words, and a cut end."""
        count, length = len(self.tokenizer.encode(prompt)), self.settings.text_length
        warnings = [] if prompt.strip() else ["an empty text; the model is left free"]
        if count > length:
            warnings.append(f"{count} tokens, the model reads {length}: the end is cut off")
        words = prompt.split()
        unknown = [w for w in words if self.tokenizer.unk_id in self.tokenizer.encode(w)]
        if unknown:
            warnings.append(f"not in the model's vocabulary: {', '.join(unknown)}")
        return warnings


# ---------------------------------------------------------------- command line

EXAMPLES = """examples:
  python sample.py "a small green triangle at the center on a black background" --seed 3 \\
      --out triangle.png
  python sample.py --prompts prompts.txt --out pictures/    one prompt a line, sixteen in a batch
  python sample.py --describe a.png b.png --order ancestral --temperature 1
  python sample.py "a cat" --model UniAlignment/transformer --vae sd3/vae \\
      --t5 sd3/text_encoder_3 --tokenizer spiece.model
  python sample.py "a cat" --model sd3_medium_incl_clips_t5xxlfp8.safetensors \\
      --tokenizer spiece.model --padding-id 0
"""


def save_picture(picture: np.ndarray, path: Path, **metadata) -> None:
    """Write a picture (H, W, 3) uint8 as PNG, with prompt and settings in its text chunks."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    image = Image.fromarray(picture)
    write_atomically(path, lambda file: image.save(file, format="PNG", pnginfo=info))


def _names(out: Path, count: int) -> list[Path]:
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


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="sample.py [-h] [PROMPT ...] [--OPTION VALUE ...]",
                                description=__doc__, epilog=EXAMPLES, allow_abbrev=False)
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
    for kind in ("edges", "depth", "pose"):
        task.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind,
                          help=f"draw the {kind} of --image")
    p.add_argument("--image", nargs="+", action="extend", type=Path, default=[], metavar="PICTURE",
                   help="source of --ask, --edit, --edges, --depth and --pose")
    p.add_argument("--out", type=Path,
                   help="a .png file (several turns: x-1.png, x-2.png, ...), or a folder that gets "
                        "numbered files (default: pictures)")
    p.add_argument("--seed", type=int, default=0,
                   help="any integer; the same seed gives the same result (default: %(default)s)")
    p.add_argument("--steps", type=int, help="Euler steps per image, or steps per text")
    p.add_argument("--guidance", type=float, help=_help("guidance"))
    p.add_argument("--image-guidance", type=float, help=_help("image_guidance"))
    p.add_argument("--order", choices=ORDERS,
                   help="which tokens of a text come first: the most probable (default of "
                        "captions), the leftmost (default of answers), or random ones, as in the "
                        "released sampler")
    p.add_argument("--temperature", type=float,
                   help="of the text; 0: the most probable (default: 0)")
    p.add_argument("--run", type=Path, help="folder of a training run (default: runs/tiny)")
    released = p.add_argument_group(
        "released weights, in place of --run; a part without a name is looked for in --model")
    released.add_argument("--model", type=Path, help="MM-DiT: a file or folder, any layout")
    released.add_argument("--vae", type=Path, help="autoencoder")
    released.add_argument("--t5", type=Path, help="T5 v1.1 XXL encoder")
    released.add_argument("--tokenizer", type=Path, help="T5's spiece.model")
    released.add_argument("--mask-token", type=Path, help=".pth of the trained mask embedding")
    released.add_argument("--padding-id", type=int, choices=(0, 1),
                          help="1 for dual checkpoints, 0 for plain SD3 (default: 1)")
    released.add_argument("--image-size", type=int, help="pixels (default: 512)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"),
                   help="of all weights (default: float32 on CPU, bfloat16 on GPU)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="(default: %(default)s)")
    return p


def _read_prompts(path: Path) -> list[str]:
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
    if bool(a.prompt) == (bool(a.describe) or takes_image):
        p.error("give texts to draw, or one of --describe, --ask, --edit, --edges, --depth, "
                "--pose; see --help for examples")
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
    if a.model and not a.tokenizer:
        p.error("--model needs --tokenizer, T5's spiece.model")
    writes = bool(a.describe or a.ask)
    rules = (       # whether the options have an effect, where they do, the options
        (a.model, "with --model, as a run in --run has its own",
         ("vae", "t5", "tokenizer", "mask_token", "padding_id", "image_size")),
        (not a.model, "without --model", ("run",)),
        (not writes, "where pictures are drawn", ("out", "guidance")),
        (a.image and not writes, "on --edit, --edges, --depth and --pose", ("image_guidance",)),
        (writes, "on --describe and --ask", ("order", "temperature")))
    for has_effect, where, names in rules:
        given = [name for name in names if getattr(a, name) is not None]
        if given and not has_effect:
            p.error(f"--{given[0].replace('_', '-')} has an effect only {where}; remove it")


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
        names = _names(a.out, count)
        if existing := [path for path in names if path.exists()]:
            p.error(f"{existing[0]} exists; nothing is overwritten, choose another name")
        _check_writable(names[0].parent)
    except OSError as error:
        p.error(f"--out {a.out}: cannot be written ({error})")
    return names


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; every mistake that shows without the model stops here."""
    p = _parser()
    a = p.parse_args(argv)
    try:
        a.prompt += _read_prompts(a.prompts) if a.prompts else []
    except OSError as error:
        p.error(f"{a.prompts}: {error.strerror.lower()}")
    except ValueError as error:
        p.error(str(error))
    _check_task(p, a)
    _check_effect(p, a)
    _check_device(p, a.device)
    a.run, a.out = a.run or Path("runs/tiny"), a.out or Path("pictures")
    count = len(a.prompt or a.edit or [a.kind])
    a.names = [] if a.describe or a.ask else _check_out(p, a, count)
    return a


def _check_numbers(a: argparse.Namespace) -> None:
    """Raise ValueError for a number out of its range, as NaN and infinity are."""
    smallest = {"steps": 1, "image_size": 1, "guidance": 0, "image_guidance": 0, "temperature": 0}
    for name, least in smallest.items():
        value = getattr(a, name)
        if value is not None and not least <= value <= 1_000_000:
            raise ValueError(f"--{name.replace('_', '-')} = {value}: expected a number from "
                             f"{least} to 1000000")


def _load(a: argparse.Namespace) -> Pipeline:
    """Load the models of --run or --model, with the settings that the command line changes."""
    on_cpu = torch.device(a.device).type == "cpu"
    dtype = getattr(torch, a.dtype or ("float32" if on_cpu else "bfloat16"))
    options = {name: getattr(a, name)
               for name in ("image_size", "padding_id", "guidance", "image_guidance")}
    given = {name: value for name, value in options.items() if value is not None}
    if a.model:
        return Pipeline.from_parts(a.model, a.vae or a.model, a.t5 or a.model, a.tokenizer,
                                   a.mask_token, SampleSettings(**given), dtype, a.device)
    pipeline = Pipeline.from_run(a.run, dtype, a.device)
    pipeline.settings = replace(pipeline.settings, **given)
    return pipeline


BATCH = 16                      # prompts, or pictures to describe, at a time: bounds the memory


def _write_texts(pipeline: Pipeline, a: argparse.Namespace) -> Iterator[str]:
    """Write captions of --describe, or answers of --ask; a line for each, batch by batch.

    A picture that cannot be read raises ValueError after all others have their text.
    """
    if not pipeline.model.text_head.weight.any():
        raise ValueError(f"{a.model or a.run}: cannot write, its text head is all zero as plain "
                         "SD3's; use a dual checkpoint")
    subjects = a.describe or a.ask
    unreadable = {}                                             # messages, each once
    for start in range(0, len(subjects), BATCH):
        readable, images = [], []
        for subject in subjects[start:start + BATCH]:
            path = subject if a.describe else a.image[0]
            try:
                images.append(load_image(path, pipeline.settings.image_size))
                readable.append(subject)
            except ValueError as error:
                unreadable[str(error)] = True
        if images:
            texts = pipeline.caption(
                torch.stack(images), a.seed + start, a.steps, a.order, a.temperature or 0.0,
                progress=True, questions=readable if a.ask else None)
            yield from (f"{subject}\t{text}" for subject, text in zip(readable, texts))
    if unreadable:
        raise ValueError("; ".join(unreadable))


def _draw_images(pipeline: Pipeline, a: argparse.Namespace) -> Iterator[Tensor]:
    """Draw the prompts in batches, or edit in turns; each time images (B, 3, H, W).

    The first turn edits the pictures of --image, each other one the last result.
    """
    for start in range(0, len(a.prompt), BATCH):
        prompts = a.prompt[start:start + BATCH]
        yield pipeline.draw(prompts, a.seed + start, a.steps, progress=True)
    size = pipeline.settings.image_size
    sources = [load_image(path, size)[None] for path in a.image]                # each (1, 3, H, W)
    for i, instruction in enumerate(a.edit):
        result = pipeline.edit([instruction], sources, a.seed + i, a.steps, progress=True)
        yield result
        sources = [result]


def _draw_pictures(pipeline: Pipeline, a: argparse.Namespace) -> Iterator[str]:
    """Draw pictures and write each batch before the next is drawn; a line for each picture."""
    settings, texts, i = pipeline.settings, a.prompt or a.edit, 0
    for images in _draw_images(pipeline, a):
        if not images.isfinite().all():
            raise ValueError(f"{a.model or a.run}: draws values that are no numbers; the weights "
                             "are damaged or the guidance is too high")
        for picture in to_pictures(images):
            name = a.names[i]
            if name.exists():           # another run has taken the name since the start
                [name] = _names(a.out, 1)
            used = {"seed": a.seed + i, "steps": a.steps or settings.steps,
                    "shift": settings.shift, "guidance": settings.guidance}
            if a.image:
                used["image_guidance"] = settings.image_guidance
            used["model"] = str(a.model or a.run)
            save_picture(picture, name, prompt=texts[i], settings=used)
            yield f"{name}\t{texts[i]}"
            i += 1


def main(argv: Sequence[str] | None = None) -> None:
    for stream in (sys.stdout, sys.stderr):     # a letter that the console lacks ends no run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    a, done, status = _arguments(argv), 0, 1
    try:
        _check_numbers(a)
        pipeline = _load(a)
        if a.kind:
            a.edit = [pipeline.settings.perception_prompt.replace("{kind}", a.kind)]
        for text in a.prompt + a.edit + a.ask:
            for warning in pipeline.warnings(text):
                print(f"warning: {text!r}: {warning}", file=sys.stderr)
        lines = _draw_pictures(pipeline, a) if a.names else _write_texts(pipeline, a)
        for line in lines:
            print(line, flush=True)
            done += 1
        return
    except KeyboardInterrupt:
        ending, status = "interrupted", 130
    except BrokenPipeError:                     # the reader is gone, as in `| head`
        ending = ""
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        ending = f"error: out of memory ({error}); draw fewer or smaller pictures at a time"
    except (ValueError, OSError) as error:
        ending = f"error: {error}"
    if ending and (done or status == 130):
        kind, where = ("pictures", f", in {a.names[0].parent}") if a.names else ("texts", "")
        total = len(a.names or a.describe or a.ask)
        ending += f"; {done} of {total} {kind} are written{where}"
    try:
        print(end="", flush=True)
    except OSError:                             # else Python's own last flush complains
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if status == 1:
        sys.exit(ending or 1)
    print(ending, file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
