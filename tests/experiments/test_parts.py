"""experiments/parts.py: the tokenizer, the autoencoder and the teacher that a run trains."""
import collections
import random

import numpy as np
import pytest
import torch
from torch import nn

from data import read_jsonl, to_images
from experiments import parts, world
from experiments.dataset import make_world
from experiments.language import caption
from muon import Muon
from teacher import load_teacher
from text_encoder import T5Tokenizer
from vae import VAE, VAEConfig


def test_the_tokenizer_knows_every_word_of_every_task(tmp_path):
    """Question marks, digits and rare letters as well."""
    make_world(tmp_path / "world", train=300, test=30)
    texts = {}
    for split in ("train", "test"):
        examples = read_jsonl(tmp_path / "world" / f"{split}.jsonl")
        texts[split] = [t for e in examples for t in (e.prompt, e.question, e.caption) if t]
    parts.train_tokenizer(texts["train"], tmp_path / "tokenizer.model")
    tokenizer = T5Tokenizer(tmp_path / "tokenizer.model")
    for text in texts["train"] + texts["test"]:
        ids = tokenizer.encode(text)
        assert tokenizer.unk_id not in ids and len(ids) <= 32
        assert tokenizer.decode([ids]) == [text.replace("?", " ?")]
    # "circle?" is two words
    assert tokenizer.encode("is there a circle?")[3] == tokenizer.encode("a circle")[1]


@pytest.mark.parametrize("optimizer, rate", [(torch.optim.AdamW, 0.1), (Muon, 0.05)])
def test_fit_warms_up_and_decays(monkeypatch, optimizer, rate):
    rates, layer = [], nn.Linear(1, 1)
    real = optimizer.step

    def step(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        return real(self, *arguments)

    def loss():
        return (layer(torch.ones(1, 1)) - 3).square().mean()

    monkeypatch.setattr(optimizer, "step", step)
    parts.fit(layer, loss, steps=200, lr=0.1, warmup=10, label="",
              muon_lr=rate if optimizer is Muon else 0.0)
    assert len(rates) == 200
    assert rates[0] == pytest.approx(rate / 10) and max(rates) < rate
    assert rates[-1] == pytest.approx(rate / 200)
    assert (layer(torch.ones(1, 1)) - 3).abs() < 0.05


def test_pictures_for_an_autoencoder_show_no_held_out_scene(monkeypatch):
    """They show crowded scenes, and every kind of picture that the tasks have."""
    drawn = []

    def recorded(name, draw):
        def record(scene):
            drawn.append((name, scene))
            return draw(scene)
        return record

    for name in ("render", "edge_map", "depth_map", "pose_map"):
        monkeypatch.setattr(world, name, recorded(name, getattr(world, name)))
    rng = random.Random(70)
    pictures = [parts.random_training_picture(rng) for _ in range(800)]
    assert len(drawn) == 800
    assert all(p.shape == (64, 64, 3) and p.dtype == np.uint8 for p in pictures)
    assert not any(world.held_out(scene) for _, scene in drawn)     # a tenth, if it were by chance
    assert {len(scene.objects) for _, scene in drawn} == set(range(1, 10))
    kinds = [(name, scene.objects[0].shape in world.ARROWS) for name, scene in drawn]
    counts = collections.Counter(kinds)
    assert set(counts) == {("render", False), ("render", True), ("edge_map", False),
                           ("depth_map", False), ("pose_map", True)}
    assert 0.55 < counts["render", False] / 800 < 0.75 and min(counts.values()) > 30
    for kind, (_, scene), picture in zip(kinds, drawn, pictures):
        if kind == ("render", False):
            assert world.read_picture(picture)[0] == scene


def test_the_autoencoder_learns_and_has_unit_scale(tmp_path):
    config = VAEConfig(
        block_channels=(16,), layers_per_block=1, norm_groups=1, mid_attention=False, stem=4)
    images = to_images([parts.random_training_picture(random.Random(i)) for i in range(64)])
    errors = []
    for steps in (1, 60):
        parts.train_vae(config, steps, 0, True, tmp_path / f"{steps}.safetensors")
        vae = VAE.from_pretrained(tmp_path / f"{steps}.safetensors")
        with torch.no_grad():
            latents = vae.encode(images)
            errors.append((vae.decode(latents) - images).square().mean().item())
    assert latents.std() == pytest.approx(1, abs=0.2) and abs(latents.mean()) < 0.2
    assert errors[1] < 0.5 * errors[0]


def test_sharpening_keeps_the_encoder_and_leads_back_to_the_latents(tmp_path, monkeypatch):
    config = VAEConfig(
        block_channels=(16,), layers_per_block=1, norm_groups=1, mid_attention=False, stem=4)
    images = to_images([parts.random_training_picture(random.Random(i)) for i in range(64)])
    weights, ways = [], []
    for share in (0, 1):
        monkeypatch.setattr(parts, "SHARPENING", share)
        parts.train_vae(config, 60, 0, True, tmp_path / f"{share}.safetensors")
        vae = VAE.from_pretrained(tmp_path / f"{share}.safetensors")
        with torch.no_grad():
            latents = vae.encode(images)
            ways.append((vae.encode(vae.decode(latents)) - latents).square().mean().item())
        weights.append(vae.encoder.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert ways[1] < 0.8 * ways[0]


def test_variants_differ_in_one_thing_or_in_an_exchange():
    scenes = parts.scenes_and_variants(random.Random(0), count=60)
    assert len(scenes) == 240 and not any(map(world.held_out, scenes))
    for i in range(0, 240, 4):
        original, *variants = scenes[i:i + 4]
        assert len({s.content() for s in scenes[i:i + 4]}) == 4
        for variant in variants:
            if variant.background != original.background:
                assert variant.objects == original.objects
                continue
            new, old = variant.content()[0], original.content()[0]
            assert len(new) == len(old) and 1 <= len(new - old) <= 2


def test_the_teacher_matches_pairs(tmp_path):
    """Thirty steps are enough to do better than chance, which is one in 32."""
    rng = random.Random(1)
    texts = [caption(world.random_scene(rng, 1 + i % 3)) for i in range(500)]
    parts.train_tokenizer(texts, tmp_path / "tokenizer.model")
    parts.train_teacher(30, 0, True, tmp_path / "tokenizer.model", tmp_path / "teacher")
    teacher = load_teacher(tmp_path / "teacher")
    scenes = [world.random_scene(rng, 2) for _ in range(32)]
    image = teacher.image_features([world.render(scene) for scene in scenes])
    text = teacher.text_features([caption(scene) for scene in scenes])
    cosine = nn.functional.normalize(image, dim=1) @ nn.functional.normalize(text, dim=1).T
    assert (cosine.argmax(1) == torch.arange(32)).float().mean() > 0.2
