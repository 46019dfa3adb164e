"""arguments.py: mistakes of the command line stop before any model is loaded."""
import errno
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import refused
from PIL import Image

from sample import main

PROMPT = "a red circle"


@pytest.fixture
def sources(inside):
    """A working folder with two pictures, a.png and b.png."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32)).save(inside / name)
    return inside


@pytest.mark.parametrize("arguments, words", [
    ([], "give texts to draw"),
    (["--image", "x.png"],
     "give texts to draw, or one of --describe, --ask, --edit, --edits, --edges, --depth"),
    (["a", "--edit", "b", "--image", "x.png"], "give texts to draw, or one of"),
    (["a", "--image", "x.png"], "need --image, and nothing else takes it"),
    (["--describe", "x.png", "--image", "x.png"], "nothing else takes it"),
    (["--ask", "what?"], "--ask, --edit, --edges, --depth and --pose need --image"),
    (["--edit", "a"], "need --image"),
    (["--edges"], "need --image"),
    (["--depth"], "need --image"),
    (["--pose"], "need --image"),
    (["--edges", "--depth", "--image", "x.png"], "--depth: not allowed with argument --edges"),
    (["--pose", "--edit", "a", "--image", "x.png"], "--edit: not allowed with argument --pose"),
    (["--ask", "what?", "--edit", "a", "--image", "x.png"],
     "--edit: not allowed with argument --ask"),
    (["--describe", "x.png", "--ask", "what?", "--image", "x.png"],
     "--ask: not allowed with argument --describe"),
    (["--ask", "what?", "--image", "x.png", "y.png"], "--ask looks at one picture, found 2"),
    (["--edges", "--image", "x.png", "--image", "y.png"], "--edges looks at one picture, found 2"),
    (["--edit", "a", "--image", "x.png", "y.png"], "no such picture: x.png, y.png"),
    (["--describe", "x.png"], "no such picture: x.png"),
    (["a", "--describe", "x.png"], "give texts to draw"),
    (["--prompts", "none.txt"], "none.txt: no such file"),
    (["a", "b", "--out", "x.png"], "one picture for 2 prompts"),
    (["a", "--order", "backwards"], "--order"),
    (["a", "--seed", "x"], "--seed"),
])
def test_impossible_command_lines(inside, capsys, arguments, words):
    assert words in refused(arguments, capsys)


@pytest.mark.parametrize("arguments", [
    ["--describe", "a.png"], ["--image", "a.png", "--edit", "a"],
    ["a", "--save-embeddings", "e.safetensors"], ["a", "--embeddings", "e.safetensors"]])
def test_plans_are_of_texts_to_draw(sources, arguments, capsys):
    assert "--plan has an effect only on texts to draw" in refused([*arguments, "--plan"], capsys)


@pytest.mark.parametrize("arguments, words", [
    (["a", "--image-size", "64"], "--image-size has an effect only with --model"),
    (["a", "--run", "r", "--padding-id", "1"], "--padding-id has an effect only with --model"),
    (["a", "--vae", "x"], "--vae has an effect only with --model"),
    (["a", "--run", "r", "--model", "x", "--tokenizer", "y"],
     "--run has an effect only without --model"),
    (["a", "--order", "left"], "--order has an effect only on --describe and --ask"),
    (["a", "--temperature", "0"], "--temperature has an effect only on --describe and --ask"),
    (["--edges", "--image", "a.png", "--order", "left"], "--order has an effect only on"),
    (["--describe", "a.png", "--out", "x"], "--out has an effect only where pictures are drawn"),
    (["--describe", "a.png", "--guidance", "2"], "--guidance has an effect only where"),
    (["--ask", "a", "--image", "a.png", "--image-guidance", "2"], "--image-guidance has an effect"),
    (["a", "--image-guidance", "2"], "--image-guidance has an effect only where pictures are ed"),
    (["--describe", "a.png", "--negative", "b"], "--negative has an effect only where pictures"),
    (["--describe", "a.png", "--dialogue"], "--dialogue has an effect only on --ask"),
    (["--describe", "a.png", "--block", "4"], "--block has an effect only with --order confidence"),
    (["a", "--save-embeddings", "x", "--t5", "y", "--tokenizer", "y", "--film", "a.gif"],
     "--film has an effect only without --save-embeddings"),
    (["--describe", "a.png", "--end-last"], "--end-last has an effect only with --order conf"),
    (["--prompt", "a"], "unrecognized arguments: --prompt"),
    (["a", "--seed", "1.5"], "--seed"), (["a", "--steps", "nan"], "--steps"),
    (["a", "--padding-id", "2"], "--padding-id")])
def test_options_without_effect(sources, capsys, arguments, words):
    assert words in refused(arguments, capsys)


@pytest.mark.parametrize("line, words", [
    ("[1]", "a JSON array"), ("{", "edits.jsonl, line 1: not valid JSON"),
    ('{"image": "a.png"}', "line 1: 'instruction' is None, expected a text"),
    ('{"image": "none.png", "instruction": "a"}', "line 1: no such picture: none.png"),
    ('{"image": [], "instruction": "a"}', "line 1: 'image' is []"),
    ('{"image": "a.png", "instruction": "a", "seed": 1.5}', "'seed' is 1.5, expected an integer"),
    ('{"image": "a.png", "instruction": "a", "name": "../x.png"}', "'name' is '../x.png'"),
    ('{"image": "a.png", "instruction": "a", "name": "x.jpg"}', "expected the name of a .png"),
    ('{"image": "a.png", "instruction": "a", "out": "x.png"}', "unknown key 'out', expected image"),
    ('{"image": "a.png", "instruction": "a", "name": "a.png"}', "is the picture to edit"),
    ('\n{"image": "a.png", "instruction": "a"}\n{"image": "b.png", "instruction": "a", '
     '"name": "0002.png"}', "line 3: another line has the name 0002.png already"),
])
def test_edits_that_cannot_be_drawn(sources, capsys, line, words):
    Path("edits.jsonl").write_text(line)
    assert words in refused(["--edits", "edits.jsonl", "--run", "none", "--out", "."], capsys)


def test_edits_need_a_folder(sources, capsys):
    Path("edits.jsonl").write_text('{"image": "a.png", "instruction": "a"}')
    message = refused(["--edits", "edits.jsonl", "--out", "x.png"], capsys)
    assert "--out x.png: --edits needs a folder" in message
    assert "edits.jsonl: no such file" in refused(["--edits", "no/edits.jsonl"], capsys)


@pytest.mark.parametrize("arguments, words", [
    (["a", "--film", "film"], "--film film: films are written as .gif; name a .gif file"),
    (["a", "--film", "film.png"], "films are written as .gif"),
    (["a", "b", "--film", "film.gif"], "--film shows one picture or text, found 2"),
    (["--prompts", "two.txt", "--film", "film.gif"], "found 2"),
    (["--describe", "a.png", "b.png", "--film", "film.gif"], "found 2"),
    (["--image", "a.png", "--ask", "a", "--ask", "b", "--film", "film.gif"], "found 2"),
    (["--image", "a.png", "--edit", "a", "--edit", "b", "--film", "film.gif"], "found 2"),
    (["--edits", "edits.jsonl", "--film", "film.gif"], "--film has an effect only on one picture"),
    (["a", "--film", "mine.gif"], "mine.gif exists; nothing is overwritten, choose another name"),
    (["a", "--film", "b.gif"], "--film b.gif writes b.gif and b.png: b.png exists"),
    (["a", "--out", "c.png", "--film", "c.gif"], "c.png is the picture to draw"),
    (["a", "--film", "pictures/0001.gif"], "pictures/0001.png is the picture to draw"),
    (["a", "--film", "mine.gif/film.gif"], "--film mine.gif/film.gif: cannot be written")])
def test_films_that_cannot_be_made(sources, inside, capsys, arguments, words):
    (inside / "mine.gif").write_text("mine")
    (inside / "two.txt").write_text("a\nb\n")
    (inside / "edits.jsonl").write_text('{"image": "a.png", "instruction": "b"}\n')
    assert words in refused(arguments, capsys)
    assert (inside / "mine.gif").read_text() == "mine" and len(list(inside.iterdir())) == 5


def test_help_has_an_example_of_every_task(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.strip().startswith("python sample.py")]
    for words in ('sample.py "', "--describe", "--ask", "--edit", "--image a.png b.png --edit",
                  "--edges", "--depth", "--pose", "--prompts", "--film", "--model"):
        assert any(words in line for line in lines), words
    assert any(line.count("--edit") == 2 for line in lines)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", "mps", "hpu", "xla", ""])
def test_a_device_that_is_not_there(inside, capsys, device):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    message = refused([PROMPT, "--run", "none", "--device", device], capsys)
    assert f"--device {device}: not available" in message and len(message) < 300


@pytest.mark.parametrize("out", ["file/sub", "file", "file/x.png", "n" * 300, "/proc/no/x.png"])
def test_an_out_that_cannot_be_written(inside, capsys, out):
    (inside / "file").write_text("mine")
    message = refused([PROMPT, "--run", "none", "--out", out], capsys)
    assert f"--out {out}: cannot be written" in message
    assert [f.name for f in inside.iterdir()] == ["file"]


def test_an_out_without_permission(inside, capsys, monkeypatch):
    def refuse(dir):
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    message = refused([PROMPT, "--run", "none", "--out", "deep/er"], capsys)
    assert "Permission denied" in message and not list(inside.iterdir())


@pytest.mark.parametrize("content, words", [
    (PROMPT.encode("utf-16"), "not UTF-8 text"), (PROMPT.encode("utf-16-le"), "holds zero bytes"),
    ("ein r\u00f6tlicher Kreis".encode("latin-1"), "not UTF-8 text"),
    (b"", "holds no prompt"), (b"\xef\xbb\xbf \r\n\n", "holds no prompt"),
    (None, "is a directory")])
def test_files_without_prompts(inside, capsys, content, words):
    if content is None:
        (inside / "prompts.txt").mkdir()
    else:
        (inside / "prompts.txt").write_bytes(content)
    message = refused(["a", "--prompts", "prompts.txt", "--run", "none"], capsys)
    assert f"prompts.txt: {words}" in message


@pytest.mark.parametrize("option", ["", "--ask=", "--edit="])
def test_a_text_that_is_not_utf8(sources, capsys, option):
    """The command line holds bytes that are not UTF-8 as half surrogate pairs."""
    text = b"ein r\xf6tlicher Kreis".decode("utf-8", "surrogateescape")
    image = ["--image", "a.png"] if option else []
    message = refused([option + text, *image, "--run", "none"], capsys)
    assert r"the text 'ein r\udcf6tlicher Kreis' is not UTF-8" in message
