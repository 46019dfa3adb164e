"""The training loop: exact resume, ranks, signals, safe files, the command line, and a miniature of the main job."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from checkpoint import Checkpoint
from model import MMDiT, MMDiTConfig

ROOT = Path(__file__).parent.parent
LOOP = ["--preset", "mini", "--train_scenes", "120", "--test_scenes", "6", "--vae_steps", "2", "--steps", "6", "--log_every", "1",
        "--save_every", "3", "--model.width", "32", "--model.depth", "2", "--model.num_heads", "2", "--model.text_dim", "32",
        "--sampling.steps", "2", "--sampling.text_steps", "2", "--batch_size", "4"]
QUICK = [*LOOP, "--vae.block_channels", "16", "--text_encoder.dim", "32"]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple]:
    return [(m["step"], m["flow_matching"], m["masked_token"], m["contrastive"], m["grad_norm"]) for m in metrics(run)]


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
            "--tokenizer_path", str(run / "tokenizer.model")]


def interrupt(monkeypatch, after: int) -> None:
    """Send SIGTERM to this process in the middle of step `after`."""
    real = train.update_average

    def update(average, model, step, decay):
        real(average, model, step, decay)
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
    assert set(scores) == {"seconds", "text_to_image", "captions", "ceiling"} and scores["text_to_image"]["n"] == 6
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
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train.py"),
                           *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=240)


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


def test_unknown_and_ill_typed_fields(tmp_path, capsys):
    for arguments, named in ((["--stepz", "5"], "--stepz"), (["--steps", "many"], "--steps"), (["--model.width", "1.5"], "--model.width"),
                             (["--decay", "perhaps"], "--decay"), (["--steps", "0"], "--steps"), (["--data", "no.jsonl"], "no.jsonl"),
                             (["--preset", "huge"], "huge"), (["--init", __file__, "--model.width", "64"], "--model.width"),
                             (["--preset", "sd3", "--data", __file__], "--vae_path"), (["--preset", "sd3"], "--data"),
                             (["--test_scenes", "0"], "--test_scenes"), (["--sampling.image_size", "128"], "image_size"),
                             (["--lr", "nan"], "--lr"), (["--model.widht", "64"], "--model.widht")):
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
