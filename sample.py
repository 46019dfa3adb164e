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
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from arguments import SETTINGS, check_numbers, picture_names, read_arguments
from checkpoint import check_ranges, note
from config import (DUAL, MASK_TOKEN_ADVICE, ORDERS, SD3, SOLVERS, RunFiles, SampleSettings,
                    find_release, parts_of, read_config, run_of)
from data import load_image, prompt_length, text_lengths, to_pictures
from embeddings import Embeddings, Request, Texts, save_embeddings
from film import picture_frames, text_frames, write_film
from jobs import Job, draw_missing
from model import MMDiT, kind_of_checkpoint
from records import length_for
from staging import Loaded, Part, free_memory, total_memory
from text_encoder import T5Encoder, T5Tokenizer, asked
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
             image_guidance: float = 1.0, progress: bool = False, solver: str = "euler",
             guidance_interval: tuple[float, float] = (0.0, 1.0),
             watch: Callable[[float, Tensor, Tensor], None] | None = None,
             new_noise: Callable[[], Tensor] | None = None) -> Tensor:
    """Integrate dx = v dsigma from noise to latents; (B, C, H, W) float32.

    noise (B, C, H, W); text (B, L, D) of the prompts and empty_text (B or 1, L, D) of the empty
    prompt, both from T5; references: clean latents (B, C, H', W') of source pictures.

    Classifier-free guidance with weight g for the prompt and h for the references (InstructPix2Pix,
    arXiv 2211.09800, equation 3):  v = v_alone + h (v_empty - v_alone) + g (v_text - v_empty).
    v_text sees prompt and references, v_empty the references, v_alone neither.
    guidance_interval: the lowest and the highest sigma with guidance (arXiv 2404.07724); outside of
    it v = v_text, half the work.

    solver: "euler", or "ab2", two-step Adams-Bashforth: v is extrapolated to the middle of the step
    from the last two points, at no more passes. A step after guidance sets in or ends is Euler's,
    as v jumps there. "sde": Euler's step, but half of the noise's power is drawn anew, by
    new_noise() (B, C, H, W), which must be given. So the next step can undo what one step has
    decided, which helps where a prompt leaves much open; it needs five times the steps.

    watch: is called at every sigma, the last one 0, with sigma, the noisy latents x and the clean
    estimate x - sigma v, (B, C, H, W) each.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver = {solver!r}; expected one of {SOLVERS}")
    if solver == "sde" and new_noise is None:
        raise ValueError("solver = 'sde' draws noise in every step: new_noise is missing")
    x = noise.float()
    image_guided = bool(references) and image_guidance != 1     # h = 1 needs no v_alone
    is_guided = guidance != 1 or image_guided                   # g = h = 1 leaves v_text alone
    low, high = guidance_interval
    references = [r.to(text.dtype) for r in references]
    if is_guided:
        empty_text = empty_text.expand_as(text)                                     # (B, L, D)
        both_texts = torch.cat([empty_text, text])                                  # (2 B, L, D)
        both_references = [torch.cat([r, r]) for r in references]           # each (2 B, C, H', W')

    def velocity(x: Tensor, text: Tensor, sigma: Tensor, references: Sequence[Tensor]) -> Tensor:
        timestep = x.new_full((len(x),), (1000 * sigma).item())                     # (B,)
        return model(x.to(text.dtype), text, timestep, references,
                     want=("velocity",)).velocity.float()                           # (B, C, H, W)

    last = None                                                 # sigma, v and guided of last step
    sigmas = flow_sigmas(steps, shift)                          # on the CPU: no step waits for them
    intervals = list(zip(sigmas[:-1], sigmas[1:]))
    for sigma, next_sigma in tqdm(intervals, desc="drawing", unit="step", disable=not progress):
        guided = is_guided and low <= sigma <= high
        if guided:
            both = velocity(torch.cat([x, x]), both_texts, sigma, both_references)
            v_empty, v_text = both.chunk(2)                                         # (B, C, H, W)
            v = v_empty + guidance * (v_text - v_empty)                             # (B, C, H, W)
        else:
            v = velocity(x, text, sigma, references)                                # (B, C, H, W)
        if guided and image_guided:
            v_alone = velocity(x, empty_text, sigma, ())                            # (B, C, H, W)
            v = v + (image_guidance - 1) * (v_empty - v_alone)                      # (B, C, H, W)
        if watch:
            watch(sigma.item(), x, x - sigma * v)
        if solver == "sde":
            clean, e = x - sigma * v, x + (1 - sigma) * v                           # (B, C, H, W)
            e = (e + new_noise()) * 0.5 ** 0.5                  # of variance 1, as before
            x = (1 - next_sigma) * clean + next_sigma * e       # z = (1 - sigma) x + sigma e
            continue
        step, slope = next_sigma - sigma, 0.0
        if solver == "ab2" and last and last[2] == guided:
            slope = (v - last[1]) / (sigma - last[0])                               # (B, C, H, W)
        x, last = x + step * (v + step / 2 * slope), (sigma, v, guided)
    if watch:
        watch(0.0, x, x)
    return x


# ---------------------------------------------------------------- text: the masked diffusion

def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU for one without float64: Apple's GPUs, many of Intel's."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).log()
    except (TypeError, RuntimeError):
        return torch.device("cpu")
    return device


ROWS = 32           # positions whose logits are in float32 or float64 at a time: bounds the memory


def draw_tokens(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Draw a token for each row of logits (N, vocab); (N,) on the `float64_device` of the logits.

    temperature: 0 takes the most probable token. The mask token, the last class, is never drawn.

    Trick for speed: one uniform number and the cumulated probabilities of a row, in place of Gumbel
    noise for each class. In float64: in float32 the sum swallows small probabilities, which lowers
    the temperature unseen (arXiv 2409.02908).
    """
    device, tokens = float64_device(logits.device), []
    for block in logits[:, :-1].split(ROWS):
        best, most_probable = block.float().max(dim=-1, keepdim=True)       # (n, 1) each
        if temperature == 0:
            tokens.append(most_probable[:, 0].to(device))                   # (n,)
            continue
        weights = ((block.float() - best) / temperature).exp()              # (n, vocab - 1)
        sums = weights.to(device).cumsum(dim=-1, dtype=torch.float64)       # (n, vocab - 1)
        place = torch.rand(
            (len(block), 1), dtype=torch.float64, device=device, generator=generator)
        drawn = torch.searchsorted(sums, place * sums[:, -1:], right=True)  # (n, 1)
        tokens.append(drawn[:, 0].clamp_max(sums.shape[1] - 1))             # (n,)
    return torch.cat(tokens)


def probability_of(tokens: Tensor, logits: Tensor) -> Tensor:
    """Probabilities of tokens (N,) by logits (N, vocab); (N,) float64 on the tokens' device.

    The other tokens are summed up apart, in float32. So 1 - 1e-12 is still above 1 - 1e-11.
    """
    probabilities = []
    for block, drawn in zip(logits[:, :-1].split(ROWS), tokens[:, None].split(ROWS)):
        block, drawn = block.float(), drawn.to(logits.device)               # (n, vocab - 1), (n, 1)
        weights = (block - block.amax(dim=-1, keepdim=True)).exp()          # (n, vocab - 1)
        weight = weights.gather(-1, drawn)[:, 0]                            # (n,)
        others = weights.scatter_(-1, drawn, 0).sum(dim=-1)                 # (n,)
        weight, others = weight.to(tokens.device).double(), others.to(tokens.device).double()
        probabilities.append(weight / (weight + others))                    # (n,)
    return torch.cat(probabilities)


def rank_masked(probability: Tensor, masked: Tensor, place: Tensor, block: Tensor,
                later: Tensor) -> Tensor:
    """The rank of each masked position in the order of revealing, (B, L); 0 comes first.

    Blocks of positions are filled in from the left, in each block the most probable tokens first.
    probability (B, L) of the tokens; masked (B, L); place (B, L): the position within the text to
    fill in; block (B,): positions of a block; later (B, L): positions that come last in their
    block.
    """
    key = probability - 2.0 * later                             # in (-2, 1]
    key = key - 4.0 * (place // block[:, None])                 # blocks do not overlap
    key = key.masked_fill(~masked, -torch.inf)
    return key.argsort(dim=1, descending=True, stable=True).argsort(dim=1)          # (B, L)


@torch.no_grad()
def describe(model: MMDiT, text_encoder: Callable[[Tensor], Tensor], latents: Tensor | None,
             tokens: Tensor, mask_id: int, steps: int = 16, order: str | None = "confidence",
             temperature: float = 0.0, generator: torch.Generator | None = None,
             progress: bool = False, block: int = 0, end_id: int | None = None,
             watch: Callable[[Tensor], None] | None = None) -> Tensor:
    """Fill in the masked tokens of a text about clean images; ids (B, L).

    latents (B, C, H, W), or None for text alone. tokens (B, L): `mask_id` where text is wanted; all
    others, such as a question, stay. temperature: 0 takes the most probable token, 1 draws from the
    model's distribution.

    order: "confidence" reveals the most probable tokens first, equally many in each step; "left"
    the leftmost ones. "ancestral" is the released sampler, the reversed diffusion: t goes from 1 to
    1e-5, and a step from t to s reveals each masked token with probability (t - s) / t. None takes
    "left" for rows that hold a question, "confidence" for the others.

    By confidence, padding is often the surest and would end a text early. Two ways against it:
    block > 0 fills in blocks of so many tokens from the left (arXiv 2503.09573); end_id reveals
    this token, the end, after the others.

    generator: on the `float64_device` of the tokens, where all but the model runs.
    watch: is called with the tokens (B, L) at the start and after every step that reveals some.
    """
    if order not in (None, *ORDERS) or steps < 1 or temperature < 0 or block < 0:
        raise ValueError(f"order = {order!r}, steps = {steps}, temperature = {temperature}, "
                         f"block = {block}; expected one of {ORDERS}, at least one step, a "
                         "temperature and a block of at least 0")
    model_device, device = tokens.device, float64_device(tokens.device)
    tokens = tokens.to(device, copy=True)
    timestep = torch.zeros(len(tokens), device=model_device)                # the images are clean
    times = torch.linspace(1, 1e-5, steps + 1, dtype=torch.float64).tolist()
    wanted = (tokens == mask_id).sum(dim=1)                                 # (B,)
    place = (tokens == mask_id).cumsum(dim=1) - 1                           # (B, L)
    has_question = wanted < tokens.shape[1]                                 # (B,)
    from_left = has_question if order is None else torch.full_like(has_question, order == "left")
    blocks = torch.where(from_left, 1, block or tokens.shape[1])            # (B,) tokens of a block
    block_start = place - place % blocks[:, None]                           # (B, L)
    if watch:
        watch(tokens)
    for i in tqdm(range(steps + 1), desc="writing", unit="step", disable=not progress):
        last = i == steps                                       # one argmax fills in the rest
        masked = tokens == mask_id                                          # (B, L)
        if not masked.any():
            break
        target = wanted * (i + 1) // steps                                  # (B,) revealed by then
        quota = target - wanted + masked.sum(dim=1)                         # (B,) to reveal now
        if last:
            chosen = masked
        elif order == "ancestral":
            t, s = times[i], times[i + 1]
            chance = torch.rand(
                tokens.shape, dtype=torch.float64, device=device, generator=generator)
            chosen = masked & (chance < (t - s) / t)                        # (B, L)
        else:                               # by rank, among the blocks that this step fills in
            filled_in = (block_start < target[:, None]) & (quota[:, None] > 0)      # (B, L)
            chosen = masked & filled_in                                     # (B, L)
        if not chosen.any():
            continue                                            # no pass, as nothing is revealed
        # Trick for speed: logits, probabilities and draws only for the chosen positions.
        text = text_encoder(tokens.to(model_device))                        # (B, L, D)
        rows = chosen.to(model_device)                                      # (B, L)
        logits = model(latents, text, timestep, want={"logits": rows}).logits       # (N, vocab)
        if logits.ndim == 3:                                    # of a model that computes them all
            logits = logits[rows]                                           # (N, vocab)
        drawn = draw_tokens(logits, 0 if last else temperature, generator)  # (N,)
        reveal = chosen
        if order != "ancestral" and (chosen.sum(dim=1) > quota).any():
            probability = torch.zeros(chosen.shape, dtype=torch.float64, device=device)
            probability[chosen] = probability_of(drawn, logits)             # (B, L)
            later = torch.zeros_like(chosen)                                # (B, L)
            if end_id is not None:
                later[chosen] = drawn == end_id
            rank = rank_masked(probability, chosen, place, blocks, later)   # (B, L)
            reveal = chosen & (rank < quota[:, None])                       # (B, L)
        tokens = tokens.masked_scatter(reveal, drawn[reveal[chosen]])       # (B, L)
        if watch:
            watch(tokens)
    return tokens.to(model_device)


@torch.no_grad()
def least_probability(model: MMDiT, text_encoder: Callable[[Tensor], Tensor],
                      latents: Tensor | None, tokens: Tensor, answer: Tensor, mask_id: int,
                      parts: int = 8) -> Tensor:
    """The probability of each text's least probable token, given the others; (B,) float64.

    tokens (B, L); answer (B, L) bool: the tokens that count, padding too.

    Trick for speed: every `parts`-th token is masked together, so `parts` passes do in place of one
    for each token.
    """
    least = torch.ones(len(tokens), dtype=torch.float64, device=float64_device(tokens.device))
    place = torch.arange(tokens.shape[1], device=tokens.device)                     # (L,)
    timestep = torch.zeros(len(tokens), device=tokens.device)
    for part in range(parts):
        masked = answer & (place % parts == part)                                   # (B, L)
        if not masked.any():
            continue
        text = text_encoder(tokens.masked_fill(masked, mask_id))                    # (B, L, D)
        logits = model(latents, text, timestep, want={"logits": masked}).logits     # (N, vocab)
        chances = torch.ones(tokens.shape, dtype=least.dtype, device=least.device)  # (B, L)
        shown = tokens[masked].to(least.device)                                     # (N,)
        chances[masked.to(least.device)] = probability_of(shown, logits)
        least = torch.minimum(least, chances.amin(dim=1))                           # (B,)
    return least


# ---------------------------------------------------------------- the pipeline

def seeded(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator of random numbers; any integer is a seed."""
    return torch.Generator(device).manual_seed(seed % 2 ** 63)


WORKING_MEMORY = 1 << 30                    # bytes beside the weights that a stage may need
PLANS = 3                                   # drawn for a prompt, of which the best is kept


@dataclass(repr=False)
class Pipeline:
    """Tokenizer, text encoder, autoencoder and transformer: from texts to images and back.

    Each model is given itself, or as a `Part` that is loaded when it is used.
    """
    tokenizer: T5Tokenizer | None           # with embeddings neither this nor T5 is needed
    text_encoder: T5Encoder = Loaded()
    vae: VAE = Loaded()
    model: MMDiT = Loaded()
    settings: SampleSettings
    name: str = ""                          # of the weights, for messages
    embeddings: Embeddings | None = None    # of prompts, made elsewhere
    watch: Callable[..., None] | None = None        # sees every step of `generate` and `describe`

    @classmethod
    def from_parts(cls, model: Path | None, vae: Path | None, t5: Path | None,
                   tokenizer: Path | None, mask_token: Path | None, settings: SampleSettings,
                   dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
                   t5_dtype: torch.dtype | None = None, embeddings: Path | None = None
                   ) -> "Pipeline":
        """Open the four parts, each in any layout; each is loaded when it is first used.

        t5_dtype: of T5 alone; float8_e4m3fn keeps its matrices in fp8. embeddings: a file in place
        of T5 and its tokenizer. Without `model` the pipeline encodes prompts and nothing else.
        Raises ValueError where one does not fit, or where images of this size cannot be drawn.
        """
        check_ranges(settings, "sampling.")
        float8 = t5_dtype == torch.float8_e4m3fn
        text_dtype = t5_dtype if t5_dtype and not float8 else dtype
        pipeline = cls(None, None, None, None, settings, str(model or t5))
        if not embeddings:
            pipeline.tokenizer = T5Tokenizer(tokenizer, padding_id=settings.padding_id)
        if model:
            pipeline.vae = Part(partial(VAE.from_pretrained, vae, dtype), device)
            pipeline.model = Part(partial(MMDiT.from_pretrained, model, dtype), device)
            pipeline.check_size((settings.image_size, settings.image_size))
        if not embeddings:
            pipeline.text_encoder = Part(
                partial(T5Encoder.from_pretrained, t5, mask_token, text_dtype, float8=float8),
                device)
            rows = pipeline.outline("text_encoder").config.vocab_size
            if pipeline.tokenizer.vocab_size > rows:
                raise ValueError(f"{t5}: has {rows} tokens, {tokenizer} has "
                                 f"{pipeline.tokenizer.vocab_size}: they do not belong together")
            return pipeline
        pipeline.embeddings = Embeddings(embeddings)
        pipeline.settings = replace(settings, negative_prompt=pipeline.embeddings.negative)
        expected, width = pipeline.outline("model").config.text_dim, pipeline.embeddings.width
        if width != expected:
            raise ValueError(f"{embeddings}: embeddings of width {width}, by the text encoder "
                             f"{pipeline.embeddings.text_encoder}; {model} expects {expected}")
        return pipeline

    @classmethod
    def from_release(cls, model: Path, vae: Path | None = None, t5: Path | None = None,
                     tokenizer: Path | None = None, mask_token: Path | None = None,
                     dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
                     t5_dtype: torch.dtype | None = None, embeddings: Path | None = None,
                     draws: bool = True, **settings) -> "Pipeline":
        """Load released weights: the folder of a pipeline, or its transformer and the other parts.

        A part without a path is looked for in `model` and beside it. The conventions are those of
        the weights, `config.SD3` or `config.DUAL`, with these `settings` changed.
        t5_dtype, embeddings: as for `from_parts`. draws: False is for prompts alone.
        Raises ValueError where a part is missing, or as `from_parts` does.
        """
        kind, found = kind_of_checkpoint(model), find_release(model, t5)
        paths = {"--vae": vae or found.vae, "--t5": found.text_encoder,
                 "--tokenizer": tokenizer or found.tokenizer}
        needed = ("--vae",) * draws + ("--t5", "--tokenizer") * (embeddings is None)
        if missing := [option for option in needed if paths[option] is None]:
            raise ValueError(f"{model}: {' and '.join(missing)} are needed, as neither this path "
                             "nor the folder around it holds these parts")
        mask_token = mask_token or (found.mask_token if kind == "dual" else None)
        if kind == "sd3":
            note(f"{model}: plain Stable Diffusion 3, which is run without its CLIP towers: T5 "
                 "alone reads the prompt, and the pooled vector is zero, so pictures differ from "
                 "SD3's own")
        if kind == "dual" and mask_token is None:
            note(f"{model}: {MASK_TOKEN_ADVICE}--mask-token")
        conventions = replace(SD3 if kind == "sd3" else DUAL, **settings)
        return cls.from_parts(model if draws else None, *paths.values(), mask_token, conventions,
                              dtype, device, t5_dtype, embeddings)

    @classmethod
    def from_run(cls, run: str | Path, dtype: torch.dtype = torch.float32,
                 device: str | torch.device = "cpu", weights: Path | None = None,
                 t5_dtype: torch.dtype | None = None, embeddings: Path | None = None,
                 draws: bool = True) -> "Pipeline":
        """Load a model of a run, and the run's frozen parts.

        weights: None is the averaged weights of its newest checkpoint. The rest is as for
        `from_release`.
        Raises ValueError where something is missing.
        """
        files = RunFiles(run)
        averaged = weights or files.averaged_weights()
        if not averaged or not files.config.is_file():
            raise ValueError(f"{run}: holds no trained model; train one with python train.py, or "
                             "name the parts of a released one (--model, --vae, --t5, --tokenizer)")
        config = read_config(files.config)
        parts = parts_of(config, files.folder)
        mask_token = Path(config.mask_token) if config.mask_token else None
        pipeline = cls.from_parts(averaged if draws else None, parts.vae, parts.text_encoder,
                                  parts.tokenizer, mask_token, config.sampling, dtype, device,
                                  t5_dtype, embeddings)
        pipeline.name = str(weights or run)
        return pipeline

    def _parts(self) -> dict[str, Part]:
        """The models that this pipeline loads itself, by their names."""
        models = {name: self.__dict__[f"_{name}"] for name in ("text_encoder", "vae", "model")}
        return {name: part for name, part in models.items() if isinstance(part, Part)}

    def outline(self, name: str) -> torch.nn.Module:
        """A model for its configuration and type; its weights need not be loaded."""
        part = self._parts().get(name)
        return part.outline if part else getattr(self, name)

    @property
    def size(self) -> int:
        """Bytes of all weights that this pipeline loads itself."""
        return sum(part.size for part in self._parts().values())

    @property
    def device(self) -> torch.device:
        parts = self._parts()
        part = parts.get("model") or parts.get("text_encoder")
        return part.device if part else self.model.pos_embed.device

    def stage(self, *names: str) -> None:
        """Make room for models that are used together: free the others if not all fit.

        So T5-XXL, the transformer and the autoencoder share a memory that the largest one fills.
        """
        parts = self._parts()
        wanted = [parts[name] for name in names if name in parts]
        missing = sum(part.size for part in wanted if part.module is None)
        if missing and missing + WORKING_MEMORY > free_memory(self.device):
            self.release(*(name for name in parts if name not in names))

    def release(self, *names: str) -> None:
        """Free models; each is loaded again when it is used again."""
        for name, part in self._parts().items():
            if name in names and part.module is not None:
                part.free()

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ValueError where images of size (height, width) cannot be drawn."""
        config = self.outline("model").config
        unit = self.outline("vae").downscale * config.patch_size            # pixels per patch
        largest = unit * config.position_table
        if any(side % unit or not unit <= side <= largest for side in size):
            raise ValueError(f"image size {size[1]} x {size[0]}: expected multiples of {unit}, "
                             f"at most {largest}")

    def check_writes(self) -> None:
        """Raise ValueError for a model that cannot write."""
        if not self.model.text_head.weight.any():
            raise ValueError(f"{self.name}: cannot write, its text head is all zero as plain "
                             "SD3's; use a dual checkpoint")

    def encode_text(self, ids: Tensor) -> Tensor:
        """T5 of ids (B, L) -> (B, L, D)."""
        text, model = self.text_encoder(ids.to(self.device)), self.outline("model")
        return text if model is None else text.to(model.pos_embed.dtype)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], negative: str | None = None,
                       sources: int = 0) -> Texts:
        """T5 of prompts, each about this number of source pictures, and of the negative prompt."""
        s = self.settings
        negative = s.negative_prompt if negative is None else negative
        if self.embeddings:
            if negative != self.embeddings.negative:
                raise ValueError(f"{self.embeddings.path}: was made with the negative prompt "
                                 f"{self.embeddings.negative!r}, not {negative!r}")
            dtype = self.outline("model").pos_embed.dtype
            return self.embeddings.texts(prompts, sources, dtype)
        self.stage("text_encoder")
        ids = self.tokenizer([*prompts, negative], length=s.text_length)            # (B + 1, L)
        *counts, negative_count = text_lengths(ids, self.tokenizer.eos_id)
        lengths = [prompt_length(max(count, negative_count), sources, s.text_length,
                                 s.prompt_multiple) for count in counts]
        texts, negatives = {}, {}
        for length in sorted(set(lengths)):         # a single one, unless there are sources
            rows = [i for i, own_length in enumerate(lengths) if own_length == length]
            encoded = self.encode_text(ids[[*rows, -1], :length]).cpu()             # (b + 1, l, D)
            texts |= dict(zip(rows, encoded))                                       # (l, D) each
            negatives[length] = encoded[-1]                                         # (l, D)
        return Texts([texts[i] for i in range(len(prompts))], negatives)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> clean latents (B, C, h, w)."""
        latents = self.vae.encode(images.to(self.device))                           # (B, C, h, w)
        return latents.to(self.outline("model").pos_embed.dtype)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Clean latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1]."""
        dtype = self.outline("model").pos_embed.dtype
        images = self.vae.decode(latents.to(self.device, dtype))                    # (B, 3, H, W)
        return images.float().clamp(-1, 1)

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seed: int | Sequence[int] = 0, steps: int | None = None,
             guidance: float | None = None, references: Sequence[Tensor] = (),
             progress: bool = False, size: tuple[int, int] | None = None,
             negative: str | None = None, texts: Texts | None = None) -> Tensor:
        """Draw images (B, 3, H, W) in [-1, 1]. Image i depends on its prompt and seed alone.

        seed: one for each image, or a number n: image i has the seed n + i. size: (H, W) in pixels.
        negative: the prompt that guidance leads away from. None is the setting of the model.
        texts: what `encode_prompts` has made of the prompts before.
        """
        s = self.settings
        steps = s.steps if steps is None else steps
        guidance = s.guidance if guidance is None else guidance
        size = size or (s.image_size, s.image_size)
        self.check_size(size)
        texts = texts or self.encode_prompts(prompts, negative, len(references))
        self.stage("model", "vae")
        seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
        channels, unit = self.outline("model").config.latent_channels, self.outline("vae").downscale
        shape = channels, *(side // unit for side in size)
        generators = [seeded(n) for n in seeds]

        def new_noise(rows: Sequence[int]) -> Tensor:
            parts = [torch.randn(shape, generator=generators[i]) for i in rows]
            return torch.stack(parts).to(self.device)                               # (b, C, h, w)

        noise = new_noise(range(len(seeds)))                                        # (B, C, h, w)

        lengths = [len(text) for text in texts.prompts]
        latents = torch.empty_like(noise, device=self.device)                       # (B, C, h, w)
        for length in sorted(set(lengths)):         # a single one, unless there are references
            rows = [i for i, own_length in enumerate(lengths) if own_length == length]
            text = torch.stack([texts.prompts[i] for i in rows]).to(self.device)    # (b, l, D)
            empty = texts.negative[length][None].to(self.device)                    # (1, l, D)
            latents[rows] = generate(
                self.model, noise[rows], text, empty, steps, guidance,
                s.shift, [r[rows] for r in references], s.image_guidance, progress, s.solver,
                s.guidance_interval, self.watch, partial(new_noise, rows))
        return self.decode_latents(latents)

    def edit(self, prompts: Sequence[str], sources: Sequence[Tensor],
             seed: int | Sequence[int] = 0, steps: int | None = None,
             guidance: float | None = None, progress: bool = False,
             size: tuple[int, int] | None = None, negative: str | None = None,
             texts: Texts | None = None) -> Tensor:
        """Draw images (B, 3, H, W) from any number of sources, each (B, 3, H', W') in [-1, 1]."""
        references = [self.encode_images(images) for images in sources]
        return self.draw(prompts, seed, steps, guidance, references, progress, size, negative,
                         texts)

    def _text_start(self, questions: Sequence[str], before: Sequence[Sequence[tuple[str, str]]],
                    no_image: bool = False) -> tuple[Tensor, Tensor]:
        """Ids of questions followed by masks, and where the masks are; (B, L) each.

        Questions are sampled in the length that the model answers in, where they fit into it.
        """
        s = self.settings
        template = s.question_template
        texts = [asked(question, template) for question in questions]
        turns = [[(asked(q, template), a) for q, a in earlier] for earlier in before]
        length = length_for(no_image, s.text_length, s.text_only_length)
        ids, answer = self.tokenizer.dialogue(texts, length=length, before=turns)
        longest = int((~answer).sum(dim=1).max())               # of the questions
        if longest and 2 * longest <= s.answer_length and not no_image:
            length = s.answer_length
        return ids[:, :length], answer[:, :length]                                  # (B, L) each

    def caption(self, images: Tensor | None, seed: int = 0, steps: int | None = None,
                order: str | None = None, temperature: float | None = None, progress: bool = False,
                questions: Sequence[str] | None = None,
                before: Sequence[Sequence[tuple[str, str]]] | None = None) -> list[str]:
        """Write captions of images (B, 3, H, W) in [-1, 1], or answers to one question about each.

        images: None answers questions about a text alone.
        before: for each question the dialogue before it, pairs of question and answer.
        order: as in `describe`; None is the setting of the model. Without one, captions are written
        by confidence and answers from the left. By confidence the end of an answer comes first and
        fixes its length, which decides between "no" and "yes at the center" before the model has
        looked (experiments/LOG.md).
        """
        s = self.settings
        questions = [""] * len(images) if questions is None else questions
        before = [()] * len(questions) if before is None else before
        tokens, answer = self._text_start(questions, before, images is None)        # (B, L) each
        generator = seeded(seed, float64_device(self.device))
        used = ("text_encoder", "model", "vae")                 # T5 is needed in every step
        self.stage(*(used if images is not None else used[:2]))
        latents = None if images is None else self.encode_images(images)            # (B, C, h, w)
        ids = describe(
            self.model, self.encode_text, latents, tokens.to(self.device),
            self.tokenizer.mask_id, s.text_steps if steps is None else steps, order or s.order or
            None, s.temperature if temperature is None else temperature, generator, progress,
            s.block, self.tokenizer.eos_id if s.end_last else None, self.watch)     # (B, L)
        rows = [row[mask].tolist() for row, mask in zip(ids.cpu(), answer)]
        return self.tokenizer.decode(rows)

    def plan(self, prompts: Sequence[str], seed: int = 0, progress: bool = False) -> list[str]:
        """Complete prompts to full captions by the text branch, without a picture; one for each.

        The model learns it from records without a picture, from a prompt to a caption. Tokens that
        are drawn in one step do not see each other, so there is one in each step, at temperature 1.
        The model checks itself: of three plans it keeps the one whose least probable token is the
        most probable. seed: of all prompts together; the plans take this one and the next two.
        """
        s = self.settings
        steps = length_for(True, s.text_length, s.text_only_length)
        questions = [asked(prompt, s.question_template) for prompt in prompts]
        best, chances = [""] * len(prompts), [-1.0] * len(prompts)
        for i in range(PLANS):
            plans = self.caption(None, seed + i, steps, "confidence", 1.0, progress,
                                 questions=prompts)
            ids, answer = self.tokenizer.dialogue(questions, plans, steps)          # (B, L) each
            chance = least_probability(
                self.model, self.encode_text, None, ids.to(self.device), answer.to(self.device),
                self.tokenizer.mask_id).tolist()                                    # (B,)
            for k, plan in enumerate(plans):
                if chance[k] > chances[k]:
                    best[k], chances[k] = plan, chance[k]
        return best

    def warnings(self, prompt: str) -> list[str]:
        """Name the parts of a prompt that the model cannot see: unknown words, and a cut end."""
        if self.tokenizer is None:
            return []
        count, length = len(self.tokenizer.encode(prompt)), self.settings.text_length
        warnings = [] if prompt.strip() else ["an empty text; the model is left free"]
        if count > length:
            warnings.append(f"{count} tokens, the model reads {length}: the end is cut off")
        words = prompt.split()
        unknown = [w for w in words if self.tokenizer.unk_id in self.tokenizer.encode(w)]
        if unknown:
            warnings.append(f"not in the model's vocabulary: {', '.join(unknown)}")
        return warnings


# ---------------------------------------------------------------- films

def watched(pipeline: Pipeline) -> list[tuple]:
    """Keep the states of every step that the pipeline samples from now on, in the list returned."""
    states: list[tuple] = []
    # on the host: the device is full at full size
    pipeline.watch = lambda *state: states.append(
        tuple(x[0].cpu() if isinstance(x, Tensor) else x for x in state))
    return states


def film_frames(pipeline: Pipeline, states: Sequence[tuple],
                pictures: Sequence[np.ndarray]) -> Iterator[Image.Image]:
    """The frames of a film: of a picture drawn, or of a text written about the first picture.

    states: of one picture or text, see `watched`; pictures (H, W, 3) uint8: its sources.
    """
    def decoded(latents: Sequence[Tensor]) -> Iterator[np.ndarray]:
        for chunk in torch.stack(latents).split(4):             # few pictures in memory at a time
            yield from to_pictures(pipeline.decode_latents(chunk))                  # (H, W, 3) each

    if len(states[0]) == 1:                                     # tokens alone: a text
        tokenizer = pipeline.tokenizer
        rows = [[None if i == tokenizer.mask_id else tokenizer.piece(i) for i in ids.tolist()]
                for ids, in states]
        yield from text_frames(rows, pictures[0])
        return
    pipeline.stage("vae")
    sigmas, noisy, clean = zip(*states)
    yield from picture_frames(sigmas, decoded(noisy), decoded(clean), pictures)


# ---------------------------------------------------------------- command line

def _open_pipeline(a: argparse.Namespace, dtype: torch.dtype) -> Pipeline:
    """Open the models that the options of `add_model_options` name, which reads no weights yet."""
    t5_dtype = a.t5_dtype and getattr(torch, a.t5_dtype.replace("float8", "float8_e4m3fn"))
    draws = not getattr(a, "save_embeddings", None)
    options = {"t5_dtype": t5_dtype, "embeddings": a.embeddings, "draws": draws}
    if not a.model and (a.run or not a.t5):
        return Pipeline.from_run(a.run or Path("runs/tiny"), dtype, a.device, **options)
    given = {name: getattr(a, name) for name in ("image_size", "padding_id")}
    settings = {name: value for name, value in given.items() if value is not None}
    if not a.model:                                             # T5 alone
        conventions = replace(SD3 if a.padding_id == 0 else DUAL, **settings)
        return Pipeline.from_parts(None, None, a.t5, a.tokenizer or a.t5, a.mask_token,
                                   conventions, dtype, a.device, t5_dtype)
    parts = a.vae, a.t5, a.tokenizer, a.mask_token
    run = run_of(a.model)
    if run and not any(parts):
        pipeline = Pipeline.from_run(run, dtype, a.device, a.model, **options)
        pipeline.settings = replace(pipeline.settings, **settings)
        return pipeline
    return Pipeline.from_release(a.model, *parts, dtype, a.device, **options, **settings)


def load_pipeline(a: argparse.Namespace) -> Pipeline:
    """Open the models that the options of `add_model_options` name. Raises ValueError.

    They are loaded when they are used. On a CPU weights are float32, unless those that the command
    line names would not fit into the memory so.
    """
    on_cpu = torch.device(a.device).type == "cpu"
    pipeline = _open_pipeline(a, getattr(torch, a.dtype or ("float32" if on_cpu else "bfloat16")))
    is_named, memory = bool(a.model or a.t5), total_memory()
    if on_cpu and is_named and not a.dtype and pipeline.size + WORKING_MEMORY > memory:
        note(f"{pipeline.name}: {pipeline.size / 1e9:.0f} GB of float32 weights in "
             f"{memory / 1e9:.0f} GB of memory: they are loaded as bfloat16; --dtype sets another")
        pipeline = _open_pipeline(a, torch.bfloat16)
    return pipeline


def change_settings(pipeline: Pipeline, a: argparse.Namespace) -> None:
    """Change the settings that options name. Raises ValueError for values that do not fit."""
    given = {name: getattr(a, name, None) for name in SETTINGS}
    changes = {name: tuple(value) if isinstance(value, list) else value
               for name, value in given.items() if value is not None}
    pipeline.settings = replace(pipeline.settings, **changes)


BATCH = 16                      # prompts, or pictures to describe, at a time: bounds the memory


def _answer_in_turn(pipeline: Pipeline, a: argparse.Namespace,
                    size: tuple[int, int]) -> Iterator[str]:
    """Answer the questions of --ask as one dialogue; a line for each."""
    image, turns = load_image(a.image[0], size)[None], []                       # (1, 3, H, W)
    for i, question in enumerate(a.ask):
        [answer] = pipeline.caption(image, a.seed + i, a.steps, progress=True,
                                    questions=[question], before=[turns])
        turns.append((question, answer))
        yield f"{question}\t{answer}"


def _write_texts(pipeline: Pipeline, a: argparse.Namespace,
                 size: tuple[int, int]) -> Iterator[str]:
    """Write captions of --describe, or answers of --ask; a line for each, batch by batch.

    A picture that cannot be read raises ValueError after all others have their text.
    """
    pipeline.check_writes()
    if a.dialogue:
        yield from _answer_in_turn(pipeline, a, size)
        return
    subjects = a.describe or a.ask
    unreadable = {}                                             # messages, each once
    for start in range(0, len(subjects), BATCH):
        readable, images = [], []
        for subject in subjects[start:start + BATCH]:
            path = subject if a.describe else a.image[0]
            try:
                images.append(load_image(path, size))
                readable.append(subject)
            except ValueError as error:
                unreadable[str(error)] = True
        if images:
            texts = pipeline.caption(torch.stack(images), a.seed + start, a.steps, progress=True,
                                     questions=readable if a.ask else None)
            yield from (f"{subject}\t{text}" for subject, text in zip(readable, texts))
            if "" in texts and pipeline.settings.question_template != "{question}":
                note("an empty answer; a question that ends with \"Answer the question using a "
                     "single word or phrase.\" is more like those of the released training")
    if unreadable:
        raise ValueError("; ".join(unreadable))


def _jobs(a: argparse.Namespace) -> list[Job]:
    """The pictures that the command line asks for.

    The first --edit takes the pictures of --image, each other one the last result.
    """
    if a.jobs:
        return a.jobs
    sources = [tuple(a.image), *((name,) for name in a.names)]
    return [Job(name, text, sources[i] if a.edit else (), a.seed + i)
            for i, (name, text) in enumerate(zip(a.names, a.prompt or a.edit))]


def _requests(a: argparse.Namespace) -> list[Request]:
    """The texts that the command line draws or edits with, in order, each once."""
    counts = [len(a.image)] + [1] * len(a.edit)                 # a turn edits the last result
    requests = [Request(job.prompt, len(job.sources)) for job in a.jobs]
    requests += [Request(text) for text in a.prompt]
    requests += [Request(text, count) for text, count in zip(a.edit, counts)]
    return [*dict.fromkeys(requests)]


def _save_embeddings(pipeline: Pipeline, a: argparse.Namespace,
                     size: tuple[int, int]) -> Iterator[str]:
    """Encode the texts and write them into a file, for a machine without T5; one line."""
    embeddings, negatives = [], {}
    dtype = a.t5_dtype or str(pipeline.outline("text_encoder").embedding.weight.dtype)
    requests = sorted(_requests(a), key=lambda request: request.sources)
    for count, group in itertools.groupby(requests, key=lambda request: request.sources):
        alike = list(group)
        for start in tqdm(range(0, len(alike), BATCH), desc="encoding", unit="batch",
                          disable=len(alike) <= BATCH):
            batch = alike[start:start + BATCH]
            texts = pipeline.encode_prompts([request.prompt for request in batch], None, count)
            embeddings += zip(batch, texts.prompts)
            negatives |= texts.negative
    save_embeddings(a.save_embeddings, embeddings, negatives, pipeline.settings.negative_prompt,
                    f"{a.t5 or pipeline.name}, {dtype.removeprefix('torch.')}")
    yield f"{a.save_embeddings}\t{len(embeddings)} texts"


def _plans(pipeline: Pipeline, a: argparse.Namespace) -> list[str]:
    """The full captions to draw in place of the prompts. Raises ValueError for an empty one."""
    pipeline.check_writes()
    plans = []
    for start in range(0, len(a.prompt), BATCH):
        plans += pipeline.plan(a.prompt[start:start + BATCH], a.seed + PLANS * start, progress=True)
    for prompt, plan in zip(a.prompt, plans):
        if not plan:
            raise ValueError(f"the plan of {prompt!r:.80} is empty; draw it without --plan, or "
                             "with a model that is trained on plans")
        print(f"plan of {prompt!r}: {plan}", file=sys.stderr)
    return plans


def _draw_pictures(pipeline: Pipeline, a: argparse.Namespace,
                   size: tuple[int, int]) -> Iterator[str]:
    """Draw pictures and write each batch before the next is drawn; a line for each picture."""
    batch = 1 if a.edit else BATCH                              # a turn needs the one before
    jobs = _jobs(a)

    def rename(taken: Path) -> Path:        # another run has taken the name since the start
        return picture_names(a.out, 1)[0]

    drawn = draw_missing(pipeline, jobs, batch, steps=a.steps, size=size,
                         rename=None if a.edits else rename)
    for job in drawn:
        yield f"{job.path}\t{job.prompt}"


def _write_film(pipeline: Pipeline, a: argparse.Namespace, size: tuple[int, int],
                states: Sequence[tuple]) -> Iterator[str]:
    """Write the film of the states that `watched` has seen; one line."""
    paths = a.describe or a.image
    pictures = [to_pictures(load_image(path, size)[None])[0] for path in paths]     # (H, W, 3) each
    [title] = a.prompt or a.edit or a.ask or [f"describe {paths[0].name}"]
    frames = film_frames(pipeline, states, pictures)
    write_film(a.film, title, list(tqdm(frames, "filming", len(states), unit="frame")))
    yield f"{a.film}\t{a.film.with_suffix('.png')}"


def main(argv: Sequence[str] | None = None) -> None:
    for stream in (sys.stdout, sys.stderr):     # a letter that the console lacks ends no run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    a, done, status = read_arguments(argv, __doc__), 0, 1
    try:
        check_numbers(a)
        pipeline = load_pipeline(a)
        change_settings(pipeline, a)
        side = pipeline.settings.image_size
        size = a.height or side, a.width or side
        if not a.save_embeddings:
            pipeline.check_size(size)
        if a.kind:
            a.edit = [pipeline.settings.perception_prompt.replace("{kind}", a.kind)]
        if a.plan:
            a.prompt = _plans(pipeline, a)
        for text in {text: None for text in [*a.prompt, *a.edit, *a.ask,
                                          *(job.prompt for job in a.jobs)]}:
            for warning in pipeline.warnings(text):
                print(f"warning: {text!r}: {warning}", file=sys.stderr)
        if pipeline.embeddings:
            pipeline.embeddings.check(_requests(a))
        writes = a.describe or a.ask
        task = _write_texts if writes else _draw_pictures
        task = _save_embeddings if a.save_embeddings else task
        lines = task(pipeline, a, size)
        if a.film:
            lines = itertools.chain(lines, _write_film(pipeline, a, size, watched(pipeline)))
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
        total = len(a.jobs or a.names or a.describe or a.ask)
        folder = a.out if a.jobs or not a.out.suffix else a.out.parent
        kind, where = ("texts", "") if a.describe or a.ask else ("pictures", f", in {folder}")
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
