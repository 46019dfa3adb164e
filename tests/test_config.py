"""config.py: options and their help, presets, stages, run.json, and the files of a run's folder."""
import dataclasses
import re
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import QUICK
from safetensors.torch import save_file

from config import (DUAL, PRESETS, SD3, Parts, Release, RunFiles, SampleSettings, TrainConfig,
                    find_release, parse_arguments, parts_of, read_config, stage, write_config)
from experiments import world


# ---------------------------------------------------------------- presets and stages

def test_the_tiny_preset_has_the_size_of_the_shapes_world():
    assert PRESETS["tiny"].sampling.image_size == world.SIZE
    assert PRESETS["mini"].sampling.image_size == world.SIZE


def test_stages_of_the_paper():
    sd3 = PRESETS["sd3"]
    assert stage(sd3, 3).steps == 30_000 and stage(sd3, 2).weights == "*=1,questions=0"
    stages = [stage(sd3, number) for number in (1, 2, 3)]
    assert [s.out for s in stages] == [f"runs/sd3-stage{number}" for number in (1, 2, 3)]
    assert [s.init for s in stages] == ["", "runs/sd3-stage1", "runs/sd3-stage2"]
    assert stages[0].weights == "text_to_image=1" and stages[2].weights == sd3.weights


def test_a_stage_without_the_one_before(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        parse_arguments(["--stage", "2"])
    assert "runs/tiny-stage1" in capsys.readouterr().err


# ---------------------------------------------------------------- the folder of a run

def test_names_of_the_files_of_a_run(tmp_path):
    files = RunFiles(str(tmp_path))
    assert files.folder == tmp_path
    names = {"config": "run.json", "metrics": "metrics.jsonl", "skipped": "skipped.jsonl",
             "seconds": "seconds.json", "scores": "scores.json", "report": "report.html",
             "scored": "scores.jsonl", "cases": "samples.json",
             "world": "data", "tokenizer": "tokenizer.model", "progress": "progress.png",
             "text_encoder": "text_encoder.safetensors", "vae": "vae.safetensors",
             "teacher": "teacher"}
    assert vars(files) == {"folder": tmp_path} | {key: tmp_path / n for key, n in names.items()}
    assert files.checkpoint(35_000) == tmp_path / "checkpoint-00035000"
    assert files.kept(7) == tmp_path / "kept-00000007.safetensors"
    assert files.samples() == tmp_path / "samples.png"
    assert files.samples("edits") == tmp_path / "samples_edits.png"
    for name in ("film-text.gif", "film-picture.gif", "film.gif", "film-strip.png"):
        (tmp_path / name).touch()
    assert files.films() == [tmp_path / "film-picture.gif", tmp_path / "film-text.gif"]


def test_checkpoints_and_samples_of_a_run(tmp_path):
    """Checkpoints and samples are sorted; averaged weights are those of the newest checkpoint."""
    files = RunFiles(tmp_path)
    assert files.newest_checkpoint() is files.averaged_weights() is None
    assert files.checkpoints() == files.all_samples() == []
    for step in (1000, 20, 3):
        files.checkpoint(step).mkdir()
        (files.checkpoint(step) / "ema.safetensors").touch()
    (tmp_path / ".checkpoint.tmp").mkdir()                      # not complete
    for name in ("pose", "", "edits"):
        files.samples(name).touch()
    assert files.checkpoints() == [files.checkpoint(step) for step in (3, 20, 1000)]
    assert files.newest_checkpoint() == files.checkpoint(1000)
    assert files.averaged_weights() == files.checkpoint(1000) / "ema.safetensors"
    assert files.all_samples() == [files.samples(), files.samples("edits"), files.samples("pose")]


def test_other_folders_are_no_checkpoints(tmp_path):
    """checkpoint- and a number is ours, compared as a number; all else is the user's."""
    files = RunFiles(tmp_path)
    for name in ("checkpoint-best", "checkpoint-00000007-copy", "checkpoint-", "checkpoint-1e3",
                 "checkpoint-99999999", "checkpoint-100000000", "my-checkpoint-200000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ema.safetensors").touch()
    (tmp_path / "checkpoint-300000000").touch()                 # a file
    (tmp_path / "checkpoint-400000000").mkdir()                 # without averaged weights
    names = ["checkpoint-99999999", "checkpoint-100000000", "checkpoint-400000000"]
    assert [folder.name for folder in files.checkpoints()] == names
    assert files.averaged_weights() == tmp_path / "checkpoint-100000000" / "ema.safetensors"


def test_run_json_keeps_paths_that_work_from_any_folder(tmp_path, monkeypatch):
    """Absolute; where the parts were moved together with the run, by the same way from it."""
    (tmp_path / "here" / "parts").mkdir(parents=True)
    for name in ("vae.safetensors", "a.jsonl", "b.jsonl"):
        (tmp_path / "here" / "parts" / name).touch()
    monkeypatch.chdir(tmp_path / "here")
    config = TrainConfig(vae_path="parts/vae.safetensors", data="parts/a.jsonl,parts/b.jsonl")
    write_config(config, Path("runs/one"))
    monkeypatch.chdir(tmp_path)
    parts = tmp_path / "here" / "parts"
    read = read_config(Path("here/runs/one/run.json"))
    assert read.vae_path == str(parts / "vae.safetensors") and read.t5_path == ""
    assert read.data == f"{parts / 'a.jsonl'},{parts / 'b.jsonl'}"
    (tmp_path / "here").rename(tmp_path / "there")
    moved = read_config(Path("there/runs/one/run.json"))
    assert moved.vae_path == str(tmp_path / "there" / "parts" / "vae.safetensors")
    assert moved.data == f"{tmp_path}/there/parts/a.jsonl,{tmp_path}/there/parts/b.jsonl"


def test_parts_lie_in_the_run_unless_they_are_named(tmp_path):
    files = RunFiles(tmp_path)
    own = parts_of(TrainConfig(), tmp_path)
    assert own == Parts((files.world / "train.jsonl",), files.world / "test.jsonl",
                        files.tokenizer, files.vae, files.text_encoder, files.teacher)
    named = TrainConfig(data="a.jsonl,b.jsonl", vae_path="v", t5_path="t", tokenizer_path="s",
                        teacher_path="q")
    assert parts_of(named, tmp_path) == Parts(
        (Path("a.jsonl"), Path("b.jsonl")), None, Path("s"), Path("v"), Path("t"), Path("q"))
    other_world = parts_of(TrainConfig(data=str(tmp_path)), tmp_path / "run")
    assert other_world.data == (tmp_path / "train.jsonl",)
    assert other_world.test == tmp_path / "test.jsonl"


@pytest.mark.parametrize("name", PRESETS)
def test_run_json_keeps_the_configuration(tmp_path, name):
    config = dataclasses.replace(PRESETS[name], keep=(1, 20))
    write_config(config, tmp_path / "run")
    kept = read_config(tmp_path / "run" / "run.json")
    assert kept == dataclasses.replace(config, out=str(tmp_path / "run"))


@pytest.mark.parametrize("content, words", [
    ("{", "run.json"),
    ("{}", "no 'sampling' in it"),
    ('{"sampling": {"size": 3}}', "'size'"),
    ('{"sampling": {}, "stepz": 3}', "'stepz'"),
    ('{"sampling": {}, "steps": "many"}', "steps = 'many'")])
def test_damaged_run_json(tmp_path, content, words):
    file = tmp_path / "run.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read_config(file)
    assert str(file) in str(error.value)


# ---------------------------------------------------------------- command line

def fields(kind, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every field of a configuration by its option, with those of its nested configurations."""
    hints, options = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            options |= fields(hints[field.name], f"{prefix}{field.name}.")
        else:
            options[f"--{prefix}{field.name}"] = field
    return options


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    options = fields(TrainConfig)
    names = ("steps", "muon_lr", "model.depth", "vae.stem", "sampling.guidance")
    assert all(f"--{name}" in options for name in names) and "--resume" in text
    squeezed = re.sub(r"\s", "", text)                          # argparse breaks lines anywhere
    for option, field in options.items():
        explained = re.sub(r"\s", "", field.metadata.get("help", ""))
        assert explained, f"{option} has no help"
        pattern = rf"{re.escape(option)}(N|N,N|TEXT|true\|false){re.escape(explained)}\(default:"
        assert re.search(pattern, squeezed), option


def test_options_change_the_preset(tmp_path):
    mini, out = PRESETS["mini"], str(tmp_path / "new")
    config = parse_arguments(["--preset", "mini", "--out", out, "--decay", "false",
                              "--keep", "5,10", "--model.depth", "6", "--sampling.guidance", "3"])
    assert config == dataclasses.replace(
        mini, out=out, decay=False, keep=(5, 10),
        model=dataclasses.replace(mini.model, depth=6),
        sampling=dataclasses.replace(mini.sampling, guidance=3.0))


@pytest.mark.parametrize("arguments, words", [
    (["--stepz", "5"], "--stepz"),
    (["--steps", "many"], "--steps"),
    (["--model.width", "1.5"], "--model.width"),
    (["--decay", "perhaps"], "--decay"),
    (["--steps", "0"], "--steps"),
    (["--data", "no.jsonl"], "no.jsonl"),
    (["--preset", "huge"], "huge"),
    (["--init", __file__, "--model.width", "64"], "--model.width"),
    (["--preset", "sd3", "--data", __file__], "--vae_path"),
    (["--preset", "sd3"], "--data"),
    (["--test_scenes", "0"], "--test_scenes"),
    (["--sampling.image_size", "128"], "image_size"),
    (["--lr", "nan"], "--lr"),
    (["--model.widht", "64"], "--model.widht"),
    (["--weights", "edits"], "edits"),
    (["--stage", "4"], "4"),
    (["--weights", "edits=-1"], "edits=-1"),
])
def test_unknown_and_ill_typed_fields(tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments([*arguments, "--out", str(tmp_path / "new")])
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_a_run_is_never_overwritten(finished, capsys):
    before = RunFiles(finished).scores.read_bytes()
    with pytest.raises(SystemExit):
        parse_arguments([*QUICK, "--out", str(finished)])
    assert "--resume" in capsys.readouterr().err
    assert RunFiles(finished).scores.read_bytes() == before
    with pytest.raises(SystemExit):
        parse_arguments(["--resume", "--out", str(finished), "--lr", "1e-4"])
    assert "--lr" in capsys.readouterr().err


def test_a_resumed_run_may_change_little(finished):
    """It may train longer, and keep its global batch on other ranks; all else is as it was."""
    before = read_config(RunFiles(finished).config)
    config = parse_arguments(["--resume", "--out", str(finished), "--steps", "9", "--batch_size",
                              "2", "--accumulation", "2", "--new_data", "true"])
    changed = dataclasses.replace(
        before, out=str(finished), steps=9, batch_size=2, accumulation=2, new_data=True)
    assert config == changed


def test_an_estimate_needs_neither_data_nor_a_free_folder(finished):
    config = parse_arguments(["--preset", "sd3", "--out", str(finished)], for_run=False)
    assert config == dataclasses.replace(PRESETS["sd3"], out=str(finished))


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "vae.safetensors", "checkpoint-00000007", "data"])
def test_files_of_the_user_are_not_taken_for_a_run(tmp_path, capsys, name):
    (tmp_path / name).mkdir()
    with pytest.raises(SystemExit):
        parse_arguments([*QUICK, "--out", str(tmp_path)])
    assert name in capsys.readouterr().err


def test_resume_without_a_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--resume", "--out", str(tmp_path / "nothing")])
    assert "nothing" in capsys.readouterr().err


def test_settings_of_runs_before_the_newer_fields_mean_the_same():
    assert SampleSettings() == SampleSettings(512, 256, 0, 1, 28, 7.0, 1.0, 3.0, 64)
    settings = SampleSettings()
    assert (settings.question_template, settings.order) == ("{question}", "")
    assert settings.temperature == settings.block == settings.answer_length == 0


def test_conventions_of_the_released_weights():
    assert SD3 == replace(SampleSettings(), padding_id=0)
    assert (DUAL.steps, DUAL.guidance, DUAL.padding_id, DUAL.image_size) == (50, 7.0, 1, 512)
    assert (DUAL.order, DUAL.temperature, DUAL.text_steps, DUAL.text_length) == \
        ("ancestral", 1.0, 32, 256)
    assert DUAL.question_template.format(question="why?") == "Q: why? A: "
    assert DUAL.perception_prompt.format(kind="depth") == \
        "Provide a detailed depth map of the entire scene."
    assert PRESETS["sd3"].sampling == DUAL


@pytest.mark.parametrize("option, value", [
    ("order", "backwards"), ("question_template", "what?"), ("block", "-1"),
    ("temperature", "nan"), ("answer_length", "-1")])
def test_impossible_settings(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments([f"--sampling.{option}", value, "--out", str(tmp_path / "new")])
    assert stopped.value.code == 2 and option in capsys.readouterr().err


# ---------------------------------------------------------------- parts of a release

@pytest.fixture
def release(tmp_path):
    """The folders of a released pipeline, of SD3, and a single file that holds all but a T5."""
    for name in ("code/pipe/transformer", "code/pipe/vae", "code/pipe/text_encoder",
                 "code/pipe/tokenizer", "sd3/vae", "sd3/text_encoder", "sd3/text_encoder_3",
                 "sd3/tokenizer", "sd3/tokenizer_3"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("code/pipe/tokenizer/spiece.model", "sd3/tokenizer_3/spiece.model",
                 "code/mask_token_emb.00-of-01.pth"):
        (tmp_path / name).touch()
    save_file({"first_stage_model.x": torch.zeros(1)}, tmp_path / "single.safetensors")
    return tmp_path


@pytest.mark.parametrize("start", ["code/pipe", "code/pipe/transformer"])
def test_a_released_folder_alone_has_all_parts(release, start):
    pipe = release / "code" / "pipe"
    assert find_release(release / start) == Release(
        pipe / "vae", pipe / "text_encoder", pipe / "tokenizer" / "spiece.model",
        release / "code" / "mask_token_emb.00-of-01.pth")


def test_parts_of_sd3(release, monkeypatch):
    sd3 = release / "sd3"
    whole = find_release(sd3)
    assert whole == Release(sd3 / "vae", sd3 / "text_encoder_3",
                            sd3 / "tokenizer_3" / "spiece.model", None)
    monkeypatch.chdir(release)                                  # a relative path
    single = Path("single.safetensors")
    assert find_release(single) == Release(single.absolute(), None, None, None)
    named = find_release(single, Path("sd3/text_encoder_3"))    # T5's tokenizer lies beside it
    assert named.tokenizer == Path("sd3/tokenizer_3/spiece.model")


# ---------------------------------------------------------------- ranges and effects

@pytest.mark.parametrize("option, value", [
    ("prompt_dropout", "10"), ("prompt_dropout", "-0.1"), ("ema", "1.5"), ("ema", "1"),
    ("beta2", "1"), ("lr", "inf"), ("lr", "nan"), ("lr", "0"), ("muon_lr", "-1"), ("clip", "0"),
    ("warmup", "-1"), ("workers", "-1"), ("max_skipped", "2"), ("sigma_mean", "inf"),
    ("text_weight", "nan"), ("cross_temperature", "0"), ("intrinsic_weight", "-0.1"),
    ("align_depth", "0"), ("log_every", "0"), ("save_every", "0"), ("ema_every", "0"),
    ("sampling.guidance", "nan"), ("sampling.steps", "0"), ("sampling.shift", "0"),
    ("sampling.padding_id", "2"), ("sampling.text_length", "1"), ("keep", "0,5"),
    ("teacher_online", "perhaps"), ("train_scenes", "-1")])
def test_numbers_have_ranges(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments([f"--{option}", value, "--out", str(tmp_path / "new")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f"--{option}" in error and "expected" in error


@pytest.mark.parametrize(
    "value", ["0.9,0.2", "0,nan", "-0.1,1", "0,1.5", "0.2", "0.2,0.5,0.9", "x"])
def test_an_interval_is_two_numbers_in_order(tmp_path, capsys, value):
    option = f"--sampling.guidance_interval={value}"
    with pytest.raises(SystemExit):
        parse_arguments([option, "--out", str(tmp_path / "new")])
    error = capsys.readouterr().err
    assert "sampling.guidance_interval" in error and "expected two numbers" in error


def test_solver_and_guidance_interval_survive_run_json(tmp_path, capsys):
    config = parse_arguments(["--sampling.guidance_interval", "0.2,0.9", "--sampling.solver", "ab2",
                              "--out", str(tmp_path / "new")])
    write_config(config, tmp_path / "new")
    sampling = read_config(tmp_path / "new" / "run.json").sampling
    assert (sampling.solver, sampling.guidance_interval) == ("ab2", (0.2, 0.9))
    with pytest.raises(SystemExit):
        parse_arguments(["--sampling.solver", "heun", "--out", str(tmp_path / "other")])
    assert "sampling.solver heun: expected euler, ab2, sde" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, named", [
    (["--muon_lr", "0", "--muon_every", "2"], "--muon_every"),
    (["--cross_weight", "0", "--cross_temperature", "0.1"], "--cross_temperature"),
    (["--cross_weight", "0", "--cross_unseen", "true"], "--cross_unseen"),
    (["--intrinsic_weight", "0", "--align_depth", "1"], "--align_depth"),
    (["--init_blocks", "2"], "--init_blocks"),
    (["--sample_every", "0", "--sample_prompts", "x.txt"], "--sample_prompts"),
    (["--mask_token", "x.pth"], "--mask_token"), (["--new_data", "true"], "--new_data"),
    (["--model.vocab_size", "99"], "--model.vocab_size"),
    (["--text_encoder.mask_id", "9"], "--text_encoder.mask_id")])
def test_an_option_without_effect_is_an_error(tmp_path, capsys, arguments, named):
    with pytest.raises(SystemExit):
        parse_arguments([*arguments, "--out", str(tmp_path / "new")])
    assert f"{named} has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [-5, 2 ** 63, 12345678901234567890123456789])
def test_any_integer_is_a_seed(tmp_path, seed):
    config = parse_arguments(["--seed", str(seed), "--out", str(tmp_path / "new")])
    assert 0 <= config.seed < 2 ** 63 and config.seed == seed % 2 ** 63
