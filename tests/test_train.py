"""train.py: exact resume, ranks, signals, the objective, and a miniature of the main job."""
import contextlib
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
import torch.distributed as dist
from conftest import LOOP, QUICK, STEPS, losses, metrics, part_options, without_bytes
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import train
from checkpoint import Checkpoint
from config import PRESETS, RunFiles, TrainConfig, read_config
from data import Batch
from losses import contrastive_loss, masked_token_loss, sum_over_all_positions
from model import MMDiT, MMDiTConfig
from muon import Muon
from run_folder import load_models, optimizer_state
from text_encoder import T5Config, T5Encoder

ROOT = Path(__file__).parent.parent
TASKS = ("text_to_image", "partial", "plan", "edits", "edges", "depth", "pose",
         "personalisation", "questions")


def weights(run: Path, name: str) -> dict[str, torch.Tensor]:
    file = Checkpoint(RunFiles(run).newest_checkpoint() / f"{name}.safetensors")
    return {n: file.read(n) for n in file.names()}


def tasks_of(run: Path) -> set[str]:
    """The tasks that have losses in metrics.jsonl."""
    return {name.split(".")[0] for line in metrics(run) for name in line if "." in name}


def scores_of(run: Path) -> dict:
    return json.loads(RunFiles(run).scores.read_text())


# ---------------------------------------------------------------- resume

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
    """SIGTERM saves and returns. --resume gives the losses and weights of an unstopped run."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        train.main([*QUICK, "--out", str(run)])
    assert "--resume" in capsys.readouterr().out
    assert RunFiles(run).newest_checkpoint().name == f"checkpoint-{after:08d}"
    train.main(["--resume", "--out", str(run)])
    assert losses(run) == losses(finished) and len(losses(run)) == 6
    for name in ("model", "ema"):
        expected, resumed = weights(finished, name), weights(run, name)
        assert expected.keys() == resumed.keys()
        assert all(torch.equal(expected[n], resumed[n]) for n in expected)


def test_resume_in_the_middle_of_a_line(tmp_path, monkeypatch):
    """A stop between two lines of metrics.jsonl does not change the second one."""
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


# ---------------------------------------------------------------- whole runs

def test_outputs(finished):
    files, scores = RunFiles(finished), scores_of(finished)
    assert set(scores) == {"seconds", "ceiling", *TASKS, "captions"} - {"plan"}
    assert scores["text_to_image"]["n"] == 6
    assert [f.name for f in files.films()] == ["film-image.gif", "film-text.gif"]
    films = [Image.open(f) for f in files.films()]
    assert films[0].n_frames == 1 + 2 and films[1].n_frames > 1         # two steps
    assert all(scores[name]["n"] > 0 for name in scores if name not in ("seconds", "ceiling"))
    seconds = scores["seconds"]
    assert scores["ceiling"]["scorer"] == 1.0
    assert {"world", "vae", "model", "evaluation"} <= set(seconds)
    total = sum(duration for phase, duration in seconds.items() if phase != "total")
    assert seconds["total"] == pytest.approx(total, abs=0.2)
    assert Image.open(files.samples()).size[0] > 500
    page = files.report.read_text()
    assert "<svg" in page and "data:image/png;base64," in page
    assert "http" not in without_bytes(page)
    assert [p.name for p in finished.glob("checkpoint-*")] == ["checkpoint-00000006"]
    assert not list(finished.glob(".*"))
    checkpoint = finished / "checkpoint-00000006"
    assert Checkpoint(checkpoint / "model.safetensors").config["width"] == 32
    assert MMDiT.from_pretrained(checkpoint / "ema.safetensors").config.qk_norm


def test_average_is_not_the_model(finished):
    model, average = weights(finished, "model"), weights(finished, "ema")
    assert any(not torch.equal(model[n], average[n]) for n in model)


def test_parts_from_elsewhere(finished, tmp_path):
    """A run whose frozen parts lie in other folders is trained, scored and sampled as any other."""
    run = tmp_path / "run"
    train.main([*LOOP, *part_options(finished), "--out", str(run), "--seed", "20240101"])
    assert (run / "report.html").exists() and not (run / "vae.safetensors").exists()


def test_weights_choose_the_tasks(finished, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = [*LOOP, *part_options(finished), "--data", str(finished / "data")]
    train.main([*arguments, "--out", str(run), "--weights", "pose=1,questions=2"])
    assert tasks_of(run) == {"pose", "questions"}
    assert sum("questions.masked_token" in m for m in metrics(run)) == 4
    printed = capsys.readouterr().out
    assert "not trained: depth, edges, edits, partial, personalisation, plan, " \
        "text_to_image" in printed
    assert {"pose", "questions"} <= set(scores_of(run))
    assert not {"edits", "captions"} & set(scores_of(run))
    with pytest.raises(SystemExit) as stopped:
        train.main([*arguments, "--out", str(run) + "2", "--weights", "poses=1"])
    assert "poses" in str(stopped.value.code)


def test_the_teacher_may_run_in_every_step(finished, tmp_path):
    """The loss is that of cached features, but for their float16."""
    arguments = [*LOOP, *part_options(finished), "--data", str(finished / "data" / "train.jsonl"),
                 "--weights", "text_to_image=1", "--autocast", "false", "--steps", "2"]
    intrinsic = []
    for online in ("true", "false"):
        run = tmp_path / online
        train.main([*arguments, "--cache_latents", "false", "--teacher_online", online,
                    "--out", str(run)])
        intrinsic.append([line["intrinsic"] for line in metrics(run)])
    assert len(intrinsic[0]) == 2 and intrinsic[0] == pytest.approx(intrinsic[1], abs=1e-3)
    assert intrinsic[0] != intrinsic[1]
    with pytest.raises(SystemExit) as stopped:
        train.main([*arguments, "--teacher_online", "true", "--out", str(tmp_path / "cached")])
    assert "--cache_latents false" in str(stopped.value.code)


def test_stages_start_from_each_other(tmp_path, monkeypatch):
    """Each stage takes weights, frozen parts and data from the run of the stage before."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        arguments = QUICK if number == 1 else STEPS
        train.main([*arguments, "--stage", str(number), "--steps", "8"])
    runs = [tmp_path / f"runs/mini-stage{number}" for number in (1, 2, 3)]
    first_tasks, second_tasks = tasks_of(runs[0]), tasks_of(runs[1])
    assert first_tasks == {"text_to_image"}
    assert "questions" not in second_tasks and {"text_to_image", "edits"} <= second_tasks
    assert not (runs[1] / "vae.safetensors").exists() and not (runs[2] / "data").exists()
    assert set(scores_of(runs[0])) == {"seconds", "ceiling", "text_to_image", "captions"}
    assert "questions" in scores_of(runs[2])
    config = read_config(runs[1] / "run.json")
    start = load_models(config, 0, None, torch.device("cpu"))[0].state_dict()
    end = weights(runs[0], "ema")
    assert all(torch.equal(start[name], end[name]) for name in end)


def test_pictures_that_are_not_encoded_beforehand(finished, tmp_path):
    """Encoding in every step trains the same examples, on drawn latents in place of the means."""
    run = tmp_path / "run"
    train.main([*LOOP, *part_options(finished), "--data", str(finished / "data"),
                "--out", str(run), "--cache_latents", "false"])
    assert [set(m) for m in metrics(run)] == [set(m) for m in metrics(finished)]


def test_pictures_and_dialogues_of_any_shape(finished, tmp_path, monkeypatch, capsys):
    """Landscapes and portraits keep their shapes, a dialogue is one text; losses are finite."""
    lines = []
    for i in range(4):
        Image.new("RGB", (180, 100) if i % 2 else (100, 180), "red").save(tmp_path / f"{i}.png")
        lines.append({"image": [f"{i}.png"], "conversations": ["a red circle", "<image>"]})
        talk = ["what color is the circle?", "red", "what shape is it?", "a circle"]
        lines.append({"image": [f"{i}.png"], "conversations": talk})
        lines.append({"task": "plan", "conversations": ["one circle", "a red circle"]})
        lines.append({"image": [f"{i}.png", f"{3 - i}.png"], "conversations": [""],
                      "instruction": "make it red"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen, real = [], train.corrupt

    def corrupt(batch, latents, *arguments):
        seen.append((batch, latents, real(batch, latents, *arguments)))
        return seen[-1][-1]

    monkeypatch.setattr(train, "corrupt", corrupt)
    run = tmp_path / "run"
    train.main([*LOOP, *part_options(finished), "--data", str(tmp_path / "data.jsonl"),
                "--out", str(run), "--max_aspect", "2", "--dialogues", "true", "--weights", "*=1",
                "--cache_latents", "false", "--model.position_table", "16", "--batch_size", "2",
                "--intrinsic_weight", "0", "--sampling.question_template", "say: {question}",
                "--steps", "8"])
    assert "shapes: 88 x 48 50%, 48 x 88 50%; 1.8% of" in capsys.readouterr().out
    plans = [(batch, c) for batch, latents, c in seen if batch.task == "plan" and latents is None]
    assert len(plans) == 2 and all(c.latents is c.noise is None for _, c in plans)
    assert all(c.masked.shape[:2] == batch.tokens.shape for batch, c in plans)
    seen = [case for case in seen if case[0].task != "plan"]
    shapes = {(batch.task, tuple(batch.images.shape)) for batch, _, _ in seen}
    sizes = {"text_to_image": 1, "questions": 1, "image_to_image": 2}
    assert shapes == {(task, (2, count, 3, *shape)) for task, count in sizes.items()
                      for shape in ((48, 88), (88, 48))}
    for batch, latents, c in seen:
        assert latents.shape[-2:] == (batch.images.shape[-2] // 4, batch.images.shape[-1] // 4)
        if batch.task == "questions":
            assert len(batch.tokens) == 2 and batch.captions == ("a circle", "a circle")
            changes = (batch.answer[:, 1:] != batch.answer[:, :-1]).sum(dim=1)
            assert changes.tolist() == [3, 3]                   # question, answer, and both again
            assert not (c.mask & ~batch.answer).any()
    assert all(math.isfinite(value) for line in metrics(run) for value in line.values())
    assert len(metrics(run)) == 8 and tasks_of(run) == {"plan", *sizes}


def test_the_teacher_sees_the_shape_of_the_batch():
    class Teacher:
        def image_features(self, pictures):
            return [picture.shape for picture in pictures]

        def text_features(self, texts):
            return list(texts)

    batch = Batch("any", torch.zeros(2, 3, 3, 48, 88), None, None, None, None, None, ("a", "b"))
    assert train.online_features(batch, Teacher()) == ([(48, 88, 3)] * 2, ["a", "b"])


def test_clipping_sees_the_mean_gradient(tmp_path, monkeypatch):
    """Four micro batches of the same data and noise have the gradient of one."""
    monkeypatch.setattr(train.BatchOrder, "__iter__", lambda self: iter(lambda: [0, 1, 2, 3], None))
    monkeypatch.setattr(train, "noise_seed", lambda config, step, micro, rank: 7)
    norms = []
    for accumulation in ("1", "4"):
        run = tmp_path / accumulation
        train.main([*QUICK, "--out", str(run), "--accumulation", accumulation, "--steps", "1",
                    "--autocast", "false"])
        norms.append(metrics(run)[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


# ---------------------------------------------------------------- waiting for a GPU

class Waits(TorchDispatchMode):
    """Record the operations whose result a GPU has to send before the CPU goes on."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()
        self.paused = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        waits = name in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "lift_fresh")
        if name in ("index", "index_put", "index_put_"):
            waits = any(x is not None and x.dtype == torch.bool for x in args[1])
        if waits and not self.paused:
            self.names.add(name)
        return function(*args, **(kwargs or {}))

    def excuse(self, monkeypatch, owner, name: str, calls: list[str]) -> None:
        """Let a function wait, and count its calls."""
        real = getattr(owner, name)

        def function(*arguments, **named):
            calls.append(name)
            self.paused += 1
            try:
                return real(*arguments, **named)
            finally:
                self.paused -= 1

        monkeypatch.setattr(owner, name, function)


def test_waits_are_recorded():
    mask, logits, zeros = torch.tensor([[True, False]]), torch.randn(1, 2, 5), torch.zeros(1, 2)
    cases = {
        "nonzero": lambda: masked_token_loss(logits, zeros.long(), mask, torch.ones(1)),
        "index": lambda: logits[mask], "_local_scalar_dense": lambda: bool(zeros.sum() > 0),
        "lift_fresh": lambda: torch.tensor([3])}
    for name, act in cases.items():
        with Waits() as waits:
            act()
        assert name in waits.names
    with Waits() as waits:
        sum_over_all_positions(logits, zeros.long(), mask, torch.ones(1)).isfinite()
    assert not waits.names


def test_no_step_waits_for_the_device_but_where_it_writes(finished, tmp_path, monkeypatch):
    """Every task, with pictures that are encoded in the step. T5 checks its ids on a CPU alone."""
    waits, calls = Waits(), []
    monkeypatch.setattr(train, "masked_token_loss", lambda logits, tokens, mask, t, answer:
                        sum_over_all_positions(logits, tokens, mask & answer, t))
    for owner, name in ((train.Tasks, "__getitems__"), (T5Encoder, "forward"),
                        (train, "check_norms"), (train.Metrics, "write"),
                        (train, "save_checkpoint")):
        waits.excuse(monkeypatch, owner, name, calls)
    real = train.load_batches

    def load_batches(*arguments):               # the loop alone, from its second step on
        batches = real(*arguments)
        yield next(batches)
        with waits:
            yield from batches

    monkeypatch.setattr(train, "load_batches", load_batches)
    run = tmp_path / "run"
    train.main([*LOOP, *part_options(finished), "--data", str(finished / "data"), "--out", str(run),
                "--weights", "*=1", "--cache_latents", "false", "--muon_lr", "0", "--steps", "14",
                "--log_every", "7", "--save_every", "100"])
    assert tasks_of(run) == set(TASKS) and waits.names == set()
    assert calls.count("check_norms") == calls.count("write") == 2
    assert calls.count("save_checkpoint") == 1 and calls.count("__getitems__") == 14


def test_counters_of_muon_stay_in_host_memory():
    """In a resumed run, too: each would be waited for."""
    before = Muon([torch.nn.Parameter(torch.ones(4, 4))], lr=0.1)
    before.param_groups[0]["params"][0].grad = torch.ones(4, 4)
    before.step()
    after = Muon([torch.nn.Parameter(torch.ones(4, 4, device="meta"))], lr=0.1)
    after.load_state_dict(before.state_dict())
    [state] = after.state.values()
    assert state["momentum_buffer"].is_meta and state["step"].device.type == "cpu"


# ---------------------------------------------------------------- ranks

def torchrun(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", str(ROOT / "train.py"), *arguments]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        try:
            output, errors = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.terminate()                 # ends its ranks, too; a kill would not
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def test_two_ranks(tmp_path):
    """Two processes and accumulation write one set of files, and a resumed run is exact."""
    arguments = [*QUICK, "--batch_size", "2", "--accumulation", "2", "--decay", "false",
                 "--save_every", "2"]
    whole, half = tmp_path / "whole", tmp_path / "half"
    for run, steps in ((whole, 4), (half, 2)):
        done = torchrun(tmp_path, *arguments, "--steps", str(steps), "--out", str(run))
        assert done.returncode == 0, done.stderr[-2000:]
    assert len(losses(whole)) == 4 and (whole / "report.html").exists()
    assert losses(half) == losses(whole)[:2]
    settings = json.loads((half / "run.json").read_text()) | {"steps": 4}
    (half / "run.json").write_text(json.dumps(settings))
    done = torchrun(tmp_path, "--resume", "--out", str(half))
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(half) == losses(whole)


def test_one_rank_may_train_the_teacher_alone(monkeypatch):
    monkeypatch.setattr("losses.gather_with_gradient", None)
    x = torch.randn(3, 1, 4)
    assert contrastive_loss(x, x, gather=False).isfinite()
    with pytest.raises(TypeError):
        contrastive_loss(x, x)


# ---------------------------------------------------------------- divided optimizers

def bytes_of(tensors) -> int:
    """The memory of tensors, in which those that share it count once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def train_divided(rank: int, world: int, folder: str) -> None:
    """Three steps of two micro batches, the same on every rank; keep weights, state and bytes."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    ranks = train.Ranks(rank, world, torch.device("cpu"))
    config = replace(CONFIG, muon_lr=0.02, muon_every=2, lr=1e-3, cross_weight=0.0)
    pair, model = corrupted(config)
    question, _ = corrupted(config, draws=False)
    parameters, optimizers = train.Parameters(model, ranks), train.make_optimizers(model, config)
    objective = train.Objective(model, config)
    if world > 1:
        objective = DistributedDataParallel(
            objective, find_unused_parameters=True, forward_sync_buffers=False,
            gradient_as_bucket_view=True)
    held = []
    for step, micro_batches in enumerate([(pair, pair), (question, question), (pair, question)]):
        for micro, c in enumerate(micro_batches):
            waits = world > 1 and step > 0 and micro == 0
            with objective.no_sync() if waits else contextlib.nullcontext():
                objective(c)["loss"].backward()
            held.append(bytes_of(p.grad for p in model.parameters() if p.grad is not None))
        parameters.update(optimizers, parameters.clip(1.0))
    state = {name: value.clone() for name, value in optimizer_state(optimizers).items()}
    sizes = {"weights": bytes_of(model.parameters()), "gradients": max(held),
             "state": bytes_of(state.values())}
    torch.save((model.state_dict(), ranks.unite(state), sizes), f"{folder}/{world}-{rank}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def test_each_rank_keeps_its_share_of_the_optimizer(tmp_path):
    """Two and four ranks have the weights and the state of one, bit for bit, in less memory."""
    train_divided(0, 1, str(tmp_path))
    weights, state, alone = torch.load(tmp_path / "1-0.pt")
    assert alone["state"] > 1.3 * alone["weights"]              # two of AdamW, one of Muon
    for world in (2, 4):
        (tmp_path / "meeting").unlink(missing_ok=True)
        torch.multiprocessing.spawn(train_divided, (world, str(tmp_path)), nprocs=world)
        for rank in range(world):
            theirs, united, sizes = torch.load(tmp_path / f"{world}-{rank}.pt")
            assert theirs.keys() == weights.keys()
            assert all(torch.equal(theirs[name], weights[name]) for name in weights)
            assert sizes["state"] < 1.25 * alone["state"] / world
            # in DDP's buckets alone; a head that a step does not train is made anew
            assert sizes["gradients"] < 1.15 * sizes["weights"]
            assert united.keys() == (state.keys() if rank == 0 else set())
            assert all(torch.equal(united[name], state[name]) for name in united)


def test_shares_are_even():
    owners = train.owners_of([5, 40, 5, 30, 10, 10], 2)
    assert owners[1] != owners[3] and owners == train.owners_of([5, 40, 5, 30, 10, 10], 2)
    loads = [sum(size for size, owner in zip([5, 40, 5, 30, 10, 10], owners) if owner == rank)
             for rank in range(2)]
    assert loads == [50, 50]
    with torch.device("meta"):
        sizes = [p.numel() for p in MMDiT(PRESETS["sd3"].model).parameters()]
    owners = train.owners_of(sizes, 8)
    loads = [sum(s for s, owner in zip(sizes, owners) if owner == rank) for rank in range(8)]
    assert max(loads) < 1.01 * min(loads)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_the_weights(value):
    config = replace(CONFIG, muon_lr=0.02, lr=1e-3)
    _, model = corrupted(config)
    ranks = train.Ranks(0, 1, torch.device("cpu"))
    parameters, optimizers = train.Parameters(model, ranks), train.make_optimizers(model, config)
    for is_bad in (False, True):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        if is_bad:
            p.grad[0] = value
        norm = parameters.clip(1.0)
        parameters.update(optimizers, norm)
        same = [torch.equal(p, before[name]) for name, p in model.named_parameters()]
        assert (all(same) if is_bad else not any(same)) and norm.isfinite() == (not is_bad)


# ---------------------------------------------------------------- corruption and objective

CONFIG = TrainConfig(align_depth=1, prompt_dropout=0.5)
EMPTY = torch.ones(1, 6, dtype=torch.int64)     # the empty prompt
MASK = 49


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_ids() -> torch.Tensor:
    return torch.randint(3, 49, (4, 6))


def corrupted(config: TrainConfig, references: int = 0, writes: bool = True,
              draws: bool = True) -> tuple[train.Corrupted, MMDiT]:
    """A random micro batch of four, and a model whose heads and gates are not zero."""
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(
        latent_channels=4, width=32, depth=2, num_heads=2, text_dim=16, vocab_size=50,
        position_table=4, align_dims=(8, 12), align_silu=False, number_references=True))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prompts = random_ids() if draws else None
    tokens = answer = features = None
    if writes:
        tokens, answer = random_ids(), torch.ones(4, 6, dtype=torch.bool)
        features = torch.randn(4, 12), torch.randn(4, 12)
    batch = Batch("any", None, None, prompts, tokens, answer, features)
    encoder = T5Encoder(T5Config(
        vocab_size=50, dim=16, head_dim=8, ff_dim=16, depth=1, num_heads=2, mask_id=MASK))
    latents = torch.randn(4, 1 + references, 4, 8, 8)
    return train.corrupt(batch, latents, encoder, MASK, EMPTY, seeded(), config), model


def test_noise_levels_of_single_tasks():
    """sigma_means names a task, `*` or neither; a mean far off gives sigmas at an end."""
    config = replace(CONFIG, sigma_mean=1.4)
    for means, expected in (
            ("", 1.4), ("any=-0.5,*=2", -0.5), ("other=0,*=2", 2), ("other=0", 1.4)):
        assert train.sigma_mean_of("any", replace(config, sigma_means=means)) == expected
    low, high = (corrupted(replace(config, sigma_means=f"any={mean}"))[0].sigma for mean in (-9, 9))
    assert low.max() < 0.05 and high.min() > 0.95


@pytest.mark.parametrize("writes", [False, True])
def test_short_prompts_stay_short(writes):
    """T5 sees three tokens of a prompt of three, beside longer texts or alone.

    Empty prompts are as short, and the loss is finite.
    """
    seen = []

    def encoder(ids):
        seen.append(ids)
        return ids[..., None].float().expand(-1, -1, 16)

    _, model = corrupted(CONFIG)
    tokens = random_ids() if writes else None
    answer = torch.ones(4, 6, dtype=torch.bool) if writes else None
    batch = Batch("any", None, None, torch.full((4, 3), 7), tokens, answer, None)
    latents = torch.randn(4, 2, 4, 8, 8)
    c = train.corrupt(batch, latents, encoder, MASK, EMPTY, seeded(), CONFIG)
    assert [tuple(ids.shape) for ids in seen] == [(4, 3), (4, 6)][:1 + writes]
    assert {tuple(row) for row in seen[0].tolist()} == {(1, 1, 1), (7, 7, 7)}
    assert torch.equal(c.prompts[..., 0], seen[0].float())
    assert c.masked is None or torch.equal(c.masked[..., 0], seen[1].float())
    assert train.Objective(model, CONFIG)(c)["loss"].isfinite()


def test_noisy_latents_are_between_image_and_noise():
    """z = (1 - sigma) x + sigma e."""
    c, _ = corrupted(CONFIG)
    sigma = c.sigma[:, None, None, None]
    torch.testing.assert_close(c.noisy, (1 - sigma) * c.latents + sigma * c.noise)


def test_one_pass_and_two_passes_have_the_same_losses():
    """Without source pictures both branches share a pass; each of them alone gives the same."""
    c, model = corrupted(CONFIG)
    objective = train.Objective(model, CONFIG)
    together = objective(c)
    assert set(together) == {"flow_matching", "masked_token", "contrastive", "intrinsic", "loss"}
    image_only = c._replace(masked=None, tokens=None, features=None)
    text_only = c._replace(noise=None, prompts=None, features=None)
    drawn, written = objective(image_only), objective(text_only)
    assert set(drawn) == {"flow_matching", "loss"} and set(written) == {"masked_token", "loss"}
    for name, alone in (("flow_matching", drawn), ("masked_token", written)):
        torch.testing.assert_close(together[name], alone[name])
    weighted = [together["flow_matching"], 0.2 * together["masked_token"],
                0.05 * together["contrastive"], 0.1 * together["intrinsic"]]
    torch.testing.assert_close(together["loss"], sum(weighted))
    question = train.Objective(model, replace(CONFIG, answer_weight=3.0))(text_only)
    torch.testing.assert_close(question["loss"], 3 * written["masked_token"])


def test_source_pictures_are_seen_by_the_image_branch_alone():
    c, model = corrupted(CONFIG, references=2)
    objective = train.Objective(model, CONFIG)
    with_sources = objective(c)
    others = objective(c._replace(references=tuple(-x for x in c.references)))
    assert (with_sources["flow_matching"] - others["flow_matching"]).abs() > 1e-4
    torch.testing.assert_close(with_sources["masked_token"], others["masked_token"], rtol=0, atol=0)
    alone = objective(c._replace(references=()))
    torch.testing.assert_close(with_sources["masked_token"], alone["masked_token"])


def test_temperature_of_the_contrast():
    """At a high temperature all pairs look alike: the loss is that of a guess among four."""
    c, model = corrupted(CONFIG)
    configs = [replace(CONFIG, cross_temperature=t) for t in (0.07, 0.5, 1e4)]
    contrasts = [train.Objective(model, config)(c)["contrastive"] for config in configs]
    torch.testing.assert_close(contrasts[0], train.Objective(model, CONFIG)(c)["contrastive"])
    assert (contrasts[0] - contrasts[1]).abs() > 1e-3
    assert abs(contrasts[2] - math.log(4)) < 1e-3


def test_contrast_of_streams_that_have_not_seen_each_other():
    """Prompts and masks that the streams have seen change the paper's form, not the unseen one."""
    config = replace(CONFIG, cross_unseen=True)
    c, model = corrupted(config)
    objective = train.Objective(model, config)
    unseen = objective(c)["contrastive"]
    noisy = torch.lerp(c.latents, -c.noise, c.sigma.view(-1, 1, 1, 1))
    changed = c._replace(prompts=c.prompts.flip(0), masked=c.masked.flip(0),
                         noise=-c.noise, noisy=noisy)
    torch.testing.assert_close(objective(changed)["contrastive"], unseen)
    other_captions = c._replace(captions=c.captions.flip(0))
    assert (objective(other_captions)["contrastive"] - unseen).abs() > 1e-4
    paper = train.Objective(model, CONFIG)
    assert (paper(changed)["contrastive"] - paper(c)["contrastive"]).abs() > 1e-4


def test_only_the_answer_to_a_question_is_masked():
    c, _ = corrupted(CONFIG, draws=False)
    is_answer = torch.arange(6).expand(4, 6) > 2
    batch = Batch("any", None, None, None, random_ids(), is_answer, None)

    def ids_of(seed: int) -> torch.Tensor:
        """Masked ids, since this text encoder changes nothing; (4, 6)."""
        return train.corrupt(batch, c.latents[:, None], lambda ids: ids[..., None].float(), MASK,
                             torch.ones(1, 6), seeded(seed), CONFIG).masked[..., 0]

    masked = torch.stack([ids_of(seed) == MASK for seed in range(20)])          # (20, 4, 6)
    assert not masked[..., :3].any() and masked[..., 3:].any()


def test_every_answer_of_a_dialogue_counts():
    """Two runs of answer: both are masked, and a token of the question changes no loss."""
    c, model = corrupted(CONFIG, draws=False)
    is_answer = torch.tensor([False, True, True, False, False, True]).expand(4, 6)
    batch = Batch("any", None, None, None, random_ids(), is_answer, None)
    encoder = T5Encoder(T5Config(
        vocab_size=50, dim=16, head_dim=8, ff_dim=16, depth=1, num_heads=2, mask_id=MASK))
    masks = [train.corrupt(batch, c.latents[:, None], encoder, MASK, EMPTY, seeded(seed), CONFIG)
             for seed in range(20)]
    counts = torch.stack([m.mask for m in masks]).sum(dim=(0, 1))               # (6,)
    assert (counts > 0).tolist() == is_answer[0].tolist()
    objective = train.Objective(model, CONFIG)
    text = next(m for m in masks if m.mask[:, 1].any() and m.mask[:, 5].any())
    loss = objective(text)["masked_token"]
    for place, is_counted in ((0, False), (1, True), (3, False), (5, True)):
        tokens = text.tokens.clone()                            # of the targets alone
        tokens[:, place] = (tokens[:, place] + 7) % 40
        other = objective(text._replace(tokens=tokens))["masked_token"]
        assert bool((other - loss).abs() > 1e-4) == is_counted


def test_stratified_numbers_are_spread_evenly():
    x = train.stratified(16, seeded(0))
    assert sorted((x * 16).long().tolist()) == list(range(16)) and (x[1:] < x[:-1]).any()


# ---------------------------------------------------------------- optimization

def test_schedule():
    config = TrainConfig(steps=100, warmup=10, decay=True)
    scales = [train.learning_rate_scale(step, config) for step in range(100)]
    assert scales[0] == pytest.approx(0.1) and max(scales) <= 1
    assert scales[99] == pytest.approx(0.01)
    assert train.learning_rate_scale(5000, TrainConfig()) == 1.0


@pytest.mark.parametrize("every", [1, 4])
def test_average_of_every_step_and_of_every_fourth(every):
    """Either way the average has come equally far towards weights that stay as they are."""
    model, average = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    start = average.weight - model.weight
    for step in range(1000, 1040):
        train.update_average(average, model, step, 0.98, every)
    end = average.weight - model.weight
    torch.testing.assert_close(end, start * 0.98 ** 40, rtol=1e-3, atol=1e-6)


def test_each_parameter_has_one_optimizer_and_rate():
    model = MMDiT(MMDiTConfig(
        width=32, depth=1, num_heads=2, text_dim=16, vocab_size=50, position_table=4))
    names = {p: name for name, p in model.named_parameters()}
    config = PRESETS["tiny"]
    adamw, muon = train.make_optimizers(model, config)
    others, modulations = adamw.param_groups
    [matrices] = muon.param_groups
    assert len(matrices["params"]) == 8 and all(p.ndim == 2 for p in matrices["params"])
    slow = {names[p] for p in modulations["params"]}
    assert slow == {"time_embed.0.weight", "time_embed.0.bias", "time_embed.2.weight",
                    "time_embed.2.bias", "blocks.0.image.modulation.weight",
                    "blocks.0.text.modulation.weight", "image_modulation.weight"}
    rates = [group["base_lr"] for group in (others, modulations, matrices)]
    assert rates == [config.lr, config.modulation_lr, config.muon_lr]
    optimized = [p for group in (others, modulations, matrices) for p in group["params"]]
    assert len(optimized) == len(set(optimized)) == len(names)
    [alone] = train.make_optimizers(model, replace(config, modulation_lr=0.0, muon_lr=0.0))
    assert [names[p] for p in alone.param_groups[0]["params"]] == list(names.values())


# ---------------------------------------------------------------- the main job

def test_miniature_of_the_main_job(tmp_path):
    """The real command with the mini preset: losses fall, and its model draws."""
    run, picture = tmp_path / "mini", tmp_path / "picture.png"
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--preset", "mini", "--out", str(run)],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = metrics(run)
    assert lines[-1]["flow_matching"] < 0.7 * lines[0]["flow_matching"]
    assert lines[-1]["masked_token"] < 0.7 * lines[0]["masked_token"]
    assert "generated scenes exact" in done.stdout
    drawn = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), "--run", str(run), "--out", str(picture),
         "a large red circle at the center on a gray background"],
        capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr[-2000:]
    assert Image.open(picture).size == (64, 64)
