"""Kills, full disks, broken data, lost ranks: a run ends soon and says why, or loses nothing.

Runs start through tests/faults.py, a process that has imported train.py and forks.
"""
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import LOOP, STEPS, losses, metrics, part_options
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from checkpoint import Checkpoint, save
from config import RunFiles, read_config
from data import BatchOrder, Group
from model import MMDiT
from run_folder import load_models

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SOON = 30                                   # seconds in which a failure must end every process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses fork, /proc and /dev/full")


# ---------------------------------------------------------------- processes

class Process:
    """train.py in a process of its own, with a fault or without."""

    def __init__(self, starter: "Starter", output: Path, **request):
        self.starter, self.output = starter, output
        self.id = starter.ask(output=str(output), **request)

    def wait(self, seconds: float = SOON) -> int:
        """The exit status. Fails, and ends the process, if it does not end in time."""
        status = self.starter.ask(wait=self.id, seconds=seconds)
        if status is None:
            self.kill()
            pytest.fail(f"still runs after {seconds} s:\n{self.text()}")
        return status

    def kill(self) -> int:
        """End it with its loader processes; returns its exit status."""
        with suppress(ProcessLookupError):
            os.killpg(self.id, signal.SIGKILL)
        return self.starter.ask(wait=self.id, seconds=SOON)

    def text(self) -> str:
        """Everything that it has printed."""
        return self.output.read_text() if self.output.exists() else ""

    def error(self) -> str:
        """The line that says why it ended. Fails without one, and if there is more than that."""
        errors = [line for line in self.text().splitlines() if line.startswith("error: ")]
        assert "Traceback" not in self.text(), self.text()
        assert len(errors) == 1, self.text()
        return errors[0]


class Starter:
    """The process of tests/faults.py."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "faults.py")], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)})

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, *argv: str | Path, fault: list | None = None, cwd: Path | None = None,
              **env: str) -> Process:
        """Start train.py with options, in a folder and an environment."""
        self.count += 1
        return Process(self, self.folder / f"{self.count}.txt", argv=list(map(str, argv)),
                       cwd=str(cwd or self.folder), env=env, fault=fault)

    def start_ranks(self, count: int, *argv: str | Path,
                    faults: dict[int, list] | None = None) -> list[Process]:
        """Start ranks as torchrun does. faults: those of some ranks."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [self.start(*argv, fault=(faults or {}).get(rank),
                           **env, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]

    def run(self, *argv: str | Path, **how) -> str:
        """Run train.py to its end, which must be a good one. Returns what it printed."""
        process = self.start(*argv, **how)
        assert process.wait(60) == 0, process.text()
        return process.text()


@pytest.fixture(scope="module")
def starter(tmp_path_factory) -> Iterator[Starter]:
    starter = Starter(tmp_path_factory.mktemp("output"))
    yield starter
    starter.process.stdin.close()
    assert starter.process.wait(SOON) == 0


# ---------------------------------------------------------------- data and runs

WORDS = ("a small red circle at the center on a white background",
         "a large blue square at the top left on a black background",
         "a small green triangle at the bottom right on a gray background")


def write_pairs(folder: Path, count: int = 12) -> Path:
    """Write pictures and their captions as real data has them. Returns the JSONL file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = random.Random(0), []
    for i in range(count):
        cells = [tuple(rng.randbytes(3)) for _ in range(16)]
        picture = Image.new("RGB", (4, 4))
        picture.putdata(cells)
        picture.resize((64, 64)).save(folder / f"{i}.jpg")
        turns = [{"from": "human", "value": WORDS[i % 3]}, {"from": "gpt", "value": "<image>"}]
        lines.append(json.dumps({"image": f"{i}.jpg", "conversations": turns}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder / "pairs.jsonl"


def truncate(picture: Path) -> None:
    picture.write_bytes(picture.read_bytes()[:700])


def options(finished: Path, data: Path, *more: str | Path, model: Path | None = None) -> list:
    """A run on the parts of another, from a small model or `model`, which ends without a report."""
    start = [*STEPS, "--init", str(model)] if model else LOOP
    return [*start, *part_options(finished), "--data", str(data), "--weights", "*=1",
            "--intrinsic_weight", "0", *more]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint: model, average, optimizer."""
    folder = RunFiles(run).newest_checkpoint()
    return {f"{name}.{key}": tensor for name in ("model", "ema", "optimizer")
            for key, tensor in load_file(folder / f"{name}.safetensors").items()}


def assert_same(run: Path, other: Path) -> None:
    """Both runs have the same metrics except seconds, and the same weights."""
    assert losses(run) == losses(other)
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_whole(run: Path) -> int:
    """The newest checkpoint loads. Returns its step, 0 if there is none."""
    folder = RunFiles(run).newest_checkpoint()
    if folder is None:
        return 0
    for name in ("model", "ema"):
        MMDiT.from_pretrained(folder / f"{name}.safetensors")
    assert load_file(folder / "optimizer.safetensors")
    assert re.fullmatch(r"checkpoint-\d{8}", folder.name)
    return int(Checkpoint(folder / "optimizer.safetensors").metadata["step"])


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if ".tmp" in path.name]


def wait_for(run: Path, step: int, process: Process) -> None:
    """Wait for the checkpoint of a step, or a later one."""
    end = time.monotonic() + SOON
    while time.monotonic() < end:
        with suppress(OSError):             # a checkpoint may vanish while the folder is read
            newest = RunFiles(run).newest_checkpoint()
            if newest and int(newest.name.removeprefix("checkpoint-")) >= step:
                return
        time.sleep(0.002)
    process.kill()
    pytest.fail(f"no checkpoint of step {step} came:\n{process.text()}")


# ---------------------------------------------------------------- kill -9

KILLS, STEPS_TO_GO = 30, 160


def test_kills_at_random_moments_lose_nothing(finished, starter, tmp_path):
    """Each of 30 restarts goes on from a whole checkpoint, to the end of an undisturbed run.

    A third of the kills comes at the start, while index, features and latents are made, the others
    within the step after a checkpoint, a third of which is the next save.
    """
    lines = (finished / "data" / "train.jsonl").read_text().splitlines()
    data = {name: tmp_path / name / "some.jsonl" for name in ("whole", "killed")}
    for file in data.values():
        file.parent.mkdir()
        for picture in (finished / "data").iterdir():
            if picture.is_dir():
                (file.parent / picture.name).symlink_to(picture)
        file.write_text("\n".join(lines[::12]) + "\n")
    runs = {name: tmp_path / name / "run" for name in data}

    def arguments(name: str) -> list[str]:
        settings = options(finished, data[name], "--save_every", "1", "--log_every", "3",
                           "--steps", str(STEPS_TO_GO), "--intrinsic_weight", "0.1")
        return [*settings, "--out", str(runs[name])]

    starter.run(*arguments("whole"))
    rng, run, before = random.Random(0), runs["killed"], 0
    for kill in range(KILLS):
        resume = ["--resume", "--out", run] if RunFiles(run).config.exists() else None
        process = starter.start(*(resume or arguments("killed")))
        if kill % 3:
            wait_for(run, before + rng.randint(1, 3), process)
        time.sleep(rng.uniform(0, 0.03 if kill % 3 else 0.25))
        assert process.kill() == -signal.SIGKILL, process.text()
        assert "error" not in process.text(), process.text()
        after = assert_whole(run)
        assert before <= after < STEPS_TO_GO
        before = after
    assert "training" in starter.run("--resume", "--out", run)
    assert_same(run, runs["whole"])
    assert len(RunFiles(run).checkpoints()) == 1 and not (run / ".checkpoint.tmp").exists()


# ---------------------------------------------------------------- ranks that fail

@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_ends_the_other(finished, starter, tmp_path, lost):
    """In the middle of a step; rank 0 holds the store that the ranks share."""
    arguments = options(finished, write_pairs(tmp_path), "--out", tmp_path / "run")
    ranks = starter.start_ranks(2, *arguments, faults={lost: ["kill in step", 2]})
    assert ranks[lost].wait() == -signal.SIGKILL
    assert ranks[1 - lost].wait() == 1
    assert "another rank has ended" in ranks[1 - lost].error()


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_rank_ends_both(finished, starter, tmp_path, failing):
    arguments = options(finished, write_pairs(tmp_path), "--out", tmp_path / "run")
    fault = ["fail in step", 2, "ValueError", "a.jsonl, line 3: the reason"]
    ranks = starter.start_ranks(2, *arguments, faults={failing: fault})
    assert [rank.wait() for rank in ranks] == [1, 1]
    assert ranks[failing].error() == "error: a.jsonl, line 3: the reason"
    assert "another rank has ended" in ranks[1 - failing].error()


def test_a_fault_of_the_program_keeps_its_traceback_and_ends_all_ranks(finished, starter, tmp_path):
    arguments = options(finished, write_pairs(tmp_path), "--out", tmp_path / "run")
    ranks = starter.start_ranks(2, *arguments, faults={1: ["fail in step", 1, "TypeError", "bug"]})
    assert [rank.wait() for rank in ranks] == [1, 1]
    assert ranks[1].text().rstrip().endswith("TypeError: bug") and "Traceback" in ranks[1].text()


def test_an_error_while_the_others_wait_for_the_first_rank(finished, starter, tmp_path):
    """The first rank builds the index and finds a broken line, the second waits for it."""
    data = write_pairs(tmp_path)
    with open(data, "a") as file:
        file.write('{"image": ["0.jpg"], "conv\n')
    ranks = starter.start_ranks(2, *options(finished, data, "--out", tmp_path / "run"))
    assert [rank.wait() for rank in ranks] == [1, 1]
    assert f"{data}, line 13: not valid JSON" in ranks[0].error()


def test_a_signal_to_one_rank_saves_and_stops_both(finished, starter, tmp_path):
    run, arguments = tmp_path / "run", options(finished, write_pairs(tmp_path))
    ranks = starter.start_ranks(2, *arguments, "--out", run, faults={1: ["stop in step", 3]})
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert "--resume" in ranks[0].text() and assert_whole(run) == 4


def test_torchrun_ends_soon_if_a_rank_is_killed(finished, tmp_path):
    """The real launcher; rank 1 is killed as soon as there is a checkpoint."""
    run = tmp_path / "run"
    arguments = options(finished, write_pairs(tmp_path), "--out", str(run), "--steps", "100000",
                        "--save_every", "5")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", str(ROOT / "train.py"), *arguments]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        try:
            end = time.monotonic() + 60
            while not RunFiles(run).newest_checkpoint() and time.monotonic() < end:
                time.sleep(0.05)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            ranks = [int(child) for child in children
                     if b"RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")]
            start = time.monotonic()
            os.kill(ranks[0], signal.SIGKILL)
            _, errors = process.communicate(timeout=SOON)
        finally:
            process.terminate()             # ends its ranks, too; a kill would not
    assert process.returncode != 0 and time.monotonic() - start < SOON
    # torchrun may end rank 0 before it has said that rank 1 is lost; it says so itself
    assert "Signal 9 (SIGKILL)" in errors, errors
    assert errors.count("error: another rank has ended") <= 1 and assert_whole(run)


@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_loader_ends_the_run(finished, starter, tmp_path, world):
    """As the system does when memory is short."""
    arguments = options(finished, write_pairs(tmp_path), "--out", tmp_path / "run",
                        "--cache_latents", "false", "--workers", "1")
    fault = ["kill in loader", 4]
    ranks = (starter.start_ranks(2, *arguments, faults={1: fault}) if world == 2
             else [starter.start(*arguments, fault=fault)])
    assert [rank.wait() for rank in ranks] == [1] * world
    assert "DataLoader worker" in ranks[-1].error() and "--workers" in ranks[-1].error()


@pytest.mark.parametrize("kind", ["TypeError", "OSError"])
def test_an_error_in_a_loader_is_the_only_one(finished, starter, tmp_path, kind):
    """A fault of the program has one traceback, one of the system is one line."""
    arguments = options(finished, write_pairs(tmp_path), "--out", tmp_path / "run",
                        "--cache_latents", "false", "--workers", "2")
    process = starter.start(*arguments, fault=["fail in loader", 1, kind, "stale file handle"])
    assert process.wait() == 1 and "DataLoader worker (pid" not in process.text(), process.text()
    if kind == "OSError":
        assert process.error() == "error: stale file handle"
    else:
        assert process.text().rstrip().endswith("TypeError: stale file handle")


def test_loaders_do_not_outlive_a_killed_run(finished, starter, tmp_path):
    arguments = options(finished, write_pairs(tmp_path), "--out", tmp_path / "run",
                        "--cache_latents", "false", "--workers", "2")
    process = starter.start(*arguments, fault=["kill in step", 2])
    assert process.wait() == -signal.SIGKILL
    end = time.monotonic() + SOON
    with pytest.raises(ProcessLookupError):                     # the group has no process left
        while time.monotonic() < end:
            os.killpg(process.id, 0)
            time.sleep(0.1)


def test_rank_without_torchrun(finished, starter, tmp_path):
    arguments = options(finished, write_pairs(tmp_path), "--out", tmp_path / "run")
    process = starter.start(*arguments, RANK="0")
    assert process.wait() == 1
    assert "torchrun" in process.error() and "WORLD_SIZE" in process.error()


# ---------------------------------------------------------------- full disk and NaN

@pytest.fixture(scope="module")
def undisturbed(finished, starter, tmp_path_factory) -> Path:
    """A run of six steps that is not disturbed, of a constant learning rate."""
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = options(finished, write_pairs(folder), "--decay", "false", "--out", folder / "run")
    starter.run(*arguments)
    return folder / "run"


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors"])
def test_a_full_disk_leaves_the_last_checkpoint(finished, starter, tmp_path, undisturbed, name):
    """The disk is full in the second save; with more room, the run goes on from the first."""
    run = tmp_path / "run"
    arguments = options(finished, write_pairs(tmp_path), "--decay", "false", "--out", run)
    process = starter.start(*arguments, fault=["full disk", name, 2])
    assert process.wait() == 1
    assert f"{name}: cannot be written" in process.error()
    assert assert_whole(run) == 3 and not leftovers(run)
    starter.run("--resume", "--out", run)
    assert_same(run, undisturbed)


def test_a_full_disk_at_a_line_of_metrics(finished, starter, tmp_path, undisturbed):
    run = tmp_path / "run"
    file = RunFiles(run).metrics
    arguments = options(finished, write_pairs(tmp_path), "--decay", "false", "--out", run)
    process = starter.start(*arguments, fault=["full file in step", 4, str(file)])
    assert process.wait() == 1
    assert f"{file}: " in process.error() and "No space left" in process.error()
    assert assert_whole(run) == 3
    file.unlink()
    kept = RunFiles(undisturbed).metrics.read_text().splitlines(keepends=True)[:4]
    file.write_text("".join(kept) + kept[0][:40])               # as a disk that is full leaves it
    starter.run("--resume", "--out", run)
    assert_same(run, undisturbed)


@pytest.mark.parametrize("world", [1, 2])
def test_nan_names_the_records_of_the_step(finished, starter, tmp_path, world):
    """Of all ranks and micro batches, though one picture of one rank is at fault."""
    run, data = tmp_path / "run", write_pairs(tmp_path, 16)
    arguments = options(finished, data, "--out", run, "--batch_size", "2", "--accumulation", "2",
                        "--save_every", "1")
    fault = ["NaN in step", 5]              # counts micro batches: in step 2
    ranks = (starter.start_ranks(2, *arguments, faults={1: fault}) if world == 2
             else [starter.start(*arguments, fault=fault)])
    assert [rank.wait() for rank in ranks] == [1] * world
    group = Group("text_to_image", range(16), 1.0)
    expected = set()
    for rank in range(world):
        order = iter(BatchOrder([group], 2, 0, rank, world, start=4))
        expected |= {f"{data}, line {i + 1}" for i in next(order) + next(order)}
    for rank in ranks:
        message = rank.error()
        assert "step 2" in message and str(run / "checkpoint-00000002") in message
        named = re.findall(re.escape(str(data)) + r", line \d+", message)
        assert len(named) == 4 * world and set(named) == expected
    assert assert_whole(run) == 2


@pytest.mark.parametrize("world", [1, 2])
def test_nan_is_found_before_the_next_save(finished, starter, tmp_path, world):
    """With rare lines of metrics: it names the step of the NaN, and nothing of it is written."""
    run, data = tmp_path / "run", write_pairs(tmp_path, 16)
    arguments = options(finished, data, "--out", run, "--batch_size", "2", "--log_every", "100",
                        "--save_every", "4", "--steps", "20", "--keep", "7")
    ranks = starter.start_ranks(world, *arguments, faults={world - 1: ["NaN in step", 4]})
    assert [rank.wait() for rank in ranks] == [1] * world
    group = Group("text_to_image", range(16), 1.0)
    expected = {f"{data}, line {i + 1}" for rank in range(world)
                for i in next(iter(BatchOrder([group], 2, 0, rank, world, start=4)))}
    for rank in ranks:
        message = rank.error()
        assert "step 4:" in message and "checkpoint-00000004" in message
        assert set(re.findall(re.escape(str(data)) + r", line \d+", message)) == expected
    assert assert_whole(run) == 4 and not RunFiles(run).kept(7).exists()
    assert not RunFiles(run).metrics.exists()
    for name, tensor in weights(run).items():
        assert tensor.isfinite().all(), name


# ---------------------------------------------------------------- gradients of several ranks

GLOBAL_BATCH = 8


def micro_batches(model: MMDiT, kinds: list[str]) -> dict[str, torch.Tensor]:
    """Random micro batches of all ranks by NUMBER.FIELD; see `fix_batches` in faults.py."""
    c, b, tensors = model.config, GLOBAL_BATCH, {}
    torch.manual_seed(0)
    for number, kind in enumerate(kinds):
        def text():
            return torch.randn(b, 12, c.text_dim)

        def latents():
            return torch.randn(b, c.latent_channels, 8, 8)

        fields = {"latents": latents()}
        if kind != "question":
            fields |= {"noise": latents(), "noisy": latents(), "sigma": torch.rand(b),
                       "prompts": text()}
        if kind == "edit":
            fields["source"] = latents()
        else:
            fields |= {"tokens": torch.randint(3, 40, (b, 12)), "t": torch.rand(b) + 0.1,
                       "mask": torch.rand(b, 12) < 0.5, "masked": text(),
                       "answer": torch.arange(12).expand(b, 12) > 4}
        if kind == "pair":
            fields |= {"image_features": torch.randn(b, c.align_dims[1]),
                       "text_features": torch.randn(b, c.align_dims[1])}
        tensors |= {f"{number}.{name}": tensor.clone() for name, tensor in fields.items()}
    return tensors


@pytest.fixture(scope="module")
def random_model(finished, tmp_path_factory) -> Path:
    """A model whose heads and gates are not zero, so that every parameter has a gradient."""
    model = MMDiT.from_pretrained(finished / "checkpoint-00000006" / "model.safetensors")
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("random") / "model.safetensors"
    save(path, model.state_dict(), model.config)
    return path


@pytest.mark.parametrize("steps", [
    [["pair"], ["edit"], ["question"]],
    [["pair", "pair"], ["pair", "question"], ["edit", "pair"]]])
def test_ranks_share_the_gradient_of_the_global_batch(finished, starter, tmp_path, random_model,
                                                      steps):
    """1, 2 and 4 ranks, which slice the same micro batches, have the same gradients.

    All losses are in them. A micro batch may train a head that the last one of the step does not.
    """
    file, data = tmp_path / "batches.safetensors", write_pairs(tmp_path)
    save_file(micro_batches(MMDiT.from_pretrained(random_model), sum(steps, [])), file)
    arguments = options(finished, data, "--autocast", "false", "--intrinsic_weight", "0.1",
                        "--accumulation", str(len(steps[0])), "--steps", str(len(steps)),
                        model=random_model)
    gradients, lines = {}, {}
    for world in (1, 2, 4):
        run, kept = tmp_path / f"run{world}", tmp_path / f"gradients{world}.safetensors"
        ranks = starter.start_ranks(
            world, *arguments, "--batch_size", str(GLOBAL_BATCH // world), "--out", run,
            faults=dict.fromkeys(range(world), ["fix batches", str(file), str(kept)]))
        assert [rank.wait() for rank in ranks] == [0] * world, ranks[0].text()
        gradients[world], lines[world] = load_file(kept), losses(run)
    names = {"pair": {"flow_matching", "masked_token", "contrastive", "intrinsic"},
             "edit": {"flow_matching"}, "question": {"masked_token"}}
    for line, kinds in zip(lines[1], steps, strict=True):
        assert set.union(*(names[kind] for kind in kinds)) <= line.keys()
    for world in (2, 4):
        for line, expected in zip(lines[world], lines[1], strict=True):
            assert line == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert gradients[world].keys() == gradients[1].keys()
        for name, gradient in gradients[1].items():
            torch.testing.assert_close(gradients[world][name], gradient, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- resume

def test_resume_on_other_ranks(finished, starter, tmp_path):
    """The same global batch goes on and says so; another one is refused, with the reason."""
    run = tmp_path / "run"
    starter.run(*options(finished, write_pairs(tmp_path)), "--steps", "2", "--out", run)
    shapes = {name: tensor.shape for name, tensor in weights(run).items()}
    resume = "--resume", "--out", run, "--steps"
    for rank in starter.start_ranks(2, *resume, "4"):
        assert rank.wait() == 1
        assert "global batch 8, not 4" in rank.error() and "--batch_size" in rank.error()
    ranks = starter.start_ranks(2, *resume, "4", "--batch_size", "2")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text()
    assert shapes == {name: tensor.shape for name, tensor in weights(run).items()}
    assert "resumed by 2 ranks, before 1" in ranks[0].text()
    assert "global batch of 4" in ranks[0].text() and "global batch" not in ranks[1].text()
    again = starter.start(*resume, "6", "--batch_size", "2")
    assert again.wait() == 1 and "global batch 2, not 4" in again.error()
    assert "before 2" in starter.run(*resume, "6", "--batch_size", "1", "--accumulation", "4")
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_resume_with_other_data(finished, starter, tmp_path):
    """Refused, unless the change is meant; then the new data is what later resumes expect."""
    run, data = tmp_path / "run", write_pairs(tmp_path)
    starter.run(*options(finished, data), "--steps", "2", "--out", run)
    lines = data.read_text().splitlines(keepends=True)
    resume = "--resume", "--out", run, "--steps", "4"
    for changed in (lines + lines[:1], lines[::-1],
                    [lines[0].replace("red", "blue"), *lines[1:]]):
        data.write_text("".join(changed))
        refused = starter.start(*resume)
        assert refused.wait() == 1
        assert "data has changed" in refused.error() and "--new_data true" in refused.error()
    data.write_text("".join(lines))
    os.utime(data, (1, 1))                                      # another time, the same contents
    assert "data has changed" not in starter.run("--resume", "--out", run, "--steps", "3")
    data.write_text("".join(lines + lines[:1]))
    assert "data has changed" in starter.run(*resume, "--new_data", "true")
    assert "data has changed" not in starter.run("--resume", "--out", run, "--steps", "5")
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5]


def test_resume_trains_longer(finished, starter, tmp_path, undisturbed):
    """As if the run had been that long from the start; fewer steps than there are is an error."""
    run = tmp_path / "run"
    arguments = options(finished, write_pairs(tmp_path), "--decay", "false", "--out", run)
    starter.run(*arguments, "--steps", "2")
    starter.run("--resume", "--out", run, "--steps", "6")
    assert_same(run, undisturbed)
    assert read_config(RunFiles(run).config).steps == 6
    shorter = starter.start("--resume", "--out", run, "--steps", "4")
    assert shorter.wait() == 1 and "--steps 4" in shorter.error()


# ---------------------------------------------------------------- broken data

def test_a_broken_picture_ends_the_run_in_one_line(finished, tmp_path):
    """The real command with loader processes, which once hung for ever."""
    data = write_pairs(tmp_path)
    truncate(tmp_path / "7.jpg")
    arguments = options(finished, data, "--out", tmp_path / "run", "--cache_latents", "false",
                        "--workers", "2", "--max_skipped", "0")
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], timeout=SOON,
                          capture_output=True, text=True, env=ENVIRONMENT)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(errors) == 1 and "--max_skipped" in errors[0]
    assert f"{data}, line 8: {tmp_path / '7.jpg'}: cannot be read as a picture" in done.stderr


@pytest.mark.parametrize("faulty", ["one rank", "all ranks"])
def test_a_broken_picture_ends_all_ranks(finished, starter, tmp_path, faulty):
    """Though only one of them may meet it, while the other waits for gradients."""
    data = write_pairs(tmp_path)
    for picture in ["7.jpg"] if faulty == "one rank" else [f"{i}.jpg" for i in range(0, 12, 2)]:
        truncate(tmp_path / picture)
    arguments = options(finished, data, "--out", tmp_path / "run", "--cache_latents", "false",
                        "--workers", "2", "--max_skipped", "0", "--batch_size", "2")
    ranks = starter.start_ranks(2, *arguments)
    assert [rank.wait() for rank in ranks] == [1, 1]
    named = [rank for rank in ranks if "--max_skipped" in rank.error()]
    message = named[0].text()
    assert f"{data}, line" in message and ".jpg: cannot be read" in message


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("loading", [
    ["--cache_latents", "true"], ["--cache_latents", "false", "--workers", "0"],
    ["--cache_latents", "false", "--workers", "2"]])
def test_without_any_usable_picture(finished, starter, tmp_path, loading, world):
    data = write_pairs(tmp_path)
    for picture in tmp_path.glob("*.jpg"):
        truncate(picture)
    arguments = [*options(finished, data, "--out", tmp_path / "run"), *loading]
    ranks = starter.start_ranks(world, *arguments)
    assert [rank.wait() for rank in ranks] == [1] * world
    shown = [rank for rank in ranks if "text_to_image can be used" in rank.text()]
    assert shown and re.search(rf"{data}, line \d+: \S+\.jpg: cannot be read", shown[0].error())


@pytest.mark.parametrize("loading", [
    ["--cache_latents", "true"], ["--cache_latents", "false", "--workers", "2"]])
def test_a_broken_picture_is_skipped(finished, starter, tmp_path, loading):
    """Warned of and listed once, counted in every later line; a resumed run is as exact as ever.

    The second run stops at a checkpoint after the record is found, the third is killed before it.
    """
    data = write_pairs(tmp_path)
    truncate(tmp_path / "7.jpg")
    arguments = [*options(finished, data, "--steps", "9", "--save_every", "4"), *loading]
    whole = tmp_path / "whole"
    printed = starter.run(*arguments, "--out", whole)
    entry = {"record": f"{data}, line 8"}
    counts = [line.get("skipped", 0) for line in losses(whole)]
    first = counts.index(1)
    assert 0 < first < 3 and counts == [0] * first + [1] * (9 - first)

    def check(run: Path) -> None:
        assert_same(run, whole)
        [listed] = map(json.loads, RunFiles(run).skipped.read_text().splitlines())
        assert listed | entry == listed and "7.jpg" in listed["reason"]

    check(whole)
    assert printed.count("warning: ") == 1 and f"{data}, line 8 is skipped" in printed
    for name, fault in (("stopped", ["stop in step", 5]), ("killed", ["kill in step", 2])):
        run = tmp_path / name
        starter.start(*arguments, "--out", run, fault=fault).wait()
        assert "warning" not in starter.run("--resume", "--out", run) or name == "killed"
        check(run)


def test_two_ranks_count_a_broken_picture_once(finished, starter, tmp_path):
    """Both ranks meet it in some epoch; a resumed run counts what both found before."""
    data, run = write_pairs(tmp_path), tmp_path / "run"
    truncate(tmp_path / "7.jpg")
    arguments = options(finished, data, "--batch_size", "2", "--cache_latents", "false",
                        "--workers", "0", "--steps", "24", "--save_every", "12")
    ranks = starter.start_ranks(2, *arguments, "--out", run)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text() + ranks[1].text()
    assert losses(run)[-1]["skipped"] == 1
    assert len(RunFiles(run).skipped.read_text().splitlines()) == 1
    ranks = starter.start_ranks(2, "--resume", "--out", run, "--steps", "30")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text() + ranks[1].text()
    assert losses(run)[-1]["skipped"] == 1
    assert len(RunFiles(run).skipped.read_text().splitlines()) == 1


def test_every_kind_of_bad_record_is_skipped(finished, starter, tmp_path):
    """With the reason of each, up to the share that is allowed."""
    data, run = write_pairs(tmp_path, 16), tmp_path / "run"
    truncate(tmp_path / "0.jpg")
    (tmp_path / "1.jpg").write_bytes(b"")
    (tmp_path / "2.jpg").write_text("not a picture")
    (tmp_path / "3.jpg").unlink()
    (tmp_path / "4.jpg").unlink()
    (tmp_path / "4.jpg").mkdir()
    broken = bytearray((finished / "data" / "images" / "train" / "000000.png").read_bytes())
    broken[20:24] = b"\xff\xff\xff\xff"     # a height of four billion
    (tmp_path / "5.jpg").write_bytes(broken)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    lines[6]["conversations"][0]["value"] = " "
    lines[7]["conversations"][0]["value"] = "a circle <extra_id_0> circle"
    lines[8]["conversations"] = ["a small circle " * 20, "a circle"]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = options(finished, data, "--cache_latents", "false", "--workers", "1", "--steps",
                        "12", "--out", str(run), "--batch_size", "4")
    starter.run(*arguments, "--max_skipped", "1")
    listed = {entry["record"]: entry["reason"]
              for entry in map(json.loads, RunFiles(run).skipped.read_text().splitlines())}
    assert listed.keys() == {f"{data}, line {number}" for number in range(1, 10)}
    assert losses(run)[-1]["skipped"] == 9
    shutil.rmtree(run)
    process = starter.start(*arguments, "--max_skipped", "0.5")
    assert process.wait() == 1
    assert "records could not be used, --max_skipped allows" in process.error()
    assert process.text().count(f"\n  {data}, line ") >= 4      # the list


# ---------------------------------------------------------------- another folder

def test_relative_paths_work_from_other_folders(finished, starter, tmp_path):
    """A run is resumed and sampled from another folder, and after it was moved with its data."""
    home = tmp_path / "home"
    write_pairs(home / "data")
    for name in ("vae.safetensors", "text_encoder.safetensors", "tokenizer.model"):
        shutil.copy(finished / name, home / "data" / name)
    arguments = [*LOOP, "--weights", "*=1", "--intrinsic_weight", "0", "--steps", "2",
                 "--data", "data/pairs.jsonl", "--vae_path", "data/vae.safetensors",
                 "--t5_path", "data/text_encoder.safetensors",
                 "--tokenizer_path", "data/tokenizer.model", "--out", "runs/one"]
    starter.run(*arguments, cwd=home)
    starter.run("--resume", "--out", "../runs/one", "--steps", "3", cwd=home / "data")
    moved = tmp_path / "moved"
    home.rename(moved)
    starter.run("--resume", "--out", "one", "--steps", "4", cwd=moved / "runs")
    assert [line["step"] for line in metrics(moved / "runs" / "one")] == [1, 2, 3, 4]
    assert not home.exists()
    drawn = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), "--run", "runs/one", "--out", "a.png", WORDS[0]],
        cwd=moved, capture_output=True, text=True, env=ENVIRONMENT)
    assert drawn.returncode == 0, drawn.stderr
    assert Image.open(moved / "a.png").size == (64, 64)
    (moved / "data" / "pairs.jsonl").unlink()
    lost = starter.start("--resume", "--out", "one", "--steps", "5", cwd=moved / "runs")
    assert lost.wait() == 1 and "pairs.jsonl: no such file" in lost.error()
