"""sample.py: the flow sampler against the reference, the text sampler by its statistics, and the command line on a tiny run."""
import io
import json
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import golden
from PIL import Image
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer

from checkpoint import save
from data import load_image, to_pictures
from model import MMDiT, MMDiTConfig, Output
from sample import ORDERS, Pipeline, SampleSettings, describe, flow_sigmas, generate, main
from shapes import caption, random_scene
from text_encoder import T5Config, T5Encoder, T5Tokenizer
from vae import VAE, VAEConfig


# ---------------------------------------------------------------- noise levels

@pytest.mark.parametrize("steps", [4, 28, 50])
def test_sigmas_are_those_of_the_reference(steps):
    expected = golden("sampling")[2]
    sigmas = flow_sigmas(steps, 3.0)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,) and sigmas[-1] == 0
    torch.testing.assert_close(sigmas, expected[f"sigmas_shift3_{steps}"], rtol=0, atol=1e-6)
    torch.testing.assert_close(1000 * sigmas[:-1], expected[f"timesteps_shift3_{steps}"], rtol=0, atol=1e-3)


def test_sigmas_without_shift_and_of_one_step():
    torch.testing.assert_close(flow_sigmas(3, 1.0), torch.tensor([1, (1 + 1e-3) / 2, 1e-3, 0]))
    assert flow_sigmas(1).tolist() == [1, 0]


@pytest.mark.parametrize("steps, shift", [(0, 3.0), (-1, 3.0), (4, 0.0), (4, -1.0)])
def test_impossible_sigmas(steps, shift):
    with pytest.raises(ValueError, match=re.escape(f"steps = {steps}, shift = {shift}")):
        flow_sigmas(steps, shift)


# ---------------------------------------------------------------- pictures

@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    file = tmp_path_factory.mktemp("dual") / "x.safetensors"
    save_file(golden("unialignment_mmdit")[0], file)
    return MMDiT.from_pretrained(file, num_heads=2)


def test_guided_trajectory(dual):
    _, inputs, outputs, config = golden("sampling")
    assert config["weights_from"] == "unialignment_mmdit"
    found = generate(dual, inputs["noise"], inputs["text"], inputs["negative_text"], config["steps"], config["guidance_scale"], config["shift"])
    torch.testing.assert_close(found, outputs["latents"], rtol=0, atol=5e-5)


def test_one_empty_text_serves_the_whole_batch(dual):
    _, inputs, _, _ = golden("sampling")
    empty = inputs["negative_text"][:1]
    one = generate(dual, inputs["noise"], inputs["text"], empty, steps=2)
    assert torch.equal(one, generate(dual, inputs["noise"], inputs["text"], torch.cat([empty, empty]), steps=2))


class Recorder:
    """A model whose velocity is the first value of the text's embedding; it keeps what it was called with."""
    def __init__(self):
        self.calls = []

    def __call__(self, latents, text, timestep, references=(), align_depth=None, want=("velocity", "logits")):
        self.calls.append((latents, text, timestep, references, want))
        return Output(text[:, 0, 0].view(-1, 1, 1, 1).expand_as(latents), None, None, None, None, None)


def test_guidance_moves_from_the_empty_text_to_the_prompt_and_beyond():
    model, noise = Recorder(), torch.randn(2, 16, 4, 4)
    text, empty = torch.full((2, 5, 8), 3.0), torch.full((1, 5, 8), 1.0)
    found = generate(model, noise, text, empty, steps=4, guidance=7.0)
    torch.testing.assert_close(found, noise - (1 + 7 * (3 - 1)))                              # sigma goes from 1 to 0 along a constant velocity
    assert [len(call[0]) for call in model.calls] == [4] * 4
    for (latents, both, timestep, _, want), sigma in zip(model.calls, flow_sigmas(4)):
        assert torch.equal(latents[:2], latents[2:]) and torch.equal(both, torch.cat([empty, empty, text])) and want == ("velocity",)
        torch.testing.assert_close(timestep, (1000 * sigma).expand(4))


def test_guidance_of_one_leaves_the_empty_text_out(dual):
    _, inputs, _, _ = golden("sampling")
    model, noise = Recorder(), torch.randn(2, 16, 4, 4)
    found = generate(model, noise, torch.full((2, 5, 8), 3.0), torch.full((1, 5, 8), 1.0), steps=4, guidance=1.0)
    torch.testing.assert_close(found, noise - 3)
    assert [len(call[0]) for call in model.calls] == [2] * 4
    conditional = generate(dual, inputs["noise"], inputs["text"], inputs["negative_text"], steps=3, guidance=1.0)
    both_halves_the_same = generate(dual, inputs["noise"], inputs["text"], inputs["text"], steps=3, guidance=4.0)
    torch.testing.assert_close(conditional, both_halves_the_same, rtol=0, atol=1e-5)


def test_references_are_seen_by_both_halves():
    model, reference = Recorder(), torch.randn(2, 16, 6, 2)
    generate(model, torch.randn(2, 16, 4, 4), torch.ones(2, 5, 8), torch.zeros(1, 5, 8), steps=1, references=[reference, reference + 1])
    references = model.calls[0][3]
    assert len(references) == 2 and torch.equal(references[1], torch.cat([reference, reference]) + 1)
    generate(model, torch.randn(2, 16, 4, 4), torch.ones(2, 5, 8), torch.zeros(1, 5, 8), steps=1, guidance=1.0, references=[reference])
    assert torch.equal(model.calls[1][3][0], reference)


class Sum(Recorder):
    """Its velocity is the text's first value, and 10 for each reference that it sees."""
    def __call__(self, latents, text, timestep, references=(), align_depth=None, want=("velocity", "logits")):
        found = super().__call__(latents, text, timestep, references, align_depth, want)
        return found._replace(velocity=found.velocity + 10 * len(references))


def test_image_guidance_moves_from_no_references_to_the_references_and_beyond():
    noise, text, empty = torch.randn(2, 16, 4, 4), torch.full((2, 5, 8), 3.0), torch.full((1, 5, 8), 1.0)
    references = [torch.randn(2, 16, 4, 4)] * 2
    for guidance, image_guidance, calls in ((7.0, 1.5, [4, 2]), (1.0, 1.5, [4, 2]), (7.0, 1.0, [4]), (1.0, 1.0, [2])):
        model = Sum()
        found = generate(model, noise, text, empty, 3, guidance, references=references, image_guidance=image_guidance)
        torch.testing.assert_close(found, noise - (1 + image_guidance * 20 + guidance * (3 - 1)), rtol=0, atol=1e-4)
        assert [len(call[0]) for call in model.calls] == calls * 3
    alone = Sum()
    generate(alone, noise, text, empty, 3, 7.0, references=references, image_guidance=1.5)
    latents, texts, _, seen, want = alone.calls[1]
    assert not seen and torch.equal(texts, empty.expand(2, 5, 8)) and want == ("velocity",) and torch.equal(latents, alone.calls[0][0][:2])
    without = Sum()
    generate(without, noise, text, empty, 3, 7.0, image_guidance=1.5)
    assert [len(call[0]) for call in without.calls] == [4] * 3                                # nothing to guide to


def test_the_state_stays_float32_for_a_bfloat16_model():
    model = Recorder()
    found = generate(model, torch.randn(1, 16, 4, 4), torch.full((1, 5, 8), 1 / 3).bfloat16(), torch.zeros(1, 5, 8).bfloat16(), steps=50)
    assert found.dtype == torch.float32 and model.calls[0][0].dtype == torch.bfloat16


# ---------------------------------------------------------------- text

MASK = 6                                                                                      # of the fake model: six tokens, and the mask


class Fake:
    """Model and text encoder in one: logits (L, 7) whatever it sees; it keeps the ids of every forward pass."""
    def __init__(self, logits):
        self.logits, self.states, self.seen = logits, [], []

    def encoder(self, ids):
        self.states.append(ids.clone())
        return ids

    def __call__(self, latents, text, timestep, references=(), align_depth=None, want=("velocity", "logits")):
        self.seen.append((latents, timestep, want))
        return Output(None, self.logits.expand(len(text), -1, -1), None, None, None, None)

    def describe(self, tokens, **options):
        return describe(self, self.encoder, None, tokens, MASK, **options)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def all_masked(rows, length):
    return torch.full((rows, length), MASK)


def confident(order):
    """Logits whose best token is position % 6, and that are most confident at order[0], then at order[1], ..."""
    logits = torch.zeros(len(order), 7)
    for rank, position in enumerate(order):
        logits[position, position % 6] = 20.0 - rank
    logits[:, MASK] = 100                                                                     # a model that would rather leave everything masked
    return logits


def test_confident_tokens_come_first_and_equally_many_per_step():
    order = [5, 0, 7, 3, 2, 6, 1, 4]
    fake = Fake(confident(order))
    found = fake.describe(all_masked(2, 8), steps=4)
    assert found.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]] * 2
    for step, state in enumerate(fake.states):
        for row in state:
            assert {i for i in range(8) if row[i] != MASK} == set(order[:2 * step])
    assert len(fake.states) == 4
    latents, timestep, want = fake.seen[0]
    assert timestep.tolist() == [0, 0] and want == ("logits",)                                # the picture is clean, no head but the text's


def test_tokens_on_the_left_come_first():
    tokens = all_masked(2, 8)
    tokens[1, :2] = torch.tensor([3, 3])
    fake = Fake(confident([5, 0, 7, 3, 2, 6, 1, 4]))
    assert fake.describe(tokens, steps=4, order="left").tolist() == [[0, 1, 2, 3, 4, 5, 0, 1], [3, 3, 2, 3, 4, 5, 0, 1]]
    assert [[(row != MASK).tolist() for row in state] for state in fake.states] == [
        [[i < 2 * step for i in range(8)], [i < 2 + 6 * step // 4 for i in range(8)]] for step in range(4)]


def test_rows_with_different_questions_finish_together():
    tokens = all_masked(2, 8)
    tokens[0, :6] = torch.tensor([0, 1, 2, 3, 4, 5])
    fake = Fake(confident(list(range(8))))
    found = fake.describe(tokens, steps=2)
    assert [(state == MASK).sum(dim=1).tolist() for state in fake.states] == [[2, 8], [1, 4]]
    assert found[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]


@pytest.mark.parametrize("order", ["confidence", "ancestral"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_question_stays_and_no_mask_is_left_or_drawn(order, temperature):
    logits = torch.randn(40, 7, generator=seeded())
    logits[:, MASK] = 50
    tokens = all_masked(3, 40)
    tokens[:, ::3] = 2
    before = tokens.clone()
    found = Fake(logits).describe(tokens, steps=5, order=order, temperature=temperature, generator=seeded())
    assert torch.equal(tokens, before)                                                        # the argument is not written to
    assert (found[:, ::3] == 2).all() and (found != MASK).all()
    if temperature == 0:
        assert torch.equal(found[before == MASK], logits[:, :MASK].argmax(dim=1).expand(3, -1)[before == MASK])
    else:
        assert not torch.equal(found[0], found[1])


def test_ancestral_reveals_one_nth_in_each_of_n_steps():
    fake = Fake(torch.zeros(10_000, 7))
    fake.describe(all_masked(2, 10_000), steps=5, order="ancestral", temperature=1.0, generator=seeded())
    shares = [(state == MASK).double().mean(dim=1) for state in fake.states]
    assert 5 <= len(shares) <= 6                                                              # a last argmax for the 1e-5 that may be left
    for step, share in enumerate(shares):
        assert (share - (1 - step / 5)).abs().max() < 0.02


def test_what_the_last_step_fills_in_is_the_most_probable():
    """With one step of the reversed diffusion a share of 1e-5 is left: the very last prediction is an argmax."""
    logits = torch.zeros(1, 7)
    logits[0, 3] = 0.1
    fake = Fake(logits.expand(200_000, -1))
    found = fake.describe(all_masked(1, 200_000), steps=1, order="ancestral", temperature=1.0, generator=seeded())
    left = fake.states[1][0] == MASK
    assert len(fake.states) == 2 and 0 < left.sum() < 15 and (found[0, left] == 3).all()


@pytest.mark.parametrize("order, steps", [("confidence", 1), ("ancestral", 1), ("ancestral", 6)])
def test_temperature_one_follows_the_models_distribution(order, steps):
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.02, 0.01])
    logits = torch.cat([probabilities.log(), torch.tensor([3.0])]).expand(20_000, -1)
    found = Fake(logits).describe(all_masked(1, 20_000), steps=steps, order=order, temperature=1.0, generator=seeded())
    counts, expected = torch.bincount(found[0], minlength=6), 20_000 * probabilities
    assert ((counts - expected) ** 2 / expected).sum() < 25                                   # chi-square of 5 degrees: beyond 25 once in 7000
    colder = Fake(logits).describe(all_masked(1, 20_000), steps=steps, order=order, temperature=0.5, generator=seeded())
    counts, expected = torch.bincount(colder[0], minlength=6), 20_000 * (probabilities ** 2 / (probabilities ** 2).sum())
    assert ((counts - expected) ** 2 / expected).sum() < 25


def test_the_same_seed_gives_the_same_text():
    logits = torch.randn(30, 7, generator=seeded())
    for order in ("confidence", "ancestral"):
        first, again, other = (Fake(logits).describe(all_masked(2, 30), steps=4, order=order, temperature=1.0, generator=seeded(seed))
                               for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_no_forward_pass_where_nothing_was_revealed():
    fake = Fake(confident([2, 0, 1]))
    assert fake.describe(all_masked(1, 3), steps=30).tolist() == [[0, 1, 2]]
    assert len(fake.seen) == 3                                                                # three tokens: three changes of the text
    fake = Fake(torch.randn(1, 7, generator=seeded()))
    fake.describe(all_masked(1, 1), steps=200, order="ancestral", temperature=1.0, generator=seeded())
    assert len(fake.seen) == 1
    complete = torch.zeros(2, 3, dtype=torch.int64)
    assert torch.equal(fake.describe(complete), complete) and len(fake.seen) == 1             # nothing is masked


def test_latents_reach_the_model():
    fake, latents = Fake(torch.zeros(4, 7)), torch.randn(1, 16, 4, 4)
    describe(fake, fake.encoder, latents, all_masked(1, 4), MASK, steps=2)
    assert all(seen[0] is latents for seen in fake.seen)


@pytest.mark.parametrize("options", [{"order": "left to right"}, {"steps": 0}, {"temperature": -1.0}])
def test_impossible_ways_to_write(options):
    with pytest.raises(ValueError, match=re.escape(repr(next(iter(options.values()))))):
        Fake(torch.zeros(3, 7)).describe(all_masked(1, 3), **options)


# ---------------------------------------------------------------- a tiny run and the command line

SETTINGS = {"image_size": 32, "text_length": 48, "padding_id": 1, "steps": 3, "guidance": 2.0, "image_guidance": 1.5, "shift": 3.0, "text_steps": 6}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as training leaves it, with random weights (none of them zero, so that everything matters)."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    rng, file = random.Random(0), io.BytesIO()
    captions = [caption(random_scene(rng, 1 + i % 3)) for i in range(400)]
    SentencePieceTrainer.train(sentence_iterator=iter(captions), model_writer=file, vocab_size=80, hard_vocab_limit=False,
                               model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, num_threads=1)
    (folder / "tokenizer.model").write_bytes(file.getvalue())
    vocab_size = T5Tokenizer(folder / "tokenizer.model").vocab_size
    vae = VAE(VAEConfig(latent_channels=4, block_channels=(16, 16), layers_per_block=1, norm_groups=8, stem=4, mid_attention=False))
    encoder = T5Encoder(T5Config(vocab_size=vocab_size, dim=24, head_dim=12, ff_dim=32, depth=1, num_heads=2, mask_id=vocab_size - 1))
    model = MMDiT(MMDiTConfig(latent_channels=4, width=32, depth=2, num_heads=2, text_dim=24, vocab_size=vocab_size, position_table=8,
                              text_positions=48, qk_norm=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    save(folder / "vae.safetensors", vae.state_dict(), vae.config)
    save(folder / "text_encoder.safetensors", encoder.state_dict(), encoder.config)
    save(folder / "checkpoint-00000001" / "ema.safetensors", model.state_dict(), model.config)
    (folder / "run.json").write_text(json.dumps({"sampling": SETTINGS}))
    return folder


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


PROMPT = "a large red circle at the top left on a gray background"


def test_pictures_with_prompt_and_settings_under_free_names(run, inside, capsys):
    main([PROMPT, "--run", str(run), "--seed", "4"])
    assert capsys.readouterr().out == f"pictures/0001.png\t{PROMPT}\n"
    picture = Image.open("pictures/0001.png")
    assert picture.size == (32, 32) and picture.mode == "RGB" and picture.text["prompt"] == PROMPT
    assert json.loads(picture.text["settings"]) == {"seed": 4, "steps": 3, "shift": 3.0, "guidance": 2.0, "model": str(run)}
    before = (inside / "pictures/0001.png").read_bytes()
    (inside / "pictures/0007.png").write_bytes(b"mine")
    (inside / "pictures/notes.png").write_bytes(b"mine too")
    main([PROMPT, "a small blue square", "--run", str(run), "--seed", "4", "--steps", "2", "--guidance", "1"])
    assert sorted(f.name for f in (inside / "pictures").iterdir()) == ["0001.png", "0007.png", "0008.png", "0009.png", "notes.png"]
    assert (inside / "pictures/0001.png").read_bytes() == before and (inside / "pictures/0007.png").read_bytes() == b"mine"
    second = Image.open("pictures/0009.png").text
    assert second["prompt"] == "a small blue square"
    assert json.loads(second["settings"]) == {"seed": 5, "steps": 2, "shift": 3.0, "guidance": 1.0, "model": str(run)}


def test_a_picture_depends_on_its_prompt_and_seed_alone(run):
    pipeline = Pipeline.from_run(run)
    together = pipeline.draw([PROMPT, "a small blue square", PROMPT], seed=3)
    assert together.shape == (3, 3, 32, 32) and together.std() > 0.05
    for i, prompt in enumerate([PROMPT, "a small blue square", PROMPT]):
        torch.testing.assert_close(pipeline.draw([prompt], seed=3 + i), together[i:i + 1], rtol=0, atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.01                                     # another seed
    assert (pipeline.draw(["a small blue square"], seed=3) - together[:1]).abs().max() > 0.01    # another prompt
    for changed in ({"steps": 2}, {"guidance": 7.0}, {"guidance": 1.0}):
        assert (pipeline.draw([PROMPT], seed=3, **changed) - together[:1]).abs().max() > 1e-3


def test_references_change_a_picture(run):
    pipeline = Pipeline.from_run(run)
    source = pipeline.encode_images(torch.rand(1, 3, 32, 32, generator=seeded()) * 2 - 1)
    assert source.shape == (1, 4, 4, 4)
    assert (pipeline.draw([PROMPT], references=[source]) - pipeline.draw([PROMPT])).abs().max() > 1e-3


def test_prompts_about_pictures_are_padded_little(run):
    """Mixed lengths in one call, in any order: each picture is what its prompt alone gives, from a text of its own length."""
    pipeline, seen = Pipeline.from_run(run), []
    pipeline.settings = replace(pipeline.settings, prompt_multiple=16)
    prompts, source = [PROMPT, "red", "a circle at the top left", "on a gray background"], torch.rand(4, 3, 32, 32, generator=seeded()) * 2 - 1
    encode = pipeline.text_encoder.forward
    pipeline.text_encoder.forward = lambda ids: seen.append(tuple(ids.shape)) or encode(ids)
    together = pipeline.edit(prompts, [source], seed=3)
    lengths = [min(48, -(-len(pipeline.tokenizer.encode(prompt)) // 16) * 16) for prompt in prompts]
    assert sorted(seen) == sorted((1 + lengths.count(length), length) for length in set(lengths)) and len(seen) > 1
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(pipeline.edit([prompt], [source[i:i + 1]], seed=3 + i), together[i:i + 1], rtol=0, atol=1e-4)
    seen.clear()
    pipeline.draw(prompts)
    assert seen == [(5, 48)]                                                                  # no source pictures, no difference


def test_out_names_a_file_or_a_folder(run, inside):
    main([PROMPT, "--run", str(run), "--out", "deep/er/circle.png"])
    before = (inside / "deep/er/circle.png").read_bytes()
    with pytest.raises(SystemExit) as exit:
        main([PROMPT, "--run", str(run), "--out", "deep/er/circle.png"])
    assert exit.value.code == 2 and (inside / "deep/er/circle.png").read_bytes() == before
    main([PROMPT, "--run", str(run), "--out", "folder"])
    assert np.array_equal(pixels("folder/0001.png"), pixels("deep/er/circle.png"))            # the same seed
    main([PROMPT, "--run", str(run), "--out", "folder", "--seed", "1"])
    assert not np.array_equal(pixels("folder/0001.png"), pixels("folder/0002.png"))


def test_prompts_from_a_file(run, inside, capsys):
    (inside / "prompts.txt").write_text(f"{PROMPT}\n\n  a small blue square  \n")
    main(["a red circle", "--prompts", "prompts.txt", "--run", str(run)])
    assert capsys.readouterr().out.splitlines() == [
        "pictures/0001.png\ta red circle", f"pictures/0002.png\t{PROMPT}", "pictures/0003.png\ta small blue square"]
    assert [Image.open(f"pictures/000{i}.png").text["prompt"] for i in (1, 2, 3)] == ["a red circle", PROMPT, "a small blue square"]


@pytest.mark.parametrize("arguments, words", [
    ([], "give texts to draw"),
    (["--image", "x.png"], "give texts to draw, or one of --describe, --ask, --edit, --edges, --depth, --pose"),
    (["a", "--edit", "b", "--image", "x.png"], "give texts to draw, or one of"),
    (["a", "--image", "x.png"], "need --image, and nothing else takes it"),
    (["--describe", "x.png", "--image", "x.png"], "nothing else takes it"),
    (["--ask", "what?"], "--ask, --edit, --edges, --depth and --pose need --image"),
    (["--edit", "a"], "need --image"), (["--edges"], "need --image"), (["--depth"], "need --image"), (["--pose"], "need --image"),
    (["--edges", "--depth", "--image", "x.png"], "--depth: not allowed with argument --edges"),
    (["--pose", "--edit", "a", "--image", "x.png"], "--edit: not allowed with argument --pose"),
    (["--ask", "what?", "--edit", "a", "--image", "x.png"], "--edit: not allowed with argument --ask"),
    (["--describe", "x.png", "--ask", "what?", "--image", "x.png"], "--ask: not allowed with argument --describe"),
    (["--ask", "what?", "--image", "x.png", "y.png"], "--ask looks at one picture, found 2"),
    (["--edges", "--image", "x.png", "--image", "y.png"], "--edges looks at one picture, found 2"),
    (["--edit", "a", "--image", "x.png", "y.png"], "no such picture: x.png, y.png"),
    (["--describe", "x.png"], "no such picture: x.png"),
    (["a", "--describe", "x.png"], "give texts to draw"),
    (["--prompts", "none.txt"], "none.txt: no such file"),
    (["a", "b", "--out", "x.png"], "one picture for 2 prompts"),
    (["a", "--model", "x"], "--model needs --tokenizer"),
    (["a", "--order", "backwards"], "--order"),
    (["a", "--seed", "x"], "--seed"),
])
def test_impossible_command_lines(inside, capsys, arguments, words):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("order", ["confidence", "ancestral"])
def test_describe(run, inside, capsys, order):
    for name, level in (("a.png", 40), ("b.png", 220)):
        Image.new("RGB", (50, 40), (level, 128, 255 - level)).save(name)
    arguments = ["--describe", "a.png", "b.png", "--run", str(run), "--order", order, "--temperature", "1"]
    main(arguments)
    first = capsys.readouterr().out
    lines = [line.split("\t") for line in first.splitlines()]
    assert [line[0] for line in lines] == ["a.png", "b.png"] and all(len(line) == 2 for line in lines)
    main(arguments)
    assert capsys.readouterr().out == first
    main(arguments + ["--seed", "1"])
    assert capsys.readouterr().out != first
    assert not (inside / "pictures").exists()


def test_caption_is_the_text_up_to_its_end(run):
    pipeline, image = Pipeline.from_run(run), torch.rand(1, 3, 32, 32, generator=seeded()) * 2 - 1
    ids = pipeline.tokenizer.encode("a red circle") + pipeline.tokenizer.encode("a blue square")
    logits = torch.zeros(48, pipeline.tokenizer.vocab_size)
    logits[range(len(ids)), ids] = 9
    fake, latents = Fake(logits), pipeline.encode_images(image)
    fake.pos_embed, pipeline.model = pipeline.model.pos_embed, fake
    assert pipeline.caption(image) == ["a red circle"]
    assert len(fake.seen) == SETTINGS["text_steps"] and torch.equal(fake.seen[0][0], latents)
    pipeline.caption(image, steps=2)
    assert len(fake.seen) == SETTINGS["text_steps"] + 2


def test_an_answer_is_the_text_after_its_question(run):
    pipeline, images = Pipeline.from_run(run), torch.rand(2, 3, 32, 32, generator=seeded()) * 2 - 1
    tokenizer, questions = pipeline.tokenizer, ["a large red circle", "a square"]
    asked, ids = [tokenizer.encode(q)[:-1] for q in questions], tokenizer.encode("a small blue square")
    logits = torch.zeros(2, 48, tokenizer.vocab_size)
    logits[:, :, tokenizer.encode("green")[0]] = 5                                            # wherever no other token is told
    for row, question in zip(logits, asked):
        row[range(len(question), len(question) + len(ids)), ids] = 9
    fake = Fake(logits)
    fake.pos_embed, pipeline.model, pipeline.text_encoder = pipeline.model.pos_embed, fake, Remembering(pipeline.text_encoder)
    for order in (None, *ORDERS):
        assert pipeline.caption(images, order=order, questions=questions) == ["a small blue square"] * 2
    for seen in pipeline.text_encoder.ids:
        for row, question in zip(seen, asked):
            assert row[:len(question)].tolist() == question                                   # never masked, never written over
    first = pipeline.text_encoder.ids[0]
    assert all((row[len(question):] == tokenizer.mask_id).all() for row, question in zip(first, asked))
    with pytest.raises(ValueError, match="too little room for an answer"):
        pipeline.caption(images, questions=["a square", "red circle " * 60])


def test_captions_are_answers_to_no_question(run):
    pipeline, images = Pipeline.from_run(run), torch.rand(2, 3, 32, 32, generator=seeded()) * 2 - 1
    assert pipeline.caption(images) == pipeline.caption(images, questions=["", ""])
    assert pipeline.caption(images, questions=["a red circle", ""])[1] == pipeline.caption(images)[1]
    assert pipeline.caption(images, questions=["a red circle", ""])[0] != pipeline.caption(images)[0]
    answers, captions = (pipeline.caption(images, order=order, questions=["a red circle", ""]) for order in ("left", "confidence"))
    assert pipeline.caption(images, questions=["a red circle", ""]) == [answers[0], captions[1]]


def test_by_itself_a_question_is_answered_from_the_left_and_a_caption_written_by_confidence():
    tokens, order = all_masked(2, 8), [5, 0, 7, 3, 2, 6, 1, 4]
    tokens[1, :2] = torch.tensor([3, 3])
    fake = Fake(confident(order))
    fake.describe(tokens, steps=4, order=None)
    for step, state in enumerate(fake.states):
        assert {i for i in range(8) if state[0, i] != MASK} == set(order[:2 * step])
        assert {i for i in range(8) if state[1, i] != MASK} == set(range(2 + 6 * step // 4))


class Remembering:
    """A text encoder that keeps the ids it was given."""
    def __init__(self, encoder):
        self.encoder, self.ids = encoder, []

    def __call__(self, ids):
        self.ids.append(ids.clone())
        return self.encoder(ids)


def test_answers_on_the_command_line(run, inside, capsys):
    Image.new("RGB", (50, 40), (220, 128, 35)).save("a.png")
    main(["--image", "a.png", "--ask", "a red circle", "--ask", "a zebra", "--run", str(run), "--temperature", "1"])
    printed = capsys.readouterr()
    answers = Pipeline.from_run(run).caption(load_image("a.png", 32).expand(2, -1, -1, -1), temperature=1.0,
                                             questions=["a red circle", "a zebra"])
    assert printed.out.splitlines() == [f"a red circle\t{answers[0]}", f"a zebra\t{answers[1]}"]
    assert "warning: 'a zebra': not in the model's vocabulary: zebra" in printed.err
    assert not (inside / "pictures").exists()
    assert "'red circle red circle" in stopped(["--image", "a.png", "--ask", "red circle " * 60, "--run", str(run)])


# ---------------------------------------------------------------- editing

@pytest.fixture
def sources(inside):
    """Two pictures of noise, a.png and b.png."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(inside / name)
    return [load_image(name, 32)[None] for name in ("a.png", "b.png")]


def test_edit_draws_with_the_encoded_sources(run, sources):
    pipeline = Pipeline.from_run(run)
    found = pipeline.edit([PROMPT], sources, seed=3, steps=2, guidance=1.5)
    latents = [pipeline.encode_images(images) for images in sources]
    assert torch.equal(found, pipeline.draw([PROMPT], 3, 2, 1.5, latents)) and found.shape == (1, 3, 32, 32)
    assert (found - pipeline.edit([PROMPT], sources[:1], seed=3, steps=2, guidance=1.5)).abs().max() > 1e-3
    assert torch.equal(pipeline.edit([PROMPT], [], seed=3), pipeline.draw([PROMPT], seed=3))
    alone = replace(pipeline, settings=replace(pipeline.settings, image_guidance=1.0))
    assert (found - alone.edit([PROMPT], sources, seed=3, steps=2, guidance=1.5)).abs().max() > 1e-3
    both = pipeline.edit([PROMPT, "a small blue square"], [torch.cat(sources)], seed=3)       # a batch: one source each
    torch.testing.assert_close(both[1:], pipeline.edit(["a small blue square"], sources[1:], seed=4), rtol=0, atol=1e-4)


def test_every_turn_edits_the_last_result(run, sources, capsys):
    turns = ["a red circle", "a blue square", "a zebra"]
    main(["--image", "a.png", "--image", "b.png", *(f"--edit={turn}" for turn in turns), "--run", str(run), "--seed", "5",
          "--out", "deep/x.png"])
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [f"deep/x-{i + 1}.png\t{turn}" for i, turn in enumerate(turns)]
    assert "warning: 'a zebra': not in the model's vocabulary: zebra" in printed.err
    pipeline = Pipeline.from_run(run)
    for i, turn in enumerate(turns):
        sources = [pipeline.edit([turn], sources, seed=5 + i)]
        assert np.abs(pixels(f"deep/x-{i + 1}.png") - to_pictures(sources[0])[0]).max() <= 1
        picture = Image.open(f"deep/x-{i + 1}.png")
        assert picture.text["prompt"] == turn and json.loads(picture.text["settings"]) == {
            "seed": 5 + i, "steps": 3, "shift": 3.0, "guidance": 2.0, "image_guidance": 1.5, "model": str(run)}


def test_names_of_edited_pictures(run, sources, inside, capsys):
    options = ["--run", str(run), "--steps", "1"]
    main(["--image", "a.png", "b.png", "--edit", "a circle", *options, "--out", "x.png"])
    main(["--image", "a.png", "b.png", "--edit", "a circle", "--edit", "a square", *options])
    assert sorted(f.name for f in (inside / "pictures").iterdir()) == ["0001.png", "0002.png"]
    assert np.array_equal(pixels("x.png"), pixels("pictures/0001.png"))
    main(["--image", "x.png", "--edit", "a circle", "--edit", "a square", *options, "--out", "x.png"])
    assert capsys.readouterr().out.splitlines()[-2:] == ["x-1.png\ta circle", "x-2.png\ta square"]
    (inside / "x-1.png").unlink()
    before = (inside / "x-2.png").read_bytes()
    for turns, name in ((1, "x.png"), (2, "x-2.png")):
        with pytest.raises(SystemExit) as exit:
            main(["--image", "a.png", *["--edit", "a circle"] * turns, "--run", "none", "--out", "x.png"])
        assert exit.value.code == 2 and f"error: {name} exists; nothing is overwritten" in capsys.readouterr().err
    assert (inside / "x-2.png").read_bytes() == before and not (inside / "x-1.png").exists()


@pytest.mark.parametrize("kind", ["edges", "depth", "pose"])
def test_maps_are_edits(run, sources, kind, capsys):
    prompt = f"draw the {kind} of the picture"
    main(["--image", "a.png", f"--{kind}", "--run", str(run), "--out", "map.png"])
    assert capsys.readouterr().out == f"map.png\t{prompt}\n" and Image.open("map.png").text["prompt"] == prompt
    main(["--image", "a.png", "--edit", prompt, "--run", str(run), "--out", "edit.png"])
    assert (pixels("map.png") == pixels("edit.png")).all()


def test_help_has_an_example_of_every_task(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("python sample.py")]
    for words in ('sample.py "', "--describe", "--ask", "--edit", "--image a.png b.png --edit", "--edges", "--depth", "--pose",
                  "--prompts", "--model"):
        assert any(words in line for line in lines), words
    assert any(line.count("--edit") == 2 for line in lines)


def stopped(arguments):
    """The message with which the command line stops."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert isinstance(exit.value.code, str) and exit.value.code.startswith("error: ")         # printed to stderr, exit status 1
    return exit.value.code


def test_missing_run(inside):
    message = stopped([PROMPT, "--run", "runs/none"])
    assert "runs/none" in message and "train.py" in message


@pytest.mark.parametrize("name, words", [
    ("tokenizer.model", "tokenizer.model: no such file"), ("vae.safetensors", "vae.safetensors: no such file"),
    ("text_encoder.safetensors", "text_encoder.safetensors: no such file"), ("run.json", "holds no trained model"),
    ("checkpoint-00000001/ema.safetensors", "holds no trained model")])
def test_a_run_that_lacks_a_file(run, inside, name, words):
    (shutil.copytree(run, inside / "run") / name).unlink()
    message = stopped([PROMPT, "--run", str(inside / "run")])
    assert str(inside / "run") in message and words in message


@pytest.mark.parametrize("content, words", [
    ('{"sampling": {"image_size": "big"}}', "image_size"), ('{"sampling": {"size": 3}}', "size"), ("{}", "sampling"), ("{", "run.json")])
def test_a_run_with_a_damaged_run_json(run, inside, content, words):
    (shutil.copytree(run, inside / "run") / "run.json").write_text(content)
    message = stopped([PROMPT, "--run", str(inside / "run")])
    assert words in message and "run.json" in message


def test_the_newest_checkpoint_is_taken(run, inside):
    folder = shutil.copytree(run, inside / "run")
    model = MMDiT.from_pretrained(run / "checkpoint-00000001" / "ema.safetensors")
    torch.nn.init.zeros_(model.image_head.weight)
    save(folder / "checkpoint-00000010" / "ema.safetensors", model.state_dict(), model.config)
    (folder / "checkpoint-00000011").mkdir()                                                  # not whole: no averaged weights in it
    assert (Pipeline.from_run(folder).model.image_head.weight == 0).all()


def test_unreadable_picture(run, inside):
    Image.new("RGB", (32, 32)).save("good.png")
    (inside / "bad.png").write_bytes((inside / "good.png").read_bytes()[:40])
    assert "bad.png" in stopped(["--describe", "good.png", "bad.png", "--run", str(run)])
    assert "bad.png" in stopped(["--edit", "a", "--image", "good.png", "bad.png", "--run", str(run)])
    assert not (inside / "pictures").exists()


def test_impossible_steps(run, inside):
    assert "steps = 0" in stopped([PROMPT, "--run", str(run), "--steps", "0"])
    assert not (inside / "pictures").exists()


def test_an_out_that_is_no_folder(run, inside):
    (inside / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as exit:
        main([PROMPT, "--run", str(run), "--out", "notes.txt"])
    assert "notes.txt" in str(exit.value.code) or exit.value.code == 2


def test_unknown_words_are_warned_of(run, inside, capsys):
    main(["a red zebra! circle", "a red circle", "--run", str(run), "--steps", "1"])
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings == ["warning: 'a red zebra! circle': not in the model's vocabulary: zebra!"]


def test_what_is_too_long_is_warned_of(run, inside, capsys):
    main(["red circle " * 60, "--run", str(run), "--steps", "1"])
    assert re.search(r"warning: .* tokens, the model reads 48: the end is cut off", capsys.readouterr().err)


def test_parts_of_released_layouts_in_place_of_a_run(run, inside):
    """--model and its parts: the reference transformer, with an autoencoder of 16 channels and a text encoder of its width."""
    torch.manual_seed(0)
    (inside / "transformer").mkdir()
    save_file(golden("unialignment_mmdit")[0], inside / "transformer" / "x.safetensors")
    (inside / "transformer" / "config.json").write_text(json.dumps(golden("unialignment_mmdit")[3]))
    vae = VAE(VAEConfig(block_channels=(8, 8), layers_per_block=1, norm_groups=4, stem=4))
    save(inside / "vae.safetensors", vae.state_dict(), vae.config)
    main([PROMPT, "--model", str(inside), "--vae", "vae.safetensors", "--t5", str(run / "text_encoder.safetensors"),
          "--tokenizer", str(run / "tokenizer.model"), "--image-size", "64", "--steps", "2", "--out", "x.png"])
    assert Image.open("x.png").size == (64, 64)
    assert json.loads(Image.open("x.png").text["settings"]) == {"seed": 0, "steps": 2, "shift": 3.0, "guidance": 7.0, "model": str(inside)}


def test_defaults_are_the_released_models():
    assert SampleSettings() == SampleSettings(512, 256, 0, 1, 28, 7.0, 1.0, 3.0, 64)
