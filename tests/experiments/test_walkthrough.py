"""experiments/walkthrough.py: it runs the real functions, and what it says of them is true."""
import importlib
import inspect
import shutil
from dataclasses import replace
from functools import reduce
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ParsedPage

from data import load_image
from experiments import walkthrough
from experiments.narration import ROOT, Code, Heading, Paragraph, Pictures, Table, as_text
from experiments.walkthrough import Walk, follow
from run_folder import load_tasks
from sample import seeded
from teacher import load_teacher
from train import Objective, corrupt, online_features

SECTIONS = ["A record", "Text to tokens", "Tokens to embeddings: T5",
            "Picture to latents: the autoencoder", "Image branch: noise on the picture",
            "Text branch: masks on the text", "Two streams of tokens",
            "A joint block: modulation by the timestep",
            "A joint block: attention over both streams",
            "Heads: a velocity, and a guess for each token", "Five losses",
            "Sampling: the picture in 4 steps", "Sampling: the caption in 4 steps"]


def walk(run: Path, number: int = 1, seed: int = 12) -> SimpleNamespace:
    """Follow an example with random heads: after six steps the run's own are nearly zero."""
    w = Walk(run, number, seed)
    torch.manual_seed(0)
    for head in (w.pipeline.model.image_head, w.pipeline.model.text_head):
        torch.nn.init.normal_(head.weight.data, std=0.3)
    parts = list(follow(w))
    return SimpleNamespace(w=w, parts=parts, text="\n".join(map(as_text, parts)))


@pytest.fixture(scope="module")
def walked(finished):
    return walk(finished)


def tables(walked, column: str) -> list[Table]:
    return [part for part in walked.parts if isinstance(part, Table) and column in part.columns]


def test_every_section_is_there(walked):
    parts = walked.parts
    assert [part.text for part in parts if isinstance(part, Heading)] == SECTIONS
    starts = [i for i, part in enumerate(parts) if isinstance(part, Heading)] + [len(parts)]
    for start, end in zip(starts, starts[1:]):
        kinds = set(map(type, parts[start:end]))
        assert {Paragraph, Code} <= kinds, parts[start].text


def test_lines_of_source_are_where_it_says(walked):
    shown = [part for part in walked.parts if isinstance(part, Code) and part.name]
    assert len(shown) > 30
    for place, name, source in shown:
        file, _, number = place.partition(":")
        first = (ROOT / file).read_text().splitlines()[int(number) - 1].strip().strip('"')
        assert first.split("  #")[0].rstrip() == source.splitlines()[0].split("  #")[0]
        module, _, qualified = name.partition(".")
        function = reduce(getattr, qualified.split("."), importlib.import_module(module))
        lines, start = inspect.getsourcelines(function)
        assert start <= int(number) < start + len(lines) and file == f"{module}.py"


def test_the_losses_are_those_of_the_objective(walked, finished):
    """Of the same pairs and the same noise, computed anew without the walkthrough."""
    w = walked.w
    pipeline, config = w.pipeline, w.config
    examples = [e for e in walkthrough.held_out_examples(finished) if e.prompt == e.caption]
    chosen = [examples[i % 6] for i in range(1, 7)]             # 6 pairs are held out
    ids = w.tokenizer([e.caption for e in chosen], config.sampling.text_length)
    images = torch.stack([load_image(e.image, 64) for e in chosen])
    batch = load_tasks(config, w.parts, w.tokenizer).__getitems__([0])._replace(
        images=images[:, None], prompts=ids, tokens=ids, captions=[e.caption for e in chosen],
        answer=torch.ones_like(ids, dtype=torch.bool))
    batch = batch._replace(features=online_features(batch, load_teacher(w.parts.teacher)))
    with torch.no_grad():
        corrupted = corrupt(
            batch, pipeline.vae.encode(images)[:, None], pipeline.text_encoder,
            w.tokenizer.mask_id, w.tokenizer([""], config.sampling.text_length), seeded(12), config)
        losses = Objective(pipeline.model, config)(corrupted)
    assert len(losses) == 5 and losses.keys() == w.losses.keys()
    for name, value in losses.items():
        assert w.losses[name].item() == pytest.approx(value.item(), abs=1e-6)
    [table] = tables(walked, "product")
    rows = {name: float(value) for name, value, *_ in table.rows if value}
    assert rows == {name: round(losses[name].item(), 4) for name in rows} and len(rows) == 4
    products = [float(product) for *_, product in table.rows]
    assert sum(products[:-1]) == pytest.approx(products[-1], abs=3e-4)
    assert products[-1] == pytest.approx(losses["loss"].item(), abs=1e-4)


def test_the_attention_map(walked):
    """Rows sum to one, and a mean of the values by the rows is what the block computed."""
    w = walked.w
    c, block = w.corrupted, w.block
    n, heads = 64, w.pipeline.model.config.num_heads
    assert w.weights.shape == (2 * 6, heads, n + 32, n + 32)
    torch.testing.assert_close(w.weights.sum(-1), torch.ones(12, heads, n + 32))
    assert w.weights.std() > 0
    seen = {}
    handles = [block.register_forward_pre_hook(lambda _, inputs: seen.update(block=inputs)),
               block.text.proj.register_forward_pre_hook(lambda _, x: seen.update(text=x[0]))]
    with torch.no_grad():
        w.pipeline.model(c.latents, c.masked, c.clean)
        image, text, condition, _ = seen["block"]
        values = torch.cat([stream.queries_keys_values(x, stream.modulations(condition)[0])[2]
                            for stream, x in ((block.image, image), (block.text, text))], dim=2)
    for handle in handles:
        handle.remove()
    result = (w.weights[6:] @ values).transpose(1, 2).flatten(2)                # (B, N + L, D)
    torch.testing.assert_close(result[:, n:], seen["text"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result, w.attended[6:], atol=1e-5, rtol=1e-4)


def test_what_is_masked_is_guessed(walked):
    w = walked.w
    [table] = tables(walked, "guess")
    positions = w.corrupted.mask[0].nonzero()[:, 0].tolist()
    assert [row[0] for row in table.rows] == positions and 0 < len(positions) < 32
    shown = next(part.source.split() for part in walked.parts
                 if isinstance(part, Code) and walkthrough.MASK in part.source)
    assert [i for i, piece in enumerate(shown) if piece == walkthrough.MASK] == positions
    for position, truth, guess, best, own in table.rows:
        logits = w.output.logits[0, position, :-1]
        assert truth == w.pieces(w.batch.tokens[0])[position]
        assert guess == w.pieces(logits.argmax()[None])[0]
        assert float(best) == pytest.approx(logits.softmax(0).max().item(), abs=1e-4)
        assert float(own) <= float(best)


def test_samples_are_those_of_the_pipeline(walked):
    w = walked.w
    w.pipeline.settings = replace(w.pipeline.settings, solver="euler")
    images = w.pipeline.draw([w.pair.prompt], seed=12, steps=4)
    [drawn] = walkthrough.to_pictures(images)
    assert abs(drawn.astype(int) - w.drawn).max() <= 1
    assert w.pipeline.caption(w.batch.images[:1, 0], steps=4, order="confidence") == [w.written]
    [states] = tables(walked, "masks")
    assert [row[1] for row in states.rows] == [32, 24, 16, 8, 0]
    pictures = [part for part in walked.parts if isinstance(part, Pictures)]
    labels = [label for part in pictures for _, label in part.labelled]
    assert [label for label in labels if label.startswith("x, sigma")] == [
        "x, sigma 1.000", "x, sigma 0.667", "x, sigma 0.334", "x, sigma 0.001"]
    at_noise = next(part.labelled[1][0] for part in pictures if part.labelled[0][1] == labels[
        labels.index("x, sigma 1.000")])
    noise = torch.randn(w.latents[:1].shape, generator=seeded(12))
    texts = w.pipeline.encode_prompts([w.pair.prompt])
    with torch.no_grad():
        both = w.pipeline.model(torch.cat([noise, noise]),
                                torch.stack([texts.negative[32], texts.prompts[0]]),
                                torch.full((2,), 1000.0), want=("velocity",)).velocity
        v = both[0] + w.settings.guidance * (both[1] - both[0])
        [estimate] = w.decode(noise - v)
    assert abs(at_noise.astype(int) - estimate).max() <= 1


def test_the_seed_and_the_example_decide(walked, finished):
    assert walk(finished).text == walked.text
    assert walk(finished, seed=13).text != walked.text
    other = walk(finished, number=5)
    assert other.w.pair.caption != walked.w.pair.caption
    assert f'"value": "{other.w.pair.caption}"' in other.text
    assert other.w.pairs[1] == walk(finished, number=0).w.pair          # the first follows the last


def test_the_command(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    walkthrough.main(["--run", str(run)])
    text = capsys.readouterr().out
    file = run / "walkthrough.html"
    parsed = ParsedPage(file.read_text(encoding="utf-8"))
    assert not parsed.open and str(file) in text
    assert all(section in parsed.text and section in text for section in SECTIONS)
    assert len(parsed.pictures()) > 30
    (run / "data" / "test.jsonl").unlink()
    with pytest.raises(SystemExit, match="error: .*only runs on a shapes world"):
        walkthrough.main(["--run", str(run)])


def test_errors(finished, tmp_path):
    with pytest.raises(SystemExit, match="error: .*holds no trained model"):
        walkthrough.main(["--run", str(tmp_path)])
    for number in ("-1", "6"):
        with pytest.raises(SystemExit, match="has 6 pairs .* expected 0 to 5"):
            walkthrough.main(["--run", str(finished), "--example", number])
    assert not (finished / "walkthrough.html").exists()
