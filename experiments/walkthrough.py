"""Follow one held-out pair of the shapes world through the whole method, step by step.

    python -m experiments.walkthrough --run runs/tiny

Each step says what happens and why, shows the line of code, and gives shapes and numbers. The lines
are read from the source and the numbers come from the run's model, so nothing here goes stale. The
text appears on the screen; walkthrough.html in the run's folder has the pictures as well.
"""
import argparse
import contextlib
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losses
from checkpoint import write_atomically
from config import RunFiles, parts_of, read_config
from data import Tasks, text_lengths, to_pictures
from experiments import language
from experiments.evaluate import held_out_examples, scene_of
from experiments.narration import (Code, Heading, Paragraph, Part, Pictures, Table, as_text,
                                   equation, page, statement)
from model import JointBlock, MMDiT, Stream, modulate, patchify
from records import parse_line, parse_record, read_lines
from sample import Pipeline, describe, draw_tokens, flow_sigmas, generate, probability_of, seeded
from teacher import load_teacher
from text_encoder import T5Encoder, T5Tokenizer
from train import Objective, corrupt, online_features, train
from vae import VAE

BATCH = 8                           # pairs in the batch, as equation (3) compares pairs
STEPS = 4                           # of each sampling
MASK = "____"                       # the mask token, as it is shown


# ---------------------------------------------------------------- a pair and its run

class Walk:
    """A held-out pair with its run. The steps add what they compute.

    Raises ValueError for a run without a model, or one that is not on the shapes world.
    """

    def __init__(self, run: Path, number: int = 0, seed: int = 0):
        self.pipeline, self.seed = Pipeline.from_run(run), seed
        self.config = read_config(RunFiles(run).config)
        self.parts, self.settings = parts_of(self.config, run), self.config.sampling
        self.tokenizer: T5Tokenizer = self.pipeline.tokenizer
        pairs = [e for e in held_out_examples(run)
                 if not e.sources and e.prompt == e.caption and language.parse_caption(e.caption)]
        if not 0 <= number < len(pairs):
            raise ValueError(f"--example {number}: {self.parts.test} has {len(pairs)} pairs of a "
                             f"picture and its full caption, expected 0 to {len(pairs) - 1}")
        chosen = range(number, number + min(BATCH, len(pairs)))
        self.pairs = [pairs[i % len(pairs)] for i in chosen]
        self.pair = self.pairs[0]

    def pieces(self, ids: Tensor) -> list[str]:
        """The text of each token of ids (n,)."""
        mask_id = self.tokenizer.mask_id
        return [MASK if i == mask_id else self.tokenizer.piece(i) for i in ids.tolist()]

    def decode(self, *latents: Tensor) -> list[np.ndarray]:
        """Latents (n, C, h, w) each -> pictures (H, W, 3) uint8."""
        return list(to_pictures(self.pipeline.vae.decode(torch.cat(latents))))


@contextlib.contextmanager
def recorded(module: nn.Module) -> Iterator[list[tuple[tuple, object]]]:
    """Record inputs and output of each forward pass of a module."""
    calls: list[tuple[tuple, object]] = []
    handle = module.register_forward_hook(lambda _, *call: calls.append(call))
    try:
        yield calls
    finally:
        handle.remove()


def attention_weights(block: JointBlock, image: Tensor, text: Tensor,
                      condition: Tensor) -> tuple[Tensor, Tensor]:
    """The weights (B, heads, N + L, N + L) of a block's attention and its result (B, N + L, D).

    The block's fused kernel gives the result alone.
    """
    pairs = zip(*(stream.queries_keys_values(x, stream.modulations(condition)[0])
                  for stream, x in ((block.image, image), (block.text, text))))
    q, k, v = (torch.cat(pair, dim=2) for pair in pairs)                    # (B, heads, N + L, d)
    scores = block.q_norm(q) @ block.k_norm(k).transpose(-2, -1) / math.sqrt(q.shape[-1])
    weights = scores.softmax(dim=-1)                                        # (B, heads, N+L, N+L)
    return weights, (weights @ v).transpose(1, 2).flatten(2)


def shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def some(x: Tensor, count: int = 4) -> str:
    """The first numbers of a tensor."""
    return ", ".join(f"{value:.2f}" for value in x.flatten()[:count].tolist()) + ", ..."


def grey(values: Tensor) -> np.ndarray:
    """Numbers (h, w) as a picture, the lowest black and the highest white."""
    shares = (values - values.min()) / (values.max() - values.min())        # (h, w)
    return to_pictures((2 * shares - 1).expand(1, 3, -1, -1))[0]


def lit(image: Tensor, weights: Tensor) -> np.ndarray:
    """An image (3, H, W) that fades to white where the weights (h, w) are low."""
    shares = F.interpolate((weights / weights.max())[None, None], image.shape[1:])[0]   # (1, H, W)
    return to_pictures((1 - (1 - image) * (0.05 + 0.95 * shares))[None])[0]


def difference(a: np.ndarray, b: np.ndarray) -> str:
    return f"{np.abs(a.astype(float) - b).mean():.1f} of 255"


# ---------------------------------------------------------------- the steps: one training step

def show_record(w: Walk) -> Iterator[Part]:
    s = w.settings
    yield Heading("A record")
    yield Paragraph("""Data is JSON lines; a record names a picture and a text. This one is held
        out: no training picture has the same objects in the same places.""")
    line = next(line for line in read_lines(w.parts.test)
                if w.pair in parse_line(line.content, w.parts.test, line.number))
    yield Code(f"{w.parts.test.name}:{line.number}", "", json.dumps(json.loads(line.content)))
    yield Paragraph("""The parser makes an example of it. An example with a prompt trains the
        drawing of its picture, one with a caption the writing about it. A pair trains both, and
        prompt and caption are the same text.""")
    yield statement(parse_record, 'task or "text_to_image"')
    dataset = Tasks(w.pairs, w.tokenizer, s.image_size, s.text_length)
    w.batch = dataset.__getitems__(list(range(len(w.pairs))))
    if w.batch.skipped:
        raise ValueError("; ".join(reason for _, reason in w.batch.skipped))
    w.picture = to_pictures(w.batch.images[:1, 0])[0]
    yield Pictures([(w.picture, w.pair.caption)])
    yield Paragraph(f"""Training takes batches. Ours has B = {len(w.pairs)} pairs, and this one is
        the first. Shapes below are those of the batch, numbers those of this pair.""")
    yield statement(Tasks.__getitems__, "return Batch(")
    yield Table(["of the batch", "shape"],
                [["images, values from -1 to 1", shape(w.batch.images[:, 0])],
                 ["prompts, ids of the text to draw", shape(w.batch.prompts)],
                 ["tokens, ids of the text to write", shape(w.batch.tokens)]])


def show_tokens(w: Walk) -> Iterator[Part]:
    yield Heading("Text to tokens")
    yield Paragraph("""A model reads numbers. The tokenizer cuts a text into pieces, the tokens, and
        gives each its id. The sign ▁ stands for a space; `</s>` ends the text.""")
    yield statement(T5Tokenizer.encode, "return ids +")
    [w.count] = text_lengths(w.batch.tokens[:1], w.tokenizer.eos_id)
    ids = w.batch.tokens[0, :w.count]                                       # (count,)
    yield Table(["position", "id", "piece"],
                list(zip(range(w.count), ids.tolist(), w.pieces(ids))))
    yield Paragraph(f"""These are {w.count} tokens. Padding (id {w.tokenizer.padding_id}) fills the
        row up to {w.settings.text_length}, so that texts of any length make one tensor. The
        vocabulary has {w.tokenizer.vocab_size} tokens. The last, id {w.tokenizer.mask_id}, is the
        mask token: it stands for a hidden one.""")
    yield statement(T5Tokenizer.__call__, "self._fit(")


def show_embeddings(w: Walk) -> Iterator[Part]:
    yield Heading("Tokens to embeddings: T5")
    yield Paragraph("""The text encoder, T5, turns each id into a vector: a row of a table, then
        blocks of self-attention, in which the tokens of a text see each other. T5 is frozen:
        training does not change it.""")
    yield statement(T5Encoder.forward, "x = self.embedding(ids)")
    yield statement(T5Encoder.forward, "x = block(x, bias)")
    w.embeddings = w.pipeline.text_encoder(w.batch.prompts)                 # (B, L, D)
    if not w.config.t5_path:
        yield Paragraph("""The paper uses T5-XXL, with 4.7 billion weights. This run has a small T5
            of random weights: even that tells tokens apart.""")
    yield Table(["", "shape", "first numbers"],
                [["ids", shape(w.batch.prompts), w.batch.prompts[0, :4].tolist()],
                 ["embeddings", shape(w.embeddings), some(w.embeddings)]])
    row = w.batch.prompts[0].tolist()
    second = next(i for i, token in enumerate(row) if token in row[:i])     # padding at the latest
    first = row.index(row[second])
    cosine = F.cosine_similarity(w.embeddings[0, first], w.embeddings[0, second], dim=0)
    yield Paragraph(f"""The tokens at positions {first} and {second} are the same,
        `{w.pieces(w.batch.prompts[0])[first]}`. In the table both are one vector. After the blocks
        their cosine is {cosine:.4f}: each has taken in some of its context.""")


def show_latents(w: Walk) -> Iterator[Part]:
    yield Heading("Picture to latents: the autoencoder")
    yield Paragraph("""Diffusion on pixels is slow. So an autoencoder (VAE), frozen as well, encodes
        the picture to latents x: fewer places, more channels, about unit variance over all
        pictures. From here on x is the picture. Pixels come back at the very end.""")
    yield statement(VAE.encode, "return (z - self.config.shift)")
    image = w.batch.images[:, 0]                                            # (B, 3, H, W)
    w.latents = w.pipeline.vae.encode(image)                                # (B, C, h, w)
    yield Table(["", "shape", "numbers a picture", "standard deviation"],
                [[name, shape(x), x[0].numel(), f"{x[0].std():.2f}"]
                 for name, x in (("image", image), ("latents x", w.latents))])
    [decoded] = w.decode(w.latents[:1])
    yield Pictures([(w.picture, "image"), (decoded, "decoded latents")])
    channels = torch.cat(list(w.latents[0]), dim=1)                         # (h, C w)
    yield Pictures([(grey(channels), "the channels of the latents")], 40)
    yield Paragraph(f"""What decoding gives back differs from the picture by
        {difference(w.picture, decoded)}, on average.""")


def show_noise(w: Walk) -> Iterator[Part]:
    yield Heading("Image branch: noise on the picture")
    empty = w.tokenizer([""], length=w.settings.text_length)                # (1, L)
    w.corrupted = c = corrupt(w.batch, w.latents[:, None], w.pipeline.text_encoder,
                              w.tokenizer.mask_id, empty, seeded(w.seed), w.config)
    sigma = c.sigma[0].item()
    yield Paragraph("""Flow matching draws a straight line from the picture x to noise e. The noise
        level sigma says where on the line: 0 is the picture, 1 the noise. Training draws e and
        sigma at random and shows the model the point z between them. The model shall say the line's
        direction, the velocity e - x.""")
    yield statement(corrupt, "sigma = logit_normal_sigmas(")
    yield statement(corrupt, "noisy = (1 - s)")
    yield Table(["", "shape", "numbers"],
                [["sigma of each pair", shape(c.sigma), some(c.sigma, len(c.sigma))],
                 ["latents x", shape(c.latents), some(c.latents)],
                 ["noise e", shape(c.noise), some(c.noise)],
                 [f"z = {1 - sigma:.2f} x + {sigma:.2f} e", shape(c.noisy), some(c.noisy)]])
    labels = "x", f"z, sigma {sigma:.2f}", "e"
    yield Pictures(list(zip(w.decode(c.latents[:1], c.noisy[:1], c.noise[:1]), labels)))
    is_kept = torch.allclose(w.embeddings[0], c.prompts[0], atol=1e-4)
    yield Paragraph(f"""In this branch the text has no masks. In {w.config.prompt_dropout:.0%} of
        the pairs the empty text takes its place, so that the model also learns to draw without a
        prompt: sampling needs that. Here the prompt is {"kept" if is_kept else "dropped"}.""")
    yield statement(corrupt, 'texts["prompts"] =')


def show_masks(w: Walk) -> Iterator[Part]:
    c = w.corrupted
    yield Heading("Text branch: masks on the text")
    yield Paragraph("""Masks are to a text what noise is to a picture. Training draws t at random
        and masks each token with probability t. At 0 the text is whole, at 1 nothing is left. The
        model shall say the masked tokens. In this branch the picture has no noise.""")
    yield statement(corrupt, "mask = batch.answer &")
    yield statement(corrupt, 'texts["masked"] =')
    w.masked = torch.where(c.mask[0], w.tokenizer.mask_id, c.tokens[0])     # (L,)
    yield Paragraph(f"""Here t = {c.t[0]:.2f}, and {c.mask[0].sum()} of {len(w.masked)} tokens are
        masked; padding is masked like any token. T5 reads:""")
    yield Code("", "", " ".join(w.pieces(w.masked)))


def show_inputs(w: Walk) -> Iterator[Part]:
    c, model = w.corrupted, w.pipeline.model
    yield Heading("Two streams of tokens")
    yield Paragraph(f"""The transformer works on tokens of one width. In the image stream a token is
        a patch of {model.config.patch_size} x {model.config.patch_size} latent places, times a
        matrix, plus a code of its position. In the text stream it is an embedding of T5, times a
        matrix.""")
    yield statement(MMDiT._embed_image, "return self.patch_embed(")
    yield statement(MMDiT._embed_text, "text = self.text_embed(")
    yield Paragraph("""The timestep says how noisy the picture is: 1000 sigma in the image branch, 0
        in the text branch. It becomes a vector, the condition. Both branches use the same weights,
        so both run as one batch of 2 B rows.""")
    yield statement(MMDiT.forward, "condition = F.silu(")
    yield statement(Objective.branches_in_one_pass, "out = self.model(")
    if w.config.intrinsic_weight:
        features = online_features(w.batch, load_teacher(w.parts.teacher))  # (B, d) each
        w.corrupted = c = c._replace(features=features)
    w.block = block = model.blocks[-1]
    with (recorded(model) as passes, recorded(block) as blocks,
          recorded(block.image.proj) as image_proj, recorded(block.text.proj) as text_proj):
        w.losses = Objective(model, w.config)(c)
    w.output = passes[0][1]
    image, text, w.condition, _ = blocks[0][0]          # (2 B, N, D), (2 B, L, D), (2 B, D)
    w.attended = torch.cat([image_proj[0][0][0], text_proj[0][0][0]], dim=1)    # (2 B, N + L, D)
    w.weights, result = attention_weights(block, image, text, w.condition)
    torch.testing.assert_close(result, w.attended, atol=1e-4, rtol=1e-4)    # it is this attention
    w.patches, b = image.shape[1], len(w.pairs)
    yield Table(["", "shape", ""],
                [["patches of z", shape(patchify(c.noisy, model.config.patch_size)), ""],
                 ["image stream", shape(image), f"rows 0 to {b - 1} noisy, the others clean"],
                 ["text stream", shape(text), f"rows 0 to {b - 1} whole, the others masked"],
                 ["condition", shape(w.condition), "one vector for each row"]])


def show_modulation(w: Walk) -> Iterator[Part]:
    yield Heading("A joint block: modulation by the timestep")
    yield Paragraph("""A block is attention, then an MLP. Each gets its input normalised, scaled and
        shifted; its output is multiplied by a gate and added. Shift, scale and gate depend on the
        condition alone (adaLN-Zero). So the same weights adapt to each noise level.""")
    yield statement(modulate, "return F.layer_norm")
    yield statement(Stream.modulations, "return Modulation(")
    yield statement(Stream.update, "x = x + attn.gate")
    attn, mlp = w.block.image.modulations(w.condition[[0, len(w.pairs)]])   # (2, 1, D) each
    yield Paragraph(f"""The image stream of the last of {len(w.pipeline.model.blocks)} blocks, mean
        absolute values:""")
    yield Table(["", f"sigma {w.corrupted.sigma[0]:.2f}", "sigma 0", "difference"],
                [[f"{kind} {name}", *(f"{x.abs().mean():.2f}" for x in (*part, part[0] - part[1]))]
                 for kind, m in (("attention", attn), ("MLP", mlp))
                 for name, part in m._asdict().items()])


def show_attention(w: Walk) -> Iterator[Part]:
    n, count, side = w.patches, w.count, math.isqrt(w.patches)
    yield Heading("A joint block: attention over both streams")
    yield Paragraph(f"""Each stream computes queries, keys and values with weights of its own.
        Joined, they are {w.weights.shape[-1]} tokens: {n} patches, then the text. Each attends to
        all. Only here the streams meet.""")
    yield statement(Stream.queries_keys_values, "qkv = self.qkv(")
    yield statement(JointBlock.forward, "q, k, v = ")
    yield statement(JointBlock.forward, "attended = attention(")
    draws, writes = w.weights[[0, len(w.pairs)]].mean(dim=1)                # (N + L, N + L) each
    yield Paragraph(f"""The map shows the attention weights, softmax(q k / sqrt(d)), as a mean over
        the heads of the last block. A row is a token with its weights for all tokens; they sum to
        1. In the image branch the patches give {draws[:n, n:].sum(1).mean():.0%} of their attention
        to the text. In the text branch the text gives {writes[n:, :n].sum(1).mean():.0%} to the
        patches.""")
    yield Pictures([(grey(x.sqrt()), f"{name}; the first {n} rows and columns are patches")
                    for x, name in ((draws, "image branch"), (writes, "text branch"))], 14)
    words, shown = w.pieces(w.corrupted.tokens[0, :count]), w.pieces(w.masked[:count])

    yield Paragraph("Image branch: the word to which each patch attends most, and the weight.")
    best = draws[:n, n:n + count].max(dim=1)                                # (N,) each
    cells = [f"{words[j]} {x:.2f}" for x, j in zip(best.values, best.indices)]
    yield Table(["", *(f"column {i}" for i in range(side))],
                [[f"row {i}", *cells[side * i:side * (i + 1)]] for i in range(side)])

    yield Paragraph("""Text branch: the patch (row, column) and the token to which each token
        attends most.""")
    rows = []
    for i, attends in enumerate(writes[n:n + count]):                       # (N + L,)
        (x, patch), (y, word) = attends[:n].max(dim=0), attends[n:n + count].max(dim=0)
        rows.append([i, shown[i], words[i], f"({patch // side}, {patch % side})",
                     f"{x:.2f}", f"{word} {shown[word]}", f"{y:.2f}"])
    yield Table(["position", "token", "truth", "patch", "weight", "token", "weight"], rows)
    yield Paragraph("The same as pictures: a patch fades as it gets less attention.")
    to_patches = writes[n:n + count, :n].unflatten(1, (side, side))         # (count, side, side)
    yield Pictures([(lit(w.batch.images[0, 0], weights), f"{words[i]}{' (masked)' * is_masked}")
                    for i, (weights, is_masked) in enumerate(zip(to_patches, w.corrupted.mask[0]))],
                   5)


def show_heads(w: Walk) -> Iterator[Part]:
    c, out = w.corrupted, w.output
    yield Heading("Heads: a velocity, and a guess for each token")
    yield Paragraph("The image stream becomes the velocity v. It should be e - x.")
    yield statement(MMDiT.forward, "velocity = unpatchify(")
    yield Table(["", "shape", "numbers"],
                [["velocity v", shape(out.velocity), some(out.velocity)],
                 ["target e - x", shape(c.noise), some(c.noise - c.latents)]])
    estimate = c.noisy[:1] - c.sigma[0] * out.velocity[:1]                  # (1, C, h, w)
    yield Paragraph("""From z back along v by sigma: that is the model's estimate of the clean
        picture, after a single look.""")
    yield Pictures(list(zip(w.decode(c.noisy[:1], estimate, c.latents[:1]),
                            ("z", "z - sigma v", "x"))))
    yield Paragraph("""The text stream becomes logits, from which follows a probability for each
        token of the vocabulary at each position. Those at masked positions count:""")
    yield statement(MMDiT.forward, "logits = self.text_head(")
    mask = c.mask[0]
    logits, truth = out.logits[0, mask], c.tokens[0, mask]                  # (m, vocab), (m,)
    guess = draw_tokens(logits, 0, None)                                    # (m,)
    columns = (mask.nonzero()[:, 0].tolist(), w.pieces(truth), w.pieces(guess),
               *([f"{p:.4f}" for p in probability_of(x, logits)] for x in (guess, truth)))
    yield Table(["position", "truth", "guess", "probability", "of the truth"], list(zip(*columns)))


def show_losses(w: Walk) -> Iterator[Part]:
    c, out, config, pairs = w.corrupted, w.output, w.config, len(w.pairs)
    yield Heading("Five losses")
    yield Paragraph("Each branch has its loss. First the velocity's distance from e - x:")
    yield equation(losses.flow_matching_loss)
    sigma = c.sigma[:1] if config.released_loss else None
    value = losses.flow_matching_loss(out.velocity[:1], c.noise[:1], c.latents[:1], sigma)
    yield Paragraph(f"""For this pair {value:.2g}. A velocity of 0 would cost
        {(c.noise - c.latents)[0].square().mean():.2f}.""")
    yield Paragraph("Then -log of the last column above, summed, divided by t and by the length:")
    yield equation(losses.masked_token_loss)
    value = losses.masked_token_loss(
        out.logits[:1], c.tokens[:1], c.mask[:1], c.t[:1], c.answer[:1])
    yield Paragraph(f"""For this pair {value:.2g}. Guessing among all tokens would cost
        {math.log(w.tokenizer.vocab_size - 1):.1f}, on average.""")
    if "contrastive" in w.losses:
        yield Paragraph(f"""Two more shape what is inside. Cross-modal alignment: the mean state of
            a picture should be closer to that of its own text than to those of the other
            {pairs - 1} texts. Guessing would cost {math.log(pairs):.2f}.""")
        yield equation(losses.contrastive_loss)
    if "intrinsic" in w.losses:
        yield Paragraph(f"""Intrinsic alignment: the mean state after block {config.align_depth},
            through a small head, should point where a frozen teacher points, a model that
            understands pictures. -2 is the best. Only training needs the teacher.""")
        yield equation(losses.intrinsic_loss)
    yield Paragraph("""The sum is what training lowers. The equation has the paper's weights, the
        table those of this run and the mean losses of the batch.""")
    yield equation(losses.total_loss)
    weights = {"flow_matching": 1.0, "masked_token": config.text_weight,
               "contrastive": config.cross_weight, "intrinsic": config.intrinsic_weight}
    yield Table(["loss", "value", "weight", "product"],
                [*([name, f"{w.losses[name]:.4f}", weight, f"{weight * w.losses[name]:.4f}"]
                   for name, weight in weights.items() if name in w.losses),
                 ["sum", "", "", f"{w.losses['loss']:.4f}"]])
    yield statement(Objective.forward, 'losses["loss"] =')
    yield Paragraph("""Then follow the gradient and a step of the optimizer. That is all of
        training; it repeats with batches of all tasks.""")
    yield statement(train, ".backward()")


# ---------------------------------------------------------------- the steps: sampling

def show_drawing(w: Walk) -> Iterator[Part]:
    s, pipeline, (low, high) = w.settings, w.pipeline, w.settings.guidance_interval
    yield Heading(f"Sampling: the picture in {STEPS} steps")
    yield Paragraph(f"""Drawing starts from noise, sigma = 1, and goes the line back. In each step
        the model says v, and x moves along it to the next sigma. This is Euler's method, where
        `slope` is 0. The run itself takes {s.steps} steps of the solver {s.solver}.""")
    yield statement(generate, "x, last = ")
    yield Paragraph(f"""Guidance: v is computed with the prompt and with the empty text, and their
        difference counts {s.guidance:g} times, where sigma is from {low:g} to {high:g}. So the
        picture follows the prompt more closely.""")
    yield statement(generate, "v = v_empty + guidance")
    texts = pipeline.encode_prompts([w.pair.prompt])
    prompt = texts.prompts[0][None]                                         # (1, L, D)
    empty = texts.negative[prompt.shape[1]][None]                           # (1, L, D)
    noise = torch.randn(w.latents[:1].shape, generator=seeded(w.seed))      # (1, C, h, w)
    with recorded(pipeline.model) as passes:
        drawn = generate(pipeline.model, noise, prompt, empty, STEPS, s.guidance, s.shift,
                         guidance_interval=(low, high))
    states = torch.cat([*(inputs[0][:1] for inputs, _ in passes), drawn])   # (steps + 1, C, h, w)
    sigmas = flow_sigmas(STEPS, s.shift).view(-1, 1, 1, 1)                  # (steps + 1, 1, 1, 1)
    velocities = states.diff(dim=0) / sigmas.diff(dim=0)                    # (steps, C, h, w)
    estimates = states[:-1] - sigmas[:-1] * velocities                      # (steps, C, h, w)
    yield Paragraph("""Beside each state is the clean estimate x - sigma v: where the line would end
        if it went on straight.""")
    both = zip(sigmas.flatten(), w.decode(states[:-1]), w.decode(estimates))
    yield Pictures([(picture, f"{name}, sigma {sigma:.3f}") for sigma, *pair in both
                    for picture, name in zip(pair, ("x", "x - sigma v"))], 10)
    [w.drawn] = w.decode(drawn)
    yield Pictures([(w.drawn, "drawn"), (w.picture, "original")])
    read = language.caption(scene_of(w.drawn))
    yield Table(["", "text"], [["prompt", w.pair.prompt], ["what the drawing shows", read]])
    yield Paragraph(f"""The drawing shows {"what" if read == w.pair.prompt else "not what"} the
        prompt says. It differs from the original by {difference(w.drawn, w.picture)}, on average:
        where exactly in its cell an object lies, the prompt does not say.""")


def show_writing(w: Walk) -> Iterator[Part]:
    yield Heading(f"Sampling: the caption in {STEPS} steps")
    yield Paragraph(f"""Writing starts from masks alone and the clean picture. In each step the
        model guesses all masked tokens, and the most probable guesses stay. So words come in any
        order. The run itself takes {w.settings.text_steps} steps.""")
    yield statement(describe, "rank = rank_masked(")
    yield statement(describe, "tokens = tokens.masked_scatter(")
    masks, _ = w.tokenizer.dialogue([""], length=w.settings.text_length)    # (1, L)
    with recorded(w.pipeline.text_encoder) as passes:
        ids = describe(w.pipeline.model, w.pipeline.text_encoder, w.latents[:1], masks,
                       w.tokenizer.mask_id, STEPS, "confidence")            # (1, L)
    seen = [*(inputs[0][0] for inputs, _ in passes), ids[0]]                # (L,) each
    yield Table(["step", "masks", "text"],
                [[i, (row == w.tokenizer.mask_id).sum().item(), " ".join(w.pieces(row))]
                 for i, row in enumerate(seen)])
    [w.written] = w.tokenizer.decode(ids)
    yield Table(["", "text"], [["written", w.written], ["original", w.pair.caption]])
    yield Paragraph(f"The two are {'equal' if w.written == w.pair.caption else 'different'}.")


@torch.no_grad()
def follow(w: Walk) -> Iterator[Part]:
    """Take all steps; yield what each shows as it runs."""
    for step in (show_record, show_tokens, show_embeddings, show_latents, show_noise, show_masks,
                 show_inputs, show_modulation, show_attention, show_heads, show_losses,
                 show_drawing, show_writing):
        yield from step(w)


# ---------------------------------------------------------------- command line

def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        prog="python -m experiments.walkthrough", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, default=Path("runs/tiny"),
                   help="folder of a training run (default: %(default)s)")
    p.add_argument("--example", type=int, default=1,
                   help="number of the held-out pair, from 0 (default: %(default)s)")
    p.add_argument("--seed", type=int, default=12,
                   help="of noise and masks (default: %(default)s, which masks half of the text)")
    a = p.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")      # a letter that the console lacks
    title = "UniAlignment: one example from end to end"
    parts: list[Part] = [Paragraph(f"""One transformer runs two diffusions: noise on pictures, masks
        on texts. This follows pair {a.example} of the held-out world through a step of training,
        then through sampling, with the averaged weights of {a.run} and seed {a.seed}, in float32.
        Above each line of code stands where it is.""")]
    try:
        walk = Walk(a.run, a.example, a.seed)
        print(title, as_text(parts[0]), sep="\n\n")
        for part in follow(walk):
            parts.append(part)
            print(as_text(part), flush=True)
        file, text = a.run / "walkthrough.html", page(title, parts)
        write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"\nThe same with pictures: {file}")


if __name__ == "__main__":
    main()
