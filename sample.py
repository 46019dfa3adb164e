"""Sampling: pictures by flow matching, text by masked diffusion (UniAlignment, arXiv 2509.23760, section 3); the command line.

  python sample.py "a large red circle at the top left on a gray background"      draw a prompt (or several: several pictures)
  python sample.py --describe picture.png                                         caption pictures
  python sample.py --image picture.png --ask "what color is the circle?"          answer questions (--ask again: another one)
  python sample.py --image picture.png --edit "make the red circle blue"          edit a picture
  python sample.py --image picture.png --edit "make the red circle blue" --edit "remove the green square"     edit it in turns
  python sample.py --image a.png b.png --edit "put the object of picture 1 left of the object of picture 2 on a black background"
  python sample.py --image picture.png --edges                                    draw the edges of a picture
  python sample.py --image picture.png --depth                                    draw its depth
  python sample.py --image picture.png --pose                                     draw the pose of what it shows
  python sample.py --help                                                         everything else, and real checkpoints

One loop integrates every picture, one loop fills in every text; what a task is, only its inputs say.
"""
import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from checkpoint import make_config, read_json
from data import load_image, prompt_length, text_lengths, to_pictures
from model import MMDiT
from text_encoder import T5Encoder, T5Tokenizer
from vae import VAE


# ---------------------------------------------------------------- pictures

def flow_sigmas(steps: int, shift: float = 3.0) -> Tensor:
    """The noise levels of `steps` Euler steps, (steps + 1,) float32 from 1 to 0.

    Copied from the public SD3 scheduler, which applies the shift s -> shift s / (1 + (shift - 1) s) twice: once to the ends of
    the range (1 and 1/1000), once to the even steps between them. So the last step is a short one.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"steps = {steps}, shift = {shift}; expected at least one step and a positive shift")

    def shifted(s: Tensor) -> Tensor:
        return shift * s / (1 + (shift - 1) * s)

    first, last = shifted(torch.tensor([1.0, 1e-3], dtype=torch.float64)).tolist()
    sigmas = shifted(torch.linspace(first, last, steps, dtype=torch.float64))                 # (steps,)
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()                                   # (steps + 1,)


@torch.no_grad()
def generate(model: MMDiT, noise: Tensor, text: Tensor, empty_text: Tensor, steps: int = 28, guidance: float = 7.0,
             shift: float = 3.0, references: Sequence[Tensor] = (), image_guidance: float = 1.0, progress: bool = False) -> Tensor:
    """Integrate dx = v dsigma from noise to latents (Euler), with classifier-free guidance; (B, C, H, W) float32.

    noise (B, C, H, W); text (B, L, D) of the prompts and empty_text (B, L, D) or (1, L, D) of the empty prompt, both from T5;
    references: clean latents (B, C, H', W') of source pictures. With guidance g and image guidance h (InstructPix2Pix,
    arXiv 2211.09800, equation 3) v = v_alone + h (v_empty - v_alone) + g (v_text - v_empty): v_text sees prompt and references,
    v_empty the references, in the same batch, and v_alone neither. g = h = 1 is v_text alone, h = 1 leaves v_alone out.
    """
    x, image_guided = noise.float(), bool(references) and image_guidance != 1
    guided = guidance != 1 or image_guided
    references = [r.to(text.dtype) for r in references]
    if guided:
        empty_text = empty_text.expand_as(text)                                               # (B, L, D)
        text = torch.cat([empty_text, text])                                                  # (2B, L, D)
        references = [torch.cat([r, r]) for r in references]                                  # each (2B, C, H', W')
    sigmas = flow_sigmas(steps, shift).to(x.device)
    for sigma, following in tqdm(list(zip(sigmas[:-1], sigmas[1:])), desc="drawing", unit="step", disable=not progress):
        latents = torch.cat([x, x]) if guided else x                                          # (2B, C, H, W)
        timestep = (1000 * sigma).expand(len(latents))                                        # (2B,)
        v = model(latents.to(text.dtype), text, timestep, references, want=("velocity",)).velocity.float()
        if guided:
            v_empty, v_text = v.chunk(2)                                                      # (B, C, H, W) each
            v = v_empty + guidance * (v_text - v_empty)                                       # (B, C, H, W)
        if image_guided:
            v_alone = model(x.to(text.dtype), empty_text, timestep[:len(x)], want=("velocity",)).velocity.float()     # (B, C, H, W)
            v = v + (image_guidance - 1) * (v_empty - v_alone)                                # (B, C, H, W)
        x = x + (following - sigma) * v                                                       # (B, C, H, W)
    return x


# ---------------------------------------------------------------- text

ORDERS = ("confidence", "left", "ancestral")


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A token for every position and the model's probability of it; both (B, L). The mask token, the last class, is never drawn.

    The Gumbel noise is in float64: in float32 it cuts off the tail, which lowers the temperature unseen (arXiv 2409.02908).
    """
    logits = logits[..., :-1].double()                                                        # (B, L, vocab - 1)
    noisy = logits
    if temperature > 0:
        uniform = torch.rand(logits.shape, dtype=torch.float64, device=logits.device, generator=generator)
        noisy = logits / temperature - (-uniform.clamp_min(1e-300).log()).log()               # (B, L, vocab - 1)
    tokens = noisy.argmax(dim=-1)                                                             # (B, L)
    return tokens, logits.softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]               # (B, L), (B, L)


@torch.no_grad()
def describe(model: MMDiT, text_encoder: Callable[[Tensor], Tensor], latents: Tensor | None, tokens: Tensor, mask_id: int,
             steps: int = 16, order: str | None = "confidence", temperature: float = 0.0,
             generator: torch.Generator | None = None, progress: bool = False) -> Tensor:
    """Fill in the masked tokens of a text about clean pictures; ids (B, L).

    latents (B, C, H, W), or None for text alone; tokens (B, L): `mask_id` where the text is wanted, anything else (a question)
    stays. order: "confidence" reveals the most probable tokens first, equally many in each step, "left" the first ones, None those
    on the left in rows that hold a question and the most probable in the others; "ancestral" is the released sampler, the reversed
    diffusion: t goes from 1 to 1e-5, and each masked token is revealed with probability (t - s) / t. temperature: 0 takes the most
    probable token, 1 draws from the model's distribution.
    """
    if order not in (None, *ORDERS) or steps < 1 or temperature < 0:
        raise ValueError(f"order = {order!r}, steps = {steps}, temperature = {temperature}; "
                         f"expected one of {ORDERS}, at least one step and a temperature of at least 0")
    tokens, timestep = tokens.clone(), torch.zeros(len(tokens), device=tokens.device)
    t = torch.linspace(1, 1e-5, steps + 1, dtype=torch.float64).tolist()
    wanted, logits = (tokens == mask_id).sum(dim=1), None                                     # (B,)
    left = wanted < tokens.shape[1] if order is None else torch.full_like(wanted, order == "left", dtype=torch.bool)    # (B,)
    for i in tqdm(range(steps + 1), desc="writing", unit="step", disable=not progress):
        masked = tokens == mask_id                                                            # (B, L)
        if not masked.any():
            break
        if logits is None:                                      # where nothing was revealed, the last prediction still holds
            logits = model(latents, text_encoder(tokens), timestep, want=("logits",)).logits  # (B, L, vocab)
        drawn, probability = _draw(logits, temperature if i < steps else 0, generator)        # (B, L), (B, L)
        if i == steps:
            reveal = masked
        elif order == "ancestral":
            chance = torch.rand(tokens.shape, dtype=torch.float64, device=tokens.device, generator=generator)
            reveal = masked & (chance < (t[i] - t[i + 1]) / t[i])                             # (B, L)
        else:
            target = wanted * (i + 1) // steps - (wanted - masked.sum(dim=1))                 # (B,) how many to reveal now
            by_confidence = probability.masked_fill(~masked, -1).argsort(dim=1, descending=True).argsort(dim=1)    # (B, L)
            rank = torch.where(left[:, None], masked.cumsum(dim=1) - 1, by_confidence)        # (B, L)
            reveal = masked & (rank < target[:, None])                                        # (B, L)
        if reveal.any():
            tokens, logits = torch.where(reveal, drawn, tokens), None                         # (B, L)
    return tokens


# ---------------------------------------------------------------- everything that is needed to sample

@dataclass(frozen=True)
class SampleSettings:
    """What a model was trained for and how it is sampled by default; the defaults are those of the released 512-pixel model."""
    image_size: int = 512
    text_length: int = 256
    prompt_multiple: int = 0        # prompts about source pictures are padded to a multiple of this; 0: to text_length
    padding_id: int = 1             # </s> for dual checkpoints, 0 for plain SD3
    steps: int = 28                 # Euler steps of a picture
    guidance: float = 7.0
    image_guidance: float = 1.0
    shift: float = 3.0
    text_steps: int = 64


def averaged_weights(run: Path) -> Path | None:
    """The averaged weights in the newest checkpoint of a run; None where there are none."""
    return max(run.glob("checkpoint-*/ema.safetensors"), default=None)


@dataclass
class Pipeline:
    """Tokenizer, text encoder, autoencoder and transformer, with methods from texts to pictures and back."""
    tokenizer: T5Tokenizer
    text_encoder: T5Encoder
    vae: VAE
    model: MMDiT
    settings: SampleSettings

    @classmethod
    def from_parts(cls, model: Path, vae: Path, t5: Path, tokenizer: Path, mask_token: Path | None, settings: SampleSettings,
                   dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> "Pipeline":
        """Checkpoints of the four parts, in any layout. ValueError where one cannot be read or the size cannot be drawn."""
        tokens = T5Tokenizer(tokenizer, padding_id=settings.padding_id)
        autoencoder = VAE.from_pretrained(vae, dtype=dtype, device=device).eval()
        mmdit = MMDiT.from_pretrained(model, dtype=dtype, device=device).eval()
        if settings.image_size % (unit := autoencoder.downscale * mmdit.config.patch_size):
            raise ValueError(f"image size {settings.image_size}: expected a multiple of {unit}")
        text_encoder = T5Encoder.from_pretrained(t5, mask_token=mask_token, dtype=dtype, device=device).eval()
        return cls(tokens, text_encoder, autoencoder, mmdit, settings)

    @classmethod
    def from_run(cls, run: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> "Pipeline":
        """The newest checkpoint (averaged weights) of a training run. Raises ValueError where something is missing."""
        run = Path(run)
        averaged = averaged_weights(run)
        if not averaged or not (run / "run.json").is_file():
            raise ValueError(f"{run}: holds no trained model; train one with python train.py, "
                             "or name the parts of a released one (--model, --vae, --t5, --tokenizer)")
        origin = str(run / "run.json")
        values = read_json((run / "run.json").read_bytes(), origin)
        if "sampling" not in values:
            raise ValueError(f"{origin}: no 'sampling' in it; expected the run.json that train.py writes")
        settings = make_config(SampleSettings, values["sampling"], origin)
        return cls.from_parts(averaged, values.get("vae_path") or run / "vae.safetensors",
                              values.get("t5_path") or run / "text_encoder.safetensors",
                              values.get("tokenizer_path") or run / "tokenizer.model", values.get("mask_token") or None,
                              settings, dtype, device)

    @property
    def device(self) -> torch.device:
        return self.model.pos_embed.device

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.text_encoder(ids.to(self.device)).to(self.model.pos_embed.dtype)          # (B, L, D)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> clean latents (B, C, h, w)."""
        return self.vae.encode(images.to(self.device)).to(self.model.pos_embed.dtype)

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seed: int = 0, steps: int | None = None, guidance: float | None = None,
             references: Sequence[Tensor] = (), progress: bool = False) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of the prompts. Picture i depends on its prompt and on seed + i alone."""
        s, side = self.settings, self.settings.image_size // self.vae.downscale
        steps, guidance = s.steps if steps is None else steps, s.guidance if guidance is None else guidance
        noise = torch.stack([torch.randn(self.model.config.latent_channels, side, side,
                                         generator=torch.Generator().manual_seed(seed + i)) for i in range(len(prompts))])
        ids, latents = self.tokenizer([*prompts, ""], length=s.text_length), torch.empty_like(noise, device=self.device)
        lengths = [prompt_length(tokens, len(references), s.text_length, s.prompt_multiple)
                   for tokens in text_lengths(ids[:-1], self.tokenizer.eos_id)]
        for length in sorted(set(lengths)):                     # only one, if there are no references
            rows = [i for i, found in enumerate(lengths) if found == length]
            texts = self.encode_text(ids[[*rows, -1], :length])                               # (b + 1, L, D)
            latents[rows] = generate(self.model, noise[rows].to(self.device), texts[:-1], texts[-1:], steps, guidance, s.shift,
                                     [r[rows] for r in references], s.image_guidance, progress)           # (b, C, h, w)
        return self.vae.decode(latents.to(self.model.pos_embed.dtype)).float().clamp(-1, 1)   # (B, 3, H, W)

    def edit(self, prompts: Sequence[str], sources: Sequence[Tensor], seed: int = 0, steps: int | None = None,
             guidance: float | None = None, progress: bool = False) -> Tensor:
        """Pictures (B, 3, H, W) as `draw` makes them, from any number of source pictures, each (B, 3, H', W') in [-1, 1]."""
        return self.draw(prompts, seed, steps, guidance, [self.encode_images(images) for images in sources], progress)

    def caption(self, images: Tensor, seed: int = 0, steps: int | None = None, order: str | None = None,
                temperature: float = 0.0, progress: bool = False, questions: Sequence[str] | None = None) -> list[str]:
        """Captions of images (B, 3, H, W) in [-1, 1], or the answers to one question about each.

        order: as `describe` has it; None writes captions by confidence and answers from the left. By confidence an answer gets its
        end first, and with it a length, which decides between "no" and "yes at the center" before either is looked up (docs/choices.md).
        """
        s = self.settings
        tokens, answer = self.tokenizer.dialogue([""] * len(images) if questions is None else questions, length=s.text_length)
        ids = describe(self.model, self.encode_text, self.encode_images(images), tokens.to(self.device), self.tokenizer.mask_id,
                       s.text_steps if steps is None else steps, order, temperature,
                       torch.Generator(self.device).manual_seed(seed), progress)              # (B, L)
        return self.tokenizer.decode([row[wanted].tolist() for row, wanted in zip(ids.cpu(), answer)])

    def warnings(self, prompt: str) -> list[str]:
        """What about a prompt the model cannot see: words its tokenizer does not know, and what is too long."""
        ids, length = self.tokenizer.encode(prompt), self.settings.text_length
        found = [f"{len(ids)} tokens, the model reads {length}: the end is cut off"] * (len(ids) > length)
        unknown = [w for w in prompt.split() if self.tokenizer.unk_id in self.tokenizer.encode(w)]
        return found + [f"not in the model's vocabulary: {', '.join(unknown)}"] * bool(unknown)


# ---------------------------------------------------------------- command line

def save_picture(picture, path: Path, **metadata) -> None:
    """An (H, W, 3) uint8 array as PNG, prompt and settings in its text chunks."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, pnginfo=info)


def _names(out: Path, count: int) -> list[Path]:
    """Where `count` pictures go: x.png, or x-1.png, x-2.png, ...; in a folder the next free numbers."""
    if out.suffix == ".png" and not out.is_dir():
        return [out] if count == 1 else [out.with_stem(f"{out.stem}-{i + 1}") for i in range(count)]
    used = [int(f.stem) for f in out.glob("*.png") if f.stem.isdigit()]
    return [out / f"{max(used, default=0) + 1 + i:04d}.png" for i in range(count)]


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__, epilog="""examples:
  python sample.py "a small green triangle at the center on a black background" --seed 3 --out triangle.png
  python sample.py --prompts prompts.txt --out pictures/          one prompt a line, sixteen in a batch
  python sample.py --describe a.png b.png --order ancestral --temperature 1
  python sample.py "a cat" --model UniAlignment/transformer --vae sd3/vae --t5 sd3/text_encoder_3 --tokenizer spiece.model
  python sample.py "a cat" --model sd3_medium_incl_clips_t5xxlfp8.safetensors --tokenizer spiece.model --padding-id 0""")
    p.add_argument("prompt", nargs="*", help="texts to draw, one picture each")
    task = p.add_mutually_exclusive_group()
    task.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with one prompt a line")
    task.add_argument("--describe", nargs="+", type=Path, default=[], metavar="PICTURE", help="caption these pictures")
    task.add_argument("--ask", action="append", default=[], metavar="QUESTION", help="answer this about --image; repeatable")
    task.add_argument("--edit", action="append", default=[], metavar="INSTRUCTION",
                      help="edit or compose the pictures of --image; given again, it edits the last result")
    for kind in ("edges", "depth", "pose"):
        task.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, help=f"draw the {kind} of --image")
    p.add_argument("--image", nargs="+", action="extend", type=Path, default=[], metavar="PICTURE",
                   help="what --ask, --edit, --edges, --depth and --pose look at")
    p.add_argument("--out", type=Path, default=Path("pictures"), help="a .png (of several turns: x-1.png, x-2.png, ...) or a "
                   "folder that gets numbered files (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same result (default: %(default)s)")
    p.add_argument("--steps", type=int, help="Euler steps of a picture, or steps of filling in a text")
    p.add_argument("--guidance", type=float, help="weight of the prompt; 1 is none and faster")
    p.add_argument("--image-guidance", type=float, help="weight of the pictures of --image; 1 is none and faster")
    p.add_argument("--order", choices=ORDERS, help="which tokens of a text come first: the most probable (the default of captions), "
                   "those on the left (of answers), or random ones, as the released sampler has it")
    p.add_argument("--temperature", type=float, default=0.0, help="of the text; 0: the most probable (default: %(default)s)")
    p.add_argument("--run", type=Path, default=Path("runs/tiny"), help="folder of a training run (default: %(default)s)")
    real = p.add_argument_group("released weights, in place of --run; a part that is not named is looked for in --model")
    real.add_argument("--model", type=Path, help="MM-DiT: a file or folder, any layout")
    real.add_argument("--vae", type=Path, help="autoencoder")
    real.add_argument("--t5", type=Path, help="T5 v1.1 XXL encoder")
    real.add_argument("--tokenizer", type=Path, help="T5's spiece.model")
    real.add_argument("--mask-token", type=Path, help="the .pth with the trained mask embedding")
    real.add_argument("--padding-id", type=int, default=1, choices=(0, 1),
                      help="1 for dual checkpoints, 0 for plain SD3 (default: %(default)s)")
    real.add_argument("--image-size", type=int, default=512, help="pixels (default: %(default)s)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of all weights (default: float32 on CPU, bfloat16 on GPU)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    return p


def _check_task(p: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    """Stop where the texts and pictures do not make one task."""
    if bool(a.prompt) == bool(a.describe or a.ask or a.edit):
        p.error("give texts to draw, or one of --describe, --ask, --edit, --edges, --depth, --pose; see --help for examples")
    if bool(a.image) != bool(a.ask or a.edit):
        p.error("--ask, --edit, --edges, --depth and --pose need --image, and nothing else takes it")
    if len(a.image) > 1 and (a.ask or a.kind):
        p.error(f"--{a.kind or 'ask'} looks at one picture, found {len(a.image)} after --image")
    if missing := [str(path) for path in a.describe + a.image if not path.is_file()]:
        p.error(f"no such picture: {', '.join(missing)}")


def _check_out(p: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    """Stop where the pictures cannot be written, or would be written over others."""
    if a.out.suffix and not a.out.is_dir():
        if a.out.suffix != ".png":
            p.error(f"{a.out}: pictures are written as .png; name a .png file or a folder")
        if len(a.prompt) > 1:
            p.error(f"--out {a.out} is one picture for {len(a.prompt)} prompts; name a folder")
    for path in _names(a.out, len(a.prompt or a.edit)):
        if path.exists():
            p.error(f"{path} exists; nothing is overwritten, choose another name")
        if path.parent.exists() and not path.parent.is_dir():
            p.error(f"{path.parent} is not a folder")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; whatever can be told to be wrong before the model is loaded stops here."""
    p = _parser()
    a = p.parse_args(argv)
    if a.prompts:
        if not a.prompts.is_file():
            p.error(f"{a.prompts}: no such file")
        try:
            a.prompt += [line.strip() for line in a.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            p.error(f"{a.prompts}: not UTF-8 text ({error})")
    if a.kind:
        a.edit = [f"draw the {a.kind} of the picture"]
    _check_task(p, a)
    if a.model and not a.tokenizer:
        p.error("--model needs --tokenizer, T5's spiece.model")
    if not a.model and (a.vae or a.t5 or a.tokenizer or a.mask_token):
        p.error("--vae, --t5, --tokenizer and --mask-token belong to --model; a run in --run has its own")
    try:
        torch.empty(0, device=a.device)
    except (RuntimeError, AssertionError) as error:
        p.error(f"--device {a.device}: {str(error).splitlines()[0]}")
    if a.prompt or a.edit:
        _check_out(p, a)
    return a


def _load(a: argparse.Namespace) -> Pipeline:
    """The models of --run or --model, with the settings that the command line changes."""
    dtype = getattr(torch, a.dtype or ("float32" if a.device == "cpu" else "bfloat16"))
    if a.model:
        settings = SampleSettings(image_size=a.image_size, padding_id=a.padding_id)
        pipeline = Pipeline.from_parts(a.model, a.vae or a.model, a.t5 or a.model, a.tokenizer, a.mask_token, settings, dtype, a.device)
    else:
        pipeline = Pipeline.from_run(a.run, dtype, a.device)
    given = {name: getattr(a, name) for name in ("guidance", "image_guidance") if getattr(a, name) is not None}
    pipeline.settings = replace(pipeline.settings, **given)
    return pipeline


def _write(pipeline: Pipeline, a: argparse.Namespace) -> list[str]:
    """A caption of each picture of --describe, or an answer to each question of --ask."""
    if not pipeline.model.text_head.weight.any():
        raise ValueError(f"{a.model or a.run}: cannot write, its text head is all zero as plain SD3's; use a dual checkpoint")
    pictures = torch.stack([load_image(path, pipeline.settings.image_size) for path in a.describe or a.image * len(a.ask)])
    return pipeline.caption(pictures, a.seed, a.steps, a.order, a.temperature, progress=True, questions=a.ask or None)


def _draw_prompts(pipeline: Pipeline, a: argparse.Namespace) -> Tensor:
    """A picture of each prompt, (B, 3, H, W), sixteen at a time so that any number fits into memory."""
    return torch.cat([pipeline.draw(a.prompt[i:i + 16], a.seed + i, a.steps, progress=True)
                      for i in range(0, len(a.prompt), 16)])


def _draw_turns(pipeline: Pipeline, a: argparse.Namespace) -> Tensor:
    """The result of each turn of --edit, (turns, 3, H, W): the first edits the given pictures, a later one the last result."""
    sources = [load_image(path, pipeline.settings.image_size)[None] for path in a.image]      # each (1, 3, H, W)
    results = []
    for i, instruction in enumerate(a.edit):
        sources = [pipeline.edit([instruction], sources, a.seed + i, a.steps, progress=True)]
        results += sources
    return torch.cat(results)


def main(argv: Sequence[str] | None = None) -> None:
    a = _arguments(argv)
    texts = a.prompt or a.edit
    try:
        pipeline = _load(a)
        for text in texts + a.ask:
            for warning in pipeline.warnings(text):
                print(f"warning: {text!r}: {warning}", file=sys.stderr)
        if not texts:
            for subject, text in zip(a.describe or a.ask, _write(pipeline, a)):
                print(f"{subject}\t{text}")
            return
        pictures = to_pictures((_draw_prompts if a.prompt else _draw_turns)(pipeline, a))
    except ValueError as error:
        sys.exit(f"error: {error}")
    for i, (picture, text, name) in enumerate(zip(pictures, texts, _names(a.out, len(texts)))):
        settings = {"seed": a.seed + i, "steps": a.steps or pipeline.settings.steps, "shift": pipeline.settings.shift,
                    "guidance": pipeline.settings.guidance}
        if a.edit:
            settings["image_guidance"] = pipeline.settings.image_guidance
        settings["model"] = str(a.model or a.run)
        save_picture(picture, name, prompt=text, settings=settings)
        print(f"{name}\t{text}")


if __name__ == "__main__":
    main()
