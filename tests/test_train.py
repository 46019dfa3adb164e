"""The training loop: exact resume, ranks, signals, safe files, the command line, and a miniature of the main job."""
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from checkpoint import Checkpoint
from data import Batch
from model import MMDiT, MMDiTConfig
from teacher import load_teacher
from text_encoder import T5Config, T5Encoder, T5Tokenizer

ROOT = Path(__file__).parent.parent
TASKS = ("text_to_image", "edits", "edges", "depth", "pose", "personalisation", "questions")
LOOP = ["--preset", "mini", "--train_scenes", "120", "--test_scenes", "6", "--vae_steps", "2", "--teacher_steps", "2", "--steps", "6",
        "--log_every", "1", "--save_every", "3", "--model.width", "32", "--model.depth", "2", "--model.num_heads", "2", "--model.text_dim", "32",
        "--sampling.steps", "2", "--sampling.text_steps", "2", "--batch_size", "4"]
QUICK = [*LOOP, "--vae.block_channels", "16", "--text_encoder.dim", "32"]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple]:
    return [{name: value for name, value in m.items() if name != "seconds"} for m in metrics(run)]


def weights(run: Path, name: str) -> dict[str, torch.Tensor]:
    file = Checkpoint(train.newest_checkpoint(run) / f"{name}.safetensors")
    return {n: file.read(n) for n in file.names()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A quick run from nothing to its report."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train.main([*QUICK, "--out", str(run)])
    return run


def parts_of(run: Path) -> list[str]:
    """The options that take the frozen parts of another run."""
    return ["--vae_path", str(run / "vae.safetensors"), "--t5_path", str(run / "text_encoder.safetensors"),
            "--tokenizer_path", str(run / "tokenizer.model"), "--teacher_path", str(run / "teacher")]


def interrupt(monkeypatch, after: int) -> None:
    """Send SIGTERM to this process in the middle of step `after`."""
    real = train.update_average

    def update(average, model, step, *settings):
        real(average, model, step, *settings)
        if step + 1 == after:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "update_average", update)


@pytest.mark.parametrize("after", [2, 3, 5])
def test_resume_is_exact(finished, tmp_path, monkeypatch, capsys, after):
    """SIGTERM saves and returns; --resume then gives the losses, weights and averages of a run that was never stopped."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        train.main([*QUICK, "--out", str(run)])
    assert "--resume" in capsys.readouterr().out
    assert train.newest_checkpoint(run).name == f"checkpoint-{after:08d}"
    train.main(["--resume", "--out", str(run)])
    assert losses(run) == losses(finished) and len(losses(run)) == 6
    for name in ("model", "ema"):
        expected, found = weights(finished, name), weights(run, name)
        assert expected.keys() == found.keys() and all(torch.equal(expected[n], found[n]) for n in expected)


def test_resume_in_the_middle_of_a_line(tmp_path, monkeypatch):
    """A line of metrics.jsonl that a stop cuts in two is that of a run which was never stopped."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    arguments = [*QUICK, "--log_every", "4"]
    train.main([*arguments, "--out", str(whole)])
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        train.main([*arguments, "--out", str(run)])
    train.main(["--resume", "--out", str(run)])
    assert losses(run) == losses(whole) and [m["step"] for m in metrics(run)] == [4, 6]


def test_a_moved_run_resumes_where_it_is(finished, tmp_path, monkeypatch):
    run, moved = tmp_path / "run", tmp_path / "elsewhere" / "moved"
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        train.main([*QUICK, "--out", str(run)])
    moved.parent.mkdir()
    run.rename(moved)
    train.main(["--resume", "--out", str(moved)])
    assert losses(moved) == losses(finished) and not run.exists()


def test_another_number_of_ranks_is_refused(finished, tmp_path):
    optimizers = train.make_optimizers(MMDiT.from_pretrained(finished / "checkpoint-00000006" / "model.safetensors"), train.PRESETS["mini"])
    with pytest.raises(ValueError, match="1 ranks, resumed by 2"):
        train.load_optimizers(optimizers, finished / "checkpoint-00000006", world=2)


def test_missing_parts_are_made_in_another_process(tmp_path, monkeypatch):
    """Only those that are missing; its errors arrive here."""
    run = tmp_path / "run"
    config = train.parse_arguments([*QUICK, "--out", str(run)])
    assert train.missing_parts(config, run) == ["world", "tokenizer", "text encoder", "vae", "teacher"]
    monkeypatch.setattr(train.tiny, "train_vae", None)                                        # of this process
    train.prepare_apart(config, run)
    made = {path: path.read_bytes() for path in run.rglob("*") if path.suffix in (".safetensors", ".jsonl")}
    assert train.missing_parts(config, run) == [] and len(made) == 5
    (run / "tokenizer.model").unlink()
    assert train.missing_parts(config, run) == ["tokenizer"]
    train.prepare_apart(config, run)
    assert train.missing_parts(config, run) == [] and all(path.read_bytes() == content for path, content in made.items())
    (run / "tokenizer.model").unlink()
    (run / "data" / "train.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="train.jsonl"):
        train.prepare_apart(config, run)
    given = train.parse_arguments([*LOOP, *parts_of(tmp_path / "run"), "--tokenizer_path", str(run / "vae.safetensors"),
                                   "--data", str(run / "data"), "--out", str(tmp_path / "other")])
    monkeypatch.setattr(train, "ProcessPoolExecutor", None)
    assert train.missing_parts(given, tmp_path / "other") == []
    train.prepare_apart(given, tmp_path / "other")


def test_parts_from_elsewhere(finished, tmp_path):
    """A run whose frozen parts lie in other folders is trained, scored and sampled like any other."""
    run = tmp_path / "run"
    train.main([*LOOP, *parts_of(finished), "--out", str(run), "--seed", "20240101"])
    assert (run / "report.html").exists() and not (run / "vae.safetensors").exists()


def test_parts_that_do_not_fit(finished, tmp_path):
    """Named before any training, and the corrected command may use the same folder."""
    arguments = [*LOOP, *parts_of(finished), "--data", str(finished / "data" / "train.jsonl"), "--out", str(tmp_path / "run")]
    for wrong, named in ((["--model.text_dim", "48"], "text_dim"), (["--sampling.image_size", "60"], "image_size"),
                         (["--sampling.text_length", "64"], "text_length"), (["--sampling.image_size", "256"], "image_size")):
        with pytest.raises(SystemExit) as stopped:
            train.main([*arguments, *wrong])
        assert named in str(stopped.value.code)


def test_outputs(finished):
    scores = json.loads((finished / "scores.json").read_text())
    assert set(scores) == {"seconds", "ceiling", *TASKS, "captions"} and scores["text_to_image"]["n"] == 6
    assert all(scores[name]["n"] > 0 for name in scores if name not in ("seconds", "ceiling"))
    seconds = scores["seconds"]
    assert scores["ceiling"]["scorer"] == 1.0 and {"world", "vae", "model", "evaluation"} <= set(seconds)
    assert seconds["total"] == pytest.approx(sum(v for k, v in seconds.items() if k != "total"), abs=0.2)
    assert Image.open(finished / "samples.png").size[0] > 500
    page = (finished / "report.html").read_text()
    assert "<svg" in page and "data:image/png;base64," in page and "http" not in page
    assert [p.name for p in finished.glob("checkpoint-*")] == ["checkpoint-00000006"]
    assert not list(finished.glob(".*"))
    config = Checkpoint(finished / "checkpoint-00000006" / "model.safetensors").config
    assert config["width"] == 32 and MMDiT.from_pretrained(finished / "checkpoint-00000006" / "ema.safetensors").config.qk_norm


def test_average_is_not_the_model(finished):
    model, average = weights(finished, "model"), weights(finished, "ema")
    assert any(not torch.equal(model[n], average[n]) for n in model)


def test_a_failed_save_keeps_the_last_checkpoint(finished, tmp_path, monkeypatch):
    """A kill while writing leaves the checkpoint before it, and the run continues from there."""
    run = tmp_path / "run"
    real = train.save

    def failing(path, tensors, config=None, **metadata):
        if path.name == "optimizer.safetensors" and metadata["step"] == "6":
            raise RuntimeError("killed")
        real(path, tensors, config, **metadata)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save", failing)
        with pytest.raises(RuntimeError, match="killed"):
            train.main([*QUICK, "--out", str(run)])
    assert train.newest_checkpoint(run).name == "checkpoint-00000003"
    train.main(["--resume", "--out", str(run)])
    assert losses(run) == losses(finished)


def test_clipping_sees_the_mean_gradient(tmp_path, monkeypatch):
    """Four micro batches of the same data and noise have the gradient of one, not four times it."""
    monkeypatch.setattr(train.BatchOrder, "__iter__", lambda self: iter(lambda: [0, 1, 2, 3], None))
    monkeypatch.setattr(train, "noise_seed", lambda config, step, micro, rank: 7)
    norms = []
    for accumulation in ("1", "4"):
        run = tmp_path / accumulation
        train.main([*QUICK, "--out", str(run), "--accumulation", accumulation, "--steps", "1", "--autocast", "false"])
        norms.append(metrics(run)[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def torchrun(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train.py"), *arguments]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            output, errors = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.terminate()                                 # which ends its ranks, too; a kill would leave them behind
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def test_two_ranks(tmp_path):
    """Two processes and accumulation: one set of files, and a resumed run has exactly the losses of one that was never stopped."""
    arguments = [*QUICK, "--batch_size", "2", "--accumulation", "2", "--decay", "false", "--save_every", "2"]
    whole, half = (tmp_path / name for name in ("whole", "half"))
    for run, steps in ((whole, 4), (half, 2)):
        done = torchrun(tmp_path, *arguments, "--steps", str(steps), "--out", str(run))
        assert done.returncode == 0, done.stderr[-2000:]
    assert len(losses(whole)) == 4 and (whole / "report.html").exists() and losses(half) == losses(whole)[:2]
    settings = json.loads((half / "run.json").read_text()) | {"steps": 4}
    (half / "run.json").write_text(json.dumps(settings))
    done = torchrun(tmp_path, "--resume", "--out", str(half))
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(half) == losses(whole)


# ---------------------------------------------------------------- tasks

def corrupted(config: train.TrainConfig, references: int = 0, writes: bool = True, draws: bool = True) -> tuple[train.Corrupted, MMDiT]:
    """A random micro batch of four, and a model whose heads and gates are not zero."""
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(latent_channels=4, width=32, depth=2, num_heads=2, text_dim=16, vocab_size=50, position_table=4,
                              align_dims=(8, 12), align_silu=False, number_references=True))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = Batch("any", None, None, torch.randint(3, 49, (4, 6)) if draws else None, torch.randint(3, 49, (4, 6)) if writes else None,
                  torch.ones(4, 6, dtype=torch.bool) if writes else None, (torch.randn(4, 12), torch.randn(4, 12)) if writes else None)
    encoder = T5Encoder(T5Config(vocab_size=50, dim=16, head_dim=8, ff_dim=16, depth=1, num_heads=2, mask_id=49))
    latents = torch.randn(4, 1 + references, 4, 8, 8)
    return train.corrupt(batch, latents, encoder, 49, torch.ones(1, 6, dtype=torch.int64), torch.Generator().manual_seed(1), config), model


CONFIG = train.TrainConfig(align_depth=1, prompt_dropout=0.5)


@pytest.mark.parametrize("writes", [False, True])
def test_short_prompts_stay_short(writes):
    """Beside longer texts or alone: T5 sees a prompt of three tokens, empty ones are as short, and the loss can be computed."""
    seen = []

    def encoder(ids):
        seen.append(ids)
        return ids[..., None].float().expand(-1, -1, 16)

    _, model = corrupted(CONFIG)
    tokens = torch.randint(3, 49, (4, 6)) if writes else None
    batch = Batch("any", None, None, torch.full((4, 3), 7), tokens, torch.ones(4, 6, dtype=torch.bool) if writes else None, None)
    c = train.corrupt(batch, torch.randn(4, 2, 4, 8, 8), encoder, 49, torch.ones(1, 6, dtype=torch.int64), torch.Generator().manual_seed(1), CONFIG)
    assert [tuple(ids.shape) for ids in seen] == [(4, 3), (4, 6)][:1 + writes]
    assert {tuple(row) for row in seen[0].tolist()} == {(1, 1, 1), (7, 7, 7)} and torch.equal(c.prompts[..., 0], seen[0].float())
    assert c.masked is None or torch.equal(c.masked[..., 0], seen[1].float())
    assert train.Objective(model, CONFIG)(c)["loss"].isfinite()


def test_one_pass_and_two_passes_have_the_same_losses():
    """Without source pictures both branches share a pass; each of them alone gives the same."""
    c, model = corrupted(CONFIG)
    objective = train.Objective(model, CONFIG)
    together = objective(c)
    assert set(together) == {"flow_matching", "masked_token", "contrastive", "intrinsic", "loss"}
    drawn = objective(c._replace(masked=None, tokens=None, features=None))
    written = objective(c._replace(noise=None, prompts=None, features=None))
    assert set(drawn) == {"flow_matching", "loss"} and set(written) == {"masked_token", "loss"}
    for name, alone in (("flow_matching", drawn), ("masked_token", written)):
        torch.testing.assert_close(together[name], alone[name])
    weighted = [together["flow_matching"], 0.2 * together["masked_token"], 0.05 * together["contrastive"], 0.1 * together["intrinsic"]]
    torch.testing.assert_close(together["loss"], sum(weighted))
    question = train.Objective(model, replace(CONFIG, answer_weight=3.0))(c._replace(noise=None, prompts=None, features=None))
    torch.testing.assert_close(question["loss"], 3 * written["masked_token"])


def test_source_pictures_are_seen_by_the_image_branch_alone():
    c, model = corrupted(CONFIG, references=2)
    objective = train.Objective(model, CONFIG)
    with_sources, others = objective(c), objective(c._replace(references=tuple(-x for x in c.references)))
    assert (with_sources["flow_matching"] - others["flow_matching"]).abs() > 1e-4
    torch.testing.assert_close(with_sources["masked_token"], others["masked_token"], rtol=0, atol=0)
    alone = objective(c._replace(references=()))
    torch.testing.assert_close(with_sources["masked_token"], alone["masked_token"])


def test_temperature_of_the_contrast():
    """Warm enough, all pairs look alike: the loss of guessing one of four."""
    c, model = corrupted(CONFIG)
    found = [train.Objective(model, replace(CONFIG, cross_temperature=t))(c)["contrastive"] for t in (0.07, 0.5, 1e4)]
    torch.testing.assert_close(found[0], train.Objective(model, CONFIG)(c)["contrastive"])
    assert (found[0] - found[1]).abs() > 1e-3 and abs(found[2] - math.log(4)) < 1e-3


def test_contrast_of_streams_that_have_not_seen_each_other():
    """The paper's form changes with the prompts and masks that the streams have seen, the other one only with what it contrasts."""
    config = replace(CONFIG, cross_unseen=True)
    c, model = corrupted(config)
    objective = train.Objective(model, config)
    found = objective(c)["contrastive"]
    changed = c._replace(prompts=c.prompts.flip(0), masked=c.masked.flip(0), noise=-c.noise)
    torch.testing.assert_close(objective(changed)["contrastive"], found)
    assert (objective(c._replace(captions=c.captions.flip(0)))["contrastive"] - found).abs() > 1e-4
    paper = train.Objective(model, CONFIG)
    assert (paper(changed)["contrastive"] - paper(c)["contrastive"]).abs() > 1e-4


def test_an_answer_is_all_that_is_hidden_of_a_question():
    c, _ = corrupted(CONFIG, draws=False)
    batch = Batch("any", None, None, None, torch.randint(3, 49, (4, 6)), torch.arange(6).expand(4, 6) > 2, None)
    hidden = [train.corrupt(batch, c.latents[:, None], lambda ids: ids[..., None].float(), 49, torch.ones(1, 6), torch.Generator().manual_seed(i),
                            CONFIG).masked[..., 0] == 49 for i in range(20)]
    assert not torch.stack(hidden)[..., :3].any() and torch.stack(hidden)[..., 3:].any()


def test_every_task_is_trained_and_reported(finished):
    """Six steps have no room for all groups; the names of those that they have stand before their losses."""
    names = {name for m in metrics(finished) for name in m if "." in name}
    assert {"text_to_image.flow_matching", "text_to_image.masked_token", "text_to_image.contrastive", "text_to_image.intrinsic",
            "edits.flow_matching"} <= names
    assert not any(name in names for name in ("questions.flow_matching", "edits.masked_token", "pose.masked_token"))
    for m in metrics(finished):                                 # one step a line: the task's losses are the step's
        assert all(m[name] == m[name.split(".")[1]] for name in m if "." in name)


def test_weights_choose_the_tasks(finished, tmp_path, capsys):
    run = tmp_path / "run"
    train.main([*LOOP, *parts_of(finished), "--data", str(finished / "data"), "--out", str(run), "--weights", "pose=1,questions=2"])
    tasks = {name.split(".")[0] for m in metrics(run) for name in m if "." in name}
    assert tasks == {"pose", "questions"} and sum("questions.masked_token" in m for m in metrics(run)) == 4
    assert "not trained: depth, edges, edits, personalisation, text_to_image" in capsys.readouterr().out
    assert {"pose", "questions"} <= set(json.loads((run / "scores.json").read_text()))
    assert not {"edits", "captions"} & set(json.loads((run / "scores.json").read_text()))
    with pytest.raises(SystemExit) as stopped:
        train.main([*LOOP, *parts_of(finished), "--data", str(finished / "data"), "--out", str(run) + "2", "--weights", "poses=1"])
    assert "poses" in str(stopped.value.code)


def test_stages_start_from_each_other(tmp_path, monkeypatch):
    """Pairs; all tasks but questions; everything: each with the weights, the frozen parts and the data of the run before it."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        train.main([*(QUICK if number == 1 else [*LOOP[:LOOP.index("--model.width")], "--batch_size", "4"]), "--stage", str(number), "--steps", "8"])
    runs = [tmp_path / f"runs/mini-stage{number}" for number in (1, 2, 3)]
    seen = [{name.split(".")[0] for m in metrics(run) for name in m if "." in name} for run in runs]
    assert seen[0] == {"text_to_image"} and "questions" not in seen[1] and {"text_to_image", "edits"} <= seen[1]
    assert not (runs[1] / "vae.safetensors").exists() and not (runs[2] / "data").exists()
    assert set(json.loads((runs[0] / "scores.json").read_text())) == {"seconds", "ceiling", "text_to_image", "captions"}
    assert "questions" in json.loads((runs[2] / "scores.json").read_text())
    first = train.load_models(train.read_config(runs[1] / "run.json"), 0, None, torch.device("cpu"))[0].state_dict()
    last = weights(runs[0], "ema")
    assert all(torch.equal(first[name], last[name]) for name in last)


def test_stages_without_the_one_before(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        train.main(["--stage", "2"])
    assert "runs/tiny-stage1" in capsys.readouterr().err
    assert train.stage(train.PRESETS["sd3"], 3).steps == 30_000 and train.stage(train.PRESETS["sd3"], 2).weights == "*=1,questions=0"


def test_teacher_features_are_computed_once(finished, monkeypatch):
    config, data = train.read_config(finished / "run.json"), finished / "data"
    alone = train.Ranks(0, 1, torch.device("cpu"))
    dataset = train.load_tasks(config, train.parts_of(config, finished), T5Tokenizer(finished / "tokenizer.model"), alone)
    chosen = [dataset.examples[i] for i in dataset.aligned]
    [cache] = data.glob("teacher-*.safetensors")
    expected = Checkpoint(cache).read("image")
    assert len(expected) == len(chosen) == 168 and all(e.task == "text_to_image" for e in chosen)
    found = load_teacher(finished / "teacher").image_features([Image.open(chosen[100].image)])
    torch.testing.assert_close(found[0], expected[100].float(), rtol=1e-2, atol=1e-2)
    monkeypatch.setattr(train, "load_teacher", None)            # a second run reads the cache
    image, text = train.teacher_features(chosen, finished / "teacher", data, 64, 128, torch.device("cpu"))
    assert torch.equal(image.float(), expected.float()) and text.shape == (168, 128)
    with pytest.raises(ValueError, match="width 128"):
        train.teacher_features(chosen, finished / "teacher", data, 64, 99, torch.device("cpu"))
    with pytest.raises(TypeError):                              # other captions are not taken from it
        train.teacher_features(chosen[1:], finished / "teacher", data, 64, 128, torch.device("cpu"))


def test_one_rank_may_train_the_teacher_alone(monkeypatch):
    monkeypatch.setattr("losses.gather_with_gradient", None)
    x = torch.randn(3, 1, 4)
    assert train.contrastive_loss(x, x, gather=False).isfinite()
    with pytest.raises(TypeError):
        train.contrastive_loss(x, x)


def test_pictures_that_are_not_encoded_beforehand(finished, tmp_path):
    """Loading and encoding pictures in every step takes the same examples; only the latents are drawn, not their means."""
    run = tmp_path / "run"
    train.main([*LOOP, *parts_of(finished), "--data", str(finished / "data"), "--out", str(run), "--cache_latents", "false"])
    assert [set(m) for m in metrics(run)] == [set(m) for m in metrics(finished)]


def test_unknown_and_ill_typed_fields(tmp_path, capsys):
    for arguments, named in ((["--stepz", "5"], "--stepz"), (["--steps", "many"], "--steps"), (["--model.width", "1.5"], "--model.width"),
                             (["--decay", "perhaps"], "--decay"), (["--steps", "0"], "--steps"), (["--data", "no.jsonl"], "no.jsonl"),
                             (["--preset", "huge"], "huge"), (["--init", __file__, "--model.width", "64"], "--model.width"),
                             (["--preset", "sd3", "--data", __file__], "--vae_path"), (["--preset", "sd3"], "--data"),
                             (["--test_scenes", "0"], "--test_scenes"), (["--sampling.image_size", "128"], "image_size"),
                             (["--lr", "nan"], "--lr"), (["--model.widht", "64"], "--model.widht"), (["--weights", "edits"], "edits"),
                             (["--stage", "4"], "4"), (["--weights", "edits=-1"], "edits=-1")):
        with pytest.raises(SystemExit) as stopped:
            train.parse_arguments([*arguments, "--out", str(tmp_path / "new")])
        assert stopped.value.code == 2 and named in capsys.readouterr().err


def test_a_run_is_never_overwritten(finished, capsys):
    before = (finished / "scores.json").read_bytes()
    with pytest.raises(SystemExit):
        train.main([*QUICK, "--out", str(finished)])
    assert "--resume" in capsys.readouterr().err and (finished / "scores.json").read_bytes() == before
    with pytest.raises(SystemExit):
        train.main(["--resume", "--out", str(finished), "--steps", "9"])
    assert "--steps" in capsys.readouterr().err


def test_resume_without_a_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--resume", "--out", str(tmp_path / "nothing")])
    assert "nothing" in capsys.readouterr().err


def test_help_shows_every_field(capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("steps", "muon_lr", "model.depth", "vae.stem", "sampling.guidance", "resume"))


def test_schedule():
    config = train.TrainConfig(steps=100, warmup=10, decay=True)
    scales = [train.learning_rate_scale(step, config) for step in range(100)]
    assert scales[0] == pytest.approx(0.1) and max(scales) <= 1 and scales[99] == pytest.approx(0.01)
    assert train.learning_rate_scale(5000, train.TrainConfig()) == 1.0


@pytest.mark.parametrize("every", [1, 4])
def test_average_of_so_many_steps(every):
    """Towards weights that stay as they are the average has come equally far, if it follows in each step or in each fourth."""
    model, average = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    start = average.weight - model.weight
    for step in range(1000, 1040):
        train.update_average(average, model, step, 0.98, every)
    torch.testing.assert_close(average.weight - model.weight, start * 0.98 ** 40, rtol=1e-3, atol=1e-6)


def test_stratified_numbers_are_spread_evenly():
    x = train.stratified(16, torch.Generator().manual_seed(0))
    assert sorted((x * 16).long().tolist()) == list(range(16)) and (x[1:] < x[:-1]).any()


def test_muon_gets_the_matrices_of_the_blocks():
    model = MMDiT(MMDiTConfig(width=32, depth=1, num_heads=2, text_dim=16, vocab_size=50, position_table=4))
    adamw, muon = train.make_optimizers(model, train.PRESETS["tiny"])
    assert len(muon.param_groups[0]["params"]) == 8 and all(p.ndim == 2 for p in muon.param_groups[0]["params"])
    assert sum(len(o.param_groups[0]["params"]) for o in (adamw, muon)) == len(list(model.parameters()))


def test_miniature_of_the_main_job(tmp_path):
    """The real command with the mini preset: losses fall, and what it writes can be used."""
    run = tmp_path / "mini"
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--preset", "mini", "--out", str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = metrics(run)
    assert lines[-1]["flow_matching"] < 0.7 * lines[0]["flow_matching"]
    assert lines[-1]["masked_token"] < 0.7 * lines[0]["masked_token"]
    assert "generated scenes exact" in done.stdout
    picture = tmp_path / "picture.png"
    drawn = subprocess.run([sys.executable, str(ROOT / "sample.py"), "--run", str(run), "--out", str(picture),
                            "a large red circle at the center on a gray background"], capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr[-2000:]
    assert Image.open(picture).size == (64, 64)
