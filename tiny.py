"""What a run without released weights makes for itself, on the shapes world: a tokenizer, an autoencoder and a teacher.

They stand in for T5's sentencepiece model, SD3's autoencoder and Qwen2.5-VL (the text encoder stays random); each takes seconds to
two minutes on two CPU cores. train.py makes what it is given no path for.

Run alone to make the three and look at what the autoencoder keeps:   python tiny.py FOLDER
"""
import io
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor, nn
from tqdm import tqdm

import shapes
from checkpoint import save, write_atomically
from data import to_images, to_pictures
from losses import contrastive_loss
from teacher import ContrastiveTeacher, ContrastiveTeacherConfig
from vae import VAE, VAEConfig

VAE_CONFIG = VAEConfig(block_channels=(48, 48), layers_per_block=1, norm_groups=1, mid_attention=False, stem=4)
VAE_STEPS, TEACHER_STEPS = 5000, 400


def train_tokenizer(texts: list[str], path: Path) -> None:
    """A sentencepiece model of whole words with T5's special ids. All characters are kept, so that no word of `texts` is unknown.

    A question mark becomes a word of its own: what "circle" means is then learned once, not again for "circle?".
    """
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        rules.write("3F\t20 3F\n")                               # "?" -> " ?", in hexadecimal code points
        rules.flush()
        SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, vocab_size=1000, hard_vocab_limit=False,
                                   model_type="word", character_coverage=1.0, normalization_rule_tsv=rules.name,
                                   pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    write_atomically(path, lambda file: file.write_bytes(model.getvalue()))


def fit(model: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float, warmup: int, label: str) -> None:
    """`steps` steps of AdamW on loss(), with warm-up and linear decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in tqdm(range(steps), desc=label, unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warmup) * (1 - step / steps)
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def train_vae(config: VAEConfig, steps: int, seed: int, autocast: bool, path: Path) -> None:
    """The tiny autoencoder: squared error and a little KL, on crowded pictures (one to nine objects), which teach most per step,
    and on the maps of the perception tasks.

    Its latents are then scaled to unit variance, which SD3's constants do for SD3's latents.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    pictures = [shapes.random_training_picture(rng) for _ in range(6000)]
    vae = VAE(replace(config, scale=1.0, shift=0.0))

    def loss() -> Tensor:
        x = to_images([pictures[i] for i in torch.randint(len(pictures), (16,), generator=generator)])       # (16, 3, H, W)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mean, logvar = (part.float() for part in vae.moments(x))                          # (16, C, h, w) each
            z = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator)      # (16, C, h, w)
            y = vae.decode(z).float()                                                         # (16, 3, H, W)
        return F.mse_loss(y, x) + 1e-4 * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()

    fit(vae, loss, steps, lr=6e-3, warmup=50, label="autoencoder")
    with torch.no_grad():
        mean = torch.cat([vae.moments(to_images(pictures[i:i + 64]))[0] for i in range(0, 512, 64)])         # (512, C, h, w)
    vae.config = replace(config, scale=1 / mean.std().item(), shift=mean.mean().item())
    save(path, vae.state_dict(), vae.config)


def scene_variant(scene: shapes.Scene, rng: random.Random) -> shapes.Scene:
    """`scene` with the background changed, or one attribute of one object: made new, or exchanged with another object's.

    The same scene where the change would be none or would put two objects into one cell.
    """
    name = rng.choice((*shapes.Object._fields[:4], "background"))
    if name == "background":
        return scene._replace(background=rng.choice(list(shapes.BACKGROUNDS)))
    first, *rest = rng.sample(scene.objects, len(scene.objects))
    exchange = bool(rest) and rng.random() < 0.5
    other = rest.pop() if exchange else shapes.random_scene(rng, 1).objects[0]
    objects = [first._replace(**{name: getattr(other, name)}), *[other._replace(**{name: getattr(first, name)})] * exchange, *rest]
    free = len({o.cell for o in objects}) == len(objects)
    return scene._replace(objects=tuple(sorted(objects, key=lambda o: o.cell))) if free else scene


def scenes_and_variants(rng: random.Random, count: int, variants: int = 3) -> list[shapes.Scene]:
    """`count` random scenes of one to three objects, each followed by different variants of it; none is held out."""
    scenes = []
    while len(scenes) < count * (1 + variants):
        scene = shapes.random_scene(rng, rng.choices((1, 2, 3), (1, 2, 3))[0])
        group = {scene.content(): scene} if not shapes.held_out(scene) else {}
        while 0 < len(group) <= variants:
            other = scene_variant(scene, rng)
            group |= {other.content(): other} if not shapes.held_out(other) else {}
        scenes += group.values()
    return scenes


def train_teacher(steps: int, seed: int, autocast: bool, tokenizer_path: Path, folder: Path) -> None:
    """The small teacher: every picture finds its caption, and is found by it, among 64 scenes with three variants of each.

    Random scenes differ in so much that a few attributes tell them apart; their variants differ in one.
    """
    rng, tokenizer = random.Random(seed), SentencePieceProcessor(model_proto=tokenizer_path.read_bytes())
    torch.manual_seed(seed)
    teacher = ContrastiveTeacher(ContrastiveTeacherConfig(vocab_size=tokenizer.get_piece_size()), tokenizer)

    def loss() -> Tensor:
        scenes = scenes_and_variants(rng, 64)
        images, ids = to_images([shapes.render(s) for s in scenes]), teacher.token_ids([shapes.caption(s) for s in scenes])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            image, text = teacher(images, ids)                                                # (256, d) each
        return contrastive_loss(image.unsqueeze(1), text.unsqueeze(1), gather=False)          # other ranks, if any, are waiting

    fit(teacher, loss, steps, lr=3e-3, warmup=30, label="teacher")
    write_atomically(folder / "tokenizer.model", lambda file: file.write_bytes(tokenizer_path.read_bytes()))
    save(folder / "model.safetensors", teacher.state_dict(), teacher.config)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    target, chance = Path(sys.argv[1]), random.Random(1)
    target.mkdir(parents=True, exist_ok=True)
    train_tokenizer([shapes.caption(shapes.random_scene(chance, 1 + i % 3)) for i in range(5000)], target / "tokenizer.model")
    train_vae(VAE_CONFIG, VAE_STEPS, 0, True, target / "vae.safetensors")
    train_teacher(TEACHER_STEPS, 0, True, target / "tokenizer.model", target / "teacher")
    shown = [shapes.random_training_picture(chance) for _ in range(12)]
    model = VAE.from_pretrained(target / "vae.safetensors")
    with torch.no_grad():
        kept = to_pictures(model.decode(model.encode(to_images(shown))))                      # (12, H, W, 3)
    Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in (shown, list(kept))])).save(target / "autoencoder.png")
    print("wrote", target / "autoencoder.png", "(above: pictures; below: what the autoencoder keeps of them)")
