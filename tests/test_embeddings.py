"""embeddings.py: files of T5's embeddings, and sample.py with them in place of T5."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from release import write_release
from safetensors import safe_open

import sample
from checkpoint import save
from embeddings import Embeddings, Request, save_embeddings
from sample import main

pytestmark = pytest.mark.usefixtures("inside")


def made(path):
    """A file of two prompts, one of them also about a picture."""
    tensors = torch.randn(3, 8, 4).bfloat16()
    requests = [Request("a cat"), Request("a dog"), Request("a cat", 1)]
    embeddings = zip(requests, (tensors[0], tensors[1], tensors[2, :5]))
    negatives = {8: torch.ones(8, 4).bfloat16(), 5: torch.ones(5, 4).bfloat16()}
    save_embeddings(path, embeddings, negatives, "blurry", "t5, bfloat16")
    return tensors


def test_a_file_of_embeddings(tmp_path):
    tensors = made(tmp_path / "e.safetensors")
    with safe_open(tmp_path / "e.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["text_encoder"] == "t5, bfloat16" and metadata["negative"] == "blurry"
    assert json.loads(metadata["prompts"]) == [["a cat", 0], ["a dog", 0], ["a cat", 1]]
    file = Embeddings(tmp_path / "e.safetensors")
    assert file.width == 4 and file.negative == "blurry" and file.prompts() == ["a cat", "a dog"]
    texts = file.texts(["a dog", "a cat"], 0, torch.bfloat16)
    assert torch.equal(torch.stack(texts.prompts), tensors[[1, 0]])
    assert list(texts.negative) == [8] and texts.negative[8].shape == (8, 4)
    texts = file.texts(["a cat"], 1, torch.float32)
    assert torch.equal(texts.prompts[0], tensors[2, :5].float()) and list(texts.negative) == [5]
    # two prompts take the place of two, though they were parts of one batch
    assert (tmp_path / "e.safetensors").stat().st_size < 1500


def test_prompts_that_are_not_in_the_file(tmp_path):
    made(tmp_path / "e.safetensors")
    file = Embeddings(tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match="e.safetensors: holds no embeddings of 2 prompts: "
                                         "'a dog' about 1 pictures, 'a cow'; add them"):
        file.check([Request("a cat"), Request("a dog", 1), Request("a cow"), Request("a cow")])
    with pytest.raises(ValueError, match="'a cow'"):
        file.texts(["a cow"], 0, torch.float32)


@pytest.mark.parametrize("metadata", [
    {}, {"prompts": "{", "negative": "", "text_encoder": ""},
    {"prompts": "[1]", "negative": "", "text_encoder": ""}, {"prompts": "[]", "negative": ""}])
def test_other_files(tmp_path, metadata):
    save(tmp_path / "e.safetensors", {"prompt.0": torch.zeros(1, 2)}, **metadata)
    with pytest.raises(ValueError, match="e.safetensors: holds no embeddings of prompts; make"):
        Embeddings(tmp_path / "e.safetensors")


# ---------------------------------------------------------------- sample.py

@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    write_release(folder)
    return folder


def t5_of(release):
    folder = release / "UniAlignment"
    return ["--t5", str(folder / "text_encoder"), "--tokenizer", str(folder / "tokenizer"),
            "--device", "cpu"]


def model_of(release):
    return ["--model", str(release / "UniAlignment"), "--image-size", "64", "--steps", "2",
            "--device", "cpu"]


def without(monkeypatch, *kinds):
    """A machine without these models."""
    for kind in kinds:
        monkeypatch.setattr(kind, "from_pretrained", lambda *a, **k: pytest.fail(f"needs {kind}"))


def pixels(path):
    return np.array(Image.open(path)).astype(int)


def test_a_machine_without_t5_draws_what_another_one_encoded(release, monkeypatch, capsys):
    main(["a cat", "a dog", *model_of(release), "--out", "expected"])
    with monkeypatch.context() as patch:
        without(patch, sample.MMDiT, sample.VAE)
        main(["a cat", "a dog", "--save-embeddings", "e.safetensors", *t5_of(release)])
    assert capsys.readouterr().out.splitlines()[-1] == "e.safetensors\t2 texts"
    assert Embeddings(Path("e.safetensors")).text_encoder.endswith("text_encoder, float32")
    without(monkeypatch, sample.T5Encoder)
    monkeypatch.setattr(sample, "T5Tokenizer", lambda *a, **k: pytest.fail("needs the tokenizer"))
    main(["--embeddings", "e.safetensors", *model_of(release), "--out", "all"])
    for name in ("0001.png", "0002.png"):
        assert np.abs(pixels(f"all/{name}") - pixels(f"expected/{name}")).max() <= 1
        assert Image.open(f"all/{name}").text == Image.open(f"expected/{name}").text
    main(["a dog", "--embeddings", "e.safetensors", *model_of(release), "--seed", "1",
          "--out", "dog.png"])
    assert np.abs(pixels("dog.png") - pixels("expected/0002.png")).max() <= 1
    with pytest.raises(SystemExit, match="no embeddings of 1 prompts: 'a cow'"):
        main(["a dog", "a cow", "--embeddings", "e.safetensors", *model_of(release)])
    assert not Path("pictures").exists()
    with pytest.raises(SystemExit, match="with the negative prompt '.*', not 'fog'"):
        main(["a dog", "--embeddings", "e.safetensors", *model_of(release), "--negative", "fog"])


def test_edits_with_embeddings(release, monkeypatch, capsys):
    edits, image = release / "edits_to_sample.jsonl", str(release / "pictures" / "square.png")
    turns = ["--image", image, image, "--edit", "make it red", "--edit", "add a dot"]
    main(["--edits", str(edits), *model_of(release), "--out", "expected"])
    main([*turns, *model_of(release), "--out", "expected.png"])
    main(["--edits", str(edits), "--save-embeddings", "e.safetensors", *t5_of(release)])
    main([*turns, "--save-embeddings", "t.safetensors", *model_of(release)[:2]])
    requests = json.loads(Embeddings(Path("t.safetensors")).file.metadata["prompts"])
    assert requests == [["add a dot", 1], ["make it red", 2]]
    without(monkeypatch, sample.T5Encoder)
    main(["--edits", str(edits), "--embeddings", "e.safetensors", *model_of(release), "--out", "x"])
    main([*turns, "--embeddings", "t.safetensors", *model_of(release), "--out", "x.png"])
    pairs = [(f"x/{file.name}", file) for file in Path("expected").iterdir()]
    pairs += [(f"x-{i}.png", f"expected-{i}.png") for i in (1, 2)]
    assert len(pairs) == 4
    for drawn, expected in pairs:
        assert np.abs(pixels(drawn) - pixels(expected)).max() <= 2


def test_a_negative_prompt_of_its_own_is_kept_with_the_file(release):
    main(["a cat", "--negative", "fog", *model_of(release), "--out", "expected.png"])
    main(["a cat", "--negative", "fog", "--save-embeddings", "e.safetensors", *t5_of(release)])
    main(["--embeddings", "e.safetensors", *model_of(release), "--out", "drawn.png"])
    assert np.abs(pixels("drawn.png") - pixels("expected.png")).max() <= 1
    assert Image.open("drawn.png").text == Image.open("expected.png").text


def test_plain_sd3_pads_otherwise(release):
    for padding, name in (([], "dual"), (["--padding-id", "0"], "sd3")):
        main(["a cat", "--save-embeddings", f"{name}.safetensors", *t5_of(release), *padding])
    dual, sd3 = (Embeddings(Path(f"{name}.safetensors")) for name in ("dual", "sd3"))
    texts = [file.texts(["a cat"], 0, torch.float32).prompts[0] for file in (dual, sd3)]
    assert not torch.equal(*texts) and dual.negative and not sd3.negative


def test_options_without_effect(release, capsys, inside):
    (inside / "e.safetensors").write_bytes(b"mine")
    assert "e.safetensors exists; nothing is overwritten" in refused(
        ["a", "--save-embeddings", "e.safetensors", *t5_of(release)], capsys)
    assert "not a whole safetensors file" in refused(
        ["--embeddings", "e.safetensors", *model_of(release)], capsys)
    made(inside / "f.safetensors")
    for options, words in (
            (["--embeddings", "f.safetensors", "--model", "m", "--t5", "t"],
             "--t5 has an effect only without --embeddings"),
            (["a", "--save-embeddings", "g.safetensors", "--t5", "t", "--out", "x.png"],
             "--out has an effect only without --save-embeddings"),
            (["--describe", str(release / "pictures" / "square.png"), "--embeddings",
              "f.safetensors"], "--embeddings has an effect only where pictures are drawn")):
        assert words in refused(options, capsys)


def test_embeddings_of_another_width(release, inside):
    made(inside / "f.safetensors")
    words = "f.safetensors: embeddings of width 4, by the text encoder t5, bfloat16; .* expects 32"
    with pytest.raises(SystemExit, match=words):
        main(["--embeddings", "f.safetensors", *model_of(release)])
