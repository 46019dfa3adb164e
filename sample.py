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
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from config import RunFiles, SampleSettings, parts_of, read_config
from data import load_image, prompt_length, text_lengths, to_pictures
from model import MMDiT
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


def draw_tokens(logits: Tensor, temperature: float,
                generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Draw a token for every position; returns tokens and their probabilities, (B, L) each.

    The mask token, the last class, is never drawn. Gumbel noise is in float64: in float32 its tail
    is cut off, which lowers the temperature unseen (arXiv 2409.02908).
    """
    logits = logits[..., :-1].double()                                      # (B, L, vocab - 1)
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
    """
    if order not in (None, *ORDERS) or steps < 1 or temperature < 0:
        raise ValueError(f"order = {order!r}, steps = {steps}, temperature = {temperature}; "
                         f"expected one of {ORDERS}, at least one step and a temperature of at "
                         "least 0")
    tokens = tokens.clone()
    timestep = torch.zeros(len(tokens), device=tokens.device)               # the images are clean
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
            text = text_encoder(tokens)                                     # (B, L, D)
            logits = model(latents, text, timestep, want=("logits",)).logits    # (B, L, vocab)
        drawn, probability = draw_tokens(logits, 0 if last else temperature, generator)
        if last:
            reveal = masked
        elif order == "ancestral":
            t, s = times[i], times[i + 1]
            chance = torch.rand(
                tokens.shape, dtype=torch.float64, device=tokens.device, generator=generator)
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
    return tokens


# ---------------------------------------------------------------- the pipeline

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
        tokens = T5Tokenizer(tokenizer, padding_id=settings.padding_id)
        autoencoder = VAE.from_pretrained(vae, dtype=dtype, device=device).eval()
        mmdit = MMDiT.from_pretrained(model, dtype=dtype, device=device).eval()
        unit = autoencoder.downscale * mmdit.config.patch_size              # pixels per patch
        if settings.image_size % unit:
            raise ValueError(f"image size {settings.image_size}: expected a multiple of {unit}")
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
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])  # (B, C, h, w)

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
        generator = torch.Generator(self.device).manual_seed(seed)
        ids = describe(
            self.model, self.encode_text, self.encode_images(images), tokens.to(self.device),
            self.tokenizer.mask_id, s.text_steps if steps is None else steps, order, temperature,
            generator, progress)                                                    # (B, L)
        rows = [row[mask].tolist() for row, mask in zip(ids.cpu(), answer)]
        return self.tokenizer.decode(rows)

    def warnings(self, prompt: str) -> list[str]:
        """Name the parts of a prompt that the model cannot see: unknown words, and a cut end."""
        count, length = len(self.tokenizer.encode(prompt)), self.settings.text_length
        warnings = []
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
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, pnginfo=info)


def _names(out: Path, count: int) -> list[Path]:
    """Name `count` pictures: x.png, or x-1.png, x-2.png, ...; in a folder the next free numbers."""
    if out.suffix == ".png" and not out.is_dir():
        numbered = [out.with_stem(f"{out.stem}-{i + 1}") for i in range(count)]
        return [out] if count == 1 else numbered
    used = [int(f.stem) for f in out.glob("*.png") if f.stem.isdigit()]
    return [out / f"{max(used, default=0) + 1 + i:04d}.png" for i in range(count)]


def _help(name: str) -> str:
    """The help of a field of SampleSettings."""
    [text] = [f.metadata["help"] for f in dataclasses.fields(SampleSettings) if f.name == name]
    return f"{text} (default: that of the model)"


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter,
                                description=__doc__, epilog=EXAMPLES)
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
    p.add_argument("--out", type=Path, default=Path("pictures"),
                   help="a .png file (several turns: x-1.png, x-2.png, ...), or a folder that gets "
                        "numbered files (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0,
                   help="the same seed gives the same result (default: %(default)s)")
    p.add_argument("--steps", type=int, help="Euler steps per image, or steps per text")
    p.add_argument("--guidance", type=float, help=_help("guidance"))
    p.add_argument("--image-guidance", type=float, help=_help("image_guidance"))
    p.add_argument("--order", choices=ORDERS,
                   help="which tokens of a text come first: the most probable (default of "
                        "captions), the leftmost (default of answers), or random ones, as in the "
                        "released sampler")
    p.add_argument("--temperature", type=float, default=0.0,
                   help="of the text; 0: the most probable (default: %(default)s)")
    p.add_argument("--run", type=Path, default=Path("runs/tiny"),
                   help="folder of a training run (default: %(default)s)")
    released = p.add_argument_group(
        "released weights, in place of --run; a part without a name is looked for in --model")
    released.add_argument("--model", type=Path, help="MM-DiT: a file or folder, any layout")
    released.add_argument("--vae", type=Path, help="autoencoder")
    released.add_argument("--t5", type=Path, help="T5 v1.1 XXL encoder")
    released.add_argument("--tokenizer", type=Path, help="T5's spiece.model")
    released.add_argument("--mask-token", type=Path, help=".pth of the trained mask embedding")
    released.add_argument("--padding-id", type=int, default=1, choices=(0, 1),
                          help="1 for dual checkpoints, 0 for plain SD3 (default: %(default)s)")
    released.add_argument("--image-size", type=int, default=512,
                          help="pixels (default: %(default)s)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"),
                   help="of all weights (default: float32 on CPU, bfloat16 on GPU)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="(default: %(default)s)")
    return p


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
    if missing := [str(path) for path in a.describe + a.image if not path.is_file()]:
        p.error(f"no such picture: {', '.join(missing)}")


def _check_out(p: argparse.ArgumentParser, a: argparse.Namespace, count: int) -> None:
    """Stop where `count` pictures cannot be written, or would overwrite others."""
    if a.out.suffix and not a.out.is_dir():
        if a.out.suffix != ".png":
            p.error(f"{a.out}: pictures are written as .png; name a .png file or a folder")
        if len(a.prompt) > 1:
            p.error(f"--out {a.out} is one picture for {len(a.prompt)} prompts; name a folder")
    for path in _names(a.out, count):
        if path.exists():
            p.error(f"{path} exists; nothing is overwritten, choose another name")
        if path.parent.exists() and not path.parent.is_dir():
            p.error(f"{path.parent} is not a folder")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; every mistake that shows without the model stops here."""
    p = _parser()
    a = p.parse_args(argv)
    if a.prompts:
        if not a.prompts.is_file():
            p.error(f"{a.prompts}: no such file")
        try:
            lines = a.prompts.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            p.error(f"{a.prompts}: not UTF-8 text ({error})")
        a.prompt += [line.strip() for line in lines if line.strip()]
    _check_task(p, a)
    if a.model and not a.tokenizer:
        p.error("--model needs --tokenizer, T5's spiece.model")
    if not a.model and (a.vae or a.t5 or a.tokenizer or a.mask_token):
        p.error("--vae, --t5, --tokenizer and --mask-token belong to --model; a run in --run has "
                "its own")
    try:
        torch.empty(0, device=a.device)
    except (RuntimeError, AssertionError) as error:
        p.error(f"--device {a.device}: {str(error).splitlines()[0]}")
    if a.prompt or a.edit or a.kind:
        _check_out(p, a, len(a.prompt or a.edit or [a.kind]))
    return a


def _load(a: argparse.Namespace) -> Pipeline:
    """Load the models of --run or --model, with the settings that the command line changes."""
    dtype = getattr(torch, a.dtype or ("float32" if a.device == "cpu" else "bfloat16"))
    if a.model:
        settings = SampleSettings(image_size=a.image_size, padding_id=a.padding_id)
        pipeline = Pipeline.from_parts(a.model, a.vae or a.model, a.t5 or a.model, a.tokenizer,
                                       a.mask_token, settings, dtype, a.device)
    else:
        pipeline = Pipeline.from_run(a.run, dtype, a.device)
    options = {name: getattr(a, name) for name in ("guidance", "image_guidance")}
    given = {name: value for name, value in options.items() if value is not None}
    pipeline.settings = replace(pipeline.settings, **given)
    return pipeline


def _write_texts(pipeline: Pipeline, a: argparse.Namespace) -> list[str]:
    """Write a caption of each picture of --describe, or an answer to each question of --ask."""
    if not pipeline.model.text_head.weight.any():
        raise ValueError(f"{a.model or a.run}: cannot write, its text head is all zero as plain "
                         "SD3's; use a dual checkpoint")
    paths = a.describe or a.image * len(a.ask)
    images = torch.stack([load_image(path, pipeline.settings.image_size) for path in paths])
    return pipeline.caption(images, a.seed, a.steps, a.order, a.temperature, progress=True,
                            questions=a.ask or None)


def _draw_prompts(pipeline: Pipeline, a: argparse.Namespace) -> Tensor:
    """Draw an image of each prompt, sixteen at a time to bound the memory; (B, 3, H, W)."""
    starts = range(0, len(a.prompt), 16)
    return torch.cat([pipeline.draw(a.prompt[i:i + 16], a.seed + i, a.steps, progress=True)
                      for i in starts])


def _draw_turns(pipeline: Pipeline, a: argparse.Namespace, turns: list[str]) -> Tensor:
    """Edit in turns, (turns, 3, H, W): first the pictures of --image, then each last result."""
    size = pipeline.settings.image_size
    sources = [load_image(path, size)[None] for path in a.image]                # each (1, 3, H, W)
    results = []
    for i, instruction in enumerate(turns):
        result = pipeline.edit([instruction], sources, a.seed + i, a.steps, progress=True)
        results.append(result)
        sources = [result]
    return torch.cat(results)


def main(argv: Sequence[str] | None = None) -> None:
    a = _arguments(argv)
    try:
        pipeline = _load(a)
        settings = pipeline.settings
        turns = [settings.perception_prompt.format(kind=a.kind)] if a.kind else a.edit
        texts = a.prompt or turns
        for text in texts + a.ask:
            for warning in pipeline.warnings(text):
                print(f"warning: {text!r}: {warning}", file=sys.stderr)
        if not texts:
            for subject, text in zip(a.describe or a.ask, _write_texts(pipeline, a)):
                print(f"{subject}\t{text}")
            return
        images = _draw_turns(pipeline, a, turns) if turns else _draw_prompts(pipeline, a)
    except ValueError as error:
        sys.exit(f"error: {error}")
    names = _names(a.out, len(texts))
    for i, (picture, text, name) in enumerate(zip(to_pictures(images), texts, names)):
        used = {"seed": a.seed + i, "steps": a.steps or settings.steps, "shift": settings.shift,
                "guidance": settings.guidance}
        if turns:
            used["image_guidance"] = settings.image_guidance
        used["model"] = str(a.model or a.run)
        save_picture(picture, name, prompt=text, settings=used)
        print(f"{name}\t{text}")


if __name__ == "__main__":
    main()
