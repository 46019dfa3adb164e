"""What a run makes for itself: a tokenizer that knows every word, an autoencoder of unit scale, hard negatives for the teacher."""
import random

import pytest
import torch
from torch import nn

import shapes
import tiny
from data import read_jsonl
from teacher import load_teacher
from text_encoder import T5Tokenizer
from vae import VAE


def test_the_tokenizer_knows_every_word_of_every_task(tmp_path):
    """Question marks, digits and rare letters as well."""
    shapes.make_world(tmp_path / "world", train=300, test=30)
    texts = {split: [t for e in read_jsonl(tmp_path / "world" / f"{split}.jsonl") for t in (e.prompt, e.question, e.caption) if t]
             for split in ("train", "test")}
    tiny.train_tokenizer(texts["train"], tmp_path / "tokenizer.model")
    tokenizer = T5Tokenizer(tmp_path / "tokenizer.model")
    for text in texts["train"] + texts["test"]:
        ids = tokenizer.encode(text)
        assert tokenizer.unk_id not in ids and tokenizer.decode([ids]) == [text.replace("?", " ?")] and len(ids) <= 32
    assert tokenizer.encode("is there a circle?")[3] == tokenizer.encode("a circle")[1]       # not a word "circle?"


def test_variants_differ_in_one_thing_or_in_an_exchange():
    scenes = tiny.scenes_and_variants(random.Random(0), count=60)
    assert len(scenes) == 240 and not any(map(shapes.held_out, scenes))
    for i in range(0, 240, 4):
        original, *variants = scenes[i:i + 4]
        assert len({s.content() for s in scenes[i:i + 4]}) == 4
        for variant in variants:
            if variant.background != original.background:
                assert variant.objects == original.objects
                continue
            new, old = (s.content()[0] for s in (variant, original))
            assert len(new) == len(old) and 1 <= len(new - old) <= 2


def test_fit_warms_up_and_decays(monkeypatch):
    rates, layer = [], nn.Linear(1, 1)
    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (rates.append(self.param_groups[0]["lr"]), real(self, *a))[1])
    tiny.fit(layer, lambda: (layer(torch.ones(1, 1)) - 3).square().mean(), steps=200, lr=0.1, warmup=10, label="")
    assert rates[0] == pytest.approx(0.01) and max(rates) < 0.1 and rates[-1] == pytest.approx(0.1 / 200)
    assert (layer(torch.ones(1, 1)) - 3).abs() < 0.05


def test_the_autoencoder_learns_and_has_unit_scale(tmp_path):
    config = tiny.VAEConfig(block_channels=(16,), layers_per_block=1, norm_groups=1, mid_attention=False, stem=4)
    errors, pictures = [], tiny.to_images([shapes.random_training_picture(random.Random(i)) for i in range(64)])
    for steps in (1, 60):
        tiny.train_vae(config, steps, 0, True, tmp_path / f"{steps}.safetensors")
        vae = VAE.from_pretrained(tmp_path / f"{steps}.safetensors")
        with torch.no_grad():
            latents = vae.encode(pictures)
            errors.append((vae.decode(latents) - pictures).square().mean().item())
    assert latents.std() == pytest.approx(1, abs=0.2) and abs(latents.mean()) < 0.2 and errors[1] < 0.5 * errors[0]


def test_the_teacher_tells_pairs_apart(tmp_path):
    """Thirty steps are enough to do better than chance, which is one in 32."""
    rng = random.Random(1)
    tiny.train_tokenizer([shapes.caption(shapes.random_scene(rng, 1 + i % 3)) for i in range(500)], tmp_path / "tokenizer.model")
    tiny.train_teacher(30, 0, True, tmp_path / "tokenizer.model", tmp_path / "teacher")
    teacher = load_teacher(tmp_path / "teacher")
    scenes = [shapes.random_scene(rng, 2) for _ in range(32)]
    image = nn.functional.normalize(teacher.image_features([shapes.render(s) for s in scenes]), dim=1)
    text = nn.functional.normalize(teacher.text_features([shapes.caption(s) for s in scenes]), dim=1)
    assert ((image @ text.T).argmax(1) == torch.arange(32)).float().mean() > 0.2
