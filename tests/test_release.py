"""A release in miniature as its users use it: README's recipe to train, every task of sample.py."""
import argparse
import json
import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from release import TRAIN_OPTIONS, write_release
from safetensors import safe_open
from test_train import torchrun

from arguments import add_model_options
from config import parse_arguments
from sample import load_pipeline, main

ROOT = Path(__file__).parent.parent
SIZES = ["--sampling.image_size", "64", "--sampling.text_length", "32"]
SHORT = ("--steps 3 --batch_size 1 --accumulation 1 --log_every 1 --save_every 3 "
         "--workers 0").split()


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The folder of a whole release. Its files are read only; runs/ are those of the recipe."""
    folder = tmp_path_factory.mktemp("release")
    write_release(folder)
    return folder


# Words of README's commands -> what stands for them here.
STAND_INS = {"spiece.model": "sd3/tokenizer_3/spiece.model", "cat.jpg": "pictures/tall.jpg"}


def readme_commands(start: str) -> list[list[str]]:
    """The commands in README that start so, as lists of words."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith(start)]
    return [[STAND_INS.get(word, word) for word in words] for words in commands]


# ---------------------------------------------------------------- training

def test_the_recipe_of_the_preset_small():
    [words] = readme_commands("torchrun --nproc_per_node 4 ")
    config = parse_arguments(words[4:], for_run=False)
    assert config.out == "runs/small" and config.sampling.image_size == 256
    assert config.batch_size * config.accumulation * 4 == 256   # the global batch of the preset
    assert not config.intrinsic_weight and config.t5_path == "t5-v1_1-base"


@pytest.fixture(scope="module")
def trained(release):
    """The runs of README's recipe, stage by stage."""
    commands = readme_commands("torchrun --nproc_per_node 8 ")
    stages = [words[words.index("--stage") + 1] for words in commands]
    assert stages == ["1", "2", "3"]
    for words, stage in zip(commands, stages):
        assert words[:4] == ["torchrun", "--nproc_per_node", "8", "train.py"]
        sizes = SIZES + TRAIN_OPTIONS if stage == "1" else TRAIN_OPTIONS[-2:]
        done = torchrun(release, *words[4:], *SHORT, *sizes)
        assert done.returncode == 0, done.stderr[-3000:]
    return [release / "runs" / f"sd3-stage{stage}" for stage in stages]


def test_the_recipe_trains_every_task_of_its_stage(trained, release):
    tasks = [{"text_to_image"}, {"text_to_image", "image_to_image", "depth"},
             {"text_to_image", "image_to_image", "questions"}]
    for run, expected in zip(trained, tasks):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3]
        assert all(math.isfinite(value) for line in lines for value in line.values())
        assert {"flow_matching", "masked_token", "contrastive", "intrinsic"} <= set(lines[0])
        assert {name.split(".")[0] for line in lines for name in line if "." in name} == expected
        files = {file.name for file in (run / "checkpoint-00000003").iterdir()}
        assert files == {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
        assert not (run / "skipped.jsonl").exists()
    inits = [json.loads((run / "run.json").read_text())["init"] for run in trained]
    assert inits == [str(path) for path in (release / "sd3_medium.safetensors", *trained[:2])]


def test_the_last_stage_draws_and_writes(trained, release, tmp_path, capsys):
    run = ["--run", str(trained[-1]), "--steps", "2"]
    main(["a green square", *run, "--out", str(tmp_path / "a.png")])
    assert Image.open(tmp_path / "a.png").size == (64, 64)
    main(["--describe", str(release / "pictures" / "wide.png"), *run])
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{release}/pictures/wide.png\t")


# ---------------------------------------------------------------- sampling, from the folder alone

QUICK = ["--image-size", "64", "--steps", "2", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def sample(release, tmp_path, monkeypatch, capsys):
    """A function that runs sample.py with --model UniAlignment; returns its lines and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model="UniAlignment"):
        main([*map(str, arguments), "--model", str(release / model), *QUICK])
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err

    return run


@pytest.fixture(scope="module")
def pictures(release):
    """The pictures of the release by their names."""
    return {file.stem: file for file in (release / "pictures").iterdir()}


def pixels(path):
    return np.array(Image.open(path))                                               # (H, W, 3)


def text_chunks(path):
    """Prompt and settings that sample.py writes into a picture."""
    chunks = Image.open(path).text
    return chunks["prompt"], json.loads(chunks["settings"])


def test_draw_with_the_conventions_of_the_release(sample):
    lines, errors = sample("a cat", "--out", "a.png")
    assert lines == ["a.png\ta cat"] and "mask_token" not in errors
    assert pixels("a.png").shape == (64, 64, 3)
    prompt, settings = text_chunks("a.png")
    assert prompt == "a cat" and settings["guidance"] == 7.0 and settings["steps"] == 2


def test_a_negative_prompt_replaces_that_of_the_release(sample):
    for name, options in (("default", ()), ("empty", ("--negative", "")),
                          ("given", ("--negative", "fog"))):
        sample("a cat", *options, "--out", f"{name}.png")
    drawn = {pixels(f"{name}.png").tobytes() for name in ("default", "empty", "given")}
    assert len(drawn) == 3


def test_pictures_that_are_not_square(sample, pictures):
    sample("a cat", "--width", 96, "--height", 48, "--out", "a.png")
    assert pixels("a.png").shape == (48, 96, 3)
    sample("--image", pictures["wide"], "--edit", "make it red", "--width", 96, "--height", 48,
           "--out", "b.png")
    assert pixels("b.png").shape == (48, 96, 3)
    with pytest.raises(SystemExit, match="multiples of 16"):
        sample("a cat", "--width", 96, "--height", 50)


def test_prompts_from_a_file(sample):
    Path("prompts.txt").write_text("a cat\na dog\n")
    lines, _ = sample("--prompts", "prompts.txt", "--out", "drawn")
    assert [line.split("\t")[1] for line in lines] == ["a cat", "a dog"]
    assert len(list(Path("drawn").glob("*.png"))) == 2


def test_describe_and_ask(sample, pictures):
    files = [pictures["wide"], pictures["turned"]]
    lines, errors = sample("--describe", *files)
    assert [line.split("\t")[0] for line in lines] == [str(file) for file in files]
    assert "mask_token" not in errors
    assert all(line.split("\t")[1] for line in lines)
    for options in ((), ("--dialogue",)):
        lines, _ = sample("--image", files[0], "--ask", "what is it?", "--ask", "is it red?",
                          *options)
        assert [line.split("\t")[0] for line in lines] == ["what is it?", "is it red?"]
        assert all(line.split("\t")[1] for line in lines)


def test_edit_in_turns_and_compose(sample, pictures):
    sample("--image", pictures["square"], "--edit", "make it red", "--edit", "add a dot",
           "--out", "x.png")
    assert text_chunks("x-1.png")[0] == "make it red" and text_chunks("x-2.png")[0] == "add a dot"
    sample("--image", pictures["square"], pictures["tall"], "--edit", "make it red",
           "--out", "y.png")
    assert pixels("y.png").shape == (64, 64, 3)
    assert (pixels("y.png") != pixels("x-1.png")).any()         # it has seen the second picture


@pytest.mark.parametrize("kind", ["edges", "depth", "pose"])
def test_maps_by_the_prompts_of_the_release(sample, pictures, kind):
    sample("--image", pictures["turned"], f"--{kind}", "--out", "map.png")
    assert text_chunks("map.png")[0] == f"Provide a detailed {kind} map of the entire scene."


def test_edits_from_a_file_go_on_where_they_ended(sample, release):
    edits = release / "edits_to_sample.jsonl"
    sample("--edits", edits, "--out", "edited")
    drawn = {file.name: file.read_bytes() for file in Path("edited").iterdir()}
    assert len(drawn) == 2 and "sky.png" in drawn
    assert text_chunks("edited/sky.png")[0] == "turn the sky green"
    assert text_chunks("edited/sky.png")[1]["seed"] == 3
    first = Path("edited/sky.png")
    first.write_bytes(drawn["sky.png"][:200])                   # half a picture
    others = {file: file.stat().st_mtime_ns for file in Path("edited").iterdir() if file != first}
    sample("--edits", edits, "--out", "edited")
    assert {file.name: file.read_bytes() for file in Path("edited").iterdir()} == drawn
    assert all(file.stat().st_mtime_ns == time for file, time in others.items())


# ---------------------------------------------------------------- the parts of a release

def loaded(*arguments):
    """The pipeline that these options of sample.py load."""
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    return load_pipeline(parser.parse_args([*map(str, arguments), *QUICK[:2], *QUICK[4:]]))


@pytest.mark.parametrize("model", ["UniAlignment", "UniAlignment/transformer"])
def test_all_parts_are_found(release, model):
    pipeline = loaded("--model", release / model)
    vector = torch.load(release / "mask_token_emb.00-of-01.pth").float()
    assert torch.equal(pipeline.text_encoder.embedding.weight[32099], vector)
    with safe_open(release / "UniAlignment" / "vae" / "diffusion_pytorch_model.safetensors",
                   framework="pt") as file:
        expected = file.get_tensor("encoder.conv_in.bias").float()
    assert any(torch.equal(p, expected) for p in pipeline.vae.parameters())
    assert pipeline.tokenizer.encode("a cat")[-1] == pipeline.tokenizer.eos_id
    s = pipeline.settings
    assert (s.steps, s.guidance, s.text_steps, s.order, s.temperature) == (
        50, 7.0, 32, "ancestral", 1.0)
    assert s.question_template == "Q: {question} A: " and s.negative_prompt and s.padding_id == 1


def test_a_dual_checkpoint_without_its_mask_vector(release, tmp_path, sample):
    shutil.copytree(release / "UniAlignment", tmp_path / "alone" / "UniAlignment")
    _, errors = sample("a cat", "--out", "a.png", model=tmp_path / "alone" / "UniAlignment")
    assert "mask_token_emb" in errors and "--mask-token" in errors
    vector = release / "mask_token_emb.00-of-01.pth"
    _, errors = sample("a cat", "--out", "b.png", "--mask-token", vector,
                       model=tmp_path / "alone" / "UniAlignment")
    assert "mask_token_emb" not in errors


def test_the_commands_of_readme(release, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(release)
    commands = [words[2:] for words in readme_commands("python sample.py ") if "--model" in words]
    assert len(commands) >= 3
    for number, words in enumerate(commands):
        writes = {"--describe", "--ask"} & set(words)
        out = [] if writes else ["--out", str(tmp_path / f"{number}.png")]
        main([*words, *QUICK, *out])
        assert len(capsys.readouterr().out.splitlines()) == 1


def test_plain_sd3_says_that_its_towers_are_missing(release, sample, pictures):
    parts = ["--t5", release / "sd3" / "text_encoder_3",
             "--tokenizer", release / "sd3" / "tokenizer_3" / "spiece.model"]
    lines, errors = sample("a cat", "--out", "a.png", *parts, model="sd3_medium.safetensors")
    assert lines == ["a.png\ta cat"] and "CLIP" in errors and "mask_token" not in errors
    settings = loaded("--model", release / "sd3_medium.safetensors", *parts).settings
    assert settings.padding_id == 0 and not settings.negative_prompt
    with pytest.raises(SystemExit, match="text head is all zero"):
        sample("--describe", pictures["wide"], *parts, model="sd3_medium.safetensors")
    with pytest.raises(SystemExit, match="--t5 and --tokenizer are needed"):
        sample("a cat", model="sd3_medium.safetensors")
