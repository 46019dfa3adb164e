"""sample.py: flow sampler against the reference, statistics of the text sampler, the tasks."""
import errno
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import golden, refused
from PIL import Image
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from torch.overrides import TorchFunctionMode

from checkpoint import save
from config import DUAL, ORDERS
from data import load_image, to_pictures
from experiments.language import caption
from experiments.world import random_scene
from film import GAP, LINE, TILE
from model import MMDiT, MMDiTConfig, Output
from sample import (Pipeline, describe, draw_tokens, float64_device, flow_sigmas, generate,
                    least_probability, main, probability_of)
from text_encoder import T5Config, T5Encoder, T5Tokenizer
from vae import VAE, VAEConfig

SAMPLE = Path(__file__).parent.parent / "sample.py"


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- noise levels

@pytest.mark.parametrize("steps", [4, 28, 50])
def test_sigmas_are_those_of_the_reference(steps):
    expected = golden("sampling")[2]
    sigmas = flow_sigmas(steps, 3.0)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,) and sigmas[-1] == 0
    close(sigmas, expected[f"sigmas_shift3_{steps}"], atol=1e-6)
    close(1000 * sigmas[:-1], expected[f"timesteps_shift3_{steps}"], atol=1e-3)


def test_sigmas_without_shift_and_of_one_step():
    expected = torch.tensor([1, (1 + 1e-3) / 2, 1e-3, 0])
    torch.testing.assert_close(flow_sigmas(3, 1.0), expected)
    assert flow_sigmas(1).tolist() == [1, 0]


@pytest.mark.parametrize("steps, shift", [(0, 3.0), (-1, 3.0), (4, 0.0), (4, -1.0)])
def test_impossible_sigmas(steps, shift):
    with pytest.raises(ValueError, match=re.escape(f"steps = {steps}, shift = {shift}")):
        flow_sigmas(steps, shift)


# ---------------------------------------------------------------- images

@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    file = tmp_path_factory.mktemp("dual") / "x.safetensors"
    save_file(golden("unialignment_mmdit")[0], file)
    return MMDiT.from_pretrained(file, num_heads=2)


def test_guided_trajectory(dual):
    _, inputs, outputs, config = golden("sampling")
    assert config["weights_from"] == "unialignment_mmdit"
    latents = generate(dual, inputs["noise"], inputs["text"], inputs["negative_text"],
                       config["steps"], config["guidance_scale"], config["shift"])
    close(latents, outputs["latents"], atol=5e-5)


def test_one_empty_text_serves_the_whole_batch(dual):
    _, inputs, _, _ = golden("sampling")
    noise, text, empty = inputs["noise"], inputs["text"], inputs["negative_text"][:1]
    one = generate(dual, noise, text, empty, steps=2)
    assert torch.equal(one, generate(dual, noise, text, torch.cat([empty, empty]), steps=2))


NOISE = torch.randn(2, 16, 4, 4, generator=seeded())
TEXT, EMPTY = torch.full((2, 5, 8), 3.0), torch.full((1, 5, 8), 1.0)


class Recorder:
    """A model whose velocity is the first value of the text; it keeps the inputs of its calls."""
    def __init__(self):
        self.calls = []

    def __call__(self, latents, text, timestep, references=(), align_depth=None,
                 want=("velocity", "logits")):
        self.calls.append((latents, text, timestep, references, want))
        velocity = text[:, 0, 0].view(-1, 1, 1, 1).expand_as(latents)
        return Output(velocity, None, None, None, None, None)

    @property
    def batch_sizes(self):
        return [len(latents) for latents, *_ in self.calls]


def test_guidance_moves_from_the_empty_text_to_the_prompt_and_beyond():
    """Along a constant velocity, sigma goes from 1 to 0."""
    model = Recorder()
    latents = generate(model, NOISE, TEXT, EMPTY, steps=4, guidance=7.0)
    torch.testing.assert_close(latents, NOISE - (1 + 7 * (3 - 1)))
    assert model.batch_sizes == [4] * 4
    for (x, both, timestep, _, want), sigma in zip(model.calls, flow_sigmas(4)):
        assert torch.equal(x[:2], x[2:]) and want == ("velocity",)
        assert torch.equal(both, torch.cat([EMPTY, EMPTY, TEXT]))
        torch.testing.assert_close(timestep, (1000 * sigma).expand(4))


def test_guidance_of_one_leaves_the_empty_text_out(dual):
    _, inputs, _, _ = golden("sampling")
    model = Recorder()
    latents = generate(model, NOISE, TEXT, EMPTY, steps=4, guidance=1.0)
    torch.testing.assert_close(latents, NOISE - 3)
    assert model.batch_sizes == [2] * 4
    noise, text, empty = inputs["noise"], inputs["text"], inputs["negative_text"]
    conditional = generate(dual, noise, text, empty, steps=3, guidance=1.0)
    both_halves_the_same = generate(dual, noise, text, text, steps=3, guidance=4.0)
    close(conditional, both_halves_the_same, atol=1e-5)


def test_references_are_seen_by_both_halves():
    model, reference = Recorder(), torch.randn(2, 16, 6, 2)
    generate(model, NOISE, TEXT, EMPTY, steps=1, references=[reference, reference + 1])
    references = model.calls[0][3]
    assert len(references) == 2
    assert torch.equal(references[1], torch.cat([reference, reference]) + 1)
    generate(model, NOISE, TEXT, EMPTY, steps=1, guidance=1.0, references=[reference])
    assert torch.equal(model.calls[1][3][0], reference)


class Sum(Recorder):
    """Its velocity is the first value of the text, plus 10 for each reference."""
    def __call__(self, latents, text, timestep, references=(), align_depth=None,
                 want=("velocity", "logits")):
        out = super().__call__(latents, text, timestep, references, align_depth, want)
        return out._replace(velocity=out.velocity + 10 * len(references))


def test_image_guidance_moves_from_no_references_to_the_references_and_beyond():
    references = [torch.randn(2, 16, 4, 4)] * 2
    for guidance, image_guidance, batch_sizes in (
            (7.0, 1.5, [4, 2]), (1.0, 1.5, [4, 2]), (7.0, 1.0, [4]), (1.0, 1.0, [2])):
        model = Sum()
        latents = generate(model, NOISE, TEXT, EMPTY, 3, guidance, references=references,
                           image_guidance=image_guidance)
        close(latents, NOISE - (1 + image_guidance * 20 + guidance * (3 - 1)))
        assert model.batch_sizes == batch_sizes * 3
    alone = Sum()
    generate(alone, NOISE, TEXT, EMPTY, 3, 7.0, references=references, image_guidance=1.5)
    x, texts, _, seen, want = alone.calls[1]
    assert not seen and torch.equal(texts, EMPTY.expand(2, 5, 8)) and want == ("velocity",)
    assert torch.equal(x, alone.calls[0][0][:2])
    without = Sum()                         # image guidance has no effect without references
    generate(without, NOISE, TEXT, EMPTY, 3, 7.0, image_guidance=1.5)
    assert without.batch_sizes == [4] * 3


class Polynomial(Recorder):
    """Its velocity is a polynomial of sigma, times the first value of the text."""
    def __init__(self, *coefficients):
        super().__init__()
        self.coefficients = coefficients

    def __call__(self, latents, text, timestep, references=(), align_depth=None,
                 want=("velocity", "logits")):
        out = super().__call__(latents, text, timestep, references, align_depth, want)
        sigma = timestep.view(-1, 1, 1, 1) / 1000
        factor = sum(c * sigma ** i for i, c in enumerate(self.coefficients))
        return out._replace(velocity=out.velocity * factor)


def errors(coefficients, steps_list, **options):
    """Errors of drawing along a known velocity, the integral of the polynomial from 1 to 0."""
    exact = NOISE - 3 * sum(c / (i + 1) for i, c in enumerate(coefficients))
    for steps in steps_list:
        model = Polynomial(*coefficients)
        latents = generate(model, NOISE, TEXT, EMPTY, steps, 1.0, shift=1.0, **options)
        assert len(model.calls) == steps                        # no more passes than Euler
        yield (latents - exact).abs().max().item()


def test_ab2_is_exact_along_a_line_after_its_first_step():
    sigmas = flow_sigmas(5, 3.0)
    first = (sigmas[1] - sigmas[0]) ** 2 / 2                    # Euler's error along v = sigma
    latents = generate(Polynomial(1.0, 2.0), NOISE, TEXT, EMPTY, 5, 1.0, solver="ab2")
    close(latents, NOISE - 3 * (1 + 1) - 3 * 2 * first, atol=1e-5)


def test_ab2_is_of_second_order():
    """Twice the steps: half of Euler's error, a quarter of ab2's."""
    coefficients = 0.5, 2.0, 3.0
    few, many = errors(coefficients, [20, 40])
    assert 1.8 < few / many < 2.2
    few, many = errors(coefficients, [20, 40], solver="ab2")
    assert 3.5 < few / many < 4.5


def test_guidance_in_an_interval_of_sigma():
    model, sigmas = Recorder(), flow_sigmas(8)
    latents = generate(model, NOISE, TEXT, EMPTY, 8, 7.0, guidance_interval=(0.3, 0.9))
    inside = [0.3 <= sigma <= 0.9 for sigma in sigmas[:-1].tolist()]
    assert 0 < sum(inside) < 8
    assert model.batch_sizes == [4 if guided else 2 for guided in inside]
    v = torch.where(torch.tensor(inside), 1 + 7 * (3 - 1), 3)
    close(latents, NOISE - (v * -sigmas.diff()).sum())
    # ab2 keeps to it: v jumps where guidance sets in and ends
    close(generate(Recorder(), NOISE, TEXT, EMPTY, 8, 7.0, solver="ab2",
                   guidance_interval=(0.3, 0.9)), latents)


def test_no_image_guidance_outside_of_the_interval():
    model, references = Sum(), [torch.randn(2, 16, 4, 4)]
    latents = generate(model, NOISE, TEXT, EMPTY, 3, 7.0, references=references,
                       image_guidance=1.5, guidance_interval=(0.0, 0.0))
    close(latents, NOISE - (3 + 10))
    assert model.batch_sizes == [2] * 3


@pytest.mark.parametrize("solver", ["euler", "ab2"])
def test_every_sigma_can_be_watched(solver):
    """Along dx = 3 (1 + 2 sigma) dsigma; watching changes nothing."""
    seen = []
    latents = generate(Polynomial(1.0, 2.0), NOISE, TEXT, EMPTY, 5, 1.0, solver=solver,
                       watch=lambda *state: seen.append(state))
    assert torch.equal(latents, generate(Polynomial(1.0, 2.0), NOISE, TEXT, EMPTY, 5, 1.0,
                                         solver=solver))
    assert [sigma for sigma, _, _ in seen] == flow_sigmas(5).tolist()       # from 1 to 0
    assert torch.equal(seen[0][1], NOISE) and torch.equal(seen[-1][1], latents)
    for sigma, x, clean in seen:
        close(clean, x - sigma * 3 * (1 + 2 * sigma), atol=1e-5)
    assert torch.equal(seen[-1][2], latents)


def test_sde_draws_half_of_the_noise_anew():
    """With the true velocity of one picture, each step has its clean estimate and mixed noise."""
    clean, new = torch.randn(2, 16, 4, 4), [torch.randn(2, 16, 4, 4) for _ in range(4)]

    def known(x, text, timestep, references, want):
        return Output((x - clean) * 1000 / timestep.view(-1, 1, 1, 1), *[None] * 5)

    seen, unused = [], iter(new)
    latents = generate(known, NOISE, TEXT, EMPTY, 4, 1.0, solver="sde",
                       watch=lambda *state: seen.append(state), new_noise=lambda: next(unused))
    close(latents, clean)
    noise = NOISE
    for (sigma, x, _), fresh in zip(seen[:4], new):
        close(x, (1 - sigma) * clean + sigma * noise, atol=1e-4)
        noise = (noise + fresh) / 2 ** 0.5
    with pytest.raises(ValueError, match="new_noise is missing"):
        generate(Recorder(), NOISE, TEXT, EMPTY, 4, 1.0, solver="sde")


def test_sde_depends_on_the_seed_of_a_picture_alone(run):
    pipeline = Pipeline.from_run(run)
    sde = with_settings(pipeline, solver="sde")
    two = sde.draw(["a", "b"], [1, 2])[1]
    close(sde.draw(["b"], [2])[0], two)
    assert not torch.allclose(pipeline.draw(["b"], [2])[0], two)


def test_unknown_solver():
    with pytest.raises(ValueError, match="solver = 'heun'.*euler"):
        generate(Recorder(), NOISE, TEXT, EMPTY, 3, solver="heun")


def test_the_state_stays_float32_for_a_bfloat16_model():
    model, text = Recorder(), torch.full((1, 5, 8), 1 / 3)
    latents = generate(model, torch.randn(1, 16, 4, 4), text.bfloat16(),
                       torch.zeros(1, 5, 8).bfloat16(), steps=50)
    assert latents.dtype == torch.float32 and model.calls[0][0].dtype == torch.bfloat16


# ---------------------------------------------------------------- text

MASK = 6                                    # the fake model has six tokens and the mask


class Fake:
    """Model and text encoder in one: logits (L, 7) for any input.

    It keeps the ids of every pass, and latents, timestep and want of every call.
    """
    def __init__(self, logits):
        self.logits, self.states, self.seen = logits, [], []

    def encoder(self, ids):
        self.states.append(ids.clone())
        return ids

    def __call__(self, latents, text, timestep, references=(), align_depth=None,
                 want=("velocity", "logits")):
        self.seen.append((latents, timestep, want))
        return Output(None, self.logits.expand(len(text), -1, -1), None, None, None, None)

    def describe(self, tokens, **options):
        return describe(self, self.encoder, None, tokens, MASK, **options)


def all_masked(rows, length):
    return torch.full((rows, length), MASK)


def revealed(row):
    return {i for i, token in enumerate(row.tolist()) if token != MASK}


def confident(order):
    """Logits with best token position % 6, most confident at order[0], then at order[1], ...

    The mask token has the largest logit of all.
    """
    logits = torch.zeros(len(order), 7)
    for rank, position in enumerate(order):
        logits[position, position % 6] = 20.0 - rank
    logits[:, MASK] = 100
    return logits


def test_confident_tokens_come_first_and_equally_many_per_step():
    order = [5, 0, 7, 3, 2, 6, 1, 4]
    fake = Fake(confident(order))
    tokens = fake.describe(all_masked(2, 8), steps=4)
    assert tokens.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]] * 2
    for step, state in enumerate(fake.states):
        for row in state:
            assert revealed(row) == set(order[:2 * step])
    assert len(fake.states) == 4
    latents, timestep, want = fake.seen[0]
    assert timestep.tolist() == [0, 0] and list(want) == ["logits"]  # clean images, the text head


def test_tokens_on_the_left_come_first():
    tokens = all_masked(2, 8)
    tokens[1, :2] = torch.tensor([3, 3])
    fake = Fake(confident([5, 0, 7, 3, 2, 6, 1, 4]))
    assert fake.describe(tokens, steps=4, order="left").tolist() == [
        [0, 1, 2, 3, 4, 5, 0, 1], [3, 3, 2, 3, 4, 5, 0, 1]]
    assert len(fake.states) == 4
    for step, (caption_row, answer_row) in enumerate(fake.states):
        assert revealed(caption_row) == set(range(2 * step))
        assert revealed(answer_row) == set(range(2 + 6 * step // 4))


def test_blocks_are_filled_in_from_the_left_each_by_confidence():
    tokens = all_masked(2, 8)
    tokens[1, :2] = torch.tensor([3, 3])                        # blocks count from the answer on
    fake = Fake(confident([5, 0, 7, 3, 2, 6, 1, 4]))
    fake.describe(tokens, steps=8, order="confidence", block=4)
    caption = [0, 3, 2, 1, 5, 7, 6, 4]
    answer = [5, 3, 2, 4, 7, 6]                                 # blocks 2 to 5 and 6 to 7
    quotas = [6 * step // 8 for step in range(8)]
    for step, (caption_row, answer_row) in enumerate(fake.states):
        assert revealed(caption_row) == set(caption[:step])
        assert revealed(answer_row) == {0, 1, *answer[:quotas[step]]}


def test_the_end_is_revealed_after_the_words():
    order = [5, 0, 7, 3, 2, 6, 1, 4]
    fake = Fake(confident(order))                               # tokens 0 1 2 3 4 5 0 1
    end = 1                                                     # at the positions 1 and 7
    fake.describe(all_masked(1, 8), steps=8, end_id=end)
    assert [revealed(state[0]) for state in fake.states] == [
        set([5, 0, 3, 2, 6, 4, 7, 1][:step]) for step in range(8)]
    # within a block the end comes last, but before the next block
    fake.states.clear()
    fake.describe(all_masked(1, 8), steps=8, end_id=end, block=4)
    assert [revealed(state[0]) for state in fake.states] == [
        set([0, 3, 2, 1, 5, 6, 4, 7][:step]) for step in range(8)]


def test_rows_with_different_questions_finish_together():
    tokens = all_masked(2, 8)
    tokens[0, :6] = torch.tensor([0, 1, 2, 3, 4, 5])
    fake = Fake(confident(list(range(8))))
    texts = fake.describe(tokens, steps=2)
    assert [(state == MASK).sum(dim=1).tolist() for state in fake.states] == [[2, 8], [1, 4]]
    assert texts[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]


@pytest.mark.parametrize("order", ["confidence", "ancestral"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_question_stays_and_no_mask_is_left_or_drawn(order, temperature):
    logits = torch.randn(40, 7, generator=seeded())
    logits[:, MASK] = 50
    tokens = all_masked(3, 40)
    tokens[:, ::3] = 2
    before = tokens.clone()
    texts = Fake(logits).describe(tokens, steps=5, order=order, temperature=temperature,
                                  generator=seeded())
    assert torch.equal(tokens, before)                              # the argument is not changed
    assert (texts[:, ::3] == 2).all() and (texts != MASK).all()
    if temperature == 0:
        best, masked = logits[:, :MASK].argmax(dim=1).expand(3, -1), before == MASK
        assert torch.equal(texts[masked], best[masked])
    else:
        assert not torch.equal(texts[0], texts[1])


def test_ancestral_reveals_one_nth_in_each_of_n_steps():
    fake = Fake(torch.zeros(10_000, 7))
    fake.describe(all_masked(2, 10_000), steps=5, order="ancestral", temperature=1.0,
                  generator=seeded())
    shares = [(state == MASK).double().mean(dim=1) for state in fake.states]
    assert 5 <= len(shares) <= 6            # a last argmax for the 1e-5 that may be left
    for step, share in enumerate(shares):
        assert (share - (1 - step / 5)).abs().max() < 0.02


def test_the_last_step_fills_in_the_most_probable_tokens():
    """One step of the reversed diffusion leaves a share of 1e-5 to the final argmax."""
    logits = torch.zeros(1, 7)
    logits[0, 3] = 0.1
    fake = Fake(logits.expand(200_000, -1))
    tokens = fake.describe(all_masked(1, 200_000), steps=1, order="ancestral", temperature=1.0,
                           generator=seeded())
    left = fake.states[1][0] == MASK
    assert len(fake.states) == 2 and 0 < left.sum() < 15 and (tokens[0, left] == 3).all()


@pytest.mark.parametrize("order, steps", [("confidence", 1), ("ancestral", 1), ("ancestral", 6)])
def test_temperature_one_follows_the_models_distribution(order, steps):
    """Chi-square with 5 degrees of freedom exceeds 25 once in 7000 draws."""
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.02, 0.01])
    logits = torch.cat([probabilities.log(), torch.tensor([3.0])]).expand(20_000, -1)
    colder = probabilities ** 2 / (probabilities ** 2).sum()
    for temperature, shares in ((1.0, probabilities), (0.5, colder)):
        tokens = Fake(logits).describe(all_masked(1, 20_000), steps=steps, order=order,
                                       temperature=temperature, generator=seeded())
        counts, expected = torch.bincount(tokens[0], minlength=6), 20_000 * shares
        assert ((counts - expected) ** 2 / expected).sum() < 25


def test_the_same_seed_gives_the_same_text():
    logits = torch.randn(30, 7, generator=seeded())
    for order in ("confidence", "ancestral"):
        first, again, other = (
            Fake(logits).describe(all_masked(2, 30), steps=4, order=order, temperature=1.0,
                                  generator=seeded(seed))
            for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("order", ORDERS)
def test_watched_masks_only_ever_open(order):
    tokens, logits, seen = all_masked(2, 30), torch.randn(30, 7, generator=seeded()), []
    tokens[:, :4] = 3                                               # a question
    result = Fake(logits).describe(tokens, steps=6, order=order, temperature=1.0,
                                   generator=seeded(), watch=seen.append)
    assert torch.equal(seen[0], tokens) and torch.equal(seen[-1], result)
    for before, after in zip(seen, seen[1:]):
        is_open = before != MASK
        assert torch.equal(after[is_open], before[is_open])
        assert (after == MASK).sum() < (before == MASK).sum()
    assert len(seen) == 7 or order == "ancestral"
    assert torch.equal(result, Fake(logits).describe(
        tokens, steps=6, order=order, temperature=1.0, generator=seeded()))


def test_no_forward_pass_where_nothing_was_revealed():
    fake = Fake(confident([2, 0, 1]))
    assert fake.describe(all_masked(1, 3), steps=30).tolist() == [[0, 1, 2]]
    assert len(fake.seen) == 3              # three tokens change the text three times
    fake = Fake(torch.randn(1, 7, generator=seeded()))
    fake.describe(all_masked(1, 1), steps=200, order="ancestral", temperature=1.0,
                  generator=seeded())
    assert len(fake.seen) == 1
    complete = torch.zeros(2, 3, dtype=torch.int64)                 # nothing is masked
    assert torch.equal(fake.describe(complete), complete) and len(fake.seen) == 1


def test_latents_reach_the_model():
    fake, latents = Fake(torch.zeros(4, 7)), torch.randn(1, 16, 4, 4)
    describe(fake, fake.encoder, latents, all_masked(1, 4), MASK, steps=2)
    assert all(seen[0] is latents for seen in fake.seen)


def test_default_order_is_from_the_left_for_questions_and_by_confidence_for_captions():
    tokens, order = all_masked(2, 8), [5, 0, 7, 3, 2, 6, 1, 4]
    tokens[1, :2] = torch.tensor([3, 3])
    fake = Fake(confident(order))
    fake.describe(tokens, steps=4, order=None)
    for step, (caption_row, answer_row) in enumerate(fake.states):
        assert revealed(caption_row) == set(order[:2 * step])
        assert revealed(answer_row) == set(range(2 + 6 * step // 4))


@pytest.mark.parametrize("options", [
    {"order": "left to right"}, {"steps": 0}, {"temperature": -1.0}, {"block": -3}])
def test_impossible_ways_to_write(options):
    [value] = options.values()
    with pytest.raises(ValueError, match=re.escape(repr(value))):
        Fake(torch.zeros(3, 7)).describe(all_masked(1, 3), **options)


# ---------------------------------------------------------------- draws

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_most_probable_tokens_are_those_of_float64(dtype):
    """The first of several, as there are many in bfloat16; over more rows than one block has."""
    logits = (4 * torch.randn(100, 3000, generator=seeded())).to(dtype)
    logits[:, -1] = 100                                         # the mask is never drawn
    tokens = draw_tokens(logits, 0, None)
    assert torch.equal(tokens, logits[:, :-1].double().argmax(dim=-1))
    expected = logits[:, :-1].double().softmax(dim=-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(probability_of(tokens, logits), expected, rtol=1e-5, atol=0)
    assert torch.equal(probability_of(tokens, logits).argsort(), expected.argsort())


def test_probabilities_near_one_keep_their_order():
    """In float32 they would all be 1."""
    lead = torch.tensor([30.0, 25.0, 35.0, 20.0])
    logits = torch.zeros(4, 100)
    logits[:, 7] = lead
    probability = probability_of(draw_tokens(logits, 0, None), logits)
    assert probability.argsort().tolist() == lead.argsort().tolist()
    others = 98 * (-lead.double()).exp()
    torch.testing.assert_close(1 - probability, others / (1 + others), rtol=1e-3, atol=1e-15)


def test_rare_tokens_are_drawn_as_often_as_they_should():
    """32,000 tokens of 2.5e-8 each beside one of 0.9992: a float32 sum loses them all."""
    rare, count, draws = 2.5e-8, 32_000, 20_000
    logits = torch.full((1, count + 2), math.log(rare))
    logits[0, 0], logits[0, -1] = math.log(1 - count * rare), 50
    tokens = draw_tokens(logits.expand(draws, -1), 1.0, seeded())
    assert tokens.max() <= count
    assert abs((tokens > 0).sum() - draws * count * rare) < 12              # Poisson of mean 16


def test_only_the_logits_of_chosen_tokens_are_asked_for():
    order = [5, 0, 7, 3, 2, 6, 1, 4]

    def asked_for(tokens, **options):
        fake = Fake(confident(order))
        fake.describe(tokens, **options)
        return [want["logits"].sum(dim=1).tolist() for *_, want in fake.seen]

    tokens = all_masked(2, 8)
    tokens[1, :4] = 3
    assert asked_for(tokens, steps=4, order="left") == [[2, 1]] * 4
    assert asked_for(tokens, steps=4) == [[8, 4], [6, 3], [4, 2], [2, 1]]
    assert asked_for(tokens, steps=4, block=4) == [[4, 4], [2, 3], [4, 2], [2, 1]]
    ancestral = asked_for(tokens, steps=4, order="ancestral", temperature=1.0, generator=seeded())
    assert torch.tensor(ancestral).sum(dim=0).tolist() == [8, 4]            # each token once


# ---------------------------------------------------------------- a tiny run and its pipeline

SETTINGS = {"image_size": 32, "text_length": 48, "padding_id": 1, "steps": 3, "guidance": 2.0,
            "image_guidance": 1.5, "shift": 3.0, "text_steps": 6}
PROMPT = "a large red circle at the top left on a gray background"
BLUE = "a small blue square"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as training leaves it, with random weights.

    None of the weights is zero, so that every part of the model matters.
    """
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    rng, file = random.Random(0), io.BytesIO()
    captions = [caption(random_scene(rng, 1 + i % 3)) for i in range(400)]
    SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_writer=file, model_type="unigram",
        vocab_size=80, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, num_threads=1)
    (folder / "tokenizer.model").write_bytes(file.getvalue())
    vocab_size = T5Tokenizer(folder / "tokenizer.model").vocab_size
    vae = VAE(VAEConfig(
        latent_channels=4, block_channels=(16, 16), layers_per_block=1, norm_groups=8, stem=4,
        mid_attention=False))
    encoder = T5Encoder(T5Config(
        vocab_size=vocab_size, dim=24, head_dim=12, ff_dim=32, depth=1, num_heads=2,
        mask_id=vocab_size - 1))
    model = MMDiT(MMDiTConfig(
        latent_channels=4, width=32, depth=2, num_heads=2, text_dim=24, vocab_size=vocab_size,
        position_table=8, text_positions=48, qk_norm=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    save(folder / "vae.safetensors", vae.state_dict(), vae.config)
    save(folder / "text_encoder.safetensors", encoder.state_dict(), encoder.config)
    save(folder / "checkpoint-00000001" / "ema.safetensors", model.state_dict(), model.config)
    (folder / "run.json").write_text(json.dumps({"sampling": SETTINGS}))
    return folder


def random_images(count):
    return torch.rand(count, 3, 32, 32, generator=seeded()) * 2 - 1


def test_an_image_depends_on_its_prompt_and_seed_alone(run):
    pipeline = Pipeline.from_run(run)
    together = pipeline.draw([PROMPT, BLUE, PROMPT], seed=3)
    assert together.shape == (3, 3, 32, 32) and together.std() > 0.05
    for i, prompt in enumerate([PROMPT, BLUE, PROMPT]):
        close(pipeline.draw([prompt], seed=3 + i), together[i:i + 1])
    assert (together[0] - together[2]).abs().max() > 0.01           # another seed
    another_prompt = pipeline.draw([BLUE], seed=3)
    assert (another_prompt - together[:1]).abs().max() > 0.01
    for changed in ({"steps": 2}, {"guidance": 7.0}, {"guidance": 1.0}):
        other = pipeline.draw([PROMPT], seed=3, **changed)
        assert (other - together[:1]).abs().max() > 1e-3


def test_references_change_an_image(run):
    pipeline = Pipeline.from_run(run)
    source = pipeline.encode_images(random_images(1))
    assert source.shape == (1, 4, 4, 4)
    with_source, without = pipeline.draw([PROMPT], references=[source]), pipeline.draw([PROMPT])
    assert (with_source - without).abs().max() > 1e-3


def test_prompts_about_pictures_are_padded_little(run):
    """Prompts of mixed lengths in one call give the images of each prompt alone.

    Each prompt is read at its own length; without source pictures at the full one.
    """
    pipeline, seen = Pipeline.from_run(run), []
    pipeline.settings = replace(pipeline.settings, prompt_multiple=16)
    prompts = [PROMPT, "red", "a circle at the top left", "on a gray background"]
    sources = random_images(4)
    encode = pipeline.text_encoder.forward
    pipeline.text_encoder.forward = lambda ids: seen.append(tuple(ids.shape)) or encode(ids)
    together = pipeline.edit(prompts, [sources], seed=3)
    counts = [len(pipeline.tokenizer.encode(prompt)) for prompt in prompts]
    lengths = [min(48, -(-count // 16) * 16) for count in counts]
    shapes = [(1 + lengths.count(length), length) for length in set(lengths)]
    assert sorted(seen) == sorted(shapes) and len(seen) > 1
    for i, prompt in enumerate(prompts):
        alone = pipeline.edit([prompt], [sources[i:i + 1]], seed=3 + i)
        close(alone, together[i:i + 1])
    seen.clear()
    pipeline.draw(prompts)
    assert seen == [(5, 48)]


def with_fake_model(run, logits):
    """A pipeline whose model returns these logits; and that model."""
    pipeline, fake = Pipeline.from_run(run), Fake(logits)
    fake.pos_embed, pipeline.model = pipeline.model.pos_embed, fake
    return pipeline, fake


def test_caption_is_the_text_up_to_its_end(run):
    tokenizer, images = T5Tokenizer(run / "tokenizer.model"), random_images(1)
    ids = tokenizer.encode("a red circle") + tokenizer.encode("a blue square")
    logits = torch.zeros(48, tokenizer.vocab_size)
    logits[range(len(ids)), ids] = 9
    pipeline, fake = with_fake_model(run, logits)
    latents = Pipeline.from_run(run).encode_images(images)
    assert pipeline.caption(images) == ["a red circle"]
    assert len(fake.seen) == SETTINGS["text_steps"] and torch.equal(fake.seen[0][0], latents)
    pipeline.caption(images, steps=2)
    assert len(fake.seen) == SETTINGS["text_steps"] + 2


class Remembering:
    """A text encoder that keeps the ids it reads."""
    def __init__(self, encoder):
        self.encoder, self.ids = encoder, []

    def __call__(self, ids):
        self.ids.append(ids.clone())
        return self.encoder(ids)


def test_an_answer_is_the_text_after_its_question(run):
    """The question is never masked nor overwritten."""
    tokenizer, images = T5Tokenizer(run / "tokenizer.model"), random_images(2)
    questions = ["a large red circle", "a square"]
    asked = [tokenizer.encode(question)[:-1] for question in questions]
    ids = tokenizer.encode(BLUE)
    logits = torch.zeros(2, 48, tokenizer.vocab_size)
    logits[:, :, tokenizer.encode("green")[0]] = 5                  # outside of the answer
    for row, question in zip(logits, asked):
        row[range(len(question), len(question) + len(ids)), ids] = 9
    pipeline, _ = with_fake_model(run, logits)
    pipeline.text_encoder = Remembering(pipeline.text_encoder)
    for order in (None, *ORDERS):
        answers = pipeline.caption(images, order=order, questions=questions)
        assert answers == [BLUE] * 2
    for seen in pipeline.text_encoder.ids:
        for row, question in zip(seen, asked):
            assert row[:len(question)].tolist() == question
    for row, question in zip(pipeline.text_encoder.ids[0], asked):
        assert (row[len(question):] == tokenizer.mask_id).all()
    with pytest.raises(ValueError, match="too little room for an answer"):
        pipeline.caption(images, questions=["a square", "red circle " * 60])


def with_settings(pipeline, **settings):
    return replace(pipeline, settings=replace(pipeline.settings, **settings))


def test_questions_stand_in_the_template_of_the_model(run):
    bare, images = Pipeline.from_run(run), random_images(2)
    pipeline = with_settings(bare, question_template="is a {question} square")
    questions = ["red", "large blue"]
    asked = [f"is a {question} square" for question in questions]
    assert pipeline.caption(images, questions=questions) == bare.caption(images, questions=asked)
    assert pipeline.caption(images, questions=questions) != bare.caption(images,
                                                                         questions=questions)
    assert pipeline.caption(images) == bare.caption(images)     # captions have no template


def test_answers_have_their_own_length(run):
    pipeline = with_settings(Pipeline.from_run(run), answer_length=20)
    lengths = []
    encode = pipeline.encode_text
    pipeline.encode_text = lambda ids: (lengths.append(ids.shape[1]), encode(ids))[1]
    image = random_images(1)
    for question, length in ((None, 48), ("red", 20), ("a large red circle at the top left", 48)):
        lengths.clear()
        pipeline.caption(image, steps=1, questions=None if question is None else [question])
        assert set(lengths) == {length}


def test_a_dialogue_is_seen_by_the_next_question(run):
    pipeline, image = Pipeline.from_run(run), random_images(1)
    tokens = pipeline.tokenizer
    before = [("red", "a circle"), ("blue", "a square")]
    seen = []
    encode = pipeline.encode_text
    pipeline.encode_text = lambda ids: (seen.append(ids.tolist()), encode(ids))[1]
    pipeline.caption(image, steps=1, questions=["gray"], before=[before])
    start = sum((tokens.encode(q)[:-1] + tokens.encode(a) for q, a in before), [])
    start += tokens.encode("gray")[:-1]
    assert seen[0][0][:len(start)] == start
    assert set(seen[0][0][len(start):]) == {tokens.mask_id}


def test_text_settings_of_the_model_are_the_defaults(run):
    bare, images = Pipeline.from_run(run), random_images(3)
    pipeline = with_settings(bare, order="ancestral", temperature=1.0)
    assert pipeline.caption(images, 3) == bare.caption(images, 3, None, "ancestral", 1.0)
    assert bare.caption(images, 3, None, "ancestral", 1.0) != bare.caption(images, 3)
    assert pipeline.caption(images, 3, None, "confidence", 0.0) == \
        bare.caption(images, 3, None, "confidence")


def test_a_negative_prompt_takes_the_place_of_the_empty_one(run):
    pipeline = Pipeline.from_run(run)
    negative = pipeline.draw([PROMPT], negative=BLUE)
    assert torch.equal(negative, with_settings(pipeline, negative_prompt=BLUE).draw([PROMPT]))
    assert not torch.equal(negative, pipeline.draw([PROMPT]))
    # v = v_negative + 1 (v_text - v_negative): guidance 1 leaves it out
    assert torch.equal(pipeline.draw([PROMPT], guidance=1.0, negative=BLUE),
                       pipeline.draw([PROMPT], guidance=1.0))
    # guidance 0 is the negative prompt alone
    close(pipeline.draw([PROMPT], guidance=0.0, negative=BLUE),
          pipeline.draw([BLUE], guidance=1.0))


def test_pictures_that_are_not_square(run):
    pipeline = Pipeline.from_run(run)
    wide = pipeline.draw([PROMPT, BLUE], [3, 9], size=(32, 80))
    assert wide.shape == (2, 3, 32, 80)
    close(pipeline.draw([BLUE], 9, size=(32, 80)), wide[1:])    # each image has its own seed
    edited = pipeline.edit([PROMPT], [wide[:1]], size=(32, 80))
    assert edited.shape == (1, 3, 32, 80)
    for size in ((32, 40), (144, 32), (0, 32)):
        with pytest.raises(ValueError, match=f"image size {size[1]} x {size[0]}: expected mult"):
            pipeline.draw([PROMPT], size=size)


def test_captions_are_answers_to_no_question(run):
    pipeline, images = Pipeline.from_run(run), random_images(2)
    captions, questions = pipeline.caption(images), ["a red circle", ""]
    assert captions == pipeline.caption(images, questions=["", ""])
    texts = pipeline.caption(images, questions=questions)
    assert texts[1] == captions[1] and texts[0] != captions[0]
    from_left = pipeline.caption(images, order="left", questions=questions)
    by_confidence = pipeline.caption(images, order="confidence", questions=questions)
    assert texts == [from_left[0], by_confidence[1]]


# ---------------------------------------------------------------- plans

def test_the_least_probable_token_given_the_others(run):
    pipeline = Pipeline.from_run(run)
    tokenizer = pipeline.tokenizer
    ids, answer = tokenizer.dialogue(["a circle", ""], ["a red circle", "blue"], 12)
    expected = []
    for row, counts in zip(ids, answer):
        chances = []
        for i in counts.nonzero()[:, 0]:
            masked = row.clone()
            masked[i] = tokenizer.mask_id
            with torch.no_grad():
                text = pipeline.encode_text(masked[None])
                logits = pipeline.model(None, text, torch.zeros(1), want=("logits",)).logits[0, i]
            logits[tokenizer.mask_id] = -torch.inf
            chances.append(logits.double().softmax(-1)[row[i]].item())
        expected.append(min(chances))
    inputs = pipeline.model, pipeline.encode_text, None, ids, answer, tokenizer.mask_id
    alone = least_probability(*inputs, parts=12)
    assert alone.tolist() == pytest.approx(expected, rel=1e-4)
    together = least_probability(*inputs, parts=3)
    assert together.tolist() != pytest.approx(expected, rel=1e-2)   # fewer others are known


def test_a_plan_is_the_surest_of_several(run, monkeypatch):
    pipeline, calls = Pipeline.from_run(run), []
    texts = ["a red circle", "a blue square", "a large red circle"]

    def caption(images, seed, steps, order, temperature, progress, questions):
        assert images is None and (steps, order, temperature) == (40, "confidence", 1.0)
        calls.append(seed)
        return [texts[len(calls) - 1]] * len(questions)

    def chance(model, encode, latents, ids, answer, mask_id):
        assert latents is None and ids.shape[1] == 40 and not answer[:, 0].any()
        return torch.tensor([[0.1, 0.9], [0.3, 0.2], [0.2, 0.5]][len(calls) - 1])

    pipeline.settings = replace(pipeline.settings, text_only_length=40)
    monkeypatch.setattr(pipeline, "caption", caption)
    monkeypatch.setattr("sample.least_probability", chance)
    assert pipeline.plan(["a circle", "a square"], seed=7) == ["a blue square", "a red circle"]
    assert calls == [7, 8, 9]


def test_texts_without_a_picture_have_their_own_length(run):
    pipeline, shapes = Pipeline.from_run(run), []
    pipeline.settings = replace(pipeline.settings, text_only_length=40, answer_length=20)
    encode = pipeline.text_encoder.forward
    pipeline.text_encoder.forward = lambda ids: shapes.append(tuple(ids.shape)) or encode(ids)
    first = pipeline.caption(None, questions=["a circle", "a square"], temperature=1.0)
    assert set(shapes) == {(2, 40)} and first[0] != first[1]
    assert pipeline.caption(None, questions=["a circle", "a square"], temperature=1.0) == first
    shapes.clear()
    pipeline.caption(random_images(1), questions=["a circle"])
    assert set(shapes) == {(1, 20)}


def test_the_newest_checkpoint_is_taken(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    model = MMDiT.from_pretrained(run / "checkpoint-00000001" / "ema.safetensors")
    torch.nn.init.zeros_(model.image_head.weight)
    save(folder / "checkpoint-00000010" / "ema.safetensors", model.state_dict(), model.config)
    (folder / "checkpoint-00000011").mkdir()                        # without averaged weights
    assert (Pipeline.from_run(folder).model.image_head.weight == 0).all()


# ---------------------------------------------------------------- command line

def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def settings_of(path):
    return json.loads(Image.open(path).text["settings"])


def stopped(arguments):
    """The message with which the command stops later: printed to stderr, exit status 1."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert isinstance(exit.value.code, str) and exit.value.code.startswith("error: ")
    return exit.value.code


def test_pictures_with_prompt_and_settings_under_free_names(run, inside, capsys):
    folder = inside / "pictures"
    main([PROMPT, "--run", str(run), "--seed", "4"])
    assert capsys.readouterr().out == f"pictures/0001.png\t{PROMPT}\n"
    picture = Image.open("pictures/0001.png")
    assert picture.size == (32, 32) and picture.mode == "RGB" and picture.text["prompt"] == PROMPT
    assert settings_of("pictures/0001.png") == {
        "seed": 4, "steps": 3, "shift": 3.0, "guidance": 2.0, "model": str(run)}
    before = (folder / "0001.png").read_bytes()
    (folder / "0007.png").write_bytes(b"mine")
    (folder / "notes.png").write_bytes(b"mine too")
    main([PROMPT, BLUE, "--run", str(run), "--seed", "4", "--steps", "2", "--guidance", "1"])
    assert sorted(f.name for f in folder.iterdir()) == [
        "0001.png", "0007.png", "0008.png", "0009.png", "notes.png"]
    assert (folder / "0001.png").read_bytes() == before
    assert (folder / "0007.png").read_bytes() == b"mine"
    assert Image.open("pictures/0009.png").text["prompt"] == BLUE
    assert settings_of("pictures/0009.png") == {
        "seed": 5, "steps": 2, "shift": 3.0, "guidance": 1.0, "model": str(run)}


def test_out_names_a_file_or_a_folder(run, inside, capsys):
    circle = [PROMPT, "--run", str(run), "--out", "deep/er/circle.png"]
    main(circle)
    before = (inside / "deep/er/circle.png").read_bytes()
    refused(circle, capsys)
    assert (inside / "deep/er/circle.png").read_bytes() == before
    main([PROMPT, "--run", str(run), "--out", "folder"])
    assert np.array_equal(pixels("folder/0001.png"), pixels("deep/er/circle.png"))  # the same seed
    main([PROMPT, "--run", str(run), "--out", "folder", "--seed", "1"])
    assert not np.array_equal(pixels("folder/0001.png"), pixels("folder/0002.png"))


def test_solver_and_guidance_interval_on_the_command_line(run, inside):
    options = ["--solver", "ab2", "--guidance-interval", "0.2", "0.9"]
    main([PROMPT, "--run", str(run), "--seed", "3", "--out", "x.png", *options])
    main([PROMPT, "--run", str(run), "--seed", "3", "--out", "y.png"])
    pipeline = with_settings(Pipeline.from_run(run), solver="ab2", guidance_interval=(0.2, 0.9))
    [expected] = to_pictures(pipeline.draw([PROMPT], 3))
    assert np.array_equal(pixels("x.png"), expected)
    assert not np.array_equal(pixels("y.png"), expected)
    settings = settings_of("x.png")
    assert settings["solver"] == "ab2" and settings["guidance_interval"] == [0.2, 0.9]
    assert not {"solver", "guidance_interval"} & settings_of("y.png").keys()
    stopped([PROMPT, "--run", str(run), "--out", "z.png", "--guidance-interval", "0.9", "0.2"])


def test_prompts_from_a_file(run, inside, capsys):
    (inside / "prompts.txt").write_text(f"{PROMPT}\n\n  {BLUE}  \n")
    main(["a red circle", "--prompts", "prompts.txt", "--run", str(run)])
    names, prompts = [f"pictures/000{i}.png" for i in (1, 2, 3)], ["a red circle", PROMPT, BLUE]
    lines = [f"{name}\t{prompt}" for name, prompt in zip(names, prompts)]
    assert capsys.readouterr().out.splitlines() == lines
    assert [Image.open(name).text["prompt"] for name in names] == prompts


@pytest.mark.parametrize("order", ["confidence", "ancestral"])
def test_describe(run, inside, capsys, order):
    for name, level in (("a.png", 40), ("b.png", 220)):
        Image.new("RGB", (50, 40), (level, 128, 255 - level)).save(name)
    arguments = ["--describe", "a.png", "b.png", "--run", str(run), "--order", order,
                 "--temperature", "1"]
    main(arguments)
    first = capsys.readouterr().out
    lines = [line.split("\t") for line in first.splitlines()]
    assert [line[0] for line in lines] == ["a.png", "b.png"]
    assert all(len(line) == 2 for line in lines)
    main(arguments)
    assert capsys.readouterr().out == first
    main(arguments + ["--seed", "1"])
    assert capsys.readouterr().out != first
    assert not (inside / "pictures").exists()


def test_answers_on_the_command_line(run, inside, capsys):
    Image.new("RGB", (50, 40), (220, 128, 35)).save("a.png")
    questions = ["a red circle", "a zebra"]
    main(["--image", "a.png", "--ask", "a red circle", "--ask", "a zebra", "--run", str(run),
          "--temperature", "1"])
    printed = capsys.readouterr()
    images = load_image("a.png", 32).expand(2, -1, -1, -1)
    answers = Pipeline.from_run(run).caption(images, temperature=1.0, questions=questions)
    assert printed.out.splitlines() == [f"{q}\t{a}" for q, a in zip(questions, answers)]
    assert "warning: 'a zebra': not in the model's vocabulary: zebra" in printed.err
    assert not (inside / "pictures").exists()
    too_long = ["--image", "a.png", "--ask", "red circle " * 60, "--run", str(run)]
    assert "'red circle red circle" in stopped(too_long)


def test_plans_are_printed_and_drawn(run, inside, capsys):
    pipeline = Pipeline.from_run(run)
    [plan] = pipeline.plan([BLUE], seed=3)
    main([BLUE, "--plan", "--run", str(run), "--seed", "3", "--out", "x.png"])
    printed = capsys.readouterr()
    assert printed.out == f"x.png\t{plan}\n" and plan != BLUE
    assert f"plan of {BLUE!r}: {plan}\n" in printed.err
    main([plan, "--run", str(run), "--seed", "3", "--out", "y.png"])
    assert Image.open("x.png").text["prompt"] == plan
    assert (pixels("x.png") == pixels("y.png")).all()


def test_an_empty_plan_is_not_drawn(run, inside, monkeypatch):
    monkeypatch.setattr(Pipeline, "plan", lambda *_, **options: [""])
    message = stopped([BLUE, "--plan", "--run", str(run), "--out", "x.png"])
    assert "the plan of 'a small blue square' is empty" in message and not Path("x.png").exists()


# ---------------------------------------------------------------- editing

@pytest.fixture
def sources(inside):
    """Two pictures of noise, a.png and b.png, as images (1, 3, 32, 32)."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(inside / name)
    return [load_image(name, 32)[None] for name in ("a.png", "b.png")]


def test_edit_draws_with_the_encoded_sources(run, sources):
    pipeline, options = Pipeline.from_run(run), {"seed": 3, "steps": 2, "guidance": 1.5}
    result = pipeline.edit([PROMPT], sources, **options)
    latents = [pipeline.encode_images(images) for images in sources]
    assert torch.equal(result, pipeline.draw([PROMPT], 3, 2, 1.5, latents))
    assert result.shape == (1, 3, 32, 32)
    of_first_source = pipeline.edit([PROMPT], sources[:1], **options)
    assert (result - of_first_source).abs().max() > 1e-3
    assert torch.equal(pipeline.edit([PROMPT], [], seed=3), pipeline.draw([PROMPT], seed=3))
    unguided = replace(pipeline, settings=replace(pipeline.settings, image_guidance=1.0))
    assert (result - unguided.edit([PROMPT], sources, **options)).abs().max() > 1e-3
    both = pipeline.edit([PROMPT, BLUE], [torch.cat(sources)], seed=3)      # one source each
    close(both[1:], pipeline.edit([BLUE], sources[1:], seed=4))


def test_every_turn_edits_the_last_result(run, sources, capsys):
    turns = ["a red circle", "a blue square", "a zebra"]
    main(["--image", "a.png", "--image", "b.png", *(f"--edit={turn}" for turn in turns),
          "--run", str(run), "--seed", "5", "--out", "deep/x.png"])
    printed = capsys.readouterr()
    names = [f"deep/x-{i}.png" for i in (1, 2, 3)]
    assert printed.out.splitlines() == [f"{name}\t{turn}" for name, turn in zip(names, turns)]
    assert "warning: 'a zebra': not in the model's vocabulary: zebra" in printed.err
    pipeline = Pipeline.from_run(run)
    for i, (name, turn) in enumerate(zip(names, turns)):
        result = pipeline.edit([turn], sources, seed=5 + i)
        assert np.abs(pixels(name) - to_pictures(result)[0]).max() <= 1
        sources = [load_image(name, 32)[None]]
        assert Image.open(name).text["prompt"] == turn
        assert settings_of(name) == {"seed": 5 + i, "steps": 3, "shift": 3.0, "guidance": 2.0,
                                     "image_guidance": 1.5, "model": str(run)}


def write_edits(*lines):
    Path("edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_many_edits_from_a_file_and_only_what_is_missing(run, sources, inside, capsys):
    write_edits({"image": "a.png", "instruction": "a red circle"},
                {"image": ["a.png", "b.png"], "instruction": "a square", "seed": 4,
                 "name": "x.png"})
    command = ["--edits", "edits.jsonl", "--out", "done", "--run", str(run), "--seed", "2"]
    main(command)
    assert capsys.readouterr().out == "done/0001.png\ta red circle\ndone/x.png\ta square\n"
    assert [settings_of(f"done/{name}")["seed"] for name in ("0001.png", "x.png")] == [2, 6]
    pipeline = Pipeline.from_run(run)
    both = pipeline.edit(["a square"], sources, 6)
    assert np.abs(pixels("done/x.png") - to_pictures(both)[0]).max() <= 1
    first, last = ((inside / "done" / name).read_bytes() for name in ("0001.png", "x.png"))
    (inside / "done" / "x.png").write_bytes(last[:len(last) // 2])     # no whole picture
    main(command)
    assert capsys.readouterr().out == "done/x.png\ta square\n"
    assert (inside / "done" / "x.png").read_bytes() == last
    assert (inside / "done" / "0001.png").read_bytes() == first
    write_edits({"image": "a.png", "instruction": "a blue circle"})
    assert "0001.png: was drawn with another prompt" in stopped(command)
    write_edits({"image": "a.png", "instruction": "a red circle"})
    assert "0001.png: was drawn with other steps" in stopped([*command, "--steps", "1"])


def test_a_dialogue_on_the_command_line(run, sources, capsys):
    questions = ["what color is it?", "where is it?"]
    ask = ["--image", "a.png", *(f"--ask={question}" for question in questions), "--run", str(run)]
    main([*ask, "--dialogue", "--steps", "3"])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    pipeline = Pipeline.from_run(run)
    [first] = pipeline.caption(sources[0], 0, 3, questions=questions[:1])
    [second] = pipeline.caption(sources[0], 1, 3, questions=questions[1:],
                                before=[[(questions[0], first)]])
    assert lines == [[questions[0], first], [questions[1], second]]


def test_width_and_height(run, sources, capsys):
    main([PROMPT, "--run", str(run), "--width", "64", "--out", "wide.png"])
    assert Image.open("wide.png").size == (64, 32)
    main(["--image", "wide.png", "--edit", "a circle", "--run", str(run), "--height", "48",
          "--out", "tall.png"])
    assert Image.open("tall.png").size == (32, 48)
    main(["--describe", "wide.png", "--run", str(run), "--width", "64"])
    assert "image size 40 x 32" in stopped([PROMPT, "--run", str(run), "--width", "40"])


def test_names_of_edited_pictures(run, sources, inside, capsys):
    options = ["--run", str(run), "--steps", "1"]
    one_turn, two_turns = ["--edit", "a circle"], ["--edit", "a circle", "--edit", "a square"]
    main(["--image", "a.png", "b.png", *one_turn, *options, "--out", "x.png"])
    main(["--image", "a.png", "b.png", *two_turns, *options])
    assert sorted(f.name for f in (inside / "pictures").iterdir()) == ["0001.png", "0002.png"]
    assert np.array_equal(pixels("x.png"), pixels("pictures/0001.png"))
    main(["--image", "x.png", *two_turns, *options, "--out", "x.png"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == ["x-1.png\ta circle", "x-2.png\ta square"]
    (inside / "x-1.png").unlink()
    before = (inside / "x-2.png").read_bytes()
    for turns, name in ((one_turn, "x.png"), (one_turn * 2, "x-2.png")):
        message = refused(["--image", "a.png", *turns, "--run", "none", "--out", "x.png"], capsys)
        assert f"error: {name} exists; nothing is overwritten" in message
    assert (inside / "x-2.png").read_bytes() == before and not (inside / "x-1.png").exists()


@pytest.mark.parametrize("kind", ["edges", "depth", "pose"])
def test_maps_are_edits(run, sources, kind, capsys):
    """Their instruction is a setting of the model."""
    prompt = f"draw the {kind} of the picture"
    main(["--image", "a.png", f"--{kind}", "--run", str(run), "--out", "map.png"])
    assert capsys.readouterr().out == f"map.png\t{prompt}\n"
    assert Image.open("map.png").text["prompt"] == prompt
    main(["--image", "a.png", "--edit", prompt, "--run", str(run), "--out", "edit.png"])
    assert (pixels("map.png") == pixels("edit.png")).all()


# ---------------------------------------------------------------- films

def film_of(path):
    """Number of frames, and the milliseconds of the last."""
    with Image.open(path) as gif:
        gif.seek(gif.n_frames - 1)
        return gif.n_frames, gif.info["duration"]


def last_tile(strip, side):
    """The rightmost picture of side x side in a strip of four frames under a title of one line."""
    picture = pixels(strip)
    top = GAP + LINE + GAP
    return picture[top:top + side, -GAP - side:-GAP]


def test_a_film_of_a_picture(run, inside, capsys):
    """Four noise levels for three steps. The last clean estimate is the picture itself."""
    main([BLUE, "--run", str(run), "--out", "a.png", "--film", "deep/film.gif"])
    assert capsys.readouterr().out == f"a.png\t{BLUE}\ndeep/film.gif\tdeep/film.png\n"
    assert film_of("deep/film.gif") == (4, 3000)
    main([BLUE, "--run", str(run), "--out", "b.png"])
    assert (pixels("a.png") == pixels("b.png")).all()
    enlarged = pixels("a.png").repeat(TILE // 32, 0).repeat(TILE // 32, 1)
    assert (last_tile("deep/film.png", TILE) == enlarged).all()


@pytest.mark.parametrize("task", [
    ["--edit", BLUE], ["--edges"], ["--width", "32", "--height", "48", "--pose"]])
def test_a_film_of_an_edit_begins_with_the_source(run, sources, inside, task):
    main(["--image", "a.png", *task, "--run", str(run), "--out", "c.png", "--film", "film.gif"])
    assert film_of("film.gif") == (4, 3000)
    source = to_pictures(load_image("a.png", pixels("c.png").shape[:2])[None])[0]
    scale, top = TILE // max(source.shape), GAP + LINE + GAP
    shown = source.repeat(scale, 0).repeat(scale, 1)
    assert (pixels("film.png")[top:, GAP:][:shown.shape[0], :shown.shape[1]] == shown).all()


@pytest.mark.parametrize("task", [
    ["--describe", "a.png"], ["--image", "a.png", "--ask", "a red circle"],
    ["--image", "a.png", "--ask", "a red circle", "--dialogue"],
    ["--describe", "a.png", "--order", "ancestral", "--temperature", "1"]])
def test_a_film_of_a_text(run, sources, inside, task, capsys):
    main([*task, "--run", str(run)])
    text = capsys.readouterr().out
    main([*task, "--run", str(run), "--film", "film.gif"])
    assert capsys.readouterr().out == f"{text}film.gif\tfilm.png\n"
    frames, pause = film_of("film.gif")
    assert pause == 3000 and frames == 7 or "ancestral" in task     # text_steps = 6
    assert (inside / "film.png").is_file() and not (inside / "pictures").exists()


def test_latents_of_a_film_are_decoded_few_at_a_time(run, inside, monkeypatch):
    """They wait on the host, and the autoencoder has its turn after the last step."""
    counts, stages = [], []
    decode, stage = Pipeline.decode_latents, Pipeline.stage
    monkeypatch.setattr(Pipeline, "decode_latents", lambda self, latents: (
        counts.append(len(latents)), decode(self, latents))[1])
    monkeypatch.setattr(Pipeline, "stage", lambda self, *names: (
        stages.append(names), stage(self, *names))[1])
    main([PROMPT, "--run", str(run), "--steps", "5", "--film", "film.gif"])
    assert counts[0] == 1 and sorted(counts[1:]) == [2, 2, 4, 4]    # six states and six estimates
    assert stages[-1] == ("vae",)


# ---------------------------------------------------------------- help, errors and warnings

def test_missing_run(inside):
    message = stopped([PROMPT, "--run", "runs/none"])
    assert "runs/none" in message and "train.py" in message


@pytest.mark.parametrize("name, words", [
    ("tokenizer.model", "tokenizer.model: no such file"),
    ("vae.safetensors", "vae.safetensors: no such file"),
    ("text_encoder.safetensors", "text_encoder.safetensors: no such file"),
    ("run.json", "holds no trained model"),
    ("checkpoint-00000001/ema.safetensors", "holds no trained model")])
def test_a_run_that_lacks_a_file(run, inside, name, words):
    (shutil.copytree(run, inside / "run") / name).unlink()
    message = stopped([PROMPT, "--run", str(inside / "run")])
    assert str(inside / "run") in message and words in message


@pytest.mark.parametrize("content, words", [
    ('{"sampling": {"image_size": "big"}}', "image_size"),
    ('{"sampling": {"size": 3}}', "size"),
    ("{}", "sampling"),
    ("{", "run.json")])
def test_a_run_with_a_damaged_run_json(run, inside, content, words):
    (shutil.copytree(run, inside / "run") / "run.json").write_text(content)
    message = stopped([PROMPT, "--run", str(inside / "run")])
    assert words in message and "run.json" in message


def test_unreadable_picture(run, inside):
    Image.new("RGB", (32, 32)).save("good.png")
    (inside / "bad.png").write_bytes((inside / "good.png").read_bytes()[:40])
    captioned = ["--describe", "good.png", "bad.png", "--run", str(run)]
    assert "bad.png" in stopped(captioned)
    edited = ["--edit", "a", "--image", "good.png", "bad.png", "--run", str(run)]
    assert "bad.png" in stopped(edited)
    assert not (inside / "pictures").exists()


def test_impossible_steps(run, inside):
    assert "steps = 0" in stopped([PROMPT, "--run", str(run), "--steps", "0"])
    assert not (inside / "pictures").exists()


def test_an_out_that_is_no_folder(run, inside):
    (inside / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as exit:
        main([PROMPT, "--run", str(run), "--out", "notes.txt"])
    assert "notes.txt" in str(exit.value.code) or exit.value.code == 2


def test_unknown_words_cause_a_warning(run, inside, capsys):
    main(["a red zebra! circle", "a red circle", "--run", str(run), "--steps", "1"])
    lines = capsys.readouterr().err.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert warnings == [
        "warning: 'a red zebra! circle': not in the model's vocabulary: zebra!"]


def test_long_prompts_cause_a_warning(run, inside, capsys):
    main(["red circle " * 60, "--run", str(run), "--steps", "1"])
    pattern = r"warning: .* tokens, the model reads 48: the end is cut off"
    assert re.search(pattern, capsys.readouterr().err)


def test_parts_of_released_layouts_in_place_of_a_run(run, inside):
    """--model with its parts: the reference transformer, an autoencoder of 16 channels, a T5."""
    torch.manual_seed(0)
    weights, _, _, config = golden("unialignment_mmdit")
    (inside / "transformer").mkdir()
    save_file(weights, inside / "transformer" / "x.safetensors")
    (inside / "transformer" / "config.json").write_text(json.dumps(config))
    vae = VAE(VAEConfig(block_channels=(8, 8), layers_per_block=1, norm_groups=4, stem=4))
    save(inside / "vae.safetensors", vae.state_dict(), vae.config)
    main([PROMPT, "--model", str(inside), "--vae", "vae.safetensors",
          "--t5", str(run / "text_encoder.safetensors"),
          "--tokenizer", str(run / "tokenizer.model"),
          "--image-size", "64", "--steps", "2", "--out", "x.png"])
    assert Image.open("x.png").size == (64, 64)
    assert settings_of("x.png") == {
        "seed": 0, "steps": 2, "shift": 3.0, "guidance": 7.0, "negative": DUAL.negative_prompt,
        "model": str(inside)}


def test_a_checkpoint_of_a_run_brings_the_parts_and_settings_of_the_run(run, inside):
    weights = run / "checkpoint-00000001" / "ema.safetensors"
    main([PROMPT, "--model", str(weights), "--out", "m.png"])
    main([PROMPT, "--run", str(run), "--out", "r.png"])
    assert (pixels("m.png") == pixels("r.png")).all()


# ---------------------------------------------------------------- what is done is written

PROMPTS = [f"a red circle and {i} squares" for i in range(40)]


def write_prompts(prompts=PROMPTS):
    with open("prompts.txt", "w", encoding="utf-8") as file:
        file.writelines(f"{prompt}\n" for prompt in prompts)


def interrupted(arguments, capsys):
    """The lines on stdout and the last line on stderr of a command that Ctrl-C ends."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    printed = capsys.readouterr()
    assert exit.value.code == 130 and "Traceback" not in printed.err
    return printed.out.splitlines(), printed.err.splitlines()[-1]


def fail_at(monkeypatch, method, number, error):
    """Make the `number`-th call of a method of Pipeline fail; returns the arguments of all."""
    calls, original = [], getattr(Pipeline, method)

    def call(self, *args, **options):
        calls.append(args)
        if len(calls) == number:
            raise error
        return original(self, *args, **options)
    monkeypatch.setattr(Pipeline, method, call)
    return calls


def test_each_batch_of_prompts_is_written_before_the_next(run, inside, monkeypatch, capsys):
    write_prompts()
    calls = fail_at(monkeypatch, "draw", 3, KeyboardInterrupt())
    arguments = ["--prompts", "prompts.txt", "--run", str(run), "--steps", "1", "--seed", "5"]
    lines, ending = interrupted(arguments, capsys)
    assert ending == "interrupted; 32 of 40 pictures are written, in pictures"
    names = [f"pictures/{i + 1:04d}.png" for i in range(32)]
    assert lines == [f"{name}\t{prompt}" for name, prompt in zip(names, PROMPTS)]
    assert sorted(map(str, (inside / "pictures").iterdir())) == [str(inside / n) for n in names]
    assert [(len(call[0]), call[1][0]) for call in calls] == [(16, 5), (16, 21), (8, 37)]
    monkeypatch.undo()
    alone = Pipeline.from_run(run).draw(PROMPTS[20:21], seed=25, steps=1)
    assert np.abs(pixels(inside / names[20]) - to_pictures(alone)[0]).max() <= 1


def test_each_turn_is_written_before_the_next(run, sources, inside, monkeypatch, capsys):
    fail_at(monkeypatch, "edit", 3, KeyboardInterrupt())
    turns = ["--edit=a circle"] * 4
    lines, ending = interrupted(
        ["--image", "a.png", *turns, "--run", str(run), "--out", "deep/x.png"], capsys)
    assert lines == ["deep/x-1.png\ta circle", "deep/x-2.png\ta circle"]
    assert ending == "interrupted; 2 of 4 pictures are written, in deep"
    assert sorted(f.name for f in (inside / "deep").iterdir()) == ["x-1.png", "x-2.png"]


def test_pictures_are_described_in_batches(run, inside, monkeypatch, capsys):
    names = [f"{i}.png" for i in range(20)]
    for i, name in enumerate(names):
        Image.new("RGB", (32, 32), (10 * i, 128, 90)).save(name)
    describe = ["--describe", *names, "--run", str(run)]
    main(describe)
    lines = capsys.readouterr().out.splitlines()
    images = torch.stack([load_image(name, 32) for name in names])
    assert lines == [f"{n}\t{t}" for n, t in zip(names, Pipeline.from_run(run).caption(images))]
    calls = fail_at(monkeypatch, "caption", 2, KeyboardInterrupt())
    written, ending = interrupted([*describe, "--seed", "7"], capsys)
    assert written == lines[:16] and ending == "interrupted; 16 of 20 texts are written"
    assert [(len(call[0]), call[1]) for call in calls] == [(16, 7), (4, 23)]


def test_a_picture_that_cannot_be_read_does_not_cost_the_others(run, inside, capsys):
    for name in ("a.png", "c.png"):
        Image.new("RGB", (32, 32), (10, 128, 90)).save(name)
    (inside / "b.png").write_bytes(b"no picture")
    message = stopped(["--describe", "a.png", "b.png", "c.png", "b.png", "--run", str(run)])
    assert message.count("b.png: cannot") == 1 and message.endswith("; 2 of 4 texts are written")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["a.png", "c.png"]


def test_a_real_interrupt(run, inside):
    write_prompts(PROMPTS * 50)
    command = [sys.executable, SAMPLE, "--prompts", "prompts.txt", "--run", str(run),
               "--device", "cpu"]
    with open("out.txt", "w") as out, open("err.txt", "w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        deadline = time.monotonic() + 60
        while not Path("out.txt").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    count, err = len(list((inside / "pictures").iterdir())), Path("err.txt").read_text()
    assert 0 < count < 2000 and count == len(Path("out.txt").read_text().splitlines())
    ending = f"interrupted; {count} of 2000 pictures are written, in pictures"
    assert err.splitlines()[-1] == ending and "Traceback" not in err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_that_cannot_show_a_letter(run, inside, monkeypatch, encoding):
    out, err = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, encoding=encoding))
    monkeypatch.setattr("sys.stderr", io.TextIOWrapper(err, encoding=encoding))
    main(["ein r\u00f6tliches \u5706", "a red circle", "--run", str(run), "--steps", "1"])
    sys.stderr.flush()
    shown = r"ein r\xf6tliches" if encoding == "ascii" else "ein r\u00f6tliches"
    lines = out.getvalue().decode(encoding).splitlines()
    assert lines == [f"pictures/0001.png\t{shown} \\u5706", "pictures/0002.png\ta red circle"]
    assert "warning: " in err.getvalue().decode(encoding)
    assert Image.open("pictures/0001.png").text["prompt"] == "ein r\u00f6tliches \u5706"


def test_a_closed_pipe_ends_quietly(run, inside, monkeypatch, capsys):
    write_prompts()
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        with pytest.raises(SystemExit) as exit:
            main(["--prompts", "prompts.txt", "--run", str(run), "--steps", "1"])
    assert exit.value.code == 1                                 # and closing it does not fail
    assert not [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert len(list((inside / "pictures").iterdir())) == 1


def test_a_full_disk_keeps_the_pictures_before(run, inside, monkeypatch, capsys):
    write_prompts()
    save_image, saved = Image.Image.save, []

    def save_until_full(self, file, **options):
        saved.append(file)
        if len(saved) == 19:
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_image(self, file, **options)
    monkeypatch.setattr(Image.Image, "save", save_until_full)
    message = stopped(["--prompts", "prompts.txt", "--run", str(run), "--steps", "1"])
    assert "pictures/0019.png" in message and "No space left on device" in message
    assert message.endswith("; 18 of 40 pictures are written, in pictures")
    names = sorted(f.name for f in (inside / "pictures").iterdir())
    assert names == [f"{i + 1:04d}.png" for i in range(18)]


def test_a_name_that_another_run_takes_meanwhile(run, inside, monkeypatch, capsys):
    draw = Pipeline.draw

    def draw_meanwhile(self, *args, **options):
        for name in ("0001", "0002", "\u00b2"):                 # the last is no number
            (inside / f"pictures/{name}.png").write_bytes(b"mine")
        return draw(self, *args, **options)
    (inside / "pictures").mkdir()
    monkeypatch.setattr(Pipeline, "draw", draw_meanwhile)
    main(["a circle", "a square", "--run", str(run), "--steps", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["pictures/0003.png\ta circle", "pictures/0004.png\ta square"]
    assert (inside / "pictures/0001.png").read_bytes() == b"mine"


def test_a_turn_edits_the_result_whose_name_was_taken(run, sources, inside, monkeypatch, capsys):
    (inside / "pictures").mkdir()
    edit, given = Pipeline.edit, []

    def edit_meanwhile(self, prompts, images, *args, **options):
        given.append(images[0])
        Image.new("RGB", (32, 32)).save(inside / "pictures/0001.png")
        return edit(self, prompts, images, *args, **options)
    monkeypatch.setattr(Pipeline, "edit", edit_meanwhile)
    main(["--image", "a.png", "--edit", "a circle", "--edit", "a square", "--run", str(run),
          "--steps", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["pictures/0002.png\ta circle", "pictures/0003.png\ta square"]
    assert torch.equal(given[1], load_image("pictures/0002.png", 32)[None])


@pytest.mark.parametrize("error", [
    torch.cuda.OutOfMemoryError("Tried to allocate 9 GiB"), MemoryError("9 GiB"),
    PermissionError(errno.EACCES, "Permission denied", "ema.safetensors")])
def test_failures_of_the_machine_have_no_traceback(run, inside, monkeypatch, error):
    fail_at(monkeypatch, "draw", 1, error)
    message = stopped([PROMPT, "--run", str(run)])
    assert str(error) in message and len(message.splitlines()) == 1
    assert ("out of memory" in message) == (not isinstance(error, OSError))


def test_pictures_without_numbers(run, inside, monkeypatch):
    monkeypatch.setattr(VAE, "decode", lambda self, latents: torch.full((1, 3, 32, 32), torch.nan))
    assert "no numbers" in stopped([PROMPT, "--run", str(run)])
    assert not (inside / "pictures").exists()


# ---------------------------------------------------------------- options

@pytest.mark.parametrize("option, value", [
    ("--steps", "-3"), ("--steps", "9" * 30), ("--guidance", "nan"), ("--guidance", "inf"),
    ("--guidance", "-1"), ("--guidance", "1e38"), ("--image-size", "0")])
def test_numbers_out_of_range_when_drawing(run, inside, option, value):
    source = ["--model", "none", "--tokenizer", "none"] if "size" in option else ["--run", str(run)]
    assert f"{option} = {value[0]}" in stopped([PROMPT, *source, option, value])


@pytest.mark.parametrize("option, value", [
    ("--temperature", "nan"), ("--temperature", "-0.5"), ("--temperature", "inf"),
    ("--steps", "0")])
def test_numbers_out_of_range_when_writing(sources, option, value):
    message = stopped(["--describe", "a.png", "--run", "none", option, value])
    assert f"{option} = {value[:2]}" in message


def test_image_guidance_out_of_range(sources):
    edit = ["--image", "a.png", "--edit", "a", "--run", "none", "--image-guidance"]
    assert "--image-guidance = nan" in stopped([*edit, "nan"])


@pytest.mark.parametrize("seed", [-1, -2 ** 80, 2 ** 63, 2 ** 64 - 3, 10 ** 40])
def test_any_integer_is_a_seed(run, sources, seed, capsys):
    main([PROMPT, BLUE, "--run", str(run), "--steps", "1", f"--seed={seed}"])
    within = Pipeline.from_run(run).draw([PROMPT], seed=seed % 2 ** 63, steps=1)
    assert np.abs(pixels("pictures/0001.png") - to_pictures(within)[0]).max() <= 1
    assert settings_of("pictures/0002.png")["seed"] == seed + 1
    main(["--describe", "a.png", "--run", str(run), "--temperature", "1", f"--seed={seed}"])


def test_an_image_size_beyond_the_positions(run, inside):
    folder = shutil.copytree(run, inside / "run")
    sizes = SETTINGS | {"image_size": 144}                      # 8 patches of 16 pixels
    (folder / "run.json").write_text(json.dumps({"sampling": sizes}))
    message = stopped([PROMPT, "--run", "run"])
    assert "image size 144 x 144: expected multiples of 16, at most 128" in message


def test_a_run_with_settings_out_of_range(run, inside):
    folder = shutil.copytree(run, inside / "run")
    (folder / "run.json").write_text(json.dumps({"sampling": SETTINGS | {"guidance": -1.0}}))
    assert "sampling.guidance -1.0" in stopped([PROMPT, "--run", "run"])


# ---------------------------------------------------------------- texts and names of any system

@pytest.mark.parametrize("content", [
    f"\ufeff{PROMPT}\r\n\r\n{BLUE}", f"\ufeff\r{PROMPT}\r  \r\ufeff{BLUE}\r",
    f"\n\u2003\n\t{PROMPT}\n\ufeff\n{BLUE}\n"])
def test_byte_order_marks_and_empty_lines(run, inside, content):
    (inside / "prompts.txt").write_bytes(content.encode("utf-8"))
    main(["--prompts", "prompts.txt", "--run", str(run), "--steps", "1"])
    names = sorted((inside / "pictures").iterdir())
    assert [Image.open(name).text["prompt"] for name in names] == [PROMPT, BLUE]


def test_a_line_separator_within_a_prompt(run, inside):
    (inside / "prompts.txt").write_bytes("a red\u2028circle\n".encode())
    main(["--prompts", "prompts.txt", "--run", str(run), "--steps", "1"])
    assert Image.open("pictures/0001.png").text["prompt"] == "a red\u2028circle"


def test_an_empty_prompt_is_drawn_with_a_warning(run, inside, capsys):
    main(["", "--run", str(run), "--guidance", "1"])
    assert "warning: '': an empty text" in capsys.readouterr().err
    unguided = Pipeline.from_run(run).draw([""], guidance=1.0)
    assert np.abs(pixels("pictures/0001.png") - to_pictures(unguided)[0]).max() <= 1


@pytest.mark.parametrize("stored, typed", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_another_normal_form(run, inside, capsys, stored, typed):
    name = unicodedata.normalize(stored, "\u00e9t\u00e9.png")
    Image.new("RGB", (32, 32), (220, 128, 35)).save(name)
    name = unicodedata.normalize(typed, name)
    main(["--describe", name, "--run", str(run)])
    assert capsys.readouterr().out.startswith(f"{name}\t")
    main(["--image", name, "--edges", "--run", str(run), "--steps", "1"])


# ---------------------------------------------------------------- a device without float64

class Apple(TorchFunctionMode):
    """Plays a device without float64: the tensors of this class, and `device="mps"`."""

    class Tensor(torch.Tensor):
        @property
        def device(self):
            return torch.device("mps")

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        here = any(isinstance(x, self.Tensor) for x in args)
        if "device" in kwargs:
            here = torch.device(kwargs["device"] or "cpu").type == "mps"
            kwargs["device"] = "cpu"
        elif name == "to":
            targets = [x for x in args[1:] if isinstance(x, (str, torch.device))]
            here = torch.device(targets[0]).type == "mps" if targets else here
            args = [torch.device("cpu") if x in targets else x for x in args]
        plain = [x.as_subclass(torch.Tensor) if isinstance(x, self.Tensor) else x for x in args]
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*plain, **kwargs)
        if not here or not isinstance(result, torch.Tensor):
            return result
        if result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result.as_subclass(self.Tensor)


@pytest.mark.parametrize("order", ORDERS)
def test_texts_on_a_device_without_float64(order):
    """They are those of the CPU, and only ids go to the model."""
    logits = torch.randn(30, 7, generator=seeded())
    options = {"steps": 4, "order": order, "temperature": 1.0}
    expected = Fake(logits).describe(all_masked(2, 30), **options, generator=seeded(1))
    with Apple():
        assert float64_device(torch.device("mps")).type == "cpu"
        with pytest.raises(TypeError, match="float64"):
            logits.as_subclass(Apple.Tensor).double()
        fake = Fake(logits.as_subclass(Apple.Tensor))
        tokens = fake.describe(
            all_masked(2, 30).as_subclass(Apple.Tensor), **options, generator=seeded(1))
        states = [type(state) for state in fake.states]
    assert type(tokens) is Apple.Tensor and set(states) == {Apple.Tensor}
    assert torch.equal(tokens.as_subclass(torch.Tensor), expected)
