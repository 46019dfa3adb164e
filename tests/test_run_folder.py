"""run_folder.py: missing and unfit parts, teacher features, checkpoints, metrics and timings."""
from pathlib import Path

import pytest
import torch
from conftest import LOOP, QUICK, losses, metrics, part_options
from PIL import Image

import experiments.parts
import run_folder
import train
from checkpoint import Checkpoint
from config import PRESETS, RunFiles, parse_arguments, parts_of, read_config
from model import MMDiT
from run_folder import (Metrics, describe_tasks, features_folder, load_optimizers, load_tasks,
                        missing_parts, read_seconds, teacher_features, timed)
from teacher import load_teacher
from text_encoder import T5Tokenizer

CPU = torch.device("cpu")


# ---------------------------------------------------------------- timings

def test_seconds_of_a_phase_add_up(tmp_path, monkeypatch):
    times = iter([10.0, 12.5, 20.0, 21.0, 30.0, 30.5])
    monkeypatch.setattr(run_folder.time, "time", lambda: next(times))
    assert read_seconds(tmp_path) == {}
    for phase in ("model", "vae", "model"):
        with timed(tmp_path, phase):
            pass
    assert read_seconds(tmp_path) == {"model": 3.0, "vae": 1.0}


def test_a_phase_that_fails_has_no_seconds(tmp_path):
    with pytest.raises(RuntimeError), timed(tmp_path, "model"):
        raise RuntimeError
    assert read_seconds(tmp_path) == {}


# ---------------------------------------------------------------- metrics

def test_metrics_are_means_that_survive_a_stop(tmp_path):
    """A line is cut in two by a checkpoint; the newer and the unfinished line are dropped."""
    def losses_of(value: float) -> dict[str, torch.Tensor]:
        return {"flow_matching": torch.tensor(value), "loss": torch.tensor(2 * value)}

    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 2, "loss": 9.0}\n{"step": 4, "loss": 8.0}\n{"step": 6, "lo')
    before = Metrics(file, 2, lambda x: x)
    assert file.read_text() == '{"step": 2, "loss": 9.0}\n'
    before.add("edits", losses_of(1.0))
    after = Metrics(file, 2, lambda x: x)
    after.load_state(before.state(), CPU)
    after.add("pose", losses_of(2.0))
    line = after.write(4, seconds=0.5)
    assert line == {"step": 4, "flow_matching": 1.5, "edits.flow_matching": 1.0, "loss": 3.0,
                    "pose.flow_matching": 2.0, "seconds": 0.5}
    assert metrics(tmp_path) == [{"step": 2, "loss": 9.0}, line]
    silent = Metrics(None, 0, lambda x: x)                      # a rank that does not write
    silent.add("pose", losses_of(2.0))
    assert silent.write(1)["loss"] == 4.0


def test_every_task_is_trained_and_reported(finished):
    """A task's name stands before its losses. Six steps are too few for all groups."""
    names = {name for m in metrics(finished) for name in m if "." in name}
    assert {"text_to_image.flow_matching", "text_to_image.masked_token",
            "text_to_image.contrastive", "text_to_image.intrinsic",
            "edits.flow_matching"} <= names
    absent = ("questions.flow_matching", "edits.masked_token", "pose.masked_token")
    assert not any(name in names for name in absent)
    for m in metrics(finished):             # one step a line: the task's losses are the step's
        assert all(m[name] == m[name.split(".")[1]] for name in m if "." in name)


# ---------------------------------------------------------------- parts

def test_missing_parts_are_made_in_another_process(tmp_path, monkeypatch):
    """Only missing parts are made, and errors of the other process arrive here."""
    run, other = tmp_path / "run", tmp_path / "other"
    files = RunFiles(run)
    config = parse_arguments([*QUICK, "--out", str(run)])
    assert missing_parts(config, run) == ["world", "tokenizer", "text encoder", "vae", "teacher"]
    monkeypatch.setattr(experiments.parts, "train_vae", None)               # in this process only
    train.prepare_apart(config, run)
    kept = [p for p in run.rglob("*") if p.suffix in (".safetensors", ".jsonl")]
    contents = {path: path.read_bytes() for path in kept}
    assert missing_parts(config, run) == [] and len(contents) == 5

    files.tokenizer.unlink()
    assert missing_parts(config, run) == ["tokenizer"]
    train.prepare_apart(config, run)
    assert missing_parts(config, run) == []
    assert all(path.read_bytes() == content for path, content in contents.items())

    files.tokenizer.unlink()
    (files.world / "train.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="train.jsonl"):
        train.prepare_apart(config, run)

    given = parse_arguments([*LOOP, *part_options(run), "--tokenizer_path", str(files.vae),
                             "--data", str(files.world), "--out", str(other)])
    monkeypatch.setattr(train, "ProcessPoolExecutor", None)
    assert missing_parts(given, other) == []
    train.prepare_apart(given, other)


def test_parts_that_do_not_fit(finished, tmp_path):
    """They are named before any training, and the corrected command may use the same folder."""
    arguments = [*LOOP, *part_options(finished), "--data", str(finished / "data" / "train.jsonl"),
                 "--out", str(tmp_path / "run")]
    for wrong, name in (
            (["--model.text_dim", "48"], "text_dim"),
            (["--sampling.image_size", "60"], "image_size"),
            (["--sampling.text_length", "64"], "text_length"),
            (["--sampling.image_size", "256"], "image_size")):
        with pytest.raises(SystemExit) as stopped:
            train.main([*arguments, *wrong])
        assert name in str(stopped.value.code)


# ---------------------------------------------------------------- data

def test_shares_of_the_tasks(finished):
    config = read_config(RunFiles(finished).config)
    parts = parts_of(config, finished)
    dataset = load_tasks(config, parts, T5Tokenizer(parts.tokenizer))
    line = describe_tasks(dataset)
    assert line.startswith("tasks: ") and "questions 23%" in line and "not trained" not in line


def test_teacher_features_are_computed_once(finished, monkeypatch):
    config = read_config(finished / "run.json")
    parts, data, teacher = parts_of(config, finished), finished / "data", finished / "teacher"
    assert features_folder(config, parts) == data
    dataset = load_tasks(config, parts, T5Tokenizer(finished / "tokenizer.model"))
    chosen = [dataset.examples[i] for i in dataset.aligned]
    [cache] = data.glob("teacher-*.safetensors")
    expected = Checkpoint(cache).read("image")
    assert len(expected) == len(chosen) == 168 and all(e.task == "text_to_image" for e in chosen)
    features = load_teacher(teacher).image_features([Image.open(chosen[100].image)])
    torch.testing.assert_close(features[0], expected[100].float(), rtol=1e-2, atol=1e-2)

    monkeypatch.setattr(run_folder, "load_teacher", None)       # a second run reads the cache
    image, text = teacher_features(chosen, teacher, data, 64, 128, CPU)
    assert torch.equal(image.float(), expected.float()) and text.shape == (168, 128)
    with pytest.raises(ValueError, match="width 128"):
        teacher_features(chosen, teacher, data, 64, 99, CPU)
    with pytest.raises(TypeError):                              # the cache has other captions
        teacher_features(chosen[1:], teacher, data, 64, 128, CPU)


# ---------------------------------------------------------------- checkpoints

def test_a_failed_save_keeps_the_last_checkpoint(finished, tmp_path, monkeypatch):
    """A kill while writing leaves the checkpoint before it, from which the run continues."""
    run = tmp_path / "run"
    real = run_folder.save

    def failing(path: Path, tensors, config=None, **metadata):
        if path.name == "optimizer.safetensors" and metadata["step"] == "6":
            raise RuntimeError("killed")
        real(path, tensors, config, **metadata)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save", failing)
        with pytest.raises(RuntimeError, match="killed"):
            train.main([*QUICK, "--out", str(run)])
    assert RunFiles(run).newest_checkpoint().name == "checkpoint-00000003"
    train.main(["--resume", "--out", str(run)])
    assert losses(run) == losses(finished)


def test_another_number_of_ranks_is_refused(finished):
    folder = finished / "checkpoint-00000006"
    model = MMDiT.from_pretrained(folder / "model.safetensors")
    optimizers = train.make_optimizers(model, PRESETS["mini"])
    with pytest.raises(ValueError, match="1 ranks, resumed by 2"):
        load_optimizers(optimizers, folder, world=2)
    progress = load_optimizers(optimizers, folder, world=1)
    assert progress.step == 6 and progress.seconds > 0 and progress.metrics == {}
