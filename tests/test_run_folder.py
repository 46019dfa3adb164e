"""run_folder.py: missing and unfit parts, teacher features, checkpoints, metrics and timings."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import LOOP, QUICK, losses, metrics, part_options
from PIL import Image

import experiments.parts
import run_folder
import train
from checkpoint import Checkpoint, save
from config import PRESETS, RunFiles, parse_arguments, parts_of, read_config
from data import parse_weights
from model import MMDiT
from run_folder import (Features, Metrics, Skipped, allowed_skips, check_resume, describe_shapes,
                        describe_tasks, encode_in_chunks, every_nth_block, features_folder,
                        load_models, load_optimizers, load_tasks, missing_parts, read_seconds,
                        save_checkpoint, t5_dtype, teacher_features, timed, unused_means)
from teacher import load_teacher
from text_encoder import T5Config, T5Encoder, T5Tokenizer
from vae import VAE, VAEConfig

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


def test_parts_that_do_not_fit(finished, tmp_path, capsys):
    """They are named before any training, and the corrected command may use the same folder."""
    arguments = [*LOOP, *part_options(finished), "--data", str(finished / "data" / "train.jsonl"),
                 "--out", str(tmp_path / "run")]
    for wrong, name in (
            (["--model.text_dim", "48"], "text_dim"),
            (["--sampling.image_size", "60"], "image_size"),
            (["--sampling.text_length", "64"], "text_length"),
            (["--sampling.image_size", "256"], "image_size"),
            (["--max_aspect", "2", "--cache_latents", "false"], "the widest shape is 88 x 48"),
            (["--max_aspect", "2"], "--cache_latents false")):
        with pytest.raises(SystemExit) as stopped:
            train.main([*arguments, *wrong])
        assert name in str(stopped.value.code) + capsys.readouterr().err


# ---------------------------------------------------------------- data

def test_shares_of_the_tasks(finished):
    config = read_config(RunFiles(finished).config)
    parts = parts_of(config, finished)
    dataset = load_tasks(config, parts, T5Tokenizer(parts.tokenizer))
    line = describe_tasks(dataset)
    assert line.startswith("tasks: ") and "not trained" not in line
    weights = parse_weights(config.weights)
    for task in ("questions", "plan"):
        assert f"{task} {weights[task] / sum(weights.values()):.0%}" in line
    assert not unused_means(dataset, config)
    dataset.left_out.append("rest")
    other = replace(config, sigma_means="rest=0,*=1,poses=0,partials=-1")
    assert unused_means(dataset, other) == ["sigma_means: no records of partials, poses"]


@pytest.fixture
def landscapes(tmp_path) -> Path:
    """A JSONL file of two landscapes, a portrait, a square and a picture that cannot be read."""
    sizes = [(200, 100), (90, 55), (100, 200), (64, 64)]
    lines = []
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (40 * i,) * 3).save(tmp_path / f"{i}.png")
    for i in range(5):
        lines.append({"image": [f"{i}.png"], "conversations": ["a red circle", "<image>"]})
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tasks_of_shapes(finished: Path, path: Path, **options):
    config = replace(read_config(finished / "run.json"), data=str(path), weights="*=1",
                     captioned="*", max_aspect=2.0, out=str(path.parent), **options)
    tokenizer = T5Tokenizer(finished / "tokenizer.model")
    return load_tasks(config, parts_of(config, path.parent), tokenizer, unit=8)


def test_shares_of_the_shapes(finished, landscapes):
    """88 x 48 is 1.83 : 1, 80 x 48 is 1.67 : 1 and the nearest to 90 x 55."""
    dataset = tasks_of_shapes(finished, landscapes)
    cropped = (2 * (1 - 88 / 48 / 2) + (1 - 90 / 55 / (80 / 48)) + 0 + 0) / 5
    squares = (1 / 2 + (1 - 55 / 90) + 1 / 2 + 0 + 0) / 5
    assert dataset.cropped == pytest.approx((cropped, squares), abs=1e-6)
    assert describe_shapes(dataset) == (
        f"shapes: 64 x 64 40%, 80 x 48 20%, 88 x 48 20%, 48 x 88 20%; {cropped:.1%} of the pixels "
        f"are cropped, squares would crop {squares:.1%}")
    assert (landscapes.parent / "records.jsonl.aspects").exists()


def test_questions_have_the_template_of_the_settings(finished, landscapes):
    turns = ["red", "a circle", "blue", "a square"]
    landscapes.write_text(json.dumps({"image": "0.png", "conversations": turns}))
    settings = read_config(finished / "run.json").sampling
    settings = replace(settings, question_template="is {question} a color")
    dataset = tasks_of_shapes(finished, landscapes, sampling=settings, dialogues=True)
    batch = dataset.__getitems__([0])
    expected = dataset.tokenizer.dialogue(
        ["is blue a color"], ["a square"], 32, [[("is red a color", "a circle")]])
    assert torch.equal(batch.tokens, expected[0]) and torch.equal(batch.answer, expected[1])
    assert batch.images.shape == (1, 1, 3, 48, 88)


def test_the_teacher_sees_the_crop(finished, landscapes, monkeypatch):
    """Every picture in its shape; files of features have other names for other shapes."""
    class Teacher:
        out_dim = 5

        def image_features(self, pictures):
            return torch.tensor([[*p.shape, p[0, 0, 0], 0] for p in pictures]).float()

        def text_features(self, texts):
            return torch.zeros(len(texts), 5)

    monkeypatch.setattr(run_folder, "load_teacher", lambda *_: Teacher())
    folder = landscapes.parent
    landscapes.write_text(landscapes.read_text() * 14)          # more than the teacher sees at once
    dataset = tasks_of_shapes(finished, landscapes)
    files = teacher_features(dataset, folder / "teacher", folder, 5, CPU)
    image, _ = Features(files, dataset.aligned)(list(range(70)))
    assert image[:, :4].tolist() == 14 * [
        [48, 88, 3, 0], [48, 80, 3, 40], [88, 48, 3, 80], [64, 64, 3, 120], [64, 64, 3, 128]]
    dataset.keys = [key._replace(shape=(64, 64)) for key in dataset.keys]
    as_squares = teacher_features(dataset, folder / "teacher", folder, 5, CPU)
    dataset.keys = [key._replace(shape=(72, 72)) for key in dataset.keys]
    larger = teacher_features(dataset, folder / "teacher", folder, 5, CPU)
    assert len({*files, *as_squares, *larger}) == 3


def test_teacher_features_are_computed_once(finished, monkeypatch):
    config = read_config(finished / "run.json")
    parts, data, teacher = parts_of(config, finished), finished / "data", finished / "teacher"
    assert features_folder(config, parts) == data
    dataset = load_tasks(config, parts, T5Tokenizer(finished / "tokenizer.model"))
    chosen = [dataset.records[int(i)] for i in dataset.aligned]
    [cache] = data.glob("teacher-*.safetensors")
    expected = Checkpoint(cache).read("image")
    assert len(expected) == len(chosen) == 120 and all(e.task == "text_to_image" for e in chosen)
    features = load_teacher(teacher).image_features([Image.open(chosen[100].image)])
    torch.testing.assert_close(features[0], expected[100].float(), rtol=1e-2, atol=1e-2)

    monkeypatch.setattr(run_folder, "load_teacher", None)       # a second run reads the cache
    files = teacher_features(dataset, teacher, data, 128, CPU)
    assert files == [cache]
    image, text = Features(files, dataset.aligned)([int(i) for i in dataset.aligned[[5, 100]]])
    assert torch.equal(image, expected[[5, 100]]) and text.shape == (2, 128)
    with pytest.raises(ValueError, match="width 128"):
        teacher_features(dataset, teacher, data, 99, CPU)
    dataset.aligned = dataset.aligned[1:]
    with pytest.raises(TypeError):                              # the cache has other captions
        teacher_features(dataset, teacher, data, 128, CPU)


def test_ranks_share_the_work_of_the_teacher(finished, tmp_path, monkeypatch):
    """Each computes its shards; an interrupted start computes only those that are missing."""
    config = read_config(finished / "run.json")
    tokenizer = T5Tokenizer(finished / "tokenizer.model")
    dataset = load_tasks(config, parts_of(config, finished), tokenizer)
    monkeypatch.setattr(run_folder, "SHARD", 35)                # four shards of 120 pairs
    arguments = dataset, finished / "teacher", tmp_path, 128, CPU
    files = teacher_features(*arguments, rank=0, world=2)
    assert [file.exists() for file in files] == [True, False, True, False]
    before = [files[i].stat().st_mtime_ns for i in (0, 2)]
    assert teacher_features(*arguments, rank=1, world=2) == files
    assert all(file.exists() for file in files)
    assert teacher_features(*arguments) == files
    assert [files[i].stat().st_mtime_ns for i in (0, 2)] == before
    whole = Features(list((finished / "data").glob("teacher-*")), dataset.aligned)
    chosen = [int(dataset.aligned[i]) for i in (0, 34, 35, 119)]
    monkeypatch.setattr(run_folder, "SHARD", 2048)
    expected = whole(chosen)
    monkeypatch.setattr(run_folder, "SHARD", 35)
    for part, same in zip(Features(files, dataset.aligned)(chosen), expected):
        torch.testing.assert_close(part, same, rtol=1e-2, atol=1e-2)


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


def test_checkpoints_of_the_user_stay(finished, tmp_path):
    """A copy under another name is neither removed nor resumed from."""
    copy = tmp_path / "checkpoint-best"
    shutil.copytree(finished / "checkpoint-00000006", copy)
    model = MMDiT.from_pretrained(copy / "model.safetensors")
    for step in (1, 2):
        save_checkpoint(tmp_path, step, 0.0, model, model, {}, {}, world=1, data="x")
    assert RunFiles(tmp_path).checkpoints() == [tmp_path / "checkpoint-00000002"]
    assert sorted(p.name for p in copy.iterdir()) == [
        "ema.safetensors", "model.safetensors", "optimizer.safetensors"]


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(finished, tmp_path, monkeypatch):
    model = MMDiT.from_pretrained(finished / "checkpoint-00000006" / "model.safetensors")
    save_checkpoint(tmp_path, 1, 0.0, model, model, {}, {}, world=1, data="x")
    real = run_folder.save

    def full(path: Path, *arguments, **metadata):
        if path.name == "ema.safetensors":
            raise OSError(28, "No space left on device", str(path))
        real(path, *arguments, **metadata)

    monkeypatch.setattr(run_folder, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, 0.0, model, model, {}, {}, world=1, data="x")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001"]


def test_a_resumed_run_knows_where_it_comes_from(finished):
    folder = finished / "checkpoint-00000006"
    data = Checkpoint(folder / "optimizer.safetensors").metadata["data"]
    assert check_resume(folder, 1, 4, data, False) is None
    with pytest.raises(ValueError, match="1 ranks, resumed by 2.*global batch 8, not 4"):
        check_resume(folder, 2, 8, data, False)
    assert "resumed by 2 ranks, before 1" in check_resume(folder, 2, 4, data, False)
    with pytest.raises(ValueError, match="data has changed.*--new_data true"):
        check_resume(folder, 1, 4, "other", False)
    assert "new data" in check_resume(folder, 1, 4, "other", True)


def test_where_a_checkpoint_was(finished):
    folder = finished / "checkpoint-00000006"
    model = MMDiT.from_pretrained(folder / "model.safetensors")
    progress = load_optimizers(train.make_optimizers(model, PRESETS["mini"]), folder)
    assert progress.step == 6 and progress.seconds > 0 and progress.metrics == {}


def test_a_rank_reads_the_state_of_its_own_parameters(finished):
    """Also of Muon's older checkpoints, in which its counter had another name."""
    folder = finished / "checkpoint-00000006"
    model = MMDiT.from_pretrained(folder / "model.safetensors")
    optimizers = train.make_optimizers(model, PRESETS["mini"])
    matrix = model.blocks[0].image.qkv.weight
    owned = {matrix, model.patch_embed.weight}
    load_optimizers(optimizers, folder, owned)
    assert set().union(*(optimizer.state for optimizer in optimizers)) == owned
    assert optimizers[1].state[matrix]["step"] == 6


def test_only_the_first_rank_reads_weights(finished):
    """The others have room for those that it sends, and no average."""
    config = replace(read_config(finished / "run.json"), init=str(finished))
    first, average = load_models(config, 0, None, CPU)
    other, none = load_models(config, 0, None, CPU, first=False)
    assert none is None and average is not first
    shapes = {name: x.shape for name, x in first.state_dict().items()}
    assert shapes == {name: x.shape for name, x in other.state_dict().items()}
    assert other.config == first.config and not other.patch_embed.weight.is_meta
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), average.parameters()))


# ---------------------------------------------------------------- frozen parts

@pytest.mark.parametrize("width, autocast, expected", [
    (512, True, torch.bfloat16), (512, False, torch.float32), (128, True, torch.float32)])
def test_a_large_t5_is_in_bfloat16_beside_autocast(tmp_path, width, autocast, expected):
    config = T5Config(vocab_size=40, dim=width, head_dim=8, ff_dim=16, depth=1, num_heads=2)
    file = tmp_path / "t5.safetensors"
    save(file, T5Encoder(config).state_dict(), config)
    assert t5_dtype(replace(PRESETS["tiny"], autocast=autocast), file, CPU) == expected


def test_encoding_in_chunks_is_that_of_all(monkeypatch):
    """The same noise, too."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(block_channels=(16, 16), layers_per_block=1, norm_groups=4))
    images, sizes = torch.rand(5, 3, 32, 48) * 2 - 1, []
    whole = vae.encode(images, sample=True, generator=torch.Generator().manual_seed(1))
    real = vae.encode
    monkeypatch.setattr(vae, "encode", lambda x, **how: sizes.append(len(x)) or real(x, **how))
    monkeypatch.setattr(run_folder, "CHUNK", 2 * 32 * 48 + 1)
    parts = encode_in_chunks(vae, images, sample=True, generator=torch.Generator().manual_seed(1))
    assert sizes == [2, 2, 1] and parts.dtype == torch.float32
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- skipped records

def test_skipped_records_are_listed_once_and_limited(tmp_path, capsys):
    file = tmp_path / "skipped.jsonl"
    skipped = Skipped(file, step=0, allowed=2)
    skipped.add([("a.jsonl, line 1", "broken"), ("a.jsonl, line 1", "broken")], step=3)
    assert skipped.share(4) == 1 and skipped.share(5) == 1
    skipped.add([("a.jsonl, line 7", "missing"), ("a.jsonl, line 1", "broken")], step=5)
    assert skipped.share(6) == 2
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [{"record": "a.jsonl, line 1", "reason": "broken", "step": 4},
                     {"record": "a.jsonl, line 7", "reason": "missing", "step": 6}]
    assert capsys.readouterr().out.count("a.jsonl, line 1 is skipped: broken") == 1
    again = Skipped(file, step=6, allowed=2)                    # of a resumed run
    again.add([("a.jsonl, line 7", "missing")], step=6)
    with pytest.raises(ValueError, match="(?s)3 records.*allows 2.*a.jsonl, line 9: empty"):
        again.add([("a.jsonl, line 9", "empty")], step=7)


def test_skipped_records_newer_than_the_checkpoint_are_dropped(tmp_path):
    """And a line that a kill has cut off."""
    file = tmp_path / "skipped.jsonl"
    old, new = ('{"record": "%s", "reason": "broken", "step": %d}' % pair for pair in
                (("a, line 1", 2), ("a, line 2", 5)))
    file.write_text(f"{old}\n{new}\n{new[:20]}")
    assert set(Skipped(file, 4, 9, writes=False).reasons) == {"a, line 1"}
    assert file.read_text().count("\n") == 2                    # another rank writes
    assert set(Skipped(file, 4, 9).reasons) == {"a, line 1"} and file.read_text() == f"{old}\n"


def test_ranks_count_a_skipped_record_once(tmp_path):
    file = tmp_path / "skipped.jsonl"
    other = {"a, line 1": "broken", "a, line 3": "missing"}
    skipped = Skipped(file, 0, 9, gather=lambda new: [new, other])
    skipped.add([("a, line 1", "broken"), ("a, line 2", "empty")], step=1)
    assert skipped.share(2) == 3 and file.read_text().count("\n") == 3


@pytest.mark.parametrize("share, count, allowed", [
    (0.01, 50, 1), (0.01, 1000, 10), (0.0, 1000, 0), (1.0, 7, 7)])
def test_how_many_may_be_skipped(share, count, allowed):
    assert allowed_skips(share, count) == allowed


# ---------------------------------------------------------------- initial weights

@pytest.mark.parametrize("depth, n, kept", [
    (24, 2, [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]), (4, 2, [0, 3]), (5, 1, [0, 1, 2, 3, 4]),
    (3, 3, [0]), (2, 5, [0])])
def test_every_nth_block(depth, n, kept):
    config = replace(PRESETS["mini"].model, width=8, depth=depth, num_heads=2, vocab_size=20)
    model = MMDiT(config)
    blocks = list(model.blocks)
    thin = every_nth_block(model, n)
    assert [blocks.index(block) for block in thin.blocks] == kept
    assert thin.config == replace(config, depth=len(kept))


def test_init_blocks_of_a_checkpoint(finished):
    """The average starts as the model does; all but the other blocks is as in the checkpoint."""
    config = replace(PRESETS["mini"], init=str(finished), init_blocks=2)
    whole = MMDiT.from_pretrained(RunFiles(finished).averaged_weights()).state_dict()
    model, average = load_models(config, 0, None, CPU)
    assert model.config.depth == 1 and len(model.blocks) == 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole[name]) and torch.equal(tensor, average.state_dict()[name])


def test_a_fresh_model_takes_the_width_of_t5():
    config = replace(PRESETS["small"], model=replace(
        PRESETS["small"].model, width=16, depth=1, num_heads=2, position_table=4))
    assert load_models(config, 30, None, CPU, True, 24)[0].config.text_dim == 24
    given = replace(config, model=replace(config.model, text_dim=40))
    assert load_models(given, 30, None, CPU, True, 24)[0].config.text_dim == 40
