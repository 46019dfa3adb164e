"""The parts that a run without released weights makes for itself: tokenizer, autoencoder, teacher.

They stand in for T5's sentencepiece model, SD3's autoencoder and Qwen2.5-VL. The text encoder has
random weights. Each part takes between seconds and four minutes on two CPU cores. `prepare` makes
the parts that a configuration has no path for.

Run alone to make the three and view the autoencoder's reconstructions:

    python -m experiments.parts FOLDER
"""
import io
import random
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import save, write_atomically
from config import PRESETS, RunFiles, TrainConfig, parts_of
from data import read_jsonl, to_images, to_pictures
from experiments import world
from experiments.dataset import make_world
from experiments.language import caption
from experiments.small_teacher import ContrastiveTeacher, ContrastiveTeacherConfig
from losses import contrastive_loss
from muon import Muon
from run_folder import missing_parts, timed
from text_encoder import T5Config, T5Encoder, T5Tokenizer
from vae import VAE, VAEConfig


# ---------------------------------------------------------------- tokenizer

def normalization_rule(text: str, replacement: str) -> str:
    """A rule of sentencepiece's normalization_rule_tsv, which writes code points in hexadecimal."""
    def code_points(characters: str) -> str:
        return " ".join(f"{ord(character):X}" for character in characters)

    return f"{code_points(text)}\t{code_points(replacement)}\n"


def train_tokenizer(texts: list[str], path: Path) -> None:
    """Train a sentencepiece model of whole words with T5's special ids.

    Every character is kept, so that no word of `texts` is unknown. A question mark is a word of its
    own, so that "circle?" and "circle" share a token and the model learns its meaning once.
    """
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:       # sentencepiece opens the file by its name
        rules = Path(folder) / "rules.tsv"
        rules.write_text(normalization_rule("?", " ?"))
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="word",
            vocab_size=1000, hard_vocab_limit=False, character_coverage=1.0,
            normalization_rule_tsv=str(rules),
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    write_atomically(path, lambda file: file.write_bytes(model.getvalue()))


# ---------------------------------------------------------------- training loop

def fit(model: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float, warmup: int,
        label: str, muon_lr: float = 0.0) -> None:
    """Minimise loss() by `steps` steps of AdamW, with linear warm-up and linear decay.

    muon_lr: the rate of Muon for all weights but vectors; 0: AdamW for all.
    """
    matrices, others = [], []
    for p in model.parameters():
        (matrices if muon_lr and p.ndim > 1 else others).append(p)
    rates: dict[torch.optim.Optimizer, float] = {
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0): lr}
    if matrices:
        rates[Muon(matrices, muon_lr)] = muon_lr
    for step in tqdm(range(steps), desc=label, unit="step"):
        model.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in rates.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / warmup) * (1 - step / steps)
            optimizer.step()


# ---------------------------------------------------------------- autoencoder

SHARPENING = 0.6                # of the autoencoder's steps once more, for the decoder alone
LATENT_NOISE = 0.3              # the largest standard deviation of the noise, that of latents is 1
RETURN = 0.3                    # weight of the way back: decoded pictures keep their latents


def random_training_picture(rng: random.Random) -> np.ndarray:
    """A training picture of the autoencoder, (H, W, 3) uint8: a crowded scene, or its map.

    One to nine objects teach more per step than one to three. No scene is held out.
    """
    shares = {
        (world.render, world.SHAPES): 0.65,
        (world.edge_map, world.SHAPES): 0.17,
        (world.depth_map, world.SHAPES): 0.06,
        (world.render, world.ARROWS): 0.06,
        (world.pose_map, world.ARROWS): 0.06}
    draw, shapes = rng.choices(list(shares), list(shares.values()))[0]
    scene = world.random_scene(rng, rng.randint(1, 9), shapes)
    while world.held_out(scene):
        scene = world.random_scene(rng, rng.randint(1, 9), shapes)
    return draw(scene)


def sharpen(vae: VAE, pictures: list[np.ndarray], latents: Tensor, steps: int,
            generator: torch.Generator, autocast: bool) -> None:
    """Train the decoder alone on the absolute error, from noisy latents; latents (n, C, h, w).

    Squared error blurs an outline whose place is uncertain, absolute error chooses one. The noise
    stands for the errors of the latents that the transformer draws. The encoder must read the
    decoded picture as the clean latents, so that edits in turns do not wear a picture out.
    """
    def loss() -> Tensor:
        batch = torch.randint(len(pictures), (16,), generator=generator)
        images, clean = to_images([pictures[i] for i in batch]), latents[batch]
        level = LATENT_NOISE * torch.rand(16, 1, 1, 1, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)                 # (16, C, h, w)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            decoded = vae.decode(clean + level * noise).float()               # (16, 3, H, W)
            back = vae.encode(decoded).float()                                # (16, C, h, w)
        return F.l1_loss(decoded, images) + RETURN * F.mse_loss(back, clean)

    vae.encoder.requires_grad_(False)
    fit(vae.decoder, loss, steps, lr=2e-3, warmup=50, label="decoder", muon_lr=0.02)


def train_vae(config: VAEConfig, steps: int, seed: int, autocast: bool, path: Path) -> None:
    """Train the tiny autoencoder on squared error and a small KL term, then sharpen its decoder.

    The saved configuration scales the latents to mean 0 and variance 1, as SD3's constants do.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    pictures = [random_training_picture(rng) for _ in range(6000)]
    vae = VAE(replace(config, scale=1.0, shift=0.0))
    vae.to(memory_format=torch.channels_last)       # trick for speed: a fifth less time on a CPU

    def loss() -> Tensor:
        batch = torch.randint(len(pictures), (16,), generator=generator)
        images = to_images([pictures[i] for i in batch])                      # (16, 3, H, W)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mean, logvar = (part.float() for part in vae.moments(images))     # (16, C, h, w) each
            noise = torch.randn(mean.shape, generator=generator)              # (16, C, h, w)
            latents = mean + (logvar / 2).exp() * noise                       # (16, C, h, w)
            decoded = vae.decode(latents).float()                             # (16, 3, H, W)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.mse_loss(decoded, images) + 1e-4 * kl

    fit(vae, loss, steps, lr=3e-3, warmup=50, label="autoencoder", muon_lr=0.02)
    with torch.no_grad():
        chunks = [to_images(pictures[i:i + 64]) for i in range(0, len(pictures), 64)]
        means = torch.cat([vae.moments(images)[0] for images in chunks])      # (6000, C, h, w)
    scale, shift = 1 / means[:512].std().item(), means[:512].mean().item()
    vae.config = replace(config, scale=scale, shift=shift)
    sharpen(vae, pictures, (means - shift) * scale, round(SHARPENING * steps), generator, autocast)
    save(path, vae.state_dict(), vae.config)


# ---------------------------------------------------------------- teacher

def scene_variant(scene: world.Scene, rng: random.Random) -> world.Scene:
    """Change the background, or one attribute of one object, of a scene.

    The attribute is drawn anew or exchanged with another object's. The same scene is returned where
    the draw changes nothing or puts two objects into one cell.
    """
    attribute = rng.choice(("size", "color", "shape", "cell", "background"))
    if attribute == "background":
        return scene._replace(background=rng.choice(list(world.BACKGROUNDS)))
    first, *rest = rng.sample(scene.objects, len(scene.objects))
    exchange = bool(rest) and rng.random() < 0.5
    other = rest.pop() if exchange else world.random_scene(rng, 1).objects[0]
    objects = [first._replace(**{attribute: getattr(other, attribute)}), *rest]
    if exchange:
        objects.append(other._replace(**{attribute: getattr(first, attribute)}))
    if len({o.cell for o in objects}) < len(objects):
        return scene
    return scene._replace(objects=world.raster_order(objects))


def scenes_and_variants(rng: random.Random, count: int, variants: int = 3) -> list[world.Scene]:
    """`count` random scenes of one to three objects, each followed by different variants of it.

    No scene is held out.
    """
    scenes = []
    while len(scenes) < count * (1 + variants):
        scene = world.random_scene(rng, rng.choices((1, 2, 3), weights=(1, 2, 3))[0])
        if world.held_out(scene):
            continue
        group = {scene.content(): scene}
        while len(group) <= variants:
            variant = scene_variant(scene, rng)
            if not world.held_out(variant):
                group[variant.content()] = variant
        scenes += group.values()
    return scenes


def train_teacher(steps: int, seed: int, autocast: bool, tokenizer_path: Path,
                  folder: Path) -> None:
    """Train the small teacher to match pictures and captions among 64 scenes and their variants.

    Random scenes differ in so much that a few attributes suffice to match them. Variants differ in
    one attribute, so that the teacher has to learn all of them.
    """
    rng = random.Random(seed)
    tokenizer = SentencePieceProcessor(model_proto=tokenizer_path.read_bytes())
    torch.manual_seed(seed)
    config = ContrastiveTeacherConfig(vocab_size=tokenizer.get_piece_size())
    teacher = ContrastiveTeacher(config, tokenizer)

    def loss() -> Tensor:
        scenes = scenes_and_variants(rng, 64)
        images = to_images([world.render(scene) for scene in scenes])         # (256, 3, H, W)
        ids = teacher.token_ids([caption(scene) for scene in scenes])         # (256, L)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            image, text = teacher(images, ids)                                # (256, d) each
        # Only one rank trains the teacher, so that there is nothing to gather.
        return contrastive_loss(image.unsqueeze(1), text.unsqueeze(1), gather=False)

    fit(teacher, loss, steps, lr=3e-3, warmup=30, label="teacher")
    write_atomically(folder / "tokenizer.model",
                     lambda file: file.write_bytes(tokenizer_path.read_bytes()))
    save(folder / "model.safetensors", teacher.state_dict(), teacher.config)


# ---------------------------------------------------------------- all parts of a run

def texts_of(files: Iterable[Path]) -> list[str]:
    """Every different prompt, question and caption of JSONL files, in their order."""
    texts = []
    for file in files:
        for example in read_jsonl(file):
            texts += [example.prompt, example.question, example.caption]
    return list(dict.fromkeys(filter(None, texts)))


def make_text_encoder(config: T5Config, tokenizer: T5Tokenizer, seed: int, path: Path) -> None:
    """Write a T5 encoder of random weights for the vocabulary of a tokenizer."""
    torch.manual_seed(seed)
    config = replace(config, vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id)
    save(path, T5Encoder(config).state_dict(), config)


def prepare(config: TrainConfig, run: Path) -> None:
    """Make the missing parts of a run."""
    parts, missing = parts_of(config, run), missing_parts(config, run)
    if "world" in missing:
        with timed(run, "world"):
            make_world(RunFiles(run).world, config.train_scenes, config.test_scenes, config.seed)
    if "tokenizer" in missing:
        with timed(run, "tokenizer"):
            train_tokenizer(texts_of(parts.data), parts.tokenizer)
    tokenizer = T5Tokenizer(parts.tokenizer)            # a wrong file raises before minutes of work
    if "text encoder" in missing:
        make_text_encoder(config.text_encoder, tokenizer, config.seed, parts.text_encoder)
    if "vae" in missing:
        with timed(run, "vae"):
            train_vae(config.vae, config.vae_steps, config.seed, config.autocast, parts.vae)
    if "teacher" in missing:
        with timed(run, "teacher"):
            train_teacher(config.teacher_steps, config.seed, config.autocast, parts.tokenizer,
                          parts.teacher)


def main(folder: Path) -> None:
    """Make the parts of the tiny preset and a sheet of reconstructions."""
    preset, files, rng = PRESETS["tiny"], RunFiles(folder), random.Random(1)
    scenes = [world.random_scene(rng, 1 + i % 3) for i in range(5000)]
    train_tokenizer([caption(scene) for scene in scenes], files.tokenizer)
    train_vae(preset.vae, preset.vae_steps, 0, True, files.vae)
    train_teacher(preset.teacher_steps, 0, True, files.tokenizer, files.teacher)

    pictures = [random_training_picture(rng) for _ in range(12)]
    vae = VAE.from_pretrained(files.vae)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(to_images(pictures)))                 # (12, 3, H, W)
    above = np.concatenate(pictures, axis=1)                                  # (H, 12 W, 3)
    below = np.concatenate(to_pictures(decoded), axis=1)                      # (H, 12 W, 3)
    sheet = folder / "autoencoder.png"
    Image.fromarray(np.concatenate([above, below])).save(sheet)
    print("wrote", sheet, "(above: pictures; below: their reconstructions)")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
